"""What every load-balancing policy keeps to; a new one joins by its line in lb.catalog."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.catalog import POLICIES, make_policy
from meshproxy.lb.cluster_balancer import ClusterBalancer, Group
from meshproxy.lb.priority import Share, priority_loads
from meshproxy.model.cluster import LbKind, LbPolicy, SlowStart
from meshproxy.model.endpoint import Locality
from tests.support.endpoint_states import endpoints, picked, share_percent

KINDS = st.sampled_from(list(LbKind))
LB = st.builds(
    LbPolicy,
    kind=KINDS,
    slow_start=st.sampled_from([None, SlowStart(window_s=30.0), SlowStart(window_s=5.0, aggression=2.0)]),
    is_locality_weighted=st.booleans(),
    panic_threshold_percent=st.sampled_from([0.0, 30.0, 50.0, 100.0]),
)
ZONES = [Locality("r", f"z{index}") for index in range(3)]
SHARES = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300)).map(
        lambda parts: Share(sum(parts), parts[0], parts[1])
    ),
    min_size=1,
    max_size=5,
)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    found: list[Group] = []
    for number in range(draw(st.integers(0, 5))):
        states = endpoints(draw(st.integers(0, 6)), host=f"10.{number}.0")
        for state in states:
            state.weight = draw(st.integers(0, 4))
            state.joined_at = draw(st.floats(0, 20))
            health = draw(st.sampled_from(["well", "well", "ejected", "unhealthy", "degraded"]))
            state.is_ejected = health == "ejected"
            state.is_unhealthy = health == "unhealthy"
            state.is_degraded = health == "degraded"
        found.append((draw(st.integers(0, 2)), draw(st.sampled_from(ZONES)), draw(st.integers(0, 5)), states))
    return found


def test_every_kind_has_a_policy() -> None:
    assert POLICIES.keys() == set(LbKind)


@given(kind=KINDS, count=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_policy_serves_everyone_it_was_given_and_nobody_else(kind: LbKind, count: int, seed: int) -> None:
    policy = make_policy(LbPolicy(kind=kind), Random(seed).random)
    states = endpoints(count)
    policy.update(states, 0.0)
    assert {policy.pick(0.0) for _ in range(60 * count)} == set(states)
    policy.update(states[: count // 2], 0.0)
    left: set[EndpointState | None] = {*states[: count // 2]}
    assert {policy.pick(0.0) for _ in range(60 * count)} == (left or {None})


@given(kind=KINDS)
def test_where_there_is_nobody_nobody_is_picked(kind: LbKind) -> None:
    policy = make_policy(LbPolicy(kind=kind), Random(1).random)
    assert policy.pick(0.0) is None
    for states in (endpoints(2), [], endpoints(1), []):
        policy.update(states, 0.0)
        assert (policy.pick(0.0) is None) == (not states)


@settings(max_examples=60)
@given(
    kind=st.sampled_from([LbKind.ROUND_ROBIN, LbKind.LEAST_REQUEST]),
    weights=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
)
def test_idle_endpoints_share_by_weight(kind: LbKind, weights: list[int], seed: int) -> None:
    """Within two points, through the real balancer; a weight of 0, which Envoy does not know, counts as 1."""
    states = endpoints(len(weights))
    for state, weight in zip(states, weights, strict=True):
        state.weight = weight
    balancer = ClusterBalancer(LbPolicy(kind=kind), [(0, ZONES[0], None, states)], Random(seed).random, 0.0)
    hits = picked(balancer.pick, 10_000)
    total = sum(weight or 1 for weight in weights)
    for state, weight in zip(states, weights, strict=True):
        assert abs(share_percent(hits, [state]) - 100 * (weight or 1) / total) <= 2


@settings(max_examples=60)
@given(
    first=st.lists(st.integers(0, 20), min_size=2, max_size=6),
    second=st.lists(st.integers(0, 20), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
)
def test_weights_hold_after_an_update_too(first: list[int], second: list[int], seed: int) -> None:
    """Who stays keeps its turn; that must not outlast the old weights by more than one turn."""
    states = endpoints(6)
    policy = make_policy(LbPolicy(kind=LbKind.ROUND_ROBIN), Random(seed).random)
    for weights in (first, second):
        for state, weight in zip(states, weights, strict=False):
            state.weight = weight
        policy.update(states[: len(weights)], 0.0)
        hits = picked(policy.pick, 10_000)
        total = sum(weight or 1 for weight in weights)
        for state, weight in zip(states, weights, strict=False):
            assert abs(share_percent(hits, [state]) - 100 * (weight or 1) / total) <= 2


@settings(max_examples=300)
@given(lb=LB, first=groups(), second=groups(), seed=st.integers(0, 1000), data=st.data())
def test_the_unavailable_are_picked_in_panic_only(
    lb: LbPolicy, first: list[Group], second: list[Group], seed: int, data: st.DataObject
) -> None:
    """Over updates and health changes; and where someone is available, someone is picked."""
    balancer = ClusterBalancer(lb, first, Random(seed).random, 20.0)
    steps: list[list[Group]] = [first, second, second, [*first, *second]]
    for now, current in enumerate(steps, start=21):
        known = [state for group in current for state in group[3]]
        does_flip = data.draw(st.booleans())
        if known and does_flip:
            flipped: EndpointState = data.draw(st.sampled_from(known))
            flipped.is_ejected = not flipped.is_ejected
        balancer.update(lb, current, float(now))
        panics = dict(zip(sorted({group[0] for group in current}), balancer.loads.panics, strict=True))
        allowed: set[EndpointState | None] = {
            state for group in current for state in group[3] if state.is_available or panics[group[0]]
        }
        hits = {balancer.pick(float(now)) for _ in range(50)}
        assert hits <= (allowed or {None})


@given(shares=SHARES, threshold=st.sampled_from([0.0, 20.0, 50.0, 100.0]))
def test_loads_add_up_to_a_hundred_and_nobody_gets_a_negative_share(shares: list[Share], threshold: float) -> None:
    loads = priority_loads(shares, threshold)
    assert sum(loads.healthy) + sum(loads.degraded) == 100
    assert min(loads.healthy) >= 0 and min(loads.degraded) >= 0
    assert all(not load or share.total for load, share in zip(loads.degraded, shares, strict=True))


@given(shares=SHARES, data=st.data())
def test_a_healthier_first_priority_never_gets_less(shares: list[Share], data: st.DataObject) -> None:
    first = shares[0]
    lost = first.total - first.healthy - first.degraded
    better = Share(first.total, first.healthy + data.draw(st.integers(0, lost)), first.degraded)
    before = priority_loads(shares, 0.0)
    after = priority_loads([better, *shares[1:]], 0.0)
    # Truncation may move a point for each share.
    assert after.healthy[0] >= before.healthy[0] - 2 * len(shares)
