"""Stream states, identifiers, their number, and priority signals, as a server must take them: RFC 9113 §5.1–5.4."""

from collections.abc import Iterator

import pytest

from tests.conformance.http2_peer import (
    Case,
    Expect,
    answer,
    answered,
    connection_error,
    either_error,
    error_or_ignored,
    goes_on,
    ignored,
    params,
    proxy,
    read,
    run,
    serves,
    stream_error,
    was_reset,
)
from tests.support.http2_client import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    FRAME_SIZE_ERROR,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    NO_ERROR,
    PING,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    STREAM_CLOSED,
    WITH_PRIORITY,
    Http2Client,
    block,
    data_frame,
    headers_frame,
    raw_frame,
    request,
    rst_frame,
    window_frame,
)
from tests.support.origin import Origin

GET = block(request("/"))
BAD = block(request("/bad"))
OPEN = headers_frame(1, request("/bad", method="POST"), end_stream=False)
"""Opens stream 1; what follows must not make it a whole request."""
POST = headers_frame(1, request("/", method="POST"), end_stream=False)
HELD = headers_frame(1, request("/hold"))
"""A request that is not answered: the stream stays half-closed (remote)."""
DONE = (headers_frame(1, GET), answered(1))
"""Stream 1 is closed by END_STREAM of both sides."""
CLOSED_BY_CLIENT = (OPEN, rst_frame(1))
CLOSED_BY_SERVER = (headers_frame(1, [*request("/bad"), (b"connection", b"x")], end_stream=False), was_reset(1))
PUSH = raw_frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2" + BAD)
PRIORITY_OF_1 = raw_frame(PRIORITY, 0, 1, b"\0\0\0\0\x0f")
TRAILERS = headers_frame(1, [(b"x-t", b"1")])

protocol_error = connection_error(PROTOCOL_ERROR)


def idle() -> Iterator[Case]:
    yield Case("5.1", "idle_headers", (headers_frame(1, GET),), serves(1))
    yield Case("5.1", "idle_priority", (PRIORITY_OF_1, headers_frame(1, GET)), serves(1))
    yield Case("5.1", "idle_data", (data_frame(1, b"body"),), connection_error(PROTOCOL_ERROR, STREAM_CLOSED))
    yield Case("5.1", "idle_rst_stream", (rst_frame(1),), protocol_error)
    yield Case("5.1", "idle_window_update", (window_frame(1, 1),), protocol_error)
    yield Case("5.1", "idle_push_promise", (PUSH,), protocol_error)
    yield Case("5.1", "idle_continuation", (raw_frame(CONTINUATION, END_HEADERS, 1, BAD),), protocol_error)
    yield Case(
        "5.1",
        "idle_data_above_an_open_stream",
        (OPEN, data_frame(3, b"body")),
        connection_error(PROTOCOL_ERROR, STREAM_CLOSED),
    )
    yield Case("5.1", "idle_window_update_above_an_open_stream", (OPEN, window_frame(3, 1)), protocol_error)
    # Streams of the server are idle for ever: it pushes nothing.
    yield Case("5.1", "idle_headers_on_a_stream_of_the_server", (headers_frame(2, BAD),), protocol_error)
    yield Case(
        "5.1",
        "idle_data_on_a_stream_of_the_server",
        (data_frame(2, b"body"),),
        connection_error(PROTOCOL_ERROR, STREAM_CLOSED),
    )
    yield Case("5.1", "idle_rst_stream_on_a_stream_of_the_server", (rst_frame(2),), protocol_error)
    yield Case("5.1", "idle_window_update_on_a_stream_of_the_server", (window_frame(2, 1),), protocol_error)
    yield Case(
        "5.1",
        "idle_window_update_on_a_stream_of_the_server_below_ours",
        (headers_frame(5, GET), window_frame(2, 1)),
        protocol_error,
    )
    yield Case("5.1", "idle_priority_on_a_stream_of_the_server", (raw_frame(PRIORITY, 0, 2, bytes(5)),), ignored)


def opened() -> Iterator[Case]:
    yield Case("5.1", "open_data", (POST, data_frame(1, b"a", False), data_frame(1, b"b")), serves(1))
    yield Case("5.1", "open_headers_as_trailers", (POST, data_frame(1, b"a", False), TRAILERS), serves(1))
    yield Case("5.1", "open_headers_as_trailers_without_data", (POST, TRAILERS), serves(1))
    yield Case("5.1", "open_priority", (POST, PRIORITY_OF_1, data_frame(1)), serves(1))
    yield Case("5.1", "open_window_update", (POST, window_frame(1, 9), data_frame(1)), serves(1))
    yield Case("5.1", "open_rst_stream", (OPEN, rst_frame(1)), ignored)
    yield Case(
        "5.1", "open_rst_stream_inside_the_body", (OPEN, data_frame(1, b"a", False), rst_frame(1, NO_ERROR)), ignored
    )
    yield Case("5.1", "open_push_promise", (OPEN, PUSH), protocol_error)


def half_closed() -> Iterator[Case]:
    stream_closed = stream_error(1, STREAM_CLOSED)
    for how, steps in (("", (HELD,)), ("_by_data", (headers_frame(1, request("/hold"), False), data_frame(1)))):
        yield Case("5.1", f"half_closed{how}_data", (*steps, data_frame(1, b"body")), stream_closed)
        yield Case("5.1", f"half_closed{how}_empty_data", (*steps, data_frame(1)), stream_closed)
        yield Case("5.1", f"half_closed{how}_headers", (*steps, headers_frame(1, BAD)), stream_closed)
        yield Case("5.1", f"half_closed{how}_trailers", (*steps, TRAILERS), stream_closed)
    yield Case(
        "5.1",
        "half_closed_continuation",
        (HELD, raw_frame(CONTINUATION, END_HEADERS, 1, BAD)),
        connection_error(PROTOCOL_ERROR, STREAM_CLOSED),
    )
    yield Case("5.1", "half_closed_push_promise", (HELD, PUSH), protocol_error)
    yield Case("5.1", "half_closed_window_update", (HELD, window_frame(1, 9)), ignored)
    yield Case("5.1", "half_closed_priority", (HELD, PRIORITY_OF_1), ignored)
    yield Case("5.1", "half_closed_rst_stream", (HELD, rst_frame(1)), ignored)


def closed() -> Iterator[Case]:
    # A frame that a stream closed by END_STREAM cannot get by a race is an error, of the stream (§6.1) or the
    # connection (§5.1).
    yield Case("5.1", "closed_data", (*DONE, data_frame(1, b"body")), either_error(1, STREAM_CLOSED))
    yield Case(
        "5.1",
        "closed_headers",
        (*DONE, headers_frame(1, BAD)),
        either_error(1, STREAM_CLOSED, connection=(PROTOCOL_ERROR,)),
    )
    yield Case(
        "5.1", "closed_trailers", (*DONE, TRAILERS), either_error(1, STREAM_CLOSED, connection=(PROTOCOL_ERROR,))
    )
    yield Case(
        "5.1",
        "closed_continuation",
        (*DONE, raw_frame(CONTINUATION, END_HEADERS, 1, BAD)),
        connection_error(PROTOCOL_ERROR, STREAM_CLOSED),
    )
    yield Case("5.1", "closed_window_update", (*DONE, window_frame(1, 9)), ignored)
    yield Case("5.1", "closed_rst_stream", (*DONE, rst_frame(1)), ignored)
    yield Case("5.1", "closed_priority", (*DONE, PRIORITY_OF_1), ignored)

    # Closed by the client's RST_STREAM: an error, or discarded (§5.1 "minimal processing"), never a request.
    for name, frame, codes in (
        ("data", data_frame(1, b"body"), ()),
        ("headers", headers_frame(1, BAD), (PROTOCOL_ERROR,)),
        ("trailers", TRAILERS, (PROTOCOL_ERROR,)),
    ):
        yield Case(
            "5.1",
            f"closed_by_the_client_{name}",
            (*CLOSED_BY_CLIENT, frame),
            error_or_ignored(1, STREAM_CLOSED, connection=(STREAM_CLOSED, *codes)),
        )
    yield Case("5.1", "closed_by_the_client_window_update", (*CLOSED_BY_CLIENT, window_frame(1, 9)), ignored)
    yield Case("5.1", "closed_by_the_client_rst_stream", (*CLOSED_BY_CLIENT, rst_frame(1)), ignored)
    yield Case("5.1", "closed_by_the_client_priority", (*CLOSED_BY_CLIENT, PRIORITY_OF_1), ignored)

    # Closed by the server's RST_STREAM: all may have been sent before that arrived, so the connection goes on.
    for name, frames in (
        ("data", data_frame(1, b"a", False) + data_frame(1, b"b")),
        ("trailers", TRAILERS),
        ("data_and_trailers", data_frame(1, b"a", False) + TRAILERS),
        ("window_update", window_frame(1, 9)),
        ("window_update_of_0", window_frame(1, 0)),
        ("window_update_that_overflows", window_frame(1, (1 << 31) - 1)),
        ("rst_stream", rst_frame(1)),
        ("priority", PRIORITY_OF_1),
    ):
        yield Case("5.1", f"closed_by_the_server_{name}", (*CLOSED_BY_SERVER, frames), goes_on)

    # Skipped identifiers are closed from the start.
    yield Case("5.1", "skipped_priority", (headers_frame(5, GET), raw_frame(PRIORITY, 0, 3, bytes(5))), serves(5))
    yield Case(
        "5.1",
        "skipped_data",
        (headers_frame(5, GET), answered(5), data_frame(3, b"body")),
        either_error(3, STREAM_CLOSED, connection=(PROTOCOL_ERROR,)),
    )
    yield Case(
        "5.1",
        "field_block_of_a_closed_stream_is_decoded",
        (*CLOSED_BY_SERVER, headers_frame(1, b"\x40\x03x-a\x01b"), headers_frame(3, GET + b"\xbe")),
        serves_not(1, 3),
    )


def serves_not(refused: int, served: int) -> Expect:
    """The one stream was reset, the other is served."""

    async def expect(client: Http2Client) -> None:
        await answered(served)(client)
        await goes_on(client)
        assert client.streams[refused].reset is not None or client.streams[refused].has_ended

    return expect


def identifiers() -> Iterator[Case]:
    yield Case("5.1.1", "headers_on_stream_0", (headers_frame(0, BAD),), protocol_error)
    for stream_id in (2, 4, (1 << 31) - 2):
        yield Case("5.1.1", f"even_identifier_{stream_id}", (headers_frame(stream_id, BAD),), protocol_error)
    closed = connection_error(PROTOCOL_ERROR, STREAM_CLOSED)
    yield Case(
        "5.1.1", "lower_than_an_open_stream", (headers_frame(5, request("/hold")), headers_frame(3, BAD)), closed
    )
    yield Case(
        "5.1.1", "lower_than_a_closed_stream", (headers_frame(5, GET), answered(5), headers_frame(3, BAD)), closed
    )
    yield Case(
        "5.1.1",
        "lower_than_a_stream_that_was_reset",
        (headers_frame(5, request("/hold")), rst_frame(5), headers_frame(3, BAD)),
        closed,
    )
    yield Case(
        "5.1.1",
        "lower_than_a_stream_that_was_refused",
        (headers_frame(5, [(b"x", b"y")]), was_reset(5), headers_frame(3, BAD)),
        closed,
    )
    yield Case(
        "5.1.1",
        "identifiers_may_be_skipped",
        (headers_frame(1, GET), headers_frame(9, GET), headers_frame(101, GET)),
        serves(1, 9, 101),
    )
    yield Case("5.1.1", "first_identifier_may_be_high", (headers_frame(0x1_0001, GET),), serves(0x1_0001))
    yield Case("5.1.1", "largest_identifier", (headers_frame((1 << 31) - 1, GET),), alone((1 << 31) - 1))
    yield Case(
        "5.1.1",
        "priority_does_not_use_up_identifiers",
        (raw_frame(PRIORITY, 0, 101, bytes(5)), headers_frame(1, GET)),
        serves(1),
    )


def alone(stream_id: int) -> Expect:
    """Served; there is no identifier left for another request."""

    async def expect(client: Http2Client) -> None:
        await answered(stream_id)(client)

    return expect


def priorities() -> Iterator[Case]:
    def headers(dependency: int, weight: int) -> bytes:
        payload = dependency.to_bytes(4, "big") + bytes((weight,)) + GET
        return raw_frame(HEADERS, END_STREAM | END_HEADERS | WITH_PRIORITY, 1, payload)

    yield Case("5.3.2", "headers_with_priority", (headers(0, 255),), serves(1))
    yield Case("5.3.2", "headers_with_exclusive_priority", (headers(1 << 31, 0),), serves(1))
    yield Case("5.3.2", "headers_depend_on_an_idle_stream", (headers(99, 16),), serves(1))
    # RFC 7540 §5.3.1 made a stream that depends on itself an error of that stream; RFC 9113 says no more of it.
    yield Case("5.3.1", "headers_depend_on_their_own_stream", (headers(1, 16),), error_or_ignored(1, PROTOCOL_ERROR))
    own = raw_frame(PRIORITY, 0, 1, b"\0\0\0\1\x10")
    yield Case("5.3.1", "priority_depends_on_its_own_stream", (HELD, own), error_or_ignored(1, PROTOCOL_ERROR))
    yield Case(
        "5.3.1",
        "priority_depends_on_its_own_idle_stream",
        (own,),
        error_or_ignored(1, PROTOCOL_ERROR, connection=(PROTOCOL_ERROR,)),
    )


CASES = [*idle(), *opened(), *half_closed(), *closed(), *identifiers(), *priorities()]


@pytest.mark.parametrize("case", params(CASES))
async def test_receiver(case: Case) -> None:
    await run(case)


def held(stream_id: int) -> bytes:
    return headers_frame(stream_id, request("/hold"))


async def test_5_1_2_stream_over_the_advertised_number_is_refused_and_only_it() -> None:
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port) as client:
        settings = await client.handshake()
        limit = settings[MAX_CONCURRENT_STREAMS]
        last = 2 * limit + 1
        client.send(*(held(stream_id) for stream_id in range(1, last, 2)))
        # Its field block must be decoded all the same: x-a enters the dynamic table.
        client.send(headers_frame(last, BAD + b"\x40\x03x-a\x01b"))
        await client.expect_rst(last, {REFUSED_STREAM, PROTOCOL_ERROR})
        await read(client)
        assert [i for i, stream in client.streams.items() if stream.reset is not None] == [last]
        client.send(rst_frame(1), headers_frame(last + 2, GET + b"\xbe"))
        await answered(last + 2)(client)
        assert [seen.target for seen in origin.requests if seen.target == b"/bad"] == []
        assert [seen.header(b"x-a") for seen in origin.requests if seen.target == b"/"] == [b"b"]


async def test_5_1_2_half_closed_streams_count_and_ended_ones_do_not() -> None:
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port) as client:
        limit = (await client.handshake())[MAX_CONCURRENT_STREAMS]
        for stream_id in range(1, 2 * limit + 21, 2):
            client.send(headers_frame(stream_id, GET))
            await answered(stream_id)(client)
        await ignored(client)


async def test_5_4_1_goaway_tells_the_last_stream_and_nothing_after_the_error_is_done() -> None:
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port) as client:
        await client.handshake()
        client.send(headers_frame(1, GET))
        await answered(1)(client)
        client.send(raw_frame(PING, 0, 0, bytes(7)), headers_frame(3, BAD))
        goaway = await client.expect_goaway(FRAME_SIZE_ERROR)
        assert goaway.last_stream_id == 1
        assert [seen.target for seen in origin.requests] == [b"/"]
