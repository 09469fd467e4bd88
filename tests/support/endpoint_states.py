"""Endpoints as a balancer sees them, made in a line."""

from collections import Counter
from collections.abc import Callable, Sequence

from meshproxy.lb.balancer import EndpointState
from meshproxy.model.endpoint import Endpoint


def endpoints(count: int, weight: int = 1, host: str = "10.0.0", now: float = 0.0) -> list[EndpointState]:
    """All available, none busy."""
    return [EndpointState(Endpoint(address=f"{host}.{i}", port=80, weight=weight), now) for i in range(count)]


def with_health(healthy: int, total: int, degraded: int = 0, host: str = "10.0.0") -> list[EndpointState]:
    """The first `healthy` are well, the next `degraded` degraded, the rest ejected or unhealthy in turn."""
    states = endpoints(total, host=host)
    for index, state in enumerate(states[healthy:]):
        if index < degraded:
            state.is_degraded = True
        elif index % 2:
            state.is_unhealthy = True
        else:
            state.is_ejected = True
    return states


def picked(
    pick: Callable[[float], EndpointState | None], count: int, now: float = 0.0
) -> Counter[EndpointState | None]:
    return Counter(pick(now) for _ in range(count))


def share_percent(hits: Counter[EndpointState | None], states: Sequence[EndpointState]) -> float:
    return 100.0 * sum(hits[state] for state in states) / hits.total()
