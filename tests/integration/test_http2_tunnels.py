"""WebSocket over any two versions: the same bytes both ways, and an end for an end (RFC 8441)."""

import contextlib
from collections.abc import AsyncIterator

from tests.integration.test_http_tunnels import OFFER, echo
from tests.support.client import Client
from tests.support.http2_client import Http2Client, data_frame, headers_frame
from tests.support.http2_origin import H2Origin
from tests.support.live_worker import LiveWorker, until
from tests.support.raw_server import RawServer

EXTENDED_CONNECT = [
    (b":method", b"CONNECT"),
    (b":protocol", b"websocket"),
    (b":scheme", b"http"),
    (b":authority", b"a.example"),
    (b":path", b"/chat"),
    (b"sec-websocket-version", b"13"),
]
MESSAGES = (b"\x81\x05hello", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 60)


@contextlib.asynccontextmanager
async def http1_upstream() -> AsyncIterator[tuple[int, LiveWorker]]:
    async with RawServer(echo) as upstream, LiveWorker() as live:
        yield live.listen(live.cluster([("127.0.0.1", upstream.port)])), live


@contextlib.asynccontextmanager
async def http2_upstream(opens_tunnels: bool = True) -> AsyncIterator[tuple[int, LiveWorker, H2Origin]]:
    async with H2Origin(opens_tunnels=opens_tunnels) as upstream, LiveWorker() as live:
        yield live.listen(live.cluster([("127.0.0.1", upstream.port)], speaks_http2=True)), live, upstream


async def talk_http2(port: int) -> None:
    async with Http2Client(port, acks=True) as client:
        settings = await client.handshake()
        assert settings[8] == 1
        client.send(headers_frame(1, EXTENDED_CONNECT, end_stream=False))
        await client.until(lambda: 1 in client.streams and client.streams[1].blocks, "an answer")
        stream = client.streams[1]
        assert dict(stream.blocks[0])[b":status"] == b"200"
        expected = b""
        for message in MESSAGES:
            client.send(data_frame(1, message, end_stream=False))
            expected += message
            await client.until(lambda: bytes(stream.body) == expected, "the echo")  # noqa: B023
        client.send(data_frame(1, b""))
        await client.until(lambda: stream.has_ended, "the end")
        assert bytes(stream.body) == expected + b"<bye>"


async def test_http2_to_http1() -> None:
    async with http1_upstream() as (port, live):
        await talk_http2(port)
        await until(lambda: not live.open_upstreams())


async def test_http2_to_http2() -> None:
    async with http2_upstream() as (port, _, upstream):
        await talk_http2(port)
    (seen,) = upstream.requests
    assert (seen.header(b":protocol"), seen.header(b":path")) == (b"websocket", b"/chat")


async def test_http1_to_http2() -> None:
    async with http2_upstream() as (port, live, upstream), Client(port) as client:
        answer = await client.ask(OFFER, "UPGRADE")
        assert answer.status == 101
        assert answer.header(b"upgrade") == b"websocket"
        # RFC 6455 §1.3 has this pair as its example; the upstream never saw the key.
        assert answer.header(b"sec-websocket-accept") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert upstream.requests[0].header(b"sec-websocket-key") is None
        for message in MESSAGES:
            client.send(message)
            assert await client.bytes(len(message)) == message
        client.writer.write_eof()
        assert await client.bytes(5) == b"<bye>"
        await until(lambda: not live.open_downstreams())


async def test_an_upstream_without_extended_connect_refuses_the_upgrade_and_serves_the_rest() -> None:
    async with http2_upstream(opens_tunnels=False) as (port, _, upstream), Client(port) as client:
        client.send(OFFER)
        assert (await client.answer()).status == 502
        assert not upstream.requests
