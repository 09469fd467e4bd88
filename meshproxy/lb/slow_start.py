"""Slow start: a new endpoint's weight grows over a window. Source: Envoy slow_start.rst; Istio warmup."""

from meshproxy.model.cluster import SlowStart


def slow_start_factor(policy: SlowStart, age_s: float) -> float:
    """What to multiply an endpoint's weight with, in (0, 1]. age_s: seconds since it joined or became healthy.

    max(min_weight, (max(age, 1) / window) ^ (1 / aggression)).
    """
    if age_s >= policy.window_s:
        return 1.0
    grown: float = (max(age_s, 1.0) / policy.window_s) ** (1.0 / policy.aggression)
    return min(1.0, max(policy.min_weight_percent / 100.0, grown))


def ends_at(policy: SlowStart, joined_at: float) -> float:
    """Monotonic seconds at which the endpoint has its full weight."""
    return joined_at + policy.window_s
