"""Each frame type as a server must take it: RFC 9113 §6.1–6.10 and §7. Flow control has a file of its own."""

from collections.abc import Iterator

import hyperframe.frame as h2f
import pytest

from tests.conformance.http2_peer import (
    Case,
    Step,
    answered,
    connection_error,
    either_error,
    error_or_ignored,
    ignored,
    params,
    read,
    run,
    serves,
    stream_error,
)
from tests.support.http2_client import (
    ACK,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    INTERNAL_ERROR,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    NO_ERROR,
    PADDED,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    Http2Client,
    block,
    data_frame,
    goaway_frame,
    headers_frame,
    ping_frame,
    raw_frame,
    request,
    rst_frame,
    settings_ack,
    settings_frame,
    window_frame,
)

GET = block(request("/"))
BAD = block(request("/bad"))
HALF = len(BAD) // 2
POST = headers_frame(1, request("/", method="POST"), end_stream=False)
ECHO = headers_frame(1, request("/echo", method="POST"), end_stream=False)
BAD_POST = headers_frame(1, request("/bad", method="POST"), end_stream=False)
HELD = headers_frame(1, request("/hold"))
"""A request that is not answered: the stream stays half-closed (remote)."""
WEIGHT = b"\0\0\0\0\x0f"
INTERRUPTIONS = {
    "data": data_frame(1, b"body"),
    "headers": headers_frame(1, BAD),
    "headers_of_another_stream": headers_frame(3, BAD),
    "priority": raw_frame(PRIORITY, 0, 1, WEIGHT),
    "priority_of_another_stream": raw_frame(PRIORITY, 0, 3, WEIGHT),
    "rst_stream": rst_frame(1),
    "settings": settings_frame(),
    "settings_ack": settings_ack(),
    "push_promise": raw_frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4) + BAD),
    "ping": ping_frame(),
    "goaway": goaway_frame(),
    "window_update": window_frame(0, 1),
    "continuation_of_another_stream": raw_frame(CONTINUATION, END_HEADERS, 3, BAD),
}
"""Frames that must not come inside a field block on stream 1."""


def body_is(body: bytes) -> Step:
    """The origin got this body: /echo answers with it."""

    async def step(client: Http2Client) -> None:
        assert (await client.response(1)).body == body

    return step


def acknowledged(count: int) -> Step:
    """So many of our SETTINGS, with the first."""

    async def step(client: Http2Client) -> None:
        def acks() -> int:
            return sum(isinstance(f, h2f.SettingsFrame) and "ACK" in f.flags for f in client.frames)

        await client.until(lambda: acks() >= count, f"{count} acknowledgements of SETTINGS")
        await read(client)
        assert acks() == count

    return step


def pong(data: bytes) -> Step:
    async def step(client: Http2Client) -> None:
        await client.frame(h2f.PingFrame, lambda f: "ACK" in f.flags and f.opaque_data == data)

    return step


def no_pong(data: bytes) -> Step:
    async def step(client: Http2Client) -> None:
        await read(client)
        assert not [f for f in client.frames if isinstance(f, h2f.PingFrame) and f.opaque_data == data]

    return step


async def nothing_wrong(client: Http2Client) -> None:
    """No stream was reset, and a GOAWAY that came is no complaint."""
    assert not [f for f in client.frames if isinstance(f, h2f.RstStreamFrame)]
    assert not [f for f in client.frames if isinstance(f, h2f.GoAwayFrame) and f.error_code != NO_ERROR]


def padded(kind: int, flags: int, stream_id: int, content: bytes, padding: int, *, says: int | None = None) -> bytes:
    """says: the pad length in the frame, where it is not the truth."""
    length = padding if says is None else says
    return raw_frame(kind, flags | PADDED, stream_id, bytes((length,)) + content + bytes(padding))


def data() -> Iterator[Case]:
    error = connection_error(PROTOCOL_ERROR)
    yield Case("6.1", "data_on_stream_0", (raw_frame(DATA, END_STREAM, 0, b"body"),), error)
    for padding in (0, 1, 255):
        yield Case(
            "6.1",
            f"data_with_padding_of_{padding}",
            (ECHO, padded(DATA, END_STREAM, 1, b"body", padding), body_is(b"body")),
            serves(1),
        )
    yield Case(
        "6.1",
        "data_that_is_all_padding",
        (ECHO, padded(DATA, 0, 1, b"", 9), data_frame(1, b"body"), body_is(b"body")),
        serves(1),
    )
    yield Case("6.1", "pad_length_is_the_payload's", (BAD_POST, padded(DATA, END_STREAM, 1, b"body", 0, says=5)), error)
    yield Case("6.1", "pad_length_is_more", (BAD_POST, padded(DATA, END_STREAM, 1, b"body", 0, says=6)), error)
    yield Case("6.1", "pad_length_255_of_1_byte", (BAD_POST, padded(DATA, END_STREAM, 1, b"", 0, says=255)), error)
    # A receiver MAY mind.
    yield Case(
        "6.1",
        "padding_that_is_not_zero",
        (POST, raw_frame(DATA, END_STREAM | PADDED, 1, b"\x03body\0\1\0")),
        error_or_ignored(1, connection=(PROTOCOL_ERROR,)),
    )
    yield Case("6.1", "empty_data_that_ends_the_stream", (POST, data_frame(1)), serves(1))
    yield Case("6.1", "empty_data_before_data", (POST, data_frame(1, b"", False), data_frame(1, b"body")), serves(1))


def headers() -> Iterator[Case]:
    error = connection_error(PROTOCOL_ERROR)
    ends = END_STREAM | END_HEADERS
    yield Case("6.2", "headers_on_stream_0", (raw_frame(HEADERS, ends, 0, BAD),), error)
    for padding in (0, 1, 255):
        yield Case("6.2", f"headers_with_padding_of_{padding}", (padded(HEADERS, ends, 1, GET, padding),), serves(1))
    yield Case(
        "6.2",
        "headers_with_padding_and_priority",
        (padded(HEADERS, ends | WITH_PRIORITY, 1, WEIGHT + GET, 7),),
        serves(1),
    )
    yield Case("6.2", "headers_with_priority", (raw_frame(HEADERS, ends | WITH_PRIORITY, 1, WEIGHT + GET),), serves(1))
    yield Case(
        "6.2",
        "headers_that_are_all_padding_and_a_continuation",
        (padded(HEADERS, END_STREAM, 1, b"", 9), raw_frame(CONTINUATION, END_HEADERS, 1, GET)),
        serves(1),
    )
    yield Case(
        "6.2",
        "padding_that_is_not_zero",
        (raw_frame(HEADERS, ends | PADDED, 1, b"\x03" + GET + b"\0\1\0"),),
        error_or_ignored(1, connection=(PROTOCOL_ERROR,)),
    )
    for name, says in (("is_the_payload's", len(BAD) + 1), ("is_more", len(BAD) + 2), ("is_255", 255)):
        yield Case("6.2", f"pad_length_{name}", (padded(HEADERS, ends, 1, BAD, 0, says=says),), error)
    yield Case(
        "6.2",
        "padding_leaves_no_room_for_the_priority",
        (padded(HEADERS, ends | WITH_PRIORITY, 1, WEIGHT, 0, says=3),),
        connection_error(PROTOCOL_ERROR, FRAME_SIZE_ERROR),
    )
    yield Case(
        "6.2",
        "end_stream_with_a_continuation",
        (raw_frame(HEADERS, END_STREAM, 1, GET[:9]), raw_frame(CONTINUATION, END_HEADERS, 1, GET[9:])),
        serves(1),
    )
    for name, frame in INTERRUPTIONS.items():
        begun = raw_frame(HEADERS, END_STREAM, 1, BAD[:HALF])
        rest = raw_frame(CONTINUATION, END_HEADERS, 1, BAD[HALF:])
        yield Case("6.2", f"field_block_interrupted_by_{name}", (begun, frame, rest), error)


def priority() -> Iterator[Case]:
    yield Case("6.3", "priority_on_stream_0", (raw_frame(PRIORITY, 0, 0, WEIGHT),), connection_error(PROTOCOL_ERROR))
    for size in (0, 4, 6):
        frame = raw_frame(PRIORITY, 0, 1, bytes(size))
        # On an idle stream there is nothing to reset, so that a connection error is as good.
        yield Case("6.3", f"priority_of_{size}_bytes_on_an_idle_stream", (frame,), either_error(1, FRAME_SIZE_ERROR))
        yield Case(
            "6.3", f"priority_of_{size}_bytes_on_an_open_stream", (BAD_POST, frame), stream_error(1, FRAME_SIZE_ERROR)
        )


def rst_stream() -> Iterator[Case]:
    yield Case("6.4", "rst_stream_on_stream_0", (rst_frame(0),), connection_error(PROTOCOL_ERROR))
    yield Case("6.4", "rst_stream_on_an_idle_stream", (rst_frame(1),), connection_error(PROTOCOL_ERROR))
    for size in (0, 3, 5):
        yield Case(
            "6.4",
            f"rst_stream_of_{size}_bytes",
            (BAD_POST, raw_frame(RST_STREAM, 0, 1, bytes(size))),
            connection_error(FRAME_SIZE_ERROR),
        )
    yield Case("6.4", "nothing_is_sent_on_a_stream_after_its_rst_stream", (HELD, rst_frame(1), read), ignored)


def settings() -> Iterator[Case]:
    size_error, protocol_error = connection_error(FRAME_SIZE_ERROR), connection_error(PROTOCOL_ERROR)
    window_error = connection_error(FLOW_CONTROL_ERROR)
    yield Case("6.5", "ack_with_a_payload", (raw_frame(SETTINGS, ACK, 0, bytes(6)),), size_error)
    yield Case("6.5", "ack_with_1_byte", (raw_frame(SETTINGS, ACK, 0, bytes(1)),), size_error)
    yield Case("6.5", "settings_on_an_idle_stream", (raw_frame(SETTINGS, 0, 1),), protocol_error)
    yield Case("6.5", "settings_on_an_open_stream", (BAD_POST, raw_frame(SETTINGS, 0, 1)), protocol_error)
    yield Case("6.5", "ack_on_a_stream", (raw_frame(SETTINGS, ACK, 1),), protocol_error)
    for size in (1, 5, 7):
        yield Case("6.5", f"settings_of_{size}_bytes", (raw_frame(SETTINGS, 0, 0, bytes(size)),), size_error)

    most = (1 << 32) - 1
    for name, setting, value, expect in (
        ("header_table_size_0", HEADER_TABLE_SIZE, 0, ignored),
        ("header_table_size_largest", HEADER_TABLE_SIZE, most, ignored),
        ("enable_push_0", ENABLE_PUSH, 0, ignored),
        ("enable_push_1", ENABLE_PUSH, 1, ignored),
        ("enable_push_2", ENABLE_PUSH, 2, protocol_error),
        ("enable_push_largest", ENABLE_PUSH, most, protocol_error),
        ("max_concurrent_streams_0", MAX_CONCURRENT_STREAMS, 0, ignored),
        ("max_concurrent_streams_largest", MAX_CONCURRENT_STREAMS, most, ignored),
        ("initial_window_size_largest", INITIAL_WINDOW_SIZE, (1 << 31) - 1, ignored),
        ("initial_window_size_above", INITIAL_WINDOW_SIZE, 1 << 31, window_error),
        ("initial_window_size_far_above", INITIAL_WINDOW_SIZE, most, window_error),
        ("max_frame_size_0", MAX_FRAME_SIZE, 0, protocol_error),
        ("max_frame_size_below", MAX_FRAME_SIZE, (1 << 14) - 1, protocol_error),
        ("max_frame_size_least", MAX_FRAME_SIZE, 1 << 14, ignored),
        ("max_frame_size_largest", MAX_FRAME_SIZE, (1 << 24) - 1, ignored),
        ("max_frame_size_above", MAX_FRAME_SIZE, 1 << 24, protocol_error),
        ("max_header_list_size_largest", MAX_HEADER_LIST_SIZE, most, ignored),
    ):
        yield Case("6.5.2", name, (settings_frame({setting: value}),), expect)
    yield Case(
        "6.5.2",
        "a_bad_value_behind_a_good_one",
        (settings_frame([(INITIAL_WINDOW_SIZE, 1), (INITIAL_WINDOW_SIZE, 1 << 31)]),),
        window_error,
    )
    yield Case("6.5.3", "every_settings_is_acknowledged", (settings_frame() * 3, acknowledged(4)), ignored)
    yield Case(
        "6.5.3",
        "values_are_taken_in_order",
        (
            settings_frame([(INITIAL_WINDOW_SIZE, 1), (INITIAL_WINDOW_SIZE, 70_000), (MAX_CONCURRENT_STREAMS, 0)]),
            headers_frame(1, GET),
            answered(1),
        ),
        serves(1),
    )


def push_promise() -> Iterator[Case]:
    error = connection_error(PROTOCOL_ERROR)
    promise = bytes((0, 0, 0, 2)) + BAD
    for name, steps in (
        ("on_stream_0", (raw_frame(PUSH_PROMISE, END_HEADERS, 0, promise),)),
        ("on_an_idle_stream", (raw_frame(PUSH_PROMISE, END_HEADERS, 1, promise),)),
        ("on_an_open_stream", (BAD_POST, raw_frame(PUSH_PROMISE, END_HEADERS, 1, promise))),
        ("on_a_half_closed_stream", (HELD, raw_frame(PUSH_PROMISE, END_HEADERS, 1, promise))),
        (
            "on_a_closed_stream",
            (headers_frame(1, GET), answered(1), raw_frame(PUSH_PROMISE, END_HEADERS, 1, promise)),
        ),
        ("without_end_headers", (HELD, raw_frame(PUSH_PROMISE, 0, 1, promise))),
    ):
        yield Case("8.4", f"push_promise_{name}", steps, error)


def ping() -> Iterator[Case]:
    yield Case(
        "6.7", "ping_is_answered_with_its_payload", (ping_frame(b"\0\xff\r\n abc"), pong(b"\0\xff\r\n abc")), ignored
    )
    yield Case(
        "6.7",
        "pings_are_all_answered",
        (*(ping_frame(b"ping..%02d" % i) for i in range(9)), pong(b"ping..08")),
        ignored,
    )
    yield Case("6.7", "ack_is_not_answered", (ping_frame(b"unasked.", ack=True), no_pong(b"unasked.")), ignored)
    yield Case("6.7", "ping_on_an_idle_stream", (raw_frame(PING, 0, 1, bytes(8)),), connection_error(PROTOCOL_ERROR))
    yield Case(
        "6.7", "ping_on_an_open_stream", (BAD_POST, raw_frame(PING, 0, 1, bytes(8))), connection_error(PROTOCOL_ERROR)
    )
    for flags, name in ((0, "ping"), (ACK, "ack")):
        for size in (0, 7, 9, 16):
            yield Case(
                "6.7",
                f"{name}_of_{size}_bytes",
                (raw_frame(PING, flags, 0, bytes(size)),),
                connection_error(FRAME_SIZE_ERROR),
            )


def goaway() -> Iterator[Case]:
    yield Case("6.8", "goaway_on_a_stream", (raw_frame(GOAWAY, 0, 1, bytes(8)),), connection_error(PROTOCOL_ERROR))
    for size in (0, 7):
        yield Case(
            "6.8",
            f"goaway_of_{size}_bytes",
            (raw_frame(GOAWAY, 0, 0, bytes(size)),),
            connection_error(FRAME_SIZE_ERROR),
        )
    for name, frame in (
        ("", goaway_frame()),
        ("_with_debug_data", goaway_frame(0, NO_ERROR, b"\0 bye \xff")),
        ("_of_an_error", goaway_frame(0, INTERNAL_ERROR)),
        ("_twice", goaway_frame((1 << 31) - 1) + goaway_frame()),
    ):
        # What is open when GOAWAY comes is finished. Whether the connection goes on then is the server's choice.
        yield Case(
            "6.8",
            f"open_stream_ends_well_after_goaway{name}",
            (POST, read, frame, data_frame(1, b"body"), answered(1)),
            nothing_wrong,
        )


def window_update() -> Iterator[Case]:
    for size in (0, 3, 5):
        for stream_id, name in ((0, "the_connection"), (1, "a_stream")):
            yield Case(
                "6.9",
                f"window_update_of_{size}_bytes_on_{name}",
                (BAD_POST, raw_frame(WINDOW_UPDATE, 0, stream_id, bytes(size))),
                connection_error(FRAME_SIZE_ERROR),
            )
    yield Case("6.9", "increment_0_on_the_connection", (window_frame(0, 0),), connection_error(PROTOCOL_ERROR))
    yield Case("6.9", "increment_0_on_an_open_stream", (BAD_POST, window_frame(1, 0)), stream_error(1, PROTOCOL_ERROR))
    yield Case(
        "6.9", "increment_0_on_a_half_closed_stream", (HELD, window_frame(1, 0)), stream_error(1, PROTOCOL_ERROR)
    )
    yield Case(
        "6.9",
        "increment_0_under_the_reserved_bit",
        (BAD_POST, raw_frame(WINDOW_UPDATE, 0, 1, b"\x80\0\0\0")),
        stream_error(1, PROTOCOL_ERROR),
    )
    yield Case("6.9", "reserved_bit_of_the_increment", (raw_frame(WINDOW_UPDATE, 0, 0, b"\x80\0\0\1"),), ignored)
    yield Case("6.9", "window_update_on_a_half_closed_stream", (HELD, window_frame(1, 1)), ignored)
    yield Case(
        "6.9", "window_update_on_a_closed_stream", (headers_frame(1, GET), answered(1), window_frame(1, 1)), ignored
    )


def continuation() -> Iterator[Case]:
    error = connection_error(PROTOCOL_ERROR)
    rest = raw_frame(CONTINUATION, END_HEADERS, 1, BAD)
    hold = block(request("/hold"))
    trailer = block([(b"x-t", b"1")])
    yield Case("6.10", "continuation_on_stream_0", (raw_frame(CONTINUATION, END_HEADERS, 0, BAD),), error)
    yield Case(
        "6.10",
        "continuation_on_stream_0_inside_a_field_block",
        (raw_frame(HEADERS, END_STREAM, 1, BAD[:HALF]), raw_frame(CONTINUATION, END_HEADERS, 0, BAD[HALF:])),
        error,
    )
    yield Case("6.10", "continuation_on_an_idle_stream", (rest,), error)
    yield Case("6.10", "continuation_behind_a_whole_field_block", (HELD, rest), error)
    yield Case("6.10", "continuation_behind_a_whole_field_block_on_an_open_stream", (BAD_POST, rest), error)
    yield Case(
        "6.10",
        "continuation_behind_the_last_continuation",
        (raw_frame(HEADERS, END_STREAM, 1, hold[:9]), raw_frame(CONTINUATION, END_HEADERS, 1, hold[9:]), rest),
        error,
    )
    yield Case("6.10", "continuation_behind_data", (BAD_POST, data_frame(1, b"body", False), rest), error)
    yield Case(
        "6.10",
        "several_continuations",
        (
            raw_frame(HEADERS, END_STREAM, 1),
            *(raw_frame(CONTINUATION, 0, 1, GET[i : i + 9]) for i in range(0, len(GET), 9)),
            raw_frame(CONTINUATION, END_HEADERS, 1),
        ),
        serves(1),
    )
    yield Case(
        "6.10",
        "continuations_of_trailers",
        (
            *(POST, data_frame(1, b"body", False)),
            *(raw_frame(HEADERS, END_STREAM, 1, trailer[:3]), raw_frame(CONTINUATION, END_HEADERS, 1, trailer[3:])),
        ),
        serves(1),
    )
    for name, frame in INTERRUPTIONS.items():
        begun = raw_frame(HEADERS, END_STREAM, 1, BAD[:9]), raw_frame(CONTINUATION, 0, 1, BAD[9:HALF])
        rest_of_it = raw_frame(CONTINUATION, END_HEADERS, 1, BAD[HALF:])
        yield Case("6.10", f"continuations_interrupted_by_{name}", (*begun, frame, rest_of_it), error)


def error_codes() -> Iterator[Case]:
    for code in (0x0E, 0xFF, 0xFFFF_FFFF):
        yield Case("7", f"rst_stream_with_unknown_code_{code:#x}", (HELD, rst_frame(1, code)), ignored)
        yield Case(
            "7",
            f"goaway_with_unknown_code_{code:#x}",
            (POST, read, goaway_frame(0, code), data_frame(1, b"body"), answered(1)),
            nothing_wrong,
        )


CASES = [
    *(*data(), *headers(), *priority(), *rst_stream(), *settings(), *push_promise()),
    *(*ping(), *goaway(), *window_update(), *continuation(), *error_codes()),
]


@pytest.mark.parametrize("case", params(CASES))
async def test_receiver(case: Case) -> None:
    await run(case)
