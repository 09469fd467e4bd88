"""What the origins answer, by the name that a request's x-answer gives. CLOSE at the end: the origin closes then."""

from typing import Final

CLOSE: Final = b"<close>"
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"
_CHUNKED: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"

ANSWERS: Final = {
    "ok": _OK + b"\r\nok",
    "headers": _OK + b"Content-Type: text/plain\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"
    b"X-Set: origin\r\nX-Add: origin\r\nX-Remove: 1\r\nX-Cluster-Remove: 1\r\nETag: \"x\"\r\n\r\nok",
    "own server": _OK + b"Server: origin\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\nok",
    "created": b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\nLocation: http://a.example/1\r\n\r\n",
    "unavailable": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy",
    "unknown status": b"HTTP/1.1 599 Odd\r\nContent-Length: 3\r\n\r\nodd",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "no content with length": b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n",
    "not modified with length": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n",
    "head": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
    "head chunked": _CHUNKED + b"\r\n",
    "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "chunked": _CHUNKED + b"\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n",
    "chunked empty": _CHUNKED + b"\r\n0\r\n\r\n",
    "trailers": _CHUNKED + b"Trailer: X-Sum\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n",
    "until close": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it" + CLOSE,
    "connection close": _OK + b"Connection: close\r\n\r\nok" + CLOSE,
    "http/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok" + CLOSE,
    "http/1.0 until close": b"HTTP/1.0 200 OK\r\n\r\nall of it" + CLOSE,
    "hop headers": _OK + b"Connection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"
    b"Proxy-Connection: keep-alive\r\n\r\nok",
    "upgrade offered": _OK + b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\nok",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "processing": b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "envoy headers": _OK + b"X-Envoy-Upstream-Service-Time: 9\r\n"
    b"X-Envoy-Decorator-Operation: op\r\nX-Request-Id: of-origin\r\n\r\nok",
    "large headers": _OK + b"X-Large: " + b"x" * 20_000 + b"\r\n\r\nok",
    "spaces": b"HTTP/1.1 200 OK\r\nContent-Length:   2  \r\nX-Spaces: \t a b \t\r\nX-Empty:\r\n\r\nok",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok",
    "closes at once": CLOSE,
    "closes in head": b"HTTP/1.1 200 OK\r\nContent-Le" + CLOSE,
    "no http": b"SSH-2.0-OpenSSH_9.6\r\n\r\n" + CLOSE,
    "two lengths": _OK + b"Content-Length: 3\r\n\r\nok" + CLOSE,
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok" + CLOSE,
    "short": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nok" + CLOSE,
    "short chunked": _CHUNKED + b"\r\n5\r\nhello\r\n" + CLOSE,
    "length and chunked": _OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "unasked upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: foo\r\nConnection: upgrade\r\n\r\n" + CLOSE,
}  # fmt: skip
