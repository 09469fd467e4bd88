"""Field blocks as a server must decode them: RFC 7541. A decoding error is a connection error of type
COMPRESSION_ERROR (RFC 9113 §4.3)."""

from collections.abc import Iterator

import hpack
import pytest
from hpack.hpack import encode_integer
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from tests.conformance.http2_peer import (
    Case,
    Step,
    answer,
    answered,
    connection_error,
    malformed,
    params,
    proxy,
    run,
    serves,
)
from tests.support.http2_client import (
    COMPRESSION_ERROR,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADER_TABLE_SIZE,
    HEADERS,
    Http2Client,
    block,
    headers_frame,
    literal,
    raw_frame,
    request,
)
from tests.support.origin import Origin

GET = block(request("/"))
BAD = block(request("/bad"))
ADD_X_A = b"\x40\x03x-a\x01b"
"""Literal with incremental indexing: `x-a: b`, 36 bytes of the dynamic table."""
NEWEST = b"\xbe"
"""The newest entry of the dynamic table: index 62."""
NOT_EMPTY = {28, 35, 38, 57}
"""content-length, expect, host, transfer-encoding: without a value, as the static table has them, they are an error."""
INT_MAX = b"\xff\xff\xff\xff\x0f"
"""The rest of an integer that is more than 2^32."""

error = connection_error(COMPRESSION_ERROR)


def broken(section: str, what: str, tail: bytes) -> Case:
    """A request with this behind its fields."""
    return Case(section, what, (headers_frame(1, BAD + tail),), error)


def good(section: str, what: str, tail: bytes) -> Case:
    return Case(section, what, (headers_frame(1, GET + tail),), serves(1))


def huffman(name: bytes, coded: bytes) -> bytes:
    """Literal without indexing whose value is Huffman-coded: these bytes."""
    return b"\x00" + bytes((len(name),)) + name + bytes((0x80 | len(coded),)) + coded


def index_table() -> Iterator[Case]:
    for what, tail in (
        ("index_0", b"\x80"),
        ("index_behind_the_static_table_with_an_empty_dynamic_table", NEWEST),
        ("index_behind_the_dynamic_table", ADD_X_A + b"\xbf"),
        ("index_70", b"\xc6"),
        ("index_of_2_31", b"\xff\x81\xff\xff\xff\x07"),
        ("name_index_behind_the_tables_with_indexing", b"\x7e\x01v"),
        ("name_index_behind_the_tables_without_indexing", b"\x0f\x2f\x01v"),
        ("name_index_behind_the_tables_never_indexed", b"\x1f\x2f\x01v"),
    ):
        yield broken("6.1" if what == "index_0" else "2.3.3", what, tail)
    yield good(
        "2.3.1",
        "every_entry_of_the_static_table_that_a_request_may_have",
        b"".join(indexed(index) for index in range(15, 62) if index not in NOT_EMPTY),
    )
    yield good("2.3.2", "duplicate_entries", ADD_X_A * 3 + b"\xbe\xbf\xc0")
    yield Case(
        "2.3.2",
        "table_lasts_from_request_to_request",
        (headers_frame(1, GET + ADD_X_A), headers_frame(3, GET + NEWEST)),
        serves(1, 3),
    )
    yield Case(
        "2.3.2",
        "trailers_share_the_table",
        (
            headers_frame(1, block(request("/", method="POST")), False),
            headers_frame(1, ADD_X_A),
            headers_frame(3, GET + NEWEST),
        ),
        serves(1, 3),
    )


def indexed(index: int) -> bytes:
    return bytes((0x80 | index,))


def size_updates() -> Iterator[Case]:
    for what, block_ in (
        ("at_the_start", b"\x20" + GET),
        ("to_the_limit", b"\x3f\xe1\x1f" + GET),
        ("two_at_the_start", b"\x20\x3f\xe1\x1f" + GET),
        ("the_same_again", b"\x3f\xe1\x1f\x3f\xe1\x1f" + GET),
    ):
        yield Case("4.2", f"size_update_{what}", (headers_frame(1, block_),), serves(1))
    for what, block_ in (
        ("behind_a_field", BAD[:13] + b"\x20" + BAD[13:]),
        ("at_the_end", BAD + b"\x20"),
        ("between_two_fields", BAD + b"\x20" + ADD_X_A),
    ):
        yield Case("4.2", f"size_update_{what}", (headers_frame(1, block_),), error)
    yield Case("6.3", "size_update_one_above_the_limit", (over_the_limit(1),), error)
    yield Case("6.3", "size_update_far_above_the_limit", (headers_frame(1, b"\x3f\xe1\xff\xff\xff\x07" + BAD),), error)
    yield Case(
        "6.3", "second_size_update_above_the_limit", (headers_frame(1, b"\x20\x3f\xe1\xff\xff\xff\x07" + BAD),), error
    )
    # What the encoder set itself is no limit: the setting is.
    yield Case(
        "6.3",
        "size_update_above_an_earlier_one",
        (headers_frame(1, b"\x20" + GET), headers_frame(3, b"\x3f\xe1\x1f" + GET)),
        serves(1, 3),
    )
    yield Case(
        "4.2",
        "size_update_at_the_start_of_trailers",
        (
            headers_frame(1, block(request("/", method="POST")), False),
            headers_frame(1, b"\x20" + block([(b"x-t", b"1")])),
        ),
        serves(1),
    )
    yield Case(
        "4.3",
        "size_update_to_0_evicts",
        (headers_frame(1, GET + ADD_X_A), headers_frame(3, b"\x20" + BAD + NEWEST)),
        error,
    )
    yield Case(
        "4.3",
        "size_update_to_35_evicts_an_entry_of_36",
        (headers_frame(1, GET + ADD_X_A), headers_frame(3, b"\x3f\x04" + BAD + NEWEST)),
        error,
    )
    yield Case(
        "4.3",
        "size_update_to_36_keeps_an_entry_of_36",
        (headers_frame(1, GET + ADD_X_A), headers_frame(3, b"\x3f\x05" + GET + NEWEST)),
        serves(1, 3),
    )
    yield Case(
        "4.3",
        "size_updates_down_and_up_evict",
        (headers_frame(1, GET + ADD_X_A), headers_frame(3, b"\x20\x3f\xe1\x1f" + BAD + NEWEST)),
        error,
    )
    yield Case(
        "4.4",
        "entry_larger_than_the_table_empties_it",
        (headers_frame(1, GET + ADD_X_A + large_entry(5000)), headers_frame(3, BAD + NEWEST)),
        error,
    )
    yield good("4.4", "entry_larger_than_the_table_is_no_error", large_entry(5000))
    yield Case(
        "4.4",
        "new_entry_evicts_the_oldest",
        (headers_frame(1, GET + ADD_X_A + large_entry(4040)), headers_frame(3, BAD + b"\xbf")),
        error,
    )
    # The new entry takes its name from one that it evicts.
    yield Case(
        "4.4",
        "name_of_an_entry_that_is_evicted",
        (headers_frame(1, GET + ADD_X_A), headers_frame(3, b"\x3f\x05" + GET + b"\x7e\x01c" + NEWEST)),
        serves(1, 3),
    )


def large_entry(size: int) -> bytes:
    """`x-l` with a value of so many bytes, with incremental indexing."""
    return b"\x40\x03x-l" + encode_integer(size, 7) + b"v" * size


def over_the_limit(excess: int) -> Step:
    async def step(client: Http2Client) -> None:
        size = encode_integer(client.settings.get(HEADER_TABLE_SIZE, 4096) + excess, 5)
        client.send(headers_frame(1, bytes((0x20 | size[0],)) + bytes(size[1:]) + BAD))

    return step


def integers() -> Iterator[Case]:
    for what, tail in (
        ("index_over_2_32", b"\xff" + INT_MAX),
        ("index_over_2_64", b"\xff" + b"\xff" * 9 + b"\x7f"),
        ("index_of_100_bytes", b"\xff" + b"\xff" * 99 + b"\x01"),
        ("index_that_would_be_1_modulo_2_32", b"\xff\x83\xff\xff\xff\x0f"),
        ("index_that_would_be_1_modulo_2_64", b"\xff\x83\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        ("length_of_a_name_over_2_32", b"\x00\x7f" + INT_MAX),
        ("length_of_a_value_over_2_32", b"\x00\x01x\x7f" + INT_MAX),
        ("length_of_a_value_over_2_64", b"\x00\x01x\x7f" + b"\xff" * 9 + b"\x7f"),
        ("index_cut_inside", b"\xff\xff"),
        ("index_cut_at_its_prefix", b"\xff"),
        ("name_index_cut_inside", b"\x7f\x80"),
        ("length_cut_inside", b"\x00\x7f\x80"),
    ):
        yield broken("5.1", what, tail)
    yield Case("5.1", "size_update_over_2_32", (headers_frame(1, b"\x3f" + INT_MAX + BAD),), error)
    yield Case("5.1", "size_update_cut_inside", (headers_frame(1, b"\x3f\x80"),), error)
    # 10 as 9 + continuation is not what an encoder writes, and still 10.
    yield good("5.1", "length_in_more_bytes_than_needed", b"\x00\x01x\x7f\x80\x00" + b"v" * 127)


def strings() -> Iterator[Case]:
    for what, tail in (
        ("literal_without_a_name", b"\x00"),
        ("literal_without_a_value", b"\x00\x01x"),
        ("name_longer_than_the_block", b"\x00\x05x"),
        ("value_longer_than_the_block", b"\x00\x01x\x05v"),
        ("huffman_value_longer_than_the_block", b"\x00\x01x\x85\xff"),
        ("value_of_1_MiB_in_a_short_block", b"\x00\x01x\x7f\x81\xff\x3f"),
        ("indexed_name_without_a_value", b"\x42"),
        ("never_indexed_name_cut", b"\x10\x05x"),
    ):
        yield broken("5.2", what, tail)
    for what, coded in (
        # `a` is 00011: three bits of padding, all ones.
        ("padding_of_8_ones", b"\x1f\xff"),
        ("padding_of_11_ones", b"\x1f\xff\xff"),
        ("padding_of_zeros", b"\x18"),
        ("padding_with_a_zero", b"\x1d"),
        ("padding_only_of_8_bits", b"\xff"),
        ("eos", b"\xff\xff\xff\xff"),
        ("eos_and_padding", b"\xff\xff\xff\xfc\x1f"),
        ("eos_behind_a_letter", b"\x1f\xff\xff\xff\xff"),
        ("padding_of_16_bits_in_a_long_string", b"\x1f" * 8 + b"\xff\xff"),
    ):
        yield broken("5.2", f"huffman_{what}", huffman(b"x", coded))
    yield broken("5.2", "huffman_name_with_eos", b"\x00\x84\xff\xff\xff\xff\x01v")
    yield broken("5.2", "huffman_name_with_8_bits_of_padding", b"\x00\x82\x1f\xff\x01v")
    for text in (
        b"a",
        b"0",
        b"ab",
        b"abc",
        b"abcde",
        b"#",
        b"~",
        b"www.example.com",
        bytes(range(0x21, 0x7F)),
        b"\xe9\xff",
    ):
        coded = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(text)
        yield good("5.2", f"huffman_of_{text[:15]!r}", huffman(b"x", coded))
    yield good("5.2", "huffman_of_the_empty_string", huffman(b"x", b""))


def representations() -> Iterator[Case]:
    yield Case(
        "6.2.1",
        "literal_with_indexing_and_an_indexed_name",
        (headers_frame(1, GET + b"\x7a\x03abc"), headers_frame(3, GET + NEWEST)),
        serves(1, 3),
    )
    yield Case(
        "6.2.2",
        "literal_without_indexing_is_not_in_the_table",
        (headers_frame(1, GET + literal(b"x", b"y")), headers_frame(3, BAD + NEWEST)),
        error,
    )
    yield Case(
        "6.2.3",
        "never_indexed_literal_is_not_in_the_table",
        (headers_frame(1, GET + b"\x10\x01x\x01y"), headers_frame(3, BAD + NEWEST)),
        error,
    )
    yield Case(
        "4.3",
        "field_block_that_ends_in_a_continuation",
        (
            raw_frame(HEADERS, END_STREAM, 1, GET + ADD_X_A[:3]),
            raw_frame(CONTINUATION, END_HEADERS, 1, ADD_X_A[3:]),
            headers_frame(3, GET + NEWEST),
        ),
        serves(1, 3),
    )
    # No bytes are a block without fields: nothing wrong with it for HPACK.
    yield Case("6", "empty_block", (raw_frame(HEADERS, END_STREAM | END_HEADERS, 1),), malformed(1))


CASES = [*index_table(), *size_updates(), *integers(), *strings(), *representations()]


@pytest.mark.parametrize("case", params(CASES))
async def test_decoder(case: Case) -> None:
    await run(case)


async def test_fields_arrive_as_they_were_encoded_and_in_order() -> None:
    """Each representation (RFC 7541 §6), with and without Huffman coding, before and after an eviction."""
    encoder = hpack.Encoder()
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port) as client:
        await client.handshake()
        sent = []
        for stream_id in range(1, 61, 2):
            encoder.header_table_size = (4096, 100, 0, 4096)[stream_id % 4]
            fields = [(b"x-%d" % (i % 7), b"value %d of %d" % (i, stream_id // 10)) for i in range(12)]
            sensitive = [hpack.NeverIndexedHeaderTuple(b"x-secret", b"s%d" % stream_id)]
            data = encoder.encode([*request(f"/{stream_id}", *fields), *sensitive], huffman=stream_id % 3 == 0)
            client.send(headers_frame(stream_id, data))
            await answered(stream_id)(client)
            sent.append((b"/%d" % stream_id, [*fields, *((bytes(n), bytes(v)) for n, v in sensitive)]))
        names = {name for _, fields in sent for name, _ in fields}
        seen = [(r.target, [(name, value) for name, value in r.headers if name in names]) for r in origin.requests]
        assert seen == sent


async def test_6_1_indexed_fields_are_those_of_the_table() -> None:
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port) as client:
        await client.handshake()
        # :method GET, :scheme http, :path /index.html, accept-encoding gzip, deflate; authority as a literal.
        client.send(headers_frame(1, b"\x82\x86\x85\x41\x09a.example\x90"))
        await answered(1)(client)
        client.send(headers_frame(3, b"\x83\x86\x84\xbe" + ADD_X_A + NEWEST))
        await answered(3)(client)
        first, second = origin.requests
        assert (first.method, first.target, first.header(b"accept-encoding")) == (
            b"GET",
            b"/index.html",
            b"gzip, deflate",
        )
        assert (second.method, second.target, second.header(b"host")) == (b"POST", b"/", b"a.example")
        values = [value for name, value in second.headers if name == b"x-a"]
        assert values in ([b"b", b"b"], [b"b,b"], [b"b, b"])
