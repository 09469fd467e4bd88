"""Slow start: a new endpoint's weight grows over a window. Source: Envoy slow_start.rst; Istio warmup."""

from collections.abc import Sequence

from meshproxy.lb.balancer import EndpointState
from meshproxy.model.cluster import SlowStart


def slow_start_factor(policy: SlowStart, age_s: float) -> float:
    """What to multiply an endpoint's weight with, in (0, 1]. age_s: seconds since it joined or became healthy.

    max(min_weight, (max(age, 1) / window) ^ (1 / aggression)).
    """
    if age_s >= policy.window_s:
        return 1.0
    grown: float = (max(age_s, 1.0) / policy.window_s) ** (1.0 / policy.aggression)
    return min(1.0, max(policy.min_weight_percent / 100.0, grown, 1e-9))


def warm_at(policy: SlowStart | None, endpoints: Sequence[EndpointState]) -> float:
    """Monotonic seconds at which all of them have their full weight; 0.0 without slow start."""
    if policy is None or not endpoints:
        return 0.0
    return max([endpoint.joined_at for endpoint in endpoints]) + policy.window_s
