"""What the supervisor and the control process say to each other: small pickled messages over a SOCK_SEQPACKET pair.

The supervisor outlives every other process, so it keeps what must outlive them: a copy of each listening socket.
"""

import pickle
import socket
from dataclasses import dataclass

_MAX_BYTES = 65536

# ── supervisor → control ──


@dataclass(slots=True)
class WorkerStarted:
    """A worker runs in this slot; the stream to it rides along as a descriptor. Again after control was replaced."""

    slot: int
    pid: int


@dataclass(slots=True)
class WorkerEnded:
    """why: a sentence's end, e.g. `signal 9`."""

    slot: int
    pid: int
    why: str


@dataclass(slots=True)
class Reload:
    pass


@dataclass(slots=True)
class DrainAll:
    deadline_s: float


# ── control → supervisor ──


@dataclass(slots=True)
class KeepSocket:
    """The listening socket rides along; it is handed to the control process's replacement.

    slot: the worker's, or -1 for admin, metrics and ready, whose name stands in address.
    """

    address: str
    port: int
    is_udp: bool
    slot: int


@dataclass(slots=True)
class DropSocket:
    address: str
    port: int
    is_udp: bool


@dataclass(slots=True)
class KeepLastGood:
    """A memfd with the last good resources rides along (control.store); replaces the one kept before."""


@dataclass(slots=True)
class Notify:
    """For the service manager, which listens to the supervisor only: sd_notify(3) text, e.g. READY=1."""

    state: str


@dataclass(slots=True)
class Running:
    """The first snapshot is out: from now on a control process that ends is replaced."""


@dataclass(slots=True)
class Quit:
    """POST /quitquitquit: drain and end."""


def send(link: socket.socket, message: object, descriptor: int | None = None) -> None:
    """Raises OSError where the other end is gone."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    if descriptor is None:
        link.send(data)
    else:
        socket.send_fds(link, [data], [descriptor])


def receive(link: socket.socket) -> tuple[object, int | None] | None:
    """One message and its descriptor; None where the other end is gone; BlockingIOError where nothing waits."""
    data, descriptors, _, _ = socket.recv_fds(link, _MAX_BYTES, 1, socket.MSG_DONTWAIT)
    if not data:
        return None
    return pickle.loads(data), descriptors[0] if descriptors else None
