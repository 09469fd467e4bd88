"""A downstream of HTTP/2 that says exactly what the test says: any frame, any bytes, in any order.

async with Http2Client(port) as client:        # has sent the preface and SETTINGS, awaits nothing
    client.send(headers_frame(1, request("/")))
    answer = await client.response(1)

It answers nothing by itself (no SETTINGS or PING acknowledgement, no WINDOW_UPDATE) unless made with `acks=True`. It
keeps all that comes: a wait is satisfied by what has come already, and says what came when its time is over.
hyperframe reads the frames and hpack the header blocks, so a proxy that sends illegal ones fails the test.

It is a protocol and not a pair of streams: a StreamReader drops what it holds when a reset follows, and a GOAWAY is
often followed by one.
"""

import asyncio
import ssl
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar, cast

import hpack
import hyperframe.frame as h2f
from hpack.hpack import encode_integer
from hyperframe.exceptions import HyperframeError

TIMEOUT_S = 5.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Frame types, flags, settings and error codes: RFC 9113 §6, §6.5.2, §7.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK = END_STREAM = 0x1
END_HEADERS, PADDED, WITH_PRIORITY = 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    1,
    2,
    3,
    4,
    5,
    6,
)
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR = range(
    7
)
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM, INADEQUATE_SECURITY = range(7, 13)

Field = tuple[bytes, bytes]
FrameT = TypeVar("FrameT", bound=h2f.Frame)


class Response(NamedTuple):
    status: int
    headers: list[Field]
    body: bytes
    trailers: list[Field]


@dataclass
class Stream:
    """What has come on one stream."""

    blocks: list[list[Field]] = field(default_factory=list)
    """Decoded header blocks: 1xx answers, the answer, trailers."""
    body: bytearray = field(default_factory=bytearray)
    has_ended: bool = False
    reset: int | None = None
    """Error code of the RST_STREAM that came."""


def raw_frame(kind: int, flags: int, stream_id: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """Any frame, legal or not. length: what its header says; None = what the payload has. Bit 31 of the id is sent."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """HPACK literal without indexing and without Huffman (RFC 7541 §6.2.2): whatever bytes, no state on either side."""
    return b"".join((b"\x00", encode_integer(len(name), 7), name, encode_integer(len(value), 7), value))


def block(fields: Iterable[Field]) -> bytes:
    return b"".join(literal(name, value) for name, value in fields)


def request(path: str = "/", *fields: Field, method: str = "GET", authority: str = "a.example") -> list[Field]:
    """Fields of a plain request; further fields after the pseudo-header fields."""
    pseudo = {b":method": method, b":scheme": "http", b":authority": authority, b":path": path}
    return [*((name, value.encode()) for name, value in pseudo.items()), *fields]


def headers_frame(
    stream_id: int, fields: Iterable[Field] | bytes, end_stream: bool = True, end_headers: bool = True
) -> bytes:
    """HEADERS of these fields, or of this header block as it is."""
    flags = END_STREAM * end_stream | END_HEADERS * end_headers
    return raw_frame(HEADERS, flags, stream_id, fields if isinstance(fields, bytes) else block(fields))


def data_frame(stream_id: int, data: bytes = b"", end_stream: bool = True) -> bytes:
    return raw_frame(DATA, END_STREAM * end_stream, stream_id, data)


def settings_frame(settings: Mapping[int, int] | Iterable[tuple[int, int]] = ()) -> bytes:
    """Pairs may repeat a setting."""
    pairs = settings.items() if isinstance(settings, Mapping) else settings
    return raw_frame(SETTINGS, 0, 0, b"".join(k.to_bytes(2, "big") + v.to_bytes(4, "big") for k, v in pairs))


def settings_ack() -> bytes:
    return raw_frame(SETTINGS, ACK, 0)


def ping_frame(data: bytes = b"12345678", ack: bool = False) -> bytes:
    return raw_frame(PING, ACK * ack, 0, data)


def rst_frame(stream_id: int, code: int = CANCEL) -> bytes:
    return raw_frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big"))


def window_frame(stream_id: int, increment: int) -> bytes:
    return raw_frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def goaway_frame(last_stream_id: int = 0, code: int = NO_ERROR, debug: bytes = b"") -> bytes:
    return raw_frame(GOAWAY, 0, 0, last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + debug)


class Http2Client(asyncio.Protocol):
    def __init__(
        self,
        port: int,
        settings: Mapping[int, int] | None = None,
        *,
        opening: bytes | None = None,
        acks: bool = False,
        tls: ssl.SSLContext | None = None,
        sni: str = "a.example",
    ) -> None:
        """opening: sent instead of the preface and SETTINGS. acks: acknowledge SETTINGS and PING as they come."""
        self._address = ("127.0.0.1", port)
        self._tls: dict[str, Any] = {"ssl": tls, "server_hostname": sni} if tls is not None else {}
        self._opening = PREFACE + settings_frame(settings or {}) if opening is None else opening
        self._acks = acks
        self._rest = b""
        self._fragments: bytearray | None = None
        self.decoder = hpack.Decoder()
        self._table_size = (settings or {}).get(HEADER_TABLE_SIZE, 4096)
        self.max_frame_size = (settings or {}).get(MAX_FRAME_SIZE, 1 << 14)
        """A longer frame that comes is illegal."""
        self.settings: dict[int, int] = {}
        """Of the other side, as of `handshake`."""
        self._changed = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self.frames: list[h2f.Frame] = []
        """All that came, in order."""
        self.streams: dict[int, Stream] = {}
        self.closed: str | None = None
        """How the connection ended: `end` or `reset`."""
        self.illegal: str | None = None
        """What is wrong with the bytes that came; nothing is read after them."""

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(TIMEOUT_S):
            await loop.create_connection(lambda: self, *self._address, **self._tls)
        self.send(self._opening)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.transport.abort()
        await asyncio.sleep(0)

    # ── sending ──

    def send(self, *parts: bytes | h2f.Frame) -> None:
        """In one write, so that all of it is likely to be read at once. Pause the reading with transport."""
        data = b"".join(part if isinstance(part, bytes) else part.serialize() for part in parts)
        if data and not self.transport.is_closing():
            self.transport.write(data)

    async def drained(self) -> None:
        """Wait until the other side took most of what was sent, or closed."""
        await self._wait(lambda: self._writable.is_set() or self.closed, "to be able to write", self._writable)

    def end(self) -> None:
        """End our half of the connection."""
        self.transport.write_eof()

    # ── waiting: each returns what it waited for and raises AssertionError with what came when its time is over ──

    async def until(self, condition: Callable[[], object], what: str = "a condition") -> None:
        """Wait until the condition on `frames`, `streams`, `closed` holds."""
        await self._wait(condition, what, self._changed)

    async def frame(self, kind: type[FrameT], condition: Callable[[FrameT], bool] = lambda _: True) -> FrameT:
        """The first frame of the kind (a hyperframe class) that satisfies the condition."""

        def found() -> FrameT | None:
            return next((f for f in self.frames if isinstance(f, kind) and condition(f)), None)

        await self.until(lambda: found() or self.closed, kind.__name__)
        frame = found()
        assert frame is not None, self._seen(kind.__name__)
        return frame

    async def handshake(self) -> dict[int, int]:
        """The settings of the other side, acknowledged; ours are acknowledged too."""
        settings = await self.frame(h2f.SettingsFrame, lambda f: "ACK" not in f.flags)
        if not self._acks:
            self.send(settings_ack())
        await self.frame(h2f.SettingsFrame, lambda f: "ACK" in f.flags)
        self.settings = dict(settings.settings)
        return self.settings

    async def response(self, stream_id: int) -> Response:
        """The whole answer. Interim (1xx) answers are in `streams[stream_id].blocks`."""
        stream = self.streams.setdefault(stream_id, Stream())
        what = f"an answer on stream {stream_id}"
        await self.until(lambda: stream.has_ended or stream.reset is not None or self.closed, what)
        assert stream.has_ended, self._seen(what)
        finals = [i for i, fields in enumerate(stream.blocks) if not dict(fields).get(b":status", b"").startswith(b"1")]
        assert finals, self._seen(what)
        (name, status), *headers = stream.blocks[finals[0]]
        assert name == b":status", headers
        trailers = [pair for i in finals[1:] for pair in stream.blocks[i]]
        return Response(int(status), headers, bytes(stream.body), trailers)

    async def expect_goaway(self, code: int | Collection[int]) -> h2f.GoAwayFrame:
        """A GOAWAY with (one of) the code(s), then the end of the connection."""
        codes = {code} if isinstance(code, int) else set(code)
        goaway = await self.frame(h2f.GoAwayFrame)
        assert goaway.error_code in codes, self._seen(f"GOAWAY with {codes}")
        await self.expect_closed()
        return goaway

    async def expect_rst(self, stream_id: int, code: int | Collection[int]) -> None:
        """RST_STREAM with (one of) the code(s)."""
        codes = {code} if isinstance(code, int) else set(code)
        rst = await self.frame(h2f.RstStreamFrame, lambda f: f.stream_id == stream_id)
        assert rst.error_code in codes, self._seen(f"RST_STREAM on {stream_id} with {codes}")

    async def expect_closed(self) -> str:
        """The end of the connection, whatever comes before: `end` or `reset`."""
        await self.until(lambda: self.closed, "the end of the connection")
        assert self.closed is not None
        return self.closed

    async def expect_ping(self, data: bytes = b"alive???") -> None:
        """Send PING; its acknowledgement comes, so all that was sent before it has been read."""
        self.send(ping_frame(data))
        await self.frame(h2f.PingFrame, lambda f: "ACK" in f.flags and f.opaque_data == data)

    async def _wait(self, condition: Callable[[], object], what: str, event: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not condition():
                    assert self.illegal is None, self._seen(what)
                    event.clear()
                    await event.wait()
        except TimeoutError:
            raise AssertionError(self._seen(what)) from None

    def _seen(self, what: str) -> str:
        tail = "\n  ".join(map(repr, self.frames[-12:]))
        more = f"({len(self.frames) - 12} before)" if len(self.frames) > 12 else ""
        ended = f"closed ({self.closed})" if self.closed else "open"
        answers = {i: (s.blocks, s.reset) for i, s in self.streams.items() if s.blocks or s.reset is not None}
        return (
            f"waited for {what}; the connection is {ended}, "
            f"{self.illegal or 'all legal'}; came {more}\n  {tail}\nstreams: {answers}"
        )

    # ── what comes ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = "end" if error is None else "reset"
        self._changed.set()
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        start = 0
        while self.illegal is None and len(data) - start >= 9:
            end = start + 9 + int.from_bytes(data[start : start + 3], "big")
            if len(data) < end:
                break
            try:
                self._on_frame(data[start:end])
            except (HyperframeError, hpack.HPACKError, AssertionError) as error:
                self.illegal = f"illegal: {error!r} in {data[start : start + 60]!r}"
            start = end
        self._rest = data[start:]
        self._changed.set()

    def _on_frame(self, whole: bytes) -> None:
        assert len(whole) - 9 <= self.max_frame_size, "a frame larger than we allow"
        frame, _ = h2f.Frame.parse_frame_header(memoryview(whole[:9]))
        frame.parse_body(memoryview(whole[9:]))
        self.frames.append(frame)
        is_continuation = isinstance(frame, h2f.ContinuationFrame)
        assert is_continuation == (self._fragments is not None), "a header block is interrupted, or continued alone"
        stream = self.streams.setdefault(frame.stream_id, Stream())
        if isinstance(frame, h2f.DataFrame):
            stream.body += frame.data
        elif isinstance(frame, h2f.HeadersFrame | h2f.ContinuationFrame):
            self._fragments = (self._fragments or bytearray()) + frame.data
            if "END_HEADERS" in frame.flags:
                fields = self.decoder.decode(bytes(self._fragments), raw=True)
                stream.blocks.append([(bytes(name), bytes(value)) for name, value in fields])
                self._fragments = None
        elif isinstance(frame, h2f.RstStreamFrame):
            stream.reset = frame.error_code
        elif isinstance(frame, h2f.SettingsFrame):
            if "ACK" in frame.flags:
                # From here on a header block must not use, and must announce, a smaller table (RFC 9113 §4.3.1).
                self.decoder.max_allowed_table_size = self._table_size
            elif self._acks:
                self.send(settings_ack())
        elif self._acks and isinstance(frame, h2f.PingFrame) and "ACK" not in frame.flags:
            self.send(ping_frame(frame.opaque_data, ack=True))
        stream.has_ended = stream.has_ended or "END_STREAM" in frame.flags
