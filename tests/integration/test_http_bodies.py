"""Bodies of many megabytes, both ways at once: every byte arrives, and an answer may begin before the request ends."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator

import pytest

from tests.support.client import CHUNKED, Client, get
from tests.support.live_worker import LiveWorker
from tests.support.raw_server import RawServer

PIECE = random.Random(7).randbytes(65_521)  # a prime: pieces never line up with the buffers of anybody
PIECES = 256
SIZE = len(PIECE) * PIECES
MOST_BUFFERED = 1024 * 1024


def digest() -> str:
    sha = hashlib.sha256()
    for _ in range(PIECES):
        sha.update(PIECE)
    return sha.hexdigest()


async def body(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    """The pieces of the message that follows `head`, as they come."""
    head = head.lower()
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return
    left = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    while left:
        piece = await reader.read(min(left, 65536))
        assert piece, "cut short"
        left -= len(piece)
        yield piece


async def write(writer: asyncio.StreamWriter, piece: bytes, chunked: bool) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
    await writer.drain()


@pytest.mark.parametrize("answers_chunked", [False, True], ids=["length-back", "chunked-back"])
@pytest.mark.parametrize("asks_chunked", [False, True], ids=["length-forth", "chunked-forth"])
async def test_a_large_body_is_echoed_while_it_is_sent(asks_chunked: bool, answers_chunked: bool) -> None:
    framing = {False: f"Content-Length: {SIZE}", True: CHUNKED}

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 200 OK\r\n{framing[answers_chunked]}\r\n\r\n".encode())
            async for piece in body(reader, head):
                await write(writer, piece, answers_chunked)
            writer.write(b"0\r\n\r\n" if answers_chunked else b"")

    async def upload(writer: asyncio.StreamWriter) -> None:
        for _ in range(PIECES):
            await write(writer, PIECE, asks_chunked)
        writer.write(b"0\r\n\r\n" if asks_chunked else b"")

    async with RawServer(echo) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client, asyncio.timeout(30):
            most = 0
            for _ in range(2):  # and neither connection has suffered
                client.send(get("/", framing[asks_chunked], method="POST"))
                sending = asyncio.create_task(upload(client.writer))
                head = await client.reader.readuntil(b"\r\n\r\n")
                assert b"connection: close" not in head
                sha = hashlib.sha256()
                async for piece in body(client.reader, head):
                    sha.update(piece)
                    most = max(most, live.buffered())
                await sending
                assert sha.hexdigest() == digest()
            assert most <= MOST_BUFFERED
        assert upstream.connections == 1
        assert live.pooled() == 1


@pytest.mark.parametrize("asks_chunked", [False, True])
async def test_an_answer_that_ends_before_the_body_it_answers_ends_both_connections(asks_chunked: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await reader.readuntil(b"go on")
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client, asyncio.timeout(10):
            framing = CHUNKED if asks_chunked else f"Content-Length: {SIZE}"
            client.send(get("/", framing, method="POST"))
            started = await client.reader.readuntil(b"one\r\n")
            await write(client.writer, b"go on", asks_chunked)
            answer = started + await client.reader.readuntil(b"two\r\n0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            await write(client.writer, get("/smuggled"), asks_chunked)
            assert await client.ended() == "end"
        assert upstream.connections == 1
        assert live.pooled() == 0


async def test_a_large_body_until_close_arrives_whole_as_chunks() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
        for _ in range(PIECES):
            await write(writer, PIECE, False)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client, asyncio.timeout(20):
            for _ in range(2):
                client.send(get())
                head = await client.reader.readuntil(b"\r\n\r\n")
                sha = hashlib.sha256()
                async for piece in body(client.reader, head):
                    sha.update(piece)
                assert sha.hexdigest() == digest()
        assert upstream.connections == 2
