"""The routes that both proxies serve. Clusters a and b have an origin; refused and empty have none."""

from typing import Any

from meshproxy.model.route import (
    DirectResponse,
    HeaderOps,
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


def _exact(value: str) -> StringMatch:
    return StringMatch(MatchKind.EXACT, value)


def _prefix(value: str) -> StringMatch:
    return StringMatch(MatchKind.PREFIX, value)


def _regex(value: str) -> StringMatch:
    return StringMatch(MatchKind.REGEX, value)


_PRESENT = StringMatch(MatchKind.PRESENT)


def _to(cluster: str, **fields: Any) -> Route:
    """A route to one cluster; the fields of a match may be given beside those of the route."""
    of_match = {name: fields.pop(name) for name in ("path", "method", "authority", "scheme") if name in fields}
    of_match |= {name: (fields.pop(name),) for name in ("headers", "query") if name in fields}
    if not fields.keys() & {"redirect", "direct_response", "clusters"}:
        fields["clusters"] = (WeightedCluster(cluster_key=cluster),)
    fields.setdefault("retry", RetryPolicy())
    return Route(match=RouteMatch(**of_match), **fields)


MATCHES = (
    _to("b", path=_exact("/exact")),
    _to("b", path=StringMatch(MatchKind.EXACT, "/AnyCase", ignores_case=True)),
    _to("b", path=_prefix("/prefix")),
    _to("b", path=StringMatch(MatchKind.PREFIX, "/AnyPrefix", ignores_case=True)),
    _to("b", path=_regex("/regex/[0-9]+")),
    _to("b", path=_prefix("/method"), method=_exact("POST")),
    _to("b", path=_prefix("/authority"), authority=_exact("match.example")),
    _to("b", path=_prefix("/scheme"), scheme=_exact("https")),
    _to("b", path=_prefix("/header/exact"), headers=NamedMatch("x-user", _exact("jason"))),
    _to("b", path=_prefix("/header/prefix"), headers=NamedMatch("x-user", _prefix("ja"))),
    _to("b", path=_prefix("/header/regex"), headers=NamedMatch("x-user", _regex("j.*n"))),
    _to("b", path=_prefix("/header/present"), headers=NamedMatch("x-user", _PRESENT)),
    _to("b", path=_prefix("/header/not"), headers=NamedMatch("x-user", _exact("jason"), is_inverted=True)),
    _to("b", path=_prefix("/header/absent"), headers=NamedMatch("x-user", _PRESENT, is_inverted=True)),
    _to("b", path=_prefix("/query/exact"), query=NamedMatch("user", _exact("jason"))),
    _to("b", path=_prefix("/query/regex"), query=NamedMatch("user", _regex("j.*n"))),
    _to("b", path=_prefix("/query/present"), query=NamedMatch("user", _PRESENT)),
    _to("a", path=_prefix("/")),
)

REDIRECTS = (
    _to("", path=_prefix("/plain"), redirect=Redirect(authority="other.example")),
    _to("", path=_prefix("/code"), redirect=Redirect(authority="other.example", code=308)),
    _to("", path=_prefix("/path"), redirect=Redirect(path="/new")),
    _to("", path=_prefix("/asked"), redirect=Redirect(path="/new?given=1")),
    _to("", path=_prefix("/prefix"), redirect=Redirect(prefix="/new")),
    _to("", path=_prefix("/https"), redirect=Redirect(scheme="https")),
    _to("", path=_prefix("/port"), redirect=Redirect(port=8080)),
    _to("", path=_prefix("/default-port"), redirect=Redirect(scheme="https", port=443)),
    _to(
        "",
        path=_prefix("/headers"),
        redirect=Redirect(path="/new"),
        response_headers=HeaderOps(set=(("x-set", "1"),), remove=("location",)),
    ),
)

_CHANGES = HeaderOps(
    set=(("x-set", "route"), ("user-agent", "of-route")), add=(("x-add", "route"),), remove=("x-remove", "x-absent")
)
_SPLIT = (WeightedCluster(cluster_key="a", weight=0), WeightedCluster(cluster_key="b", weight=100))
_OF_CLUSTER = HeaderOps(set=(("x-set", "cluster"),), add=(("x-add", "cluster"),), remove=("x-cluster-remove",))

CHANGES = (
    _to("a", path=_prefix("/prefix/"), rewrite=Rewrite(path="/")),
    _to("a", path=_prefix("/old"), rewrite=Rewrite(path="/new")),
    _to("a", path=_exact("/whole"), rewrite=Rewrite(path="/all")),
    _to("a", path=_prefix("/regex"), rewrite=Rewrite(path_regex=("/regex/([^/]+)/(.*)", r"/\2/from/\1"))),
    _to("a", path=_prefix("/every"), rewrite=Rewrite(path_regex=("o", "0"))),
    _to("a", path=_prefix("/host-rewrite"), rewrite=Rewrite(authority="inside.example")),
    _to("a", path=_prefix("/host-set"), request_headers=HeaderOps(set=(("host", "set.example"),))),
    _to("a", path=_prefix("/both"), rewrite=Rewrite(path="/one", authority="inside.example")),
    _to("a", path=_prefix("/request-headers"), request_headers=_CHANGES),
    _to("a", path=_prefix("/response-headers"), response_headers=_CHANGES),
    _to(
        "a",
        path=_prefix("/cluster-headers"),
        clusters=(
            WeightedCluster(cluster_key="a", weight=0),
            WeightedCluster(cluster_key="b", weight=100, request_headers=_OF_CLUSTER, response_headers=_OF_CLUSTER),
        ),
        request_headers=_CHANGES,
        response_headers=_CHANGES,
    ),
    _to("a", path=_prefix("/split"), clusters=_SPLIT),
    _to("", path=_prefix("/direct/"), direct_response=DirectResponse(status=418, body=b"short and stout")),
    _to("", path=_prefix("/bodyless"), direct_response=DirectResponse(status=503)),
    _to(
        "",
        path=_prefix("/direct-headers"),
        direct_response=DirectResponse(status=200, body=b"text"),
        response_headers=HeaderOps(set=(("content-type", "application/json"), ("x-set", "1"))),
    ),
    _to("refused", path=_prefix("/refused")),
    _to("empty", path=_prefix("/empty")),
    _to("missing", path=_prefix("/missing")),
)

TABLE = RouteTable(
    name="differential",
    virtual_hosts=(
        VirtualHost(name="matches", domains=("match.example", "match.example:8080"), routes=MATCHES),
        VirtualHost(name="redirects", domains=("redirect.example", "redirect.example:8080"), routes=REDIRECTS),
        VirtualHost(name="changes", domains=("change.example",), routes=CHANGES),
        VirtualHost(name="suffix", domains=("*.wild.example",), routes=(_to("b"),)),
        VirtualHost(name="longer suffix", domains=("*.very.wild.example",), routes=(_to("a"),)),
        VirtualHost(name="plain", domains=("plain.example",), routes=(_to("a"),)),
    ),
)
