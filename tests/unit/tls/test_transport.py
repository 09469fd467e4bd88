"""TlsTransport over real sockets on loopback, with uvloop as in the workers."""

import asyncio
import gc
import os
import socket
import ssl
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.tls.context import client_context, server_context
from meshproxy.tls.transport import HandshakeError, SessionSlot, TlsTransport, accept_tls, connect_tls
from tests.support.certificates import Authority, Leaf
from tests.support.handshakes import client_hello

AUTHORITY = Authority()
SERVER = AUTHORITY.leaf("default", "edge")
CLIENT = AUTHORITY.leaf("default", "rsu")
SERVER_CONTEXT = server_context(SERVER.bundle(), alpn=("istio",))
CLIENT_CONTEXT = client_context(CLIENT.bundle(), alpn=("istio",))
PATIENCE_S = 10.0


class App(asyncio.Protocol):
    """Keeps what it is told and lets a test wait for it."""

    def __init__(self, keeps_open: bool = False) -> None:
        self.transport: Any = None
        self.data = bytearray()
        self.calls: list[str] = []
        self.lost: Exception | None = None
        self.keeps_open = keeps_open
        self._changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._call("made")

    def data_received(self, data: bytes) -> None:
        assert isinstance(data, bytes)
        self.data += data
        self._changed.set()

    def eof_received(self) -> bool:
        self._call("eof")
        return self.keeps_open

    def pause_writing(self) -> None:
        self._call("pause")

    def resume_writing(self) -> None:
        self._call("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = exc
        self._call("lost")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_data(self, wanted: bytes) -> None:
        await self.until(lambda: len(self.data) >= len(wanted))
        assert self.data == wanted

    async def until_call(self, name: str) -> None:
        await self.until(lambda: name in self.calls)


class Served:
    """What a test server saw: its apps, and why handshakes failed."""

    def __init__(self) -> None:
        self.port = 0
        self.apps: list[App] = []
        self.errors: list[BaseException] = []
        self.accepted = asyncio.Event()

    async def app(self) -> App:
        async with asyncio.timeout(PATIENCE_S):
            await self.accepted.wait()
        self.accepted.clear()
        return self.apps[-1]

    async def error(self) -> HandshakeError:
        async with asyncio.timeout(PATIENCE_S):
            await self.accepted.wait()
        self.accepted.clear()
        error = self.errors[-1]
        assert isinstance(error, HandshakeError)
        return error


@asynccontextmanager
async def serving(
    context: ssl.SSLContext | Callable[[], ssl.SSLContext] = SERVER_CONTEXT,
    *,
    keeps_open: bool = False,
    **keywords: Any,
) -> AsyncIterator[Served]:
    served = Served()
    loop = asyncio.get_running_loop()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    served.port = listening.getsockname()[1]
    tasks: set[asyncio.Task[None]] = set()

    async def serve(connection: socket.socket) -> None:
        try:
            now = context() if callable(context) else context
            _, app = await accept_tls(lambda: App(keeps_open), connection, now, **keywords)
        except (OSError, HandshakeError) as error:
            served.errors.append(error)
        else:
            assert isinstance(app, App)
            served.apps.append(app)
        served.accepted.set()

    async def accept() -> None:
        while True:
            connection, _ = await loop.sock_accept(listening)
            tasks.add(asyncio.create_task(serve(connection)))

    accepting = asyncio.create_task(accept())
    try:
        yield served
    finally:
        accepting.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(accepting, *tasks, return_exceptions=True)
        listening.close()
        for app in served.apps:
            if "lost" not in app.calls:
                app.transport.abort()
                await app.until_call("lost")


async def connect(served: Served, context: ssl.SSLContext = CLIENT_CONTEXT, **keywords: Any) -> App:
    keeps_open = keywords.pop("keeps_open", False)
    _, app = await connect_tls(lambda: App(keeps_open), "127.0.0.1", served.port, context, **keywords)
    assert isinstance(app, App)
    return app


def why_not(leaf: Leaf) -> Callable[[ssl.SSLObject], str | None]:
    return lambda ssl_object: None if ssl_object.getpeercert(True) == leaf.der else "another peer"


async def test_bytes_arrive_both_ways_and_each_knows_the_other() -> None:
    async with serving(verify=why_not(CLIENT)) as served:
        client = await connect(served, verify=why_not(SERVER), server_name="edge.example")
        server = await served.app()
        client.transport.write(b"request")
        await server.until_data(b"request")
        server.transport.writelines([b"re", b"spon", bytearray(b"se")])
        await client.until_data(b"response")
        info = server.transport.get_extra_info
        assert info("ssl_object").selected_alpn_protocol() == "istio"
        assert info("peercert")["subjectAltName"] == (("URI", "spiffe://cluster.local/ns/default/sa/rsu"),)
        assert info("cipher")[1] == "TLSv1.3"
        assert info("peername")[1] == client.transport.get_extra_info("sockname")[1]
        assert info("nothing", "default") == "default"
        client.transport.close()
        await server.until_call("lost")
        assert (server.calls, server.lost) == (["made", "eof", "lost"], None)
        await client.until_call("lost")
        assert client.calls == ["made", "lost"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_bulk_arrives_whole_both_ways_at_once(version: ssl.TLSVersion) -> None:
    context = client_context(CLIENT.bundle(), alpn=())
    context.maximum_version = version
    up, down = os.urandom(3_000_001), os.urandom(2_500_003)
    async with serving() as served:
        client = await connect(served, context)
        server = await served.app()
        client.transport.write(up)
        server.transport.write(memoryview(down))
        await asyncio.gather(server.until_data(up), client.until_data(down))


async def test_a_reader_that_pauses_pauses_the_writer_and_loses_nothing() -> None:
    chunk = os.urandom(64 * 1024)
    async with serving() as served:
        client = await connect(served)
        server = await served.app()
        server.transport.pause_reading()
        client.transport.set_write_buffer_limits(128 * 1024, 32 * 1024)
        sent = 0
        async with asyncio.timeout(PATIENCE_S):
            while "pause" not in client.calls:
                client.transport.write(chunk)
                sent += 1
                await asyncio.sleep(0)
        assert client.transport.get_write_buffer_size() > 128 * 1024
        server.transport.resume_reading()
        await client.until_call("resume")
        await server.until(lambda: len(server.data) == sent * len(chunk))
        assert server.data == chunk * sent


async def test_each_half_ends_by_itself() -> None:
    async with serving(keeps_open=True) as served:
        client = await connect(served, keeps_open=True)
        server = await served.app()
        assert client.transport.can_write_eof()
        client.transport.write(b"all I have")
        client.transport.write_eof()
        client.transport.write(b"dropped")
        await server.until_call("eof")
        assert server.data == b"all I have"
        server.transport.write(b"x" * 100_000)
        await client.until_data(b"x" * 100_000)
        server.transport.write_eof()
        await client.until_call("eof")
        assert "lost" not in client.calls
        client.transport.close()
        await server.until_call("lost")
        assert server.lost is None


async def test_our_half_may_end_while_bytes_of_the_peer_are_on_their_way() -> None:
    """OpenSSL takes data that lies there when we say close_notify for an error; it must have been read before."""
    async with serving(keeps_open=True) as served:
        client = await connect(served, keeps_open=True)
        server = await served.app()
        for _ in range(50):
            server.transport.write(b"y" * 20_000)
        client.transport.write_eof()
        await client.until_data(b"y" * 1_000_000)


class SaysGoodbye(App):
    """Ends its half as soon as it is connected."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write_eof()


async def test_a_half_that_ends_at_once_leaves_what_came_with_the_handshake() -> None:
    """A TLS 1.3 client's first bytes may lie in the same segment as its last flight."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    app = SaysGoodbye(keeps_open=True)
    tls = TlsTransport(SERVER_CONTEXT, app, is_server=True)
    await loop.connect_accepted_socket(lambda: tls, ours)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = CLIENT_CONTEXT.wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    await loop.sock_sendall(theirs, outgoing.read())
    async with asyncio.timeout(PATIENCE_S):
        while True:
            incoming.write(await loop.sock_recv(theirs, 65536))
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
    client.write(b"first bytes")
    await loop.sock_sendall(theirs, outgoing.read())
    await app.until_data(b"first bytes")
    client.write(b", and more")
    await loop.sock_sendall(theirs, outgoing.read())
    await app.until_data(b"first bytes, and more")
    tls.abort()
    await app.until_call("lost")
    theirs.close()


async def test_a_stream_that_is_cut_is_not_an_end() -> None:
    async with serving() as served:
        client = await connect(served)
        server = await served.app()
        client.transport.write(b"half a mess")
        await server.until_data(b"half a mess")
        client.transport._lower.write_eof()
        await server.until_call("lost")
        assert "eof" not in server.calls
        assert isinstance(server.lost, ConnectionResetError)


async def test_a_damaged_record_ends_the_connection_with_a_word() -> None:
    async with serving() as served:
        client = await connect(served)
        server = await served.app()
        client.transport._lower.write(b"\x17\x03\x03\x00\x20" + b"\x00" * 32)
        await server.until_call("lost")
        assert isinstance(server.lost, ConnectionAbortedError)
        assert str(server.lost) == "tls.decryption_failed_or_bad_record_mac"
        assert not server.data
        await client.until_call("lost")


async def test_abort_is_at_once() -> None:
    async with serving() as served:
        client = await connect(served)
        server = await served.app()
        client.transport.abort()
        assert client.transport.is_closing()
        client.transport.write(b"dropped")
        await client.until_call("lost")
        await server.until_call("lost")


async def test_close_sends_what_was_written() -> None:
    data = os.urandom(2_000_000)
    async with serving() as served:
        client = await connect(served)
        server = await served.app()
        client.transport.write(data)
        client.transport.close()
        client.transport.close()
        await server.until_call("lost")
        assert server.data == data
        assert server.lost is None


async def test_another_protocol_may_take_over() -> None:
    async with serving() as served:
        client = await connect(served)
        server = await served.app()
        successor = App()
        server.transport.set_protocol(successor)
        successor.connection_made(server.transport)
        assert server.transport.get_protocol() is successor
        client.transport.write(b"for the successor")
        await successor.until_data(b"for the successor")
        assert not server.data
        client.transport.close()
        await successor.until_call("lost")
        server.calls.append("lost")


async def test_first_bytes_that_were_read_already_are_handed_over() -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    first = App()
    transport, _ = await loop.connect_accepted_socket(lambda: first, ours)
    connecting = asyncio.create_task(_connect_over(theirs))
    await first.until(lambda: len(first.data) > 100)
    app = App()
    tls = TlsTransport(SERVER_CONTEXT, app, is_server=True)
    transport.set_protocol(tls)
    tls.connection_made(transport)
    tls.data_received(bytes(first.data))
    client = await connecting
    client.transport.write(b"hello")
    await app.until_data(b"hello")
    client.transport.close()
    await app.until_call("lost")


async def _connect_over(sock: socket.socket) -> App:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    app = App()
    tls = TlsTransport(CLIENT_CONTEXT, app, is_server=False, on_done=lambda error: done.set_result(None))
    await asyncio.get_running_loop().connect_accepted_socket(lambda: tls, sock)
    await done
    return app


@pytest.mark.parametrize(
    ("keeps", "asked", "told"), [(True, "Edge.example", "edge.example"), (True, None, None), (False, "a.example", None)]
)
async def test_the_server_name_asked_for_is_told_to_who_wants_to_know(
    keeps: bool, asked: str | None, told: str | None
) -> None:
    async with serving(keeps_server_name=keeps) as served:
        await connect(served, server_name=asked)
        assert (await served.app()).transport.get_extra_info("requested_server_name") == told


# ── handshakes that fail ──


async def test_a_peer_that_is_refused_never_reaches_the_app() -> None:
    made: list[App] = []
    async with serving(verify=lambda ssl_object: "not of this trust domain") as served:
        client = await connect(served)
        error = await served.error()
        assert error.detail == "tls.peer_identity_refused"
        assert str(error) == "not of this trust domain"
        await client.until_call("lost")
        assert not served.apps
    async with serving() as served:
        with pytest.raises(HandshakeError, match="does not run this service"):
            await connect_tls(
                lambda: made.append(App()) or made[-1],  # type: ignore[func-returns-value]
                "127.0.0.1",
                served.port,
                CLIENT_CONTEXT,
                verify=lambda ssl_object: "the server does not run this service",
            )
        assert made[0].calls == []


@pytest.mark.parametrize(
    ("leaf", "detail", "why"),
    [
        (AUTHORITY.leaf(expires_s=-60), "tls.certificate_verify_failed", "certificate has expired"),
        (Authority("Other").leaf(), "tls.certificate_verify_failed", "unable to get local issuer certificate"),
    ],
)
async def test_certificates_that_do_not_verify_are_told_by_word_and_sentence(leaf: Leaf, detail: str, why: str) -> None:
    async with serving() as served:
        client = await connect(served, client_context(leaf.bundle(AUTHORITY.pem), alpn=()))
        error = await served.error()
        assert error.detail == detail
        assert why in str(error)
        # TLS 1.3: the client learns of it only when it reads.
        await client.until_call("lost")
        assert str(client.lost).startswith("tls.")
    async with serving(server_context(leaf.bundle(AUTHORITY.pem), alpn=())) as served:
        with pytest.raises(HandshakeError, match=why):
            await connect(served)
        assert (await served.error()).detail.startswith("tls.")


async def test_a_certificate_with_names_that_are_no_text_is_refused() -> None:
    name = b"spiffe://\xff"
    leaf = AUTHORITY.leaf(uris=(), raw_alt_names=b"\x30" + bytes([len(name) + 2]) + b"\x86" + bytes([len(name)]) + name)
    async with serving() as served:
        client = await connect(served, client_context(leaf.bundle(), alpn=()))
        assert (await served.error()).detail == "tls.unreadable_certificate"
        await client.until_call("lost")


@pytest.mark.parametrize("name", [".leading.dot", "a\x00b", "x" * 300])
async def test_a_server_name_that_cannot_be_one_is_told(name: str) -> None:
    async with serving() as served:
        with pytest.raises(HandshakeError, match="cannot be a TLS server name"):
            await connect(served, server_name=name)


async def test_plaintext_is_reset_without_an_answer() -> None:
    loop = asyncio.get_running_loop()
    async with serving() as served:
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", served.port))
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: edge\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(loop.sock_recv(client, 100), PATIENCE_S)
        assert (await served.error()).detail == "tls.http_request"


async def test_a_client_that_goes_away_during_the_handshake_is_told() -> None:
    loop = asyncio.get_running_loop()
    async with serving() as served:
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", served.port))
            await loop.sock_sendall(client, client_hello(CLIENT_CONTEXT)[:50])
        assert (await served.error()).detail == "tls.connection_closed"


async def test_a_slow_handshake_is_cut() -> None:
    loop = asyncio.get_running_loop()
    async with serving(handshake_timeout_s=0.05) as served:
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", served.port))
            await loop.sock_sendall(client, b"\x16\x03\x01")
            error = await served.error()
            assert error.detail == "tls.handshake_timeout"
            assert not await asyncio.wait_for(loop.sock_recv(client, 100), PATIENCE_S)


async def test_a_handshake_that_is_too_large_is_cut_before_it_is_verified() -> None:
    authority = AUTHORITY
    for number in range(100):
        authority = Authority(f"Intermediate {number}", issuer=authority)
    leaf = authority.leaf()
    assert len(leaf.chain_pem) > 40_000
    async with serving() as served:
        client = await connect(served, client_context(leaf.bundle(), alpn=()))
        assert (await served.error()).detail == "tls.handshake_too_large"
        await client.until_call("lost")


async def test_connecting_to_nobody_and_giving_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(HandshakeError) as caught:
            await connect_tls(App, "127.0.0.1", port, CLIENT_CONTEXT, handshake_timeout_s=0.05)
        assert caught.value.detail == "tls.handshake_timeout"
        connecting = asyncio.create_task(connect_tls(App, "127.0.0.1", port, CLIENT_CONTEXT))
        done, _ = await asyncio.wait({connecting}, timeout=0.05)
        assert not done
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
    with pytest.raises(ConnectionRefusedError):
        await connect_tls(App, "127.0.0.1", port, CLIENT_CONTEXT)


# ── sessions and rotation ──


async def test_a_slot_lets_the_next_connection_resume_until_the_context_changes() -> None:
    slot = SessionSlot()
    reused = []
    async with serving() as served:
        for context in (CLIENT_CONTEXT, CLIENT_CONTEXT, client_context(CLIENT.bundle(), alpn=())):
            client = await connect(served, context, slot=slot)
            server = await served.app()
            server.transport.write(b"!")
            await client.until_data(b"!")
            reused.append(client.transport.get_extra_info("ssl_object").session_reused)
            assert server.transport.get_extra_info("peercert")["subjectAltName"][0][1].endswith("/sa/rsu")
            client.transport.close()
            await server.until_call("lost")
            await client.until_call("lost")
    assert reused == [False, True, False]


async def test_a_slot_that_holds_a_session_takes_no_other_for_half_an_hour() -> None:
    slot = SessionSlot()  # each look costs 6 KiB for good (CPython): one a connection would be a leak
    kept = []
    async with serving() as served:
        for _ in range(4):
            client = await connect(served, slot=slot)
            server = await served.app()
            server.transport.write(b"!")
            await client.until_data(b"!")
            client.transport.close()
            await server.until_call("lost")
            await client.until_call("lost")
            kept.append(slot.session_for(CLIENT_CONTEXT))
    assert kept[0] is not None
    assert all(session is kept[0] for session in kept)


async def test_a_failed_handshake_forgets_the_session() -> None:
    slot = SessionSlot()
    async with serving() as served:
        client = await connect(served, slot=slot)
        server = await served.app()
        server.transport.write(b"!")
        await client.until_data(b"!")
        client.transport.abort()
        await client.until_call("lost")
        assert slot.session_for(CLIENT_CONTEXT) is not None
        with pytest.raises(HandshakeError):
            await connect(served, slot=slot, verify=lambda ssl_object: "no")
        assert slot.session_for(CLIENT_CONTEXT) is None


async def test_no_handshake_fails_and_no_connection_drops_while_certificates_rotate() -> None:
    now = [server_context(SERVER.bundle(), alpn=())]
    slot = SessionSlot()
    async with serving(lambda: now[0]) as served:
        oldest = await connect(served)
        oldest_server = await served.app()
        for _ in range(20):
            now[0] = server_context(AUTHORITY.leaf("default", "edge").bundle(), alpn=())
            context = client_context(AUTHORITY.leaf("default", "rsu").bundle(), alpn=())
            for _ in range(3):
                client = await connect(served, context, slot=slot)
                server = await served.app()
                client.transport.write(b"?")
                await server.until_data(b"?")
                client.transport.close()
                await server.until_call("lost")
        oldest.transport.write(b"still here")
        await oldest_server.until_data(b"still here")
        assert not served.errors


# ── nothing stays behind ──


async def test_a_closed_connection_leaves_no_objects_and_no_descriptors() -> None:
    descriptors: list[int] = []
    async with serving() as served:
        for _ in range(3):
            client = await connect(served)
            server = await served.app()
            client.transport.write(b"x")
            await server.until_data(b"x")
            client.transport.close()
            await server.until_call("lost")
            await client.until_call("lost")
            watched = weakref.ref(client.transport.get_extra_info("ssl_object"))
            client.transport = server.transport = None
            served.apps.clear()
            del client, server
            await asyncio.sleep(0)
            gc.collect()
            assert watched() is None
            descriptors.append(len(os.listdir("/proc/self/fd")))
    # The first connection has uvloop open one of its own, for good.
    assert descriptors[2] == descriptors[1]


# ── laws, in memory ──


class Wire(asyncio.Transport):
    """The transport below, without a socket: keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.sent += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def take(self) -> bytes:
        taken = bytes(self.sent)
        self.sent.clear()
        return taken


def _pair() -> tuple[TlsTransport, Wire, App, TlsTransport, Wire, App]:
    client_wire, server_wire = Wire(), Wire()
    client_app, server_app = App(keeps_open=True), App(keeps_open=True)
    client = TlsTransport(CLIENT_CONTEXT, client_app, is_server=False)
    server = TlsTransport(SERVER_CONTEXT, server_app, is_server=True)
    server.connection_made(server_wire)
    client.connection_made(client_wire)
    while client_wire.sent or server_wire.sent:
        if client_wire.sent:
            server.data_received(client_wire.take())
        if server_wire.sent:
            client.data_received(server_wire.take())
    return client, client_wire, client_app, server, server_wire, server_app


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 300), st.sampled_from([16_384, 16_385, 40_000, 70_000])), max_size=6),
    st.lists(st.sampled_from([1, 3, 5, 22, 1_000, 16_406, 65_536, 65_537, 262_144]), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_writes_in_any_split_arrive_in_order(writes: list[int], sizes: list[int], ends: bool) -> None:
    async def scenario() -> None:
        client, wire, _, server, _, app = _pair()
        wanted = b""
        for number, size in enumerate(writes):
            piece = bytes([number + 65]) * size
            wanted += piece
            client.write(piece)
        if ends:
            client.write_eof()
        data = wire.take()
        smallest = max(1, len(data) // 2_000)  # single bytes of a large message say nothing new
        at = turn = 0
        while at < len(data):
            size = max(sizes[turn % len(sizes)], smallest)
            server.data_received(data[at : at + size])
            at, turn = at + size, turn + 1
        assert app.data == wanted
        assert app.calls == (["made", "eof"] if ends else ["made"])
        for tls in (client, server):
            tls.connection_lost(None)

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_junk_ends_a_connection_and_raises_nothing(junk: bytes, looks_like_tls: bool, is_early: bool) -> None:
    async def scenario() -> None:
        if looks_like_tls:
            data = b"\x16\x03\x03" + len(junk).to_bytes(2, "big") + junk
        else:
            data = junk
        if is_early:
            app, wire = App(), Wire()
            tls = TlsTransport(SERVER_CONTEXT, app, is_server=True)
            tls.connection_made(wire)
        else:
            _, _, _, tls, _, app = _pair()
        tls.data_received(data)
        tls.data_received(data)
        tls.connection_lost(None)
        assert not app.data

    asyncio.run(scenario())
