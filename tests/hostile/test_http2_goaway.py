"""The end of an HTTP/2 connection loses no request: each is answered, or known not to be begun (RFC 9113 §6.8)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import hyperframe.frame as h2f
import pytest

from meshproxy.control import messages as m
from tests.faults.traffic import Record, note
from tests.support.http2_client import (
    INITIAL_WINDOW_SIZE,
    NO_ERROR,
    Http2Client,
    Stream,
    goaway_frame,
    headers_frame,
    request,
    window_frame,
)
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.raw_server import RawServer

ALL = 2**31 - 1


def goaways(client: Http2Client) -> list[tuple[int, int]]:
    """(last stream id, error code) of each that came."""
    return [(f.last_stream_id, f.error_code) for f in client.frames if isinstance(f, h2f.GoAwayFrame)]


@asynccontextmanager
async def draining() -> AsyncIterator[tuple[LiveWorker, Http2Client, asyncio.Event]]:
    """A client with one request under way to a worker that drains; the event lets the upstream answer."""
    may_answer = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await may_answer.wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            await client.handshake()
            client.send(headers_frame(1, request()))
            await until(lambda: live.open_upstreams() == 1)
            live.worker.on_message(m.Drain(30.0, exits=False), None)
            await client.frame(h2f.GoAwayFrame)
            yield live, client, may_answer


async def test_requests_that_cross_the_first_goaway_are_served() -> None:
    async with draining() as (_, client, may_answer):
        assert goaways(client) == [(ALL, NO_ERROR)]
        client.send(*(headers_frame(i, request()) for i in (3, 5, 7)))
        await client.until(lambda: len(goaways(client)) == 2)  # its time runs out, for nobody answers its PING
        assert goaways(client)[1] == (7, NO_ERROR)
        may_answer.set()
        for i in (1, 3, 5, 7):
            assert (await client.response(i)).body == b"ok"
        assert await client.expect_closed() == "end"


async def test_a_request_after_the_last_goaway_is_not_begun_and_harms_no_other() -> None:
    async with draining() as (live, client, may_answer):
        ping = await client.frame(h2f.PingFrame)
        client.send(h2f.PingFrame(0, ping.opaque_data, flags=["ACK"]))
        await client.until(lambda: len(goaways(client)) == 2)
        assert goaways(client)[1] == (1, NO_ERROR)
        client.send(headers_frame(3, request()), headers_frame(5, request()))
        await client.expect_ping()
        assert live.open_upstreams() == 1
        may_answer.set()
        assert (await client.response(1)).body == b"ok"
        assert await client.expect_closed() == "end"
        assert not {3, 5} & set(client.streams)


async def test_a_goaway_of_the_client_lets_its_requests_end() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Http2Client(port, {INITIAL_WINDOW_SIZE: 0}) as client:
            await client.handshake()
            client.send(headers_frame(1, request()), goaway_frame())
            await until(lambda: len(origin.requests) == 1)
            client.send(window_frame(1, 2))
            assert (await client.response(1)).body == b"ok"
            assert await client.expect_closed() == "end"
        await until(lambda: live.open_downstreams() == 0)


@pytest.mark.parametrize("acks", [True, False], ids=["answers_ping", "does_not"])
async def test_no_request_is_lost_when_the_proxy_drains_under_load(acks: bool, record_property: Record) -> None:
    """Sixteen connections ask without pause: what is not answered is above the last id that they were told."""
    answered = refused = 0

    async def ask(port: int) -> None:
        nonlocal answered, refused
        async with Http2Client(port, acks=acks) as client:
            await client.handshake()
            stream_id = -1
            while len(goaways(client)) < 2 and not client.closed:
                first = stream_id + 2
                stream_id = first + 18
                client.send(*(headers_frame(i, request()) for i in range(first, stream_id + 2, 2)))
                streams = [client.streams.setdefault(i, Stream()) for i in range(first, stream_id + 2, 2)]
                await client.until(lambda streams=streams: client.closed or all(s.has_ended for s in streams))
            last_id = goaways(client)[-1][0]
            ended = {i for i, stream in client.streams.items() if stream.has_ended}
            assert {i for i in client.streams if 0 < i <= last_id} == ended
            answered += len(ended)
            refused += stream_id // 2 + 1 - len(ended)

    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        asking = [asyncio.create_task(ask(port)) for _ in range(16)]
        await until(lambda: len(origin.requests) > 1000)
        live.worker.on_message(m.Drain(30.0, exits=False), None)
        await asyncio.gather(*asking)
        await until(lambda: live.open_downstreams() == 0)
        note(record_property, "drain", answered=answered, refused=refused, lost=len(origin.requests) - answered)
        assert len(origin.requests) == answered
