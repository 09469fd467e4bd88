"""TCP through a live worker: any bytes, both halves, and what happens when one side is gone."""

import asyncio
import json
import os
import ssl
from pathlib import Path

import pytest

from meshproxy.model.cluster import CircuitLimits, Protocol
from meshproxy.model.listener import AccessLogPolicy, Direction, ServerTls, ServerTlsMode
from meshproxy.telemetry.access_log import AccessLog
from tests.support.client import Client
from tests.support.handshakes import client_hello
from tests.support.live_worker import LiveWorker, until
from tests.support.raw_server import Blackhole, RawServer, reset, unused_port


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Gives back what comes, and one word more when it has ended."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write(b"<bye>")


def listen(live: LiveWorker, *ports: int, **fields: object) -> int:
    cluster = live.cluster([("127.0.0.1", port) for port in ports], protocol=Protocol.TCP, **fields)
    return live.listen(cluster, protocol=Protocol.TCP)


async def nothing_left(live: LiveWorker) -> None:
    await until(lambda: live.open_downstreams() == live.open_upstreams() == 0)
    for cluster in live.clusters():
        assert cluster.connections == len(cluster.connecting) == 0
        assert all(endpoint.active_requests == 0 for endpoint in cluster.endpoints.values())


async def test_any_bytes_pass_both_ways() -> None:
    data = os.urandom(3_000_000)
    async with RawServer(echo) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream.port)) as client:
            client.send(data)
            assert await client.bytes(len(data)) == data
            client.end()
            assert await client.bytes(5) == b"<bye>"
            assert await client.ended() == "end"
        await nothing_left(live)
        assert live.tcp(response_flags="-") == (1, 1, len(data) + 5, len(data))


async def test_the_upstream_may_speak_first() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\r\n")
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream.port)) as client:
            assert await client.bytes(11) == b"220 ready\r\n"


async def test_the_end_of_one_half_leaves_the_other_open() -> None:
    async with RawServer(echo) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream.port)) as client:
            client.send(b"last")
            client.end()
            assert await client.bytes(9) == b"last<bye>"
            assert await client.ended() == "end"
        await nothing_left(live)


async def test_the_end_of_the_upstreams_half_leaves_the_other_open() -> None:
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"all I have")
        writer.write_eof()
        received.set_result(await reader.read())
        await asyncio.Event().wait()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream.port)) as client:
            assert await client.bytes(10) == b"all I have"
            assert await client.ended() == "end"
            client.send(b"x" * 2_000_000)
            client.end()
            async with asyncio.timeout(5):
                assert len(await received) == 2_000_000
        await nothing_left(live)


async def test_bytes_and_an_end_that_come_before_the_upstream_is_there_are_kept() -> None:
    async with RawServer(echo) as upstream, LiveWorker() as live:
        async with Client(listen(live, unused_port(), upstream.port)) as client:
            client.send(b"early")
            client.end()
            assert await client.bytes(10) == b"early<bye>"


async def test_the_next_endpoint_is_tried_when_one_is_down() -> None:
    async with RawServer(echo) as upstream, LiveWorker() as live:
        port = listen(live, unused_port(), unused_port(), upstream.port)
        for _ in range(6):
            async with Client(port) as client:
                client.send(b"x")
                assert await client.bytes(1) == b"x"
        assert upstream.connections == 6


async def test_no_endpoint_at_all_resets_the_downstream() -> None:
    async with LiveWorker() as live:
        async with Client(listen(live)) as client:
            assert await client.ended() in ("reset", "end")
        async with Client(listen(live, unused_port())) as client:
            assert await client.ended() in ("reset", "end")
        await nothing_left(live)
        assert live.tcp(response_flags="UH")[:2] == live.tcp(response_flags="UF")[:2] == (1, 1)


async def test_a_reset_of_the_upstream_is_a_reset_downstream() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        await reset(writer)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream.port)) as client:
            client.send(b"x")
            assert await client.ended() == "reset"
        await nothing_left(live)


async def test_a_reset_of_the_downstream_is_a_reset_upstream() -> None:
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"y")
        try:
            data = await reader.read()
            ended.set_result(f"end {data!r}")
        except ConnectionResetError:
            ended.set_result("reset")

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream.port)) as client:
            client.send(b"x")
            assert await client.bytes(1) == b"y"
            await reset(client.writer)
            async with asyncio.timeout(5):
                assert await ended == "reset"
        await nothing_left(live)


async def test_a_session_without_traffic_ends() -> None:
    async with RawServer(echo) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)], protocol=Protocol.TCP)
        port = live.listen(cluster, protocol=Protocol.TCP, idle_timeout_s=0.4)
        async with Client(port) as client:
            for _ in range(6):
                client.send(b"x")
                assert await client.bytes(1) == b"x"
                await asyncio.sleep(0.1)
            assert await client.ended() in ("end", "reset")
        await nothing_left(live)


async def test_connections_beyond_the_clusters_limit_are_refused() -> None:
    async with RawServer(echo) as upstream, LiveWorker() as live:
        port = listen(live, upstream.port, limits=CircuitLimits(max_connections=1))
        async with Client(port) as first:
            first.send(b"x")
            assert await first.bytes(1) == b"x"
            async with Client(port) as second:
                assert await second.ended() in ("end", "reset")
        await nothing_left(live)
        assert live.tcp(response_flags="UO")[:2] == (1, 1)
        async with Client(port) as third:
            third.send(b"x")
            assert await third.bytes(1) == b"x"


async def test_a_connect_that_takes_too_long_goes_to_the_next_endpoint() -> None:
    with Blackhole() as hole:
        async with RawServer(echo) as upstream, LiveWorker() as live:
            port = listen(live, hole.port, upstream.port, connect_timeout_s=0.1)
            for _ in range(2):
                async with Client(port) as client:
                    client.send(b"x")
                    assert await client.bytes(1) == b"x"


async def test_a_downstream_that_leaves_while_we_connect_leaves_nothing() -> None:
    """It need not be seen before connecting ends: what came is not read on until then."""
    with Blackhole() as hole:
        async with LiveWorker() as live:
            async with Client(listen(live, hole.port, connect_timeout_s=0.1)) as client:
                await until(lambda: any(cluster.connecting for cluster in live.clusters()))
                client.send(b"x")
                await reset(client.writer)
            await nothing_left(live)


async def test_a_downstream_cannot_fill_our_memory_while_we_connect() -> None:
    with Blackhole() as hole:
        async with LiveWorker() as live:
            async with Client(listen(live, hole.port)) as client:
                client.send(b"z" * 64 * 1024 * 1024)
                sizes = [-1, client.writer.transport.get_write_buffer_size()]
                while sizes[-1] != sizes[-2]:
                    await asyncio.sleep(0.1)
                    sizes.append(client.writer.transport.get_write_buffer_size())
                (listener,) = live.worker.listeners.values()
                (session,) = listener.runtime.connections
                assert 0 < sum(map(len, session._early)) <= 512 * 1024


@pytest.mark.parametrize("slow", ["downstream", "upstream"])
async def test_a_slow_reader_stops_the_other_side(slow: str) -> None:
    moved = 0

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal moved
        while moved < 256 * 1024 * 1024:
            writer.write(b"z" * 65536)
            await writer.drain()
            moved += 65536

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if slow == "downstream":
            await pour(writer)
        else:
            await asyncio.Event().wait()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream.port)) as client:
            sending = asyncio.ensure_future(pour(client.writer)) if slow == "upstream" else None
            before, still, most = -1, 0, 0
            while still < 40:
                await asyncio.sleep(0.005)
                most = max(most, live.buffered())
                still = still + 1 if moved == before else 0
                before = moved
            assert 0 < moved < 64 * 1024 * 1024
            assert most <= 2 * (256 + 256) * 1024
            if sending is not None:
                sending.cancel()


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"HTTP/1.1 "),
        (b"\x00\x01binary", b"\x00\x01binary"),
        (b"GE\x00", b"GE\x00"),
        (b"EHLO x\r\n", b"EHLO x\r\n"),
    ],
)
async def test_a_port_of_unknown_protocol_tells_http_from_the_rest(data: bytes, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(65536)
        if first.startswith(b"GET / "):
            assert b"x-request-id" in first
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(first)
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]), protocol=Protocol.AUTO)
        async with Client(port) as client:
            client.send(data)
            assert await client.bytes(len(answer)) == answer


async def test_a_half_closed_start_of_unknown_protocol_still_gets_its_answer() -> None:
    async with RawServer(echo) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]), protocol=Protocol.AUTO)
        async with Client(port) as client:
            client.send(b"GE")  # could still become GET
            client.end()
            assert await client.bytes(7) == b"GE<bye>"
            assert await client.ended() == "end"
        await nothing_left(live)


async def test_the_log_tells_the_server_name_of_tls_that_passes_through(tmp_path: Path) -> None:
    hello = client_hello(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "a.example")
    passthrough = ServerTls(mode=ServerTlsMode.PASSTHROUGH)
    async with RawServer(echo) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)], protocol=Protocol.TCP)
        port = live.listen(cluster, direction=Direction.GATEWAY, protocol=Protocol.TCP, tls=passthrough)
        log = live.worker.state.access_log = AccessLog(AccessLogPolicy(path=str(tmp_path / "log"), encoding="json"))
        async with Client(port) as client:
            client.send(hello)
            client.end()
            assert await client.bytes(len(hello)) == hello
        await nothing_left(live)
        log.close()
        line = json.loads((tmp_path / "log").read_text())
        assert (line["requested_server_name"], line["bytes_received"]) == ("a.example", len(hello))
