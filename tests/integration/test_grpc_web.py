"""gRPC-Web, binary and text, in HTTP/1.1 and HTTP/2, in front of a gRPC server of grpcio."""

import base64
from collections.abc import Awaitable, Callable

import pytest

from meshproxy.model.cluster import Protocol
from tests.support.client import Client
from tests.support.grpc_app import SERVICE, GrpcApp, channel, method
from tests.support.http2_client import (
    INITIAL_WINDOW_SIZE,
    Http2Client,
    data_frame,
    headers_frame,
    request,
    window_frame,
)
from tests.support.http2_origin import H2Answer, H2Origin
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.raw_server import unused_port

BINARY = "application/grpc-web+proto"
TEXT = "application/grpc-web-text"
Reply = tuple[int, dict[bytes, bytes], bytes]
"""Status, fields, body."""
Ask = Callable[[int, str, bytes, str], Awaitable[Reply]]


def listen(live: LiveWorker, port: int, *, http2: bool = True) -> int:
    cluster = live.cluster([("127.0.0.1", port)], protocol=Protocol.GRPC_WEB, speaks_http2=http2)
    return live.listen(cluster, protocol=Protocol.GRPC_WEB)


def message(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


def frames(body: bytes) -> tuple[list[bytes], dict[bytes, bytes]]:
    """Messages and the trailers of the last frame."""
    found: list[bytes] = []
    while body:
        size = int.from_bytes(body[1:5], "big")
        flag, data, body = body[0], body[5 : 5 + size], body[5 + size :]
        if flag == 0x80:
            assert not body, "the trailers are the last frame"
            pairs = [line.split(b":", 1) for line in data.split(b"\r\n")[:-1]]
            return found, {name: value.strip() for name, value in pairs}
        found.append(data)
    return found, {}


def from_text(body: bytes) -> bytes:
    """Base64 that may be padded within."""
    return b"".join(base64.b64decode(body[at : at + 4], validate=True) for at in range(0, len(body), 4))


async def in_http1(port: int, name: str, body: bytes, kind: str) -> Reply:
    async with Client(port) as client:
        head = f"POST /{SERVICE}/{name} HTTP/1.1\r\nHost: a.example\r\nContent-Type: {kind}\r\nAccept: {kind}\r\n"
        client.send(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = await client.answer()
        assert not answer.trailers
        return answer.status, dict(answer.headers), answer.body


async def in_http2(port: int, name: str, body: bytes, kind: str) -> Reply:
    async with Http2Client(port, {INITIAL_WINDOW_SIZE: 1 << 20}, acks=True) as client:
        await client.handshake()
        client.send(window_frame(0, 1 << 20))
        fields = ((b"content-type", kind.encode()), (b"accept", kind.encode()), (b"content-length", b"%d" % len(body)))
        client.send(headers_frame(1, request(f"/{SERVICE}/{name}", *fields, method="POST"), end_stream=False))
        for at in range(0, len(body) - 1, 1 << 14):
            client.send(data_frame(1, body[at : min(at + (1 << 14), len(body) - 1)], end_stream=False))
        client.send(data_frame(1, body[-1:], end_stream=True))
        answer = await client.response(1)
        assert not answer.trailers
        return answer.status, dict(answer.headers), answer.body


@pytest.fixture(params=[in_http1, in_http2])
def ask(request: pytest.FixtureRequest) -> Ask:
    found: Ask = request.param
    return found


async def test_binary(ask: Ask) -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        status, fields, body = await ask(listen(live, app.port), "Unary", message(b"hello"), BINARY)
        assert (status, fields[b"content-type"]) == (200, b"application/grpc-web+proto")
        assert frames(body) == ([b"hello"], {b"grpc-status": b"0", b"grpc-message": b"", b"x-trailing": b"yes"})
        assert app.calls[0].metadata["accept"] == BINARY
        assert live.requests(request_protocol="grpc", grpc_response_status="0", response_code="200") == 1


async def test_text(ask: Ask) -> None:
    sent = base64.b64encode(message(b"hello"))
    async with GrpcApp() as app, LiveWorker() as live:
        status, fields, body = await ask(listen(live, app.port), "Unary", sent, TEXT)
        assert (status, fields[b"content-type"]) == (200, b"application/grpc-web-text+proto")
        assert frames(from_text(body)) == (
            [b"hello"],
            {b"grpc-status": b"0", b"grpc-message": b"", b"x-trailing": b"yes"},
        )


async def test_text_in_pieces_that_are_padded_each(ask: Ask) -> None:
    whole = message(b"hello")
    sent = b"".join(base64.b64encode(whole[at : at + 4]) for at in range(0, len(whole), 4))
    async with GrpcApp() as app, LiveWorker() as live:
        _, _, body = await ask(listen(live, app.port), "Unary", sent, TEXT)
        assert frames(from_text(body))[0] == [b"hello"]


async def test_big_text(ask: Ask) -> None:
    data = bytes(range(256)) * 160  # in base64 just below what a stream may send before it is passed on
    async with GrpcApp() as app, LiveWorker() as live:
        _, _, body = await ask(listen(live, app.port), "Unary", base64.b64encode(message(data)), TEXT)
        assert frames(from_text(body))[0] == [data]


async def test_a_server_streams(ask: Ask) -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        _, _, body = await ask(listen(live, app.port), "ServerStream", message(b"abc"), BINARY)
        messages, trailers = frames(body)
        assert (messages, trailers[b"grpc-status"]) == ([b"a", b"b", b"c"], b"0")
        await until(lambda: live.messages() == (1, 3))


async def test_a_status_that_comes_alone_stays_in_the_head(ask: Ask) -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        status, fields, body = await ask(listen(live, app.port), "Fail", message(b"NOT_FOUND"), BINARY)
        assert (status, fields[b"grpc-status"], body) == (200, b"5", b"")
        assert fields[b"content-type"] == b"application/grpc-web+proto"
        assert live.requests(grpc_response_status="5") == 1


async def test_a_status_after_a_message_is_in_the_frame(ask: Ask) -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        _, _, body = await ask(listen(live, app.port), "FailLate", message(b"DATA_LOSS"), BINARY)
        assert frames(body) == ([b"one"], {b"grpc-status": b"15", b"grpc-message": b"after one"})


@pytest.mark.parametrize("text", [b"AAAAA", b"AA*A", b"A==="])
async def test_what_is_no_base64_is_refused(ask: Ask, text: bytes) -> None:
    async with GrpcApp() as app, LiveWorker() as live:
        status, fields, body = await ask(listen(live, app.port), "Unary", text, TEXT)
        assert (status, fields[b"grpc-status"], body) == (400, b"13", b"")
        assert fields[b"grpc-message"] == b"Bad gRPC-web request, invalid base64 data."


async def test_the_proxys_own_answers_say_a_status_in_fields(ask: Ask) -> None:
    async with LiveWorker() as live:
        status, fields, body = await ask(listen(live, unused_port()), "Unary", message(b""), BINARY)
        assert (status, fields[b"grpc-status"], fields[b"content-type"], body) == (503, b"14", BINARY.encode(), b"")
        assert fields[b"grpc-message"].endswith(b"remote connection failure")
        assert live.requests(response_code="503", grpc_response_status="14", response_flags="UF") == 1


async def test_an_answer_that_is_no_grpc_is_told_in_fields(ask: Ask) -> None:
    answer = H2Answer(b"<html>", [(b"content-type", b"text/html"), (b"content-length", b"6")], status=404)
    async with H2Origin(lambda _: answer) as origin, LiveWorker() as live:
        port = listen(live, origin.port)
        for _ in range(2):
            status, fields, body = await ask(port, "Unary", message(b""), BINARY)
            assert (status, fields[b"grpc-status"], fields[b"content-type"], body) == (404, b"12", BINARY.encode(), b"")
        await until(lambda: live.requests(response_code="404", grpc_response_status="12") == 2)


async def test_an_upstream_in_http1_gets_grpc_too(ask: Ask) -> None:
    async with Origin() as origin, LiveWorker() as live:
        await ask(listen(live, origin.port, http2=False), "Unary", base64.b64encode(message(b"hello")), TEXT)
        (seen,) = origin.requests
        assert seen.header(b"content-type") == b"application/grpc"
        assert (seen.header(b"te"), seen.header(b"content-length")) == (b"trailers", None)
        assert seen.body == message(b"hello")


async def test_grpc_itself_passes_on_such_a_port() -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(listen(live, app.port)) as client:
        assert await method(client, "Unary")(b"hello") == b"hello"


async def test_other_requests_pass_on_a_connection_that_has_carried_grpc_web() -> None:
    async with Origin() as origin, LiveWorker() as live:
        async with Client(listen(live, origin.port, http2=False)) as client:
            for kind in (BINARY, "text/plain", BINARY):
                head = f"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Type: {kind}\r\nContent-Length: 4\r\n\r\n"
                client.send(head.encode() + b"body")
                await client.answer()
                client.send(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
                assert (await client.answer()).status == 200
        types = [seen.header(b"content-type") for seen in origin.requests]
        assert types == [b"application/grpc", None, b"text/plain", None, b"application/grpc", None]


async def test_on_other_ports_grpc_web_is_the_applications() -> None:
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        await in_http1(live.listen(cluster), "Unary", message(b"hello"), BINARY)
        assert origin.requests[0].header(b"content-type") == BINARY.encode()
        assert live.requests(request_protocol="http", grpc_response_status="") == 1
