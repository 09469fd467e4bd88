from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.lb.edf import EdfScheduler


def take(scheduler: EdfScheduler[str], weights: dict[str, float], count: int) -> Counter[str]:
    taken: Counter[str] = Counter()
    for _ in range(count):
        entry = scheduler.peek()
        scheduler.advance(weights[entry])
        taken[entry] += 1
    return taken


@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    phase=st.floats(0, 1, exclude_max=True),
    cycles=st.integers(1, 5),
)
def test_after_whole_cycles_each_entry_was_chosen_by_its_weight(weights: list[int], phase: float, cycles: int) -> None:
    named = {str(index): float(weight) for index, weight in enumerate(weights)}
    taken = take(EdfScheduler(named.items(), phase), named, cycles * sum(weights))
    for name, weight in named.items():
        assert abs(taken[name] - cycles * weight) <= 1


def test_choices_are_spread_evenly() -> None:
    named = {"a": 3.0, "b": 1.0}
    scheduler = EdfScheduler(named.items())
    order = ""
    for _ in range(40):
        entry = scheduler.peek()
        scheduler.advance(named[entry])
        order += entry
    assert "aaaa" not in order and "bb" not in order


def test_a_new_weight_counts_from_the_next_turn() -> None:
    weights = {"a": 1.0, "b": 1.0}
    scheduler = EdfScheduler(weights.items())
    weights["a"] = 3.0
    assert take(scheduler, weights, 400)["a"] == pytest.approx(300, abs=2)


def test_who_stays_keeps_its_turn() -> None:
    weights = dict.fromkeys("abcd", 1.0)
    scheduler = EdfScheduler(weights.items())
    take(scheduler, weights, 2)
    scheduler.replace(["a", "c", "d"], lambda _: 1.0, 0.5)
    assert [next(iter(take(scheduler, weights, 1))) for _ in range(3)] == ["c", "d", "a"]


def test_who_comes_takes_part_at_once_and_is_not_favoured() -> None:
    weights = dict.fromkeys("abc", 1.0)
    scheduler = EdfScheduler([("a", 1.0), ("b", 1.0)])
    take(scheduler, weights, 1001)
    scheduler.replace(["a", "b", "c"], lambda _: 1.0, 0.3)
    assert take(scheduler, weights, 3) == Counter("abc")


def test_nobody_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        EdfScheduler[str]([]).peek()
