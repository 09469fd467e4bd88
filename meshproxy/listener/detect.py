"""What the first bytes of a connection are: TLS, HTTP/1, HTTP/2 or none of them. Pure.

Source: TLS record layer (RFC 8446 §5.1), HTTP/2 preface (RFC 9113 §3.4), Envoy tls_inspector and http_inspector.
"""

from enum import Enum

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_METHODS = tuple(
    method + b" "
    for method in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH")
)
LONGEST_NEEDED_BYTES = len(_PREFACE)


class First(Enum):
    TLS = "tls"
    HTTP1 = "http1"
    HTTP2 = "http2"
    OPAQUE = "opaque"
    NEED_MORE = "need_more"


def is_tls(first: bytes) -> bool | None:
    """True for the start of a TLS handshake record, False for anything else, None while it cannot be told."""
    if not first:
        return None
    if first[0] != 0x16:
        return False
    if len(first) < 3:
        return None if first[1:] in (b"", b"\x03") else False
    return first[1] == 3 and first[2] <= 4


def detect(first: bytes) -> First:
    """The protocol that `first` begins. Unknown methods are opaque, as Envoy's inspector has it."""
    tls = is_tls(first)
    if tls:
        return First.TLS
    if tls is None:
        return First.NEED_MORE
    if first.startswith(_PREFACE):
        return First.HTTP2
    if first.startswith(_METHODS):
        return First.HTTP1
    if _PREFACE.startswith(first) or any(method.startswith(first) for method in _METHODS):
        return First.NEED_MORE
    return First.OPAQUE
