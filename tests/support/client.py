"""A downstream that says exactly what the test says, and reads answers strictly (with h11).

async with Client(port) as client:
    client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
    answer = await client.answer()
"""

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import Self

import h11

TIMEOUT_S = 10.0


@dataclass
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    version: bytes
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)
    informational: list[int] = field(default_factory=list)

    def header(self, name: bytes) -> bytes | None:
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name!r} comes {len(values)} times"
        return values[0] if values else None


class Cut(Exception):
    """The connection ended in the middle of an answer; what had come of the body."""

    def __init__(self, body: bytes, is_reset: bool) -> None:
        super().__init__(f"cut after {len(body)} bytes ({'reset' if is_reset else 'end'})")
        self.body = body
        self.is_reset = is_reset


class Client:
    def __init__(self, port: int, tls: ssl.SSLContext | None = None, *, sni: str = "") -> None:
        self._port = port
        self._tls = tls
        self._sni = sni
        self._rest = b""
        self._ended = False

    async def __aenter__(self) -> Self:
        tls = {"ssl": self._tls, "server_hostname": self._sni or "a.example"} if self._tls is not None else {}
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port, **tls)  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def end(self) -> None:
        """End our half of the connection."""
        self.writer.write_eof()

    async def ask(self, data: bytes, method: str = "GET") -> Answer:
        self.send(data)
        return await self.answer(method)

    async def answer(self, method: str = "GET") -> Answer:
        """The next final answer. Cut when the connection ends before it is whole."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self._answer(method)

    async def _answer(self, method: str) -> Answer:
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        offer = [("upgrade", "x"), ("connection", "upgrade")] if method == "UPGRADE" else []
        parser.send(h11.Request(method=method.replace("UPGRADE", "GET"), target="/", headers=[("host", "x"), *offer]))
        parser.send(h11.EndOfMessage())
        if self._rest:
            parser.receive_data(self._rest)
            self._rest = b""
        answer: Answer | None = None
        informational: list[int] = []
        is_reset = False
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError as error:
                if self._ended:
                    raise Cut(answer.body if answer is not None else b"", is_reset) from None
                raise AssertionError(f"the answer is not HTTP: {error}") from error
            if event is h11.NEED_DATA:
                try:
                    data = await self.reader.read(65536)
                except ConnectionError:
                    raise Cut(answer.body if answer is not None else b"", True) from None
                self._ended = self._ended or not data
                parser.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                informational.append(event.status_code)
                if event.status_code == 101:
                    self._rest = parser.trailing_data[0]
                    return Answer(101, _pairs(event.headers), bytes(event.http_version), informational=informational)
            elif isinstance(event, h11.Response):
                answer = Answer(
                    event.status_code, _pairs(event.headers), bytes(event.http_version), informational=informational
                )
            elif isinstance(event, h11.Data):
                assert answer is not None
                answer.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert answer is not None
                answer.trailers = _pairs(event.headers)
                self._rest = parser.trailing_data[0]
                return answer
            else:
                raise Cut(b"", is_reset)

    async def bytes(self, size: int) -> bytes:
        """Exactly so many bytes, past HTTP."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self._rest) < size:
                data = await self.reader.read(65536)
                if not data:
                    raise Cut(self._rest, False)
                self._rest += data
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    async def ended(self) -> str:
        """How the connection ends: `end` or `reset`. Fails when more bytes come first."""
        async with asyncio.timeout(TIMEOUT_S):
            try:
                data = self._rest or await self.reader.read(65536)
            except ConnectionError:
                return "reset"
        assert not data, f"more bytes: {data[:200]!r}"
        return "end"


def _pairs(headers: object) -> list[tuple[bytes, bytes]]:
    return [(bytes(name), bytes(value)) for name, value in headers]  # type: ignore[attr-defined]


def get(path: str = "/", *lines: str, host: str = "a.example", method: str = "GET", version: str = "1.1") -> bytes:
    """A request without a body; lines: further header fields."""
    return "\r\n".join((f"{method} {path} HTTP/{version}", f"Host: {host}", *lines, "", "")).encode()


def post(body: bytes, *lines: str, path: str = "/", method: str = "POST") -> bytes:
    return get(path, f"Content-Length: {len(body)}", *lines, method=method) + body


CHUNKED = "Transfer-Encoding: chunked"
