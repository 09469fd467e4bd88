"""Kubernetes objects, as far as traffic depends on them: Service, EndpointSlice, Deployment, Pod, Namespace, Node.

These APIs are large and their owner checks them; here only the fields that are read are checked, and a field beside
them passes unless it looks like one of them misspelt. What a Deployment lacks is a warning: it is read for its
containers.
Source: Kubernetes API reference, v1, apps/v1 and discovery.k8s.io/v1.
"""

from typing import Any, Final

from meshproxy.resources import names
from meshproxy.resources.document import Path, Value
from meshproxy.resources.schema import (
    AnyValue,
    Boolean,
    Choice,
    Field,
    Integer,
    Items,
    Reading,
    Struct,
    Table,
    Text,
    shown,
)

_PORT: Final = Integer(1, 65535)
_LABELS: Final = Table(Text(names.label_value, keeps_empty=True), key=names.as_table_key(names.label_key))
_ANNOTATIONS: Final = Table(Text(keeps_empty=True))
_TRANSPORT: Final = Choice("TCP", "UDP", "SCTP")


class _PortOrName(Field):
    """A number, or the name of a container's port."""

    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is str:
            return Text(names.dns_label).read(value, at, reading)
        return _PORT.read(value, at, reading)


def _check_ports(value: dict[str, Any], at: Path, reading: Reading) -> None:
    ports = value.get("ports", ())
    seen_names: set[str] = set()
    seen: set[Any] = set()
    for index, port in enumerate(ports):
        here = ((at, "ports"), index)
        name = port.get("name", "")
        if len(ports) > 1 and not name:
            reading.error(here, "each of several ports needs a name")
        elif name in seen_names:
            reading.error((here, "name"), f"port name {shown(name)} is given twice")
        key = (port.get("port"), port.get("protocol", "TCP"))
        if "port" in port and key in seen:
            reading.error((here, "port"), f"port {key[0]} is given twice")
        seen_names.add(name)
        seen.add(key)


def _check_service(value: dict[str, Any], at: Path, reading: Reading) -> None:
    kind = value.get("type", "ClusterIP")
    if kind == "ExternalName":
        if "externalName" not in value:
            reading.error(at, "type ExternalName needs externalName")
    elif not value.get("ports") and value.get("clusterIP") != "None":
        reading.error(at, "ports is missing")


class _ClusterIp(Text):
    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        return "None" if value == "None" else super().read(value, at, reading)


SERVICE: Final = Struct(
    {
        "type": Choice("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        "clusterIP": _ClusterIp(names.ip),
        "clusterIPs": Items(_ClusterIp(names.ip)),
        "externalName": Text(names.exact_host),
        "ports": Items(
            Struct(
                {
                    "name": Text(names.dns_label),
                    "port": _PORT,
                    "targetPort": _PortOrName(),
                    "protocol": _TRANSPORT,
                    "appProtocol": Text(),
                },
                required=("port",),
                ignored=("nodePort",),
                is_open=True,
            )
        ),
        "selector": _LABELS,
        "externalIPs": Items(Text(names.ip)),
        "trafficDistribution": Text(),
        "publishNotReadyAddresses": Boolean(),
    },
    rules=(_check_ports, _check_service),
    ignored=("sessionAffinity", "sessionAffinityConfig"),
    is_open=True,
)

_CONDITIONS: Final = Struct({"ready": Boolean(), "serving": Boolean(), "terminating": Boolean()}, is_open=True)
_ENDPOINT: Final = Struct(
    {
        "addresses": Items(Text(names.exact_host_or_ip), at_least=1),
        "conditions": _CONDITIONS,
        "hostname": Text(),
        "nodeName": Text(),
        "zone": Text(),
        "targetRef": Struct(
            {"kind": Text(), "name": Text(), "namespace": Text()},
            ignored=("uid", "apiVersion", "resourceVersion", "fieldPath"),
            is_open=True,
        ),
        "topology": Table(Text()),
        "deprecatedTopology": Table(Text()),
        "hints": Struct({"forZones": Items(Struct({"name": Text()}, is_open=True))}, is_open=True),
    },
    required=("addresses",),
    is_open=True,
)


def _check_addresses(value: dict[str, Any], at: Path, reading: Reading) -> None:
    kind = value.get("addressType")
    for index, endpoint in enumerate(value.get("endpoints", ())):
        topology = endpoint.pop("topology", {}) | endpoint.pop("deprecatedTopology", {})
        if "zone" not in endpoint and "topology.kubernetes.io/zone" in topology:
            endpoint["zone"] = topology["topology.kubernetes.io/zone"]
        for number, address in enumerate(endpoint.get("addresses", ())):
            found = "FQDN" if not names.is_ip(address) else "IPv6" if ":" in address else "IPv4"
            if kind is not None and found != kind:
                here = ((((at, "endpoints"), index), "addresses"), number)
                reading.error(here, f"{shown(address)} is not of addressType {kind}")


ENDPOINT_SLICE: Final = Struct(
    {
        "addressType": Choice("IPv4", "IPv6", "FQDN"),
        "endpoints": Items(_ENDPOINT),
        "ports": Items(
            Struct(
                {"name": Text(), "port": _PORT, "protocol": _TRANSPORT, "appProtocol": Text()},
                is_open=True,
            )
        ),
    },
    required=("addressType",),
    rules=(_check_addresses,),
    is_open=True,
)

_CONTAINER: Final = Struct(
    {
        "name": Text(names.dns_label),
        "image": Text(),
        "ports": Items(
            Struct(
                {"name": Text(names.dns_label), "containerPort": _PORT, "protocol": _TRANSPORT},
                required=("containerPort",),
                is_open=True,
            )
        ),
        "resources": Struct({"limits": AnyValue(), "requests": AnyValue()}, is_open=True),
        "restartPolicy": Text(),
    },
    required=("name",),
    is_open=True,
)


def _check_images(value: dict[str, Any], at: Path, reading: Reading) -> None:
    for index, container in enumerate(value.get("containers", ())):
        if "image" not in container and "name" in container:
            reading.warn(
                ((((at, "containers"), index)), "image"),
                f"container {container['name']} has no image",
                "its workload is served all the same",
            )


_POD_SPEC: Final = Struct(
    {
        "containers": Items(_CONTAINER),
        "initContainers": Items(_CONTAINER),
        "serviceAccountName": Text(names.object_name),
        "nodeName": Text(),
        "hostNetwork": Boolean(),
    },
    rules=(_check_images,),
    ignored=("serviceAccount", "nodeSelector", "hostPID", "hostname"),
    is_open=True,
)


def _check_deployment(value: dict[str, Any], at: Path, reading: Reading) -> None:
    """apps/v1 requires a selector and the template's labels; a file written for this proxy alone may do without."""
    template = value.get("template", {})
    labels = template.get("metadata", {}).get("labels", {})
    match_labels = value.get("selector", {}).get("matchLabels", {})
    if not match_labels:
        reading.warn(
            ((at, "selector"), "matchLabels"),
            "selector.matchLabels is missing, which apps/v1 requires",
            "every pod of the template is taken",
        )
    if not labels:
        reading.warn(
            (((at, "template"), "metadata"), "labels"),
            "template.metadata.labels is missing, which apps/v1 requires",
            "app: <container name> is assumed for each container's workload",
        )
    elif any(labels.get(name) != wanted for name, wanted in match_labels.items()):
        reading.warn(
            ((at, "selector"), "matchLabels"),
            "selector.matchLabels does not match template.metadata.labels",
            "the template's labels count",
        )


DEPLOYMENT: Final = Struct(
    {
        "replicas": Integer(0, 2**31 - 1),
        "selector": Struct({"matchLabels": _LABELS}, is_open=True),
        "template": Struct(
            {
                "metadata": Struct({"labels": _LABELS, "annotations": _ANNOTATIONS}, is_open=True),
                "spec": _POD_SPEC,
            },
            required=("spec",),
            is_open=True,
        ),
    },
    required=("template",),
    rules=(_check_deployment,),
    is_open=True,
)
POD: Final = _POD_SPEC
_NOTHING_READ: Final = Struct({}, is_open=True)

BODY_KINDS: Final[dict[tuple[str, str], Struct]] = {("discovery.k8s.io", "EndpointSlice"): ENDPOINT_SLICE}
"""Kinds without a spec: what stands beside metadata is read as one."""
SPEC_KINDS: Final[dict[tuple[str, str], Struct]] = {
    ("", "Service"): SERVICE,
    ("", "Pod"): POD,
    ("", "Namespace"): _NOTHING_READ,
    ("", "Node"): _NOTHING_READ,
    ("apps", "Deployment"): DEPLOYMENT,
}
CLUSTER_SCOPED: Final = frozenset({("", "Namespace"), ("", "Node")})
SILENT_KINDS: Final = frozenset({("", "ConfigMap")})
"""Ignored without a word: they stand beside everything and say nothing about traffic."""
VERSIONS: Final[dict[str, tuple[str, ...]]] = {
    "": ("v1",),
    "apps": ("v1",),
    "discovery.k8s.io": ("v1", "v1beta1"),
}
OLD_VERSIONS: Final = {
    ("apps", "v1beta1"): "apps/v1",
    ("apps", "v1beta2"): "apps/v1",
    ("extensions", "v1beta1"): "apps/v1",
}
