import ssl
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.tls.client_hello import (
    LIMIT_BYTES,
    NEED_MORE,
    NOT_TLS,
    ClientHello,
    ClientHelloReader,
    parse_client_hello,
)
from tests.support.handshakes import client_hello, in_records_of


@cache
def hello(
    server_name: str | None = "Outbound_.80_._.edge.default.svc", alpn: tuple[str, ...] = ("istio", "h2")
) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return client_hello(context, server_name)


WANTED = ClientHello("outbound_.80_._.edge.default.svc", ("istio", "h2"))


def test_a_real_hello_gives_name_in_lower_case_and_protocols_in_order() -> None:
    assert parse_client_hello(hello()) == WANTED


def test_a_hello_without_extensions_of_ours_asks_for_nothing() -> None:
    assert parse_client_hello(hello(None, ())) == ClientHello(None, ())


@pytest.mark.parametrize(
    ("alpn", "is_mesh"),
    [
        (("istio", "h2"), True),
        (("istio-peer-exchange",), True),
        (("istio-http/1.1", "http/1.1"), True),
        (("h2", "http/1.1"), False),
        (("ISTIO",), False),
        ((), False),
    ],
)
def test_mesh_mtls_is_told_by_its_protocols(alpn: tuple[str, ...], is_mesh: bool) -> None:
    parsed = parse_client_hello(hello("a", alpn))
    assert isinstance(parsed, ClientHello)
    assert parsed.is_mesh is is_mesh


def test_every_proper_prefix_needs_more() -> None:
    data = hello()
    assert {parse_client_hello(data[:size]) for size in range(len(data))} == {NEED_MORE}


@given(st.lists(st.integers(1, 80), min_size=1), st.integers(1, 400))
def test_any_split_and_any_record_size_give_the_same_answer(sizes: list[int], record: int) -> None:
    data = in_records_of(record, hello())
    reader = ClientHelloReader()
    at, turn = 0, 0
    while at < len(data):
        assert reader.feed(b"") is NEED_MORE
        size = sizes[turn % len(sizes)]
        answer = reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert answer == WANTED


def test_the_answer_stays_when_more_follows() -> None:
    reader = ClientHelloReader()
    assert reader.feed(hello() + b"early data") == WANTED
    assert reader.feed(b"\x00 anything") == WANTED


def test_a_hello_of_more_than_a_record_is_read() -> None:
    many = tuple(f"{number:0200}" for number in range(150))
    data = hello("a.example", many)
    assert len(data) > 16 * 1024
    parsed = parse_client_hello(data)
    assert isinstance(parsed, ClientHello)
    assert parsed.server_name == "a.example"
    assert parsed.alpn == many


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x00",
        b"\x16\x02",
        b"\x16\x03\x05",
        b"\x16\x03\x01\x00\x00",  # an empty record
        b"\x16\x03\x01\xff\xff",  # longer than a record may be
        b"\x16\x03\x01\x00\x05\x02",  # not a ClientHello
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\x00",  # a message of 16 MiB
        b"\x15\x03\x01\x00\x02\x02\x28",  # an alert
        b"\x80\x2e\x01\x03\x01",  # SSL 2
    ],
)
def test_what_is_not_a_client_hello_is_told_at_once(data: bytes) -> None:
    assert parse_client_hello(data) is NOT_TLS


def test_another_record_kind_in_the_middle_is_not_tls() -> None:
    data = in_records_of(50, hello())
    assert parse_client_hello(data[:55] + b"\x17" + data[56:]) is NOT_TLS


def test_a_hello_that_never_ends_is_given_up_at_the_limit() -> None:
    start = b"\x16\x03\x01\x00\x04\x01\x00\xff\xf0"
    reader = ClientHelloReader()
    answers = [reader.feed(start)]
    while answers[-1] is NEED_MORE:
        answers.append(reader.feed(b"\x16\x03\x01\x00\x01\x00"))
    assert answers[-1] is NOT_TLS
    assert reader.seen_bytes <= LIMIT_BYTES + 6


def test_a_hello_of_thousands_of_records_is_given_up() -> None:
    data = hello("a.example", tuple(f"{number:0200}" for number in range(20)))
    assert isinstance(parse_client_hello(in_records_of(5, data)), ClientHello)
    assert parse_client_hello(in_records_of(1, data)) is NOT_TLS


@pytest.mark.parametrize("name", [b"a\x00b", b"a b", b"\xc3\xa9", b"a\r\nb"])
def test_a_name_that_cannot_be_one_is_no_name(name: bytes) -> None:
    data = hello("x" * len(name), ())
    parsed = parse_client_hello(data.replace(b"x" * len(name), name))
    assert isinstance(parsed, ClientHello)
    assert parsed.server_name is None


@pytest.mark.parametrize("name", ["10.0.0.1", "EXAMPLE.com"])
def test_addresses_and_upper_case_come_through_as_names(name: str) -> None:
    parsed = parse_client_hello(hello("y" * len(name), ()).replace(b"y" * len(name), name.encode()))
    assert parsed == ClientHello(name.lower(), ())


@given(st.binary(max_size=300))
def test_junk_never_raises(junk: bytes) -> None:
    parse_client_hello(junk)
    parse_client_hello(b"\x16\x03\x01\x00\xf0\x01\x00\x00\xec" + junk)


@given(st.integers(5, 200), st.binary(min_size=1, max_size=6))
def test_a_damaged_hello_never_raises(at: int, damage: bytes) -> None:
    data = hello()
    parse_client_hello(data[:at] + damage + data[at + len(damage) :])
