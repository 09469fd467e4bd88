import pytest

from bench.soak import Reading, last_two_thirds, slope_per_hour


def test_slope_of_a_steady_growth_is_that_growth() -> None:
    points = [(float(at), 40 + 0.5 * at / 3600) for at in range(0, 1800, 10)]
    assert slope_per_hour(points) == pytest.approx(0.5)


def test_slope_weighs_all_points_and_not_only_the_ends() -> None:
    # The last point is a spike; first to last would say 36 per hour.
    points = [(float(at), 40.0) for at in range(0, 1000, 10)] + [(1000.0, 50.0)]
    assert 0 < slope_per_hour(points) < 3


@pytest.mark.parametrize("points", [[], [(10.0, 40.0)], [(10.0, 40.0), (10.0, 41.0)]])
def test_slope_needs_two_moments(points: list[tuple[float, float]]) -> None:
    assert slope_per_hour(points) == 0.0


def test_the_first_third_is_for_warming_up() -> None:
    readings = [Reading(at_s=float(at), pss_mib={}, descriptors={}, connections=0) for at in (10, 20, 30, 40, 50, 60)]
    assert [reading.at_s for reading in last_two_thirds(readings, 60.0)] == [20, 30, 40, 50, 60]
