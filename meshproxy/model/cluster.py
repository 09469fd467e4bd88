"""A cluster: one service (or its subset) as traffic is sent to it. Names and defaults are Envoy's and Istio's."""

from dataclasses import dataclass, field
from enum import Enum

from meshproxy.model.endpoint import LocalityEndpoints


class Protocol(str, Enum):
    """Application protocol of a port (Istio protocol selection). AUTO is told from the first bytes."""

    HTTP = "HTTP"
    HTTP2 = "HTTP2"
    GRPC = "GRPC"
    GRPC_WEB = "GRPC-Web"
    HTTPS = "HTTPS"
    TLS = "TLS"
    TCP = "TCP"
    UDP = "UDP"
    AUTO = "AUTO"

    @property
    def is_http(self) -> bool:
        return self in _HTTP_PROTOCOLS


_HTTP_PROTOCOLS = frozenset({Protocol.HTTP, Protocol.HTTP2, Protocol.GRPC, Protocol.GRPC_WEB})


class Discovery(str, Enum):
    """Where a cluster's addresses come from."""

    STATIC = "STATIC"
    STRICT_DNS = "STRICT_DNS"
    ORIGINAL_DST = "ORIGINAL_DST"
    """No endpoints of its own: the connection goes where the downstream meant to go (PASSTHROUGH)."""


class LbKind(str, Enum):
    ROUND_ROBIN = "ROUND_ROBIN"
    LEAST_REQUEST = "LEAST_REQUEST"
    RANDOM = "RANDOM"
    PASSTHROUGH = "PASSTHROUGH"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowStart:
    """Istio `warmup`: a new endpoint's weight grows over the window: w·max(min, (t/window)^(1/aggression))."""

    window_s: float
    min_weight_percent: float = 10.0
    aggression: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LbPolicy:
    kind: LbKind = LbKind.LEAST_REQUEST
    slow_start: SlowStart | None = None
    is_locality_weighted: bool = False
    """Choose the locality by LocalityEndpoints.weight (Istio distribute; failover keeps weights of one priority)."""
    panic_threshold_percent: float = 50.0
    """Below this share of healthy endpoints a priority uses all of them; 0 turns panic off. Istio sets 0 (or
    minHealthPercent) whenever outlierDetection is set."""
    overprovisioning_factor_percent: int = 140


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierPolicy:
    """When a failing endpoint stops receiving traffic (Istio DestinationRule outlierDetection, Envoy's semantics)."""

    consecutive_5xx: int = 5
    """Failures in a row before ejection; 0 turns the check off."""
    consecutive_gateway_failure: int = 0
    consecutive_local_origin_failure: int = 5
    """Only with split_external_local_origin."""
    split_external_local_origin: bool = False
    interval_s: float = 10.0
    """Seconds between sweeps that restore endpoints whose ejection has run out."""
    base_ejection_s: float = 30.0
    max_ejection_s: float = 300.0
    max_ejection_percent: int = 10
    """Share of the cluster that may be out at once, 0–100."""
    always_eject_one: bool = True
    """One endpoint may go whatever the share says. Differs from Istio on purpose: an edge service has three pods."""
    success_rate_min_hosts: int = 5
    success_rate_request_volume: int = 100
    success_rate_stdev_factor: float = 1.9
    enforce_success_rate: bool = False
    """Istio forces it off; on for clusters that ask for it by annotation."""
    failure_percentage_threshold: int = 85
    failure_percentage_min_hosts: int = 5
    failure_percentage_request_volume: int = 50
    enforce_failure_percentage: bool = False
    error_codes: frozenset[int] | None = None
    """Codes that count instead of 5xx (Istio outlierDetectionHttpErrorCodes); None: 5xx."""


UNLIMITED = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBudget:
    percent: float = 20.0
    min_concurrency: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitLimits:
    """Istio connectionPool / Envoy circuit breakers; per worker process, as Envoy's are per process."""

    max_connections: int = UNLIMITED
    max_pending_requests: int = UNLIMITED
    max_requests: int = UNLIMITED
    max_retries: int = UNLIMITED
    retry_budget: RetryBudget | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpKeepalive:
    """Seconds and counts as setsockopt takes them; None leaves the system's value."""

    time_s: int | None = None
    interval_s: int | None = None
    probes: int | None = None


class TlsMode(str, Enum):
    """DestinationRule tls.mode, and AUTO for Istio's auto-mTLS."""

    DISABLE = "DISABLE"
    SIMPLE = "SIMPLE"
    MUTUAL = "MUTUAL"
    ISTIO_MUTUAL = "ISTIO_MUTUAL"
    AUTO = "AUTO"
    """ISTIO_MUTUAL to an endpoint that speaks_mtls, plaintext to others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamTls:
    mode: TlsMode = TlsMode.DISABLE
    sni: str = ""
    subject_alt_names: tuple[str, ...] = ()
    """Accepted SANs (URI or DNS); empty with ISTIO_MUTUAL means the endpoint's spiffe_ids."""
    ca_file: str | None = None
    """None: the system's roots (SIMPLE, MUTUAL) or the mesh's (ISTIO_MUTUAL)."""
    certificate_file: str | None = None
    key_file: str | None = None
    insecure_skip_verify: bool = False


PLAINTEXT = UpstreamTls()


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """Active check (WorkloadGroup probe). kind: http, tcp or grpc."""

    kind: str
    interval_s: float = 10.0
    timeout_s: float = 1.0
    initial_delay_s: float = 0.0
    healthy_threshold: int = 1
    unhealthy_threshold: int = 3
    path: str = "/"
    host: str = ""
    port: int | None = None
    """None: the endpoint's own port."""
    scheme: str = "http"
    headers: tuple[tuple[str, str], ...] = ()
    service: str = ""
    """Which service of a gRPC server is asked about; empty: the server as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Everything needed to send a request or a connection to one service port (or subset of it)."""

    name: str
    """`outbound|<port>|<subset>|<fqdn>` or `inbound|<port>||`; what logs, stats and /clusters show."""
    key: str
    """Unique in the snapshot; equals name unless two workloads see different policies of one service."""
    service_host: str
    """Fully qualified service name; metric label destination_service."""
    service_name: str
    service_namespace: str
    port: int
    subset: str = ""
    protocol: Protocol = Protocol.HTTP
    discovery: Discovery = Discovery.STATIC
    localities: tuple[LocalityEndpoints, ...] = field(default=(), hash=False)
    lb: LbPolicy = LbPolicy()
    outlier: OutlierPolicy | None = None
    limits: CircuitLimits = CircuitLimits()
    tls: UpstreamTls = PLAINTEXT
    connect_timeout_s: float = 10.0
    idle_timeout_s: float | None = 3600.0
    """HTTP: an idle pooled connection is closed after this; TCP: an idle session. None: never."""
    max_requests_per_connection: int = 0
    """0: no limit; 1: no keep-alive."""
    max_connection_duration_s: float | None = None
    tcp_keepalive: TcpKeepalive | None = None
    speaks_http2: bool = False
    """HTTP requests go over shared HTTP/2 connections: by prior knowledge in plaintext, by ALPN in TLS."""
    offers_http2: bool = True
    """Between two proxies of a mesh: HTTP/2 where both sides have it, though the service speaks HTTP/1.1."""
    offers_http3: bool = False
    """Where there is TLS: HTTP/3 where QUIC gets through, else what TCP would have."""
    follows_client: bool = False
    """HTTP requests go on in the version they came in, whatever speaks_http2 and offers_http2 say."""
    proxy_protocol: int = 0
    """Version of the PROXY header that begins a connection and names the downstream; 0: none."""
    max_concurrent_streams: int = 0
    """Of one HTTP/2 connection; 0: what the peer allows."""
    health_check: HealthCheck | None = None
    source: str = field(default="", compare=False)
    """file:line of the resource that shaped it, for /config_dump; not part of equality of traffic."""
