"""Active checks: results in, verdicts by thresholds. Source: Envoy health_check.proto (semantics of thresholds)."""

from typing import Literal

from meshproxy.model.cluster import HealthCheck


class CheckState:
    """One endpoint's standing. Before the first result it counts as healthy, as an endpoint without checks does.

    Differs from Envoy, where an endpoint waits for its first success: here the checks start anew with the control
    process, and that must not empty the mesh.
    """

    __slots__ = ("_check", "_failures", "_has_succeeded", "_successes", "is_healthy")

    def __init__(self, check: HealthCheck) -> None:
        self._check = check
        self._failures = 0
        self._successes = 0
        self._has_succeeded = False
        self.is_healthy = True

    def on_check(self, is_success: bool) -> Literal["healthy", "unhealthy"] | None:
        """The new standing when it changes, else None. The first success ever is enough to be healthy."""
        if is_success:
            self._failures = 0
            self._successes += 1
            is_first, self._has_succeeded = not self._has_succeeded, True
            if not self.is_healthy and (is_first or self._successes >= self._check.healthy_threshold):
                self.is_healthy = True
                return "healthy"
        else:
            self._successes = 0
            self._failures += 1
            if self.is_healthy and self._failures >= self._check.unhealthy_threshold:
                self.is_healthy = False
                return "unhealthy"
        return None
