"""grpc.health.v1's messages; expected bytes as protobuf's encoding rules give them by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.codec import grpc_health


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ("", b"\0\0\0\0\0"),
        ("a.B", b"\0\0\0\0\x05\x0a\x03a.B"),
        ("x" * 200, b"\0\0\0\0\xcb\x0a\xc8\x01" + b"x" * 200),
    ],
)
def test_requests(service: str, message: bytes) -> None:
    assert grpc_health.request(service) == message


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"\x08\x01", True),
        (b"\x08\x02", False),  # NOT_SERVING
        (b"", False),  # UNKNOWN
        (b"\x08\x02\x08\x01", True),  # the last one counts
        (b"\x12\x03abc\x08\x01", True),  # a field of a later version
        (b"\x19" + b"\0" * 8 + b"\x25" + b"\0" * 4 + b"\x08\x01", True),
        (b"\x08\x81\x00", True),  # a varint may be longer than it must
        (b"\x10\x01", False),  # another field
        (b"\x08", False),
        (b"\x12\x05ab", False),
        (b"\x0b", False),  # groups
        (b"\xff" * 12, False),
    ],
)
def test_answers(message: bytes, expected: bool) -> None:
    assert grpc_health.is_serving(b"\0" + len(message).to_bytes(4, "big") + message) is expected


@pytest.mark.parametrize(
    "body", [b"", b"\0\0\0\0", b"\0\0\0\0\x03\x08\x01", b"\1\0\0\0\x02\x08\x01", b"\0\0\0\0\x02\x08\x01\0\0\0\0\0"]
)
def test_what_is_not_one_plain_message_is_no_answer(body: bytes) -> None:
    assert not grpc_health.is_serving(body)


@given(st.binary(max_size=60))
def test_any_bytes_are_answered_or_not(message: bytes) -> None:
    assert grpc_health.is_serving(b"\0" + len(message).to_bytes(4, "big") + message) in (True, False)
