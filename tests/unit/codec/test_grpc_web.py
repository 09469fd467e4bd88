"""gRPC-Web's text and its last frame, against base64 of the standard library and PROTOCOL-WEB.md."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec import grpc_web
from meshproxy.errors import RemoteProtocolError
from tests.support.cuts import cut

PLACES = st.lists(st.integers(0, 300))


@pytest.mark.parametrize(
    ("content_type", "is_web", "is_text"),
    [
        (b"application/grpc-web", True, False),
        (b"application/grpc-web+proto", True, False),
        (b"application/grpc-web-text", True, True),
        (b"application/grpc-web-text+proto", True, True),
        (b"application/grpc-web+json", False, False),
        (b"application/grpc", False, False),
        (b"", False, False),
    ],
)
def test_content_types(content_type: bytes, is_web: bool, is_text: bool) -> None:
    assert (grpc_web.is_grpc_web(content_type), grpc_web.is_text(content_type)) == (is_web, is_text)


@pytest.mark.parametrize(
    ("lines", "frame"),
    [
        (b"", b"\x80\0\0\0\0"),
        (b"grpc-status: 0\r\n", b"\x80\0\0\0\x0fgrpc-status:0\r\n"),
        (b"Grpc-Status:5\r\nX: Y: z\r\n", b"\x80\0\0\0\x17grpc-status:5\r\nx:Y: z\r\n"),
    ],
)
def test_trailers_as_a_frame(lines: bytes, frame: bytes) -> None:
    assert grpc_web.trailer_frame(lines) == frame


def decoded(pieces: list[bytes]) -> bytes:
    decoder = grpc_web.TextDecoder()
    return b"".join([decoder.feed(piece, False) for piece in pieces] + [decoder.feed(b"", True)])


@given(st.binary(max_size=200), PLACES)
def test_text_means_the_same_however_it_is_cut(data: bytes, places: list[int]) -> None:
    assert decoded(cut(base64.b64encode(data), places)) == data


@given(st.lists(st.binary(max_size=20)), PLACES)
def test_text_that_was_encoded_in_pieces(pieces: list[bytes], places: list[int]) -> None:
    text = b"".join(map(grpc_web.encoded, pieces))
    assert decoded(cut(text, places)) == b"".join(pieces)


@pytest.mark.parametrize(
    "text", [b"A", b"AA", b"AAA", b"AAAAA", b"A===", b"====", b"AA=A", b"AA*A", b"AA\r\n", b"=AAA"]
)
def test_what_is_no_base64_is_refused(text: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        decoded([text])
    assert refused.value.status == 400


@given(st.lists(st.binary(max_size=30)))
def test_any_bytes_are_text_or_refused(pieces: list[bytes]) -> None:
    try:
        decoded(pieces)
    except RemoteProtocolError as refused:
        assert refused.detail.startswith("grpc_base_64_decode_failed")
