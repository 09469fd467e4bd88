import pytest

from bench.offered import Call, dues
from bench.overload import recovered_after_s

_END_S = 63.0
_USUAL_S = 0.03


def calls(*, failing_until_s: float = 0.0, slow_until_s: float = 0.0) -> list[Call]:
    """A hundred a second for ten seconds after the overload, and some from before that do not count."""
    return [Call(_END_S - 1.0, 9.0, 503, True)] + [
        Call(
            _END_S + at,
            5 * _USUAL_S if at < slow_until_s else _USUAL_S / 2,
            503 if at < failing_until_s else 200,
            at < failing_until_s,
        )
        for at in (number / 100 for number in range(1000))
    ]


def test_what_is_normal_at_once_needed_no_time() -> None:
    assert recovered_after_s(calls(), _END_S, _USUAL_S) == 0.0


@pytest.mark.parametrize("late", [calls(failing_until_s=2.1), calls(slow_until_s=2.1)])
def test_recovery_lasts_as_long_as_anything_fails_or_is_slow(late: list[Call]) -> None:
    assert recovered_after_s(late, _END_S, _USUAL_S) == pytest.approx(2.25)


def test_one_slow_call_among_many_is_normal() -> None:
    late = [*calls(), Call(_END_S + 4.0, 1.0, 200, False)]
    assert recovered_after_s(late, _END_S, _USUAL_S) == 0.0


def test_one_failure_is_not() -> None:
    late = [*calls(), Call(_END_S + 4.1, 0.001, 503, True)]
    assert recovered_after_s(late, _END_S, _USUAL_S) == pytest.approx(4.25)


def test_phases_follow_each_other_without_a_gap() -> None:
    assert dues([(2.0, 1.0), (4.0, 0.5)]) == [0.0, 0.5, 1.0, 1.25]
