"""YAML in, snapshot out: the configuration path without a process."""

from dataclasses import dataclass
from textwrap import dedent
from typing import Any

from meshproxy.model.cluster import Cluster
from meshproxy.model.endpoint import Endpoint, Locality
from meshproxy.model.route import Route, VirtualHost
from meshproxy.resources.load import load_text
from meshproxy.resources.problems import Severity
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.snapshot.translate import ProxyContext, translate


@dataclass(frozen=True)
class Translated:
    """A snapshot and the sentences that came with it."""

    snapshot: Snapshot
    warnings: list[str]
    errors: list[str]

    def cluster(self, name: str) -> Cluster:
        """The only cluster of that name."""
        (found,) = (cluster for cluster in self.snapshot.clusters.values() if cluster.name == name)
        return found

    def hosts(self, listener: str) -> dict[str, VirtualHost]:
        """Domain → virtual host of the table a listener serves."""
        table = self.snapshot.route_tables[self.snapshot.listeners[listener].route_table or ""]
        return {domain: host for host in table.virtual_hosts for domain in host.domains}

    def routes(self, listener: str, domain: str) -> tuple[Route, ...]:
        return self.hosts(listener)[domain].routes

    def shares(self, name: str) -> dict[str, tuple[int, int | None, int]]:
        """Locality → (priority, weight, endpoints) of a cluster."""
        return {
            str(group.locality): (group.priority, group.weight, len(group.endpoints))
            for group in self.cluster(name).localities
        }


def translated(*texts: str, locality: str = "", previous: Snapshot | None = None, **context: Any) -> Translated:
    """The texts are files `1.yaml`, `2.yaml`, …; every one of them must be well formed."""
    resources = []
    for number, text in enumerate(texts, 1):
        loaded, problems = load_text(dedent(text), f"{number}.yaml")
        refused = [problem.sentence() for problem in problems if problem.severity is Severity.ERROR]
        assert not refused, refused
        resources += loaded
    snapshot, problems = translate(
        resources, ProxyContext(locality=Locality.parse(locality), **context), previous=previous
    )
    return Translated(
        snapshot,
        [problem.sentence() for problem in problems if problem.severity is Severity.WARNING],
        [problem.sentence() for problem in problems if problem.severity is Severity.ERROR],
    )


def endpoints(cluster: Cluster) -> list[Endpoint]:
    return [endpoint for group in cluster.localities for endpoint in group.endpoints]


def sidecar(port: int = 8080, protocol: str = "HTTP", hosts: str = '"*/*"', extra: str = "") -> str:
    """A Sidecar of namespace default with one egress listener on 127.0.0.1."""
    return f"""
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: egress}}
spec:
  {extra}
  egress:
  - port: {{number: {port}, protocol: {protocol}, name: out}}
    captureMode: NONE
    hosts: [{hosts}]
"""


def service_entry(
    host: str,
    *endpoints: str,
    port: int = 8080,
    protocol: str = "HTTP",
    namespace: str = "default",
    resolution: str = "STATIC",
    location: str = "MESH_INTERNAL",
    extra: str = "",
) -> str:
    """endpoints: flow mappings such as `{address: 10.0.0.1, locality: r/z}`."""
    name = host.replace("*", "any").replace(".", "-")
    listed = f"endpoints: [{', '.join(endpoints)}]" if endpoints else ""
    return f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  hosts: ["{host}"]
  location: {location}
  resolution: {resolution}
  ports: [{{number: {port}, name: out, protocol: {protocol}}}]
  {listed}
  {extra}
"""


def destination_rule(host: str, spec: str, name: str = "rule", namespace: str = "default", head: str = "") -> str:
    """spec: what stands under `spec`, indented by two. head: more metadata, as a flow mapping's entries."""
    more = f", {head}" if head else ""
    return f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: {name}, namespace: {namespace}{more}}}
spec:
  host: "{host}"
{spec}
"""


def virtual_service(hosts: str, spec: str, name: str = "routes", namespace: str = "default", head: str = "") -> str:
    """hosts: a flow list's entries. spec: what stands under `spec`, indented by two."""
    more = f", {head}" if head else ""
    return f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: {name}, namespace: {namespace}{more}}}
spec:
  hosts: [{hosts}]
{spec}
"""
