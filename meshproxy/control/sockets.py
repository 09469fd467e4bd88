"""The listening sockets: bound here, used by the workers.

One SO_REUSEPORT socket per address and worker slot, kept open here, so that the accept queue (or the datagrams) of a
worker that dies wait for its replacement instead of being lost. A unix path has one socket that all slots share.
"""

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable

from meshproxy.model.address import SocketAddress

BACKLOG = 4096
"""net.core.somaxconn caps it."""

_SO_ATTACH_FILTER = 26
_SO_ATTACH_REUSEPORT_CBPF = 51
"""Not in Python's socket module; asm-generic/socket.h."""

Keep = Callable[[SocketAddress, int, socket.socket], None]
Drop = Callable[[SocketAddress], None]


class ListeningSockets:
    """Address → one listening socket per worker slot.

    keep and drop tell the supervisor, which holds copies for the next control process; adopted are the copies this
    control process was started with.
    """

    def __init__(
        self,
        slots: int,
        keep: Keep,
        drop: Drop,
        adopted: Iterable[tuple[SocketAddress, int, socket.socket]] = (),
    ) -> None:
        self._slots = slots
        self._keep = keep
        self._drop = drop
        self._sockets: dict[SocketAddress, dict[int, socket.socket]] = {}
        for address, slot, sock in adopted:
            self._sockets.setdefault(address, {})[slot] = sock

    @property
    def addresses(self) -> frozenset[SocketAddress]:
        return frozenset(self._sockets)

    def get(self, address: SocketAddress, slot: int) -> socket.socket:
        """KeyError where the address is not bound."""
        sockets = self._sockets[address]
        return sockets[0 if address.is_unix else slot]

    def bind(self, address: SocketAddress, *, is_quic: bool = False) -> str | None:
        """None once the address is bound (also where it was already); else one sentence that says why not.

        is_quic: datagrams go to the slot that their connection id names, not to one that their addresses choose.
        """
        if address in self._sockets:
            return None
        bound: dict[int, socket.socket] = {}
        try:
            if address.is_unix:
                bound[0] = _bind_unix(address.host)
            else:
                # Two of our own addresses may overlap on a port (0.0.0.0 and 127.0.0.1); only strangers are probed for.
                bind = _bind_udp if address.is_udp else _bind_tcp
                same_port = (address.port, address.is_udp)
                if not any((own.port, own.is_udp) == same_port and not own.is_unix for own in self._sockets):
                    bind(address, shares=False).close()
                for slot in range(self._slots):
                    bound[slot] = bind(address, shares=True)
                if is_quic and self._slots > 1:
                    _steer(bound[0], self._slots)
        except OSError as error:
            for sock in bound.values():
                sock.close()
            return f"listener {address}: cannot bind: {why(error)}"
        self._sockets[address] = bound
        for slot, sock in bound.items():
            self._keep(address, slot, sock)
        return None

    def close(self, address: SocketAddress) -> None:
        """Stop holding the address; workers that still listen on it go on until they are told."""
        sockets = self._sockets.pop(address, {})
        for sock in sockets.values():
            sock.close()
        if sockets:
            self._drop(address)
            if address.is_unix:
                _unlink(address.host)

    def refuse_new(self) -> None:
        """Let no new connection begin, while those under way still end up in the accept queues.

        Closing a listening socket resets what waits in its queue: requests that were already sent. So a drain first
        drops SYNs, gives the workers a moment to accept what is there, and only then closes. A client whose SYN was
        dropped sends another after a second and is refused.
        """
        for sockets in self._sockets.values():
            for sock in sockets.values():
                if sock.family != socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
                    _drop_syns(sock)

    def close_all(self) -> None:
        for address in list(self._sockets):
            self.close(address)


def _drop_syns(sock: socket.socket) -> None:
    """Socket filter: ldb [13]; jset #SYN; ret #0; ret #all. On a TCP socket a filter begins at the TCP header."""
    program = ctypes.create_string_buffer(
        b"".join(
            struct.pack("=HBBI", *instruction)
            for instruction in ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0x40000))
        )
    )
    with contextlib.suppress(OSError):  # then a connection may be reset by the close, as with other proxies
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 4, ctypes.addressof(program)))


def bind_one(address: SocketAddress) -> socket.socket:
    """A listening socket of the control process's own (admin, metrics). OSError where it cannot be had."""
    return _bind_tcp(address, shares=False, listens=True)


def _steer(sock: socket.socket, slots: int) -> None:
    """Choose among the SO_REUSEPORT sockets of this address by the first byte of a QUIC connection id.

    On UDP the filter begins at the payload; the id is at byte 6 of a long header and at byte 1 of a short one. Sockets
    count in the order in which they were bound. Random ids, with which clients begin, spread over all of them.
    """
    program = ctypes.create_string_buffer(
        b"".join(
            struct.pack("=HBBI", *instruction)
            for instruction in (
                (0x30, 0, 0, 0),  # ldb [0]
                (0x45, 0, 2, 0x80),  # jset #0x80: long header
                (0x30, 0, 0, 6),  # ldb [6]
                (0x05, 0, 0, 1),  # ja
                (0x30, 0, 0, 1),  # ldb [1]
                (0x94, 0, 0, slots),  # mod #slots
                (0x16, 0, 0, 0),  # ret a
            )
        )
    )
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", 7, ctypes.addressof(program)))


def _bind_tcp(address: SocketAddress, *, shares: bool, listens: bool | None = None) -> socket.socket:
    """shares: one of several sockets on the address. Without it the bind fails where anyone listens there, which
    SO_REUSEPORT would hide if the other is ours too."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Accepted sockets inherit it: one system call less per connection.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((address.host, address.port))
        if shares if listens is None else listens:
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_udp(address: SocketAddress, *, shares: bool) -> socket.socket:
    """shares as in _bind_tcp. No SO_REUSEADDR: on UDP it would take the port from whoever has it."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if shares:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, address.port))
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(path: str) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Unlink a socket that nobody listens on; leave everything else for bind to complain about."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            _unlink(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def why(error: OSError) -> str:
    """The usual reasons in plain words; the system's words for the others."""
    plain = {
        errno.EADDRINUSE: "address in use",
        errno.EADDRNOTAVAIL: "this host has no such address",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
    }
    return plain.get(error.errno or 0) or (error.strerror or str(error)).lower()
