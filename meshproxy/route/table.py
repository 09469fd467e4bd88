"""From authority to virtual host to route. Pure; everything a request needs is prepared, hosts on their first use.

Decides: which route, which weighted cluster. Leaves to others: whether the cluster exists (upstream), what the route
changes (route.rewrite). Source: Envoy virtual host domain search (exact, longest suffix, `*`); istio route.go.
"""

from collections.abc import Iterable
from typing import Any

from meshproxy.model.route import Route, RouteTable, VirtualHost, WeightedCluster
from meshproxy.route.match import CompiledMatch, Headers
from meshproxy.route.rewrite import compile_ops, matched_prefix

MAX_REMEMBERED_HOSTS = 4096
"""Authorities whose virtual host is remembered; they come from outside, so the memory is bounded."""


class CompiledCluster:
    """One destination of a route. runtime: the data path's own note (the live cluster), None until first used."""

    __slots__ = ("cluster_key", "request_ops", "response_ops", "runtime", "weight")

    def __init__(self, cluster: WeightedCluster) -> None:
        self.cluster_key = cluster.cluster_key
        self.weight = cluster.weight
        self.request_ops = compile_ops(cluster.request_headers)
        self.response_ops = compile_ops(cluster.response_headers)
        self.runtime: Any = None


class CompiledRoute:
    __slots__ = (
        "_bounds",
        "clusters",
        "direct_response",
        "idle_timeout_s",
        "match",
        "matched_prefix",
        "name",
        "only_cluster",
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
        path = route.match.path
        self.matched_prefix = matched_prefix(path.kind if path is not None else None, path.value if path else "")
        self.clusters = tuple(CompiledCluster(cluster) for cluster in route.clusters)
        # A single destination gets everything, whatever its weight (Istio).
        self.only_cluster = self.clusters[0] if len(self.clusters) == 1 else None
        total = sum(cluster.weight for cluster in self.clusters)
        bounds: list[float] = []
        so_far = 0
        for cluster in self.clusters:
            so_far += cluster.weight
            bounds.append(so_far / total if total else 0.0)
        self._bounds = tuple(bounds)
        self.redirect = route.redirect
        self.direct_response = route.direct_response
        self.rewrite = route.rewrite
        self.timeout_s = route.timeout_s
        self.idle_timeout_s = route.idle_timeout_s
        self.retry = route.retry
        self.request_ops = compile_ops(route.request_headers)
        self.response_ops = compile_ops(route.response_headers)

    def choose_cluster(self, draw: float) -> CompiledCluster:
        """weight/Σweights; weight 0 gets nothing. draw: uniform in [0, 1)."""
        for cluster, bound in zip(self.clusters, self._bounds, strict=True):
            if draw < bound:
                return cluster
        return self.clusters[-1]


class CompiledHost:
    """One virtual host."""

    __slots__ = ("header_probes", "name", "only_route", "routes")

    def __init__(self, host: VirtualHost) -> None:
        routes: list[CompiledRoute] = []
        for route in host.routes:
            compiled = CompiledRoute(route)
            routes.append(compiled)
            if compiled.match.is_always:
                break  # nothing after a catch-all can match
        self.name = host.name
        self.routes = tuple(routes)
        self.only_route = routes[0] if routes and routes[0].match.is_always else None
        """The route of every request to this host; None where requests must be looked at."""
        names = {named.name for route in routes for named in route.match.headers}
        self.header_probes = tuple(b"\r\n%b:" % name for name in sorted(names))
        """How a header that some route asks for begins in a lower-cased block of field lines: a request that holds none
        of them need not be taken apart, and no headers may be given to `pick`."""

    def pick(
        self, method: bytes, path: bytes, authority: bytes, scheme: bytes, headers: Headers
    ) -> CompiledRoute | None:
        """The first route that matches; None: 404 (Istio does not fall through to the service)."""
        for route in self.routes:
            match = route.match
            if match.is_always or (
                (headers or not match.needs_header) and match.matches(method, path, authority, scheme, headers)
            ):
                return route
        return None


class CompiledTable:
    """The virtual hosts of one listener. Building it only indexes domains; hosts compile when first asked for."""

    __slots__ = ("_any", "_compiled", "_exact", "_remembered", "_suffixes", "name")

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

    def find(self, authority: bytes) -> CompiledHost | None:
        """The virtual host for a lower-case authority: exact, then the longest `*` suffix, then `*`; None: 404 NR."""
        try:
            return self._remembered[authority]
        except KeyError:
            return self._search(authority)

    def _search(self, authority: bytes) -> CompiledHost | None:
        host = self._exact.get(authority)
        if host is None:
            # The wildcard stands for at least one character (Envoy).
            for length in range(len(authority) - 1, 0, -1) if self._suffixes else ():
                host = self._suffixes.get(authority[-length:])
                if host is not None:
                    break
            else:
                host = self._any
        compiled = self._compile(host) if host is not None else None
        if len(self._remembered) >= MAX_REMEMBERED_HOSTS:
            self._remembered.clear()
        self._remembered[authority] = compiled
        return compiled

    def _compile(self, host: VirtualHost) -> CompiledHost:
        compiled = self._compiled.get(id(host))
        if compiled is None:
            compiled = self._compiled[id(host)] = CompiledHost(host)
        return compiled
