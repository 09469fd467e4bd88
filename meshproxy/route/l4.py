"""From a connection's destination address and server name to its cluster. Pure.

Decides: which TCP or TLS route, which weighted cluster. Leaves to others: telling TLS from plaintext (listener), the
connection itself (proxy.tcp_session). Source: VirtualService tcp and tls routes; Envoy filter chain match (destination
prefix, then server name: exact before the longest `*` suffix).
"""

import ipaddress
from collections.abc import Iterable

from meshproxy.model.listener import TcpRoute
from meshproxy.model.route import Route
from meshproxy.route.table import CompiledRoute


class L4Route:
    """One TcpRoute, compiled."""

    __slots__ = ("_networks", "_weighted", "server_names")

    def __init__(self, route: TcpRoute) -> None:
        self._networks = tuple(ipaddress.ip_network(subnet, strict=False) for subnet in route.destination_subnets)
        self._weighted = CompiledRoute(Route(clusters=route.clusters))
        self.server_names = route.sni_hosts

    def reaches(self, address: str) -> bool:
        """Does the route serve this destination? address: IP literal; "" (a unix socket) is in no subnet."""
        if not self._networks:
            return True
        return bool(address) and any(ipaddress.ip_address(address) in network for network in self._networks)

    def cluster_key(self, draw: float) -> str:
        """weight/Σweights; a single destination's weight is ignored (Istio). draw: uniform in [0, 1)."""
        chosen = self._weighted.only_cluster or self._weighted.choose_cluster(draw)
        return chosen.cluster_key


class L4Table:
    """The TCP and TLS routes of one listener, in order of precedence."""

    __slots__ = ("_routes",)

    def __init__(self, routes: Iterable[TcpRoute]) -> None:
        self._routes = tuple(L4Route(route) for route in routes)

    def find(self, address: str) -> L4Route | None:
        """The first route for a connection without a server name; None: it is closed."""
        return next((route for route in self._routes if not route.server_names and route.reaches(address)), None)

    def find_by_name(self, address: str, server_name: str) -> L4Route | None:
        """The route for a ClientHello's server name ("" where it had none): exact, then the longest wildcard, then one
        that names none."""
        name = server_name.lower()
        best: L4Route | None = None
        best_length = -1
        for route in self._routes:
            if not route.reaches(address):
                continue
            for host in route.server_names or ("*",):
                is_match = host in ("*", name) or (host.startswith("*.") and name.endswith(host[1:]))
                length = 1000 if host == name else len(host)
                if is_match and length > best_length:
                    best, best_length = route, length
        return best
