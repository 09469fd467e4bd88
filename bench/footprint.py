"""Memory: of an idle proxy, and of one with a large mesh and many open connections."""

import time
from collections.abc import Sequence

from bench import envoy, haproxy, mesh, origin
from bench.case import MESH, Case, Contender, Figure, Outcome, Settings, say
from bench.idle import Held
from bench.load import Target
from bench.process import Workspace
from bench.services import ECHO_HOST, Service, echo, many


def _proxies(settings: Settings, workspace: Workspace, services: Sequence[Service]) -> list[Contender]:
    contenders = []
    if settings.wants("envoy"):
        group, port = envoy.outbound_http(workspace, services)
        contenders.append(Contender("envoy", Target("127.0.0.1", port, ECHO_HOST), (group,)))
    if settings.wants("haproxy"):
        group, port = haproxy.outbound(workspace, services, "http")
        contenders.append(Contender("haproxy", Target("127.0.0.1", port, ECHO_HOST), (group,)))
    if settings.wants(MESH):
        port = workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources(services, port))
        contenders.append(Contender(MESH, Target("127.0.0.1", port, ECHO_HOST), (proxy.group,)))
    return contenders


def _measure(outcome: Outcome, contender: Contender) -> None:
    memory = contender.groups[0].memory()
    outcome.rows[contender.name] = {**memory.as_row(), "processes": memory.processes}
    say(
        f"  {outcome.case} {contender.name:<10} PSS {memory.pss_mib:.1f} MiB, private {memory.private_mib:.1f} MiB, "
        f"{memory.processes} processes" + (f", pages {memory.pages_mib:.1f} MiB" if memory.pages_mib else "")
    )


def _budget(outcome: Outcome, name: str, at_most: float) -> None:
    value = outcome.median(MESH, "pss_mib")
    if value is not None:
        outcome.figures.append(Figure(f"{name}: PSS of all processes", value, "MiB", at_most=at_most))
    pages = outcome.median(MESH, "pages_mib")
    if pages is not None:
        outcome.figures.append(Figure(f"{name}: distinct physical pages of all processes", pages, "MiB"))


def idle(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        contenders = _proxies(settings, workspace, [echo(source.port)])
        time.sleep(settings.seconds)
        for contender in contenders:
            _measure(outcome, contender)
    _budget(outcome, "Idle, one worker", 56.0)


def scale(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        services = [echo(source.port), *many(999, 10)]
        for contender in _proxies(settings, workspace, services):
            held = Held(contender.target)
            held.grow(2000)
            time.sleep(settings.seconds)
            _measure(outcome, contender)
            held.close()
    _budget(outcome, "1,000 services, 10,000 endpoints, 2,000 open connections", 110.0)


CASES = (
    Case("idle_memory", "Memory of an idle proxy with one worker", idle),
    Case("scale_memory", "Memory with 1,000 services, 10,000 endpoints and 2,000 open connections", scale),
)
