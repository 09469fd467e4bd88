"""One call of grpc.health.v1.Health/Check on a connection of its own. Imported when the first such probe runs: the
control process of a mesh without them does without HTTP/2.

Source: gRPC health checking protocol (health-checking.md); Kubernetes gRPC probes.
"""

import asyncio
from time import monotonic
from typing import Any

from meshproxy.codec import grpc_health
from meshproxy.codec.http2 import Http2Connection, Http2Error, Http2Stream, StreamError

_MAX_ANSWER_BYTES = 4096


async def is_serving(address: str, port: int, authority: str, service: str) -> bool:
    """Any answer but SERVING is False; so is what is no HTTP/2. Raises OSError where nobody listens."""
    loop = asyncio.get_running_loop()
    if address.startswith("/"):
        _, call = await loop.create_unix_connection(lambda: _Call(authority, service), address)
    else:
        _, call = await loop.create_connection(lambda: _Call(authority, service), address, port)
    try:
        return await call.result
    finally:
        call.transport.abort()


class _Call(Http2Connection, asyncio.Protocol):
    def __init__(self, authority: str, service: str) -> None:
        super().__init__(is_client=True)
        self.result: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.transport: Any = None
        self.body = b""
        self._authority = authority.encode("latin-1", "replace")
        self._message = grpc_health.request(service)
        self._fields: dict[bytes, bytes] = {}

    def finish(self, is_serving: bool) -> None:
        if not self.result.done():
            self.result.set_result(is_serving)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.start()
        stream = _Stream(self)
        stream.open(1, self._peer_initial_window, self.stream_window)
        self.last_id = 1
        self.streams[1] = stream
        fields = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":authority", self._authority),
            (b":path", grpc_health.METHOD),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"user-agent", b"meshproxy-health-check"),
        )
        self.send_headers(stream, self.encode([(name, value, False) for name, value in fields]), False)
        self.send_data(stream, self._message, True)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self.receive(data, monotonic())
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.finish(False)

    def _flush(self) -> None:
        if self._out and not self.transport.is_closing():
            self.transport.write(self.take_output())

    # ── codec.http2's side ──

    def _wake(self) -> None:
        """Whoever calls, comes from connection_made or data_received, which flush."""

    def _on_header_block(self, stream_id: int, block: bytes, is_end: bool) -> None:
        self._fields |= {name: value for name, value, _ in self.decode(block)}
        if is_end:
            has_answered = self._fields.get(b":status") == b"200" and self._fields.get(b"grpc-status") == b"0"
            self.finish(has_answered and grpc_health.is_serving(self.body))

    def _on_goaway(self, last_id: int, code: int) -> None:
        if last_id < 1:
            self.finish(False)

    def _on_stream_error(self, stream_id: int, error: StreamError) -> None:
        self.finish(False)

    def _on_dead(self, error: Http2Error) -> None:
        self.finish(False)


class _Stream(Http2Stream):
    __slots__ = ("_call",)

    def __init__(self, call: _Call) -> None:
        self._call = call

    def on_data(self, data: bytes, is_end: bool) -> None:
        call = self._call
        call.body += data
        if is_end or len(call.body) > _MAX_ANSWER_BYTES:  # without trailers it is no answer
            call.finish(False)

    def on_reset(self, code: int) -> None:
        self._call.finish(False)

    def on_writable(self, is_writable: bool) -> None:
        assert is_writable, "the request is small"
