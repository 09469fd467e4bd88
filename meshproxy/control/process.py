"""The control process: reads configuration, compiles it, feeds the workers, judges health, answers the operator.

Decides: the order of starting and stopping, and what the admin interface may ask for.
Leaves to others: each job (the modules of control and discovery), forking (worker.supervisor), the data path.
"""

import asyncio
import ctypes
import gc
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.control import link as supervisor_link
from meshproxy.control import log
from meshproxy.control.fleet import Fleet, WorkerHandle
from meshproxy.control.health import EndpointHealth
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
from meshproxy.control.memory import STEP_BYTES, anonymous_bytes, limit_bytes, share_bytes
from meshproxy.control.messages import Drain, MemoryShare, SetLogLevel
from meshproxy.control.publisher import Publisher
from meshproxy.control.settings import Settings
from meshproxy.control.sockets import ListeningSockets, bind_one, why
from meshproxy.control.store import ResourceStore
from meshproxy.discovery.dns import DnsResolver
from meshproxy.discovery.files import FilesProvider
from meshproxy.errors import ConfigError
from meshproxy.model.address import SocketAddress
from meshproxy.model.endpoint import LocalityEndpoints
from meshproxy.resources.problems import ConfigProblem, Severity
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.snapshot.translate import ProxyContext
from meshproxy.telemetry.process_state import DRAINING, INITIALIZING, LIVE, ControlCounters, ProcessState, WorkerInfo

if TYPE_CHECKING:
    from meshproxy.control.identities import Identities

_log = logging.getLogger(__name__)

Adopted = tuple[SocketAddress, int, socket.socket]


class Served(Protocol):
    async def close(self) -> None: ...


ServeAdmin = Callable[["Control", Mapping[str, socket.socket]], Awaitable[Served]]
"""Starts answering on the bound sockets (admin, metrics, ready)."""

_TIDY_AFTER_S = 1.0
_SHARE_EVERY_S = 1.0
_DNS_PATIENCE_S = 2.0
"""How long a snapshot waits for the first answer to names that are new in it."""
_QUEUE_S = 0.05
"""How long workers accept what is under way before they are told to drain: a few round trips of a LAN."""
_OWN_SLOT = -1
"""Marks a kept socket as the control process's own; its name stands in the address."""


class Control:
    """What admin and metrics may see and do. One per process."""

    def __init__(
        self,
        settings: Settings,
        link: socket.socket,
        adopted: Iterable[Adopted],
        last_good: int | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.settings = settings
        self.started_at = time.time()
        """Wall clock, for display."""
        self._loop = loop
        self._link = link
        adopted = list(adopted)
        self._is_replacement = bool(adopted)
        self._own_adopted = {address.host: sock for address, slot, sock in adopted if slot == _OWN_SLOT}
        self.is_draining = False
        self._is_announced = False
        self._first_failure: str | None = None
        self.counters = ControlCounters()
        self.log_level = settings.log_level
        self.sockets = ListeningSockets(
            settings.workers, self._keep_socket, self._drop_socket, [item for item in adopted if item[1] != _OWN_SLOT]
        )
        self.fleet = Fleet(self.sockets, loop)
        self.fleet.on_applied = self._on_applied
        self.store = ResourceStore(lambda: self.publisher.changed())
        self.publisher = Publisher(
            self.store,
            ProxyContext(
                locality=settings.locality,
                default_namespace=settings.namespace,
                service_account=settings.service_account,
                labels=settings.labels,
                trust_domain=settings.trust_domain,
                root_namespace=settings.root_namespace,
                access_log=settings.access_log,
                idle_timeout_s=settings.idle_timeout_s or None,
                has_http3=settings.has_http3,
            ),
            self.sockets,
            self.fleet,
            self.counters,
            self._on_publishing,
            self._on_published,
        )
        self._dns = DnsResolver(self._on_resolved)
        self._health = EndpointHealth(self.fleet.broadcast, self.fleet.localities_of, self._loop)
        self._health.ejections = self.counters.ejections
        self.fleet.health_now = self._health.now
        self.fleet.on_results = self._health.on_results
        self.fleet.on_counts = self._health.on_counts
        self._identities: Identities | None = None
        if last_good is not None:
            self.store.restore(_contents(last_good))
        self._files = FilesProvider(settings.config_paths, settings.namespace, self.store.sources())
        if not self._is_replacement:
            self.publisher.on_failed_start = self._fail
        self._memory_limit = limit_bytes(settings)
        self._memory_share: int | None = None
        self._tidy: asyncio.TimerHandle | None = None
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    # ── for the admin interface ──

    @property
    def snapshot(self) -> Snapshot:
        return self.publisher.snapshot

    @property
    def problems(self) -> list[ConfigProblem]:
        """Of the configuration first, then of what it asks for and this host does not give."""
        sentences = list(self.publisher.bind_failures.values())
        if self._identities is not None:
            sentences.extend(self._identities.problems)
        return [
            *self.publisher.problems,
            *(ConfigProblem(Severity.ERROR, "", 0, "", "", sentence, "") for sentence in sentences),
        ]

    @property
    def is_ready(self) -> bool:
        """Every worker routes by a snapshot, and nothing is being drained."""
        return self._is_announced and not self.is_draining and bool(self.fleet.workers)

    def state(self) -> ProcessState:
        """This moment, for /metrics and the admin views."""
        problems = self.problems
        warnings = sum(problem.severity is Severity.WARNING for problem in problems)
        return ProcessState(
            now=time.time(),
            state=DRAINING if self.is_draining else LIVE if self.is_ready else INITIALIZING,
            started_at=self.started_at,
            snapshot=self.snapshot,
            counters=self.counters,
            workers=[self._worker_info(worker) for _, worker in sorted(self.fleet.workers.items())],
            certificates=self._identities.describe() if self._identities is not None else [],
            warnings=warnings,
            errors=len(problems) - warnings,
            endpoint_health=self._health.by_cluster(),
            cluster_sizes={
                key: sum(len(group.endpoints) for group in self.fleet.localities_of(cluster))
                for key, cluster in self.snapshot.clusters.items()
            },
            supervisor_pid=os.getppid(),
        )

    def _worker_info(self, worker: WorkerHandle) -> WorkerInfo:
        info = WorkerInfo(slot=worker.slot, pid=worker.pid, started_at=worker.started_at, is_draining=self.is_draining)
        if worker.applied is not None:
            info.version = worker.applied.version
            info.apply_stall_s = worker.applied.stall_s
            info.apply_total_s = worker.applied.total_s
            info.problems = worker.applied.problems
        return info

    async def ask_workers(self, what: str) -> list[Any]:
        """One answer per worker that answers within a second."""
        return await self.fleet.ask(what)

    def drain(self) -> None:
        """POST /drain_listeners: accept no more, let what is in flight end; the process stays."""
        self._stop_listening(self.settings.drain_time_s, exits=False)

    def quit(self) -> None:
        """POST /quitquitquit: the same as SIGTERM to the supervisor."""
        self._tell_supervisor(Quit())

    def reload(self) -> None:
        """SIGHUP: read everything again."""
        self._tell_supervisor(Notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"))
        self._files.reload()
        self._loop.call_later(0.5, self._tell_supervisor, Notify("READY=1"))

    def set_log_level(self, level: str) -> None:
        """ValueError where level is none of log.LEVELS."""
        if level not in log.LEVELS:
            raise ValueError(f"log level {level!r} is none of {', '.join(log.LEVELS)}")
        self.log_level = level
        logging.getLogger().setLevel(level.upper())
        self.fleet.broadcast(SetLogLevel(level))

    # ── the process's life ──

    async def run(self, serve_admin: ServeAdmin) -> int:
        """Exit status. ConfigError where the process cannot start."""
        own_sockets = self._bind_own()
        if self.settings.certificates_dir is not None:
            # Here and not above: cryptography costs 15 MB, and a proxy without mTLS does not pay for it.
            from meshproxy.control.identities import Identities

            self._identities = Identities(self.settings.certificates_dir, self.fleet.put_certificates, self._loop)
        self._loop.add_reader(self._link.fileno(), self._on_link)
        server = await serve_admin(self, own_sockets)
        self._write_ports(own_sockets)
        self._start(self._files.run(self.store))
        self._start(self.publisher.run())
        if self._memory_limit is not None:
            _log.info("memory limit: %d MiB for all processes", self._memory_limit >> 20)
            self._start(self._share_memory(self._memory_limit))
        watchdog_us = os.environ.get("WATCHDOG_USEC", "")
        if watchdog_us.isdigit() and int(watchdog_us) > 0:
            self._start(self._feed_watchdog(int(watchdog_us) / 2e6))
        await self._stopped.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.fleet.close()
        self._dns.close()
        self._health.close()
        if self._identities is not None:
            self._identities.close()
        self._loop.remove_reader(self._link.fileno())
        await server.close()
        for sock in own_sockets.values():
            sock.close()
        if self._first_failure is not None:
            raise ConfigError(self._first_failure)
        return 0

    def _start(self, job: Any) -> None:
        task = self._loop.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.critical("a job of the control process failed", exc_info=task.exception())
            # A new control process takes over with the same sockets; the workers do not notice.
            os._exit(1)

    def _bind_own(self) -> dict[str, socket.socket]:
        bound: dict[str, socket.socket] = {}
        for name in ("admin", "metrics", "ready"):
            if name in self._own_adopted:
                bound[name] = self._own_adopted[name]
                continue
            address: SocketAddress = getattr(self.settings, name)
            try:
                bound[name] = bind_one(address)
            except OSError as error:
                for sock in bound.values():
                    sock.close()
                raise ConfigError(f"{name} {address}: cannot bind: {why(error)}") from error
            host, port = bound[name].getsockname()[:2]
            _log.info("%s listens on %s", name, SocketAddress(host, port))
            self._keep_socket(SocketAddress(name, 0), _OWN_SLOT, bound[name])
        return bound

    def _write_ports(self, own_sockets: Mapping[str, socket.socket]) -> None:
        path = self.settings.ports_file
        if path is None:
            return
        ports = {name: sock.getsockname()[1] for name, sock in own_sockets.items()}
        # Renamed into place: who waits for the file never reads half of it.
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(ports, file)
        os.replace(f"{path}.new", path)

    def _on_link(self) -> None:
        try:
            received = supervisor_link.receive(self._link)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            received = None
        if received is None:
            self._stopped.set()
            return
        message, descriptor = received
        if isinstance(message, WorkerStarted):
            assert descriptor is not None
            self.fleet.attach(message.slot, message.pid, socket.socket(fileno=descriptor))
            if self._memory_share is not None:
                self.fleet.broadcast(MemoryShare(self._memory_share))
            if self.log_level != self.settings.log_level:
                self.fleet.broadcast(SetLogLevel(self.log_level))
        elif isinstance(message, WorkerEnded):
            if not self.is_draining:
                self.counters.worker_restarts += 1
            worker = self.fleet.workers.get(message.slot)
            if worker is not None and worker.pid == message.pid:
                self.fleet.detach(message.slot)
        elif isinstance(message, Reload):
            self.reload()
        elif isinstance(message, DrainAll):
            self._stop_listening(message.deadline_s, exits=True)

    def _stop_listening(self, deadline_s: float, *, exits: bool) -> None:
        self.is_draining = True
        self.publisher.stop()
        self.sockets.refuse_new()
        self._loop.call_later(_QUEUE_S, self._drain_workers, Drain(deadline_s, exits))

    def _drain_workers(self, order: Drain) -> None:
        self.fleet.broadcast(order)
        self.sockets.close_all()

    def _fail(self, sentence: str) -> None:
        self._first_failure = sentence
        self._stopped.set()

    async def _on_publishing(self, snapshot: Snapshot) -> None:
        self._dns.follow(snapshot.clusters.values())
        await self._dns.settled(_DNS_PATIENCE_S)
        if self._identities is not None:
            self._identities.follow(snapshot.workloads.values())
            self.fleet.forget_certificates(self.snapshot.workloads.keys() - snapshot.workloads.keys())

    def _on_resolved(self, cluster_key: str, localities: tuple[LocalityEndpoints, ...]) -> None:
        self.fleet.resolve(cluster_key, localities)
        self._health.resolved(cluster_key)

    def _on_published(self, snapshot: Snapshot) -> None:
        self._health.follow(snapshot)
        if self._tidy is not None:
            self._tidy.cancel()
        self._tidy = self._loop.call_later(_TIDY_AFTER_S, self._tidy_up)

    def _tidy_up(self) -> None:
        """A while after the last change: leave the resources with the supervisor, and give memory back."""
        self._tidy = None
        descriptor = os.memfd_create("meshproxy-last-good")
        try:
            os.write(descriptor, self.store.dump())
            self._tell_supervisor(KeepLastGood(), descriptor)
            _log.debug("left the last good resources with the supervisor")
        finally:
            os.close(descriptor)
        _give_memory_back()

    def _on_applied(self, worker: WorkerHandle) -> None:
        if self.fleet.is_up_to_date:
            self.publisher.in_effect()
        if not self._is_announced and self.fleet.is_up_to_date and len(self.fleet.workers) == self.settings.workers:
            self._is_announced = True
            self._tell_supervisor(Running())
            self._tell_supervisor(Notify("READY=1"))
            _log.info("ready: %d workers, snapshot %s", len(self.fleet.workers), self.snapshot.version)

    async def _share_memory(self, limit: int) -> None:
        """What the control process needs grows and shrinks with the configuration: the workers have the rest."""
        while True:
            others = anonymous_bytes(os.getpid()) + anonymous_bytes(os.getppid())
            share = share_bytes(limit, others, self.settings.workers)
            if self._memory_share is None or abs(share - self._memory_share) >= STEP_BYTES:
                self._memory_share = share
                self.fleet.broadcast(MemoryShare(share))
            await asyncio.sleep(_SHARE_EVERY_S)

    async def _feed_watchdog(self, every_s: float) -> None:
        while True:
            self._tell_supervisor(Notify("WATCHDOG=1"))
            await asyncio.sleep(every_s)

    def _keep_socket(self, address: SocketAddress, slot: int, sock: socket.socket) -> None:
        self._tell_supervisor(KeepSocket(address.host, address.port, address.is_udp, slot), sock.fileno())

    def _drop_socket(self, address: SocketAddress) -> None:
        self._tell_supervisor(DropSocket(address.host, address.port, address.is_udp))

    def _tell_supervisor(self, message: object, descriptor: int | None = None) -> None:
        try:
            supervisor_link.send(self._link, message, descriptor)
        except OSError:
            self._stopped.set()  # the supervisor is gone, and we go with it


def run_control(
    settings: Settings, link: socket.socket, adopted: list[Adopted], last_good: int | None, serve_admin: ServeAdmin
) -> int:
    """The control process's main, after the fork. Exit status; a startup fault is one sentence and 1."""
    log.configure("control", settings.log_level)
    try:
        with asyncio.Runner() as runner:
            return runner.run(_run(settings, link, adopted, last_good, serve_admin))
    except ConfigError as error:
        _log.error("%s", error)
        return 1


async def _run(
    settings: Settings, link: socket.socket, adopted: list[Adopted], last_good: int | None, serve_admin: ServeAdmin
) -> int:
    return await Control(settings, link, adopted, last_good, asyncio.get_running_loop()).run(serve_admin)


def _contents(descriptor: int) -> bytes:
    """Of a memfd; read by offset, for its position is shared with the supervisor's."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _give_memory_back() -> None:
    """A load leaves freed parse trees behind; small nodes want those pages back."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # not glibc
