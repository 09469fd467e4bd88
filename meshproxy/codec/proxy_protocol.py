"""The PROXY protocol's header, versions 1 and 2: whose connection this is, said before its first byte. Pure.

Decides: where the header ends and what it says, and whether it is one. Leaves to others: whether to believe it.
Stricter than the specification where it leaves a choice: datagram families on a stream are refused, and a header of
version 2 is at most MAX_V2_BYTES long (it allows 64 KiB): addresses take 232, a certificate's name, an authority and
an id as TLVs some 500. TLVs are checked for their length, CRC32c for its value, others are passed over.
Source: haproxy.org/download/2.9/doc/proxy-protocol.txt, sections 2.1 and 2.2.
"""

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, ip_address

MAX_V1_BYTES = 107
"""The longest line the specification knows, CRLF included."""
MAX_V2_BYTES = 2048

_V1 = b"PROXY "
_V2 = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_FIXED_BYTES = 16
_UNIX_PATH_BYTES = 108
_ADDRESS_BYTES = {0x11: 12, 0x21: 36, 0x31: 2 * _UNIX_PATH_BYTES}
"""By family and protocol: TCP over IPv4, over IPv6, unix stream."""
_UNSPECIFIED = 0x00
_CRC32C = 0x03

Name = tuple[str, int] | str
"""As getpeername says it: (IP address, port), or the path of a unix socket."""


class Verdict(Enum):
    NEED_MORE = "need_more"
    REFUSED = "refused"


NEED_MORE = Verdict.NEED_MORE
REFUSED = Verdict.REFUSED


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """source and destination: None where the connection speaks for itself (LOCAL, UNKNOWN, a family we do not know)."""

    length: int
    """How many bytes it took."""
    source: Name | None = None
    destination: Name | None = None


def read_header(data: bytes) -> ProxyHeader | Verdict:
    """The header at the beginning of `data`; what follows it is not looked at. Never raises."""
    if data.startswith(_V2):
        return _read_v2(data)
    if data.startswith(_V1):
        return _read_v1(data)
    return NEED_MORE if _V2.startswith(data) or _V1.startswith(data) else REFUSED


def _read_v1(data: bytes) -> ProxyHeader | Verdict:
    end = data.find(b"\n", 0, MAX_V1_BYTES)
    if end < 0:
        return NEED_MORE if len(data) < MAX_V1_BYTES else REFUSED
    if data[end - 1 : end] != b"\r":
        return REFUSED
    words = data[: end - 1].split(b" ")
    if words[1] == b"UNKNOWN":  # whatever stands behind it (section 2.1)
        return ProxyHeader(end + 1)
    if len(words) != 6:
        return REFUSED
    _, family, *ips, source_port, destination_port = words
    if family not in (b"TCP4", b"TCP6"):
        return REFUSED
    kind = IPv4Address if family == b"TCP4" else IPv6Address
    source = _v1_name(kind, ips[0], source_port)
    destination = _v1_name(kind, ips[1], destination_port)
    if source is None or destination is None:
        return REFUSED
    return ProxyHeader(end + 1, source, destination)


def _v1_name(kind: type[IPv4Address] | type[IPv6Address], ip: bytes, port: bytes) -> Name | None:
    if not port.isdigit() or len(port) > 5 or (port[:1] == b"0" and port != b"0") or int(port) > 65535 or b"%" in ip:
        return None
    try:
        return str(kind(ip.decode("ascii"))), int(port)
    except ValueError:
        return None


def _read_v2(data: bytes) -> ProxyHeader | Verdict:
    if len(data) < _V2_FIXED_BYTES:
        return NEED_MORE
    version_and_command, family = data[12], data[13]
    length = _V2_FIXED_BYTES + int.from_bytes(data[14:16], "big")
    if version_and_command not in (0x20, 0x21) or length > MAX_V2_BYTES:
        return REFUSED
    if len(data) < length:
        return NEED_MORE
    if version_and_command == 0x20:  # LOCAL: the rest is to be passed over, family included
        return ProxyHeader(length)
    if family == _UNSPECIFIED:
        return ProxyHeader(length)
    address_bytes = _ADDRESS_BYTES.get(family, MAX_V2_BYTES)
    end = _V2_FIXED_BYTES + address_bytes
    if end > length or not _are_tlvs_whole(data[:length], end):
        return REFUSED
    block = data[_V2_FIXED_BYTES:end]
    if family == 0x31:
        return ProxyHeader(length, _path(block[:_UNIX_PATH_BYTES]), _path(block[_UNIX_PATH_BYTES:]))
    size = address_bytes // 2 - 2
    source, destination = block[:size], block[size : 2 * size]
    ports = block[2 * size :]
    return ProxyHeader(
        length,
        (str(ip_address(source)), int.from_bytes(ports[:2], "big")),
        (str(ip_address(destination)), int.from_bytes(ports[2:], "big")),
    )


def _path(padded: bytes) -> str:
    """ "" for a socket without a name. An abstract name begins with NUL, written @ as in /proc/net/unix."""
    path = padded.rstrip(b"\0")
    if path[:1] == b"\0":
        path = b"@" + path[1:]
    return path.decode("utf-8", "backslashreplace")


def _are_tlvs_whole(header: bytes, at: int) -> bool:
    """Each value ends within the header, and a checksum is right."""
    while at < len(header):
        if len(header) < at + 3:
            return False
        kind = header[at]
        value = at + 3
        at = value + int.from_bytes(header[at + 1 : value], "big")
        if at > len(header):
            return False
        if kind == _CRC32C:
            if at - value != 4:
                return False
            if _crc32c(header[:value] + b"\0\0\0\0" + header[at:]) != int.from_bytes(header[value:at], "big"):
                return False
    return True


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C_TABLE = _crc32c_table()


def _crc32c(data: bytes) -> int:
    """RFC 9260 appendix A. 0.1 ms for a header of MAX_V2_BYTES."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def write_header(version: int, source: object, destination: object) -> bytes:
    """The header for a connection between these names, as getpeername and getsockname say them.

    Without two IP addresses (a unix socket, a name that is not known) it is UNKNOWN or LOCAL.
    """
    names = _ip_names(source, destination)
    if version == 1:
        if names is None:
            return b"PROXY UNKNOWN\r\n"
        (ip, port), (own_ip, own_port) = names
        return b"PROXY TCP%d %b %b %d %d\r\n" % (ip.version, str(ip).encode(), str(own_ip).encode(), port, own_port)
    if names is None:
        return _V2 + b"\x20\x00\x00\x00"
    (ip, port), (own_ip, own_port) = names
    block = ip.packed + own_ip.packed + port.to_bytes(2, "big") + own_port.to_bytes(2, "big")
    return _V2 + (b"\x21\x11" if ip.version == 4 else b"\x21\x21") + len(block).to_bytes(2, "big") + block


_IpName = tuple[IPv4Address | IPv6Address, int]


def _ip_names(source: object, destination: object) -> tuple[_IpName, _IpName] | None:
    """Both of one family: a header has one for the two of them."""
    if not (isinstance(source, tuple) and isinstance(destination, tuple)):
        return None
    try:
        ip, own_ip = _ip(source[0]), _ip(destination[0])
    except ValueError:
        return None
    if ip.version != own_ip.version:
        ip, own_ip = _as_v6(ip), _as_v6(own_ip)
    return (ip, source[1]), (own_ip, destination[1])


def _ip(written: str) -> IPv4Address | IPv6Address:
    """An IPv4 client of a socket that listens on :: is an IPv4 client; a zone means nothing on another host."""
    ip = ip_address(written.partition("%")[0])
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def _as_v6(ip: IPv4Address | IPv6Address) -> IPv6Address:
    return ip if isinstance(ip, IPv6Address) else IPv6Address(b"\0" * 10 + b"\xff\xff" + ip.packed)
