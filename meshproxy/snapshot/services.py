"""The services of the mesh and the workloads behind them, whichever resource they came from.

Decides: who finds which service under a host. Leaves to others: reading Kubernetes' and Istio's resources
(kubernetes_services, service_entries), what traffic to a service is like (clusters).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshproxy.model.cluster import Discovery, HealthCheck, Protocol
from meshproxy.model.endpoint import NOWHERE, Locality
from meshproxy.model.workload import UNKNOWN_WORKLOAD, WorkloadLabels
from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import age_order
from meshproxy.snapshot.hosts import is_exported, qualified

NO_PORTS: Mapping[str, int] = {}
NO_LABELS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class ServicePort:
    number: int
    name: str
    protocol: Protocol
    target: int | str | None = None
    """Port on the workload, or its name there; None: the number itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One workload behind a service."""

    address: str
    """IP literal, DNS name, or `unix://` and a path."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Port numbers by port name, where they differ from the service's own."""
    is_port_bound: bool = False
    """Only the named ports exist (EndpointSlice); otherwise a missing name means the service's target port."""
    locality: Locality = NOWHERE
    weight: int = 1
    namespace: str = ""
    identity: str = ""
    """SPIFFE URI; empty where unknown."""
    labels: Mapping[str, str] = field(default_factory=dict)
    node: str = ""
    workload: WorkloadLabels = UNKNOWN_WORKLOAD
    health_check: HealthCheck | None = None

    def port_for(self, port: ServicePort) -> int | None:
        """Where this instance serves the port; None where it does not."""
        if self.is_port_bound:
            return self.ports.get(port.name)
        found = self.ports.get(port.name)
        if found is None and isinstance(port.target, str):
            found = self.ports.get(port.target)
        if found is not None:
            return found
        return port.target if isinstance(port.target, int) else port.number


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """One host name with its ports. Identity matters, not equality."""

    host: str
    name: str
    """Metric label destination_service_name."""
    namespace: str
    ports: tuple[ServicePort, ...]
    """Those that carry streams."""
    resource: Resource
    udp_ports: tuple[ServicePort, ...] = ()
    """Apart, because one number may be both: DNS is 53 over TCP and 53 over UDP."""
    discovery: Discovery = Discovery.STATIC
    addresses: tuple[str, ...] = ()
    """Virtual addresses a client may name instead of the host."""
    export_to: tuple[str, ...] = ()
    is_external: bool = False
    """Outside the mesh: no mTLS unless a DestinationRule asks for it."""
    subject_alt_names: tuple[str, ...] = ()
    traffic_distribution: str = ""
    alias_of: str = ""
    """ExternalName: the host whose endpoints these are, where the mesh knows it."""
    instances: list[Instance] = field(default_factory=list)

    def port(self, number: int, *, is_udp: bool = False) -> ServicePort | None:
        ports = self.udp_ports if is_udp else self.ports
        return next((port for port in ports if port.number == number), None)


def by_transport(ports: Sequence[ServicePort]) -> tuple[tuple[ServicePort, ...], tuple[ServicePort, ...]]:
    """(`ports`, `udp_ports`) of a Service."""
    return (
        tuple(port for port in ports if port.protocol is not Protocol.UDP),
        tuple(port for port in ports if port.protocol is Protocol.UDP),
    )


class Services:
    """All services, found by host as a namespace sees them."""

    __slots__ = ("_by_host", "all")

    def __init__(self, services: Sequence[Service]) -> None:
        self.all: tuple[Service, ...] = tuple(sorted(services, key=lambda service: age_order(service.resource)))
        self._by_host: dict[str, list[Service]] = {}
        for service in self.all:
            self._by_host.setdefault(service.host, []).append(service)

    def find(self, host: str, namespace: str) -> Service | None:
        """The service of that exact host: the namespace's own before others', the oldest first."""
        found = self._by_host.get(host)
        if found is None:
            return None
        if len(found) > 1:
            found = sorted(found, key=lambda service: service.namespace != namespace)
        return next((s for s in found if is_exported(s.export_to, s.namespace, namespace)), None)

    def resolve(self, written: str, namespace: str, seen_from: str) -> tuple[str, Service | None]:
        """A host as a resource of `namespace` wrote it → its full name, and the service as `seen_from` sees it.

        A short name is completed by the resource's own namespace, unless a ServiceEntry declares it as it stands.
        """
        full = qualified(written, namespace)
        service = self.find(full, seen_from)
        if service is None and full != written:
            as_written = self.find(written.lower(), seen_from)
            if as_written is not None:
                return as_written.host, as_written
        return full, service

    def visible_to(self, namespace: str) -> list[Service]:
        """One service per host, in order of age."""
        return [
            service
            for service in self.all
            if (len(self._by_host[service.host]) == 1 and is_exported(service.export_to, service.namespace, namespace))
            or self.find(service.host, namespace) is service
        ]
