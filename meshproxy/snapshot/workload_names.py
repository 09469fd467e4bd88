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
_NOTHING_SAID = {"canonical_revision": "latest"}


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
    """Identity → what is known of all workloads that have it; where they contradict each other, nobody knows."""
    seen: dict[str, dict[WorkloadLabels, None]] = {}
    for identity, labels in workloads:
        seen.setdefault(identity, {})[labels] = None
    return {identity: _common(tuple(found)) for identity, found in seen.items()}


def _common(found: tuple[WorkloadLabels, ...]) -> WorkloadLabels:
    if len(found) == 1:
        return found[0]
    values = []
    for field in fields(WorkloadLabels):
        nothing = _NOTHING_SAID.get(field.name, _UNKNOWN)
        said = {getattr(labels, field.name) for labels in found} - {nothing}
        values.append(said.pop() if len(said) == 1 else _UNKNOWN if said else nothing)
    return _interned(*values)
