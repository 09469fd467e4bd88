"""python -m bench.quic_clients PORT HOST ROOTS: holds HTTP/3 connections to 127.0.0.1:PORT.

Each line on stdin is how many it shall hold. It opens those that are missing, asks every one of them for /, and writes
the count to stdout when all were answered with 200; it ends with an error when one was not, and with stdin.
"""

import asyncio
import contextlib
import ssl
import sys
from typing import Any

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent

_IDLE_S = 3600.0
_ANSWER_S = 10.0


class Client(QuicConnectionProtocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._http: H3Connection | None = None
        self._status = b""
        self._answered: asyncio.Future[bytes] | None = None

    async def status(self, host: str) -> bytes:
        """Of the answer to a GET of /, once it is whole; ConnectionError when there is none."""
        if self._http is None:
            self._http = H3Connection(self._quic)
        stream_id = self._quic.get_next_available_stream_id()
        self._answered = asyncio.get_running_loop().create_future()
        head = {":method": "GET", ":scheme": "https", ":authority": host, ":path": "/"}
        self._http.send_headers(stream_id, [(k.encode(), v.encode()) for k, v in head.items()], end_stream=True)
        self.transmit()
        return await asyncio.wait_for(self._answered, _ANSWER_S)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ConnectionTerminated) and self._answered is not None and not self._answered.done():
            self._answered.set_exception(ConnectionError(event.reason_phrase or f"closed: {event.error_code}"))
        for http_event in self._http.handle_event(event) if self._http is not None else ():
            if isinstance(http_event, HeadersReceived):
                self._status = dict(http_event.headers).get(b":status", b"")
            if isinstance(http_event, HeadersReceived | DataReceived) and http_event.stream_ended:
                assert self._answered is not None
                self._answered.set_result(self._status)


async def hold(port: int, host: str, roots: str) -> None:
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=["h3"],
        server_name=host,
        verify_mode=ssl.CERT_REQUIRED,
        cafile=roots,
        idle_timeout=_IDLE_S,
    )
    clients: list[QuicConnectionProtocol] = []
    async with contextlib.AsyncExitStack() as stack:
        while line := await asyncio.to_thread(sys.stdin.readline):
            while len(clients) < int(line):
                opening = connect("127.0.0.1", port, configuration=configuration, create_protocol=Client)
                clients.append(await stack.enter_async_context(opening))
            for number, client in enumerate(clients):
                assert isinstance(client, Client)
                if (status := await client.status(host)) != b"200":
                    sys.exit(f"connection {number + 1} was answered with {status!r}")
            print(len(clients), flush=True)
        for client in clients:
            client.close()  # all at once: leaving the stack waits for each to be closed


if __name__ == "__main__":
    asyncio.run(hold(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
