"""gRPC's words in HTTP. Tables: gRPC's http-grpc-status-mapping.md, google.rpc.Code, PROTOCOL-HTTP2.md."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec import grpc
from tests.support.cuts import cut


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"application/grpc", b"application/grpc"),
        (b"application/grpc+proto", b"application/grpc+proto"),
        (b"application/grpc-web", b"application/grpc-web"),
        (b"application/grpc-web-text+proto", b"application/grpc-web-text+proto"),
        (b"application/grpc; charset=utf-8", b""),
        (b"application/grpcs", b""),
        (b"text/plain, application/grpc", b""),
        (b"application/json", b""),
    ],
)
def test_content_types(value: bytes, expected: bytes) -> None:
    assert grpc.content_type(b"\r\nhost: a\r\ncontent-type: " + value) == expected
    assert grpc.content_type(b"\r\ncontent-type: " + value + b"\r\nte: trailers") == expected


def test_another_field_makes_no_grpc() -> None:
    assert grpc.content_type(b"\r\naccept: application/grpc\r\ncontent-type: text/plain") == b""


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc-web+proto", False),
        (b"", False),
    ],
)
def test_grpc_web_is_not_grpc(content_type: bytes, expected: bool) -> None:
    assert grpc.is_grpc(content_type) is expected


@pytest.mark.parametrize(
    ("http", "code"),
    [
        (400, 13),
        (401, 16),
        (403, 7),
        (404, 12),
        (429, 14),
        (502, 14),
        (503, 14),
        (504, 14),
        (408, 2),
        (500, 2),
        (200, 2),
    ],
)
def test_http_status_as_grpc(http: int, code: int) -> None:
    assert grpc.from_http(http) == code


@pytest.mark.parametrize(
    ("code", "http"),
    [
        *(
            (0, 200),
            (1, 499),
            (2, 500),
            (3, 400),
            (4, 504),
            (5, 404),
            (6, 409),
            (7, 403),
            (8, 429),
            (9, 400),
            (10, 409),
        ),
        *((11, 400), (12, 501), (13, 500), (14, 503), (15, 500), (16, 401), (17, 500), (grpc.INVALID_CODE, 500)),
    ],
)
def test_grpc_status_as_http(code: int, http: int) -> None:
    assert grpc.to_http(code) == http


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"\r\ncontent-type: application/grpc\r\ngrpc-status: 14", 14),
        (b"\r\nGrpc-Status:0\r\nx: y", 0),
        (b"\r\nx-grpc-status: 3", None),
        (b"\r\ngrpc-status: seven", grpc.INVALID_CODE),
        (b"\r\ngrpc-status: 17", grpc.INVALID_CODE),
        (b"\r\ngrpc-status: 014", grpc.INVALID_CODE),
        (b"", None),
    ],
)
def test_status_among_fields(block: bytes, expected: int | None) -> None:
    assert grpc.status_in(block) == expected


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3600.0), (b"2M", 120.0), (b"3S", 3.0), (b"100m", 0.1), (b"50000000n", 0.05), (b"0S", 0.0)]
    + [(bad, None) for bad in (b"", b"1", b"1s", b"-1S", b"123456789S", b"1.5S", b"S")],
)
def test_timeouts(value: bytes, seconds: float | None) -> None:
    for block in (b"\r\nGrpc-Timeout: " + value, b"\r\nhost: a\r\ngrpc-timeout:" + value + b"\r\nte: trailers"):
        expected = pytest.approx(seconds) if seconds is not None else None
        assert grpc.timeout_in(block.lower(), block) == expected


def test_no_timeout() -> None:
    assert grpc.timeout_in(b"\r\nx-grpc-timeout: 1s", b"\r\nX-Grpc-Timeout: 1S") is None


def test_messages_are_percent_encoded() -> None:
    assert grpc.encoded_message("a ~ 100 %\r\nü".encode()) == b"a ~ 100 %25%0D%0A%C3%BC"


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(0, 200)))
def test_messages_are_counted_however_the_bytes_are_cut(messages: list[bytes], places: list[int]) -> None:
    stream = b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)
    counter = grpc.MessageCounter()
    for piece in cut(stream, places):
        counter.feed(piece)
    assert counter.count == len(messages)


@given(st.lists(st.binary(max_size=30)))
def test_no_bytes_break_the_counter(pieces: list[bytes]) -> None:
    counter = grpc.MessageCounter()
    for piece in pieces:
        counter.feed(piece)
    assert counter.count * 5 <= sum(map(len, pieces))
