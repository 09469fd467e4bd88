from random import Random

import pytest

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.least_request import LeastRequest
from meshproxy.model.cluster import SlowStart
from tests.support.endpoint_states import endpoints, picked, share_percent

PICKS = 20_000


def least_request(states: list[EndpointState], slow_start: SlowStart | None = None) -> LeastRequest:
    policy = LeastRequest(Random(7).random, slow_start)
    policy.update(states, 0.0)
    return policy


def test_the_busier_of_two_gets_a_quarter() -> None:
    """Both draws meet the busier one a quarter of the time."""
    states = endpoints(2)
    states[0].active_requests = 1
    assert share_percent(picked(least_request(states).pick, PICKS), states[:1]) == pytest.approx(25, abs=1)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_idle_endpoints_share_equally(count: int) -> None:
    states = endpoints(count)
    hits = picked(least_request(states).pick, 400 * count)
    assert all(400 * 0.75 < hits[state] < 400 * 1.25 for state in states)


def test_a_slow_endpoint_gets_markedly_fewer() -> None:
    """Three endpoints, a request every tick; two answer after 2 ticks, one after 20."""
    states = endpoints(3)
    policy = least_request(states)
    done: list[tuple[int, EndpointState]] = []
    hits = dict.fromkeys(states, 0)
    for tick in range(PICKS):
        for when, state in [item for item in done if item[0] <= tick]:
            done.remove((when, state))
            state.active_requests -= 1
        chosen = policy.pick(0.0)
        assert chosen is not None
        chosen.active_requests += 1
        hits[chosen] += 1
        done.append((tick + (20 if chosen is states[0] else 2), chosen))
    assert hits[states[0]] / PICKS < 0.20


def test_weight_over_load() -> None:
    """Weight 2 and four requests under way count for 0.4."""
    (state,) = endpoints(1, weight=2)
    state.active_requests = 4
    assert least_request([state]).weight(state, 0.0) == pytest.approx(0.4)


def test_where_weights_differ_idle_endpoints_share_by_weight() -> None:
    heavy, light = endpoints(1, weight=3), endpoints(1, host="10.0.1")
    hits = picked(least_request(heavy + light).pick, PICKS)
    assert share_percent(hits, heavy) == pytest.approx(75, abs=0.1)


def test_where_weights_differ_load_takes_from_the_share() -> None:
    heavy, light = endpoints(1, weight=3), endpoints(1, host="10.0.1")
    heavy[0].active_requests = 5
    hits = picked(least_request(heavy + light).pick, PICKS)
    assert share_percent(hits, heavy) == pytest.approx(100 * 0.5 / 1.5, abs=0.1)


def test_a_warming_endpoint_gets_its_grown_share_and_p2c_follows() -> None:
    old, new = endpoints(1, now=-100.0), endpoints(1, host="10.0.1", now=0.0)
    policy = least_request(old + new, SlowStart(window_s=60.0))
    assert share_percent(picked(policy.pick, PICKS, now=15.0), new) == pytest.approx(20, abs=0.5)
    policy.pick(60.0)
    old[0].active_requests = 1
    assert share_percent(picked(policy.pick, PICKS, now=61.0), old) == pytest.approx(25, abs=1)


def test_nobody() -> None:
    assert least_request([]).pick(0.0) is None


@pytest.mark.parametrize("count", [2, 3, 7, 10_000])
def test_the_largest_draw_is_still_an_endpoint(count: int) -> None:
    policy = LeastRequest(lambda: 1.0 - 2**-53)
    policy.update(endpoints(count), 0.0)
    assert policy.pick(0.0) is not None
