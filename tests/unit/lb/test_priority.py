"""Priorities, overprovisioning and panic: Envoy's published tables, with the rows its code contradicts as its code has
them. Each row runs through the arithmetic and through the balancer."""

from collections.abc import Sequence
from random import Random

import pytest

from meshproxy.lb.cluster_balancer import ClusterBalancer
from meshproxy.lb.priority import Share, priority_loads
from meshproxy.model.cluster import LbPolicy
from meshproxy.model.endpoint import Locality
from tests.support.endpoint_states import endpoints, picked, share_percent, with_health

PICKS = 40_000  # three standard deviations of a 50 % share are 0.75 points
TOLERANCE = 1.0

Row = tuple[Sequence[int], Sequence[int], Sequence[bool], float]
"""(healthy percent by priority, load by priority, panics, panic threshold)."""

CALM2, CALM3 = (False, False), (False, False, False)

TWO_PRIORITIES_SECOND_WELL: list[Row] = [
    ((100, 100), (100, 0), CALM2, 50.0),
    ((72, 100), (100, 0), CALM2, 50.0),
    ((71, 100), (99, 1), CALM2, 50.0),
    ((50, 100), (70, 30), CALM2, 50.0),
    ((25, 100), (35, 65), CALM2, 50.0),
    ((0, 100), (0, 100), CALM2, 50.0),
]
TWO_PRIORITIES: list[Row] = [
    ((72, 72), (100, 0), CALM2, 50.0),
    ((71, 71), (99, 1), CALM2, 50.0),
    ((50, 50), (70, 30), CALM2, 50.0),
    ((25, 25), (50, 50), (True, True), 50.0),
]
THREE_PRIORITIES: list[Row] = [
    ((100, 100, 100), (100, 0, 0), CALM3, 50.0),
    ((72, 72, 100), (100, 0, 0), CALM3, 50.0),
    ((71, 71, 100), (99, 1, 0), CALM3, 50.0),
    ((50, 50, 100), (70, 30, 0), CALM3, 50.0),
    ((25, 100, 100), (35, 65, 0), CALM3, 50.0),
    ((25, 25, 100), (35, 35, 30), CALM3, 50.0),
    ((25, 25, 20), (37, 35, 28), CALM3, 0.0),
    ((25, 25, 20), (34, 33, 33), (True, True, True), 50.0),
]
PANIC: list[Row] = [
    ((50, 60), (70, 30), CALM2, 50.0),
    ((5, 65), (8, 92), (True, False), 50.0),
    ((0, 0), (50, 50), (True, True), 50.0),
    ((0, 0), (100, 0), CALM2, 0.0),
    ((20, 30), (40, 60), CALM2, 0.0),  # with overprovisioning 100: health 20 and 30 are scaled to 40 and 60
]


@pytest.mark.parametrize("row", TWO_PRIORITIES_SECOND_WELL + TWO_PRIORITIES + THREE_PRIORITIES + PANIC, ids=str)
class TestTables:
    def test_arithmetic(self, row: Row) -> None:
        percents, expected, panics, threshold = row
        overprovisioning = 100 if percents == (20, 30) else 140
        loads = priority_loads([Share(100, healthy) for healthy in percents], threshold, overprovisioning)
        assert loads.healthy == tuple(expected)
        assert loads.panics == tuple(panics)
        assert not any(loads.degraded)

    def test_picks_of_the_real_balancer(self, row: Row) -> None:
        percents, expected, panics, threshold = row
        lb = LbPolicy(
            panic_threshold_percent=threshold, overprovisioning_factor_percent=100 if percents == (20, 30) else 140
        )
        levels = [with_health(healthy, 100, host=f"10.0.{index}") for index, healthy in enumerate(percents)]
        groups = [(index, Locality(), None, states) for index, states in enumerate(levels)]
        balancer = ClusterBalancer(lb, groups, Random(7).random, 0.0)
        hits = picked(balancer.pick, PICKS)
        if percents == (0, 0) and not threshold:
            assert hits == {None: PICKS}
            return
        for states, load, panicking in zip(levels, expected, panics, strict=True):
            assert share_percent(hits, states) == pytest.approx(load, abs=TOLERANCE if 0 < load < 100 else 0)
            unavailable = [state for state in states if not state.is_available]
            assert (share_percent(hits, unavailable) > 0) == (panicking and load > 0)


DEGRADED = [
    ((100, 0), (100, 0)),
    ((71, 0), (100, 0)),
    ((71, 29), (99, 1)),
    ((25, 65), (35, 65)),
    ((5, 0), (100, 0)),
]
"""((healthy %, degraded %), (to healthy, to degraded)) of one priority."""


@pytest.mark.parametrize(("health", "expected"), DEGRADED)
class TestDegraded:
    def test_arithmetic(self, health: tuple[int, int], expected: tuple[int, int]) -> None:
        loads = priority_loads([Share(100, *health)], 0.0)
        assert (loads.healthy, loads.degraded) == ((expected[0],), (expected[1],))

    def test_picks_of_the_real_balancer(self, health: tuple[int, int], expected: tuple[int, int]) -> None:
        states = with_health(health[0], 100, degraded=health[1])
        groups = [(0, Locality(), None, states)]
        balancer = ClusterBalancer(LbPolicy(panic_threshold_percent=0.0), groups, Random(7).random, 0.0)
        hits = picked(balancer.pick, PICKS)
        measured = share_percent(hits, [state for state in states if state.is_degraded])
        assert measured == pytest.approx(expected[1], abs=TOLERANCE if 0 < expected[1] < 100 else 0)
        assert share_percent(hits, [state for state in states if not state.is_available]) == 0


def test_loads_of_healthy_and_degraded_priorities_are_scaled_together() -> None:
    """Health 10/20/10 and degraded 20/10/0: a comment in Envoy's code works this example."""
    shares = [Share(100, 10, 20), Share(100, 20, 10), Share(100, 10, 0)]
    loads = priority_loads(shares, 0.0, 100)
    assert (loads.healthy, loads.degraded) == ((16, 28, 14), (28, 14, 0))


def test_degraded_endpoints_count_against_panic() -> None:
    assert not priority_loads([Share(100, 20, 30)]).panics[0]
    assert priority_loads([Share(100, 20, 29)]).panics[0]


def test_a_degraded_draw_in_panic_meets_everyone() -> None:
    states = with_health(10, 100, degraded=20)
    balancer = ClusterBalancer(LbPolicy(), [(0, Locality(), None, states)], Random(7).random, 0.0)
    assert balancer.loads.panics == (True,)
    assert len(picked(balancer.pick, PICKS)) == 100


def test_total_panic_follows_the_number_of_endpoints() -> None:
    loads = priority_loads([Share(10, 0), Share(30, 0), Share(0, 0)])
    assert loads.healthy == (25, 75, 0)
    assert priority_loads([Share(0, 0), Share(1, 0), Share(2, 0)]).healthy == (0, 34, 66)


def test_an_empty_priority_takes_nothing() -> None:
    assert priority_loads([Share(0, 0), Share(10, 10)]).healthy == (0, 100)
    well = endpoints(3)
    groups = [(0, Locality(), None, []), (1, Locality(), None, well)]
    balancer = ClusterBalancer(LbPolicy(), groups, Random(7).random, 0.0)
    assert set(picked(balancer.pick, 100)) == set(well)


def test_one_healthy_of_very_many_still_serves() -> None:
    """140 · 1 // 200 is 0: availability is lost to truncation, the endpoint is not."""
    states = with_health(1, 200)
    balancer = ClusterBalancer(
        LbPolicy(panic_threshold_percent=0.0), [(0, Locality(), None, states)], Random(7).random, 0.0
    )
    assert set(picked(balancer.pick, 100)) == {states[0]}


@pytest.mark.parametrize(
    ("ejected", "load"), [(0, (100, 0)), (1, (100, 0)), (2, (70, 30)), (3, (35, 65)), (4, (0, 100))]
)
def test_failover_spills_as_local_endpoints_are_ejected(ejected: int, load: tuple[int, int]) -> None:
    """Four local endpoints and four elsewhere: one gone is within overprovisioning, the second spills."""
    local, remote = endpoints(4, host="10.0.1"), endpoints(4, host="10.0.2")
    groups = [(0, Locality("r1"), None, local), (1, Locality("r2"), None, remote)]
    balancer = ClusterBalancer(LbPolicy(panic_threshold_percent=0.0), groups, Random(7).random, 0.0)
    for state in local[:ejected]:
        state.is_ejected = True
    balancer.recompute(0.0)
    hits = picked(balancer.pick, PICKS)
    assert share_percent(hits, local) == pytest.approx(load[0], abs=TOLERANCE if 0 < load[0] < 100 else 0)
