"""What is tried again, how often, with which body; and what is re-sent without being a retry."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from meshproxy.model.cluster import CircuitLimits, RetryBudget
from meshproxy.model.route import RetryPolicy, Route, WeightedCluster
from tests.support.client import CHUNKED, Client, get, post
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin, Seen
from tests.support.raw_server import RawServer, Serve, reset, script, unused_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BAD = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nbad"


def retrying(cluster: str, *words: str, attempts: int = 2, timeout_s: float | None = None, **fields: object) -> Route:
    fields.setdefault("base_interval_s", 0.0)
    policy = RetryPolicy(attempts=attempts, on=frozenset(words), **fields)  # type: ignore[arg-type]
    return Route(clusters=(WeightedCluster(cluster_key=cluster),), retry=policy, timeout_s=timeout_s)


def first(*answers: bytes, then: bytes = OK) -> Callable[[Seen], bytes]:
    left: Iterator[bytes] = iter(answers)
    return lambda seen: next(left, then)


# ── by status ──


@pytest.mark.parametrize(
    ("words", "status", "is_retried"),
    [
        (("5xx",), 500, True),
        (("5xx",), 404, False),
        (("gateway-error",), 502, True),
        (("gateway-error",), 504, True),
        (("gateway-error",), 500, False),
        (("retriable-4xx",), 409, True),
        (("retriable-4xx",), 404, False),
        (("connect-failure", "reset"), 503, False),
    ],
)
async def test_a_status_is_retried_by_the_word_that_names_it(
    words: tuple[str, ...], status: int, is_retried: bool
) -> None:
    async with Origin(first(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, *words),))) as client:
            answer = await client.ask(get())
        assert answer.status == (200 if is_retried else status)
        assert len(origin.requests) == (2 if is_retried else 1)


async def test_listed_status_codes_are_retried() -> None:
    async with Origin(first(b"HTTP/1.1 418 X\r\nContent-Length: 0\r\n\r\n")) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        route = retrying(cluster, "retriable-status-codes", status_codes=frozenset({418}))
        async with Client(live.listen(cluster, routes=(route,))) as client:
            assert (await client.ask(get())).status == 200


async def test_the_last_attempts_answer_is_given_and_flagged() -> None:
    async with Origin(lambda seen: BAD) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "5xx"),))) as client:
            answer = await client.ask(get())
        assert (answer.status, answer.body) == (503, b"bad")
        assert [seen.header(b"x-envoy-attempt-count") for seen in origin.requests] == [b"1", b"2", b"3"]
        assert len({seen.header(b"x-request-id") for seen in origin.requests}) == 1
        assert live.requests(response_code="503", response_flags="URX") == 1


async def test_zero_attempts_turn_retrying_off() -> None:
    async with Origin(lambda seen: BAD) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "5xx", attempts=0),))) as client:
            assert (await client.ask(get())).status == 503
        assert len(origin.requests) == 1
        assert live.requests(response_code="503", response_flags="-") == 1


async def test_a_large_answer_that_is_retried_leaves_nothing_behind() -> None:
    bad = b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 65536 + b"\r\n0\r\n\r\n"
    async with Origin(first(bad)) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "5xx"),))) as client:
            assert (await client.ask(get())).body == b"ok"


async def test_a_retry_goes_to_an_endpoint_that_was_not_tried() -> None:
    async with Origin(lambda seen: BAD) as bad, Origin() as good, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", bad.port), ("127.0.0.1", good.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "5xx", attempts=1),))) as client:
            for _ in range(10):
                assert (await client.ask(get())).status == 200
        assert len(good.requests) == 10


# ── by what became of the connection ──


async def test_connect_failure_is_retried_at_the_next_endpoint() -> None:
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", unused_port()), ("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "connect-failure"),))) as client:
            for _ in range(6):
                assert (await client.ask(post(b"body"))).status == 200
        assert [seen.body for seen in origin.requests] == [b"body"] * 6


async def test_connect_failure_without_the_word_is_an_answer_of_ours() -> None:
    async with LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", unused_port())])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "retriable-4xx"),))) as client:
            answer = await client.ask(get())
        assert (answer.status, answer.body[:30]) == (503, b"upstream connect error or disc")
        assert live.requests(response_code="503", response_flags="UF") == 1


@pytest.mark.parametrize(
    ("word", "status"), [("reset", 200), ("5xx", 200), ("connect-failure", 503), ("retriable-4xx", 503)]
)
async def test_a_reset_before_the_answer(word: str, status: int) -> None:
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await reader.readuntil(b"\r\n\r\n")
        if count == 1:
            await reset(writer)
        else:
            writer.write(OK)
            await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, word),))) as client:
            assert (await client.ask(get(method="POST"))).status == status
        assert upstream.connections == (2 if status == 200 else 1)


async def test_an_answer_that_has_begun_is_never_retried() -> None:
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
    async with RawServer(script(half, closes=True)) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "5xx", "reset"),))) as client:
            client.send(get())
            await client.reader.readuntil(b"half")
            assert await client.ended() == "reset"
        assert upstream.connections == 1


async def test_a_kept_connection_that_closes_under_an_idempotent_request_is_replaced_silently() -> None:
    """The upstream closes just as the next request is written: no failure of its, and no retry of the operator's."""
    async with RawServer(_one_then_close(OK)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            for _ in range(5):
                assert (await client.ask(get())).status == 200
        assert upstream.connections == 5
        assert live.requests(response_code="200", response_flags="-") == 5


def _one_then_close(answer: bytes) -> Serve:
    """Answers one request on each connection, reads the head of the next and closes without a word."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.readuntil(b"\r\n\r\n")

    return serve


async def test_a_kept_connection_that_closes_under_a_post_is_the_downstreams_to_judge() -> None:
    async with RawServer(_one_then_close(OK)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            assert (await client.ask(post(b""))).status == 200
            assert (await client.ask(post(b""))).status == 503
        assert upstream.connections == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_silent_second_sending_brings_its_body(framing: str) -> None:
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            if number == 1:
                return
            end = await reader.readuntil(b"0\r\n\r\n") if b"chunked" in head else await reader.readexactly(4)
            bodies.append(end)
            writer.write(OK)

    data = (
        post(b"body", method="PUT")
        if framing == "length"
        else get("/", CHUNKED, method="PUT") + b"4\r\nbody\r\n0\r\n\r\n"
    )
    async with RawServer(serve) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "connect-failure"),))) as client:
            for _ in range(3):
                assert (await client.ask(data)).status == 200
        assert len(bodies) == 3 and len(set(bodies)) == 1


# ── bodies ──


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(1, 200), (60_000, 200), (70_000, 503), (500_000, 503)])
async def test_a_body_is_replayed_whole_or_not_at_all(size: int, status: int, chunked: bool) -> None:
    body = bytes(range(250)) * (size // 250) + b"y" * (size % 250)
    data = post(body) if not chunked else get("/", CHUNKED, method="POST") + b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    async with Origin(first(BAD)) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "5xx"),))) as client:
            assert (await client.ask(data)).status == status
        assert [seen.body == body for seen in origin.requests] == [True] * (2 if status == 200 else 1)
        assert origin.errors == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("rest", [1000, 200_000])
async def test_a_body_that_arrives_between_two_attempts_is_whole_at_the_second(rest: int, chunked: bool) -> None:
    """The first attempt is refused with part of the body sent; the rest comes while the second is still to begin."""
    bodies: list[bytes] = []
    parts = [b"a" * 10_000, b"b" * rest]
    refused = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if not refused.is_set():
            await reader.readexactly(5000)
            writer.write(BAD)
            refused.set()
            await reader.read()
            return
        body = b""
        if chunked:
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(sum(map(len, parts)))
        bodies.append(body)
        writer.write(OK)
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        live.worker.state.draw = lambda: 1.0
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        async with Client(live.listen(cluster, routes=(retrying(cluster, "5xx", base_interval_s=0.15),))) as client:
            framing = CHUNKED if chunked else f"Content-Length: {sum(map(len, parts))}"
            client.send(get("/", framing, method="POST"))
            for part in parts:
                client.send(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                await refused.wait()
                await until(lambda: live.open_upstreams() == 0)
            if chunked:
                client.send(b"0\r\n\r\n")
            assert (await client.answer()).status == 200
        assert bodies == [b"".join(parts)]


async def test_a_body_that_arrives_while_the_first_connection_is_made_is_sent_once() -> None:
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        port = live.listen(cluster, routes=(retrying(cluster, "5xx"),))
        for size in (10, 65536, 300_000):
            async with Client(port) as client:
                for endpoint in live.endpoints():
                    endpoint.close_idle()
                assert (await client.ask(post(b"x" * size))).status == 200
        assert [len(seen.body) for seen in origin.requests] == [10, 65536, 300_000]


# ── how many ──


@pytest.mark.parametrize(
    "limits", [CircuitLimits(max_retries=1), CircuitLimits(retry_budget=RetryBudget(percent=0.0, min_concurrency=1))]
)
async def test_retries_under_way_at_once_are_limited(limits: CircuitLimits) -> None:
    """A retry counts from its decision to its answer, not only while it waits."""
    release = asyncio.Event()
    attempts = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            attempts += 1
            if b"attempt-count: 2" in head:
                await release.wait()
                writer.write(OK)
            else:
                writer.write(BAD)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)], limits=limits)
        port = live.listen(cluster, routes=(retrying(cluster, "5xx"),))
        async with Client(port) as held, Client(port) as refused:
            held.send(get())
            await until(lambda: attempts == 2)
            assert (await refused.ask(get())).status == 503
            release.set()
            assert (await held.answer()).status == 200
            assert (await refused.ask(get())).status == 200
        (runtime,) = live.clusters()
        assert runtime.retries == 0
        assert runtime.counters.upstream_rq_retry_overflow == 1


async def test_a_downstream_that_leaves_during_the_back_off_gives_its_place_back() -> None:
    async with Origin(lambda seen: BAD) as origin, LiveWorker() as live:
        live.worker.state.draw = lambda: 1.0
        cluster = live.cluster([("127.0.0.1", origin.port)])
        route = retrying(cluster, "5xx", base_interval_s=30.0, max_interval_s=30.0)
        async with Client(live.listen(cluster, routes=(route,))) as client:
            client.send(get())
            await until(lambda: bool(origin.requests))
            (runtime,) = live.clusters()
            await until(lambda: runtime.retries == 1)
            await reset(client.writer)
        await until(lambda: runtime.retries == 0)
        assert runtime.active_requests == 0


# ── time ──


async def test_a_try_that_takes_too_long_is_replaced() -> None:
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await reader.readuntil(b"\r\n\r\n")
        if count > 1:
            writer.write(OK)
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        route = retrying(cluster, "5xx", per_try_timeout_s=0.1)
        async with Client(live.listen(cluster, routes=(route,))) as client:
            assert (await client.ask(post(b"again"))).status == 200
        assert upstream.connections == 2


async def test_the_routes_timeout_includes_the_retries() -> None:
    async with RawServer(script()) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        route = retrying(cluster, "5xx", attempts=50, per_try_timeout_s=0.1, timeout_s=0.35)
        async with Client(live.listen(cluster, routes=(route,))) as client:
            answer = await client.ask(get())
            assert (answer.status, answer.body) == (504, b"upstream request timeout")
        assert 2 <= upstream.connections <= 5
