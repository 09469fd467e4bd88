"""HTTP/2 towards the upstream, through a live worker, with the `h2` library at the other end."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from meshproxy.model.cluster import CircuitLimits
from meshproxy.model.route import RetryPolicy, Route, WeightedCluster
from tests.support.client import Client, Cut, get, post
from tests.support.http2_client import Http2Client, data_frame, headers_frame, request, rst_frame, settings_frame
from tests.support.http2_origin import H2Answer, H2Origin, H2Request
from tests.support.live_worker import LiveWorker, until
from tests.support.raw_http2_upstream import RawHttp2Upstream, response

BODY = bytes(range(256)) * 4096  # 1 MiB: four stream windows


def listen(live: LiveWorker, origin: H2Origin, retries: int = 0, **cluster: Any) -> int:
    key = live.cluster([("127.0.0.1", origin.port)], speaks_http2=True, **cluster)
    retry = RetryPolicy(attempts=retries) if retries else None
    return live.listen(key, routes=(Route(clusters=(WeightedCluster(cluster_key=key),), retry=retry),))


async def test_a_request_in_http1_arrives_as_http2_and_its_answer_comes_back() -> None:
    answer = H2Answer(b"body", [(b"content-length", b"4"), (b"x-from", b"origin")])
    async with H2Origin(lambda _: answer) as origin, LiveWorker() as live, Client(listen(live, origin)) as client:
        client.send(get("/path?q=1", "X-Mine: yes"))
        response = await client.answer()
    assert (response.status, response.body, response.header(b"x-from")) == (200, b"body", b"origin")
    (seen,) = origin.requests
    assert seen.fields[:4] == [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a.example"),
                               (b":path", b"/path?q=1")]  # fmt: skip
    assert seen.header(b"x-mine") == b"yes"
    assert len(seen.header(b"x-request-id") or b"") == 36
    assert seen.header(b"host") is None


async def test_requests_at_the_same_time_share_one_connection_and_get_their_own_answers() -> None:
    def answer(seen: H2Request) -> H2Answer:
        return H2Answer(seen.header(b":path") or b"")

    async with H2Origin(answer) as origin, LiveWorker() as live:
        port = listen(live, origin)

        async def ask(number: int) -> bytes:
            async with Client(port) as client:
                client.send(get(f"/{number}"))
                return (await client.answer()).body

        bodies = await asyncio.gather(*(ask(number) for number in range(50)))
        assert bodies == [b"/%d" % number for number in range(50)]
        assert len(origin.connections) == 1
        assert await asyncio.gather(*(ask(number) for number in range(50))) == bodies
        assert len(origin.connections) == 1


async def test_more_requests_than_the_upstream_allows_at_once_use_another_connection() -> None:
    held: list[H2Request] = []

    def hold(seen: H2Request) -> None:
        held.append(seen)

    async with H2Origin(hold) as origin, LiveWorker() as live:
        port = listen(live, origin, max_concurrent_streams=2)
        async with Client(port) as first, Client(port) as second, Client(port) as third:
            for client in (first, second, third):
                client.send(get())
            await until(lambda: sum(seen.is_whole for seen in origin.requests) == 3)
            assert sorted(len(connection.open) for connection in origin.connections) == [1, 2]


async def test_bodies_of_many_windows_pass_both_ways_with_trailers() -> None:
    def echo(seen: H2Request) -> H2Answer:
        return H2Answer(seen.body, trailers=[(b"x-sum", b"1"), *seen.trailers])

    async with H2Origin(echo) as origin, LiveWorker() as live:
        port = listen(live, origin)
        async with Client(port) as client:
            head = b"POST / HTTP/1.1\r\nHost: a.example\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.send(head + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nx-end: yes\r\n\r\n")
            response = await client.answer()
    assert response.body == BODY
    assert response.trailers == [(b"x-sum", b"1"), (b"x-end", b"yes")]
    assert origin.requests[0].header(b"te") == b"trailers"


async def test_both_sides_in_http2_pass_a_body_and_its_trailers() -> None:
    def echo(seen: H2Request) -> H2Answer:
        return H2Answer(seen.body, trailers=[*seen.trailers, (b"x-sum", b"1")])

    async with H2Origin(echo) as origin, LiveWorker() as live:
        async with Http2Client(listen(live, origin), acks=True) as client:
            await client.handshake()
            client.send(
                headers_frame(1, request("/", (b"te", b"trailers"), method="POST"), end_stream=False),
                data_frame(1, b"a" * 16000, end_stream=False),
                data_frame(1, b"b" * 16000, end_stream=False),
                headers_frame(1, [(b"x-end", b"yes")]),
            )
            response = await client.response(1)
    assert response.body == b"a" * 16000 + b"b" * 16000
    assert response.trailers == [(b"x-end", b"yes"), (b"x-sum", b"1")]


@pytest.mark.parametrize("request_line", [b"GET / HTTP/1.1", b"HEAD / HTTP/1.1", b"GET / HTTP/1.0"])
async def test_an_answer_that_ends_with_its_head_ends_in_http1_too(request_line: bytes) -> None:
    async with H2Origin(lambda _: H2Answer(status=302, ends_with_head=True)) as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            for _ in range(2):  # the connection goes on
                client.send(request_line + b"\r\nHost: a.example\r\nConnection: keep-alive\r\n\r\n")
                response = await client.answer(request_line.split()[0].decode())
                assert (response.status, response.body) == (302, b"")


async def test_a_refused_stream_that_cannot_be_asked_again_is_503() -> None:
    async with H2Origin(lambda seen: H2Answer(resets=7) if seen.is_whole else None) as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            client.send(post(BODY))
            assert (await client.answer()).status == 503


async def test_interim_answers_pass() -> None:
    async with H2Origin(lambda _: H2Answer(interim=(103, 103))) as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            client.send(get())
            response = await client.answer()
    assert (response.status, response.informational) == (200, [103, 103])


async def test_a_refused_stream_is_asked_again_elsewhere_whatever_its_method() -> None:
    answers = [H2Answer(resets=7), H2Answer(b"done")]
    async with H2Origin(lambda seen: answers.pop(0) if seen.is_whole else None) as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            client.send(post(b"")[:-4] + b"\r\n\r\n")
            response = await client.answer()
    assert (response.status, response.body) == (200, b"done")
    assert len(origin.requests) == 2


@pytest.mark.parametrize("code", [1, 2, 8, 11])
async def test_a_reset_before_the_answer_is_503(code: int) -> None:
    async with H2Origin(lambda _: H2Answer(resets=code)) as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            client.send(get())
            response = await client.answer()
            assert response.status == 503
            origin.answer = lambda _: H2Answer()
            client.send(get())
            assert (await client.answer()).status == 200
        assert len(origin.connections) == 1


async def test_a_reset_within_the_answer_never_looks_whole() -> None:
    async with H2Origin(lambda _: None) as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            client.send(get())
            await until(lambda: bool(origin.requests) and origin.requests[0].is_whole)
            connection = origin.connections[0]
            connection.h2.send_headers(1, [(b":status", b"200")])
            connection.h2.send_data(1, b"half")
            connection.h2.reset_stream(1, 2)
            connection.flush()
            with pytest.raises(Cut) as cut:
                await client.answer()
    assert cut.value.body in (b"", b"half")


async def test_a_goaway_loses_no_request_and_the_next_one_takes_another_connection() -> None:
    async with H2Origin(lambda _: None) as origin, LiveWorker() as live:
        port = listen(live, origin)
        async with Client(port) as first, Client(port) as second:
            first.send(get("/first"))
            await until(lambda: len(origin.requests) == 1 and origin.requests[0].is_whole)
            second.send(get("/second"))
            await until(lambda: len(origin.requests) == 2 and origin.requests[1].is_whole)
            old = origin.connections[0]
            # As a server that drains: it has looked at stream 1 only.
            old.transport.write(b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + b"\x00\x00\x00\x01" + bytes(4))
            await until(lambda: len(origin.requests) == 3 and origin.requests[2].is_whole)
            assert origin.requests[2].header(b":path") == b"/second"
            assert len(origin.connections) == 2
            new = origin.connections[1]
            old.respond(origin.requests[0], H2Answer(b"first"))
            old.flush()
            new.respond(origin.requests[2], H2Answer(b"second"))
            new.flush()
            assert (await first.answer()).body == b"first"
            assert (await second.answer()).body == b"second"


async def test_a_downstream_that_leaves_resets_its_stream_and_no_other() -> None:
    async with H2Origin(lambda _: None) as origin, LiveWorker() as live:
        port = listen(live, origin)
        async with Http2Client(port, acks=True) as client, Client(port) as other:
            await client.handshake()
            client.send(headers_frame(1, request("/leaves")))
            other.send(get("/stays"))
            await until(lambda: sum(seen.is_whole for seen in origin.requests) == 2)
            client.send(rst_frame(1))
            leaves, stays = sorted(origin.requests, key=lambda seen: seen.header(b":path") or b"")
            await until(lambda: leaves.reset == 8)
            connection = origin.connections[0]
            connection.respond(stays, H2Answer(b"still"))
            connection.flush()
            assert (await other.answer()).body == b"still"
        assert stays.reset is None


async def test_an_answer_nobody_reads_stops_its_stream_and_no_other() -> None:
    def answer(seen: H2Request) -> H2Answer:
        return H2Answer(bytes(16 << 20) if seen.header(b":path") == b"/large" else b"small")

    async with H2Origin(answer) as origin, LiveWorker() as live:
        port = listen(live, origin)
        async with Client(port) as slow, Client(port) as other:
            slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
            slow.send(get("/large"))
            await until(lambda: bool(origin.connections) and bool(origin.connections[0].unsent))
            for _ in range(20):
                other.send(get("/small"))
                assert (await other.answer()).body == b"small"
            left = len(origin.connections[0].unsent[1][0])
            assert left > 4 << 20  # what the windows and the sockets' buffers took is not all of it
            slow.reader._transport.resume_reading()  # type: ignore[attr-defined]
            assert len((await slow.answer()).body) == 16 << 20


async def test_a_connection_on_which_nobody_is_heard_any_more_is_left_after_a_second() -> None:
    async with H2Origin() as origin, LiveWorker() as live:
        key = live.cluster([("127.0.0.1", origin.port)], speaks_http2=True)
        port = live.listen(key, routes=(Route(clusters=(WeightedCluster(cluster_key=key),), timeout_s=0.3),))
        async with Client(port) as client:
            client.send(get())
            assert (await client.answer()).status == 200
            origin.connections[0].transport.pause_reading()  # as if the path to it were gone
            client.send(get())
            assert (await client.answer()).status == 504
            await until(lambda: live.open_upstreams() == 0)
            client.send(get())
            assert (await client.answer()).status == 200
        assert len(origin.connections) == 2


async def test_a_slow_answer_costs_its_request_and_not_the_connection() -> None:
    async with H2Origin(lambda _: None) as origin, LiveWorker() as live:
        key = live.cluster([("127.0.0.1", origin.port)], speaks_http2=True)
        port = live.listen(key, routes=(Route(clusters=(WeightedCluster(cluster_key=key),), timeout_s=0.3),))
        async with Client(port) as client:
            client.send(get())
            assert (await client.answer()).status == 504
            (shared,) = live.endpoints()[0].shared
            await until(lambda: shared._probed_at_read < 0)  # the probe was answered, and is over
            origin.answer = lambda _: H2Answer()
            client.send(get())
            assert (await client.answer()).status == 200
        assert len(origin.connections) == 1


async def test_the_limit_of_requests_of_a_connection_is_kept() -> None:
    async with H2Origin() as origin, LiveWorker() as live:
        async with Client(listen(live, origin, max_requests_per_connection=3)) as client:
            for _ in range(7):
                client.send(get())
                assert (await client.answer()).status == 200
        assert len(origin.connections) == 3


async def test_who_may_not_wait_for_the_connection_is_refused() -> None:
    # A listening socket that accepts nobody: the connection is made by the kernel, and says nothing.
    async with H2Origin() as origin, LiveWorker() as live:
        port = listen(live, origin, limits=CircuitLimits(max_pending_requests=1))
        async with asyncio.TaskGroup() as group:

            async def ask() -> int:
                async with Client(port) as client:
                    client.send(get())
                    return (await client.answer()).status

            asked = [group.create_task(ask()) for _ in range(4)]
    statuses = [task.result() for task in asked]
    assert set(statuses) <= {200, 503} and 200 in statuses


async def test_an_upstream_without_http2_gives_502_and_no_traceback() -> None:
    async def http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(http1, "127.0.0.1", 0)
    async with server, LiveWorker() as live:
        key = live.cluster([("127.0.0.1", server.sockets[0].getsockname()[1])], speaks_http2=True)
        async with Client(live.listen(key)) as client:
            client.send(get())
            assert (await client.answer()).status in (502, 503)


async def test_a_request_that_waits_for_a_connection_gets_the_first_place_on_one() -> None:
    held: list[H2Request] = []

    async with H2Origin(held.append) as origin, LiveWorker() as live:
        port = listen(live, origin, max_concurrent_streams=1, limits=CircuitLimits(max_connections=1))
        async with Client(port) as first, Client(port) as second:
            first.send(get("/first"))
            await until(lambda: bool(held) and held[0].is_whole)
            second.send(get("/second"))
            await until(lambda: len(live.clusters()[0].pending) == 1)
            (connection,) = origin.connections
            connection.respond(held[0], H2Answer(b"first"))
            connection.flush()
            assert (await first.answer()).body == b"first"
            await until(lambda: len(origin.requests) == 2 and origin.requests[1].is_whole)
            connection.respond(origin.requests[1], H2Answer(b"second"))
            connection.flush()
            assert (await second.answer()).body == b"second"
        assert len(origin.connections) == 1


async def test_an_upgrade_that_left_before_settings_came_is_not_sent_for_another_request() -> None:
    async with RawHttp2Upstream(lambda *_: None, opening=b"") as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], speaks_http2=True))
        connect = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http")]
        async with Http2Client(port, acks=True) as client:
            await client.handshake()
            client.send(headers_frame(1, [*connect, (b":authority", b"a.example"), (b":path", b"/leaves")], False))
            await until(lambda: live.open_upstreams() == 1 and bool(upstream.connections))
            client.send(rst_frame(1), headers_frame(3, request("/stays")))
            (connection,) = upstream.connections
            await until(lambda: connection.has_request(1))
            connection.send(settings_frame({8: 1}), response(1))
            await until(lambda: connection.acked_settings())
            connection.send(data_frame(1))
            assert (await client.response(3)).status == 200
            assert [dict(fields)[b":path"] for fields in connection.requests.values()] == [b"/stays"]


async def test_bodies_of_a_few_frames_give_back_all_of_the_connections_window() -> None:
    """One after another, ten windows of it, in pieces smaller than those a stream's window is given back in."""
    async with H2Origin(lambda _: H2Answer(bytes(40_000))) as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            for _ in range(260):
                client.send(get())
                assert len((await client.answer()).body) == 40_000
        assert len(origin.connections) == 1


async def test_many_bodies_at_once_do_not_share_out_the_connections_window_for_ever() -> None:
    """Each has a little of it, and none as much as a stream's window is given back in."""
    async with H2Origin(lambda _: None) as origin, LiveWorker() as live, AsyncExitStack() as stack:
        port = listen(live, origin)
        clients = [await stack.enter_async_context(Client(port)) for _ in range(100)]
        for client in clients:
            client.send(get())
        await until(lambda: sum(seen.is_whole for seen in origin.requests) == 100)
        (connection,) = origin.connections
        for size in range(0, 60_000, 15_000):
            for seen in origin.requests:
                if not size:
                    connection.h2.send_headers(seen.stream_id, [(b":status", b"200")])
                room = connection.h2.local_flow_control_window(seen.stream_id)
                if room < 15_000:  # until the proxy gives more
                    connection.flush()
                    await until(lambda: connection.h2.local_flow_control_window(seen.stream_id) >= 15_000)  # noqa: B023
                connection.h2.send_data(seen.stream_id, bytes(15_000), end_stream=size == 45_000)
        connection.flush()
        assert [len((await client.answer()).body) for client in clients] == [60_000] * 100


async def test_many_answers_nobody_reads_do_not_stop_the_others() -> None:
    def answer(seen: H2Request) -> H2Answer:
        return H2Answer(bytes(16 << 20) if seen.header(b":path") == b"/large" else bytes(40_000))

    async with H2Origin(answer) as origin, LiveWorker() as live, AsyncExitStack() as stack:
        port = listen(live, origin)
        for _ in range(10):
            slow = await stack.enter_async_context(Client(port))
            slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
            slow.send(get("/large"))
        await until(lambda: len(origin.requests) == 10)
        async with Client(port) as other:
            for _ in range(100):
                other.send(get("/small"))
                assert len((await other.answer()).body) == 40_000
        (connection,) = origin.connections
        assert all(len(body) > 4 << 20 for body, _ in connection.unsent.values())


async def test_an_unused_connection_gives_its_place_to_one_for_another_endpoint() -> None:
    async with H2Origin(lambda _: H2Answer(b"a")) as a, H2Origin(lambda _: H2Answer(b"b")) as b, LiveWorker() as live:
        endpoints = [("127.0.0.1", a.port), ("127.0.0.1", b.port)]
        key = live.cluster(endpoints, speaks_http2=True, limits=CircuitLimits(max_connections=1))
        async with Client(live.listen(key)) as client:
            bodies = [(await client.ask(get())).body for _ in range(6)]
        assert sorted(bodies) == [b"a"] * 3 + [b"b"] * 3
        await until(lambda: live.open_upstreams() == 1)
