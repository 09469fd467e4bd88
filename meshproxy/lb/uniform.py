"""RANDOM: any endpoint with the same chance, whatever its weight. Source: Istio simple RANDOM, Envoy random_lb.cc."""

from collections.abc import Callable, Sequence

from meshproxy.lb.balancer import EndpointState
from meshproxy.model.cluster import SlowStart


class Uniform:
    __slots__ = ("_count", "_draw", "_endpoints")

    def __init__(self, draw: Callable[[], float], slow_start: SlowStart | None = None) -> None:
        """slow_start: not for this policy (Envoy has it for round robin and least request only)."""
        self._draw = draw
        self._endpoints: list[EndpointState] = []
        self._count = 0

    def update(self, endpoints: Sequence[EndpointState], now: float) -> None:
        self._endpoints = list(endpoints)
        self._count = len(self._endpoints)

    def pick(self, now: float) -> EndpointState | None:
        return self._endpoints[int(self._draw() * self._count)] if self._count else None
