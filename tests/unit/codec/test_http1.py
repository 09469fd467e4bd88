"""HTTP/1.1 heads: the grammar, framing, hop-by-hop fields, and that it does not matter how the bytes arrive."""

from collections.abc import Callable

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshproxy.codec.http1 import (
    CHUNKED,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    NO_BODY,
    UNTIL_CLOSE,
    RequestHead,
    ResponseHead,
    fields,
    find_field,
    replace_host,
    request_head,
    response_head,
    skip_empty_lines,
    without_field,
)
from meshproxy.errors import RemoteProtocolError
from tests.hostile.http1_requests import LEGAL, MALFORMED


def request(*lines: bytes, start: bytes = b"GET / HTTP/1.1", host: bytes | None = b"Host: a.example") -> RequestHead:
    every = [start, *([host] if host is not None else []), *lines]
    wire = b"\r\n".join(every) + b"\r\n\r\n"
    head = request_head(wire + b"body")
    assert head is not None
    assert head.length == len(wire)
    return head


def response(
    *lines: bytes, start: bytes = b"HTTP/1.1 200 OK", is_head_request: bool = False, more: bytes = b"body"
) -> ResponseHead:
    wire = b"\r\n".join([start, *lines]) + b"\r\n\r\n"
    head = response_head(wire + more, is_head_request)
    assert head is not None
    assert head.length == len(wire)
    return head


def refusal(act: Callable[[], object]) -> tuple[str, int]:
    with pytest.raises(RemoteProtocolError) as refused:
        act()
    return refused.value.detail, refused.value.status


class TestRequestFraming:
    @pytest.mark.parametrize(
        ("lines", "body"),
        [
            ([], NO_BODY),
            ([b"Content-Length: 0"], 0),
            ([b"Content-Length: 5"], 5),
            ([b"content-length:5"], 5),
            ([b"CONTENT-LENGTH: \t5 \t"], 5),
            ([b"Content-Length: 005"], 5),
            ([b"Content-Length: 999999999999999999"], 999999999999999999),
            ([b"Transfer-Encoding: chunked"], CHUNKED),
            ([b"transfer-encoding:\tCHUNKED "], CHUNKED),
            ([b"X-Content-Length: 5"], NO_BODY),
            ([b"X: y Content-Length: 5"], NO_BODY),
        ],
    )
    def test_how_long_the_body_is(self, lines: list[bytes], body: int) -> None:
        for method in (b"GET", b"POST", b"HEAD", b"DELETE"):
            assert request(*lines, start=method + b" / HTTP/1.1").body == body

    @pytest.mark.parametrize(
        ("lines", "word", "status"),
        [
            ([b"Content-Length: 5", b"Content-Length: 5"], "duplicate_content_length", 400),
            ([b"Content-Length: 5, 5"], "invalid_content_length", 400),
            ([b"Content-Length: +5"], "invalid_content_length", 400),
            ([b"Content-Length: -5"], "invalid_content_length", 400),
            ([b"Content-Length: 0x5"], "invalid_content_length", 400),
            ([b"Content-Length: 5_0"], "invalid_content_length", 400),
            ([b"Content-Length:"], "invalid_content_length", 400),
            ([b"Content-Length: \xb2"], "invalid_content_length", 400),
            ([b"Content-Length: 1000000000000000000"], "invalid_content_length", 400),
            (
                [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
                "content_length_with_transfer_encoding",
                400,
            ),
            (
                [b"Transfer-Encoding: chunked", b"Content-Length: 0"],
                "content_length_with_transfer_encoding",
                400,
            ),
            ([b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], "duplicate_transfer_encoding", 400),
            ([b"Transfer-Encoding: identity"], "unsupported_transfer_encoding", 501),
            ([b"Transfer-Encoding: gzip, chunked"], "unsupported_transfer_encoding", 501),
            ([b"Transfer-Encoding: chunked, chunked"], "unsupported_transfer_encoding", 501),
            ([b"Transfer-Encoding: xchunked"], "unsupported_transfer_encoding", 501),
            ([b"Transfer-Encoding:"], "unsupported_transfer_encoding", 501),
            ([b'Transfer-Encoding: "chunked"'], "unsupported_transfer_encoding", 501),
            ([b"Transfer-Encoding: chunked;q=1"], "unsupported_transfer_encoding", 501),
            ([b"Transfer-Encoding: chunked\xff"], "unsupported_transfer_encoding", 501),
        ],
    )
    def test_what_two_hops_could_read_differently_is_refused(self, lines: list[bytes], word: str, status: int) -> None:
        assert refusal(lambda: request(*lines)) == (f"http1.{word}", status)

    def test_chunked_needs_http11(self) -> None:
        lines = b"Transfer-Encoding: chunked"
        assert refusal(lambda: request(lines, start=b"POST / HTTP/1.0"))[0] == "http1.transfer_encoding_in_http10"


class TestConnection:
    @pytest.mark.parametrize(
        ("minor", "lines", "keeps_alive"),
        [
            (1, [], True),
            (1, [b"Connection: close"], False),
            (1, [b"Connection: CLOSE"], False),
            (1, [b"Connection: keep-alive"], True),
            (1, [b"Connection: keep-alive, close"], False),
            (1, [b"Connection: keep-alive", b"Connection: x,close"], False),
            (1, [b"X-Connection: close"], True),
            (1, [b"Proxy-Connection: close"], True),
            (0, [], False),
            (0, [b"Connection: keep-alive"], True),
            (0, [b"Connection: Keep-Alive"], True),
            (0, [b"Connection: keep-alive, close"], False),
        ],
    )
    def test_does_it_stay(self, minor: int, lines: list[bytes], keeps_alive: bool) -> None:
        head = request(*lines, start=b"GET / HTTP/1.%d" % minor)
        assert (head.keeps_alive, head.minor) == (keeps_alive, minor)

    @pytest.mark.parametrize(
        ("minor", "lines", "keeps_alive"),
        [
            (1, [b"Content-Length: 1"], True),
            (1, [b"Content-Length: 1", b"Connection: close"], False),
            (1, [b"Content-Length: 1", b"Connection: keep-alive", b"Connection: close"], False),
            (1, [b"Content-Length: 1", b"Connection: close", b"Connection: keep-alive"], False),
            (1, [b"Transfer-Encoding: chunked"], True),
            (1, [], False),
            (0, [b"Content-Length: 1"], False),
            (0, [b"Content-Length: 1", b"Connection: keep-alive"], True),
            (0, [b"Content-Length: 1", b"Connection: Keep-Alive"], True),
        ],
    )
    def test_does_the_upstreams_stay(self, minor: int, lines: list[bytes], keeps_alive: bool) -> None:
        assert response(*lines, start=b"HTTP/1.%d 200 OK" % minor).keeps_alive is keeps_alive

    @pytest.mark.parametrize(
        ("lines", "upgrade"),
        [
            ([b"Connection: Upgrade", b"Upgrade: websocket"], b"websocket"),
            ([b"Connection: keep-alive, Upgrade", b"Upgrade: WebSocket"], b"websocket"),
            ([b"Upgrade: websocket"], b""),
            ([b"Connection: Upgrade"], b""),
            ([b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"], b""),
            ([b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: h2c"], b""),
            ([b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: 3"], b""),
            ([b"Connection: Upgrade", b"Upgrade: websocket", b"Transfer-Encoding: chunked"], b""),
        ],
    )
    def test_an_upgrade_needs_its_option_no_body_and_another_protocol_than_h2c(
        self, lines: list[bytes], upgrade: bytes
    ) -> None:
        head = request(*lines)
        assert head.upgrade == upgrade
        assert find_field(head.block, b"upgrade") is None

    def test_an_upstreams_upgrade(self) -> None:
        head = response(b"Connection: upgrade", b"Upgrade: websocket", start=b"HTTP/1.1 101 Switching Protocols")
        assert (head.status, head.upgrade, head.body) == (101, b"websocket", NO_BODY)
        assert response(b"Upgrade: h2", b"Content-Length: 0").upgrade == b"h2"

    @pytest.mark.parametrize(
        "line",
        [
            b"Connection: close",
            b"Connection: keep-alive",
            b"CONNECTION: Keep-Alive",
            b"Keep-Alive: timeout=5",
            b"Proxy-Connection: keep-alive",
            b"TE: trailers",
            b"Transfer-Encoding: chunked",
            b"Upgrade: websocket",
            b"HTTP2-Settings: AAMA",
            b"X-Forwarded-Proto: https",
            b"X-Forwarded-Client-Cert: By=a",
            b"x-envoy-max-retries: 9",
            b"X-Envoy-Anything: 1",
        ],
    )
    def test_fields_of_one_hop_are_not_forwarded(self, line: bytes) -> None:
        head = request(b"A: b", line, b"C: d")
        assert head.block == b"\r\nHost: a.example\r\nA: b\r\nC: d"
        assert not head.is_plain

    @pytest.mark.parametrize(
        "line",
        [
            b"Connection: keep-alive",
            b"connection: Keep-Alive",
            b"Connection: close",
            b"Connection: keep-alive, close",
            b"Keep-Alive: timeout=5",
            b"Proxy-Connection: close",
            b"Upgrade: h2",
            b"X-Envoy-Upstream-Service-Time: 3",
            b"X-Envoy-Decorator-Operation: x",
        ],
    )
    def test_fields_of_the_upstreams_hop_are_not_forwarded(self, line: bytes) -> None:
        for lines in ([line, b"A: b", b"C: d"], [b"A: b", line, b"C: d"], [b"A: b", b"C: d", line]):
            assert response(*lines).block == b"\r\nA: b\r\nC: d"

    @pytest.mark.parametrize(
        ("lines", "kept"),
        [
            ([b"Connection: x-hop", b"X-Hop: 1", b"X-Hop-2: 1"], b"\r\nX-Hop-2: 1"),
            ([b"X-HOP: 1", b"Connection: close, X-hop ,y", b"Y: 2", b"Z: 3"], b"\r\nZ: 3"),
            ([b"Connection: x.hop", b"xxhop: 1"], b"\r\nxxhop: 1"),
            ([b"Connection: ,, ,", b"X: 1"], b"\r\nX: 1"),
        ],
    )
    def test_what_connection_names_goes_too(self, lines: list[bytes], kept: bytes) -> None:
        assert request(*lines).block == b"\r\nHost: a.example" + kept
        assert response(*lines).block == kept

    @pytest.mark.parametrize(
        "name", [b"Host", b"content-length", b"Authorization", b"cookie", b"x-forwarded-for", b"X-Request-Id"]
    )
    def test_naming_what_says_whose_request_it_is_is_refused(self, name: bytes) -> None:
        lines = [b"Connection: close, " + name]
        assert refusal(lambda: request(*lines)) == ("http1.invalid_connection_option", 400)
        assert refusal(lambda: response(*lines)) == ("upstream.invalid_connection_option", 502)

    def test_an_upstream_cannot_cut_into_another_field(self) -> None:
        """What looks like the usual spelling may be the beginning of another value."""
        head = response(b"Content-Length: 5", b"Connection: keep-alive0", b"Connection: keep-alive")
        assert (head.body, head.block) == (5, b"\r\nContent-Length: 5")

    @pytest.mark.parametrize("option", [b"host:a", b"x y", b'"close"', b"(x)", b"\xe9"])
    def test_an_option_that_is_no_token_names_no_field(self, option: bytes) -> None:
        """`Connection: host:a` must not remove `Host:a:80`."""
        try:
            head = request(b"Connection: " + option, host=b"Host:a:80")
        except RemoteProtocolError as error:
            assert error.status == 400
        else:
            assert head.block == b"\r\nHost:a:80"


class TestRequestLine:
    @pytest.mark.parametrize(
        ("start", "method", "path"),
        [
            (b"GET / HTTP/1.1", b"GET", b"/"),
            (b"BREW /a?b=c%20&d=\"'<>[]{}|\\^` HTTP/1.1", b"BREW", b"/a?b=c%20&d=\"'<>[]{}|\\^`"),
            (b"GET //a/../b HTTP/1.1", b"GET", b"//a/../b"),
            (b"OPTIONS * HTTP/1.1", b"OPTIONS", b"*"),
            (b"GET http://a.example HTTP/1.1", b"GET", b"/"),
            (b"GET HTTP://A.Example/x?y HTTP/1.1", b"GET", b"/x?y"),
            (b"GET https://a.example?y HTTP/1.1", b"GET", b"/?y"),
            (b"M!#$%&'*+-.^_`|~9 / HTTP/1.1", b"M!#$%&'*+-.^_`|~9", b"/"),
        ],
    )
    def test_method_and_target(self, start: bytes, method: bytes, path: bytes) -> None:
        head = request(start=start)
        assert (head.method, head.path, head.authority) == (method, path, b"a.example")

    def test_connect_names_host_and_port(self) -> None:
        head = request(start=b"CONNECT a.example:443 HTTP/1.1", host=b"Host: A.example:443")
        assert (head.method, head.path, head.authority) == (b"CONNECT", b"a.example:443", b"a.example:443")

    @pytest.mark.parametrize(
        ("host", "authority"),
        [
            (b"Host: A.Example", b"a.example"),
            (b"host:a.example:8080", b"a.example:8080"),
            (b"HOST: \t a \t", b"a"),
            (b"Host: [::1]:8080", b"[::1]:8080"),
            (b"Host: 10.0.0.1", b"10.0.0.1"),
            (b"Host: a_b.example", b"a_b.example"),
            (b"Host: a%2fb", b"a%2fb"),
        ],
    )
    def test_authority_is_the_host_in_lower_case(self, host: bytes, authority: bytes) -> None:
        for _ in range(2):  # the second time it is a known one
            head = request(host=host)
            assert (head.authority, head.block) == (authority, b"\r\n" + host)

    @pytest.mark.parametrize(
        ("host", "word"),
        [
            (None, "missing_host"),
            (b"Host:", "invalid_host"),
            (b"Host: a b", "invalid_host"),
            (b"Host: a,b", "invalid_host"),
            (b"Host: u@a", "invalid_host"),
            (b"Host: a/b", "invalid_host"),
            (b"Host: a:65536", "invalid_host"),
            (b"Host: a:", "invalid_host"),
            (b"Host: :80", "invalid_host"),
            (b"Host: ::1", "invalid_host"),
            (b"Host: [::1", "invalid_host"),
            (b"Host: a\xe9", "invalid_host"),
            (b"Host: " + b"a" * 301, "invalid_host"),
            (b"Host: a\r\nHost: a", "duplicate_host"),
        ],
    )
    def test_hosts_that_are_refused(self, host: bytes | None, word: str) -> None:
        assert refusal(lambda: request(host=host)) == (f"http1.{word}", 400)

    def test_flags(self) -> None:
        plain = request(b"Accept: */*")
        assert plain.is_plain and not (plain.expects_continue or plain.te_trailers or plain.has_request_id)
        head = request(
            b"Expect: 100-Continue",
            b"TE: trailers",
            b"X-Request-ID: 1",
            b"X-Forwarded-Proto: HTTPS",
            b"Content-Length: 1",
        )
        assert head.expects_continue and head.te_trailers and head.has_request_id
        assert head.forwarded_proto == b"https"
        assert request(b"X-Request-Id: 1").is_plain
        assert not request(b"Expect: 100-continue", start=b"GET / HTTP/1.0").expects_continue

    def test_client_certificate_fields_keep_their_case_and_are_one_list(self) -> None:
        head = request(b"X-Forwarded-Client-Cert: By=spiffe://A", b"x-forwarded-client-cert:Hash=aB ")
        assert head.xfcc == b"By=spiffe://A,Hash=aB"

    @pytest.mark.parametrize(
        ("wire", "word", "status"),
        [
            (b"GET / HTTP/2.0\r\n\r\n", "unsupported_version", 505),
            (b"GET / HTTP/1.2\r\n\r\n", "unsupported_version", 505),
            (b"GET / http/1.1\r\n\r\n", "invalid_request_line", 400),
            (b"GET  / HTTP/1.1\r\n\r\n", "invalid_request_line", 400),
            (b"GET /\r\n\r\n", "invalid_request_line", 400),
            (b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", "fragment_in_target", 400),
            (b"GET / HTTP/1.1\nHost: a\r\n\r\n", "bare_line_feed", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", "line_folding", 400),
            (b"GET / HTTP/1.1\r\nX : y\r\n\r\n", "invalid_header", 400),
            (b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n", "invalid_character", 400),
            (b"GET / HTTP/1.1\r\nX: a\rb\r\n\r\n", "invalid_character", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n", "unknown_expectation", 417),
            (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", "invalid_target", 400),
            (b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", "host_differs_from_target", 400),
            (b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES, "headers_too_large", 431),
            (b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", "headers_too_large", 431),
        ],
    )
    def test_refusals_say_why(self, wire: bytes, word: str, status: int) -> None:
        assert refusal(lambda: request_head(wire)) == (f"http1.{word}", status)

    def test_so_many_fields_and_no_more(self) -> None:
        lines = [b"x-%d: some value" % index for index in range(MAX_HEADERS - 1)]
        assert len(request(*lines).headers()) == MAX_HEADERS
        assert refusal(lambda: request(*lines, b"z: y")) == ("http1.headers_too_large", 431)

    def test_short_fields_are_counted_too(self) -> None:
        assert refusal(lambda: request(*[b"a:"] * MAX_HEADERS)) == ("http1.headers_too_large", 431)

    def test_a_head_may_begin_anywhere_in_what_arrived(self) -> None:
        wire = b"xx\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"
        at = skip_empty_lines(wire, 2)
        head = request_head(wire, at)
        assert at == 6
        assert head is not None and head.length == len(wire) - 6
        assert skip_empty_lines(b"\r\n\r") == 2


class TestResponse:
    @pytest.mark.parametrize(
        ("status", "lines", "is_head_request", "body"),
        [
            (200, [b"Content-Length: 5"], False, 5),
            (200, [b"Content-Length: 0"], False, 0),
            (200, [b"Transfer-Encoding: Chunked"], False, CHUNKED),
            (200, [], False, UNTIL_CLOSE),
            (500, [], False, UNTIL_CLOSE),
            (200, [b"Content-Length: 5"], True, NO_BODY),
            (200, [b"Transfer-Encoding: chunked"], True, NO_BODY),
            (200, [], True, NO_BODY),
            (304, [b"Content-Length: 5"], False, NO_BODY),
            (304, [], False, NO_BODY),
            (204, [], False, NO_BODY),
            (204, [b"Content-Length: 0"], False, NO_BODY),
            (100, [], False, NO_BODY),
            (103, [b"Link: x"], False, NO_BODY),
        ],
    )
    def test_how_long_the_body_is(self, status: int, lines: list[bytes], is_head_request: bool, body: int) -> None:
        head = response(*lines, start=b"HTTP/1.1 %d X" % status, is_head_request=is_head_request)
        assert (head.status, head.body) == (status, body)

    def test_the_length_of_what_was_not_sent_is_forwarded_where_it_means_something(self) -> None:
        length = b"\r\nContent-Length: 5"
        assert response(length[2:], is_head_request=True).block == length
        assert response(length[2:], start=b"HTTP/1.1 304 Not Modified").block == length
        assert response(b"Content-Length: 0", start=b"HTTP/1.1 204 No Content").block == b""

    @pytest.mark.parametrize(
        ("start", "lines", "word"),
        [
            (b"HTTP/1.1 200 OK", [b"Content-Length: 5", b"Content-Length: 5"], "duplicate_content_length"),
            (b"HTTP/1.1 200 OK", [b"Content-Length: 5,5"], "invalid_content_length"),
            (b"HTTP/1.1 200 OK", [b"Content-Length: +5"], "invalid_content_length"),
            (
                b"HTTP/1.1 200 OK",
                [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
                "content_length_with_transfer_encoding",
            ),
            (b"HTTP/1.1 200 OK", [b"Transfer-Encoding: gzip, chunked"], "invalid_transfer_encoding"),
            (b"HTTP/1.1 200 OK", [b"Transfer-Encoding: chunked"] * 2, "invalid_transfer_encoding"),
            (b"HTTP/1.0 200 OK", [b"Transfer-Encoding: chunked"], "invalid_transfer_encoding"),
            (b"HTTP/1.1 204 X", [b"Content-Length: 5"], "body_not_allowed"),
            (b"HTTP/1.1 204 X", [b"Transfer-Encoding: chunked"], "body_not_allowed"),
            (b"HTTP/1.1 101 X", [b"Content-Length: 5"], "body_not_allowed"),
            (b"HTTP/1.1 20 OK", [], "invalid_status_line"),
            (b"HTTP/1.1 2000 OK", [], "invalid_status_line"),
            (b"HTTP/1.1 099 OK", [], "invalid_status_line"),
            (b"HTTP/1.1  200 OK", [], "invalid_status_line"),
            (b"HTTP/2.0 200 OK", [], "invalid_status_line"),
            (b"ICY 200 OK", [], "invalid_status_line"),
            (b"HTTP/1.1 200 O\x00K", [], "invalid_character"),
            (b"HTTP/1.1 200 OK", [b"X: y", b" z"], "line_folding"),
            (b"HTTP/1.1 200 OK", [b"X : y"], "invalid_header"),
            (b"HTTP/1.1 200 OK", [b"X: a\nb"], "bare_line_feed"),
            (b"HTTP/1.1 200 OK", [b"X: some value"] * (MAX_HEADERS + 1), "headers_too_large"),
            (b"HTTP/1.1 200 OK", [b"a:"] * (MAX_HEADERS + 1), "headers_too_large"),
            (b"HTTP/1.1 200 OK", [b"X: " + b"a" * MAX_HEAD_BYTES], "headers_too_large"),
        ],
    )
    def test_refusals_are_a_bad_gateway(self, start: bytes, lines: list[bytes], word: str) -> None:
        assert refusal(lambda: response(*lines, start=start)) == (f"upstream.{word}", 502)

    @pytest.mark.parametrize("line", [b"\r\n", b"HTTP/1.1\r\n", b"HTTP/1.1 20\r\n"])
    def test_a_status_line_that_ends_early_is_refused_at_once(self, line: bytes) -> None:
        assert refusal(lambda: response_head(line, False)) == ("upstream.invalid_status_line", 502)

    @pytest.mark.parametrize(
        ("start", "reason"),
        [
            (b"HTTP/1.1 200 OK", b"OK"),
            (b"HTTP/1.1 200 ", b""),
            (b"HTTP/1.1 200", None),
            (b"HTTP/1.1 404 Not \xe9 Found", b"Not \xe9 Found"),
        ],
    )
    def test_reason(self, start: bytes, reason: bytes | None) -> None:
        assert response(b"Content-Length: 0", start=start).reason == reason


class TestBlocks:
    BLOCK = b"\r\nHost: a\r\nX-A:  1 \r\nx-a:2\r\nX-AB: 3\r\nEmpty:"

    def test_fields(self) -> None:
        assert fields(self.BLOCK) == [
            (b"host", b"a"),
            (b"x-a", b"1"),
            (b"x-a", b"2"),
            (b"x-ab", b"3"),
            (b"empty", b""),
        ]
        assert fields(b"") == []

    def test_the_first_value(self) -> None:
        assert find_field(self.BLOCK, b"x-a") == b"1"
        assert find_field(self.BLOCK, b"empty") == b""
        assert find_field(self.BLOCK, b"x") is None

    def test_removal(self) -> None:
        assert without_field(self.BLOCK, b"x-a") == b"\r\nHost: a\r\nX-AB: 3\r\nEmpty:"
        assert without_field(self.BLOCK, b"x.a") == self.BLOCK
        assert without_field(self.BLOCK, b"empty") == self.BLOCK[: -len(b"\r\nEmpty:")]

    def test_another_host(self) -> None:
        assert replace_host(self.BLOCK, b"b:80") == b"\r\nhost: b:80" + self.BLOCK[len(b"\r\nHost: a") :]


# ── laws ──

TOKEN = st.text("abXY-_!#09", min_size=1, max_size=6).map(str.encode)
VALUE = st.binary(max_size=8).map(lambda raw: bytes(byte for byte in raw if byte in b"\t" or 32 <= byte != 127))
FIELD = st.one_of(
    st.tuples(TOKEN, st.sampled_from([b":", b": ", b":\t"]), VALUE).map(b"".join),
    st.sampled_from(
        b"Content-Length: 5|content-length: 0|Transfer-Encoding: chunked|Connection: close|Connection: keep-alive"
        b"|Connection: x-a, close|Connection: x-b,|Upgrade: websocket|Expect: 100-continue|TE: trailers|Host: b"
        b"|X-A: 1".split(b"|")
    ),
)
REQUEST_LINE = st.tuples(
    st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"CONNECT", b"X!"]),
    st.sampled_from([b"/", b"/a?b", b"*", b"http://a/x", b"a:80", b"/#", b"/\xff"]),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2"]),
).map(b" ".join)
STATUS_LINE = st.tuples(
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0"]),
    st.sampled_from([b"200 OK", b"204", b"304 ", b"100 C", b"20"]),
).map(b" ".join)


def heads(start: st.SearchStrategy[bytes], host: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(start, st.lists(FIELD, max_size=5)).map(
        lambda pair: b"\r\n".join([pair[0], *host, *pair[1]]) + b"\r\n\r\n"
    )


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A head with up to two bytes changed, dropped or put in."""
    wire: bytes = draw(whole)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(wire)))
        byte = draw(st.sampled_from([b"", *(bytes([value]) for value in b"\r\n\t :,;\x00\x0b\x7f\x80/#A0")]))
        wire = wire[:at] + byte + wire[at + draw(st.integers(0, 1)) :]
    return wire


REQUESTS = heads(REQUEST_LINE, [b"Host: a"])
RESPONSES = heads(STATUS_LINE, [])
ANY_REQUEST = st.one_of(REQUESTS, damaged(REQUESTS), st.binary(max_size=60))
ANY_RESPONSE = st.one_of(RESPONSES, damaged(RESPONSES), st.binary(max_size=60))

Seen = dict[str, object] | None | str


def seen(parse: Callable[[bytes], RequestHead | ResponseHead | None], wire: bytes) -> Seen:
    """All of a head, None while it is not whole, or the status of a refusal. Anything else is a failure."""
    try:
        head = parse(wire)
    except RemoteProtocolError:
        return "refused"
    if head is None:
        return None
    return {name: getattr(head, name) for name in type(head).__slots__}


def arrives(parse: Callable[[bytes], RequestHead | ResponseHead | None], wire: bytes) -> Seen:
    """Byte by byte, as long as more is asked for."""
    found: Seen = None
    for end in range(len(wire) + 1):
        found = seen(parse, wire[:end])
        if found is not None:
            return found
    return found


def of_get(wire: bytes) -> ResponseHead | None:
    return response_head(wire, False)


def of_head(wire: bytes) -> ResponseHead | None:
    return response_head(wire, True)


@settings(max_examples=400)
@given(wire=ANY_REQUEST)
@example(wire=b"\r")
@example(wire=b"GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST")
def test_any_split_of_a_request_gives_the_same_result(wire: bytes) -> None:
    assert arrives(request_head, wire) == seen(request_head, wire)


@settings(max_examples=400)
@given(wire=ANY_RESPONSE)
@example(wire=b"HTTP/1.1 200\r\n\r\n")
def test_any_split_of_a_response_gives_the_same_result(wire: bytes) -> None:
    for parse in (of_get, of_head):
        whole = seen(parse, wire)
        assert arrives(parse, wire) == whole


@pytest.mark.parametrize(
    "wire",
    [
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 150 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * (MAX_HEADERS - 1) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (MAX_HEAD_BYTES - 32) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (MAX_HEAD_BYTES - 31) + b"\r\n\r\n",
    ],
    ids=["long target", "long value", "too many short fields", "as many as may be", "largest", "too large"],
)
def test_a_large_request_in_two_pieces_is_the_same_request(wire: bytes) -> None:
    whole = seen(request_head, wire)
    for cut in (len(wire) // 2, len(wire) - 1):
        first = seen(request_head, wire[:cut])
        assert first in (None, whole)


@given(wire=st.binary(max_size=300), at=st.integers(0, 5))
def test_junk_raises_nothing_but_a_protocol_error(wire: bytes, at: int) -> None:
    for parse in (request_head, of_get, of_head):
        try:
            parse(wire)
        except RemoteProtocolError:
            pass
    try:
        request_head(wire, at)
    except RemoteProtocolError:
        pass


def length_of(name: bytes, headers: list[tuple[bytes, bytes]]) -> int | None:
    return next((int(value) for key, value in headers if key == name), None)


@settings(max_examples=400)
@given(wire=ANY_REQUEST)
def test_whatever_request_is_accepted_another_implementation_reads_alike(wire: bytes) -> None:
    try:
        head = request_head(wire)
    except RemoteProtocolError:
        return
    if head is None:
        return
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    peer.receive_data(wire[: head.length])
    event = peer.next_event()
    assert isinstance(event, h11.Request)
    assert event.method == head.method
    assert event.http_version == b"1.%d" % head.minor
    line = wire.split(b" ", 2)
    assert event.target == line[1]
    assert head.path in (line[1], line[1].partition(b"//a")[2] or line[1])
    headers = list(event.headers)
    assert fields(b"\r\n" + wire[: head.length - 4].partition(b"\r\n")[2]) == headers
    assert (b"host", head.authority) in [(name, value.lower()) for name, value in headers]
    is_chunked = any(name == b"transfer-encoding" for name, _ in headers)
    assert head.body == (CHUNKED if is_chunked else length_of(b"content-length", headers) or NO_BODY)
    follows = peer.next_event()
    if head.body == NO_BODY and head.method != b"CONNECT":
        assert isinstance(follows, h11.EndOfMessage)
        if head.minor == 1 and find_field(head.lowered, b"upgrade") is None:
            assert (peer.their_state is h11.MUST_CLOSE) is not head.keeps_alive
    # What is forwarded is a part of what came, in order, and frames the body as it was framed here.
    left = iter(headers)
    assert all(any(line == other for other in left) for line in head.headers())
    assert length_of(b"content-length", head.headers()) == length_of(b"content-length", headers)


@settings(max_examples=400)
@given(wire=ANY_RESPONSE, is_head_request=st.booleans())
def test_whatever_response_is_accepted_another_implementation_reads_alike(wire: bytes, is_head_request: bool) -> None:
    try:
        head = response_head(wire, is_head_request)
    except RemoteProtocolError:
        return
    if head is None or head.status == 101:
        return
    peer = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    method = "HEAD" if is_head_request else "GET"
    peer.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(wire[: head.length])
    event = peer.next_event()
    assert isinstance(event, h11.Response | h11.InformationalResponse)
    assert event.status_code == head.status
    assert bytes(event.reason) == (head.reason or b"")
    headers = list(event.headers)
    if isinstance(event, h11.Response):
        follows = peer.next_event()
        if head.body == NO_BODY or head.body == 0:
            assert isinstance(follows, h11.EndOfMessage)
        else:
            assert follows is h11.NEED_DATA
    left = iter(headers)
    assert all(any(line == other for other in left) for line in head.headers())
    if head.status >= 200 and head.status != 204:
        assert length_of(b"content-length", head.headers()) == length_of(b"content-length", headers)


@pytest.mark.parametrize(("name", "data", "status"), MALFORMED, ids=[case[0] for case in MALFORMED])
def test_malformed_heads_are_refused_or_never_whole(name: str, data: bytes, status: int) -> None:
    """Those whose head is well formed are refused by their body, which test_chunked and the live worker look at."""
    if name.startswith(("chunk_", "last_chunk_", "trailer_", "target_request_inside")):
        return
    found = seen(request_head, data)
    assert found in ("refused", None)
    if len(data) < 3000:
        assert arrives(request_head, data) == found


@pytest.mark.parametrize(("name", "data"), LEGAL, ids=[case[0] for case in LEGAL])
def test_odd_but_legal_heads_are_taken(name: str, data: bytes) -> None:
    wire = data[skip_empty_lines(data) :]
    whole = seen(request_head, wire)
    assert isinstance(whole, dict)
    assert arrives(request_head, wire) == whole


@pytest.mark.parametrize(
    "wire",
    [
        b"GET / HTTP/1.1\r\n" + b"a:" * 25_000 + b"\r",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9_000 + b"\x00",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a" * 50_000,
        b"GET / HTTP/1.1\r\nX:" + b" " * 50_000 + b"\x00",
        b"GET / HTTP/1.1\r\nConnection: " + b"x," * 25_000 + b"\r\nX\x00",
        b"A" * 8_000,
        b"\r\n" * 25_000 + b"GET",
        b"GET " + b"http://" * 1_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + b"a%2f" * 70 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + b"%2" * 149 + b"\r\n\r\n",
    ],
    ids=range(10),
)
def test_heads_made_to_be_slow_are_not(wire: bytes) -> None:
    """Were matching not linear, one of these would outlast the suite's time limit many times over."""
    seen(request_head, wire[skip_empty_lines(wire) :])
    seen(of_get, wire.replace(b"GET / HTTP/1.1", b"HTTP/1.1 200 OK"))


def test_a_head_under_another_request_id_is_the_same_otherwise() -> None:
    head = request_head(b"POST /p HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nContent-Length: 3\r\nX-Mine: 1\r\n\r\n")
    assert head is not None
    other = head.with_request_id(b"0-1")
    assert other.has_request_id and not head.has_request_id
    assert other.block == head.block + b"\r\nx-request-id: 0-1"
    differ = {"block", "received", "lowered", "length", "has_request_id"}
    for field in set(RequestHead.__slots__) - differ:
        assert getattr(other, field) == getattr(head, field), field
