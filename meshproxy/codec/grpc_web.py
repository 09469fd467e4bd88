"""gRPC-Web's two differences from gRPC: trailers are the body's last frame, and all of it may be base64 text. Pure.

Source: gRPC-Web protocol (PROTOCOL-WEB.md); Envoy's grpc_web filter for what is accepted and what is answered.
"""

import binascii
from typing import Final

from meshproxy.codec.http1 import fields
from meshproxy.errors import RemoteProtocolError

BINARY: Final = b"application/grpc-web+proto"
TEXT: Final = b"application/grpc-web-text+proto"
_TRAILER_FLAG = b"\x80"
_TEXT_TYPES = frozenset({b"application/grpc-web-text", TEXT})
_TYPES = _TEXT_TYPES | {b"application/grpc-web", BINARY}


def is_grpc_web(content_type: bytes) -> bool:
    return content_type in _TYPES


def is_text(content_type: bytes) -> bool:
    return content_type in _TEXT_TYPES


def trailer_frame(lines: bytes) -> bytes:
    """Trailer fields, each line ending in CRLF, as a frame of the body; spelled as Envoy does: `grpc-status:0`."""
    block = b"".join([b"%b:%b\r\n" % pair for pair in fields(b"\r\n" + lines[:-2])]) if lines else b""
    return _TRAILER_FLAG + len(block).to_bytes(4, "big") + block


def encoded(data: bytes) -> bytes:
    """A piece of the body as text. Each piece is padded by itself, as the protocol has it where one is flushed."""
    return binascii.b2a_base64(data, newline=False)


class TextDecoder:
    """Base64 text → bytes, however the text is cut. Padding may come at the end of any piece that was encoded by
    itself, so also within the text."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, text: bytes, is_end: bool) -> bytes:
        """Raises RemoteProtocolError (400) for what is no base64, or ends within four characters."""
        if self._rest:
            text = self._rest + text
        size = len(text)
        whole = size - size % 4
        if is_end and whole != size:
            raise RemoteProtocolError("grpc_base_64_decode_failed_bad_size")
        self._rest = text[whole:]
        pieces = []
        at = 0
        try:
            while at < whole:
                padding = text.find(b"=", at, whole)
                end = whole if padding < 0 else padding - padding % 4 + 4
                pieces.append(binascii.a2b_base64(text[at:end], strict_mode=True))
                at = end
        except binascii.Error:
            raise RemoteProtocolError("grpc_base_64_decode_failed") from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
