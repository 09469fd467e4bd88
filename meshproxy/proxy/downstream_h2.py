"""One HTTP/2 downstream connection: each stream is one request for proxy.http_stream, and its answer.

Decides: when the connection ends, what an answer looks like in HTTP/2. Leaves to others: frames and flow control
(codec.http2), what field lists may hold (codec.http2_fields), what the request means (proxy.http_stream).

Streams and their HttpStream are kept for the next request: a connection with 32 requests at a time makes 32 of them.
"""

import asyncio
from time import monotonic
from typing import Any

from jh2._hazmat import Encoder

from meshproxy.codec import http2
from meshproxy.codec.http1 import NO_BODY, RequestHead, ResponseHead
from meshproxy.codec.http2 import Http2Connection, Http2Error, Http2Stream, StreamError
from meshproxy.codec.http2_fields import from_block, from_trailers, request_head, trailers
from meshproxy.errors import RemoteProtocolError
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.proxy.gone import GONE
from meshproxy.proxy.grpc import GrpcStream
from meshproxy.proxy.http_stream import HttpStream
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.proxy.local_reply import LocalReply, protocol_error
from meshproxy.upstream.connect import reset
from meshproxy.upstream.worker_state import NEVER

HIGH_WATER_BYTES = 64 * 1024
LOW_WATER_BYTES = 16 * 1024
SETTINGS_TIMEOUT_S = 10.0
"""For the preface, the peer's settings and its acknowledgement of ours."""
HEADERS_TIMEOUT_S = 10.0
"""From the first byte of a field block to its last."""
FLUSH_TIMEOUT_S = 300.0
GOODBYE_S = 1.0
"""Between the two GOAWAYs of a drain, where the PING sent with the first is not answered: what crosses it is served."""
LINGER_S = 1.0
MAX_FREE = 32
MAX_KNOWN = 256
"""Field blocks remembered a connection, each way."""
MAX_KNOWN_BYTES = 512 * 1024
"""Of the requests' blocks and heads together."""

_GOODBYE = b"goodbye!"
_LITERAL_REQUEST_ID = b"\x10\x0cx-request-id\x24"
"""How upstream.connection_h2 writes an id, last in its block: 36 bytes follow."""
_literals: dict[bytes, bytes] = {}
"""Lines that change with every answer → their encoding, which refers to no table and so serves every connection."""
_stateless = Encoder()


class DownstreamH2(Http2Connection, asyncio.Protocol):
    __slots__ = (
        "_free",
        "_goodbye_at",
        "_headers_since",
        "_idle_since",
        "_is_going",
        "_is_waking",
        "_known_bytes",
        "_last_served",
        "_settings_due",
        "counters",
        "deadline",
        "listener",
        "peer",
        "transport",
    )

    def __init__(self, listener: ListenerRuntime, peer: PeerContext) -> None:
        super().__init__(is_client=False)
        self.listener = listener
        self.peer = peer
        self.counters = listener.counters
        self.deadline = NEVER
        self.transport: Any = None
        self._free: list[DownstreamStream] = []
        self._is_waking = False
        self._known_bytes = 0
        self._is_going = False
        self._goodbye_at = NEVER
        """When the last GOAWAY is due."""
        self._last_served = http2.MAX_WINDOW
        """Streams above it are not served any more: the peer has been told."""
        self._headers_since = 0.0
        self._idle_since = 0.0
        self._settings_due = NEVER

    # ── asyncio's side ──

    def connection_made(self, transport: Any) -> None:
        self.counters.downstream_cx_total += 1
        self.counters.downstream_cx_active += 1
        self.listener.state.open_connections += 1
        self.take_over(transport)

    def take_over(self, transport: Any) -> None:
        """Serve a connection that another protocol has counted already."""
        self.transport = transport
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)
        self.listener.connections.add(self)
        self.listener.state.timed.add(self)
        self._idle_since = monotonic()
        self.deadline = self._settings_due = self._idle_since + SETTINGS_TIMEOUT_S
        self.start()
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and (error := _unfit(tls)) is not None:
            self.fail(error)
        elif self.listener.state.is_draining:
            self.drain()

    def connection_lost(self, exc: Exception | None) -> None:
        if self not in self.listener.connections:
            return
        self.listener.connections.discard(self)
        self.counters.downstream_cx_active -= 1
        self.counters.downstream_cx_destroy += 1
        state = self.listener.state
        state.timed.discard(self)
        state.open_connections -= 1
        self.is_dead = True
        self._drop_streams(http2.CANCEL)
        for stream in self._free:
            stream.http.down = GONE
        self._free.clear()

    def eof_received(self) -> bool:
        return False  # half of an HTTP/2 connection is of no use

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        self.receive(data, now)
        if self.is_dead:
            return
        if self._out and not self._is_waking:
            self._wake()  # not at once: answers of this loop turn are still coming, and one write serves them all
        if self._block is not None or self._partial[3:4] == b"\x01":
            if not self._headers_since:
                self._headers_since = now
                self.deadline = min(self.deadline, now + HEADERS_TIMEOUT_S)
        else:
            self._headers_since = 0.0
            if not self.streams:
                self._rest(self._idle_since)  # frames that open no stream do not keep a connection

    def pause_writing(self) -> None:
        self.pause_output()
        self.listener.state.on_buffered()

    def resume_writing(self) -> None:
        self.resume_output()

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        if self.transport.is_closing():
            reset(self.transport)
        elif self.is_dead:
            self.transport.abort()
        elif now >= self._goodbye_at:
            self._say_last()
        elif self.awaits_settings:
            self.fail(Http2Error(http2.SETTINGS_TIMEOUT, "settings_timeout"))
        elif self._headers_since and now - self._headers_since >= HEADERS_TIMEOUT_S:
            self.fail(Http2Error(http2.ENHANCE_YOUR_CALM, "headers_timeout"))
        elif not self.streams:
            self.counters.downstream_cx_idle_timeout += 1
            self.goaway(self.last_id, http2.NO_ERROR)
            self._close()

    # ── codec.http2's side ──

    def _wake(self) -> None:
        if not self._is_waking:
            self._is_waking = True
            self.listener.state.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_waking = False
        if self._out and not self.transport.is_closing():
            self.transport.write(self.take_output())

    def _on_header_block(self, stream_id: int, block: bytes, is_end: bool) -> None:
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._on_trailers(stream, block, is_end)
            return
        key = (block, is_end)
        head = self._memo.get(key)
        refused: RemoteProtocolError | None = None
        if head is None and block[-51:-36] == _LITERAL_REQUEST_ID:
            head = self._with_request_id(block, is_end)
        fields = self.decode(block) if head is None else []
        if not self._opened_by_peer(stream_id):
            return
        if head is None:
            try:
                head = request_head(fields, is_end)
            except RemoteProtocolError as error:
                refused = error
            else:
                if http2.changes_no_table(block):
                    if block[-51:-36] == _LITERAL_REQUEST_ID and fields[-1][0] == b"x-request-id":
                        self._know((block[:-51], is_end), request_head(fields[:-1], is_end))
                    else:
                        self._know(key, head)
        if stream_id > self._last_served:
            self._reset_by_us[stream_id] = None
            return
        if len(self.streams) >= http2.MAX_STREAMS:
            self._glitch()
            self.reset(stream_id, http2.REFUSED_STREAM)
            return
        stream = self._free.pop() if self._free else DownstreamStream(self)
        stream.open(stream_id, self._peer_initial_window, self.stream_window)
        stream.is_peer_ended = is_end
        self.streams[stream_id] = stream
        if len(self.streams) == 1 and not self._headers_since:
            self.deadline = self._settings_due if self.awaits_settings else self._goodbye_at
        if head is None:
            assert refused is not None
            stream.refuse(refused)
        else:
            stream.start(head, self._now)

    def _know(self, key: tuple[bytes, bool], head: RequestHead) -> None:
        """Another block like it, another head like that. By its bytes: sixteen of a block can mean 60 KiB."""
        memo = self._memo
        if not memo:
            self._known_bytes = 0
        self._known_bytes += 2 * head.length + len(key[0])
        if len(memo) >= MAX_KNOWN or self._known_bytes > MAX_KNOWN_BYTES:
            memo.clear()
        else:
            memo[key] = head

    def _with_request_id(self, block: bytes, is_end: bool) -> RequestHead | None:
        """The head of a block that ends in an id as our own upstreams write it: all before it is likely to be known.

        None where it is not; the block is to be decoded then.
        """
        request_id = block[-36:]
        known = self._memo.get((block[:-51], is_end))
        if known is None or known.has_request_id or not request_id.replace(b"-", b"").isalnum():
            return None
        head: RequestHead = known.with_request_id(request_id)
        return head

    def _on_trailers(self, stream: "DownstreamStream", block: bytes, is_end: bool) -> None:
        fields = self.decode(block)
        if stream.is_peer_ended:
            raise StreamError(http2.STREAM_CLOSED, "headers_after_end")
        if not is_end:
            raise StreamError(http2.PROTOCOL_ERROR, "trailers_without_end")
        if stream.expected > 0:
            raise StreamError(http2.PROTOCOL_ERROR, "content_length_mismatch")
        try:
            lines = trailers(fields)
        except RemoteProtocolError:
            raise StreamError(http2.PROTOCOL_ERROR, "trailers_too_large") from None
        stream.is_peer_ended = True
        stream.on_end(lines)
        if stream.is_ended and stream.queue is None and stream.id in self.streams:
            self._ended(stream)

    def _on_goaway(self, last_id: int, code: int) -> None:
        """The client will open no more streams: those that are open are served."""
        self._is_going = True
        if not self.streams:
            self._close()

    def _on_ping_ack(self, payload: bytes) -> None:
        if payload == _GOODBYE and self._goodbye_at is not NEVER:
            self._say_last()

    def _on_stream_error(self, stream_id: int, error: StreamError) -> None:
        self.listener.state.counters.protocol_error(error.detail)

    def _on_dead(self, error: Http2Error) -> None:
        self.counters.downstream_cx_protocol_error += 1
        self.listener.state.counters.protocol_error(error.detail)
        if self.transport.is_closing():
            return
        self._flush()
        # Closing at once would reset the connection, and could take the GOAWAY with it.
        self.deadline = monotonic() + LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    # ── ending ──

    def drain(self) -> None:
        """Two GOAWAYs (RFC 9113 §6.8): the first refuses nothing, so that no request that crosses it is lost."""
        if self._is_going or self.is_dead:
            return
        self._is_going = True
        self._goodbye_at = monotonic() + GOODBYE_S
        self.deadline = min(self.deadline, self._goodbye_at)
        self.goaway(http2.MAX_WINDOW, http2.NO_ERROR)
        self.ping(_GOODBYE)

    def _say_last(self) -> None:
        self._goodbye_at = NEVER
        self._last_served = self.last_id
        self.goaway(self.last_id, http2.NO_ERROR)
        if not self.streams:
            self._close()

    def _rest(self, since: float) -> None:
        """No stream is open."""
        if self._is_going and self._goodbye_at is NEVER:
            self._close()
            return
        idle_timeout_s = self.listener.listener.idle_timeout_s
        idle_at = since + idle_timeout_s if idle_timeout_s is not None else NEVER
        self.deadline = min(idle_at, self._goodbye_at, self._settings_due if self.awaits_settings else NEVER)

    def _close(self) -> None:
        """When what there is to say is out; a client that does not take it is cut."""
        self._flush()
        self.deadline = monotonic() + FLUSH_TIMEOUT_S
        self.transport.close()

    def stream_over(self, stream: "DownstreamStream") -> None:
        """Neither side has more to say on it."""
        self.listener.state.timed.discard(stream)
        if len(self._free) < MAX_FREE and not self.is_dead:
            self._free.append(stream)
        else:
            stream.http.down = GONE  # each names the other: cut, so that reference counts free both
        if not self.streams and not self.is_dead:
            self._idle_since = monotonic()
            self._rest(self._idle_since)

    def held_bytes(self) -> int:
        """What waits here: answers not taken, bodies without a connection, heads: 110 bytes can mean one of 60 KiB."""
        held: int = self.transport.get_write_buffer_size()
        for stream in self.streams.values():
            http = stream.http
            held += stream.queued_bytes + http.waiting_bytes()
            if http.is_active:
                held += 2 * http.head.length
        return held

    def shed(self) -> None:
        """Memory runs out: the whole connection goes, with all that waits in it."""
        reset(self.transport)

    # ── answers ──

    def response_block(self, head: ResponseHead, status: int, extra: bytes) -> bytes:
        """The encoded head of an answer: what was said before costs one look-up."""
        key: Any = head.block if status == 200 else (status, head.block)
        encoded = self._encoded.get(key)
        if encoded is None:
            encoded = self.encode([(b":status", b"%d" % status, False), *from_block(head.block)])
            self._remember(key, encoded)
        if extra:
            literal = _literals.get(extra)
            if literal is None:
                if len(_literals) > 4096:
                    _literals.clear()
                literal = _literals[extra] = _stateless.encode([(n, v, True) for n, v, _ in from_block(extra)])
            return encoded + literal
        return encoded

    def trailer_block(self, lines: bytes) -> bytes:
        encoded = self._encoded.get(lines)
        if encoded is None:
            encoded = self.encode(from_trailers(lines))
            self._remember(lines, encoded)
        return encoded

    def _remember(self, key: Any, encoded: bytes) -> None:
        if http2.changes_no_table(encoded):
            if len(self._encoded) >= MAX_KNOWN:
                self._encoded.clear()
            self._encoded[key] = encoded
        else:
            self._encoded.clear()  # the table has changed, and with it what every index means


class DownstreamStream(Http2Stream):
    """One request and its answer (proxy.http_stream.Downstream)."""

    __slots__ = (
        "_early",
        "_is_closed",
        "_is_done",
        "_is_head_request",
        "_waiting",
        "connection",
        "deadline",
        "http",
        "protocol",
        "transport",
    )

    def __init__(self, connection: DownstreamH2) -> None:
        self.connection = connection
        self.transport = connection.transport
        self.protocol = "HTTP/2"
        self.deadline = NEVER
        self.http: HttpStream = HttpStream(self, connection.listener, connection.peer)

    def start(self, head: RequestHead, now: float) -> None:
        self.deadline = NEVER
        self._is_closed = self._is_done = False
        self._is_head_request = head.method == b"HEAD"
        self._early = bytearray()
        self._waiting: RequestHead | None = None
        if head.grpc and not self.http.knows_grpc:
            self.http.down = GONE
            self.http = GrpcStream(self, self.connection.listener, self.connection.peer)
        self.connection.listener.state.timed.add(self)
        if head.body > 0:
            self.expected = head.body
        elif head.body == NO_BODY and not self.is_peer_ended and not head.upgrade and head.method != b"CONNECT":
            # A length of 0 that has not ended: it goes on only when it has, or what followed would be another request.
            self.expected = 0
            self._waiting = head
            self.deadline = now + HEADERS_TIMEOUT_S
            return
        self.http.start(head, now)

    def refuse(self, error: RemoteProtocolError) -> None:
        self._is_closed = self._is_done = self._is_head_request = False
        self._waiting = None
        counters = self.connection.listener.state.counters
        counters.protocol_error(error.detail)
        self.send_local_reply(protocol_error(error.status, error.detail), b"")
        self.stream_done(self.connection._now)

    # ── codec.http2's side ──

    def on_data(self, data: bytes, is_end: bool) -> None:
        http = self.http
        if self._waiting is not None:
            if is_end:
                self.on_end(b"")
        elif http.is_active:
            if http.head.upgrade and not http.is_tunnel:
                self._early += data  # a tunnel that the upstream has not opened yet: no more than the window
                self.connection.hold(self)
            elif http.is_tunnel:
                if data:
                    http.send_tunnel(data)
                if is_end:
                    http.on_downstream_eof()
            else:
                http.on_request_body(data, is_end)

    def on_end(self, lines: bytes) -> None:
        """The body ended without data of its own: with trailers, or with nothing."""
        if self._waiting is not None:
            head, self._waiting = self._waiting, None
            self.http.start(head, self.connection._now)
        elif self.http.is_active:
            if self.http.is_tunnel:
                self.http.on_downstream_eof()
            else:
                self.http.on_request_body(b"", True, lines)

    def on_reset(self, code: int) -> None:
        self._is_closed = self._is_done = True
        self._waiting = None
        self.http.cancel(ResponseFlag.DOWNSTREAM_CLOSED, "http2.remote_reset")
        self.connection.stream_over(self)

    def on_half_closed(self) -> None:
        if self._is_done:
            self._end_early()

    @property
    def is_blocked(self) -> bool:
        connection = self.connection
        return connection._is_full and not connection._may_send(self)

    def on_writable(self, is_writable: bool) -> None:
        upstream = self.http.connection
        if upstream is None:
            return
        if is_writable:
            upstream.resume_reading()
        else:
            self.connection.listener.state.on_buffered()
            upstream.pause_reading()

    def on_closed(self) -> None:
        self._is_closed = True
        if self._is_done:
            self.connection.stream_over(self)

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        if self.http.is_active:
            self.http.on_deadline(now)
        elif not self._is_closed:  # a body that does not end, or an answer that is made and not taken
            self.connection.reset(self.id, http2.CANCEL)
            self.on_reset(http2.CANCEL)

    # ── proxy.http_stream's side ──

    def send_response(self, head: ResponseHead, extra: bytes, body: bytes, is_complete: bool) -> None:
        connection = self.connection
        status = head.status
        if status == 101:
            status = 200  # RFC 8441 §5: the tunnel is the stream itself
        counters = connection.counters
        if status < 300:
            counters.downstream_rq_2xx += 1
        else:
            self.connection.counters.count_response(status)
        if self._is_head_request:
            body = b""
        if connection.listener.alt_svc:
            extra += connection.listener.alt_svc
        ends = is_complete and not body
        connection.send_headers(self, connection.response_block(head, status, extra), ends)
        if body or (is_complete and not ends):
            connection.send_data(self, body, is_complete)
        if not connection._is_waking:
            connection._wake()

    def send_body(self, body: bytes, is_complete: bool, trailers: bytes) -> None:
        connection = self.connection
        connection.send_data(self, body, is_complete, connection.trailer_block(trailers) if trailers else b"")
        connection._wake()

    def send_informational(self, head: ResponseHead) -> None:
        self.connection.send_headers(self, self.connection.response_block(head, head.status, b""), False)
        self.connection._wake()

    def send_local_reply(self, reply: LocalReply, extra: bytes) -> None:
        connection = self.connection
        fields, body = reply.as_fields(extra, self._is_head_request)
        self.connection.counters.count_response(reply.status)
        encoded = connection.encode(fields)
        connection._encoded.clear()
        connection.send_headers(self, encoded, not body)
        if body:
            connection.send_data(self, body, True)
        connection._wake()

    def send_tunnel(self, data: bytes) -> None:
        self.connection.send_data(self, data, False)
        self.connection._wake()

    def send_eof(self) -> None:
        if not self.is_ended:
            self.connection.send_data(self, b"", True)
            self.connection._wake()

    def close(self) -> None:
        """A tunnel is over: what is written still goes out."""
        self.send_eof()
        self.stream_done(monotonic())

    def abort(self) -> None:
        """Cut an answer that is out in part."""
        self._is_done = self._is_closed = True
        self.connection.reset(self.id, http2.INTERNAL_ERROR)
        self.connection.stream_over(self)

    def pause_body(self) -> None:
        self.connection.listener.state.on_buffered()
        self.connection.hold(self)

    def resume_body(self) -> None:
        if self.is_held:
            self.connection.release(self)

    def take_early_tunnel_data(self) -> bytes:
        early = bytes(self._early)
        self._early.clear()
        self.connection.release(self)
        if self.is_peer_ended:
            self.connection.listener.state.loop.call_soon(self.http.on_downstream_eof)
        return early

    def stream_done(self, now: float) -> None:
        """The answer is out, or waits for the client's window."""
        self._is_done = True
        if self._is_closed:
            self.connection.stream_over(self)
            return
        self.deadline = now + FLUSH_TIMEOUT_S
        if self.is_ended and self.queue is None:
            self._end_early()

    def _end_early(self) -> None:
        """The answer is out before the request was whole: what still comes of it is of no use (RFC 9113 §8.1)."""
        self._is_closed = True
        self.connection.reset(self.id, http2.NO_ERROR)
        self.connection.stream_over(self)


def _unfit(tls: Any) -> Http2Error | None:
    """Why HTTP/2 is not spoken over this TLS: the other side agreed to HTTP/1 (RFC 9113 §3.2), or nothing keeps the
    session secret once the server's key is out (§9.2.2, appendix A)."""
    if (tls.selected_alpn_protocol() or "").rpartition("/")[0] in ("http", "istio-http"):
        return Http2Error(http2.PROTOCOL_ERROR, "http1_was_agreed")
    name, version, _ = tls.cipher()
    if version == "TLSv1.2" and not name.startswith("ECDHE-"):
        return Http2Error(http2.INADEQUATE_SECURITY, "inadequate_security")
    return None
