"""Deadlines and limits: each ends in the answer that Envoy gives, and leaves nothing behind."""

import asyncio
import ssl
from pathlib import Path

import pytest

from meshproxy.model.cluster import CircuitLimits, TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from meshproxy.model.route import DirectResponse, MatchKind, Route, RouteMatch, StringMatch, WeightedCluster
from tests.support.certificates import Authority
from tests.support.client import Client, get, post
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.raw_server import Blackhole, RawServer, Serve, reset, script, unused_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def held(release: asyncio.Event) -> Serve:
    """Answers every request once `release` is set."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await release.wait()
            writer.write(OK)

    return serve


def route_to(cluster: str, **fields: object) -> tuple[Route, ...]:
    return (Route(clusters=(WeightedCluster(cluster_key=cluster),), **fields),)  # type: ignore[arg-type]


def nothing_under_way(live: LiveWorker) -> None:
    for cluster in live.clusters():
        assert cluster.active_requests == cluster.retries == len(cluster.pending) == len(cluster.connecting) == 0
        assert cluster.connections == sum(len(endpoint.connections) for endpoint in cluster.endpoints.values())
        assert all(endpoint.active_requests == 0 for endpoint in cluster.endpoints.values())


# ── downstream deadlines ──


async def test_a_head_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.downstream_h1.REQUEST_HEADERS_TIMEOUT_S", 0.2)
    async with LiveWorker() as live, Client(live.listen("none")) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n")
        for _ in range(8):  # drop by drop does not help
            client.send(b"X: y\r\n")
            await asyncio.sleep(0.02)
        answer = await client.answer()
        assert (answer.status, answer.header(b"connection")) == (408, b"close")
        assert await client.ended() in ("end", "reset")


async def test_a_second_head_has_its_own_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.downstream_h1.REQUEST_HEADERS_TIMEOUT_S", 0.2)
    async with Origin() as origin, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            client.send(get() + b"GET / HT")
            assert (await client.answer()).status == 200
            assert (await client.answer()).status == 408


async def test_an_idle_downstream_is_closed_without_a_word() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]), idle_timeout_s=0.2)
        async with Client(port) as silent, Client(port) as client:
            assert (await client.ask(get())).status == 200
            assert await client.ended() == "end"
            assert await silent.ended() == "end"
        await until(lambda: live.open_downstreams() == 0)


async def test_an_idle_upstream_connection_is_closed() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)], idle_timeout_s=0.1))
        async with Client(port) as client:
            assert (await client.ask(get())).status == 200
            assert live.pooled() == 1
            await until(lambda: live.open_upstreams() == 0)
            assert (await client.ask(get())).status == 200
        assert origin.connections == 2


async def test_a_downstream_that_connects_and_says_nothing_is_closed_in_the_end() -> None:
    async with LiveWorker() as live, Client(live.listen("none", idle_timeout_s=0.1)) as client:
        assert await client.ended() == "end"


# ── request deadlines ──


async def test_the_routes_timeout_gives_504() -> None:
    async with RawServer(held(asyncio.Event())) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        async with Client(live.listen(cluster, routes=route_to(cluster, timeout_s=0.15))) as client:
            answer = await client.ask(get())
            assert (answer.status, answer.body) == (504, b"upstream request timeout")
            assert live.requests(response_code="504", response_flags="UT") == 1
            await until(lambda: live.open_upstreams() == 0)  # an answer that comes late must not be another's
            nothing_under_way(live)
            assert (await client.ask(get())).status == 504  # the downstream's connection is in order


async def test_the_routes_timeout_cuts_an_answer_that_has_begun() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"
    async with RawServer(script(start)) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)])
        async with Client(live.listen(cluster, routes=route_to(cluster, timeout_s=0.15))) as client:
            client.send(get())
            await client.reader.readuntil(b"some")
            assert await client.ended() == "reset"
        assert live.requests(response_code="200", response_flags="UT") == 1
        nothing_under_way(live)


async def test_a_stream_without_traffic_gives_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", 0.15)
    async with RawServer(held(asyncio.Event())) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            answer = await client.ask(get())
            assert (answer.status, answer.body) == (408, b"stream timeout")
        assert live.requests(response_code="408", response_flags="SI") == 1


async def test_an_upload_that_stops_gives_408_and_its_connections_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", 0.15)
    async with RawServer(script()) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            client.send(get("/", "Content-Length: 100", method="POST") + b"some")
            answer = await client.answer()
            assert (answer.status, answer.header(b"connection")) == (408, b"close")
        await until(lambda: live.open_upstreams() == 0)


async def test_traffic_keeps_a_slow_answer_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.proxy.http_stream.STREAM_IDLE_TIMEOUT_S", 0.3)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        for _ in range(6):
            await asyncio.sleep(0.1)
            writer.write(b"x")
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            assert (await client.ask(get())).body == b"xxxxxx"


# ── connecting ──


async def test_a_refused_connection_gives_503() -> None:
    async with LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", unused_port())]))) as client:
            answer = await client.ask(post(b"body"))
            assert answer.status == 503
            assert answer.body.endswith(b"reset reason: remote connection failure")
            assert answer.header(b"content-type") == b"text/plain"
        assert live.requests(response_code="503", response_flags="UF") == 1
        nothing_under_way(live)


async def test_a_connection_that_does_not_come_gives_503_in_time() -> None:
    with Blackhole() as hole:
        async with LiveWorker() as live:
            port = live.listen(live.cluster([("127.0.0.1", hole.port)], connect_timeout_s=0.15))
            async with Client(port) as client:
                answer = await client.ask(get())
                assert (answer.status, answer.body[-18:]) == (503, b"connection timeout")
            assert live.requests(response_code="503", response_flags="UF") == 1
            nothing_under_way(live)


async def test_an_upstream_that_hangs_up_at_once_gives_503() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reset(writer)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            for _ in range(20):
                assert (await client.ask(get())).status == 503
        await until(lambda: live.open_upstreams() == 0)
        nothing_under_way(live)


async def test_an_upstream_that_speaks_unasked_loses_its_connection() -> None:
    """What it said would be the answer to whoever asks next."""
    evil = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await evil.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            assert (await client.ask(get())).body == b"ok"
            assert live.pooled() == 1
            evil.set()
            await until(lambda: live.pooled() == 0)
            evil.clear()
            assert (await client.ask(get())).body == b"ok"
        assert upstream.connections == 2
        assert live.worker.state.counters.protocol_errors == {"upstream.unexpected_data": 1}


def behind(port: int, wait: asyncio.Event, delay_s: float = 0.0) -> Serve:
    """Passes everything on to that port, once it may: a handshake that takes its time."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await wait.wait()
        await asyncio.sleep(delay_s)
        there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    return serve


async def test_a_connection_that_came_too_late_serves_no_other_request(tmp_path: Path) -> None:
    """Its request timed out while it was being made; the next request of that downstream is for someone else."""
    asked = asyncio.Event()
    Authority().leaf().write(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert-chain.pem", tmp_path / "key.pem")

    def says(word: bytes) -> Serve:
        return script(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + word)

    async with (
        RawServer(says(b"wrong"), tls) as wrong,
        RawServer(says(b"right"), tls) as right,
        RawServer(behind(wrong.port, asked)) as late,
        RawServer(behind(right.port, asked, 0.2)) as later,
        LiveWorker() as live,
    ):
        origination = UpstreamTls(mode=TlsMode.SIMPLE, insecure_skip_verify=True)
        first = live.cluster([("127.0.0.1", late.port)], "outbound|80||first.example", tls=origination)
        second = live.cluster([("127.0.0.1", later.port)], "outbound|80||second.example", tls=origination)
        match = RouteMatch(path=StringMatch(MatchKind.EXACT, "/first"))
        weighted = (WeightedCluster(cluster_key=first),)
        routes = (Route(match=match, clusters=weighted, timeout_s=0.1), *route_to(second))
        async with Client(live.listen(second, routes=routes)) as client:
            assert (await client.ask(get("/first"))).status == 504
            nothing_under_way(live)
            client.send(get("/second"))
            await until(lambda: later.connections == 1)
            asked.set()
            assert (await client.answer()).body == b"right"


async def test_a_downstream_that_resets_while_we_connect_leaves_nothing() -> None:
    with Blackhole() as hole:
        async with LiveWorker() as live:
            port = live.listen(live.cluster([("127.0.0.1", hole.port)]))
            async with Client(port) as client:
                client.send(get())
                await until(lambda: any(cluster.connections for cluster in live.clusters()))
                await reset(client.writer)
            await until(lambda: not any(cluster.connections for cluster in live.clusters()))
            nothing_under_way(live)
            assert live.requests(response_code="0", response_flags="DC") == 1


async def test_a_downstream_that_resets_takes_its_request_along() -> None:
    async with RawServer(held(asyncio.Event())) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            client.send(get())
            await until(lambda: live.open_upstreams() == 1)
            await reset(client.writer)
            await until(lambda: live.open_upstreams() == live.open_downstreams() == 0)
        nothing_under_way(live)
        assert live.requests(response_code="0", response_flags="DC") == 1


# ── circuit breakers ──


async def test_one_connection_and_one_waiting_request_leave_exactly_one_of_three_without_a_place() -> None:
    release = asyncio.Event()
    async with RawServer(held(release)) as upstream, LiveWorker() as live:
        limits = CircuitLimits(max_connections=1, max_pending_requests=1)
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], limits=limits))
        async with Client(port) as a, Client(port) as b, Client(port) as c:
            for client in (a, b, c):
                client.send(get())
            waiting = [asyncio.ensure_future(client.answer()) for client in (a, b, c)]
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=5)
            assert len(done) == 1
            release.set()
            answers = await asyncio.gather(*waiting)
        assert sorted(answer.status for answer in answers) == [200, 200, 503]
        (refused,) = [answer for answer in answers if answer.status == 503]
        assert refused.header(b"x-envoy-overloaded") == b"true"
        assert refused.body.endswith(b"reset reason: overflow")
        assert upstream.connections == 1
        assert live.requests(response_code="503", response_flags="UO") == 1
        nothing_under_way(live)


async def test_too_many_requests_at_once_are_refused() -> None:
    release = asyncio.Event()
    async with RawServer(held(release)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], limits=CircuitLimits(max_requests=2)))
        async with Client(port) as a, Client(port) as b, Client(port) as c:
            a.send(get())
            b.send(get())
            await until(lambda: live.open_upstreams() == 2)
            assert (await c.ask(get())).header(b"x-envoy-overloaded") == b"true"
            release.set()
            assert [(await client.answer()).status for client in (a, b)] == [200, 200]
            assert (await c.ask(get())).status == 200


async def test_those_who_wait_are_served_in_turn() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)], limits=CircuitLimits(max_connections=2)))

        async def many() -> None:
            async with Client(port) as client:
                for _ in range(20):
                    assert (await client.ask(get())).status == 200

        await asyncio.gather(*(many() for _ in range(12)))
        assert origin.connections == 2
        nothing_under_way(live)


async def test_the_one_connection_moves_between_endpoints() -> None:
    async with Origin() as a, Origin() as b, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", a.port), ("127.0.0.1", b.port)], limits=CircuitLimits(max_connections=1))
        async with Client(live.listen(cluster)) as client:
            for _ in range(10):
                assert (await client.ask(get())).status == 200
        assert (len(a.requests), len(b.requests)) == (5, 5)
        assert live.clusters()[0].connections <= 2


async def test_one_who_waited_and_left_takes_no_place() -> None:
    release = asyncio.Event()
    async with RawServer(held(release)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], limits=CircuitLimits(max_connections=1)))
        async with Client(port) as a, Client(port) as b, Client(port) as c:
            a.send(get())
            await until(lambda: live.open_upstreams() == 1)
            b.send(get())
            await until(lambda: len(live.clusters()[0].pending) == 1)
            await reset(b.writer)
            await until(lambda: not live.clusters()[0].pending)
            c.send(get())
            release.set()
            assert [(await client.answer()).status for client in (a, c)] == [200, 200]
        nothing_under_way(live)


async def test_a_listener_takes_no_more_connections_than_it_may() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]), max_connections=1)
        async with Client(port) as first:
            assert (await first.ask(get())).status == 200
            async with Client(port) as second:
                assert await second.ended() in ("end", "reset")
        await until(lambda: live.open_downstreams() == 0)
        async with Client(port) as third:
            assert (await third.ask(get())).status == 200


async def test_connections_that_say_nothing_count_too() -> None:
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        port = live.listen(cluster, direction=Direction.INBOUND, mtls=MtlsMode.PERMISSIVE, max_connections=2)
        async with Client(port), Client(port):
            (listener,) = live.worker.listeners.values()
            await until(lambda: len(listener.peeking) == 2)
            async with Client(port) as third:
                assert await third.ended() in ("end", "reset")
        await until(lambda: not listener.peeking)
        async with Client(port) as fourth:
            assert (await fourth.ask(get())).status == 200


# ── header limits ──


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([f"X-{number}: y" for number in range(99)], 200),
        ([f"X-{number}: y" for number in range(100)], 431),
        (["X: " + "y" * 60_000], 200),
        (["X: " + "y" * 62_000], 431),
    ],
)
async def test_heads_are_limited(lines: list[str], status: int) -> None:
    async with Origin() as origin, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            answer = await client.ask(get("/", *lines))
            assert answer.status == status
        assert len(origin.requests) == (status == 200)


# ── answers of our own ──


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_answers_of_our_own_have_a_length_and_keep_the_connection(method: str) -> None:
    async with LiveWorker() as live, Client(live.listen("none")) as client:
        for _ in range(2):
            answer = await client.ask(get(method=method), method)
            assert (answer.status, answer.body) == (503, b"")
            assert answer.header(b"content-length") == b"0"
        assert live.requests(response_code="503", response_flags="NC") == 2


async def test_no_endpoint_is_no_healthy_upstream() -> None:
    async with LiveWorker() as live, Client(live.listen(live.cluster([]))) as client:
        answer = await client.ask(get())
        assert (answer.status, answer.body) == (503, b"no healthy upstream")
        assert live.requests(response_code="503", response_flags="UH") == 1


async def test_head_of_an_answer_of_our_own_says_the_length_and_has_no_body() -> None:
    async with LiveWorker() as live, Client(live.listen(live.cluster([]))) as client:
        for _ in range(2):
            answer = await client.ask(get(method="HEAD"), "HEAD")
            assert (answer.header(b"content-length"), answer.body) == (b"19", b"")


@pytest.mark.parametrize("status", [204, 304])
async def test_a_direct_response_that_has_no_body_is_given_none(status: int) -> None:
    async with LiveWorker() as live:
        routes = (Route(direct_response=DirectResponse(status=status, body=b"HTTP/1.1 200 OK")),)
        async with Client(live.listen("none", routes=routes)) as client:
            for _ in range(3):
                answer = await client.ask(get())
                assert (answer.status, answer.body, answer.header(b"content-length")) == (status, b"", None)


async def test_no_route_is_404() -> None:
    async with LiveWorker() as live:
        match = RouteMatch(path=StringMatch(MatchKind.EXACT, "/only"))
        cluster = live.cluster([])
        port = live.listen(cluster, routes=(Route(match=match, clusters=(WeightedCluster(cluster_key=cluster),)),))
        async with Client(port) as client:
            answer = await client.ask(get("/other"))
            assert (answer.status, answer.body) == (404, b"")
        assert live.requests(response_code="404", response_flags="NR") == 1
