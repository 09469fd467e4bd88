"""What the control process knows of itself and its workers, as metrics and the admin views show it.

Decides: nothing. Control fills these; telemetry.exposition and admin.views read them.
Source: proc(5) for memory, processor time and descriptors.
"""

import os
from dataclasses import dataclass, field

from meshproxy.snapshot.snapshot import Snapshot

PRE_INITIALIZING = "PRE_INITIALIZING"
INITIALIZING = "INITIALIZING"
LIVE = "LIVE"
DRAINING = "DRAINING"
"""Envoy's words for the server's state."""


@dataclass(slots=True, kw_only=True)
class WorkerInfo:
    """One running worker. Times are wall clock seconds."""

    slot: int
    """Which of the `--workers N` places it has, from 0; stays when the process is replaced."""
    pid: int
    started_at: float
    version: str = ""
    """Snapshot it has applied; empty before the first."""
    apply_stall_s: float = 0.0
    apply_total_s: float = 0.0
    """From its last Applied."""
    is_draining: bool = False
    problems: tuple[str, ...] = ()
    """From its last Applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateInfo:
    """One certificate in use. Times are wall clock seconds. Never holds a key."""

    workload_id: str
    kind: str
    """cert_chain (a workload's own or an intermediate) or ca_cert (a root it trusts)."""
    path: str
    serial_number: str
    """Lower-case hexadecimal."""
    not_before: float
    not_after: float
    uris: tuple[str, ...] = ()
    dns_names: tuple[str, ...] = ()
    subject: str = ""


@dataclass(slots=True)
class ControlCounters:
    """What control itself counts; it adds to them directly."""

    reloads_applied: int = 0
    reloads_rejected: int = 0
    """Reloads with at least one error (the resource's last good version stays)."""
    reload_duration_s: float = 0.0
    """Of the last reload, from the change noticed to the last worker's Applied."""
    published_at: float = 0.0
    """Wall clock seconds when the snapshot in effect was published; 0.0 before the first."""
    worker_restarts: int = 0
    ejections: dict[str, int] = field(default_factory=dict)
    """Cluster name → ejections by outlier detection."""


@dataclass(slots=True, kw_only=True)
class ProcessState:
    """A moment of the control process: all that metrics need besides the workers' counts."""

    now: float
    """Wall clock seconds."""
    state: str
    """PRE_INITIALIZING | INITIALIZING | LIVE | DRAINING."""
    started_at: float
    snapshot: Snapshot
    counters: ControlCounters
    workers: list[WorkerInfo]
    certificates: list[CertificateInfo]
    warnings: int
    errors: int
    """Problems of the configuration by severity."""
    endpoint_health: dict[str, dict[str, str]]
    """Cluster key → endpoint key → ejected | unhealthy; what is not named is healthy."""
    cluster_sizes: dict[str, int]
    """Cluster key → number of endpoints known now, DNS answers included."""
    supervisor_pid: int | None = None

    def processes(self) -> list[tuple[str, int]]:
        """(name, pid) of every process of this proxy: supervisor, control, worker_0, …"""
        named = [("control", os.getpid())]
        if self.supervisor_pid is not None:
            named.insert(0, ("supervisor", self.supervisor_pid))
        return named + [(f"worker_{worker.slot}", worker.pid) for worker in self.workers]


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """What one process uses now. None: the system does not say (another user's process, no smaps_rollup)."""

    resident_bytes: int
    pss_bytes: int | None
    private_bytes: int | None
    cpu_s: float
    open_fds: int | None


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def process_usage(pid: int) -> ProcessUsage | None:
    """None: there is no such process any more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command may hold spaces and parentheses; the fields begin after the last one.
            stat = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    pss, private = _shares(pid)
    try:
        open_fds: int | None = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        open_fds = None
    return ProcessUsage(
        resident_bytes=int(stat[21]) * _PAGE_BYTES,
        pss_bytes=pss,
        private_bytes=private,
        cpu_s=(int(stat[11]) + int(stat[12])) / _TICKS_PER_S,
        open_fds=open_fds,
    )


def _shares(pid: int) -> tuple[int | None, int | None]:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return None, None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(b":") for line in lines[1:])}
    return kib[b"Pss"] * 1024, (kib[b"Private_Clean"] + kib[b"Private_Dirty"]) * 1024
