"""Chunked bodies: what is read, what is refused, and that it does not matter how the bytes arrive."""

import re

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshproxy.codec.chunked import MAX_LINE_BYTES, MAX_TRAILER_BYTES, ChunkedReader, chunk, last_chunk
from meshproxy.errors import RemoteProtocolError

Outcome = tuple[bytes, bytes, bytes | None]
"""(body, trailers, bytes after the message or None while it goes on)."""


def read(*pieces: bytes) -> Outcome:
    reader = ChunkedReader()
    body: list[bytes] = []
    for index, piece in enumerate(pieces):
        found, end = reader.feed(piece)
        body += found
        assert all(found), "an empty slice would end a chunked message that is written from slices"
        if end >= 0:
            return b"".join(body), reader.trailers, piece[end:] + b"".join(pieces[index + 1 :])
    return b"".join(body), b"", None


def outcome(*pieces: bytes) -> Outcome | str:
    try:
        return read(*pieces)
    except RemoteProtocolError as error:
        assert error.status == 400
        assert error.detail.startswith("http1.")
        return "refused"


@pytest.mark.parametrize(
    ("wire", "body", "trailers", "rest"),
    [
        (b"0\r\n\r\n", b"", b"", b""),
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello", b"", b""),
        (b"5\r\nhello\r\n0\r\n\r\nGET /", b"hello", b"", b"GET /"),
        (b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", b"hello", b"", b""),
        (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", b"", b""),
        (b"a\r\n0123456789\r\n00\r\n\r\n", b"0123456789", b"", b""),
        (b"0000000000000005\r\nhello\r\n0\r\n\r\n", b"hello", b"", b""),
        (b"5;a\r\nhello\r\n0;b=c\r\n\r\n", b"hello", b"", b""),
        (b'5 ;a="b c"\r\nhello\r\n0\t; b\r\n\r\n', b"hello", b"", b""),
        (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n", b"", b""),
        (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n", b"", b""),
        (b"0\r\nX-A: b\r\nX-C:\r\n\r\nrest", b"", b"X-A: b\r\nX-C:\r\n", b"rest"),
    ],
)
def test_bodies(wire: bytes, body: bytes, trailers: bytes, rest: bytes) -> None:
    assert read(wire) == (body, trailers, rest)


@pytest.mark.parametrize("cut", range(len(b"5;x\r\nhello\r\n0\r\nX: y\r\n\r\n")))
def test_a_message_that_is_not_whole_goes_on(cut: int) -> None:
    wire = b"5;x\r\nhello\r\n0\r\nX: y\r\n\r\n"
    assert read(wire[:cut])[2] is None
    assert read(wire[:cut], wire[cut:] + b"rest") == (b"hello", b"X: y\r\n", b"rest")


@pytest.mark.parametrize(
    ("wire", "word"),
    [
        (b"\r\n", "invalid_chunk_size"),
        (b"g", "invalid_chunk_size"),
        (b"-1\r\n", "invalid_chunk_size"),
        (b"+1\r\n", "invalid_chunk_size"),
        (b"0x1\r\n", "invalid_chunk_size"),
        (b"1_0\r\n", "invalid_chunk_size"),
        (b" 5\r\n", "invalid_chunk_size"),
        (b"5 \r\n", "invalid_chunk_size"),
        (b"5\n", "invalid_chunk_size"),
        (b"5\rX", "invalid_chunk_size"),
        (b"5,5\r\n", "invalid_chunk_size"),
        (b"5;a\x00", "invalid_chunk_size"),
        (b"5;a\n", "invalid_chunk_size"),
        (b"5;a\rb", "invalid_chunk_size"),
        ("٥\r\n".encode(), "invalid_chunk_size"),
        (b"00000000000000005\r\n", "invalid_chunk_size"),
        (b"ffffffffffffffff\r\n", "chunk_size_overflow"),
        (b"4000000000000001\r\n", "chunk_size_overflow"),
        (b"5;" + b"a" * 300, "chunk_line_too_long"),
        (b"5;" + b"a" * 300 + b"\r\n", "chunk_line_too_long"),
        (b"5\r\nhello0", "chunk_not_terminated"),
        (b"5\r\nhelloX\n", "chunk_not_terminated"),
        (b"5\r\nhello\n0", "chunk_not_terminated"),
        (b"5\r\nhello\rX", "chunk_not_terminated"),
        (b"0\r\n X: y", "invalid_trailer"),
        (b"0\r\nX : y", "invalid_trailer"),
        (b"0\r\nX: y\r\n z\r\n\r\n", "invalid_trailer"),
        (b"0\r\nX: y\n", "invalid_trailer"),
        (b"0\r\nX: \x00", "invalid_trailer"),
        (b"0\r\n: y", "invalid_trailer"),
        (b"0\r\nXY\r\n", "invalid_trailer"),
        (b"0\r\n\n", "invalid_trailer"),
        (b"0\r\n\rX", "invalid_trailer"),
        (b"0\r\nX: " + b"a" * 9000, "trailers_too_large"),
        (b"0\r\nX: " + b"a" * 9000 + b"\r\n\r\n", "trailers_too_large"),
        (b"0\r\n" + b"X: y\r\n" * 2000 + b"\r\n", "trailers_too_large"),
    ],
)
def test_refused_as_soon_as_it_cannot_become_legal(wire: bytes, word: str) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        read(wire)
    assert (refused.value.detail, refused.value.status) == (f"http1.{word}", 400)
    assert outcome(*[wire[at : at + 1] for at in range(len(wire))]) == "refused"


def test_an_upstream_that_errs_is_a_bad_gateway() -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        ChunkedReader("upstream").feed(b"x")
    assert (refused.value.detail, refused.value.status) == ("upstream.invalid_chunk_size", 502)


@pytest.mark.parametrize("size", [MAX_LINE_BYTES - 1, MAX_LINE_BYTES])
def test_the_longest_size_line(size: int) -> None:
    line = b"5;" + b"a" * (size - 4) + b"\r\n"
    assert read(line + b"hello\r\n0\r\n\r\n")[0] == b"hello"
    assert outcome(line[:-1], line[-1:], b"hello\r\n0\r\n\r\n") == (b"hello", b"", b"")


@pytest.mark.parametrize("size", [MAX_TRAILER_BYTES - 1, MAX_TRAILER_BYTES])
def test_the_longest_trailers(size: int) -> None:
    trailers = b"X:" + b"a" * (size - 6) + b"\r\n"
    assert read(b"0\r\n" + trailers + b"\r\n") == (b"", trailers, b"")
    assert outcome(b"0\r\n" + trailers + b"\r", b"\n") == (b"", trailers, b"")


@pytest.mark.parametrize(
    "name",
    [
        b"Content-Length",
        b"transfer-encoding",
        b"HOST",
        b"Trailer",
        b"TE",
        b"Connection",
        b"Authorization",
        b"Cookie",
        b"Set-Cookie",
        b"Content-Type",
        b"Content-Encoding",
        b"x-forwarded-for",
        b"X-Envoy-Original-Path",
        b"Proxy-Authorization",
    ],
)
def test_fields_that_must_not_come_late_are_dropped(name: bytes) -> None:
    wire = b"0\r\nx-a: 1\r\n" + name + b": 5\r\nx-b: " + name + b": 2\r\n\r\n"
    assert read(wire)[1] == b"x-a: 1\r\nx-b: " + name + b": 2\r\n"


def test_reading_may_begin_in_the_middle_of_what_arrived() -> None:
    wire = b"HEAD\r\n\r\n5\r\nhello\r\n0\r\n\r\nnext"
    reader = ChunkedReader()
    assert reader.feed(wire, 8) == ([b"hello"], wire.index(b"next"))


def test_an_offset_counts_in_what_was_fed_last() -> None:
    reader = ChunkedReader()
    assert reader.feed(b"5\r\nhel") == ([b"hel"], -1)
    assert reader.feed(b"lo\r\n0\r") == ([b"lo"], -1)
    assert reader.feed(b"junk\n\r\nnext", 4) == ([], len(b"junk\n\r\n"))


def test_large_pieces_pass_through_uncopied() -> None:
    reader = ChunkedReader()
    reader.feed(b"ffff\r\n")
    piece = bytes(1000)
    (found,), _ = reader.feed(piece)
    assert found is piece


SIZE_LINES = st.sampled_from([b"%x", b"%X", b"0%x", b"%x;a=b", b"%x \t;x"])
CHUNKS = st.lists(
    st.tuples(st.binary(min_size=1, max_size=40), SIZE_LINES).map(
        lambda pair: pair[1] % len(pair[0]) + b"\r\n" + pair[0] + b"\r\n"
    ),
    max_size=5,
).map(b"".join)
TRAILERS = st.lists(st.sampled_from([b"X: y\r\n", b"x-a:\r\n", b"Content-Length: 3\r\n", b"Z:\xe9\t\r\n"]), max_size=3)
WIRES = st.builds(
    lambda chunks, trailers, rest: chunks + b"0\r\n" + b"".join(trailers) + b"\r\n" + rest,
    CHUNKS,
    TRAILERS,
    st.binary(max_size=10),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with a byte changed, dropped or put in."""
    wire: bytes = draw(WIRES)
    at = draw(st.integers(0, len(wire)))
    byte: bytes = draw(st.sampled_from([b"", *(bytes([value]) for value in b"\r\n \t;:0aZ\x00\xff-")]))
    return wire[:at] + byte + wire[at + draw(st.integers(0, 1)) :]


def split(wire: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(wire) + 1) for cut in cuts})
    return [wire[start:end] for start, end in zip([0, *places], [*places, len(wire)], strict=True)]


@given(wire=WIRES | damaged() | st.binary(max_size=40), cuts=st.lists(st.integers(0, 400), max_size=12))
@example(wire=b"5\r\nhello\r\n0\r\n\r\n", cuts=[1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14])
@example(wire=b"0\r\nX: y\r\n\r\nrest", cuts=[1, 2, 3, 9, 10, 11, 12])
def test_any_split_of_the_same_bytes_gives_the_same_result(wire: bytes, cuts: list[int]) -> None:
    whole = outcome(wire)
    assert outcome(*split(wire, cuts)) == whole
    assert outcome(*[wire[at : at + 1] for at in range(len(wire))]) == whole


@given(wire=WIRES | damaged())
def test_whatever_is_accepted_another_implementation_reads_alike(wire: bytes) -> None:
    got = outcome(wire)
    # RFC 9112 §7.1.1 allows white space before the semicolon of an extension, h11 does not; trailers that are dropped
    # here h11 reads, and refuses where they are not well formed.
    if got == "refused" or re.search(rb"[\t ];|content-length", wire.lower()):
        return
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    peer.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + wire)
    assert isinstance(peer.next_event(), h11.Request)
    body = b""
    while isinstance(event := peer.next_event(), h11.Data):
        body += bytes(event.data)
    assert body == got[0]
    if got[2] is None:
        assert event is h11.NEED_DATA
    else:
        assert isinstance(event, h11.EndOfMessage)
        assert bytes(peer.trailing_data[0]) == got[2]


@given(pieces=st.lists(st.binary(min_size=1, max_size=50), max_size=6), trailers=st.sampled_from([b"", b"X: y\r\n"]))
def test_what_is_written_is_read_back(pieces: list[bytes], trailers: bytes) -> None:
    wire = b"".join([chunk(piece) for piece in pieces]) + last_chunk(trailers)
    assert read(wire) == (b"".join(pieces), trailers, b"")
