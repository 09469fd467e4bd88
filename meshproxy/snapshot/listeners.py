"""Listeners as they are collected: one address belongs to one workload, the first that asks for it."""

from dataclasses import dataclass, field, replace

from meshproxy.model.address import SocketAddress
from meshproxy.model.listener import Direction, Listener, MtlsMode, ServerTlsMode
from meshproxy.model.route import RouteTable, VirtualHost
from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import Findings

UNIX_SCHEME = "unix://"


@dataclass(frozen=True, slots=True)
class Bind:
    """Where a listener listens: an IP address and port, or a unix socket path and port 0."""

    address: str
    port: int
    is_udp: bool = False

    @classmethod
    def of(cls, written: str, port: int, default: str, *, is_udp: bool = False) -> "Bind":
        """written: `bind` of a resource; empty means default."""
        if written.startswith(UNIX_SCHEME):
            return cls(written.removeprefix(UNIX_SCHEME), 0, is_udp)
        return cls(written or default, port, is_udp)

    @property
    def is_unix(self) -> bool:
        return self.address.startswith(("/", "@"))

    @property
    def is_abstract(self) -> bool:
        """Linux's unix sockets without a file."""
        return self.address.startswith("@")

    @property
    def name(self) -> str:
        if self.is_unix:
            return self.address
        return f"{self.address}_{self.port}_udp" if self.is_udp else f"{self.address}_{self.port}"

    def __str__(self) -> str:
        return self.address if self.is_unix else str(SocketAddress(self.address, self.port, self.is_udp))


@dataclass(slots=True)
class Listeners:
    """What will listen, and the route tables it serves."""

    findings: Findings
    idle_timeout_s: float | None = 3600.0
    """Of every downstream connection; None: never."""
    by_name: dict[str, Listener] = field(default_factory=dict)
    route_tables: dict[str, RouteTable] = field(default_factory=dict)

    def can_bind(self, bind: Bind, resource: Resource, path: str) -> bool:
        """False, and said so, for an address that this version does not serve."""
        if bind.is_abstract:
            message = f"{bind} is an abstract unix socket, which this version does not serve"
            self.findings.error(resource, path, message, "this listener is left out; give a path")
            return False
        if bind.is_unix and bind.is_udp:
            message = f"{bind} is a unix socket, where datagrams are not served"
            self.findings.error(resource, path, message, "this listener is left out; give an IP address")
            return False
        return True

    def is_free(self, bind: Bind, workload_id: str, resource: Resource, path: str) -> bool:
        """False, and said so, where an earlier listener has the address."""
        if not self.can_bind(bind, resource, path):
            return False
        taken = self.by_name.get(bind.name)
        if taken is None:
            return True
        owner = "it" if taken.workload_id == workload_id else taken.workload_id
        message = f"{workload_id} asks for {bind}, where {owner} listens already (from {taken.source})"
        # One Sidecar that happens to govern several workloads is a default; two resources that clash are a mistake.
        report = self.findings.warn if taken.source == resource.source else self.findings.error
        report(resource, path, message, "the first listener keeps it; give each its own bind or port")
        return False

    def add(self, listener: Listener, table: RouteTable | None = None) -> None:
        self.by_name[listener.name] = listener
        if table is not None:
            self.route_tables[table.name] = table


def with_quic(listeners: dict[str, Listener]) -> dict[str, Listener]:
    """The listeners, and one of QUIC beside each whose HTTP is always encrypted and ends here.

    Source: Istio's PILOT_ENABLE_QUIC_LISTENERS mirrors the HTTPS servers of gateways, without PASSTHROUGH; inbound
    listeners with mutual TLS are mirrored here, too. AUTO is not: what is not HTTP could not be told over QUIC. Where
    the UDP port is somebody's already, it stays theirs.
    """
    every: dict[str, Listener] = {}
    for name, listener in listeners.items():
        if _can_have_quic(listener) and f"{name}_udp" not in listeners:
            listener = replace(listener, advertises_quic=listener.direction is Direction.GATEWAY)
            mirror = replace(listener, name=f"{name}_quic", is_quic=True, advertises_quic=False)
            every[mirror.name] = mirror
        every[name] = listener
    return every


def _can_have_quic(listener: Listener) -> bool:
    if not listener.protocol.is_http or listener.socket_address.is_unix:
        return False
    if listener.direction is Direction.GATEWAY:
        return listener.tls is not None and listener.tls.mode is not ServerTlsMode.PASSTHROUGH
    return listener.direction is Direction.INBOUND and listener.mtls is not MtlsMode.DISABLE


class VirtualHosts:
    """Virtual hosts of one table. A domain belongs to the first that claims it."""

    __slots__ = ("_claimed", "_hosts")

    def __init__(self) -> None:
        self._claimed: set[str] = set()
        self._hosts: list[VirtualHost] = []

    def add(self, host: VirtualHost) -> None:
        domains = tuple(domain for domain in host.domains if domain not in self._claimed)
        self._claimed.update(domains)
        if domains == host.domains:
            self._hosts.append(host)
        elif domains:
            self._hosts.append(VirtualHost(name=host.name, domains=domains, routes=host.routes))

    def has(self, domain: str) -> bool:
        return domain in self._claimed

    def table(self, name: str) -> RouteTable:
        return RouteTable(name=name, virtual_hosts=tuple(self._hosts))
