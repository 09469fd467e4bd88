"""Routes: from (authority, method, path, headers) to a cluster. Semantics are VirtualService's.

Source: istio pilot/pkg/networking/core/route/route.go; Envoy route_components.proto.
"""

from dataclasses import dataclass, field
from enum import Enum


class MatchKind(str, Enum):
    EXACT = "exact"
    PREFIX = "prefix"
    REGEX = "regex"
    """RE2 semantics, full match."""
    PRESENT = "present"


@dataclass(frozen=True, slots=True)
class StringMatch:
    kind: MatchKind
    value: str = ""
    ignores_case: bool = False
    """Only exact and prefix."""


@dataclass(frozen=True, slots=True)
class NamedMatch:
    """A header or query parameter condition; name is lower-case for headers."""

    name: str
    match: StringMatch
    is_inverted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteMatch:
    """All given conditions hold (AND). None: no condition. Path conditions ignore the query string."""

    path: StringMatch | None = None
    method: StringMatch | None = None
    authority: StringMatch | None = None
    scheme: StringMatch | None = None
    headers: tuple[NamedMatch, ...] = ()
    query: tuple[NamedMatch, ...] = ()


MATCH_ALL = RouteMatch()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderOps:
    """Applied in this order: remove, set, add. Names lower-case. `host`/`:authority` in set rewrites the authority."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


NO_HEADER_OPS = HeaderOps()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedCluster:
    cluster_key: str
    weight: int = 100
    request_headers: HeaderOps = NO_HEADER_OPS
    response_headers: HeaderOps = NO_HEADER_OPS


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    attempts: int = 2
    """Retries, not tries; 0 turns retrying off."""
    on: frozenset[str] = frozenset(
        {"connect-failure", "refused-stream", "unavailable", "cancelled", "retriable-status-codes"}
    )
    """Envoy's retry_on words, without the numbers."""
    status_codes: frozenset[int] = frozenset()
    per_try_timeout_s: float | None = None
    """None: the route's timeout."""
    base_interval_s: float = 0.025
    max_interval_s: float = 0.25
    avoids_previous_hosts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    code: int = 301
    authority: str | None = None
    path: str | None = None
    """Replaces the whole path; excludes prefix."""
    prefix: str | None = None
    """Replaces the matched prefix."""
    scheme: str | None = None
    port: int | None = None
    """None: keep; the default port of the scheme is never written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectResponse:
    status: int
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    path: str | None = None
    """Prefix match: replaces the matched prefix. Exact or no path match: replaces the whole path."""
    path_regex: tuple[str, str] | None = None
    """(regex, substitution) applied to the path; excludes path."""
    authority: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Exactly one of clusters, redirect and direct_response is given."""

    name: str = "default"
    match: RouteMatch = MATCH_ALL
    clusters: tuple[WeightedCluster, ...] = ()
    redirect: Redirect | None = None
    direct_response: DirectResponse | None = None
    rewrite: Rewrite | None = None
    timeout_s: float | None = None
    """Whole request, retries included; None: no limit (Istio's default)."""
    idle_timeout_s: float | None = None
    """Stream idle; None: the proxy's default."""
    retry: RetryPolicy | None = None
    request_headers: HeaderOps = NO_HEADER_OPS
    response_headers: HeaderOps = NO_HEADER_OPS
    source: str = field(default="", compare=False)
    """file:line of the resource."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualHost:
    """domains: exact names, `*.suffix`, or `*`; lower-case; with and without `:port` where both are meant."""

    name: str
    domains: tuple[str, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """The virtual hosts one listener serves. No virtual host matches: 404 NR."""

    name: str
    virtual_hosts: tuple[VirtualHost, ...]
