"""The whole demo under mixed load for a long time, endpoints dying and coming back: does anything grow?

Runs only when asked for by name, for `--minutes`. The stage is the demo's: two proxies with mTLS between them and real
applications. Every ten seconds one endpoint is killed and, a little later, started again.
"""

import asyncio
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.case import Case, Figure, Outcome, Settings, say
from bench.process import BenchError, Group
from meshproxy.demo import client
from meshproxy.demo.files import EDGE_SERVICE, RSU_SERVICE
from meshproxy.demo.stage import Proxy, Stage, StageError

_PERIOD_S = 10.0
_DOWN_S = 3.0
"""Of each period: how long the killed endpoint stays away."""
_FLAPPING = ("edge-1a", "edge-1b", "edge-2a")
_NEW_CONNECTIONS_RATE = 50.0
_SLOPE_AT_MOST_MIB_H = 0.5
_TELLING_MINUTES = 20.0
"""A slope over less says how a proxy warms up, not whether it leaks: it is reported, nothing is asked of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One proxy at one moment. Per process, by the name its process has."""

    at_s: float
    pss_mib: dict[str, float]
    descriptors: dict[str, int]
    connections: int
    """Downstream and upstream, as the proxy counts them."""


def slope_per_hour(points: Sequence[tuple[float, float]]) -> float:
    """Least squares slope of (seconds, value) points, per hour; 0.0 where fewer than two moments differ."""
    if len({at for at, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope * 3600


def last_two_thirds(readings: Sequence[Reading], seconds: float) -> list[Reading]:
    return [reading for reading in readings if reading.at_s >= seconds / 3]


def soak(settings: Settings, outcome: Outcome) -> None:
    try:
        asyncio.run(_soak(settings.minutes * 60, outcome))
    except StageError as error:
        raise BenchError(str(error)) from error


async def _soak(seconds: float, outcome: Outcome) -> None:
    steady = [client.Tally() for _ in range(3)]
    fresh = client.Tally()
    readings: dict[str, list[Reading]] = {}
    async with Stage() as stage:
        (_, first), (_, second) = stage.plan.egress
        port = stage.plan.service_port
        loads = [
            client.load(first, port, EDGE_SERVICE, rate=300, seconds=seconds, tally=steady[0]),
            client.load(second, port, RSU_SERVICE, rate=100, seconds=seconds, tally=steady[1]),
            client.load(second, port, EDGE_SERVICE, rate=100, seconds=seconds, tally=steady[2], connections=4),
        ]
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for load in loads:
                group.create_task(load)
            group.create_task(_new_connections(first, port, seconds, fresh))
            number = 0
            while (next_at := started + (number + 1) * _PERIOD_S) <= started + seconds:
                await _flap(stage, _FLAPPING[number % len(_FLAPPING)], next_at)
                number += 1
                for proxy in stage.proxies:
                    reading = await _read(proxy, time.monotonic() - started)
                    readings.setdefault(proxy.name, []).append(reading)
                _progress(outcome.case, {name: taken[-1] for name, taken in readings.items()}, [*steady, fresh])
        logs = {proxy.name: await _end(proxy) for proxy in stage.proxies}
    _summarise(outcome, readings, [*steady, fresh], logs, seconds)


async def _new_connections(address: str, port: int, seconds: float, tally: client.Tally) -> None:
    """One request on each of _NEW_CONNECTIONS_RATE connections a second, one connection after the other."""
    due = time.monotonic()
    end = due + seconds
    while due < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        try:
            answer = await client.request(address, port, EDGE_SERVICE)
        except OSError:
            tally.statuses[0] += 1
        else:
            tally.statuses[answer.status] += 1
        due = max(due + 1 / _NEW_CONNECTIONS_RATE, time.monotonic() - 1.0)  # no burst longer than a second's worth


async def _flap(stage: Stage, name: str, until: float) -> None:
    """Kill, and start again; returns at the monotonic moment `until`."""
    instance = stage.instance(name)
    stage.kill_application(instance)
    await asyncio.sleep(_DOWN_S)
    stage.start_application(instance)
    await asyncio.sleep(max(0.0, until - time.monotonic()))


async def _read(proxy: Proxy, at_s: float) -> Reading:
    if proxy.process.poll() is not None:
        raise BenchError(f"the proxy of {proxy.name} ended under load:\n{proxy.last_lines()}")
    pss_mib, descriptors = await asyncio.to_thread(_held, proxy)
    text = (await asyncio.to_thread(proxy.get, "metrics", "/stats/prometheus")).decode()
    gauges = ("envoy_listener_downstream_cx_active{", "envoy_cluster_upstream_cx_active{")
    connections = sum(int(float(line.rsplit(" ", 1)[1])) for line in text.splitlines() if line.startswith(gauges))
    return Reading(at_s=at_s, pss_mib=pss_mib, descriptors=descriptors, connections=connections)


def _held(proxy: Proxy) -> tuple[dict[str, float], dict[str, int]]:
    """(PSS in MiB, descriptors) of each process, by name."""
    memory = proxy.memory_mib()
    pss: dict[str, float] = {}
    descriptors: dict[str, int] = {}
    for pid in Group(proxy.name, proxy.process, Path(os.devnull)).pids():
        try:
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            count = len(os.listdir(f"/proc/{pid}/fd"))
            # Only those that the supervisor forked have named themselves.
            name = comm.removeprefix("mesh-") if comm.startswith("mesh-") else "supervisor"
            pss[name] = memory[f"{proxy.name} {pid}"]
        except (OSError, KeyError):
            continue  # it ended meanwhile
        descriptors[name] = count
    return pss, descriptors


async def _end(proxy: Proxy) -> str:
    """The whole log, that of the drain included."""
    proxy.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(proxy.process.wait, 30)
    return proxy.last_lines(1 << 30)


def _progress(case: str, latest: dict[str, Reading], tallies: Sequence[client.Tally]) -> None:
    parts = [f"  {case} {max(reading.at_s for reading in latest.values()):>5.0f} s"]
    for name, reading in latest.items():
        pss = "+".join(f"{value:.1f}" for value in reading.pss_mib.values())
        descriptors = "+".join(map(str, reading.descriptors.values()))
        parts.append(f"{name} {pss} MiB, {descriptors} fds, {reading.connections} cx")
    total, failures = _totals(tallies)
    worst_ms = max(tally.percentile_ms(99) for tally in tallies if tally.latencies_ms)
    parts.append(f"{total:,} requests, failed {_by_status(failures)}, p99 {worst_ms:.0f} ms")
    say("  ".join(parts))
    for tally in tallies:
        tally.latencies_ms.clear()  # half an hour of them is more than anyone reads


def _totals(tallies: Sequence[client.Tally]) -> tuple[int, Counter[int]]:
    """(requests, failed ones by status)."""
    failures: Counter[int] = Counter()
    for tally in tallies:
        failures.update({status: count for status, count in tally.statuses.items() if status != 200})
    return sum(tally.total for tally in tallies), failures


def _by_status(failures: Counter[int]) -> str:
    return ", ".join(f"{status or 'no answer'}: {count}" for status, count in sorted(failures.items())) or "none"


def _summarise(
    outcome: Outcome,
    readings: dict[str, list[Reading]],
    tallies: Sequence[client.Tally],
    logs: dict[str, str],
    seconds: float,
) -> None:
    at_most = _SLOPE_AT_MOST_MIB_H if seconds >= _TELLING_MINUTES * 60 else None
    for proxy, taken in readings.items():
        late = last_two_thirds(taken, seconds)
        for process in taken[-1].pss_mib:
            kept = [reading for reading in taken if process in reading.pss_mib and process in reading.descriptors]
            outcome.rows[f"{proxy} {process}"] = {
                "pss_first_mib": kept[0].pss_mib[process],
                "pss_last_mib": kept[-1].pss_mib[process],
                "pss_mib_per_hour": slope_per_hour(
                    [(reading.at_s, reading.pss_mib[process]) for reading in kept if reading in late]
                ),
                "descriptors_first": kept[0].descriptors[process],
                "descriptors_last": kept[-1].descriptors[process],
            }
        outcome.rounds[proxy] = [
            {
                "at_s": reading.at_s,
                "pss_mib": reading.pss_mib,
                "descriptors": reading.descriptors,
                "connections": reading.connections,
            }
            for reading in taken
        ]
        slope = slope_per_hour([(reading.at_s, sum(reading.pss_mib.values())) for reading in late])
        outcome.figures.append(
            Figure(f"{proxy}: PSS of all processes, slope over the last two thirds", slope, "MiB/h", at_most=at_most)
        )
        first, last = (sum(reading.descriptors.values()) for reading in (taken[0], taken[-1]))
        outcome.notes.append(
            f"{proxy}: descriptors first {first}, last {last}; connections last {taken[-1].connections}"
        )
    total, failures = _totals(tallies)
    outcome.rows["load"] = {
        "requests": total,
        **{f"failed_{status or 'no_answer'}": count for status, count in sorted(failures.items())},
    }
    outcome.notes.append(f"{total:,} requests, failed {_by_status(failures)}")
    outcome.figures.append(Figure("Requests not answered with 200", failures.total() / total * 100, "%"))
    tracebacks = sum(log.count("Traceback") for log in logs.values())
    outcome.figures.append(Figure("Tracebacks in the proxies' logs", tracebacks, "tracebacks", at_most=0.0))
    for proxy, log in logs.items():
        if "Traceback" in log:
            outcome.notes.append(f"{proxy} logged:\n{log[log.index('Traceback') :][:2000]}")


CASES = (
    Case(
        "soak", "Half an hour of mixed load, endpoints flapping: memory, descriptors, failures", soak, by_name_only=True
    ),
)
