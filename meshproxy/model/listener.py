"""A listener: a bound address and what is done with connections to it."""

from dataclasses import dataclass, field
from enum import Enum

from meshproxy.model.address import SocketAddress
from meshproxy.model.cluster import Protocol
from meshproxy.model.route import WeightedCluster


class Direction(str, Enum):
    INBOUND = "inbound"
    OUTBOUND = "outbound"
    GATEWAY = "gateway"


class MtlsMode(str, Enum):
    """Effective PeerAuthentication mode of an inbound port."""

    STRICT = "STRICT"
    PERMISSIVE = "PERMISSIVE"
    DISABLE = "DISABLE"


class ServerTlsMode(str, Enum):
    """Gateway server tls.mode."""

    SIMPLE = "SIMPLE"
    MUTUAL = "MUTUAL"
    ISTIO_MUTUAL = "ISTIO_MUTUAL"
    PASSTHROUGH = "PASSTHROUGH"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    mode: ServerTlsMode
    certificate_file: str | None = None
    key_file: str | None = None
    ca_file: str | None = None
    subject_alt_names: tuple[str, ...] = ()
    min_version: str = "TLSV1_2"


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpRoute:
    """Where a TCP connection goes; weights as in HTTP routes."""

    clusters: tuple[WeightedCluster, ...]
    destination_subnets: tuple[str, ...] = ()
    sni_hosts: tuple[str, ...] = ()
    """Non-empty: only connections whose TLS ClientHello names one of them (exact or *.suffix)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """One bound address. Equality decides whether a reload touches it."""

    name: str
    """`<bind>_<port>`, as Istio names them, and `_udp` or `_quic` after it; unique in the snapshot."""
    address: str
    """IP literal or unix socket path."""
    port: int
    direction: Direction
    workload_id: str
    """The workload whose identity and labels serve connections of this listener."""
    protocol: Protocol
    """HTTP or TCP family; AUTO sniffs. UDP is datagrams, everything else a stream."""
    mtls: MtlsMode = MtlsMode.DISABLE
    """Inbound only."""
    tls: ServerTls | None = None
    """Gateway only."""
    route_table: str | None = None
    """Name of the RouteTable for HTTP; None where protocol is TCP."""
    tcp_routes: tuple[TcpRoute, ...] = ()
    """First match wins; for TCP and for what AUTO finds not to be HTTP."""
    idle_timeout_s: float | None = 3600.0
    """None: never; for UDP: the cluster's."""
    max_connections: int | None = None
    expects_proxy_header: bool = False
    """Gateway only: a connection begins with a PROXY header (version 1 or 2), which says whose it is."""
    is_quic: bool = False
    """HTTP/3: a UDP socket, beside the TCP listener of the same address that has `advertises_quic`."""
    advertises_quic: bool = False
    """Answers say that HTTP/3 is to be had on the same port (alt-svc)."""
    source: str = field(default="", compare=False)

    @property
    def socket_address(self) -> SocketAddress:
        return SocketAddress(self.address, self.port, self.is_quic or self.protocol is Protocol.UDP)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessLogPolicy:
    """encoding: `text` or `json`; format None: Istio's default."""

    path: str = "/dev/stdout"
    encoding: str = "text"
    format: str | None = None
