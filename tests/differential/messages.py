"""Requests whose form, body, connection or answer is what is compared; the routes hardly matter."""

from tests.differential.answers import ANSWERS
from tests.differential.cases import Case, request


def _case(name: str, start: str = "GET /", *lines: str, body: bytes = b"", responses: int = 1) -> Case:
    return Case(name, request(start, "plain.example", *lines, body=body), responses)


def _raw(name: str, text: str, responses: int = 1) -> Case:
    """text: a whole request, with \n for line ends."""
    return Case(f"form: {name}", text.replace("\n", "\r\n").encode("latin-1"), responses)


_CHUNKED = "Transfer-Encoding: chunked"

_WITH_BODY = ("GET", "POST", "PUT", "PATCH")

METHODS = (
    *(_case(f"method: {m}", f"{m} /") for m in ("GET", "HEAD", "DELETE", "OPTIONS", "TRACE", "PURGE", "M-SEARCH")),
    *(_case(f"method: {m} with body", f"{m} /", "Content-Length: 5", body=b"hello") for m in _WITH_BODY),
    _case("method: POST without body", "POST /"),
    _case("method: unknown", "BREW /pot"),
    _case("method: small letters", "get /"),
    _case("method: CONNECT", "CONNECT plain.example:443"),
    _case("method: OPTIONS *", "OPTIONS *"),
    _case("method: GET *", "GET *"),
)  # fmt: skip

TARGETS = tuple(
    _case(f"target: {target}", f"GET {target}")
    for target in (
        "/a?b=c&d", "/?", "/a?", "//double//slash", "/./dot", "/a/../b", "/../../etc", "/a/..", "/%2e%2e/x", "/a%2Fb",
        "/%41%5c%00", "/a%zz", "/a\\b", "/a;p=1", "/a?b?c", "/a#fragment", "/a|b", "/a<b>", "/\xe9", "relative",
        "http://plain.example/abs?q=1", "http://plain.example", "http://match.example/exact", "HTTP://plain.example/x",
        "https://plain.example/x", "ftp://plain.example/x", "http://plain.example:80/x", "http://user@plain.example/x",
    )
)  # fmt: skip

BODIES = (
    _case("body: chunked", "POST /", _CHUNKED, body=b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"),
    _case("body: chunked and empty", "POST /", _CHUNKED, body=b"0\r\n\r\n"),
    _case("body: chunked in capitals", "POST /", "Transfer-Encoding: Chunked", body=b"1\r\na\r\n0\r\n\r\n"),
    _case("body: chunked with trailers", "POST /", _CHUNKED, "Trailer: X-Sum", body=b"1\r\na\r\n0\r\nX-Sum: 1\r\n\r\n"),
    _case("body: large", "POST /", "Content-Length: 200000", body=b"x" * 200_000),
    _case("body: length zero", "POST /", "Content-Length: 0"),
    _case("body: expect continue", "POST /", "Expect: 100-continue", "Content-Length: 2", body=b"hi"),
    _case("body: length and chunked", "POST /", "Content-Length: 1", _CHUNKED, body=b"1\r\na\r\n0\r\n\r\n"),
    _case("body: two equal lengths", "POST /", "Content-Length: 2", "Content-Length: 2", body=b"hi"),
    _case("body: two lengths", "POST /", "Content-Length: 2", "Content-Length: 3", body=b"hi"),
    _case("body: bad length", "POST /", "Content-Length: +2", body=b"hi"),
    _case("body: other coding", "POST /", "Transfer-Encoding: gzip", body=b"hi"),
    _case("body: gzip and chunked", "POST /", "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    _case("body: bad chunk size", "POST /", _CHUNKED, body=b"zz\r\n"),
)

FIELDS = (
    _case("field: te trailers", "GET /", "TE: trailers"),
    _case("field: te of several", "GET /", "TE: trailers, deflate;q=0.5"),
    _case("field: te gzip", "GET /", "TE: gzip"),
    _case("field: connection names it", "GET /", "Connection: X-Hop", "X-Hop: 1"),
    _case("field: connection close", "GET /", "Connection: close"),
    _case("field: connection keep-alive", "GET /", "Connection: keep-alive", "Keep-Alive: timeout=5"),
    _case("field: proxy-connection", "GET /", "Proxy-Connection: keep-alive"),
    _case("field: connection close and more", "GET /", "Connection: close, X-Hop", "X-Hop: 1"),
    _case("field: connection names a needed one", "GET /", "Connection: Host"),
    _case("field: upgrade h2c", "GET /", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"),
    _case("field: upgrade nobody knows", "GET /", "Connection: Upgrade", "Upgrade: foo"),
    _case("field: websocket refused", "GET /", "Connection: Upgrade", "Upgrade: websocket"),
    _case("field: request id", "GET /", "X-Request-Id: mine"),
    _case("field: forwarded for", "GET /", "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: h.example"),
    _case("field: forwarded proto", "GET /", "X-Forwarded-Proto: https"),
    _case("field: forwarded proto unknown", "GET /", "X-Forwarded-Proto: gopher"),
    _case(
        "field: of Envoy", "GET /", "X-Envoy-Attempt-Count: 7", "X-Envoy-Original-Path: /x", "X-Envoy-Internal: true"
    ),
    _case("field: client certificate", "GET /", "X-Forwarded-Client-Cert: By=x"),
    _case("field: several of one name", "GET /", "X-A: 1", "X-B: 2", "X-A: 3", "Cookie: a=1", "Cookie: b=2"),
    _case("field: spaces around", "GET /", "X-A: \t a b \t", "X-Empty:"),
    _case("field: underscore", "GET /", "X_Under: 1"),
    _case("field: high bytes", "GET /", "X-A: caf\xe9"),
    _case("field: large", "GET /", "X-Large: " + "x" * 30_000),
    _case("field: larger than the limit", "GET /", "X-Large: " + "x" * 70_000),
    _case("field: one hundred", "GET /", *(f"X-{n}: {n}" for n in range(98))),
    _case("field: more than one hundred", "GET /", *(f"X-{n}: {n}" for n in range(101))),
)

FORMS = (
    _raw("pipelined", "GET /1 HTTP/1.1\nHost: plain.example\n\nGET /2 HTTP/1.1\nHost: plain.example\n\n", 2),
    _raw("pipelined, first fails", "GET / HTTP/1.1\nHost: no.example\n\nGET /2 HTTP/1.1\nHost: plain.example\n\n", 2),
    _raw("pipelined after a body", "POST /1 HTTP/1.1\nHost: plain.example\nContent-Length: 2\n\nhi"
         "GET /2 HTTP/1.1\nHost: plain.example\n\n", 2),
    _raw("empty line first", "\nGET / HTTP/1.1\nHost: plain.example\n\n"),
    _raw("HTTP/1.0", "GET / HTTP/1.0\nHost: plain.example\n\n"),
    _raw("no host", "GET / HTTP/1.1\nX-A: 1\n\n"),
    _raw("empty host", "GET / HTTP/1.1\nHost:\n\n"),
    _raw("two hosts", "GET / HTTP/1.1\nHost: plain.example\nHost: match.example\n\n"),
    _raw("bad host", "GET / HTTP/1.1\nHost: pl ain\n\n"),
    _raw("HTTP/2.0", "GET / HTTP/2.0\nHost: plain.example\n\n"),
    _raw("HTTP/1.2", "GET / HTTP/1.2\nHost: plain.example\n\n"),
    _raw("no version", "GET /\n\n"),
    _raw("not HTTP", "SSH-2.0-OpenSSH_9.6\n\n"),
    _raw("space before colon", "GET / HTTP/1.1\nHost: plain.example\nX-A : 1\n\n"),
    _raw("folded line", "GET / HTTP/1.1\nHost: plain.example\nX-A: 1\n 2\n\n"),
    _raw("no colon", "GET / HTTP/1.1\nHost: plain.example\nX-A\n\n"),
    _raw("empty name", "GET / HTTP/1.1\nHost: plain.example\n: 1\n\n"),
    _raw("NUL in value", "GET / HTTP/1.1\nHost: plain.example\nX-A: a\0b\n\n"),
    _raw("two spaces", "GET  / HTTP/1.1\nHost: plain.example\n\n"),
    Case("form: bare line feeds", b"GET / HTTP/1.1\nHost: plain.example\n\n"),
)  # fmt: skip

ANSWERED = tuple(
    _case(f"answer: {name}", "HEAD /" if name in ("head", "head chunked") else "GET /", f"X-Answer: {name}")
    for name in ANSWERS
)

CASES = (*METHODS, *TARGETS, *BODIES, *FIELDS, *FORMS, *ANSWERED)
