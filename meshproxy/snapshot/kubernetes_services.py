"""Kubernetes Services and EndpointSlices → services.

Source: Kubernetes API v1 and discovery.k8s.io/v1; istio pkg/config/kube/conversion.go.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshproxy.model.cluster import Discovery
from meshproxy.model.endpoint import NOWHERE, Locality
from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import selects, service_fqdn
from meshproxy.snapshot.localities import REGION_LABEL, SUBZONE_LABEL, ZONE_LABEL
from meshproxy.snapshot.protocols import select_protocol
from meshproxy.snapshot.service_entries import WorkloadInstance
from meshproxy.snapshot.services import NO_LABELS, Instance, Service, ServicePort, by_transport
from meshproxy.snapshot.workload_names import metric_labels, spiffe_uri

_SERVICE_NAME_LABEL = "kubernetes.io/service-name"
_EXPORT_ANNOTATION = "networking.istio.io/exportTo"
TRAFFIC_DISTRIBUTION_ANNOTATION = "networking.istio.io/traffic-distribution"


def kubernetes_services(
    services: Iterable[Resource],
    slices: Iterable[Resource],
    workload_entries: Sequence[WorkloadInstance],
    pods: Iterable[Resource],
    nodes: Iterable[Resource],
    region: str,
    trust_domain: str,
    findings: Findings,
) -> list[Service]:
    """region: of this proxy, for endpoints on nodes that are not known: an EndpointSlice itself names only zones."""
    reader = _SliceReader(pods, nodes, region, trust_domain)
    slices_by_service: dict[tuple[str, str], list[Resource]] = {}
    for resource in slices:
        name = resource.labels.get(_SERVICE_NAME_LABEL)
        if name is None:
            message = f"the label {_SERVICE_NAME_LABEL} is missing, so the slice belongs to no Service"
            findings.warn(resource, "metadata.labels", message, "its endpoints are not used")
            continue
        slices_by_service.setdefault((resource.namespace, name), []).append(resource)
    return [
        _service(resource, slices_by_service.get((resource.namespace, resource.name), ()), workload_entries, reader)
        for resource in services
    ]


def _service(
    resource: Resource,
    slices: Iterable[Resource],
    workload_entries: Sequence[WorkloadInstance],
    reader: "_SliceReader",
) -> Service:
    spec = resource.spec
    external_name = spec.get("externalName") if spec.get("type") == "ExternalName" else None
    ports, udp_ports = by_transport([_port(port) for port in spec.get("ports") or ()])
    service = Service(
        host=service_fqdn(resource.name, resource.namespace),
        name=resource.name,
        namespace=resource.namespace,
        ports=ports,
        udp_ports=udp_ports,
        resource=resource,
        addresses=_addresses(spec),
        export_to=tuple(
            word.strip() for word in resource.annotations.get(_EXPORT_ANNOTATION, "").split(",") if word.strip()
        ),
        traffic_distribution=spec.get("trafficDistribution")
        or resource.annotations.get(TRAFFIC_DISTRIBUTION_ANNOTATION, ""),
    )
    if external_name:
        service.discovery = Discovery.STRICT_DNS
        service.alias_of = external_name.lower().rstrip(".")
        service.instances.append(Instance(address=service.alias_of, workload=metric_labels("", resource.namespace, {})))
        return service
    for endpoint_slice in slices:
        service.instances += reader.instances(endpoint_slice)
    if spec.get("selector"):
        selector = spec["selector"]
        service.instances += [
            entry.instance
            for entry in workload_entries
            if entry.resource.namespace == resource.namespace
            and entry.instance is not None
            and selects(selector, entry.labels)
        ]
    return service


def _port(port: Mapping[str, Any]) -> ServicePort:
    name = port.get("name") or ""
    protocol = select_protocol(port["port"], name, port.get("appProtocol") or "", port.get("protocol") or "TCP")
    return ServicePort(port["port"], name, protocol, port.get("targetPort"))


def _addresses(spec: Mapping[str, Any]) -> tuple[str, ...]:
    addresses = [*(spec.get("clusterIPs") or ()), spec.get("clusterIP") or ""]
    return tuple(dict.fromkeys(address for address in addresses if address and address != "None"))


class _SliceReader:
    """EndpointSlices → instances, with what Pods and Nodes add where they are known."""

    def __init__(self, pods: Iterable[Resource], nodes: Iterable[Resource], region: str, trust_domain: str) -> None:
        self._pods = {(pod.namespace, pod.name): pod for pod in pods}
        self._nodes = {node.name: node for node in nodes}
        self._region = region
        self._trust_domain = trust_domain

    def instances(self, resource: Resource) -> list[Instance]:
        spec, namespace = resource.spec, resource.namespace
        ports = {port.get("name") or "": port["port"] for port in spec.get("ports") or () if port.get("port")}
        instances = []
        for endpoint in spec.get("endpoints") or ():
            # An unset condition means ready (discovery.k8s.io/v1 EndpointConditions).
            if (endpoint.get("conditions") or {}).get("ready") is False:
                continue
            target = endpoint.get("targetRef") or {}
            pod = self._pods.get((namespace, target.get("name", ""))) if target.get("kind") == "Pod" else None
            labels = pod.labels if pod is not None else NO_LABELS
            account = (pod.spec.get("serviceAccountName") or "default") if pod is not None else ""
            node = endpoint.get("nodeName") or ""
            instances.append(
                Instance(
                    # One endpoint's addresses are the same Pod under several names: the first is enough.
                    address=endpoint["addresses"][0],
                    ports=ports,
                    is_port_bound=True,
                    locality=self._locality(endpoint.get("zone") or "", node, labels),
                    namespace=namespace,
                    identity=spiffe_uri(self._trust_domain, namespace, account) if account else "",
                    labels=labels,
                    node=node,
                    workload=metric_labels(pod.name if pod is not None else "", namespace, labels),
                )
            )
        return instances

    def _locality(self, zone: str, node_name: str, labels: Mapping[str, str]) -> Locality:
        node = self._nodes.get(node_name)
        node_labels = node.labels if node is not None else NO_LABELS
        zone = zone or node_labels.get(ZONE_LABEL, "")
        if not zone:
            return NOWHERE
        region = node_labels.get(REGION_LABEL) or self._region
        return Locality(region, zone, labels.get(SUBZONE_LABEL) or node_labels.get(SUBZONE_LABEL, ""))
