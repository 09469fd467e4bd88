"""What every load-balancing policy sees and gives.

Decides nothing itself: it names the live view of an endpoint that policies read, and the contract they keep.
"""

from collections.abc import Sequence
from typing import Protocol

from meshproxy.model.endpoint import Endpoint


class EndpointState:
    """One endpoint as one worker sees it now. `upstream` extends it with the connection pool."""

    __slots__ = ("active_requests", "endpoint", "is_degraded", "is_ejected", "is_unhealthy", "joined_at", "weight")

    def __init__(self, endpoint: Endpoint, now: float) -> None:
        self.endpoint = endpoint
        self.weight = endpoint.weight
        self.active_requests = 0
        self.is_ejected = False
        """Outlier detection's verdict."""
        self.is_unhealthy = False
        """Active health check's verdict."""
        self.is_degraded = False
        self.joined_at = now
        """Monotonic seconds; start of slow start: when it joined or last became healthy."""

    @property
    def is_available(self) -> bool:
        return not (self.is_ejected or self.is_unhealthy)


class Policy(Protocol):
    """One load-balancing policy over the endpoints of one priority and locality, already filtered by health."""

    def pick(self, now: float) -> EndpointState | None:
        """None only where there are no endpoints."""
        ...

    def update(self, endpoints: Sequence[EndpointState], now: float) -> None:
        """The endpoints to choose from from now on; weights and membership may have changed."""
        ...
