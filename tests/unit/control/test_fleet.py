from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.control.fleet import PIECE_ENDPOINTS, changes
from meshproxy.control.messages import (
    Begin,
    Commit,
    PutCluster,
    PutEndpoints,
    PutListener,
    PutPeers,
    PutRouteTable,
    PutWorkload,
    Remove,
)
from meshproxy.model.cluster import Cluster, Protocol
from meshproxy.model.endpoint import Endpoint, Locality, LocalityEndpoints
from meshproxy.model.listener import Direction, Listener
from meshproxy.model.route import RouteTable
from meshproxy.model.workload import Workload, WorkloadLabels
from meshproxy.snapshot.snapshot import Snapshot


def cluster(key: str, sizes: list[int]) -> Cluster:
    return Cluster(
        name=key,
        key=key,
        service_host="a.default.svc.cluster.local",
        service_name="a",
        service_namespace="default",
        port=80,
        localities=tuple(
            LocalityEndpoints(
                locality=Locality("r", f"z{index}"),
                priority=index % 2,
                weight=index + 1,
                endpoints=tuple(Endpoint(address=f"10.{index}.{n // 256}.{n % 256}", port=80) for n in range(size)),
            )
            for index, size in enumerate(sizes)
        ),
    )


LISTENER = Listener(
    name="127.0.0.1_80",
    address="127.0.0.1",
    port=80,
    direction=Direction.OUTBOUND,
    workload_id="default/a",
    protocol=Protocol.HTTP,
    route_table="80",
)
FULL = Snapshot(
    version="1",
    workloads={"default/a": Workload(id="default/a", name="a", namespace="default")},
    listeners={LISTENER.name: LISTENER},
    route_tables={"80": RouteTable(name="80", virtual_hosts=())},
    clusters={"a": cluster("a", [3]), "b": cluster("b", [1])},
    peers={"spiffe://x/ns/a/sa/b": WorkloadLabels(workload="a")},
)


def kinds(messages: list[Any]) -> list[str]:
    return [type(message).__name__ for message in messages]


def test_a_new_worker_gets_everything_and_listeners_last() -> None:
    messages = list(changes(None, FULL))
    assert messages[0] == Begin("1", replaces_all=True)
    assert kinds(messages[1:-1]) == [
        "PutWorkload",
        "PutCluster",
        "PutEndpoints",
        "PutCluster",
        "PutEndpoints",
        "PutRouteTable",
        "PutPeers",
        "PutListener",
    ]
    assert messages[-1] == Commit("1", None)


def test_a_worker_that_has_it_gets_only_what_differs() -> None:
    now = replace(FULL, version="2", clusters={"a": FULL.clusters["a"], "b": cluster("b", [2])})
    messages = list(changes(FULL, now))
    assert messages == [
        Begin("2"),
        PutCluster(replace(now.clusters["b"], localities=())),
        PutEndpoints("b", now.clusters["b"].localities),
        Commit("2", None),
    ]


def test_what_is_gone_is_removed_listeners_first() -> None:
    messages = list(changes(FULL, Snapshot(version="2")))
    removed = [(m.kind, m.name) for m in messages if isinstance(m, Remove)]
    assert removed[0] == ("listener", "127.0.0.1_80")
    assert removed[1] == ("route_table", "80")
    assert sorted(removed[2:4]) == [("cluster", "a"), ("cluster", "b")]
    assert removed[4] == ("workload", "default/a")
    assert PutPeers({}) in messages


def test_a_cluster_that_lost_its_last_endpoint_says_so() -> None:
    messages = list(changes(None, Snapshot(version="1", clusters={"a": cluster("a", [])})))
    assert PutEndpoints("a", ()) in messages


@given(sizes=st.lists(st.integers(min_value=0, max_value=600), max_size=5))
def test_pieces_add_up_to_the_endpoints_and_none_is_too_large(sizes: list[int]) -> None:
    whole = cluster("a", sizes)
    pieces = [m for m in changes(None, Snapshot(version="1", clusters={"a": whole})) if isinstance(m, PutEndpoints)]
    together: dict[tuple[Locality, int, int | None], list[Endpoint]] = {}
    for piece in pieces:
        assert sum(len(group.endpoints) for group in piece.localities) <= PIECE_ENDPOINTS
        for group in piece.localities:
            together.setdefault((group.locality, group.priority, group.weight), []).extend(group.endpoints)
    assert together == {(g.locality, g.priority, g.weight): list(g.endpoints) for g in whole.localities}
    assert {type(m) for m in changes(None, FULL)} >= {PutWorkload, PutRouteTable, PutListener}
