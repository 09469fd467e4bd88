"""A hostile upstream: the downstream gets an honest answer, and the connection that lied is not used again."""

import asyncio
import re

import pytest

from tests.hostile.http1_responses import MALFORMED, TRUNCATED
from tests.support.client import Client, post
from tests.support.live_worker import LiveWorker, exchange
from tests.support.origin import Origin, ScriptedOrigin
from tests.support.raw_server import RawServer

REQUEST = b"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 0\r\n\r\n"
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n/path"


@pytest.mark.parametrize(("name", "script"), MALFORMED, ids=[case[0] for case in MALFORMED])
async def test_malformed_response_becomes_an_error_of_ours(name: str, script: bytes) -> None:
    async with ScriptedOrigin(script) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, REQUEST)
        final = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer) if not status.startswith(b"1")]
        assert final in ([502], [503]), answer
        assert b"hello" not in answer
        assert b"ookie" not in answer
        assert live.pooled() == 0


@pytest.mark.parametrize(("name", "script"), TRUNCATED, ids=[case[0] for case in TRUNCATED])
async def test_a_response_that_breaks_off_is_never_a_whole_one(name: str, script: bytes) -> None:
    async with ScriptedOrigin(script) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, REQUEST)
        assert not answer.endswith(b"0\r\n\r\n"), answer
        assert b"Content-Length: 10" not in answer or not answer.endswith(b"hellohello")
        assert live.pooled() == 0


async def test_bytes_after_the_response_are_not_the_next_answer() -> None:
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    honest = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst"
    async with ScriptedOrigin(honest + evil, closes=False) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, REQUEST + REQUEST)
        assert answer.count(b"first") == 2
        assert b"evil" not in answer
        assert origin.connections == 2


async def test_each_request_gets_its_own_answer_after_a_bad_one() -> None:
    answers = iter([b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"])
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"
    async with Origin(lambda seen: next(answers, good)) as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, REQUEST + REQUEST)
        assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)] == [502, 200]
        assert answer.endswith(b"good")
        assert origin.connections == 2


NEEDS_MORE = frozenset({"close_at_once", "close_in_status_line", "close_in_fields", "close_before_end_of_head"})
"""What has come could still become a response: only its end shows that it will not."""


@pytest.mark.parametrize(("name", "bad"), MALFORMED, ids=[case[0] for case in MALFORMED])
async def test_a_connection_that_lied_once_is_replaced_though_the_upstream_would_keep_it(name: str, bad: bytes) -> None:
    """Good answer, bad answer, good answer: the third comes over another connection and is the third request's own."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for answer in (GOOD, bad) if connections == 1 else (GOOD, GOOD):
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            writer.write(answer.replace(b"/path", path))
        if connections > 1 or name not in NEEDS_MORE:
            await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Client(port) as client:
            assert (await client.ask(post(b"", path="/aaaa"))).body == b"/aaaa"
            answer = await client.ask(post(b"", path="/bbbb"))
            assert answer.status in (502, 503)
            assert (await client.ask(post(b"", path="/cccc"))).body == b"/cccc"
        assert connections == 2
        assert live.pooled() == 1
        assert live.requests(response_code=str(answer.status)) == 1
