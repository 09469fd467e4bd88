"""Resources → the snapshot: what Istio's configuration means for the workloads of this process.

Decides: the order of things. Each subject has its module here. Pure: the same resources give the same snapshot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshproxy.model.endpoint import Locality
from meshproxy.model.listener import AccessLogPolicy
from meshproxy.model.workload import WorkloadLabels
from meshproxy.resources.document import Resource
from meshproxy.resources.problems import ConfigProblem
from meshproxy.snapshot.clusters import OutboundClusters
from meshproxy.snapshot.content import reuse, version_of
from meshproxy.snapshot.destination_rules import DestinationRules
from meshproxy.snapshot.findings import Findings, age_order
from meshproxy.snapshot.gateways import Gateways
from meshproxy.snapshot.health_checks import Probes
from meshproxy.snapshot.inbound import Inbound
from meshproxy.snapshot.kubernetes_services import kubernetes_services
from meshproxy.snapshot.listeners import Listeners, with_quic
from meshproxy.snapshot.outbound import Outbound
from meshproxy.snapshot.peer_authentication import PeerAuthentications
from meshproxy.snapshot.routes import Routes
from meshproxy.snapshot.service_entries import WorkloadInstance, service_entries, workload_instances
from meshproxy.snapshot.services import Services
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.snapshot.virtual_services import VirtualServices
from meshproxy.snapshot.workload_names import known_peers
from meshproxy.snapshot.workloads import LocalWorkload, ProcessIdentity, Sidecars, local_workloads

_NETWORKING = "networking.istio.io"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyContext:
    """Who this process is, as its flags say."""

    locality: Locality
    default_namespace: str = "default"
    service_account: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    trust_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    access_log: AccessLogPolicy | None = None
    idle_timeout_s: float | None = 3600.0
    """Of downstream connections; None: never."""
    has_http3: bool = False
    """Whether there is QUIC beside TCP where HTTP is always encrypted."""


def translate(
    resources: Sequence[Resource], context: ProxyContext, previous: Snapshot | None = None
) -> tuple[Snapshot, list[ConfigProblem]]:
    """The snapshot, and what does not fit together in resources that are each well formed. Never raises on those.

    previous: parts that did not change are the same objects in both snapshots; if nothing did, it is returned itself.
    """
    findings = Findings()
    kinds: dict[tuple[str, str], list[Resource]] = {}
    # Whichever module must choose between two of a kind takes the older: they all see them in this order.
    for resource in sorted(resources, key=age_order):
        kinds.setdefault((resource.group, resource.kind), []).append(resource)

    def of(group: str, kind: str) -> list[Resource]:
        return kinds.get((group, kind), [])

    probes = Probes(of(_NETWORKING, "WorkloadGroup"))
    entries = workload_instances(of(_NETWORKING, "WorkloadEntry"), context.trust_domain, probes, findings)
    services = Services(
        [
            *kubernetes_services(
                of("", "Service"),
                of("discovery.k8s.io", "EndpointSlice"),
                entries,
                of("", "Pod"),
                of("", "Node"),
                context.locality.region,
                context.trust_domain,
                findings,
            ),
            *service_entries(of(_NETWORKING, "ServiceEntry"), entries, context.trust_domain, probes, findings),
        ]
    )
    process = ProcessIdentity(
        locality=context.locality,
        namespace=context.default_namespace,
        service_account=context.service_account,
        labels=context.labels,
        trust_domain=context.trust_domain,
    )
    sidecars = Sidecars(of(_NETWORKING, "Sidecar"), context.root_namespace, findings)
    workloads = local_workloads(entries, of("apps", "Deployment"), sidecars, process)
    peer_authentications = PeerAuthentications(
        of("security.istio.io", "PeerAuthentication"), context.root_namespace, findings
    )
    gateways = Gateways(of(_NETWORKING, "Gateway"), workloads, process)
    workloads = gateways.workloads
    rules = DestinationRules(of(_NETWORKING, "DestinationRule"), services, context.root_namespace, findings)
    virtual_services = VirtualServices(of(_NETWORKING, "VirtualService"), services, findings)

    listeners = Listeners(findings, context.idle_timeout_s)
    inbound = Inbound(workloads, peer_authentications, listeners, findings)
    clusters = OutboundClusters(services, rules, peer_authentications, workloads, inbound.own_ports(), findings)
    inbound.add(services.all, clusters)
    routes = Routes(services, clusters, findings)
    outbound = Outbound(services, virtual_services, clusters, routes, listeners, findings)
    for local in workloads:
        outbound.add(local)
    gateways.add(virtual_services, routes, listeners)

    parts = Snapshot(
        version="",
        workloads={local.workload.id: local.workload for local in workloads},
        listeners=with_quic(listeners.by_name) if context.has_http3 else listeners.by_name,
        route_tables=listeners.route_tables,
        clusters=clusters.built,
        peers=_peers(workloads, entries, services),
        access_log=context.access_log,
    )
    snapshot = reuse(parts, previous) if previous is not None else parts
    if snapshot is not previous:
        snapshot = version_of(snapshot)
    return snapshot, findings.all()


def _peers(
    workloads: Sequence[LocalWorkload], entries: Sequence[WorkloadInstance], services: Services
) -> dict[str, WorkloadLabels]:
    known: list[tuple[str, WorkloadLabels]] = [
        (str(local.workload.identity), local.workload.metric_labels) for local in workloads
    ]
    local_ids = {local.workload.id for local in workloads}
    for entry in entries:
        # A local WorkloadEntry is there already, under the same name.
        if f"{entry.resource.namespace}/{entry.resource.name}" in local_ids:
            continue
        if entry.instance is not None and entry.instance.identity:
            known.append((entry.instance.identity, entry.instance.workload))
    seen: set[int] = set()
    for service in services.all:
        for instance in service.instances:
            if instance.identity and id(instance) not in seen:
                seen.add(id(instance))
                known.append((instance.identity, instance.workload))
    return known_peers(known)
