"""Programs under test: started pinned, watched, measured and always ended.

A `Group` is one program with everything it forked; a `Workspace` owns the groups, ports and files of one case and
leaves nothing behind, also after an exception or Ctrl-C.
"""

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ORIGIN_NAME = "nginx"
GRPC_ORIGIN_NAME = "grpc origin"
DRIVER_NAME = "envoy driver"
LOAD_NAMES = frozenset({ORIGIN_NAME, GRPC_ORIGIN_NAME, DRIVER_NAME})
"""The groups that ask, or answer what is proxied; their CPU belongs to the load, not to a contender."""

CHECKOUT = Path(__file__).resolve().parent.parent

_CORES = sorted(os.sched_getaffinity(0))
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Pinning:
    """Which cores each kind of program may use; the same for every contender."""

    name: str
    proxies: frozenset[int]
    origin: frozenset[int]
    load: frozenset[int]


_FIRST, _SECOND, _ALL = frozenset(_CORES[:1]), frozenset(_CORES[1:2] or _CORES), frozenset(_CORES)
# split: one core belongs to whatever is measured (a pair of proxies shares it, so its figure is the work of the whole
# pair), the other to load and origin. For throughput: the figure is what one core of proxy can do.
# apart: the load on one core, all that it calls on the other, as a client on another machine. For the latency of one
# request at a time: waking an idle core of a virtual machine takes 30 µs or more, and here every contender, no proxy
# included, pays for it exactly twice a request. Left to the scheduler the baseline alone is 10 or 70 µs, by chance.
# one: everything on one core, no wake-ups at all. free: the scheduler decides.
PINNINGS = {
    "split": Pinning("split", proxies=_FIRST, origin=_SECOND, load=_SECOND),
    "apart": Pinning("apart", proxies=_FIRST, origin=_FIRST, load=_SECOND),
    "one": Pinning("one", proxies=_FIRST, origin=_FIRST, load=_FIRST),
    "free": Pinning("free", proxies=_ALL, origin=_ALL, load=_ALL),
}


class BenchError(Exception):
    """The run cannot go on; the text says why in one sentence."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a whole process group, in MiB. Source: /proc/<pid>/smaps_rollup."""

    pss_mib: float
    """Shared pages divided by the number of processes that map them, also processes outside the group."""
    private_mib: float
    processes: int
    pages_mib: float | None = None
    """Distinct physical pages of the group, each counted once and whole: unlike PSS, other programs of the same
    interpreter on the machine do not make it smaller. None without the right to read page frame numbers (root)."""

    def as_row(self) -> dict[str, float]:
        row = {"pss_mib": self.pss_mib, "private_mib": self.private_mib}
        return row if self.pages_mib is None else {**row, "pages_mib": self.pages_mib}


class Group:
    """One running program and all its descendants."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    def pids(self) -> list[int]:
        """The program and its descendants that are alive now, parents first."""
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                fields = _stat_fields(int(entry))
                if fields is not None:
                    children.setdefault(int(fields[1]), []).append(int(entry))
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop(0)
            if _stat_fields(pid) is not None:
                found.append(pid)
            queue += children.get(pid, [])
        return found

    def cpu_s(self) -> float:
        """CPU seconds used so far by the processes that are alive now."""
        total = 0
        for pid in self.pids():
            fields = _stat_fields(pid)
            if fields is not None:
                total += int(fields[11]) + int(fields[12])
        return total / _CLOCK_TICKS

    def memory(self) -> Memory:
        pss = private = processes = 0
        frames: set[int] | None = set()
        for pid in self.pids():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            processes += 1
            for line in lines:
                name, _, rest = line.partition(":")
                if name == "Pss":
                    pss += int(rest.split()[0])
                elif name in ("Private_Clean", "Private_Dirty"):
                    private += int(rest.split()[0])
            found = _page_frames(pid) if frames is not None else None
            frames = frames | found if frames is not None and found else None
        pages = len(frames) * _PAGE_BYTES / (1 << 20) if frames else None
        return Memory(pss / 1024, private / 1024, processes, pages)

    def tail(self, lines: int = 12) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def stop(self, grace_s: float = 3.0) -> None:
        """SIGTERM, then SIGKILL to whatever of the session is left. Harmless when it has ended already."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


class Workspace:
    """A temporary directory, the ports handed out and the programs started for one case."""

    def __init__(self, pinning: Pinning = PINNINGS["split"]) -> None:
        self.pinning = pinning
        self.path = Path(tempfile.mkdtemp(prefix="meshproxy-bench-"))
        self.groups: list[Group] = []
        self._ports: set[int] = set()

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for group in reversed(self.groups):
            group.stop()
        shutil.rmtree(self.path, ignore_errors=True)

    def port(self) -> int:
        """A free TCP port below the ephemeral range, where no outgoing connection can take it meanwhile."""
        for _ in range(1000):
            port = random.randrange(16000, 32000)
            if port in self._ports:
                continue
            with socket.socket() as probe:
                try:
                    probe.bind(("0.0.0.0", port))
                except OSError:
                    continue
            self._ports.add(port)
            return port
        raise BenchError("no free port between 16000 and 32000")

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def start(
        self, name: str, command: Sequence[str], cores: frozenset[int], env: dict[str, str] | None = None
    ) -> Group:
        log = self.path / f"{name}-{len(self.groups)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=CHECKOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=lambda: _before_exec(cores),  # single-threaded harness: safe, and taskset may be absent
            )
        group = Group(name, process, log)
        self.groups.append(group)
        return group

    def stop(self, group: Group) -> None:
        group.stop()
        self.groups.remove(group)

    def wait_http(
        self, group: Group, port: int, path: str = "/", host: str = "127.0.0.1", timeout_s: float = 20.0
    ) -> None:
        """Until the program answers 200 there; BenchError with its last log lines when it ends or never does."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if group.process.poll() is not None:
                raise BenchError(f"{group.name} ended at start:\n{group.tail()}")
            if http_status(port, path, host) == 200:
                return
            time.sleep(0.02)
        raise BenchError(f"{group.name} not ready after {timeout_s:g} s:\n{group.tail()}")


def http_exchange(
    port: int, path: str, host: str = "127.0.0.1", method: str = "GET", timeout_s: float = 5.0
) -> tuple[int, bytes, bytes]:
    """(status, head, body) of one request on a fresh connection; status 0 when nobody answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
            connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            data = bytearray()
            while chunk := connection.recv(65536):
                data += chunk
    except OSError:
        return 0, b"", b""
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    parts = head.split(b" ", 2)
    return (int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0), head, body


def http_get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    """(status, body) of a GET; (0, b"") when nobody answers."""
    status, _, body = http_exchange(port, path, host)
    return status, body


def http_status(port: int, path: str, host: str = "127.0.0.1") -> int:
    return http_get(port, path, host)[0]


def _before_exec(cores: frozenset[int]) -> None:
    os.sched_setaffinity(0, cores)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # nothing outlives a harness that was killed


def _page_frames(pid: int) -> set[int] | None:
    """Physical page numbers a process has resident now; None where the kernel does not tell."""
    frames: set[int] = set()
    try:
        ranges = []
        with open(f"/proc/{pid}/smaps") as maps:
            start = end = 0
            for line in maps:
                name = line.split(" ", 1)[0]
                if name == "Rss:" and int(line.split()[1]):
                    ranges.append((start, end))
                elif not name.endswith(":"):
                    start, end = (int(part, 16) for part in name.split("-"))
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for start, end in ranges:
                for at in range(start // _PAGE_BYTES, end // _PAGE_BYTES, 65536):
                    pagemap.seek(at * 8)
                    entries = array("Q", pagemap.read(8 * min(65536, end // _PAGE_BYTES - at)))
                    # Bit 63: present; bits 0–54: the frame number, zero without CAP_SYS_ADMIN.
                    frames.update(entry & (1 << 55) - 1 for entry in entries if entry >> 63)
    except OSError:
        return None
    frames.discard(0)
    return frames or None


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat after the command name (state is 0, ppid 1, utime 11, stime 12); None when gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
