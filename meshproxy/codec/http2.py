"""One side of an HTTP/2 connection: frames in → hooks, calls → frames out. Streams, flow control, limits.

Decides: is a frame legal now, whose fault is what is not (the stream's or the connection's), how much may be sent and
received, what counts as a flood. Leaves to others: what header fields mean (codec.http2_fields), header compression
(the Rust HPACK of `jh2`), sockets and clocks (proxy.downstream_h2, upstream.connection_h2).

One flat loop over what was read; replies are joined and written once a loop turn. Sources: RFC 9113, RFC 7541;
limits: Envoy's HTTP/2 flood protections, CVE-2023-44487, CVE-2024-27316, CVE-2025-8671.
"""

import re
from collections import deque
from typing import Any, Final

from jh2._hazmat import Decoder, Encoder, HPACKError, OversizedHeaderListError

from meshproxy.codec.hpack_grammar import is_padded_well, scan

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 1
ACK: Final = 1
END_HEADERS: Final = 4
PADDED: Final = 8
HAS_PRIORITY: Final = 0x20

NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
INTERNAL_ERROR: Final = 2
FLOW_CONTROL_ERROR: Final = 3
SETTINGS_TIMEOUT: Final = 4
STREAM_CLOSED: Final = 5
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
COMPRESSION_ERROR: Final = 9
CONNECT_ERROR: Final = 10
ENHANCE_YOUR_CALM: Final = 11
INADEQUATE_SECURITY: Final = 12
HTTP_1_1_REQUIRED: Final = 13

MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65535
STREAM_WINDOW: Final = 64 * 1024
"""What a client may send on one stream before we have passed it on."""
ANSWER_WINDOW: Final = 256 * 1024
"""The same for an upstream's answer; such bytes do not count against the connection while they are held."""
MAX_FRAME: Final = 16384
MAX_STREAMS: Final = 100
"""Envoy's advice for edges."""
CONNECTION_WINDOW: Final = MAX_STREAMS * STREAM_WINDOW
"""Room for all streams at once: uploads that wait for an upstream must not keep those from ending that have one, or
all of them wait for ever. What a client makes us keep by it is bounded by the memory guard."""
ANSWERS_WINDOW: Final = 1024 * 1024
MAX_BLOCK_BYTES: Final = 60 * 1024
MAX_LIST_BYTES: Final = 64 * 1024
"""Of a decoded field list, names and values with 32 bytes each: a bomb of indexed fields ends here."""
MAX_CONTINUATIONS: Final = 20
MAX_QUEUED_CONTROL: Final = 64 * 1024
"""Bytes of answers (acknowledgements, resets) that a peer that does not read may make us keep."""
GLITCHES_PER_SECOND: Final = 100.0
MAX_GLITCHES: Final = 200.0
"""Frames that cost us and carry nothing (PING, SETTINGS, PRIORITY, empty DATA, unknown kinds): a bucket of this size,
refilled at GLITCHES_PER_SECOND."""
FREE_FIELDS: Final = 128
"""A block of more fields is a glitch for each time this many: one of 60 KiB can hold 60,000."""
MAX_SETTINGS: Final = 32
"""In one frame: each may mean work on every stream (CVE-2020-11080; nghttp2's limit)."""
MAX_RESETS_MADE: Final = 200
"""Streams a peer may make us reset in a connection's life (CVE-2025-8671)."""
PREMATURE_AFTER: Final = 100
"""From this many streams on, a connection that resets more than half of them before their answer ends (Envoy)."""
HIGH_WATER_BYTES: Final = 64 * 1024
LOW_WATER_BYTES: Final = 16 * 1024
MAX_QUEUED_BYTES: Final = 1024 * 1024
"""Waiting in all streams of a connection; beyond it none takes more that would have to wait, too (CVE-2019-9517)."""

_NEVER_CLOSED = -1
_INDEXED_RUN = re.compile(rb"[\x80-\xfe]+").match


def changes_no_table(block: bytes) -> bool:
    """Whether a field block leaves the dynamic table as it is: indices, and literals that are not to be indexed.

    False also where it is costly to tell. Such a block means the same fields whenever it comes again, until another
    kind of block has come.
    """
    run = _INDEXED_RUN(block)
    at, size = run.end() if run is not None else 0, len(block)
    while at < size:
        kind = block[at]
        if kind >= 0x80:
            if kind == 0xFF:
                return False
            at += 1
            continue
        name = kind & 0x0F
        if kind >= 0x20 or name == 15:
            return False
        at += 1
        for _ in range(1 if name else 2):
            if at >= size or (length := block[at] & 0x7F) == 127:
                return False
            at += 1 + length
    return at == size


class Http2Error(Exception):
    """The connection is over: GOAWAY with this code. detail: a word for counters and logs."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = f"http2.{detail}"


class StreamError(Exception):
    """One stream is over: RST_STREAM with this code."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = f"http2.{detail}"


class Http2Stream:
    """A stream's place in its connection. Whoever owns it subclasses it; on_* are called by the connection."""

    __slots__ = (
        "ends_after_queue",
        "expected",
        "id",
        "is_ended",
        "is_held",
        "is_peer_ended",
        "queue",
        "queued_bytes",
        "receive_window",
        "send_window",
        "trailers",
        "unacknowledged",
        "withheld",
    )

    id: int

    def open(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.receive_window = receive_window
        self.unacknowledged = 0
        """Bytes that its own window has not been given back for."""
        self.withheld = 0
        """Bytes that the connection's window has not been given back for, because they are held."""
        self.expected = -1
        """Body bytes the content-length still asks for; -1: it says nothing."""
        self.is_ended = False
        """We have sent, or queued, END_STREAM."""
        self.is_peer_ended = False
        self.is_held = False
        """Its data waits here: no window is given back."""
        self.queue: deque[bytes | memoryview] | None = None
        self.queued_bytes = 0
        self.ends_after_queue = False
        self.trailers = b""

    def on_data(self, data: bytes, is_end: bool) -> None:
        raise NotImplementedError

    def on_reset(self, code: int) -> None:
        """The peer reset it, or its connection is gone."""
        raise NotImplementedError

    def on_half_closed(self) -> None:
        """Our END_STREAM is out, the peer's has not come."""

    def on_closed(self) -> None:
        """Both sides have ended it."""

    def on_writable(self, is_writable: bool) -> None:
        """False: more than HIGH_WATER_BYTES wait here, or MAX_QUEUED_BYTES in the connection; True: they have gone."""
        raise NotImplementedError


class Http2Connection:
    """Frames and streams. Subclasses give `_on_header_block`, `_on_goaway`, `_on_dead` and `_wake`, and a transport."""

    __slots__ = (
        "_answers_bytes",
        "_block",
        "_block_flags",
        "_block_id",
        "_blocked",
        "_connection_window",
        "_decoder",
        "_encoded",
        "_encoder",
        "_gaps",
        "_glitches",
        "_glitches_at",
        "_has_settings",
        "_is_client",
        "_is_full",
        "_is_write_paused",
        "_literals",
        "_memo",
        "_now",
        "_out",
        "_partial",
        "_peer_initial_window",
        "_peer_max_frame",
        "_preface_at",
        "_premature",
        "_queued_bytes",
        "_receive_window",
        "_reset_by_us",
        "_resets_made",
        "_send_window",
        "_settings_unacknowledged",
        "_unacknowledged",
        "_window_updates",
        "_window_updates_allowed",
        "allows_connect_protocol",
        "has_pushed",
        "is_dead",
        "last_id",
        "peer_allows_connect_protocol",
        "peer_max_streams",
        "stream_window",
        "streams",
    )

    def __init__(self, is_client: bool) -> None:
        self._is_client = is_client
        self._decoder = Decoder()
        self._decoder.max_header_list_size = MAX_LIST_BYTES
        self._encoder = Encoder()
        self._memo: dict[Any, Any] = {}
        """Blocks that change no table → what the subclass made of them; cleared when the decoder's table may change."""
        self._encoded: dict[Any, bytes] = {}
        """What was encoded and changed no table → its bytes; cleared when the encoder's table changes."""
        self._out: list[bytes] = []
        self._partial = b""
        self._preface_at = len(PREFACE) if is_client else 0
        self._has_settings = False
        self._settings_unacknowledged = 0
        self._block: list[bytes] | None = None
        self._block_id = 0
        self._block_flags = 0
        self.streams: dict[int, Any] = {}
        self.last_id = 0
        """Highest stream id opened by the side that opens them."""
        self._gaps: list[tuple[int, int]] = []
        self._reset_by_us: dict[int, None] = {}
        self._send_window = DEFAULT_WINDOW
        self.stream_window = ANSWER_WINDOW if is_client else STREAM_WINDOW
        self._connection_window = ANSWERS_WINDOW if is_client else CONNECTION_WINDOW
        self._receive_window = self._connection_window
        self._unacknowledged = 0
        self._peer_initial_window = DEFAULT_WINDOW
        self._peer_max_frame = MAX_FRAME
        self.peer_max_streams = MAX_STREAMS
        self.peer_allows_connect_protocol = False
        self.allows_connect_protocol = not is_client
        self._blocked: dict[int, Any] = {}
        """Streams with data that no window, or no socket, has room for."""
        self._queued_bytes = 0
        self._is_full = False
        """More than MAX_QUEUED_BYTES wait, and half of them have not gone since."""
        self._is_write_paused = False
        self._answers_bytes = 0
        self._glitches = MAX_GLITCHES
        self._glitches_at = 0.0
        self._now = 0.0
        self._premature = 0
        self._resets_made = 0
        self._window_updates = 0
        self._window_updates_allowed = 5
        self.is_dead = False

    # ── for subclasses ──

    def _on_header_block(self, stream_id: int, block: bytes, is_end: bool) -> None:
        """A whole field block. Raises StreamError or Http2Error."""
        raise NotImplementedError

    def _on_goaway(self, last_id: int, code: int) -> None:
        raise NotImplementedError

    def _on_settings(self) -> None:
        """The peer's settings have changed."""

    def _on_ping_ack(self, payload: bytes) -> None:
        """Answer to a PING of ours."""

    def _on_dead(self, error: Http2Error) -> None:
        """GOAWAY is in the output: count it, write what there is, close. All streams have been told."""
        raise NotImplementedError

    def _on_stream_error(self, stream_id: int, error: StreamError) -> None:
        """A stream was reset because of what the peer sent."""

    def _wake(self) -> None:
        """There is output: call take_output() soon, once."""
        raise NotImplementedError

    def _flush(self) -> None:
        """There is much of it: write it now."""
        raise NotImplementedError

    # ── opening ──

    def start(self) -> None:
        """The preface and our settings; the connection's window is opened with them."""
        settings = [(3, 0 if self._is_client else MAX_STREAMS), (4, self.stream_window), (6, MAX_BLOCK_BYTES)]
        if self._is_client:
            settings[0] = (2, 0)  # no push
        else:
            settings.append((8, 1))  # extended CONNECT, RFC 8441
        payload = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in settings)
        self._out.append(
            (PREFACE if self._is_client else b"")
            + frame(SETTINGS, 0, 0, payload)
            + frame(WINDOW_UPDATE, 0, 0, (self._connection_window - DEFAULT_WINDOW).to_bytes(4, "big"))
        )
        self._settings_unacknowledged = 1
        self._wake()

    @property
    def awaits_settings(self) -> bool:
        """The peer has not acknowledged our settings, or not sent its own."""
        return self._settings_unacknowledged > 0 or not self._has_settings

    # ── receiving ──

    def receive(self, data: bytes, now: float) -> None:
        """What the socket gave. now: monotonic seconds. The caller takes the output there may be afterwards."""
        if self.is_dead:
            return
        self._now = now
        if self._partial:
            data = self._partial + data
            self._partial = b""
        try:
            self._read(data)
        except Http2Error as error:
            self.fail(error)
            return

    def _read(self, data: bytes) -> None:
        at, size = 0, len(data)
        if self._preface_at < 24:
            at = min(24 - self._preface_at, size)
            if data[:at] != PREFACE[self._preface_at : self._preface_at + at]:
                raise Http2Error(PROTOCOL_ERROR, "bad_preface")
            self._preface_at += at
        streams = self.streams
        while size - at >= 9:
            length = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2]
            if length > MAX_FRAME:
                raise Http2Error(FRAME_SIZE_ERROR, "frame_too_large")
            begin = at + 9
            end = begin + length
            if end > size:
                break
            kind = data[at + 3]
            flags = data[at + 4]
            stream_id = ((data[at + 5] & 0x7F) << 24) | (data[at + 6] << 16) | (data[at + 7] << 8) | data[at + 8]
            at = end
            if self._block is not None or not self._has_settings:
                if self._block is not None:
                    if kind != CONTINUATION or stream_id != self._block_id:
                        raise Http2Error(PROTOCOL_ERROR, "interrupted_headers")
                elif kind != SETTINGS or flags & ACK:
                    raise Http2Error(PROTOCOL_ERROR, "settings_expected")
            if kind == HEADERS:
                if flags & (PADDED | HAS_PRIORITY):
                    begin, end = self._strip(data, begin, end, flags, stream_id)
                if not flags & END_HEADERS:
                    self._block, self._block_id, self._block_flags = [data[begin:end]], stream_id, flags
                    continue
                try:
                    self._on_header_block(stream_id, data[begin:end], bool(flags & END_STREAM))
                except StreamError as error:
                    self._refuse(stream_id, error)
            elif kind == DATA:
                stream = streams.get(stream_id)
                self._receive_window -= length
                if self._receive_window < 0:
                    raise Http2Error(FLOW_CONTROL_ERROR, "connection_window_exceeded")
                padding = length
                if flags & PADDED:
                    begin, end = self._strip(data, begin, end, flags, stream_id)
                padding -= end - begin
                if stream is None or stream.is_peer_ended:
                    self._data_on_closed(stream_id, length)
                    continue
                is_end = flags & END_STREAM
                stream.receive_window -= length
                if stream.receive_window < 0:
                    self._acknowledge_connection(length)
                    self._refuse(stream_id, StreamError(FLOW_CONTROL_ERROR, "stream_window_exceeded"))
                    continue
                body = data[begin:end]
                if stream.expected >= 0:
                    stream.expected -= len(body)
                    if stream.expected < 0 or (is_end and stream.expected):
                        self._acknowledge_connection(length)
                        self._refuse(stream_id, StreamError(PROTOCOL_ERROR, "content_length_mismatch"))
                        continue
                if is_end:
                    stream.is_peer_ended = True
                    stream.on_data(body, True)
                    self._acknowledge_connection(length)
                    if stream.is_ended and stream.queue is None and streams.pop(stream_id, None) is not None:
                        self._give_back(stream)
                        stream.on_closed()
                    continue
                if not body:
                    self._glitch()
                    if padding:
                        self._acknowledge(stream, length)
                    continue
                stream.on_data(body, False)
                self._acknowledge(stream, length)
            else:
                self._read_other(kind, flags, stream_id, data[begin:end])
            if self.is_dead:
                return
        if at < size:
            self._partial = data[at:] if at else data

    def _strip(self, data: bytes, begin: int, end: int, flags: int, stream_id: int) -> tuple[int, int]:
        """A frame's payload without padding and priority."""
        if flags & PADDED:
            if begin >= end:
                raise Http2Error(FRAME_SIZE_ERROR, "padding_missing")
            padding = data[begin]
            begin += 1
            if padding > end - begin:
                raise Http2Error(PROTOCOL_ERROR, "padding_too_long")
            end -= padding
        if flags & HAS_PRIORITY:
            if end - begin < 5:
                raise Http2Error(FRAME_SIZE_ERROR, "priority_missing")
            if int.from_bytes(data[begin : begin + 4], "big") & MAX_WINDOW == stream_id:
                # Not only the stream's: its block would have to be decoded to go on.
                raise Http2Error(PROTOCOL_ERROR, "depends_on_itself")
            begin += 5
        return begin, end

    def _read_other(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._read_window_update(stream_id, payload)
        elif kind == RST_STREAM:
            self._read_reset(stream_id, payload)
        elif kind == SETTINGS:
            self._read_settings(flags, stream_id, payload)
        elif kind == PING:
            if stream_id:
                raise Http2Error(PROTOCOL_ERROR, "ping_on_stream")
            if len(payload) != 8:
                raise Http2Error(FRAME_SIZE_ERROR, "ping_size")
            self._glitch()
            if flags & ACK:
                self._on_ping_ack(payload)
            else:
                self._answer(frame(PING, ACK, 0, payload))
        elif kind == CONTINUATION:
            self._read_continuation(flags, payload)
        elif kind == PRIORITY:
            if not stream_id:
                raise Http2Error(PROTOCOL_ERROR, "priority_on_connection")
            self._glitch()
            if len(payload) != 5:
                self._refuse(stream_id, StreamError(FRAME_SIZE_ERROR, "priority_size"))
            elif int.from_bytes(payload[:4], "big") & MAX_WINDOW == stream_id:
                self._refuse(stream_id, StreamError(PROTOCOL_ERROR, "depends_on_itself"))
        elif kind == GOAWAY:
            if stream_id:
                raise Http2Error(PROTOCOL_ERROR, "goaway_on_stream")
            if len(payload) < 8:
                raise Http2Error(FRAME_SIZE_ERROR, "goaway_size")
            self._glitch()
            self._on_goaway(int.from_bytes(payload[:4], "big") & MAX_WINDOW, int.from_bytes(payload[4:8], "big"))
        elif kind == PUSH_PROMISE:
            raise Http2Error(PROTOCOL_ERROR, "push_promise")
        else:
            self._glitch()  # unknown kinds are ignored (RFC 9113 §4.1)

    def _read_continuation(self, flags: int, payload: bytes) -> None:
        block = self._block
        if block is None:
            raise Http2Error(PROTOCOL_ERROR, "unexpected_continuation")
        block.append(payload)
        if len(block) > MAX_CONTINUATIONS or sum(map(len, block)) > MAX_BLOCK_BYTES:
            raise Http2Error(ENHANCE_YOUR_CALM, "headers_too_large")
        if flags & END_HEADERS:
            self._block = None
            try:
                self._on_header_block(self._block_id, b"".join(block), bool(self._block_flags & END_STREAM))
            except StreamError as error:
                self._refuse(self._block_id, error)

    def _read_window_update(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Http2Error(FRAME_SIZE_ERROR, "window_update_size")
        increment = int.from_bytes(payload, "big") & MAX_WINDOW
        self._window_updates += 1
        if self._window_updates > self._window_updates_allowed:
            self._glitch()  # more than our data can have asked for (Envoy's formula)
        if not stream_id:
            if not increment:
                raise Http2Error(PROTOCOL_ERROR, "zero_window_update")
            self._send_window += increment
            if self._send_window > MAX_WINDOW:
                raise Http2Error(FLOW_CONTROL_ERROR, "window_overflow")
            if self._blocked:
                self._pump_all()
            if self._is_full:
                self._drain()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_not_idle(stream_id)
            return
        if not increment:
            self._refuse(stream_id, StreamError(PROTOCOL_ERROR, "zero_window_update"))
            return
        stream.send_window += increment
        if stream.send_window > MAX_WINDOW:
            self._refuse(stream_id, StreamError(FLOW_CONTROL_ERROR, "window_overflow"))
        elif stream.queue is not None:
            self._pump(stream)
        elif self._is_full and self._may_send(stream):
            stream.on_writable(True)

    def _read_reset(self, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise Http2Error(PROTOCOL_ERROR, "reset_of_connection")
        if len(payload) != 4:
            raise Http2Error(FRAME_SIZE_ERROR, "reset_size")
        stream = self.streams.pop(stream_id, None)
        if stream is None:
            self._check_not_idle(stream_id)
            if stream_id in self._reset_by_us:
                del self._reset_by_us[stream_id]  # the two crossed: as with every answer before its request's end
            else:
                self._glitch()
            return
        self._unblock(stream_id)
        if not stream.is_ended:
            self._premature += 1
            opened = self.last_id // 2 + 1
            if opened >= PREMATURE_AFTER and self._premature * 2 > opened and not self._is_client:
                stream.on_reset(CANCEL)
                raise Http2Error(ENHANCE_YOUR_CALM, "rapid_reset")
        self._give_back(stream)
        stream.on_reset(int.from_bytes(payload, "big"))

    def _read_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(PROTOCOL_ERROR, "settings_on_stream")
        if flags & ACK:
            if payload:
                raise Http2Error(FRAME_SIZE_ERROR, "settings_ack_size")
            if self._settings_unacknowledged:
                self._settings_unacknowledged -= 1
            else:
                self._glitch()
            return
        if len(payload) % 6:
            raise Http2Error(FRAME_SIZE_ERROR, "settings_size")
        if len(payload) > MAX_SETTINGS * 6:
            raise Http2Error(ENHANCE_YOUR_CALM, "too_many_settings")
        self._has_settings = True
        self._glitch()
        for at in range(0, len(payload), 6):
            self._set(int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big"))
        self._answer(b"\x00\x00\x00\x04\x01\x00\x00\x00\x00")
        if self._blocked:
            self._pump_all()  # once, however often the frame changed their windows
        if self._is_full:
            self._drain()
        self._on_settings()

    def _set(self, key: int, value: int) -> None:
        if key == 1:
            # Smaller tables are obeyed, larger ones not used: 4 KiB is what we keep for a peer.
            self._encoder.header_table_size = min(value, 4096)
            self._encoded.clear()
        elif key == 2:
            if value > 1 or (value and self._is_client):
                raise Http2Error(PROTOCOL_ERROR, "bad_enable_push")
        elif key == 3:
            self.peer_max_streams = value
        elif key == 4:
            if value > MAX_WINDOW:
                raise Http2Error(FLOW_CONTROL_ERROR, "bad_initial_window")
            change = value - self._peer_initial_window
            self._peer_initial_window = value
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > MAX_WINDOW:
                    raise Http2Error(FLOW_CONTROL_ERROR, "window_overflow")
        elif key == 5:
            if not MAX_FRAME <= value <= 2**24 - 1:
                raise Http2Error(PROTOCOL_ERROR, "bad_max_frame_size")
            self._peer_max_frame = min(value, HIGH_WATER_BYTES)
        elif key == 8:
            if value > 1 or (self.peer_allows_connect_protocol and not value):
                raise Http2Error(PROTOCOL_ERROR, "bad_connect_protocol")
            self.peer_allows_connect_protocol = bool(value)

    def _data_on_closed(self, stream_id: int, length: int) -> None:
        """DATA that nobody waits for: it still counts against the connection's window, and is given back."""
        if not stream_id:
            raise Http2Error(PROTOCOL_ERROR, "data_on_connection")
        self._check_not_idle(stream_id)
        self._acknowledge_connection(length)
        if stream_id in self._reset_by_us:
            self._glitch(0.1)  # it was on its way; a peer that goes on and on is another matter
            return
        if stream_id in self.streams:
            self._refuse(stream_id, StreamError(STREAM_CLOSED, "data_after_end"))
            return
        raise Http2Error(STREAM_CLOSED, "data_after_end")

    def _check_not_idle(self, stream_id: int) -> None:
        """Raises where the stream was never opened."""
        if stream_id > self.last_id or not stream_id & 1 or any(low <= stream_id < high for low, high in self._gaps):
            raise Http2Error(PROTOCOL_ERROR, "idle_stream")

    def _opened_by_peer(self, stream_id: int) -> bool:
        """A HEADERS frame for no stream we know: True when it opens one, False when it is to be ignored."""
        last_id = self.last_id
        if stream_id > last_id and stream_id & 1:
            if stream_id != last_id + 2 and (last_id or stream_id != 1):
                self._gaps.append((last_id + 1, stream_id))
                if len(self._gaps) > 16:
                    del self._gaps[0]
            self.last_id = stream_id
            self._window_updates_allowed += 2
            return True
        if stream_id in self._reset_by_us:
            self._glitch()
            return False
        self._check_not_idle(stream_id)
        raise Http2Error(STREAM_CLOSED, "headers_after_end")

    def decode(self, block: bytes) -> list[tuple[bytes, bytes, bool]]:
        """The block's fields: (name, value, never to be indexed)."""
        if len(block) > MAX_BLOCK_BYTES:
            raise Http2Error(ENHANCE_YOUR_CALM, "headers_too_large")
        try:
            count, strings = scan(block)
            if count > FREE_FIELDS:
                if count * 32 > MAX_LIST_BYTES:  # the decoder counts names and values alone
                    raise OversizedHeaderListError
                self._glitch(count / FREE_FIELDS)
            fields: list[tuple[bytes, bytes, bool]] = self._decoder.decode(block)
            if not is_padded_well(block, strings, fields):
                raise ValueError
        except OversizedHeaderListError:
            raise Http2Error(ENHANCE_YOUR_CALM, "headers_too_large") from None
        except (HPACKError, ValueError, IndexError):
            raise Http2Error(COMPRESSION_ERROR, "bad_field_block") from None
        if not changes_no_table(block):
            self._memo.clear()
        return fields

    # ── floods ──

    def _glitch(self, cost: float = 1.0) -> None:
        now = self._now
        left = min(self._glitches + (now - self._glitches_at) * GLITCHES_PER_SECOND, MAX_GLITCHES) - cost
        self._glitches_at = now
        self._glitches = left
        if left < 0:
            raise Http2Error(ENHANCE_YOUR_CALM, "flood")

    def _answer(self, data: bytes) -> None:
        """A frame that a frame of theirs asked for."""
        if self._is_write_paused:
            self._answers_bytes += len(data)
            if self._answers_bytes > MAX_QUEUED_CONTROL:
                raise Http2Error(ENHANCE_YOUR_CALM, "unread_answers")
        self._out.append(data)

    def _refuse(self, stream_id: int, error: StreamError) -> None:
        """The peer broke the protocol in one stream."""
        self._resets_made += 1
        if self._resets_made > MAX_RESETS_MADE:
            raise Http2Error(ENHANCE_YOUR_CALM, "too_many_stream_errors")
        self._on_stream_error(stream_id, error)
        stream = self.streams.get(stream_id)
        self.reset(stream_id, error.code)
        if stream is not None:
            stream.on_reset(error.code)

    # ── windows we give ──

    def _acknowledge_connection(self, length: int) -> None:
        """Bytes that have gone on, or never will: the connection may send as many more."""
        unacknowledged = self._unacknowledged = self._unacknowledged + length
        if unacknowledged >= self._connection_window // 2:
            self._unacknowledged = 0
            self._receive_window += unacknowledged
            self._out.append(frame(WINDOW_UPDATE, 0, 0, unacknowledged.to_bytes(4, "big")))

    def _acknowledge(self, stream: Http2Stream, length: int) -> None:
        """Bytes of a stream have been passed on.

        The connection's window is given back at once: a hundred streams with a little of it each would have it all.
        An upstream's is even where the stream is held, for a connection's streams are of clients that must not wait
        for each other.
        """
        stream.unacknowledged += length
        if stream.is_held:
            if self._is_client or stream.id not in self.streams:
                self._acknowledge_connection(length)
            else:
                stream.withheld += length
            return
        self._acknowledge_connection(length)
        if stream.unacknowledged >= self.stream_window // 4:
            self._give_back(stream)

    def _give_back(self, stream: Http2Stream) -> None:
        """Window for what the stream has passed on; its own only while it is open."""
        if stream.withheld:
            self._acknowledge_connection(stream.withheld)
            stream.withheld = 0
        length = stream.unacknowledged
        if length >= self.stream_window // 4 and not stream.is_peer_ended and stream.id in self.streams:
            stream.unacknowledged = 0
            stream.receive_window += length
            self._out.append(frame(WINDOW_UPDATE, 0, stream.id, length.to_bytes(4, "big")))

    def hold(self, stream: Http2Stream) -> None:
        """Whoever takes the stream's data is busy: let its window run out."""
        stream.is_held = True

    def release(self, stream: Http2Stream) -> None:
        if stream.is_held:
            stream.is_held = False
            self._give_back(stream)
            if self._out:
                self._wake()

    # ── sending ──

    def encode(self, fields: list[tuple[bytes, bytes, bool]]) -> bytes:
        """Field block; fields whose third says True are not kept in the table (they change with every message)."""
        block: bytes = self._encoder.encode(fields)
        return block

    def send_headers(self, stream: Http2Stream, block: bytes, is_end: bool) -> None:
        length = len(block)
        if length <= MAX_FRAME:
            self._out.append(
                b"%b\x01%c%b%b" % (length.to_bytes(3, "big"), 5 if is_end else 4, stream.id.to_bytes(4, "big"), block)
            )
        else:
            pieces = [block[at : at + MAX_FRAME] for at in range(0, length, MAX_FRAME)]
            out = [frame(HEADERS, END_STREAM if is_end else 0, stream.id, pieces[0])]
            out += [frame(CONTINUATION, 0, stream.id, piece) for piece in pieces[1:-1]]
            out.append(frame(CONTINUATION, END_HEADERS, stream.id, pieces[-1]))
            self._out.append(b"".join(out))
        if is_end:
            self._ended(stream)

    def send_data(self, stream: Http2Stream, data: bytes, is_end: bool, trailers: bytes = b"") -> None:
        """trailers: an encoded block, sent after the data (with is_end)."""
        length = len(data)
        if (
            stream.queue is None
            and length <= self._send_window
            and length <= stream.send_window
            and length <= self._peer_max_frame
            and not self._is_write_paused
        ):
            if length or (is_end and not trailers):
                self._send_window -= length
                stream.send_window -= length
                self._window_updates_allowed += 20
                ends = is_end and not trailers
                self._out.append(
                    b"%b\x00%c%b%b" % (length.to_bytes(3, "big"), 1 if ends else 0, stream.id.to_bytes(4, "big"), data)
                )
            if is_end:
                if trailers:
                    self.send_headers(stream, trailers, True)
                else:
                    self._ended(stream)
            return
        if stream.queue is None:
            stream.queue = deque()
            self._blocked[stream.id] = stream
        if data:
            stream.queue.append(data)
            stream.queued_bytes += length
            self._queued_bytes += length
        if is_end:
            stream.is_ended = True
            stream.ends_after_queue = True
            stream.trailers = trailers
        self._pump(stream)
        if self._queued_bytes > MAX_QUEUED_BYTES and not self._is_full:
            self._is_full = True
            for other in list(self.streams.values()):
                if not self._may_send(other):
                    other.on_writable(False)
        elif stream.queued_bytes > (0 if self._is_full else HIGH_WATER_BYTES):
            stream.on_writable(False)

    def _pump(self, stream: Http2Stream, most: int = 1 << 30) -> None:
        """Send what is queued, as far as the windows and the socket let it."""
        queue = stream.queue
        if queue is None or self._is_write_paused:
            return
        out = self._out
        was_high = stream.queued_bytes > LOW_WATER_BYTES
        sent = unwritten = 0
        has_ended = False
        while queue:
            room = min(self._send_window, stream.send_window, self._peer_max_frame, most)
            if room <= 0:
                break
            data = queue[0]
            if len(data) > room:
                data = memoryview(data)  # a slice of bytes would copy the rest of 256 KiB for each frame
                queue[0] = data[room:]
                data = data[:room]
            else:
                queue.popleft()
            length = len(data)
            most -= length
            self._send_window -= length
            stream.send_window -= length
            sent += length
            unwritten += length
            self._window_updates_allowed += 20
            has_ended = stream.ends_after_queue and not queue and not stream.trailers
            out.append(frame(DATA, END_STREAM if has_ended else 0, stream.id, bytes(data)))
            if unwritten >= HIGH_WATER_BYTES:
                # Only what is written tells whether the socket is full: a hundred answers of one loop turn may not be.
                unwritten = 0
                self._flush()
                if self._is_write_paused:
                    break
        stream.queued_bytes -= sent
        self._queued_bytes -= sent
        if not queue:
            stream.queue = None
            self._blocked.pop(stream.id, None)
            if stream.ends_after_queue:
                if stream.trailers:
                    self.send_headers(stream, stream.trailers, True)
                else:
                    if not has_ended:
                        out.append(frame(DATA, END_STREAM, stream.id, b""))
                    self._ended(stream)
        if out:
            self._wake()
        if self._is_full:
            if self._queued_bytes <= MAX_QUEUED_BYTES // 2:
                self._drain()
            elif self._may_send(stream):
                stream.on_writable(True)
        elif was_high and stream.queued_bytes <= LOW_WATER_BYTES:
            stream.on_writable(True)

    def _may_send(self, stream: Http2Stream) -> bool:
        """Whether what the stream says next goes out at once: such a stream does not wait for those that made the
        connection full, for they may wait as long as the peer likes."""
        return stream.queue is None and stream.send_window > 0 and self._send_window > 0 and not self._is_write_paused

    def _drain(self) -> None:
        """The connection is full, and something has changed: data have gone, or a window was opened."""
        if self._queued_bytes <= MAX_QUEUED_BYTES // 2:
            self._is_full = False
        for stream in list(self.streams.values()):
            if stream.queued_bytes <= LOW_WATER_BYTES if not self._is_full else self._may_send(stream):
                stream.on_writable(True)

    def _unblock(self, stream_id: int) -> None:
        """What a stream has queued will not go out."""
        stream = self._blocked.pop(stream_id, None)
        if stream is not None:
            self._queued_bytes -= stream.queued_bytes
            if self._is_full:
                self._drain()

    def _pump_all(self) -> None:
        """Every blocked stream in turn, a piece each, so that one large body does not keep the others waiting."""
        while self._blocked and self._send_window > 0 and not self._is_write_paused:
            before = self._send_window
            for stream in list(self._blocked.values()):
                self._pump(stream, MAX_FRAME)
                if self._send_window <= 0:
                    return
            if self._send_window == before:
                return

    def _ended(self, stream: Http2Stream) -> None:
        stream.is_ended = True
        if not stream.is_peer_ended:
            stream.on_half_closed()
        elif self.streams.pop(stream.id, None) is not None:
            self._give_back(stream)
            stream.on_closed()

    def reset(self, stream_id: int, code: int) -> None:
        """Send RST_STREAM and forget the stream; its owner knows."""
        stream = self.streams.pop(stream_id, None)
        self._unblock(stream_id)
        if stream is not None:
            self._give_back(stream)
        self._reset_by_us[stream_id] = None
        if len(self._reset_by_us) > MAX_RESETS_MADE:
            del self._reset_by_us[next(iter(self._reset_by_us))]
        self._answer(frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))
        self._wake()

    def goaway(self, last_id: int, code: int, why: bytes = b"") -> None:
        self._out.append(frame(GOAWAY, 0, 0, last_id.to_bytes(4, "big") + code.to_bytes(4, "big") + why))
        self._wake()

    def ping(self, payload: bytes) -> None:
        self._out.append(frame(PING, 0, 0, payload))
        self._wake()

    def fail(self, error: Http2Error) -> None:
        """The connection is over: say so, and tell every stream."""
        if self.is_dead:
            return
        self.is_dead = True
        self._out.append(
            frame(
                GOAWAY,
                0,
                0,
                (0 if self._is_client else self.last_id).to_bytes(4, "big")
                + error.code.to_bytes(4, "big")
                + error.detail.encode(),
            )
        )
        self._drop_streams(error.code)
        self._on_dead(error)

    def _drop_streams(self, code: int) -> None:
        streams = list(self.streams.values())
        self.streams.clear()
        self._blocked.clear()
        self._queued_bytes = 0
        for stream in streams:
            stream.on_reset(code)

    def take_output(self) -> bytes:
        out = self._out
        if len(out) == 1:
            return out.pop()
        data = b"".join(out)
        out.clear()
        return data

    def pause_output(self) -> None:
        """The socket is full: data waits in its streams from now on."""
        self._is_write_paused = True

    def resume_output(self) -> None:
        self._is_write_paused = False
        self._answers_bytes = 0
        if self._blocked:
            self._pump_all()
        if self._is_full:
            self._drain()


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return b"%b%c%c%b%b" % (len(payload).to_bytes(3, "big"), kind, flags, stream_id.to_bytes(4, "big"), payload)
