"""HTTP/3 downstreams against real upstreams: requests, bodies, ends, limits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic.connection import QuicConnection

from meshproxy.codec.http3 import frame
from meshproxy.codec.quic import STREAM_WINDOW, ServerConnection
from meshproxy.control import messages as m
from meshproxy.listener.quic import BATCH
from meshproxy.model.listener import ServerTls, ServerTlsMode
from tests.support.certificates import Authority
from tests.support.http3_client import Http3Client, Listening, get
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.raw_server import RawServer, script

AUTHORITY = Authority()


@pytest.fixture
def server_tls(tmp_path: Path) -> ServerTls:
    directory = AUTHORITY.leaf(dns_names=["a.example"]).write(tmp_path)
    return ServerTls(
        mode=ServerTlsMode.SIMPLE,
        certificate_file=str(directory / "cert-chain.pem"),
        key_file=str(directory / "key.pem"),
    )


@pytest.fixture
async def worker() -> AsyncIterator[LiveWorker]:
    async with LiveWorker() as worker:
        yield worker


class Gateway:
    def __init__(self, worker: LiveWorker, origin: Origin, client: Http3Client) -> None:
        self.worker = worker
        self.origin = origin
        self.client = client

    @property
    def connection(self) -> Any:
        return next(iter(runtime(self.worker).connections))


@pytest.fixture
async def gateway(worker: LiveWorker, server_tls: ServerTls) -> AsyncIterator[Gateway]:
    async with Origin() as origin, opened(worker, server_tls, origin.port) as client:
        yield Gateway(worker, origin, client)


@contextlib.asynccontextmanager
async def opened(worker: LiveWorker, tls: ServerTls, upstream_port: int) -> AsyncIterator[Http3Client]:
    """A client of a gateway before this upstream."""
    port = worker.listen_quic(worker.cluster([("127.0.0.1", upstream_port)]), tls=tls)
    async with Http3Client.to(port, AUTHORITY.pem) as client:
        yield client


def runtime(worker: LiveWorker) -> Any:
    return next(iter(worker.worker.listeners.values())).runtime


def connection_of(worker: LiveWorker) -> Any:
    return next(iter(runtime(worker).connections))


async def test_a_request_goes_through_a_gateway_to_an_http1_upstream(worker: LiveWorker, server_tls: ServerTls) -> None:
    async with Origin() as origin:
        port = worker.listen_quic(worker.cluster([("127.0.0.1", origin.port)]), tls=server_tls)
        async with Http3Client.to(port, AUTHORITY.pem) as client:
            answer = await client.request(get("/path?query"))
        assert (answer.status, answer.body) == (200, b"ok")
        assert origin.requests[0].target == b"/path?query"
        assert origin.requests[0].header(b"x-forwarded-proto") == b"https"


# ── messages ──


async def test_what_a_request_says_and_what_the_upstream_answers_come_through(gateway: Gateway) -> None:
    gateway.origin.answer = lambda seen: (
        b"HTTP/1.1 404 Not Here\r\nContent-Length: %d\r\nX-Thing: a\r\nConnection: close\r\n\r\n%b"
        % (len(seen.body), seen.body)
    )
    body = b"z" * 300_000
    answer = await gateway.client.request(get("/", "POST", "a.example", (b"cookie", b"a=1"), (b"cookie", b"b=2")), body)
    assert (answer.status, answer.header(b"x-thing"), answer.body) == (404, b"a", body)
    assert answer.header(b"connection") is None
    seen = gateway.origin.requests[0]
    assert (seen.method, seen.header(b"host"), seen.header(b"cookie")) == (b"POST", b"a.example", b"a=1; b=2")
    assert seen.header(b"transfer-encoding") == b"chunked"


async def test_an_answer_to_head_has_a_length_and_no_body(gateway: Gateway) -> None:
    gateway.origin.answer = lambda seen: b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    # This client takes the length of an answer to HEAD for that of its body.
    gateway.client.http._check_content_length = lambda stream: None  # type: ignore[method-assign]
    answer = await gateway.client.request(get("/", "HEAD"))
    assert (answer.status, answer.header(b"content-length"), answer.body) == (200, b"5", b"")


async def test_trailers_come_through_both_ways(gateway: Gateway) -> None:
    gateway.origin.answer = lambda seen: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 7\r\n\r\n"
    )
    client = gateway.client
    stream = client.send(get("/", "POST", "a.example", (b"te", b"trailers")), b"body", ends=False)
    client.http.send_headers(stream, [(b"x-check", b"3")], end_stream=True)
    client.transmit()
    answer = await client.answer(stream)
    assert answer.trailers == [(b"x-sum", b"7")]
    assert gateway.origin.requests[0].trailers == [(b"x-check", b"3")]


async def test_trailers_may_come_before_the_end_of_their_stream(gateway: Gateway) -> None:
    client = gateway.client
    stream = client.send(get("/", "POST", "a.example", (b"te", b"trailers")), b"body", ends=False)
    client.http.send_headers(stream, [(b"x-check", b"3")], end_stream=False)
    client.transmit()
    await client.request(get("/"))  # what was sent before has come
    client._quic.send_stream_data(stream, b"", end_stream=True)
    client.transmit()
    assert (await client.answer(stream)).status == 200
    (seen,) = [seen for seen in gateway.origin.requests if seen.method == b"POST"]
    assert (seen.body, seen.trailers) == (b"body", [(b"x-check", b"3")])


async def test_informational_answers_come_through(worker: LiveWorker, server_tls: ServerTls) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with RawServer(script(hints)) as upstream, opened(worker, server_tls, upstream.port) as client:
        answer = await client.request(get("/"))
        assert [dict(each)[b":status"] for each in answer.informational] == [b"103"]
        assert answer.status == 200


async def test_a_hundred_requests_at_once_are_answered_each_with_its_own(gateway: Gateway) -> None:
    gateway.origin.answer = lambda seen: (
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(seen.target), seen.target)
    )
    streams = [gateway.client.send(get(f"/{number}")) for number in range(100)]
    for number, stream in enumerate(streams):
        assert (await gateway.client.answer(stream)).body == b"/%d" % number


async def test_streams_are_given_back_so_that_a_connection_serves_any_number(gateway: Gateway) -> None:
    for _ in range(6):
        streams = [gateway.client.send(get("/")) for _ in range(60)]
        for stream in streams:
            assert (await gateway.client.answer(stream)).status == 200
    connection = gateway.connection
    await until(lambda: not connection.streams and not connection._deaf)
    await until(lambda: len(connection.quic._streams) < 40)


async def test_without_a_route_the_proxy_answers_by_itself(worker: LiveWorker, server_tls: ServerTls) -> None:
    port = worker.listen_quic("outbound|80||gone.example", tls=server_tls)
    async with Http3Client.to(port, AUTHORITY.pem) as client:
        answer = await client.request(get("/"))
    assert (answer.status, answer.header(b"server")) == (503, b"meshproxy")


async def test_a_websocket_goes_through_an_extended_connect(worker: LiveWorker, server_tls: ServerTls) -> None:
    heads: list[bytes] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        while data := await reader.read(65536):
            writer.write(data)

    async with RawServer(echo) as upstream, opened(worker, server_tls, upstream.port) as client:
        connect = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *get("/chat")[1:]]
        stream = client.send(connect, ends=False)
        await client.until(lambda: stream in client.answers)
        assert client.answers[stream].status == 200
        client.http.send_data(stream, b"hello", end_stream=False)
        client.transmit()
        await client.until(lambda: client.answers[stream].body == b"hello")
        client.http.send_data(stream, b"", end_stream=True)
        client.transmit()
        assert (await client.answer(stream)).body == b"hello"
    assert heads[0].startswith(b"GET /chat HTTP/1.1\r\n")
    assert b"upgrade: websocket" in heads[0].lower()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1"])
async def test_a_listener_of_all_addresses_answers_from_the_one_that_was_asked(
    worker: LiveWorker, server_tls: ServerTls, host: str
) -> None:
    async with Origin() as origin:
        everywhere = "::" if ":" in host else "0.0.0.0"
        port = worker.listen_quic(worker.cluster([("127.0.0.1", origin.port)]), everywhere, tls=server_tls)
        async with Http3Client.to(port, AUTHORITY.pem, host=host) as client:
            # The client drops what comes from an address that it has not asked.
            assert (await client.request(get("/"))).body == b"ok"
            connection = next(iter(runtime(worker).connections))
            assert connection.get_extra_info("sockname") == (host, port)


async def test_what_is_sent_into_a_tunnel_that_does_not_open_waits_in_its_window(
    worker: LiveWorker, server_tls: ServerTls
) -> None:
    go = asyncio.Event()
    received = bytearray()
    size = 2 * 1024 * 1024

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go.wait()
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        while len(received) < size:
            received.extend(await reader.read(65536))

    async with RawServer(late) as upstream, opened(worker, server_tls, upstream.port) as client:
        stream = client.send([(b":method", b"CONNECT"), (b":protocol", b"websocket"), *get("/")[1:]], ends=False)
        client._quic.send_stream_data(stream, frame(0, b"z" * size))
        client.transmit()
        await until(lambda: upstream.connections == 1)
        quic = connection_of(worker).quic
        await stands_still([0], lambda: quic._local_max_data.used)
        assert 0 < quic._local_max_data.used < 2 * STREAM_WINDOW
        go.set()
        await until(lambda: len(received) == size, 20)


async def test_what_the_proxy_answers_to_grpc_is_grpc(worker: LiveWorker, server_tls: ServerTls) -> None:
    port = worker.listen_quic("outbound|80||gone.example", tls=server_tls)
    async with Http3Client.to(port, AUTHORITY.pem) as client:
        answer = await client.request(get("/a.S/M", "POST", "a.example", (b"content-type", b"application/grpc")), b"x")
    assert (answer.status, answer.header(b"grpc-status"), answer.body) == (200, b"14", b"")


# ── ends ──


async def test_a_request_that_the_client_resets_is_cancelled_upstream(
    worker: LiveWorker, server_tls: ServerTls
) -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read()
        ended.set()

    async with RawServer(wait) as upstream, opened(worker, server_tls, upstream.port) as client:
        stream = client.send(get("/", "POST"), b"part", ends=False)
        await until(lambda: upstream.connections == 1)
        client._quic.reset_stream(stream, 0x10C)
        client.transmit()
        await asyncio.wait_for(ended.wait(), 5)
        assert (await client.answer(stream)).reset == 0x10C
        await until(lambda: not next(iter(runtime(worker).connections)).streams)


async def test_an_answer_that_the_client_stops_ends_upstream(worker: LiveWorker, server_tls: ServerTls) -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome")
        await reader.read()
        ended.set()

    async with RawServer(wait) as upstream, opened(worker, server_tls, upstream.port) as client:
        stream = client.send(get("/"))
        await client.until(lambda: stream in client.answers)
        client._quic.stop_stream(stream, 0x10C)
        client.transmit()
        await asyncio.wait_for(ended.wait(), 5)
        assert worker.requests(response_flags="DC") == 1


async def test_an_answer_cut_by_the_upstream_is_reset_and_never_ends_well(
    worker: LiveWorker, server_tls: ServerTls
) -> None:
    cut = script(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", closes=True)
    async with RawServer(cut) as upstream, opened(worker, server_tls, upstream.port) as client:
        answer = await client.request(get("/"))
        assert (answer.reset, answer.status, answer.body) == (0x102, 200, b"half")


async def test_an_answer_before_the_body_is_whole_stops_the_body(worker: LiveWorker, server_tls: ServerTls) -> None:
    early = script(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", closes=True)
    async with RawServer(early) as upstream, opened(worker, server_tls, upstream.port) as client:
        stream = client.send(get("/", "POST"), b"z" * 1000, ends=False)
        answer = await client.answer(stream)
        assert answer.status == 413
        await client.until(lambda: answer.stopped == 0x100)
        await until(lambda: not next(iter(runtime(worker).connections))._deaf)


async def test_a_drain_serves_what_is_under_way_and_says_goodbye(worker: LiveWorker, server_tls: ServerTls) -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await go.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(slow) as upstream, opened(worker, server_tls, upstream.port) as client:
        first = client.send(get("/"))
        await until(lambda: upstream.connections == 1)
        worker.worker.on_message(m.Drain(deadline_s=5.0, exits=False), None)
        crossed = client.send(get("/"))
        await until(lambda: upstream.connections == 2)
        go.set()
        assert (await client.answer(first)).body == b"ok"
        assert (await client.answer(crossed)).body == b"ok"
        assert (await client.refusal()).error_code == 0x100


async def test_a_listener_that_changes_or_goes_serves_what_is_under_way(
    worker: LiveWorker, server_tls: ServerTls
) -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await go.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(slow) as upstream, opened(worker, server_tls, upstream.port) as client:
        (before,) = worker.worker.listeners.values()
        spec = before.runtime.listener
        under_way = client.send(get("/"))
        await until(lambda: upstream.connections == 1)
        worker.put(m.PutListener(replace(spec, idle_timeout_s=5.0)), sockets=[before._sock.dup()])
        async with Http3Client.to(spec.port, AUTHORITY.pem) as other:
            stream = other.send(get("/"))
            await until(lambda: upstream.connections == 2)
            go.set()
            assert (await client.answer(under_way)).body == b"ok"
            assert (await client.refusal()).error_code == 0x100
            assert before._sock.fileno() < 0
            assert (await other.answer(stream)).body == b"ok"
            go.clear()
            last = other.send(get("/"))
            await until(lambda: len(runtime(worker).connections) == 1 and bool(connection_of(worker).streams))
            (after,) = worker.worker.listeners.values()
            worker.put(m.Remove("listener", spec.name))
            go.set()
            assert (await other.answer(last)).body == b"ok"
            assert (await other.refusal()).error_code == 0x100
            assert after._sock.fileno() < 0


async def test_a_connection_on_which_nothing_moves_is_closed_and_one_that_waits_for_an_answer_is_not(
    worker: LiveWorker, server_tls: ServerTls
) -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await go.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with RawServer(slow) as upstream:
        port = worker.listen_quic(worker.cluster([("127.0.0.1", upstream.port)]), tls=server_tls, idle_timeout_s=1.0)
        async with Http3Client.to(port, AUTHORITY.pem) as idle, Http3Client.to(port, AUTHORITY.pem) as waiting:
            stream = waiting.send(get("/"))
            await idle.until(lambda: idle.control_stream)
            assert (await idle.refusal()).reason_phrase == "Idle timeout"
            await until(lambda: runtime(worker).counters.downstream_cx_idle_timeout == 1)
            go.set()
            assert (await waiting.answer(stream)).body == b"ok"


async def test_a_fault_in_one_connection_costs_no_other(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("as a fault would")

    before = gateway.connection
    monkeypatch.setattr(ServerConnection, "_handle_ping_frame", fails)
    port = runtime(gateway.worker).listener.port
    async with Listening.to(port, AUTHORITY.pem) as other:
        assert (await other.request(get("/"))).status == 200
        token = other._quic._peer_cid.stateless_reset_token
        other._quic.send_ping(1)
        other.transmit()
        await until(lambda: runtime(gateway.worker).connections == {before})
        other.send(get("/"))
        await until(lambda: other.received[-1][-16:] == token)
        assert (await gateway.client.request(get("/"))).status == 200
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


# ── back-pressure ──


class SlowClient(Http3Client):
    """Gives the server no more window than it begins with, until told otherwise."""

    def __init__(self, quic: QuicConnection) -> None:
        super().__init__(quic)
        self.is_slow = True
        for name in ("_write_connection_limits", "_write_stream_limits"):
            setattr(quic, name, self._unless_slow(getattr(quic, name)))

    def _unless_slow(self, original: Any) -> Any:
        return lambda *args, **kwargs: None if self.is_slow else original(*args, **kwargs)


async def test_a_client_that_gives_no_window_stops_the_upstream(worker: LiveWorker, server_tls: ServerTls) -> None:
    moved = [0]
    size = 32 * 1024 * 1024

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while moved[0] < size:
            writer.write(b"z" * 65536)
            await writer.drain()
            moved[0] += 65536

    async with RawServer(pour) as upstream:
        port = worker.listen_quic(worker.cluster([("127.0.0.1", upstream.port)]), tls=server_tls)
        async with SlowClient.to(port, AUTHORITY.pem, max_data=100_000, max_stream_data=100_000) as client:
            stream = client.send(get("/"))
            await client.until(lambda: stream in client.answers and len(client.answers[stream].body) > 90_000)
            connection = next(iter(runtime(worker).connections))
            await until(lambda: connection.streams[stream].is_full)
            await stands_still(moved)
            assert connection.get_write_buffer_size() < 1024 * 1024
            assert moved[0] < size / 2


async def test_an_upstream_that_does_not_read_stops_the_client(worker: LiveWorker, server_tls: ServerTls) -> None:
    go = asyncio.Event()
    size = 16 * 1024 * 1024

    async def sleepy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await go.wait()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        while received < size:
            received += len(await reader.read(1 << 20))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with RawServer(sleepy) as upstream, opened(worker, server_tls, upstream.port) as client:
        stream = client.send(get("/", "POST", "a.example", (b"content-length", b"%d" % size)), b"z" * size)
        await until(lambda: bool(runtime(worker).connections))
        connection = next(iter(runtime(worker).connections))
        await until(lambda: stream in connection.streams and connection.streams[stream].is_held)
        await stands_still([0], lambda: connection.quic._local_max_data.used)
        assert connection.quic._local_max_data.used < size / 2
        # What one turn takes from the socket counts as taken before the stream is told to hold.
        assert connection.streams[stream].untaken <= STREAM_WINDOW + BATCH * 1500
        go.set()
        assert (await client.answer(stream, 20)).status == 200


async def stands_still(moved: list[int], look: Callable[[], int] | None = None) -> None:
    """Until the number has not changed for a while."""
    look = look or (lambda: moved[0])
    before, still = -1, 0
    async with asyncio.timeout(20):
        while still < 40:
            await asyncio.sleep(0.005)
            still = still + 1 if look() == before else 0
            before = look()
