"""gRPC through one proxy: unary calls, and messages of bidirectional streams.

grpcio's client and server cost several times what a proxy does, and both run on the load's core: where that core is
full (see `direct`, and load_busy), req/s says little, and CPU per request tells the proxies apart.
"""

import sys

from bench import envoy, mesh
from bench.case import DIRECT, MESH, Case, Contender, Load, Outcome, Settings, compare
from bench.load import Target, grpc_calls
from bench.process import GRPC_ORIGIN_NAME, Workspace
from bench.services import ECHO_HOST, ORIGIN_ADDRESSES, echo

_CONCURRENCY = 32
_UNARY_THREADS = 4
"""More of them cost more changes of thread, and serve no more calls a second."""
_STREAM_THREADS = _CONCURRENCY + 1


def _calls(kind: str) -> Load:
    return lambda contender, seconds, place: grpc_calls(
        contender.target, kind, _CONCURRENCY, seconds, contender.groups, place
    )


def _contenders(settings: Settings, workspace: Workspace, threads: int) -> list[Contender]:
    origin_port = workspace.port()
    addresses = [address for address, _ in ORIGIN_ADDRESSES]
    command = [sys.executable, "-m", "bench.grpc_server", str(origin_port), str(threads), *addresses]
    workspace.start(GRPC_ORIGIN_NAME, command, workspace.pinning.origin)
    direct = Contender(DIRECT, Target(addresses[0], origin_port, ECHO_HOST))
    grpc_calls(direct.target, "unary", 1, 0.1, (), workspace)  # it waits until the origin serves
    contenders = [direct] if settings.wants(DIRECT) else []
    service = echo(origin_port)
    if settings.wants("envoy"):
        group, port = envoy.outbound_http(workspace, [service], inside="h2")
        contenders.append(Contender("envoy", Target("127.0.0.1", port, ECHO_HOST), (group,)))
    if settings.wants(MESH):
        port = workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources([service], port, protocol="GRPC"))
        contenders.append(Contender(MESH, Target("127.0.0.1", port, ECHO_HOST), (proxy.group,)))
    return contenders


def _run(settings: Settings, outcome: Outcome, kind: str, threads: int, name: str, at_least: float) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        compare(outcome, settings, _contenders(settings, workspace, threads), _calls(kind), workspace)
    outcome.ratio(f"{name} a second over Envoy", ["envoy"], "req_s", at_least=at_least)
    outcome.per_cpu(f"{name} for the same CPU over Envoy", ["envoy"])
    busy, rate = outcome.median(DIRECT, "load_busy"), outcome.median(DIRECT, "req_s")
    if busy and rate:
        outcome.notes.append(f"client and server need {busy * 1e6 / rate:.0f} µs of CPU for each, without a proxy")


def unary(settings: Settings, outcome: Outcome) -> None:
    _run(settings, outcome, "unary", _UNARY_THREADS, "gRPC unary calls", 0.8)


def stream(settings: Settings, outcome: Outcome) -> None:
    _run(settings, outcome, "stream", _STREAM_THREADS, "gRPC messages of bidirectional streams", 0.7)


CASES = (
    Case("grpc_unary", f"gRPC: {_CONCURRENCY} unary calls at a time on one connection", unary),
    Case("grpc_stream", f"gRPC: {_CONCURRENCY} bidirectional streams on one connection, messages echoed", stream),
)
