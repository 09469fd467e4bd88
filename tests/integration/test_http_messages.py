"""HTTP/1.1 through a live worker: connections, bodies, trailers, interim answers, methods and versions."""

import asyncio
import re
import uuid

import pytest

from meshproxy.control import messages as m
from meshproxy.model.listener import Direction
from tests.support.client import CHUNKED, Client, Cut, get, post
from tests.support.live_worker import LiveWorker, exchange
from tests.support.origin import Origin, Seen
from tests.support.raw_server import RawServer, reset, script

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def echo(seen: Seen) -> bytes:
    """The target and the body, so that an answer says whose it is."""
    body = seen.target + b" " + seen.body
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


# ── connections ──


async def test_keep_alive_serves_many_requests_over_one_connection_each_way() -> None:
    async with Origin(echo) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            for number in range(50):
                answer = await client.ask(get(f"/{number}"))
                assert (answer.status, answer.body) == (200, b"/%d " % number)
        assert origin.connections == 1


async def test_a_thousand_pipelined_requests_are_answered_in_order() -> None:
    async with Origin(echo) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            client.send(b"".join(get(f"/{number}") for number in range(1000)))
            for number in range(1000):
                assert (await client.answer()).body == b"/%d " % number
        assert origin.connections == 1


async def test_a_thousand_pipelined_requests_that_we_answer_ourselves_nest_no_calls() -> None:
    async with LiveWorker() as live:
        port = live.listen("no such cluster")
        async with Client(port) as client:
            client.send(get() * 1000)
            for _ in range(1000):
                assert (await client.answer()).status == 503


async def test_pipelined_bodies_are_told_apart() -> None:
    async with Origin(echo) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            client.send(
                post(b"one", path="/1") + get("/2") + get("/3", CHUNKED, method="POST") + b"3\r\n333\r\n0\r\n\r\n"
            )
            client.send(post(b"four", path="/4"))
            assert [(await client.answer()).body for _ in range(4)] == [b"/1 one", b"/2 ", b"/3 333", b"/4 four"]


async def test_any_split_of_a_request_is_the_same_request() -> None:
    data = get("/split", CHUNKED, method="POST") + b"5\r\nhello\r\n0\r\nx-sum: 5\r\n\r\n"
    async with Origin(echo) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            for step in (1, 2, 3, 7, 40):
                for at in range(0, len(data), step):
                    client.send(data[at : at + step])
                    await client.writer.drain()
                    await asyncio.sleep(0)
                assert (await client.answer()).body == b"/split hello"
        assert all(seen.trailers == [(b"x-sum", b"5")] for seen in origin.requests)


async def test_connection_close_is_answered_and_then_closed() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            answer = await client.ask(get("/", "Connection: close"))
            assert answer.header(b"connection") == b"close"
            assert await client.ended() == "end"
            assert live.pooled() == 1  # the downstream's wish says nothing of the upstream's connection


async def test_a_half_closed_downstream_still_gets_every_answer() -> None:
    async with Origin(echo) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, get("/1") + post(b"body", path="/2") + get("/3"))
        assert re.findall(rb"\r\n\r\n(/\d \w{0,4})(?=HTTP|$)", answer) == [b"/1 ", b"/2 body", b"/3 "]


async def test_an_upstream_that_says_close_is_not_used_again() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    async with RawServer(script(answer, answer)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            for _ in range(2):
                first = await client.ask(get())
                assert first.header(b"connection") is None
            assert upstream.connections == 2


async def test_an_http10_upstream_is_kept_only_when_it_says_so() -> None:
    plain = b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"
    kept = b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok"
    async with RawServer(script(kept, plain, plain)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            assert [(await client.ask(get())).body for _ in range(3)] == [b"ok"] * 3
        assert upstream.connections == 2


async def test_max_requests_per_connection_renews_the_upstream_connection() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)], max_requests_per_connection=2))
        async with Client(port) as client:
            for _ in range(6):
                assert (await client.ask(get())).status == 200
        assert origin.connections == 3


async def test_a_draining_worker_says_goodbye_with_the_next_answer() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            assert (await client.ask(get())).header(b"connection") is None
            live.worker.on_message(m.Drain(30.0, exits=False), None)
            assert (await client.ask(get())).header(b"connection") == b"close"
            assert await client.ended() == "end"


async def test_fields_that_connection_names_stay_on_their_hop() -> None:
    def answer(seen: Seen) -> bytes:
        return (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x-hop, keep-alive\r\nX-Hop: 1\r\nX-End: 1\r\n\r\nok"
        )

    async with Origin(answer) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            got = await client.ask(get("/", "Connection: x-mine, keep-alive", "X-Mine: 1", "X-Far: 1", "Keep-Alive: 5"))
        names = {name for name, _ in origin.requests[0].headers}
        assert b"x-far" in names and not names & {b"x-mine", b"connection", b"keep-alive"}
        assert got.header(b"x-end") == b"1"
        assert got.header(b"x-hop") is got.header(b"connection") is None


# ── bodies ──


@pytest.mark.parametrize("size", [0, 1, 2, 16384, 16385, 65536, 300_000])
async def test_bodies_arrive_whole_with_length_and_chunked_both_ways(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"z" * (size % 256)

    def answer(seen: Seen) -> bytes:
        if seen.target == b"/chunked":
            return (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                + (b"%x\r\n%b\r\n" % (len(seen.body), seen.body) if seen.body else b"")
                + b"0\r\n\r\n"
            )
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(seen.body), seen.body)

    async with Origin(answer) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            sent = b"".join(
                b"%x\r\n%b\r\n" % (len(part), part) for at in range(0, size, 7000) if (part := body[at : at + 7000])
            )
            for data in (
                post(body, path="/length"),
                post(body, path="/chunked"),
                get("/length", CHUNKED, method="POST") + sent + b"0\r\n\r\n",
                get("/chunked", CHUNKED, method="PUT") + sent + b"0\r\n\r\n",
            ):
                answer_ = await client.ask(data)
                assert answer_.body == body
        assert [seen.body for seen in origin.requests] == [body] * 4
        assert origin.errors == []


async def test_trailers_pass_both_ways() -> None:
    def answer(seen: Seen) -> bytes:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-back: 2\r\n\r\n"

    async with Origin(answer) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            got = await client.ask(get("/", CHUNKED, "TE: trailers", method="POST") + b"0\r\nx-forth: 1\r\n\r\n")
        assert origin.requests[0].trailers == [(b"x-forth", b"1")]
        assert origin.requests[0].header(b"te") == b"trailers"
        assert got.trailers == [(b"x-back", b"2")]


async def test_a_body_until_close_reaches_http11_as_chunks() -> None:
    async with RawServer(script(b"HTTP/1.1 200 OK\r\n\r\nto the end", closes=True)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            for _ in range(2):
                answer = await client.ask(get())
                assert (answer.body, answer.header(b"transfer-encoding")) == (b"to the end", b"chunked")


async def test_an_early_final_answer_ends_the_connections_whose_body_is_unread() -> None:
    early = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
    async with RawServer(script(early)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            client.send(get("/", "Content-Length: 100000", method="POST") + b"x" * 1000)
            answer = await client.answer()
            assert (answer.status, answer.header(b"connection")) == (413, b"close")
            client.send(get("/smuggled"))
            assert await client.ended() in ("end", "reset")
        assert upstream.connections == 1
        assert live.pooled() == 0


# ── interim answers ──


async def test_expect_100_continue_is_the_upstreams_to_grant() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"100-continue" in head
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(5)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + body)
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            client.send(get("/", "Content-Length: 5", "Expect: 100-continue", method="POST"))
            assert await client.bytes(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"hello")
            assert (await client.answer()).body == b"hello"


async def test_an_expectation_that_is_refused_ends_with_that_answer() -> None:
    async with RawServer(script(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            answer = await client.ask(get("/", "Content-Length: 5", "Expect: 100-continue", method="POST"))
            assert (answer.status, answer.header(b"connection")) == (417, b"close")


async def test_early_hints_reach_the_downstream_before_the_answer() -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    async with RawServer(script(hints * 3 + OK, hints + OK)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            assert (await client.ask(get())).informational == [103, 103, 103]
            assert (await client.ask(get())).informational == [103]
        assert upstream.connections == 1


async def test_interim_answers_are_counted_for_each_request_not_for_the_connection() -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\n" + OK
    async with RawServer(script(*[answer] * 40)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            for _ in range(40):
                assert (await client.ask(get())).status == 200
        assert upstream.connections == 1


async def test_interim_answers_are_not_for_http10() -> None:
    async with RawServer(script(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            assert (await client.ask(get(version="1.0"))).informational == []


# ── answers without a body ──


async def test_head_keeps_the_length_and_has_no_body() -> None:
    async with (
        RawServer(script(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n", OK)) as upstream,
        LiveWorker() as live,
    ):
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            answer = await client.ask(get(method="HEAD"), "HEAD")
            assert (answer.header(b"content-length"), answer.body) == (b"1234", b"")
            assert (await client.ask(get())).body == b"ok"
        assert upstream.connections == 1


async def test_head_of_a_chunked_answer_has_no_body() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with RawServer(script(head, OK)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            assert (await client.ask(get(method="HEAD"), "HEAD")).status == 200
            assert (await client.ask(get())).body == b"ok"
        assert upstream.connections == 1


@pytest.mark.parametrize(
    ("head", "length"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", None),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", None),
        (b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", None),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n", b"77"),
        (b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", None),
        (b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", b"0"),
    ],
)
async def test_answers_without_a_body_leave_the_connection_in_order(head: bytes, length: bytes | None) -> None:
    async with RawServer(script(head, OK)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            answer = await client.ask(get())
            assert (answer.status, answer.body, answer.header(b"content-length")) == (int(head[9:12]), b"", length)
            assert answer.header(b"transfer-encoding") is None
            assert (await client.ask(get())).body == b"ok"
        assert upstream.connections == 1


# ── HTTP/1.0 downstreams ──


async def test_http10_is_closed_after_its_answer() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            answer = await client.ask(get(version="1.0"))
            assert (answer.body, answer.header(b"connection")) == (b"ok", b"close")
            assert await client.ended() == "end"


async def test_http10_with_keep_alive_stays() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            for _ in range(3):
                answer = await client.ask(get("/", "Connection: keep-alive", version="1.0"))
                assert (answer.body, answer.header(b"connection")) == (b"ok", b"keep-alive")


async def test_http10_gets_a_chunked_answer_as_bytes_until_close() -> None:
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
    async with RawServer(script(chunks)) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        answer = await exchange(port, get("/", "Connection: keep-alive", version="1.0"))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert body == b"abcdef"
        assert b"chunked" not in head.lower() and b"connection: close" in head.lower()


async def test_http10_is_reset_where_the_end_would_look_like_the_end_of_the_body() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await writer.drain()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            with pytest.raises(Cut) as cut:
                await client.ask(get(version="1.0"))
            assert cut.value.is_reset


async def test_an_upgrade_offered_by_http10_is_ignored() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            await client.ask(get("/", "Connection: upgrade", "Upgrade: websocket", version="1.0"))
        assert origin.requests[0].header(b"upgrade") is None


# ── a broken upstream ──


@pytest.mark.parametrize("ends_with_reset", [False, True])
@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
    ids=["length", "chunked"],
)
async def test_an_answer_cut_short_is_never_a_whole_one(start: bytes, ends_with_reset: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(start)
        if ends_with_reset:
            await reset(writer)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            with pytest.raises(Cut):
                answer = await client.ask(get())
                raise AssertionError(answer)


async def test_a_reset_in_a_body_until_close_is_not_its_end() -> None:
    release = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await release.wait()
        await reset(writer)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            client.send(get())
            await client.reader.readuntil(b"abc")
            release.set()
            assert b"0\r\n\r\n" not in await _until_cut(client)


async def _until_cut(client: Client) -> bytes:
    received = b""
    while True:
        try:
            data = await client.reader.read(65536)
        except ConnectionError:
            return received
        if not data:
            return received
        received += data


# ── targets and hosts ──


async def test_absolute_form_is_forwarded_as_origin_form() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            for target in ("http://a.example/x?y=1", "http://A.example", "http://a.example?q"):
                assert (await client.ask(get(target))).status == 200
        assert [seen.target for seen in origin.requests] == [b"/x?y=1", b"/", b"/?q"]


async def test_connect_is_no_open_door() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 404")
        assert origin.connections == 0


# ── what this hop adds and takes away ──


async def test_a_request_without_an_id_gets_a_random_uuid() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            for _ in range(3):
                await client.ask(get())
        ids = [(seen.header(b"x-request-id") or b"").decode() for seen in origin.requests]
        assert len(set(ids)) == 3
        assert all(uuid.UUID(text).version == 4 and str(uuid.UUID(text)) == text for text in ids)


async def test_a_request_id_that_came_in_is_kept() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            await client.ask(get("/", "X-Request-Id: mine"))
        assert [v for k, v in origin.requests[0].headers if k == b"x-request-id"] == [b"mine"]


@pytest.mark.parametrize("direction", [Direction.OUTBOUND, Direction.INBOUND])
async def test_what_only_a_proxy_may_say_is_taken_from_strangers(direction: Direction) -> None:
    def answer(seen: Seen) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Envoy-Upstream-Service-Time: 99999\r\n\r\nok"

    async with Origin(answer) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]), direction=direction)
        async with Client(port) as client:
            got = await client.ask(
                get(
                    "/",
                    "X-Envoy-Retry-On: 5xx",
                    "x-envoy-upstream-rq-timeout-ms: 1",
                    "X-ENVOY-INTERNAL: true",
                    "x-envoy-attempt-count: 7",
                    "X-Forwarded-Client-Cert: By=x;URI=spiffe://cluster.local/ns/a/sa/b",
                )
            )
        seen = origin.requests[0]
        assert {name for name, _ in seen.headers if name.startswith(b"x-envoy")} <= {b"x-envoy-attempt-count"}
        assert seen.header(b"x-envoy-attempt-count") == (b"1" if direction is Direction.OUTBOUND else None)
        assert seen.header(b"x-forwarded-client-cert") is None
        assert seen.header(b"x-forwarded-proto") == b"http"
        assert int(got.header(b"x-envoy-upstream-service-time") or b"-1") < 1000


async def test_a_sidecar_believes_the_scheme_that_the_hop_before_it_saw() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        async with Client(port) as client:
            await client.ask(get("/", "X-Forwarded-Proto: https"))
            await client.ask(get("/", "X-Forwarded-Proto: gopher"))
        assert [seen.header(b"x-forwarded-proto") for seen in origin.requests] == [b"https", b"http"]


async def test_a_gateway_appends_the_address_it_sees_and_believes_no_scheme() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]), direction=Direction.GATEWAY)
        async with Client(port) as client:
            await client.ask(get("/", "X-Forwarded-Proto: https", "X-Forwarded-For: 1.2.3.4"))
        seen = origin.requests[0]
        assert seen.header(b"x-forwarded-for") == b"1.2.3.4,127.0.0.1"
        assert seen.header(b"x-forwarded-proto") == b"http"
