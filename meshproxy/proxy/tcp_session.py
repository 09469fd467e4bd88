"""One L4 connection: pick → connect → relay. Any bytes, half-close kept, back-pressure by pausing the fuller side.

Bytes go from one transport to the other as they came; the relay looks at none of them.
"""

import asyncio
from time import monotonic, time
from typing import Any

from meshproxy.model.response_flag import ResponseFlag
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.telemetry.access_log import local_address, remote_address, tls_version
from meshproxy.telemetry.recorder import TcpSeries
from meshproxy.upstream.cluster_runtime import ClusterRuntime, EndpointRuntime
from meshproxy.upstream.connect import ConnectError, reset
from meshproxy.upstream.worker_state import NEVER

HIGH_WATER_BYTES = 256 * 1024
LOW_WATER_BYTES = 64 * 1024
FLUSH_TIMEOUT_S = 60.0
"""How long an upstream may take to read the rest of a session whose downstream has gone."""
MAX_CONNECT_ATTEMPTS = 3
"""Endpoints tried before the downstream is closed (Envoy tcp_proxy max_connect_attempts is 1; nothing was sent yet, so
trying the next endpoint is safe)."""


class TcpSession(asyncio.Protocol):
    """The downstream's side, and the owner of the pair."""

    __slots__ = (
        "_attempts",
        "_early",
        "_failure_reason",
        "_flag",
        "_has_eof",
        "_must_authenticate",
        "_series",
        "_started",
        "_tried",
        "cluster",
        "cluster_key",
        "deadline",
        "endpoint",
        "endpoint_key",
        "listener",
        "peer",
        "received",
        "sent",
        "server_name",
        "transport",
        "upstream",
    )

    def __init__(
        self, listener: ListenerRuntime, peer: PeerContext | None, cluster_key: str, server_name: str | None = None
    ) -> None:
        """peer: None where TLS will tell it. server_name: asked for in TLS that is passed through."""
        self.listener = listener
        self.peer = peer or listener.plain_peer
        self._must_authenticate = peer is None
        self.cluster_key = cluster_key
        self.server_name = server_name
        self.cluster: ClusterRuntime | None = None
        self.endpoint: EndpointRuntime | None = None
        self.endpoint_key: str | None = None
        """Of the endpoint tried last."""
        self.upstream: TcpUpstream | None = None
        self.transport: Any = None
        self.deadline = NEVER
        self.sent = self.received = 0
        self._failure_reason: str | None = None
        self._early: list[bytes] = []
        self._has_eof = False
        self._attempts = 0
        self._tried: set[EndpointRuntime] = set()
        self._series: TcpSeries | None = None
        self._started = 0.0
        self._flag = ResponseFlag.NONE.value

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._started = monotonic()
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        listener = self.listener
        listener.counters.downstream_cx_total += 1
        listener.counters.downstream_cx_active += 1
        listener.connections.add(self)
        listener.state.open_connections += 1
        listener.state.timed.add(self)
        if self._must_authenticate:
            peer = listener.authenticate(transport)
            if peer is None:
                return
            self.peer = peer
        self.cluster = listener.workload.cluster(self.cluster_key)
        if self.cluster is None:
            self._refuse(ResponseFlag.NO_CLUSTER)
            return
        self._connect()

    def _connect(self) -> None:
        cluster = self.cluster
        assert cluster is not None
        self._attempts += 1
        now = monotonic()
        endpoint: Any = cluster.pick_avoiding(now, self._tried) if self._tried else cluster.balancer.pick(now)
        if endpoint is None:
            self._refuse(ResponseFlag.NO_HEALTHY_UPSTREAM)
            return
        self.endpoint = endpoint
        self.endpoint_key = endpoint.key
        endpoint.active_requests += 1
        if cluster.connections >= cluster.cluster.limits.max_connections:
            cluster.counters.upstream_cx_overflow += 1
            self._refuse(ResponseFlag.UPSTREAM_OVERFLOW)
            return
        cluster.open(endpoint, self, lambda endpoint: TcpUpstream(self, endpoint))

    def downstream(self) -> tuple[Any, str]:
        return self.transport, "TCP"

    def on_connected(self, upstream: "TcpUpstream") -> None:
        if self.transport.is_closing():
            upstream.transport.abort()
            return
        self.upstream = upstream
        endpoint, listener = self.endpoint, self.listener
        assert endpoint is not None and self.cluster is not None
        endpoint.rq_total += 1
        series = endpoint.series.get(self.peer.number)
        if series is None:
            series = endpoint.series[self.peer.number] = listener.tcp_series(
                self.peer, endpoint, self.cluster.cluster, ResponseFlag.NONE.value
            )
        self._series = series
        series.opened += 1
        if endpoint.is_suspect:
            listener.state.report(self.cluster.key, endpoint.key, 4)
        for data in self._early:
            self.received += len(data)
            upstream.transport.write(data)
        self._early.clear()
        if self._has_eof:
            upstream.transport.write_eof()
        self.touch()
        self.transport.resume_reading()  # harmless where nothing came early

    def on_connect_failed(self, error: ConnectError) -> None:
        endpoint = self.endpoint
        if endpoint is not None:
            endpoint.active_requests -= 1
            endpoint.rq_total += 1
            endpoint.rq_error += 1
            self._tried.add(endpoint)
            self.endpoint = None
        self._failure_reason = error.reason
        if self.transport.is_closing():
            return
        if self._attempts < MAX_CONNECT_ATTEMPTS:
            self._connect()
        else:
            self._refuse(ResponseFlag.UPSTREAM_CONNECTION_FAILURE)

    def _refuse(self, flag: ResponseFlag) -> None:
        self._flag = flag.value
        self._series = self.listener.tcp_series(
            self.peer, self.endpoint, self.cluster.cluster if self.cluster is not None else None, flag.value
        )
        self._series.opened += 1
        reset(self.transport)  # an orderly end would say that there was nothing to be had

    def touch(self) -> None:
        """There was traffic: the idle clock starts again. Called by the sweep, not per piece of data."""
        idle_timeout_s = self.listener.listener.idle_timeout_s
        self.deadline = monotonic() + idle_timeout_s if idle_timeout_s is not None else NEVER

    def on_deadline(self, now: float) -> None:
        upstream = self.upstream
        if upstream is not None and upstream.moved + self.received != upstream.seen:
            # Data moved since we looked last: comparing totals here costs nothing while bytes flow.
            upstream.seen = upstream.moved + self.received
            self.touch()
            return
        self.deadline = NEVER
        self.listener.counters.downstream_cx_idle_timeout += 1
        self._flag = ResponseFlag.STREAM_IDLE.value
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        upstream = self.upstream
        if upstream is None:
            # One read is kept until there is somewhere to write to: a downstream cannot fill our memory meanwhile. (Not
            # paused in connection_made: uvloop begins to read after it, whatever was said there.)
            self._early.append(data)
            self.transport.pause_reading()
            return
        self.received += len(data)
        upstream.transport.write(data)

    def eof_received(self) -> bool:
        self._has_eof = True
        upstream = self.upstream
        if upstream is None:
            return True
        if upstream.has_eof:
            upstream.close()
            return False
        upstream.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        self.listener.state.on_buffered()
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        listener = self.listener
        if self not in listener.connections:
            return
        listener.connections.discard(self)
        listener.counters.downstream_cx_active -= 1
        listener.counters.downstream_cx_destroy += 1
        listener.state.open_connections -= 1
        listener.state.timed.discard(self)
        upstream = self.upstream
        if upstream is not None and not upstream.transport.is_closing():
            upstream.close() if exc is None else reset(upstream.transport)
        if upstream is None and self.cluster is not None:
            self.cluster.forget(self)
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            endpoint.active_requests -= 1
        series = self._series
        if series is not None:
            series.closed += 1
            series.received_bytes += self.received
            series.sent_bytes += upstream.moved if upstream is not None else 0
        if listener.state.access_log is not None:
            self._log()
        self.upstream = None  # each names the other: without this only the collector would free them

    def held_bytes(self) -> int:
        """What waits to be written, either way."""
        held: int = self.transport.get_write_buffer_size()
        if self.upstream is not None:
            held += self.upstream.transport.get_write_buffer_size()
        return held

    def shed(self) -> None:
        """Memory runs out, and this session is among those that hold most of it."""
        self._flag = ResponseFlag.OVERLOAD.value
        if self.upstream is not None:
            reset(self.upstream.transport)
        reset(self.transport)

    def drain(self) -> None:
        """TCP has no way to say goodbye: the session goes on until the drain's deadline."""

    def _log(self) -> None:
        log = self.listener.state.access_log
        assert log is not None
        upstream, downstream = self.upstream, self.transport
        duration_s = monotonic() - self._started
        log.append(
            (
                time() - duration_s,
                duration_s * 1000,
                None,  # method, path, protocol
                None,
                None,
                0,
                self._flag,
                None,  # details, termination details
                None,
                self._failure_reason,
                self.received,
                upstream.moved if upstream is not None else 0,
                None,  # upstream service time, x-forwarded-for, user agent, request id, authority
                None,
                None,
                None,
                None,
                self.endpoint_key,
                self.cluster.cluster.name if self.cluster is not None else None,
                local_address(upstream.transport) if upstream is not None else None,
                local_address(downstream),
                remote_address(downstream),
                self.server_name or downstream.get_extra_info("requested_server_name"),
                None,  # route
                None,  # headers
                None,
                self.peer.principal if self.peer.is_mtls else None,
                tls_version(downstream),
                self._attempts,
                self.listener.workload.workload.id,
            )
        )


class TcpUpstream(asyncio.Protocol):
    """The upstream's side of a session."""

    __slots__ = ("deadline", "endpoint", "has_eof", "moved", "seen", "session", "transport")

    def __init__(self, session: TcpSession, endpoint: EndpointRuntime) -> None:
        self.session = session
        self.endpoint = endpoint
        self.moved = 0
        """Bytes from the upstream."""
        self.seen = 0
        self.has_eof = False
        self.deadline = NEVER
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        self.endpoint.connections.add(self)
        self.endpoint.cluster.counters.upstream_cx_active += 1

    def data_received(self, data: bytes) -> None:
        self.moved += len(data)
        self.session.transport.write(data)

    def eof_received(self) -> bool:
        self.has_eof = True
        session = self.session
        if session._has_eof:
            session.transport.close()
            return False
        session.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        self.session.listener.state.on_buffered()
        if not self.session.transport.is_closing():
            self.session.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.session.transport.is_closing():
            self.session.transport.resume_reading()

    def close(self) -> None:
        """What is written still goes out, if the upstream takes it in time."""
        self.deadline = monotonic() + FLUSH_TIMEOUT_S
        self.session.listener.state.timed.add(self)
        self.transport.close()

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        self.transport.abort()

    def held_bytes(self) -> int:
        return int(self.transport.get_write_buffer_size())

    def shed(self) -> None:
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        endpoint = self.endpoint
        endpoint.connections.discard(self)
        self.session.listener.state.timed.discard(self)
        endpoint.cluster.counters.upstream_cx_active -= 1
        endpoint.cluster.connection_closed()
        transport = self.session.transport
        if transport is not None and not transport.is_closing():
            # A reset is passed on as a reset, an end as an end.
            transport.close() if exc is None else reset(transport)
