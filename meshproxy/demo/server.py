"""An application for the demo: answers every request with who it is and which identity the proxy in front of it saw.

python -m meshproxy.demo.server NAME PORT

/ready answers 503 from SIGUSR1 on, until SIGUSR2; everything else is answered all the same.
"""

import asyncio
import json
import signal
import sys


class _Application(asyncio.Protocol):
    def __init__(self, name: str, busy: asyncio.Event) -> None:
        self._name = name
        self._busy = busy
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head, self._data = self._data[:end], self._data[end + 4 :]
            self._transport.write(self._answer(head))

    def _answer(self, head: bytes) -> bytes:
        if head.startswith(b"GET /ready ") and self._busy.is_set():
            return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
        fields = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n")[1:] if ": " in line)
        seen = {name.lower(): value for name, value in fields.items()}
        body = json.dumps({"endpoint": self._name, "xfcc": seen.get("x-forwarded-client-cert", "")}).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


async def _serve(name: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    busy, stop = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, busy.set)
    loop.add_signal_handler(signal.SIGUSR2, busy.clear)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await loop.create_server(lambda: _Application(name, busy), "127.0.0.1", port)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
