"""Replies the proxy makes itself: status, body and why, in Envoy's words.

Source: Envoy local reply bodies (router, http connection manager); %RESPONSE_CODE_DETAILS%.
"""

from dataclasses import dataclass
from http import HTTPStatus

from meshproxy.codec.http2_fields import Fields, from_block
from meshproxy.model.response_flag import ResponseFlag


@dataclass(frozen=True, slots=True)
class LocalReply:
    status: int
    flag: ResponseFlag
    details: str
    body: bytes = b""
    extra: bytes = b""
    """Field lines, each preceded by CRLF."""

    def as_fields(self, extra: bytes, is_head_request: bool) -> tuple[Fields, bytes]:
        """(what HTTP/2 and HTTP/3 say of it, the body to send). extra: more lines as in `extra`."""
        body = self.body
        block = b"\r\nserver: meshproxy" + self.extra + extra
        if self.status in (204, 304):
            body = b""
        else:
            block = b"\r\ncontent-length: %d" % len(body) + block
        if body and b"\r\ncontent-type: " not in extra:
            block += b"\r\ncontent-type: text/plain"
        return [(b":status", b"%d" % self.status, False), *from_block(block)], b"" if is_head_request else body


NO_ROUTE = LocalReply(404, ResponseFlag.NO_ROUTE, "route_not_found")
NO_CLUSTER = LocalReply(503, ResponseFlag.NO_CLUSTER, "cluster_not_found")
NO_HEALTHY_UPSTREAM = LocalReply(503, ResponseFlag.NO_HEALTHY_UPSTREAM, "no_healthy_upstream", b"no healthy upstream")
_RESET = b"upstream connect error or disconnect/reset before headers. reset reason: "
_RETRY_AFTER = b"\r\nretry-after: 1"
"""What is shed may be tried again elsewhere or later (RFC 9110 §10.2.3); Envoy does not say when."""
OVERFLOW = LocalReply(
    503,
    ResponseFlag.UPSTREAM_OVERFLOW,
    "upstream_reset_before_response_started{overflow}",
    _RESET + b"overflow",
    b"\r\nx-envoy-overloaded: true" + _RETRY_AFTER,
)
OVERLOADED = LocalReply(
    503,
    ResponseFlag.OVERLOAD,
    "overload",
    b"overloaded",
    b"\r\nx-envoy-local-overloaded: true" + _RETRY_AFTER,
)
UPSTREAM_TIMEOUT = LocalReply(504, ResponseFlag.UPSTREAM_TIMEOUT, "response_timeout", b"upstream request timeout")
DURATION_TIMEOUT = LocalReply(
    504, ResponseFlag.DURATION_TIMEOUT, "max_duration_timeout", b"downstream duration timeout"
)
STREAM_IDLE = LocalReply(408, ResponseFlag.STREAM_IDLE, "stream_idle_timeout", b"stream timeout")


def connect_failure(kind: str) -> LocalReply:
    """kind: refused, timeout or tls."""
    reason = b"connection timeout" if kind == "timeout" else b"remote connection failure"
    return LocalReply(
        503,
        ResponseFlag.UPSTREAM_CONNECTION_FAILURE,
        f"upstream_reset_before_response_started{{{reason.decode().replace(' ', '_')}}}",
        _RESET + reason,
    )


def upstream_lost(detail: str) -> LocalReply:
    """The connection went away, or broke the protocol, before a response head came."""
    if detail.startswith("upstream."):
        return LocalReply(502, ResponseFlag.UPSTREAM_PROTOCOL_ERROR, detail, _RESET + b"protocol error")
    if detail == "reset":
        return LocalReply(
            503,
            ResponseFlag.UPSTREAM_RESET,
            "upstream_reset_before_response_started{connection_termination}",
            _RESET + b"connection termination",
        )
    return LocalReply(
        503,
        ResponseFlag.UPSTREAM_CLOSED,
        "upstream_reset_before_response_started{connection_termination}",
        _RESET + b"connection termination",
    )


def protocol_error(status: int, details: str) -> LocalReply:
    return LocalReply(status, ResponseFlag.DOWNSTREAM_PROTOCOL_ERROR, details, reason_phrase(status))


_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


def reason_phrase(status: int) -> bytes:
    return _PHRASES.get(status, b"Unknown")
