"""Messages as a server must take them: RFC 9113 §8.1–8.3 and §8.5. A malformed request is a stream error of type
PROTOCOL_ERROR (§8.1.1), or is answered with 4xx; other streams go on, and nothing of it reaches the origin as a
request."""

from collections.abc import Iterator

import pytest

from tests.conformance.http2_peer import (
    Case,
    answer,
    answered,
    goes_on,
    malformed,
    params,
    proxy,
    run,
    serves,
)
from tests.support.http2_client import (
    DATA,
    END_STREAM,
    PADDED,
    Field,
    Http2Client,
    Stream,
    data_frame,
    headers_frame,
    raw_frame,
    request,
)
from tests.support.origin import Origin, Seen

BODY = data_frame(1, b"body")


def bad(*fields: Field, method: str = "GET", end_stream: bool = True) -> bytes:
    return headers_frame(1, request("/bad", *fields, method=method), end_stream)


def fine(*fields: Field, method: str = "GET", path: str = "/", end_stream: bool = True) -> bytes:
    return headers_frame(1, request(path, *fields, method=method), end_stream)


def message_framing() -> Iterator[Case]:
    open_bad, open_fine = bad(method="POST", end_stream=False), fine(method="POST", end_stream=False)
    trailers = headers_frame(1, [(b"x-trailer", b"1")])
    yield Case("8.1", "headers_data_trailers", (open_fine, data_frame(1, b"a", False), trailers), serves(1))
    yield Case("8.1", "headers_trailers", (open_fine, trailers), serves(1))
    yield Case("8.1", "empty_trailers", (open_fine, headers_frame(1, b"")), serves(1))
    yield Case(
        "8.1",
        "second_headers_without_end_stream",
        (open_bad, headers_frame(1, [(b"x-trailer", b"1")], end_stream=False)),
        malformed(1),
    )
    yield Case(
        "8.1",
        "second_headers_without_end_stream_behind_data",
        (open_bad, data_frame(1, b"a", False), headers_frame(1, [(b"x-trailer", b"1")], end_stream=False), BODY),
        malformed(1),
    )
    yield Case(
        "8.1",
        "second_request_on_the_stream",
        (open_bad, headers_frame(1, request("/bad2"), end_stream=False), headers_frame(1, request("/bad3"))),
        malformed(1),
    )
    for name, fields in (
        ("method", [(b":method", b"GET")]),
        ("path_behind_a_field", [(b"x-trailer", b"1"), (b":path", b"/")]),
        ("status", [(b":status", b"200")]),
        ("unknown", [(b":x", b"y")]),
        ("a_whole_request", request("/bad2")),
    ):
        yield Case("8.1", f"trailers_with_pseudo_field_{name}", (open_bad, headers_frame(1, fields)), malformed(1))
    for name, field in (
        ("uppercase_name", (b"X-Trailer", b"1")),
        ("connection", (b"connection", b"x")),
        ("transfer_encoding", (b"transfer-encoding", b"chunked")),
        ("line_feed_in_a_value", (b"x", b"a\nb")),
        ("line_break_in_a_name", (b"x: y\r\nz", b"a")),
        ("empty_name", (b"", b"a")),
    ):
        yield Case("8.1.1", f"trailers_with_{name}", (open_bad, headers_frame(1, [field])), malformed(1))


def content_lengths() -> Iterator[Case]:
    def length(value: bytes) -> Field:
        return (b"content-length", value)

    def upload(*lengths: bytes) -> bytes:
        return bad(*map(length, lengths), method="POST", end_stream=False)

    part = data_frame(1, b"bo", False)
    for name, steps in (
        ("less_than_the_body", (upload(b"3"), BODY)),
        ("more_than_the_body", (upload(b"5"), BODY)),
        ("more_than_two_frames", (upload(b"5"), part, data_frame(1, b"dy"))),
        ("less_than_two_frames", (upload(b"3"), part, data_frame(1, b"dy"))),
        # Whole for HTTP/1.1 as soon as its head is: it may reach the origin, what follows may not.
        ("0_and_a_body", (fine(length(b"0"), method="POST", end_stream=False), BODY)),
        ("1_and_an_empty_body", (upload(b"1"), data_frame(1))),
        ("4_and_no_body", (bad(length(b"4"), method="POST"),)),
        ("4_and_no_body_of_a_get", (bad(length(b"4")),)),
        (
            "more_than_the_body_with_trailers",
            (upload(b"5"), data_frame(1, b"body", False), headers_frame(1, [(b"x", b"y")])),
        ),
        ("less_than_the_body_so_far", (upload(b"1"), data_frame(1, b"body", False))),
        (
            "0_and_a_request_for_body",
            (
                fine(length(b"0"), method="POST", end_stream=False),
                data_frame(1, b"GET /bad HTTP/1.1\r\nhost: a\r\n\r\n"),
            ),
        ),
        ("two_that_differ", (upload(b"4", b"5"), BODY)),
        ("with_a_sign", (upload(b"+4"), BODY)),
        ("negative", (upload(b"-4"), BODY)),
        ("in_hex", (upload(b"0x4"), BODY)),
        ("with_a_space_inside", (upload(b"4 4"), BODY)),
        ("empty", (upload(b""), BODY)),
        ("no_number", (upload(b"four"), BODY)),
        ("of_other_digits", (upload("٤".encode()), BODY)),
        ("over_2_64", (upload(b"18446744073709551620"), BODY)),
        ("with_padding_counted", (upload(b"6"), raw_frame(DATA, END_STREAM | PADDED, 1, b"\x01body\x00"))),
    ):
        yield Case("8.1.1", f"content_length_{name}", steps, malformed(1))
    four = length(b"4")
    yield Case("8.1.1", "content_length_that_is_right", (fine(four, method="POST", end_stream=False), BODY), serves(1))
    yield Case(
        "8.1.1",
        "content_length_that_is_right_in_two_frames_and_a_last_empty_one",
        (fine(four, method="POST", end_stream=False), part, data_frame(1, b"dy", False), data_frame(1)),
        serves(1),
    )
    yield Case(
        "8.1.1",
        "content_length_that_is_right_without_padding",
        (fine(four, method="POST", end_stream=False), raw_frame(DATA, END_STREAM | PADDED, 1, b"\x01body\x00")),
        serves(1),
    )
    yield Case("8.1.1", "content_length_0_of_no_body", (fine(length(b"0"), method="POST"),), serves(1))
    yield Case(
        "8.1.1",
        "content_length_0_of_an_empty_body",
        (fine(length(b"0"), method="POST", end_stream=False), data_frame(1)),
        serves(1),
    )


def field_validity() -> Iterator[Case]:
    names = {
        "uppercase": b"X-a",
        "uppercase_inside": b"x-A",
        "uppercase_all": b"X",
        "empty": b"",
        "colon_inside": b"x:a",
        "colon_at_the_end": b"x:",
        "two_colons_in_front": b"::x",
        "line_break_and_field": b"x: y\r\nz",
        "request_inside": b"x: y\r\n\r\nGET /bad2 HTTP/1.1\r\nhost: a.example\r\nx",
    }
    names |= {f"byte_{byte:#04x}": b"x%ca" % byte for byte in (*range(0x21), 0x7F, 0x80, 0xA0, 0xC3, 0xFF)}
    # Not a token of RFC 9110 §5.1 (a SHOULD in §8.2.1).
    names |= {f"delimiter_{byte:#04x}": b"x%ca" % byte for byte in b'"(),/;<=>?@[\\]{}'}
    names |= {"space_in_front": b" x", "space_behind": b"x ", "tab_behind": b"x\t"}
    for what, name in names.items():
        yield Case("8.2.1", f"name_{what}", (bad((name, b"v")),), malformed(1))
    values = {
        "nul": b"a\0b",
        "line_feed": b"a\nb",
        "carriage_return": b"a\rb",
        "line_break_and_field": b"a\r\ntransfer-encoding: chunked",
        "request_inside": b"a\r\n\r\nGET /bad2 HTTP/1.1\r\nhost: a.example\r\n\r\n",
        "nul_alone": b"\0",
        "line_feed_in_front": b"\na",
        "line_feed_behind": b"a\n",
        "carriage_return_behind": b"a\r",
        "fold": b"a\r\n b",
        "space_in_front": b" a",
        "space_behind": b"a ",
        "tab_in_front": b"\ta",
        "tab_behind": b"a\t",
        "space_alone": b" ",
    }
    for what, value in values.items():
        yield Case("8.2.1", f"value_{what}", (bad((b"x-a", value)),), malformed(1))
        yield Case("8.2.1", f"cookie_{what}", (bad((b"cookie", value)),), malformed(1))
        yield Case(
            "8.2.1",
            f"trailer_{what}",
            (bad(method="POST", end_stream=False), headers_frame(1, [(b"x-a", value)])),
            malformed(1),
        )
    for what, value in (
        ("empty", b""),
        ("space_and_tab_inside", b"a \tb"),
        ("obs_text", b"\x80\xff"),
        ("utf8", "é€".encode()),
        ("colon", b":a: b"),
        ("quotes", b'"a, b"'),
    ):
        yield Case("8.2.1", f"good_value_{what}", (fine((b"x-a", value)),), serves(1))
    for name in (b"x", b"0", b"!#$%&'*+-.^_`|~", b"x_a", b"x.a"):
        yield Case("8.2.1", f"good_name_{name.decode()}", (fine((name, b"v")),), serves(1))


def connection_fields() -> Iterator[Case]:
    for name, value in (
        (b"connection", b"close"),
        (b"connection", b"keep-alive"),
        (b"connection", b"x-a"),
        (b"connection", b""),
        (b"proxy-connection", b"keep-alive"),
        (b"keep-alive", b"timeout=5"),
        (b"transfer-encoding", b"chunked"),
        (b"transfer-encoding", b"identity"),
        (b"transfer-encoding", b""),
        (b"upgrade", b"h2c"),
        (b"upgrade", b"websocket"),
        (b"te", b"gzip"),
        (b"te", b"trailers, gzip"),
        (b"te", b"trailers;q=1"),
        (b"te", b""),
    ):
        what = f"{name.decode()}_{value.decode() or 'empty'}"
        yield Case("8.2.2", what, (bad((name, value)),), malformed(1))
    yield Case(
        "8.2.2",
        "transfer_encoding_with_a_body",
        (
            bad((b"transfer-encoding", b"chunked"), method="POST", end_stream=False),
            data_frame(1, b"0\r\n\r\nGET /bad2 HTTP/1.1\r\n\r\n"),
        ),
        malformed(1),
    )
    yield Case("8.2.2", "te_trailers_and_another_te", (bad((b"te", b"trailers"), (b"te", b"gzip")),), malformed(1))
    yield Case("8.2.2", "te_trailers", (fine((b"te", b"trailers")),), serves(1))


def pseudo_fields() -> Iterator[Case]:
    m, s, a, p = request("/bad")
    for what, fields in (
        ("unknown", [m, s, a, p, (b":x", b"y")]),
        ("status_in_a_request", [m, s, a, p, (b":status", b"200")]),
        ("colon_alone", [m, s, a, p, (b":", b"y")]),
        ("protocol_without_connect", [m, s, a, p, (b":protocol", b"websocket")]),
        ("uppercase_method", [(b":Method", b"GET"), s, a, p]),
        ("path_behind_a_field", [m, s, a, (b"x-a", b"b"), p]),
        ("authority_behind_a_field", [m, s, p, (b"x-a", b"b"), a]),
        ("method_behind_all_fields", [s, a, p, (b"x-a", b"b"), m]),
        ("second_method_behind_a_field", [m, s, a, p, (b"x-a", b"b"), m]),
        ("two_methods", [m, m, s, a, p]),
        ("two_methods_that_differ", [m, (b":method", b"POST"), s, a, p]),
        ("two_schemes", [m, s, s, a, p]),
        ("two_authorities", [m, s, a, a, p]),
        ("two_paths", [m, s, a, p, p]),
        ("two_paths_that_differ", [m, s, a, p, (b":path", b"/bad2")]),
    ):
        yield Case("8.3", what, (headers_frame(1, fields),), malformed(1))
    for what, fields in (
        ("no_method", [s, a, p]),
        ("no_scheme", [m, a, p]),
        ("no_path", [m, s, a]),
        ("no_pseudo_field_at_all", [(b"host", b"a.example")]),
        ("no_authority_and_no_host", [m, s, p]),
        ("empty_method", [(b":method", b""), s, a, p]),
        ("empty_scheme", [m, (b":scheme", b""), a, p]),
        ("empty_path", [m, s, a, (b":path", b"")]),
        ("empty_path_of_options", [(b":method", b"OPTIONS"), s, a, (b":path", b"")]),
        ("empty_authority", [m, s, (b":authority", b""), p]),
        ("empty_authority_and_a_host", [m, s, (b":authority", b""), p, (b"host", b"b.example")]),
        ("host_differs_from_authority", [m, s, a, p, (b"host", b"b.example")]),
        ("host_differs_by_its_port", [m, s, a, p, (b"host", b"a.example:81")]),
        ("two_hosts", [m, s, p, (b"host", b"a.example"), (b"host", b"b.example")]),
        ("host_like_authority_and_another", [m, s, a, p, (b"host", b"a.example"), (b"host", b"b.example")]),
        ("empty_host", [m, s, p, (b"host", b"")]),
    ):
        yield Case("8.3.1", what, (headers_frame(1, fields),), malformed(1))
    for name, values in (
        (
            b":method",
            {
                "space": b"GE T",
                "line_break": b"GET /bad2 HTTP/1.1\r\nx: y\r\n",
                "nul": b"GET\0",
                "slash": b"GET/",
                "space_behind": b"GET ",
                "high_byte": b"GE\xff",
            },
        ),
        (
            b":scheme",
            {
                "space": b"ht tp",
                "line_break": b"http\r\nx: y",
                "nul": b"http\0",
                "slashes": b"http://",
                "url": b"http://b.example/?",
                "digit_in_front": b"1http",
            },
        ),
        (
            b":authority",
            {
                "userinfo": b"user@a.example",
                "userinfo_with_password": b"u:p@a.example",
                "space": b"a.example b",
                "line_break": b"a.example\r\nx: y",
                "nul": b"a.example\0",
                "slash": b"a.example/bad2",
                "no_port": b"a.example:b",
                "two_ports": b"a.example:80:81",
                "query": b"a.example?x",
                "fragment": b"a.example#x",
                "high_byte": b"a.example\xff",
                "backslash": b"a.example\\b",
                "space_in_front": b" a.example",
            },
        ),
        (
            b":path",
            {
                "space": b"/bad x",
                "request_line": b"/bad HTTP/1.1\r\nx: y\r\n\r\nGET /bad2",
                "line_feed": b"/bad\nx",
                "nul": b"/bad\0",
                "tab": b"/bad\tx",
                "delete": b"/bad\x7f",
                "fragment": b"/bad#x",
                "no_slash": b"bad",
                "query_alone": b"?x=/bad",
                "url": b"http://b.example/bad",
                "asterisk_of_get": b"*",
                "asterisk_and_more": b"*/bad",
                "space_behind": b"/bad ",
                "space_in_front": b" /bad",
            },
        ),
    ):
        for what, value in values.items():
            fields = [(n, value if n == name else v) for n, v in request("/bad")]
            yield Case("8.3.1", f"{name[1:].decode()}_with_{what}", (headers_frame(1, fields),), malformed(1))


def connects() -> Iterator[Case]:
    connect, authority = (b":method", b"CONNECT"), (b":authority", b"a.example:80")
    scheme, path, protocol = (b":scheme", b"http"), (b":path", b"/bad"), (b":protocol", b"websocket")
    for what, fields in (
        ("with_scheme_and_path", [connect, scheme, authority, path]),
        ("with_a_path", [connect, authority, path]),
        ("with_a_scheme", [connect, scheme, authority]),
        ("without_an_authority", [connect]),
        ("with_an_empty_authority", [connect, (b":authority", b"")]),
        ("with_a_path_for_authority", [connect, (b":authority", b"/bad")]),
    ):
        yield Case("8.5", f"connect_{what}", (headers_frame(1, fields, end_stream=False),), malformed(1))
        yield Case("8.5", f"connect_{what}_and_end_stream", (headers_frame(1, fields),), malformed(1))
    yield Case(
        "8.5",
        "connect_is_refused_and_the_connection_goes_on",
        (headers_frame(1, [connect, authority], False),),
        refused,
    )
    yield Case(
        "8.3",
        "extended_connect_without_a_path",
        (headers_frame(1, [connect, protocol, scheme, authority], False),),
        malformed(1),
    )
    yield Case(
        "8.3",
        "extended_connect_without_a_scheme",
        (headers_frame(1, [connect, protocol, authority, path], False),),
        malformed(1),
    )
    yield Case(
        "8.3",
        "extended_connect_with_an_empty_protocol",
        (headers_frame(1, [connect, (b":protocol", b""), scheme, authority, path], False),),
        malformed(1),
    )


async def refused(client: Http2Client) -> None:
    """Answered with an error, or reset: this proxy is nobody's way to the world."""
    stream = client.streams.setdefault(1, Stream())
    await client.until(lambda: stream.reset is not None or stream.blocks, "a refusal")
    if stream.blocks:
        assert int(dict(stream.blocks[0])[b":status"]) >= 400
    await goes_on(client)


CASES = [*message_framing(), *content_lengths(), *field_validity(), *connection_fields(), *pseudo_fields(), *connects()]


@pytest.mark.parametrize("case", params(CASES))
async def test_receiver(case: Case) -> None:
    await run(case)


async def forwarded(*frames: bytes) -> Seen:
    """What the origin sees of the request on stream 1, which is answered with 200."""
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port) as client:
        await client.handshake()
        client.send(*frames)
        await answered(1)(client)
        await goes_on(client)
        assert origin.errors == []
        first, _ = origin.requests
        return first


async def test_8_2_3_cookies_are_joined_for_http1() -> None:
    seen = await forwarded(fine((b"cookie", b"a=b"), (b"x", b"y"), (b"cookie", b"c=d; e=f"), (b"cookie", b"g=h")))
    assert [value for name, value in seen.headers if name == b"cookie"] == [b"a=b; c=d; e=f; g=h"]


async def test_8_3_1_host_is_made_from_authority() -> None:
    seen = await forwarded(headers_frame(1, request("/", authority="a.example:8080")))
    assert [value for name, value in seen.headers if name == b"host"] == [b"a.example:8080"]


async def test_8_3_1_host_that_says_the_same_is_taken_once() -> None:
    seen = await forwarded(fine((b"host", b"a.example")))
    assert [value for name, value in seen.headers if name == b"host"] == [b"a.example"]


async def test_8_3_1_host_stands_in_for_an_absent_authority() -> None:
    fields = [field for field in request("/", (b"host", b"b.example")) if field[0] != b":authority"]
    seen = await forwarded(headers_frame(1, fields))
    assert [value for name, value in seen.headers if name == b"host"] == [b"b.example"]


async def test_8_3_1_asterisk_of_options() -> None:
    seen = await forwarded(fine(method="OPTIONS", path="*"))
    assert (seen.method, seen.target) == (b"OPTIONS", b"*")


@pytest.mark.parametrize("path", ["/a?b=c", "/%2F%00", "//a", "/a/../b", "/?", "/a;b=c,d", "/~!$&'()*+,;=:@-._"])
async def test_8_3_1_path_and_query_are_forwarded_as_they_are(path: str) -> None:
    assert (await forwarded(fine(path=path))).target == path.encode()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "PURGE", "get", "M-SEARCH"])
async def test_8_3_1_method_is_forwarded_as_it_is(method: str) -> None:
    assert (await forwarded(fine(method=method))).method == method.encode()


async def test_8_1_body_and_trailers_are_forwarded() -> None:
    seen = await forwarded(
        fine((b"trailer", b"x-t"), (b"te", b"trailers"), method="POST", end_stream=False),
        data_frame(1, b"bo", False),
        data_frame(1, b"dy", False),
        headers_frame(1, [(b"x-t", b"1")]),
    )
    assert (seen.body, seen.trailers) == (b"body", [(b"x-t", b"1")])


async def test_8_1_request_with_an_unknown_length_is_chunked_and_one_without_a_body_is_not() -> None:
    seen = await forwarded(fine(method="POST", end_stream=False), data_frame(1, b"body"))
    assert (seen.body, seen.header(b"transfer-encoding"), seen.header(b"content-length")) == (b"body", b"chunked", None)
    seen = await forwarded(fine())
    assert (seen.body, seen.header(b"transfer-encoding")) == (b"", None)


async def test_8_2_2_nothing_of_http2_reaches_the_origin() -> None:
    seen = await forwarded(fine((b"te", b"trailers"), (b"x-a", b"b")))
    names = [name for name, _ in seen.headers]
    assert not [name for name in names if name.startswith(b":")]
    assert b"x-a" in names
