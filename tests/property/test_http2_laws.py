"""Laws of HTTP/2 through a live worker: how bytes are cut, framed, padded and compressed says nothing.

Examples run on real sockets; only the cuts are not left to them: pieces are handed to the connection one after another,
within one turn of the loop, so that nothing else can make a difference.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import hpack
import hyperframe.frame as h2f
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.http2_client import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PADDED,
    PRIORITY,
    Field,
    Http2Client,
    Stream,
    data_frame,
    goaway_frame,
    headers_frame,
    ping_frame,
    raw_frame,
    request,
    rst_frame,
    settings_frame,
    window_frame,
)
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin

T = TypeVar("T")
LIVE = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CHANGING = {b"x-request-id", b"x-envoy-upstream-service-time"}


def run(example: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(example)


def pieces_of(data: bytes, cuts: list[float]) -> list[bytes]:
    """The bytes, cut at these shares of their length."""
    places = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


SHARES = st.lists(st.floats(0, 1), max_size=30)


# ── messages ──


@dataclass(frozen=True)
class Message:
    """A request as it goes over the wire, except for its stream."""

    fields: list[Field]
    body: list[tuple[bytes, int]]
    """Data and padding of each DATA frame; -1: not padded."""
    trailers: list[Field] | None
    block_cuts: list[float]

    def encode(self, stream_id: int, encoder: hpack.Encoder) -> bytes:
        has_more = bool(self.body) or self.trailers is not None
        sent = [self._block(stream_id, encoder.encode(self.fields), END_STREAM * (not has_more))]
        for number, (data, padding) in enumerate(self.body, 1):
            flags = END_STREAM * (number == len(self.body) and self.trailers is None)
            if padding >= 0:
                data, flags = bytes((padding,)) + data + bytes(padding), flags | PADDED
            sent.append(raw_frame(DATA, flags, stream_id, data))
        if self.trailers is not None:
            sent.append(self._block(stream_id, encoder.encode(self.trailers), END_STREAM))
        return b"".join(sent)

    def _block(self, stream_id: int, block: bytes, flags: int) -> bytes:
        first, *rest = pieces_of(block, self.block_cuts) or [b""]
        sent = [raw_frame(HEADERS, flags | END_HEADERS * (not rest), stream_id, first)]
        sent += [raw_frame(CONTINUATION, END_HEADERS * (part is rest[-1]), stream_id, part) for part in rest]
        return b"".join(sent)


BODIES = st.lists(st.tuples(st.binary(max_size=40), st.integers(-1, 9)), max_size=4)
FIELDS: list[Field] = [(b"foo", b"b"), (b"foo", b"c"), (b"cookie", b"d=e"), (b"te", b"trailers"), (b"x", b"y" * 200)]
REFUSED: list[Field] = [
    (b"Foo", b"b"),
    (b"te", b"gzip"),
    (b"foo", b"b\n"),
    (b"content-length", b"7"),
    (b"expect", b"y"),
]


@st.composite
def messages(draw: Callable[..., Any], spoilt: bool = False) -> Message:
    body = draw(BODIES)
    choices = st.sampled_from(FIELDS + REFUSED * spoilt)
    fields = request(
        draw(st.sampled_from(["/", "/a", "/b?c=d"])), *draw(st.lists(choices, max_size=4, unique=True)),
        method=draw(st.sampled_from(["GET", "POST"])),
    )  # fmt: skip
    trailers = draw(st.none() | st.lists(st.sampled_from([(b"t", b"1"), (b"u", b"2")]), min_size=1, max_size=2))
    return Message(fields, body, trailers, draw(st.lists(st.floats(0, 1), max_size=3)))


# ── laws ──

OTHERS: list[Callable[[int], bytes]] = [
    lambda last: ping_frame(),
    lambda last: settings_frame({INITIAL_WINDOW_SIZE: 70_000}),
    lambda last: settings_frame({INITIAL_WINDOW_SIZE: 10}) + settings_frame({INITIAL_WINDOW_SIZE: 65_535}),
    lambda last: raw_frame(PRIORITY, 0, last + 2, bytes(5)),
    lambda last: raw_frame(0xFA, 0xFF, last, b"?"),
    lambda last: window_frame(0, 100),
    lambda last: window_frame(last, 2**31 - 1),
    lambda last: rst_frame(last),
    lambda last: data_frame(last, b"late"),
    lambda last: headers_frame(last, request("/late")),
    lambda last: goaway_frame(),
    lambda last: b"\xff" * 20,
]
STEPS = st.lists(messages(spoilt=True) | st.sampled_from(OTHERS), min_size=1, max_size=12)


def wire(steps: list[Message | Callable[[int], bytes]]) -> bytes:
    """The steps on one connection; what is no message is about the stream before."""
    encoder, last, sent = hpack.Encoder(), -1, []
    for step in steps:
        if isinstance(step, Message):
            last += 2
            sent.append(step.encode(last, encoder))
        elif last > 0:
            sent.append(step(last))
    return b"".join(sent)


async def outcome(pieces: list[bytes]) -> tuple[list[Any], dict[int, Any], list[str]]:
    """(what the upstream saw, what came back on each stream, what on the connection), less what no two share."""
    async with Origin() as origin, LiveWorker() as live:
        async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            await client.handshake()
            ((connection,),) = [listener.runtime.connections for listener in live.worker.listeners.values()]
            begin = len(client.frames)
            for piece in pieces:
                connection.data_received(piece)
            connection.data_received(ping_frame(b"the end."))
            await client.until(
                lambda: client.closed or (not connection.streams and b"the end." in _pings(client)), "all to be done"
            )
            back = {
                i: ([_steady(block) for block in s.blocks], bytes(s.body), s.has_ended, s.reset)
                for i, s in client.streams.items()
                if i
            }
            common = [repr(f) for f in client.frames[begin:] if not f.stream_id and not isinstance(f, h2f.PingFrame)]
        assert origin.errors == []
        seen = sorted((s.method, s.target, _steady(s.headers), s.body, s.trailers) for s in origin.requests)
        return seen, back, common


def _pings(client: Http2Client) -> list[bytes]:
    return [f.opaque_data for f in client.frames if isinstance(f, h2f.PingFrame)]


def _steady(fields: list[Field]) -> list[Field]:
    return [(name, value) for name, value in fields if name not in CHANGING]


@LIVE
@given(STEPS, SHARES)
def test_any_cut_of_the_same_bytes_has_the_same_outcome(steps: list[Any], cuts: list[float]) -> None:
    data = wire(steps)
    assert run(outcome(pieces_of(data, cuts))) == run(outcome([data]))


@settings(LIVE, max_examples=10)
@given(STEPS)
def test_single_bytes_have_the_same_outcome(steps: list[Any]) -> None:
    data = wire(steps)
    assert run(outcome([data[at : at + 1] for at in range(len(data))])) == run(outcome([data]))


@LIVE
@given(st.lists(messages(), min_size=1, max_size=8), st.lists(st.integers(0, 7), max_size=12), st.booleans())
def test_requests_arrive_as_they_were_however_their_fields_are_compressed(
    kinds: list[Message], order: list[int], has_table: bool
) -> None:
    """A few kinds of requests in any order: most blocks are indices, which mean something else whenever the table has
    changed, and what is remembered of one must not serve for another."""
    sent = [kinds[number % len(kinds)] for number in (*range(len(kinds)), *order)]

    async def example() -> None:
        encoder = hpack.Encoder()
        if not has_table:
            encoder.header_table_size = 0
        async with Origin() as origin, LiveWorker() as live:
            async with Http2Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
                await client.handshake()
                for number, message in enumerate(sent):
                    client.send(message.encode(2 * number + 1, encoder))
                    assert (await client.response(2 * number + 1)).status == 200
            assert origin.errors == []
            assert len(origin.requests) == len(sent)
            for seen, message in zip(origin.requests, sent, strict=True):
                assert (seen.method, seen.target) == (dict(message.fields)[b":method"], dict(message.fields)[b":path"])
                assert seen.body == b"".join(data for data, _ in message.body)
                assert seen.trailers == (message.trailers or [])
                for name, _ in FIELDS:
                    values = [value for key, value in message.fields if key == name]
                    assert [value for key, value in seen.headers if key == name] == values

    run(example())


SIZES = st.integers(0, 300) | st.sampled_from([9_000, 16_383, 16_384, 16_385, 65_535, 65_536, 100_000, 300_000])
"""Of pieces of a body; those around the lengths of frames, windows and buffers are likely."""


def cut_body(sizes: list[int]) -> list[bytes]:
    """A body in pieces of these sizes, no two kilobytes of it alike."""
    whole = b"".join(b"%8d" % number for number in range(sum(sizes) // 8 + 1))
    places = [0, *accumulate(sizes)]
    return [whole[begin:end] for begin, end in pairwise(places)]


def framed(pieces: list[bytes], paddings: list[int], ends: bool) -> list[bytes]:
    """DATA frames of stream 1, each with the next of the paddings; -1: not padded."""
    sent = []
    chunks = [p[at : at + 16_000] for p in pieces for at in range(0, len(p), 16_000)]
    for number, chunk in enumerate(chunks, 1):
        padding = paddings[number % len(paddings)]
        flags = END_STREAM * (ends and number == len(chunks))
        if padding >= 0:
            chunk, flags = bytes((padding,)) + chunk + bytes(padding), flags | PADDED
        sent.append(raw_frame(DATA, flags, 1, chunk))
    return sent if chunks or not ends else [data_frame(1)]


async def send_within_windows(client: Http2Client, frames: list[bytes]) -> None:
    """Each as soon as the proxy's windows have room for it."""
    used = 0
    for frame in frames:
        length = len(frame) - 9
        used += length

        def has_room(used: int = used) -> bool:
            given = {0: 65_535, 1: client.settings[INITIAL_WINDOW_SIZE]}
            for update in client.frames:
                if isinstance(update, h2f.WindowUpdateFrame):
                    given[update.stream_id] += update.window_increment
            return min(given.values()) >= used

        await client.until(has_room, "room in the windows")
        client.send(frame)


async def take(client: Http2Client, body: bytes, step: int) -> None:
    """Opens the stream's window by `step` whenever it has been used up, until the body is there."""
    taken = 0
    while taken < len(body):
        taken += step
        client.send(window_frame(1, step), window_frame(0, step))
        await client.until(lambda taken=taken: len(client.streams[1].body) >= min(taken, len(body)), "the body")


@settings(LIVE, max_examples=40)
@given(
    up=st.lists(SIZES, max_size=5),
    down=st.lists(SIZES, max_size=5),
    paddings=st.lists(st.sampled_from([-1, 0, 1, 255]), min_size=1, max_size=4),
    trailers=st.lists(st.sampled_from([(b"x-sum", b"1"), (b"x-end", b"y" * 300)]), max_size=2, unique=True),
    says_length=st.booleans(),
    window=st.sampled_from([0, 1, 1000, 65_535, 2**20]),
)
def test_a_body_arrives_as_it_was_both_ways_however_it_is_framed(
    up: list[int], down: list[int], paddings: list[int], trailers: list[Field], says_length: bool, window: int
) -> None:
    asked, answered = cut_body(up), cut_body(down)
    whole_up, whole_down = b"".join(asked), b"".join(answered)
    lines = b"".join(b"%b: %b\r\n" % field for field in trailers)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in answered if piece)
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + lines + b"\r\n"
    plain = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(whole_down) + whole_down

    async def example() -> None:
        async with Origin(lambda _: plain if says_length else chunked) as origin, LiveWorker() as live:
            port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
            async with Http2Client(port, {INITIAL_WINDOW_SIZE: window}) as client:
                await client.handshake()
                client.send(window_frame(0, 2**20))
                length = [(b"content-length", b"%d" % len(whole_up))] if says_length else []
                client.send(headers_frame(1, request("/", *length, method="POST"), end_stream=False))
                await send_within_windows(client, framed(asked, paddings, ends=not trailers))
                if trailers:
                    client.send(headers_frame(1, trailers))
                client.streams.setdefault(1, Stream())
                await take(client, whole_down[window:], max(len(whole_down) // 20, 1))
                answer = await client.response(1)
        (seen,) = origin.requests
        assert origin.errors == []
        assert seen.body == whole_up
        assert answer.body == whole_down
        if not says_length:
            assert seen.trailers == answer.trailers == trailers

    run(example())
