"""Two network namespaces joined by a cable that loses packets: the same share of them for TCP and UDP.

A relay could lose datagrams, but not segments of TCP: only what is below it can. Nothing outside the namespaces is
touched. Source of the loss: nftables' `numgen random`, at the end that receives, in either direction.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from bench.process import BenchError

NEAR, FAR = "10.255.78.1", "10.255.78.2"

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_SBIN = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def hindrance() -> str | None:
    """Why there can be no such cable here; None: there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nft") if shutil.which(name, path=_SBIN) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    try:
        with Cable(1):
            return None
    except BenchError as error:  # a container's root, or a kernel without a part
        return str(error)


class Cable:
    """Joins NEAR and FAR, each in a namespace of its own. loss_percent: of the packets, in each direction."""

    def __init__(self, loss_percent: int) -> None:
        self._loss_percent = loss_percent
        self._near, self._far = (f"bench-{os.getpid()}-{end}" for end in "nf")

    def __enter__(self) -> Self:
        try:
            for name in (self._near, self._far):
                _run("ip", "netns", "add", name)
            _run("ip", "-n", self._near, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", self._far)
            for name, link, address in ((self._near, "v0", NEAR), (self._far, "v1", FAR)):
                _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", link)
                # Packets as they are on a wire: one that stands for many would be lost for all of them.
                _run("ip", "-n", name, "link", "set", link, "gso_max_segs", "1")
                _run("ip", "-n", name, "link", "set", link, "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
                rules = (
                    "table inet loss { chain received { type filter hook input priority 0; "
                    f"iifname {link} counter numgen random mod 100 < {self._loss_percent} counter drop; }}; }}"
                )
                _run("ip", "netns", "exec", name, "nft", rules)
        except BenchError:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (self._near, self._far):
            with contextlib.suppress(BenchError):
                _run("ip", "netns", "del", name)

    def lost_percent(self) -> float:
        """Of all packets so far, in both directions."""
        seen = lost = 0
        for name in (self._near, self._far):
            rules = _run("ip", "netns", "exec", name, "nft", "list", "ruleset")
            every, dropped = (int(packets) for packets in re.findall(r"counter packets (\d+)", rules))
            seen, lost = seen + every, lost + dropped
        return 100 * lost / seen if seen else 0.0

    @contextlib.contextmanager
    def near(self) -> Iterator[None]:
        """This thread is at NEAR meanwhile, with the sockets it makes and the programs it starts."""
        with _inside(self._near):
            yield

    @contextlib.contextmanager
    def far(self) -> Iterator[None]:
        """As near, at FAR."""
        with _inside(self._far):
            yield


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{namespace}") as chosen:
        _enter(chosen.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET):
        raise BenchError(f"cannot enter a network namespace: {os.strerror(ctypes.get_errno())}")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": _SBIN})
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
