"""The compiled, immutable configuration. Requests see one snapshot from first byte to last.

A publish replaces the reference; parts that did not change are the same objects in old and new (compare with `is`
first, then `==`), so that pools and connections of untouched clusters survive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshproxy.model.cluster import Cluster
from meshproxy.model.listener import AccessLogPolicy, Listener
from meshproxy.model.route import RouteTable
from meshproxy.model.workload import Workload, WorkloadLabels


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """version: short hash of the content.

    Mappings are keyed by Workload.id, Listener.name, RouteTable.name and Cluster.key.
    """

    version: str
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    listeners: Mapping[str, Listener] = field(default_factory=dict)
    route_tables: Mapping[str, RouteTable] = field(default_factory=dict)
    clusters: Mapping[str, Cluster] = field(default_factory=dict)
    peers: Mapping[str, WorkloadLabels] = field(default_factory=dict)
    """SPIFFE URI → what is known of the workload behind it; names the source of inbound requests in metrics."""
    access_log: AccessLogPolicy | None = None


EMPTY_SNAPSHOT = Snapshot(version="0")
