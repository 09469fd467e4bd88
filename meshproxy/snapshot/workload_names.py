"""What is said of a workload: metric labels, identity.

Source: istio.io reference/config/metrics; istio pkg/model canonical service labels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache

from meshproxy.model.identity import SpiffeId
from meshproxy.model.workload import WorkloadLabels

TLS_MODE_LABEL = "security.istio.io/tlsMode"
_UNKNOWN = "unknown"


def metric_labels(name: str, namespace: str, labels: Mapping[str, str]) -> WorkloadLabels:
    """name: the workload's own; empty where nobody gave it one, as with endpoints written inside a ServiceEntry."""
    get = labels.get
    app = get("app") or get("app.kubernetes.io/name") or ""
    version = get("version") or get("app.kubernetes.io/version") or ""
    return _interned(
        name or _UNKNOWN,
        namespace or _UNKNOWN,
        app or _UNKNOWN,
        version or _UNKNOWN,
        get("service.istio.io/canonical-name") or get("app.kubernetes.io/name") or get("app") or name or _UNKNOWN,
        get("service.istio.io/canonical-revision") or version or "latest",
        get("topology.istio.io/cluster") or _UNKNOWN,
    )


# Ten thousand endpoints are a few hundred workloads: equal labels are one object, here and in every worker.
@lru_cache(maxsize=4096)
def _interned(*values: str) -> WorkloadLabels:
    return WorkloadLabels(*values)


@lru_cache(maxsize=4096)
def spiffe_uri(trust_domain: str, namespace: str, service_account: str) -> str:
    return str(SpiffeId(trust_domain, namespace, service_account))


def known_peers(workloads: Iterable[tuple[str, WorkloadLabels]]) -> dict[str, WorkloadLabels]:
    """Identity → what all workloads of that identity have in common; what differs among them is unknown."""
    peers: dict[str, WorkloadLabels] = {}
    for identity, labels in workloads:
        known = peers.get(identity)
        if known is None:
            peers[identity] = labels
        elif known is not labels and known != labels:
            peers[identity] = _common(known, labels)
    return peers


def _common(a: WorkloadLabels, b: WorkloadLabels) -> WorkloadLabels:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(WorkloadLabels)]
    return _interned(*(mine if mine == other else _UNKNOWN for mine, other in pairs))
