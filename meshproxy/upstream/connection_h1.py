"""One HTTP/1.1 upstream connection: writes a request, reads its response, goes back to the pool.

Decides: where a response ends and whether the connection may serve another request. Leaves to others: what the
response means (proxy.http_stream). An upstream that breaks the protocol costs it the connection and gives 502.
"""

import asyncio
import os
from base64 import b64encode
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from meshproxy.codec.chunked import ChunkedReader, chunk, last_chunk
from meshproxy.codec.http1 import CHUNKED, UNTIL_CLOSE, RequestHead, ResponseHead, response_head
from meshproxy.errors import RemoteProtocolError
from meshproxy.upstream.worker_state import NEVER

if TYPE_CHECKING:
    from meshproxy.upstream.cluster_runtime import EndpointRuntime

HIGH_WATER_BYTES = 64 * 1024
LOW_WATER_BYTES = 16 * 1024
FLUSH_S = 60.0
"""How long an upstream may take to read the rest of a tunnel that is over."""
MAX_INFORMATIONAL = 16
"""1xx responses to one request before it counts as a flood."""

# What `_left` means besides a count of body bytes still to come.
_HEAD = -10
_IDLE = -11
_TUNNEL = -12


class Stream(Protocol):
    """What a connection needs of the request it serves."""

    def on_response(self, head: ResponseHead, body: bytes, is_complete: bool) -> None: ...
    def on_informational(self, head: ResponseHead) -> None: ...
    def on_response_body(self, body: bytes, is_complete: bool, trailers: bytes) -> None: ...
    def on_tunnel_data(self, data: bytes) -> None: ...
    def on_upstream_eof(self) -> None: ...
    def on_upstream_lost(self, detail: str, has_answered: bool) -> None: ...
    def on_upstream_writable(self, is_writable: bool) -> None: ...
    def shed(self) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    __slots__ = (
        "_buffer",
        "_chunked",
        "_informational",
        "_informational_of",
        "_is_chunking",
        "_is_head_request",
        "_is_paused",
        "_is_write_paused",
        "_left",
        "_opened_at",
        "_response",
        "deadline",
        "endpoint",
        "requests",
        "stream",
        "transport",
    )

    def __init__(self, endpoint: "EndpointRuntime") -> None:
        self.endpoint = endpoint
        self.stream: Stream | None = None
        self.requests = 0
        self.deadline = NEVER
        self._left = _IDLE
        self._buffer = b""
        self._chunked: ChunkedReader | None = None
        self._is_head_request = False
        self._is_chunking = False
        self._is_paused = False
        self._is_write_paused = False
        self._informational = 0
        self._informational_of = 0
        self._response: ResponseHead | None = None
        self._opened_at = 0.0
        self.transport: Any = None

    # ── the owner's side ──

    def send(self, stream: Stream, head: RequestHead, path: bytes, block: bytes, suffix: bytes) -> None:
        """Begin a request; its body follows in send_body. block and suffix: field lines, each preceded by CRLF."""
        self.stream = stream
        self.deadline = NEVER
        self.requests += 1
        self._left = _HEAD
        method = head.method
        self._is_head_request = method == b"HEAD"
        self._is_chunking = False
        if not head.is_plain:
            if head.body == CHUNKED:
                self._is_chunking = True
                suffix += b"\r\ntransfer-encoding: chunked"
            if head.upgrade:
                suffix += b"\r\nconnection: upgrade\r\nupgrade: " + head.upgrade
                if head.upgrade == b"websocket" and b"\r\nsec-websocket-key:" not in head.lowered:
                    # It came by extended CONNECT, which has none (RFC 8441 §5); an HTTP/1.1 server asks for one.
                    suffix += b"\r\nsec-websocket-key: " + b64encode(os.urandom(16))
        self.transport.write(b"%b %b HTTP/1.1%b%b\r\n\r\n" % (method, path, block, suffix))

    def send_body(self, data: bytes, is_complete: bool, trailers: bytes) -> None:
        """A piece of the body, decoded. trailers: field lines, each ending CRLF; only a chunked body has them."""
        if self._is_chunking:
            if data:
                data = chunk(data)
            if is_complete:
                data += last_chunk(trailers)
        if data:
            self.transport.write(data)

    def send_tunnel(self, data: bytes) -> None:
        self.transport.write(data)

    def send_eof(self) -> None:
        """The downstream ended its side of a tunnel."""
        if not self.transport.is_closing():
            self.transport.write_eof()

    def start_tunnel(self) -> None:
        """From now on bytes are not HTTP (after 101, or 2xx to CONNECT)."""
        self._left = _TUNNEL
        if self._buffer:
            data, self._buffer = self._buffer, b""
            if self.stream is not None:
                self.stream.on_tunnel_data(data)

    def pause_reading(self) -> None:
        if not self._is_paused and not self.transport.is_closing():
            self._is_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def release(self, may_reuse: bool, now: float) -> None:
        """The stream is done with the connection. Reuse needs a whole request sent and a whole response read."""
        self.stream = None
        endpoint = self.endpoint
        response = self._response
        self._response = None
        cluster = endpoint.cluster
        if (
            not may_reuse
            or response is None
            or not response.keeps_alive
            or self._left != _IDLE
            or self._buffer
            or self._is_write_paused  # it answered without reading the request: it may never read another
            or endpoint.is_removed
            or endpoint.is_ejected
            or self.transport.is_closing()
            or 0 < cluster.cluster.max_requests_per_connection <= self.requests
            or (cluster.cluster.max_connection_duration_s or NEVER) <= now - self._opened_at
        ):
            self.close()
            return
        if self._is_paused:
            self.resume_reading()
        idle_timeout_s = cluster.cluster.idle_timeout_s
        if idle_timeout_s is not None:
            self.deadline = now + idle_timeout_s
        if cluster.pending and cluster.hand_over(self):
            return
        endpoint.idle.append(self)

    def close(self) -> None:
        self.stream = None
        if not self.transport.is_closing():
            self.transport.abort() if self._left != _IDLE else self.transport.close()

    def held_bytes(self) -> int:
        return int(self.transport.get_write_buffer_size())

    def shed(self) -> None:
        """Memory runs out: whose bytes wait here is cut."""
        if self.stream is not None:
            self.stream.shed()
        else:
            self.transport.abort()

    def end_tunnel(self) -> None:
        """Both halves are over: what is written still goes out."""
        self.stream = None
        self.deadline = monotonic() + FLUSH_S
        self.transport.close()

    def on_deadline(self, now: float) -> None:
        """Idle for too long, or closed and still not flushed."""
        self.deadline = NEVER
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self.close()

    # ── asyncio's side ──

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._opened_at = monotonic()
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        endpoint = self.endpoint
        endpoint.connections.add(self)
        endpoint.cluster.state.timed.add(self)
        endpoint.cluster.counters.upstream_cx_active += 1

    def connection_lost(self, exc: Exception | None) -> None:
        endpoint = self.endpoint
        if self not in endpoint.connections:
            return
        endpoint.connections.discard(self)
        cluster = endpoint.cluster
        cluster.state.timed.discard(self)
        cluster.counters.upstream_cx_active -= 1
        if self._left == _IDLE and self in endpoint.idle:
            endpoint.idle.remove(self)
        stream, self.stream = self.stream, None
        if stream is not None:
            self._lost(stream, exc)
        cluster.connection_closed()

    def eof_received(self) -> bool:
        if self._left == _TUNNEL and self.stream is not None:
            self.stream.on_upstream_eof()
            return True
        return False  # asyncio closes; connection_lost tells the stream

    def pause_writing(self) -> None:
        self._is_write_paused = True
        if self.stream is not None:
            self.stream.on_upstream_writable(False)

    def resume_writing(self) -> None:
        self._is_write_paused = False
        if self.stream is not None:
            self.stream.on_upstream_writable(True)

    def data_received(self, data: bytes) -> None:
        left = self._left
        stream = self.stream
        if left == _HEAD:
            assert stream is not None
            if self._buffer:
                data = self._buffer + data
                self._buffer = b""
            self._read_head(stream, data)
        elif left >= 0:
            assert stream is not None
            size = len(data)
            if size < left:
                self._left = left - size
                stream.on_response_body(data, False, b"")
            else:
                if size > left:  # more than the response said: never reuse, never forward
                    self._buffer = data[left:]
                    data = data[:left]
                self._left = _IDLE
                stream.on_response_body(data, True, b"")
        elif left == _TUNNEL:
            if stream is not None:
                stream.on_tunnel_data(data)
        elif left == CHUNKED:
            assert stream is not None
            self._read_chunks(stream, data, 0)
        elif left == UNTIL_CLOSE:
            assert stream is not None
            stream.on_response_body(data, False, b"")
        else:
            # A response nobody asked for: the next request's answer would be this one's (response splitting).
            self.endpoint.cluster.state.counters.protocol_error("upstream.unexpected_data")
            self._left = UNTIL_CLOSE
            if self in self.endpoint.idle:
                self.endpoint.idle.remove(self)
            self.transport.abort()

    # ── reading ──

    def _read_head(self, stream: Stream, data: bytes) -> None:
        try:
            head = response_head(data, self._is_head_request)
        except RemoteProtocolError as error:
            self._refuse(stream, error)
            return
        if head is None:
            self._buffer = data
            return
        length = head.length
        if head.status < 200:
            self._read_informational(stream, head, data)
            return
        self._response = head
        body = head.body
        if body >= 0:
            arrived = len(data) - length
            if arrived == body:
                self._left = _IDLE
                stream.on_response(head, data[length:] if body else b"", True)
            elif arrived < body:
                self._left = body - arrived
                stream.on_response(head, data[length:] if arrived else b"", False)
            else:
                self._left = _IDLE
                self._buffer = data[length + body :]
                stream.on_response(head, data[length : length + body], True)
        elif body == CHUNKED:
            self._left = CHUNKED
            self._chunked = ChunkedReader("upstream")
            stream.on_response(head, b"", False)
            if len(data) > length and self.stream is stream and self._left == CHUNKED:
                self._read_chunks(stream, data, length)
        else:
            self._left = UNTIL_CLOSE
            stream.on_response(head, data[length:], False)

    def _read_informational(self, stream: Stream, head: ResponseHead, data: bytes) -> None:
        if self._informational_of != self.requests:
            self._informational_of, self._informational = self.requests, 0
        self._informational += 1
        if self._informational > MAX_INFORMATIONAL:
            self._refuse(stream, RemoteProtocolError("upstream.too_many_informational", 502))
            return
        rest = data[head.length :]
        if head.status == 101:
            self._response = head
            self._buffer = rest
            stream.on_response(head, b"", False)
            return
        stream.on_informational(head)
        if rest and self.stream is stream:
            self._read_head(stream, rest)

    def _read_chunks(self, stream: Stream, data: bytes, at: int) -> None:
        reader = self._chunked
        assert reader is not None
        try:
            pieces, end = reader.feed(data, at)
        except RemoteProtocolError as error:
            self._refuse(stream, error)
            return
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if end < 0:
            if body:
                stream.on_response_body(body, False, b"")
            return
        self._left = _IDLE
        self._chunked = None
        self._buffer = data[end:] if end < len(data) else b""
        stream.on_response_body(body, True, reader.trailers)

    def _refuse(self, stream: Stream, error: RemoteProtocolError) -> None:
        self.stream = None
        self.endpoint.cluster.state.counters.protocol_error(error.detail)
        has_answered = self._left != _HEAD
        self._left = UNTIL_CLOSE
        self.transport.abort()
        stream.on_upstream_lost(error.detail, has_answered)

    def _lost(self, stream: Stream, exc: Exception | None) -> None:
        left = self._left
        if left == UNTIL_CLOSE and exc is None:
            self._left = _IDLE
            stream.on_response_body(b"", True, b"")
            return
        if left == _TUNNEL:
            stream.on_upstream_lost("upstream_closed", True)  # a clean end is eof_received: this is a reset
            return
        word = "connection_termination" if exc is None else "reset"
        stream.on_upstream_lost(word, left != _HEAD or bool(self._buffer))
