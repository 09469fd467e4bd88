"""Two proxies with mTLS between them: outbound of one workload, inbound of another."""

from bench import certificates, envoy, mesh, origin
from bench.case import DIRECT, MESH, Case, Contender, Figure, Load, Outcome, Settings, at_rate, compare, flat_out
from bench.load import Target
from bench.process import Pinning, Workspace
from bench.services import ECHO_HOST, LOCAL_ZONE, Place, Service

ENVOY_H1 = "envoy-pair-h1"
ENVOY_H2 = "envoy-pair-h2"
ENVOY_TCP = "envoy-pair-tcp"
MESH_H3 = "meshproxy-h3"
CLIENT, SERVER = "client", "server"


def _pairs(settings: Settings, workspace: Workspace) -> list[Contender]:
    source = origin.start(workspace)
    issued = certificates.issue(workspace.path / "certs", (CLIENT, SERVER))
    contenders = []
    if settings.wants(DIRECT):
        contenders.append(Contender(DIRECT, Target(source.address, source.port, ECHO_HOST)))
    for name, inside in ((ENVOY_H1, "h1"), (ENVOY_H2, "h2")):
        if settings.wants(name):
            contenders.append(envoy_pair(workspace, source.port, issued, name, inside))
    if settings.wants(MESH):
        contenders.append(mesh_pair(workspace, source.port, issued, "HTTP"))
    return contenders


def envoy_pair(
    workspace: Workspace, origin_port: int, issued: certificates.Certificates, name: str, inside: str
) -> Contender:
    server, inner = envoy.inbound_http(workspace, origin_port, tls=(issued, SERVER))
    client, port = envoy.outbound_http(workspace, [_behind(inner)], tls=(issued, CLIENT, SERVER), inside=inside)
    return Contender(name, Target("127.0.0.1", port, ECHO_HOST), (client, server))


def mesh_pair(
    workspace: Workspace, origin_port: int, issued: certificates.Certificates, protocol: str, inside: str = "h1"
) -> Contender:
    inner, port = workspace.port(), workspace.port()
    server = mesh.start(
        workspace,
        inner,
        mesh.inbound_resources(inner, origin_port, "STRICT", protocol),
        account=SERVER,
        certificates=issued,
        flags=("--http3", "on") if inside == "h3" else (),
    )
    client = mesh.start(
        workspace,
        port,
        mesh.outbound_resources([_behind(inner)], port, protocol=protocol, server_account=SERVER, inside=inside),
        account=CLIENT,
        certificates=issued,
    )
    name = MESH_H3 if inside == "h3" else MESH
    return Contender(name, Target("127.0.0.1", port, ECHO_HOST), (client.group, server.group))


def _behind(port: int) -> Service:
    """The service as the client's proxy sees it: the server's proxy."""
    return Service(ECHO_HOST, (Place("127.0.0.1", port, LOCAL_ZONE),))


def _run(settings: Settings, outcome: Outcome, load: Load, pinning: Pinning) -> None:
    with Workspace(pinning) as workspace:
        compare(outcome, settings, _pairs(settings, workspace), load, workspace)


def pair_c32(settings: Settings, outcome: Outcome) -> None:
    _run(settings, outcome, flat_out(32), settings.pinned("split"))
    outcome.ratio(
        "mTLS pair, 32 connections: req/s over the better Envoy pair", [ENVOY_H1, ENVOY_H2], "req_s", at_least=1.0
    )


def pair_c1(settings: Settings, outcome: Outcome) -> None:
    _run(settings, outcome, flat_out(1), settings.pinned("apart"))
    outcome.added(
        "mTLS pair, 1 connection: added p50 over the better Envoy pair's", [ENVOY_H1, ENVOY_H2], "p50_us", at_most=0.65
    )


def pair_paced(settings: Settings, outcome: Outcome) -> None:
    _run(settings, outcome, at_rate(1000), settings.pinned("apart"))
    for measure in ("added_p50_us", "added_p99_us"):
        value = outcome.median(MESH, measure)
        if value is not None and outcome.median(DIRECT, "p50_us") is not None:
            at_most = 1000.0 if measure == "added_p99_us" else None
            name = f"mTLS pair at 1,000 req/s: {measure.split('_')[1]} added"
            outcome.figures.append(Figure(name, value, "µs", at_most=at_most))


def tcp_pair_c32(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        issued = certificates.issue(workspace.path / "certs", (CLIENT, SERVER))
        contenders = []
        if settings.wants(DIRECT):
            contenders.append(Contender(DIRECT, Target(source.address, source.port, ECHO_HOST)))
        if settings.wants(ENVOY_TCP):
            server, inner = envoy.inbound_tcp(workspace, source.port, tls=(issued, SERVER))
            client, port = envoy.outbound_tcp(workspace, _behind(inner), tls=(issued, CLIENT, SERVER))
            contenders.append(Contender(ENVOY_TCP, Target("127.0.0.1", port, ECHO_HOST), (client, server)))
        if settings.wants(MESH):
            contenders.append(mesh_pair(workspace, source.port, issued, "TCP"))
        compare(outcome, settings, contenders, flat_out(32), workspace)
    outcome.ratio(
        "TCP inside an mTLS pair, 32 connections: req/s over Envoy's pair", [ENVOY_TCP], "req_s", at_least=0.9
    )


def h3_pair(settings: Settings, outcome: Outcome) -> None:
    _h3_beside_h2(settings, outcome, 32)


def h3_pair_c1(settings: Settings, outcome: Outcome) -> None:
    _h3_beside_h2(settings, outcome, 1)
    mine, other = outcome.median(MESH_H3, "p50_us"), outcome.median(MESH, "p50_us")
    if mine is not None and other:
        name = "mTLS pair, 1 connection: p50 with HTTP/3 inside over p50 with HTTP/2"
        outcome.figures.append(Figure(name, mine / other, "×", at_most=2.0))


def _h3_beside_h2(settings: Settings, outcome: Outcome, connections: int) -> None:
    with Workspace(settings.pinned("split" if connections > 1 else "apart")) as workspace:
        source = origin.start(workspace)
        issued = certificates.issue(workspace.path / "certs", (CLIENT, SERVER))
        pairs = {MESH: "h2", MESH_H3: "h3"}
        contenders = [
            mesh_pair(workspace, source.port, issued, "HTTP", inside)
            for name, inside in pairs.items()
            if settings.wants(name)
        ]
        compare(outcome, settings, contenders, flat_out(connections), workspace)


CASES = (
    Case("h3_pair", "HTTP/3 and HTTP/2 inside an mTLS pair, 32 HTTP/1.1 connections in", h3_pair),
    Case("h3_pair_c1", "HTTP/3 and HTTP/2 inside an mTLS pair, 1 HTTP/1.1 connection in: latency", h3_pair_c1),
    Case("mtls_pair_c32", "HTTP/1.1 through two proxies with mTLS between, 32 connections", pair_c32),
    Case("mtls_pair_c1", "HTTP/1.1 through two proxies with mTLS between, 1 connection: latency", pair_c1),
    Case("mtls_pair_paced", "HTTP/1.1 through two proxies with mTLS between, constant 1,000 req/s", pair_paced),
    Case("tcp_mtls_pair_c32", "TCP through two proxies with mTLS between, 32 connections", tcp_pair_c32),
)
