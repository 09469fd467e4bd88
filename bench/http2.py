"""HTTP/2: how many requests and how much latency with one connection in, and with one connection between a pair."""

from bench import certificates, envoy, mesh, origin
from bench.case import DIRECT, MESH, Case, Contender, Load, Outcome, Settings, compare, flat_out
from bench.load import Target, h2load
from bench.pairs import CLIENT, ENVOY_H2, SERVER, envoy_pair, mesh_pair
from bench.process import Workspace
from bench.services import ECHO_HOST, echo


def one_connection(streams: int) -> Load:
    """As many requests as that many streams at a time on one connection get through."""
    return lambda contender, seconds, place: h2load(contender.target, streams, seconds, contender.groups, place)


def _outbound(settings: Settings, workspace: Workspace) -> list[Contender]:
    """No proxy, where the origin itself speaks HTTP/2, and Envoy and meshproxy in front of its HTTP/1.1."""
    source = origin.start(workspace)
    service = echo(source.port)
    contenders = []
    if settings.wants(DIRECT):
        contenders.append(Contender(DIRECT, Target(source.address, source.http2_port, ECHO_HOST)))
    if settings.wants("envoy"):
        group, port = envoy.outbound_http(workspace, [service])
        contenders.append(Contender("envoy", Target("127.0.0.1", port, ECHO_HOST), (group,)))
    if settings.wants(MESH):
        port = workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources([service], port))
        contenders.append(Contender(MESH, Target("127.0.0.1", port, ECHO_HOST), (proxy.group,)))
    return contenders


def m32(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        compare(outcome, settings, _outbound(settings, workspace), one_connection(32), workspace)
    outcome.ratio("HTTP/2 in, 32 streams: req/s over Envoy", ["envoy"], "req_s", at_least=1.3)
    outcome.per_cpu("HTTP/2 in, 32 streams: requests for the same CPU over Envoy", ["envoy"])


def m1(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("apart")) as workspace:
        compare(outcome, settings, _outbound(settings, workspace), one_connection(1), workspace)
    name = "HTTP/2 in, 1 stream: added {0} over Envoy's added {0}"
    outcome.added(name.format("mean"), ["envoy"], "mean_us", at_most=0.6)
    outcome.added(name.format("p50"), ["envoy"], "p50_us")


def _pairs(settings: Settings, outcome: Outcome, load: Load, is_http2_in: bool) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        issued = certificates.issue(workspace.path / "certs", (CLIENT, SERVER))
        contenders = []
        if settings.wants(DIRECT):
            port = source.http2_port if is_http2_in else source.port
            contenders.append(Contender(DIRECT, Target(source.address, port, ECHO_HOST)))
        if settings.wants(ENVOY_H2):
            contenders.append(envoy_pair(workspace, source.port, issued, ENVOY_H2, "h2"))
        if settings.wants(MESH):
            contenders.append(mesh_pair(workspace, source.port, issued, "HTTP", "h2"))
        compare(outcome, settings, contenders, load, workspace)


def pair_c32(settings: Settings, outcome: Outcome) -> None:
    _pairs(settings, outcome, flat_out(32), is_http2_in=False)
    name = "HTTP/2 inside an mTLS pair, 32 HTTP/1.1 connections in"
    outcome.ratio(f"{name}: req/s over Envoy's pair", [ENVOY_H2], "req_s", at_least=1.0)
    outcome.per_cpu(f"{name}: requests for the same CPU over Envoy's pair", [ENVOY_H2])


def pair_m32(settings: Settings, outcome: Outcome) -> None:
    _pairs(settings, outcome, one_connection(32), is_http2_in=True)
    name = "HTTP/2 inside an mTLS pair, 32 HTTP/2 streams in"
    outcome.ratio(f"{name}: req/s over Envoy's pair", [ENVOY_H2], "req_s", at_least=1.0)
    outcome.per_cpu(f"{name}: requests for the same CPU over Envoy's pair", [ENVOY_H2])


CASES = (
    Case("h2_m32", "HTTP/2 in on one connection, 32 streams at a time, HTTP/1.1 out", m32),
    Case("h2_m1", "HTTP/2 in on one connection, one stream at a time, HTTP/1.1 out: latency", m1),
    Case("h2_pair", "HTTP/2 inside an mTLS pair, 32 HTTP/1.1 connections in", pair_c32),
    Case("h2_pair_m32", "HTTP/2 inside an mTLS pair, HTTP/2 in on one connection, 32 streams at a time", pair_m32),
)
