"""What the control process and a worker say to each other, in both directions.

Every message is one pickled tuple of this module's classes (control/channel.py frames it). The socket pair is
private to parent and child, so pickle is safe here; nothing from the network is ever unpickled.
"""

from dataclasses import dataclass, field
from typing import Any

from meshproxy.model.cluster import Cluster
from meshproxy.model.endpoint import LocalityEndpoints
from meshproxy.model.listener import AccessLogPolicy, Listener
from meshproxy.model.route import RouteTable, VirtualHost
from meshproxy.model.workload import Workload, WorkloadLabels

# ── control → worker: a snapshot arrives in pieces between Begin and Commit, so that no piece stalls the loop ──


@dataclass(slots=True)
class Begin:
    """replaces_all: what is not put before Commit goes away (the sender does not know what the worker has).

    control/channel.py turns that into Remove messages, so a worker may ignore the field; Begin always discards what
    an earlier Begin left uncommitted.
    """

    version: str
    replaces_all: bool = False


@dataclass(slots=True)
class PutWorkload:
    workload: Workload


@dataclass(slots=True)
class PutCluster:
    """The cluster without its endpoints (localities is empty); they follow in PutEndpoints."""

    cluster: Cluster


@dataclass(slots=True)
class PutEndpoints:
    """At most 256 endpoints of one cluster; several messages add up. Sent whenever the cluster was put."""

    cluster_key: str
    localities: tuple[LocalityEndpoints, ...]


@dataclass(slots=True)
class PutRouteTable:
    """The first virtual hosts of a table; the others follow in PutVirtualHosts."""

    table: RouteTable


@dataclass(slots=True)
class PutVirtualHosts:
    """More of a table that was put in this update; at most 32 hosts, as unpickling 1,000 takes 45 ms."""

    table_name: str
    hosts: tuple[VirtualHost, ...]


@dataclass(slots=True)
class PutListener:
    """The bound, listening socket's descriptor rides along as SCM_RIGHTS: exactly one descriptor."""

    listener: Listener


@dataclass(slots=True)
class PutPeers:
    peers: dict[str, WorkloadLabels]


@dataclass(slots=True)
class Remove:
    """kind: workload | cluster | route_table | listener; name: its key in the snapshot."""

    kind: str
    name: str


@dataclass(slots=True)
class Commit:
    version: str
    access_log: AccessLogPolicy | None = None


@dataclass(slots=True)
class PutCertificates:
    """A workload's verified, matching key, chain and roots (PEM). Applies to new handshakes at once."""

    workload_id: str
    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    roots_pem: bytes


@dataclass(slots=True)
class Health:
    """Verdicts of the one outlier detector and the active checks: (cluster key, endpoint key, word).

    word: eject | restore | unhealthy | healthy | suspect | clear. `suspect` asks the worker to report successes of this
    endpoint too (its failure count is not zero); `clear` ends that.
    """

    verdicts: tuple[tuple[str, str, str], ...]


@dataclass(slots=True)
class Resolved:
    """DNS answers for a STRICT_DNS cluster: replaces its endpoints."""

    cluster_key: str
    localities: tuple[LocalityEndpoints, ...]


@dataclass(slots=True)
class Ask:
    """what: stats | clusters | connections. Answered by Answer with the same id."""

    id: int
    what: str


@dataclass(slots=True)
class MemoryShare:
    """What this worker may use; None: no limit."""

    share_bytes: int | None


@dataclass(slots=True)
class Drain:
    """Stop accepting, say Connection: close, finish what is in flight; exit when idle or after deadline_s seconds.

    exits: False only drains the listeners (POST /drain_listeners?graceful).
    """

    deadline_s: float
    exits: bool = True


@dataclass(slots=True)
class SetLogLevel:
    level: str


# ── worker → control ──


@dataclass(slots=True)
class Hello:
    pid: int


@dataclass(slots=True)
class Applied:
    """stall_s: longest time the apply held the loop in one piece; total_s: Begin to Commit."""

    version: str
    stall_s: float
    total_s: float
    problems: tuple[str, ...] = ()


@dataclass(slots=True)
class Results:
    """Outcomes for the outlier detector: (cluster key, endpoint key, outcome code).

    Codes: an HTTP status (100–599), or a local-origin event: 1 connect failed, 2 timeout, 3 reset, 4 connect succeeded.
    Failures always; successes only of endpoints marked suspect.
    """

    events: tuple[tuple[str, str, int], ...]


@dataclass(slots=True)
class IntervalCounts:
    """Per endpoint since the last message: (cluster key, endpoint key, requests, successes).

    Once a second, non-zero only.
    """

    counts: tuple[tuple[str, str, int, int], ...]


@dataclass(slots=True)
class Answer:
    id: int
    payload: Any


@dataclass(slots=True)
class Drained:
    """Nothing in flight any more."""
