"""HTTP/3 frames on one stream, whatever pieces they come in."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec import http3
from meshproxy.codec.http3 import (
    FieldDecoder,
    Http3Error,
    RequestReader,
    ResponseReader,
    ServerStreams,
    encode,
    frame,
    number,
)
from meshproxy.codec.http3 import _read_number as read_number


class Reader(RequestReader):
    """What was read, with pieces of data joined."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bytes]] = []
        self.ends = 0

    def on_headers(self, block: bytes, is_end: bool) -> None:
        self.seen.append(("headers", block))
        self.ends += is_end

    def on_data(self, data: bytes, is_end: bool) -> None:
        if self.seen and self.seen[-1][0] == "data":
            self.seen[-1] = ("data", self.seen[-1][1] + data)
        elif data:
            self.seen.append(("data", data))
        self.ends += is_end

    def on_incomplete(self) -> None:
        self.seen.append(("incomplete", b""))


def read(pieces: list[bytes]) -> tuple[list[tuple[str, bytes]], int] | str:
    reader = Reader()
    try:
        for index, piece in enumerate(pieces):
            reader.receive(piece, index == len(pieces) - 1)
            assert reader.held <= http3.MAX_BLOCK_BYTES + 16
    except Http3Error as error:
        return error.detail
    return reader.seen, reader.ends


kinds = st.sampled_from([http3.DATA, http3.HEADERS, 0x21, 0x40, 0x4000, http3.SETTINGS])
frames = st.lists(st.tuples(kinds, st.binary(max_size=40)), max_size=8)


@given(frames, st.binary(max_size=5), st.lists(st.integers(0, 400), max_size=12))
def test_how_a_stream_is_cut_into_pieces_makes_no_difference(
    sent: list[tuple[int, bytes]], rest: bytes, cuts: list[int]
) -> None:
    data = b"".join(frame(kind, payload) for kind, payload in sent) + rest
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = [data[begin:end] for begin, end in pairwise(places)] or [b""]
    assert read(pieces) == read([data])


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.booleans())
def test_a_request_is_read_as_it_was_written_and_ends_once(body: list[bytes], has_trailers: bool) -> None:
    data = frame(http3.HEADERS, b"head") + b"".join(frame(http3.DATA, piece) for piece in body)
    expected = [("headers", b"head")]
    if body:
        expected.append(("data", b"".join(body)))
    if has_trailers:
        data += frame(http3.HEADERS, b"trailers")
        expected.append(("headers", b"trailers"))
    assert read([data]) == (expected, 1)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_request_or_an_error_of_the_protocol(data: bytes) -> None:
    result = read([data])
    assert isinstance(result, (tuple, str))


@given(st.integers(0, (1 << 62) - 1))
def test_numbers_read_as_they_were_written(value: int) -> None:
    written = number(value)
    assert read_number(written, 0) == (value, len(written))
    assert all(read_number(written[:cut], 0)[1] < 0 for cut in range(len(written)))


names = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=20).map(str.encode)
lines = st.lists(st.tuples(names, st.binary(max_size=60)), max_size=20)


@given(lines)
def test_field_sections_read_as_they_were_written(fields: list[tuple[bytes, bytes]]) -> None:
    written = [(name, value, False) for name, value in fields]
    assert FieldDecoder().decode(encode(written)) == written


@given(lines, lines)
def test_lines_may_be_added_to_a_section_without_their_prefix(
    first: list[tuple[bytes, bytes]], second: list[tuple[bytes, bytes]]
) -> None:
    """What the proxy relies on to write an answer's own lines behind remembered ones."""
    one = [(name, value, False) for name, value in first]
    two = [(name, value, False) for name, value in second]
    assert FieldDecoder().decode(encode(one) + encode(two)[2:]) == one + two


@given(st.binary(max_size=200))
def test_any_section_gives_fields_or_an_error_and_the_next_one_is_read_as_ever(block: bytes) -> None:
    decoder = FieldDecoder()
    try:
        fields = decoder.decode(block)
    except Http3Error:
        pass
    else:
        assert fields is None or isinstance(fields, list)
    after = [(b":status", b"200", False), (b"x", b"y" * 50, False)]
    assert decoder.decode(encode(after)) == after


class Server(ServerStreams):
    def __init__(self) -> None:
        super().__init__()
        self.goaways: list[int] = []

    def on_goaway(self, stream_id: int) -> None:
        self.goaways.append(stream_id)


def control(*frames: bytes) -> bytes:
    return b"\x00" + b"".join(frames)


SETTINGS = frame(http3.SETTINGS, b"\x08\x01\x06\x44\x00")


def test_what_a_server_says_of_itself_is_read_in_any_pieces() -> None:
    data = control(SETTINGS, frame(http3.GOAWAY, number(400)), frame(0x21, b"grease"), frame(http3.GOAWAY, number(8)))
    for size in (1, 3, len(data)):
        server = Server()
        for at in range(0, len(data), size):
            assert server.receive(3, data[at : at + size], False)
        assert server.settings == {0x8: 1, 0x6: 0x400}
        assert server.goaways == [400, 8]


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        ([control(frame(http3.GOAWAY, b"\x00"))], http3.MISSING_SETTINGS),
        ([control(SETTINGS, SETTINGS)], http3.FRAME_UNEXPECTED),
        ([control(frame(http3.SETTINGS, b"\x08\x02"))], http3.SETTINGS_ERROR),
        ([control(frame(http3.SETTINGS, b"\x02\x00"))], http3.SETTINGS_ERROR),
        ([control(SETTINGS, frame(http3.GOAWAY, b"\x04"), frame(http3.GOAWAY, b"\x08"))], http3.ID_ERROR),
        ([control(SETTINGS, frame(http3.GOAWAY, b"\x01"))], http3.ID_ERROR),
        ([control(SETTINGS, frame(http3.GOAWAY, b"\x04\x00"))], http3.FRAME_ERROR),
        ([control(SETTINGS, frame(http3.MAX_PUSH_ID, b"\x04"))], http3.FRAME_UNEXPECTED),
        ([control(SETTINGS, frame(http3.CANCEL_PUSH, b"\x00"))], http3.ID_ERROR),
        ([control(SETTINGS, frame(http3.HEADERS, b""))], http3.FRAME_UNEXPECTED),
        ([control(SETTINGS), control(SETTINGS)], http3.STREAM_CREATION_ERROR),
        ([b"\x01\x00"], http3.ID_ERROR),
        ([b"\x02\x3f\x01"], http3.ENCODER_STREAM_ERROR),
        ([b"\x03\x80"], http3.DECODER_STREAM_ERROR),
    ],
)
def test_a_server_that_breaks_the_rules_of_its_own_streams_is_left(streams: list[bytes], code: int) -> None:
    server = Server()
    with pytest.raises(Http3Error) as caught:
        for index, data in enumerate(streams):
            server.receive(3 + 4 * index, data, False)
    assert caught.value.code == code


def test_interim_heads_may_come_before_the_head_and_trailers_after_it() -> None:
    class Response(ResponseReader):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[bytes] = []

        def on_headers(self, block: bytes, is_end: bool) -> None:
            self.seen.append(block)
            if block.startswith(b"1"):
                self.was_informational()

        def on_data(self, data: bytes, is_end: bool) -> None:
            self.seen.append(data)

    reader = Response()
    heads = (b"103", b"103", b"200")
    reader.receive(b"".join(frame(http3.HEADERS, head) for head in heads) + frame(http3.DATA, b"body"), False)
    reader.receive(frame(http3.HEADERS, b"trailers"), True)
    assert reader.seen == [*heads, b"body", b"trailers"]
    with pytest.raises(Http3Error):
        Response().receive(frame(http3.HEADERS, b"103") + frame(http3.DATA, b"body"), False)
