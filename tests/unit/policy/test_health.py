import pytest

from meshproxy.model.cluster import HealthCheck
from meshproxy.policy.health import CheckState


def words(results: str, healthy: int = 2, unhealthy: int = 3) -> str:
    """`+` success, `-` failure → per result: h (now healthy), u (now unhealthy), `.` (no change)."""
    check = CheckState(HealthCheck(kind="http", healthy_threshold=healthy, unhealthy_threshold=unhealthy))
    said = {None: ".", "healthy": "h", "unhealthy": "u"}
    return "".join(said[check.on_check(result == "+")] for result in results)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ("+++", "..."),
        ("--", ".."),
        ("---", "..u"),
        ("--+--+", "......"),
        ("-----", "..u.."),
        ("---+", "..uh"),
        ("+---+", "...u."),
        ("+---++", "...u.h"),
        ("+---+-++", "...u...h"),
        ("+---++---", "...u.h..u"),
    ],
)
def test_thresholds(results: str, expected: str) -> None:
    """The first success ever makes healthy at once; later ones must come in a row."""
    assert words(results) == expected


def test_thresholds_of_one_follow_every_change() -> None:
    assert words("+-+-", healthy=1, unhealthy=1) == ".uhu"


def test_an_endpoint_counts_as_healthy_until_a_check_says_otherwise() -> None:
    assert CheckState(HealthCheck(kind="tcp")).is_healthy
