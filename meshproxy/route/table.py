"""From authority to virtual host to route. Pure; everything a request needs is prepared, hosts on their first use.

Decides: which route, which weighted cluster. Leaves to others: whether the cluster exists (upstream), what the route
changes (route.rewrite). Source: Envoy virtual host domain search (exact, longest suffix, `*`); istio route.go.
"""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, Final

from meshproxy.model.route import NO_HEADER_OPS, DirectResponse, Route, RouteTable, VirtualHost, WeightedCluster
from meshproxy.route.match import CompiledMatch, Headers
from meshproxy.route.rewrite import MAX_REGEX_PATH_BYTES, compile_ops, compile_path_rewrite, matched_prefix

MAX_REMEMBERED_HOSTS: Final = 4096
"""Authorities whose virtual host is remembered; they come from outside, so the memory is bounded."""
MAX_REMEMBERED_BYTES: Final = 300
"""Longest authority that is remembered: more than a host name and a port can have."""


class CompiledCluster:
    """One destination of a route. runtime: the data path's own note (the live cluster), None until first used."""

    __slots__ = ("cluster_key", "request_ops", "response_ops", "runtime", "weight")

    def __init__(self, cluster: WeightedCluster, has_own_ops: bool) -> None:
        """has_own_ops: False where the route's operations already hold the cluster's."""
        self.cluster_key = cluster.cluster_key
        self.weight = cluster.weight
        self.request_ops = compile_ops(cluster.request_headers) if has_own_ops else None
        self.response_ops = compile_ops(cluster.response_headers) if has_own_ops else None
        self.runtime: Any = None


class CompiledRoute:
    """One route. The order of header operations: the chosen cluster's (its request_ops), then the route's."""

    __slots__ = (
        "_bounds",
        "_choices",
        "clusters",
        "direct_response",
        "idle_timeout_s",
        "match",
        "matched_prefix",
        "name",
        "only_cluster",
        "path_rewrite",
        "redirect",
        "request_ops",
        "response_ops",
        "retry",
        "rewrite",
        "source",
        "suffix",
        "timeout_s",
    )

    def __init__(self, route: Route) -> None:
        self.name = route.name
        self.source = route.source
        self.suffix: Any = None
        """The data path's own note: (listener, what its forwarded requests end with)."""
        self.match = CompiledMatch(route.match)
        self.matched_prefix = matched_prefix(route.match)
        is_split = len(route.clusters) > 1
        self.clusters = tuple(CompiledCluster(cluster, is_split) for cluster in route.clusters)
        # A single destination gets everything, whatever its weight (Istio).
        self.only_cluster = self.clusters[0] if len(self.clusters) == 1 else None
        self._choices = tuple(cluster for cluster in self.clusters if cluster.weight > 0)
        total = sum(cluster.weight for cluster in self._choices)
        bounds: list[float] = []
        so_far = 0
        for cluster in self._choices[:-1]:
            so_far += cluster.weight
            bounds.append(so_far / total)
        self._bounds = tuple(bounds)
        self.redirect = route.redirect
        self.direct_response = route.direct_response
        self.rewrite = route.rewrite
        self.path_rewrite = compile_path_rewrite(route.rewrite, route.match)
        self.timeout_s = route.timeout_s
        self.idle_timeout_s = route.idle_timeout_s
        self.retry = route.retry
        # Istio puts a single destination's headers behind the route's; those of a weighted one Envoy applies first.
        only = route.clusters[0] if self.only_cluster is not None else None
        self.request_ops = compile_ops(route.request_headers, only.request_headers if only else NO_HEADER_OPS)
        self.response_ops = compile_ops(route.response_headers, only.response_headers if only else NO_HEADER_OPS)
        if self.request_ops is not None and self.request_ops.authority is not None:
            # The route's authority is written last, so what a weighted cluster says of it is never seen.
            for compiled in self.clusters:
                if compiled.request_ops is not None:
                    compiled.request_ops.authority = None

    def choose_cluster(self, draw: float) -> CompiledCluster:
        """weight/Σweights; weight 0 gets nothing. draw: uniform in [0, 1). Not for a redirect or a direct response."""
        return self._choices[bisect_right(self._bounds, draw)]


_URI_TOO_LONG: Final = Route(name="path_too_long_to_rewrite", direct_response=DirectResponse(status=414))


class CompiledHost:
    """One virtual host."""

    __slots__ = ("_rows", "_too_long", "header_probes", "name", "only_route", "routes")

    def __init__(self, host: VirtualHost) -> None:
        routes: list[CompiledRoute] = []
        for route in host.routes:
            compiled = CompiledRoute(route)
            routes.append(compiled)
            if compiled.match.is_always:
                break  # nothing after a catch-all can match
        self.name = host.name
        self.routes = tuple(routes)
        # (path prefix or None, further conditions or None, the route): what pick walks.
        self._rows = tuple(
            (route.match.prefix, None if route.match.is_prefix_only else route.match, route) for route in routes
        )
        has_regex = any(route.rewrite is not None and route.rewrite.path_regex is not None for route in routes)
        self._too_long = CompiledRoute(_URI_TOO_LONG) if has_regex else None
        self.only_route = routes[0] if routes and routes[0].match.is_always and not has_regex else None
        """The route of every request to this host; None where requests must be looked at."""
        names = sorted(frozenset[bytes]().union(*(route.match.header_names for route in routes)))
        self.header_probes = tuple(b"\r\n%b:" % name for name in names)
        """How a header that some route asks for begins in a lower-cased block of field lines: a request that holds none
        of them need not be taken apart, and no headers may be given to `pick`."""

    def pick(
        self, method: bytes, path: bytes, authority: bytes, scheme: bytes, headers: Headers
    ) -> CompiledRoute | None:
        """The first route that matches; None: 404 (Istio does not fall through to the service)."""
        for prefix, match, route in self._rows:
            if (prefix is None or path.startswith(prefix)) and (
                match is None
                or (
                    (headers or not match.needs_header) and match.matches_rest(method, path, authority, scheme, headers)
                )
            ):
                if self._too_long is not None and len(path) > MAX_REGEX_PATH_BYTES:
                    return self._unless_too_long(route, path)
                return route
        return None

    def _unless_too_long(self, route: CompiledRoute, path: bytes) -> CompiledRoute | None:
        """A path that a regex rewrite would search for too long gets 414 (see MAX_REGEX_PATH_BYTES)."""
        has_regex = route.rewrite is not None and route.rewrite.path_regex is not None
        return self._too_long if has_regex and len(path.partition(b"?")[0]) > MAX_REGEX_PATH_BYTES else route


class CompiledTable:
    """The virtual hosts of one listener. Building it only indexes domains; hosts compile when first asked for."""

    __slots__ = ("_any", "_compiled", "_exact", "_remembered", "_suffix_bytes", "_suffixes", "name")

    def __init__(self, table: RouteTable) -> None:
        self.name = table.name
        self._exact: dict[bytes, VirtualHost] = {}
        self._suffixes: dict[bytes, VirtualHost] = {}
        self._any: VirtualHost | None = None
        self._compiled: dict[int, CompiledHost] = {}
        self._remembered: dict[bytes, CompiledHost | None] = {}
        self.add(table.virtual_hosts)

    def add(self, hosts: Iterable[VirtualHost]) -> None:
        """More virtual hosts; for a table that arrives in pieces, before it is first asked."""
        for host in hosts:
            for domain in host.domains:
                if domain == "*":
                    self._any = self._any or host
                elif domain.startswith("*"):
                    self._suffixes.setdefault(domain[1:].encode(), host)
                else:
                    self._exact.setdefault(domain.encode(), host)
        # The wildcard stands for at least one character (Envoy). Longest first; by length, because a Host of 300 bytes
        # would otherwise cost 300 look-ups.
        self._suffix_bytes = tuple(sorted({len(suffix) for suffix in self._suffixes}, reverse=True))

    def find(self, authority: bytes) -> CompiledHost | None:
        """The virtual host for a lower-case authority: exact, then the longest `*` suffix, then `*`; None: 404 NR."""
        try:
            return self._remembered[authority]
        except KeyError:
            return self._search(authority)

    def _search(self, authority: bytes) -> CompiledHost | None:
        host = self._exact.get(authority)
        if host is None:
            for length in self._suffix_bytes:
                if length < len(authority):
                    host = self._suffixes.get(authority[-length:])
                    if host is not None:
                        break
            else:
                host = self._any
        compiled = self._compile(host) if host is not None else None
        if len(authority) > MAX_REMEMBERED_BYTES:
            return compiled
        if len(self._remembered) >= MAX_REMEMBERED_HOSTS:
            self._remembered.clear()
        self._remembered[authority] = compiled
        return compiled

    def _compile(self, host: VirtualHost) -> CompiledHost:
        compiled = self._compiled.get(id(host))
        if compiled is None:
            compiled = self._compiled[id(host)] = CompiledHost(host)
        return compiled
