"""Load: wrk, h2load and grpcio for as-fast-as-possible, our own clients for a constant rate and for counting every
failed request.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.paced import percentile
from bench.process import CHECKOUT, LOAD_NAMES, BenchError, Group, Workspace

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
    """Share of one core that load and origin used together: near 1, the figure is their limit. None: not pinned."""
    mean_us: float | None = None
    """None where the load does not say."""


class Meter:
    """CPU of the proxies and of the load, from when it is made. Read it once the load has ended."""

    __slots__ = ("_load_before", "_loads", "_proxies", "_proxies_before", "_workspace")

    def __init__(self, proxies: Sequence[Group], workspace: Workspace) -> None:
        self._proxies = proxies
        self._workspace = workspace
        self._loads = [group for group in workspace.groups if group.name in LOAD_NAMES]
        self._proxies_before = self._proxies_s()
        self._load_before = self._load_s()

    def cpu_us_per_request(self, requests: int) -> float | None:
        """None for no proxy."""
        if not self._proxies or not requests:
            return None
        return (self._proxies_s() - self._proxies_before) * 1e6 / requests

    def load_busy(self, elapsed_s: float, starting_s: float = 0.0) -> float | None:
        """As in Sample. starting_s: CPU that the load needed before and after elapsed_s."""
        if self._workspace.pinning.name != "split":
            return None
        return (self._load_s() - self._load_before - starting_s) / elapsed_s

    def _proxies_s(self) -> float:
        return sum(group.cpu_s() for group in self._proxies)

    def _load_s(self) -> float:
        return sum(group.cpu_s() for group in self._loads) + _children_cpu_s()


def wrk(target: Target, connections: int, seconds: float, proxies: Sequence[Group], workspace: Workspace) -> Sample:
    """As many requests as `connections` closed-loop connections get through; one wrk thread."""
    if shutil.which("wrk") is None:
        raise BenchError("wrk is not installed (make bench installs it)")
    meter = Meter(proxies, workspace)
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
        cpu_us_per_request=meter.cpu_us_per_request(requests),
        load_busy=meter.load_busy(elapsed_s),
    )


_H2LOAD_FIGURES = {
    "finished": re.compile(r"^finished in [\d.]+[a-z]+, (?P<req_s>[\d.]+) req/s", re.M),
    "requests": re.compile(r"^requests: .* (?P<done>\d+) done, .* (?P<failed>\d+) failed, ", re.M),
    "status codes": re.compile(r"^status codes: \d+ 2xx, (?P<redirected>\d+) 3xx, ", re.M),
    "traffic": re.compile(r"^traffic: .*\((?P<bytes>\d+)\) data$", re.M),
    "time for request": re.compile(
        r"^time for request: +\S+ +(?P<max>[\d.]+)(?P<max_unit>[a-z]+) +(?P<mean>[\d.]+)(?P<mean_unit>[a-z]+) ", re.M
    ),
}
_UNIT_US = {"us": 1.0, "ms": 1e3, "s": 1e6}


def h2load(target: Target, streams: int, seconds: float, proxies: Sequence[Group], workspace: Workspace) -> Sample:
    """As many requests as `streams` at a time on one HTTP/2 connection get through, without TLS and Upgrade."""
    if shutil.which("h2load") is None:
        raise BenchError("h2load is not installed (make bench installs it)")
    log = workspace.path / "h2load.log"
    log.unlink(missing_ok=True)
    meter = Meter(proxies, workspace)
    run = subprocess.run(
        [
            "h2load", "-t1", "-c1", f"-m{streams}", f"-D{int(seconds)}", "--log-file", str(log),
            "-H", f":authority: {target.host}", f"http://{target.address}:{target.port}{target.path}",
        ],
        capture_output=True,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.pinning.load),
    )  # fmt: skip
    figures = h2load_figures(run.stdout)
    if figures is None or not figures["done"]:
        raise BenchError(f"h2load against {target.address}:{target.port} gave no summary: {run.stderr or run.stdout}")
    done = int(figures["done"])
    elapsed_s = done / figures["req_s"]
    took = sorted(float(line.rsplit("\t", 1)[1]) for line in log.read_text().splitlines())
    return Sample(
        req_s=figures["req_s"],
        bytes_s=figures["bytes"] / elapsed_s,
        p50_us=percentile(took, 0.5),
        p99_us=percentile(took, 0.99),
        max_us=figures["max_us"],
        failed=int(figures["failed"] + figures["redirected"]),
        cpu_us_per_request=meter.cpu_us_per_request(done),
        load_busy=meter.load_busy(elapsed_s),
        mean_us=figures["mean_us"],
    )


def h2load_figures(text: str) -> dict[str, float] | None:
    """req_s, done, failed (for any reason), redirected, bytes (of bodies), max_us, mean_us; None: a line is missing."""
    found: dict[str, str] = {}
    for pattern in _H2LOAD_FIGURES.values():
        match = pattern.search(text)
        if match is None:
            return None
        found |= match.groupdict()
    figures = {name: float(value) for name, value in found.items() if value not in _UNIT_US}
    for name in ("max", "mean"):
        figures[f"{name}_us"] = figures.pop(name) * _UNIT_US[found[f"{name}_unit"]]
    return figures


def grpc_calls(
    target: Target, kind: str, concurrency: int, seconds: float, proxies: Sequence[Group], workspace: Workspace
) -> Sample:
    """As many answers as grpcio gets on one connection. kind, concurrency: as in bench.grpc_client."""
    meter = Meter(proxies, workspace)
    run = subprocess.run(
        [sys.executable, "-m", "bench.grpc_client", target.address, str(target.port), target.host, kind,
         str(concurrency), str(seconds)],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.pinning.load),
    )  # fmt: skip
    if run.returncode != 0:
        raise BenchError(f"gRPC client against {target.address}:{target.port} failed: {run.stderr[-500:]}")
    figures = json.loads(run.stdout)
    requests, elapsed_s = figures["requests"], figures["elapsed_s"]
    return Sample(
        req_s=requests / elapsed_s,
        bytes_s=requests * figures["message_bytes"] / elapsed_s,
        p50_us=figures["p50_us"],
        p99_us=figures["p99_us"],
        max_us=figures["max_us"],
        failed=figures["failed"],
        cpu_us_per_request=meter.cpu_us_per_request(requests),
        load_busy=meter.load_busy(elapsed_s, figures["starting_s"]),
        mean_us=figures["mean_us"],
    )


def paced(target: Target, rate: int, seconds: float, proxies: Sequence[Group], workspace: Workspace) -> Sample:
    """`rate` requests a second whatever the answers do; latency counts from the moment a request was due."""
    meter = Meter(proxies, workspace)
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
    requests = figures["requests"]
    return Sample(
        req_s=requests / seconds,
        bytes_s=0.0,
        p50_us=figures["p50_us"],
        p99_us=figures["p99_us"],
        max_us=figures["max_us"],
        failed=figures["failed"],
        cpu_us_per_request=meter.cpu_us_per_request(requests),
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
