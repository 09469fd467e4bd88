"""The beginning of a connection and the frame layer, as a server must take them: RFC 9113 §3.4, §4, §5.4, §5.5."""

import asyncio
import socket
from collections.abc import Iterator

import hyperframe.frame as h2f
import pytest

from meshproxy.model.cluster import Protocol
from tests.conformance.http2_peer import (
    IS_ENVOY,
    Case,
    Step,
    answer,
    answered,
    connection_error,
    either_error,
    goes_on,
    ignored,
    malformed,
    params,
    proxy,
    read,
    run,
    serves,
)
from tests.support.http2_client import (
    ACK,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    Http2Client,
    block,
    data_frame,
    goaway_frame,
    headers_frame,
    literal,
    ping_frame,
    raw_frame,
    request,
    rst_frame,
    settings_frame,
    window_frame,
)
from tests.support.live_worker import exchange
from tests.support.origin import Origin

GET = block(request("/"))
BAD = block(request("/bad"))
HALF = len(BAD) // 2
POST = headers_frame(1, request("/", method="POST"), end_stream=False)
BAD_POST = headers_frame(1, request("/bad", method="POST"), end_stream=False)
HELD = headers_frame(1, request("/hold"))
"""A request that is not answered: the stream stays half-closed (remote)."""
UNKNOWN = 0xBE
RESERVED_BIT = 1 << 31
WEIGHT = b"\0\0\0\0\x0f"


def frames_of_the_frame_layer() -> Iterator[Case]:
    yield Case("4.1", "unknown_type_on_the_connection", (raw_frame(UNKNOWN, 0, 0, b"payload"),), ignored)
    yield Case("4.1", "unknown_type_on_an_idle_stream", (raw_frame(UNKNOWN, 0, 1, b"payload"),), ignored)
    yield Case(
        "4.1",
        "unknown_type_on_an_open_stream",
        (POST, raw_frame(UNKNOWN, 0xFF, 1, b"payload"), data_frame(1, b"body")),
        serves(1),
    )
    yield Case("4.1", "unknown_type_on_a_half_closed_stream", (HELD, raw_frame(UNKNOWN, 1, 1)), ignored)
    yield Case(
        "4.1",
        "unknown_type_on_a_closed_stream",
        (headers_frame(1, GET), answered(1), raw_frame(UNKNOWN, 1, 1)),
        ignored,
    )
    yield Case("4.1", "unknown_type_without_payload", (raw_frame(UNKNOWN, 0, 0),), ignored)

    # Unused flags MUST be ignored on receipt.
    every = 0xFF
    yield Case(
        "4.1",
        "unused_flags_of_data",
        (POST, raw_frame(DATA, every & ~PADDED, 1, b"body")),
        serves(1),
    )
    yield Case(
        "4.1", "unused_flags_of_headers", (raw_frame(HEADERS, every & ~PADDED & ~WITH_PRIORITY, 1, GET),), serves(1)
    )
    yield Case("4.1", "unused_flags_of_priority", (raw_frame(PRIORITY, every, 1, WEIGHT),), ignored)
    yield Case("4.1", "unused_flags_of_rst_stream", (POST, raw_frame(RST_STREAM, every, 1, bytes(4))), ignored)
    yield Case("4.1", "unused_flags_of_settings", (raw_frame(SETTINGS, every & ~ACK, 0),), ignored)
    yield Case(
        "4.1",
        "unused_flags_of_ping",
        (raw_frame(PING, every & ~ACK, 0, b"flags..."), ping_answered(b"flags...")),
        ignored,
    )
    yield Case("4.1", "unused_flags_of_window_update", (raw_frame(WINDOW_UPDATE, every, 0, b"\0\0\0\1"),), ignored)
    yield Case(
        "4.1",
        "unused_flags_of_continuation",
        (raw_frame(HEADERS, END_STREAM, 1, GET[:9]), raw_frame(CONTINUATION, every, 1, GET[9:])),
        serves(1),
    )

    # The reserved bit MUST be ignored on receipt.
    yield Case(
        "4.1",
        "reserved_bit_of_headers",
        (raw_frame(HEADERS, END_STREAM | END_HEADERS, RESERVED_BIT | 1, GET),),
        serves(1),
    )
    yield Case("4.1", "reserved_bit_of_data", (POST, raw_frame(DATA, END_STREAM, RESERVED_BIT | 1, b"body")), serves(1))
    yield Case("4.1", "reserved_bit_of_settings", (raw_frame(SETTINGS, 0, RESERVED_BIT),), ignored)
    yield Case(
        "4.1",
        "reserved_bit_of_ping",
        (raw_frame(PING, 0, RESERVED_BIT, b"reserved"), ping_answered(b"reserved")),
        ignored,
    )
    yield Case(
        "4.1", "reserved_bit_of_window_update", (raw_frame(WINDOW_UPDATE, 0, RESERVED_BIT, b"\0\0\0\1"),), ignored
    )
    yield Case(
        "4.1", "reserved_bit_of_rst_stream", (POST, raw_frame(RST_STREAM, 0, RESERVED_BIT | 1, bytes(4))), ignored
    )
    yield Case("4.1", "reserved_bit_of_an_unknown_type", (raw_frame(UNKNOWN, 0, RESERVED_BIT),), ignored)


def ping_answered(data: bytes) -> Step:
    async def step(client: Http2Client) -> None:
        await client.frame(h2f.PingFrame, lambda f: "ACK" in f.flags and f.opaque_data == data)

    return step


def oversized(kind: int, flags: int, stream_id: int) -> Step:
    """A frame one byte over the largest that the other side allows; its payload is a field block that decodes."""

    async def step(client: Http2Client) -> None:
        size = client.settings.get(MAX_FRAME_SIZE, 1 << 14) + 1
        payloads = (literal(b"x", b"a" * length) for length in range(size - 9, size))
        payload = next(payload for payload in payloads if len(payload) == size)
        client.send(raw_frame(kind, flags, stream_id, payload))

    return step


def frame_sizes() -> Iterator[Case]:
    long = block(request("/", (b"x-long", b"a" * 16_000)))
    yield Case(
        "4.2",
        "data_of_the_largest_size_that_all_accept",
        (POST, data_frame(1, bytes(1 << 14))),
        serves(1),
    )
    yield Case(
        "4.2",
        "headers_of_the_largest_size_that_all_accept",
        (headers_frame(1, long + block([(b"x-pad", b"a" * ((1 << 14) - len(long) - 10))])),),
        serves(1),
    )
    yield Case("4.2", "data_too_large", (BAD_POST, oversized(DATA, 0, 1)), either_error(1, FRAME_SIZE_ERROR))
    too_large = connection_error(FRAME_SIZE_ERROR)
    for name, kind, stream_id in (("headers", HEADERS, 1), ("settings", SETTINGS, 0), ("ping", PING, 0)):
        yield Case(
            "4.2", f"{name}_too_large", (oversized(kind, END_HEADERS & -(kind == HEADERS), stream_id),), too_large
        )
    yield Case("4.2", "goaway_too_large", (oversized(GOAWAY, 0, 0),), too_large)
    yield Case(
        "4.2",
        "continuation_too_large",
        (raw_frame(HEADERS, END_STREAM, 1, BAD), oversized(CONTINUATION, END_HEADERS, 1)),
        too_large,
    )
    yield Case("4.2", "unknown_type_too_large_on_the_connection", (oversized(UNKNOWN, 0, 0),), too_large)
    yield Case(
        "4.2",
        "unknown_type_too_large_on_a_stream",
        (BAD_POST, oversized(UNKNOWN, 0, 1)),
        either_error(1, FRAME_SIZE_ERROR),
    )
    yield Case(
        "4.2",
        "header_says_the_largest_length_of_all",
        (raw_frame(HEADERS, END_STREAM | END_HEADERS, 1, BAD, length=(1 << 24) - 1),),
        too_large,
    )
    # Too small to contain mandatory frame data.
    yield Case(
        "4.2",
        "headers_without_room_for_the_priority",
        (raw_frame(HEADERS, END_STREAM | END_HEADERS | WITH_PRIORITY, 1, WEIGHT[:4]),),
        too_large,
    )
    yield Case(
        "4.2",
        "headers_without_room_for_the_pad_length",
        (raw_frame(HEADERS, END_STREAM | END_HEADERS | PADDED, 1),),
        connection_error(FRAME_SIZE_ERROR, PROTOCOL_ERROR),
    )
    yield Case(
        "4.2",
        "data_without_room_for_the_pad_length",
        (BAD_POST, raw_frame(DATA, END_STREAM | PADDED, 1)),
        either_error(1, FRAME_SIZE_ERROR, connection=(PROTOCOL_ERROR,)),
    )


def field_blocks() -> Iterator[Case]:
    yield Case(
        "4.3",
        "block_in_single_bytes",
        (
            raw_frame(HEADERS, END_STREAM, 1, GET[:20]),
            *(raw_frame(CONTINUATION, 0, 1, GET[i : i + 1]) for i in range(20, 30)),
            raw_frame(CONTINUATION, END_HEADERS, 1, GET[30:]),
        ),
        serves(1),
    )
    yield Case(
        "4.3",
        "block_that_does_not_decode",
        (headers_frame(1, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),),
        connection_error(COMPRESSION_ERROR),
    )
    yield Case(
        "4.3",
        "trailers_that_do_not_decode",
        (BAD_POST, headers_frame(1, b"\x80")),
        connection_error(COMPRESSION_ERROR),
    )
    # Decompression goes on even where the frames are to be discarded.
    yield Case(
        "4.3",
        "block_that_does_not_decode_on_a_stream_that_was_refused",
        (headers_frame(1, [(b"x", b"y")], end_stream=False), read, headers_frame(1, b"\x80")),
        connection_error(COMPRESSION_ERROR, STREAM_CLOSED),
    )
    yield Case(
        "4.3.1",
        "our_table_of_size_0_is_respected",
        (headers_frame(1, GET), answered(1)),
        serves(1),
        {HEADER_TABLE_SIZE: 0},
    )
    yield Case(
        "4.3.1",
        "our_table_of_size_100_is_respected",
        (headers_frame(1, GET), answered(1)),
        serves(1),
        {HEADER_TABLE_SIZE: 100},
    )


def errors_and_extensions() -> Iterator[Case]:
    yield Case(
        "5.4.2", "rst_stream_is_not_answered_with_one", (headers_frame(1, request("/hold")), rst_frame(1)), ignored
    )
    yield Case(
        "5.4.2",
        "frames_sent_before_the_reset_arrived_are_discarded",
        (
            headers_frame(1, [*request("/bad", method="POST"), (b"connection", b"x")], end_stream=False),
            read,
            data_frame(1, b"body", end_stream=False),
            data_frame(1, b"more"),
        ),
        malformed(1),
    )
    for flags, name in ((0, ""), (END_STREAM | END_HEADERS, "_with_flags")):
        yield Case(
            "5.5",
            f"unknown_type_inside_a_field_block{name}",
            (
                raw_frame(HEADERS, END_STREAM, 1, BAD[:HALF]),
                raw_frame(UNKNOWN, flags, 1),
                raw_frame(CONTINUATION, END_HEADERS, 1, BAD[HALF:]),
            ),
            connection_error(PROTOCOL_ERROR),
        )
    yield Case(
        "5.5",
        "unknown_type_on_the_connection_inside_a_field_block",
        (raw_frame(HEADERS, END_STREAM, 1, BAD[:HALF]), raw_frame(UNKNOWN, 0, 0)),
        connection_error(PROTOCOL_ERROR),
    )
    yield Case("5.5", "unknown_setting", (settings_frame({0xBEEF: 1, 0xFFFF: (1 << 32) - 1, 0: 7}),), ignored)


CASES = [*frames_of_the_frame_layer(), *frame_sizes(), *field_blocks(), *errors_and_extensions()]


@pytest.mark.parametrize("case", params(CASES))
async def test_receiver(case: Case) -> None:
    await run(case)


PROTOCOLS = [Protocol.HTTP] if IS_ENVOY else [Protocol.HTTP, Protocol.HTTP2, Protocol.AUTO]
"""AUTO: the preface is told from other protocols by its first bytes."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_3_4_server_speaks_first_with_legal_settings_and_acknowledges_ours(protocol: Protocol) -> None:
    async with Origin(answer) as origin, proxy(origin.port, protocol) as port, Http2Client(port) as client:
        settings = await client.handshake()
        first = client.frames[0]
        assert isinstance(first, h2f.SettingsFrame) and "ACK" not in first.flags
        assert settings.get(ENABLE_PUSH, 0) == 0
        assert settings.get(INITIAL_WINDOW_SIZE, 0) < 1 << 31
        assert 1 << 14 <= settings.get(MAX_FRAME_SIZE, 1 << 14) < 1 << 24
        await goes_on(client)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_3_4_preface_in_single_bytes(protocol: Protocol) -> None:
    opening = PREFACE + settings_frame()
    async with (
        Origin(answer) as origin,
        proxy(origin.port, protocol) as port,
        Http2Client(port, opening=opening[:1]) as client,
    ):
        client.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(1, len(opening)):
            client.send(opening[i : i + 1])
            await asyncio.sleep(0)  # so that it is a write of its own
        await client.handshake()
        await goes_on(client)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_3_4_request_right_behind_the_preface(protocol: Protocol) -> None:
    opening = PREFACE + settings_frame() + headers_frame(1, GET)
    async with (
        Origin(answer) as origin,
        proxy(origin.port, protocol) as port,
        Http2Client(port, opening=opening) as client,
    ):
        assert (await client.response(1)).status == 200
        await client.handshake()
        await goes_on(client)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(ping_frame(), id="ping"),
        pytest.param(headers_frame(1, BAD), id="headers"),
        pytest.param(window_frame(0, 1), id="window_update"),
        pytest.param(raw_frame(PRIORITY, 0, 1, WEIGHT), id="priority"),
        pytest.param(goaway_frame(), id="goaway"),
        pytest.param(raw_frame(UNKNOWN, 0, 0), id="unknown_type"),
        pytest.param(raw_frame(SETTINGS, ACK, 0), id="settings_ack"),
        pytest.param(raw_frame(SETTINGS, 0, 0, bytes(5)), id="settings_of_5_bytes"),
        pytest.param(b"GET /bad HTTP/1.1\r\nHost: a.example\r\n\r\n", id="http1_request"),
    ],
)
async def test_3_4_anything_but_settings_first_is_a_connection_error(protocol: Protocol, first: bytes) -> None:
    async with (
        Origin(answer) as origin,
        proxy(origin.port, protocol) as port,
        Http2Client(port, opening=PREFACE + first) as client,
    ):
        client.send(headers_frame(1, BAD))
        # The GOAWAY may be left out here.
        await client.expect_closed()
        codes = {frame.error_code for frame in client.frames if isinstance(frame, h2f.GoAwayFrame)}
        assert codes <= {PROTOCOL_ERROR, FRAME_SIZE_ERROR}
        assert origin.requests == []


# Not where the protocol is detected: there, what is no preface is no HTTP/2, and goes on as bytes.
@pytest.mark.parametrize("protocol", [p for p in PROTOCOLS if p is not Protocol.AUTO])
@pytest.mark.parametrize(
    "preface",
    [
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", id="other_last_word"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", id="other_last_byte"),
        pytest.param(b"PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n", id="other_version"),
        pytest.param(b"PRI / HTTP/2.0\r\n\r\nSM\r\n\r\n", id="other_target"),
        pytest.param(PREFACE[:-1], id="cut"),
    ],
)
async def test_3_4_invalid_preface_ends_the_connection(protocol: Protocol, preface: bytes) -> None:
    async with Origin(answer) as origin, proxy(origin.port, protocol) as port:
        came = await exchange(port, preface + settings_frame() + headers_frame(1, BAD))
        assert b" 200 " not in came
        assert origin.requests == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_3_4_connection_that_ends_inside_the_preface(protocol: Protocol) -> None:
    async with Origin(answer) as origin, proxy(origin.port, protocol) as port:
        await exchange(port, PREFACE[:9])
        async with Http2Client(port) as client:
            await client.handshake()
            await goes_on(client)
