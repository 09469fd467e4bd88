"""How much of a priority's traffic each of its localities takes, and whose turn it is.

Source: Envoy locality_weight.rst, HostSetImpl::effectiveLocalityWeight (floating point, unlike priorities).
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heapreplace

from meshproxy.lb.balancer import EndpointState

Pick = Callable[[float], EndpointState | None]


def effective_weight(weight: int, available: int, total: int, overprovisioning_percent: int = 140) -> float:
    """The locality's weight, less what its missing endpoints cannot carry; 0.0 when it takes nothing."""
    if not total or not available:
        return 0.0
    return weight * min(1.0, overprovisioning_percent / 100 * available / total)


class LocalityChoice:
    """Localities by weight, earliest deadline first as in lb.edf; each pick goes on to the locality's own policy."""

    __slots__ = ("_turns", "weighted")

    def __init__(self, weighted: Sequence[tuple[Pick, float]], phase: float) -> None:
        """Weights > 0; phase in [0, 1): where in the cycle to begin."""
        self.weighted = weighted
        # Kept apart from EdfScheduler because weights are fixed here: the period is in the entry, the heap step inline
        # (−25 % of a pick with two localities).
        self._turns = [
            (((phase + index / len(weighted)) % 1.0) / weight, index, 1.0 / weight, pick)
            for index, (pick, weight) in enumerate(weighted)
        ]
        heapify(self._turns)

    def pick(self, now: float) -> EndpointState | None:
        turns = self._turns
        deadline, index, period, pick = turns[0]
        heapreplace(turns, (deadline + period, index, period, pick))
        return pick(now)
