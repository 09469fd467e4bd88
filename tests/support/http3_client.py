"""An HTTP/3 client on aioquic's QUIC and HTTP/3, which the proxy's own HTTP/3 layer has nothing to do with.

async with Http3Client.to(port, roots_pem) as client:
    answer = await client.request(get("/"))
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StopSendingReceived, StreamDataReceived, StreamReset

from tests.support.certificates import Leaf

Headers = list[tuple[bytes, bytes]]


def get(path: str, method: str = "GET", authority: str = "a.example", *more: tuple[bytes, bytes]) -> Headers:
    return [
        (b":method", method.encode()),
        (b":scheme", b"https"),
        (b":authority", authority.encode()),
        (b":path", path.encode()),
        *more,
    ]


@dataclass
class Answer:
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    trailers: Headers = field(default_factory=list)
    informational: list[Headers] = field(default_factory=list)
    reset: int | None = None
    """Code of a RESET_STREAM."""
    stopped: int | None = None
    """Code of a STOP_SENDING."""
    is_over: bool = False

    @property
    def status(self) -> int:
        return int(dict(self.headers)[b":status"])

    def header(self, name: bytes) -> bytes | None:
        return dict(self.headers).get(name)


class Http3Client(QuicConnectionProtocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.http = H3Connection(self._quic)
        self.answers: dict[int, Answer] = {}
        self.terminated: ConnectionTerminated | None = None
        self.changed = asyncio.Event()
        self.control_stream = b""
        """What the server says on its control stream: SETTINGS, GOAWAY."""

    @classmethod
    @contextlib.asynccontextmanager
    async def to(
        cls, port: int, roots_pem: bytes, identity: Leaf | None = None, *, host: str = "127.0.0.1", **settings: Any
    ) -> AsyncIterator[Self]:
        """roots_pem: of the server. identity: what is shown where the server asks for a certificate.

        Does not wait for the handshake: requests go out as soon as QUIC lets them.
        """
        quic = QuicConnection(configuration=client_configuration(roots_pem, identity, **settings))
        loop = asyncio.get_running_loop()
        _, client = await loop.create_datagram_endpoint(
            lambda: cls(quic), local_addr=("::1" if ":" in host else "127.0.0.1", 0)
        )
        client.connect((host, port, 0, 0) if ":" in host else (host, port))
        try:
            yield client
        finally:
            client.close()
            client._transport.close()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived) and event.stream_id == 3:
            self.control_stream += event.data
        if isinstance(event, StreamReset):
            answer = self.answers.setdefault(event.stream_id, Answer())
            answer.reset, answer.is_over = event.error_code, True
        elif isinstance(event, StopSendingReceived):
            self.answers.setdefault(event.stream_id, Answer()).stopped = event.error_code
        elif isinstance(event, ConnectionTerminated):
            self.terminated = event
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, HeadersReceived):
                answer = self.answers.setdefault(http_event.stream_id, Answer())
                if dict(http_event.headers).get(b":status", b"").startswith(b"1"):
                    answer.informational.append(http_event.headers)
                elif answer.headers:
                    answer.trailers = http_event.headers
                else:
                    answer.headers = http_event.headers
                answer.is_over = http_event.stream_ended
            elif isinstance(http_event, DataReceived):
                answer = self.answers.setdefault(http_event.stream_id, Answer())
                answer.body += http_event.data
                answer.is_over = http_event.stream_ended
        self.changed.set()

    async def move(self) -> None:
        """Go on from another port, as behind a NAT that has forgotten us."""
        loop = asyncio.get_running_loop()
        before = self._transport
        await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        before.close()

    def connection_lost(self, error: Exception | None) -> None:
        pass  # of a socket that was left behind

    def send(self, headers: Headers, body: bytes | None = None, *, ends: bool = True) -> int:
        """Begin a request; returns its stream."""
        stream_id = self._quic.get_next_available_stream_id()
        self.http.send_headers(stream_id, headers, end_stream=ends and body is None)
        if body is not None:
            self.http.send_data(stream_id, body, end_stream=ends)
        self.transmit()
        return stream_id

    async def until(self, condition: Any, timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def answer(self, stream_id: int, timeout_s: float = 5.0) -> Answer:
        await self.until(
            lambda: self.terminated or (stream_id in self.answers and self.answers[stream_id].is_over), timeout_s
        )
        if stream_id not in self.answers or not self.answers[stream_id].is_over:
            raise ConnectionError(f"closed: {self.terminated}")
        return self.answers[stream_id]

    async def request(self, headers: Headers, body: bytes | None = None) -> Answer:
        return await self.answer(self.send(headers, body))

    async def refusal(self) -> ConnectionTerminated:
        """How the server ended the connection."""
        await self.until(lambda: self.terminated)
        assert self.terminated is not None
        return self.terminated


class Listening(Http3Client):
    """Keeps what came as it came: aioquic's client knows no stateless resets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received: list[bytes] = []

    def datagram_received(self, data: bytes | str, address: Any) -> None:
        assert isinstance(data, bytes)
        self.received.append(data)
        super().datagram_received(data, address)


def client_configuration(roots_pem: bytes, identity: Leaf | None = None, **settings: Any) -> QuicConfiguration:
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=["h3"], server_name="a.example", cadata=roots_pem, **settings
    )
    if identity is not None:
        configuration.certificate = identity.certificate
        configuration.private_key = identity.key
    return configuration
