import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshproxy.codec.proxy_protocol import (
    MAX_V1_BYTES,
    MAX_V2_BYTES,
    NEED_MORE,
    REFUSED,
    ProxyHeader,
    read_header,
    write_header,
)

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
SOURCE4, OWN4 = ("192.0.2.7", 56324), ("198.51.100.1", 443)
SOURCE6, OWN6 = ("2001:db8::7", 56324), ("2001:db8::1", 443)
BLOCK4 = bytes([192, 0, 2, 7, 198, 51, 100, 1]) + (56324).to_bytes(2, "big") + (443).to_bytes(2, "big")

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"


def v2(block: bytes, *, command: int = 0x21, family: int = 0x11) -> bytes:
    return SIGNATURE + bytes([command, family]) + len(block).to_bytes(2, "big") + block


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def test_a_line_of_version_1_names_both_ends() -> None:
    assert read_header(V1 + b"GET /") == ProxyHeader(len(V1), SOURCE4, OWN4)
    line = b"PROXY TCP6 2001:db8::7 2001:db8::1 56324 443\r\n"
    assert read_header(line) == ProxyHeader(len(line), SOURCE6, OWN6)


def test_an_unknown_connection_speaks_for_itself_whatever_stands_behind_the_word() -> None:
    assert read_header(b"PROXY UNKNOWN\r\n") == ProxyHeader(15)
    line = b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n"
    assert read_header(line + b"x") == ProxyHeader(len(line))


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01",
        b"PROXY\r\n",
        b"PROXY \r\n",
        b"PROXY UNKNOWNS\r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP5 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443 \r\n",
        b"PROXY TCP4  192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 65536\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 056 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 +56 443\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 \xb2 443\r\n",
        b"PROXY TCP4 192.0.2.07 198.51.100.1 56324 443\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::1 56324 443\r\n",
        b"PROXY TCP6 192.0.2.7 198.51.100.1 56324 443\r\n",
        b"PROXY TCP6 fe80::1%eth0 2001:db8::1 56324 443\r\n",
        b"PROXY TCP4 192.0.2.\xff 198.51.100.1 56324 443\r\n",
        b"PROXY " + b"x" * MAX_V1_BYTES,
    ],
)
def test_what_is_not_quite_a_line_of_version_1_is_refused(line: bytes) -> None:
    assert read_header(line) is REFUSED


def test_a_line_of_version_1_may_have_107_bytes_and_no_more() -> None:
    line = b"PROXY UNKNOWN ".ljust(MAX_V1_BYTES - 2, b"x") + b"\r\n"
    assert read_header(line) == ProxyHeader(MAX_V1_BYTES)
    assert read_header(line[:-1]) is NEED_MORE
    assert read_header(line[:-2] + b"x\r\n") is REFUSED


def test_a_header_of_version_2_names_both_ends_and_its_tlvs_are_passed_over() -> None:
    header = v2(BLOCK4 + tlv(0x02, b"a.example") + tlv(0xEA, b"") + tlv(0x04, b"\0" * 40))
    assert read_header(header + b"GET /") == ProxyHeader(len(header), SOURCE4, OWN4)


def test_a_unix_socket_has_paths() -> None:
    block = b"/run/a.sock".ljust(108, b"\0") + b"\0abstract".ljust(108, b"\0")
    assert read_header(v2(block, family=0x31)) == ProxyHeader(16 + 216, "/run/a.sock", "@abstract")


@pytest.mark.parametrize(
    "header",
    [v2(b"", command=0x20, family=0), v2(b"\xff" * 30, command=0x20, family=0xFF), v2(b"\x01\x02", family=0)],
)
def test_a_local_or_unspecified_connection_speaks_for_itself(header: bytes) -> None:
    assert read_header(header) == ProxyHeader(len(header))


@pytest.mark.parametrize(
    "header",
    [
        v2(BLOCK4, command=0x11),
        v2(BLOCK4, command=0x22),
        v2(BLOCK4, family=0x12),  # datagrams
        v2(BLOCK4, family=0x41),
        v2(BLOCK4[:-1]),
        v2(BLOCK4, family=0x21),
        v2(BLOCK4 + b"\x04"),
        v2(BLOCK4 + b"\x04\x00\x02x"),
        v2(BLOCK4 + tlv(0x03, b"\0\0\0\0")),  # a checksum that is not
        v2(BLOCK4 + tlv(0x03, b"\0\0\0")),
        v2(BLOCK4 + tlv(0x04, b"\0" * MAX_V2_BYTES)),
        b"\r\n\r\n\x00\r\nQUIT\r",
    ],
)
def test_what_is_not_quite_a_header_of_version_2_is_refused(header: bytes) -> None:
    assert read_header(header) is REFUSED


def test_a_header_too_long_is_refused_before_it_has_come() -> None:
    assert read_header(SIGNATURE + b"\x21\x11\x07\xf1") is REFUSED
    assert read_header(SIGNATURE + b"\x21\x11\x07\xf0") is NEED_MORE


def test_a_right_checksum_is_taken() -> None:
    assert _crc32c_bit_by_bit(b"123456789") == bytes.fromhex("e3069283")
    header = v2(BLOCK4 + tlv(0x03, bytes(4)))
    crc = _crc32c_bit_by_bit(header)
    assert read_header(header[:-4] + crc) == ProxyHeader(len(header), SOURCE4, OWN4)


def _crc32c_bit_by_bit(data: bytes) -> bytes:
    """Another way to the same number: the unreflected polynomial over reflected bits."""
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            carry = (crc >> 31) ^ (byte >> bit & 1)
            crc = (crc << 1 & 0xFFFFFFFF) ^ (0x1EDC6F41 if carry else 0)
    return int(f"{crc ^ 0xFFFFFFFF:032b}"[::-1], 2).to_bytes(4, "big")


ports = st.integers(0, 65535)
names4 = st.tuples(st.ip_addresses(v=4).map(str), ports)
names6 = st.tuples(st.ip_addresses(v=6).filter(lambda ip: getattr(ip, "ipv4_mapped", None) is None).map(str), ports)
versions = st.sampled_from([1, 2])


@given(versions, st.one_of(st.tuples(names4, names4), st.tuples(names6, names6)), st.binary(max_size=8))
def test_what_is_written_is_read(version: int, ends: tuple[tuple[str, int], tuple[str, int]], rest: bytes) -> None:
    header = write_header(version, *ends)
    assert read_header(header + rest) == ProxyHeader(len(header), *ends)


@given(versions, names4, names6)
def test_ends_of_two_families_are_both_written_as_ipv6(
    version: int, four: tuple[str, int], six: tuple[str, int]
) -> None:
    header = read_header(write_header(version, four, six))
    assert isinstance(header, ProxyHeader)
    assert header.destination == six
    assert header.source is not None
    assert ":" in header.source[0]


@pytest.mark.parametrize(("version", "header"), [(1, b"PROXY UNKNOWN\r\n"), (2, SIGNATURE + b"\x20\0\0\0")])
@pytest.mark.parametrize("source", ["", "/run/a.sock", None, ("not an address", 1)])
def test_a_connection_without_ip_addresses_is_written_as_its_own(version: int, header: bytes, source: object) -> None:
    assert write_header(version, source, OWN4) == header


def test_an_ipv4_client_of_a_socket_for_both_families_is_written_as_ipv4() -> None:
    source, own = ("::ffff:192.0.2.7", 56324, 0, 0), ("::ffff:198.51.100.1", 443, 0, 0)
    assert write_header(1, source, own) == V1
    assert write_header(1, ("fe80::1%eth0", 1, 0, 2), ("fe80::2", 2, 0, 0)) == b"PROXY TCP6 fe80::1 fe80::2 1 2\r\n"


headers = st.one_of(
    st.sampled_from([V1, b"PROXY UNKNOWN\r\n", v2(BLOCK4), v2(b"", command=0x20), v2(BLOCK4 + tlv(4, b"abc"))]),
    st.binary(max_size=60).map(lambda junk: b"PROXY TCP4 " + junk),
    st.binary(max_size=300).map(lambda junk: SIGNATURE + b"\x21" + junk),
    st.builds(v2, st.binary(max_size=300), command=st.sampled_from([0x20, 0x21]), family=st.integers(0, 255)),
    st.binary(max_size=300),
)


@given(headers, st.data())
@example(b"", None)
def test_a_beginning_needs_more_or_says_what_the_whole_says(whole: bytes, data: st.DataObject | None) -> None:
    found = read_header(whole)
    for at in range(min(len(whole), 130)) if data is None else [data.draw(st.integers(0, len(whole)))]:
        beginning = read_header(whole[:at])
        assert beginning is NEED_MORE or beginning == found
    if isinstance(found, ProxyHeader):
        assert 0 < found.length <= min(len(whole), MAX_V2_BYTES)
        assert read_header(whole[: found.length]) == found
        assert read_header(whole[: found.length - 1]) is NEED_MORE
