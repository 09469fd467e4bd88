"""One HTTP/3 downstream connection: each request stream is one request for proxy.http_stream, and its answer.

Decides: when a client is who it must be, when the connection ends, what an answer looks like in HTTP/3. Leaves to
others: QUIC (codec.quic), frames (codec.http3), what field lists may hold (codec.http2_fields), datagrams and timers
(listener.quic), what the request means (proxy.http_stream).

Nothing of HTTP/3 exists before the handshake is complete and the client's identity is verified: until then no stream is
read and not even SETTINGS are sent.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any

from aioquic.quic import events

from meshproxy.codec import http2, http3
from meshproxy.codec.http1 import NO_BODY, RequestHead, ResponseHead
from meshproxy.codec.http2_fields import from_block, from_trailers, request_head, trailers
from meshproxy.codec.http3 import ClientStreams, FieldDecoder, Http3Error, RequestReader
from meshproxy.codec.quic import ServerConnection
from meshproxy.errors import RemoteProtocolError
from meshproxy.model.listener import Listener
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.proxy.gone import GONE
from meshproxy.proxy.grpc import GrpcStream
from meshproxy.proxy.http_stream import HttpStream
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.proxy.local_reply import LocalReply, protocol_error
from meshproxy.upstream.worker_state import NEVER

HANDSHAKE_TIMEOUT_S = 10.0
HEADERS_TIMEOUT_S = 10.0
"""From a request stream's first byte to its head."""
FLUSH_TIMEOUT_S = 300.0
GOODBYE_S = 1.0
"""Between the two GOAWAYs of a drain: what crosses the first is served."""
MAX_IDLE_S = 60.0
"""However long a listener lets a connection rest: NATs forget UDP long before TCP, and a new one costs 5 ms."""
HIGH_WATER_BYTES = 64 * 1024
"""Of an answer that waits to be sent, of one stream."""
LOW_WATER_BYTES = 16 * 1024
UNACKNOWLEDGED_HIGH_BYTES = 1024 * 1024
"""Of an answer that is sent and not acknowledged; kept, as it may have to be sent again."""
MAX_FREE = 32
MAX_KNOWN = 256
"""Field sections remembered, each way."""
PREMATURE_AFTER = 100
"""From this many requests on, a connection that resets more than half of them before their answer ends (Envoy)."""
MAX_REFUSED = 200
"""Malformed requests in a connection's life."""
_ALL_STREAMS = (1 << 62) - 4

Authenticate = Callable[[ServerConnection], PeerContext | None]
"""Who the client is, once its handshake is complete; None where it may not go on."""

_encoded: dict[Any, bytes] = {}
"""Answers' field sections. They refer to no table of a connection's own, so one dictionary serves the process."""


class DownstreamH3:
    """The connection; for whoever asks for a transport (the log, the memory guard), it is that as well."""

    __slots__ = (
        "_authenticate",
        "_client_streams",
        "_control_id",
        "_deaf",
        "_decoder",
        "_free",
        "_goodbye_at",
        "_handshake_due",
        "_ids",
        "_is_going",
        "_last_served",
        "_memo",
        "_must_go",
        "_ping_at",
        "_refused",
        "_requests",
        "_resets",
        "_wake_up",
        "_watched",
        "counters",
        "deadline",
        "is_over",
        "listener",
        "now",
        "peer",
        "quic",
        "registry",
        "sockname",
        "source",
        "streams",
        "transport",
    )

    def __init__(
        self,
        listener: ListenerRuntime,
        quic: ServerConnection,
        authenticate: Authenticate,
        wake_up: Callable[["DownstreamH3"], None],
        registry: "dict[bytes, DownstreamH3]",
        sockname: Any,
        now: float,
    ) -> None:
        """wake_up: have what is to be sent sent in the next loop turn. registry: connection id → connection."""
        self.listener = listener
        self.quic = quic
        self.counters = listener.counters
        self.transport = self
        self.sockname = sockname
        self.source: Any = ()
        """Ancillary data that makes datagrams leave from where the client's arrive; () where there is only one such."""
        self.registry = registry
        self._ids: set[bytes] = set()
        self.peer: PeerContext | None = None
        self.streams: dict[int, DownstreamH3Stream] = {}
        self.now = now
        self.is_over = False
        self._authenticate = authenticate
        self._wake_up = wake_up
        self._client_streams = ClientStreams()
        self._deaf: set[int] = set()
        """Streams that are over for us, and on which the client may have more on its way."""
        self._decoder = FieldDecoder()
        self._free: list[DownstreamH3Stream] = []
        self._memo: dict[tuple[bytes, bool], RequestHead] = {}
        self._watched: set[DownstreamH3Stream] = set()
        """Streams whose answer waits for the client."""
        self._control_id = -1
        self._is_going = self._must_go = False
        self._goodbye_at = NEVER
        self._ping_at = NEVER
        self._last_served = _ALL_STREAMS
        self._requests = self._resets = self._refused = 0
        self._handshake_due = self.deadline = now + HANDSHAKE_TIMEOUT_S
        self.counters.downstream_cx_total += 1
        self.counters.downstream_cx_active += 1
        listener.state.open_connections += 1
        listener.connections.add(self)
        listener.state.timed.add(self)

    # ── a transport, as far as others ask for one ──

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self.quic.get_peer_address()
        if name == "sockname":
            return self.sockname
        if name == "ssl_object":
            return self
        return default

    def version(self) -> str:
        """As SSLObject.version(): QUIC has no other."""
        return "TLSv1.3"

    def is_closing(self) -> bool:
        return self.is_over or self.quic.is_closing

    def get_write_buffer_size(self) -> int:
        return sum(sum(self.quic.waiting_bytes(stream_id)) for stream_id in self.streams)

    def abort(self) -> None:
        self.close(http3.NO_ERROR, "closed")
        self._wake_up(self)

    # ── listener.quic's side ──

    @property
    def is_pending(self) -> bool:
        """The handshake is not complete, or its client not verified."""
        return self.peer is None

    def add_id(self, connection_id: bytes) -> None:
        self._ids.add(connection_id)
        self.registry[connection_id] = self

    def on_events(self, now: float) -> None:
        """Take what aioquic has understood of the datagrams it was given."""
        self.now = now
        quic = self.quic
        try:
            while (event := quic.next_event()) is not None:
                if isinstance(event, events.StreamDataReceived):
                    if self.peer is not None and not quic.is_closing:
                        self._on_stream_data(event.stream_id, event.data, event.end_stream)
                elif isinstance(event, events.HandshakeCompleted):
                    self._on_handshake()
                elif isinstance(event, events.StreamReset):
                    self._on_reset(event.stream_id)
                elif isinstance(event, events.StopSendingReceived):
                    self._on_stop_sending(event.stream_id)
                elif isinstance(event, events.ConnectionIdIssued):
                    self.add_id(event.connection_id)
                elif isinstance(event, events.ConnectionIdRetired):
                    self._ids.discard(event.connection_id)
                    self.registry.pop(event.connection_id, None)
                elif isinstance(event, events.ConnectionTerminated):
                    self._on_terminated(event)
        except Http3Error as error:
            self.fail(error)
        if self._watched:
            self._look()

    def fail(self, error: Http3Error) -> None:
        self.counters.downstream_cx_protocol_error += 1
        self.listener.state.counters.protocol_error(error.detail)
        self.close(error.code, error.detail)

    def close(self, code: int, reason: str = "") -> None:
        """CONNECTION_CLOSE; what is under way is cancelled."""
        self.quic.close(error_code=code, reason_phrase=reason)
        self._drop_streams()

    def over(self) -> None:
        """The connection is no more; idempotent."""
        if self.is_over:
            return
        self.is_over = True
        self.deadline = NEVER
        self._drop_streams()
        for stream in self._free:
            stream.http.down = GONE
        self._free.clear()
        for connection_id in self._ids:
            self.registry.pop(connection_id, None)
        state = self.listener.state
        state.timed.discard(self)
        state.open_connections -= 1
        self.listener.connections.discard(self)
        self.counters.downstream_cx_active -= 1
        self.counters.downstream_cx_destroy += 1
        if self.peer is None:
            self.counters.ssl_connection_error += 1

    def on_deadline(self, now: float) -> None:
        self.now = now
        if self.peer is None:
            if now >= self._handshake_due:
                self.quic.close(error_code=0, reason_phrase="handshake timeout")
                self.over()
        elif now >= self._goodbye_at:
            self._say_last()
        elif now >= self._ping_at:
            self._ping_at = NEVER
            if self.streams:
                self.quic.send_ping(0)
        self._set_deadline(now)
        self._wake_up(self)

    def _set_deadline(self, now: float) -> None:
        if self.is_over:
            self.deadline = NEVER
            return
        if self.peer is None:
            self.deadline = self._handshake_due
            return
        if self.streams and self._ping_at is NEVER:
            # A slow upstream must not make the connection look idle.
            self._ping_at = now + idle_timeout_s(self.listener.listener) / 3
        self.deadline = min(self._goodbye_at, self._ping_at)

    # ── events ──

    def _on_handshake(self) -> None:
        self.counters.ssl_handshake += 1
        self.peer = self._authenticate(self.quic)
        if self.peer is None:
            return  # refused, and the connection closed by whoever refused it
        self.quic.forget_handshake()
        self._set_deadline(self.now)
        quic = self.quic
        self._control_id = quic.get_next_available_stream_id(is_unidirectional=True)
        quic.send_stream_data(self._control_id, b"\x00" + http3.our_settings())
        if self._must_go or self.listener.state.is_draining:
            self.drain()

    def _on_stream_data(self, stream_id: int, data: bytes, is_end: bool) -> None:
        quic = self.quic
        if stream_id & 2:
            quic.take(len(data))
            if not self._client_streams.receive(stream_id, data, is_end) and not is_end:
                quic.stop_stream(stream_id, http3.STREAM_CREATION_ERROR)
            quic.grant(stream_id, 0)
            return
        stream = self.streams.get(stream_id)
        if stream is None and stream_id not in self._deaf:
            stream = self._open(stream_id)
        if stream is None or stream.is_deaf:
            quic.take(len(data))
            if is_end:
                self._deaf.discard(stream_id)
                if stream is not None:
                    stream.is_peer_ended = True
            return
        stream.is_peer_ended = is_end
        stream.receive(data, is_end)
        if stream.id != stream_id:
            quic.take(len(data))
            return
        if stream.is_held:
            stream.untaken += len(data)
        else:
            quic.take(len(data))
            if not is_end:
                quic.grant(stream_id, stream.held)

    def _open(self, stream_id: int) -> "DownstreamH3Stream | None":
        if stream_id > self._last_served:
            self._deaf.add(stream_id)
            self.quic.reset_stream(stream_id, http3.REQUEST_REJECTED)
            if self.quic.has_stream(stream_id):
                self.quic.stop_stream(stream_id, http3.REQUEST_REJECTED)
            return None
        stream = self._free.pop() if self._free else DownstreamH3Stream(self)
        stream.open(stream_id, self.now)
        self.streams[stream_id] = stream
        if self._ping_at is NEVER:
            self._set_deadline(self.now)
        self._requests += 1
        return stream

    def head_of(self, block: bytes, is_end: bool) -> RequestHead:
        """The request of a field section: what came before in the same bytes is not read again."""
        key = (block, is_end)
        head = self._memo.get(key)
        if head is None:
            fields = self._decoder.decode(block)
            if fields is None:
                raise RemoteProtocolError("http3.headers_too_large", 431)
            head = request_head(fields, is_end)
            if len(self._memo) >= MAX_KNOWN:
                self._memo.clear()
            if len(block) < 4096:
                self._memo[key] = head
        return head

    def trailers_of(self, block: bytes) -> bytes:
        fields = self._decoder.decode(block)
        if fields is None:
            raise RemoteProtocolError("http3.trailers_too_large", 431)
        return trailers(fields)

    def _on_reset(self, stream_id: int) -> None:
        if self._client_streams.is_critical(stream_id):
            raise Http3Error(http3.CLOSED_CRITICAL_STREAM, "critical_stream_reset")
        self._client_streams.forget(stream_id)
        self.quic.take_rest(stream_id)
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id in self._deaf:
                self._deaf.discard(stream_id)
            elif not stream_id & 2 and self.peer is not None:
                # Nothing of it was a request yet, and nothing will answer it.
                self.quic.reset_stream(stream_id, http3.REQUEST_INCOMPLETE)
                self._requests += 1
                self._count_reset()
            return
        stream.is_peer_ended = True
        stream.release_untaken()
        self._count_reset()
        stream.leave(http3.REQUEST_CANCELLED)

    def _on_stop_sending(self, stream_id: int) -> None:
        """The client wants no answer; aioquic has reset our side already."""
        if stream_id == self._control_id:
            raise Http3Error(http3.CLOSED_CRITICAL_STREAM, "critical_stream_stopped")
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._count_reset()
            stream.leave(http3.REQUEST_CANCELLED)

    def _count_reset(self) -> None:
        self._resets += 1
        if self._requests >= PREMATURE_AFTER and self._resets * 2 > self._requests:
            raise Http3Error(http3.EXCESSIVE_LOAD, "rapid_reset")
        if self._resets > PREMATURE_AFTER + self._requests:
            raise Http3Error(http3.EXCESSIVE_LOAD, "rapid_reset")

    def count_refused(self, detail: str) -> None:
        self.listener.state.counters.protocol_error(detail)
        self._refused += 1
        if self._refused > MAX_REFUSED:
            raise Http3Error(http3.EXCESSIVE_LOAD, "too_many_stream_errors")

    def _on_terminated(self, event: events.ConnectionTerminated) -> None:
        if event.reason_phrase == "Idle timeout":
            self.counters.downstream_cx_idle_timeout += 1
        self.over()

    # ── answers that wait for the client ──

    def watch(self, stream: "DownstreamH3Stream") -> None:
        self._watched.add(stream)

    def wake_up(self) -> None:
        self._wake_up(self)

    def _look(self) -> None:
        """Which answers have gone out, and which have room again."""
        waiting = self.quic.waiting_bytes
        for stream in list(self._watched):
            unsent, unacknowledged = waiting(stream.id)
            if stream.is_full and unsent <= LOW_WATER_BYTES and unacknowledged <= UNACKNOWLEDGED_HIGH_BYTES:
                stream.on_writable()
            if stream.is_flushing:
                if not unsent:
                    stream.on_flushed()
            elif not stream.is_full:
                self._watched.discard(stream)

    def after_transmit(self, now: float) -> None:
        self.now = now
        if self._watched:
            self._look()

    # ── ending ──

    def drain(self) -> None:
        """Two GOAWAYs (RFC 9114 §5.2): the first refuses nothing, so that no request that crosses it is lost."""
        if self._is_going or self.is_closing():
            return
        if self.peer is None:
            self._must_go = True  # as soon as its handshake is complete
            return
        self._is_going = True
        now = monotonic()
        self._goodbye_at = now + GOODBYE_S
        self._send_goaway(_ALL_STREAMS)
        self._set_deadline(now)
        self._wake_up(self)

    def _say_last(self) -> None:
        self._goodbye_at = NEVER
        following = self.quic.next_client_stream_id
        self._last_served = following - 4
        self._send_goaway(following)
        if not self.streams:
            self.close(http3.NO_ERROR)

    def _send_goaway(self, stream_id: int) -> None:
        self.quic.send_stream_data(self._control_id, http3.frame(http3.GOAWAY, http3.number(stream_id)))

    def _drop_streams(self) -> None:
        for stream in list(self.streams.values()):
            stream.leave(http3.REQUEST_CANCELLED)
        self._watched.clear()

    def stream_over(self, stream: "DownstreamH3Stream") -> None:
        """Neither side has more to say on it."""
        self.listener.state.timed.discard(stream)
        self._watched.discard(stream)
        self.streams.pop(stream.id, None)
        if not stream.is_peer_ended:
            self._deaf.add(stream.id)
        stream.id = -1
        if len(self._free) < MAX_FREE and not self.is_over:
            self._free.append(stream)
        else:
            stream.http.down = GONE  # each names the other: cut, so that reference counts free both
        if not self.streams:
            self._ping_at = NEVER
            if self._is_going and self._goodbye_at is NEVER and not self.is_closing():
                self.close(http3.NO_ERROR)
                self._wake_up(self)

    def held_bytes(self) -> int:
        """What waits here: answers not taken, bodies without a connection."""
        bodies = sum(stream.http.waiting_bytes() + len(stream._early) for stream in self.streams.values())
        return self.get_write_buffer_size() + bodies

    def shed(self) -> None:
        """Memory runs out: the whole connection goes, with all that waits in it."""
        self.abort()


def idle_timeout_s(listener: Listener) -> float:
    return min(MAX_IDLE_S, listener.idle_timeout_s or MAX_IDLE_S)


def response_section(head: ResponseHead, status: int, extra: bytes) -> bytes:
    """The field section of an answer: what was said before costs one look-up."""
    key = (status, head.block)
    section = _encoded.get(key)
    if section is None:
        section = http3.encode([(b":status", b"%d" % status, False), *from_block(head.block)])
        _remember(key, section)
    return section + _lines(extra) if extra else section


def _lines(block: bytes) -> bytes:
    """Field lines to add to a section: without its prefix, for they refer to no dynamic table."""
    lines = _encoded.get(block)
    if lines is None:
        lines = http3.encode(from_block(block))[2:]
        _remember(block, lines)
    return lines


def _remember(key: Any, section: bytes) -> None:
    if len(_encoded) >= 16 * MAX_KNOWN:
        _encoded.clear()
    _encoded[key] = section


class DownstreamH3Stream(RequestReader):
    """One request and its answer (proxy.http_stream.Downstream)."""

    __slots__ = (
        "_early",
        "_has_head",
        "_is_done",
        "_is_head_request",
        "_peer",
        "_trailers",
        "_waiting",
        "connection",
        "deadline",
        "expected",
        "http",
        "id",
        "is_deaf",
        "is_ended",
        "is_flushing",
        "is_full",
        "is_held",
        "is_peer_ended",
        "protocol",
        "transport",
        "untaken",
    )

    is_blocked = False

    def __init__(self, connection: DownstreamH3) -> None:
        super().__init__()
        assert connection.peer is not None, "no stream before the client is verified"
        self.connection = connection
        self.transport = connection
        self.protocol = "HTTP/3"
        self.deadline = NEVER
        self.id = -1
        self._peer = connection.peer
        self.http: HttpStream = HttpStream(self, connection.listener, connection.peer)

    def open(self, stream_id: int, now: float) -> None:
        self.restart()
        self.id = stream_id
        self.untaken = 0
        """Bytes that have come and whose window is not given back: the upstream does not take more."""
        self.expected = -1
        """Of the body, as content-length says; -1: unknown."""
        self.is_peer_ended = self.is_ended = self.is_held = self.is_full = self.is_flushing = self.is_deaf = False
        self._has_head = self._is_done = self._is_head_request = False
        self._early = bytearray()
        self._waiting: RequestHead | None = None
        self._trailers = b""
        self.deadline = now + HEADERS_TIMEOUT_S
        self.connection.listener.state.timed.add(self)

    # ── codec.http3's side ──

    def on_headers(self, block: bytes, is_end: bool) -> None:
        if self.is_deaf:
            return
        connection = self.connection
        try:
            if self._has_head:
                self._on_trailers(connection.trailers_of(block))
                return
            self._has_head = True
            head = connection.head_of(block, is_end)
        except http2.StreamError as error:
            self._refuse(error.detail)
            return
        except RemoteProtocolError as error:
            self.deadline = NEVER
            connection.count_refused(error.detail)
            if self.http.is_active:
                self._refuse(error.detail)
                return
            self.send_local_reply(protocol_error(error.status, error.detail), b"")
            self.stream_done(connection.now)
            return
        self.deadline = NEVER
        self._is_head_request = head.method == b"HEAD"
        if head.grpc and not self.http.knows_grpc:
            self.http.down = GONE
            self.http = GrpcStream(self, connection.listener, self._peer)
        if head.body > 0:
            self.expected = head.body
        elif head.body == NO_BODY and not is_end and not head.upgrade and head.method != b"CONNECT":
            # A length of 0 that has not ended: it goes on only when it has, or what followed would be another request.
            self.expected = 0
            self._waiting = head
            self.deadline = connection.now + HEADERS_TIMEOUT_S
            return
        self.http.start(head, connection.now)

    def _on_trailers(self, lines: bytes) -> None:
        if self.expected > 0:
            self._refuse("http3.content_length_mismatch")
        elif self.is_peer_ended:
            self._end(lines)
        else:
            self._trailers = lines  # the end of the stream comes in a frame of its own

    def on_data(self, data: bytes, is_end: bool) -> None:
        if self.is_deaf:
            return
        if self.expected >= 0:
            self.expected -= len(data)
            if self.expected < 0 or (is_end and self.expected):
                self._refuse("http3.content_length_mismatch")
                return
        http = self.http
        if not data or self._waiting is not None:
            if is_end:
                self._end(self._trailers)
        elif http.is_active:
            if http.head.upgrade and not http.is_tunnel:
                # A tunnel that the upstream has not opened yet: no more than the window.
                self._early += data
                self.is_held = True
            elif http.is_tunnel:
                http.send_tunnel(data)
                if is_end:
                    http.on_downstream_eof()
            else:
                http.on_request_body(data, is_end)

    def _end(self, lines: bytes) -> None:
        """The body ended without data of its own: with trailers, or with nothing."""
        if self._waiting is not None:
            head, self._waiting = self._waiting, None
            self.deadline = NEVER
            self.http.start(head, self.connection.now)
        elif self.http.is_active:
            if self.http.is_tunnel:
                self.http.on_downstream_eof()
            else:
                self.http.on_request_body(b"", True, lines)

    def on_incomplete(self) -> None:
        self.leave(http3.REQUEST_INCOMPLETE)

    def _refuse(self, detail: str) -> None:
        """The request is malformed (RFC 9114 §4.1.2): this stream is over, the connection goes on."""
        self.leave(http3.MESSAGE_ERROR, detail)
        self.connection.count_refused(detail)

    def leave(self, code: int, detail: str = "http3.remote_reset") -> None:
        """The client left, or may not go on: nothing more is sent to it."""
        if self.id < 0:
            return
        self.is_deaf = self._is_done = True
        self._waiting = None
        self.release_untaken()
        self.http.cancel(ResponseFlag.DOWNSTREAM_CLOSED, detail)
        self._reset(code)
        self.connection.stream_over(self)

    def _reset(self, code: int) -> None:
        quic = self.connection.quic
        if quic.has_stream(self.id):
            if not self.is_peer_ended:
                quic.stop_stream(self.id, code)
            if not self.is_ended or self.is_flushing:
                quic.reset_stream(self.id, code)
        self.connection.wake_up()

    def release_untaken(self) -> None:
        if self.untaken:
            self.connection.quic.take(self.untaken)
            self.untaken = 0

    # ── the connection's side ──

    def on_writable(self) -> None:
        self.is_full = False
        upstream = self.http.connection
        if upstream is not None:
            upstream.resume_reading()

    def on_flushed(self) -> None:
        self.is_flushing = False
        self.connection.stream_over(self)

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        if self.http.is_active:
            self.http.on_deadline(now)
        elif self.id >= 0:  # a head or body that does not come, or an answer that is made and not taken
            self.leave(http3.REQUEST_CANCELLED if self._has_head else http3.REQUEST_INCOMPLETE)

    # ── proxy.http_stream's side ──

    def _write(self, data: bytes, is_end: bool) -> None:
        connection = self.connection
        quic = connection.quic
        if self.id < 0 or not quic.has_stream(self.id):
            return
        quic.send_stream_data(self.id, data, is_end)
        if is_end:
            self.is_ended = True
        elif not self.is_full:
            unsent, unacknowledged = quic.waiting_bytes(self.id)
            if unsent > HIGH_WATER_BYTES or unacknowledged > UNACKNOWLEDGED_HIGH_BYTES:
                self.is_full = True
                connection.watch(self)
                connection.listener.state.on_buffered()
                upstream = self.http.connection
                if upstream is not None:
                    upstream.pause_reading()
        connection.wake_up()

    def send_response(self, head: ResponseHead, extra: bytes, body: bytes, is_complete: bool) -> None:
        status = head.status
        if status == 101:
            status = 200  # RFC 9220 §3: the tunnel is the stream itself
        self.connection.counters.count_response(status)
        if self._is_head_request:
            body = b""
        section = response_section(head, status, extra)
        data = b"\x01" + http3.number(len(section)) + section
        if body:
            data += b"\x00" + http3.number(len(body)) + body
        self._write(data, is_complete)

    def send_body(self, body: bytes, is_complete: bool, trailers: bytes) -> None:
        data = b"\x00" + http3.number(len(body)) + body if body else b""
        if trailers:
            data += http3.frame(http3.HEADERS, http3.encode(from_trailers(trailers)))
        self._write(data, is_complete)

    def send_informational(self, head: ResponseHead) -> None:
        self._write(http3.frame(http3.HEADERS, response_section(head, head.status, b"")), False)

    def send_local_reply(self, reply: LocalReply, extra: bytes) -> None:
        fields, body = reply.as_fields(extra, self._is_head_request)
        self.connection.counters.count_response(reply.status)
        section = http3.encode(fields)
        data = http3.frame(http3.HEADERS, section)
        if body:
            data += http3.frame(http3.DATA, body)
        self._write(data, True)

    def send_tunnel(self, data: bytes) -> None:
        self._write(http3.frame(http3.DATA, data), False)

    def send_eof(self) -> None:
        if not self.is_ended:
            self._write(b"", True)

    def close(self) -> None:
        """A tunnel is over: what is written still goes out."""
        self.send_eof()
        self.stream_done(monotonic())

    def abort(self) -> None:
        """Cut an answer that is out in part."""
        if self.id < 0:
            return
        self.is_deaf = self._is_done = True
        self.release_untaken()
        self._reset(http3.INTERNAL_ERROR)
        self.connection.stream_over(self)

    def pause_body(self) -> None:
        self.connection.listener.state.on_buffered()
        self.is_held = True

    def resume_body(self) -> None:
        if self.is_held:
            self.is_held = False
            self.release_untaken()
            if self.id >= 0 and not self.is_peer_ended:
                self.connection.quic.grant(self.id, self.held)
            self.connection.wake_up()

    def take_early_tunnel_data(self) -> bytes:
        early = bytes(self._early)
        self._early.clear()
        self.resume_body()
        return early

    def stream_done(self, now: float) -> None:
        """The answer is written, and waits for the client's window."""
        if self.id < 0:
            return
        self._is_done = True
        self.is_full = False
        self.release_untaken()
        if not self.is_peer_ended:
            # The answer is out before the request was whole: what still comes of it is of no use (RFC 9114 §4.1).
            self.is_deaf = True
            if self.connection.quic.has_stream(self.id):
                self.connection.quic.stop_stream(self.id, http3.NO_ERROR)
        self.is_flushing = True
        self.deadline = now + FLUSH_TIMEOUT_S
        self.connection.watch(self)
