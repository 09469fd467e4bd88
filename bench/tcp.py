"""TCP in the clear: the same requests, carried as bytes nobody parses."""

from bench import envoy, haproxy, mesh, origin
from bench.case import DIRECT, MESH, Case, Contender, Outcome, Settings, compare, flat_out
from bench.load import Target
from bench.process import Workspace
from bench.services import ECHO_HOST, echo


def tcp_c32(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        service = echo(source.port)
        contenders = []
        if settings.wants(DIRECT):
            contenders.append(Contender(DIRECT, Target(source.address, source.port, ECHO_HOST)))
        if settings.wants("envoy"):
            group, port = envoy.outbound_tcp(workspace, service)
            contenders.append(Contender("envoy", Target("127.0.0.1", port, ECHO_HOST), (group,)))
        if settings.wants("haproxy"):
            group, port = haproxy.outbound(workspace, [service], "tcp")
            contenders.append(Contender("haproxy", Target("127.0.0.1", port, ECHO_HOST), (group,)))
        if settings.wants(MESH):
            port = workspace.port()
            proxy = mesh.start(workspace, port, mesh.outbound_resources([service], port, protocol="TCP"))
            contenders.append(Contender(MESH, Target("127.0.0.1", port, ECHO_HOST), (proxy.group,)))
        compare(outcome, settings, contenders, flat_out(32), workspace)
    outcome.ratio("TCP, 32 connections: req/s over HAProxy", ["haproxy"], "req_s", at_least=0.8)
    outcome.ratio("TCP, 32 connections: req/s over Envoy", ["envoy"], "req_s")


CASES = (Case("tcp_c32", "TCP outbound, 32 connections, small messages", tcp_c32),)
