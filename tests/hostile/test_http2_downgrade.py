"""HTTP/2 in front of an HTTP/1.1 upstream: no request becomes another one, or two, on the way down."""

import asyncio

import pytest

from tests.hostile.http2_requests import MALFORMED, Parts
from tests.support.http2_client import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PROTOCOL_ERROR,
    Http2Client,
    Stream,
    block,
    headers_frame,
    raw_frame,
    request,
)
from tests.support.live_worker import LiveWorker, until
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
