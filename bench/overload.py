"""More load than can be served: is what can be served still served, is the rest turned away at once and politely, do
the proxy's own ports answer meanwhile, and is all well again soon after?

Two limits. A service of known capacity whose DestinationRule says so (connectionPool), offered three times that; and
the proxy's own core, asked by 32 connections and then by 1,000, each as fast as it is answered.
"""

import json
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import mesh, origin
from bench.case import Case, Figure, Outcome, Settings, say
from bench.load import Target, wrk
from bench.offered import Call
from bench.paced import percentile
from bench.process import BenchError, Group, Workspace
from bench.services import ECHO_HOST, LOCAL_ZONE, Place, Service, echo

_CONCURRENCY = 8
_SERVICE_MS = 10
_TIMES_CAPACITY = 3
_OVERLOAD_S = 60
_CALM_S = (3.0, 10.0)
"""Half the capacity is offered for so long before and after the overload."""
_MEASURED_S = 5
_WINDOW_S = 0.25
_SHED_STATUSES = (429, 503)
_GOODPUT_AT_LEAST = 0.8
_RECOVERED_AT_MOST_S = 5.0
_ADMIN_AT_MOST_MS = 100.0
_FEW, _MANY = 32, 1000


def recovered_after_s(calls: Sequence[Call], end_s: float, usual_s: float) -> float:
    """Seconds from end_s (since the start, as in Call) to the end of the last window in which something was not normal.

    Normal: every call due in the window was answered with 200, nine of ten within usual_s.
    """
    windows: dict[int, list[Call]] = {}
    for call in calls:
        if call.due_s >= end_s:
            windows.setdefault(int((call.due_s - end_s) / _WINDOW_S), []).append(call)
    last = -1
    for number, inside in windows.items():
        took = sorted(call.took_s for call in inside)
        if any(call.status != 200 for call in inside) or percentile(took, 0.9) > usual_s:
            last = max(last, number)
    return (last + 1) * _WINDOW_S


def overload(settings: Settings, outcome: Outcome) -> None:
    _limited_service(settings, outcome)
    _limited_proxy(settings, outcome)


def _limited_service(settings: Settings, outcome: Outcome) -> None:
    seconds = settings.own_seconds or _OVERLOAD_S
    with Workspace(settings.pinned("split")) as workspace:
        outcome.pinning = workspace.pinning.name
        origin_port, port = workspace.port(), workspace.port()
        command = [sys.executable, "-m", "bench.limited", str(origin_port), str(_CONCURRENCY), str(_SERVICE_MS)]
        limited = workspace.start("limited origin", command, workspace.pinning.origin)
        workspace.wait_http(limited, origin_port)
        proxy = mesh.start(workspace, port, _resources(origin_port, port))
        target = Target("127.0.0.1", port, ECHO_HOST)
        measured = wrk(target, _CONCURRENCY * 3 // 2, _MEASURED_S, (proxy.group,), workspace)
        if measured.failed:
            raise BenchError(f"{measured.failed} requests failed before any overload")
        maximum = measured.req_s
        say(f"  {outcome.case} service: at most {maximum:.0f} req/s; {_TIMES_CAPACITY} times that for {seconds} s")
        phases = ((maximum / 2, _CALM_S[0]), (maximum * _TIMES_CAPACITY, seconds), (maximum / 2, _CALM_S[1]))
        probe = _start_probe(workspace, proxy)
        calls = _offer(workspace, target, phases)
        asked = _end_probe(workspace, probe)
    start_s, end_s = _CALM_S[0], _CALM_S[0] + seconds
    before = sorted(call.took_s for call in calls if call.due_s < start_s)
    during = [call for call in calls if start_s <= call.due_s < end_s]
    statuses = Counter(call.status for call in during)
    shed = [call for call in during if call.status in _SHED_STATUSES]
    served = sorted(call.took_s for call in during if call.status == 200)
    broken = len(during) - len(shed) - len(served)
    usual_s = percentile(before, 0.99)
    recovered_s = recovered_after_s(calls, end_s, 2 * usual_s)
    shed_s = sorted(call.took_s for call in shed)
    outcome.rows["service"] = {
        "maximum_req_s": maximum,
        "offered_req_s": len(during) / seconds,
        "served_req_s": len(served) / seconds,
        **{f"status_{status or 'none'}": count for status, count in sorted(statuses.items())},
        "before_p99_ms": usual_s * 1000,
        "served_p50_ms": percentile(served, 0.5) * 1000,
        "served_p99_ms": percentile(served, 0.99) * 1000,
        "shed_p50_ms": percentile(shed_s, 0.5) * 1000,
        "shed_p99_ms": percentile(shed_s, 0.99) * 1000,
        "recovered_s": recovered_s,
        **asked,
    }
    figures = outcome.figures
    name = f"{_TIMES_CAPACITY} times a service's capacity"
    goodput = len(served) / seconds / maximum
    figures.append(Figure(f"{name}: goodput over its maximum", goodput, "×", at_least=_GOODPUT_AT_LEAST))
    figures.append(Figure(f"{name}: share shed with 429 or 503", 100 * len(shed) / len(during), "%"))
    figures.append(Figure(f"{name}: requests that got neither 200 nor that", broken, "requests", at_most=0.0))
    if shed:
        polite = 100 * sum(call.says_when for call in shed) / len(shed)
        figures.append(Figure(f"{name}: shed answers with retry-after", polite, "%", at_least=100.0))
    figures.append(Figure(f"{name}: until all is normal again", recovered_s, "s", at_most=_RECOVERED_AT_MOST_S))
    _admin_figures(outcome, name, asked)


def _limited_proxy(settings: Settings, outcome: Outcome) -> None:
    rates: dict[int, list[float]] = {_FEW: [], _MANY: []}
    failed = 0
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        port = workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources([echo(source.port)], port))
        target = Target("127.0.0.1", port, ECHO_HOST)
        wrk(target, _FEW, 1, (proxy.group,), workspace)
        probe = _start_probe(workspace, proxy)
        for number in range(1, settings.rounds + 1):
            for connections, measured in rates.items():
                sample = wrk(target, connections, settings.seconds, (proxy.group,), workspace)
                measured.append(sample.req_s)
                failed += sample.failed
                say(
                    f"  {outcome.case} proxy {number}/{settings.rounds} {connections:>5} connections "
                    f"{sample.req_s:.0f} req/s  p99 {sample.p99_us / 1000:.1f} ms"
                    + (f"  failed {sample.failed}" if sample.failed else "")
                )
        asked = _end_probe(workspace, probe)
    medians = {connections: statistics.median(measured) for connections, measured in rates.items()}
    outcome.rows["proxy"] = {
        **{f"req_s_{connections}": median for connections, median in medians.items()},
        "failed": failed,
        **asked,
    }
    name = f"{_MANY:,} connections as fast as the proxy answers"
    ratio = medians[_MANY] / medians[_FEW]
    outcome.figures.append(Figure(f"{name}: goodput over {_FEW}'s", ratio, "×", at_least=_GOODPUT_AT_LEAST))
    outcome.figures.append(Figure(f"{name}: requests failed", failed, "requests"))
    _admin_figures(outcome, name, asked)


def _admin_figures(outcome: Outcome, name: str, asked: dict[str, Any]) -> None:
    for what, key in (("/ready", "slowest_ready_ms"), ("/stats/prometheus", "slowest_metrics_ms")):
        outcome.figures.append(Figure(f"{name}: slowest {what}", asked[key], "ms", at_most=_ADMIN_AT_MOST_MS))
    if asked["failed"]:
        outcome.notes.append(f"{name}: {asked['failed']} of {asked['asked']} questions to the proxy's own ports failed")


def _resources(origin_port: int, port: int) -> list[dict[str, Any]]:
    """One service; as many requests at a time as it can work on, as many waiting, and no more."""
    service = Service(ECHO_HOST, (Place("127.0.0.1", origin_port, LOCAL_ZONE),))
    resources = mesh.outbound_resources([service], port)
    for resource in resources:
        if resource["kind"] == "DestinationRule":
            resource["spec"]["trafficPolicy"]["connectionPool"] = {
                "tcp": {"maxConnections": _CONCURRENCY},
                "http": {"http1MaxPendingRequests": _CONCURRENCY, "http2MaxRequests": 2 * _CONCURRENCY},
            }
    return resources


def _offer(workspace: Workspace, target: Target, phases: Sequence[tuple[float, float]]) -> list[Call]:
    report = workspace.path / "offered.json"
    command = [sys.executable, "-m", "bench.offered", target.address, str(target.port), target.host, str(report)]
    command += [f"{rate}:{seconds}" for rate, seconds in phases]
    client = workspace.start("offering client", command, workspace.pinning.load)
    if client.process.wait(sum(seconds for _, seconds in phases) + 60) != 0:
        raise BenchError(f"the offering client failed:\n{client.tail()}")
    return [Call(*fields) for fields in json.loads(report.read_text())]


def _start_probe(workspace: Workspace, proxy: mesh.Mesh) -> tuple[Group, Path]:
    report = workspace.path / "probe.json"
    command = [sys.executable, "-m", "bench.probe", str(proxy.admin_port), str(proxy.metrics_port), str(report)]
    return workspace.start("probe", command, workspace.pinning.load), report


def _end_probe(workspace: Workspace, probe: tuple[Group, Path]) -> dict[str, Any]:
    group, report = probe
    group.process.send_signal(signal.SIGTERM)
    group.process.wait(15)
    workspace.stop(group)
    asked: dict[str, Any] = json.loads(report.read_text())
    return asked


CASES = (
    Case("overload", "Three times what a service can serve, and more than the proxy can: what is served", overload),
)
