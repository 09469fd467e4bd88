"""Requests lost when configuration is reloaded, a worker is killed and the proxy is drained, all under load."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench import mesh, origin
from bench.case import MESH, Case, Figure, Outcome, Settings, say
from bench.change import publish, revised, wait_revision
from bench.load import Target, start_steady
from bench.process import BenchError, Group, Workspace
from bench.services import ECHO_HOST, echo

_RELOADS = 20
_RATE = 2000
_CONNECTIONS = 32


def zero_loss(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        services = [echo(source.port)]
        port, next_port = workspace.port(), workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources(services, port), workers=2)
        targets = [Target("127.0.0.1", port, ECHO_HOST), Target("127.0.0.1", next_port, ECHO_HOST)]
        client = start_steady(workspace, targets, _RATE, _CONNECTIONS)
        time.sleep(1.0)

        reloads_from = time.monotonic()
        for number in range(1, _RELOADS + 1):
            publish(proxy.config, revised(services, port, number))
            wait_revision(port, number)
        say(f"  {outcome.case} {_RELOADS} reloads done")
        time.sleep(0.5)

        victim, held = _busiest_worker(proxy.group, port)
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        say(f"  {outcome.case} killed worker {victim}, which had {held} connections")
        time.sleep(2.0)

        # As an operator does it: the next instance is up, then the old one is told to end.
        mesh.start(workspace, next_port, mesh.outbound_resources(services, next_port), workers=2)
        drained_at = time.monotonic()
        proxy.group.process.send_signal(signal.SIGTERM)
        try:
            proxy.group.process.wait(30)
        except subprocess.TimeoutExpired:
            raise BenchError("meshproxy had not ended 30 s after SIGTERM") from None
        drain_s = time.monotonic() - drained_at
        say(f"  {outcome.case} drained in {drain_s:.1f} s")
        time.sleep(1.0)
        client.process.send_signal(signal.SIGTERM)
        client.process.wait(15)
        report: dict[str, Any] = json.loads((workspace.path / "steady.json").read_text())

    in_flight = by_reload = by_kill = by_drain = other = 0
    for failure in report["failures"]:
        at = failure["at"]
        if at >= drained_at:
            by_drain += 1
        elif at >= killed_at:
            # kill -9 takes what was in flight on the worker's own connections, one request each at most.
            if failure["was_sent"] and at - killed_at < 1.0 and in_flight < held:
                in_flight += 1
            else:
                by_kill += 1
        elif at >= reloads_from:
            by_reload += 1
        else:
            other += 1
        say(f"  {outcome.case} failed: {failure['reason']} at {at - reloads_from:+.2f} s after the first reload")
    outcome.rows[MESH] = {
        "requests": report["requests"],
        "answered": report["answered"],
        "slowest_ms": report["slowest_ms"],
        "failed_reloads": by_reload,
        "failed_kill_in_flight": in_flight,
        "failed_kill_other": by_kill,
        "failed_drain": by_drain,
        "failed_else": other,
        "drain_s": drain_s,
    }
    lost = by_reload + by_kill + by_drain + other
    name = f"Requests failed across {_RELOADS} reloads, a worker kill and a drain, of {report['requests']:,}"
    outcome.figures.append(Figure(name, lost, "requests", at_most=0.0))
    outcome.notes.append(f"{in_flight} requests were in flight in the worker that got SIGKILL and are not counted")


def _busiest_worker(group: Group, port: int) -> tuple[int, int]:
    """(pid, connections) of the process of the group with the most accepted connections on the port."""
    accepted = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "01":
            accepted.add(fields[9])
    counts: dict[int, int] = {}
    for pid in group.pids():
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor.path))
            except FileNotFoundError:
                continue
            if found and found[1] in accepted:
                counts[pid] = counts.get(pid, 0) + 1
    if not counts:
        raise BenchError("no process of meshproxy has accepted a connection")
    victim = max(counts, key=lambda pid: counts[pid])
    return victim, counts[victim]


CASES = (Case("zero_loss", "Failed requests across reloads, a worker kill and a drain under load", zero_loss),)
