import pytest

from meshproxy.lb.slow_start import slow_start_factor, warm_at
from meshproxy.model.cluster import SlowStart
from tests.support.endpoint_states import endpoints


@pytest.mark.parametrize(
    ("age_s", "aggression", "factor"),
    [
        (0, 1.0, 0.10),
        (1, 1.0, 0.10),
        (6, 1.0, 0.10),
        (15, 1.0, 0.25),
        (30, 1.0, 0.50),
        (45, 1.0, 0.75),
        (60, 1.0, 1.0),
        (1000, 1.0, 1.0),
        (15, 2.0, 0.5),
        (30, 2.0, 0.7071),
    ],
)
def test_weight_grows_over_a_window_of_sixty_seconds(age_s: float, aggression: float, factor: float) -> None:
    policy = SlowStart(window_s=60.0, min_weight_percent=10.0, aggression=aggression)
    assert slow_start_factor(policy, age_s) == pytest.approx(factor, abs=1e-4)


@pytest.mark.parametrize("age_s", [0.0, 0.5, 1e-9])
def test_never_nothing_even_without_a_minimum(age_s: float) -> None:
    assert slow_start_factor(SlowStart(window_s=1e9, min_weight_percent=0.0, aggression=0.1), age_s) > 0


def test_all_are_warm_when_the_youngest_is() -> None:
    states = endpoints(3, now=5.0)
    states[1].joined_at = 20.0
    assert warm_at(SlowStart(window_s=60.0), states) == 80.0
    assert warm_at(None, states) == 0.0
    assert warm_at(SlowStart(window_s=60.0), []) == 0.0
