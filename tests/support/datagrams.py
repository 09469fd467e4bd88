"""Both ends of a UDP session: an upstream that answers with its name, and a downstream that waits for what comes.

async with Upstream("a") as upstream, Downstream(port) as client:
    assert await client.ask(b"hi") == b"a:hi"

Plain sockets: asyncio's transports cannot send an empty datagram.
"""

import asyncio
import contextlib
import socket
from typing import Any, Self


def _socket(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


class Upstream:
    """Answers every datagram, unless it is silent. `senders` are the sockets it has heard from."""

    def __init__(self, name: str = "", host: str = "127.0.0.1", port: int = 0, *, is_silent: bool = False) -> None:
        self._name = name.encode() + b":" if name else b""
        self._address = (host, port)
        self.is_silent = is_silent
        self.senders: set[Any] = set()
        self.received: list[bytes] = []

    async def __aenter__(self) -> Self:
        self._sock = _socket(self._address[0])
        self._sock.bind(self._address)
        self.address: tuple[str, int] = self._sock.getsockname()[:2]
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._on_readable)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on its host answers with ICMP port unreachable."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()

    def _on_readable(self) -> None:
        data, sender = self._sock.recvfrom(65535)
        self.senders.add(sender)
        self.received.append(data)
        if not self.is_silent:
            self._sock.sendto(self._name + data, sender)

    def say(self, data: bytes, to: Any) -> None:
        self._sock.sendto(data, to)


class Downstream:
    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._to = (host, port)

    async def __aenter__(self) -> Self:
        self._sock = _socket(self._to[0])
        self._sock.connect(self._to)
        self.address = "{}:{}".format(*self._sock.getsockname())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, data: bytes) -> None:
        self._sock.send(data)

    async def answer(self, timeout_s: float = 5.0) -> bytes:
        async with asyncio.timeout(timeout_s):
            return await asyncio.get_running_loop().sock_recv(self._sock, 65535)

    async def ask(self, data: bytes) -> bytes:
        self.send(data)
        return await self.answer()

    async def ask_until_answered(self, data: bytes) -> bytes:
        """As applications over UDP do it: again, until something comes back."""
        while True:
            self.send(data)
            with contextlib.suppress(TimeoutError):
                return await self.answer(0.1)

    @property
    def has_answer(self) -> bool:
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        return True


def unused_udp_port(host: str = "127.0.0.1") -> int:
    with _socket(host) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port
