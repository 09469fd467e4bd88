"""Locality weights as endpoints fail: Envoy's published table and an 80/20 split, through the real balancer."""

from random import Random

import pytest

from meshproxy.lb.cluster_balancer import ClusterBalancer
from meshproxy.lb.locality import effective_weight
from meshproxy.model.cluster import LbKind, LbPolicy
from meshproxy.model.endpoint import Locality
from tests.support.endpoint_states import endpoints, picked, share_percent, with_health

PICKS = 20_000
WEIGHTED = LbPolicy(is_locality_weighted=True, panic_threshold_percent=0.0)
ZONE1, ZONE2, ZONE3 = Locality("cn-north-1", "zone1"), Locality("cn-north-1", "zone2"), Locality("cn-north-1", "zone3")

ONE_TO_TWO = [(100, 33.33), (70, 32.89), (69, 32.57), (50, 25.93), (25, 14.89), (0, 0.0)]
"""Weights 1 and 2, the second all well: (healthy % of the first, its share in %)."""

EIGHTY_TWENTY = [
    (10, 10, 80.0),
    (8, 10, 80.0),
    (7, 10, 79.67),
    (5, 10, 73.68),
    (3, 10, 62.69),
    (1, 10, 35.90),
    (0, 10, 0.0),
    (10, 0, 100.0),
    (5, 5, 80.0),
]
"""Weights 80 and 20, ten endpoints each: (up in the first, up in the second, share of the first in %)."""


@pytest.mark.parametrize(("healthy", "expected"), ONE_TO_TWO)
def test_weights_one_and_two(healthy: int, expected: float) -> None:
    first, second = effective_weight(1, healthy, 100), effective_weight(2, 100, 100)
    assert 100 * first / (first + second) == pytest.approx(expected, abs=0.005)
    x, y = with_health(healthy, 100, host="10.0.1"), endpoints(100, host="10.0.2")
    balancer = ClusterBalancer(WEIGHTED, [(0, ZONE1, 1, x), (0, ZONE2, 2, y)], Random(7).random, 0.0)
    assert share_percent(picked(balancer.pick, PICKS), x) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("kind", [LbKind.LEAST_REQUEST, LbKind.ROUND_ROBIN, LbKind.RANDOM])
@pytest.mark.parametrize(("up1", "up2", "expected"), EIGHTY_TWENTY)
def test_eighty_to_twenty(up1: int, up2: int, expected: float, kind: LbKind) -> None:
    zone1, zone2 = with_health(up1, 10, host="10.0.1"), with_health(up2, 10, host="10.0.2")
    lb = LbPolicy(kind=kind, is_locality_weighted=True, panic_threshold_percent=0.0)
    balancer = ClusterBalancer(lb, [(0, ZONE1, 80, zone1), (0, ZONE2, 20, zone2)], Random(7).random, 0.0)
    hits = picked(balancer.pick, PICKS)
    assert share_percent(hits, zone1) == pytest.approx(expected, abs=0.1)
    assert all(state is not None and state.is_available for state in hits)


def test_a_locality_without_weight_gets_nothing() -> None:
    groups = [
        (0, ZONE1, 80, endpoints(4, host="10.0.1")),
        (0, ZONE2, 20, endpoints(4, host="10.0.2")),
        (0, ZONE3, 0, endpoints(4, host="10.0.3")),
    ]
    balancer = ClusterBalancer(WEIGHTED, groups, Random(7).random, 0.0)
    hits = picked(balancer.pick, PICKS)
    assert [share_percent(hits, group[3]) for group in groups] == [pytest.approx(80), pytest.approx(20), 0]


def test_where_no_locality_has_weight_all_endpoints_are_one_list() -> None:
    states = endpoints(2, host="10.0.1") + endpoints(6, host="10.0.2")
    groups = [(0, ZONE1, 0, states[:2]), (0, ZONE2, 0, states[2:])]
    balancer = ClusterBalancer(WEIGHTED, groups, Random(7).random, 0.0)
    assert share_percent(picked(balancer.pick, PICKS), states[:2]) == pytest.approx(25, abs=1)


def test_all_of_one_zone_ejected_sends_everything_to_the_other() -> None:
    zone1, zone2 = endpoints(4, host="10.0.1"), endpoints(4, host="10.0.2")
    balancer = ClusterBalancer(WEIGHTED, [(0, ZONE1, 80, zone1), (0, ZONE2, 20, zone2)], Random(7).random, 0.0)
    for state in zone1:
        state.is_ejected = True
        balancer.recompute(0.0)
    assert share_percent(picked(balancer.pick, 1000), zone2) == 100


def test_without_locality_weighting_a_priority_is_one_list() -> None:
    zone1, zone2 = endpoints(2, host="10.0.1"), endpoints(8, host="10.0.2")
    balancer = ClusterBalancer(LbPolicy(), [(0, ZONE1, 80, zone1), (0, ZONE2, 20, zone2)], Random(7).random, 0.0)
    assert share_percent(picked(balancer.pick, PICKS), zone1) == pytest.approx(20, abs=1)


def test_panic_prefers_no_locality() -> None:
    """Envoy takes all hosts of a panicking priority, whatever their localities weigh."""
    zone1, zone2 = with_health(0, 4, host="10.0.1"), with_health(0, 4, host="10.0.2")
    lb = LbPolicy(is_locality_weighted=True)
    balancer = ClusterBalancer(lb, [(0, ZONE1, 80, zone1), (0, ZONE2, 20, zone2)], Random(7).random, 0.0)
    assert share_percent(picked(balancer.pick, PICKS), zone1) == pytest.approx(50, abs=1)


def test_degraded_endpoints_have_localities_of_their_own() -> None:
    zone1, zone2 = with_health(0, 10, degraded=10, host="10.0.1"), with_health(0, 10, degraded=10, host="10.0.2")
    balancer = ClusterBalancer(WEIGHTED, [(0, ZONE1, 80, zone1), (0, ZONE2, 20, zone2)], Random(7).random, 0.0)
    assert balancer.loads.degraded == (100,)
    assert share_percent(picked(balancer.pick, PICKS), zone1) == pytest.approx(80, abs=0.1)


def test_a_locality_in_two_pieces_is_one() -> None:
    pieces = endpoints(6, host="10.0.1")
    other = endpoints(2, host="10.0.2")
    groups = [(0, ZONE1, 40, pieces[:3]), (0, ZONE1, 40, pieces[3:]), (0, ZONE2, 20, other)]
    hits = picked(ClusterBalancer(WEIGHTED, groups, Random(7).random, 0.0).pick, PICKS)
    assert share_percent(hits, pieces) == pytest.approx(80, abs=0.1)
    assert all(hits[state] for state in pieces)


def test_flapping_health_does_not_starve_the_light_locality() -> None:
    """Weights change with every flap, so turns begin anew; the shares must hold all the same."""
    zone1, zone2 = endpoints(10, host="10.0.1"), endpoints(10, host="10.0.2")
    balancer = ClusterBalancer(WEIGHTED, [(0, ZONE1, 80, zone1), (0, ZONE2, 20, zone2)], Random(7).random, 0.0)
    in_zone2 = 0
    for turn in range(PICKS):
        for state in zone2[:5]:
            state.is_ejected = turn % 2 == 0
        balancer.recompute(0.0)
        in_zone2 += balancer.pick(0.0) in zone2
    # Half the time the light zone weighs 20 of 100, half the time 14 of 94.
    assert 100 * in_zone2 / PICKS == pytest.approx((20 + 100 * 14 / 94) / 2, abs=1)
