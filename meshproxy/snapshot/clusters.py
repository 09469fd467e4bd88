"""Service, port and subset, as one workload sees them → a cluster.

Decides: which endpoints, under which policy, under which key. Clusters are made when a route first names them, so what
nobody can reach costs nothing. Leaves to others: the policy's fields (traffic_policy), localities (localities).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from meshproxy.model.cluster import Cluster, Discovery, HealthCheck, Protocol
from meshproxy.model.endpoint import Endpoint, Locality
from meshproxy.model.workload import WorkloadLabels
from meshproxy.resources.document import Resource
from meshproxy.snapshot.destination_rules import DestinationRules, Rule, settings_for
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.listeners import UNIX_SCHEME
from meshproxy.snapshot.localities import (
    HOSTNAME_LABEL,
    LocalityPolicy,
    Placed,
    arrange,
    effective_policy,
    topology_labels,
)
from meshproxy.snapshot.peer_authentication import PeerAuthentications
from meshproxy.snapshot.services import Instance, Service, ServicePort, Services
from meshproxy.snapshot.traffic_policy import (
    lb_policy,
    offers_http3,
    outlier_policy,
    pool_settings,
    proxy_protocol,
    upstream_tls,
    warn_of_udp_tls,
)
from meshproxy.snapshot.workload_names import TLS_MODE_LABEL
from meshproxy.snapshot.workloads import LocalWorkload

_T = TypeVar("_T")


def outbound_name(port: int, subset: str, host: str, *, is_udp: bool = False) -> str:
    """Istio's name for a cluster; Istio has none for UDP, which is written `53/udp` here."""
    return f"outbound|{port}{'/udp' if is_udp else ''}|{subset}|{host}"


@dataclass(frozen=True, slots=True)
class OwnPort:
    """An inbound listener of this process, as other workloads reach it."""

    identity: str
    takes_mtls: bool
    workload: WorkloadLabels


class OutboundClusters:
    """Makes and keeps the clusters that routes name. `built` is keyed by Cluster.key."""

    def __init__(
        self,
        services: Services,
        rules: DestinationRules,
        peer_authentications: PeerAuthentications,
        workloads: Sequence[LocalWorkload],
        own_ports: Mapping[tuple[str, int, bool], OwnPort],
        findings: Findings,
    ) -> None:
        self.built: dict[str, Cluster] = {}
        self._services = services
        self._rules = rules
        self._peer_authentications = peer_authentications
        self._workloads = workloads
        self._own_ports = own_ports
        self._findings = findings
        self._keys: dict[tuple[int, int, str, bool], Mapping[str, str] | None] = {}
        self._shared: dict[Any, Any] = {}
        self._endpoints: dict[tuple[int, int, bool, str, int], Sequence[tuple[Endpoint, Instance]]] = {}

    def key(self, service: Service, port: int, subset: str, workload_id: str, *, is_udp: bool = False) -> str | None:
        """Key of the cluster as the workload sees it; None where the port or the subset does not exist."""
        at = (id(service), port, subset, is_udp)
        if at not in self._keys:
            self._keys[at] = self._build(service, port, subset, is_udp)
        keys = self._keys[at]
        return keys.get(workload_id) if keys is not None else None

    def add(self, cluster: Cluster) -> None:
        self.built[cluster.key] = cluster

    def _build(self, service: Service, number: int, subset: str, is_udp: bool) -> Mapping[str, str] | None:
        """Workload id → cluster key. Workloads that see the same share one cluster."""
        port = service.port(number, is_udp=is_udp)
        if port is None:
            return None
        seen: dict[tuple[int, Locality, str], Cluster | None] = {}
        views: list[tuple[str, Cluster | None]] = []
        for local in self._workloads:
            rule = self._rules.find(service, local.workload)
            # Labels matter only to failoverPriority, the locality only where endpoints are told apart by it.
            labels_of = local.workload.id if self._orders_by_labels(service, rule, port, subset) else ""
            view = (id(rule), local.locality, labels_of)
            if view not in seen:
                seen[view] = self._cluster(service, port, subset, rule, local)
            views.append((local.workload.id, seen[view]))
        keys: dict[str, str] = {}
        distinct: list[tuple[str, Cluster]] = []
        for workload_id, cluster in views:
            if cluster is None:
                continue
            owner = next((first for first, known in distinct if known is cluster or known == cluster), None)
            if owner is None:
                distinct.append((workload_id, cluster))
                owner = workload_id
            keys[workload_id] = owner
        name = outbound_name(number, subset, service.host, is_udp=is_udp)
        suffixes = {first: f"@{first}" if len(distinct) > 1 else "" for first, _ in distinct}
        for first, cluster in distinct:
            self.add(replace(cluster, key=name + suffixes[first]) if suffixes[first] else cluster)
        return {workload_id: name + suffixes[owner] for workload_id, owner in keys.items()}

    def _orders_by_labels(self, service: Service, rule: Rule | None, port: ServicePort, subset: str) -> bool:
        if service.traffic_distribution:
            return True
        if rule is None:
            return False
        balancer = settings_for(rule, port.number, rule.subsets.get(subset)).get("loadBalancer")
        return balancer is not None and bool((balancer.value.get("localityLbSetting") or {}).get("failoverPriority"))

    def _cluster(
        self, service: Service, port: ServicePort, subset: str, rule: Rule | None, local: LocalWorkload
    ) -> Cluster | None:
        chosen = rule.subsets.get(subset) if rule is not None and subset else None
        if subset and chosen is None:
            return None
        settings = settings_for(rule, port.number, chosen)
        balancer, outlier = settings.get("loadBalancer"), settings.get("outlierDetection")
        locality_policy = effective_policy(
            balancer.value.get("localityLbSetting") if balancer is not None else None,
            service.traffic_distribution,
            outlier is not None,
        )
        endpoints = self._endpoints_of(service, port, subset, chosen.labels if chosen is not None else {}, rule)
        proxy_labels = topology_labels(local.locality, local.workload.labels)
        localities, is_weighted = arrange(
            _placed(endpoints, locality_policy), locality_policy, local.locality, proxy_labels
        )
        shaped_by: Resource = chosen.resource if chosen is not None else rule.resource if rule else service.resource
        is_udp = port.protocol is Protocol.UDP
        tls = settings.get("tls")
        if is_udp:
            warn_of_udp_tls(tls, self._findings)
        name = outbound_name(port.number, subset, service.host, is_udp=is_udp)
        return Cluster(
            name=name,
            key=name,
            service_host=service.host,
            service_name=service.name,
            service_namespace=service.namespace,
            port=port.number,
            subset=subset,
            protocol=port.protocol,
            discovery=_discovery(endpoint for endpoint, _ in endpoints),
            localities=localities,
            lb=self._share(lb_policy(balancer, outlier, is_weighted, self._findings)),
            outlier=self._share(outlier_policy(outlier)),
            tls=upstream_tls(tls, service.host, port.number, subset, service.is_external or is_udp),
            proxy_protocol=proxy_protocol(settings.get("proxyProtocol"), port.protocol, self._findings),
            health_check=_health_check(endpoints),
            offers_http3=port.protocol.is_http and offers_http3(rule, chosen),
            source=shaped_by.source,
            **pool_settings(settings.get("connectionPool"), settings.get("retryBudget"), port.protocol),
        )

    def _share(self, policy: _T) -> _T:
        """Equal policies are one object: a thousand clusters have a handful of them."""
        shared: _T = self._shared.setdefault(policy, policy)
        return shared

    def _endpoints_of(
        self, service: Service, port: ServicePort, subset: str, labels: Mapping[str, str], rule: Rule | None
    ) -> Sequence[tuple[Endpoint, Instance]]:
        at = (id(service), port.number, port.protocol is Protocol.UDP, subset, id(rule) if subset else 0)
        found = self._endpoints.get(at)
        if found is None:
            found = self._endpoints[at] = list(self._select(service, port, labels))
        return found

    def _select(
        self, service: Service, port: ServicePort, labels: Mapping[str, str]
    ) -> Iterable[tuple[Endpoint, Instance]]:
        instances: Iterable[Instance] = service.instances
        is_udp = port.protocol is Protocol.UDP
        if service.alias_of:
            real = self._services.find(service.alias_of, service.namespace)
            if real is not None and not real.alias_of:
                instances = real.instances
                port = real.port(port.number, is_udp=is_udp) or port
        wanted = labels.items()
        seen: set[tuple[str, int]] = set()
        for instance in instances:
            if wanted and not wanted <= instance.labels.items():
                continue
            number = instance.port_for(port)
            if number is None:
                continue
            endpoint = self._endpoint(service, instance, number, is_udp)
            # The same address twice would be two endpoints with one name in health reports.
            address = (endpoint.address, endpoint.port)
            if address not in seen:
                seen.add(address)
                yield endpoint, instance

    def _endpoint(self, service: Service, instance: Instance, port: int, is_udp: bool) -> Endpoint:
        address = instance.address
        if address.startswith(UNIX_SCHEME):
            address, port = address.removeprefix(UNIX_SCHEME), 0
        identity, workload = instance.identity, instance.workload
        own = self._own_ports.get((address, port, is_udp))
        if own is not None:
            identity, speaks_mtls, workload = own.identity, own.takes_mtls, own.workload
        else:
            speaks_mtls = instance.labels.get(TLS_MODE_LABEL) == "istio"
            if speaks_mtls and self._peer_authentications.is_disabled(instance.namespace, instance.labels, port):
                speaks_mtls = False
        return Endpoint(
            address=address,
            port=port,
            weight=instance.weight,
            speaks_mtls=speaks_mtls,
            spiffe_ids=((identity, *service.subject_alt_names) if identity else service.subject_alt_names),
            workload=workload,
            labels=instance.labels,
        )


def _placed(endpoints: Iterable[tuple[Endpoint, Instance]], policy: LocalityPolicy) -> list[Placed]:
    if not policy.failover_priority:
        return [Placed(endpoint, instance.locality, instance.labels) for endpoint, instance in endpoints]
    return [
        Placed(
            endpoint,
            instance.locality,
            topology_labels(
                instance.locality,
                {HOSTNAME_LABEL: instance.node, **instance.labels} if instance.node else instance.labels,
            ),
        )
        for endpoint, instance in endpoints
    ]


def _discovery(endpoints: Iterable[Endpoint]) -> Discovery:
    """By what the addresses are, whatever `resolution` says: an IP needs no DNS, and a name cannot do without."""
    for endpoint in endpoints:
        address = endpoint.address
        # Names whose last label is a number do not exist, so this tells IP addresses without parsing them.
        if address[:1] not in ("/", "@") and ":" not in address and not address.rpartition(".")[2].isdecimal():
            return Discovery.STRICT_DNS
    return Discovery.STATIC


def _health_check(endpoints: Iterable[tuple[Endpoint, Instance]]) -> HealthCheck | None:
    return next((instance.health_check for _, instance in endpoints if instance.health_check is not None), None)
