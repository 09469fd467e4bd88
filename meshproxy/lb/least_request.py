"""LEAST_REQUEST: the less busy of two at random; by weight over load where weights differ.

Source: Envoy least_request (choice_count 2, with replacement; EDF with weight / (active + 1) where weights differ);
Istio's default policy.
"""

from collections.abc import Callable, Sequence

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.edf import EdfScheduler
from meshproxy.lb.slow_start import ends_at, slow_start_factor
from meshproxy.model.cluster import SlowStart


class LeastRequest:
    __slots__ = ("_count", "_draw", "_endpoints", "_scheduler", "_slow_start", "_warm_at")

    def __init__(self, draw: Callable[[], float], slow_start: SlowStart | None = None) -> None:
        self._draw = draw
        self._slow_start = slow_start
        self._endpoints: list[EndpointState] = []
        self._count = 0
        self._scheduler: EdfScheduler[EndpointState] | None = None
        self._warm_at = 0.0

    def update(self, endpoints: Sequence[EndpointState], now: float) -> None:
        self._endpoints = list(endpoints)
        self._count = len(self._endpoints)
        slow = self._slow_start
        self._warm_at = max((ends_at(slow, e.joined_at) for e in endpoints), default=0.0) if slow else 0.0
        if len({endpoint.weight for endpoint in endpoints}) > 1 or self._warm_at > now:
            weighted = [(endpoint, self._weight(endpoint, now)) for endpoint in self._endpoints]
            self._scheduler = EdfScheduler(weighted, self._draw())
        else:
            self._scheduler = None

    def _weight(self, endpoint: EndpointState, now: float) -> float:
        weight = endpoint.weight / (endpoint.active_requests + 1)
        if self._slow_start is not None:
            weight *= slow_start_factor(self._slow_start, now - endpoint.joined_at)
        return weight

    def pick(self, now: float) -> EndpointState | None:
        if self._scheduler is not None:
            return self._pick_weighted(now)
        count = self._count
        if count < 2:
            return self._endpoints[0] if count else None
        draw = self._draw
        endpoints = self._endpoints
        one = endpoints[int(draw() * count)]
        other = endpoints[int(draw() * count)]
        return one if one.active_requests <= other.active_requests else other

    def _pick_weighted(self, now: float) -> EndpointState | None:
        scheduler = self._scheduler
        assert scheduler is not None
        endpoint = scheduler.peek()
        scheduler.advance(self._weight(endpoint, now))
        if self._slow_start is not None and now >= self._warm_at:
            self.update(self._endpoints, now)
        return endpoint
