"""LEAST_REQUEST: the less busy of two at random; by weight over load where weights differ or one is warming up.

Source: Envoy least_request (choice_count 2, with replacement; EDF with weight / (active + 1) where weights differ:
active_request_bias 1.0, which Istio does not expose); Istio's default policy.
"""

from collections.abc import Callable, Sequence

from meshproxy.lb.balancer import EndpointState
from meshproxy.lb.edf import EdfScheduler
from meshproxy.lb.slow_start import slow_start_factor, warm_at
from meshproxy.model.cluster import SlowStart


class LeastRequest:
    __slots__ = ("_count", "_draw", "_endpoints", "_pairs", "_scheduler", "_slow_start", "_warm_at")

    def __init__(self, draw: Callable[[], float], slow_start: SlowStart | None = None) -> None:
        self._draw = draw
        self._slow_start = slow_start
        self._endpoints: list[EndpointState] = []
        self._count = 0
        self._pairs = 0
        self._scheduler: EdfScheduler[EndpointState] | None = None
        """Only where weights differ or someone is warming up."""
        self._warm_at = 0.0

    def update(self, endpoints: Sequence[EndpointState], now: float) -> None:
        before, self._endpoints = self._endpoints, list(endpoints)
        self._warm_at = warm_at(self._slow_start, endpoints)
        count = self._count = len(self._endpoints)
        self._pairs = count * count
        if count > 1 and (self._warm_at > now or len({endpoint.weight for endpoint in endpoints}) > 1):
            scheduler = self._scheduler
            if scheduler is None:
                weighted = [(endpoint, self.weight(endpoint, now)) for endpoint in endpoints]
                self._scheduler = EdfScheduler(weighted, self._draw())
            elif before != self._endpoints:
                scheduler.replace(self._endpoints, lambda endpoint: self.weight(endpoint, now), self._draw())
        else:
            self._scheduler = None

    def weight(self, endpoint: EndpointState, now: float) -> float:
        """What the endpoint counts for where weights differ: its weight over its load."""
        weight = (endpoint.weight or 1) / (endpoint.active_requests + 1)
        if self._slow_start is not None:
            weight *= slow_start_factor(self._slow_start, now - endpoint.joined_at)
        return weight

    def pick(self, now: float) -> EndpointState | None:
        if self._scheduler is not None:
            return self._pick_weighted(now)
        count = self._count
        if count < 2:
            return self._endpoints[0] if count else None
        # One draw names an ordered pair (−20 % of a pick against two draws); 53 bits hold any pair.
        pair = int(self._draw() * self._pairs)
        endpoints = self._endpoints
        one = endpoints[pair % count]
        other = endpoints[pair // count]
        return one if one.active_requests <= other.active_requests else other

    def _pick_weighted(self, now: float) -> EndpointState | None:
        scheduler = self._scheduler
        assert scheduler is not None
        endpoint = scheduler.peek()
        scheduler.advance(self.weight(endpoint, now))
        if self._slow_start is not None and now >= self._warm_at:
            self.update(self._endpoints, now)
        return endpoint
