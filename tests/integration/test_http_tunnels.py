"""Upgrade (WebSocket and others): after 101 the connection carries any bytes, both ways, to its two ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from meshproxy.control import messages as m
from tests.support.client import Client, get
from tests.support.http2_client import Http2Client, data_frame, headers_frame, request
from tests.support.live_worker import LiveWorker, until
from tests.support.raw_server import RawServer, Serve, reset, script

OFFER = get("/chat", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@contextlib.asynccontextmanager
async def tunnel(serve: Serve) -> AsyncIterator[tuple[Client, LiveWorker]]:
    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            yield client, live


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"upgrade: websocket" in head.lower() and b"connection: upgrade" in head.lower()
    writer.write(SWITCH)
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write(b"<bye>")


async def nothing_left(live: LiveWorker) -> None:
    """Until both connections of the tunnel are gone."""
    await until(lambda: not live.open_downstreams() and not live.open_upstreams())


async def test_bytes_pass_both_ways_after_the_switch() -> None:
    async with tunnel(echo) as (client, _):
        answer = await client.ask(OFFER, "UPGRADE")
        assert answer.status == 101
        assert answer.header(b"upgrade") == b"websocket"
        assert (answer.header(b"connection") or b"").lower() == b"upgrade"
        for data in (b"\x81\x05hello", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 400):
            client.send(data)
            assert await client.bytes(len(data)) == data


async def test_bytes_sent_with_the_offer_follow_the_switch() -> None:
    async with tunnel(echo) as (client, _):
        client.send(OFFER + b"early")
        await client.answer("UPGRADE")
        client.send(b" late")
        assert await client.bytes(10) == b"early late"


async def test_bytes_that_come_with_the_switch_are_delivered() -> None:
    async with tunnel(script(SWITCH + b"welcome")) as (client, _):
        await client.ask(OFFER, "UPGRADE")
        assert await client.bytes(7) == b"welcome"


async def test_an_end_from_the_downstream_leaves_the_other_half_open() -> None:
    async with tunnel(echo) as (client, live):
        await client.ask(OFFER, "UPGRADE")
        client.send(b"last")
        client.end()
        assert await client.bytes(9) == b"last<bye>"
        assert await client.ended() == "end"
        await nothing_left(live)


async def test_an_end_from_the_upstream_leaves_the_other_half_open() -> None:
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCH + b"all I have")
        writer.write_eof()
        received.set_result(await reader.read())
        await asyncio.Event().wait()  # the proxy has to end it, nobody else will

    async with tunnel(serve) as (client, live):
        await client.ask(OFFER, "UPGRADE")
        assert await client.bytes(10) == b"all I have"
        assert await client.ended() == "end"
        client.send(b"x" * 1_000_000)
        client.end()
        async with asyncio.timeout(5):
            assert len(await received) == 1_000_000
        await nothing_left(live)


async def test_a_reset_of_the_upstream_ends_the_downstream() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SWITCH)
        await reader.readexactly(1)
        await reset(writer)

    async with tunnel(serve) as (client, live):
        await client.ask(OFFER, "UPGRADE")
        client.send(b"x")
        assert await client.ended() == "reset"
        await nothing_left(live)


async def test_a_downstream_that_leaves_takes_the_upstream_along() -> None:
    async with tunnel(echo) as (client, live):
        await client.ask(OFFER, "UPGRADE")
        client.writer.transport.abort()
        await nothing_left(live)


async def test_an_offer_that_is_declined_is_an_ordinary_request() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"
    async with tunnel(script(answer, answer)) as (client, live):
        client.send(OFFER + get("/next"))
        assert [(await client.answer()).body for _ in range(2)] == [b"no", b"no"]
        assert live.pooled() == 1


async def test_a_switch_nobody_asked_for_is_a_broken_upstream() -> None:
    async with tunnel(script(SWITCH)) as (client, live):
        assert (await client.ask(get())).status == 502
        assert live.pooled() == 0


async def test_an_upgrade_during_a_drain_is_still_an_upgrade() -> None:
    async with tunnel(echo) as (client, live):
        live.worker.on_message(m.Drain(30.0, exits=False), None)
        answer = await client.ask(OFFER, "UPGRADE")
        assert (answer.status, (answer.header(b"connection") or b"").lower()) == (101, b"upgrade")
        client.send(b"hello")
        assert await client.bytes(5) == b"hello"


@pytest.mark.parametrize("options", ["upgrade, close", "close, upgrade"])
async def test_an_upgrade_of_a_last_request_is_still_an_upgrade(options: str) -> None:
    async with tunnel(echo) as (client, _):
        answer = await client.ask(get("/", f"Connection: {options}", "Upgrade: websocket"), "UPGRADE")
        assert (answer.header(b"connection") or b"").lower() == b"upgrade"


async def test_a_tunnel_is_idle_only_without_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", 0.4)
    async with tunnel(echo) as (client, live):
        await client.ask(OFFER, "UPGRADE")
        for _ in range(6):
            client.send(b"x")
            assert await client.bytes(1) == b"x"
            await asyncio.sleep(0.1)
        assert await client.ended() in ("end", "reset")
        await nothing_left(live)


async def test_what_an_http2_client_says_before_the_switch_follows_it_and_so_does_its_end() -> None:
    """Extended CONNECT (RFC 8441): bytes and END_STREAM that come while the upstream has not switched yet."""
    connect = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *request("/chat")[1:]]
    async with RawServer(echo) as upstream, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            await client.handshake()
            client.send(
                headers_frame(1, connect, end_stream=False),
                data_frame(1, b"early ", end_stream=False),
                data_frame(1, b"and last", end_stream=True),
            )
            answer = await client.response(1)
            assert (answer.status, answer.body) == (200, b"early and last<bye>")
            await until(lambda: not live.open_upstreams())
