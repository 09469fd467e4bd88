"""One worker process: a uvloop loop, its listeners, its current configuration.

Configuration arrives in pieces (control/messages.py) and is staged; clusters take effect as each is whole (make before
break), routes and listeners together at Commit. What did not change is not sent and is not touched.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from dataclasses import replace
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import uvloop

from meshproxy.control import messages as m
from meshproxy.control.channel import WorkerChannel
from meshproxy.listener.tcp import TcpListener
from meshproxy.listener.udp import UdpListener
from meshproxy.model.cluster import Cluster, Protocol
from meshproxy.model.endpoint import LocalityEndpoints
from meshproxy.model.listener import Listener
from meshproxy.model.workload import Workload, WorkloadLabels
from meshproxy.proxy.listener_runtime import ListenerRuntime
from meshproxy.route.table import CompiledTable
from meshproxy.telemetry.access_log import AccessLog
from meshproxy.telemetry.recorder import Recorder
from meshproxy.tls.context import Bundle
from meshproxy.upstream.cluster_runtime import ClusterRuntime, ClusterUpdate, WorkloadRuntime
from meshproxy.upstream.connect import has_quic
from meshproxy.upstream.worker_state import MIN_SWEEP_GAP_S, SWEEP_INTERVAL_S, WorkerState
from meshproxy.worker.memory_guard import MemoryGuard
from meshproxy.worker.stall_watch import StallWatch

if TYPE_CHECKING:
    from meshproxy.listener.quic import QuicListener

log = logging.getLogger(__name__)

STALL_S = 0.1
"""A loop turn that takes longer is counted and logged."""


class Worker:
    """Everything of one worker. Messages go in through `on_message`; the rest happens on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, slot: int = 0) -> None:
        self.loop = loop
        self.slot = slot
        self.state = WorkerState(loop, Recorder())
        self.state.send_results = self._send_results
        self.memory = MemoryGuard(self.state)
        self.clusters: dict[str, Cluster] = {}
        self.workloads: dict[str, WorkloadRuntime] = {}
        self.tables: dict[str, CompiledTable] = {}
        self.peers: dict[str, WorkloadLabels] = {}
        self.listeners: dict[str, TcpListener | UdpListener | QuicListener] = {}
        self.certificates: dict[str, Bundle] = {}
        self.retired: list[ListenerRuntime] = []
        """Listeners that no longer accept and still have connections."""
        self._staged_cluster: Cluster | None = None
        self._staged_localities: dict[tuple[Any, ...], list[Any]] = {}
        self._staged_updates: list[ClusterUpdate] = []
        self._staged_workloads: list[Workload] = []
        self._staged_listeners: list[tuple[Listener, int]] = []
        self._staged_removals: list[m.Remove] = []
        self._staged_tables: dict[str, CompiledTable] = {}
        self._began_at = 0.0
        self._stall_s = 0.0
        self._drain_deadline: float | None = None
        self._due_at = monotonic() + SWEEP_INTERVAL_S
        self._second_at = 0.0
        self._lets_pass = False
        self.stall_watch: StallWatch | None = None
        self._counts: dict[tuple[str, str], tuple[int, int]] = {}
        self.stopped: asyncio.Future[None] = loop.create_future()
        self.channel = WorkerChannel(sock, loop, self.on_message, self._on_closed)
        self.timer = loop.call_later(SWEEP_INTERVAL_S, self._tick)

    # ── messages ──

    def on_message(self, message: object, descriptor: int | None) -> None:
        started = perf_counter()
        if self._staged_cluster is not None and not isinstance(message, m.PutEndpoints):
            self._finish_cluster()
        if descriptor is not None:
            assert isinstance(message, m.PutListener)
            self._staged_listeners.append((message.listener, descriptor))
        else:
            _HANDLERS[type(message)](self, message)
        self._stall_s = max(self._stall_s, perf_counter() - started)

    def _begin(self, message: m.Begin) -> None:
        for _, descriptor in self._staged_listeners:
            os.close(descriptor)
        self._staged_listeners.clear()
        self._staged_workloads.clear()
        self._staged_removals.clear()
        self._staged_tables.clear()
        # Nothing that arrives now is garbage: without this the collector walks the half-built update several times.
        gc.disable()
        self._began_at = perf_counter()
        self._stall_s = 0.0

    def _put_workload(self, message: m.PutWorkload) -> None:
        workload = message.workload
        runtime = self.workloads.get(workload.id)
        if runtime is None:
            runtime = self.workloads[workload.id] = WorkloadRuntime(workload, self.clusters, self.state)
        elif runtime.workload.identity != workload.identity:
            # Another identity: its connections must not serve the new one.
            for cluster in runtime.clusters.values():
                cluster.remove()
            runtime.clusters.clear()
            runtime.clear_bundle()
        runtime.workload = workload
        bundle = self.certificates.get(workload.id)
        if bundle is not None and runtime.bundle is None:
            runtime.set_bundle(bundle)

    def _put_cluster(self, message: m.PutCluster) -> None:
        cluster = self._staged_cluster = message.cluster
        if cluster.offers_http3 and has_quic():
            import meshproxy.upstream.connection_h3  # noqa: F401 - 0.1 s, which no request should wait for
        self._staged_localities = {}
        self._staged_updates = [
            ClusterUpdate(runtime.clusters[cluster.key], cluster)
            for runtime in self.workloads.values()
            if cluster.key in runtime.clusters
        ]

    def _put_endpoints(self, message: m.PutEndpoints) -> None:
        if self._staged_cluster is None:
            return
        now = monotonic()
        for group in message.localities:
            key = (group.priority, group.locality, group.weight)
            self._staged_localities.setdefault(key, []).extend(group.endpoints)
        for update in self._staged_updates:
            update.add(message.localities, now)

    def _finish_cluster(self) -> None:
        cluster, self._staged_cluster = self._staged_cluster, None
        assert cluster is not None
        localities = tuple(
            LocalityEndpoints(locality=locality, priority=priority, weight=weight, endpoints=tuple(endpoints))
            for (priority, locality, weight), endpoints in self._staged_localities.items()
        )
        cluster = replace(cluster, localities=localities)
        self.clusters[cluster.key] = cluster
        now = monotonic()
        for update in self._staged_updates:
            update.commit(now, cluster)
        self._staged_localities = {}
        self._staged_updates = []

    def _resolved(self, message: m.Resolved) -> None:
        cluster = self.clusters.get(message.cluster_key)
        if cluster is not None:
            self._put_cluster(m.PutCluster(replace(cluster, localities=())))
            self._put_endpoints(m.PutEndpoints(message.cluster_key, message.localities))
            self._finish_cluster()

    def _put_route_table(self, message: m.PutRouteTable) -> None:
        self._staged_tables[message.table.name] = CompiledTable(message.table)

    def _put_virtual_hosts(self, message: m.PutVirtualHosts) -> None:
        self._staged_tables[message.table_name].add(message.hosts)

    def _put_peers(self, message: m.PutPeers) -> None:
        self.peers.clear()
        self.peers.update(message.peers)

    def _remove(self, message: m.Remove) -> None:
        self._staged_removals.append(message)

    def _commit(self, message: m.Commit) -> None:
        started = perf_counter()
        problems: list[str] = []
        self.tables.update(self._staged_tables)
        for listener in self.listeners.values():
            name = listener.runtime.listener.route_table
            if name in self._staged_tables:
                listener.runtime.table = self.tables[name]
        self._staged_tables = {}
        self._apply_removals()
        for spec, descriptor in self._staged_listeners:
            self._open_listener(spec, descriptor, problems)
        self._staged_listeners.clear()
        self._set_access_log(message, problems)
        # The new configuration lives long: keep the collector from walking it again and again.
        gc.freeze()
        gc.enable()
        stall_s = max(self._stall_s, perf_counter() - started, self.channel.take_longest_s())
        self.channel.send(m.Applied(message.version, stall_s, perf_counter() - self._began_at, tuple(problems)))

    def _apply_removals(self) -> None:
        for removal in self._staged_removals:
            name = removal.name
            if removal.kind == "listener":
                self._close_listener(name)
                self.state.recorder.remove_listener(name)
            elif removal.kind == "cluster":
                self.clusters.pop(name, None)
                self.state.verdicts.pop(name, None)
                self.state.recorder.remove_cluster(name)
                for workload in self.workloads.values():
                    cluster = workload.clusters.pop(name, None)
                    if cluster is not None:
                        cluster.remove()
            elif removal.kind == "route_table":
                self.tables.pop(name, None)
            elif removal.kind == "workload":
                gone = self.workloads.pop(name, None)
                self.certificates.pop(name, None)
                if gone is not None:
                    for cluster in gone.clusters.values():
                        cluster.remove()
        self._staged_removals.clear()

    def _open_listener(self, spec: Listener, descriptor: int, problems: list[str]) -> None:
        workload = self.workloads.get(spec.workload_id)
        if workload is None:
            problems.append(f"listener {spec.name}: its workload {spec.workload_id} is not known")
            os.close(descriptor)
            return
        before = self.listeners.get(spec.name)
        self._close_listener(spec.name)
        table = self.tables.get(spec.route_table) if spec.route_table is not None else None
        runtime = ListenerRuntime(spec, table, workload, self.state, self.peers)
        sock = socket.socket(fileno=descriptor)
        if spec.is_quic:
            from meshproxy.listener.quic import QuicListener  # 15 MiB that other workers do without

            assert before is None or isinstance(before, QuicListener)
            self.listeners[spec.name] = QuicListener(sock, runtime, self.slot, before)
        elif spec.protocol is Protocol.UDP:
            self.listeners[spec.name] = UdpListener(sock, runtime)
        else:
            self.listeners[spec.name] = TcpListener(sock, runtime)
        if self.state.is_draining:
            self.listeners[spec.name].pause()

    def _close_listener(self, name: str) -> None:
        listener = self.listeners.pop(name, None)
        if listener is None:
            return
        listener.close()
        for connection in list(listener.runtime.connections):
            connection.drain()
        if listener.runtime.connections:
            self.retired.append(listener.runtime)

    def _set_access_log(self, message: m.Commit, problems: list[str]) -> None:
        log_now = self.state.access_log
        policy = message.access_log
        if policy is None:
            if log_now is not None:
                log_now.close()
                self.state.access_log = None
        elif log_now is not None and log_now.policy == policy:
            log_now.reopen()  # a rotated file is followed on reload
        else:
            try:
                fresh = AccessLog(policy, self.state.counters)
            except Exception as error:  # the operator's path or format: say so, keep what we had
                problems.append(f"access log: {error}")
                return
            if log_now is not None:
                log_now.close()
            self.state.access_log = fresh

    def _put_certificates(self, message: m.PutCertificates) -> None:
        bundle = Bundle(chain_pem=message.chain_pem, key_pem=message.key_pem, roots_pem=message.roots_pem)
        self.certificates[message.workload_id] = bundle
        runtime = self.workloads.get(message.workload_id)
        if runtime is not None:
            runtime.set_bundle(bundle)

    def _health(self, message: m.Health) -> None:
        now = monotonic()
        changed: set[ClusterRuntime] = set()
        for cluster_key, endpoint_key, word in message.verdicts:
            standing = self.state.verdicts.setdefault(cluster_key, {})
            kind = _VERDICT_KIND[word]
            if word in ("restore", "healthy", "clear"):
                standing.pop((endpoint_key, kind), None)
            else:
                standing[(endpoint_key, kind)] = word
            for workload in self.workloads.values():
                cluster = workload.clusters.get(cluster_key)
                if cluster is not None:
                    cluster.set_health(endpoint_key, word, now)
                    if kind != "suspect":
                        changed.add(cluster)
        for cluster in changed:  # once each, however many verdicts: it costs a walk over all endpoints
            cluster.balancer.recompute(now)

    def _ask(self, message: m.Ask) -> None:
        payload: Any
        if message.what == "stats":
            payload = self.state.recorder.flush()
        elif message.what == "clusters":
            payload = [
                cluster.snapshot() for workload in self.workloads.values() for cluster in workload.clusters.values()
            ]
        else:
            payload = [
                {
                    "listener": listener.runtime.listener.name,
                    "workload": listener.runtime.listener.workload_id,
                    "downstream": str(connection.transport.get_extra_info("peername")),
                    "identity": connection.peer.principal if connection.peer is not None else "",
                }
                for listener in self.listeners.values()
                for connection in listener.runtime.connections
            ]
        self.channel.send(m.Answer(message.id, payload))

    def _drain(self, message: m.Drain) -> None:
        """Accept no more, say goodbye on every answer, and (exits) end when nothing is in flight."""
        self.state.is_draining = True
        for listener in self.listeners.values():
            if not isinstance(listener, TcpListener):
                listener.drain()
                continue
            listener.close()  # not merely paused: who connects now must be refused, not left in a queue
            for connection in list(listener.runtime.connections):
                connection.drain()
        if message.exits:
            self._drain_deadline = monotonic() + message.deadline_s

    def _memory_share(self, message: m.MemoryShare) -> None:
        self.memory.share_bytes = message.share_bytes

    def _set_log_level(self, message: m.SetLogLevel) -> None:
        logging.getLogger().setLevel(message.level.upper())

    # ── time ──

    def _tick(self) -> None:
        now = monotonic()
        late_s = now - self._due_at
        counters = self.state.counters
        if late_s > counters.loop_stall_max_s:
            counters.loop_stall_max_s = late_s
        is_stall = late_s > STALL_S
        if is_stall:
            counters.loop_stall_total_s += late_s
            where = self.stall_watch.take() if self.stall_watch is not None else ""
            log.warning("the loop was held for %d ms%s", late_s * 1000, f" in {where}" if where else "")
        if is_stall and not self._lets_pass:
            # Answers that came meanwhile wait in their sockets: who was late was this process. They are read first, or
            # every request in flight would time out, and its endpoint be ejected for it.
            self._lets_pass = True
            self._due_at = now + MIN_SWEEP_GAP_S
        else:
            self._lets_pass = False
            self._due_at = self.state.sweep(now)
        self.memory.look()
        self._flush_access_log()
        if now >= self._second_at:
            self._second_at = now + 1.0
            self._every_second()
        if self._drain_deadline is not None:
            self._check_drained(now)
        delay_s = max(self._due_at - monotonic(), 0.0)
        if self.stall_watch is not None:
            self.stall_watch.expect(delay_s + STALL_S)
        self.timer = self.loop.call_later(delay_s, self._tick)

    def _flush_access_log(self) -> None:
        access_log = self.state.access_log
        if access_log is not None and access_log.flush():
            self.loop.call_soon(self._flush_access_log)  # more lines wait: requests come in between

    def _every_second(self) -> None:
        self.retired = [runtime for runtime in self.retired if runtime.connections]
        counts: list[tuple[str, str, int, int]] = []
        for workload in self.workloads.values():
            for cluster in workload.clusters.values():
                outlier = cluster.cluster.outlier
                if outlier is None or not (outlier.enforce_success_rate or outlier.enforce_failure_percentage):
                    continue
                for endpoint in cluster.endpoints.values():
                    key = (f"{workload.workload.id} {cluster.key}", endpoint.key)
                    before = self._counts.get(key, (0, 0))
                    total, errors = endpoint.rq_total, endpoint.rq_error
                    if total != before[0]:
                        requests = total - before[0]
                        counts.append((cluster.key, endpoint.key, requests, requests - (errors - before[1])))
                        self._counts[key] = (total, errors)
        if counts:
            self.channel.send(m.IntervalCounts(tuple(counts)))

    def _check_drained(self, now: float) -> None:
        assert self._drain_deadline is not None
        runtimes = [listener.runtime for listener in self.listeners.values()] + self.retired
        if not any(runtime.connections for runtime in runtimes):
            self._stop()
        elif now >= self._drain_deadline:
            for runtime in runtimes:
                for connection in list(runtime.connections):
                    connection.transport.abort()
            self._stop()

    def _send_results(self, events: list[tuple[str, str, int]]) -> None:
        self.channel.send(m.Results(tuple(events)))

    def _on_closed(self) -> None:
        """Nobody will ever configure or stop us again."""
        log.error("the supervisor is gone: stopping")
        self._stop()

    def _stop(self) -> None:
        if not self.stopped.done():
            if self.state.access_log is not None:
                self.state.access_log.flush()
            self._leave_quic_upstreams()
            self.channel.send(m.Drained())
            self.stopped.set_result(None)

    def _leave_quic_upstreams(self) -> None:
        """The kernel ends TCP connections for us; servers would keep those of QUIC until they are idle for too long."""
        for workload in self.workloads.values():
            for cluster in workload.clusters.values():
                for endpoint in cluster.endpoints.values():
                    if endpoint.http3 is not None:
                        endpoint.close_idle()


_VERDICT_KIND = {
    "eject": "outlier",
    "restore": "outlier",
    "unhealthy": "check",
    "healthy": "check",
    "suspect": "suspect",
    "clear": "suspect",
}
_HANDLERS: dict[type, Any] = {
    m.Begin: Worker._begin,
    m.PutWorkload: Worker._put_workload,
    m.PutCluster: Worker._put_cluster,
    m.PutEndpoints: Worker._put_endpoints,
    m.Resolved: Worker._resolved,
    m.PutRouteTable: Worker._put_route_table,
    m.PutVirtualHosts: Worker._put_virtual_hosts,
    m.PutPeers: Worker._put_peers,
    m.Remove: Worker._remove,
    m.Commit: Worker._commit,
    m.PutCertificates: Worker._put_certificates,
    m.Health: Worker._health,
    m.Ask: Worker._ask,
    m.Drain: Worker._drain,
    m.MemoryShare: Worker._memory_share,
    m.SetLogLevel: Worker._set_log_level,
}


def main(channel_socket: socket.socket, slot: int) -> None:
    """Run until drained or orphaned, then exit the process. Called in a fresh child of the supervisor."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor drains us; a group-wide signal must not cut requests
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    uvloop.install()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    # Connections make few cycles (each breaks its own on close); the default threshold walks the heap far too often.
    gc.set_threshold(20_000, 20, 100)
    worker = Worker(loop, channel_socket, slot)
    worker.stall_watch = StallWatch()
    try:
        loop.run_until_complete(worker.stopped)
    finally:
        sys.stdout.flush()
        os._exit(0)
