"""How messages travel between the control process and a worker: length-prefixed pickles over a unix stream socket.

Decides: framing, which descriptor belongs to which message, how much of an update a worker takes per loop turn.
Leaves to others: what the messages mean (control/messages.py), when to send what (control/fleet.py).

A worker is given either the stream itself or a SOCK_SEQPACKET link to the supervisor. Over a link the supervisor hands
the stream over as a descriptor, and hands over another one when the control process had to be replaced; the worker's
code sees neither: the new control process sends everything, and what it does not name is removed (Begin.replaces_all).

Imports stay lean: every worker carries them.
"""

import os
import pickle
import socket
import struct
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter

from meshproxy.control.messages import (
    Begin,
    Commit,
    Health,
    Hello,
    PutCluster,
    PutListener,
    PutRouteTable,
    PutWorkload,
    Remove,
)
from meshproxy.errors import LocalProtocolError
from meshproxy.model.listener import Listener

_LENGTH = struct.Struct("!I")
_READ_BYTES = 65536
MAX_FRAME_BYTES = 256 * 1024 * 1024
"""A longer frame is a bug of ours (the stream lost its place), not a big configuration."""
SLICE_S = 0.001
"""A worker applies messages for this long, then lets its loop serve requests. One piece of 256 endpoints unpickles in
0.7 ms, so a turn stays below 2 ms."""
MAX_PENDING_BYTES = 1 << 20
"""A worker whose control process does not read drops reports above this instead of growing."""

_ENDS = {"eject": "restore", "unhealthy": "healthy", "suspect": "clear"}

NOTHING = object()
"""What `Decoder.next` returns while the next message is incomplete (None is a possible message)."""


def encode(message: object) -> bytes:
    """One frame: four bytes of length, then the pickle."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Bytes in any split → messages, one at a time. Does no IO; only ever fed by our own other end."""

    __slots__ = ("_buffer", "_start")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        # Dropping the consumed front here, once per read, keeps `next` from moving the rest for every message.
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next(self) -> object:
        """The next whole message, or NOTHING."""
        start = self._start
        if len(self._buffer) - start < 4:
            return NOTHING
        (length,) = _LENGTH.unpack_from(self._buffer, start)
        if length > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame of {length} bytes on the control channel")
        end = start + 4 + length
        if len(self._buffer) < end:
            return NOTHING
        with memoryview(self._buffer) as view:
            message: object = pickle.loads(view[start + 4 : end])
        self._start = end
        return message


class WorkerChannel:
    """The worker's end: calls `on_message(message, descriptor)`; descriptor is None but for PutListener.

    The receiver owns the descriptor. `on_closed()` is called once, when nothing will ever arrive again: the supervisor
    (given a link) or the control process (given the stream) is gone. Works on any loop with add_reader.
    """

    __slots__ = (
        "_backlogged",
        "_closed",
        "_decoder",
        "_descriptors",
        "_known",
        "_link",
        "_listeners",
        "_longest_s",
        "_loop",
        "_named",
        "_on_closed",
        "_on_message",
        "_out",
        "_out_bytes",
        "_staged",
        "_stream",
        "_verdicts",
        "dropped",
    )

    def __init__(
        self,
        sock: socket.socket,
        loop: AbstractEventLoop,
        on_message: Callable[[object, int | None], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._on_message = on_message
        self._on_closed = on_closed
        self._link: socket.socket | None = None
        self._stream: socket.socket | None = None
        self._known: set[tuple[str, str]] = set()
        self._listeners: dict[str, Listener] = {}
        self._staged: dict[str, Listener] = {}
        self._named: set[tuple[str, str]] | None = None
        self._verdicts: set[tuple[str, str, str]] = set()
        """What would end each verdict that stands: (cluster key, endpoint key, restore | healthy | clear)."""
        self._closed = False
        self._longest_s = 0.0
        self.dropped = 0
        """Messages not sent because the control process was away or did not read."""
        self._reset()
        sock.setblocking(False)
        if sock.type == socket.SOCK_SEQPACKET:
            self._link = sock
            loop.add_reader(sock.fileno(), self._link_readable)
        else:
            self._connect(sock)

    def send(self, message: object) -> None:
        """Queue a message; never blocks. Dropped (and counted) without a control process that reads."""
        if self._stream is None or self._out_bytes > MAX_PENDING_BYTES:
            self.dropped += 1
            return
        frame = encode(message)
        if not self._out:
            try:
                sent = self._stream.send(frame)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.dropped += 1
                return  # the reader sees the end of the stream and acts on it
            if sent == len(frame):
                return
            frame = frame[sent:]
            self._loop.add_writer(self._stream.fileno(), self._writable)
        self._out.append(frame)
        self._out_bytes += len(frame)

    def close(self) -> None:
        """Stop listening to the control process; on_closed is not called."""
        self._closed = True
        self._disconnect()
        if self._link is not None:
            self._loop.remove_reader(self._link.fileno())
            self._link.close()
            self._link = None

    def _reset(self) -> None:
        self._decoder = Decoder()
        self._descriptors: deque[int] = deque()
        self._out: deque[bytes] = deque()
        self._out_bytes = 0
        self._backlogged = False

    def _connect(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._loop.add_reader(stream.fileno(), self._readable)
        self.send(Hello(os.getpid()))

    def _disconnect(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if not self._backlogged:
            self._loop.remove_reader(stream.fileno())
        if self._out:
            self._loop.remove_writer(stream.fileno())
        stream.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._reset()

    def _link_readable(self) -> None:
        assert self._link is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._link, 16, 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._end()
            return
        if descriptors:
            self._disconnect()
            self._connect(socket.socket(fileno=descriptors[0]))

    def _readable(self) -> None:
        assert self._stream is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._stream, _READ_BYTES, 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            if self._link is None:
                self._end()
            else:
                self._disconnect()
            return
        self._descriptors.extend(descriptors)
        self._decoder.feed(data)
        self._apply()

    def _apply(self) -> None:
        """Hand out messages for one slice of time; with more left, stop reading and come back next turn."""
        stream = self._stream
        if stream is None:
            return
        started = perf_counter()
        deadline = started + SLICE_S
        while (message := self._decoder.next()) is not NOTHING:
            self._deliver(message)
            if self._stream is not stream:
                return  # the receiver closed us
            now = perf_counter()
            if now >= deadline:
                self._longest_s = max(self._longest_s, now - started)
                if not self._backlogged:
                    self._backlogged = True
                    self._loop.remove_reader(stream.fileno())
                self._loop.call_soon(self._resume, stream)
                return
        if self._backlogged:
            self._backlogged = False
            self._loop.add_reader(stream.fileno(), self._readable)

    def take_longest_s(self) -> float:
        """The longest time that messages held the loop in one piece, decoding included, since the last call."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s

    def _resume(self, stream: socket.socket) -> None:
        if self._stream is stream:  # else: replaced meanwhile, and its backlog with it
            self._apply()

    def _deliver(self, message: object) -> None:
        if isinstance(message, PutListener):
            listener = message.listener
            # Descriptors arrive in the order of the messages they were sent with, at the latest with their last byte.
            descriptor = self._descriptors.popleft()
            self._name("listener", listener.name)
            if self._named is not None and self._listeners.get(listener.name) == listener:
                os.close(descriptor)  # another copy of a socket the worker listens on: nothing to tell it
                return
            self._staged[listener.name] = listener
            self._on_message(message, descriptor)
            return
        if isinstance(message, PutCluster):
            self._name("cluster", message.cluster.key)
        elif isinstance(message, PutRouteTable):
            self._name("route_table", message.table.name)
        elif isinstance(message, PutWorkload):
            self._name("workload", message.workload.id)
        elif isinstance(message, Remove):
            self._known.discard((message.kind, message.name))
            if message.kind == "listener":
                self._listeners.pop(message.name, None)
            if message.kind == "cluster" and self._verdicts:
                self._verdicts = {verdict for verdict in self._verdicts if verdict[0] != message.name}
        elif isinstance(message, Health):
            for cluster, endpoint, word in message.verdicts:
                if word in _ENDS:
                    self._verdicts.add((cluster, endpoint, _ENDS[word]))
                else:
                    self._verdicts.discard((cluster, endpoint, word))
        elif isinstance(message, Begin):
            self._staged = {}
            self._named = set() if message.replaces_all else None
        elif isinstance(message, Commit) and self._named is not None:
            unnamed = self._known - self._named
            self._named = None
            self._known -= unnamed
            for kind, name in sorted(unnamed):
                if kind == "listener":
                    self._listeners.pop(name, None)
                self._on_message(Remove(kind, name), None)
            self._forget_verdicts()
        if isinstance(message, Commit):
            self._listeners.update(self._staged)
            self._staged = {}
        self._on_message(message, None)

    def _forget_verdicts(self) -> None:
        """A new control process starts without verdicts and would never take back those of the one before."""
        ends, self._verdicts = tuple(sorted(self._verdicts)), set()
        if ends:
            self._on_message(Health(ends), None)

    def _name(self, kind: str, name: str) -> None:
        self._known.add((kind, name))
        if self._named is not None:
            self._named.add((kind, name))

    def _writable(self) -> None:
        assert self._stream is not None
        while self._out:
            frame = self._out[0]
            try:
                sent = self._stream.send(frame)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._out.clear()  # the reader sees the end of the stream and acts on it
                self._out_bytes = 0
                break
            self._out_bytes -= sent
            if sent < len(frame):
                self._out[0] = frame[sent:]
                return
            self._out.popleft()
        self._loop.remove_writer(self._stream.fileno())

    def _end(self) -> None:
        if not self._closed:
            self.close()
            self._on_closed()


Item = tuple[object, socket.socket | None]
"""A message and the socket whose descriptor rides along (None: none)."""


class ControlChannel:
    """The control process's end, one per worker. Sends in order; a long update is encoded as the socket takes it."""

    __slots__ = ("_closed", "_decoder", "_frame", "_loop", "_on_closed", "_on_message", "_queue", "_sock", "_writing")

    def __init__(
        self,
        sock: socket.socket,
        loop: AbstractEventLoop,
        on_message: Callable[[object], None],
        on_closed: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._on_message = on_message
        self._on_closed = on_closed
        self._decoder = Decoder()
        self._queue: deque[Iterator[Item]] = deque()
        self._frame = memoryview(b"")
        self._writing = False
        self._closed = False
        loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: object, descriptor: socket.socket | None = None) -> None:
        """Queue one message, after all queued before it."""
        self.send_all([(message, descriptor)])

    def send_all(self, items: Iterable[Item]) -> None:
        """Queue many; the iterable is read as the worker takes them, so it must not depend on what changes later.

        A message whose socket was closed before its turn is left out: a later update removes what it would have put.
        """
        if self._closed:
            return
        self._queue.append(iter(items))
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        self._queue.clear()
        self._sock.close()

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._on_closed()
            return
        self._decoder.feed(data)
        while not self._closed and (message := self._decoder.next()) is not NOTHING:
            self._on_message(message)

    def _writable(self) -> None:
        # A slice of time here too: the control loop also answers scrapes while it feeds a worker.
        deadline = perf_counter() + 2 * SLICE_S
        try:
            while perf_counter() < deadline:
                if self._frame:
                    self._frame = self._frame[self._sock.send(self._frame) :]
                elif not self._next_frame():
                    self._writing = False
                    self._loop.remove_writer(self._sock.fileno())
                    return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            self._on_closed()

    def _next_frame(self) -> bool:
        """Fill `_frame` from the queue; False when there is no more to send."""
        parts: list[bytes] = []
        size = 0
        while self._queue and size < _READ_BYTES:
            item = next(self._queue[0], None)
            if item is None:
                self._queue.popleft()
                continue
            message, descriptor = item
            if descriptor is not None:
                if descriptor.fileno() < 0:
                    continue
                # The descriptor belongs to the first byte of its own frame, so what came before goes out first and
                # the descriptor waits in front of the queue.
                if parts:
                    self._queue.appendleft(iter([item]))
                    break
                frame = encode(message)
                try:
                    sent = socket.send_fds(self._sock, [frame], [descriptor.fileno()])
                except (BlockingIOError, InterruptedError):
                    self._queue.appendleft(iter([item]))
                    raise
                self._frame = memoryview(frame)[sent:]
                return True
            parts.append(encode(message))
            size += len(parts[-1])
        self._frame = memoryview(b"".join(parts))
        return bool(parts)
