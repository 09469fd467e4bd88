from random import Random

import pytest

from meshproxy.lb.uniform import Uniform
from tests.support.endpoint_states import endpoints, picked, share_percent


def test_every_endpoint_has_the_same_chance_whatever_its_weight() -> None:
    states = endpoints(4)
    states[0].weight = 100
    policy = Uniform(Random(7).random)
    policy.update(states, 0.0)
    hits = picked(policy.pick, 20_000)
    assert all(share_percent(hits, [state]) == pytest.approx(25, abs=1) for state in states)


def test_nobody() -> None:
    assert Uniform(Random(7).random).pick(0.0) is None
