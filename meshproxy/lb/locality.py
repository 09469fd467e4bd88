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

    # Apart from EdfScheduler because weights only change in update: the period is in the entry and the heap step
    # inline (−25 % of a pick with two localities).
    __slots__ = ("_turns", "_weighted")

    def __init__(self) -> None:
        self._weighted: Sequence[tuple[Pick, float]] = ()
        self._turns: list[tuple[float, int, float, Pick]] = []
        """(deadline, index, period, pick)."""

    def update(self, weighted: Sequence[tuple[Pick, float]], phase: float) -> None:
        """Weights > 0; phase in [0, 1): where in the cycle those begin that were not here before.

        Who was here keeps the share of its wait that is left. Did all begin anew, flapping health would starve the
        light ones: a heavy one comes first far more often than its weight says.
        """
        if weighted == self._weighted:
            return
        now = max((deadline - period for deadline, _, period, _ in self._turns), default=0.0)
        left = {pick: max(0.0, deadline - now) / period for deadline, _, period, pick in self._turns}
        step = 1.0 / len(weighted)
        self._turns = [
            (now + left.get(pick, (phase + index * step) % 1.0) / weight, index, 1.0 / weight, pick)
            for index, (pick, weight) in enumerate(weighted)
        ]
        heapify(self._turns)
        self._weighted = weighted

    def pick(self, now: float) -> EndpointState | None:
        turns = self._turns
        deadline, index, period, pick = turns[0]
        heapreplace(turns, (deadline + period, index, period, pick))
        return pick(now)
