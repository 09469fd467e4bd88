"""Chunked transfer coding: strict reader, and the writer's three pieces.

Source: RFC 9112 §7.1. Stricter on purpose: only CRLF ends a line, extensions are bounded and dropped, sizes are at
most 16 hex digits, trailers are bounded and checked by the same grammar as header fields.
"""

import re

from meshproxy.errors import RemoteProtocolError

LAST_CHUNK = b"0\r\n\r\n"
MAX_LINE_BYTES = 256
"""A chunk-size line with its extension. Extensions are a known flooding tool (CVE-2023-39326)."""
MAX_TRAILER_BYTES = 8192

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[\t ]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_TRAILERS = re.compile(rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n")
# RFC 9110 §6.5.1: framing, routing, authentication and the like must not come in a trailer.
_FORBIDDEN_TRAILERS = re.compile(
    rb"^(?:content-length|transfer-encoding|host|trailer|te|connection|keep-alive|upgrade|expect|authorization|cookie"
    rb"|set-cookie|content-encoding|content-type|content-range|x-forwarded-[^:]*|x-envoy-[^:]*|proxy-[^:]*):[^\r]*\r\n",
    re.MULTILINE | re.IGNORECASE,
)


class ChunkedReader:
    """Feeds on wire bytes, gives body slices. No socket, no clock.

    `where` prefixes the detail word of errors: `http1` (status 400) or `upstream` (502).
    """

    __slots__ = ("_pending", "_remaining", "_status", "_where", "trailers")

    def __init__(self, where: str = "http1") -> None:
        self._where = where
        self._status = 400 if where == "http1" else 502
        self._remaining = (
            -1
        )  # bytes left of the current chunk; -1: at a size line; 0: at the CRLF after data; -2: trailers
        self._pending = b""
        self.trailers = b""
        """Field lines of the trailer section once complete; forbidden ones removed."""

    def feed(self, data: bytes, at: int = 0) -> tuple[list[bytes], int]:
        """Body slices in data[at:], and the offset after the message's end, or -1 while it goes on."""
        if self._pending:
            data = self._pending + data[at:]
            carried = len(self._pending)
            self._pending = b""
            pieces, end = self._read(data, 0)
            return pieces, end if end < 0 else end - carried + at
        return self._read(data, at)

    def _read(self, data: bytes, at: int) -> tuple[list[bytes], int]:
        pieces: list[bytes] = []
        size = len(data)
        while True:
            remaining = self._remaining
            if remaining > 0:
                take = min(remaining, size - at)
                if take:
                    pieces.append(data[at : at + take] if take < size else data)
                    at += take
                    self._remaining = remaining - take
                if self._remaining:
                    return pieces, -1
                continue
            if remaining == 0:
                if size - at < 2:
                    if data[at:] not in (b"", b"\r"):
                        raise self._error("chunk_not_terminated")
                    self._pending = data[at:]
                    return pieces, -1
                if data[at : at + 2] != b"\r\n":
                    raise self._error("chunk_not_terminated")
                at += 2
                self._remaining = -1
                continue
            if remaining == -1:
                match = _SIZE_LINE.match(data, at)
                if match is None:
                    self._keep_line(data, at)
                    return pieces, -1
                if match.end() - at > MAX_LINE_BYTES:
                    raise self._error("chunk_line_too_long")
                at = match.end()
                length = int(match.group(1), 16)
                if length > 2**62:
                    raise self._error("chunk_size_overflow")
                self._remaining = length if length else -2
                continue
            match = _TRAILERS.match(data, at)
            if match is not None:
                if match.end() - at > MAX_TRAILER_BYTES:
                    raise self._error("trailers_too_large")
                self.trailers = allowed_trailers(match.group(1))
                return pieces, match.end()
            rest = data[at:]
            if len(rest) > MAX_TRAILER_BYTES:
                raise self._error("trailers_too_large")
            if not _could_be_trailers(rest):
                raise self._error("invalid_trailer")
            self._pending = rest
            return pieces, -1

    def _keep_line(self, data: bytes, at: int) -> None:
        """An incomplete size line is kept; one that can no longer become legal is refused now."""
        rest = data[at : at + MAX_LINE_BYTES + 1]
        if len(rest) > MAX_LINE_BYTES:
            raise self._error("chunk_line_too_long")
        if _SIZE_START.fullmatch(rest) is None:
            raise self._error("invalid_chunk_size")
        self._pending = rest

    def _error(self, word: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{self._where}.{word}", self._status)


_SIZE_START = re.compile(rb"(?:[0-9A-Fa-f]{1,16}(?:[\t ]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?\r?)?")
_TRAILER_START = re.compile(
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+(?::[\t\x20-\x7e\x80-\xff]*\r?)?|\r)?"
)


def _could_be_trailers(rest: bytes) -> bool:
    return _TRAILER_START.fullmatch(rest) is not None


def allowed_trailers(lines: bytes) -> bytes:
    """Field lines, each ending CRLF, without those that a trailer must not hold (RFC 9110 §6.5.1)."""
    return _FORBIDDEN_TRAILERS.sub(b"", lines)


def chunk(data: bytes) -> bytes:
    """One chunk on the wire; data is not empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: bytes) -> bytes:
    """The end of a chunked body; trailers: field lines, each ending CRLF."""
    return b"0\r\n%b\r\n" % trailers if trailers else LAST_CHUNK
