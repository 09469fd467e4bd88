"""A hostile HTTP/2 upstream: the downstream gets an honest answer, other streams what RFC 9113 owes them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import hyperframe.frame as h2f
import pytest

from meshproxy.model.route import Route, WeightedCluster
from meshproxy.upstream import connection_h2
from tests.hostile.http2_responses import CLOSES, CONNECTION_ERRORS, CUT, STREAM_ERRORS, Case
from tests.support.client import Client, Cut, get, post
from tests.support.http2_client import (
    CANCEL,
    ENABLE_PUSH,
    FLOW_CONTROL_ERROR,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    INTERNAL_ERROR,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    NO_ERROR,
    REFUSED_STREAM,
    SETTINGS_TIMEOUT,
    Http2Client,
    data_frame,
    goaway_frame,
    headers_frame,
    ping_frame,
    request,
    rst_frame,
    settings_frame,
    window_frame,
)
from tests.support.live_worker import LiveWorker, exchange, until
from tests.support.raw_http2_upstream import RawHttp2Connection, RawHttp2Upstream, response


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


# ── windows ──


async def test_a_window_that_never_opens_costs_one_request_its_time() -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, path: bytes) -> None:
        if path != b"/waits":
            connection.answer(stream_id)

    opening = settings_frame({INITIAL_WINDOW_SIZE: 0})
    async with RawHttp2Upstream(on_request, opening=opening) as upstream, proxy() as live:
        key = live.cluster([("127.0.0.1", upstream.port)], speaks_http2=True)
        port = live.listen(key, routes=(Route(clusters=(WeightedCluster(cluster_key=key),), timeout_s=0.5),))
        async with Client(port) as waits, Client(port) as other:
            await other.ask(get("/other"))  # so that the window is known
            waits.send(post(b"a" * 1000, path="/waits"))
            assert (await other.ask(get("/other"))).body == b"ok"
            assert (await waits.answer()).status == 504
            (connection,) = upstream.connections
            await until(lambda: bool(connection.resets))
            assert not [frame for frame in connection.frames if isinstance(frame, h2f.DataFrame)]
            assert (await other.ask(get("/other"))).body == b"ok"
        assert live.endpoints()[0].active_requests == 0


async def test_a_window_that_shrinks_below_zero_stops_a_body_and_opens_again() -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, path: bytes) -> None:
        pass

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        client.send(post(b"a" * 100_000))

        def received() -> int:
            frames = upstream.connections[0].frames if upstream.connections else []
            return sum(len(frame.data) for frame in frames if isinstance(frame, h2f.DataFrame))

        await until(lambda: received() == 65_535)
        (connection,) = upstream.connections
        connection.send(window_frame(0, 100_000), settings_frame({INITIAL_WINDOW_SIZE: 0}), window_frame(1, 65_535))
        connection.send(ping_frame(b"emptied\0"))
        await until(lambda: any(isinstance(frame, h2f.PingFrame) for frame in connection.frames))
        assert received() == 65_535
        connection.send(window_frame(1, 34_465))
        await until(lambda: received() == 100_000)
        connection.answer(1)
        assert (await client.answer()).body == b"ok"


async def test_data_beyond_the_stream_window_breaks_that_stream_only() -> None:
    """The downstream reads nothing, so the window stays used up."""
    async with RawHttp2Upstream(lambda *_: None) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Client(port) as other, Http2Client(port, {INITIAL_WINDOW_SIZE: 0}, acks=True) as slow:
            other.send(get("/other"))
            await until(lambda: bool(upstream.connections) and upstream.connections[0].has_request(1))
            await slow.handshake()
            slow.send(headers_frame(1, request("/slow")))
            (connection,) = upstream.connections
            await until(lambda: connection.has_request(3))
            connection.send(response(3), *[data_frame(3, bytes(16_000), end_stream=False)] * 60)
            await until(lambda: 3 in connection.resets)
            assert connection.resets[3] == FLOW_CONTROL_ERROR
            assert words(live) == {"http2.stream_window_exceeded": 1}
            await slow.expect_rst(1, {INTERNAL_ERROR, CANCEL})
            assert live.buffered() < 1 << 20
            connection.answer(1)
            assert (await other.answer()).body == b"ok"


async def test_windows_of_many_streams_used_up_and_passed_break_those_streams_only() -> None:
    async with RawHttp2Upstream(lambda *_: None) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Http2Client(port, {INITIAL_WINDOW_SIZE: 0}, acks=True) as slow, Client(port) as other:
            await slow.handshake()
            slow.send(*[headers_frame(stream_id, request("/slow")) for stream_id in range(1, 41, 2)])
            await until(lambda: bool(upstream.connections) and len(upstream.connections[0].requests) == 20)
            (connection,) = upstream.connections
            for stream_id in range(1, 41, 2):
                connection.send(response(stream_id), *[data_frame(stream_id, bytes(16_000), end_stream=False)] * 60)
            await until(lambda: len(connection.resets) == 20)
            assert words(live) == {"http2.stream_window_exceeded": 20}
            assert live.buffered() < 8 << 20
            other.send(get("/other"))
            await until(lambda: connection.has_request(41))
            connection.answer(41)
            assert (await other.answer()).body == b"ok"


# ── what comes for requests that are gone ──


async def test_an_answer_to_a_request_that_left_is_not_anyone_elses() -> None:
    """More than a window of them, so that it is seen that theirs is given back."""
    async with RawHttp2Upstream(lambda *_: None) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Http2Client(port, acks=True) as client:
            await client.handshake()
            for stream_id in range(1, 41, 2):
                client.send(headers_frame(stream_id, request("/leaves")))
                await until(lambda: bool(upstream.connections))
                (connection,) = upstream.connections
                await until(partial(connection.has_request, stream_id))
                client.send(rst_frame(stream_id))
                await until(partial(connection.has_reset, stream_id))
                connection.send(response(stream_id), *[data_frame(stream_id, b"evil" * 4000, end_stream=False)] * 6)
            client.send(headers_frame(41, request("/stays")))
            await until(lambda: connection.has_request(41))
            connection.send(response(41), data_frame(41, b"mine"))
            assert (await client.response(41)).body == b"mine"
            assert words(live) == {}


async def test_a_thousand_103_end_their_request_and_the_flood_its_connection() -> None:
    async with RawHttp2Upstream(lambda *_: None) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        client.send(get())
        await until(lambda: bool(upstream.connections) and upstream.connections[0].has_request(1))
        upstream.connections[0].send(response(1, status=b"103") * 1000)
        assert await outcome(client) == 502
        await until(lambda: upstream.connections[0].is_closed)
        assert words(live) == {"http2.too_many_informational": 1, "http2.flood": 1}


async def test_streams_broken_one_after_another_end_the_connection() -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        connection.send(headers_frame(stream_id, [(b":status", b"no")]))

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        for _ in range(250):
            client.send(get())
            assert await outcome(client) == 502
        assert len(upstream.connections) == 2
        assert words(live)["http2.too_many_stream_errors"] == 1


async def test_a_malformed_block_still_counts_for_the_table() -> None:
    """What it put into the HPACK table is what later blocks refer to."""

    def on_request(connection: RawHttp2Connection, stream_id: int, path: bytes) -> None:
        if path == b"/bad":
            connection.send(
                headers_frame(stream_id, b"\x40\x01a\x03one\x40\x01B\x01x")
            )  # no status, and an upper-case name
        else:
            connection.send(headers_frame(stream_id, b"\x88\xbf"))  # :status 200, the entry before the last

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        for _ in range(3):
            client.send(get("/bad"))
            assert await outcome(client) == 502
            answer = await client.ask(get("/good"))
            assert (answer.status, answer.header(b"a")) == (200, b"one")
        assert len(upstream.connections) == 1


# ── answers before their time ──


@pytest.mark.parametrize("reset", [b"", rst_frame(1, NO_ERROR), rst_frame(1, CANCEL)], ids=["", "NO_ERROR", "CANCEL"])
async def test_an_answer_that_ends_before_its_request_is_passed_on_whole(reset: bytes) -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        connection.send(response(stream_id, status=b"413"), data_frame(stream_id, b"too large"))
        if stream_id == 1:
            connection.send(reset)

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live:
        port = listen(live, upstream)
        async with Client(port) as client, Client(port) as other:
            client.send(post(b"")[:-5] + b"1000000\r\n\r\n" + b"a" * 1000)
            answer = await client.answer()
            assert (answer.status, answer.body) == (413, b"too large")
            await until(lambda: bool(reset) or upstream.connections[0].has_reset(1))
            assert (await other.ask(post(b"a"))).status == 413
        assert len(upstream.connections) == 1
        assert words(live) == {}


async def test_thousands_of_early_answers_are_no_flood() -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        connection.send(response(stream_id, status=b"403", end_stream=True), rst_frame(stream_id, NO_ERROR))

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live:
        async with Http2Client(listen(live, upstream), acks=True) as client:
            await client.handshake()
            for first in range(1, 2001, 100):
                ids = range(first, first + 100, 2)
                client.send(*[headers_frame(i, request(method="POST"), end_stream=False) for i in ids])
                for stream_id in ids:
                    assert (await client.response(stream_id)).status == 403
                client.send(*[data_frame(i) for i in ids])
        assert len(upstream.connections) == 1
        assert words(live) == {}


# ── towards HTTP/1.1 ──


@pytest.mark.parametrize("name", [b"x", b"set-cookie", b"location", b"trailer", b"content-type"])
@pytest.mark.parametrize(
    "split", [b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\nevil", b"\n\nevil", b"\r\revil", b"\x00\r\nevil: 1", b"\n evil"]
)
async def test_no_field_splits_an_answer(name: bytes, split: bytes) -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        connection.send(response(stream_id, (name, b"a" + split), end_stream=True))

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live:
        answer = await exchange(listen(live, upstream), get() + get())
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert answer.count(b"HTTP/1.1 ") == 2
        assert b"evil" not in answer


async def test_a_body_that_looks_like_an_answer_is_a_body() -> None:
    evil = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

    def on_request(connection: RawHttp2Connection, stream_id: int, path: bytes) -> None:
        fields = [(b"content-length", b"%d" % len(evil))] if path == b"/length" else []
        connection.send(response(stream_id, *fields), data_frame(stream_id, evil))

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        for path in ("/length", "/none"):
            assert (await client.ask(get(path))).body == evil


@pytest.mark.parametrize("status", [b"204", b"304"])
async def test_a_body_where_none_may_be_does_not_become_the_next_answer(status: bytes) -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, path: bytes) -> None:
        if path == b"/good":
            connection.answer(stream_id)
        else:
            evil = data_frame(stream_id, b"HTTP/1.1 200 OK\r\nX: evil\r\n\r\n")
            connection.send(response(stream_id, status=b"200" if path == b"/head" else status), evil)

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live:
        port = listen(live, upstream)
        assert b"evil" not in await exchange(port, get("/bad") + get("/good"))
        assert b"evil" not in await exchange(port, get("/head", method="HEAD") + get("/good"))
        assert words(live) == {"http2.content_length_mismatch": 2}


# ── towards HTTP/2 ──

CUTS = [case for case in (*STREAM_ERRORS, *CONNECTION_ERRORS) if case.status == CUT]


@pytest.mark.parametrize("case", CUTS, ids=[case.name for case in CUTS])
async def test_an_answer_that_breaks_off_is_reset_towards_http2(case: Case) -> None:
    async with answers(case) as upstream, proxy() as live:
        async with Http2Client(listen(live, upstream), acks=True) as client:
            await client.handshake()
            client.send(headers_frame(1, request("/stays")))
            await until(lambda: bool(upstream.connections and upstream.connections[0].requests))
            client.send(headers_frame(3, request("/bad")))
            await client.expect_rst(3, {INTERNAL_ERROR, CANCEL})
            assert not client.streams[3].has_ended
            client.send(headers_frame(5, request("/next")))
            assert (await client.response(5)).body == b"ok"


async def test_goaway_before_every_answer_ends_in_an_error() -> None:
    def on_request(connection: RawHttp2Connection, stream_id: int, _: bytes) -> None:
        connection.send(goaway_frame(0))

    async with RawHttp2Upstream(on_request) as upstream, proxy() as live, Client(listen(live, upstream)) as client:
        client.send(get())
        assert await outcome(client) == 503
        assert len(upstream.connections) < 10
        await until(lambda: live.open_upstreams() == 0)
