"""What a grpc-status means to the proxy: metrics, outlier detection, retries; and what the proxy answers to gRPC."""

import asyncio
from time import monotonic

import grpc
import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import OutlierPolicy, Protocol
from meshproxy.model.route import DirectResponse, Route, WeightedCluster
from meshproxy.policy.outlier import OutlierDetector
from tests.integration.test_retry_policies import retrying
from tests.support.client import Client, post
from tests.support.grpc_app import GrpcApp, channel, method, status_of
from tests.support.http2_client import Http2Client, data_frame, headers_frame, request
from tests.support.http2_origin import H2Answer, H2Origin, H2Request
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.raw_server import RawServer, unused_port

Code = grpc.StatusCode
GRPC = {"protocol": Protocol.GRPC, "speaks_http2": True}


def put(live: LiveWorker, *apps: GrpcApp, **fields: object) -> str:
    return live.cluster([("127.0.0.1", app.port) for app in apps], **GRPC, **fields)


# ── metrics ──


@pytest.mark.parametrize(
    ("name", "code", "label"),
    [("Unary", "OK", "0"), ("Fail", "NOT_FOUND", "5"), ("FailLate", "UNAVAILABLE", "14"), ("Nothing", "", "12")],
)
async def test_grpc_status_is_a_label(name: str, code: str, label: str) -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        async with channel(live.listen(put(live, app), protocol=Protocol.GRPC)) as client:
            call = method(client, name)(code.encode())
            await (call.code() if name != "FailLate" else _read_all(call))
        await until(
            lambda: (
                live.requests(
                    request_protocol="grpc", response_code="200", grpc_response_status=label, response_flags="-"
                )
                == 1
            )
        )


async def _read_all(call: grpc.aio.UnaryStreamCall) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in call:
            pass


async def test_a_call_that_the_caller_cancelled_has_no_status() -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        async with channel(live.listen(put(live, app), protocol=Protocol.GRPC)) as client:
            call = method(client, "Hang")(b"")
            await app.started.wait()
            call.cancel()
            await until(lambda: live.requests(response_code="0", grpc_response_status="", response_flags="DC") == 1)


async def test_messages_are_counted_while_the_call_goes_on() -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        async with channel(live.listen(put(live, app), protocol=Protocol.GRPC)) as client:
            call = method(client, "Bidi")()
            for number in range(1, 4):
                await call.write(b"x" * 70_000)
                assert await call.read() == b"x" * 70_000
                assert live.messages(reporter="source", destination_service="a.example") == (number, number)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert len([letter async for letter in method(client, "ServerStream")(b"four")]) == 4
            await until(lambda: live.messages() == (4, 7))


async def test_of_what_is_no_grpc_no_messages_are_counted() -> None:
    async with Origin() as origin, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.ask(post(b"\0\0\0\0\0"))
        assert live.messages() == (0, 0)


# ── outlier detection ──


async def reported(live: LiveWorker, name: str, code: Code) -> list[int]:
    """What outlier detection is told of one call that ends with this status."""
    told: list[int] = []
    live.worker.state.send_results = lambda events: told.extend(code for _, _, code in events)
    async with GrpcApp() as app:
        async with channel(live.listen(put(live, app), protocol=Protocol.GRPC)) as client:
            call = method(client, name)(code.name.encode())
            await (call.code() if name == "Fail" else _read_all(call))
    return told


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (Code.UNAVAILABLE, [503]),
        (Code.INTERNAL, [500]),
        (Code.DEADLINE_EXCEEDED, [504]),
        (Code.UNIMPLEMENTED, [501]),
        (Code.NOT_FOUND, []),
        (Code.RESOURCE_EXHAUSTED, []),
    ],
)
async def test_a_status_that_comes_alone_counts_as_the_http_status_it_stands_for(code: Code, told: list[int]) -> None:
    async with LiveWorker() as live:
        assert await reported(live, "Fail", code) == told
        (endpoint,) = live.endpoints()
        assert endpoint.rq_error == len(told)


async def test_a_status_in_trailers_is_no_outlier_but_an_error() -> None:
    async with LiveWorker() as live:
        assert await reported(live, "FailLate", Code.UNAVAILABLE) == []
        (endpoint,) = live.endpoints()
        assert (endpoint.rq_total, endpoint.rq_error) == (1, 1)


async def test_unavailable_in_a_row_ejects_and_ok_begins_anew() -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        policy = OutlierPolicy(consecutive_5xx=3, max_ejection_percent=100)
        cluster = put(live, app, outlier=policy)
        detector = OutlierDetector(policy, [f"127.0.0.1:{app.port}"], 0.0)
        words: list[str] = []

        def judge(events: list[tuple[str, str, int]]) -> None:
            for _, key, code in events:
                for verdict in detector.on_result(key, code, monotonic()):
                    words.append(verdict.word)
                    live.worker.on_message(m.Health(((cluster, verdict.key, verdict.word),)), None)

        live.worker.state.send_results = judge
        unavailable = [Code.UNAVAILABLE] * 2
        async with channel(live.listen(cluster, protocol=Protocol.GRPC)) as client:
            for fails in (unavailable, [], [*unavailable, Code.UNAVAILABLE]):
                app.fails = list(fails)
                for _ in fails or [None]:
                    await method(client, "Unary")(b"").code()
                    await asyncio.sleep(0)  # results travel at the end of the loop's turn
        await until(lambda: words == ["suspect", "clear", "suspect", "eject"])


# ── retries ──


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("cancelled", Code.CANCELLED),
        ("deadline-exceeded", Code.DEADLINE_EXCEEDED),
        ("internal", Code.INTERNAL),
        ("resource-exhausted", Code.RESOURCE_EXHAUSTED),
        ("unavailable", Code.UNAVAILABLE),
    ],
)
async def test_a_status_that_comes_alone_is_retried_by_the_word_that_names_it(word: str, code: Code) -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        app.fails = [code, code]
        cluster = put(live, app)
        port = live.listen(cluster, routes=(retrying(cluster, word),), protocol=Protocol.GRPC)
        async with channel(port) as client:
            assert await method(client, "Unary")(b"hello") == b"hello"
        assert len(app.calls) == 3
        assert live.requests() == live.requests(grpc_response_status="0", response_flags="-") == 1
        (found,) = live.clusters()
        assert (found.counters.upstream_rq_retry, found.counters.upstream_rq_total) == (2, 3)


async def test_a_status_that_no_word_names_is_not_retried() -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        app.fails = [Code.INTERNAL]
        cluster = put(live, app)
        port = live.listen(cluster, routes=(retrying(cluster, "unavailable", "5xx"),), protocol=Protocol.GRPC)
        async with channel(port) as client:
            assert await status_of(method(client, "Unary")(b"")) == (Code.INTERNAL, "as told")
        assert len(app.calls) == 1


async def test_the_last_attempts_status_is_given_and_flagged() -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        app.fails = [Code.UNAVAILABLE] * 9
        cluster = put(live, app)
        port = live.listen(cluster, routes=(retrying(cluster, "unavailable"),), protocol=Protocol.GRPC)
        async with channel(port) as client:
            assert await status_of(method(client, "Unary")(b"")) == (Code.UNAVAILABLE, "as told")
        assert len(app.calls) == 3
        assert live.requests(response_code="200", grpc_response_status="14", response_flags="URX") == 1


async def test_a_status_in_trailers_is_not_retried() -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        cluster = put(live, app)
        port = live.listen(cluster, routes=(retrying(cluster, "unavailable"),), protocol=Protocol.GRPC)
        async with channel(port) as client:
            await _read_all(method(client, "FailLate")(b"UNAVAILABLE"))
        assert len(app.calls) == 1


async def test_a_stream_that_is_refused_while_the_caller_sends_goes_on_at_the_next_attempt() -> None:
    refusal = H2Answer(fields=[(b"grpc-status", b"14")], ends_with_head=True, early=True)
    kind = (b"content-type", b"application/grpc")
    answers = [refusal]

    def answer(seen: H2Request) -> H2Answer | None:
        if answers and not seen.is_whole:
            return answers.pop()
        return H2Answer(seen.body, [kind], trailers=[(b"grpc-status", b"0")]) if seen.is_whole else None

    async with H2Origin(answer) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)], **GRPC)
        port = live.listen(cluster, routes=(retrying(cluster, "unavailable"),), protocol=Protocol.GRPC)
        async with Http2Client(port, acks=True) as client:
            await client.handshake()
            client.send(headers_frame(1, request("/a.B/C", kind, method="POST"), end_stream=False))
            client.send(data_frame(1, b"\0\0\0\0\1a", end_stream=False))
            await until(lambda: len(origin.requests) == 2)
            client.send(data_frame(1, b"\0\0\0\0\1b"))
            response = await client.response(1)
        assert response.body == b"\0\0\0\0\1a\0\0\0\0\1b"
        assert response.trailers == [(b"grpc-status", b"0")]
        assert live.messages() == (2, 2)


# ── what the proxy answers ──


async def test_no_endpoint_listens() -> None:
    async with LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", unused_port())], **GRPC)
        async with channel(live.listen(cluster, protocol=Protocol.GRPC)) as client:
            call = method(client, "Unary")(b"")
            code, details = await status_of(call)
        assert code is Code.UNAVAILABLE
        assert details.endswith("before headers. reset reason: remote connection failure")
        assert live.requests(response_code="200", grpc_response_status="14", response_flags="UF") == 1


async def test_no_route() -> None:
    async with LiveWorker() as live:
        cluster = live.cluster([], **GRPC)
        routes = (Route(direct_response=DirectResponse(status=403, body="not you: 100 %, ü".encode())),)
        async with channel(live.listen(cluster, routes=routes, protocol=Protocol.GRPC)) as client:
            assert await status_of(method(client, "Unary")(b"")) == (Code.PERMISSION_DENIED, "not you: 100 %, ü")


async def test_the_routes_timeout() -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        cluster = put(live, app)
        routes = (Route(clusters=(WeightedCluster(cluster_key=cluster),), timeout_s=0.2),)
        async with channel(live.listen(cluster, routes=routes, protocol=Protocol.GRPC)) as client:
            call = method(client, "Hang")(b"", timeout=20)
            assert await status_of(call) == (Code.UNAVAILABLE, "upstream request timeout")
        assert live.requests(response_code="200", grpc_response_status="14", response_flags="UT") == 1
        await app.calls[0].is_cancelled.wait()


async def test_the_callers_timeout_is_the_proxys_where_the_caller_does_not_act_on_it() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with RawServer(silent) as app, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", app.port)], **GRPC)
        async with channel(live.listen(cluster, protocol=Protocol.GRPC)) as client:
            call = method(client, "Hang")(b"", metadata=(("grpc-timeout", "200m"),))
            assert await status_of(call) == (Code.DEADLINE_EXCEEDED, "downstream duration timeout")
        assert live.requests(response_code="200", grpc_response_status="4", response_flags="DT") == 1


async def test_another_request_of_the_connection_is_answered_as_ever() -> None:
    async with LiveWorker() as live:
        cluster = live.cluster([], **GRPC)
        async with channel(live.listen(cluster, protocol=Protocol.GRPC)) as client:
            assert (await status_of(method(client, "Unary")(b"")))[0] is Code.UNAVAILABLE
        assert live.requests(request_protocol="grpc", response_flags="UH") == 1
