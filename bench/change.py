"""Changing configuration under load: how long a worker stands still, how soon new routing is in effect."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench import mesh, origin
from bench.case import MESH, Case, Figure, Outcome, Settings, say
from bench.process import CHECKOUT, BenchError, Workspace, http_exchange
from bench.services import ECHO_HOST, Service, echo, many

_REVISION = "x-bench-revision"


def revised(services: Sequence[Service], port: int, revision: int) -> str:
    """The configuration as text; a large one takes a second to write out, so never while latency is measured."""
    return mesh.render(mesh.outbound_resources(services, port, response_header=(_REVISION, str(revision))))


def publish(config: Path, text: str) -> float:
    """Replaces the watched file in one rename; the monotonic moment of it."""
    fresh = config.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, config)
    return time.monotonic()


def wait_revision(port: int, revision: int, timeout_s: float = 30.0) -> float:
    """The monotonic moment at which a request is first routed by that revision."""
    expected = f"\r\n{_REVISION}: {revision}\r\n".encode()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        _, head, _ = http_exchange(port, "/", ECHO_HOST)
        if expected in head.lower() + b"\r\n":
            return time.monotonic()
        time.sleep(0.001)
    raise BenchError(f"revision {revision} not in effect after {timeout_s:g} s")


# name, services, endpoints of each, whether a route changes with them
_CHURNS = (
    ("4 services of 2,500", 4, 2500, False),
    ("1,000 services of 10", 1000, 10, False),
    ("1,000 services of 10 and a route", 1000, 10, True),
)


def endpoint_churn(settings: Settings, outcome: Outcome) -> None:
    """All addresses of 10,000 endpoints change at once, while 1,000 req/s go to a service that does not change."""
    for name, services, endpoints, has_route in _CHURNS:
        stalls, slowest, effects = [], [], []
        with Workspace(settings.pinned("split")) as workspace:
            source = origin.start(workspace)
            steady = echo(source.port)
            port = workspace.port()
            first = [steady, *many(services, endpoints)]
            proxy = mesh.start(workspace, port, mesh.outbound_resources(first, port, response_header=(_REVISION, "0")))
            for number in range(1, min(settings.rounds, 3) + 1):
                changed = [steady, *many(services, endpoints, (number % 2) * 1_000_000)]
                text = revised(changed, port, number if has_route else 0)
                before = proxy.metric("meshproxy_snapshot_published_timestamp_seconds")
                figures = _probe_during(workspace, port, partial(publish, proxy.config, text))
                if proxy.metric("meshproxy_snapshot_published_timestamp_seconds") == before:
                    raise BenchError("the change was not in effect after 10 s")
                slowest.append(figures["max_us"] / 1000)
                stalls.append((proxy.metric("meshproxy_worker_apply_stall_seconds") or 0.0) * 1000)
                effects.append((proxy.metric("meshproxy_config_reload_duration_seconds") or 0.0) * 1000)
                say(
                    f"  {outcome.case} {number} {name}: in effect after {effects[-1]:.0f} ms, worker stall "
                    f"{stalls[-1]:.2f} ms, slowest request {slowest[-1]:.1f} ms, failed {figures['failed']:.0f}"
                )
        outcome.rows[f"{MESH}, {name}"] = {
            "stall_ms": max(stalls),
            "slowest_request_ms": statistics.median(slowest),
            "in_effect_ms": statistics.median(effects),
        }
        what = f"Replacing 10,000 endpoints ({name})"
        outcome.figures.append(Figure(f"{what}: longest stall of the worker's loop", max(stalls), "ms", at_most=10.0))
        outcome.figures.append(Figure(f"{what}: slowest of 1,000 req/s meanwhile", statistics.median(slowest), "ms"))


def _probe_during(workspace: Workspace, port: int, change: Callable[[], object]) -> dict[str, float]:
    """1,000 req/s for 12 s with the change after the first; the harness itself stays idle meanwhile."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.paced", "127.0.0.1", str(port), ECHO_HOST, "/", "1000", "12", "16"],
        stdout=subprocess.PIPE,
        cwd=CHECKOUT,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.pinning.load),
    ) as prober:
        try:
            time.sleep(1.0)
            change()
            output, _ = prober.communicate(timeout=60)
        finally:
            prober.kill()
    try:
        return dict(json.loads(output))
    except ValueError:
        raise BenchError("the paced client gave no figures") from None


def reload_latency(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        services = [echo(source.port)]
        port = workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources(services, port))
        taken = []
        for number in range(1, 4 * settings.rounds + 1):
            at = publish(proxy.config, revised(services, port, number))
            taken.append((wait_revision(port, number) - at) * 1000)
            time.sleep(0.3)
    outcome.rows[MESH] = {"median_ms": statistics.median(taken), "max_ms": max(taken), "changes": len(taken)}
    say(f"  {outcome.case} {len(taken)} changes: median {statistics.median(taken):.0f} ms, slowest {max(taken):.0f} ms")
    outcome.figures.append(Figure("File change to new routing in effect (slowest)", max(taken), "ms", at_most=300.0))
    outcome.figures.append(Figure("File change to new routing in effect (median)", statistics.median(taken), "ms"))


CASES = (
    Case("endpoint_churn", "Replacing 10,000 endpoints under load: how long the worker stands still", endpoint_churn),
    Case("reload_latency", "From a changed file to new routing in effect, small configuration", reload_latency),
)
