"""The process's own settings: what the operator said on the command line or in the environment.

Plain data that the supervisor, the control process and the command line share; cli/settings.py fills it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshproxy.model.address import SocketAddress
from meshproxy.model.endpoint import NOWHERE, Locality
from meshproxy.model.listener import AccessLogPolicy

DEFAULT_ADMIN = SocketAddress("127.0.0.1", 15000)
DEFAULT_METRICS = SocketAddress("0.0.0.0", 15020)
DEFAULT_READY = SocketAddress("0.0.0.0", 15021)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every field is a flag of `meshproxy run` and a MESHPROXY_… variable."""

    config_paths: tuple[str, ...]
    workers: int = 1
    locality: Locality = NOWHERE
    admin: SocketAddress = DEFAULT_ADMIN
    """Loopback only."""
    metrics: SocketAddress = DEFAULT_METRICS
    ready: SocketAddress = DEFAULT_READY
    certificates_dir: str | None = None
    """Holds <namespace>/<service account>/{cert-chain,key,root-cert}.pem; None: no mesh identity."""
    namespace: str = "default"
    """Of resources that name none, and of this proxy's own workload."""
    service_account: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    trust_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    node_id: str = ""
    log_level: str = "info"
    access_log_file: str | None = None
    """/dev/stdout or a file; None: no access log."""
    access_log_encoding: str = "text"
    access_log_format: str | None = None
    """None: Istio's."""
    drain_time_s: float = 5.0
    """Istio's terminationDrainDuration: how long a drain waits for what is in flight."""
    idle_timeout_s: float = 3600.0
    """Of downstream connections on which nothing moves; 0: never."""
    has_http3: bool = False
    """Whether HTTPS listeners of gateways and inbound listeners with mutual TLS serve QUIC on the same port, too."""
    memory_limit_bytes: int | None = None
    """Of all processes together, before which load is shed; 0: never; None: what the control group says."""
    ports_file: str | None = None
    """Where the chosen admin, metrics and ready ports are written as JSON, once they are bound."""

    @property
    def access_log(self) -> AccessLogPolicy | None:
        if self.access_log_file is None:
            return None
        return AccessLogPolicy(
            path=self.access_log_file, encoding=self.access_log_encoding, format=self.access_log_format
        )
