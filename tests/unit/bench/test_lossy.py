"""bench.lossy: the cable loses its share of packets, and leaves nothing behind."""

import contextlib
import socket
from pathlib import Path

import pytest

from bench import lossy

SENT = 2000


@pytest.fixture(autouse=True)
def cables_can_be_made() -> None:
    if (why := lossy.hindrance()) is not None:
        pytest.skip(why)


def namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("bench-*")}


@pytest.mark.parametrize("percent", [0, 25])
def test_a_cable_loses_its_share_of_datagrams(percent: int) -> None:
    before = namespaces()
    with lossy.Cable(percent) as cable:
        with cable.far():
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            receiver.bind((lossy.FAR, 0))
        with cable.near():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with receiver, sender:
            receiver.setblocking(False)
            received = 0
            for _ in range(SENT):
                sender.sendto(b"?", receiver.getsockname())
                try:
                    received += len(receiver.recv(64))
                except BlockingIOError:
                    continue  # lost, or still to come
            receiver.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                while True:
                    received += len(receiver.recv(64))
        # Five standard deviations; the rest of the traffic is a few packets of neighbour discovery.
        assert abs(SENT - received - SENT * percent / 100) < (100 if percent else 1)
        assert abs(cable.lost_percent() - percent) < 5
    assert namespaces() == before
