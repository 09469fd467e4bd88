"""The workers as the control process sees them: what each one has, what it still needs to hear.

Decides: the messages that take a worker from the snapshot it has to the current one, and their order.
Leaves to others: framing (control.channel), starting and replacing workers (worker.supervisor).
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from meshproxy.control.channel import ControlChannel, Item
from meshproxy.control.messages import (
    Answer,
    Applied,
    Ask,
    Begin,
    Commit,
    Drained,
    Health,
    Hello,
    IntervalCounts,
    PutCertificates,
    PutCluster,
    PutEndpoints,
    PutListener,
    PutPeers,
    PutRouteTable,
    PutVirtualHosts,
    PutWorkload,
    Remove,
    Resolved,
    Results,
)
from meshproxy.control.sockets import ListeningSockets
from meshproxy.model.cluster import Cluster, Discovery
from meshproxy.model.endpoint import LocalityEndpoints
from meshproxy.snapshot.snapshot import EMPTY_SNAPSHOT, Snapshot

_log = logging.getLogger(__name__)

PIECE_ENDPOINTS = 256
PIECE_HOSTS = 32
ASK_TIMEOUT_S = 1.0
_APPLY_TIMEOUT_S = 5.0
"""A worker that has not answered a snapshot for this long gets the next one all the same."""


class WorkerHandle:
    """One worker process. `snapshot` is what it was last sent."""

    __slots__ = ("applied", "channel", "pid", "sent_at", "slot", "snapshot", "started_at", "waits_for")

    def __init__(self, slot: int, pid: int) -> None:
        self.slot = slot
        self.pid = pid
        self.started_at = time.time()
        self.channel: ControlChannel | None = None
        self.snapshot: Snapshot | None = None
        self.sent_at = 0.0
        self.waits_for: str | None = None
        """Version sent and not yet applied; the next snapshot waits for it, so a slow worker never has two queued."""
        self.applied: Applied | None = None


class Fleet:
    """All workers. Reports go to the callbacks, which the control process sets before the first worker comes."""

    def __init__(self, sockets: ListeningSockets, loop: asyncio.AbstractEventLoop) -> None:
        self._sockets = sockets
        self._loop = loop
        self._current: Snapshot = EMPTY_SNAPSHOT
        self._certificates: dict[str, PutCertificates] = {}
        self._resolved: dict[str, tuple[LocalityEndpoints, ...]] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._asked: dict[int, set[int]] = {}
        self._last_question = 0
        self.workers: dict[int, WorkerHandle] = {}
        self.health_now: Callable[[], tuple[tuple[str, str, str], ...]] = tuple
        """Every verdict that holds now, for a worker that is new."""
        self.on_results: Callable[[Results], None] = lambda _: None
        self.on_counts: Callable[[IntervalCounts], None] = lambda _: None
        self.on_applied: Callable[[WorkerHandle], None] = lambda _: None

    @property
    def current(self) -> Snapshot:
        return self._current

    @property
    def is_up_to_date(self) -> bool:
        """Every worker routes by the current snapshot."""
        return bool(self.workers) and all(
            worker.applied is not None and worker.snapshot is self._current and worker.waits_for is None
            for worker in self.workers.values()
        )

    def attach(self, slot: int, pid: int, sock: socket.socket) -> None:
        """A worker runs in this slot (a new one, or one that outlived the control process before this)."""
        self.detach(slot)
        worker = WorkerHandle(slot, pid)
        self.workers[slot] = worker
        worker.channel = ControlChannel(
            sock,
            self._loop,
            lambda message: self._on_message(worker, message),
            lambda: self._on_closed(worker),
        )
        if self._current is not EMPTY_SNAPSHOT:
            self._send_snapshot(worker)

    def detach(self, slot: int) -> None:
        worker = self.workers.pop(slot, None)
        if worker is not None and worker.channel is not None:
            worker.channel.close()

    def publish(self, snapshot: Snapshot) -> None:
        """Make it current; each worker gets the difference as soon as it has taken what it was sent before."""
        self._current = snapshot
        self._resolved = {key: found for key, found in self._resolved.items() if key in snapshot.clusters}
        for worker in list(self.workers.values()):
            self._send_snapshot(worker)

    def broadcast(self, message: object) -> None:
        for worker in self.workers.values():
            if worker.channel is not None:
                worker.channel.send(message)

    def put_certificates(self, message: PutCertificates) -> None:
        self._certificates[message.workload_id] = message
        self.broadcast(message)

    def forget_certificates(self, workload_ids: Iterable[str]) -> None:
        for workload_id in workload_ids:
            self._certificates.pop(workload_id, None)

    def resolve(self, cluster_key: str, localities: tuple[LocalityEndpoints, ...]) -> None:
        """DNS answered for a STRICT_DNS cluster."""
        self._resolved[cluster_key] = localities
        message = Resolved(cluster_key, localities)
        for worker in self.workers.values():
            if worker.channel is not None and worker.snapshot is not None and cluster_key in worker.snapshot.clusters:
                worker.channel.send(message)

    def localities_of(self, cluster: Cluster) -> tuple[LocalityEndpoints, ...]:
        """The endpoints workers use: names are replaced by what DNS said of them, nothing before it answered."""
        if cluster.discovery is Discovery.STRICT_DNS:
            return self._resolved.get(cluster.key, ())
        return cluster.localities

    async def ask(self, what: str, timeout_s: float = ASK_TIMEOUT_S) -> list[Any]:
        """The workers' answers by slot; a worker that does not answer in time is left out."""
        futures: list[asyncio.Future[Any]] = []
        ids: list[int] = []
        for _, worker in sorted(self.workers.items()):
            if worker.channel is None:
                continue
            self._last_question += 1
            future = self._loop.create_future()
            self._questions[self._last_question] = future
            self._asked.setdefault(worker.pid, set()).add(self._last_question)
            ids.append(self._last_question)
            futures.append(future)
            worker.channel.send(Ask(self._last_question, what))
        if not futures:
            return []
        done, _ = await asyncio.wait(futures, timeout=timeout_s)
        for question in ids:
            self._questions.pop(question, None)
        for asked in self._asked.values():
            asked.difference_update(ids)
        return [future.result() for future in futures if future in done and not future.cancelled()]

    def close(self) -> None:
        for slot in list(self.workers):
            self.detach(slot)

    def _on_message(self, worker: WorkerHandle, message: object) -> None:
        if isinstance(message, Results):
            self.on_results(message)
        elif isinstance(message, IntervalCounts):
            self.on_counts(message)
        elif isinstance(message, Answer):
            future = self._questions.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message.payload)
        elif isinstance(message, Applied):
            worker.applied = message
            for problem in message.problems:
                _log.warning("worker-%d: %s", worker.slot, problem)
            if message.version == worker.waits_for:
                worker.waits_for = None
                self._send_snapshot(worker)
            self.on_applied(worker)
        elif isinstance(message, Hello):
            _log.debug("worker-%d (pid %d) is connected", worker.slot, message.pid)
        elif isinstance(message, Drained):
            _log.info("worker-%d has nothing in flight any more", worker.slot)

    def _on_closed(self, worker: WorkerHandle) -> None:
        if self.workers.get(worker.slot) is worker:
            del self.workers[worker.slot]
        for question in self._asked.pop(worker.pid, ()):
            future = self._questions.pop(question, None)
            if future is not None and not future.done():
                future.cancel()

    def _send_snapshot(self, worker: WorkerHandle) -> None:
        if worker.channel is None or worker.snapshot is self._current:
            return
        now = self._loop.time()
        if worker.waits_for is not None and now - worker.sent_at < _APPLY_TIMEOUT_S:
            self._loop.call_later(_APPLY_TIMEOUT_S, self._send_late, worker)
            return
        old, new = worker.snapshot, self._current
        worker.snapshot = new
        worker.sent_at = now
        worker.waits_for = new.version
        if old is None:
            # Identities first: a listener must never be up without the certificate it answers with.
            for certificates in self._certificates.values():
                worker.channel.send(certificates)
        worker.channel.send_all(self._with_sockets(worker.slot, changes(old, new, self.localities_of)))
        if old is None:
            verdicts = self.health_now()
            if verdicts:
                worker.channel.send(Health(verdicts))

    def _send_late(self, worker: WorkerHandle) -> None:
        if self.workers.get(worker.slot) is worker:
            self._send_snapshot(worker)

    def _with_sockets(self, slot: int, messages: Iterator[object]) -> Iterator[Item]:
        for message in messages:
            if isinstance(message, PutListener):
                try:
                    yield message, self._sockets.get(message.listener.socket_address, slot)
                except KeyError:
                    continue  # removed again before this worker's turn; the update that removed it follows
            else:
                yield message, None


def changes(
    old: Snapshot | None,
    new: Snapshot,
    localities_of: Callable[[Cluster], tuple[LocalityEndpoints, ...]] = lambda cluster: cluster.localities,
) -> Iterator[object]:
    """Begin … Commit: what a worker that has `old` needs to have `new`; None: what it has is not known.

    What a listener needs comes before it, what is not needed any more goes last.
    """
    yield Begin(new.version, replaces_all=old is None)
    before = old or EMPTY_SNAPSHOT
    for workload in _changed(before.workloads, new.workloads):
        yield PutWorkload(workload)
    for cluster in _changed(before.clusters, new.clusters):
        yield PutCluster(_without_endpoints(cluster))
        yield from _endpoint_pieces(cluster.key, localities_of(cluster))
    for table in _changed(before.route_tables, new.route_tables):
        hosts = table.virtual_hosts
        yield PutRouteTable(table if len(hosts) <= PIECE_HOSTS else replace(table, virtual_hosts=hosts[:PIECE_HOSTS]))
        for at in range(PIECE_HOSTS, len(hosts), PIECE_HOSTS):
            yield PutVirtualHosts(table.name, hosts[at : at + PIECE_HOSTS])
    if old is None or before.peers != new.peers:
        yield PutPeers(dict(new.peers))
    for listener in _changed(before.listeners, new.listeners):
        yield PutListener(listener)
    for kind, had, has in (
        ("listener", before.listeners, new.listeners),
        ("route_table", before.route_tables, new.route_tables),
        ("cluster", before.clusters, new.clusters),
        ("workload", before.workloads, new.workloads),
    ):
        for name in had.keys() - has.keys():
            yield Remove(kind, name)
    yield Commit(new.version, new.access_log)


_T = TypeVar("_T")


def _changed(before: Mapping[str, _T], now: Mapping[str, _T]) -> Iterator[_T]:
    for name, value in now.items():
        had = before.get(name)
        if had is not value and had != value:
            yield value


def _without_endpoints(cluster: Cluster) -> Cluster:
    return replace(cluster, localities=())


def _endpoint_pieces(key: str, localities: tuple[LocalityEndpoints, ...]) -> Iterator[PutEndpoints]:
    """At least one message, so that a cluster that lost its last endpoint says so; each of at most 256 endpoints."""
    piece: list[LocalityEndpoints] = []
    room = PIECE_ENDPOINTS
    for group in localities:
        rest = group.endpoints
        while True:
            taken, rest = rest[:room], rest[room:]
            piece.append(_part_of(group, taken))
            room -= len(taken)
            if room == 0:
                yield PutEndpoints(key, tuple(piece))
                piece, room = [], PIECE_ENDPOINTS
            if not rest:
                break
    if piece or not localities:
        yield PutEndpoints(key, tuple(piece))


def _part_of(group: LocalityEndpoints, endpoints: tuple[Any, ...]) -> LocalityEndpoints:
    if len(endpoints) == len(group.endpoints):
        return group
    return LocalityEndpoints(locality=group.locality, priority=group.priority, weight=group.weight, endpoints=endpoints)
