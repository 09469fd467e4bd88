"""From authority to virtual host to route to cluster. `# Envoy`: Envoy 1.40 was asked the same."""

from random import Random

import pytest

from meshproxy.model.route import (
    DirectResponse,
    MatchKind,
    NamedMatch,
    Redirect,
    RetryPolicy,
    Rewrite,
    Route,
    RouteMatch,
    RouteTable,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from meshproxy.route.rewrite import MAX_REGEX_PATH_BYTES, rewrite_path
from meshproxy.route.table import MAX_REMEMBERED_HOSTS, CompiledHost, CompiledRoute, CompiledTable

ONE = (WeightedCluster(cluster_key="one"),)


def host(name: str, *domains: str, routes: tuple[Route, ...] = ()) -> VirtualHost:
    return VirtualHost(name=name, domains=domains or (name,), routes=routes)


def table(*hosts: VirtualHost) -> CompiledTable:
    return CompiledTable(RouteTable(name="8080", virtual_hosts=hosts))


def found(compiled: CompiledTable, authority: str) -> str | None:
    result = compiled.find(authority.encode())
    return result.name if result is not None else None


DOMAINS = table(
    host("wide", "*.foo.com", "*-z.foo.com"),
    host("narrow", "*.a.foo.com", "*.foo.com:80"),
    host("exact", "x.foo.com", "x.foo.com:8080", "[::1]:80"),
)


@pytest.mark.parametrize(
    ("authority", "expected"),
    [
        ("x.foo.com", "exact"),
        ("x.foo.com:8080", "exact"),
        ("x.foo.com:80", "narrow"),
        ("x.foo.com:81", None),  # Envoy: the whole authority is looked at, port and all
        ("[::1]:80", "exact"),
        ("[::1]", None),
        ("b.foo.com", "wide"),  # Envoy
        ("x.a.foo.com", "narrow"),  # Envoy: the longest suffix
        ("b.foo.com:80", "narrow"),  # Envoy
        ("q-z.foo.com", "wide"),  # Envoy
        ("foo.com", None),  # Envoy
        (".foo.com", None),  # Envoy: the wildcard stands for something
        ("", None),
        ("x.foo.co", None),
    ],
)
def test_exact_names_come_before_the_longest_wildcard(authority: str, expected: str | None) -> None:
    assert found(DOMAINS, authority) == expected
    assert found(DOMAINS, authority) == expected  # remembered


def test_a_star_takes_the_rest() -> None:
    compiled = table(host("rest", "*"), host("wide", "*.foo.com"), host("exact", "foo.com"))
    assert [found(compiled, name) for name in ("foo.com", "a.foo.com", "bar.com", "")] == [
        "exact",
        "wide",
        "rest",
        "rest",
    ]


def test_the_first_host_of_a_domain_has_it() -> None:
    compiled = table(host("first", "a", "*"), host("second", "a", "*"))
    assert (found(compiled, "a"), found(compiled, "b")) == ("first", "first")


def test_hosts_compile_on_their_first_use_and_once() -> None:
    broken = Route(match=RouteMatch(path=StringMatch(MatchKind.REGEX, "(")), clusters=ONE)
    compiled = table(host("used", "used", "other"), host("unused", routes=(broken,)))
    assert compiled.find(b"used") is compiled.find(b"other") is not None


def test_what_is_remembered_of_strangers_is_bounded() -> None:
    compiled = table(host("rest", "*"))
    for number in range(2 * MAX_REMEMBERED_HOSTS + 7):
        compiled.find(b"%d.example" % number)
    compiled.find(b"x" * 10_000)
    assert 0 < len(compiled._remembered) <= MAX_REMEMBERED_HOSTS
    assert max(map(len, compiled._remembered)) < 300
    assert found(compiled, "x" * 10_000) == "rest"


def test_a_table_may_arrive_in_pieces() -> None:
    compiled = table(host("first", "*.a"))
    compiled.add((host("second", "*.longer.a"), host("third", "b")))
    assert [found(compiled, name) for name in ("x.a", "x.longer.a", "b")] == ["first", "second", "third"]


def prefix(path: str) -> RouteMatch:
    return RouteMatch(path=StringMatch(MatchKind.PREFIX, path))


def header(name: str, value: str) -> RouteMatch:
    return RouteMatch(headers=(NamedMatch(name, StringMatch(MatchKind.EXACT, value)),))


def picked(routes: tuple[Route, ...], target: str, headers: list[tuple[bytes, bytes]] | None = None) -> str | None:
    route = CompiledHost(host("a", routes=routes)).pick(b"GET", target.encode(), b"a", b"http", headers or [])
    return route.name if route is not None else None


def test_routes_are_asked_in_order_and_the_first_match_wins() -> None:
    routes = (
        Route(name="canary", match=header("x-canary", "1"), clusters=ONE),
        Route(name="api", match=prefix("/api"), clusters=ONE),
        Route(name="api-v2", match=prefix("/api/v2"), clusters=ONE),
        Route(name="exact", match=RouteMatch(path=StringMatch(MatchKind.EXACT, "/e")), clusters=ONE),
        Route(name="rest", clusters=ONE),
        Route(name="unreachable", match=prefix("/u"), clusters=ONE),
    )
    assert picked(routes, "/api/v2") == "api"
    assert picked(routes, "/api/v2", [(b"x-canary", b"1")]) == "canary"
    assert picked(routes, "/api", [(b"x-canary", b"0")]) == "api"
    assert picked(routes, "/e?q") == "exact"
    assert picked(routes, "/u") == "rest"
    assert len(CompiledHost(host("a", routes=routes)).routes) == 5


def test_no_match_is_no_route() -> None:
    """404: a VirtualService whose routes do not match never falls through to the service."""
    assert picked((Route(match=prefix("/api"), clusters=ONE),), "/other") is None
    assert picked((), "/") is None


@pytest.mark.parametrize("match", [RouteMatch(), prefix("/")])
def test_a_host_with_a_catch_all_first_needs_no_pick(match: RouteMatch) -> None:
    compiled = CompiledHost(host("a", routes=(Route(match=match, clusters=ONE), Route(name="dropped", clusters=ONE))))
    assert compiled.only_route is compiled.routes[0]
    assert len(compiled.routes) == 1
    assert compiled.pick(b"GET", b"/x", b"a", b"http", []) is compiled.only_route


def test_other_hosts_do() -> None:
    routes = (Route(match=prefix("/api"), clusters=ONE), Route(clusters=ONE))
    assert CompiledHost(host("a", routes=routes)).only_route is None
    assert CompiledHost(host("a")).only_route is None


def test_probes_tell_which_headers_routes_look_at() -> None:
    routes = (
        Route(match=header("x-b", "1"), clusters=ONE),
        Route(match=header("x-a", "1"), clusters=ONE),
        Route(match=header(":method", "GET"), clusters=ONE),
    )
    assert CompiledHost(host("a", routes=routes)).header_probes == (b"\r\nx-a:", b"\r\nx-b:")


def test_an_inverted_header_condition_holds_without_any_header() -> None:
    named = NamedMatch("x", StringMatch(MatchKind.EXACT, "1"), is_inverted=True)
    assert picked((Route(name="without", match=RouteMatch(headers=(named,)), clusters=ONE),), "/") == "without"


def test_a_path_too_long_for_a_regex_rewrite_is_answered_414() -> None:
    """Searching 60 KiB for an innocent regex can take many seconds; other routes of the host take any length."""
    rewrite = Rewrite(path_regex=("/(.*)/old/(.*)", r"/\1/new/\2"))
    routes = (
        Route(name="free", match=prefix("/free"), clusters=ONE),
        Route(name="rewritten", rewrite=rewrite, clusters=ONE),
    )
    longest = "/" * MAX_REGEX_PATH_BYTES
    assert picked(routes, longest) == "rewritten"
    assert picked(routes, longest + "?" + longest) == "rewritten"
    assert picked(routes, "/free" + longest) == "free"
    compiled = CompiledHost(host("a", routes=routes[1:]))
    assert compiled.only_route is None
    refused = compiled.pick(b"GET", longest.encode() + b"/", b"a", b"http", [])
    assert refused is not None and refused.direct_response == DirectResponse(status=414)
    assert refused.only_cluster is None
    kept = compiled.pick(b"GET", b"/a/old/b", b"a", b"http", [])
    assert kept is not None and rewrite_path(kept, b"/a/old/b") == b"/a/new/b"


def test_a_route_keeps_what_it_was_given() -> None:
    retry = RetryPolicy(attempts=1)
    rewrite = Rewrite(authority="b")
    route = CompiledRoute(
        Route(
            name="n", clusters=ONE, timeout_s=1.5, idle_timeout_s=2.0, retry=retry, rewrite=rewrite, source="a.yaml:3"
        )
    )
    assert (route.name, route.source, route.timeout_s, route.idle_timeout_s) == ("n", "a.yaml:3", 1.5, 2.0)
    assert (route.retry, route.rewrite, route.path_rewrite) == (retry, rewrite, None)
    assert (route.request_ops, route.response_ops) == (None, None)
    redirect = Redirect(path="/x")
    assert CompiledRoute(Route(redirect=redirect)).redirect is redirect


def split(*weights: int) -> CompiledRoute:
    return CompiledRoute(
        Route(clusters=tuple(WeightedCluster(cluster_key=str(n), weight=w) for n, w in enumerate(weights)))
    )


@pytest.mark.parametrize("weights", [(80, 20), (1, 1, 1), (3, 1), (0, 5, 0, 15, 0), (1, 999), (33, 33, 34), (7, 0)])
def test_weights_are_shares_of_their_sum(weights: tuple[int, ...]) -> None:
    route = split(*weights)
    draw = Random(1).random
    hits = [0] * len(weights)
    for _ in range(10_000):
        hits[int(route.choose_cluster(draw()).cluster_key)] += 1
    for hit, weight in zip(hits, weights, strict=True):
        share = weight / sum(weights)
        # Four standard deviations; a weight of 0 among several gets nothing at all.
        assert abs(hit - 10_000 * share) <= 4 * (10_000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("draw", [0.0, 0.7999, 0.8, 0.999_999_999_999_999_9])
def test_a_draw_on_the_border_belongs_to_the_next(draw: float) -> None:
    assert split(80, 20).choose_cluster(draw).cluster_key == ("0" if draw < 0.8 else "1")
    assert split(0, 1, 0).choose_cluster(draw).cluster_key == "1"


@pytest.mark.parametrize("weight", [0, 1, 100])
def test_a_single_destination_gets_everything_whatever_its_weight(weight: int) -> None:
    route = split(weight)
    assert route.only_cluster is route.clusters[0]
    assert split(1, weight).only_cluster is None
