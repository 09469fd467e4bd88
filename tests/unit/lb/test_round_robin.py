from random import Random

import pytest

from meshproxy.lb.round_robin import RoundRobin
from meshproxy.model.cluster import SlowStart
from tests.support.endpoint_states import endpoints, picked, share_percent


def test_each_endpoint_in_its_turn() -> None:
    states = endpoints(3)
    policy = RoundRobin(Random(1).random)
    policy.update(states, 0.0)
    order = [policy.pick(0.0) for _ in range(6)]
    assert order[:3] == order[3:]
    assert set(order) == set(states)


def test_workers_start_at_different_endpoints() -> None:
    states = endpoints(10)
    firsts = set()
    for seed in range(40):
        policy = RoundRobin(Random(seed).random)
        policy.update(states, 0.0)
        firsts.add(policy.pick(0.0))
    assert len(firsts) > 7


@pytest.mark.parametrize("leaves", [0, 1, 2, 3])
def test_the_next_in_turn_stays_the_next_when_someone_leaves(leaves: int) -> None:
    states = endpoints(4)
    policy = RoundRobin(lambda: 0.0)
    policy.update(states, 0.0)
    policy.pick(0.0)
    policy.update([state for index, state in enumerate(states) if index != leaves], 0.0)
    assert policy.pick(0.0) is states[2 if leaves == 1 else 1]


def test_weights_are_honoured() -> None:
    heavy, light = endpoints(1, weight=3), endpoints(1, host="10.0.1")
    policy = RoundRobin(Random(1).random)
    policy.update(heavy + light, 0.0)
    assert share_percent(picked(policy.pick, 10_000), heavy) == pytest.approx(75, abs=0.1)


def test_equal_again_after_weights_differed() -> None:
    states = endpoints(2)
    states[0].weight = 3
    policy = RoundRobin(Random(1).random)
    policy.update(states, 0.0)
    states[0].weight = 1
    policy.update(states, 0.0)
    assert share_percent(picked(policy.pick, 100), states[:1]) == 50


def test_a_weight_of_zero_counts_as_one() -> None:
    states = endpoints(2, weight=0)
    states[1].weight = 3
    policy = RoundRobin(Random(1).random)
    policy.update(states, 0.0)
    assert share_percent(picked(policy.pick, 10_000), states[:1]) == pytest.approx(25, abs=0.1)


def test_a_warming_endpoint_gets_its_grown_share() -> None:
    old, new = endpoints(1, now=-100.0), endpoints(1, host="10.0.1", now=0.0)
    policy = RoundRobin(Random(1).random, SlowStart(window_s=60.0))
    policy.update(old + new, 0.0)
    assert share_percent(picked(policy.pick, 10_000, now=30.0), new) == pytest.approx(100 * 0.5 / 1.5, abs=0.5)
    assert share_percent(picked(policy.pick, 10_000, now=60.0), new) == pytest.approx(50, abs=0.5)


def test_nobody() -> None:
    policy = RoundRobin(Random(1).random)
    assert policy.pick(0.0) is None
    policy.update(endpoints(2), 0.0)
    policy.update([], 0.0)
    assert policy.pick(0.0) is None
