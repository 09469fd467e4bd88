"""Circuit breaking: how much one cluster may have under way at once.

Decides: room or no room. Leaves to others: what a refusal looks like (503, flag UO), who waits for room.
Source: Envoy circuit_breaker.proto; Istio connectionPool. Limits are per worker process, as Envoy's are per process.
"""

from meshproxy.model.cluster import CircuitLimits


class Circuit:
    """Counts of one cluster. Each try_ that says True is paid back by one release_.

    The counts are public for /clusters; only the methods write them.
    """

    __slots__ = ("_limits", "connections", "pending", "requests", "retries")

    def __init__(self, limits: CircuitLimits) -> None:
        self._limits = limits
        self.connections = 0
        self.pending = 0
        """Requests that wait for a connection."""
        self.requests = 0
        self.retries = 0

    def update(self, limits: CircuitLimits) -> None:
        """Other limits; what is under way goes on, even where it is more than they allow."""
        self._limits = limits

    def try_connection(self) -> bool:
        if self.connections >= self._limits.max_connections:
            return False
        self.connections += 1
        return True

    def release_connection(self) -> None:
        self.connections -= 1

    def try_pending(self) -> bool:
        if self.pending >= self._limits.max_pending_requests:
            return False
        self.pending += 1
        return True

    def release_pending(self) -> None:
        self.pending -= 1

    def try_request(self) -> bool:
        if self.requests >= self._limits.max_requests:
            return False
        self.requests += 1
        return True

    def release_request(self) -> None:
        self.requests -= 1

    def try_retry(self) -> bool:
        if self.retries >= self.max_retries:
            return False
        self.retries += 1
        return True

    def release_retry(self) -> None:
        self.retries -= 1

    @property
    def max_retries(self) -> int:
        """Retries allowed at once: a budget, where there is one, stands in place of max_retries."""
        budget = self._limits.retry_budget
        if budget is None:
            return self._limits.max_retries
        return max(budget.min_concurrency, int((self.requests + self.pending) * budget.percent / 100))
