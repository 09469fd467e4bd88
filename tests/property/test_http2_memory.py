"""What an HTTP/2 connection remembers of field blocks is what decoding or encoding them again would give."""

import hpack
from hypothesis import given
from hypothesis import strategies as st
from jh2._hazmat import Decoder, Encoder

from meshproxy.codec.http2 import changes_no_table

NAMES = st.sampled_from([b":path", b":status", b"x-request-id", b"date", b"server", b"cookie", b"x-" + b"n" * 140])
VALUES = st.sampled_from([b"", b"/", b"200", b"a", b"b" * 40, b"\xff\xfe", b"v" * 200])
FIELD = st.tuples(NAMES, VALUES, st.booleans())
LISTS = st.lists(st.lists(FIELD, min_size=1, max_size=6), min_size=1, max_size=8)


@given(LISTS)
def test_a_block_that_changes_no_table_may_be_left_out_without_a_trace(
    lists: list[list[tuple[bytes, bytes, bool]]],
) -> None:
    encoder, all_blocks, without = Encoder(), Decoder(), Decoder()
    for fields in lists:
        block = encoder.encode(fields)
        decoded = [(name, value) for name, value, _ in all_blocks.decode(block)]
        assert decoded == [(name, value) for name, value, _ in fields]
        if changes_no_table(block):
            continue
        assert [(name, value) for name, value, _ in without.decode(block)] == decoded


@given(LISTS)
def test_what_was_encoded_without_changing_the_table_may_be_sent_again(
    lists: list[list[tuple[bytes, bytes, bool]]],
) -> None:
    encoder, peer = Encoder(), hpack.Decoder()
    kept: dict[tuple[tuple[bytes, bytes, bool], ...], bytes] = {}
    for fields in [*lists, *lists]:
        key = tuple(fields)
        block = kept.get(key)
        if block is None:
            block = encoder.encode(fields)
            if changes_no_table(block):
                kept[key] = block
            else:
                kept.clear()
        assert [(bytes(name), bytes(value)) for name, value in peer.decode(block, raw=True)] == [
            (name, value) for name, value, _ in fields
        ]


@given(st.binary(max_size=60))
def test_any_bytes_are_looked_at_without_an_error(block: bytes) -> None:
    assert changes_no_table(block) in (True, False)
