"""Rows T-DIST and T-FO of Istio's localityLbSetting, and the laws they are instances of."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.model.endpoint import Endpoint, Locality
from meshproxy.snapshot.localities import (
    LocalityPolicy,
    Placed,
    arrange,
    effective_policy,
    locality_matches,
    topology_labels,
)

SEED: Mapping[str, Any] = {
    "enabled": True,
    "distribute": [{"from": "cn-north-1/zone1/*", "to": {"cn-north-1/zone1/*": 80, "cn-north-1/zone2/*": 20}}],
}


def place(locality: str, number: int = 0, labels: Mapping[str, str] | None = None, weight: int = 1) -> Placed:
    where = Locality.parse(locality)
    return Placed(
        Endpoint(address=f"10.0.0.{number}", port=80, weight=weight), where, topology_labels(where, labels or {})
    )


def several(*localities: str) -> list[Placed]:
    return [place(locality, number) for number, locality in enumerate(localities)]


def arranged(
    placed: Sequence[Placed], policy: LocalityPolicy, proxy: str, labels: Mapping[str, str] | None = None
) -> dict[str, tuple[int, int | None]]:
    where = Locality.parse(proxy)
    groups, _ = arrange(placed, policy, where, topology_labels(where, labels or {}))
    return {str(group.locality): (group.priority, group.weight) for group in groups}


def by_address(
    placed: Sequence[Placed], policy: LocalityPolicy, proxy: str, labels: Mapping[str, str]
) -> dict[str, int]:
    where = Locality.parse(proxy)
    groups, _ = arrange(placed, policy, where, topology_labels(where, labels))
    return {endpoint.address: group.priority for group in groups for endpoint in group.endpoints}


@pytest.mark.parametrize(
    ("locality", "pattern", "does"),
    [
        ("r1/z1/s1", "*", True),
        ("r1/z1/s1", "r1", True),
        ("r1/z1/s1", "r1/*", True),
        ("r1/z1/s1", "r1/z1", True),
        ("r1/z1/s1", "r1/z1/*", True),
        ("r1/z1/s1", "r1/z1/s1", True),
        ("r1/z1/s1", "r1/z1/s2", False),
        ("r1/z1/s1", "r1/z2/*", False),
        ("r1/z1/s1", "r2", False),
        ("r1", "r1/z1/*", False),
        ("r1/z1", "r1/z1/*", True),
    ],
)
def test_a_locality_pattern_matches_part_by_part(locality: str, pattern: str, does: bool) -> None:
    assert locality_matches(Locality.parse(locality), pattern) is does


# T-DIST-1
def test_the_own_zone_gets_80_the_next_20_and_a_zone_in_no_share_nothing() -> None:
    placed = several(*["cn-north-1/zone1/a"] * 4, *["cn-north-1/zone2/a"] * 4, *["cn-north-1/zone3/a"] * 4)
    policy = effective_policy(SEED, "", has_outlier_detection=True)
    assert arranged(placed, policy, "cn-north-1/zone1/a") == {
        "cn-north-1/zone1/a": (0, 80),
        "cn-north-1/zone2/a": (0, 20),
    }


# T-DIST-2
def test_a_proxy_that_no_from_matches_balances_as_without_the_rule() -> None:
    placed = several(*["cn-north-1/zone1/a"] * 4, *["cn-north-1/zone2/a"] * 4, *["cn-north-1/zone3/a"] * 4)
    policy = effective_policy(SEED, "", has_outlier_detection=True)
    groups, is_weighted = arrange(placed, policy, Locality("cn-north-1", "zone2", "a"), {})
    assert not is_weighted
    assert {(group.priority, group.weight, len(group.endpoints)) for group in groups} == {(0, None, 4)}


# T-DIST-3
def test_a_share_for_several_localities_is_split_by_their_endpoints() -> None:
    policy = effective_policy({"distribute": [{"from": "*", "to": {"cn-north-1/*": 100}}]}, "", False)
    placed = several(*["cn-north-1/zone1"] * 3, "cn-north-1/zone2")
    assert arranged(placed, policy, "cn-north-1/zone1") == {"cn-north-1/zone1": (0, 75), "cn-north-1/zone2": (0, 25)}


def test_a_split_share_is_rounded_up_so_that_no_locality_gets_nothing() -> None:
    policy = effective_policy({"distribute": [{"from": "*", "to": {"r/*": 1, "q/*": 99}}]}, "", False)
    placed = several(*["r/z1"] * 3, "r/z2", "q/z")
    assert arranged(placed, policy, "r/z1") == {"r/z1": (0, 1), "r/z2": (0, 1), "q/z": (0, 99)}


def test_endpoint_weights_count_in_the_split() -> None:
    policy = effective_policy({"distribute": [{"from": "*", "to": {"*": 100}}]}, "", False)
    placed = [place("r/z1", 1, weight=3), place("r/z2", 2)]
    assert arranged(placed, policy, "r/z1") == {"r/z1": (0, 75), "r/z2": (0, 25)}


def test_the_first_matching_from_is_the_only_one_used() -> None:
    setting = {
        "distribute": [
            {"from": "r1/*", "to": {"r1/*": 100}},
            {"from": "*", "to": {"r2/*": 100}},
        ]
    }
    policy = effective_policy(setting, "", False)
    assert arranged(several("r1/z1", "r2/z1"), policy, "r1/z1") == {"r1/z1": (0, 100)}


def test_an_earlier_pattern_claims_a_locality_for_itself() -> None:
    policy = effective_policy({"distribute": [{"from": "*", "to": {"r1/z1/*": 70, "*": 30}}]}, "", False)
    assert arranged(several("r1/z1", "r1/z2"), policy, "r1/z1") == {"r1/z1": (0, 70), "r1/z2": (0, 30)}


def test_distribute_wins_over_failover() -> None:
    policy = effective_policy({**SEED, "failoverPriority": ["version"]}, "", True)
    assert arranged(several("cn-north-1/zone1/a"), policy, "cn-north-1/zone1/a") == {"cn-north-1/zone1/a": (0, 80)}


FAILS_OVER = effective_policy(None, "", has_outlier_detection=True)


# T-FO-1
def test_outlier_detection_alone_prefers_near_endpoints() -> None:
    placed = several("r1/z1/s1", "r1/z1/s2", "r1/z2/s1", "r2/z1/s1")
    assert arranged(placed, FAILS_OVER, "r1/z1/s1") == {
        "r1/z1/s1": (0, None),
        "r1/z1/s2": (1, None),
        "r1/z2/s1": (2, None),
        "r2/z1/s1": (3, None),
    }


# T-FO-2
def test_priorities_have_no_gaps() -> None:
    placed = several("r1/z1/s2", "r1/z2/s1", "r2/z1/s1")
    assert arranged(placed, FAILS_OVER, "r1/z1/s1") == {
        "r1/z1/s2": (0, None),
        "r1/z2/s1": (1, None),
        "r2/z1/s1": (2, None),
    }


# T-FO-3
def test_failover_names_the_region_that_comes_next() -> None:
    policy = effective_policy({"failover": [{"from": "r1", "to": "r3"}]}, "", True)
    placed = several("r1/z1/s1", "r2/z1", "r3/z1")
    assert arranged(placed, policy, "r1/z1/s1") == {"r1/z1/s1": (0, 1), "r3/z1": (1, 1), "r2/z1": (2, 1)}


# T-FO-4
def test_without_outlier_detection_all_localities_are_equal() -> None:
    policy = effective_policy(None, "", has_outlier_detection=False)
    assert arranged(several("r1/z1/s1", "r2/z1"), policy, "r1/z1/s1") == {"r1/z1/s1": (0, None), "r2/z1": (0, None)}


def test_failover_without_outlier_detection_does_nothing() -> None:
    policy = effective_policy({"failover": [{"from": "r1", "to": "r3"}]}, "", has_outlier_detection=False)
    groups, is_weighted = arrange(several("r1/z1", "r2/z1"), policy, Locality("r1", "z1"), {})
    assert {group.priority for group in groups} == {0}
    assert not is_weighted


def test_a_disabled_setting_is_no_locality_balancing_at_all() -> None:
    policy = effective_policy({**SEED, "enabled": False}, "", has_outlier_detection=True)
    assert arranged(several("r1/z1", "r2/z1"), policy, "r1/z1") == {"r1/z1": (0, None), "r2/z1": (0, None)}


def test_localities_weigh_against_each_other_only_where_failover_is_written() -> None:
    _, is_weighted = arrange(several("r1/z1"), FAILS_OVER, Locality("r1", "z1"), {})
    assert not is_weighted
    written = effective_policy({"failover": [{"from": "r1", "to": "r3"}]}, "", True)
    _, is_weighted = arrange(several("r1/z1"), written, Locality("r1", "z1"), {})
    assert is_weighted


def test_failover_priority_walks_labels_until_the_first_mismatch() -> None:
    policy = effective_policy({"failoverPriority": ["version=v1", "topology.istio.io/cluster=clusterA"]}, "", True)
    placed = [
        place("", 1, {"version": "v1", "topology.istio.io/cluster": "clusterA"}),
        place("", 2, {"version": "v1", "topology.istio.io/cluster": "clusterB"}),
        place("", 3, {"version": "v2", "topology.istio.io/cluster": "clusterA"}),
        place("", 4),
    ]
    assert by_address(placed, policy, "", {"any": "label"}) == {
        "10.0.0.1": 0,
        "10.0.0.2": 1,
        "10.0.0.3": 2,
        "10.0.0.4": 2,
    }


def test_failover_priority_compares_with_the_proxy_where_no_value_is_given() -> None:
    policy = effective_policy({"failoverPriority": ["version"]}, "", True)
    placed = [place("", 1, {"version": "v1"}), place("", 2, {"version": "v2"})]
    assert by_address(placed, policy, "", {"version": "v2"}) == {"10.0.0.2": 0, "10.0.0.1": 1}


def test_failover_priority_is_ignored_for_a_proxy_without_labels() -> None:
    policy = effective_policy({"failoverPriority": ["version"]}, "", True)
    groups, _ = arrange([place("", 1, {"version": "v1"}), place("", 2)], policy, Locality(), {})
    assert {group.priority for group in groups} == {0}


def test_another_network_sorts_after_all_of_this_one_and_keeps_its_own_order() -> None:
    policy = effective_policy({"failoverPriority": ["topology.istio.io/network", "version"]}, "", True)
    near = {"topology.istio.io/network": "n1"}
    far = {"topology.istio.io/network": "n2"}
    placed = [
        place("", 1, {**near, "version": "v1"}),
        place("", 2, {**near, "version": "v2"}),
        place("", 3, {**far, "version": "v1"}),
        place("", 4, {**far, "version": "v2"}),
    ]
    found = by_address(placed, policy, "", {**near, "version": "v1"})
    assert found == {"10.0.0.1": 0, "10.0.0.2": 1, "10.0.0.3": 2, "10.0.0.4": 3}


def test_failover_orders_regions_inside_each_step_of_failover_priority() -> None:
    policy = effective_policy({"failoverPriority": ["version"], "failover": [{"from": "r1", "to": "r3"}]}, "", True)
    placed = [
        place("r2", 1, {"version": "v1"}),
        place("r3", 2, {"version": "v1"}),
        place("r1", 3, {"version": "v2"}),
        place("r1", 4, {"version": "v1"}),
    ]
    found = by_address(placed, policy, "r1", {"version": "v1"})
    assert found == {"10.0.0.4": 0, "10.0.0.2": 1, "10.0.0.1": 2, "10.0.0.3": 3}


@pytest.mark.parametrize("word", ["PreferSameZone", "PreferClose"])
def test_traffic_distribution_prefers_the_zone_without_outlier_detection(word: str) -> None:
    policy = effective_policy(None, word, has_outlier_detection=False)
    placed = several("r1/z1/s1", "r1/z1/s2", "r1/z2", "r2/z1")
    assert arranged(placed, policy, "r1/z1/s1") == {
        "r1/z1/s1": (0, 1),
        "r1/z1/s2": (0, 1),
        "r1/z2": (1, 1),
        "r2/z1": (2, 1),
    }


def test_prefer_same_node_puts_the_node_before_the_zone() -> None:
    policy = effective_policy(None, "PreferSameNode", has_outlier_detection=False)
    placed = [
        place("r1/z1", 1, {"kubernetes.io/hostname": "node-a"}),
        place("r1/z1", 2, {"kubernetes.io/hostname": "node-b"}),
        place("r1/z2", 3, {"kubernetes.io/hostname": "node-c"}),
    ]
    found = by_address(placed, policy, "r1/z1", {"kubernetes.io/hostname": "node-a"})
    assert found == {"10.0.0.1": 0, "10.0.0.2": 1, "10.0.0.3": 2}


def test_a_destination_rules_setting_wins_over_traffic_distribution() -> None:
    policy = effective_policy({"enabled": True}, "PreferSameZone", has_outlier_detection=False)
    assert not policy.fails_over


_LOCALITIES = st.builds(Locality, *[st.sampled_from(["a", "b", "c"])] * 3)
_POLICIES = st.builds(
    effective_policy,
    st.one_of(
        st.none(),
        st.just({"failover": [{"from": "a", "to": "b"}]}),
        st.just({"failoverPriority": ["version", "topology.kubernetes.io/zone"]}),
        st.just({"enabled": False}),
    ),
    st.sampled_from(["", "PreferSameZone", "PreferSameNode"]),
    st.booleans(),
)


@given(st.lists(_LOCALITIES, max_size=12), _LOCALITIES, _POLICIES)
def test_every_endpoint_is_kept_and_priorities_are_gapless(
    localities: list[Locality], proxy: Locality, policy: LocalityPolicy
) -> None:
    placed = [place(str(locality), number) for number, locality in enumerate(localities)]
    groups, is_weighted = arrange(placed, policy, proxy, topology_labels(proxy, {"version": "v1"}))
    addresses = sorted(endpoint.address for group in groups for endpoint in group.endpoints)
    assert addresses == sorted(item.endpoint.address for item in placed)
    priorities = {group.priority for group in groups}
    assert priorities == set(range(len(priorities)))
    assert all((group.weight is not None) == is_weighted for group in groups)


@given(st.lists(_LOCALITIES, min_size=1, max_size=12), st.integers(1, 99), st.randoms(use_true_random=False))
def test_distribute_does_not_depend_on_the_order_of_endpoints(
    localities: list[Locality], share: int, order: Any
) -> None:
    policy = effective_policy({"distribute": [{"from": "*", "to": {"a/*": share, "b/*": 100 - share}}]}, "", False)
    placed = [place(str(locality), number) for number, locality in enumerate(localities)]
    shuffled = list(placed)
    order.shuffle(shuffled)
    assert arranged(placed, policy, "a/a/a") == arranged(shuffled, policy, "a/a/a")
