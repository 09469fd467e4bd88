"""gRPC that is wrong, from callers and from servers: HTTP/2 keeps its rules, what is wrong in gRPC itself is passed on
for its ends to judge, and is counted as what it is."""

import pytest

from meshproxy.model.cluster import Protocol
from tests.support.http2_client import Http2Client, Response, data_frame, headers_frame, request
from tests.support.http2_origin import H2Answer, H2Origin
from tests.support.live_worker import LiveWorker, until

GRPC = (b"content-type", b"application/grpc")
OK = (b"grpc-status", b"0")
MESSAGE = b"\0\0\0\0\x02hi"


async def call(
    live: LiveWorker, answer: H2Answer, *fields: tuple[bytes, bytes], body: bytes = MESSAGE
) -> tuple[Response, H2Origin]:
    async with H2Origin(lambda seen: answer if seen.is_whole else None) as origin:
        cluster = live.cluster([("127.0.0.1", origin.port)], protocol=Protocol.GRPC, speaks_http2=True)
        async with Http2Client(live.listen(cluster, protocol=Protocol.GRPC), acks=True) as client:
            await client.handshake()
            fields = fields or (GRPC,)
            client.send(headers_frame(1, request("/a.B/C", *fields, method="POST"), end_stream=False))
            client.send(data_frame(1, body))
            response = await client.response(1)
            await client.expect_ping()  # the connection goes on
            return response, origin


# ── servers ──


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (b"0", "0"),
        (b"16", "16"),
        (b"17", "-1"),
        (b"-1", "-1"),
        (b"00", "-1"),
        (b"0x1", "-1"),
        (b"1e1", "-1"),
        (b"", "-1"),
        (b"14, 0", "-1"),
        (b"9" * 4000, "-1"),
        (b"\xb9", "-1"),
    ],
)
@pytest.mark.parametrize("is_alone", [True, False])
async def test_any_grpc_status_is_passed_on_and_few_are_labels(value: bytes, label: str, is_alone: bool) -> None:
    status = (b"grpc-status", value)
    alone = H2Answer(fields=[GRPC, status], ends_with_head=True)
    async with LiveWorker() as live:
        response, _ = await call(live, alone if is_alone else H2Answer(MESSAGE, [GRPC], trailers=[status]))
        assert (response.headers if is_alone else response.trailers).count(status) == 1
        await until(lambda: live.requests(request_protocol="grpc", grpc_response_status=label) == 1)


@pytest.mark.parametrize(
    ("answer", "label", "messages"),
    [
        (H2Answer(MESSAGE, [GRPC]), "2", 1),  # no trailers
        (H2Answer(b"", [GRPC]), "2", 0),
        (H2Answer(MESSAGE, [GRPC], trailers=[(b"x", b"y")]), "2", 1),  # trailers without a status
        (H2Answer(MESSAGE, [GRPC, OK], trailers=[(b"grpc-status", b"13")]), "0", 1),  # two of them
        (H2Answer(MESSAGE, [GRPC], trailers=[OK, (b"grpc-message", b"%" * 30_000)]), "0", 1),
        (H2Answer(MESSAGE, [GRPC], trailers=[OK, (b"grpc-message", b"%zz\xff")]), "0", 1),
        (H2Answer(b"\0\xff\xff\xff\xffhi", [GRPC], trailers=[OK]), "0", 1),  # a message that never ends
        (H2Answer(b"\x7f\0\0\0\x02hi", [GRPC], trailers=[OK]), "0", 1),  # a flag that means nothing
        (H2Answer(b"\0\0\0", [GRPC], trailers=[OK]), "0", 0),  # half of a prefix
        (H2Answer(b"\0\0\0\0\0" * 3000, [GRPC], trailers=[OK]), "0", 3000),
        (H2Answer(b"<html>", [(b"content-type", b"text/html")], status=502), "14", None),
    ],
)
async def test_answers_that_are_wrong_in_grpc_pass(answer: H2Answer, label: str, messages: int | None) -> None:
    async with LiveWorker() as live:
        response, _ = await call(live, answer)
        assert (response.status, response.body) == (answer.status, answer.body)
        assert response.trailers == answer.trailers
        await until(lambda: live.requests(request_protocol="grpc", grpc_response_status=label) == 1)
        assert messages is None or live.messages() == (1, messages)


# ── callers ──


@pytest.mark.parametrize(
    "value",
    [
        *(b"99999999H", b"0S", b"-1S", b"1", b"S", b"1s", b"1.5S", b"100000000n", b"999999999999S", b"1S, 2S"),
        *(b"", b"\xb9S", b"0x1S", b"1 S"),
    ],
)
async def test_any_grpc_timeout_is_passed_on(value: bytes) -> None:
    async with LiveWorker() as live:
        answer = H2Answer(MESSAGE, [GRPC], trailers=[OK])
        response, origin = await call(live, answer, GRPC, (b"grpc-timeout", value))
        assert response.trailers == [OK]
        assert origin.requests[0].header(b"grpc-timeout") == value


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        (b"", 0),
        (b"\0", 0),
        (b"\0\xff\xff\xff\xff", 1),
        (b"\xff\0\0\0\0", 1),
        (b"\x80\0\0\0\x10grpc-status: 0\r\n", 1),  # gRPC-Web's trailers are a message here
    ],
)
async def test_requests_that_are_wrong_in_grpc_pass(body: bytes, messages: int) -> None:
    async with LiveWorker() as live:
        response, origin = await call(live, H2Answer(fields=[GRPC, OK], ends_with_head=True), body=body)
        assert (response.status, origin.requests[0].body) == (200, body)
        await until(lambda: live.requests(grpc_response_status="0") == 1)
        assert live.messages() == (messages, 0)


@pytest.mark.parametrize(
    "content_type",
    [b"application/grpc;x", b"application/grpc, text/html", b"Application/GRPC", b"application/grpc+", b"a" * 3000],
)
async def test_content_types_that_are_nearly_grpcs(content_type: bytes) -> None:
    async with LiveWorker() as live:
        answer = H2Answer(MESSAGE, [GRPC], trailers=[OK])
        response, origin = await call(live, answer, (b"content-type", content_type))
        assert response.trailers == [OK]
        assert origin.requests[0].header(b"content-type") == content_type
