"""An HTTP/2 upstream that says exactly what the test says: any frame, any bytes, in any order.

async with RawHttp2Upstream(on_request) as upstream:    # on_request(connection, stream_id, path), for each HEADERS
    port = worker.listen(worker.cluster([("127.0.0.1", upstream.port)], speaks_http2=True))

Frames for connection.send() come from tests.support.http2_client. hyperframe reads what the proxy says.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Self

import hpack
import hyperframe.frame as h2f

from tests.support.http2_client import ACK, PREFACE, Field, block, data_frame, headers_frame, raw_frame, settings_frame

SETTINGS = 4


class RawHttp2Connection(asyncio.Protocol):
    def __init__(self, upstream: "RawHttp2Upstream") -> None:
        self._upstream = upstream
        self._rest = b""
        self._has_preface = False
        self._decoder = hpack.Decoder()
        self.frames: list[h2f.Frame] = []
        """All that came, in order."""
        self.requests: dict[int, list[Field]] = {}
        self.resets: dict[int, int] = {}
        self.goaways: list[h2f.GoAwayFrame] = []
        self.is_closed = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._upstream.connections.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True

    def has_request(self, stream_id: int) -> bool:
        return stream_id in self.requests

    def has_reset(self, stream_id: int) -> bool:
        return stream_id in self.resets

    def acked_settings(self) -> bool:
        return any(isinstance(frame, h2f.SettingsFrame) and "ACK" in frame.flags for frame in self.frames)

    def send(self, *parts: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"".join(parts))

    def answer(self, stream_id: int, body: bytes = b"ok") -> None:
        self.send(headers_frame(stream_id, [(b":status", b"200")], end_stream=False), data_frame(stream_id, body))

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if not self._has_preface:
            if len(self._rest) < len(PREFACE):
                return
            assert self._rest.startswith(PREFACE)
            self._rest = self._rest[len(PREFACE) :]
            self._has_preface = True
            self.send(self._upstream.opening)
        while len(self._rest) >= 9:
            frame, length = h2f.Frame.parse_frame_header(memoryview(self._rest[:9]))
            if len(self._rest) < 9 + length:
                return
            frame.parse_body(memoryview(self._rest[9 : 9 + length]))
            self._rest = self._rest[9 + length :]
            self.frames.append(frame)
            self._on(frame)

    def _on(self, frame: h2f.Frame) -> None:
        if isinstance(frame, h2f.RstStreamFrame):
            self.resets[frame.stream_id] = frame.error_code
        elif isinstance(frame, h2f.GoAwayFrame):
            self.goaways.append(frame)
        elif isinstance(frame, h2f.SettingsFrame) and "ACK" not in frame.flags and self._upstream.opening:
            self.send(raw_frame(SETTINGS, ACK, 0))
        elif isinstance(frame, h2f.HeadersFrame):
            fields = [(bytes(k), bytes(v)) for k, v in self._decoder.decode(frame.data, raw=True)]
            self.requests[frame.stream_id] = fields
            self._upstream.on_request(self, frame.stream_id, dict(fields).get(b":path", b""))


OnRequest = Callable[[RawHttp2Connection, int, bytes], None]


class RawHttp2Upstream:
    def __init__(
        self,
        on_request: OnRequest = lambda connection, stream_id, _: connection.answer(stream_id),
        *,
        opening: bytes | None = None,
    ) -> None:
        """opening: what it says first, once the preface has come; its SETTINGS, acknowledgement included, when None."""
        self.on_request = on_request
        self.opening = settings_frame() if opening is None else opening
        self.connections: list[RawHttp2Connection] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(lambda: RawHttp2Connection(self), "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self.connections:
            connection.transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)


def response(stream_id: int, *fields: Field, status: bytes = b"200", end_stream: bool = False) -> bytes:
    """HEADERS of an answer."""
    return headers_frame(stream_id, block([(b":status", status), *fields]), end_stream=end_stream)
