"""HTTP/2 clients that take their time: each thing that could be waited for has an end, and only what waits is cut.

The timeouts are made short here; which one ends what is what these tests ask.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import process_time

import hyperframe.frame as h2f
import pytest

from meshproxy.model.route import RetryPolicy, Route, WeightedCluster
from tests.support.http2_client import (
    CANCEL,
    ENHANCE_YOUR_CALM,
    INITIAL_WINDOW_SIZE,
    INTERNAL_ERROR,
    NO_ERROR,
    PREFACE,
    PROTOCOL_ERROR,
    SETTINGS_TIMEOUT,
    Http2Client,
    Stream,
    block,
    data_frame,
    headers_frame,
    ping_frame,
    request,
    settings_frame,
    window_frame,
)
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin, Seen
from tests.support.raw_server import Blackhole

DOWNSTREAM = "meshproxy.proxy.downstream_h2"
SHORT_S = 0.3
BODY = bytes(200_000)


def answer(seen: Seen) -> bytes:
    body = BODY if seen.target == b"/big" else b"ok"
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@asynccontextmanager
async def proxy(**listener: float) -> AsyncIterator[tuple[LiveWorker, int]]:
    """A worker in front of an origin, and its port. At the end it holds no connection of the client's."""
    async with Origin(answer) as origin, LiveWorker() as live:
        yield live, live.listen(live.cluster([("127.0.0.1", origin.port)]), **listener)
        await until(lambda: live.open_downstreams() == 0)
        assert not [timed for timed in live.worker.state.timed if "ownstream" in type(timed).__name__]


@pytest.mark.parametrize(
    "opening",
    [PREFACE, PREFACE + settings_frame()[:5], PREFACE + settings_frame()],
    ids=["no_settings", "half_a_frame", "no_acknowledgement"],
)
async def test_a_client_that_does_not_settle_is_sent_away(opening: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{DOWNSTREAM}.SETTINGS_TIMEOUT_S", SHORT_S)
    async with proxy() as (_, port), Http2Client(port, opening=opening) as client:
        await client.expect_goaway(SETTINGS_TIMEOUT)


async def trickle(client: Http2Client, data: bytes, every_s: float = 0.05) -> None:
    """A byte at a time, until all are sent or the proxy has had enough."""
    for at in range(len(data)):
        if client.closed:
            return
        client.send(data[at : at + 1])
        await asyncio.sleep(every_s)


@pytest.mark.parametrize("has_stream", [False, True], ids=["alone", "beside_a_request"])
@pytest.mark.parametrize(
    "kind", [lambda i: headers_frame(i, request()), lambda i: headers_frame(i, b"", end_headers=False)]
)
async def test_a_field_block_that_does_not_end_ends_the_connection(
    has_stream: bool, kind: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes of it in the meantime."""
    monkeypatch.setattr(f"{DOWNSTREAM}.HEADERS_TIMEOUT_S", SHORT_S)
    async with proxy() as (_, port), Http2Client(port, {INITIAL_WINDOW_SIZE: 0}) as client:
        await client.handshake()
        if has_stream:
            client.send(headers_frame(1, request("/big")))
        started = asyncio.get_running_loop().time()
        await trickle(client, kind(3))
        await client.expect_goaway(ENHANCE_YOUR_CALM)
        assert asyncio.get_running_loop().time() - started < SHORT_S + 0.5


async def test_continuations_one_by_one_do_not_extend_the_time_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{DOWNSTREAM}.HEADERS_TIMEOUT_S", SHORT_S)
    async with proxy() as (_, port), Http2Client(port) as client:
        await client.handshake()
        client.send(headers_frame(1, block(request()), end_headers=False))
        await trickle(client, b"\0\0\1\x09\0\0\0\0\1\x82" * 19, 0.02)
        await client.expect_goaway(ENHANCE_YOUR_CALM)


async def test_a_hundred_answers_behind_a_shut_window_are_given_up_and_the_connection_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(f"{DOWNSTREAM}.FLUSH_TIMEOUT_S", SHORT_S)
    async with proxy() as (live, port), Http2Client(port, {INITIAL_WINDOW_SIZE: 0}) as client:
        await client.handshake()
        ids = range(1, 201, 2)
        client.send(*(headers_frame(i, request("/big" if i % 4 == 1 else "/")) for i in ids))
        await client.until(lambda: all(client.streams.setdefault(i, Stream()).reset is not None for i in ids))
        assert {client.streams[i].reset for i in ids} <= {CANCEL, INTERNAL_ERROR}
        await until(lambda: live.buffered() == 0)
        client.send(settings_frame({INITIAL_WINDOW_SIZE: 65535}), headers_frame(201, request()))
        assert (await client.response(201)).body == b"ok"


async def test_a_body_that_stops_gives_408_and_the_connection_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", SHORT_S)
    async with proxy() as (_, port), Http2Client(port) as client:
        await client.handshake()
        client.send(headers_frame(1, request(method="POST"), end_stream=False), data_frame(1, b"begun", False))
        assert (await client.response(1)).status == 408
        await client.expect_rst(1, NO_ERROR)
        client.send(headers_frame(3, request()))
        assert (await client.response(3)).body == b"ok"


async def test_a_request_of_no_length_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """content-length: 0 without END_STREAM: until it ends, what follows could make it another request."""
    monkeypatch.setattr(f"{DOWNSTREAM}.HEADERS_TIMEOUT_S", SHORT_S)
    async with proxy() as (live, port), Http2Client(port) as client:
        await client.handshake()
        client.send(headers_frame(1, request("/", (b"content-length", b"0"), method="POST"), end_stream=False))
        await client.expect_rst(1, {CANCEL, PROTOCOL_ERROR})
        assert live.open_upstreams() == 0


async def test_an_idle_connection_is_closed_though_it_pings() -> None:
    async with proxy(idle_timeout_s=SHORT_S) as (_, port), Http2Client(port) as client:
        await client.handshake()
        client.send(headers_frame(1, request()))
        await client.response(1)
        rested = asyncio.get_running_loop().time()
        await trickle(client, 5 * (ping_frame() + window_frame(0, 1)), 0.02)
        await client.expect_goaway(NO_ERROR)
        assert asyncio.get_running_loop().time() - rested < SHORT_S + 0.5


async def test_a_connection_is_idle_from_the_end_of_its_last_answer() -> None:
    async with proxy(idle_timeout_s=SHORT_S) as (_, port), Http2Client(port, {INITIAL_WINDOW_SIZE: 0}) as client:
        await client.handshake()
        client.send(headers_frame(1, request()))
        await asyncio.sleep(2 * SHORT_S)  # a span in which nothing must happen
        client.send(window_frame(1, 65535))
        assert (await client.response(1)).body == b"ok"
        answered = asyncio.get_running_loop().time()
        await client.expect_goaway(NO_ERROR)
        assert asyncio.get_running_loop().time() - answered > SHORT_S / 2


async def test_a_client_that_ignores_its_goaway_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its half of the connection open, and goes on sending."""
    monkeypatch.setattr(f"{DOWNSTREAM}.LINGER_S", SHORT_S)
    async with proxy() as (live, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(PREFACE + settings_frame() + data_frame(0))
            await until(lambda: live.open_downstreams() == 1)
            async with asyncio.timeout(SHORT_S + 1.0):
                while live.open_downstreams():
                    writer.write(ping_frame())
                    await asyncio.sleep(0.02)
        finally:
            writer.transport.abort()


async def test_a_client_that_reads_no_more_is_cut_when_all_it_asked_for_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(f"{DOWNSTREAM}.FLUSH_TIMEOUT_S", SHORT_S)
    everything = window_frame(0, 2**31 - 1 - 65535), *(headers_frame(i, request("/big")) for i in range(1, 201, 2))
    async with (
        proxy(idle_timeout_s=SHORT_S) as (live, port),
        Http2Client(port, {INITIAL_WINDOW_SIZE: 2**31 - 1}) as client,
    ):
        await client.handshake()
        client.transport.pause_reading()
        client.send(*everything)
        await until(lambda: live.buffered() > 0)
        await until(lambda: live.open_downstreams() == 0)


async def test_a_second_connection_does_not_wait_for_a_slow_one() -> None:
    async with (
        proxy() as (_, port),
        Http2Client(port, {INITIAL_WINDOW_SIZE: 2**31 - 1}) as slow,
        Http2Client(port) as other,
    ):
        await slow.handshake()
        slow.transport.pause_reading()
        slow.send(window_frame(0, 2**31 - 1 - 65535), *(headers_frame(i, request("/big")) for i in range(1, 201, 2)))
        await other.handshake()
        other.send(headers_frame(1, request()))
        assert (await other.response(1)).body == b"ok"
        assert not [frame for frame in other.frames if isinstance(frame, h2f.GoAwayFrame)]


@pytest.mark.parametrize("retries", [0, 2], ids=["kept_for_one_attempt", "kept_for_several"])
async def test_a_body_of_single_bytes_for_an_upstream_that_does_not_answer_costs_a_frame_each(retries: int) -> None:
    """All of a window, 64 KiB, each byte in a frame of its own, while the connection is still being made."""
    with Blackhole() as upstream:
        async with LiveWorker() as live:
            key = live.cluster([("127.0.0.1", upstream.port)], connect_timeout_s=30.0)
            clusters = (WeightedCluster(cluster_key=key),)
            retry = RetryPolicy(attempts=retries) if retries else None
            async with Http2Client(live.listen(key, routes=(Route(clusters=clusters, retry=retry),))) as client:
                await client.handshake()
                ((connection,),) = [listener.runtime.connections for listener in live.worker.listeners.values()]
                connection.data_received(headers_frame(1, request(method="POST"), end_stream=False))
                single = data_frame(1, b"x", False) * 1024
                began = process_time()
                for _ in range(64):
                    connection.data_received(single)
                assert process_time() - began < 3.0
                assert connection.streams[1].http.waiting_bytes() == 64 * 1024
