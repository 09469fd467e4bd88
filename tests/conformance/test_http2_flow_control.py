"""Windows, both ways: RFC 9113 §5.2, §6.9.1 and §6.9.2."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import hyperframe.frame as h2f
import pytest

from tests.conformance.http2_peer import (
    BIG,
    Case,
    answer,
    connection_error,
    goes_on,
    ignored,
    params,
    proxy,
    read,
    run,
    stream_error,
    was_reset,
)
from tests.support.http2_client import (
    DATA,
    FLOW_CONTROL_ERROR,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    PADDED,
    Http2Client,
    Stream,
    data_frame,
    headers_frame,
    ping_frame,
    raw_frame,
    request,
    rst_frame,
    settings_frame,
    window_frame,
)
from tests.support.origin import Origin
from tests.support.raw_server import Blackhole

GET_BIG = headers_frame(1, request("/big"))
LARGEST = (1 << 31) - 1
POST = headers_frame(1, request("/hold", method="POST"), end_stream=False)
HELD = headers_frame(1, request("/hold"))

window_error = connection_error(FLOW_CONTROL_ERROR)


def windows() -> Iterator[Case]:
    for name, steps in (
        ("on_an_open_stream", (POST,)),
        ("on_a_half_closed_stream", (HELD,)),
    ):
        yield Case(
            "6.9.1", f"window_overflows_{name}", (*steps, window_frame(1, LARGEST)), stream_error(1, FLOW_CONTROL_ERROR)
        )
        yield Case(
            "6.9.1",
            f"window_overflows_by_the_second_update_{name}",
            (*steps, window_frame(1, LARGEST - 65_535), read, window_frame(1, 1)),
            stream_error(1, FLOW_CONTROL_ERROR),
        )
    yield Case("6.9.1", "window_of_the_connection_overflows", (window_frame(0, LARGEST),), window_error)
    yield Case(
        "6.9.1",
        "window_of_the_connection_overflows_by_the_second_update",
        (window_frame(0, LARGEST - 65_535), read, window_frame(0, 1)),
        window_error,
    )
    yield Case(
        "6.9.1",
        "windows_may_be_the_largest",
        (HELD, window_frame(1, LARGEST - 65_535), window_frame(0, LARGEST - 65_535)),
        ignored,
    )
    yield Case(
        "6.9.2",
        "initial_size_makes_a_window_overflow",
        (HELD, window_frame(1, LARGEST - 65_535), settings_frame({INITIAL_WINDOW_SIZE: 65_536})),
        window_error,
    )
    yield Case(
        "6.9.2",
        "initial_size_does_not_concern_the_connection",
        (window_frame(0, LARGEST - 65_535), settings_frame({INITIAL_WINDOW_SIZE: LARGEST})),
        ignored,
    )
    yield Case(
        "6.9.2",
        "initial_size_does_not_concern_closed_streams",
        (HELD, window_frame(1, LARGEST - 65_535), rst_frame(1), settings_frame({INITIAL_WINDOW_SIZE: LARGEST})),
        ignored,
    )


@pytest.mark.parametrize("case", params([*windows()]))
async def test_receiver(case: Case) -> None:
    await run(case)


@contextlib.asynccontextmanager
async def connection(settings: dict[int, int] | None = None) -> AsyncIterator[Http2Client]:
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port, settings) as client:
        await client.handshake()
        yield client
        assert client.illegal is None, client.illegal


async def body_is(client: Http2Client, size: int, stream_id: int = 1) -> None:
    """So many bytes of the body come, and no more."""
    stream = client.streams.setdefault(stream_id, Stream())
    await client.until(lambda: len(stream.body) >= size and stream.blocks, f"{size} bytes on {stream_id}")
    await read(client)
    assert len(stream.body) == size


async def test_6_9_2_initial_window_of_0_holds_the_body_back_but_not_the_head() -> None:
    async with connection({INITIAL_WINDOW_SIZE: 0}) as client:
        client.send(GET_BIG)
        await body_is(client, 0)
        client.send(window_frame(1, 1))
        await body_is(client, 1)
        client.send(settings_frame({INITIAL_WINDOW_SIZE: 3}))
        await body_is(client, 4)


async def test_6_9_1_empty_body_needs_no_window() -> None:
    async with connection({INITIAL_WINDOW_SIZE: 0}) as client:
        client.send(headers_frame(1, request("/empty")))
        assert (await client.response(1)).body == b""


async def test_6_9_2_last_of_several_initial_sizes_in_one_frame_holds() -> None:
    async with connection() as client:
        client.send(settings_frame([(INITIAL_WINDOW_SIZE, 100_000), (INITIAL_WINDOW_SIZE, 5)]), GET_BIG)
        await body_is(client, 5)


async def test_6_9_2_window_may_become_negative_and_must_be_positive_again_before_data_comes() -> None:
    async with connection({INITIAL_WINDOW_SIZE: 1000}) as client:
        client.send(GET_BIG)
        await body_is(client, 1000)
        client.send(settings_frame({INITIAL_WINDOW_SIZE: 100}))
        await body_is(client, 1000)
        client.send(window_frame(1, 900))
        await body_is(client, 1000)
        client.send(window_frame(1, 1))
        await body_is(client, 1001)
        client.send(settings_frame({INITIAL_WINDOW_SIZE: 102}))
        await body_is(client, 1003)


async def test_6_9_1_window_of_the_connection_holds_all_streams_back() -> None:
    async with connection({INITIAL_WINDOW_SIZE: LARGEST}) as client:
        client.send(GET_BIG)
        await body_is(client, 65_535)
        client.send(headers_frame(3, request("/")))
        await body_is(client, 0, 3)
        # Neither a stream's window nor its initial size helps.
        client.send(settings_frame({INITIAL_WINDOW_SIZE: 1_000_000}), window_frame(1, 1))
        await body_is(client, 65_535)
        client.send(window_frame(0, 10))
        await client.until(lambda: len(client.streams[1].body) + len(client.streams[3].body) >= 65_545, "10 bytes")
        await read(client)
        assert len(client.streams[1].body) + len(client.streams[3].body) == 65_545
        client.send(window_frame(0, 1_000_000))
        assert (await client.response(1)).body == BIG
        assert (await client.response(3)).body == b"ok"


async def test_6_9_1_stream_that_is_reset_while_the_connection_has_no_window_holds_nothing_up() -> None:
    async with connection({INITIAL_WINDOW_SIZE: LARGEST}) as client:
        client.send(GET_BIG)
        await body_is(client, 65_535)
        client.send(rst_frame(1), headers_frame(3, request("/")), window_frame(0, 9))
        assert (await client.response(3)).body == b"ok"
        client.send(window_frame(0, 1_000_000))
        await body_is(client, 65_535)  # §6.4: nothing more of a stream that we reset


async def test_6_9_1_frames_are_no_larger_than_we_allow_nor_than_the_window() -> None:
    for size in (1 << 14, 1 << 15):
        async with connection({INITIAL_WINDOW_SIZE: LARGEST, MAX_FRAME_SIZE: size}) as client:
            client.send(window_frame(0, 1_000_000), GET_BIG)
            # A larger frame would be `illegal`.
            assert (await client.response(1)).body == BIG


class Windows:
    """What the other side allows us to send, and what we sent."""

    def __init__(self, client: Http2Client) -> None:
        self._client = client
        self._sent: Counter[int] = Counter()
        self._initial = client.settings.get(INITIAL_WINDOW_SIZE, 65_535)

    def room(self, stream_id: int) -> int:
        """Of a stream, or (0) of the connection; negative when more was sent."""
        granted = sum(
            frame.window_increment
            for frame in self._client.frames
            if isinstance(frame, h2f.WindowUpdateFrame) and frame.stream_id == stream_id
        )
        return (self._initial if stream_id else 65_535) + granted - self._sent[stream_id]

    def send(self, stream_id: int, frame: bytes) -> None:
        """DATA on the stream, whether there is room or not."""
        self._client.send(frame)
        self._sent[stream_id] += len(frame) - 9
        self._sent[0] += len(frame) - 9

    async def has_room(self, size: int, *stream_ids: int) -> None:
        await self._client.until(
            lambda: all(self.room(stream_id) >= size for stream_id in stream_ids),
            f"room for {size} bytes: {[(stream_id, self.room(stream_id)) for stream_id in stream_ids]}",
        )


def upload(stream_id: int, path: str) -> bytes:
    return headers_frame(stream_id, request(path, method="POST"), end_stream=False)


FULL = 1 << 14


async def test_6_1_padding_counts_and_its_credit_comes_back() -> None:
    async with connection() as client:
        windows = Windows(client)
        client.send(upload(1, "/echo"))
        frame = raw_frame(DATA, PADDED, 1, b"\xffx" + bytes(255))
        # More than a window: without credit for the padding the last frames have no room.
        count = min(windows.room(0), windows.room(1)) // 257 + 100
        sent = 0
        while sent < count:
            await windows.has_room(257, 0, 1)
            batch = min(windows.room(0) // 257, windows.room(1) // 257, count - sent)
            for _ in range(batch):
                windows.send(1, frame)
            sent += batch
        client.send(data_frame(1))
        await client.until(lambda: client.streams[1].blocks, "an answer")
        assert client.streams[1].blocks[0][0] == (b":status", b"200")


async def test_6_9_data_of_a_stream_that_was_refused_counts_and_its_credit_comes_back() -> None:
    async with connection() as client:
        client.send(headers_frame(1, [*request("/bad", method="POST"), (b"connection", b"x")], end_stream=False))
        await was_reset(1)(client)
        windows = Windows(client)
        for _ in range(windows.room(0) // FULL + 4):
            await windows.has_room(FULL, 0)
            windows.send(1, data_frame(1, bytes(FULL), False))
        await goes_on(client)


async def test_6_9_data_of_streams_that_the_client_reset_counts_and_its_credit_comes_back() -> None:
    with Blackhole() as hole:  # the body waits in the proxy when the reset comes
        async with proxy(hole.port) as port, Http2Client(port) as client:
            await client.handshake()
            windows = Windows(client)
            frame = data_frame(1, bytes(min(FULL, windows.room(1))), False)
            before = windows.room(0)
            for stream_id in range(1, 41, 2):
                client.send(upload(stream_id, "/hold"))
                windows.send(stream_id, frame[:5] + stream_id.to_bytes(4, "big") + frame[9:])
                client.send(rst_frame(stream_id))
                await read(client)
            # Credit may be held back to be given in one piece, but not for ever: half the window is there.
            await windows.has_room(before // 2, 0)


async def test_6_9_1_data_beyond_the_window_of_the_stream_is_an_error() -> None:
    with Blackhole() as hole:  # nothing takes the body, so that credit ends
        async with proxy(hole.port) as port, Http2Client(port) as client:
            await client.handshake()
            windows = Windows(client)
            client.send(upload(1, "/bad"))
            stream = client.streams.setdefault(1, Stream())
            for attempt in range(50):
                while windows.room(1) >= 0:
                    windows.send(1, data_frame(1, bytes(min(FULL, windows.room(1) + 1)), False))
                await has_read(client, attempt, lambda: stream.reset is not None)
                if stream.reset is not None or client.closed:
                    break
                assert windows.room(1) >= 0, "more than the window came, without an error and without credit"
            if stream.reset is not None:
                assert stream.reset == FLOW_CONTROL_ERROR
                await client.expect_ping()
            else:
                await client.expect_goaway(FLOW_CONTROL_ERROR)


async def test_6_9_1_data_beyond_the_window_of_the_connection_is_an_error() -> None:
    with Blackhole() as hole:
        async with proxy(hole.port) as port, Http2Client(port) as client:
            await client.handshake()
            windows = Windows(client)
            largest = client.settings.get(MAX_CONCURRENT_STREAMS, 1000)
            if windows.room(1) * largest <= windows.room(0):
                pytest.skip("streams cannot use up the window of the connection")
            stream_id = -1
            for attempt in range(50):
                while windows.room(0) >= 0:
                    if stream_id < 0 or windows.room(stream_id) < FULL:
                        stream_id += 2
                        client.send(upload(stream_id, "/bad"))
                    windows.send(stream_id, data_frame(stream_id, bytes(FULL), False))
                await has_read(client, attempt, lambda: False)
                if client.closed:
                    break
                assert windows.room(0) >= 0, "more than the window came, without an error and without credit"
            await client.expect_goaway(FLOW_CONTROL_ERROR)


async def has_read(client: Http2Client, attempt: int, is_over: Callable[[], bool]) -> None:
    """All that was sent has been read, or the connection is closed, or `is_over`."""
    data = b"%08d" % attempt
    client.send(ping_frame(data))

    def pong() -> bool:
        return any(isinstance(f, h2f.PingFrame) and f.opaque_data == data for f in client.frames)

    await client.until(lambda: pong() or client.closed or is_over(), "all to be read")
