"""Whatever resources stand together, the snapshot holds together."""

import json
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.cluster_balancer import ClusterBalancer
from meshproxy.model.cluster import Cluster
from meshproxy.model.endpoint import Locality
from meshproxy.resources.load import load_text
from meshproxy.resources.problems import Severity
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.snapshot.translate import ProxyContext, translate

# What is said often is what makes resources meet.
_NAMESPACES = st.sampled_from(["default"] * 5 + ["shop", "istio-system"])
_HOSTS = st.sampled_from(["a.example", "b.example", "*.example", "echo.default.svc.cluster.local", "echo", "c.example"])
_PORTS = st.sampled_from([80, 80, 80, 8080])
_PROTOCOLS = st.sampled_from(["HTTP", "HTTP", "HTTP", "TCP", "TLS", "GRPC"])
_ADDRESSES = st.sampled_from(["127.0.0.1", "127.0.0.2", "10.0.0.1", "fd00::1"])
_VALUE = st.sampled_from(["a", "b"])
_LABELS = st.fixed_dictionaries({}, optional={"app": _VALUE, "version": _VALUE})
_LOCALITIES = st.sampled_from(["r1/z1", "r1/z2", "r2/z1", "r1"])
_EXPORTS = st.sampled_from([["*"], [], [], ["."], ["shop"]])


def _resource(kind: str, spec: st.SearchStrategy[dict[str, Any]], group: str = "networking.istio.io/v1") -> Any:
    metadata = st.fixed_dictionaries({"name": st.sampled_from(["one", "two", "echo"]), "namespace": _NAMESPACES})
    return st.fixed_dictionaries(
        {"apiVersion": st.just(group), "kind": st.just(kind), "metadata": metadata, "spec": spec}
    )


def _alone(item: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return item.map(lambda value: [value])


def _port(name: str = "out") -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"number": _PORTS, "protocol": _PROTOCOLS, "name": st.just(name)})


_ENDPOINT = st.fixed_dictionaries({"address": _ADDRESSES}, optional={"locality": _LOCALITIES, "labels": _LABELS})
_DESTINATION = st.fixed_dictionaries(
    {"host": _HOSTS.filter(lambda host: "*" not in host)},
    optional={"subset": st.sampled_from(["v1", "v2"]), "port": st.fixed_dictionaries({"number": _PORTS})},
)
_ROUTE = st.lists(
    st.fixed_dictionaries({"destination": _DESTINATION, "weight": st.integers(1, 9)}), min_size=1, max_size=3
)
_MATCH = st.fixed_dictionaries(
    {},
    optional={
        "uri": st.sampled_from([{"prefix": "/a"}, {"exact": "/b"}, {"regex": "/c.*"}]),
        "port": _PORTS,
        "sourceLabels": _LABELS,
        "gateways": st.just(["mesh"]),
    },
)
_POLICY = st.fixed_dictionaries(
    {},
    optional={
        "loadBalancer": st.fixed_dictionaries(
            {},
            optional={
                "simple": st.sampled_from(["RANDOM", "ROUND_ROBIN", "PASSTHROUGH"]),
                "localityLbSetting": st.sampled_from(
                    [
                        {"distribute": [{"from": "*", "to": {"r1/z1": 80, "r1/z2": 20}}]},
                        {"failoverPriority": ["version"]},
                        {"failover": [{"from": "r1", "to": "r2"}]},
                    ]
                ),
            },
        ),
        "outlierDetection": st.just({"consecutive5xxErrors": 3}),
        "tls": st.sampled_from([{"mode": "DISABLE"}, {"mode": "ISTIO_MUTUAL"}]),
    },
)
_RESOURCES = st.one_of(
    _resource(
        "ServiceEntry",
        st.fixed_dictionaries(
            {
                "hosts": _alone(_HOSTS.filter(lambda host: host != "echo")),
                "ports": _alone(_port()),
                "location": st.sampled_from(["MESH_INTERNAL", "MESH_EXTERNAL"]),
                "resolution": st.just("STATIC"),
                "endpoints": st.lists(_ENDPOINT, max_size=4),
                "exportTo": _EXPORTS,
            }
        ),
    ),
    _resource(
        "WorkloadEntry",
        st.fixed_dictionaries({"address": _ADDRESSES, "labels": _LABELS}, optional={"locality": _LOCALITIES}),
    ),
    _resource(
        "Service",
        st.fixed_dictionaries(
            {"ports": _alone(_PORTS.map(lambda n: {"port": n}))},
            optional={"selector": _LABELS},
        ),
        "v1",
    ),
    _resource(
        "Sidecar",
        st.fixed_dictionaries(
            {
                "egress": _alone(
                    st.fixed_dictionaries(
                        {
                            "hosts": st.sampled_from([["*/*"], ["*/*"], ["./*"], ["shop/*"], ["~/*"]]),
                            "captureMode": st.just("NONE"),
                            "port": _port(),
                        },
                    )
                )
            },
            optional={
                "ingress": _alone(
                    st.fixed_dictionaries(
                        {"port": _port("in"), "defaultEndpoint": st.sampled_from(["127.0.0.1:9000", "0.0.0.0:80"])}
                    )
                ),
                "workloadSelector": st.fixed_dictionaries({"labels": _LABELS.filter(bool)}),
            },
        ),
    ),
    _resource(
        "DestinationRule",
        st.fixed_dictionaries(
            {"host": _HOSTS, "trafficPolicy": _POLICY, "exportTo": _EXPORTS},
            optional={
                "subsets": _alone(
                    st.fixed_dictionaries({"name": st.just("v1"), "labels": _LABELS, "trafficPolicy": _POLICY})
                )
            },
        ),
    ),
    _resource(
        "VirtualService",
        st.fixed_dictionaries(
            {"hosts": _alone(_HOSTS), "exportTo": _EXPORTS},
            optional={
                "http": st.lists(
                    st.fixed_dictionaries(
                        {"route": _ROUTE}, optional={"match": st.lists(_MATCH, min_size=1, max_size=2)}
                    ),
                    max_size=3,
                ),
                "tcp": st.lists(st.fixed_dictionaries({"route": _ROUTE}), max_size=2),
                "gateways": st.sampled_from([["mesh"], ["one"], ["mesh", "default/one"]]),
            },
        ),
    ),
    _resource(
        "Gateway",
        st.fixed_dictionaries(
            {
                "selector": _LABELS,
                "servers": st.lists(
                    st.fixed_dictionaries(
                        {
                            "port": _port().filter(lambda p: p["protocol"] != "TLS"),
                            "hosts": st.sampled_from([["*"], ["a.example"], ["./*"]]),
                        }
                    ),
                    min_size=1,
                    max_size=2,
                ),
            }
        ),
    ),
    _resource(
        "PeerAuthentication",
        st.fixed_dictionaries({"mtls": st.fixed_dictionaries({"mode": st.sampled_from(["STRICT", "DISABLE"])})}),
        "security.istio.io/v1",
    ),
)
_CONTEXTS = st.builds(ProxyContext, locality=_LOCALITIES.map(Locality.parse), labels=_LABELS)


def _loaded(documents: list[dict[str, Any]]) -> list[Any]:
    """JSON is YAML. What the loader refuses is not for translation."""
    resources = []
    for number, document in enumerate(documents):
        resources += load_text(json.dumps(document), f"{number}.yaml")[0]
    return resources


def keys_named(snapshot: Snapshot) -> set[str]:
    hosts = [host for table in snapshot.route_tables.values() for host in table.virtual_hosts]
    named = {cluster.cluster_key for host in hosts for route in host.routes for cluster in route.clusters}
    for listener in snapshot.listeners.values():
        named |= {cluster.cluster_key for route in listener.tcp_routes for cluster in route.clusters}
    return named


@settings(max_examples=200)
@given(st.lists(_RESOURCES, max_size=20), _CONTEXTS)
def test_any_well_formed_resources_give_a_snapshot_that_holds_together(
    documents: list[dict[str, Any]], context: ProxyContext
) -> None:
    resources = _loaded(documents)
    snapshot, problems = translate(resources, context)
    assert snapshot.workloads
    for name, listener in snapshot.listeners.items():
        assert listener.name == name
        assert listener.workload_id in snapshot.workloads
        assert listener.route_table is None or listener.route_table in snapshot.route_tables
        assert listener.route_table is not None or not listener.protocol.is_http
    assert {listener.route_table for listener in snapshot.listeners.values()} - {None} == snapshot.route_tables.keys()
    for table in snapshot.route_tables.values():
        domains = [domain for host in table.virtual_hosts for domain in host.domains]
        assert len(domains) == len(set(domains))
    for key, cluster in snapshot.clusters.items():
        assert cluster.key == key and key.startswith(cluster.name)
        assert_localities_hold_together(cluster)
    if keys_named(snapshot) - snapshot.clusters.keys():
        assert any("503" in problem.action for problem in problems)
    assert all(problem.line for problem in problems)
    assert translate(resources, context, snapshot)[0] is snapshot


def assert_localities_hold_together(cluster: Cluster) -> None:
    priorities = sorted({group.priority for group in cluster.localities})
    assert priorities == list(range(len(priorities)))
    keys = [endpoint.key for group in cluster.localities for endpoint in group.endpoints]
    assert len(keys) == len(set(keys))
    for group in cluster.localities:
        assert group.endpoints
        assert (group.weight is not None) == cluster.lb.is_locality_weighted


# ── the seed's sentence, from YAML to picks ──────────────────────────────────────────────────────────────────────────

_SEED = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: client}
spec:
  egress: [{port: {number: 8080, protocol: HTTP, name: http}, captureMode: NONE, hosts: ["./*"]}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: edge}
spec:
  hosts: [edge.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 8080, name: http, protocol: HTTP}]
  endpoints: [ENDPOINTS]
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {name: edge}
spec:
  host: edge.example
  trafficPolicy:
    loadBalancer: {simple: LEAST_CONN}
    outlierDetection: {consecutiveErrors: 5, interval: 10s}
    localityLbSettings:
      enabled: true
      distribute: [{from: cn-north-1/zone1/*, to: {"cn-north-1/zone1/*": 80, "cn-north-1/zone2/*": 20}}]
"""
_PICKS = 10_000


def shares(proxy: str, ejected: dict[str, int], each: int = 4, seed: str = _SEED) -> dict[str, float]:
    """Zone → percent of 10,000 picks, with so many endpoints of a zone ejected."""
    listed = [
        f"{{address: 10.0.{zone}.{number}, locality: cn-north-1/zone{zone}/a}}"
        for zone in (1, 2, 3)
        for number in range(each)
    ]
    resources, problems = load_text(seed.replace("ENDPOINTS", ", ".join(listed)), "seed.yaml")
    assert all(problem.severity is Severity.WARNING for problem in problems)
    snapshot, _ = translate(resources, ProxyContext(locality=Locality.parse(proxy)))
    cluster = snapshot.clusters["outbound|8080||edge.example"]
    groups = []
    for group in cluster.localities:
        states = [EndpointState(endpoint, 0.0) for endpoint in group.endpoints]
        for state in states[: ejected.get(group.locality.zone, 0)]:
            state.is_ejected = True
        groups.append((group.priority, group.locality, group.weight, states))
    zone_of = {id(state): locality.zone for _, locality, _, states in groups for state in states}
    balancer = ClusterBalancer(cluster.lb, groups, Random(1).random, 0.0)
    counts: dict[str, int] = {}
    for _ in range(_PICKS):
        state = balancer.pick(0.0)
        assert state is not None and not state.is_ejected
        counts[zone_of[id(state)]] = counts.get(zone_of[id(state)], 0) + 1
    return {zone: 100 * count / _PICKS for zone, count in sorted(counts.items())}


def near(found: dict[str, float], expected: dict[str, float]) -> bool:
    return found.keys() == expected.keys() and all(abs(found[zone] - share) <= 1 for zone, share in expected.items())


def test_80_percent_stay_in_the_own_zone_and_20_go_to_the_next() -> None:
    assert near(shares("cn-north-1/zone1/a", {}), {"zone1": 80, "zone2": 20})


def test_where_the_rule_does_not_match_all_endpoints_share_alike() -> None:
    found = shares("cn-north-1/zone2/a", {})
    assert near(found, {"zone1": 100 / 3, "zone2": 100 / 3, "zone3": 100 / 3})


def test_with_all_of_the_own_zone_ejected_everything_goes_to_the_next() -> None:
    assert shares("cn-north-1/zone1/a", {"zone1": 4}) == {"zone2": 100}


def test_with_ten_endpoints_a_zone_the_share_follows_their_health() -> None:
    expected = {2: 80, 3: 79.67, 5: 73.68, 7: 62.69, 9: 35.90}
    for out, share in expected.items():
        found = shares("cn-north-1/zone1/a", {"zone1": out}, each=10)
        assert near(found, {"zone1": share, "zone2": 100 - share}), (out, found)


def test_without_distribute_the_own_zone_spills_over_only_when_too_few_endpoints_are_left() -> None:
    failover = _SEED.partition("    localityLbSettings:")[0]
    assert shares("cn-north-1/zone1/a", {}, seed=failover) == {"zone1": 100}
    assert shares("cn-north-1/zone1/a", {"zone1": 1}, seed=failover) == {"zone1": 100}
    found = shares("cn-north-1/zone1/a", {"zone1": 2}, seed=failover)
    assert near(found, {"zone1": 70, "zone2": 15, "zone3": 15})
