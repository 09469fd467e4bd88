"""Earliest deadline first: weighted choice in proportion, as evenly spread as can be.

An entry of weight w is due every 1/w; who is due first is chosen, and is due again one period later.
Source: Envoy EdfScheduler. A choice costs O(log n).
"""

from collections.abc import Callable, Collection, Iterable
from heapq import heapify, heapreplace
from typing import Generic, TypeVar

T = TypeVar("T")


class EdfScheduler(Generic[T]):
    """Entries are chosen in proportion to the weight given when they were chosen last."""

    __slots__ = ("_entries", "_made")

    def __init__(self, weighted: Iterable[tuple[T, float]], phase: float = 0.0) -> None:
        """Weights > 0. phase in [0, 1): where in the cycle to begin, so that several schedulers do not move in step."""
        self._entries: list[tuple[float, int, T]] = []
        self._made = 0
        self._add(weighted, 0.0, phase)

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self) -> T:
        """Who is next; IndexError when there is nobody."""
        return self._entries[0][2]

    def advance(self, weight: float) -> None:
        """The next one was taken; its weight from now on is `weight` (> 0)."""
        entries = self._entries
        deadline, number, entry = entries[0]
        heapreplace(entries, (deadline + 1.0 / weight, number, entry))

    def replace(self, members: Collection[T], weight_of: Callable[[T], float], phase: float) -> None:
        """Choose among `members` from now on. Who was here before keeps its turn, and its weight until then."""
        wanted = set(members)
        entries = self._entries
        now = entries[0][0] if entries else 0.0
        kept = [entry for entry in entries if entry[2] in wanted]
        self._entries = kept
        if len(kept) < len(wanted):
            wanted.difference_update([entry for _, _, entry in kept])
            self._add([(entry, weight_of(entry)) for entry in members if entry in wanted], now, phase)
        else:
            heapify(kept)

    def _add(self, weighted: Iterable[tuple[T, float]], now: float, phase: float) -> None:
        # First deadlines are spread over one period, anywhere in it with equal chance. Were they all a whole period
        # away, the light entries would starve wherever health flaps faster than their turn comes.
        pairs = list(weighted)
        step = 1.0 / max(1, len(pairs))
        number = self._made
        self._entries += [
            (now + ((phase + index * step) % 1.0) / weight, number + index, entry)
            for index, (entry, weight) in enumerate(pairs)
        ]
        self._made = number + len(pairs)
        heapify(self._entries)
