"""What the first bytes of a connection are told to be, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.listener.detect import LONGEST_NEEDED_BYTES, First, detect, is_tls

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"]
STARTS = [b"\x16\x03\x01\x02\x00\x01", PREFACE, *[method + b" / HTTP/1.1\r\n" for method in METHODS]]
BEGINNINGS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda start, cut, rest: start[:cut] + rest, st.sampled_from(STARTS), st.integers(0, 26), st.binary(max_size=4)
    ),
)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (b"", First.NEED_MORE),
        (b"\x16", First.NEED_MORE),
        (b"\x16\x03", First.NEED_MORE),
        (b"\x16\x03\x00", First.TLS),
        (b"\x16\x03\x01", First.TLS),
        (b"\x16\x03\x03\x00\xff", First.TLS),
        (b"\x16\x03\x04", First.TLS),
        (b"\x16\x03\x05", First.OPAQUE),
        (b"\x16\x02", First.OPAQUE),
        (b"\x16\x02\x01", First.OPAQUE),
        (b"\x15\x03\x01", First.OPAQUE),
        (b"\x80\x2e\x01", First.OPAQUE),
        (PREFACE, First.HTTP2),
        (PREFACE + b"\x00\x00\x00\x04", First.HTTP2),
        (PREFACE[:23], First.NEED_MORE),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", First.OPAQUE),
        (b"PRI * HTTP/1.1\r\n", First.OPAQUE),
        (b"P", First.NEED_MORE),
        (b"PR", First.NEED_MORE),
        (b"PA", First.NEED_MORE),
        (b"PATH", First.OPAQUE),
        (b"GET", First.NEED_MORE),
        (b"GET ", First.HTTP1),
        (b"GETS", First.OPAQUE),
        (b"GET\t/", First.OPAQUE),
        (b"get / HTTP/1.1", First.OPAQUE),
        (b" GET / HTTP/1.1", First.OPAQUE),
        (b"BREW / HTTP/1.1", First.OPAQUE),
        (b"SSH-2.0-OpenSSH_9.2\r\n", First.OPAQUE),
        (b"\x05\x01\x00", First.OPAQUE),
        (b"*1\r\n$4\r\nPING\r\n", First.OPAQUE),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", First.OPAQUE),
        (b"\x00", First.OPAQUE),
        (b"\xff" * 64, First.OPAQUE),
    ],
)
def test_first_bytes(first: bytes, expected: First) -> None:
    assert detect(first) is expected


@pytest.mark.parametrize("method", METHODS)
def test_a_known_method_and_a_space_is_http1(method: bytes) -> None:
    line = method + b" /x HTTP/1.1\r\n"
    for length in range(len(method) + 1):
        assert detect(line[:length]) is First.NEED_MORE
    for length in range(len(method) + 1, len(line)):
        assert detect(line[:length]) is First.HTTP1


@pytest.mark.parametrize(
    ("first", "expected"),
    [(b"", None), (b"\x16", None), (b"\x16\x03", None), (b"\x16\x03\x01", True), (b"\x16\x04", False), (b"G", False)],
)
def test_tls_or_not_needs_three_bytes_at_most(first: bytes, expected: bool | None) -> None:
    assert is_tls(first) is expected


@given(first=BEGINNINGS, more=st.binary(max_size=30))
def test_what_was_told_stays_true_as_more_arrives(first: bytes, more: bytes) -> None:
    told = detect(first)
    if told is not First.NEED_MORE:
        assert detect(first + more) is told


@given(first=BEGINNINGS)
def test_more_is_asked_for_only_while_something_could_still_come_of_it(first: bytes) -> None:
    could_become = [start for start in STARTS if start.startswith(first)]
    if detect(first) is First.NEED_MORE:
        assert len(first) < LONGEST_NEEDED_BYTES
        assert could_become
    elif detect(first) is First.OPAQUE:
        assert not could_become
