"""Which workloads this process serves, and which Sidecar governs each.

A workload is local when
1. it is a WorkloadEntry that a Sidecar's workloadSelector selects, or
2. it is an app container of a Deployment whose Pod has a proxy container beside it (one sidecar shared by several
   apps). Its name is the container's; so is its service account unless the Pod names one: each app its own identity.
Labels given to the process restrict both to workloads that carry all of them: every node may read the same files.
3. Where none is left, the process itself is the one workload: its namespace, service account and labels are those
   it was started with.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshproxy.model.address import is_ip
from meshproxy.model.endpoint import Locality
from meshproxy.model.workload import Workload
from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import selects
from meshproxy.snapshot.service_entries import WorkloadInstance, parse_locality
from meshproxy.snapshot.workload_names import metric_labels

_PROXY_NAMES = frozenset({"envoy", "istio-proxy", "meshproxy", "proxyv2"})


@dataclass(frozen=True, slots=True, eq=False)
class LocalWorkload:
    workload: Workload
    locality: Locality
    address: str = ""
    """Its own IP address; empty where it has none that is known."""
    sidecar: Resource | None = None


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """What the process was told of itself."""

    locality: Locality
    namespace: str
    service_account: str
    labels: Mapping[str, str]
    trust_domain: str


class Sidecars:
    """The Sidecar of a workload: of its namespace by selector, else of its namespace, else of the root namespace."""

    def __init__(self, sidecars: Iterable[Resource], root_namespace: str, findings: Findings) -> None:
        self._root_namespace = root_namespace
        self._findings = findings
        self._selecting: dict[str, list[Resource]] = {}
        self._defaults: dict[str, Resource] = {}
        for sidecar in sidecars:
            if selector_of(sidecar):
                self._selecting.setdefault(sidecar.namespace, []).append(sidecar)
                continue
            older = self._defaults.setdefault(sidecar.namespace, sidecar)
            if older is not sidecar:
                message = f"Sidecar {older.name} at {older.source} has no selector either and is older"
                findings.warn(sidecar, "metadata.name", message, "this one is ignored")

    @property
    def selecting(self) -> list[Resource]:
        return [sidecar for sidecars in self._selecting.values() for sidecar in sidecars]

    def of(self, workload: Workload) -> Resource | None:
        matching = [s for s in self._selecting.get(workload.namespace, ()) if selects(selector_of(s), workload.labels)]
        for younger in matching[1:]:
            message = f"Sidecar {matching[0].name} at {matching[0].source} selects {workload.id} too and is older"
            self._findings.warn(younger, "spec.workloadSelector", message, "this one does not apply to that workload")
        if matching:
            return matching[0]
        return self._defaults.get(workload.namespace) or self._defaults.get(self._root_namespace)


def selector_of(sidecar: Resource) -> Mapping[str, str]:
    return (sidecar.spec.get("workloadSelector") or {}).get("labels") or {}


def local_workloads(
    entries: Sequence[WorkloadInstance],
    deployments: Iterable[Resource],
    sidecars: Sidecars,
    process: ProcessIdentity,
) -> list[LocalWorkload]:
    """In order of id."""
    found: dict[str, LocalWorkload] = {}
    for local in (*_of_deployments(deployments, process), *_of_entries(entries, sidecars.selecting, process)):
        if selects(process.labels, local.workload.labels):
            found[local.workload.id] = local
    if not found:
        own = process_workload(process)
        found[own.workload.id] = own
    return [
        LocalWorkload(local.workload, local.locality, local.address, sidecars.of(local.workload))
        for _, local in sorted(found.items())
    ]


def process_workload(process: ProcessIdentity) -> LocalWorkload:
    labels = process.labels
    account = process.service_account
    name = (
        labels.get("app.kubernetes.io/name") or labels.get("app") or (account if account != "default" else "meshproxy")
    )
    return LocalWorkload(_workload(name, process.namespace, account, labels, process), process.locality)


def _workload(
    name: str, namespace: str, service_account: str, labels: Mapping[str, str], process: ProcessIdentity
) -> Workload:
    return Workload(
        id=f"{namespace}/{name}",
        name=name,
        namespace=namespace,
        service_account=service_account,
        trust_domain=process.trust_domain,
        labels=labels,
        metric_labels=metric_labels(name, namespace, labels),
    )


def _of_entries(
    entries: Iterable[WorkloadInstance], sidecars: Sequence[Resource], process: ProcessIdentity
) -> Iterable[LocalWorkload]:
    for entry in entries:
        resource = entry.resource
        if not any(s.namespace == resource.namespace and selects(selector_of(s), entry.labels) for s in sidecars):
            continue
        address = resource.spec.get("address") or ""
        account = resource.spec.get("serviceAccount") or "default"
        yield LocalWorkload(
            _workload(resource.name, resource.namespace, account, entry.labels, process),
            parse_locality(resource.spec.get("locality") or "") if resource.spec.get("locality") else process.locality,
            address if is_ip(address) else "",
        )


def _of_deployments(deployments: Iterable[Resource], process: ProcessIdentity) -> Iterable[LocalWorkload]:
    for deployment in deployments:
        template = deployment.spec.get("template") or {}
        pod = template.get("spec") or {}
        containers = pod.get("containers") or ()
        apps = [container for container in containers if not _is_proxy(container)]
        if len(apps) == len(containers):
            continue
        pod_labels = (template.get("metadata") or {}).get("labels") or {}
        for container in apps:
            name = container.get("name")
            if name:
                account = pod.get("serviceAccountName") or pod.get("serviceAccount") or name
                labels = {**pod_labels, "app": name}
                workload = _workload(name, deployment.namespace, account, labels, process)
                yield LocalWorkload(workload, process.locality)


def _is_proxy(container: Mapping[str, object]) -> bool:
    image = str(container.get("image") or "").rpartition("/")[2].partition("@")[0].partition(":")[0]
    return container.get("name") in _PROXY_NAMES or image in _PROXY_NAMES
