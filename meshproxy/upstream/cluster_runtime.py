"""The live side of a cluster in one worker: its endpoints, their pools, the limits, what is in flight.

Pools hang on (workload, cluster, endpoint), so a connection made under one identity is never used for another.
Decides: reuse, open, wait or refuse. Leaves to others: which endpoint (lb), whether it is healthy (control).
"""

import ssl
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.cluster_balancer import ClusterBalancer
from meshproxy.model.cluster import Cluster
from meshproxy.model.cluster import Protocol as PortProtocol
from meshproxy.model.endpoint import Endpoint, Locality, LocalityEndpoints
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.model.workload import Workload
from meshproxy.telemetry.recorder import ClusterCounters
from meshproxy.tls.context import Bundle, client_context, server_context
from meshproxy.tls.transport import SessionSlot
from meshproxy.upstream.connect import (
    ALPN_SERVER,
    ConnectError,
    PendingConnect,
    UpstreamTlsContext,
    probe_quic,
    upstream_tls,
)
from meshproxy.upstream.transport_choice import QuicTries
from meshproxy.upstream.worker_state import NEVER, WorkerState

if TYPE_CHECKING:
    from meshproxy.upstream.connection_h1 import UpstreamConnection
    from meshproxy.upstream.connection_h2 import UpstreamH2
    from meshproxy.upstream.connection_h3 import UpstreamH3


_HTTP2_PROTOCOLS = frozenset({"HTTP/2", "HTTP/3"})
"""Downstream protocols that an upstream which follows them hears as HTTP/2 (as in Envoy)."""
_LOOK_AFTER_DOWNSTREAM_S = 1.0
"""How long connections that name a downstream may outlive it."""


class Waiter(Protocol):
    """Who waits for a connection: an HTTP stream or a TCP session."""

    def downstream(self) -> tuple[Any, str]:
        """On whose behalf: its transport, and the protocol it speaks (`HTTP/1.1`)."""

    def on_connected(self, connection: Any) -> None: ...

    def on_connect_failed(self, error: ConnectError) -> None: ...


class EndpointRuntime(EndpointState):
    """One endpoint with its pool, in one worker, for one workload."""

    __slots__ = (
        "cluster",
        "connect_failures",
        "connections",
        "connections_total",
        "expects_h2",
        "has_answered",
        "http3",
        "idle",
        "is_removed",
        "is_suspect",
        "key",
        "of",
        "rq_error",
        "rq_total",
        "series",
        "session",
        "shared",
        "shares",
        "tls",
        "waiting",
    )

    def __init__(self, cluster: "ClusterRuntime", endpoint: Endpoint, now: float) -> None:
        super().__init__(endpoint, now)
        self.cluster = cluster
        self.key = endpoint.key
        self.idle: list[UpstreamConnection] = []
        self.connections: set[Any] = set()
        self.connections_total = 0
        self.connect_failures = 0
        self.has_answered = False
        """UDP: it sends datagrams back, so silence means something (proxy.udp_session)."""
        self.rq_total = 0
        self.rq_error = 0
        self.is_suspect = False
        """The detector wants to hear of successes too."""
        self.is_removed = False
        self.series: dict[int, Any] = {}
        """Metric series by peer context and status: resolved once, then one dict get per request."""
        self.tls: UpstreamTlsContext | None = None
        self.session: SessionSlot | None = None
        """TLS session to resume; made with the first TLS connection."""
        self.shared: list[UpstreamH2 | UpstreamH3] = []
        """Connections that may have room for another request (HTTP/2 and HTTP/3)."""
        self.http3: QuicTries | None = None
        """How QUIC fared, where it has been tried."""
        self.expects_h2 = cluster.cluster.speaks_http2
        """One connection serves many requests, so one is opened and the others wait for it."""
        self.waiting: list[Waiter] | None = None
        """Requests that wait for the shared connection being opened; None while none is."""
        self.of: EndpointRuntime | None = None
        """Of a share: the endpoint."""
        self.shares = _NO_SHARES
        """Where not every connection serves every downstream, its pools."""

    def http_spec(self) -> Cluster:
        """How HTTP is spoken to it."""
        return self.cluster.cluster

    def refresh_tls(self) -> None:
        """Certificates or tls changed: new connections use the new ones, idle ones go, busy ones finish."""
        spec = self.http_spec()
        tls = upstream_tls(spec, self.endpoint, self.cluster.workload)
        if tls != self.tls:
            self.tls = tls
            if tls is not None and tls.is_mesh:
                self.expects_h2 |= (spec.offers_http2 or spec.offers_http3) and spec.protocol.is_http
            self.close_idle()
        for share in self.shares.values():
            share.refresh_tls()

    def share(self, waiter: Waiter) -> "EndpointShare":
        """The pool for this downstream: of its own where a connection names it, of its version where that counts."""
        transport, protocol = waiter.downstream()
        spec = self.cluster.cluster
        speaks_http2 = protocol in _HTTP2_PROTOCOLS if spec.follows_client else None
        key = (transport if spec.proxy_protocol else None, speaks_http2)
        share = self.shares.get(key)
        if share is None:
            if self.shares is _NO_SHARES:
                self.shares = {}
            share = self.shares[key] = EndpointShare(self, *key)
        share.is_ejected = self.is_ejected
        return share

    def close_idle(self) -> None:
        for share in list(self.shares.values()):
            share.is_ejected = self.is_ejected
            share.close_idle()
            if self.is_removed:
                share.end()
        for connection in self.idle.copy():
            connection.close()
        self.idle.clear()
        for shared in self.shared.copy():
            shared.retire()


_NO_SHARES: dict[tuple[Any, bool | None], "EndpointShare"] = {}
"""Of all endpoints that have none: 10,000 empty ones would be 640 KB."""


class EndpointShare(EndpointRuntime):
    """The connections to an endpoint that serve one kind of downstream, in a pool of their own.

    What is counted and judged is the endpoint. A pool for one downstream ends with it.
    """

    __slots__ = ("_downstream", "_speaks_http2", "deadline")

    def __init__(self, of: EndpointRuntime, downstream: Any, speaks_http2: bool | None) -> None:
        """downstream: the transport whose names its connections begin with, or None. speaks_http2: None as ever."""
        self._downstream = downstream
        self._speaks_http2 = speaks_http2
        super().__init__(of.cluster, of.endpoint, 0.0)
        self.of = of
        self.connections = of.connections
        self.expects_h2 = self.http_spec().speaks_http2
        self.refresh_tls()
        self.deadline = NEVER
        if downstream is not None:
            self.deadline = monotonic() + _LOOK_AFTER_DOWNSTREAM_S
            of.cluster.state.timed.add(self)

    def http_spec(self) -> Cluster:
        spec = self.cluster.cluster
        if self._speaks_http2 is None:
            return spec
        return replace(spec, protocol=PortProtocol.HTTP, speaks_http2=self._speaks_http2, offers_http2=False)

    def on_deadline(self, now: float) -> None:
        if self._downstream.is_closing():
            self.end()
        else:
            self.deadline = now + _LOOK_AFTER_DOWNSTREAM_S

    def end(self) -> None:
        """Nobody will ask for it any more; what is under way is finished."""
        assert self.of is not None
        self.is_removed = True
        self.close_idle()
        self.cluster.state.timed.discard(self)
        self.of.shares.pop((self._downstream, self._speaks_http2), None)


class ClusterRuntime:
    """One cluster for one workload."""

    __slots__ = (
        "_certificate_version",
        "active_requests",
        "balancer",
        "cluster",
        "connecting",
        "connections",
        "counters",
        "endpoints",
        "is_removed",
        "is_shared_out",
        "key",
        "max_pending",
        "max_requests",
        "pending",
        "reports_success",
        "retries",
        "retry_budget",
        "state",
        "workload",
    )

    def __init__(self, cluster: Cluster, workload: "WorkloadRuntime", state: WorkerState, now: float) -> None:
        self.state = state
        self.workload = workload
        self.key = cluster.key
        self.active_requests = 0
        self.connections = 0
        self.retries = 0
        self.connecting: dict[Waiter, PendingConnect] = {}
        self.pending: deque[tuple[EndpointRuntime, Waiter, Callable[[Any], Any]]] = deque()
        self.is_removed = False
        self.endpoints: dict[str, EndpointRuntime] = {}
        self.counters: ClusterCounters = state.recorder.cluster(cluster.key, cluster.name)
        self.cluster = cluster
        self.is_shared_out = cluster.follows_client or cluster.proxy_protocol > 0
        """Not every connection to an endpoint serves every downstream."""
        self.max_requests = cluster.limits.max_requests
        self.max_pending = cluster.limits.max_pending_requests
        self.retry_budget = cluster.limits.retry_budget
        self.balancer: ClusterBalancer = None  # type: ignore[assignment]  # update() makes it
        self.update(cluster, now)

    def update(self, cluster: Cluster, now: float) -> None:
        """A new version of the cluster in one piece; see ClusterUpdate for a large one."""
        update = ClusterUpdate(self, cluster)
        update.add(cluster.localities, now)
        update.commit(now)

    def refresh_tls(self) -> None:
        """Certificates were rotated: new connections use the new ones, idle ones go, busy ones finish."""
        for runtime in self.endpoints.values():
            runtime.refresh_tls()

    def set_health(self, endpoint_key: str, word: str, now: float) -> None:
        """Note one verdict of the control process (messages.Health); recompute the balancer after the last of them."""
        runtime = self.endpoints.get(endpoint_key)
        if runtime is None:
            return
        if word == "suspect":
            runtime.is_suspect = True
        elif word == "clear":
            runtime.is_suspect = False
        else:
            if word == "eject":
                runtime.is_ejected = True
                runtime.is_suspect = False
                runtime.close_idle()
            elif word == "restore":
                runtime.is_ejected = False
                runtime.joined_at = now
            elif word == "unhealthy":
                runtime.is_unhealthy = True
                runtime.close_idle()
            elif word == "healthy":
                runtime.is_unhealthy = False
                runtime.joined_at = now

    def acquire(self, endpoint: EndpointRuntime, waiter: Waiter, factory: Callable[["EndpointRuntime"], Any]) -> Any:
        """An idle connection, or None: the waiter hears later; ResponseFlag.UPSTREAM_OVERFLOW when it may not wait."""
        if self.is_shared_out and endpoint.of is None:
            endpoint = endpoint.share(waiter)
        idle = endpoint.idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                return connection
        if endpoint.expects_h2:
            if endpoint.http3 is not None and endpoint.http3.is_due(monotonic()):
                probe_quic(endpoint)
            for shared in endpoint.shared:
                if shared.has_room():
                    return shared.open_stream()
            if endpoint.waiting is not None:
                if len(endpoint.waiting) >= self.max_pending:
                    self.counters.upstream_rq_pending_overflow += 1
                    return ResponseFlag.UPSTREAM_OVERFLOW
                endpoint.waiting.append(waiter)
                return None
        if self.connections >= self.cluster.limits.max_connections:
            counters = self.counters
            if len(self.pending) >= self.max_pending:
                counters.upstream_rq_pending_overflow += 1
                return ResponseFlag.UPSTREAM_OVERFLOW
            counters.upstream_cx_overflow += 1
            # An idle connection to another endpoint counts against the limit too: give its place to this one.
            for other in self._pools():
                if other.idle:
                    other.idle.pop().close()
                    break
                unused = next((shared for shared in other.shared if not shared.streams), None)
                if unused is not None:
                    unused.retire()
                    break
            else:
                self.pending.append((endpoint, waiter, factory))
                return None
        self.open(endpoint, waiter, factory)
        return None

    def open(self, endpoint: EndpointRuntime, waiter: Waiter, factory: Callable[["EndpointRuntime"], Any]) -> None:
        self.connections += 1
        if endpoint.expects_h2 and endpoint.waiting is None:
            endpoint.waiting = []
        self.connecting[waiter] = PendingConnect(self.state, endpoint, waiter, factory)

    def opened(self, endpoint: EndpointRuntime, waiter: Waiter, connection: Any, factory: Callable[[Any], Any]) -> None:
        """A connection is open: its waiter has it, or a share of it, and so have those who waited with it."""
        waiting, endpoint.waiting = endpoint.waiting, None
        open_stream = getattr(connection, "open_stream", None)
        endpoint.expects_h2 = open_stream is not None
        waiter.on_connected(open_stream() if open_stream is not None else connection)
        for other in waiting or ():
            found = self.acquire(endpoint, other, factory)
            if found is ResponseFlag.UPSTREAM_OVERFLOW:
                other.on_connect_failed(ConnectError("refused", "overflow"))
            elif found is not None:
                other.on_connected(found)

    def open_failed(self, endpoint: EndpointRuntime, waiter: Waiter, error: ConnectError) -> None:
        waiting, endpoint.waiting = endpoint.waiting, None
        waiter.on_connect_failed(error)
        for other in waiting or ():
            other.on_connect_failed(error)

    def connection_closed(self) -> None:
        """A connection (or an attempt to make one) is gone: whoever waits for its place gets it."""
        self.connections -= 1
        while self.pending and self.connections < self.cluster.limits.max_connections:
            endpoint, waiter, factory = self.pending.popleft()
            self.open(endpoint, waiter, factory)

    def hand_over(self, connection: "UpstreamConnection") -> bool:
        """A connection became free: give it to the first waiter for its endpoint, or close it for another's sake."""
        for index, (endpoint, waiter, _) in enumerate(self.pending):
            if endpoint is connection.endpoint:
                del self.pending[index]
                waiter.on_connected(connection)
                return True
        connection.close()
        return True

    def forget(self, waiter: Waiter) -> None:
        """The waiter is not interested any more, and may soon wait for something else."""
        connecting = self.connecting.pop(waiter, None)
        if connecting is not None:
            waiting = connecting.endpoint.waiting
            if waiting:
                heir = waiting.pop(0)
                connecting.waiter = heir
                self.connecting[heir] = connecting
                return
            connecting.endpoint.waiting = None
            connecting.abandon()
            return
        for runtime in self._pools():
            if runtime.waiting and waiter in runtime.waiting:
                runtime.waiting.remove(waiter)
                return
        for index, (_, queued, _) in enumerate(self.pending):
            if queued is waiter:
                del self.pending[index]
                return

    def _pools(self) -> Iterator[EndpointRuntime]:
        for endpoint in self.endpoints.values():
            yield endpoint
            yield from endpoint.shares.values()

    def may_retry(self) -> bool:
        """Room for one more concurrent retry (Envoy circuit breaker max_retries or retry budget)."""
        budget = self.retry_budget
        if budget is not None:
            allowed = max(budget.min_concurrency, self.active_requests * budget.percent / 100)
            return self.retries < allowed
        return self.retries < self.cluster.limits.max_retries

    def pick_avoiding(self, now: float, tried: Container[EndpointState]) -> EndpointState | None:
        return self.balancer.pick_avoiding(now, tried)

    def count_panic(self) -> None:
        self.counters.lb_healthy_panic += 1

    def remove(self) -> None:
        self.is_removed = True
        for runtime in self.endpoints.values():
            runtime.is_removed = True
            runtime.close_idle()

    def snapshot(self) -> dict[str, Any]:
        """What /clusters shows of it."""
        where = {
            endpoint.key: (group.priority, str(group.locality))
            for group in self.cluster.localities
            for endpoint in group.endpoints
        }
        return {
            "cluster_key": self.key,
            "cluster_name": self.cluster.name,
            "workload": self.workload.workload.id,
            "endpoints": [
                {
                    "address": runtime.endpoint.address,
                    "port": runtime.endpoint.port,
                    "priority": where[key][0],
                    "locality": where[key][1],
                    "weight": runtime.weight,
                    "is_ejected": runtime.is_ejected,
                    "is_unhealthy": runtime.is_unhealthy,
                    "active_requests": runtime.active_requests,
                    "rq_total": runtime.rq_total,
                    "rq_success": runtime.rq_total - runtime.rq_error,
                    "rq_error": runtime.rq_error,
                    "cx_active": len(runtime.connections),
                    "cx_total": runtime.connections_total,
                    "cx_connect_fail": runtime.connect_failures,
                }
                for key, runtime in self.endpoints.items()
            ],
        }


class ClusterUpdate:
    """A new version of a cluster, built piece by piece beside the live one: endpoints that stay keep pools, counts and
    health. `add` does the work, a few hundred endpoints a call; `commit` swaps. 10,000 endpoints never stall the loop.
    """

    __slots__ = ("_cluster", "_fresh", "_groups", "_runtime", "_speaks_otherwise")

    def __init__(self, runtime: ClusterRuntime, cluster: Cluster) -> None:
        self._runtime = runtime
        self._cluster = cluster
        self._speaks_otherwise = _wire(runtime.cluster) != _wire(cluster)
        self._fresh: dict[str, EndpointRuntime] = {}
        self._groups: dict[tuple[int, Locality, int | None], list[EndpointState]] = {}

    def add(self, localities: Sequence[LocalityEndpoints], now: float) -> None:
        runtime, fresh = self._runtime, self._fresh
        old, workload, cluster = runtime.endpoints, runtime.workload, self._cluster
        for group in localities:
            members = self._groups.setdefault((group.priority, group.locality, group.weight), [])
            for endpoint in group.endpoints:
                key = endpoint.key
                state = fresh.get(key) or old.get(key)  # listed twice: one pool, two places in the balance
                before = None
                if self._speaks_otherwise and state is not None and key not in fresh:
                    # Connections of the old kind serve nobody any more, and must not come back into the pool.
                    before, state = state, None
                if state is None:
                    state = EndpointRuntime(runtime, endpoint, now)
                    state.tls = upstream_tls(cluster, endpoint, workload)
                    state.expects_h2 = cluster.speaks_http2
                    if state.tls is not None and state.tls.is_mesh:
                        state.expects_h2 |= (cluster.offers_http2 or cluster.offers_http3) and cluster.protocol.is_http
                    if before is not None:
                        state.is_ejected, state.is_unhealthy = before.is_ejected, before.is_unhealthy
                        state.is_suspect, state.joined_at = before.is_suspect, before.joined_at
                elif state.endpoint is not endpoint:
                    if state.endpoint != endpoint:
                        state.series.clear()
                    state.endpoint = endpoint
                    state.weight = endpoint.weight
                fresh[key] = state
                members.append(state)

    def commit(self, now: float, cluster: Cluster | None = None) -> None:
        """cluster: the version with its endpoints, where __init__ was given one without."""
        runtime = self._runtime
        cluster = cluster or self._cluster
        old, before = runtime.endpoints, runtime.cluster if runtime.balancer is not None else None
        runtime.cluster = cluster
        runtime.is_shared_out = cluster.follows_client or cluster.proxy_protocol > 0
        runtime.endpoints = self._fresh
        runtime.max_requests = cluster.limits.max_requests
        runtime.max_pending = cluster.limits.max_pending_requests
        runtime.retry_budget = cluster.limits.retry_budget
        for key, gone in old.items():
            if self._fresh.get(key) is not gone:
                gone.is_removed = True
                if gone.idle or gone.shared or gone.shares:
                    gone.close_idle()
        if before is not None and before.tls != cluster.tls:
            runtime.refresh_tls()
        groups = [(*place, members) for place, members in self._groups.items()]
        if before is None:
            runtime.balancer = ClusterBalancer(cluster.lb, groups, runtime.state.draw, now)
            runtime.balancer.on_panic_pick = runtime.count_panic
        else:
            runtime.balancer.update(cluster.lb, groups, now)


def _wire(cluster: Cluster) -> tuple[object, ...]:
    """What a connection to the cluster is like: one of another wire cannot serve it."""
    return cluster.follows_client, cluster.proxy_protocol, cluster.speaks_http2, cluster.offers_http3


class WorkloadRuntime:
    """One workload in one worker: its clusters (made on first use) and its certificates."""

    __slots__ = ("_client_contexts", "_server_context", "bundle", "clusters", "specs", "state", "workload")

    def __init__(self, workload: Workload, specs: Mapping[str, Cluster], state: WorkerState) -> None:
        self.workload = workload
        self.specs = specs
        """The worker's table of clusters by key, shared by all workloads."""
        self.state = state
        self.clusters: dict[str, ClusterRuntime] = {}
        self.bundle: Bundle | None = None
        """None while the workload has no certificates."""
        self._client_contexts: dict[tuple[str, ...], ssl.SSLContext] = {}
        self._server_context: ssl.SSLContext | None = None

    def set_bundle(self, bundle: Bundle) -> None:
        """New certificates: new handshakes use them at once, connections that are open stay."""
        self.bundle = bundle
        self._client_contexts.clear()
        self._server_context = None
        for runtime in self.clusters.values():
            runtime.refresh_tls()

    def clear_bundle(self) -> None:
        """The identity changed: what was issued for the old one must not be shown any more."""
        self.bundle = None
        self._client_contexts.clear()
        self._server_context = None

    def client_context(self, alpn: tuple[str, ...]) -> ssl.SSLContext:
        """mTLS towards the mesh under this workload's identity. Call only with a bundle."""
        assert self.bundle is not None
        context = self._client_contexts.get(alpn)
        if context is None:
            context = self._client_contexts[alpn] = client_context(self.bundle, alpn=alpn)
        return context

    def server_context(self) -> ssl.SSLContext | None:
        """mTLS for this workload's inbound listeners; None without certificates."""
        if self._server_context is None and self.bundle is not None:
            self._server_context = server_context(self.bundle, alpn=ALPN_SERVER, requires_client_certificate=True)
        return self._server_context

    def cluster(self, key: str) -> ClusterRuntime | None:
        """The live cluster; None where the snapshot has none of that key (503 NC)."""
        runtime = self.clusters.get(key)
        if runtime is None or runtime.is_removed:
            spec = self.specs.get(key)
            if spec is None:
                return None
            now = monotonic()
            runtime = self.clusters[key] = ClusterRuntime(spec, self, self.state, now)
            for (endpoint_key, _), word in self.state.verdicts.get(key, {}).items():
                runtime.set_health(endpoint_key, word, now)
            runtime.balancer.recompute(now)
        return runtime
