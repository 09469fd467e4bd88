"""An HTTP/3 upstream on aioquic's QUIC and HTTP/3, which the proxy's own HTTP/3 layer has nothing to do with."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from aioquic.asyncio import serve
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection, encode_frame
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, ProtocolNegotiated, QuicEvent, StopSendingReceived, StreamReset

from tests.support.certificates import Leaf

Fields = list[tuple[bytes, bytes]]


@dataclass
class H3Request:
    connection: "_Connection"
    stream_id: int
    fields: Fields
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    is_whole: bool = False
    reset: int | None = None
    """Code of a RESET_STREAM."""
    stopped: int | None = None
    """Code of a STOP_SENDING."""

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.fields if key == name), None)


@dataclass
class H3Answer:
    body: bytes = b"ok"
    fields: Fields = field(default_factory=list)
    status: int = 200
    trailers: Fields = field(default_factory=list)
    interim: tuple[int, ...] = ()
    resets: int | None = None
    """RESET_STREAM with this code instead of an answer."""
    raw: bytes | None = None
    """What the stream carries instead of an answer."""
    ends: bool = True


Answer = Callable[[H3Request], H3Answer | None]
"""None: no answer, for the test to give by hand."""


class H3Origin:
    def __init__(self, leaf: Leaf, answer: Answer = lambda _: H3Answer(), *, opens_tunnels: bool = False) -> None:
        """opens_tunnels: extended CONNECT (RFC 9220) is accepted, and echoed until its end."""
        self.answer = answer
        self.opens_tunnels = opens_tunnels
        self.requests: list[H3Request] = []
        self.connections: list[_Connection] = []
        self.configuration = QuicConfiguration(is_client=False, alpn_protocols=["h3"])
        self.configuration.certificate = leaf.certificate
        self.configuration.private_key = leaf.key

    async def __aenter__(self) -> Self:
        self._server: Any = await serve("127.0.0.1", 0, configuration=self.configuration, create_protocol=self._accept)
        self.port: int = self._server._transport.get_extra_info("sockname")[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.sleep(0)

    def _accept(self, *args: Any, **kwargs: Any) -> "_Connection":
        connection = _Connection(self, *args, **kwargs)
        self.connections.append(connection)
        return connection


class _Connection(QuicConnectionProtocol):
    def __init__(self, origin: H3Origin, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.origin = origin
        self.http: H3Connection | None = None
        self.requests: dict[int, H3Request] = {}
        self.terminated: ConnectionTerminated | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            # WebTransport is what makes aioquic's server say that it knows extended CONNECT.
            self.http = H3Connection(self._quic, enable_webtransport=self.origin.opens_tunnels)
        elif isinstance(event, ConnectionTerminated):
            self.terminated = event
        elif isinstance(event, StreamReset) and event.stream_id in self.requests:
            self.requests[event.stream_id].reset = event.error_code
        elif isinstance(event, StopSendingReceived) and event.stream_id in self.requests:
            self.requests[event.stream_id].stopped = event.error_code
        if self.http is None:
            return
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, HeadersReceived):
                self._on_headers(http_event)
            elif isinstance(http_event, DataReceived):
                self._on_data(http_event)

    def _on_headers(self, event: HeadersReceived) -> None:
        seen = self.requests.get(event.stream_id)
        if seen is None:
            seen = self.requests[event.stream_id] = H3Request(self, event.stream_id, event.headers)
            self.origin.requests.append(seen)
            if seen.header(b":protocol") is not None:
                self.http.send_headers(event.stream_id, [(b":status", b"200")])  # type: ignore[union-attr]
                return
        else:
            seen.trailers = event.headers
        if event.stream_ended:
            self._whole(seen)

    def _on_data(self, event: DataReceived) -> None:
        seen = self.requests[event.stream_id]
        if seen.header(b":protocol") is not None:
            self.http.send_data(event.stream_id, event.data, event.stream_ended)  # type: ignore[union-attr]
            return
        seen.body += event.data
        if event.stream_ended:
            self._whole(seen)

    def _whole(self, seen: H3Request) -> None:
        seen.is_whole = True
        answer = self.origin.answer(seen)
        if answer is not None:
            self.respond(seen, answer)

    def respond(self, seen: H3Request, answer: H3Answer) -> None:
        stream_id, http = seen.stream_id, self.http
        assert http is not None
        if answer.resets is not None:
            self._quic.reset_stream(stream_id, answer.resets)
        elif answer.raw is not None:
            self._quic.send_stream_data(stream_id, answer.raw, answer.ends)
        else:
            for status in answer.interim:
                http.send_headers(stream_id, [(b":status", b"%d" % status)])
            http.send_headers(stream_id, [(b":status", b"%d" % answer.status), *answer.fields])
            http.send_data(stream_id, answer.body, answer.ends and not answer.trailers)
            if answer.trailers:
                http.send_headers(stream_id, answer.trailers, end_stream=answer.ends)
        self.transmit()

    def goaway(self, stream_id: int) -> None:
        """Requests from this stream id on are not looked at."""
        assert self.http is not None and self.http._local_control_stream_id is not None
        self._quic.send_stream_data(self.http._local_control_stream_id, encode_frame(7, bytes((stream_id,))))
        self.transmit()
