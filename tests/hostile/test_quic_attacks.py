"""Datagrams that no honest client sends, or not that many of, against a QUIC listener on a real socket."""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aioquic.buffer import Buffer
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicPacketType, pull_quic_header

from meshproxy.listener import quic
from meshproxy.model.listener import ServerTls, ServerTlsMode
from tests.support.certificates import Authority
from tests.support.http3_client import Http3Client, Listening, client_configuration, get
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin

AUTHORITY = Authority()


class Target:
    def __init__(self, worker: LiveWorker, origin: Origin, directory: Path) -> None:
        # A chain of five makes the server's first flight as long as they come.
        authority = AUTHORITY
        for depth in range(4):
            authority = Authority(f"Intermediate {depth} " + "x" * 60, key_type="rsa", issuer=authority)
        authority.leaf(dns_names=["a.example"]).write(directory)
        tls = ServerTls(
            mode=ServerTlsMode.SIMPLE,
            certificate_file=str(directory / "cert-chain.pem"),
            key_file=str(directory / "key.pem"),
        )
        self.origin = origin
        self.port = worker.listen_quic(worker.cluster([("127.0.0.1", origin.port)]), tls=tls)
        self.listener: Any = next(iter(worker.worker.listeners.values()))
        self.runtime = self.listener.runtime

    async def still_serves(self) -> None:
        async with Http3Client.to(self.port, AUTHORITY.pem) as client:
            assert (await client.request(get("/"))).body == b"ok"


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    async with LiveWorker() as worker, Origin() as origin:
        yield Target(worker, origin, tmp_path)


class Raw:
    """A UDP socket, and what came back on it."""

    def __init__(self, target: Target) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.connect(("127.0.0.1", target.port))

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def receive(self, timeout_s: float = 2.0) -> bytes:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 65536), timeout_s)

    async def all(self, quiet_s: float) -> list[bytes]:
        """Until nothing has come for a while."""
        received = []
        with contextlib.suppress(TimeoutError):
            while True:
                received.append(await self.receive(quiet_s))
        return received


def client_hello() -> list[bytes]:
    """The first flight of an honest client."""
    connection = QuicConnection(configuration=client_configuration(AUTHORITY.pem))
    connection.connect(("127.0.0.1", 1), now=0.0)
    return [data for data, _ in connection.datagrams_to_send(now=0.0)]


def header(data: bytes) -> Any:
    return pull_quic_header(Buffer(data=data), host_cid_length=8)


# ── before an address is known to be its own ──


async def test_whoever_says_no_more_gets_three_times_what_it_sent(target: Target) -> None:
    with Raw(target) as raw:
        first = client_hello()
        for data in first:
            raw.sock.send(data)
        received = await raw.all(1.5)  # retransmissions count, too
        assert received
        assert sum(map(len, received)) <= 3 * sum(map(len, first))
    await target.still_serves()


async def test_a_first_packet_that_is_too_short_gets_nothing(target: Target) -> None:
    with Raw(target) as raw:
        raw.sock.send(client_hello()[0][:1199])
        raw.sock.send(b"\xc0\xba\xba\xba\xba" + bytes(1100))  # no more for a version that is unknown
        assert await raw.all(0.3) == []
    assert not target.runtime.connections


async def test_an_unknown_version_is_told_the_known_ones_and_a_list_of_versions_is_not_answered(target: Target) -> None:
    with Raw(target) as raw:
        unknown = b"\xc0\xba\xba\xba\xba\x08" + b"d" * 8 + b"\x08" + b"s" * 8 + bytes(1200)
        raw.sock.send(unknown)
        answer = await raw.receive()
        told = header(answer)
        assert told.packet_type is QuicPacketType.VERSION_NEGOTIATION
        assert (told.destination_cid, told.source_cid) == (b"s" * 8, b"d" * 8)
        assert len(answer) < len(unknown)
        raw.sock.send(answer + bytes(1200))
        assert await raw.all(0.3) == []
    assert not target.runtime.connections


async def test_a_first_packet_that_cannot_be_read_leaves_nothing_behind(target: Target) -> None:
    with Raw(target) as raw:
        data = client_hello()[0]
        for at in range(60, 124):
            raw.sock.send(data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :])
        assert await raw.all(0.3) == []
    assert not target.runtime.connections
    assert not target.listener._by_id
    assert not target.listener._timers
    await target.still_serves()


async def test_garbage_makes_no_state_and_no_traceback(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(7)
    base = client_hello()
    with Raw(target) as raw:
        for number in range(4000):
            if number % 2:
                data = draw.randbytes(draw.randint(1, 1400))
            else:
                mutated = bytearray(draw.choice(base))
                for _ in range(draw.randint(1, 8)):
                    mutated[draw.randrange(len(mutated))] = draw.randrange(256)
                data = bytes(mutated)
            with contextlib.suppress(BlockingIOError):
                raw.sock.send(data)
            if number % 50 == 0:
                await asyncio.sleep(0)
        await raw.all(0.3)
    assert not [record for record in caplog.records if record.exc_info]
    assert len(target.runtime.connections) < 20  # those whose change hit nothing that counts
    await target.still_serves()


# ── floods of handshakes ──


async def test_with_a_hundred_handshakes_pending_a_client_must_show_its_address(target: Target) -> None:
    with Raw(target) as raw:
        for number in range(quic.RETRY_AFTER):
            raw.sock.send(client_hello()[0])
            await until(lambda number=number: len(target.runtime.connections) > number)
            with contextlib.suppress(BlockingIOError):
                while raw.sock.recv(2048):
                    pass
        assert len(target.listener._handshaking) == quic.RETRY_AFTER
    with Raw(target) as raw:
        for _ in range(20):
            raw.sock.send(client_hello()[0])
            answer = await raw.receive()
            assert header(answer).packet_type is QuicPacketType.RETRY
            assert len(answer) < 300
        assert len(target.runtime.connections) == quic.RETRY_AFTER
    # An honest client does what Retry asks for, and is served.
    async with Http3Client.to(target.port, AUTHORITY.pem) as client:
        assert (await client.request(get("/"))).body == b"ok"
        assert client._quic._retry_count == 1


async def test_a_token_of_another_address_or_of_nobody_is_refused(target: Target) -> None:
    target.listener._handshaking.update(object() for _ in range(quic.RETRY_AFTER))
    connection = QuicConnection(configuration=client_configuration(AUTHORITY.pem))
    connection.connect(("127.0.0.1", 1), now=0.0)
    with Raw(target) as first, Raw(target) as other:
        for data, _ in connection.datagrams_to_send(now=0.0):
            first.sock.send(data)
        connection.receive_datagram(await first.receive(), ("127.0.0.1", 1), now=0.1)
        second_flight = [data for data, _ in connection.datagrams_to_send(now=0.1)]
        assert header(second_flight[0]).token
        for data in second_flight:
            other.sock.send(data)
        refusal = await other.receive()
        assert header(refusal).packet_type is QuicPacketType.INITIAL
        assert len(refusal) < 1200
        assert not target.runtime.connections
        first.sock.send(second_flight[0])  # and from its own it is taken
        await until(lambda: len(target.runtime.connections) == 1)
    target.listener._handshaking.clear()


async def test_handshakes_that_do_not_end_are_forgotten(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.downstream_h3.HANDSHAKE_TIMEOUT_S", 0.2)
    with Raw(target) as raw:
        for data in client_hello():
            raw.sock.send(data)
        await until(lambda: len(target.runtime.connections) == 1)
        await until(lambda: not target.runtime.connections)
    assert not target.listener._by_id
    assert not target.listener._handshaking
    assert target.runtime.counters.ssl_connection_error == 1


# ── without a connection ──


async def test_after_a_restart_a_client_learns_at_once_that_its_connection_is_gone(target: Target) -> None:
    async with Listening.to(target.port, AUTHORITY.pem) as client:
        assert (await client.request(get("/"))).body == b"ok"
        # As a new process would: nothing is known of the connection, but the key is the same.
        for connection in list(target.runtime.connections):
            connection.over()
        target.listener._context = target.listener._made_from = None
        client.send(get("/"))
        token = client._quic._peer_cid.stateless_reset_token
        assert len(token) == 16
        await until(lambda: client.received[-1][-16:] == token)


async def test_resets_are_shorter_than_what_asks_for_them_and_not_sent_for_ids_of_others(target: Target) -> None:
    with Raw(target) as raw:
        ours = b"\x40\x00" + b"x" * 60
        raw.sock.send(ours)
        assert len(await raw.receive()) == 42
        raw.sock.send(ours[:30])
        assert len(await raw.receive()) == 29
        raw.sock.send(ours[:21])
        raw.sock.send(b"\x40\x09" + b"x" * 60)  # another worker's
        assert await raw.all(0.3) == []
        for _ in range(300):
            raw.sock.send(ours)
        assert len(await raw.all(0.3)) <= 2 * quic.RESETS_PER_SECOND
