"""The demo's configuration: three files as an operator wrote them, and what says where things are and listen.

Every node reads the same `mesh` folder (the three files, services, endpoints) and a folder of its own (what is local).
"""

from dataclasses import dataclass
from pathlib import Path

import meshproxy

WRITTEN = ("shared-sidecar.yaml", "locality-lb.yaml", "v2x-policy.yaml")
EDGE_SERVICE = "edge-service.default.svc.cluster.local"
RSU_SERVICE = "rsu-service.default.svc.cluster.local"
LOCALITY = "cn-north-1/zone1/node-a"


@dataclass(frozen=True, slots=True)
class Instance:
    """One application and the inbound listener in front of it."""

    name: str
    app: str
    zone: str
    address: str
    """Loopback address of its inbound listener."""
    app_port: int


@dataclass(frozen=True, slots=True)
class Plan:
    instances: tuple[Instance, ...]
    inbound_port: int
    """Of every inbound listener; each has its own address."""
    service_port: int
    """Of both services, and so of the egress listeners."""
    egress: tuple[tuple[str, str], ...]
    """(app of the shared sidecar, address of its egress listener)."""


def examples() -> Path:
    """The folder of examples: beside the package in a checkout, inside it when installed."""
    inside = Path(meshproxy.__file__).parent / "examples"
    return inside if inside.is_dir() else Path(meshproxy.__file__).parent.parent / "examples"


def write(root: Path, plan: Plan) -> None:
    for folder in ("mesh", "this-node", "other-node"):
        (root / folder).mkdir()
    for name in WRITTEN:
        (root / "mesh" / name).write_bytes((examples() / name).read_bytes())
    (root / "mesh" / "services.yaml").write_text(_services(plan))
    (root / "this-node" / "sidecars.yaml").write_text("---\n".join(_egress(plan)))
    (root / "other-node" / "sidecars.yaml").write_text("---\n".join(_ingress(plan)))


def without_ejection_limit(text: str) -> str:
    """The locality file with outlier detection allowed to empty a zone: what an operator adds for small services."""
    marker = "      interval: 10s\n"
    assert marker in text
    return text.replace(marker, marker + "      maxEjectionPercent: 100\n")


def readiness(plan: Plan) -> str:
    """What an operator adds so that this node asks each edge-service whether it is ready: a file of its own.

    It asks through the inbound listener, which takes plaintext as long as the service is PERMISSIVE.
    """
    return f"""apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata:
  name: edge-service
spec:
  metadata:
    labels:
      app: edge-service
  template: {{}}
  probe:
    periodSeconds: 1
    failureThreshold: 1
    httpGet:
      path: /ready
      port: {plan.inbound_port}
"""


def _services(plan: Plan) -> str:
    documents = [
        f"""apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: {host.split(".")[0]}
spec:
  hosts:
  - {host}
  location: MESH_INTERNAL
  resolution: STATIC
  ports:
  - number: {plan.service_port}
    name: http
    protocol: HTTP
    targetPort: {plan.inbound_port}
  workloadSelector:
    labels:
      app: {host.split(".")[0]}
"""
        for host in (EDGE_SERVICE, RSU_SERVICE)
    ]
    documents += [
        f"""apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: {instance.name}
  labels:
    app: {instance.app}
    instance: {instance.name}
    security.istio.io/tlsMode: istio
spec:
  address: {instance.address}
  locality: cn-north-1/{instance.zone}/node-b
  serviceAccount: {instance.app}
  labels:
    app: {instance.app}
    instance: {instance.name}
    security.istio.io/tlsMode: istio
"""
        for instance in plan.instances
    ]
    return "---\n".join(documents)


def _egress(plan: Plan) -> list[str]:
    return [
        f"""apiVersion: networking.istio.io/v1
kind: Sidecar
metadata:
  name: {app}
spec:
  workloadSelector:
    labels:
      app: {app}
  egress:
  - port:
      number: {plan.service_port}
      protocol: HTTP
      name: http
    bind: {address}
    captureMode: NONE
    hosts:
    - "./*"
"""
        for app, address in plan.egress
    ]


def _ingress(plan: Plan) -> list[str]:
    return [
        f"""apiVersion: networking.istio.io/v1
kind: Sidecar
metadata:
  name: {instance.name}
spec:
  workloadSelector:
    labels:
      instance: {instance.name}
  ingress:
  - port:
      number: {plan.inbound_port}
      protocol: HTTP
      name: http
    bind: {instance.address}
    captureMode: NONE
    defaultEndpoint: 127.0.0.1:{instance.app_port}
"""
        for instance in plan.instances
    ]
