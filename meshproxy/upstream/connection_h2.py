"""One HTTP/2 upstream connection, shared by many requests; each stream of it looks like a connection to its request.

Decides: how many requests may share it, when it takes no more. Leaves to others: frames and flow control
(codec.http2), what field lists may hold (codec.http2_fields), what the response means (proxy.http_stream).
"""

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

from meshproxy.codec import http2
from meshproxy.codec.http1 import NO_BODY, RequestHead
from meshproxy.codec.http2 import Http2Connection, Http2Error, Http2Stream, StreamError
from meshproxy.codec.http2_fields import (
    extended_connect,
    from_block,
    from_trailers,
    response_head,
    trailers,
    tunnel_opened,
)
from meshproxy.errors import RemoteProtocolError
from meshproxy.upstream.connect import ALPN_HTTP2
from meshproxy.upstream.connection_h1 import (
    HIGH_WATER_BYTES,
    LOW_WATER_BYTES,
    MAX_INFORMATIONAL,
    Stream,
    UpstreamConnection,
)
from meshproxy.upstream.worker_state import NEVER

if TYPE_CHECKING:
    from meshproxy.upstream.cluster_runtime import EndpointRuntime

MAX_FREE = 32
MAX_KNOWN = 256
MAX_KNOWN_BYTES = 2048
"""Of a head that is remembered: few short blocks can mean many bytes."""
SETTINGS_TIMEOUT_S = 10.0
PROBE_S = 1.0
"""How long a connection on which nothing was heard during a whole request may take to answer a PING."""
LAST_STREAM_ID = 2**31 - 1
_REQUEST_ID = b"\r\nx-request-id: "
_LITERAL_REQUEST_ID = b"\x10\x0cx-request-id"
"""A literal that is never indexed, its name spelt out (RFC 7541 §6.2.3): every value is another."""


class UpstreamH2(Http2Connection, asyncio.Protocol):
    __slots__ = (
        "_free",
        "_is_waking",
        "_next_id",
        "_opened_at",
        "_probed_at_read",
        "_reads",
        "_scheme",
        "_settings_due",
        "_upgrades",
        "deadline",
        "endpoint",
        "is_going",
        "requests",
        "transport",
    )

    def __init__(self, endpoint: "EndpointRuntime") -> None:
        super().__init__(is_client=True)
        self.endpoint = endpoint
        self.deadline = NEVER
        self.requests = 0
        self.is_going = False
        """It takes no more requests, and closes when it has none."""
        self.transport: Any = None
        self._free: list[UpstreamStream] = []
        self._is_waking = False
        self._next_id = 1
        self._opened_at = 0.0
        self._settings_due = NEVER
        self._reads = 0
        """How often anything was heard from the peer."""
        self._probed_at_read = -1
        """_reads when a probe was sent; -1: none is under way."""
        self._upgrades: list[UpstreamStream] = []
        """Tunnels that wait to hear whether the peer knows extended CONNECT."""
        self._scheme = b"https" if endpoint.tls is not None else b"http"

    # ── the pool's side ──

    def has_room(self) -> bool:
        spec = self.endpoint.cluster.cluster
        limit = spec.max_concurrent_streams
        if (
            self.is_going
            or self.is_dead
            or len(self.streams) >= self.peer_max_streams
            or (limit and len(self.streams) >= limit)
            or self.transport.is_closing()
        ):
            return False
        if (
            0 < spec.max_requests_per_connection <= self.requests
            or self._next_id >= LAST_STREAM_ID
            or (spec.max_connection_duration_s or NEVER) <= monotonic() - self._opened_at
        ):
            self.retire()
            return False
        return True

    def open_stream(self) -> "UpstreamStream":
        """A place for one request; only after has_room(), and for one that is sent in this turn."""
        stream = self._free.pop() if self._free else UpstreamStream(self)
        stream.id = 0
        stream.http = None
        stream.has_head = False
        return stream

    def begin(self, stream: "UpstreamStream") -> None:
        """Give the stream its number: streams begin in the order of their numbers (RFC 9113 §5.1.1)."""
        stream.open(self._next_id, self._peer_initial_window, self.stream_window)
        stream.informational = 0
        self.last_id = self._next_id
        self._next_id += 2
        self._window_updates_allowed += 2
        stream.reads_before = self._reads
        self.streams[stream.id] = stream
        self.requests += 1
        if self._probed_at_read < 0:
            self.deadline = self._settings_due if self.awaits_settings else NEVER

    def retire(self) -> None:
        """No more requests; those it has are finished."""
        self.is_going = True
        if self in self.endpoint.shared:
            self.endpoint.shared.remove(self)
        if not self.streams and self.transport is not None and not self.transport.is_closing():
            self.goaway(0, http2.NO_ERROR)
            self._flush()
            self.transport.close()

    def stream_over(self, stream: "UpstreamStream") -> None:
        if len(self._free) < MAX_FREE and not self.is_dead:
            self._free.append(stream)
        if self.is_dead:
            return
        endpoint = self.endpoint
        if endpoint.cluster.pending and self.has_room() and self._take_waiter():
            return
        if self.streams:
            return
        if (
            self.is_going
            or endpoint.is_removed
            or endpoint.is_ejected
            or not self.peer_max_streams
            or endpoint.cluster.pending  # for another endpoint: its turn
        ):
            self.retire()
            return
        if self._probed_at_read < 0:
            self._rest(self._now)

    def _rest(self, now: float) -> None:
        """No stream is open."""
        idle_timeout_s = self.endpoint.cluster.cluster.idle_timeout_s
        self.deadline = now + idle_timeout_s if idle_timeout_s is not None else NEVER

    def _take_waiter(self) -> bool:
        """Whether somebody who waits for a connection to this endpoint has got a share of this one."""
        pending = self.endpoint.cluster.pending
        for index, (endpoint, waiter, _) in enumerate(pending):
            if endpoint is self.endpoint:
                del pending[index]
                waiter.on_connected(self.open_stream())
                return True
        return False

    def probe(self) -> None:
        """A request was given up, and nothing has been heard since it was sent: is anybody there?

        A path that is gone (another radio cell, a NAT that forgot) gives no error for a quarter of an hour, and on a
        shared connection every request would wait for it.
        """
        if self._probed_at_read < 0 and not self.is_dead:
            self._probed_at_read = self._reads
            self.deadline = monotonic() + PROBE_S
            self.ping(b"meshpoke")

    def close(self) -> None:
        self.retire()

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        if self.transport.is_closing():
            self.transport.abort()
        elif 0 <= self._probed_at_read:
            is_silent = self._reads == self._probed_at_read
            self._probed_at_read = -1
            if is_silent:
                self.endpoint.cluster.counters.upstream_cx_destroy_local += 1
                self.transport.abort()
            elif not self.streams:
                self._rest(now)
        elif self.awaits_settings:
            self.fail(Http2Error(http2.SETTINGS_TIMEOUT, "settings_timeout"))
        elif not self.streams:
            self.endpoint.cluster.counters.upstream_cx_idle_timeout += 1
            self.retire()

    def held_bytes(self) -> int:
        held: int = self.transport.get_write_buffer_size()
        for stream in self.streams.values():
            held += stream.queued_bytes
        return held

    def shed(self) -> None:
        self.transport.abort()

    # ── asyncio's side ──

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        endpoint = self.endpoint
        endpoint.connections.add(self)
        endpoint.shared.append(self)
        state = endpoint.cluster.state
        state.timed.add(self)
        endpoint.cluster.counters.upstream_cx_active += 1
        self._opened_at = self._now = monotonic()
        self.deadline = self._settings_due = self._opened_at + SETTINGS_TIMEOUT_S
        self.start()

    def connection_lost(self, exc: Exception | None) -> None:
        endpoint = self.endpoint
        if self not in endpoint.connections:
            return
        endpoint.connections.discard(self)
        if self in endpoint.shared:
            endpoint.shared.remove(self)
        cluster = endpoint.cluster
        cluster.state.timed.discard(self)
        cluster.counters.upstream_cx_active -= 1
        self.is_dead = True
        self._free.clear()
        code = http2.INTERNAL_ERROR if exc is not None else http2.CANCEL
        self._drop_streams(code)
        waiting, self._upgrades = self._upgrades, []
        for stream in waiting:
            stream.on_reset(code)
        cluster.connection_closed()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        self._reads += 1
        self.receive(data, monotonic())
        if self._out and not self.is_dead:
            self._wake()

    def pause_writing(self) -> None:
        self.pause_output()
        self.endpoint.cluster.state.on_buffered()

    def resume_writing(self) -> None:
        self.resume_output()

    # ── codec.http2's side ──

    def _wake(self) -> None:
        if not self._is_waking:
            self._is_waking = True
            self.endpoint.cluster.state.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_waking = False
        if self._out and not self.transport.is_closing():
            self.transport.write(self.take_output())

    def _on_header_block(self, stream_id: int, block: bytes, is_end: bool) -> None:
        stream = self.streams.get(stream_id)
        if stream is None or stream.is_peer_ended:
            self.decode(block)  # for the table's sake
            if stream_id in self._reset_by_us:
                self._glitch()
                return
            self._check_not_idle(stream_id)
            raise Http2Error(http2.STREAM_CLOSED, "headers_after_end")
        if stream.has_head:
            fields = self.decode(block)
            if not is_end or stream.expected > 0:
                raise StreamError(http2.PROTOCOL_ERROR, "bad_trailers")
            try:
                lines = trailers(fields)
            except RemoteProtocolError:
                raise StreamError(http2.PROTOCOL_ERROR, "bad_trailers") from None
            self._end(stream)
            stream.http.on_response_body(b"", True, lines)
            return
        key = (block, is_end, stream.is_head_request)
        head = self._memo.get(key)
        if head is None:
            fields = self.decode(block)
            try:
                head = response_head(fields, stream.is_head_request, is_end)
            except RemoteProtocolError:
                raise StreamError(http2.PROTOCOL_ERROR, "headers_too_large") from None
            if head.length <= MAX_KNOWN_BYTES and http2.changes_no_table(block):
                if len(self._memo) >= MAX_KNOWN:
                    self._memo.clear()
                self._memo[key] = head
        if head.status < 200:
            stream.informational += 1
            if is_end or stream.informational > MAX_INFORMATIONAL:
                raise StreamError(http2.PROTOCOL_ERROR, "too_many_informational")
            stream.http.on_informational(head)
            return
        stream.has_head = True
        if stream.upgrade and head.status < 300 and not is_end:
            stream.http.on_response(tunnel_opened(head, stream.upgrade, stream._upgrade_head[1]), b"", False)
            return
        if head.body > 0:
            stream.expected = head.body
        elif head.body == NO_BODY and not is_end:
            stream.expected = 0
        if is_end:
            self._end(stream)
        stream.http.on_response(head, b"", is_end)

    def _end(self, stream: "UpstreamStream") -> None:
        """The peer has said its last on this stream."""
        stream.is_peer_ended = True
        if stream.is_ended and stream.queue is None and self.streams.pop(stream.id, None) is not None:
            stream.on_closed()

    def _on_goaway(self, last_id: int, code: int) -> None:
        """Streams above last_id were never looked at: their requests may go elsewhere (RFC 9113 §6.8)."""
        self.is_going = True
        if self in self.endpoint.shared:
            self.endpoint.shared.remove(self)
        for stream in [stream for stream in self.streams.values() if stream.id > last_id]:
            self.streams.pop(stream.id, None)
            self._unblock(stream.id)
            stream.on_reset(http2.REFUSED_STREAM)
        if not self.streams:
            self._flush()
            self.transport.close()

    def _on_settings(self) -> None:
        waiting, self._upgrades = self._upgrades, []
        for stream in waiting:
            if stream.http is not None:
                stream.send_upgrade()

    def _on_stream_error(self, stream_id: int, error: StreamError) -> None:
        self.endpoint.cluster.state.counters.protocol_error(error.detail)
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.broken_by = error.detail

    def fail(self, error: Http2Error) -> None:
        for stream in self.streams.values():
            stream.broken_by = error.detail
        super().fail(error)

    def _on_dead(self, error: Http2Error) -> None:
        self.endpoint.cluster.counters.upstream_cx_protocol_error += 1
        self.endpoint.cluster.state.counters.protocol_error(error.detail)
        if self in self.endpoint.shared:
            self.endpoint.shared.remove(self)
        if not self.transport.is_closing():
            self._flush()
            self.transport.close()

    # ── requests ──

    def request_block(self, method: bytes, path: bytes, block: bytes, suffix: bytes) -> bytes:
        """The encoded head of a request; block and suffix: field lines, Host among them."""
        at = suffix.rfind(_REQUEST_ID)
        literal = b""
        if at >= 0 and len(suffix) - at == len(_REQUEST_ID) + 36:
            literal = _LITERAL_REQUEST_ID + b"\x24" + suffix[at + len(_REQUEST_ID) :]
            suffix = suffix[:at]
        key = (method, path, block, suffix)
        encoded = self._encoded.get(key)
        if encoded is None:
            lines = from_block(block + suffix)
            authority = next((value for name, value, _ in lines if name == b"host"), b"")
            encoded = self.encode(
                [
                    (b":method", method, False),
                    (b":scheme", self._scheme, False),
                    (b":authority", authority, False),
                    (b":path", path, False),
                    *(line for line in lines if line[0] != b"host"),
                ]
            )
            if len(path) + len(block) <= MAX_KNOWN_BYTES and http2.changes_no_table(encoded):
                if len(self._encoded) >= MAX_KNOWN:
                    self._encoded.clear()
                self._encoded[key] = encoded
            else:
                self._encoded.clear()
        return encoded + literal


class _Negotiating(asyncio.Protocol):
    """Until TLS is up: ALPN says which of the two it becomes."""

    __slots__ = ("endpoint", "transport")

    def __init__(self, endpoint: "EndpointRuntime") -> None:
        self.endpoint = endpoint
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        protocol = UpstreamH2(self.endpoint) if chosen in ALPN_HTTP2 else UpstreamConnection(self.endpoint)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


def http_connection(endpoint: "EndpointRuntime") -> Any:
    """The protocol for a new connection to an endpoint that speaks HTTP."""
    if endpoint.tls is not None:
        return _Negotiating(endpoint)
    return UpstreamH2(endpoint) if endpoint.http_spec().speaks_http2 else UpstreamConnection(endpoint)


class UpstreamStream(Http2Stream):
    """One request's share of the connection: what proxy.http_stream takes for a connection."""

    __slots__ = (
        "_is_tunnel",
        "_upgrade_head",
        "broken_by",
        "connection",
        "has_head",
        "http",
        "informational",
        "is_head_request",
        "reads_before",
        "upgrade",
    )

    has_head: bool
    informational: int
    reads_before: int
    http: Any
    """The request's Stream (connection_h1); None before send and after release."""

    def __init__(self, connection: UpstreamH2) -> None:
        self.connection = connection

    @property
    def requests(self) -> int:
        """1: a server says by GOAWAY or REFUSED_STREAM what it has not looked at; nothing has to be guessed."""
        return 1

    @property
    def endpoint(self) -> "EndpointRuntime":
        return self.connection.endpoint

    @property
    def transport(self) -> Any:
        return self.connection.transport

    # ── proxy.http_stream's side ──

    def send(self, stream: Stream, head: RequestHead, path: bytes, block: bytes, suffix: bytes) -> None:
        connection = self.connection
        self.http = stream
        self.broken_by = ""
        method = head.method
        self.is_head_request = method == b"HEAD"
        self.upgrade = head.upgrade
        self._is_tunnel = False
        if head.upgrade:
            self._upgrade_head = (path, block + suffix)
            if not connection._has_settings:
                connection._upgrades.append(self)
            else:
                connection.endpoint.cluster.state.loop.call_soon(self.send_upgrade)
            return
        encoded = connection.request_block(method, path, block, suffix)
        connection.begin(self)
        connection.send_headers(self, encoded, head.body == NO_BODY)
        if not connection._is_waking:
            connection._wake()

    def send_upgrade(self) -> None:
        """Extended CONNECT (RFC 8441): what HTTP/1.1 calls an upgrade. Its key and proof exist in HTTP/1.1 only."""
        connection = self.connection
        if self.http is None or not self.upgrade or self.id:  # its request has gone; it may stand for another now
            return
        if not connection.peer_allows_connect_protocol or not connection.has_room():
            self.broken_by = "http2.no_extended_connect"
            self.on_reset(http2.CANCEL)
            return
        connection.begin(self)
        path, lines = self._upgrade_head
        encoded = connection.encode(extended_connect(self.upgrade, connection._scheme, path, lines))
        connection._encoded.clear()
        connection.send_headers(self, encoded, False)
        connection._wake()

    def send_body(self, data: bytes, is_complete: bool, trailers: bytes) -> None:
        if self.is_ended or self.upgrade:
            return
        connection = self.connection
        encoded = b""
        if trailers:
            encoded = connection.encode(from_trailers(trailers))
            connection._encoded.clear()
        connection.send_data(self, data, is_complete, encoded)
        connection._wake()

    def send_tunnel(self, data: bytes) -> None:
        self.connection.send_data(self, data, False)
        self.connection._wake()

    def send_eof(self) -> None:
        if not self.is_ended:
            self.connection.send_data(self, b"", True)
            self.connection._wake()

    def start_tunnel(self) -> None:
        self._is_tunnel = True

    def pause_reading(self) -> None:
        self.connection.hold(self)

    def resume_reading(self) -> None:
        if self.is_held:
            self.connection.release(self)

    def release(self, may_reuse: bool, now: float) -> None:
        """The request is done with it."""
        self.http = None
        connection = self.connection
        if self.id and self.id in connection.streams:
            if self.is_ended and self.queue is None and self.is_peer_ended:
                del connection.streams[self.id]
            else:
                connection.reset(self.id, http2.NO_ERROR if self.is_peer_ended else http2.CANCEL)
                if connection._reads == self.reads_before:
                    connection.probe()
        connection.stream_over(self)

    def close(self) -> None:
        self.release(False, 0.0)

    def end_tunnel(self) -> None:
        self.release(False, 0.0)

    # ── codec.http2's side ──

    def on_data(self, data: bytes, is_end: bool) -> None:
        http = self.http
        if http is None:
            return
        if not self.has_head:
            self.connection._refuse(self.id, StreamError(http2.PROTOCOL_ERROR, "data_before_headers"))
            return
        if self._is_tunnel:
            if data:
                http.on_tunnel_data(data)
            if is_end:
                http.on_upstream_eof()
        else:
            http.on_response_body(data, is_end, b"")

    def on_reset(self, code: int) -> None:
        http, self.http = self.http, None
        if http is None:
            return
        if self.broken_by:
            detail = f"upstream.{self.broken_by}"
        elif code == http2.REFUSED_STREAM:
            detail = "refused_stream"
        else:
            detail = "reset" if code != http2.CANCEL else "connection_termination"
        has_head = self.has_head
        self.connection.stream_over(self)  # from here on it may be another request's
        http.on_upstream_lost(detail, has_head)

    def on_writable(self, is_writable: bool) -> None:
        if self.http is not None:
            self.http.on_upstream_writable(is_writable)
