"""ROUND_ROBIN: each endpoint in its turn; by weight where weights differ or one is warming up.

Source: Envoy round robin (EDF where weights differ). A random start keeps the workers from moving in step.
"""

from collections.abc import Callable, Sequence

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.edf import EdfScheduler
from meshproxy.lb.slow_start import ends_at, slow_start_factor
from meshproxy.model.cluster import SlowStart


class RoundRobin:
    __slots__ = ("_at", "_draw", "_endpoints", "_scheduler", "_slow_start", "_warm_at")

    def __init__(self, draw: Callable[[], float], slow_start: SlowStart | None = None) -> None:
        self._draw = draw
        self._slow_start = slow_start
        self._endpoints: list[EndpointState] = []
        self._at = -1
        self._scheduler: EdfScheduler[EndpointState] | None = None
        self._warm_at = 0.0

    def update(self, endpoints: Sequence[EndpointState], now: float) -> None:
        before = self._endpoints
        self._endpoints = list(endpoints)
        count = len(self._endpoints)
        slow = self._slow_start
        self._warm_at = max((ends_at(slow, e.joined_at) for e in endpoints), default=0.0) if slow else 0.0
        if len({endpoint.weight for endpoint in endpoints}) > 1 or self._warm_at > now:
            weighted = [(endpoint, self._weight(endpoint, now)) for endpoint in self._endpoints]
            self._scheduler = EdfScheduler(weighted, self._draw())
            return
        self._scheduler = None
        # Stay where we were if the next in turn is still there: an update must not favour the first of the list.
        if self._at < 0 or not before:
            self._at = int(self._draw() * count)
        elif before != self._endpoints and count:
            following = before[self._at % len(before)]
            self._at = self._endpoints.index(following) if following in self._endpoints else self._at % count

    def _weight(self, endpoint: EndpointState, now: float) -> float:
        if self._slow_start is None:
            return float(endpoint.weight)
        return endpoint.weight * slow_start_factor(self._slow_start, now - endpoint.joined_at)

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
