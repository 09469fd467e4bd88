"""A workload: one local or remote service instance with its own identity.

One process serves several workloads; whatever belongs to a workload (identity, certificates, listeners, egress
scope, metric labels) hangs on the workload, never on the process.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshproxy.model.identity import SpiffeId


@dataclass(frozen=True, slots=True)
class WorkloadLabels:
    """What Istio's standard metrics say of a workload; "unknown" where nobody knows."""

    workload: str = "unknown"
    namespace: str = "unknown"
    app: str = "unknown"
    version: str = "unknown"
    canonical_service: str = "unknown"
    canonical_revision: str = "latest"
    cluster: str = "unknown"


UNKNOWN_WORKLOAD = WorkloadLabels(canonical_revision="unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One workload this process serves."""

    id: str
    """`namespace/name`, unique in the process; listeners name their workload by it."""
    name: str
    namespace: str
    service_account: str = "default"
    trust_domain: str = "cluster.local"
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    metric_labels: WorkloadLabels = UNKNOWN_WORKLOAD

    @property
    def identity(self) -> SpiffeId:
        return SpiffeId(self.trust_domain, self.namespace, self.service_account)
