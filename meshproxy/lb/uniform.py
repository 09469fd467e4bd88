"""RANDOM: uniform choice; by weight where weights differ. Source: Istio simple RANDOM, Envoy random."""

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate

from meshproxy.lb.balancer import EndpointState
from meshproxy.model.cluster import SlowStart


class Uniform:
    __slots__ = ("_bounds", "_count", "_draw", "_endpoints", "_total")

    def __init__(self, draw: Callable[[], float], slow_start: SlowStart | None = None) -> None:
        """slow_start: not for this policy (Envoy has it for round robin and least request only)."""
        self._draw = draw
        self._endpoints: list[EndpointState] = []
        self._count = 0
        self._bounds: list[int] | None = None
        self._total = 0

    def update(self, endpoints: Sequence[EndpointState], now: float) -> None:
        self._endpoints = list(endpoints)
        self._count = len(self._endpoints)
        weights = [endpoint.weight for endpoint in endpoints]
        self._bounds = None if len(set(weights)) <= 1 else list(accumulate(weights))
        self._total = sum(weights)

    def pick(self, now: float) -> EndpointState | None:
        if self._bounds is not None:
            return self._endpoints[bisect(self._bounds, self._draw() * self._total)]
        return self._endpoints[int(self._draw() * self._count)] if self._count else None
