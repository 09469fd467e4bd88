"""An HTTP/2 upstream on the `h2` library: independent of our codec, strict about what reaches it."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.settings

Fields = list[tuple[bytes, bytes]]


@dataclass
class H2Request:
    stream_id: int
    fields: Fields
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    is_whole: bool = False
    reset: int | None = None

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.fields if key == name), None)


@dataclass
class H2Answer:
    body: bytes = b"ok"
    fields: Fields = field(default_factory=list)
    status: int = 200
    trailers: Fields = field(default_factory=list)
    interim: tuple[int, ...] = ()
    resets: int | None = None
    """RST_STREAM with this code instead of an answer."""
    ends_with_head: bool = False
    early: bool = False
    """Answer when the head is there, not when the request is whole."""


Answer = Callable[[H2Request], H2Answer | None]
"""None: no answer, for the test to give by hand."""


class H2Origin:
    def __init__(
        self, answer: Answer = lambda _: H2Answer(), *, tls: ssl.SSLContext | None = None, opens_tunnels: bool = False
    ) -> None:
        """opens_tunnels: extended CONNECT (RFC 8441) is offered, accepted, and echoed until its end."""
        self.opens_tunnels = opens_tunnels
        self.answer = answer
        self.tls = tls
        self.requests: list[H2Request] = []
        self.connections: list[_Connection] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, ssl=self.tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self.connections:
            connection.transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)


class _Connection(asyncio.Protocol):
    def __init__(self, origin: H2Origin) -> None:
        self.origin = origin
        config = h2.config.H2Configuration(client_side=False, header_encoding=False)
        self.h2 = h2.connection.H2Connection(config)
        self.open: dict[int, H2Request] = {}
        self.unsent: dict[int, tuple[memoryview, Fields]] = {}

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.origin.connections.append(self)
        if self.origin.opens_tunnels:
            self.h2.local_settings = h2.settings.Settings(
                client=False, initial_values={h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}
            )
        self.h2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            self._on(event)
        for stream_id in list(self.unsent):
            self._pump(stream_id)
        self.flush()

    def flush(self) -> None:
        if data := self.h2.data_to_send():
            self.transport.write(data)

    def _on(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            request = H2Request(event.stream_id, list(event.headers))
            self.open[event.stream_id] = request
            self.origin.requests.append(request)
            if request.header(b":protocol") is not None:
                self.h2.send_headers(event.stream_id, [(b":status", b"200")])
                return
            answer = self.origin.answer(request)
            if answer is not None and answer.early and event.stream_ended is None:
                self.respond(request, answer)
        elif isinstance(event, h2.events.DataReceived):
            self.open[event.stream_id].body += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if self.open[event.stream_id].header(b":protocol") is not None and event.data:
                self.h2.send_data(event.stream_id, event.data)
        elif isinstance(event, h2.events.TrailersReceived):
            self.open[event.stream_id].trailers = list(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            request = self.open[event.stream_id]
            request.is_whole = True
            if request.header(b":protocol") is not None:
                self.h2.send_data(event.stream_id, b"<bye>", end_stream=True)
                return
            answer = self.origin.answer(request)
            if answer is not None and not answer.early:
                self.respond(request, answer)
        elif isinstance(event, h2.events.StreamReset):
            self.open[event.stream_id].reset = int(event.error_code)
            self.unsent.pop(event.stream_id, None)

    def respond(self, request: H2Request, answer: H2Answer) -> None:
        stream_id = request.stream_id
        if answer.resets is not None:
            self.h2.reset_stream(stream_id, answer.resets)
            return
        for status in answer.interim:
            self.h2.send_headers(stream_id, [(b":status", b"%d" % status), (b"x-interim", b"yes")])
        head = [(b":status", b"%d" % answer.status), *answer.fields]
        self.h2.send_headers(stream_id, head, end_stream=answer.ends_with_head)
        if answer.ends_with_head:
            return
        self.unsent[stream_id] = (memoryview(answer.body), answer.trailers)
        self._pump(stream_id)

    def _pump(self, stream_id: int) -> None:
        body, trailers = self.unsent[stream_id]
        while body:
            room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
            if room <= 0:
                self.unsent[stream_id] = (body, trailers)
                return
            self.h2.send_data(stream_id, bytes(body[:room]))
            body = body[room:]
        del self.unsent[stream_id]
        if trailers:
            self.h2.send_headers(stream_id, trailers, end_stream=True)
        else:
            self.h2.end_stream(stream_id)
