"""HTTP/2 downstreams that take answers late: little waits in the worker, and nobody waits for somebody else."""

import asyncio

from tests.support.http2_client import INITIAL_WINDOW_SIZE, Http2Client, Stream, headers_frame, request, window_frame
from tests.support.live_worker import LiveWorker, until
from tests.support.raw_server import RawServer

ALL = 2**31 - 1
BODY = b"0123456789abcdef" * 65_536
"""1 MiB."""


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)
        await writer.drain()


def waiting(live: LiveWorker) -> int:
    """Bytes queued in the streams of the only connection."""
    ((connection,),) = [listener.runtime.connections for listener in live.worker.listeners.values()]
    return sum(stream.queued_bytes for stream in connection.streams.values())


async def test_answers_that_wait_for_their_windows_hold_up_no_other() -> None:
    """Twenty answers behind windows of 64 KiB are more than a connection keeps. Another one, asked for later, comes
    nevertheless, and so does one of the twenty when its window opens, and in the end all of them."""
    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            await client.handshake()
            client.send(window_frame(0, ALL - 65_535), *(headers_frame(i, request()) for i in range(1, 41, 2)))
            await client.until(lambda: all(len(client.streams.setdefault(i, Stream()).body) for i in range(1, 41, 2)))
            await until(lambda: waiting(live) > 1 << 20)
            client.send(headers_frame(41, request()), window_frame(41, ALL - 65_535))
            assert (await client.response(41)).body == BODY
            client.send(window_frame(7, ALL - 65_535))
            assert (await client.response(7)).body == BODY
            client.send(*(window_frame(i, ALL - 65_535) for i in range(1, 41, 2) if i != 7))
            for i in range(1, 41, 2):
                assert (await client.response(i)).body == BODY
            assert waiting(live) == 0


async def test_answers_flow_on_when_the_window_of_the_connection_opens_again_and_again() -> None:
    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Http2Client(port, {INITIAL_WINDOW_SIZE: ALL}) as client:
            await client.handshake()
            ids = range(1, 21, 2)
            client.send(*(headers_frame(i, request()) for i in ids))
            streams = [client.streams.setdefault(i, Stream()) for i in ids]
            taken = 65_535
            while taken < len(BODY) * len(ids):
                await client.until(lambda most=taken: sum(len(s.body) for s in streams) == most, "all that may come")
                assert waiting(live) < 8 << 20
                client.send(window_frame(0, 300_000))
                taken += 300_000
            for i in ids:
                assert (await client.response(i)).body == BODY


async def test_answers_flow_on_when_their_client_reads_on() -> None:
    async with RawServer(serve) as upstream, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)]))
        async with Http2Client(port, {INITIAL_WINDOW_SIZE: ALL}) as client:
            await client.handshake()
            client.transport.pause_reading()
            client.send(window_frame(0, ALL - 65_535), *(headers_frame(i, request()) for i in range(1, 61, 2)))
            await until(lambda: waiting(live) > 1 << 20)
            client.transport.resume_reading()
            for i in range(1, 61, 2):
                assert (await client.response(i)).body == BODY
