"""HTTP/2 field lists ↔ the heads that the rest of the proxy knows (codec.http1.RequestHead, ResponseHead).

Decides: is this list well formed, and does it mean the same to an HTTP/1.1 hop (RFC 9113 §8; the downgrade attacks on
it). Leaves to others: compression and frames (codec.http2), routing (route).

A list becomes one block, is checked against one grammar, and is a block of field lines from then on: what an HTTP/1.1
connection is given cannot hold what the grammar does not spell.
"""

import re
from base64 import b64encode
from copy import copy
from hashlib import sha1
from http import HTTPStatus
from typing import Final

from meshproxy.codec.chunked import allowed_trailers
from meshproxy.codec.grpc import content_type
from meshproxy.codec.http1 import (
    CHUNKED,
    MAX_HEADERS,
    NO_BODY,
    UNSAID,
    RequestHead,
    ResponseHead,
    checked_host,
    fields,
    find_field,
)
from meshproxy.codec.http2 import PROTOCOL_ERROR, StreamError
from meshproxy.errors import RemoteProtocolError

Fields = list[tuple[bytes, bytes, bool]]
"""(name, value, never to be indexed)."""

_WEBSOCKET_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
_TOKEN = rb"[!#$%&'*+.^_`|~0-9a-z-]+"
# Names are lower case; values do not begin or end with white space (RFC 9113 §8.2.1). Both are joined by a NUL
# here, which neither may hold, so that a colon or a line break within one cannot pass for a boundary.
_BLOCK = re.compile(
    rb"(?:\r\n" + _TOKEN + rb"\x00(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)*"
)
_REQUEST_SPECIAL = re.compile(
    rb"\r\n(host|connection|content-length|transfer-encoding|te|upgrade|expect|keep-alive|proxy-connection|cookie"
    rb"|http2-settings|x-request-id|x-forwarded-proto|x-forwarded-client-cert|x-envoy-[^\x00]*)\x00([^\r]*)"
)
_REQUEST_DROP = re.compile(
    rb"\r\n(?:host|te|cookie|x-forwarded-proto|x-forwarded-client-cert|x-envoy-[^\x00]*)\x00[^\r]*"
)
_RESPONSE_SPECIAL = re.compile(
    rb"\r\n(connection|content-length|transfer-encoding|upgrade|keep-alive|proxy-connection"
    rb"|x-envoy-upstream-service-time|x-envoy-decorator-operation)\x00([^\r]*)"
)
_RESPONSE_DROP = re.compile(rb"\r\n(?:x-envoy-upstream-service-time|x-envoy-decorator-operation)\x00[^\r]*")
_OF_A_CONNECTION: Final = frozenset(
    {b"connection", b"transfer-encoding", b"upgrade", b"keep-alive", b"proxy-connection", b"http2-settings"}
)
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PATH = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_STATUS = re.compile(rb"[1-5][0-9][0-9]")
_PROTOCOL = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


def _malformed(word: str) -> StreamError:
    return StreamError(PROTOCOL_ERROR, word)


def _lines(regular: Fields) -> bytes:
    """The fields as lines, each preceded by CRLF, with NUL between name and value."""
    if len(regular) > MAX_HEADERS and sum(name != b"cookie" for name, _, _ in regular) > MAX_HEADERS:
        # A cookie for each of a browser's 180 is one field in the end (RFC 9113 §8.2.3).
        raise RemoteProtocolError("http2.headers_too_large", 431)
    lines = b"".join([b"\r\n%b\x00%b" % (name, value) for name, value, _ in regular])
    if _BLOCK.fullmatch(lines) is None or lines.count(b"\n") != len(regular):
        raise _malformed("invalid_field")
    return lines


def request_head(received: Fields, is_end: bool) -> RequestHead:
    """The head of a request; is_end: no body follows.

    StreamError for a malformed one (RFC 9113 §8.1.1), RemoteProtocolError (with a status) for one that is refused.
    A body of unknown length is CHUNKED, whatever the next hop makes of it. `upgrade` is what :protocol asked for.
    """
    method = path = scheme = authority = protocol = None
    at = 0
    for name, value, _ in received:
        if name[:1] != b":":
            break
        at += 1
        if name == b":method" and method is None:
            method = value
        elif name == b":path" and path is None:
            path = value
        elif name == b":scheme" and scheme is None:
            scheme = value
        elif name == b":authority" and authority is None:
            authority = value
        elif name == b":protocol" and protocol is None:
            protocol = value
        else:
            raise _malformed("bad_pseudo_field")
    if method is None or _METHOD.fullmatch(method) is None:
        raise _malformed("bad_method")
    lines = _lines(received[at:])
    head = RequestHead()
    head.minor = 1
    head.keeps_alive = head.is_plain = True
    head.has_request_id = head.expects_continue = head.te_trailers = False
    head.upgrade = head.forwarded_proto = head.xfcc = b""
    head.body = NO_BODY if is_end else CHUNKED
    special = _REQUEST_SPECIAL.findall(lines)
    host = None
    if special:
        host = _special(head, special, is_end)
        lines = _REQUEST_DROP.sub(b"", lines)
        if cookies := [value for name, value in special if name == b"cookie"]:
            lines += b"\r\ncookie\x00" + b"; ".join(cookies)
    if authority is None:
        authority = host
    elif host is not None and host.lower() != authority.lower():
        raise _malformed("host_differs_from_authority")
    if not authority:
        raise _malformed("missing_authority")
    authority = authority.lower()
    try:
        if checked_host(authority) != authority:  # white space, which HTTP/1 would have around it
            raise _malformed("bad_authority")
    except RemoteProtocolError:
        raise _malformed("bad_authority") from None
    if method == b"CONNECT":
        path = _connect(head, path, scheme, protocol, authority)
        method = b"GET" if head.upgrade else method
    elif protocol is not None:
        raise _malformed("protocol_without_connect")
    elif scheme not in (b"http", b"https"):
        raise _malformed("bad_scheme")
    elif path is None or (_PATH.fullmatch(path) is None and (path != b"*" or method != b"OPTIONS")):
        raise _malformed("bad_path")
    head.method = method
    head.path = path
    head.authority = authority
    head.block = head.received = b"\r\nhost: " + authority + lines.replace(b"\x00", b": ")
    head.lowered = head.block.lower()
    head.length = len(head.block) + len(path) + len(method)
    head.grpc = content_type(head.lowered)
    if head.body == CHUNKED:
        head.is_plain = False
    return head


def _special(head: RequestHead, special: list[tuple[bytes, bytes]], is_end: bool) -> bytes | None:
    """Each field that matters; returns Host."""
    host: bytes | None = None
    has_length = False
    for name, value in special:
        if name == b"host":
            if host is not None:
                raise _malformed("duplicate_host")
            host = value
        elif name == b"content-length":
            if has_length or _DIGITS.fullmatch(value) is None:
                raise _malformed("bad_content_length")
            has_length = True
            length = int(value)
            if is_end and length:
                raise _malformed("content_length_mismatch")
            head.body = length
        elif name == b"x-request-id":
            head.has_request_id = True
        elif name == b"cookie":
            pass
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise RemoteProtocolError("http2.unknown_expectation", 417)
            head.expects_continue = True
        elif name == b"te":
            if value.lower() != b"trailers":
                raise _malformed("bad_te")
            head.te_trailers = True
            head.is_plain = False
        elif name in _OF_A_CONNECTION:
            raise _malformed("connection_field")
        else:
            head.is_plain = False
            if name == b"x-forwarded-proto":
                head.forwarded_proto = value.lower()
            elif name == b"x-forwarded-client-cert":
                head.xfcc = head.xfcc + b"," + value if head.xfcc else value
    return host


def _connect(
    head: RequestHead, path: bytes | None, scheme: bytes | None, protocol: bytes | None, authority: bytes
) -> bytes:
    """CONNECT (RFC 9113 §8.5) has no path; extended CONNECT (RFC 8441 §4) has one, and becomes an upgrade."""
    if protocol is None:
        if path is not None or scheme is not None:
            raise _malformed("bad_connect")
        return authority
    if path is None or _PATH.fullmatch(path) is None or scheme not in (b"http", b"https"):
        raise _malformed("bad_connect")
    if _PROTOCOL.fullmatch(protocol) is None or head.body != CHUNKED:
        raise _malformed("bad_protocol")
    head.upgrade = protocol.lower()
    head.body = NO_BODY
    head.is_plain = False
    return path


def response_head(received: Fields, is_head_request: bool, is_end: bool) -> ResponseHead:
    """The head of an upstream's response. StreamError for a malformed one; 1xx come out like any other."""
    if not received or received[0][0] != b":status" or _STATUS.fullmatch(received[0][1]) is None:
        raise _malformed("bad_status")
    lines = _lines(received[1:])
    status = int(received[0][1])
    if status == 101:
        raise _malformed("switching_protocols")
    head = ResponseHead()
    head.status = status
    head.reason = _PHRASES.get(status, b"")
    head.minor = 1
    head.keeps_alive = True
    head.upgrade = b""
    head.body = NO_BODY if is_end else CHUNKED
    has_length = False
    for name, value in _RESPONSE_SPECIAL.findall(lines):
        if name == b"content-length":
            if has_length or _DIGITS.fullmatch(value) is None:
                raise _malformed("bad_content_length")
            has_length = True
            length = int(value)
            if is_end and length and not is_head_request and status != 304:
                raise _malformed("content_length_mismatch")
            if not is_end:
                head.body = length
        elif name in _OF_A_CONNECTION:
            raise _malformed("connection_field")
        else:
            lines = _RESPONSE_DROP.sub(b"", lines)
    head.block = lines.replace(b"\x00", b": ")
    head.length = len(head.block) + 5
    if is_head_request or status in (204, 304):
        head.body = NO_BODY
    elif is_end and not has_length:
        head.body = UNSAID
    elif not is_end and head.body == NO_BODY:
        head.body = CHUNKED if not has_length else NO_BODY
    return head


def extended_connect(protocol: bytes, scheme: bytes, path: bytes, lines: bytes) -> Fields:
    """What HTTP/1.1 calls an upgrade (RFC 8441, RFC 9220). lines: the request's, Host among them.

    The key and proof of a WebSocket exist in HTTP/1.1 only.
    """
    fields_ = from_block(lines)
    return [
        (b":method", b"CONNECT", False),
        (b":protocol", protocol, False),
        (b":scheme", scheme, False),
        (b":authority", next((value for name, value, _ in fields_ if name == b"host"), b""), False),
        (b":path", path, False),
        *(field for field in fields_ if field[0] not in (b"host", b"sec-websocket-key")),
    ]


def tunnel_opened(head: ResponseHead, protocol: bytes, lines: bytes) -> ResponseHead:
    """The answer to extended CONNECT as HTTP/1.1 says it, with the proof of the key that the request's lines have."""
    head = copy(head)
    head.status, head.reason, head.upgrade = 101, b"Switching Protocols", protocol
    key = find_field(lines, b"sec-websocket-key")
    if key is not None:
        proof = b64encode(sha1(key + _WEBSOCKET_GUID, usedforsecurity=False).digest())
        head.block += b"\r\nsec-websocket-accept: " + proof
    return head


def trailers(received: Fields) -> bytes:
    """Trailer fields as lines that each end in CRLF; those a trailer must not hold are left out."""
    if any(name in _OF_A_CONNECTION for name, _, _ in received):
        raise _malformed("connection_field")
    return allowed_trailers(_lines(received).replace(b"\x00", b": ")[2:] + b"\r\n") if received else b""


def from_block(block: bytes) -> Fields:
    """Field lines, each preceded by CRLF, as a list to encode."""
    return [(name, value, False) for name, value in fields(block)]


def from_trailers(lines: bytes) -> Fields:
    """Field lines that each end in CRLF, as a list to encode."""
    return from_block(b"\r\n" + lines[:-2]) if lines else []
