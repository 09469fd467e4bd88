"""Upstreams for tests: one that records what reaches it and answers as told, one that follows a script of bytes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import h11


@dataclass
class Seen:
    """One request as an independent parser (h11) reads it."""

    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)


Answer = Callable[[Seen], bytes]


def ok(seen: Seen) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Origin:
    """Parses with h11, answers with `answer(request)` (raw bytes). What h11 refuses is recorded in `errors`."""

    def __init__(self, answer: Answer = ok) -> None:
        self.answer = answer
        self.requests: list[Seen] = []
        self.errors: list[str] = []
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for _ in range(3):
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        seen: Seen | None = None
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(65536)
                    connection.receive_data(data)
                    continue
                if isinstance(event, h11.Request):
                    seen = Seen(
                        bytes(event.method), bytes(event.target), [(bytes(k), bytes(v)) for k, v in event.headers]
                    )
                elif isinstance(event, h11.Data):
                    assert seen is not None
                    seen.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    assert seen is not None
                    seen.trailers = [(bytes(k), bytes(v)) for k, v in event.headers]
                    self.requests.append(seen)
                    writer.write(self.answer(seen))
                    await writer.drain()
                    leftover = connection.trailing_data[0]
                    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
                    connection.receive_data(leftover) if leftover else None
                elif isinstance(event, h11.ConnectionClosed):
                    return
                else:
                    return
        except h11.RemoteProtocolError as error:
            self.errors.append(str(error))
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class ScriptedOrigin:
    """Reads a request head, then writes the script as it is and (closes) ends the connection."""

    def __init__(self, script: bytes, closes: bool = True) -> None:
        self.script = script
        self.closes = closes
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for _ in range(3):
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.script)
            await writer.drain()
            if not self.closes:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
