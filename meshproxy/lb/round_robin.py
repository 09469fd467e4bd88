"""ROUND_ROBIN: each endpoint in its turn; by weight where weights differ or one is warming up.

Source: Envoy round robin (EDF where weights differ). A random start keeps the workers from moving in step.
"""

from collections.abc import Callable, Sequence

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.edf import EdfScheduler
from meshproxy.lb.slow_start import slow_start_factor, warm_at
from meshproxy.model.cluster import SlowStart


class RoundRobin:
    __slots__ = ("_at", "_draw", "_endpoints", "_scheduler", "_slow_start", "_warm_at")

    def __init__(self, draw: Callable[[], float], slow_start: SlowStart | None = None) -> None:
        self._draw = draw
        self._slow_start = slow_start
        self._endpoints: list[EndpointState] = []
        self._at = 0
        """Index of the next one."""
        self._scheduler: EdfScheduler[EndpointState] | None = None
        """Only where weights differ or someone is warming up."""
        self._warm_at = 0.0

    def update(self, endpoints: Sequence[EndpointState], now: float) -> None:
        before, self._endpoints = self._endpoints, list(endpoints)
        self._warm_at = warm_at(self._slow_start, endpoints)
        count = len(self._endpoints)
        if count > 1 and (self._warm_at > now or len({endpoint.weight for endpoint in endpoints}) > 1):
            scheduler = self._scheduler
            if scheduler is None:
                weighted = [(endpoint, self._weight(endpoint, now)) for endpoint in endpoints]
                self._scheduler = EdfScheduler(weighted, self._draw())
            elif before != self._endpoints:
                scheduler.replace(self._endpoints, lambda endpoint: self._weight(endpoint, now), self._draw())
            return
        if self._scheduler is not None or not before:
            self._scheduler = None
            self._at = int(self._draw() * count)
        elif count and before != self._endpoints:
            # Stay where we were if the next in turn is still there: an update must not favour the first of the list.
            following = before[self._at % len(before)]
            self._at = self._endpoints.index(following) if following in self._endpoints else self._at % count

    def _weight(self, endpoint: EndpointState, now: float) -> float:
        weight = endpoint.weight or 1
        if self._slow_start is None:
            return weight
        return weight * slow_start_factor(self._slow_start, now - endpoint.joined_at)

    def pick(self, now: float) -> EndpointState | None:
        scheduler = self._scheduler
        if scheduler is not None:
            endpoint = scheduler.peek()
            scheduler.advance(self._weight(endpoint, now))
            if self._slow_start is not None and now >= self._warm_at:
                self.update(self._endpoints, now)
            return endpoint
        endpoints = self._endpoints
        at = self._at
        if at >= len(endpoints):
            if not endpoints:
                return None
            at = 0
        self._at = at + 1
        return endpoints[at]
