"""HTTP/2 in front of an HTTP/1.1 upstream: no request becomes another one, or two, on the way down."""

import asyncio
import itertools
import re

import pytest

from tests.hostile.http1_requests import LEGAL
from tests.hostile.http1_requests import MALFORMED as BAD_REQUESTS
from tests.hostile.http1_responses import MALFORMED as BAD_RESPONSES
from tests.hostile.http1_responses import TRUNCATED
from tests.hostile.http2_requests import MALFORMED, ODD, SMUGGLED, Parts
from tests.support.http2_client import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INTERNAL_ERROR,
    NO_ERROR,
    PROTOCOL_ERROR,
    Http2Client,
    Stream,
    block,
    headers_frame,
    raw_frame,
    request,
)
from tests.support.http2_origin import H2Answer, H2Origin
from tests.support.live_worker import LiveWorker, exchange, until
from tests.support.origin import Origin, ScriptedOrigin
from tests.support.raw_server import RawServer


class Recorder(RawServer):
    """An upstream that keeps every byte, a list of them for each connection, and answers GET /next only."""

    def __init__(self) -> None:
        super().__init__(self._record)
        self.received: list[bytearray] = []
        self.open = 0

    async def _record(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = bytearray()
        self.received.append(received)
        self.open += 1
        try:
            while data := await reader.read(65536):
                received += data
                if data.startswith(b"GET /next ") and data.endswith(b"\r\n\r\n"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        finally:
            self.open -= 1


def frames(stream_id: int, parts: Parts) -> bytes:
    """HEADERS, DATA, trailers; the last part ends the stream."""
    sent = []
    for number, part in enumerate(parts, 1):
        ends = END_STREAM * (number == len(parts))
        if isinstance(part, bytes):
            sent.append(raw_frame(DATA, ends, stream_id, part))
        else:
            sent.append(raw_frame(HEADERS, ends | END_HEADERS, stream_id, block(part)))
    return b"".join(sent)


@pytest.mark.parametrize(("name", "parts"), MALFORMED, ids=[case[0] for case in MALFORMED])
async def test_what_would_be_another_request_is_refused_and_the_connection_goes_on(name: str, parts: Parts) -> None:
    """Twice, for what is known of the first must not let the second pass; then a good one."""
    async with Recorder() as upstream, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            await client.handshake()
            for stream_id in (1, 3):
                client.send(frames(stream_id, parts))
                stream = client.streams.setdefault(stream_id, Stream())
                await client.until(lambda s=stream: s.reset is not None or s.has_ended or client.closed, "a refusal")
                assert client.closed is None
                if stream.has_ended:
                    assert 400 <= (await client.response(stream_id)).status < 500
                else:
                    assert stream.reset == PROTOCOL_ERROR
            client.send(headers_frame(5, request("/next")))
            assert (await client.response(5)).body == b"ok"
            await until(lambda: upstream.open == 1)  # that of /next: what was begun has been given up
        for received in upstream.received:
            head, _, body = bytes(received).partition(b"\r\n\r\n")
            assert head.startswith(b"GET /next ") or _is_cut(head, body), bytes(received)
            assert head.count(b" HTTP/1.1") == 1
            assert head.startswith(b"GET /next ") or b"smuggled" not in received


def _is_cut(head: bytes, body: bytes) -> bool:
    """A request that was let go before its body turned out wrong: it has no end."""
    if b"\r\ntransfer-encoding: chunked" in head:
        return b"0\r\n\r\n" not in body
    _, _, length = head.partition(b"\r\ncontent-length: ")
    return len(body) < int(length.partition(b"\r\n")[0] or 0)


@pytest.mark.parametrize(("name", "parts", "arrives"), ODD, ids=[case[0] for case in ODD])
async def test_what_is_odd_but_legal_arrives_as_the_request_it_is(
    name: str, parts: Parts, arrives: dict[str, object]
) -> None:
    """Twice on one connection, then another one."""
    async with Origin() as origin, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.handshake()
            for stream_id in (1, 3):
                client.send(frames(stream_id, parts))
                assert (await client.response(stream_id)).status == 200
            client.send(headers_frame(5, request("/next")))
            assert (await client.response(5)).body == b"ok"
    assert origin.errors == []
    *odd, after = origin.requests
    assert after.target == b"/next"
    assert len(odd) == 2
    for seen in odd:
        for part, value in arrives.items():
            if part in ("method", "target", "body", "trailers"):
                assert getattr(seen, part) == value
            else:
                values = [held for key, held in seen.headers if key == part.encode()]
                assert values == ([] if value is None else [value])


async def test_the_same_fields_with_and_without_a_body_are_different_requests() -> None:
    """One after another in every order, as what is known of one block must not stand in for the other."""
    head = request("/", (b"content-length", b"0"), method="POST")
    kinds: dict[str, Parts] = {"end": (head,), "empty": (head, b""), "trailers": (head, [(b"a", b"b")])}
    open_head = request("/", method="POST")
    kinds |= {"plain": (open_head,), "body": (open_head, SMUGGLED), "later": (open_head, b"", SMUGGLED)}
    orders = list(itertools.permutations(kinds, 2))
    async with Origin() as origin, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.handshake()
            sent = [kind for order in orders for kind in order]
            for number, kind in enumerate(sent):
                client.send(frames(2 * number + 1, kinds[kind]))
                assert (await client.response(2 * number + 1)).status == 200
    assert origin.errors == []
    bodies = {"body": SMUGGLED, "later": SMUGGLED}
    assert [seen.body for seen in origin.requests] == [bodies.get(kind, b"") for kind in sent]


# ── and back ──


@pytest.mark.parametrize(("name", "script"), BAD_RESPONSES, ids=[case[0] for case in BAD_RESPONSES])
async def test_a_malformed_response_becomes_an_error_of_ours_and_its_connection_serves_nobody_else(
    name: str, script: bytes
) -> None:
    async with ScriptedOrigin(script) as origin, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.handshake()
            for number, stream_id in enumerate((1, 3), 1):
                client.send(headers_frame(stream_id, request(method="POST"), end_stream=True))
                answer = await client.response(stream_id)
                assert answer.status in (502, 503)
                assert b"hello" not in answer.body
                assert b"set-cookie" not in dict(answer.headers)
                assert live.pooled() == 0
                assert origin.connections == number


@pytest.mark.parametrize(("name", "script"), TRUNCATED, ids=[case[0] for case in TRUNCATED])
async def test_a_response_that_breaks_off_is_never_a_whole_one(name: str, script: bytes) -> None:
    """The stream is reset; the connection, and what else is on it, goes on."""
    async with ScriptedOrigin(script) as origin, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.handshake()
            client.send(headers_frame(1, request(method="POST")))
            await client.expect_rst(1, INTERNAL_ERROR)
            assert not client.streams[1].has_ended
            await client.expect_ping()
            assert client.closed is None
            assert live.pooled() == 0


async def test_bytes_after_a_response_are_not_the_next_answer() -> None:
    evil = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
    honest = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfirst"
    async with ScriptedOrigin(honest + evil, closes=False) as origin, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.handshake()
            for stream_id in (1, 3, 5):
                client.send(headers_frame(stream_id, request()))
                assert (await client.response(stream_id)).body == b"first"
            assert origin.connections == 3


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_body_where_there_is_none_is_not_the_next_answer(status: bytes) -> None:
    evil = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"
    async with ScriptedOrigin(b"HTTP/1.1 " + status + b"\r\n\r\n" + evil, closes=False) as origin, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.handshake()
            for stream_id in (1, 3):
                client.send(headers_frame(stream_id, request()))
                answer = await client.response(stream_id)
                assert (answer.status, answer.body) == (int(status[:3]), b"")
            assert origin.connections == 2


@pytest.mark.parametrize("method", ["POST", "HEAD", "GET"])
async def test_an_answer_before_the_body_is_whole_ends_the_upstream_connection(method: str) -> None:
    """What of the body would come later must not be the next request there."""
    async with ScriptedOrigin(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", closes=False) as origin:
        async with LiveWorker() as live:
            async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
                await client.handshake()
                for number, stream_id in enumerate((1, 3), 1):
                    client.send(headers_frame(stream_id, request(method=method), end_stream=False))
                    assert (await client.response(stream_id)).status == 200
                    await client.expect_rst(stream_id, NO_ERROR)
                    client.send(raw_frame(DATA, END_STREAM, stream_id, SMUGGLED))
                    await client.expect_ping(b"%08d" % number)
                    assert (live.pooled(), live.open_upstreams(), origin.connections) == (0, 0, number)


async def test_an_answer_to_head_has_a_length_and_no_body() -> None:
    async with ScriptedOrigin(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", closes=False) as origin:
        async with LiveWorker() as live:
            async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
                await client.handshake()
                client.send(headers_frame(1, request(method="HEAD")))
                answer = await client.response(1)
                assert dict(answer.headers)[b"content-length"] == b"9"
                assert answer.body == b""
                assert live.pooled() == 1


# ── and up: HTTP/1.1 in front of an HTTP/2 upstream ──


@pytest.mark.parametrize(("name", "data", "status"), BAD_REQUESTS, ids=[case[0] for case in BAD_REQUESTS])
async def test_a_malformed_http1_request_does_not_become_an_http2_one(name: str, data: bytes, status: int) -> None:
    async with H2Origin(lambda _: H2Answer(b"ok")) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)], speaks_http2=True))
        answer = await exchange(port, data)
        assert not [seen for seen in origin.requests if seen.is_whole], name
        statuses = re.findall(rb"HTTP/1\.1 (\d{3})", answer)
        assert len(statuses) <= 1
        assert status == 0 or int(statuses[0]) == status


@pytest.mark.parametrize(("name", "data"), LEGAL, ids=[case[0] for case in LEGAL])
async def test_an_odd_but_legal_http1_request_is_one_http2_request(name: str, data: bytes) -> None:
    """The origin's library refuses what RFC 9113 forbids: upper case, fields of a connection, two hosts."""
    async with H2Origin(lambda _: H2Answer(b"ok")) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)], speaks_http2=True))
        answer = await exchange(port, data)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        (seen,) = origin.requests
        assert seen.is_whole
        names = [field for field, _ in seen.fields]
        assert names[:4] == [b":method", b":scheme", b":authority", b":path"]
        assert not {b"host", b"connection", b"transfer-encoding", b"keep-alive", b"upgrade"} & set(names)
