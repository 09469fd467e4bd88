"""A slow reader stops the fast writer at the other end; the worker never holds more than its watermarks."""

import asyncio
import socket

import pytest

from meshproxy.proxy import downstream_h1
from tests.support.client import CHUNKED, Client, get
from tests.support.live_worker import LiveWorker, until
from tests.support.raw_server import RawServer

MOST_BYTES = 1024 * 1024
"""Watermark (64 KiB) and what one read of the loop can bring on top of it (256 KiB), for both ends of a connection."""
FAR_TOO_MUCH = 64 * 1024 * 1024


class Meter:
    """Looks at the worker's buffers on every turn that it gets, and keeps the largest sum."""

    def __init__(self, live: LiveWorker) -> None:
        self._live = live
        self.most = 0

    async def until_stuck(self, moved: list[int]) -> None:
        """Until the sender has not got a byte further for a while."""
        before, still = -1, 0
        async with asyncio.timeout(20):
            while still < 40:
                await asyncio.sleep(0.005)
                self.most = max(self.most, self._live.buffered())
                still = still + 1 if moved[0] == before else 0
                before = moved[0]


async def pour(writer: asyncio.StreamWriter, size: int, moved: list[int], frame: bool = False) -> None:
    piece = b"z" * 65536
    while moved[0] < size:
        writer.write(b"10000\r\n" + piece + b"\r\n" if frame else piece)
        await writer.drain()
        moved[0] += len(piece)
    if frame:
        writer.write(b"0\r\n\r\n")


def slow_socket(port: int) -> socket.socket:
    """A connection that reads nothing by itself, with small buffers of the kernel's."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    sock.connect(("127.0.0.1", port))
    sock.setblocking(False)
    return sock


@pytest.mark.parametrize("framing", ["length", "chunked", "until_close"])
async def test_a_downstream_that_does_not_read_stops_the_upstream(framing: str) -> None:
    moved = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = {"length": b"Content-Length: %d\r\n" % FAR_TOO_MUCH, "chunked": b"Transfer-Encoding: chunked\r\n"}
        writer.write(b"HTTP/1.1 200 OK\r\n%b\r\n" % head.get(framing, b""))
        await pour(writer, FAR_TOO_MUCH, moved, framing == "chunked")

    async with RawServer(serve) as upstream, LiveWorker() as live:
        sock = slow_socket(live.listen(live.cluster([("127.0.0.1", upstream.port)])))
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, get())
        meter = Meter(live)
        await meter.until_stuck(moved)
        assert meter.most <= MOST_BYTES
        assert moved[0] < FAR_TOO_MUCH / 4
        received = 0
        async with asyncio.timeout(20):  # and once it reads, everything comes
            while received < FAR_TOO_MUCH:
                data = await loop.sock_recv(sock, 1 << 20)
                assert data
                received += len(data)
                meter.most = max(meter.most, live.buffered())
        assert meter.most <= MOST_BYTES
        sock.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_upstream_that_does_not_read_stops_the_downstream(chunked: bool) -> None:
    reads = asyncio.Event()
    received = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reads.wait()
        while received[0] < FAR_TOO_MUCH:
            received[0] += len(await reader.read(1 << 20))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            client.send(get("/", CHUNKED if chunked else f"Content-Length: {FAR_TOO_MUCH}", method="PUT"))
            moved = [0]
            sending = asyncio.ensure_future(pour(client.writer, FAR_TOO_MUCH, moved, chunked))
            meter = Meter(live)
            await meter.until_stuck(moved)
            assert meter.most <= MOST_BYTES
            assert moved[0] < FAR_TOO_MUCH / 4
            reads.set()
            await sending
            answer = await client.answer()
            assert answer.body == b"ok"


async def test_requests_without_a_reader_of_their_answers_wait() -> None:
    """Each answer is small enough to be whole at once; only together they are too much."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20_000
    asked = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            asked[0] += 1
            writer.write(answer)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        sock = slow_socket(live.listen(live.cluster([("127.0.0.1", upstream.port)])))
        loop = asyncio.get_running_loop()
        meter = Meter(live)
        try:
            for number in range(1000):  # one at a time: none of them is found waiting behind another
                await loop.sock_sendall(sock, get())
                await until(lambda number=number: asked[0] > number, 0.2)  # type: ignore[misc]
                await asyncio.sleep(0.001)
                meter.most = max(meter.most, live.buffered())
        except TimeoutError:
            await loop.sock_sendall(sock, get() * (999 - number))
        await meter.until_stuck(asked)
        assert meter.most <= MOST_BYTES
        assert asked[0] < 1000
        received = 0
        async with asyncio.timeout(20):
            while asked[0] < 1000 or received < 20_050 * 1000:
                received += len(await loop.sock_recv(sock, 1 << 20))
        sock.close()


async def test_a_reader_that_stays_away_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", 0.2)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % FAR_TOO_MUCH)
        await pour(writer, FAR_TOO_MUCH, [0])

    async with RawServer(serve) as upstream, LiveWorker() as live:
        sock = slow_socket(live.listen(live.cluster([("127.0.0.1", upstream.port)])))
        await asyncio.get_running_loop().sock_sendall(sock, get())
        await until(lambda: live.open_upstreams() == 1)
        await until(lambda: live.open_downstreams() == live.open_upstreams() == 0)
        sock.close()


@pytest.mark.parametrize("last", [get("/", "Connection: close"), get() * 3], ids=["closing", "paused"])
async def test_a_reader_that_stays_away_is_cut_though_its_answers_are_whole(
    last: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is written, nothing is under way at the upstream, and nobody takes the bytes."""
    monkeypatch.setattr("meshproxy.proxy.downstream_h1.FLUSH_TIMEOUT_S", 0.2)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 30000\r\n\r\n" + b"x" * 30_000
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while True:
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            writer.write(answer)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        sock = slow_socket(live.listen(live.cluster([("127.0.0.1", upstream.port)])))
        loop = asyncio.get_running_loop()
        sent = 0
        while not live.buffered():
            sent += 1
            await loop.sock_sendall(sock, get())
            await until(lambda sent=sent: asked == sent and live.pooled() == 1)  # type: ignore[misc]
            await asyncio.sleep(0.005)
        await loop.sock_sendall(sock, last)
        await until(lambda: live.open_downstreams() == 0)
        assert live.pooled() == 1
        sock.close()


async def test_pipelined_bytes_wait_within_the_watermark() -> None:
    """A downstream that sends on and on while its first request is under way is not read."""
    release = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await release.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    requests = get("/", "X-Padding: " + "x" * 4000) * 10
    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            sent = [0]

            async def send() -> None:
                for _ in range(200):
                    client.send(requests)
                    await client.writer.drain()
                    sent[0] += 1

            sending = asyncio.ensure_future(send())
            meter = Meter(live)
            await meter.until_stuck(sent)
            (connection,) = next(iter(live.worker.listeners.values())).runtime.connections
            assert isinstance(connection, downstream_h1.DownstreamConnection)
            assert len(connection._pending) <= MOST_BYTES
            release.set()
            for _ in range(2000):
                assert (await client.answer()).status == 200
            await sending
