"""ServiceEntry and WorkloadEntry → services and the workloads behind them.

Source: Istio ServiceEntry, WorkloadEntry, WorkloadGroup; istio pilot/pkg/serviceregistry/serviceentry/conversion.go.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshproxy.model.cluster import Discovery
from meshproxy.model.endpoint import NOWHERE, Locality
from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.health_checks import Probes
from meshproxy.snapshot.hosts import selects
from meshproxy.snapshot.protocols import declared_protocol
from meshproxy.snapshot.services import NO_PORTS, Instance, Service, ServicePort, by_transport
from meshproxy.snapshot.workload_names import metric_labels, spiffe_uri

_TRAFFIC_DISTRIBUTION_ANNOTATION = "networking.istio.io/traffic-distribution"


@dataclass(frozen=True, slots=True, eq=False)
class WorkloadInstance:
    """A WorkloadEntry. instance: None where it has no address to send to."""

    resource: Resource
    labels: Mapping[str, str]
    instance: Instance | None


def workload_instances(
    entries: Iterable[Resource], trust_domain: str, probes: Probes, findings: Findings
) -> list[WorkloadInstance]:
    found = []
    for resource in entries:
        spec = resource.spec
        # Istio merges both, and the labels of the object win.
        labels = {**(spec.get("labels") or {}), **resource.labels}
        instance = None
        if _is_reachable(spec, resource, "spec", findings):
            check = probes.for_entry(resource, labels)
            instance = _instance(spec, labels, resource.namespace, resource.name, trust_domain, check)
        found.append(WorkloadInstance(resource, labels, instance))
    return found


def _is_reachable(spec: Mapping[str, Any], resource: Resource, path: str, findings: Findings) -> bool:
    address = spec.get("address") or ""
    if address.startswith("unix://@"):
        message = f"{address} is an abstract unix socket, which this version does not connect to"
        findings.warn(resource, f"{path}.address", message, "the endpoint is left out")
        return False
    return bool(address)


def _instance(
    spec: Mapping[str, Any], labels: Mapping[str, str], namespace: str, name: str, trust_domain: str, check: Any
) -> Instance:
    account = spec.get("serviceAccount")
    return Instance(
        address=spec["address"],
        ports=spec.get("ports") or NO_PORTS,
        locality=parse_locality(spec.get("locality") or ""),
        weight=spec.get("weight") or 1,
        namespace=namespace,
        identity=spiffe_uri(trust_domain, namespace, account) if account else "",
        labels=labels,
        workload=metric_labels(name, namespace, labels),
        health_check=check,
    )


def parse_locality(text: str) -> Locality:
    parts = text.split("/")
    return Locality(*(part for part in parts[:3])) if text else NOWHERE


def service_entries(
    entries: Iterable[Resource],
    workload_entries: Sequence[WorkloadInstance],
    trust_domain: str,
    probes: Probes,
    findings: Findings,
) -> list[Service]:
    """One service per host. Several entries of one namespace for one host: the oldest is used."""
    services: dict[tuple[str, str], Service] = {}
    for resource in entries:
        hosts = [host.lower() for host in resource.spec.get("hosts") or ()]
        instances: list[Instance] | None = None
        for index, host in enumerate(hosts):
            taken = services.get((resource.namespace, host))
            if taken is not None:
                where = taken.resource.source
                message = f"{host} is already declared by ServiceEntry {taken.resource.name} at {where}"
                findings.warn(resource, f"spec.hosts[{index}]", message, "the older one is used")
                continue
            if instances is None:
                instances = _instances(resource, workload_entries, trust_domain, probes, findings)
            services[resource.namespace, host] = _service(resource, host, index, instances, findings)
    return list(services.values())


def _instances(
    resource: Resource,
    workload_entries: Sequence[WorkloadInstance],
    trust_domain: str,
    probes: Probes,
    findings: Findings,
) -> list[Instance]:
    spec, namespace = resource.spec, resource.namespace
    selector = (spec.get("workloadSelector") or {}).get("labels")
    if selector:
        return [
            entry.instance
            for entry in workload_entries
            if entry.resource.namespace == namespace and entry.instance is not None and selects(selector, entry.labels)
        ]
    # Equal label sets are one object: ten thousand endpoints carry a handful of them.
    shared: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = {}
    instances = []
    for index, endpoint in enumerate(spec.get("endpoints") or ()):
        written = endpoint.get("labels") or {}
        labels = shared.setdefault(tuple(written.items()), written)
        if _is_reachable(endpoint, resource, f"spec.endpoints[{index}]", findings):
            check = probes.for_labels(namespace, labels)
            instances.append(_instance(endpoint, labels, namespace, "", trust_domain, check))
    return instances


def _port(port: Mapping[str, Any]) -> ServicePort:
    name = port.get("name") or ""
    protocol = declared_protocol(port["number"], port.get("protocol") or "", name)
    return ServicePort(port["number"], name, protocol, port.get("targetPort"))


def _service(resource: Resource, host: str, index: int, instances: Sequence[Instance], findings: Findings) -> Service:
    spec = resource.spec
    resolution = spec.get("resolution") or "NONE"
    ports, udp_ports = by_transport([_port(port) for port in spec.get("ports") or ()])
    service = Service(
        host=host,
        name=host,
        namespace=resource.namespace,
        ports=ports,
        udp_ports=udp_ports,
        resource=resource,
        # An address range names no single host a client could write.
        addresses=tuple(address for address in spec.get("addresses") or () if "/" not in address),
        export_to=tuple(spec.get("exportTo") or ()),
        is_external=(spec.get("location") or "MESH_EXTERNAL") == "MESH_EXTERNAL",
        subject_alt_names=tuple(spec.get("subjectAltNames") or ()),
        traffic_distribution=resource.annotations.get(_TRAFFIC_DISTRIBUTION_ANNOTATION, ""),
    )
    if resolution == "STATIC":
        service.instances = list(instances)
        return service
    service.discovery = Discovery.STRICT_DNS
    if resolution == "NONE":
        message = (
            "NONE means the address the client meant to reach, which a listener without captured traffic does not know"
        )
        findings.warn(resource, "spec.resolution", message, "the host name is resolved by DNS instead")
    if instances and resolution != "NONE":
        service.instances = list(instances)
    elif "*" in host:
        findings.warn(resource, f"spec.hosts[{index}]", f"{host} cannot be resolved by DNS", "it has no endpoints")
    else:
        service.instances = [Instance(address=host, namespace=resource.namespace)]
    return service
