"""The supervisor: forks the control process and the workers, replaces what dies, turns signals into orders.

Decides: when a process is started again, when the whole ends. Leaves to others: everything that can fail; it holds
no configuration and serves nothing, so that it outlives the rest. What must survive a process is kept here: a copy of
each listening socket.

It runs no event loop and imports nothing of its own: the pages it freezes before forking are shared by all processes.
"""

import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from meshproxy.control import link, log
from meshproxy.control.link import (
    DrainAll,
    DropSocket,
    KeepLastGood,
    KeepSocket,
    Notify,
    Quit,
    Reload,
    Running,
    WorkerEnded,
    WorkerStarted,
)
from meshproxy.control.settings import Settings
from meshproxy.model.address import SocketAddress

_log = logging.getLogger(__name__)

RunWorker = Callable[[socket.socket, int], None]
"""(link to the supervisor, slot): the worker's main. See control.channel.WorkerChannel."""
RunControl = Callable[[Settings, socket.socket, list[tuple[SocketAddress, int, socket.socket]], int | None], int]
"""(settings, link to the supervisor, sockets kept, memfd of the last good resources or None) → exit status."""

_SHORT_LIFE_S = 1.0
_MAX_PAUSE_S = 10.0
_GRACE_S = 1.0
"""What a process may need beyond the drain's deadline before it is killed."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_M_ARENA_MAX = -8


@dataclass(slots=True)
class _Child:
    """One process that is to run; pid 0 while it does not."""

    name: str
    pid: int = 0
    started_at: float = 0.0
    short_lives: int = 0
    start_at: float = 0.0
    """Monotonic seconds; meaningful while pid is 0."""
    link: socket.socket | None = None
    pending: deque[tuple[object, int | None]] = field(default_factory=deque)

    def ended(self, now: float) -> None:
        """Start again at once, but ever later when it keeps dying right after its start."""
        self.pid = 0
        self.short_lives = self.short_lives + 1 if now - self.started_at < _SHORT_LIFE_S else 0
        self.start_at = now + restart_pause_s(self.short_lives)
        if self.link is not None:
            self.link.close()
            self.link = None
        for _, descriptor in self.pending:
            if descriptor is not None:
                os.close(descriptor)
        self.pending.clear()


def restart_pause_s(short_lives: int) -> float:
    """Seconds before the next start, after so many lives in a row that were shorter than a second."""
    return 0.0 if short_lives <= 1 else min(_MAX_PAUSE_S, 0.1 * 2.0 ** min(short_lives - 2, 16))


class Supervisor:
    def __init__(self, settings: Settings, run_worker: RunWorker, run_control: RunControl) -> None:
        self._settings = settings
        self._run_worker = run_worker
        self._run_control = run_control
        self._control = _Child("control")
        self._workers = [_Child(f"worker-{slot}") for slot in range(settings.workers)]
        self._kept: dict[SocketAddress, dict[int, socket.socket]] = {}
        self._wake_read, self._wake_write = socket.socketpair()
        self._last_good: int | None = None
        self._is_running = False
        self._drain_until: float | None = None
        self._status = 0

    def run(self) -> int:
        """Until told to end; the exit status."""
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        for number in _SIGNALS:
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        _limit_arenas()
        gc.collect()
        gc.freeze()
        try:
            while not self._is_over():
                self._start_due()
                self._wait()
                self._flush()
            return self._status
        finally:
            self._end_all()

    # ── processes ──

    def _start_due(self) -> None:
        if self._drain_until is not None:
            return
        now = monotonic()
        if self._control.pid == 0 and self._control.start_at <= now:
            self._start_control()
        for slot, worker in enumerate(self._workers):
            if worker.pid == 0 and worker.start_at <= now:
                self._start_worker(slot, worker)

    def _start_control(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = [(address, slot, sock) for address, by_slot in self._kept.items() for slot, sock in by_slot.items()]

        def run() -> int:
            ours.close()  # or the end of the supervisor would never be seen on theirs
            self._close_all_but(theirs, *(sock for _, _, sock in kept), keeps_last_good=True)
            return self._run_control(self._settings, theirs, kept, self._last_good)

        self._control.pid = self._fork("control", run)
        self._control.started_at = monotonic()
        theirs.close()
        ours.setblocking(False)
        self._control.link = ours
        for slot, worker in enumerate(self._workers):
            if worker.pid:
                self._connect(slot, worker)

    def _start_worker(self, slot: int, worker: _Child) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def run() -> int:
            ours.close()
            self._close_all_but(theirs)
            log.configure(f"worker-{slot}", self._settings.log_level)
            self._run_worker(theirs, slot)
            return 0

        worker.pid = self._fork(worker.name, run)
        worker.started_at = monotonic()
        theirs.close()
        ours.setblocking(False)
        worker.link = ours
        if self._control.pid:
            self._connect(slot, worker)

    def _connect(self, slot: int, worker: _Child) -> None:
        """Give the worker and the control process the two ends of a stream between them."""
        assert worker.link is not None
        workers_end, controls_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(OSError):  # a worker that is gone is about to be reaped
            socket.send_fds(worker.link, [b"s"], [workers_end.fileno()])
        workers_end.close()
        self._tell_control(WorkerStarted(slot, worker.pid), controls_end.detach())

    def _fork(self, name: str, run: Callable[[], int]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                # A terminal and systemd signal the whole group; the supervisor alone decides what follows.
                signal.signal(number, signal.SIG_IGN)
            _set_process_name(name, parent)
            status = run()
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            _log.critical("%s failed", name, exc_info=True)
        finally:
            sys.stdout.flush()
            os._exit(status)

    def _close_all_but(self, *keep: socket.socket, keeps_last_good: bool = False) -> None:
        """In a child: let go of everything of ours, so that a socket ends when its owner ends."""
        own = [self._wake_read, self._wake_write, self._control.link, *(worker.link for worker in self._workers)]
        own.extend(sock for by_slot in self._kept.values() for sock in by_slot.values())
        for sock in own:
            if sock is not None and sock not in keep:
                sock.close()
        if self._last_good is not None and not keeps_last_good:
            os.close(self._last_good)
        for child in (self._control, *self._workers):
            for _, descriptor in child.pending:
                if descriptor is not None:
                    os.close(descriptor)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._on_exit(pid, _why(status), os.waitstatus_to_exitcode(status))

    def _on_exit(self, pid: int, why: str, code: int) -> None:
        now = monotonic()
        is_expected = self._drain_until is not None
        if pid == self._control.pid:
            self._control.ended(now)
            if not self._is_running and not is_expected:
                # It never came up: its sentence is in the log, and trying again would say the same.
                self._status = code if code > 0 else 1
                self._drain_until = now - _GRACE_S
            elif not is_expected:
                _log.error("control process %d ended (%s); starting another, workers go on", pid, why)
            return
        for slot, worker in enumerate(self._workers):
            if worker.pid == pid:
                worker.ended(now)
                if not is_expected:
                    _log.error("%s (pid %d) ended (%s); starting another", worker.name, pid, why)
                self._tell_control(WorkerEnded(slot, pid, why))
                return

    # ── waiting and signals ──

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        control = self._control.link
        if control is not None:
            poll.register(control, select.POLLIN | (select.POLLOUT if self._control.pending else 0))
        ready = dict(poll.poll(self._timeout_ms()))
        if control is not None and ready.get(control.fileno(), 0) & (select.POLLIN | select.POLLHUP):
            self._read_control()
        if self._wake_read.fileno() in ready:
            numbers = b""
            with contextlib.suppress(BlockingIOError):
                numbers = self._wake_read.recv(256)
            for number in numbers:
                if number in (signal.SIGTERM, signal.SIGINT):
                    self._drain()
                elif number == signal.SIGHUP:
                    self._tell_control(Reload())
            self._reap()

    def _timeout_ms(self) -> int | None:
        """Until the next process is due or the drain's deadline; None: only an event will do."""
        children = (self._control, *self._workers)
        if self._drain_until is not None:
            due = [self._drain_until + _GRACE_S]
        else:
            due = [child.start_at for child in children if child.pid == 0]
        if not due:
            return None
        return max(0, int((min(due) - monotonic()) * 1000) + 1)

    def _drain(self) -> None:
        """First call: finish what is in flight. Second: now."""
        if self._drain_until is not None:
            self._drain_until = 0.0
            return
        deadline_s = self._settings.drain_time_s
        _log.info("draining for at most %.1f s", deadline_s)
        _notify_service_manager("STOPPING=1")
        self._drain_until = monotonic() + deadline_s
        self._tell_control(DrainAll(deadline_s))
        self._drop_all()

    def _is_over(self) -> bool:
        if self._drain_until is None:
            return False
        return not any(worker.pid for worker in self._workers) or monotonic() >= self._drain_until + _GRACE_S

    def _end_all(self) -> None:
        """Kill what is left, control last and gently: it unlinks and says goodbye."""
        for worker in self._workers:
            if worker.pid:
                _kill(worker.pid)
        if self._control.link is not None:
            self._control.link.close()
            self._control.link = None
        deadline = monotonic() + _GRACE_S
        while self._control.pid and monotonic() < deadline:
            select.select([self._wake_read], [], [], 0.1)
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(256)
            self._reap()
        if self._control.pid:
            _kill(self._control.pid)
        for child in (self._control, *self._workers):
            if child.pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, 0)
        self._drop_all()
        signal.set_wakeup_fd(-1)
        self._wake_read.close()
        self._wake_write.close()

    # ── the control process's wishes ──

    def _read_control(self) -> None:
        control = self._control.link
        while control is not None:
            try:
                received = link.receive(control)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                received = None
            if received is None:
                # Its exit follows; without this the closed link would wake us over and over until then.
                control.close()
                self._control.link = None
                return
            self._obey(*received)

    def _obey(self, message: object, descriptor: int | None) -> None:
        if isinstance(message, KeepSocket):
            assert descriptor is not None
            kept = self._kept.setdefault(SocketAddress(message.address, message.port, message.is_udp), {})
            kept[message.slot] = socket.socket(fileno=descriptor)
            if self._drain_until is not None:
                self._drop_all()
        elif isinstance(message, DropSocket):
            for sock in self._kept.pop(SocketAddress(message.address, message.port, message.is_udp), {}).values():
                sock.close()
        elif isinstance(message, KeepLastGood):
            if self._last_good is not None:
                os.close(self._last_good)
            self._last_good = descriptor
        elif isinstance(message, Notify):
            _notify_service_manager(message.state)
        elif isinstance(message, Running):
            self._is_running = True
        elif isinstance(message, Quit) and self._drain_until is None:
            self._drain()

    def _drop_all(self) -> None:
        for address, by_slot in self._kept.items():
            for sock in by_slot.values():
                sock.close()
            if address.is_unix:
                with contextlib.suppress(OSError):
                    os.unlink(address.host)
        self._kept.clear()

    def _tell_control(self, message: object, descriptor: int | None = None) -> None:
        """Never waits: the supervisor must stay able to reap while the control process is stopped or busy."""
        self._control.pending.append((message, descriptor))
        self._flush()

    def _flush(self) -> None:
        control = self._control
        while control.link is not None and control.pending:
            message, descriptor = control.pending[0]
            try:
                link.send(control.link, message, descriptor)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                pass  # it is gone; its replacement is told everything anew
            control.pending.popleft()
            if descriptor is not None:
                os.close(descriptor)


def supervise(settings: Settings, run_worker: RunWorker, run_control: RunControl) -> int:
    """Run until SIGTERM or SIGINT; the exit status. Call it from the main thread, before any other thread exists."""
    log.configure("supervisor", settings.log_level)
    return Supervisor(settings, run_worker, run_control).run()


def _why(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"status {os.WEXITSTATUS(status)}"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _set_process_name(name: str, parent: int) -> None:
    """Name ourselves for ps, and die with the supervisor: an orphan would hold ports nobody manages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, f"mesh-{name}"[:15].encode(), 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _limit_arenas() -> None:
    """One malloc arena per process: the few helper threads do not pay for one of their own."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _notify_service_manager(state: str) -> None:
    """sd_notify(3): one datagram to NOTIFY_SOCKET, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address)
