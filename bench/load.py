"""Load: wrk for as-fast-as-possible, our own clients for a constant rate and for counting every failed request."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.process import CHECKOUT, ORIGIN_NAME, BenchError, Group, Workspace

_PACED_CONNECTIONS = 16
_SCRIPT = Path(__file__).with_name("summary.lua")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a contender is loaded. host: the Host header, which routes by virtual host."""

    address: str
    port: int
    host: str
    path: str = "/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One round of one contender."""

    req_s: float
    bytes_s: float
    p50_us: float
    p99_us: float
    max_us: float
    failed: int
    cpu_us_per_request: float | None = None
    """CPU of all proxy processes divided by requests; None for no proxy."""
    load_busy: float | None = None
    """Share of one core that wrk and the origin used together: near 1, the figure is their limit. None: not pinned."""


def wrk(target: Target, connections: int, seconds: float, proxies: Sequence[Group], workspace: Workspace) -> Sample:
    """As many requests as `connections` closed-loop connections get through; one wrk thread."""
    if shutil.which("wrk") is None:
        raise BenchError("wrk is not installed (make bench installs it)")
    cpu_before = sum(group.cpu_s() for group in proxies)
    origins = [group for group in workspace.groups if group.name == ORIGIN_NAME]
    load_before = sum(group.cpu_s() for group in origins) + _children_cpu_s()
    run = subprocess.run(
        [
            "wrk", "-t1", f"-c{connections}", f"-d{int(seconds)}s", "--timeout", "10s", "-s", str(_SCRIPT),
            "-H", f"Host: {target.host}", f"http://{target.address}:{target.port}{target.path}",
        ],
        capture_output=True,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.pinning.load),
    )  # fmt: skip
    load = sum(group.cpu_s() for group in origins) + _children_cpu_s() - load_before
    cpu = sum(group.cpu_s() for group in proxies) - cpu_before
    summary = next((line[1:] for line in run.stdout.splitlines() if line.startswith("@{")), None)
    if summary is None:
        raise BenchError(f"wrk against {target.address}:{target.port} gave no summary: {run.stderr or run.stdout}")
    figures = json.loads(summary)
    elapsed_s = figures["duration_us"] / 1e6
    requests = figures["requests"]
    return Sample(
        req_s=requests / elapsed_s,
        bytes_s=figures["bytes"] / elapsed_s,
        p50_us=figures["p50_us"],
        p99_us=figures["p99_us"],
        max_us=figures["max_us"],
        failed=figures["errors"] + figures["statuses"],
        cpu_us_per_request=cpu * 1e6 / requests if proxies and requests else None,
        load_busy=load / elapsed_s if workspace.pinning.name == "split" else None,
    )


def paced(target: Target, rate: int, seconds: float, proxies: Sequence[Group], workspace: Workspace) -> Sample:
    """`rate` requests a second whatever the answers do; latency counts from the moment a request was due."""
    cpu_before = sum(group.cpu_s() for group in proxies)
    run = subprocess.run(
        [sys.executable, "-m", "bench.paced", target.address, str(target.port), target.host, target.path,
         str(rate), str(seconds), str(_PACED_CONNECTIONS)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.pinning.load),
    )  # fmt: skip
    if run.returncode != 0:
        raise BenchError(f"paced client against {target.address}:{target.port} failed: {run.stderr[-500:]}")
    figures = json.loads(run.stdout)
    cpu = sum(group.cpu_s() for group in proxies) - cpu_before
    requests = figures["requests"]
    return Sample(
        req_s=requests / seconds,
        bytes_s=0.0,
        p50_us=figures["p50_us"],
        p99_us=figures["p99_us"],
        max_us=figures["max_us"],
        failed=figures["failed"],
        cpu_us_per_request=cpu * 1e6 / requests if proxies and requests else None,
    )


def start_steady(workspace: Workspace, targets: Sequence[Target], rate: int, connections: int) -> Group:
    """A client in the background that accounts for every request; end it with SIGTERM, then `steady_report`."""
    addresses = ",".join(f"{target.address}:{target.port}" for target in targets)
    report = workspace.path / "steady.json"
    return workspace.start(
        "steady client",
        [sys.executable, "-m", "bench.steady", addresses, targets[0].host, targets[0].path, str(rate),
         str(connections), str(report)],
        workspace.pinning.load,
    )  # fmt: skip


def _children_cpu_s() -> float:
    """CPU seconds of all children that have ended: wrk's, when taken before and after one run of it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
