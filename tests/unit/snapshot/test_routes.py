"""VirtualService http routes, field by field."""

import pytest

from meshproxy.model.route import (
    MATCH_ALL,
    DirectResponse,
    HeaderOps,
    MatchKind,
    NamedMatch,
    Redirect,
    RetryPolicy,
    Rewrite,
    Route,
    RouteMatch,
    StringMatch,
)
from meshproxy.snapshot.routes import DEFAULT_RETRY
from tests.support.translation import Translated, service_entry, sidecar, translated, virtual_service

HOST = "echo.example"
KEY = f"outbound|8080||{HOST}"
LISTENER = "127.0.0.1_8080"
ECHO = service_entry(HOST, "{address: 10.0.0.1}")
TO_ECHO = f"route: [{{destination: {{host: {HOST}}}}}]"


def under(http: str, *more: str, labels: dict[str, str] | None = None) -> Translated:
    """http: entries of spec.http as one flow list's content."""
    return translated(sidecar(), ECHO, virtual_service(HOST, f"  http: [{http}]"), *more, labels=labels or {})


def routes(http: str, labels: dict[str, str] | None = None) -> tuple[Route, ...]:
    return under(http, labels=labels).routes(LISTENER, HOST)


def only(http: str) -> Route:
    (route,) = routes(http)
    return route


def exact(value: str, ignores_case: bool = False) -> StringMatch:
    return StringMatch(MatchKind.EXACT, value, ignores_case)


PRESENT = StringMatch(MatchKind.PRESENT)


def test_a_service_without_a_virtual_service_has_the_default_route() -> None:
    (route,) = translated(sidecar(), ECHO).routes(LISTENER, HOST)
    assert route.name == "default"
    assert route.match == MATCH_ALL
    assert [cluster.cluster_key for cluster in route.clusters] == [KEY]
    assert route.retry == RetryPolicy()
    assert route.timeout_s is None


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("uri: {exact: /a}", RouteMatch(path=exact("/a"))),
        ("uri: {prefix: /a}", RouteMatch(path=StringMatch(MatchKind.PREFIX, "/a"))),
        ("uri: {regex: '/a.*'}", RouteMatch(path=StringMatch(MatchKind.REGEX, "/a.*"))),
        ("uri: {exact: /A}, ignoreUriCase: true", RouteMatch(path=exact("/A", True))),
        ("uri: {regex: '*'}", MATCH_ALL),
        ("method: {exact: GET}", RouteMatch(method=exact("GET"))),
        ("scheme: {exact: https}", RouteMatch(scheme=exact("https"))),
        ("authority: {prefix: a.}", RouteMatch(authority=StringMatch(MatchKind.PREFIX, "a."))),
        ("headers: {X-Canary: {exact: '1'}}", RouteMatch(headers=(NamedMatch("x-canary", exact("1")),))),
        ("headers: {x-canary: {}}", RouteMatch(headers=(NamedMatch("x-canary", PRESENT),))),
        ("headers: {x-canary: {regex: '*'}}", RouteMatch(headers=(NamedMatch("x-canary", PRESENT),))),
        ("headers: {x-canary: {exact: ''}}", RouteMatch(headers=(NamedMatch("x-canary", exact("")),))),
        (
            "withoutHeaders: {x-canary: {}}",
            RouteMatch(headers=(NamedMatch("x-canary", PRESENT, is_inverted=True),)),
        ),
        ("queryParams: {user: {exact: Ann}}", RouteMatch(query=(NamedMatch("user", exact("Ann")),))),
    ],
)
def test_match_conditions(match: str, expected: RouteMatch) -> None:
    assert only(f"{{match: [{{{match}}}], {TO_ECHO}}}").match == expected


def test_match_blocks_are_alternatives_with_the_same_action() -> None:
    found = routes(f"{{match: [{{uri: {{exact: /a}}}}, {{uri: {{exact: /b}}}}], {TO_ECHO}}}")
    assert [route.match.path for route in found] == [exact("/a"), exact("/b")]
    assert found[0].clusters == found[1].clusters


def test_nothing_follows_a_catch_all() -> None:
    found = routes(f"{{name: first, {TO_ECHO}}}, {{name: second, match: [{{uri: {{exact: /a}}}}], {TO_ECHO}}}")
    assert [route.name for route in found] == ["first"]


def test_names_of_route_and_match_are_joined() -> None:
    assert only(f"{{name: canary, match: [{{name: header, uri: {{exact: /a}}}}], {TO_ECHO}}}").name == "canary.header"


@pytest.mark.parametrize(
    ("condition", "labels", "applies"),
    [
        ("port: 8080", {}, True),
        ("port: 9090", {}, False),
        ("sourceLabels: {app: a}", {"app": "a", "more": "b"}, True),
        ("sourceLabels: {app: a}", {"app": "b"}, False),
        ("sourceNamespace: default", {}, True),
        ("sourceNamespace: other", {}, False),
        ("gateways: [mesh]", {}, True),
        ("gateways: [edge]", {}, False),
    ],
)
def test_conditions_on_who_asks_are_settled_before_any_request(
    condition: str, labels: dict[str, str], applies: bool
) -> None:
    found = routes(f"{{match: [{{{condition}}}], {TO_ECHO}}}", labels)
    assert [route.match for route in found] == ([MATCH_ALL] if applies else [])


def test_what_no_route_matches_does_not_fall_through_to_the_service() -> None:
    assert [route.match for route in routes(f"{{match: [{{uri: {{exact: /a}}}}], {TO_ECHO}}}")] == [
        RouteMatch(path=exact("/a"))
    ]


# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_are_kept_and_a_destination_without_weight_gets_nothing() -> None:
    other = service_entry("other.example", "{address: 10.0.0.9}")
    third = service_entry("third.example", "{address: 10.0.0.8}")
    destinations = (
        f"{{destination: {{host: {HOST}}}, weight: 3}}, {{destination: {{host: other.example}}, weight: 1}}, "
        "{destination: {host: third.example}}"
    )
    (route,) = under(f"{{route: [{destinations}]}}", other, third).routes(LISTENER, HOST)
    assert [(c.cluster_key, c.weight) for c in route.clusters] == [(KEY, 3), ("outbound|8080||other.example", 1)]


def test_the_weight_of_a_single_destination_does_not_matter() -> None:
    assert only(f"{{route: [{{destination: {{host: {HOST}}}, weight: 0}}]}}").clusters[0].weight == 100


def test_an_unknown_host_keeps_its_route_and_is_reported() -> None:
    result = under("{route: [{destination: {host: nowhere.example, port: {number: 81}}}]}")
    assert result.routes(LISTENER, HOST)[0].clusters[0].cluster_key == "outbound|81||nowhere.example"
    assert "outbound|81||nowhere.example" not in result.snapshot.clusters
    assert result.warnings == [
        "3.yaml:7: VirtualService default/routes: spec.http[0].route[0].destination.host: no service nowhere.example "
        "is known in namespace default; requests sent there are answered 503 (flag NC)"
    ]


def test_an_unknown_port_is_reported_with_the_known_ones() -> None:
    result = under(f"{{route: [{{destination: {{host: {HOST}, port: {{number: 81}}}}}}]}}")
    assert result.routes(LISTENER, HOST)[0].clusters[0].cluster_key == f"outbound|81||{HOST}"
    assert "its ports: 8080" in result.warnings[0]


def test_a_destination_without_port_means_the_services_only_port() -> None:
    other = service_entry("other.example", "{address: 10.0.0.9}", port=9999)
    (route,) = under("{route: [{destination: {host: other.example}}]}", other).routes(LISTENER, HOST)
    assert route.clusters[0].cluster_key == "outbound|9999||other.example"


@pytest.mark.parametrize(
    ("match", "rewrite", "path", "expected"),
    [
        ("uri: {prefix: /a}", "uri: /b", StringMatch(MatchKind.PREFIX, "/a"), Rewrite(path="/b")),
        ("uri: {exact: /a}", "uri: /b", exact("/a"), Rewrite(path="/b")),
        ("port: 8080", "uri: /b/", StringMatch(MatchKind.PREFIX, "/"), Rewrite(path="/b/")),
        ("port: 8080", "authority: b.example", None, Rewrite(authority="b.example")),
        (
            "port: 8080",
            r"uriRegexRewrite: {match: '/a/(.*)', rewrite: '/b/\1'}",
            None,
            Rewrite(path_regex=("/a/(.*)", r"/b/\1")),
        ),
    ],
)
def test_rewrites(match: str, rewrite: str, path: StringMatch | None, expected: Rewrite) -> None:
    route = only(f"{{match: [{{{match}}}], rewrite: {{{rewrite}}}, {TO_ECHO}}}")
    assert route.match.path == path
    assert route.rewrite == expected


@pytest.mark.parametrize(
    ("redirect", "expected"),
    [
        ("uri: /new", Redirect(path="/new")),
        (
            "authority: b.example, redirectCode: 308, scheme: https",
            Redirect(code=308, authority="b.example", scheme="https"),
        ),
        ("port: 8443", Redirect(port=8443)),
        ("uri: /, derivePort: FROM_REQUEST_PORT", Redirect(path="/", port=8080)),
        ("uri: /, derivePort: FROM_PROTOCOL_DEFAULT", Redirect(path="/")),
    ],
)
def test_redirects(redirect: str, expected: Redirect) -> None:
    route = only(f"{{redirect: {{{redirect}}}}}")
    assert route.redirect == expected
    assert route.clusters == ()


def test_a_redirect_of_the_prefix_matches_every_path_by_its_first_slash() -> None:
    route = only("{redirect: {prefixRewrite: /new/}}")
    assert route.match.path == StringMatch(MatchKind.PREFIX, "/")
    assert route.redirect == Redirect(prefix="/new/")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("status: 404", DirectResponse(status=404)),
        ("status: 200, body: {string: hé}", DirectResponse(status=200, body="hé".encode())),
        ("status: 503, body: {bytes: AAE=}", DirectResponse(status=503, body=b"\0\1")),
    ],
)
def test_direct_responses(response: str, expected: DirectResponse) -> None:
    assert only(f"{{directResponse: {{{response}}}}}").direct_response == expected


def test_header_operations_of_route_and_destination() -> None:
    route = only(
        "{headers: {request: {set: {X-A: '1'}, add: {X-B: '2'}, remove: [X-C]}, response: {remove: [Server]}}, "
        f"route: [{{destination: {{host: {HOST}}}, headers: {{response: {{add: {{x-d: '4'}}}}}}}}]}}"
    )
    assert route.request_headers == HeaderOps(set=(("x-a", "1"),), add=(("x-b", "2"),), remove=("x-c",))
    assert route.response_headers == HeaderOps(remove=("server",))
    assert route.clusters[0].response_headers == HeaderOps(add=(("x-d", "4"),))


def test_adding_a_host_replaces_the_authority() -> None:
    route = only(f"{{headers: {{request: {{add: {{Host: b.example}}}}}}, {TO_ECHO}}}")
    assert route.request_headers == HeaderOps(set=(("host", "b.example"),))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("timeout: 15s", DEFAULT_RETRY),
        ("retries: {attempts: 0}", None),
        ("retries: {attempts: 3}", RetryPolicy(attempts=3)),
        (
            "retries: {attempts: 1, retryOn: '5xx,reset', perTryTimeout: 2s}",
            RetryPolicy(attempts=1, on=frozenset({"5xx", "reset"}), per_try_timeout_s=2.0),
        ),
        (
            "retries: {attempts: 1, retryOn: 'connect-failure, 503, 429'}",
            RetryPolicy(
                attempts=1,
                on=frozenset({"connect-failure", "retriable-status-codes"}),
                status_codes=frozenset({503, 429}),
            ),
        ),
        (
            "retries: {attempts: 1, retryIgnorePreviousHosts: false}",
            RetryPolicy(attempts=1, avoids_previous_hosts=False),
        ),
        (
            "retries: {attempts: 1, backoff: 100ms}",
            RetryPolicy(attempts=1, base_interval_s=0.1, max_interval_s=1.0),
        ),
    ],
)
def test_retries(spec: str, expected: RetryPolicy | None) -> None:
    assert only(f"{{{spec}, {TO_ECHO}}}").retry == expected


def test_timeouts() -> None:
    assert only(f"{{timeout: 1500ms, {TO_ECHO}}}").timeout_s == 1.5


# ── which VirtualService ─────────────────────────────────────────────────────────────────────────────────────────────


def named(hosts: str, name: str, namespace: str = "default", head: str = "", more: str = "") -> str:
    spec = f"{more}\n  http: [{{name: {name}, {TO_ECHO}}}]"
    return virtual_service(hosts, spec, name, namespace, head)


def route_name(*texts: str, domain: str = HOST, imports: str = '"*/*"') -> str:
    return translated(sidecar(hosts=imports), ECHO, *texts).routes(LISTENER, domain)[0].name


def test_an_exact_host_wins_over_the_longest_wildcard_and_that_over_shorter_ones() -> None:
    short, long = named("'*.com', '*.example'", "short"), named("'*.a.example'", "long")
    entry = service_entry("b.a.example", "{address: 10.0.0.1}")
    assert route_name(short, entry, domain="b.a.example") == "short"
    assert route_name(short, long, entry, domain="b.a.example") == "long"
    assert route_name(short, long, named("b.a.example", "exact"), entry, domain="b.a.example") == "exact"


def test_of_several_for_one_host_the_oldest_is_used_and_the_others_are_reported() -> None:
    young = named(HOST, "young", head='creationTimestamp: "2026-02-01T00:00:00Z"')
    old = named(HOST, "old", head='creationTimestamp: "2026-01-01T00:00:00Z"')
    result = translated(sidecar(), ECHO, young, old)
    assert result.routes(LISTENER, HOST)[0].name == "old"
    assert "VirtualService default/young: spec.hosts[0]" in result.warnings[0]


def test_a_virtual_service_that_is_not_exported_or_not_imported_does_not_speak() -> None:
    foreign = named(HOST, "foreign", "other")
    assert route_name(foreign) == "foreign"
    assert route_name(foreign, imports='"./*"') == "default"
    assert route_name(named(HOST, "private", "other", more='  exportTo: ["."]')) == "default"


def test_a_virtual_service_of_gateways_only_does_not_speak_inside_the_mesh() -> None:
    assert route_name(named(HOST, "edge", more="  gateways: [edge]")) == "default"


def test_a_host_that_only_a_virtual_service_knows_is_served() -> None:
    assert route_name(named("shop.example", "shop"), domain="shop.example") == "shop"


def test_short_hosts_mean_the_virtual_services_own_namespace() -> None:
    service = """
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {ports: [{name: http, port: 8080}]}
"""
    spec = "  http: [{name: shop, route: [{destination: {host: reviews}}]}]"
    result = translated(sidecar(), service, virtual_service("reviews", spec, namespace="shop"))
    (route,) = result.routes(LISTENER, "reviews.shop")
    assert route.name == "shop"
    assert route.clusters[0].cluster_key == "outbound|8080||reviews.shop.svc.cluster.local"
