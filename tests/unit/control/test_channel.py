import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.control.channel import NOTHING, ControlChannel, Decoder, WorkerChannel, encode
from meshproxy.control.messages import Begin, Commit, Health, Hello, PutEndpoints, PutListener, PutWorkload, Remove
from meshproxy.errors import LocalProtocolError
from meshproxy.model.cluster import Protocol
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints
from meshproxy.model.listener import Direction, Listener
from meshproxy.model.workload import Workload


def listener(name: str) -> Listener:
    return Listener(
        name=name,
        address="127.0.0.1",
        port=0,
        direction=Direction.OUTBOUND,
        workload_id="default/app",
        protocol=Protocol.TCP,
    )


def workload(name: str) -> Workload:
    return Workload(id=f"default/{name}", name=name, namespace="default")


@given(
    messages=st.lists(st.one_of(st.none(), st.binary(max_size=200), st.text(max_size=50)), max_size=8),
    cuts=st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=30),
)
def test_any_split_of_the_same_bytes_gives_the_same_messages(messages: list[Any], cuts: list[int]) -> None:
    data = b"".join(encode(message) for message in messages)
    decoder = Decoder()
    decoded = []
    at = 0
    while at < len(data):
        cut = cuts[len(decoded) % len(cuts)] if cuts else 1
        decoder.feed(data[at : at + cut])
        at += cut
        while (message := decoder.next()) is not NOTHING:
            decoded.append(message)
    assert decoded == messages


def test_a_stream_that_lost_its_place_is_a_bug_that_says_so() -> None:
    decoder = Decoder()
    decoder.feed(b"\xff\xff\xff\xffxxxx")
    with pytest.raises(LocalProtocolError):
        decoder.next()


class Receiver:
    """A worker's end that keeps what it gets; `until(n)` waits for n messages."""

    def __init__(self, sock: socket.socket) -> None:
        self.messages: list[object] = []
        self.descriptors: list[int] = []
        self.closed = asyncio.Event()
        self._more = asyncio.Event()
        self.channel = WorkerChannel(sock, asyncio.get_running_loop(), self.on_message, self.closed.set)

    def on_message(self, message: object, descriptor: int | None) -> None:
        self.messages.append(message)
        if descriptor is not None:
            self.descriptors.append(descriptor)
        self._more.set()

    async def until(self, count: int) -> list[object]:
        async with asyncio.timeout(5):
            while len(self.messages) < count:
                self._more.clear()
                await self._more.wait()
        return self.messages


class Sender:
    def __init__(self, sock: socket.socket) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.channel = ControlChannel(sock, asyncio.get_running_loop(), self.messages.put_nowait, self.closed.set)


@contextlib.contextmanager
def stream() -> Iterator[tuple[Receiver, Sender]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiver, sender = Receiver(a), Sender(b)
    yield receiver, sender
    receiver.channel.close()
    sender.channel.close()


async def test_descriptors_reach_the_message_they_were_sent_with() -> None:
    with stream() as (receiver, sender):
        pairs = [socket.socketpair() for _ in range(20)]
        items: list[tuple[object, socket.socket | None]] = []
        for index, (theirs, _) in enumerate(pairs):
            items.extend(((Begin(str(index)), None), (PutListener(listener(str(index))), theirs)))
        sender.channel.send_all(items)
        await receiver.until(40)
        listeners = [message for message in receiver.messages if isinstance(message, PutListener)]
        assert [message.listener.name for message in listeners] == [str(index) for index in range(20)]
        for index, ((theirs, ours), descriptor) in enumerate(zip(pairs, receiver.descriptors, strict=True)):
            ours.send(bytes([index]))
            assert os.read(descriptor, 1) == bytes([index])
            os.close(descriptor)
            theirs.close()
            ours.close()


async def test_a_listener_whose_socket_is_closed_meanwhile_is_left_out() -> None:
    with stream() as (receiver, sender):
        sock = socket.socket()
        sock.close()
        sender.channel.send(Begin("1"))
        sender.channel.send(PutListener(listener("a")), sock)
        sender.channel.send(Commit("1"))
        assert await receiver.until(2) == [Begin("1"), Commit("1")]


async def test_a_large_update_never_holds_the_loop_for_long() -> None:
    endpoints = tuple(Endpoint(address=f"10.0.{n // 256}.{n % 256}", port=80) for n in range(256))
    pieces = [PutEndpoints(str(n), (LocalityEndpoints(endpoints=endpoints),)) for n in range(60)]
    with stream() as (receiver, sender):
        loop = asyncio.get_running_loop()
        between: list[int] = []

        def tick() -> None:
            between.append(len(receiver.messages))
            if len(receiver.messages) < 60:
                loop.call_soon(tick)

        tick()
        sender.channel.send_all((piece, None) for piece in pieces)
        await receiver.until(60)
        # Three pieces take longer than a slice here and on any slower machine; a slice never takes them all.
        assert max(later - earlier for earlier, later in itertools.pairwise(between)) < 30


async def test_a_worker_greets_and_reports() -> None:
    with stream() as (receiver, sender):
        receiver.channel.send("report")
        async with asyncio.timeout(5):
            assert await sender.messages.get() == Hello(os.getpid())
            assert await sender.messages.get() == "report"


async def test_reports_are_dropped_while_the_control_process_does_not_read() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiver = Receiver(a)
    for _ in range(100):
        receiver.channel.send(b"x" * 65536)
    assert receiver.channel.dropped > 50
    sender = Sender(b)  # now it reads: what was queued arrives whole
    async with asyncio.timeout(5):
        assert await sender.messages.get() == Hello(os.getpid())
        for _ in range(100 - receiver.channel.dropped):
            assert await sender.messages.get() == b"x" * 65536
    receiver.channel.close()
    sender.channel.close()


async def test_the_end_of_a_plain_stream_is_the_end() -> None:
    with stream() as (receiver, sender):
        sender.channel.close()
        async with asyncio.timeout(5):
            await receiver.closed.wait()


@contextlib.contextmanager
def link() -> Iterator[tuple[Receiver, socket.socket]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver = Receiver(a)
    yield receiver, b
    receiver.channel.close()
    b.close()


def connect(supervisor: socket.socket) -> Sender:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    socket.send_fds(supervisor, [b"s"], [a.fileno()])
    a.close()
    return Sender(b)


async def test_a_new_control_process_removes_what_it_does_not_name() -> None:
    with link() as (receiver, supervisor):
        first = connect(supervisor)
        for message in (Begin("1"), PutWorkload(workload("old")), PutWorkload(workload("kept")), Commit("1")):
            first.channel.send(message)
        await receiver.until(4)
        first.channel.send(Begin("2"))
        first.channel.send(PutWorkload(workload("half")))
        await receiver.until(6)
        first.channel.close()
        assert not receiver.closed.is_set()

        second = connect(supervisor)
        second.channel.send(Begin("3", replaces_all=True))
        second.channel.send(PutWorkload(workload("kept")))
        second.channel.send(Commit("3"))
        messages = await receiver.until(11)
        assert messages[6:] == [
            Begin("3", replaces_all=True),
            PutWorkload(workload("kept")),
            Remove("workload", "default/half"),
            Remove("workload", "default/old"),
            Commit("3"),
        ]
        second.channel.close()


async def test_half_a_message_of_a_dead_control_process_is_forgotten() -> None:
    with link() as (receiver, supervisor):
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        socket.send_fds(supervisor, [b"s"], [a.fileno()])
        a.close()
        b.send(encode(Begin("1"))[:7])
        b.close()
        second = connect(supervisor)
        second.channel.send(Commit("2"))
        assert await receiver.until(1) == [Commit("2")]
        second.channel.close()


async def test_the_end_of_the_link_is_the_end() -> None:
    with link() as (receiver, supervisor):
        sender = connect(supervisor)
        supervisor.close()
        async with asyncio.timeout(5):
            await receiver.closed.wait()
        sender.channel.close()


async def test_verdicts_end_with_the_control_process_that_gave_them() -> None:
    with link() as (receiver, supervisor):
        first = connect(supervisor)
        first.channel.send(Health((("a", "10.0.0.1:80", "eject"), ("a", "10.0.0.2:80", "suspect"))))
        first.channel.send(Health((("a", "10.0.0.3:80", "unhealthy"), ("a", "10.0.0.2:80", "clear"))))
        await receiver.until(2)
        first.channel.close()
        second = connect(supervisor)
        second.channel.send(Begin("1", replaces_all=True))
        second.channel.send(Commit("1"))
        messages = await receiver.until(5)
        assert messages[3] == Health((("a", "10.0.0.1:80", "restore"), ("a", "10.0.0.3:80", "healthy")))
        assert messages[4] == Commit("1")
        second.channel.close()


async def test_a_listener_the_worker_has_is_not_opened_again_by_a_new_control_process() -> None:
    with link() as (receiver, supervisor), socket.socket() as sock:
        first = connect(supervisor)
        first.channel.send(Begin("1"))
        first.channel.send(PutListener(listener("committed")), sock)
        first.channel.send(Commit("1"))
        first.channel.send(Begin("2"))
        first.channel.send(PutListener(listener("half")), sock)
        await receiver.until(5)
        first.channel.close()
        second = connect(supervisor)
        second.channel.send(Begin("3", replaces_all=True))
        for name in ("committed", "half"):
            second.channel.send(PutListener(listener(name)), sock)
        second.channel.send(Commit("3"))
        messages = await receiver.until(8)
        assert messages[6:] == [PutListener(listener("half")), Commit("3")]
        assert len(receiver.descriptors) == 3
        for descriptor in receiver.descriptors:
            os.close(descriptor)
        second.channel.close()
