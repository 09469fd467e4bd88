"""HTTP/2 requests that would be another request, or several, to an HTTP/1.1 hop, each to be refused (RFC 9113 §8).

What HTTP/2 carries as bytes, HTTP/1.1 delimits: what is a field there may end a line, a head or a body here. Sources of
the categories: RFC 9113 §8.1 to §8.3, §10.3; "HTTP/2: The Sequel is Always Worse" (2021); CVE-2025-57804. The requests
are ours.

A case is (name, parts). The parts are what is sent on a stream one after another: fields are HEADERS, bytes are DATA,
and the last one ends the stream. ODD are legal, if odd, and must arrive as one request each: their third part says what
of it (method, target, body, trailers) or which fields, by name; None: no such field.
"""

from tests.support.http2_client import Field, request

Parts = tuple[list[Field] | bytes, ...]

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: a.example\r\n\r\n"


def get(*fields: Field) -> Parts:
    return (request("/bad", *fields),)


def post(*fields: Field, body: tuple[bytes, ...] = (b"x",), trailers: list[Field] | None = None) -> Parts:
    return (request("/bad", *fields, method="POST"), *body, *([] if trailers is None else [trailers]))


def pseudo(**values: bytes | None) -> Parts:
    """A GET with these pseudo-header fields, in this order where they are among the four; None: without it."""
    fields = {b":method": b"GET", b":scheme": b"http", b":authority": b"a.example", b":path": b"/bad"}
    fields |= {b":" + name.encode(): value for name, value in values.items() if value is not None}
    return ([(name, value) for name, value in fields.items() if values.get(name[1:].decode(), b"") is not None],)


def length(*values: bytes) -> tuple[Field, ...]:
    return tuple((b"content-length", value) for value in values)


WITHOUT_AUTHORITY = [field for field in request("/bad") if field[0] != b":authority"]
_CONTROLS = {"cr_lf": b"\r\n", "lf": b"\n", "cr": b"\r", "nul": b"\0", "lf_lf": b"\n\n", "cr_lf_cr_lf": b"\r\n\r\n"}

MALFORMED: list[tuple[str, Parts]] = [
    # ── framing that HTTP/2 does not have ──
    ("transfer_encoding_chunked", post((b"transfer-encoding", b"chunked"), body=(b"0\r\n\r\n" + SMUGGLED,))),
    ("transfer_encoding_chunked_without_body", get((b"transfer-encoding", b"chunked"))),
    ("transfer_encoding_identity", post((b"transfer-encoding", b"identity"))),
    ("transfer_encoding_empty", post((b"transfer-encoding", b""))),
    ("transfer_encoding_and_length", post((b"transfer-encoding", b"chunked"), *length(b"5"), body=(b"0\r\n\r\n",))),
    # ── lengths ──
    ("length_0_and_a_body", post(*length(b"0"), body=(SMUGGLED,))),
    ("length_0_and_a_body_later", post(*length(b"0"), body=(b"", b"", SMUGGLED))),
    ("length_0_and_a_body_and_trailers", post(*length(b"0"), body=(SMUGGLED,), trailers=[(b"a", b"b")])),
    ("length_without_body", get(*length(b"5"))),
    ("length_and_only_trailers", post(*length(b"5"), body=(), trailers=[(b"a", b"b")])),
    ("length_and_an_empty_body", post(*length(b"5"), body=(b"",))),
    ("two_equal_lengths", post(*length(b"1", b"1"))),
    ("two_lengths", post(*length(b"1", b"2"))),
    ("two_lengths_in_one", post(*length(b"1, 1"))),
    *((f"length_{name}", post(*length(value))) for name, value in {
        "with_plus": b"+1", "negative": b"-1", "hexadecimal": b"0x1", "with_point": b"1.0", "with_exponent": b"1e0",
        "with_underscore": b"1_0", "in_other_digits": "१".encode(), "empty": b"", "with_letter": b"1a",
        "over_64_bits": b"18446744073709551617", "with_semicolon": b"1;", "quoted": b'"1"',
    }.items()),
    # ── line breaks and NUL ──
    *((f"value_with_{name}", get((b"foo", b"b" + control + b"te: chunked"))) for name, control in _CONTROLS.items()),
    *((f"value_ends_in_{name}", get((b"foo", b"b" + control))) for name, control in _CONTROLS.items()),
    *((f"value_begins_with_{name}", get((b"foo", control + b"b"))) for name, control in _CONTROLS.items()),
    *((f"value_is_{name}", get((b"foo", control))) for name, control in _CONTROLS.items()),
    ("value_with_a_request", get((b"foo", b"b\r\n\r\n" + SMUGGLED))),
    ("value_with_a_request_after_lf", get((b"foo", b"b\n\n" + SMUGGLED.replace(b"\r", b"")))),
    ("cookie_with_a_request", get((b"cookie", b"a=b"), (b"cookie", b"c=d\r\n\r\n" + SMUGGLED))),
    ("te_with_a_field", get((b"te", b"trailers\r\nfoo: b"))),
    ("expect_with_a_field", get((b"expect", b"100-continue\r\nfoo: b"))),
    *((f"name_with_{name}", get((b"foo: b" + control + b"bar", b"c"))) for name, control in _CONTROLS.items()),
    *((f"name_ends_in_{name}", get((b"foo" + control, b"c"))) for name, control in _CONTROLS.items()),
    ("name_with_a_request", get((b"foo: b\r\n\r\n" + SMUGGLED + b"x", b"c"))),
    # ── names ──
    ("name_empty", get((b"", b"b"))),
    ("name_empty_value_with_colon", get((b"", b"transfer-encoding: chunked"))),
    ("name_upper_case", get((b"Foo", b"b"))),
    ("name_upper_case_transfer_encoding", get((b"Transfer-Encoding", b"chunked"))),
    *((f"name_with_{name}", get((b"foo" + byte + b"bar", b"c"))) for name, byte in {
        "space": b" ", "tab": b"\t", "colon": b":", "high_byte": b"\xc3", "delete": b"\x7f", "comma": b",",
        "slash": b"/", "bell": b"\x07", "brace": b"{",
    }.items()),
    ("name_ends_in_space", get((b"transfer-encoding ", b"chunked"))),
    ("name_ends_in_colon", get((b"transfer-encoding:", b"chunked"))),
    ("name_begins_with_space", get((b" transfer-encoding", b"chunked"))),
    # ── values ──
    *((f"value_{where}_{name}", get((b"foo", value))) for name, blank in {"space": b" ", "tab": b"\t"}.items()
      for where, value in {"begins_with": blank + b"b", "ends_in": b"b" + blank, "is": blank}.items()),
    ("length_ends_in_space", post(*length(b"1 "))),
    ("length_begins_with_tab", post(*length(b"\t1"))),
    ("value_with_bell", get((b"foo", b"a\x07b"))),
    ("value_with_delete", get((b"foo", b"a\x7fb"))),
    ("value_with_escape", get((b"foo", b"a\x1bb"))),
    # ── pseudo-header fields ──
    *((f"no_{name}", pseudo(**{name: None})) for name in ("method", "scheme", "path", "authority")),
    *((f"empty_{name}", pseudo(**{name: b""})) for name in ("method", "scheme", "path", "authority")),
    *((f"two_{name[1:].decode()}s", ([*request("/bad")[:4], (name, value)],)) for name, value in request("/bad")),
    ("an_unknown_one", pseudo(foo=b"b")),
    ("status_of_a_response", pseudo(status=b"200")),
    ("protocol_without_connect", pseudo(protocol=b"websocket")),
    ("one_after_a_field", ([*request("/bad")[:3], (b"foo", b"b"), (b":path", b"/bad")],)),
    ("method_after_a_field", ([*request("/bad")[1:], (b"foo", b"b"), (b":method", b"GET")],)),
    *((f"method_{name}", pseudo(method=value)) for name, value in {
        "with_a_request": b"GET /smuggled HTTP/1.1\r\nx: y", "with_space": b"GET /x", "ends_in_space": b"GET ",
        "begins_with_space": b" GET", "with_lf": b"GET\n", "with_nul": b"GET\0", "with_colon": b"GET:",
        "with_tab": b"G\tT", "with_high_byte": b"G\xc3T",
    }.items()),
    *((f"path_{name}", pseudo(path=value)) for name, value in {
        "with_a_request": b"/bad HTTP/1.1\r\nhost: b.example\r\n\r\nGET /smuggled", "with_space": b"/bad HTTP/1.0",
        "with_lf": b"/bad\n", "with_cr": b"/bad\r", "with_nul": b"/bad\0", "with_tab": b"/bad\t",
        "ends_in_space": b"/bad ", "begins_with_space": b" /bad", "without_slash": b"bad",
        "absolute": b"http://b.example/bad", "with_fragment": b"/bad#x", "asterisk_with_get": b"*",
        "of_authority_form": b"a.example:80", "with_high_byte": b"/bad\xc3\xa9",
        "with_delete": b"/bad\x7f", "query_alone": b"?bad",
    }.items()),
    *((f"scheme_{name}", pseudo(scheme=value)) for name, value in {
        "with_a_host": b"http://evil/x?", "with_lf": b"http\n", "with_cr_lf": b"http\r\nfoo: b",
        "with_space": b"http x", "unknown": b"ftp", "with_colon": b"http:", "with_nul": b"http\0",
    }.items()),
    *((f"authority_{name}", pseudo(authority=value)) for name, value in {
        "with_a_field": b"a.example\r\nfoo: b", "with_lf": b"a.example\n", "with_nul": b"a.example\0",
        "with_user": b"user@a.example", "with_password": b"user:word@a.example", "with_space": b"a.example b",
        "ends_in_space": b"a.example ", "begins_with_space": b" a.example", "with_path": b"a.example/bad",
        "of_two": b"a.example,b.example", "with_query": b"a.example?x", "with_fragment": b"a.example#x",
        "with_letters_as_port": b"a.example:x", "with_two_ports": b"a.example:80:80",
        "with_backslash": b"a.example\\bad", "with_high_byte": b"a\xc3.example", "with_tab": b"a.example\t",
    }.items()),
    # ── host ──
    ("host_differs", get((b"host", b"b.example"))),
    ("host_differs_by_port", get((b"host", b"a.example:81"))),
    ("host_empty", get((b"host", b""))),
    ("two_hosts", get((b"host", b"a.example"), (b"host", b"b.example"))),
    ("two_equal_hosts", get((b"host", b"a.example"), (b"host", b"a.example"))),
    ("host_with_user", ([*WITHOUT_AUTHORITY, (b"host", b"user@a.example")],)),
    ("host_with_space", ([*WITHOUT_AUTHORITY, (b"host", b"a.example b")],)),
    # ── fields of a connection ──
    *((f"{name.decode()}_{value.decode() or 'empty'}", get((name, value))) for name, value in (
        (b"connection", b"close"), (b"connection", b"keep-alive"), (b"connection", b"foo"), (b"connection", b""),
        (b"keep-alive", b"timeout=5"), (b"proxy-connection", b"keep-alive"), (b"upgrade", b"h2c"),
        (b"upgrade", b"websocket"), (b"http2-settings", b"AAMAAABk"), (b"te", b"gzip"), (b"te", b"trailers, deflate"),
        (b"te", b"chunked"), (b"te", b""),
    )),
    # ── CONNECT ──
    ("connect_with_path", pseudo(method=b"CONNECT", scheme=None)),
    ("connect_with_scheme", pseudo(method=b"CONNECT", path=None)),
    ("connect_without_authority", pseudo(method=b"CONNECT", path=None, scheme=None, authority=None)),
    ("connect", pseudo(method=b"CONNECT", path=None, scheme=None)),
    ("connect_with_protocol_without_path", pseudo(method=b"CONNECT", protocol=b"websocket", path=None)),
    ("connect_with_protocol_and_line_break", pseudo(method=b"CONNECT", protocol=b"websocket\r\nfoo: b")),
    # ── trailers ──
    ("trailer_with_pseudo_field", post(trailers=[(b":path", b"/smuggled")])),
    ("trailer_with_transfer_encoding", post(trailers=[(b"transfer-encoding", b"chunked")])),
    ("trailer_with_connection", post(trailers=[(b"connection", b"close")])),
    ("trailer_with_line_break", post(trailers=[(b"foo", b"b\r\n\r\n" + SMUGGLED)])),
    ("trailer_with_upper_case_name", post(trailers=[(b"Foo", b"b")])),
    ("trailer_with_empty_name", post(trailers=[(b"", b"b")])),
    ("trailer_with_colon_in_name", post(trailers=[(b"foo: b", b"c")])),
]  # fmt: skip


def odd(*fields: Field, method: str = "GET", path: str = "/") -> list[Field]:
    return request(path, *fields, method=method)


ODD: list[tuple[str, Parts, dict[str, object]]] = [
    ("te_trailers_is_kept", (odd((b"te", b"trailers")),), {"te": b"trailers"}),
    ("te_trailers_in_capitals", (odd((b"te", b"Trailers")),), {"te": b"trailers"}),
    ("host_that_says_the_same", (odd((b"host", b"a.example")),), {"host": b"a.example"}),
    ("host_in_capitals", (odd((b"host", b"A.Example")),), {"host": b"a.example"}),
    ("host_alone", ([*WITHOUT_AUTHORITY, (b"host", b"a.example")],), {"host": b"a.example", "target": b"/bad"}),
    ("authority_with_port", pseudo(authority=b"a.example:8080"), {"host": b"a.example:8080", "target": b"/bad"}),
    ("three_cookies", (odd((b"cookie", b"a=b"), (b"cookie", b"c=d"), (b"cookie", b"e=f")),),
     {"cookie": b"a=b; c=d; e=f"}),
    ("cookies_of_a_browser", (odd(*[(b"cookie", b"a=b")] * 180),), {"cookie": b"; ".join([b"a=b"] * 180)}),
    ("options_asterisk", pseudo(method=b"OPTIONS", path=b"*"), {"method": b"OPTIONS", "target": b"*"}),
    ("get_with_body", (odd(), b"abc"), {"body": b"abc", "transfer-encoding": b"chunked"}),
    ("get_with_length_and_body", (odd(*length(b"3")), b"a", b"bc"), {"body": b"abc", "transfer-encoding": None}),
    ("get_with_empty_body", (odd(), b""), {"body": b""}),
    ("get_with_length_0_and_empty_data", (odd(*length(b"0")), b""), {"body": b"", "content-length": b"0"}),
    ("length_with_zeros_before", (odd(*length(b"0003"), method="POST"), b"abc"), {"body": b"abc"}),
    ("post_without_body", (odd(method="POST"),), {"method": b"POST", "body": b""}),
    ("post_of_a_request", (odd(method="POST"), SMUGGLED), {"body": SMUGGLED}),
    ("post_of_an_end_of_chunks", (odd(method="POST"), b"0\r\n\r\n" + SMUGGLED), {"body": b"0\r\n\r\n" + SMUGGLED}),
    ("post_of_a_request_of_a_length", (odd(*length(b"%d" % len(SMUGGLED)), method="POST"), SMUGGLED),
     {"body": SMUGGLED}),
    ("post_with_expect", (odd((b"expect", b"100-continue"), method="POST"), b"abc"), {"body": b"abc"}),
    ("post_with_only_trailers", (odd(method="POST"), [(b"a", b"b")]), {"body": b"", "trailers": [(b"a", b"b")]}),
    ("post_with_length_0_and_trailers", (odd(*length(b"0"), method="POST"), [(b"a", b"b")]), {"body": b""}),
    ("post_with_length_and_trailers", (odd(*length(b"3"), method="POST"), b"abc", [(b"a", b"b")]), {"body": b"abc"}),
    ("trailers_that_belong_into_a_head",
     (odd(method="POST"), b"abc", [*length(b"9"), (b"host", b"b"), (b"trailer", b"c"), (b"a", b"b")]),
     {"body": b"abc", "trailers": [(b"a", b"b")], "content-length": None, "host": b"a.example"}),
    ("value_with_spaces_and_tabs_within", (odd((b"foo", b"a \t b")),), {"foo": b"a \t b"}),
    ("value_empty", (odd((b"foo", b"")),), {"foo": b""}),
    ("value_in_utf_8", (odd((b"foo", "ä".encode())),), {"foo": "ä".encode()}),
    ("value_like_a_field", (odd((b"foo", b"transfer-encoding: chunked")),), {"foo": b"transfer-encoding: chunked"}),
    ("name_of_all_letters", (odd((b"!#$%&'*+.^_`|~0-9az", b"b")),), {"!#$%&'*+.^_`|~0-9az": b"b"}),
    ("name_like_method", (odd((b"get", b"/ HTTP/1.1")),), {"get": b"/ HTTP/1.1"}),
    ("path_with_odd_letters", (odd(path="/a?b=\"<>\\^`{|}%00//../;@:"),), {"target": b"/a?b=\"<>\\^`{|}%00//../;@:"}),
    ("method_of_odd_letters", (odd(method="!#$%&'*+.^_`|~0-9az"),), {"method": b"!#$%&'*+.^_`|~0-9az"}),
    ("scheme_https", pseudo(scheme=b"https"), {"target": b"/bad", "x-forwarded-proto": b"http"}),
]  # fmt: skip
