import pytest
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec.hpack_grammar import is_padded_well, scan

TEXT = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=300).map(lambda text: text.encode("latin-1"))
FIELD = st.tuples(TEXT.filter(bool), TEXT)


@given(st.lists(st.lists(FIELD, max_size=12), min_size=1, max_size=4), st.booleans(), st.integers(0, 4096))
def test_what_an_encoder_makes_is_well_formed_and_counted(
    blocks: list[list[tuple[bytes, bytes]]], huffman: bool, table_size: int
) -> None:
    encoder, decoder = Encoder(), Decoder()
    encoder.header_table_size = table_size
    for fields in blocks:
        block = encoder.encode(fields, huffman=huffman)
        count, strings = scan(block)
        decoded = [(bytes(name), bytes(value), False) for name, value in decoder.decode(block, raw=True)]
        assert count == len(fields)
        assert is_padded_well(block, strings, decoded)


@given(st.binary(max_size=80))
def test_any_bytes_that_a_strict_decoder_takes_are_well_formed(block: bytes) -> None:
    """The two differ in what no index means (the decoder knows the table) and in table sizes by the dozen."""
    try:
        fields = [(bytes(name), bytes(value), False) for name, value in Decoder().decode(block, raw=True)]
    except (HPACKError, IndexError):
        return
    try:
        count, strings = scan(block)
    except ValueError as error:
        assert str(error) == "misplaced table size"
        assert any(0x20 <= byte < 0x40 for byte in block)
        return
    assert count == len(fields)
    assert is_padded_well(block, strings, fields)


@pytest.mark.parametrize(
    "block",
    [
        *(b"\x82\x20", b"\x20\x20\x20\x82", b"\x3f\x82" + b"\x80" * 9, b"\xff", b"\xff" + b"\x80" * 9, b"\x0f"),
        *(b"\x00", b"\x00\x01", b"\x00\x01a", b"\x00\x01a\x05b", b"\x00\x01a\x7f\xff\xff\xff\xff\x07b", b"\x40\x01"),
    ],
)
def test_a_block_that_breaks_off_or_a_size_in_the_wrong_place_is_malformed(block: bytes) -> None:
    with pytest.raises(ValueError):
        scan(block)


@pytest.mark.parametrize(
    ("string", "value", "is_well"),
    [
        (b"\x1f", b"a", True),  # 00011 111
        (b"\x18", b"a", False),  # 00011 000
        (b"\x1b", b"a", False),  # 00011 011
        (b"\x1f\xff", b"a", False),  # eleven bits of it
        (b"\xf8", b"&", True),  # a code of eight bits, without padding
    ],
)
def test_padding_is_ones_and_less_than_a_byte(string: bytes, value: bytes, is_well: bool) -> None:
    block = b"\x00\x01a" + bytes((0x80 | len(string),)) + string
    count, strings = scan(block)
    assert count == 1
    assert is_padded_well(block, strings, [(b"a", value, False)]) is is_well
