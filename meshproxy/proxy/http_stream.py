"""One request: route → pick → forward → reply → count. The join between a downstream codec and an upstream one.

A downstream connection that serves one request at a time (HTTP/1.1) owns one HttpStream and starts it again for each
request; nothing on the plain path makes a task, a timer or a closure. Rare roads (retries, redirects, tunnels, header
operations) each cost one attribute test when they are not taken.

Source: Envoy router filter (retries, timeouts, local replies), HTTP connection manager (headers).
"""

from copy import copy
from time import monotonic, time
from typing import Any, Protocol

from meshproxy.codec.http1 import NO_BODY, RequestHead, ResponseHead, fields, replace_host, without_field
from meshproxy.model.cluster import Cluster
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.model.route import RetryPolicy
from meshproxy.policy.retry import CompiledRetry
from meshproxy.proxy import local_reply
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.proxy.local_reply import LocalReply
from meshproxy.route.rewrite import apply_ops, redirect_location, rewrite_path
from meshproxy.route.table import CompiledCluster, CompiledRoute
from meshproxy.telemetry.access_log import local_address, remote_address, tls_version
from meshproxy.upstream.cluster_runtime import ClusterRuntime, EndpointRuntime
from meshproxy.upstream.connect import ConnectError
from meshproxy.upstream.connection_h1 import HIGH_WATER_BYTES, UpstreamConnection
from meshproxy.upstream.connection_h2 import UpstreamStream, http_connection
from meshproxy.upstream.worker_state import NEVER, WorkerState

STREAM_IDLE_TIMEOUT_S = 300.0
"""Envoy's stream_idle_timeout default."""
MAX_REPLAY_BYTES = 64 * 1024
"""A request body longer than this cannot be sent a second time."""
MAX_RESENT = 7
"""How often a request is sent again because an upstream had not looked at it. One that refuses for ever is failing."""

_IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
_NONE = ResponseFlag.NONE.value


class Downstream(Protocol):
    """What a stream needs of the connection (HTTP/1.1) or stream (later codecs) it answers on."""

    deadline: float
    transport: Any

    @property
    def protocol(self) -> str:
        """`HTTP/1.1`, as the access log says it."""

    @property
    def is_blocked(self) -> bool:
        """The first of an answer would wait already: too much does, and it could not be sent either."""

    def send_response(self, head: ResponseHead, extra: bytes, body: bytes, is_complete: bool) -> None: ...
    def send_local_reply(self, reply: LocalReply, extra: bytes) -> None: ...
    def send_informational(self, head: ResponseHead) -> None: ...
    def send_body(self, body: bytes, is_complete: bool, trailers: bytes) -> None: ...
    def send_tunnel(self, data: bytes) -> None: ...
    def send_eof(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def pause_body(self) -> None: ...
    def resume_body(self) -> None: ...
    def stream_done(self, now: float) -> None: ...
    def take_early_tunnel_data(self) -> bytes: ...


class HttpStream:
    knows_grpc = False

    __slots__ = (
        "_retry_handle",
        "_retry_policy",
        "attempt",
        "cluster",
        "connection",
        "details",
        "down",
        "endpoint",
        "endpoint_key",
        "failure_reason",
        "flag",
        "has_downstream_eof",
        "has_upstream_eof",
        "head",
        "idle_timeout_s",
        "is_active",
        "is_request_complete",
        "is_retrying",
        "is_tunnel",
        "listener",
        "peer",
        "queue",
        "replay",
        "request_bytes",
        "request_id",
        "request_trailers",
        "resent",
        "response_bytes",
        "response_head_bytes",
        "route",
        "started",
        "state",
        "status",
        "target",
        "timeout_at",
        "tried",
        "try_timeout_at",
        "upstream_ms",
    )

    def __init__(self, down: Downstream, listener: ListenerRuntime, peer: PeerContext) -> None:
        self.down = down
        self.listener = listener
        self.peer = peer
        self.state: WorkerState = listener.state
        self.is_active = False
        self.connection: UpstreamConnection | UpstreamStream | None = None
        self.endpoint: EndpointRuntime | None = None
        self.cluster: ClusterRuntime | None = None
        self._retry_handle: Any = None
        self.is_retrying = False
        """Counts among the cluster's retries: from the decision until the next one, or the end."""

    # ── the request ──

    def start(self, head: RequestHead, now: float) -> None:
        """Begin a request. Its body follows in on_request_body, unless head.body is NO_BODY."""
        self.head = head
        self.started = now
        self.is_active = True
        self.is_request_complete = head.body == NO_BODY
        self.is_tunnel = False
        self.response_head_bytes = 0  # until the upstream's response begins to go out
        self.attempt = 0
        self.status = 0
        self.flag = _NONE
        self.details = "via_upstream"
        self.request_bytes = head.length
        self.request_id = b""
        self.request_trailers = b""
        self.resent = 0
        self.response_bytes = 0
        # One buffer each, not the pieces as they came: single bytes would cost forty times as much, and counting them
        # for each that comes the square of their number.
        self.queue: bytearray | None = None
        self.replay: bytearray | None = None
        self.tried: set[EndpointRuntime] | None = None
        self.endpoint_key: str | None = None
        self.failure_reason: str | None = None
        self.upstream_ms: int | None = None
        self.try_timeout_at = NEVER
        self._retry_policy: CompiledRetry | None = None
        self.route: CompiledRoute | None = None
        self.target: CompiledCluster | None = None
        self.cluster = self.endpoint = None
        listener = self.listener
        listener.counters.downstream_rq_total += 1

        if self.state.is_overloaded:
            self.state.counters.overload["refuse_request"] += 1
            self.reply(local_reply.OVERLOADED)
            return
        if head.method == b"CONNECT":  # an open door otherwise; tunnels come with their own listener (HBONE)
            self.reply(local_reply.NO_ROUTE)
            return
        table = listener.table
        host = table.find(head.authority) if table is not None else None
        if host is None:
            self.reply(local_reply.NO_ROUTE)
            return
        route = host.only_route
        if route is None:
            scheme = self._scheme(head)
            headers: Any = ()
            for probe in host.header_probes:
                if probe in head.lowered:
                    headers = head.received_headers()
                    break
            route = host.pick(head.method, head.path, head.authority, scheme, headers)
            if route is None:
                self.reply(local_reply.NO_ROUTE)
                return
        self.route = route
        timeout_s = route.timeout_s
        self.timeout_at = now + timeout_s if timeout_s else NEVER
        self.idle_timeout_s = route.idle_timeout_s or STREAM_IDLE_TIMEOUT_S
        target = route.only_cluster
        if target is None:
            if route.redirect is not None or route.direct_response is not None:
                self._reply_by_route(route)
                return
            target = route.choose_cluster(self.state.draw())
        self.target = target
        cluster: ClusterRuntime | None = target.runtime
        if cluster is None or cluster.is_removed:
            cluster = target.runtime = listener.workload.cluster(target.cluster_key)
            if cluster is None:
                self.reply(local_reply.NO_CLUSTER)
                return
        self.cluster = cluster
        if route.retry is not None and head.body != NO_BODY:
            self.replay = bytearray()
        cluster.active_requests += 1
        if cluster.active_requests > cluster.max_requests:
            cluster.counters.upstream_rq_pending_overflow += 1
            self.reply(local_reply.OVERFLOW)
            return
        deadline = now + self.idle_timeout_s
        self.down.deadline = deadline if deadline < self.timeout_at else self.timeout_at
        self._attempt(now)

    def _attempt(self, now: float) -> None:
        """Send the request to an endpoint: the first time, or once more."""
        cluster: Any = self.cluster
        self.attempt += 1
        endpoint: Any
        if self.tried is None:
            endpoint = cluster.balancer.pick(now)
        else:
            endpoint = cluster.pick_avoiding(now, self.tried)
        if endpoint is None:
            self.endpoint = None
            cluster.counters.upstream_cx_none_healthy += 1
            self.reply(local_reply.NO_HEALTHY_UPSTREAM)
            return
        self.endpoint = endpoint
        self.endpoint_key = endpoint.key
        endpoint.active_requests += 1
        idle = endpoint.idle
        connection = idle.pop() if idle else None
        if connection is None or connection.transport.is_closing():
            connection = cluster.acquire(endpoint, self, http_connection)
            if connection is None:
                if not self.is_request_complete and self.queue is None:
                    self.queue = bytearray()
                return
            if connection is ResponseFlag.UPSTREAM_OVERFLOW:
                self._leave_endpoint()
                self.reply(local_reply.OVERFLOW)
                return
        self.on_connected(connection)

    def downstream(self) -> tuple[Any, str]:
        return self.down.transport, self.down.protocol

    def on_connected(self, connection: UpstreamConnection | UpstreamStream) -> None:
        """A connection for us: from the pool, or fresh."""
        if not self.is_active or self.connection is not None:
            connection.release(False, monotonic())
            return
        self.connection = connection
        head = self.head
        path, block, suffix = self._request_head(head)
        body = b""
        queue, self.queue = self.queue, None
        if self.replay:  # all that has come of the body, whichever attempt this is
            body = bytes(self.replay)
            if len(body) > MAX_REPLAY_BYTES:
                self.replay = None
            self.down.resume_body()
        elif queue:
            body = bytes(queue)
            self.down.resume_body()
        retry = self.route.retry  # type: ignore[union-attr]  # a stream with a connection has a route
        if retry is not None and retry.per_try_timeout_s:
            self.try_timeout_at = monotonic() + retry.per_try_timeout_s
            self.down.deadline = min(self.down.deadline, self.try_timeout_at)
        connection.send(self, head, path, block, suffix)
        if body or (self.is_request_complete and head.body != NO_BODY):
            connection.send_body(body, self.is_request_complete, self.request_trailers)
        if self.down.is_blocked:
            connection.pause_reading()

    def _request_head(self, head: RequestHead) -> tuple[bytes, bytes, bytes]:
        """(path, block, suffix): the field lines to send are block + suffix; framing is the connection's."""
        route: Any = self.route
        target: Any = self.target
        path, block = head.path, head.block
        listener = self.listener
        cached = route.suffix
        if cached is None or cached[0] is not listener:
            suffix = listener.head_suffix
            if route.timeout_s:
                suffix += b"\r\nx-envoy-expected-rq-timeout-ms: %d" % (route.timeout_s * 1000)
            cached = route.suffix = (listener, suffix)
        suffix = cached[1]
        if not head.is_plain or self.attempt > 1 or listener.is_gateway or self.peer.xfcc:
            block, suffix = self._special(head, block, suffix)
        if not head.has_request_id:
            # Given once, so that every attempt and both access-log lines of a hop say the same id. The head is not
            # ours to change: an HTTP/2 connection gives equal requests the same one.
            if not self.request_id:
                self.request_id = self.state.request_id()
            suffix += b"\r\nx-request-id: " + self.request_id
        if route.rewrite is not None or route.request_ops is not None or target.request_ops is not None:
            # Last, so that a route has its say about what the proxy adds, too.
            path, block = self._rewritten(head, block + suffix, route, target)
            suffix = b""
        return path, block, suffix

    def _special(self, head: RequestHead, block: bytes, suffix: bytes) -> tuple[bytes, bytes]:
        """Block and suffix of a request that has more to it than the usual fields."""
        if self.peer.xfcc:
            # Inbound mTLS appends the peer (Istio APPEND_FORWARD); elsewhere what came in is not believed.
            received = head.xfcc + b"," if head.xfcc else b""
            suffix += b"\r\nx-forwarded-client-cert: " + received + self.peer.xfcc
        if self.listener.is_gateway:
            block = self._forwarded_for(block)
        elif head.forwarded_proto in (b"http", b"https"):
            # A sidecar believes the hop before it (Envoy with use_remote_address off); an edge does not.
            suffix = suffix.replace(b"proto: http", b"proto: " + head.forwarded_proto)
        if self.attempt > 1:
            suffix = suffix.replace(b"x-envoy-attempt-count: 1", b"x-envoy-attempt-count: %d" % self.attempt)
        if head.te_trailers:
            suffix += b"\r\nte: trailers"
        return block, suffix

    def _rewritten(
        self, head: RequestHead, block: bytes, route: CompiledRoute, target: CompiledCluster
    ) -> tuple[bytes, bytes]:
        """Path and block after the route's and the destination's operations on `block`."""
        path = head.path
        authority: bytes | None = None
        for ops in (target.request_ops, route.request_ops):
            if ops is not None:
                lines = apply_ops(ops, fields(block))
                block = b"".join([b"\r\n%b: %b" % line for line in lines])
                authority = authority or ops.authority
        if route.rewrite is not None:
            path = rewrite_path(route, head.path)
            if path != head.path:
                block += b"\r\nx-envoy-original-path: " + head.path
            if route.rewrite.authority is not None:
                authority = route.rewrite.authority.encode()
        if authority is not None:
            block = replace_host(block, authority)
        return path, block

    def _forwarded_for(self, block: bytes) -> bytes:
        """An edge appends the address it sees (Envoy use_remote_address)."""
        name = self.down.transport.get_extra_info("peername")
        address = name[0].encode() if isinstance(name, tuple) else b"unknown"
        received = [value for key, value in fields(block) if key == b"x-forwarded-for"]
        if received:
            block = without_field(block, b"x-forwarded-for")
        return block + b"\r\nx-forwarded-for: " + b",".join([*received, address])

    def on_request_body(self, data: bytes, is_complete: bool, trailers: bytes = b"") -> None:
        """A piece of the body as it arrived, decoded; is_complete with the last one (which may be empty)."""
        self.request_bytes += len(data)
        if is_complete:
            self.is_request_complete = True
            self.request_trailers = trailers
        connection = self.connection
        if connection is not None:
            if self.replay is not None and not self.response_head_bytes:
                self._remember(data)
            connection.send_body(data, is_complete, trailers)
            if not is_complete:
                self.down.deadline = min(self.timeout_at, self.try_timeout_at, monotonic() + self.idle_timeout_s)
        elif self.endpoint is not None or self._retry_handle is not None:
            # No connection yet, or none between two attempts: the body waits where the next attempt will find it whole.
            if self.replay is not None:
                self.replay += data
                waiting = len(self.replay)
            else:
                if self.queue is None:
                    self.queue = bytearray()
                self.queue += data
                waiting = len(self.queue)
            if waiting > HIGH_WATER_BYTES and not is_complete:
                self.down.pause_body()

    def _remember(self, data: bytes) -> None:
        """Keep the body for a second attempt, up to a bound."""
        if self.replay is not None:
            if len(self.replay) + len(data) > MAX_REPLAY_BYTES:
                self.replay = None
            else:
                self.replay += data

    @property
    def _can_replay(self) -> bool:
        return self.head.body == NO_BODY or self.replay is not None

    # ── the upstream's side (upstream.connection_h1.Stream) ──

    def on_response(self, head: ResponseHead, body: bytes, is_complete: bool) -> None:
        status = head.status
        route: Any = self.route
        endpoint: Any = self.endpoint
        if status < 300 and not endpoint.is_suspect:
            endpoint.rq_total += 1
            counters = self.cluster.counters  # type: ignore[union-attr]  # there is one while a response comes
            counters.upstream_rq_total += 1
            counters.upstream_rq_2xx += 1
        else:
            self._count_outcome(status)
        if route.retry is not None and status >= 400 and self._retry_status(status, head):
            return
        self.status = status
        self.response_head_bytes = head.length
        self.response_bytes = head.length + len(body)
        now = monotonic()
        took_ms = self.upstream_ms = int((now - self.started) * 1000)
        extra = b"\r\nx-envoy-upstream-service-time: %d" % took_ms
        target: Any = self.target
        if route.response_ops is not None or target.response_ops is not None:
            head = self._rewritten_response(head, extra)
            extra = b""
        if status == 101:
            self._start_tunnel(head, extra)
            return
        self.down.send_response(head, extra, body, is_complete)
        if is_complete:
            self._complete(now)
        else:
            self.down.deadline = min(self.timeout_at, now + self.idle_timeout_s)

    def _rewritten_response(self, head: ResponseHead, extra: bytes) -> ResponseHead:
        """A copy: the head may stand for other responses as well (HTTP/2)."""
        route, target = self.route, self.target
        assert route is not None and target is not None
        head = copy(head)
        head.block += extra
        for ops in (target.response_ops, route.response_ops):
            if ops is not None:
                head.block = b"".join([b"\r\n%b: %b" % line for line in apply_ops(ops, fields(head.block))])
        return head

    def on_informational(self, head: ResponseHead) -> None:
        self.down.send_informational(head)

    def on_response_body(self, body: bytes, is_complete: bool, trailers: bytes) -> None:
        self.response_bytes += len(body)
        self.down.send_body(body, is_complete, trailers)
        if is_complete:
            self._complete(monotonic())
        else:
            self.down.deadline = min(self.timeout_at, monotonic() + self.idle_timeout_s)

    def on_upstream_writable(self, is_writable: bool) -> None:
        if is_writable:
            self.down.resume_body()
        else:
            self.down.pause_body()

    def on_upstream_lost(self, detail: str, has_answered: bool) -> None:
        """The connection is gone before the response was whole."""
        cluster, endpoint, connection = self.cluster, self.endpoint, self.connection
        assert cluster is not None and endpoint is not None
        if self.is_tunnel:
            self.flag = ResponseFlag.UPSTREAM_CLOSED.value
            self._finish_accounting(monotonic())
            self.connection = None
            self.down.abort()
            return
        if self.response_head_bytes:
            # Bytes are out: the only honest end is an incomplete message (never a short 200).
            self.flag = ResponseFlag.UPSTREAM_CLOSED.value
            # However an HTTP/1.1 connection ends, to Envoy its stream ended with it; `reset` is HTTP/2's.
            detail = "connection_termination" if detail == "reset" else detail
            self.details = f"upstream_reset_after_response_started{{{detail}}}"
            self.state.report(cluster.key, endpoint.key, 3)
            self._finish_accounting(monotonic())
            self.connection = None
            self.down.abort()
            return
        self.connection = None
        cluster.counters.upstream_rq_rx_reset += 1
        if (
            not has_answered
            and connection is not None
            and (detail == "refused_stream" or (connection.requests > 1 and self.head.method in _IDEMPOTENT))
            and self._can_replay
            and not detail.startswith("upstream.")
            and self.resent < MAX_RESENT
        ):
            # The upstream closed a kept-alive connection as we wrote: it never saw the request, or may see it twice
            # (RFC 9110 §9.2.2). Or it says that it has not looked at the stream (RFC 9113 §8.7). Not a failure of the
            # endpoint, and not one of the operator's retries.
            self.resent += 1
            self.attempt -= 1
            self._leave_endpoint()
            self._attempt(monotonic())
            return
        self.state.report(cluster.key, endpoint.key, 502 if detail.startswith("upstream.") else 3)
        endpoint.rq_total += 1
        endpoint.rq_error += 1
        # Never reset-before-request: the head was written, so the upstream may have acted on it.
        kind = "refused" if detail == "refused_stream" else "reset"
        self._retry_or_fail(kind, local_reply.upstream_lost(detail))

    def on_connect_failed(self, error: ConnectError) -> None:
        if not self.is_active or self.endpoint is None:
            return
        self.endpoint.rq_total += 1
        self.endpoint.rq_error += 1
        self.failure_reason = error.reason
        self._retry_or_fail("connect-failure", local_reply.connect_failure(error.kind))

    # ── retries ──

    def _policy(self) -> CompiledRetry | None:
        policy = self._retry_policy
        if policy is None and self.route is not None and self.route.retry is not None:
            policy = self._retry_policy = _compiled_retry(self.route.retry)
        return policy

    def _retry_status(self, status: int, head: ResponseHead) -> bool:
        policy = self._policy()
        if policy is None or not policy.should_retry_status(status, head.headers()):
            return False
        if not self._may_retry():
            return False
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.release(False, monotonic())
        self._retry_soon()
        return True

    def _retry_or_fail(self, kind: str, reply: LocalReply) -> None:
        policy = self._policy()
        if policy is not None and policy.should_retry_reset(kind) and self._may_retry():
            self._retry_soon()
        else:
            self.reply(reply)

    def _may_retry(self) -> bool:
        cluster, route = self.cluster, self.route
        assert cluster is not None and route is not None and route.retry is not None
        if self.attempt > route.retry.attempts or not self._can_replay:
            if self.attempt > route.retry.attempts > 0:
                self.flag = ResponseFlag.RETRY_LIMIT.value
                cluster.counters.upstream_rq_retry_limit_exceeded += 1
            return False
        if self.is_retrying:  # the retry before this one is over
            self.is_retrying = False
            cluster.retries -= 1
        if not cluster.may_retry():
            cluster.counters.upstream_rq_retry_overflow += 1
            return False
        return True

    def _retry_soon(self) -> None:
        cluster, endpoint, route = self.cluster, self.endpoint, self.route
        assert cluster is not None and route is not None and route.retry is not None
        if endpoint is not None and route.retry.avoids_previous_hosts:
            self.tried = self.tried or set()
            self.tried.add(endpoint)
        self._leave_endpoint()
        cluster.retries += 1
        self.is_retrying = True
        cluster.counters.upstream_rq_retry += 1
        self.try_timeout_at = NEVER
        self.down.deadline = min(self.timeout_at, monotonic() + self.idle_timeout_s)
        self.queue = None
        delay_s = _compiled_retry(route.retry).delay_s(self.attempt, self.state.draw())
        self._retry_handle = self.state.loop.call_later(delay_s, self._retry_now)

    def _retry_now(self) -> None:
        self._retry_handle = None
        if self.is_active:
            self._attempt(monotonic())

    # ── endings ──

    def _count_outcome(self, status: int) -> None:
        endpoint, cluster = self.endpoint, self.cluster
        assert endpoint is not None and cluster is not None
        endpoint.rq_total += 1
        counters = cluster.counters
        counters.upstream_rq_total += 1
        if status < 300:
            counters.upstream_rq_2xx += 1
            if endpoint.is_suspect:
                self._judge(status)
            return
        if status < 400:
            counters.upstream_rq_3xx += 1
        elif status < 500:
            counters.upstream_rq_4xx += 1
        else:
            counters.upstream_rq_5xx += 1
            endpoint.rq_error += 1
        self._judge(status)

    def _judge(self, status: int) -> None:
        """Tell outlier detection of an answer, where it could matter."""
        endpoint, cluster = self.endpoint, self.cluster
        assert endpoint is not None and cluster is not None
        outlier = cluster.cluster.outlier
        if outlier is not None and (status >= 500 or endpoint.is_suspect or outlier.error_codes is not None):
            self.state.report(cluster.key, endpoint.key, status)

    def _leave_endpoint(self) -> None:
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            endpoint.active_requests -= 1

    def _complete(self, now: float) -> None:
        """The response is whole and out."""
        self._finish_accounting(now)  # before the connection goes: the log asks it for its address
        connection = self.connection
        if connection is not None:
            self.connection = None
            connection.release(self.is_request_complete, now)
        self.down.stream_done(now)

    def _finish_accounting(self, now: float) -> None:
        if not self.is_active:
            return
        self.is_active = False
        endpoint, cluster = self.endpoint, self.cluster
        if cluster is not None:
            cluster.active_requests -= 1
            if self.is_retrying:
                self.is_retrying = False
                cluster.retries -= 1
                if self.attempt > 1 and 0 < self.status < 500:
                    cluster.counters.upstream_rq_retry_success += 1
        listener, peer = self.listener, self.peer
        if endpoint is not None:
            endpoint.active_requests -= 1
            if self.flag is _NONE:
                key = peer.number + self.status
                series = endpoint.series.get(key)
                if series is None:
                    series = endpoint.series[key] = listener.http_series(
                        peer, endpoint, cluster.cluster if cluster is not None else None, self.status, _NONE
                    )
                series.record((now - self.started) * 1000, self.request_bytes, self.response_bytes)
                if self.state.access_log is not None:
                    self._log(now)
                self.endpoint = None
                return
        spec: Cluster | None = cluster.cluster if cluster is not None else None
        listener.http_series(peer, endpoint, spec, self.status, self.flag).record(
            (now - self.started) * 1000, self.request_bytes, self.response_bytes
        )
        if self.state.access_log is not None:
            self._log(now)
        self.endpoint = None

    def reply(self, reply: LocalReply, extra: bytes = b"") -> None:
        """Answer by ourselves; ends the stream."""
        self.status = reply.status
        if reply.flag is not ResponseFlag.NONE:
            self.flag = reply.flag.value if self.flag is _NONE else f"{reply.flag.value},{self.flag}"
        self.details = reply.details
        self.response_bytes = len(reply.body)
        self._send_reply(reply, extra)
        now = monotonic()
        self._finish_accounting(now)
        self.down.stream_done(now)

    def _send_reply(self, reply: LocalReply, extra: bytes) -> None:
        self.down.send_local_reply(reply, extra)

    def _scheme(self, head: RequestHead) -> bytes:
        """A sidecar believes what the hop before it says; an edge does not."""
        forwarded = head.forwarded_proto
        if forwarded in (b"http", b"https") and not self.listener.is_gateway:
            return forwarded
        return b"https" if self.peer.is_mtls or self.listener.listener.tls is not None else b"http"

    def _reply_by_route(self, route: CompiledRoute) -> None:
        head = self.head
        if route.redirect is not None:
            location = redirect_location(route, self._scheme(head), head.authority, head.path)
            status, body, block = route.redirect.code, b"", b"\r\nlocation: " + location
        else:
            direct: Any = route.direct_response
            status, body = direct.status, direct.body
            block = b"\r\ncontent-type: text/plain" if body else b""
        if route.response_ops is not None:
            block = b"".join([b"\r\n%b: %b" % line for line in apply_ops(route.response_ops, fields(block))])
        self.reply(LocalReply(status, ResponseFlag.NONE, "direct_response", body), block)

    def on_deadline(self, now: float) -> None:
        """The downstream's deadline passed while we are active."""
        cluster, endpoint = self.cluster, self.endpoint
        if now >= self.try_timeout_at and now < self.timeout_at and not self.response_head_bytes:
            self.try_timeout_at = NEVER
            if cluster is not None:
                cluster.counters.upstream_rq_per_try_timeout += 1
            self._drop_upstream()
            if cluster is not None and endpoint is not None:
                self.state.report(cluster.key, endpoint.key, 2)
            self._retry_or_fail("per-try-timeout", local_reply.UPSTREAM_TIMEOUT)
            return
        is_timeout = now >= self.timeout_at
        if is_timeout and cluster is not None and not self.response_head_bytes:
            cluster.counters.upstream_rq_timeout += 1
            if endpoint is not None and self.is_request_complete:
                self.state.report(cluster.key, endpoint.key, 2)
        self._drop_upstream()
        if self.response_head_bytes:
            self.flag = (ResponseFlag.UPSTREAM_TIMEOUT if is_timeout else ResponseFlag.STREAM_IDLE).value
            self.details = "response_timeout" if is_timeout else "stream_idle_timeout"
            self.down.abort()
            self._finish_accounting(now)
            return
        self.reply(local_reply.UPSTREAM_TIMEOUT if is_timeout else local_reply.STREAM_IDLE)

    def cancel(self, flag: ResponseFlag, details: str) -> None:
        """The downstream left, or broke the protocol in its body: nothing more is to be sent to it."""
        if not self.is_active:
            return
        self._drop_upstream()
        self.flag = flag.value
        self.details = details
        if not self.response_head_bytes:
            self.status = 0
        if self.cluster is not None:
            self.cluster.counters.upstream_rq_cancelled += 1
        self._finish_accounting(monotonic())

    def waiting_bytes(self) -> int:
        """Of a request body that is kept here, for its first attempt or another."""
        if not self.is_active:
            return 0
        return len(self.replay or b"") + len(self.queue or b"")

    def shed(self) -> None:
        """Memory runs out, and this stream is among those that hold most of it."""
        self.cancel(ResponseFlag.OVERLOAD, "overload")
        self.down.abort()

    def _drop_upstream(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()
        elif self.cluster is not None:
            self.cluster.forget(self)
        if self._retry_handle is not None:
            self._retry_handle.cancel()
            self._retry_handle = None

    # ── tunnels: Upgrade and CONNECT ──

    def _start_tunnel(self, head: ResponseHead, extra: bytes) -> None:
        if head.status == 101 and not self.head.upgrade:
            self._drop_upstream()
            self.response_head_bytes = 0
            self.reply(local_reply.upstream_lost("upstream.unexpected_upgrade"))
            return
        self.is_tunnel = True
        self.has_downstream_eof = self.has_upstream_eof = False
        self.down.send_response(head, extra, b"", False)
        self.down.deadline = monotonic() + self.idle_timeout_s
        if self.connection is not None:
            early = self.down.take_early_tunnel_data()
            if early:
                self.send_tunnel(early)
            self.connection.start_tunnel()

    def on_tunnel_data(self, data: bytes) -> None:
        self.response_bytes += len(data)
        self.down.deadline = monotonic() + self.idle_timeout_s
        self.down.send_tunnel(data)

    def on_upstream_eof(self) -> None:
        self.has_upstream_eof = True
        if self.has_downstream_eof:
            self._end_tunnel()
        else:
            self.down.send_eof()

    def send_tunnel(self, data: bytes) -> None:
        """Bytes from the downstream."""
        self.request_bytes += len(data)
        self.down.deadline = monotonic() + self.idle_timeout_s
        if self.connection is not None:
            self.connection.send_tunnel(data)

    def on_downstream_eof(self) -> None:
        if not self.is_tunnel or self.connection is None:
            return
        self.has_downstream_eof = True
        if self.has_upstream_eof:
            self._end_tunnel()
        else:
            self.connection.send_eof()

    def _end_tunnel(self) -> None:
        """Both halves are over, and neither side will say more: it is ours to close."""
        self._finish_accounting(monotonic())
        connection, self.connection = self.connection, None
        assert connection is not None
        connection.end_tunnel()
        self.down.close()

    # ── the log ──

    def _log(self, now: float) -> None:
        log = self.state.access_log
        assert log is not None
        head = self.head
        downstream = self.down.transport
        log.append(
            (
                time() - (now - self.started),
                (now - self.started) * 1000,
                head.method,
                head.path,
                self.down.protocol,
                self.status,
                self.flag,
                self.details,
                None,
                self.failure_reason,
                self.request_bytes - head.length,
                self.response_bytes - self.response_head_bytes,
                self.upstream_ms,
                None,
                None,
                None if head.has_request_id else self.request_id or self.state.request_id(),
                head.authority,
                self.endpoint_key,
                self.cluster.cluster.name if self.cluster is not None else None,
                local_address(self.connection.transport) if self.connection is not None else None,
                local_address(downstream),
                remote_address(downstream),
                downstream.get_extra_info("requested_server_name"),
                self.route.name if self.route is not None else None,
                [*head.headers(), (b"x-request-id", self.request_id)] if self.request_id else head.headers(),
                None,
                self.peer.principal if self.peer.is_mtls else None,
                tls_version(downstream),
                self.attempt,
                self.listener.workload.workload.id,
            )
        )


_retries: dict[RetryPolicy, CompiledRetry] = {}


def _compiled_retry(policy: RetryPolicy) -> CompiledRetry:
    compiled = _retries.get(policy)
    if compiled is None:
        if len(_retries) > 256:
            _retries.clear()
        compiled = _retries[policy] = CompiledRetry(policy)
    return compiled
