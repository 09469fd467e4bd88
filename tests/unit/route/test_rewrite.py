"""What routes change. Where a case has `# Envoy`, Envoy 1.40 was asked the same."""

import pytest

from meshproxy.model.route import (
    HeaderOps,
    MatchKind,
    Redirect,
    Rewrite,
    Route,
    RouteMatch,
    StringMatch,
    WeightedCluster,
)
from meshproxy.route.rewrite import CompiledOps, apply_ops, compile_ops, redirect_location, rewrite_path
from meshproxy.route.table import CompiledRoute

ONE = (WeightedCluster(cluster_key="one"),)


def rewritten(rewrite: Rewrite, target: str, match: StringMatch | None = None) -> str:
    route = CompiledRoute(Route(match=RouteMatch(path=match), clusters=ONE, rewrite=rewrite))
    return rewrite_path(route, target.encode()).decode()


def prefix(value: str, ignores_case: bool = False) -> StringMatch:
    return StringMatch(MatchKind.PREFIX, value, ignores_case)


@pytest.mark.parametrize(
    ("match", "new", "target", "expected"),
    [
        (prefix("/a"), "/b", "/a", "/b"),
        (prefix("/a"), "/b", "/a/c?x=/a", "/b/c?x=/a"),
        (prefix("/a"), "/b", "/a/a", "/b/a"),  # the matched prefix only
        (prefix("/a"), "/b", "/ax", "/bx"),
        (prefix("/s/"), "/", "/s/t", "/t"),  # Envoy
        (prefix("/s/"), "/", "/s//t", "//t"),  # Envoy
        (prefix("/"), "/n", "/zz", "/nzz"),  # Envoy
        (prefix("/Ab", True), "/n", "/aBc?Q", "/nc?Q"),  # Envoy
        (prefix("/q"), "/z?w=1", "/q?x=1", "/z?w=1?x=1"),  # Envoy
        (StringMatch(MatchKind.EXACT, "/a"), "/b", "/a?q", "/b?q"),
        (StringMatch(MatchKind.EXACT, "/EX", True), "/n", "/ex?q", "/n?q"),  # Envoy
        (StringMatch(MatchKind.REGEX, "/re.*"), "/n", "/rex/y?q", "/n?q"),  # Envoy
        (None, "/n", "/old/path?q", "/n?q"),
        # Knowingly unlike Envoy, which would send a target without a slash or with a space in it.
        (prefix("/noslash"), "n", "/noslash/x", "/n/x"),
        (prefix("/a"), "/b c\r\nx: y#é", "/a", "/b%20c%0D%0Ax:%20y%23%C3%A9"),
    ],
)
def test_prefix_rewrite(match: StringMatch | None, new: str, target: str, expected: str) -> None:
    assert rewritten(Rewrite(path=new), target, match) == expected


@pytest.mark.parametrize(
    ("pattern", "substitution", "target", "expected"),
    [
        ("^/v[0-9]+/(.*)$", r"/\1", "/v12/x/y?q=/v1/", "/x/y?q=/v1/"),
        ("^/v[0-9]+/(.*)$", r"/\1", "/other?q", "/other?q"),
        ("/a", "/b", "/a/a", "/b/b"),  # every match
        ("x*", "-", "/abxd?x=x", "/-/-a-b-d-?x=x"),  # Envoy, but for the slash in front
        ("x*", "-", "/xx", "/-/-"),  # Envoy, but for the slash in front
        ("^/a", "b", "/a/a", "/b/a"),  # Envoy, but for the slash in front: ^ is the start of the path only
        ("/(a)(z)?", r"/[\0\1\10\2\\]", "/a?k", "/[/aaa0%5C]?k".replace("%5C", "\\")),  # Envoy
        ("(.*)/old/(.*)", r"\1/new/\2", "/x/old/y/old/z", "/x/old/y/new/z"),
        ("(.*)/old/(.*)", r"\1/new/\2", "/x/older", "/x/older"),
        (".*", "/n", "/x/y?q", "/n?q"),
        ("(a)|b", r"<\1>", "/ab", "/<a><>"),
        ("/a", "/\r\nx: y", "/a", "/%0D%0Ax:%20y"),
        ("(/)a", r"\7\1b", "/a", "/b"),
        ("/a", r"/\g<0>\n", "/a", r"/\g<0>\n"),  # Python's own escapes mean nothing
    ],
)
def test_regex_rewrite(pattern: str, substitution: str, target: str, expected: str) -> None:
    assert rewritten(Rewrite(path_regex=(pattern, substitution)), target) == expected


def test_what_is_no_path_is_not_rewritten() -> None:
    assert rewritten(Rewrite(path="/n"), "*") == "*"
    assert rewritten(Rewrite(authority="b.example"), "/a?q") == "/a?q"


def location(
    redirect: Redirect,
    target: str = "/p?q=1",
    *,
    scheme: str = "http",
    authority: str = "a.example",
    match: StringMatch | None = None,
) -> str:
    route = CompiledRoute(Route(match=RouteMatch(path=match), redirect=redirect))
    return redirect_location(route, scheme.encode(), authority.encode(), target.encode()).decode()


@pytest.mark.parametrize(
    ("redirect", "scheme", "authority", "expected"),
    [
        (Redirect(path="/n"), "http", "a", "http://a/n?q=1"),  # Envoy
        (Redirect(path="/n"), "http", "a:8080", "http://a:8080/n?q=1"),  # Envoy
        (Redirect(path="/n"), "http", "a:443", "http://a:443/n?q=1"),  # Envoy
        (Redirect(path="/n?z=1"), "http", "a", "http://a/n?z=1"),  # Envoy
        (Redirect(path="n"), "http", "a", "http://a/n?q=1"),  # Envoy
        (Redirect(path="/n"), "http", "a:80", "http://a/n?q=1"),
        (Redirect(path="/n"), "https", "a:443", "https://a/n?q=1"),
        (Redirect(scheme="https"), "http", "a", "https://a/p?q=1"),  # Envoy
        (Redirect(scheme="https"), "http", "a:80", "https://a/p?q=1"),  # Envoy
        (Redirect(scheme="https"), "http", "a:8080", "https://a:8080/p?q=1"),  # Envoy
        (Redirect(scheme="https"), "http", "a:443", "https://a/p?q=1"),
        (Redirect(scheme="http"), "http", "a:443", "http://a:443/p?q=1"),  # Envoy
        (Redirect(scheme="http"), "https", "a:443", "http://a/p?q=1"),  # Envoy
        (Redirect(scheme="https"), "https", "a:80", "https://a:80/p?q=1"),
        (Redirect(port=8443), "http", "a:80", "http://a:8443/p?q=1"),  # Envoy
        (Redirect(port=8443), "http", "[::1]:80", "http://[::1]:8443/p?q=1"),  # Envoy
        (Redirect(port=8443), "http", "[::1]", "http://[::1]:8443/p?q=1"),  # Envoy
        (Redirect(port=80), "http", "a:8080", "http://a/p?q=1"),
        (Redirect(port=443), "http", "a:8080", "http://a:443/p?q=1"),
        (Redirect(port=443, scheme="https"), "http", "a:8080", "https://a/p?q=1"),
        (Redirect(port=80, scheme="https"), "http", "a", "https://a:80/p?q=1"),
        (Redirect(authority="b:81"), "http", "a:80", "http://b:81/p?q=1"),  # Envoy
        (Redirect(authority="b"), "http", "a:8080", "http://b/p?q=1"),
        (Redirect(authority="b", port=8443, scheme="https"), "http", "a", "https://b:8443/p?q=1"),
        (Redirect(path="/a b\r\nx: y"), "http", "a", "http://a/a%20b%0D%0Ax:%20y?q=1"),
    ],
)
def test_redirects(redirect: Redirect, scheme: str, authority: str, expected: str) -> None:
    assert location(redirect, scheme=scheme, authority=authority) == expected


@pytest.mark.parametrize(
    ("match", "target", "expected"),
    [
        (prefix("/a"), "/a/c?q", "http://a.example/b/c?q"),  # Envoy
        (prefix("/a"), "/ab", "http://a.example/bb"),  # Envoy
        (StringMatch(MatchKind.EXACT, "/x"), "/x?q", "http://a.example/b?q"),  # Envoy
        (StringMatch(MatchKind.REGEX, "/y.*"), "/yes?q", "http://a.example/b?q"),  # Envoy
        (None, "/zz?q", "http://a.example/b?q"),
    ],
)
def test_prefix_redirects(match: StringMatch | None, target: str, expected: str) -> None:
    assert location(Redirect(prefix="/b"), target, match=match) == expected


RECEIVED = [(b"host", b"a.example"), (b"x", b"old"), (b"y", b"old"), (b"z", b"old"), (b"x", b"older")]


def applied(ops: HeaderOps) -> list[tuple[bytes, bytes]]:
    return apply_ops(CompiledOps(ops), RECEIVED)


def test_set_overwrites_every_field_of_that_name() -> None:
    assert applied(HeaderOps(set=(("X", "new"),))) == [*RECEIVED[:1], *RECEIVED[2:4], (b"x", b"new")]


def test_add_appends() -> None:
    assert applied(HeaderOps(add=(("x", "new"),))) == [*RECEIVED, (b"x", b"new")]


def test_remove_deletes_every_field_of_that_name() -> None:
    assert applied(HeaderOps(remove=("X", "absent"))) == [RECEIVED[0], *RECEIVED[2:4]]


def test_a_name_may_be_removed_set_and_added_at_once() -> None:
    ops = HeaderOps(remove=("x",), set=(("x", "1"),), add=(("x", "2"),))
    assert [pair for pair in applied(ops) if pair[0] == b"x"] == [(b"x", b"1"), (b"x", b"2")]


def test_an_empty_value_changes_nothing() -> None:
    """Envoy: `x: ""` leaves the header as it came."""
    assert compile_ops(HeaderOps(set=(("x", ""), ("host", "")), add=(("y", ""),))) is None


@pytest.mark.parametrize("name", ["host", "Host", ":authority", ":path", ":method", ":scheme"])
def test_pseudo_headers_and_host_are_never_removed_or_written(name: str) -> None:
    assert applied(HeaderOps(remove=(name,), set=((name, "v"),), add=((name, "v"),))) == RECEIVED


@pytest.mark.parametrize(
    "name", ["content-length", "Transfer-Encoding", "connection", "upgrade", "te", "keep-alive", "proxy-connection"]
)
def test_what_frames_a_message_is_out_of_reach(name: str) -> None:
    """A route that took Content-Length away would turn the body into a second request."""
    assert compile_ops(HeaderOps(remove=(name,), set=((name, "v"),), add=((name, "v"),))) is None


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        (HeaderOps(set=(("host", "b.example"),)), b"b.example"),
        (HeaderOps(set=((":authority", "b.example"),)), b"b.example"),
        (HeaderOps(add=(("host", "b.example"),)), b"b.example"),
        (HeaderOps(set=(("host", "set.example"),), add=((":authority", "add.example"),)), b"set.example"),
        (HeaderOps(set=(("x", "1"),)), None),
    ],
)
def test_host_and_authority_rewrite_the_authority(ops: HeaderOps, expected: bytes | None) -> None:
    assert CompiledOps(ops).authority == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("100%%", b"100%"),  # Envoy
        ("%%A%%%%", b"%A%%"),  # Envoy
        ("%DOWNSTREAM_REMOTE_ADDRESS%", b"%DOWNSTREAM_REMOTE_ADDRESS%"),
        ("é", "é".encode()),
    ],
)
def test_values_are_literal_but_for_the_doubled_percent_sign(value: str, expected: bytes) -> None:
    assert applied(HeaderOps(set=(("v", value),)))[-1] == (b"v", expected)


def test_nothing_to_do_is_none() -> None:
    assert compile_ops(HeaderOps()) is None


SET_AND_ADD = HeaderOps(set=(("s", "route"), ("x", "route")), add=(("a", "route"),), remove=("gone",))
CLUSTER = HeaderOps(set=(("s", "cluster"),), add=(("a", "cluster"), ("gone", "cluster")))
BEFORE = [(b"gone", b"x"), (b"s", b"old"), (b"a", b"old")]


def both_applied(route: CompiledRoute) -> list[tuple[bytes, bytes]]:
    """As the data path does it: the cluster's operations, then the route's."""
    headers = BEFORE
    for ops in (route.choose_cluster(0.0).request_ops, route.request_ops):
        if ops is not None:
            headers = apply_ops(ops, headers)
    return headers


def test_operations_of_a_weighted_destination_come_before_the_routes() -> None:
    """The very case and result of Envoy: what the cluster sets the route overwrites, and removes."""
    clusters = (WeightedCluster(cluster_key="c", weight=1, request_headers=CLUSTER), WeightedCluster(cluster_key="d"))
    assert both_applied(CompiledRoute(Route(clusters=clusters, request_headers=SET_AND_ADD))) == [
        (b"a", b"old"),
        (b"a", b"cluster"),
        (b"s", b"route"),
        (b"x", b"route"),
        (b"a", b"route"),
    ]


def test_operations_of_a_single_destination_come_after_the_routes() -> None:
    """Istio appends them to the route's, so its removals come first of all and its `set` is the last word."""
    clusters = (WeightedCluster(cluster_key="c", request_headers=CLUSTER),)
    route = CompiledRoute(Route(clusters=clusters, request_headers=SET_AND_ADD))
    assert both_applied(route) == [
        (b"a", b"old"),
        (b"x", b"route"),
        (b"a", b"route"),
        (b"s", b"cluster"),
        (b"a", b"cluster"),
        (b"gone", b"cluster"),
    ]
    assert route.clusters[0].request_ops is None


def host_ops(authority: str) -> HeaderOps:
    return HeaderOps(set=(("host", authority),))


@pytest.mark.parametrize("count", [1, 2])
def test_the_routes_authority_wins_over_the_destinations(count: int) -> None:
    """Envoy writes the route's last; Istio takes a single destination's only where the route has none."""
    cluster = WeightedCluster(cluster_key="c", request_headers=host_ops("cluster.example"))
    route = CompiledRoute(Route(clusters=(cluster,) * count, request_headers=host_ops("route.example")))
    assert route.request_ops is not None and route.request_ops.authority == b"route.example"
    assert all(c.request_ops is None or c.request_ops.authority is None for c in route.clusters)


def test_a_destinations_authority_holds_where_the_route_has_none() -> None:
    cluster = WeightedCluster(cluster_key="c", request_headers=host_ops("cluster.example"))
    single = CompiledRoute(Route(clusters=(cluster,)))
    assert single.request_ops is not None and single.request_ops.authority == b"cluster.example"
    split = CompiledRoute(Route(clusters=(cluster, cluster)))
    assert split.request_ops is None
    assert split.clusters[0].request_ops is not None
    assert split.clusters[0].request_ops.authority == b"cluster.example"
