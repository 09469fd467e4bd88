"""Active checks: results in, verdicts by thresholds. Source: Envoy health_check.proto (semantics of thresholds)."""

from meshproxy.model.cluster import HealthCheck


class CheckState:
    """One endpoint's standing. Before the first result it counts as healthy, as an endpoint without checks does."""

    __slots__ = ("_check", "_failures", "_successes", "is_healthy", "is_known")

    def __init__(self, check: HealthCheck) -> None:
        self._check = check
        self._failures = 0
        self._successes = 0
        self.is_healthy = True
        self.is_known = False

    def on_check(self, is_success: bool) -> str | None:
        """`healthy` or `unhealthy` when the standing changes, else None. The first success is enough to be healthy."""
        first, self.is_known = not self.is_known, True
        if is_success:
            self._failures = 0
            self._successes += 1
            if not self.is_healthy and (first or self._successes >= self._check.healthy_threshold):
                self.is_healthy = True
                return "healthy"
        else:
            self._successes = 0
            self._failures += 1
            if self.is_healthy and self._failures >= self._check.unhealthy_threshold:
                self.is_healthy = False
                return "unhealthy"
        return None
