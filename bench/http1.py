"""HTTP/1.1 in the clear: how many requests, how much latency, how fast large bodies."""

from bench import envoy, haproxy, mesh, origin
from bench.case import DIRECT, MESH, Case, Contender, Outcome, Settings, at_rate, compare, flat_out
from bench.load import Target
from bench.process import Workspace
from bench.services import ECHO_HOST, echo


def _outbound(settings: Settings, workspace: Workspace, path: str = "/") -> list[Contender]:
    """No proxy, Envoy, HAProxy and meshproxy in front of the same four endpoints in two zones."""
    source = origin.start(workspace)
    service = echo(source.port)
    contenders = []
    if settings.wants(DIRECT):
        contenders.append(Contender(DIRECT, Target(source.address, source.port, ECHO_HOST, path)))
    if settings.wants("envoy"):
        group, port = envoy.outbound_http(workspace, [service])
        contenders.append(Contender("envoy", Target("127.0.0.1", port, ECHO_HOST, path), (group,)))
    if settings.wants("haproxy"):
        group, port = haproxy.outbound(workspace, [service], "http")
        contenders.append(Contender("haproxy", Target("127.0.0.1", port, ECHO_HOST, path), (group,)))
    if settings.wants(MESH):
        port = workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources([service], port))
        contenders.append(Contender(MESH, Target("127.0.0.1", port, ECHO_HOST, path), (proxy.group,)))
    return contenders


def outbound_c32(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        compare(outcome, settings, _outbound(settings, workspace), flat_out(32), workspace)
    outcome.ratio("HTTP/1.1 outbound, 32 connections: req/s over Envoy", ["envoy"], "req_s", at_least=1.35)
    outcome.ratio("HTTP/1.1 outbound, 32 connections: req/s over HAProxy", ["haproxy"], "req_s")


def outbound_c1(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("apart")) as workspace:
        compare(outcome, settings, _outbound(settings, workspace), flat_out(1), workspace)
    outcome.added("HTTP/1.1, 1 connection: added p50 over Envoy's added p50", ["envoy"], "p50_us", at_most=0.45)


def outbound_paced(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("apart")) as workspace:
        compare(outcome, settings, _outbound(settings, workspace), at_rate(1000), workspace)
    outcome.added("HTTP/1.1 at 1,000 req/s: added p99 over Envoy's added p99", ["envoy"], "p99_us")


def inbound_c32(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        contenders = []
        if settings.wants(DIRECT):
            contenders.append(Contender(DIRECT, Target(source.address, source.port, ECHO_HOST)))
        if settings.wants("envoy"):
            group, port = envoy.inbound_http(workspace, source.port)
            contenders.append(Contender("envoy", Target("127.0.0.1", port, ECHO_HOST), (group,)))
        if settings.wants(MESH):
            port = workspace.port()
            proxy = mesh.start(workspace, port, mesh.inbound_resources(port, source.port, "DISABLE"))
            contenders.append(Contender(MESH, Target("127.0.0.1", port, ECHO_HOST), (proxy.group,)))
        compare(outcome, settings, contenders, flat_out(32), workspace)
    outcome.ratio("HTTP/1.1 inbound, 32 connections: req/s over Envoy", ["envoy"], "req_s", at_least=1.35)


def body_1m(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        contenders = _outbound(settings, workspace, "/1m")
        compare(outcome, settings, contenders, flat_out(4), workspace)
    outcome.ratio("1 MiB bodies, 4 connections: bytes/s over Envoy", ["envoy"], "bytes_s", at_least=0.5)


CASES = (
    Case("h1_c32", "HTTP/1.1 outbound, 32 connections, small bodies", outbound_c32),
    Case("h1_inbound_c32", "HTTP/1.1 inbound, 32 connections, small bodies", inbound_c32),
    Case("h1_c1", "HTTP/1.1 outbound, 1 connection: latency", outbound_c1),
    Case("h1_paced", "HTTP/1.1 outbound at a constant 1,000 req/s: latency", outbound_paced),
    Case("body_1m", "HTTP/1.1 outbound, 1 MiB responses, 4 connections", body_1m),
)
