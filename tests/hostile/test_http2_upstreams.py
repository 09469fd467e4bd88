"""A hostile HTTP/2 upstream: the downstream gets an honest answer, other streams what RFC 9113 owes them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from meshproxy.upstream import connection_h2
from tests.hostile.http2_responses import CLOSES, CONNECTION_ERRORS, CUT, STREAM_ERRORS, Case
from tests.support.client import Client, Cut, get, post
from tests.support.http2_client import (
    ENABLE_PUSH,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    REFUSED_STREAM,
    SETTINGS_TIMEOUT,
    goaway_frame,
    rst_frame,
    settings_frame,
)
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


# ── settings ──


async def test_an_upstream_that_does_not_begin_with_settings_is_502() -> None:
    async with RawHttp2Upstream(opening=b"") as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        client.send(get())
        assert await outcome(client) == 502
        assert words(live) == {"http2.settings_expected": 1}


async def test_an_upstream_that_never_says_anything_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_h2, "SETTINGS_TIMEOUT_S", 0.2)
    async with RawHttp2Upstream(lambda *_: None, opening=b"") as upstream, proxy() as live:
        async with Client(listen(live, upstream)) as client:
            client.send(get())
            assert await outcome(client) == 502
            assert words(live) == {"http2.settings_timeout": 1}
            (goaway,) = upstream.connections[0].goaways
            assert goaway.error_code == SETTINGS_TIMEOUT


@pytest.mark.parametrize(
    "settings",
    [
        {HEADER_TABLE_SIZE: 0},
        {HEADER_TABLE_SIZE: 2**32 - 1},
        {ENABLE_PUSH: 0},
        {MAX_CONCURRENT_STREAMS: 1},
        {MAX_CONCURRENT_STREAMS: 2**32 - 1},
        {INITIAL_WINDOW_SIZE: 2**31 - 1},
        {MAX_FRAME_SIZE: 2**24 - 1},
        {MAX_HEADER_LIST_SIZE: 0},
        {0: 1, 0xFFFF: 2**32 - 1},
    ],
    ids=str,
)
async def test_settings_that_are_odd_but_legal_are_obeyed(settings: dict[int, int]) -> None:
    async with RawHttp2Upstream(opening=settings_frame(settings)) as upstream, proxy() as live:
        port = listen(live, upstream)
        for number in range(5):
            async with Client(port) as client:
                answer = await client.ask(get(f"/{number}", "x-mine: yes") if number % 2 else post(b"a" * 100))
                assert (answer.status, answer.body) == (200, b"ok")
        assert len(upstream.connections) == 1
        assert words(live) == {}


async def test_an_upstream_that_allows_no_streams_ends_in_an_error() -> None:
    def refuse(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        connection.send(rst_frame(stream_id, REFUSED_STREAM))

    async with (
        RawHttp2Upstream(refuse, opening=settings_frame({MAX_CONCURRENT_STREAMS: 0})) as upstream,
        proxy() as live,
    ):
        async with Client(listen(live, upstream)) as client:
            client.send(get())
            assert await outcome(client) == 503
        assert len(upstream.connections) < 10
        await until(lambda: live.open_upstreams() == 0)


# ── requests that are sent again, and those that are not ──


@pytest.mark.parametrize("asked", [get(), post(b"")], ids=["GET", "POST"])
async def test_a_stream_refused_again_and_again_ends_in_an_error(asked: bytes) -> None:
    sent = 0

    def refuse(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        nonlocal sent
        sent += 1
        connection.send(rst_frame(stream_id, REFUSED_STREAM))

    async with RawHttp2Upstream(refuse) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        client.send(asked)
        assert await outcome(client) == 503
        assert sent < 10


@pytest.mark.parametrize("code", [code for code in range(14) if code != REFUSED_STREAM])
async def test_a_stream_that_may_have_been_looked_at_is_not_asked_again(code: int) -> None:
    sent = 0

    def reset(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        nonlocal sent
        sent += 1
        connection.send(rst_frame(stream_id, code))

    async with RawHttp2Upstream(reset) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        for asked in (get(), post(b"")):
            client.send(asked)
            assert await outcome(client) == 503
        assert sent == 2


@pytest.mark.parametrize("code", [0, 2, 11])
@pytest.mark.parametrize("last_id", [0, 1, 2, 3, 4, 5, 7, 2**31 - 1])
async def test_goaway_sends_what_is_above_it_elsewhere_and_nothing_else(last_id: int, code: int) -> None:
    """Three requests wait, on streams 1, 3 and 5. Those up to last_id are answered where they are."""

    def on_request(connection: RawHttp2Connection, stream_id: int, path: bytes) -> None:
        if connection is not upstream.connections[0]:
            connection.answer(stream_id, b"again " + path)

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Client(port) as one, Client(port) as two, Client(port) as three, Client(port) as next_one:
            for stream_id, client in ((1, one), (3, two), (5, three)):
                client.send(post(b"", path=f"/{stream_id}"))
                await until(lambda: bool(upstream.connections))
                await until(partial(upstream.connections[0].has_request, stream_id))
            old = upstream.connections[0]
            old.send(goaway_frame(last_id, code))
            assert (await next_one.ask(get("/next"))).body == b"again /next"
            for stream_id in (1, 3, 5):
                if stream_id <= last_id:
                    old.answer(stream_id, b"first /%d" % stream_id)
            for stream_id, client in ((1, one), (3, two), (5, three)):
                expected = b"first" if stream_id <= last_id else b"again"
                assert (await client.answer()).body == b"%b /%d" % (expected, stream_id)
            await until(lambda: old.is_closed)
            assert len(upstream.connections) == 2
            assert words(live) == {}
