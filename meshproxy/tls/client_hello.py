"""What a TLS ClientHello asks for: server name and application protocols, from a connection's first bytes. Pure.

Decides: is it TLS, and what does it want. Leaves to others: the handshake (every byte is still there for it).
Bounded: a hello of more than LIMIT_BYTES, or of a thousand records, is not TLS to us. Bytes may come in any split.
Source: RFC 8446 §4.1.2 and §5.1, RFC 6066 §3 (server_name), RFC 7301 §3.1 (ALPN).
"""

from dataclasses import dataclass
from enum import Enum

LIMIT_BYTES = 64 * 1024
MESH_ALPN = frozenset({"istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"})
"""What tells mesh mTLS from an application's own TLS on an inbound port (Istio)."""

_MAX_RECORDS = 1024
"""A hello has one or two. Whoever parses again at each arrival (a peek) pays for all of them each time."""
_MAX_RECORD_BYTES = 16 * 1024 + 256
_HANDSHAKE, _CLIENT_HELLO = 0x16, 0x01
_SERVER_NAME, _ALPN = 0, 16


class Verdict(Enum):
    NEED_MORE = "need_more"
    NOT_TLS = "not_tls"


NEED_MORE = Verdict.NEED_MORE
NOT_TLS = Verdict.NOT_TLS


@dataclass(frozen=True, slots=True)
class ClientHello:
    """server_name: lower case; None when absent or not a printable ASCII name. alpn: as offered, in order."""

    server_name: str | None = None
    alpn: tuple[str, ...] = ()

    @property
    def is_mesh(self) -> bool:
        """The other side is a mesh proxy, not an application with TLS of its own."""
        return not MESH_ALPN.isdisjoint(self.alpn)


class ClientHelloReader:
    """Reads a hello as it arrives; each byte is looked at once, however small the pieces are."""

    __slots__ = ("_header", "_message", "_record_left", "_records", "_result", "seen_bytes")

    def __init__(self) -> None:
        self.seen_bytes = 0
        """How much was fed; where a caller peeks, what it has yet to feed begins here."""
        self._header = b""
        self._record_left = 0
        self._records = 0
        self._message = bytearray()
        self._result: ClientHello | Verdict = NEED_MORE

    def feed(self, data: bytes) -> ClientHello | Verdict:
        """The answer so far; once it is not NEED_MORE it stays."""
        if self._result is NEED_MORE and data:
            self.seen_bytes += len(data)
            self._result = self._advance(data)
            if self._result is NEED_MORE and self.seen_bytes >= LIMIT_BYTES:
                self._result = NOT_TLS
        return self._result

    def _advance(self, data: bytes) -> ClientHello | Verdict:
        at = 0
        while at < len(data):
            if self._record_left == 0:
                take = 5 - len(self._header)
                self._header += data[at : at + take]
                at += take
                if not _may_be_record(self._header) or self._records >= _MAX_RECORDS:
                    return NOT_TLS
                if len(self._header) < 5:
                    return NEED_MORE
                self._record_left = int.from_bytes(self._header[3:], "big")
                self._header = b""
                self._records += 1
                continue
            piece = data[at : at + self._record_left]
            at += len(piece)
            self._record_left -= len(piece)
            self._message += piece
            message = self._message
            if message[0] != _CLIENT_HELLO:
                return NOT_TLS
            if len(message) >= 4:
                end = 4 + int.from_bytes(message[1:4], "big")
                if end > LIMIT_BYTES:
                    return NOT_TLS
                if len(message) >= end:
                    try:
                        return _client_hello(bytes(message[4:end]))
                    except ValueError:
                        return NOT_TLS
        return NEED_MORE


def parse_client_hello(data: bytes) -> ClientHello | Verdict:
    """The answer for bytes that are there already, from a connection's first one on."""
    return ClientHelloReader().feed(data)


def _may_be_record(header: bytes) -> bool:
    """The record header so far: handshake, version 3.0 to 3.4, not empty and not over the limit."""
    if header[0] != _HANDSHAKE or header[1:2] not in (b"", b"\x03") or header[2:3] > b"\x04":
        return False
    return len(header) < 5 or 0 < int.from_bytes(header[3:], "big") <= _MAX_RECORD_BYTES


def _client_hello(body: bytes) -> ClientHello:
    """ValueError where a length does not fit."""
    at = 2 + 32  # legacy_version, random
    _, at = _vector(body, at, 1)  # legacy_session_id
    _, at = _vector(body, at, 2)  # cipher_suites
    _, at = _vector(body, at, 1)  # legacy_compression_methods
    if at == len(body):
        return ClientHello()
    extensions, at = _vector(body, at, 2)
    if at != len(body):
        raise ValueError("bytes after the extensions")
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    at = 0
    while at < len(extensions):
        kind = int.from_bytes(extensions[at : at + 2], "big")
        content, at = _vector(extensions, at + 2, 2)
        if kind == _SERVER_NAME:
            server_name = _server_name(content)
        elif kind == _ALPN:
            alpn = _protocols(content)
    return ClientHello(server_name, alpn)


def _server_name(content: bytes) -> str | None:
    names, end = _vector(content, 0, 2)
    if end != len(content):
        raise ValueError("bytes after the names")
    at = 0
    while at < len(names):
        kind = names[at]
        name, at = _vector(names, at + 1, 2)
        if kind == 0:
            is_printable = bool(name) and all(0x21 <= byte <= 0x7E for byte in name)
            return name.decode("ascii").lower() if is_printable else None
    return None


def _protocols(content: bytes) -> tuple[str, ...]:
    names, end = _vector(content, 0, 2)
    if end != len(content):
        raise ValueError("bytes after the protocols")
    protocols = []
    at = 0
    while at < len(names):
        name, at = _vector(names, at, 1)
        protocols.append(name.decode("latin-1"))
    return tuple(protocols)


def _vector(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    """A vector with a length of `size` bytes at `at`, and where it ends."""
    start = at + size
    end = start + int.from_bytes(data[at:start], "big")
    if start > len(data) or end > len(data):
        raise ValueError("a vector runs over its parent")
    return data[start:end], end
