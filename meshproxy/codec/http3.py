"""HTTP/3 frames on one request stream, and what a client's unidirectional streams may say. Pure.

Decides: where frames begin and end, which may stand where (RFC 9114 §7), what a HEADERS frame may cost. Leaves to
others: what field lists may hold (codec.http2_fields: the rules are the same), QUIC (aioquic), requests (proxy).

aioquic has an HTTP/3 layer of its own. It ends the whole connection for one malformed request, looks at every character
of every field in Python, and lets a HEADERS frame and its decoded list grow without a bound; hence this one.

QPACK's dynamic table is off both ways (capacity 0): a reference of one byte can then never stand for more than the
longest line of the static table, no stream ever waits for another, and equal blocks always mean the same list.
"""

from typing import Final

import pylsqpack

from meshproxy.codec.http2_fields import Fields

MAX_BLOCK_BYTES: Final = 60 * 1024
"""Of an encoded field section, and of a decoded one as RFC 9114 §4.2.2 counts (32 more for each line)."""
MAX_LINES: Final = 2000
"""Of a field section, twenty times what is served: 60 KiB can hold 60,000, which cost 26 ms and 14 MiB to read. Whoever
sends them does it once a connection."""
MAX_CONTROL_BYTES: Final = 1024
"""Of a frame on the control stream that has a meaning here."""

DATA: Final = 0x0
HEADERS: Final = 0x1
CANCEL_PUSH: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
GOAWAY: Final = 0x7
MAX_PUSH_ID: Final = 0xD
_OF_HTTP2 = frozenset({0x2, 0x6, 0x8, 0x9})
_NOT_IN_A_REQUEST = _OF_HTTP2 | {CANCEL_PUSH, SETTINGS, PUSH_PROMISE, GOAWAY, MAX_PUSH_ID}
_NOT_IN_CONTROL = _OF_HTTP2 | {DATA, HEADERS, PUSH_PROMISE}
_SETTINGS_OF_HTTP2 = frozenset({0x0, 0x2, 0x3, 0x4, 0x5})

_CONTROL, _PUSH, _ENCODER, _DECODER = range(4)
_IGNORED = -1

NO_ERROR: Final = 0x100
INTERNAL_ERROR: Final = 0x102
STREAM_CREATION_ERROR: Final = 0x103
CLOSED_CRITICAL_STREAM: Final = 0x104
FRAME_UNEXPECTED: Final = 0x105
FRAME_ERROR: Final = 0x106
EXCESSIVE_LOAD: Final = 0x107
SETTINGS_ERROR: Final = 0x109
MISSING_SETTINGS: Final = 0x10A
ID_ERROR: Final = 0x108
REQUEST_REJECTED: Final = 0x10B
REQUEST_CANCELLED: Final = 0x10C
REQUEST_INCOMPLETE: Final = 0x10D
MESSAGE_ERROR: Final = 0x10E
DECOMPRESSION_FAILED: Final = 0x200
ENCODER_STREAM_ERROR: Final = 0x201
DECODER_STREAM_ERROR: Final = 0x202


class Http3Error(Exception):
    """The connection must end with `code`; detail: the word to count."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = f"http3.{detail}"


def number(value: int) -> bytes:
    """A variable-length integer (RFC 9000 §16)."""
    if value < 0x40:
        return bytes((value,))
    if value < 0x4000:
        return (value | 0x4000).to_bytes(2, "big")
    if value < 0x40000000:
        return (value | 0x80000000).to_bytes(4, "big")
    return (value | 0xC000000000000000).to_bytes(8, "big")


def frame(kind: int, payload: bytes) -> bytes:
    return number(kind) + number(len(payload)) + payload


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends); (0, -1) where there is not enough of it."""
    if at >= len(data):
        return 0, -1
    first = data[at]
    size = 1 << (first >> 6)
    if size == 1:
        return first, at + 1
    if at + size > len(data):
        return 0, -1
    return int.from_bytes(data[at : at + size], "big") & ((1 << (8 * size - 2)) - 1), at + size


class RequestReader:
    """Frames of one request stream. What it holds back (`held`) is less than one HEADERS frame of MAX_BLOCK_BYTES."""

    __slots__ = ("_buffer", "_has_headers", "_has_trailers", "_kind", "_left")

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._buffer = b""
        self._kind = -1
        """Of the frame that is being read; -1 between frames."""
        self._left = 0
        self._has_headers = self._has_trailers = False

    @property
    def held(self) -> int:
        return len(self._buffer)

    def on_headers(self, block: bytes, is_end: bool) -> None:
        """A whole field section: the request's first, its trailers second."""
        raise NotImplementedError

    def on_data(self, data: bytes, is_end: bool) -> None:
        raise NotImplementedError

    def on_incomplete(self) -> None:
        """The stream ended before a request was on it."""
        raise NotImplementedError

    def receive(self, data: bytes, is_end: bool) -> None:
        """Http3Error where the connection must end. The stream may stop listening within one of its callbacks."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        at, size = 0, len(data)
        while True:
            if self._kind < 0:
                if at == size:
                    break
                kind, after = _read_number(data, at)
                length, after = _read_number(data, after) if after > 0 else (0, -1)
                if after < 0:
                    if is_end:
                        raise Http3Error(FRAME_ERROR, "truncated_frame")
                    self._buffer = data[at:]
                    return
                at = after
                self._begin(kind, length)
            if self._kind == HEADERS:
                if size - at < self._left:
                    if is_end:
                        raise Http3Error(FRAME_ERROR, "truncated_frame")
                    self._buffer = data[at:]
                    return
                block = data[at : at + self._left]
                at += self._left
                self._kind = -1
                ends = is_end and at == size
                self.on_headers(block, ends)
                if ends:
                    return
                continue
            taken = min(self._left, size - at)
            piece = data[at : at + taken] if taken < size else data
            at += taken
            self._left -= taken
            kind = self._kind
            if not self._left:
                self._kind = -1
            elif is_end:
                raise Http3Error(FRAME_ERROR, "truncated_frame")
            if kind == DATA:
                ends = is_end and at == size
                if piece or ends:
                    self.on_data(piece, ends)
                if ends:
                    return
            if self._left and at == size:
                return
        if is_end:
            if self._has_headers:
                self.on_data(b"", True)
            else:
                self.on_incomplete()

    def _begin(self, kind: int, length: int) -> None:
        self._kind, self._left = kind, length
        if kind == DATA:
            if not self._has_headers or self._has_trailers:
                raise Http3Error(FRAME_UNEXPECTED, "data_out_of_place")
        elif kind == HEADERS:
            if self._has_trailers:
                raise Http3Error(FRAME_UNEXPECTED, "headers_after_trailers")
            if length > MAX_BLOCK_BYTES:
                raise Http3Error(EXCESSIVE_LOAD, "headers_too_large")
            self._has_trailers = self._has_headers
            self._has_headers = True
        elif kind in _NOT_IN_A_REQUEST:
            raise Http3Error(FRAME_UNEXPECTED, "frame_in_request")


class ResponseReader(RequestReader):
    """Frames of the answer on a request stream."""

    __slots__ = ()

    def was_informational(self) -> None:
        """What on_headers was given is not the head yet."""
        self._has_headers = False


class ClientStreams:
    """A client's unidirectional streams: one of control, two of QPACK that have nothing to say, others ignored."""

    __slots__ = ("_buffers", "_is_in_number", "_kinds", "_left", "_settings_received", "max_push_id", "settings")

    _push_refusal = STREAM_CREATION_ERROR, "push_from_client"

    def __init__(self) -> None:
        self._kinds: dict[int, int] = {}
        self._buffers: dict[int, bytes] = {}
        self._left = 0
        """Bytes of a frame on the control stream that is passed over."""
        self._is_in_number = False
        """Within an instruction of the decoder stream that goes over more than a byte."""
        self._settings_received = False
        self.settings: dict[int, int] = {}
        self.max_push_id = -1

    def is_critical(self, stream_id: int) -> bool:
        return self._kinds.get(stream_id, _IGNORED) != _IGNORED

    def forget(self, stream_id: int) -> None:
        """The other side has reset it."""
        self._kinds.pop(stream_id, None)
        self._buffers.pop(stream_id, None)

    def receive(self, stream_id: int, data: bytes, is_end: bool) -> bool:
        """False: of no use to us, the client may be told to stop."""
        kind = self._kinds.get(stream_id)
        if kind is None:
            data = self._buffers.pop(stream_id, b"") + data
            kind, at = _read_number(data, 0)
            if at < 0:
                if not is_end:
                    self._buffers[stream_id] = data
                return True
            data = data[at:]
            if kind == _PUSH:
                raise Http3Error(*self._push_refusal)
            if kind > _DECODER:
                if not is_end:
                    self._kinds[stream_id] = _IGNORED
                return False
            if kind in self._kinds.values():
                raise Http3Error(STREAM_CREATION_ERROR, "second_stream_of_its_kind")
            self._kinds[stream_id] = kind
        elif kind == _IGNORED:
            if is_end:
                self.forget(stream_id)
            return True
        if is_end:
            raise Http3Error(CLOSED_CRITICAL_STREAM, "critical_stream_ended")
        if kind == _CONTROL:
            self._control(self._buffers.pop(stream_id, b"") + data, stream_id)
        elif kind == _ENCODER:
            if data.strip(b"\x20"):  # Set Dynamic Table Capacity to 0 is all that a capacity of 0 allows
                raise Http3Error(ENCODER_STREAM_ERROR, "dynamic_table")
        else:
            for byte in data:
                if self._is_in_number:
                    self._is_in_number = byte >= 0x80
                elif byte & 0xC0 != 0x40:  # Stream Cancellation may come; we insert nothing that could be acknowledged
                    raise Http3Error(DECODER_STREAM_ERROR, "decoder_instruction")
                else:
                    self._is_in_number = byte == 0x7F
        return True

    def _control(self, data: bytes, stream_id: int) -> None:
        at = 0
        while True:
            if self._left:
                passed = min(self._left, len(data) - at)
                at += passed
                self._left -= passed
            if at == len(data):
                return
            kind, after = _read_number(data, at)
            length, after = _read_number(data, after) if after > 0 else (0, -1)
            if after < 0:
                break
            if kind != SETTINGS and not self._settings_received:
                raise Http3Error(MISSING_SETTINGS, "missing_settings")
            if kind in _NOT_IN_CONTROL or (kind == SETTINGS and self._settings_received):
                raise Http3Error(FRAME_UNEXPECTED, "frame_in_control")
            if kind not in (SETTINGS, MAX_PUSH_ID, GOAWAY, CANCEL_PUSH):
                at, self._left = after, length
                continue
            if length > MAX_CONTROL_BYTES:
                raise Http3Error(EXCESSIVE_LOAD, "control_frame_too_large")
            if len(data) - after < length:
                break
            payload = data[after : after + length]
            at = after + length
            if kind == SETTINGS:
                self._settings_received = True
                self.settings = _read_settings(payload)
                self.on_settings()
            else:
                self._on_id(kind, payload)
        self._buffers[stream_id] = data[at:]

    def _on_id(self, kind: int, payload: bytes) -> None:
        value, end = _read_number(payload, 0)
        if end != len(payload):
            raise Http3Error(FRAME_ERROR, "bad_id_frame")
        self.on_id(kind, value)

    def on_settings(self) -> None:
        """`settings` has them."""

    def on_id(self, kind: int, value: int) -> None:
        if kind == MAX_PUSH_ID:
            if value < self.max_push_id:
                raise Http3Error(ID_ERROR, "max_push_id_reduced")
            self.max_push_id = value
        elif kind == CANCEL_PUSH:
            raise Http3Error(ID_ERROR, "nothing_was_pushed")


class ServerStreams(ClientStreams):
    """A server's unidirectional streams, to a client that allows no push."""

    __slots__ = ("goaway",)

    _push_refusal = ID_ERROR, "push_not_allowed"

    def __init__(self) -> None:
        super().__init__()
        self.goaway: int | None = None
        """Requests from this stream id on are not looked at."""

    def on_id(self, kind: int, value: int) -> None:
        if kind == MAX_PUSH_ID:
            raise Http3Error(FRAME_UNEXPECTED, "max_push_id_from_server")
        if kind == CANCEL_PUSH:
            raise Http3Error(ID_ERROR, "push_not_allowed")
        if value & 3 or (self.goaway is not None and value > self.goaway):
            raise Http3Error(ID_ERROR, "bad_goaway")
        self.goaway = value
        self.on_goaway(value)

    def on_goaway(self, stream_id: int) -> None:
        raise NotImplementedError


def _read_settings(payload: bytes) -> dict[int, int]:
    at = 0
    seen: dict[int, int] = {}
    while at < len(payload):
        identifier, at = _read_number(payload, at)
        value, at = _read_number(payload, at) if at > 0 else (0, -1)
        if at < 0:
            raise Http3Error(FRAME_ERROR, "truncated_settings")
        if identifier in _SETTINGS_OF_HTTP2 or identifier in seen:
            raise Http3Error(SETTINGS_ERROR, "bad_setting")
        if identifier in (0x8, 0x33) and value > 1:
            raise Http3Error(SETTINGS_ERROR, "bad_setting")
        seen[identifier] = value
    return seen


def our_settings() -> bytes:
    """SETTINGS: no dynamic table, no blocked streams, the longest field section, extended CONNECT (RFC 9220)."""
    pairs = ((0x1, 0), (0x7, 0), (0x6, MAX_BLOCK_BYTES), (0x8, 1))
    return frame(SETTINGS, b"".join(number(key) + number(value) for key, value in pairs))


_encoder = pylsqpack.Encoder()


def encode(fields: Fields) -> bytes:
    """A field section, by the static table alone: it serves any connection."""
    block: bytes = _encoder.encode(0, [(name, value) for name, value, _ in fields])[1]
    return block


class FieldDecoder:
    """Reads field sections; without a dynamic table one ls-qpack decoder (4 KiB) serves all connections."""

    __slots__ = ()
    _decoder = pylsqpack.Decoder(0, 0)

    def decode(self, block: bytes) -> Fields | None:
        """The list; None where it is longer than MAX_BLOCK_BYTES. Http3Error where the block is not QPACK."""
        if block == b"\x00\x00":  # no lines at all: lawful, and an error to ls-qpack
            return []
        try:
            _, received = self._decoder.feed_header(0, block)
        except (pylsqpack.DecompressionFailed, pylsqpack.StreamBlocked):
            raise Http3Error(DECOMPRESSION_FAILED, "bad_field_section") from None
        if len(received) > MAX_LINES:
            raise Http3Error(EXCESSIVE_LOAD, "too_many_fields")
        size = 0
        fields: Fields = []
        for name, value in received:
            size += len(name) + len(value) + 32
            fields.append((name, value, False))
        return fields if size <= MAX_BLOCK_BYTES else None
