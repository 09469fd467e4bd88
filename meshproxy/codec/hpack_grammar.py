"""What RFC 7541 forbids in a field block and the decoder lets pass.

Decides: is the block well formed, how many fields has it. Leaves to others: what the fields are (the Rust HPACK of
`jh2`). Without it a table's size could change within a block (§4.2), a Huffman string be padded with anything (§5.2),
and 60 KiB of one-byte indices be decoded to 60,000 fields, which takes 50 ms.
"""

from typing import Final

Strings = list[tuple[int, int, int, int]]
"""Huffman strings of a block: (number of the field, 0 = its name or 1 = its value, first byte, end)."""

# RFC 7541 appendix B: how many bits the code of each byte has.
_CODE_BITS: Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c"
    "060a0a0c0d06080b0a0a080b080606060505050606060606060607080f060c0a"
    "0d06070707070707070707070707070707070707070707070807080d130d0e06"
    "0f05060506050606060507070606060506070605050607070707070f0b0e0d1c"
    "1416141416161617161717171717181718181617181717171715161716171718"
    "1615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b"
    "14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a"
)


def scan(block: bytes) -> tuple[int, Strings]:
    """How many fields the block has, and its Huffman strings. ValueError for a malformed block.

    Not looked at: what an index means, or whether there is such an entry; the decoder does that.
    """
    at, size, count, updates = 0, len(block), 0, 0
    strings: Strings = []
    while at < size:
        kind = block[at]
        at += 1
        if kind >= 0x80:  # a field by index
            if kind == 0xFF:
                _, at = _integer(block, at, 127)
            count += 1
            continue
        if 0x20 <= kind < 0x40:
            updates += 1
            if count or updates > 2:  # the smallest since the last block, and the last
                raise ValueError("misplaced table size")
            if kind == 0x3F:
                _, at = _integer(block, at, 31)
            continue
        name = kind & (0x3F if kind >= 0x40 else 0x0F)
        if name == (0x3F if kind >= 0x40 else 0x0F):
            _, at = _integer(block, at, name)
        for part in (0, 1) if not name else (1,):
            if at >= size:
                raise ValueError("truncated")
            length = block[at]
            at += 1
            is_huffman = length >= 0x80
            length &= 0x7F
            if length == 127:
                length, at = _integer(block, at, 127)
            if is_huffman:
                strings.append((count, part, at, at + length))
            at += length
        count += 1
    if at != size:
        raise ValueError("truncated")
    return count, strings


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """(Value, where it ends) of an integer whose prefix is full (§5.1). At most 2^28: nothing here is that large."""
    for shift in (0, 7, 14, 21):
        if at >= len(block):
            break
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("integer too long")


def is_padded_well(block: bytes, strings: Strings, fields: list[tuple[bytes, bytes, bool]]) -> bool:
    """Whether each Huffman string ends with the first bits of EOS, all ones, and fewer than eight of them (§5.2)."""
    for number, part, at, end in strings:
        name, value, _ = fields[number]
        padding = 8 * (end - at) - sum((value if part else name).translate(_CODE_BITS))
        if padding and not (0 < padding < 8 and block[end - 1] & (1 << padding) - 1 == (1 << padding) - 1):
            return False
    return True
