"""Attacks on the HTTP/2 of a running proxy: what they get, what they cost, and that nobody else notices.

Each test names what is done; its figures are kept with its result. The limits asked are those of Envoy or of this
proxy's own table (codec.http2). Sources: CVE-2023-44487, CVE-2025-8671, CVE-2024-27316, CVE-2019-9511 to 9518,
CVE-2016-6581; RFC 9113 §5 to §8 and §10.5; RFC 7541.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from time import monotonic

import hyperframe.frame as h2f
import pytest
import pytest_asyncio

from tests.faults.traffic import Callers, Record, note, private_mib
from tests.hostile.siege import Measured, Siege
from tests.support.http2_client import (
    ACK,
    CANCEL,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    NO_ERROR,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REFUSED_STREAM,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Http2Client,
    Stream,
    block,
    data_frame,
    goaway_frame,
    headers_frame,
    literal,
    ping_frame,
    raw_frame,
    request,
    rst_frame,
    settings_ack,
    settings_frame,
    window_frame,
)
from tests.support.live_worker import exchange, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOLD = request("/hold")
BIG = request("/big")
BEGUN = headers_frame(1, b"", end_headers=False)
BEGUN_LATER = headers_frame(1001, b"", end_headers=False)
LARGE = raw_frame(CONTINUATION, 0, 1, literal(b"a", b"b" * 16_000))
OVER = 2**31 - 1
CALM = {ENHANCE_YOUR_CALM}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def siege(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Siege]:
    """One proxy for all of them, so each attack meets what the ones before it left behind."""
    async with Siege(tmp_path_factory.mktemp("siege")) as siege:
        yield siege


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def siege_without_retries(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Siege]:
    """Where no request is sent twice, so that no body is kept for it."""
    async with Siege(tmp_path_factory.mktemp("siege"), {"retries": {"attempts": 0}}) as siege:
        yield siege


async def send_until_closed(client: Http2Client, bursts: Iterable[Sequence[bytes]], measured: Measured) -> None:
    """A burst of frames at a time, each read by the proxy before the next is sent; frames sent are counted."""
    for number, burst in enumerate(bursts):
        client.send(*burst)
        measured.frames += len(burst)
        await read(client, number)
        if client.closed:
            return


async def read(client: Http2Client, number: int = 0) -> None:
    """The proxy has read all that was sent, or closed the connection."""
    mark = number.to_bytes(8, "big")
    client.send(ping_frame(mark))
    at = len(client.frames)
    await client.until(
        lambda: (
            client.closed or any(isinstance(f, h2f.PingFrame) and f.opaque_data == mark for f in client.frames[at:])
        ),
        "PING to be answered",
    )


async def until_settled(siege: Siege) -> None:
    """The worker has done what there was to do: it is as busy as the caller alone makes it."""
    used = siege.worker_cpu_s()
    while True:
        await asyncio.sleep(0.2)
        before, used = used, siege.worker_cpu_s()
        if used - before < 0.03:
            return


# ── streams that are opened to be reset ──


async def test_streams_opened_and_reset_at_once_end_the_connection(siege: Siege, record_property: Record) -> None:
    async with siege.attack(record_property, "rapid_reset") as measured, Http2Client(siege.port) as client:
        await client.handshake()
        bursts = (
            [headers_frame(i, HOLD) + rst_frame(i, CANCEL) for i in range(first, first + 200, 2)]
            for first in range(1, 20_000, 200)
        )
        await send_until_closed(client, bursts, measured)
        goaway = await client.expect_goaway(ENHANCE_YOUR_CALM)
    assert goaway.last_stream_id < 2 * 500
    assert measured.upstream_requests <= 500
    assert measured.grown_mib < 8


async def test_streams_reset_with_patience_end_the_connection(siege: Siege, record_property: Record) -> None:
    """Each only when the upstream has its request, so that each costs a connection there: no rate gives it away."""
    async with siege.attack(record_property, "patient_reset") as measured, Http2Client(siege.port) as client:
        await client.handshake()
        for stream_id in range(1, 20_000, 2):
            client.send(headers_frame(stream_id, HOLD))
            await until(lambda: siege.holding == 1)
            client.send(rst_frame(stream_id, CANCEL))
            measured.frames += 2
            await until(lambda: siege.holding == 0)
            await read(client)
            if client.closed:
                break
        await client.expect_goaway(ENHANCE_YOUR_CALM)
    assert measured.upstream_requests <= 500


async def test_a_client_that_cancels_every_third_request_is_served_on(siege: Siege, record_property: Record) -> None:
    """As callers with short timeouts do."""
    async with siege.attack(record_property, "cancelled_in_part") as measured, Http2Client(siege.port) as client:
        await client.handshake()
        for first in range(1, 3000, 6):
            client.send(*(headers_frame(i, HOLD if i == first else request("/")) for i in range(first, first + 6, 2)))
            assert (await client.response(first + 2)).status == 200
            assert (await client.response(first + 4)).status == 200
            client.send(rst_frame(first, CANCEL))
            measured.frames += 4
        assert client.closed is None
    assert measured.upstream_requests == 1500


def begun(stream_id: int, *fields: tuple[bytes, bytes]) -> bytes:
    return headers_frame(stream_id, request("/hold", *fields, method="POST"), end_stream=False)


RESETS: list[tuple[str, Callable[[int], bytes]]] = [
    ("zero_window_update", lambda i: begun(i) + window_frame(i, 0)),
    ("window_overflow", lambda i: begun(i) + window_frame(i, 2**31 - 1)),
    ("data_after_the_end", lambda i: headers_frame(i, HOLD) + data_frame(i, b"x")),
    ("headers_after_the_end", lambda i: headers_frame(i, HOLD) + headers_frame(i, HOLD)),
    ("priority_of_4_bytes", lambda i: begun(i) + raw_frame(PRIORITY, 0, i, bytes(4))),
    ("priority_that_depends_on_itself", lambda i: begun(i) + raw_frame(PRIORITY, 0, i, i.to_bytes(4, "big") + b"x")),
    ("body_longer_than_its_length", lambda i: begun(i, (b"content-length", b"1")) + data_frame(i, b"xy", False)),
    ("body_shorter_than_its_length", lambda i: begun(i, (b"content-length", b"9")) + data_frame(i, b"x")),
    ("trailers_that_do_not_end_it", lambda i: begun(i) + headers_frame(i, [(b"a", b"b")], end_stream=False)),
    ("pseudo_field_in_trailers", lambda i: begun(i) + headers_frame(i, [(b":path", b"/")])),
    ("malformed_request", lambda i: headers_frame(i, [*HOLD, (b"A", b"b")])),
]


@pytest.mark.parametrize(("name", "attack"), RESETS, ids=[reset[0] for reset in RESETS])
async def test_a_client_that_makes_the_proxy_reset_its_streams_is_sent_away(
    name: str, attack: Callable[[int], bytes], siege: Siege, record_property: Record
) -> None:
    """CVE-2025-8671: the reset is not the client's own, the work for nothing is the same."""
    async with siege.attack(record_property, name) as measured, Http2Client(siege.port) as client:
        await client.handshake()
        bursts = ([attack(i) for i in range(first, first + 20, 2)] for first in range(1, 20_000, 20))
        await send_until_closed(client, bursts, measured)
        await client.expect_goaway(ENHANCE_YOUR_CALM)
        assert all(stream.reset not in (None, NO_ERROR) for i, stream in client.streams.items() if 0 < i < 200)
    assert measured.frames <= 210
    assert measured.upstream_requests <= 200


async def test_streams_beyond_the_hundred_are_refused_and_may_be_asked_again(
    siege: Siege, record_property: Record
) -> None:
    async with siege.attack(record_property, "too_many_streams") as measured, Http2Client(siege.port) as client:
        settings = await client.handshake()
        assert settings[MAX_CONCURRENT_STREAMS] == 100
        client.send(*(headers_frame(i, HOLD) for i in range(1, 301, 2)))
        measured.frames = 150
        for refused in range(201, 301, 2):
            await client.expect_rst(refused, REFUSED_STREAM)
        await until(lambda: siege.holding == 100)
        client.send(rst_frame(1), headers_frame(301, request("/")))
        assert (await client.response(301)).status == 200
        client.send(*(headers_frame(i, HOLD) for i in range(303, 3001, 2)))
        await client.expect_goaway(ENHANCE_YOUR_CALM)
    assert measured.upstream_requests == 102


async def test_an_attacker_who_comes_back_at_once_does_not_starve_others(siege: Siege, record_property: Record) -> None:
    """Two seconds of connections that open a hundred streams, reset them, and are sent away."""
    connections = 0
    until_s = monotonic() + 2.0
    streams = b"".join(headers_frame(i, HOLD) + rst_frame(i, CANCEL) for i in range(1, 2001, 2))
    async with siege.attack(record_property, "rapid_reset_again") as measured:
        while monotonic() < until_s:
            async with Http2Client(siege.port) as client:
                client.send(streams)
                await client.expect_goaway(ENHANCE_YOUR_CALM)
            connections += 1
            measured.frames += 2000
    record_property("rapid_reset_again.connections", connections)
    assert measured.grown_mib < 8


# ── field blocks ──

PSEUDO = block(HOLD)
KEPT = b"\x40" + literal(b"a", b"x" * 4000)[1:]
"""A field for the dynamic table: from then on one byte, 0xBE, means 4 KiB."""

BLOCKS: list[tuple[str, list[bytes], set[int]]] = [
    ("endless_continuation_of_1_byte", [BEGUN, *[raw_frame(CONTINUATION, 0, 1, b"\x82")] * 10_000], CALM),
    ("endless_continuation_of_16_kib", [BEGUN, *[raw_frame(CONTINUATION, 0, 1, bytes(16384))] * 1000], CALM),
    ("60_kib_in_one_block", [headers_frame(1, HOLD, end_headers=False), *[LARGE] * 5], CALM),
    ("a_table_entry_times_16_thousand", [headers_frame(1, PSEUDO + KEPT + b"\xbe" * 12_000)], CALM),
    ("a_table_entry_times_15", [headers_frame(i, PSEUDO + KEPT + b"\xbe" * 17) for i in range(1, 200, 2)], CALM),
    ("short_fields_by_the_ten_thousand", [headers_frame(1, PSEUDO + b"\x40\x01a\x01b" + b"\xbe" * 16_000)] * 2, CALM),
    ("fields_of_no_name_and_no_value", [headers_frame(i, PSEUDO + b"\0\0\0" * 4000) for i in range(1, 200, 2)], CALM),
    ("a_table_larger_than_agreed", [headers_frame(1, b"\x3f\xe2\x1f" + PSEUDO)], {COMPRESSION_ERROR}),
    ("a_table_size_within_a_block", [headers_frame(1, PSEUDO + b"\x20")], {COMPRESSION_ERROR}),
    ("table_sizes_by_the_thousand", [headers_frame(1, b"\x20\x3f\xe1\x1f" * 4000 + PSEUDO)], {COMPRESSION_ERROR}),
    ("index_0", [headers_frame(1, PSEUDO + b"\x80")], {COMPRESSION_ERROR}),
    ("index_beyond_the_table", [headers_frame(1, PSEUDO + b"\xff\xff\xff\xff\xff\x07")], {COMPRESSION_ERROR}),
    ("an_integer_without_end", [headers_frame(1, PSEUDO + b"\xff" + b"\x80" * 5000)], {COMPRESSION_ERROR}),
    ("a_length_of_2_gib", [headers_frame(1, PSEUDO + b"\x00\x7f\x80\xff\xff\xff\x07a")], {COMPRESSION_ERROR}),
    ("a_block_that_breaks_off", [headers_frame(1, PSEUDO + b"\x00\x05ab")], {COMPRESSION_ERROR}),
    ("huffman_end_of_string", [headers_frame(1, PSEUDO + b"\x00\x01a\x84\xff\xff\xff\xff")], {COMPRESSION_ERROR}),
    ("huffman_padding_of_8_bits", [headers_frame(1, PSEUDO + b"\x00\x01a\x82\x1f\xff")], {COMPRESSION_ERROR}),
    ("huffman_padding_of_zeros", [headers_frame(1, PSEUDO + b"\x00\x01a\x81\x18")], {COMPRESSION_ERROR}),
]


@pytest.mark.parametrize(("name", "frames", "codes"), BLOCKS, ids=[case[0] for case in BLOCKS])
async def test_a_field_block_that_is_a_trap_ends_the_connection(
    name: str, frames: list[bytes], codes: set[int], siege: Siege, record_property: Record
) -> None:
    async with siege.attack(record_property, name) as measured, Http2Client(siege.port) as client:
        await client.handshake()
        client.send(*frames)
        measured.frames = len(frames)
        await client.expect_goaway(codes)
    assert measured.upstream_requests == 0
    assert measured.grown_mib < 1
    assert measured.worker_cpu_s < 0.05


LEFT_BEHIND: list[tuple[str, Callable[[bytes], bytes]]] = [
    (
        "fifteen_indices_of_4_kib",
        lambda mark: (KEPT if mark == b"00000001" else b"") + literal(b"b", mark) + b"\xbe" * 14,
    ),
    ("one_of_50_kib", lambda mark: literal(b"a", mark * 6250)),
    ("one_of_50_kib_for_the_table", lambda mark: b"\x40" + literal(b"a", mark * 6250)[1:]),
    ("ninety_of_120_bytes", lambda mark: block([(b"a", mark * 15)] * 90)),
]


@pytest.mark.parametrize(("name", "fields"), LEFT_BEHIND, ids=[case[0] for case in LEFT_BEHIND])
async def test_fields_of_answered_requests_are_not_kept_by_the_megabyte(
    name: str, fields: Callable[[bytes], bytes], siege: Siege, record_property: Record
) -> None:
    """300 requests whose fields nobody will ever send again."""
    async with siege.attack(record_property, name) as measured, Http2Client(siege.port) as client:
        await client.handshake()
        for i in range(1, 600, 2):
            whole = block(request("/")) + fields(b"%08x" % i)
            pieces = [whole[at : at + 16_000] for at in range(0, len(whole), 16_000)]
            more = [raw_frame(CONTINUATION, END_HEADERS * (piece is pieces[-1]), i, piece) for piece in pieces[1:]]
            client.send(headers_frame(i, pieces[0], end_headers=not more), *more)
            measured.frames += len(pieces)
            assert (await client.response(i)).status == 200
    assert measured.upstream_requests == 300
    assert measured.grown_mib < 2


async def flood_with_heads(siege: Siege, clients: contextlib.AsyncExitStack) -> float:
    """Connections with a hundred requests each, until one is refused; MiB of the worker at the highest."""
    highest = 0.0
    for _ in range(30):
        try:
            client = await clients.enter_async_context(Http2Client(siege.port))
        except ConnectionError:
            return highest
        heads = [block(HOLD) + KEPT + literal(b"b", b"%08x" % 0) + b"\xbe" * 13]
        heads += [block(HOLD) + literal(b"b", b"%08x" % i) + b"\xbe" * 14 for i in range(1, 100)]
        client.send(*(headers_frame(2 * i + 1, head) for i, head in enumerate(heads)))
        await read(client)
        highest = max(highest, private_mib(siege.worker))
    return highest


async def test_heads_that_the_table_makes_large_are_shed_before_the_memory_is_used_up(
    tmp_path: Path, record_property: Record
) -> None:
    """Requests that nobody answers, of 60 bytes each on the wire and 60 KiB each in the proxy, under 128 MiB."""
    async with Siege(tmp_path, {"retries": {"attempts": 0}}, "--memory-limit", "128Mi") as siege:
        async with contextlib.AsyncExitStack() as clients:
            highest = await flood_with_heads(siege, clients)
            requests = len(siege.seen)
        async with Callers(siege.port, rate=50.0, target="/caller") as callers:
            left = monotonic()
            await until(lambda: bool(callers.calls) and callers.calls[-1].status == 200)
            note(
                record_property,
                "large_heads",
                private_mib=highest,
                upstream_requests=requests,
                refused=await siege.metric('meshproxy_overload_total{action="refuse_request"}'),
                reset=await siege.metric('meshproxy_overload_total{action="reset_stream"}'),
                served_again_s=monotonic() - left,
            )
        assert highest < 128


# ── frames that carry nothing ──

OPEN = headers_frame(1, request("/hold", method="POST"), end_stream=False)
GONE = headers_frame(1, HOLD) + rst_frame(1)

FLOODS: list[tuple[str, bytes, bytes, set[int]]] = [
    ("settings", b"", settings_frame(), CALM),
    ("settings_of_unknown_kinds", b"", settings_frame((i, 1) for i in range(0x100, 0x120)), CALM),
    ("settings_of_a_changing_window", b"", settings_frame((4, i) for i in range(32)), CALM),
    ("settings_acknowledgements", b"", settings_ack(), CALM | {PROTOCOL_ERROR}),
    ("ping", b"", ping_frame(), CALM),
    ("ping_acknowledgements", b"", ping_frame(ack=True), CALM),
    ("empty_data", OPEN, data_frame(1, end_stream=False), CALM),
    ("data_of_padding_alone", OPEN, raw_frame(DATA, PADDED, 1, b"\xff" + bytes(255)), CALM),
    ("empty_continuation", BEGUN, raw_frame(CONTINUATION, 0, 1), CALM),
    ("priority", b"", raw_frame(PRIORITY, 0, 3, bytes(5)), CALM),
    ("priority_of_many_streams", b"", b"".join(raw_frame(PRIORITY, 0, i, bytes(5)) for i in range(3, 203, 2)), CALM),
    ("window_of_the_connection", b"", window_frame(0, 1), CALM),
    ("window_of_a_stream", OPEN, window_frame(1, 1), CALM),
    ("window_of_a_closed_stream", GONE, window_frame(1, 1), CALM),
    ("reset_of_a_closed_stream", GONE, rst_frame(1), CALM),
    ("unknown_kinds", b"", raw_frame(0xFA, 0xFF, 1, b"?"), CALM),
    ("unknown_kinds_of_16_kib", b"", raw_frame(0xFA, 0xFF, 1, bytes(16384)), CALM),
    ("goaway", OPEN, goaway_frame(), CALM),
]


@pytest.mark.parametrize(("name", "first", "flood", "codes"), FLOODS, ids=[flood[0] for flood in FLOODS])
async def test_a_flood_of_frames_that_carry_nothing_ends_the_connection(
    name: str, first: bytes, flood: bytes, codes: set[int], siege: Siege, record_property: Record
) -> None:
    async with siege.attack(record_property, name) as measured, Http2Client(siege.port) as client:
        await client.handshake()
        client.send(first)
        if first is BEGUN:  # nothing else may come between, so nothing tells that it has been read
            client.send(flood * 1000)
            measured.frames = 1000
        else:
            await send_until_closed(client, ([flood] * 50 for _ in range(200)), measured)
        await client.expect_goaway(codes)
    assert measured.grown_mib < 2
    assert measured.worker_cpu_s < 0.1


async def test_settings_by_the_thousand_do_not_work_on_every_stream_each(siege: Siege, record_property: Record) -> None:
    """CVE-2020-11080: a window that changes 2,730 times in a frame of 16 KiB, with 100 streams to adjust each time."""
    many = settings_frame((INITIAL_WINDOW_SIZE, i) for i in range(2730))
    async with siege.attack(record_property, "many_settings") as measured, Http2Client(siege.port) as client:
        await client.handshake()
        client.send(*(headers_frame(i, HOLD) for i in range(1, 200, 2)))
        await send_until_closed(client, ([many] for _ in range(100)), measured)
        await client.expect_goaway(ENHANCE_YOUR_CALM)
    assert measured.worker_cpu_s < 0.1


# ── windows ──


async def test_a_megabyte_taken_byte_by_byte_costs_a_frame_each_and_no_more(
    siege: Siege, record_property: Record
) -> None:
    """CVE-2019-9511: a window of one byte, opened again and again."""
    async with (
        siege.attack(record_property, "dribble") as measured,
        Http2Client(siege.port, {INITIAL_WINDOW_SIZE: 0}) as client,
    ):
        await client.handshake()
        client.send(headers_frame(1, BIG))
        body = client.streams.setdefault(1, Stream()).body
        for taken in range(0, 10_000, 100):
            client.send(window_frame(1, 1) * 100)
            measured.frames += 100
            await client.until(lambda taken=taken: len(body) >= taken + 100, "bytes")
    assert measured.worker_cpu_s < 0.2


@pytest.mark.parametrize("window", [0, 2**31 - 1], ids=["by_window", "by_socket"])
async def test_answers_that_are_not_taken_wait_at_the_upstream(
    window: int, siege: Siege, record_property: Record
) -> None:
    """CVE-2019-9517: a hundred megabytes are asked for on one connection, and none is read."""
    async with (
        siege.attack(record_property, "not_taken") as measured,
        Http2Client(siege.port, {INITIAL_WINDOW_SIZE: window}) as client,
    ):
        await client.handshake()
        client.send(window_frame(0, 2**31 - 1 - 65535))
        await read(client)
        client.transport.pause_reading()
        client.send(*(headers_frame(i, BIG) for i in range(1, 201, 2)))
        measured.frames = 100
        await until(lambda: siege.seen[-100:].count(b"/big") == 100)
        await until_settled(siege)
    assert measured.upstream_requests == 100
    assert measured.grown_mib < 4


SINGLE = b"".join(data_frame(1, b"x", False) for _ in range(1000))


@pytest.mark.parametrize("path", ["/hold", "/"])
async def test_a_body_of_single_bytes_costs_a_frame_each_and_no_more(
    path: str, siege_without_retries: Siege, record_property: Record
) -> None:
    """Also while there is no upstream connection yet, as for all that comes in one read with the request."""
    siege = siege_without_retries
    async with siege.attack(record_property, "single_bytes") as measured, Http2Client(siege.port) as client:
        await client.handshake()
        client.send(headers_frame(1, request(path, method="POST"), end_stream=False), *[SINGLE] * 20)
        await read(client)
        measured.frames = 20_000
    assert measured.worker_cpu_s < 0.5


async def test_data_for_a_tunnel_that_is_not_open_waits_in_the_window(siege: Siege, record_property: Record) -> None:
    connect = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *request("/hold")[1:]]
    async with siege.attack(record_property, "early_tunnel_data") as measured, Http2Client(siege.port) as client:
        await client.handshake()
        client.send(headers_frame(1, connect, end_stream=False))
        await until(lambda: siege.holding == 1)
        client.send(*[data_frame(1, bytes(16_000), False)] * 60, *[SINGLE] * 20)
        await read(client)
    assert measured.grown_mib < 2
    assert measured.worker_cpu_s < 0.2
    assert client.streams[1].reset == FLOW_CONTROL_ERROR


@pytest.mark.parametrize(
    "step",
    [
        lambda i: settings_frame((INITIAL_WINDOW_SIZE, 31 * i + j) for j in range(32)),
        lambda i: window_frame(0, 1),
        lambda i: window_frame(2 * (i % 100) + 1, 1),
    ],
    ids=["settings", "window_of_the_connection", "windows_of_streams"],
)
async def test_a_hundred_answers_that_wait_do_not_each_wake_at_every_window(
    step: Callable[[int], bytes], siege: Siege, record_property: Record
) -> None:
    is_of_connection = step(1) == window_frame(0, 1)
    window = OVER if is_of_connection else 0
    async with (
        siege.attack(record_property, "windows_for_a_hundred") as measured,
        Http2Client(siege.port, {INITIAL_WINDOW_SIZE: window}) as client,
    ):
        await client.handshake()
        client.send(*(headers_frame(i, BIG) for i in range(1, 201, 2)))
        if not is_of_connection:
            client.send(window_frame(0, OVER - 65_535))
        await until_settled(siege)
        before = siege.worker_cpu_s()
        client.send(*(step(i) for i in range(60)))
        await read(client)
        record_property("windows_for_a_hundred.cpu_of_60_s", siege.worker_cpu_s() - before)
        measured.frames = 60
        assert siege.worker_cpu_s() - before < 0.15


# ── broken connections ──

BROKEN: list[tuple[str, bytes, set[int]]] = [
    ("window_of_the_connection_twice", window_frame(0, OVER) * 2, {FLOW_CONTROL_ERROR}),
    ("window_of_the_connection_by_nothing", window_frame(0, 0), {PROTOCOL_ERROR}),
    ("initial_window_of_2_gib", settings_frame({INITIAL_WINDOW_SIZE: 2**31}), {FLOW_CONTROL_ERROR}),
    (
        "initial_window_over_one_in_use",
        window_frame(1, OVER - 70_000) + settings_frame({4: OVER}),
        {FLOW_CONTROL_ERROR},
    ),
    ("data_within_a_block", BEGUN_LATER + data_frame(1), {PROTOCOL_ERROR}),
    ("ping_within_a_block", BEGUN_LATER + ping_frame(), {PROTOCOL_ERROR}),
    ("another_block_within_a_block", BEGUN_LATER + headers_frame(1003, HOLD), {PROTOCOL_ERROR}),
    ("continuation_of_another_stream", BEGUN_LATER + raw_frame(CONTINUATION, 4, 1003), {PROTOCOL_ERROR}),
    ("continuation_of_nothing", raw_frame(CONTINUATION, 4, 1), {PROTOCOL_ERROR}),
    ("an_even_stream", headers_frame(1002, HOLD), {PROTOCOL_ERROR}),
    ("stream_0", headers_frame(0, HOLD), {PROTOCOL_ERROR}),
    ("a_stream_that_was_skipped", headers_frame(1001, HOLD) + headers_frame(999, HOLD), {PROTOCOL_ERROR}),
    ("data_on_a_stream_to_come", data_frame(1001), {PROTOCOL_ERROR}),
    ("data_on_stream_0", data_frame(0), {PROTOCOL_ERROR}),
    ("reset_of_a_stream_to_come", rst_frame(1001), {PROTOCOL_ERROR}),
    ("window_of_a_stream_to_come", window_frame(1001, 1), {PROTOCOL_ERROR}),
    ("a_frame_of_16_mib", raw_frame(DATA, 0, 1, b"", 2**24 - 1), {FRAME_SIZE_ERROR}),
    ("a_frame_one_byte_too_long", raw_frame(0xFA, 0, 1, bytes(16_385)), {FRAME_SIZE_ERROR}),
    ("a_block_one_byte_too_long", raw_frame(HEADERS, 4, 1001, bytes(16_385)), {FRAME_SIZE_ERROR}),
    ("ping_of_7_bytes", raw_frame(PING, 0, 0, bytes(7)), {FRAME_SIZE_ERROR}),
    ("reset_of_3_bytes", raw_frame(RST_STREAM, 0, 1, bytes(3)), {FRAME_SIZE_ERROR}),
    ("settings_of_5_bytes", raw_frame(SETTINGS, 0, 0, bytes(5)), {FRAME_SIZE_ERROR}),
    ("acknowledgement_with_settings", raw_frame(SETTINGS, ACK, 0, bytes(6)), {FRAME_SIZE_ERROR}),
    ("window_update_of_3_bytes", raw_frame(WINDOW_UPDATE, 0, 1, bytes(3)), {FRAME_SIZE_ERROR}),
    ("goaway_of_7_bytes", raw_frame(GOAWAY, 0, 0, bytes(7)), {FRAME_SIZE_ERROR}),
    ("settings_on_a_stream", raw_frame(SETTINGS, 0, 1), {PROTOCOL_ERROR}),
    ("ping_on_a_stream", raw_frame(PING, 0, 1, bytes(8)), {PROTOCOL_ERROR}),
    ("padding_as_long_as_the_frame", raw_frame(DATA, PADDED, 1, b"\x05abcd"), {PROTOCOL_ERROR}),
    ("padding_longer_than_the_block", raw_frame(HEADERS, PADDED | 4, 1001, b"\xffabcd"), {PROTOCOL_ERROR}),
    ("push_promise", raw_frame(PUSH_PROMISE, 4, 1, bytes(4) + PSEUDO), {PROTOCOL_ERROR}),
    ("an_http_1_request", b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n", {FRAME_SIZE_ERROR, PROTOCOL_ERROR}),
    ("another_preface", PREFACE, {FRAME_SIZE_ERROR, PROTOCOL_ERROR}),
]


@pytest.mark.parametrize(("name", "bad", "codes"), BROKEN, ids=[case[0] for case in BROKEN])
async def test_a_connection_error_gives_up_all_its_requests_and_nobody_elses(
    name: str, bad: bytes, codes: set[int], siege: Siege
) -> None:
    async with Http2Client(siege.port) as other, Http2Client(siege.port) as client:
        await client.handshake()
        await other.handshake()
        client.send(begun(1), headers_frame(3, HOLD), headers_frame(5, HOLD))
        await until(lambda: siege.holding == 3)
        client.send(bad)
        await client.expect_goaway(codes)
        await until(lambda: siege.holding == 0)
        other.send(headers_frame(1, request("/")))
        assert (await other.response(1)).status == 200


PREFACES = [
    ("of_other_letters", PREFACE[:-6] + b"XX\r\n\r\n"),
    ("of_another_version", b"PRI * HTTP/2.1\r\n\r\nSM\r\n\r\n"),
    ("with_a_field", b"PRI * HTTP/2.0\r\nhost: a\r\n\r\nSM\r\n\r\n"),
    ("then_junk", PREFACE + b"\xff" * 100),
    ("then_a_request", PREFACE + headers_frame(1, HOLD)),
    ("then_an_http_1_request", PREFACE + b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n"),
]


@pytest.mark.parametrize(("name", "opening"), PREFACES, ids=[case[0] for case in PREFACES])
async def test_a_bad_preface_closes_the_connection_and_nothing_goes_on(name: str, opening: bytes, siege: Siege) -> None:
    seen = len(siege.seen)
    answer = await exchange(siege.port, opening, ends=False)
    assert b"HTTP/1.1 200" not in answer
    assert len(siege.seen) == seen
