"""What gRPC says in HTTP: content types, statuses, timeouts, percent-encoded messages, the framing of messages. Pure.

Source: gRPC over HTTP/2 (PROTOCOL-HTTP2.md), gRPC's HTTP status mapping (http-grpc-status-mapping.md); Envoy
Grpc::Common and Grpc::Utility for what a proxy makes of them.
"""

import re
from typing import Final

OK: Final = 0
UNKNOWN: Final = 2
DEADLINE_EXCEEDED: Final = 4
UNIMPLEMENTED: Final = 12
INTERNAL: Final = 13
UNAVAILABLE: Final = 14
UNAUTHENTICATED: Final = 16
INVALID_CODE: Final = -1
"""Envoy's name for a grpc-status that is none."""

CONTENT_TYPE: Final = b"application/grpc"
_CONTENT_TYPE = re.compile(rb"\r\ncontent-type:[\t ]*(application/grpc(?:[+-][a-z0-9.+-]*)?)[\t ]*(?:\r|\Z)")
_STATUS_FIELD = re.compile(rb"(?i)\r\ngrpc-status:[\t ]*([^\r]*)")
_TIMEOUT = re.compile(rb"\r\n[^:]*:[\t ]*([0-9]{1,8})([HMSmun])[\t ]*(?:\r|\Z)")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_TO_ENCODE = re.compile(rb"[^\x20-\x24\x26-\x7e]")

_FROM_HTTP = {400: INTERNAL, 401: UNAUTHENTICATED, 403: 7, 404: UNIMPLEMENTED}
_FROM_HTTP |= dict.fromkeys((429, 502, 503, 504), UNAVAILABLE)
# By google.rpc.Code, 0 to 16.
_TO_HTTP = (200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401)
_STATUSES = {b"%d" % code: code for code in range(len(_TO_HTTP))}


def content_type(lowered: bytes) -> bytes:
    """`application/grpc`, `application/grpc+proto`, `application/grpc-web-text`, … from a block of lower-case field
    lines, each preceded by CRLF; b"" where the content is no gRPC."""
    if b"application/grpc" not in lowered:
        return b""
    found = _CONTENT_TYPE.search(lowered)
    return found[1] if found is not None else b""


def is_grpc(content_type: bytes) -> bool:
    """Whether it is gRPC itself, so that the HTTP/2 rules hold; gRPC-Web is not."""
    return content_type == CONTENT_TYPE or content_type.startswith(b"application/grpc+")


def status_in(block: bytes) -> int | None:
    """grpc-status among field lines, each preceded by CRLF; None without one, INVALID_CODE for one that is none."""
    found = _STATUS_FIELD.search(block)
    return None if found is None else _STATUSES.get(found[1].rstrip(b" \t"), INVALID_CODE)


def from_http(status: int) -> int:
    """The grpc-status that an HTTP status means where nobody said another."""
    return _FROM_HTTP.get(status, UNKNOWN)


def to_http(code: int) -> int:
    """The HTTP status that says as much as a grpc-status: what outlier detection counts."""
    return _TO_HTTP[code] if 0 <= code < len(_TO_HTTP) else 500


def timeout_in(lowered: bytes, block: bytes) -> float | None:
    """Seconds that grpc-timeout gives (`100m`) among field lines; None without one, or where it is malformed.
    lowered: the same lines in lower case, where names are looked for; units have a case (`M` minutes, `m` milli)."""
    at = lowered.find(b"\r\ngrpc-timeout:")
    found = _TIMEOUT.match(block, at) if at >= 0 else None
    return int(found[1]) * _UNITS_S[found[2]] if found is not None else None


def encoded_message(message: bytes) -> bytes:
    """A text as grpc-message carries it."""
    return _TO_ENCODE.sub(lambda found: b"%%%02X" % found[0][0], message)


class MessageCounter:
    """Counts messages by their length prefixes as bytes go by, however they are cut."""

    __slots__ = ("_left", "_prefix", "count")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Another stream."""
        self.count = 0
        """Messages that have begun: their prefix is complete."""
        self._left = 0
        self._prefix = b""

    def feed(self, data: bytes) -> None:
        left = self._left
        size = len(data)
        if left >= size:
            self._left = left - size
            return
        at = left
        if self._prefix:
            need = 5 - len(self._prefix)
            self._prefix += data[at : at + need]
            if len(self._prefix) < 5:
                return
            self.count += 1
            at += need + int.from_bytes(self._prefix[1:], "big")
            self._prefix = b""
        while at + 5 <= size:
            self.count += 1
            at += 5 + int.from_bytes(data[at + 1 : at + 5], "big")
        if at < size:
            self._prefix = data[at:]
            self._left = 0
        else:
            self._left = at - size
