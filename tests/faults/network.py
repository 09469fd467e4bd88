"""Network namespaces of a test's own: nothing outside them is touched."""

import asyncio
import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import pytest

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")

NEAR, FAR = "10.255.77.1", "10.255.77.2"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Pair:
    """Two namespaces joined by a cable: the proxy lives at NEAR, whoever talks to it at FAR.

    Skips the test where namespaces cannot be made.
    """

    def __init__(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("network namespaces need root")
        if shutil.which("ip") is None:
            pytest.skip("network namespaces need iproute2")
        self.near, self.far = (f"mesh-{os.getpid()}-{end}" for end in "nf")

    def __enter__(self) -> Self:
        try:
            for name in (self.near, self.far):
                _ip("netns", "add", name)
            _ip("-n", self.near, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", self.far)
            for name, link, address in ((self.near, "v0", NEAR), (self.far, "v1", FAR)):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
                _ip("-n", name, "link", "set", link, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except RuntimeError as error:
            self._remove()
            pytest.skip(f"no network namespaces here: {error}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (self.near, self.far):
            with contextlib.suppress(RuntimeError):
                _ip("netns", "del", name)

    def cut(self) -> None:
        """Pull the cable: no packet, no reset, no FIN comes through any more."""
        _ip("-n", self.far, "link", "set", "v1", "down")

    def swallow(self) -> None:
        """FAR takes packets in and answers none of them: a SYN is lost, as behind a firewall that drops."""
        _ip("-n", self.far, "route", "add", "blackhole", f"{NEAR}/32")

    def prefix(self) -> list[str]:
        """Runs a command at NEAR."""
        return ["ip", "netns", "exec", self.near]

    def at(self, name: str, make: Callable[[], _T]) -> _T:
        """What `make` gives in that namespace; a socket stays where it was made."""
        made: list[_T] = []

        def run() -> None:
            with open(f"/run/netns/{name}") as namespace:
                if _LIBC.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(make())

        thread = threading.Thread(target=run)  # its own thread: a namespace is a thread's
        thread.start()
        thread.join()
        assert made, f"could not enter {name}"
        return made[0]

    async def connect(self, name: str, address: str, port: int) -> socket.socket:
        sock = self.at(name, socket.socket)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
        return sock
