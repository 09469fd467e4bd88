"""A hostile HTTP/2 upstream: the downstream gets an honest answer, other streams what RFC 9113 owes them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.hostile.http2_responses import CLOSES, CONNECTION_ERRORS, CUT, STREAM_ERRORS, Case
from tests.support.client import Client, Cut, get
from tests.support.live_worker import LiveWorker, until
from tests.support.raw_http2_upstream import RawHttp2Connection, RawHttp2Upstream


@contextlib.asynccontextmanager
async def proxy() -> AsyncIterator[LiveWorker]:
    """A worker that no exception may leave."""
    escaped: list[dict[str, Any]] = []
    async with LiveWorker() as live:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
        yield live
    assert not escaped, f"an exception left the proxy: {escaped}"


def listen(live: LiveWorker, upstream: RawHttp2Upstream, **cluster: Any) -> int:
    return live.listen(live.cluster([("127.0.0.1", upstream.port)], speaks_http2=True, **cluster))


def words(live: LiveWorker) -> dict[str, int]:
    return dict(live.worker.state.counters.protocol_errors)


async def outcome(client: Client) -> int:
    """The status of an answer that is an error; CUT for one of 200 that is cut."""
    try:
        answer = await client.answer()
    except Cut:
        return CUT
    assert answer.status >= 500, answer
    assert b"hello" not in answer.body
    return answer.status


def answers(case: Case) -> RawHttp2Upstream:
    """/stays waits, on stream 1; /bad gets the case, on stream 3; others are answered."""

    def on_request(connection: RawHttp2Connection, stream_id: int, path: bytes) -> None:
        if path == b"/bad":
            assert stream_id == 3
            connection.send(case.sent)
        elif path != b"/stays":
            connection.answer(stream_id)

    return RawHttp2Upstream(on_request)


@pytest.mark.parametrize("case", STREAM_ERRORS, ids=[case.name for case in STREAM_ERRORS])
async def test_what_breaks_one_stream_leaves_the_others(case: Case) -> None:
    async with answers(case) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Client(port) as stays, Client(port) as bad, Client(port) as next_one:
            stays.send(get("/stays"))
            await until(lambda: bool(upstream.connections and upstream.connections[0].requests))
            bad.send(get("/bad"))
            assert await outcome(bad) == case.status
            (connection,) = upstream.connections
            connection.answer(1, b"stayed")
            assert (await stays.answer()).body == b"stayed"
            assert (await next_one.ask(get("/next"))).body == b"ok"
            assert len(upstream.connections) == 1
            if case.word:
                await until(lambda: 3 in connection.resets)
            assert words(live) == ({f"http2.{case.word}": 1} if case.word else {})
            assert not connection.goaways


@pytest.mark.parametrize("case", CONNECTION_ERRORS, ids=[case.name for case in CONNECTION_ERRORS])
async def test_what_breaks_the_connection_ends_all_its_streams(case: Case) -> None:
    async with answers(case) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Client(port) as stays, Client(port) as bad, Client(port) as next_one:
            stays.send(get("/stays"))
            await until(lambda: bool(upstream.connections and upstream.connections[0].requests))
            bad.send(get("/bad"))
            assert await outcome(bad) == case.status
            assert await outcome(stays) in (502, 503)
            connection = upstream.connections[0]
            await until(lambda: connection.is_closed)
            assert (await next_one.ask(get("/next"))).body == b"ok"
            assert len(upstream.connections) == 2
            assert words(live) == {f"http2.{case.word}": 1}
            assert live.clusters()[0].counters.upstream_cx_protocol_error == 1
            assert live.open_upstreams() == 1


@pytest.mark.parametrize("case", CLOSES, ids=[case.name for case in CLOSES])
async def test_a_connection_that_closes_in_the_middle_never_looks_whole(case: Case) -> None:
    async with answers(case) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Client(port) as stays, Client(port) as bad, Client(port) as next_one:
            stays.send(get("/stays"))
            await until(lambda: bool(upstream.connections and upstream.connections[0].requests))
            bad.send(get("/bad"))
            connection = upstream.connections[0]
            await until(lambda: 3 in connection.requests)
            connection.transport.close()
            assert await outcome(bad) == case.status
            assert await outcome(stays) == 503
            assert (await next_one.ask(get("/next"))).body == b"ok"
            assert live.open_upstreams() == 1
