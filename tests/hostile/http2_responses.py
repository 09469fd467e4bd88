"""What a hostile HTTP/2 upstream says to a request on stream 3, while stream 1 waits for its own answer.

STREAM_ERRORS break one stream: the other is answered afterwards. CONNECTION_ERRORS break all. In both the request gets
an error of ours, or is cut where its head was out already (CUT), and `word` is what the counter of protocol errors
says. Sources: RFC 9113 §5 to §8, RFC 7541; limits: codec.http2.
"""

from typing import NamedTuple

from tests.support.http2_client import (
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    block,
    data_frame,
    headers_frame,
    literal,
    ping_frame,
    raw_frame,
    rst_frame,
    settings_frame,
    window_frame,
)
from tests.support.raw_http2_upstream import response

CUT = 0
"""The head was out: the client's connection is cut in the middle of its answer."""


class Case(NamedTuple):
    name: str
    sent: bytes
    word: str
    """After `http2.`; empty: nothing is counted."""
    status: int = 502


HEAD = response(3)
INTERIM = response(3, status=b"103")
HEAD_OF_4 = response(3, (b"content-length", b"4"))


def _head(*fields: tuple[bytes, bytes], end_stream: bool = True) -> bytes:
    return headers_frame(3, block(fields), end_stream=end_stream)


def _field(name: bytes, value: bytes) -> bytes:
    return _head((b":status", b"200"), (name, value))


STREAM_ERRORS = [
    # ── the status ──
    Case("no status", _head((b"x", b"y")), "bad_status"),
    Case("no fields", _head(), "bad_status"),
    Case("status twice", _head((b":status", b"200"), (b":status", b"200")), "invalid_field"),
    Case("two statuses", _head((b":status", b"200"), (b":status", b"500")), "invalid_field"),
    Case("status after a field", _head((b"x", b"y"), (b":status", b"200")), "bad_status"),
    Case("status of two digits", _head((b":status", b"20")), "bad_status"),
    Case("status of four digits", _head((b":status", b"2000")), "bad_status"),
    Case("status of letters", _head((b":status", b"abc")), "bad_status"),
    Case("empty status", _head((b":status", b"")), "bad_status"),
    Case("status with a sign", _head((b":status", b"+20")), "bad_status"),
    Case("status with a space", _head((b":status", b"200 ")), "bad_status"),
    Case("status with a reason", _head((b":status", b"200 OK")), "bad_status"),
    Case("status 000", _head((b":status", b"000")), "bad_status"),
    Case("status 600", _head((b":status", b"600")), "bad_status"),
    Case("status with line break", _head((b":status", b"200\r\nx: y")), "bad_status"),
    Case("status in other digits", _head((b":status", "٢٠٠".encode())), "bad_status"),
    Case("101", _head((b":status", b"101"), end_stream=False), "switching_protocols"),
    Case("101 that ends", _head((b":status", b"101")), "switching_protocols"),
    Case("103 that ends", _head((b":status", b"103")), "too_many_informational"),
    Case("100 with a body", _head((b":status", b"100"), end_stream=False) + data_frame(3, b"hello"),
         "data_before_headers"),
    # ── fields ──
    Case("a pseudo field of requests", _head((b":status", b"200"), (b":path", b"/")), "invalid_field"),
    Case("an unknown pseudo field", _head((b":status", b"200"), (b":x", b"y")), "invalid_field"),
    Case("upper-case name", _field(b"X-Upper", b"y"), "invalid_field"),
    Case("empty name", _field(b"", b"y"), "invalid_field"),
    Case("space in a name", _field(b"x y", b"z"), "invalid_field"),
    Case("colon in a name", _field(b"x:y", b"z"), "invalid_field"),
    Case("NUL in a name", _field(b"x\x00y", b"z"), "invalid_field"),
    Case("line break in a name", _field(b"x: y\r\nset-cookie", b"z"), "invalid_field"),
    Case("line break in a value", _field(b"x", b"y\r\nset-cookie: z"), "invalid_field"),
    Case("two line breaks in a value", _field(b"x", b"y\r\n\r\n<script>"), "invalid_field"),
    Case("CR in a value", _field(b"x", b"y\rset-cookie: z"), "invalid_field"),
    Case("LF in a value", _field(b"x", b"y\nset-cookie: z"), "invalid_field"),
    Case("NUL in a value", _field(b"x", b"y\x00z"), "invalid_field"),
    Case("leading space in a value", _field(b"x", b" y"), "invalid_field"),
    Case("trailing tab in a value", _field(b"x", b"y\t"), "invalid_field"),
    Case("DEL in a value", _field(b"x", b"y\x7f"), "invalid_field"),
    Case("connection", _field(b"connection", b"close"), "connection_field"),
    Case("keep-alive", _field(b"keep-alive", b"timeout=5"), "connection_field"),
    Case("proxy-connection", _field(b"proxy-connection", b"close"), "connection_field"),
    Case("transfer-encoding", _field(b"transfer-encoding", b"chunked"), "connection_field"),
    Case("upgrade", _field(b"upgrade", b"h2c"), "connection_field"),
    Case("too many fields", _head((b":status", b"200"), *[(b"x-%d" % n, b"y") for n in range(120)]),
         "headers_too_large"),
    # ── content-length ──
    Case("content-length without a body", _field(b"content-length", b"4"), "content_length_mismatch"),
    Case("content-length of letters", _field(b"content-length", b"four"), "bad_content_length"),
    Case("content-length with a sign", _field(b"content-length", b"-4"), "bad_content_length"),
    Case("content-length too large", _field(b"content-length", b"9" * 30), "bad_content_length"),
    Case("content-length list", _field(b"content-length", b"4, 4"), "bad_content_length"),
    Case("content-length twice", _head((b":status", b"200"), (b"content-length", b"0"), (b"content-length", b"0")),
         "bad_content_length"),
    Case("body shorter than said", HEAD_OF_4 + data_frame(3, b"abc"), "content_length_mismatch", CUT),
    Case("body longer than said", HEAD_OF_4 + data_frame(3, b"abcde"), "content_length_mismatch", CUT),
    Case("trailers before the body is whole", HEAD_OF_4 + data_frame(3, b"a", False) + _head((b"x", b"y")),
         "bad_trailers", CUT),
    # ── the order of frames ──
    Case("DATA before HEADERS", data_frame(3, b"hello"), "data_before_headers"),
    Case("DATA after 103 alone", INTERIM + data_frame(3, b"hello"), "data_before_headers"),
    Case("empty DATA ends without HEADERS", data_frame(3), "data_before_headers"),
    Case("HEADERS twice", HEAD + HEAD + data_frame(3, b"hello"), "bad_trailers", CUT),
    Case("trailers without END_STREAM", HEAD + data_frame(3, b"a", False) + _head((b"x", b"y"), end_stream=False),
         "bad_trailers", CUT),
    Case("pseudo field in trailers", HEAD + data_frame(3, b"a", False) + _head((b":status", b"200")),
         "invalid_field", CUT),
    Case("line break in trailers", HEAD + data_frame(3, b"a", False) + _head((b"x", b"y\r\n\r\nHTTP/1.1 200 OK")),
         "invalid_field", CUT),
    Case("connection field in trailers", HEAD + data_frame(3, b"a", False) + _head((b"connection", b"close")),
         "connection_field", CUT),
    Case("a hundred 103", INTERIM * 100 + HEAD + data_frame(3, b"hello"), "too_many_informational"),
    Case("103 after the head", HEAD + INTERIM + data_frame(3, b"hello"), "bad_trailers", CUT),
    # ── windows ──
    Case("WINDOW_UPDATE of 0", window_frame(3, 0), "zero_window_update"),
    Case("window overflow", window_frame(3, 2**31 - 1), "window_overflow"),
    # ── resets ──
    *(Case(f"reset with code {code}", rst_frame(3, code), "", 503) for code in (*range(7), *range(8, 14), 2**32 - 1)),
    *(Case(f"reset with code {code} after the head", HEAD + rst_frame(3, code), "", CUT) for code in (0, 2, 7, 8)),
]  # fmt: skip

_BOMB = b"\x40" + literal(b"x", b"a" * 3900)[1:] + b"\xbe" * 8000
"""An indexed field of 4 KB, and 8000 mentions of it."""

CONNECTION_ERRORS = [
    # ── settings ──
    Case("ENABLE_PUSH 1", settings_frame({ENABLE_PUSH: 1}), "bad_enable_push"),
    Case("ENABLE_PUSH 2", settings_frame({ENABLE_PUSH: 2}), "bad_enable_push"),
    Case("INITIAL_WINDOW_SIZE too large", settings_frame({INITIAL_WINDOW_SIZE: 2**31}), "bad_initial_window"),
    Case("MAX_FRAME_SIZE too small", settings_frame({MAX_FRAME_SIZE: 16383}), "bad_max_frame_size"),
    Case("MAX_FRAME_SIZE too large", settings_frame({MAX_FRAME_SIZE: 2**24}), "bad_max_frame_size"),
    Case("SETTINGS on a stream", raw_frame(SETTINGS, 0, 3), "settings_on_stream"),
    Case("SETTINGS of 5 bytes", raw_frame(SETTINGS, 0, 0, bytes(5)), "settings_size"),
    Case("SETTINGS ACK with a payload", raw_frame(SETTINGS, 1, 0, bytes(6)), "settings_ack_size"),
    Case("SETTINGS of 100 entries", settings_frame([(99, n) for n in range(100)]), "too_many_settings"),
    # ── frames that no server may send, or not there ──
    Case("PUSH_PROMISE", raw_frame(PUSH_PROMISE, END_HEADERS, 3, b"\0\0\0\2" + block([(b":path", b"/")])),
         "push_promise"),
    Case("HEADERS on stream 0", headers_frame(0, block([(b":status", b"200")])), "idle_stream"),
    Case("HEADERS on a stream of the server's", headers_frame(2, block([(b":status", b"200")])), "idle_stream"),
    Case("HEADERS on a stream never opened", headers_frame(99, block([(b":status", b"200")])), "idle_stream"),
    Case("DATA on stream 0", data_frame(0, b"hello"), "data_on_connection"),
    Case("DATA on a stream never opened", data_frame(99, b"hello"), "idle_stream"),
    Case("RST_STREAM on stream 0", rst_frame(0), "reset_of_connection"),
    Case("RST_STREAM on a stream never opened", rst_frame(99), "idle_stream"),
    Case("RST_STREAM of 3 bytes", raw_frame(RST_STREAM, 0, 3, bytes(3)), "reset_size"),
    Case("WINDOW_UPDATE on a stream never opened", window_frame(99, 1), "idle_stream"),
    Case("WINDOW_UPDATE of 0 for the connection", window_frame(0, 0), "zero_window_update"),
    Case("WINDOW_UPDATE of 3 bytes", raw_frame(WINDOW_UPDATE, 0, 3, bytes(3)), "window_update_size"),
    Case("connection window overflow", window_frame(0, 2**31 - 1), "window_overflow"),
    Case("PING on a stream", raw_frame(PING, 0, 3, bytes(8)), "ping_on_stream"),
    Case("PING of 7 bytes", raw_frame(PING, 0, 0, bytes(7)), "ping_size"),
    Case("GOAWAY on a stream", raw_frame(GOAWAY, 0, 3, bytes(8)), "goaway_on_stream"),
    Case("GOAWAY of 7 bytes", raw_frame(GOAWAY, 0, 0, bytes(7)), "goaway_size"),
    Case("PRIORITY on stream 0", raw_frame(PRIORITY, 0, 0, bytes(5)), "priority_on_connection"),
    Case("a frame too large", raw_frame(DATA, 0, 3, bytes(16385)), "frame_too_large"),
    Case("padding longer than the frame", raw_frame(DATA, PADDED, 3, b"\xff" + bytes(9)), "padding_too_long"),
    Case("padding without its length", raw_frame(DATA, PADDED, 3), "padding_missing"),
    Case("HEADERS with half a priority", raw_frame(HEADERS, END_HEADERS | WITH_PRIORITY, 3, bytes(4)),
         "priority_missing"),
    # ── field blocks ──
    Case("CONTINUATION without HEADERS", raw_frame(CONTINUATION, END_HEADERS, 3), "unexpected_continuation"),
    Case("HEADERS broken off by PING", headers_frame(3, b"", end_headers=False) + ping_frame(), "interrupted_headers"),
    Case("HEADERS broken off by another stream's", headers_frame(3, b"", end_headers=False) + response(1),
         "interrupted_headers"),
    Case("CONTINUATION flood", headers_frame(3, b"", end_headers=False) + raw_frame(CONTINUATION, 0, 3) * 1000,
         "headers_too_large"),
    Case("CONTINUATION of 300 KB", headers_frame(3, b"", end_headers=False) + raw_frame(
        CONTINUATION, 0, 3, literal(b"x", b"a" * 16000)) * 20, "headers_too_large"),
    Case("HPACK bomb", headers_frame(3, b"\x88" + _BOMB), "headers_too_large"),
    Case("HPACK index 0", headers_frame(3, b"\x80"), "bad_field_block"),
    Case("HPACK index without an entry", headers_frame(3, b"\x88\xfe"), "bad_field_block"),
    Case("HPACK integer without end", headers_frame(3, b"\xff" + b"\xff" * 20), "bad_field_block"),
    Case("HPACK table larger than allowed", headers_frame(3, b"\x3f\xe2\x1f\x88"), "bad_field_block"),
    Case("HPACK string broken off", headers_frame(3, b"\x88\x00\x05ab"), "bad_field_block"),
    # ── floods ──
    Case("PING flood", ping_frame() * 5000, "flood"),
    Case("SETTINGS flood", settings_frame() * 5000, "flood"),
    Case("SETTINGS ACK flood", raw_frame(SETTINGS, 1, 0) * 5000, "flood"),
    Case("flood of unknown frames", raw_frame(99, 0, 0) * 5000, "flood"),
    Case("PRIORITY flood", raw_frame(PRIORITY, 0, 3, bytes(5)) * 5000, "flood"),
    Case("WINDOW_UPDATE flood", window_frame(0, 1) * 5000, "flood"),
    Case("GOAWAY flood", raw_frame(GOAWAY, 0, 0, b"\0\0\0\3" + bytes(4)) * 5000, "flood"),
    # ── nothing like HTTP/2 ──
    Case("the client's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "frame_too_large"),
    Case("HTTP/1.1", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "frame_too_large"),
    Case("random bytes", bytes(range(255, 0, -1)), "frame_too_large"),
    # ── after the head ──
    Case("flood of empty DATA", HEAD + data_frame(3, b"", end_stream=False) * 5000, "flood", CUT),
    Case("garbage after the head", HEAD + b"\xff" * 100, "frame_too_large", CUT),
]  # fmt: skip

CLOSES = [
    Case("at once", b"", "", 503),
    Case("in a frame header", HEAD[:4], "", 503),
    Case("in HEADERS", HEAD[:-2], "", 503),
    Case("before CONTINUATION", headers_frame(3, b"\x88", end_headers=False), "", 503),
    Case("after 103", INTERIM, "", 503),
    Case("after the head", HEAD, "", CUT),
    Case("in DATA", HEAD + data_frame(3, b"hello")[:-2], "", CUT),
    Case("between DATA", HEAD + data_frame(3, b"hello", end_stream=False), "", CUT),
    Case("before the length is reached", HEAD_OF_4 + data_frame(3, b"abc", end_stream=False), "", CUT),
    Case("at the length, without END_STREAM", HEAD + data_frame(3, b"a", end_stream=False) + raw_frame(
        HEADERS, END_STREAM, 3, block([(b"x", b"y")])), "", CUT),
]  # fmt: skip
"""Then the upstream closes its connection, without a word or with GOAWAY."""
