from random import Random
from time import perf_counter

import pytest

from meshproxy.lb.cluster_balancer import ClusterBalancer, Group
from meshproxy.lb.least_request import LeastRequest
from meshproxy.lb.round_robin import RoundRobin
from meshproxy.lb.uniform import Uniform
from meshproxy.model.cluster import LbKind, LbPolicy, SlowStart
from meshproxy.model.endpoint import Locality
from tests.support.endpoint_states import endpoints, picked, share_percent

NO_PANIC = LbPolicy(panic_threshold_percent=0.0)
ROUND_ROBIN = LbPolicy(kind=LbKind.ROUND_ROBIN, panic_threshold_percent=0.0)
HERE = Locality("r1", "z1")


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        (LbKind.ROUND_ROBIN, RoundRobin),
        (LbKind.LEAST_REQUEST, LeastRequest),
        (LbKind.RANDOM, Uniform),
        (LbKind.PASSTHROUGH, Uniform),
    ],
)
def test_the_plain_case_is_the_policys_own_pick(kind: LbKind, policy: type[object]) -> None:
    balancer = ClusterBalancer(LbPolicy(kind=kind), [(0, HERE, None, endpoints(3))], Random(7).random, 0.0)
    assert isinstance(balancer.pick.__self__, policy)  # type: ignore[attr-defined]


def test_one_locality_left_is_the_policys_own_pick() -> None:
    gone, left = endpoints(2), endpoints(2, host="10.0.1")
    lb = LbPolicy(is_locality_weighted=True, panic_threshold_percent=0.0)
    balancer = ClusterBalancer(lb, [(0, HERE, 80, gone), (0, Locality("r2"), 20, left)], Random(7).random, 0.0)
    for state in gone:
        state.is_ejected = True
    balancer.recompute(0.0)
    assert isinstance(balancer.pick.__self__, LeastRequest)  # type: ignore[attr-defined]
    assert set(picked(balancer.pick, 100)) == set(left)


def test_no_endpoints_no_pick() -> None:
    nobody: list[list[Group]] = [[], [(0, HERE, None, [])]]
    for groups in nobody:
        balancer = ClusterBalancer(NO_PANIC, groups, Random(7).random, 0.0)
        assert balancer.pick(0.0) is None
        assert balancer.pick_avoiding(0.0, set()) is None


def test_the_ejected_and_the_unhealthy_are_not_picked() -> None:
    states = endpoints(4)
    balancer = ClusterBalancer(NO_PANIC, [(0, HERE, None, states)], Random(7).random, 0.0)
    states[0].is_ejected = states[1].is_unhealthy = True
    balancer.recompute(0.0)
    assert set(picked(balancer.pick, 1000)) == set(states[2:])
    states[0].is_ejected = False
    balancer.recompute(0.0)
    assert set(picked(balancer.pick, 1000)) == {states[0], *states[2:]}


def test_priorities_may_have_gaps_and_any_order() -> None:
    first, second = endpoints(2), endpoints(2, host="10.0.1")
    groups = [(7, HERE, None, second), (3, HERE, None, first)]
    balancer = ClusterBalancer(NO_PANIC, groups, Random(7).random, 0.0)
    assert set(picked(balancer.pick, 100)) == set(first)


def test_round_robin_goes_on_where_it_was_after_an_update() -> None:
    states = endpoints(4)
    balancer = ClusterBalancer(ROUND_ROBIN, [(0, HERE, None, states)], lambda: 0.0, 0.0)
    balancer.pick(0.0)
    balancer.update(ROUND_ROBIN, [(0, HERE, None, list(states))], 0.0)
    assert balancer.pick(0.0) is states[1]
    states[0].is_ejected = True
    balancer.recompute(0.0)
    assert balancer.pick(0.0) is states[2]


def test_weighted_turns_go_on_after_an_update() -> None:
    """Were they begun anew each time, the first in the list would be favoured."""
    states = endpoints(4)
    states[0].weight = 2
    balancer = ClusterBalancer(ROUND_ROBIN, [(0, HERE, None, states)], Random(7).random, 0.0)
    hits = dict.fromkeys(states, 0)
    for turn in range(5000):
        states[3].is_ejected = turn % 2 == 0
        balancer.recompute(0.0)
        state = balancer.pick(0.0)
        assert state is not None
        hits[state] += 1
    assert hits[states[1]] == pytest.approx(hits[states[2]], rel=0.05)
    assert hits[states[0]] == pytest.approx(2 * hits[states[1]], rel=0.05)


def test_another_policy_takes_over() -> None:
    states = endpoints(2)
    balancer = ClusterBalancer(ROUND_ROBIN, [(0, HERE, None, states)], Random(7).random, 0.0)
    balancer.update(NO_PANIC, [(0, HERE, None, states)], 0.0)
    assert isinstance(balancer.pick.__self__, LeastRequest)  # type: ignore[attr-defined]


def test_a_weight_changed_in_place_counts_after_the_update() -> None:
    states = endpoints(2)
    balancer = ClusterBalancer(NO_PANIC, [(0, HERE, None, states)], Random(7).random, 0.0)
    states[0].weight = 3
    balancer.update(NO_PANIC, [(0, HERE, None, states)], 0.0)
    assert share_percent(picked(balancer.pick, 10_000), states[:1]) == pytest.approx(75, abs=0.1)


def test_a_retry_avoids_who_was_tried() -> None:
    states = endpoints(3)
    balancer = ClusterBalancer(NO_PANIC, [(0, HERE, None, states)], Random(7).random, 0.0)
    assert {balancer.pick_avoiding(0.0, {states[0], states[2]}) for _ in range(1000)} == {states[1]}


def test_a_retry_never_meets_the_idle_broken_one_again() -> None:
    """It fails at once, so it is always the least busy: draws alone would find it again and again."""
    states = endpoints(3)
    states[1].active_requests = states[2].active_requests = 10
    balancer = ClusterBalancer(NO_PANIC, [(0, HERE, None, states)], Random(7).random, 0.0)
    assert states[0] not in {balancer.pick_avoiding(0.0, {states[0]}) for _ in range(2000)}


def test_a_retry_takes_whom_there_is() -> None:
    states = endpoints(1)
    balancer = ClusterBalancer(NO_PANIC, [(0, HERE, None, states)], Random(7).random, 0.0)
    assert balancer.pick_avoiding(0.0, set(states)) is states[0]


def test_a_retry_goes_to_the_next_priority_rather_than_back() -> None:
    local, remote = endpoints(1), endpoints(1, host="10.0.1")
    groups = [(0, HERE, None, local), (1, Locality("r2"), None, remote)]
    balancer = ClusterBalancer(NO_PANIC, groups, Random(7).random, 0.0)
    assert balancer.pick_avoiding(0.0, set(local)) is remote[0]


def test_a_retry_does_not_leave_for_a_locality_without_weight() -> None:
    mine, foreign = endpoints(1), endpoints(1, host="10.0.1")
    lb = LbPolicy(is_locality_weighted=True, panic_threshold_percent=0.0)
    balancer = ClusterBalancer(lb, [(0, HERE, 100, mine), (0, Locality("r2"), 0, foreign)], Random(7).random, 0.0)
    assert balancer.pick_avoiding(0.0, set(mine)) is mine[0]


@pytest.mark.parametrize("slow_start", [None, SlowStart(window_s=60.0)])
@pytest.mark.parametrize("weights", [1, 3])
def test_ten_thousand_endpoints_lose_one_quickly(weights: int, slow_start: SlowStart | None) -> None:
    """About 0.7 ms, 2 ms where weights differ, while the loop stands; the bound allows for a busy machine."""
    states = endpoints(10_000)
    for index, state in enumerate(states):
        state.weight = 1 + index % weights
    lb = LbPolicy(panic_threshold_percent=0.0, slow_start=slow_start)
    balancer = ClusterBalancer(lb, [(0, HERE, None, states)], Random(7).random, 0.0)
    best = float("inf")
    for state in states[:10]:
        state.is_ejected = True
        start = perf_counter()
        balancer.recompute(1.0)
        best = min(best, perf_counter() - start)
    assert best < 0.010
