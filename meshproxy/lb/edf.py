"""Earliest deadline first: weighted choice in proportion, as evenly spread as can be.

Source: Envoy EdfScheduler; each choice costs O(log n).
"""

from heapq import heapify, heappush, heapreplace
from typing import Generic, TypeVar

T = TypeVar("T")


class EdfScheduler(Generic[T]):
    """Entries are chosen in proportion to the weight given when they were chosen last."""

    __slots__ = ("_entries", "_now", "_order")

    def __init__(self, weighted: list[tuple[T, float]], offset: float = 0.0) -> None:
        """offset in [0, 1): where in the cycle to begin, so that several schedulers do not move in step."""
        self._now = 0.0
        self._order = len(weighted)
        # Each first deadline is a share of its period: without that, all first choices would go by list order.
        self._entries: list[tuple[float, int, T]] = [
            ((1.0 + (index / len(weighted) + offset) % 1.0) / weight, index, entry)
            for index, (entry, weight) in enumerate(weighted)
            if weight > 0
        ]
        heapify(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self) -> T:
        """Who is next; IndexError when there is nobody."""
        return self._entries[0][2]

    def advance(self, weight: float) -> None:
        """The next one was taken; its weight from now on is `weight` (> 0)."""
        deadline, _, entry = self._entries[0]
        self._now = deadline
        self._order += 1
        heapreplace(self._entries, (deadline + 1.0 / weight, self._order, entry))

    def add(self, entry: T, weight: float) -> None:
        self._order += 1
        heappush(self._entries, (self._now + 1.0 / weight, self._order, entry))
