"""Which VirtualService speaks for a host.

Source: istio pilot/pkg/networking/core/httproute.go, pkg/config/host mostSpecificHostMatch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import Imports, is_exported, matches, narrower, specificity
from meshproxy.snapshot.services import Services

MESH = "mesh"


@dataclass(frozen=True, slots=True, eq=False)
class VirtualService:
    resource: Resource
    hosts: tuple[str, ...]
    """Fully qualified, in the order of spec.hosts."""
    gateways: frozenset[str]
    """`mesh`, or `namespace/name`."""

    def is_exported_to(self, namespace: str) -> bool:
        return is_exported(self.resource.spec.get("exportTo") or (), self.resource.namespace, namespace)


class VirtualServices:
    __slots__ = ("_by_host", "_findings", "_wildcards", "all")

    def __init__(self, resources: Iterable[Resource], services: Services, findings: Findings) -> None:
        self._findings = findings
        self._by_host: dict[str, list[VirtualService]] = {}
        found = []
        for resource in resources:
            namespace = resource.namespace
            hosts = [services.resolve(host, namespace, namespace)[0] for host in resource.spec.get("hosts") or ()]
            gateways = frozenset(gateway_name(name, namespace) for name in resource.spec.get("gateways") or (MESH,))
            found.append(VirtualService(resource, tuple(hosts), gateways))
            for host in hosts:
                self._by_host.setdefault(host, []).append(found[-1])
        self.all: tuple[VirtualService, ...] = tuple(found)
        self._wildcards = sorted((host for host in self._by_host if host[0] == "*"), key=specificity, reverse=True)

    def in_mesh(self, host: str, namespace: str, imports: Imports) -> VirtualService | None:
        """The one for traffic inside the mesh: exact host, else the longest wildcard; of several, the oldest.

        namespace: the client's. imports: what its Sidecar lets it see.
        """
        patterns = [host] if host in self._by_host else []
        patterns += [pattern for pattern in self._wildcards if pattern != host and matches(pattern, host)]
        for pattern in patterns:
            first: VirtualService | None = None
            for candidate in self._by_host[pattern]:
                if (
                    MESH not in candidate.gateways
                    or not candidate.is_exported_to(namespace)
                    or not imports.cover(candidate.resource.namespace, pattern)
                ):
                    continue
                if first is None:
                    first = candidate
                    continue
                older = first.resource
                message = f"VirtualService {older.name} at {older.source} is older and has host {pattern} too"
                field = f"spec.hosts[{candidate.hosts.index(pattern)}]"
                self._findings.warn(candidate.resource, field, message, "this one is not used for that host")
            if first is not None:
                return first
        return None

    def hosts_in_mesh(self, namespace: str, imports: Imports) -> Iterator[str]:
        """Hosts that VirtualServices of the mesh declare to this client, whether or not a service has that name."""
        for host, candidates in self._by_host.items():
            if any(
                MESH in candidate.gateways
                and candidate.is_exported_to(namespace)
                and imports.cover(candidate.resource.namespace, host)
                for candidate in candidates
            ):
                yield host

    def at_gateway(
        self, gateway: str, gateway_namespace: str, server_hosts: Iterable[str]
    ) -> dict[str, list[VirtualService]]:
        """Host → the VirtualServices bound to it, oldest first: on gateways they add up.

        server_hosts: of a Gateway server, each with or without `namespace/` before it.
        """
        scopes = []
        for written in server_hosts:
            owner, slash, host = written.rpartition("/")
            scopes.append((gateway_namespace if owner == "." else owner if slash else "*", host.lower()))
        found: dict[str, list[VirtualService]] = {}
        for candidate in self.all:
            if gateway not in candidate.gateways or not candidate.is_exported_to(gateway_namespace):
                continue
            for owner, pattern in scopes:
                if owner not in ("*", candidate.resource.namespace):
                    continue
                for host in candidate.hosts:
                    both = narrower(pattern, host)
                    if both is not None and candidate not in found.setdefault(both, []):
                        found[both].append(candidate)
        return found


def gateway_name(written: str, namespace: str) -> str:
    """`mesh`, or `namespace/name`; a bare name is of the namespace of who wrote it."""
    return written if written == MESH or "/" in written else f"{namespace}/{written}"
