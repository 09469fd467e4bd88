"""Match blocks. Where a case has `# Envoy`, Envoy 1.40 was asked the same."""

import pytest

from meshproxy.model.route import MATCH_ALL, MatchKind, NamedMatch, RouteMatch, StringMatch
from meshproxy.route.match import CompiledMatch

Fields = list[tuple[bytes, bytes]]


def exact(value: str, ignores_case: bool = False) -> StringMatch:
    return StringMatch(MatchKind.EXACT, value, ignores_case)


def prefix(value: str, ignores_case: bool = False) -> StringMatch:
    return StringMatch(MatchKind.PREFIX, value, ignores_case)


def regex(value: str) -> StringMatch:
    return StringMatch(MatchKind.REGEX, value)


PRESENT = StringMatch(MatchKind.PRESENT)


def matches(
    match: RouteMatch,
    target: str = "/",
    *,
    method: str = "GET",
    authority: str = "a.example",
    scheme: str = "http",
    headers: Fields | None = None,
) -> bool:
    return CompiledMatch(match).matches(
        method.encode(), target.encode(), authority.encode(), scheme.encode(), headers or []
    )


@pytest.mark.parametrize(
    ("path", "target", "expected"),
    [
        (exact("/a"), "/a", True),
        (exact("/a"), "/a?q=1", True),  # Envoy: exact with the query stripped
        (exact("/a"), "/a/", False),
        (exact("/a"), "/ab", False),
        (exact("/a"), "/", False),
        (exact("/a"), "/A", False),
        (exact("/EX", True), "/ex?q", True),  # Envoy
        (exact("/EX", True), "/exx", False),  # Envoy
        (prefix("/api"), "/api", True),
        (prefix("/api"), "/apix", True),  # a plain string prefix, not a path-separated one
        (prefix("/api"), "/api/v1?x", True),
        (prefix("/api"), "/ap?i", False),
        (prefix("/api"), "/API", False),
        (prefix("/Ab", True), "/aBc?Q", True),  # Envoy
        (prefix("/a?b"), "/a?b", False),  # Envoy: there is no query in what is looked at
        (prefix("/"), "/anything", True),
        (prefix(""), "/anything", True),
        (prefix("", True), "/anything", True),
        (PRESENT, "/", True),
        (regex("/r"), "/r?b", True),  # Envoy
        (regex("/r"), "/rr", False),  # a full match
        (regex("/r|/rr"), "/rr", True),
        (regex("/v[0-9]+/.*"), "/v12/x/y?z", True),
        (regex(".*q.*"), "/?q", False),
    ],
)
def test_path_conditions_see_the_path_without_its_query(path: StringMatch, target: str, expected: bool) -> None:
    assert matches(RouteMatch(path=path), target) is expected


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (RouteMatch(method=exact("POST")), True),
        (RouteMatch(method=exact("GET")), False),
        (RouteMatch(method=prefix("PO")), True),
        (RouteMatch(method=regex("P.+")), True),
        (RouteMatch(method=PRESENT), True),
        (RouteMatch(scheme=exact("https")), True),
        (RouteMatch(scheme=exact("http")), False),
        (RouteMatch(scheme=prefix("http")), True),
        (RouteMatch(authority=exact("shop.example:8080")), True),
        (RouteMatch(authority=exact("shop.example")), False),
        (RouteMatch(authority=exact("Shop.Example:8080")), True),  # host names have no case
        (RouteMatch(authority=prefix("SHOP.")), True),
        (RouteMatch(authority=regex(r"shop\.example(:\d+)?")), True),
        (RouteMatch(authority=PRESENT), True),
    ],
)
def test_method_scheme_and_authority(match: RouteMatch, expected: bool) -> None:
    assert matches(match, method="POST", scheme="https", authority="shop.example:8080") is expected


NONE: Fields = []
ONE = [(b"x", b"1")]
BOTH = [(b"x", b"1"), (b"y", b"0"), (b"x", b"2")]
EMPTY = [(b"x", b"")]


@pytest.mark.parametrize(
    ("match", "headers", "expected"),
    [
        (exact("1"), NONE, False),
        (exact("1"), ONE, True),
        (exact("1"), EMPTY, False),
        (exact(""), NONE, False),  # Envoy
        (exact(""), EMPTY, True),  # Envoy
        (prefix("1"), [(b"x", b"12")], True),
        (prefix("2"), [(b"x", b"12")], False),
        (regex("a.b"), [(b"x", b"a\xffb")], True),  # Envoy: `.` is one byte
        (regex("a.b"), [(b"x", "aéb".encode())], False),  # Envoy
        (regex("a..b"), [(b"x", "aéb".encode())], True),  # Envoy
        (PRESENT, NONE, False),
        (PRESENT, EMPTY, True),
        (PRESENT, BOTH, True),
    ],
)
def test_header_conditions(match: StringMatch, headers: Fields, expected: bool) -> None:
    assert matches(RouteMatch(headers=(NamedMatch("x", match),)), headers=headers) is expected


@pytest.mark.parametrize(
    ("match", "headers", "expected"),
    [
        (exact("1"), NONE, True),  # Envoy, with what Istio writes for withoutHeaders
        (exact("1"), ONE, False),  # Envoy
        (exact("1"), EMPTY, True),  # Envoy
        (exact("1"), [(b"x", b"3")], True),  # Envoy
        (PRESENT, NONE, True),  # Envoy
        (PRESENT, ONE, False),  # Envoy
        (PRESENT, EMPTY, False),  # Envoy
        (exact(""), NONE, False),  # an absent header counts as an empty one
        (regex(".*"), NONE, False),  # Envoy
        (regex(".*"), ONE, False),  # Envoy
    ],
)
def test_inverted_header_conditions(match: StringMatch, headers: Fields, expected: bool) -> None:
    assert matches(RouteMatch(headers=(NamedMatch("x", match, is_inverted=True),)), headers=headers) is expected


@pytest.mark.parametrize(
    ("match", "is_inverted", "expected"),
    [
        (exact("1"), False, True),
        (exact("2"), False, True),
        (exact("1,2"), False, False),
        (prefix("2"), False, True),
        (regex("1,2"), False, False),
        (regex(".*2"), False, True),
        (exact("2"), True, False),
        (exact("1,2"), True, True),
        (exact("3"), True, True),
    ],
)
def test_any_field_of_a_repeated_header_may_match(match: StringMatch, is_inverted: bool, expected: bool) -> None:
    """All as in Envoy. Joined values would let a client hide `2` from a withoutHeaders by sending a second field."""
    assert matches(RouteMatch(headers=(NamedMatch("x", match, is_inverted),)), headers=BOTH) is expected


@pytest.mark.parametrize(
    ("name", "match", "expected"),
    [
        (":method", prefix("GE"), True),
        (":method", exact("POST"), False),
        (":path", exact("/p?q=1"), True),  # Envoy: with the query
        (":path", exact("/p"), False),
        (":authority", exact("a.example"), True),
        ("host", exact("a.example"), True),  # Envoy
        ("host", exact("A.example"), True),
        ("host", exact("b.example"), False),
        (":scheme", exact("http"), True),
        (":scheme", PRESENT, True),
    ],
)
@pytest.mark.parametrize("is_inverted", [False, True])
def test_headers_may_name_the_request_line(name: str, match: StringMatch, is_inverted: bool, expected: bool) -> None:
    compiled = RouteMatch(headers=(NamedMatch(name, match, is_inverted),))
    assert matches(compiled, "/p?q=1") is (expected is not is_inverted)
    assert not CompiledMatch(compiled).header_names


@pytest.mark.parametrize(
    ("match", "target", "expected"),
    [
        (exact("1"), "/?a=1", True),
        (exact("1"), "/?a=1&a=2", True),  # Envoy: the first value
        (exact("1"), "/?a=2&a=1", False),  # Envoy
        (exact("1"), "/?&a=1", True),  # Envoy
        (exact("1"), "/?b=2&a=1", True),
        (exact("1"), "/?%61=1", False),  # Envoy: nothing is decoded
        (exact("1"), "/?a=%31", False),  # Envoy
        (exact("1"), "/?A=1", False),  # Envoy
        (exact("1"), "/?x?a=1", False),  # Envoy
        (exact("1"), "/", False),
        (exact(""), "/?a", True),  # Envoy
        (exact(""), "/?a=", True),  # Envoy
        (exact(""), "/?b", False),
        (prefix("1"), "/?a=12", True),
        (regex("[0-9]+"), "/?a=12", True),
        (regex("[0-9]+"), "/?a=12x", False),
        (PRESENT, "/?a", True),  # Envoy
        (PRESENT, "/?b=1", False),
        (PRESENT, "/a=1", False),
    ],
)
def test_query_conditions(match: StringMatch, target: str, expected: bool) -> None:
    assert matches(RouteMatch(query=(NamedMatch("a", match),)), target) is expected


def test_an_inverted_query_condition_holds_where_the_parameter_is_absent() -> None:
    match = RouteMatch(query=(NamedMatch("a", exact("1"), is_inverted=True),))
    assert matches(match, "/")
    assert matches(match, "/?a=2")
    assert not matches(match, "/?a=1")


FULL = RouteMatch(
    path=prefix("/api"),
    method=exact("GET"),
    authority=exact("a.example"),
    scheme=exact("http"),
    headers=(NamedMatch("x", exact("1")), NamedMatch("y", PRESENT, is_inverted=True)),
    query=(NamedMatch("q", exact("1")), NamedMatch("r", PRESENT)),
)


def test_conditions_of_a_block_all_have_to_hold() -> None:
    target = "/api?q=1&r"
    assert matches(FULL, target, headers=ONE)
    assert not matches(FULL, "/x?q=1&r", headers=ONE)
    assert not matches(FULL, target, headers=ONE, method="PUT")
    assert not matches(FULL, target, headers=ONE, authority="b.example")
    assert not matches(FULL, target, headers=ONE, scheme="https")
    assert not matches(FULL, target, headers=NONE)
    assert not matches(FULL, target, headers=BOTH)
    assert not matches(FULL, "/api?q=2&r", headers=ONE)
    assert not matches(FULL, "/api?q=1", headers=ONE)


@pytest.mark.parametrize(
    "match",
    [MATCH_ALL, RouteMatch(path=prefix("/")), RouteMatch(path=prefix("")), RouteMatch(path=PRESENT, method=PRESENT)],
)
def test_a_block_without_conditions_is_known_to_match_always(match: RouteMatch) -> None:
    assert CompiledMatch(match).is_always


@pytest.mark.parametrize(
    "match",
    [
        RouteMatch(path=prefix("/a")),
        RouteMatch(path=exact("/")),
        RouteMatch(method=exact("GET")),
        RouteMatch(headers=(NamedMatch("x", PRESENT),)),
        RouteMatch(headers=(NamedMatch("host", exact("a")),)),
        RouteMatch(query=(NamedMatch("x", PRESENT),)),
    ],
)
def test_a_block_with_a_condition_is_not(match: RouteMatch) -> None:
    assert not CompiledMatch(match).is_always
