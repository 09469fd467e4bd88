"""One HTTP/1.1 downstream connection: bytes → requests, one at a time, and answers → bytes.

Decides: where a request ends, whether the connection stays, when to stop reading. Leaves to others: what the request
means (proxy.http_stream). Pipelined requests wait in `_pending`, at most one high-water mark of them, while the one
before them is answered; a downstream that does not read its answer stops the upstream that gives it.
"""

import asyncio
from time import monotonic
from typing import Any

from meshproxy.codec.chunked import LAST_CHUNK, ChunkedReader, chunk, last_chunk
from meshproxy.codec.http1 import (
    CHUNKED,
    MAX_HEAD_BYTES,
    NO_BODY,
    UNSAID,
    UNTIL_CLOSE,
    RequestHead,
    ResponseHead,
    request_head,
    skip_empty_lines,
)
from meshproxy.errors import RemoteProtocolError
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.proxy.downstream_h2 import DownstreamH2
from meshproxy.proxy.gone import GONE
from meshproxy.proxy.grpc import GrpcStream
from meshproxy.proxy.http_stream import HttpStream
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.proxy.local_reply import LocalReply, protocol_error, reason_phrase
from meshproxy.telemetry.recorder import ListenerCounters
from meshproxy.upstream.connect import ALPN_HTTP2, reset
from meshproxy.upstream.worker_state import NEVER

HIGH_WATER_BYTES = 64 * 1024
LOW_WATER_BYTES = 16 * 1024
REQUEST_HEADERS_TIMEOUT_S = 10.0
"""From the first byte of a head to its last."""
LINGER_S = 1.0
"""After an error answer: how long the downstream may go on sending before the connection is cut. Closing at once would
reset the connection and could take the answer with it (RFC 9112 §9.6)."""
DRAIN_IDLE_S = 1.0
FLUSH_TIMEOUT_S = 300.0
"""How long a downstream may leave a whole answer unread; as long as a stream may be idle."""
LARGE_BYTES = 16 * 1024
"""Above this, head and body are written apart: two entries of one writev are cheaper than a copy."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\n"
"""As much of HTTP/2's as looks like a request."""

_READY = 0  # between requests, or within a head
_BODY = 1  # a request's body is arriving
_BUSY = 2  # the request is whole; its answer is not
_TUNNEL = 3
_LINGER = 4


class DownstreamConnection(asyncio.Protocol):
    __slots__ = (
        "_body_left",
        "_chunked",
        "_has_eof",
        "_head",
        "_is_write_paused",
        "_keeps_alive",
        "_look_again_at",
        "_mode",
        "_pauses",
        "_pending",
        "_response_body",
        "counters",
        "deadline",
        "listener",
        "peer",
        "stream",
        "transport",
    )

    is_blocked = False
    """One answer at a time: what waits of it is known to its upstream connection."""

    def __init__(self, listener: ListenerRuntime, peer: PeerContext | None) -> None:
        """peer: None where TLS will tell it (connection_made asks the listener who it is)."""
        self.listener = listener
        self.peer = peer
        self.counters: ListenerCounters = listener.counters
        self.stream: HttpStream = HttpStream(self, listener, peer or listener.plain_peer)
        self.deadline = NEVER
        self._mode = _READY
        self._pending = b""
        self._head: RequestHead | None = None
        self._body_left = 0
        self._chunked: ChunkedReader | None = None
        self._keeps_alive = True
        self._has_eof = False
        self._is_write_paused = False
        self._look_again_at = 0
        self._pauses = 0
        self._response_body = NO_BODY
        self.transport: Any = None

    # ── asyncio's side ──

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() in ALPN_HTTP2:
            self.stream.down = GONE  # it will not be used, and must not keep this and the transport alive
            peer = self.listener.authenticate(transport)
            if peer is not None:
                connection = DownstreamH2(self.listener, peer)
                transport.set_protocol(connection)
                connection.connection_made(transport)
            return
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        self.counters.downstream_cx_total += 1
        self.counters.downstream_cx_active += 1
        self.listener.connections.add(self)
        state = self.listener.state
        state.timed.add(self)
        state.open_connections += 1
        if self.peer is None:
            self.peer = self.listener.authenticate(transport)
            if self.peer is None:
                return
            self.stream.peer = self.peer
        idle_timeout_s = self.listener.listener.idle_timeout_s
        self.deadline = monotonic() + idle_timeout_s if idle_timeout_s is not None else NEVER

    def connection_lost(self, exc: Exception | None) -> None:
        if self not in self.listener.connections:
            return
        self.listener.connections.discard(self)
        self.counters.downstream_cx_active -= 1
        self.counters.downstream_cx_destroy += 1
        state = self.listener.state
        state.timed.discard(self)
        state.open_connections -= 1
        self.stream.cancel(ResponseFlag.DOWNSTREAM_CLOSED, "downstream_remote_disconnect")
        self._pending = b""
        # Connection and stream name each other: cut here, so that reference counts free both at once. The collector
        # comes by so seldom in a worker that ten thousand dead connections with their TLS buffers could wait for it.
        self.stream.down = GONE

    def eof_received(self) -> bool:
        """The downstream will send no more; an answer under way still goes out (half-close)."""
        self._has_eof = True
        if not self._pending:  # requests that wait behind the one under way are still to be answered
            self._keeps_alive = False
        if self._mode == _TUNNEL:
            self.stream.on_downstream_eof()
            return True
        if self._mode == _BODY:
            self._cut_body()
            return False
        return self._mode == _BUSY

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self.listener.state.on_buffered()
        connection = self.stream.connection
        if connection is not None:
            connection.pause_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        connection = self.stream.connection
        if connection is not None:
            connection.resume_reading()
        elif self._mode == _BUSY and not self.stream.is_active:
            self._take_pending()  # requests wait for the answers before them to be read

    def data_received(self, data: bytes) -> None:
        mode = self._mode
        if mode == _READY:
            if self._pending:
                known = len(self._pending)
                data = self._pending + data
                # A head that arrives byte by byte is looked at when it may be whole or has doubled, not at every byte.
                if len(data) < self._look_again_at and data.find(b"\r\n\r\n", max(known - 3, 0)) < 0:
                    self._pending = data
                    return
                self._pending = b""
            self._read(data)
        elif mode == _BODY:
            self._read_body(data)
            if self._mode == _READY and self._pending:
                self._take_pending()
        elif mode == _TUNNEL:
            self.stream.send_tunnel(data)
        elif mode == _BUSY:
            self._pending += data
            if len(self._pending) > HIGH_WATER_BYTES:
                self.pause_body()
        # _LINGER: read and forget

    # ── reading ──

    def _read(self, data: bytes) -> None:
        """Requests in `data`, as long as each is answered before the next is read (local replies are)."""
        while True:
            if data[:1] == b"\r":
                at = skip_empty_lines(data)
                data = data[at:]
                if not data:
                    if self._has_eof:
                        self.transport.close()
                    return
            try:
                head = request_head(data)
            except RemoteProtocolError as error:
                is_preface = data.startswith(_PREFACE) or _PREFACE.startswith(data)
                if is_preface and self._head is None and self.peer is not None:
                    self._become_h2(data, self.peer)
                else:
                    self._refuse(error)
                return
            if head is None:
                if self._has_eof:  # the rest of it will never come
                    self.transport.close()
                    return
                if not self._look_again_at:
                    self.deadline = monotonic() + REQUEST_HEADERS_TIMEOUT_S
                self._look_again_at = min(2 * len(data), MAX_HEAD_BYTES)
                self._pending = data
                return
            now = monotonic()
            self._look_again_at = 0
            self._head = head
            self._keeps_alive = head.keeps_alive and self._keeps_alive and not self.listener.state.is_draining
            self.deadline = NEVER
            length = head.length
            body = head.body
            if body == NO_BODY:
                self._mode = _BUSY
                if len(data) > length:
                    self._pending = data[length:]
                elif self._has_eof:
                    self._keeps_alive = False
                self.stream.start(head, now)
            else:
                self._mode = _BODY
                if body == CHUNKED:
                    self._chunked = ChunkedReader()
                else:
                    self._body_left = body
                if head.grpc and not self.stream.knows_grpc:
                    self.stream.down = GONE
                    self.stream = GrpcStream(self, self.listener, self.stream.peer)
                self.stream.start(head, now)
                if self._mode == _BODY and len(data) > length:
                    self._read_body(data[length:])
                if self._mode == _BODY and self._has_eof:
                    self._cut_body()
                    return
            if self._mode != _READY or not self._pending:
                return
            data, self._pending = self._pending, b""

    def _become_h2(self, data: bytes, peer: PeerContext) -> None:
        """The first bytes are HTTP/2's preface (prior knowledge, RFC 9113 §3.3)."""
        listener, transport = self.listener, self.transport
        listener.connections.discard(self)
        listener.state.timed.discard(self)
        self.stream.down = GONE
        connection = DownstreamH2(listener, peer)
        transport.set_protocol(connection)
        connection.take_over(transport)
        connection.data_received(data)

    def _read_body(self, data: bytes) -> None:
        stream = self.stream
        if self._chunked is None:
            left = self._body_left
            size = len(data)
            if size < left:
                self._body_left = left - size
                stream.on_request_body(data, False)
                return
            if size > left:
                self._pending = data[left:]
                data = data[:left]
            elif self._has_eof:
                self._keeps_alive = False
            self._mode = _BUSY
            stream.on_request_body(data, True)
            return
        reader = self._chunked
        try:
            pieces, end = reader.feed(data)
        except RemoteProtocolError as error:
            self._refuse(error)
            return
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if end < 0:
            if body:
                stream.on_request_body(body, False)
            return
        self._chunked = None
        if end < len(data):
            self._pending = data[end:]
        elif self._has_eof:
            self._keeps_alive = False
        self._mode = _BUSY
        stream.on_request_body(body, True, reader.trailers)

    def _cut_body(self) -> None:
        """The downstream ended in the middle of a body: what it meant cannot be known, so nothing is answered."""
        self.counters.downstream_cx_protocol_error += 1
        self.listener.state.counters.protocol_error("http1.incomplete_body")
        self.stream.cancel(ResponseFlag.DOWNSTREAM_CLOSED, "downstream_remote_disconnect")
        self.transport.close()

    def _refuse(self, error: RemoteProtocolError) -> None:
        """What came in is not HTTP we accept: answer once, count the word, and read no further."""
        self.counters.downstream_cx_protocol_error += 1
        self.listener.state.counters.protocol_error(error.detail)
        self._pending = b""
        self._keeps_alive = False
        stream = self.stream
        if stream.is_active:
            had_answered = stream.response_head_bytes > 0
            stream.cancel(ResponseFlag.DOWNSTREAM_PROTOCOL_ERROR, error.detail)
            if had_answered:
                self.transport.abort()
                return
        if self._head is None or self._mode == _READY:
            self._head = None
        self.send_local_reply(protocol_error(error.status, error.detail), b"")
        self._linger()

    def _linger(self) -> None:
        self._mode = _LINGER
        if self.transport.is_closing():
            return
        self.resume_body()
        if self._has_eof or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.deadline = monotonic() + LINGER_S

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        mode = self._mode
        if mode == _LINGER:
            self.transport.abort()
        elif self.stream.is_active:
            self.stream.on_deadline(now)
        elif self._is_write_paused or self.transport.is_closing():  # nobody takes what we have written
            self.counters.downstream_cx_idle_timeout += 1
            reset(self.transport)
        elif self._pending:  # a head that does not come to its end (slow-loris)
            self._refuse(RemoteProtocolError("http1.request_headers_timeout", 408))
        else:
            self.counters.downstream_cx_idle_timeout += 1
            self.transport.close()

    # ── answering (proxy.http_stream.Downstream) ──

    @property
    def protocol(self) -> str:
        return "HTTP/1.1" if self._head is None or self._head.minor else "HTTP/1.0"

    def send_response(self, head: ResponseHead, extra: bytes, body: bytes, is_complete: bool) -> None:
        framing = head.body
        request: Any = self._head
        if self.listener.alt_svc:
            extra += self.listener.alt_svc
        if framing >= 0 and self._keeps_alive and request.minor and self._mode == _BUSY and head.status != 101:
            self._response_body = framing
            if head.status < 300:
                self.counters.downstream_rq_2xx += 1
            else:
                self.counters.count_response(head.status)
            if len(body) <= LARGE_BYTES:
                self.transport.write(
                    b"HTTP/1.1 %d %b%b%b\r\n\r\n%b" % (head.status, head.reason or b"", head.block, extra, body)
                )
            else:
                self.transport.write(
                    b"HTTP/1.1 %d %b%b%b\r\n\r\n" % (head.status, head.reason or b"", head.block, extra)
                )
                self.transport.write(body)
            return
        if framing < 0 and head.status != 101:
            if framing == UNSAID:
                framing = NO_BODY
                extra += b"\r\ncontent-length: 0"
            elif request.minor == 0:
                framing = UNTIL_CLOSE
                self._keeps_alive = False
            else:
                framing = CHUNKED
                extra += b"\r\ntransfer-encoding: chunked"
                if body:
                    body = chunk(body)
        if head.status == 101:
            extra += b"\r\nconnection: upgrade\r\nupgrade: " + head.upgrade
        elif not self._keeps_alive:
            extra += b"\r\nconnection: close"
        elif request.minor == 0:
            extra += b"\r\nconnection: keep-alive"
        if self._mode == _BODY and is_complete:
            # An early final answer: the rest of the body is unread, so the connection cannot be told apart from the
            # next request (0.CL class). It ends after this answer.
            self._keeps_alive = False
            if b"connection: close" not in extra:
                extra += b"\r\nconnection: close"
        self._response_body = framing
        self.counters.count_response(head.status)
        data = b"HTTP/1.1 %d %b%b%b\r\n\r\n" % (head.status, head.reason or b"", head.block, extra)
        if head.status == 101 or (request.method == b"CONNECT" and head.status < 300):
            self._mode = _TUNNEL
            self.resume_body()
        if len(body) <= LARGE_BYTES:
            self.transport.write(data + body)
        else:
            self.transport.write(data)
            self.transport.write(body)

    def send_body(self, body: bytes, is_complete: bool, trailers: bytes) -> None:
        if self._response_body == CHUNKED:
            if body:
                if len(body) > LARGE_BYTES:
                    self.transport.writelines((b"%x\r\n" % len(body), body, b"\r\n"))
                    body = b""
                else:
                    body = chunk(body)
            if is_complete:
                body += last_chunk(trailers) if trailers else LAST_CHUNK
        if body:
            self.transport.write(body)

    def send_informational(self, head: ResponseHead) -> None:
        if self._head is not None and self._head.minor:  # RFC 9110 §15.2: never to an HTTP/1.0 client
            self.transport.write(b"HTTP/1.1 %d %b%b\r\n\r\n" % (head.status, head.reason or b"", head.block))

    def send_local_reply(self, reply: LocalReply, extra: bytes) -> None:
        request = self._head
        status, body = reply.status, reply.body
        if self._mode == _BODY:
            self._keeps_alive = False
        if not self._keeps_alive:
            extra += b"\r\nconnection: close"
        elif request is not None and request.minor == 0:
            extra += b"\r\nconnection: keep-alive"
        if status in (204, 304):  # has no body and so no length, whatever the route says
            body = length = b""
        else:
            length = b"\r\ncontent-length: %d" % len(body)
        if body and b"\r\ncontent-type: " not in extra:
            extra += b"\r\ncontent-type: text/plain"
        head = b"HTTP/1.1 %d %b%b\r\nserver: meshproxy%b%b\r\n\r\n" % (
            status,
            reason_phrase(status),
            length,
            reply.extra,
            extra,
        )
        self.counters.count_response(status)
        if request is not None and request.method == b"HEAD":
            body = b""
        if not self.transport.is_closing():
            self.transport.write(head + body)

    def send_tunnel(self, data: bytes) -> None:
        self.transport.write(data)

    def send_eof(self) -> None:
        """The upstream ended its side of a tunnel."""
        if not self.transport.is_closing():
            self.transport.write_eof()

    def close(self) -> None:
        """A tunnel is over: what is written still goes out."""
        self.transport.close()

    def abort(self) -> None:
        """Cut an answer that is out in part; with RST, for the end of a body until close is an orderly end."""
        reset(self.transport)

    def held_bytes(self) -> int:
        """What waits here: answers not taken, requests behind the one under way, a body without a connection."""
        return int(self.transport.get_write_buffer_size()) + len(self._pending) + self.stream.waiting_bytes()

    def shed(self) -> None:
        self._keeps_alive = False
        self.stream.shed()

    def pause_body(self) -> None:
        if self._pauses == 0 and not self.transport.is_closing():
            self._pauses = 1
            self.listener.state.on_buffered()
            self.transport.pause_reading()

    def resume_body(self) -> None:
        if self._pauses:
            self._pauses = 0
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def stream_done(self, now: float) -> None:
        """The answer is out: wait for the next request, or end the connection."""
        if self._mode == _BODY:
            self._linger()
            return
        self._mode = _READY
        if not self._keeps_alive:
            self.deadline = now + FLUSH_TIMEOUT_S
            self.transport.close()
            return
        if self._pauses:
            self.resume_body()
        if self._is_write_paused:
            # The downstream does not read what it has been given: it gets no more, and its requests wait.
            self._mode = _BUSY
            self.deadline = now + FLUSH_TIMEOUT_S
            return
        if self._pending:
            # Not from within the call that answered the request before: a client that pipelines thousands of
            # requests would nest as deep.
            self._mode = _BUSY
            self.listener.state.loop.call_soon(self._take_pending)
            return
        idle_timeout_s = self.listener.listener.idle_timeout_s
        self.deadline = now + idle_timeout_s if idle_timeout_s is not None else NEVER

    def take_early_tunnel_data(self) -> bytes:
        """Bytes that came between an Upgrade offer and its acceptance."""
        data, self._pending = self._pending, b""
        return data

    def _take_pending(self) -> None:
        if self.transport.is_closing() or self.stream.is_active:
            return
        self._mode = _READY
        self.resume_body()
        data, self._pending = self._pending, b""
        if data:
            self._read(data)
        elif self._keeps_alive:
            idle_timeout_s = self.listener.listener.idle_timeout_s
            self.deadline = monotonic() + idle_timeout_s if idle_timeout_s is not None else NEVER
        else:
            self.deadline = monotonic() + FLUSH_TIMEOUT_S
            self.transport.close()

    def drain(self) -> None:
        """Say goodbye with the next answer. An idle connection gets a moment to ask once more: closing it at once would
        cross a request on its way (RFC 9112 §9.6)."""
        self._keeps_alive = False
        if self._mode == _READY and not self._pending:
            self.deadline = min(self.deadline, monotonic() + DRAIN_IDLE_S)
