"""May this attempt be repeated, and after how long? Pure.

Source: Envoy router_filter.rst (x-envoy-retry-on, x-envoy-retry-grpc-on), jittered back-off; Istio HTTPRetry.
"""

from collections.abc import Sequence

from meshproxy.model.route import RetryPolicy

_GRPC_WORDS = {
    "cancelled": b"1",
    "deadline-exceeded": b"4",
    "resource-exhausted": b"8",
    "internal": b"13",
    "unavailable": b"14",
}
_RESET_WORDS = {
    "connect-failure": frozenset({"connect-failure", "gateway-error", "5xx", "reset", "reset-before-request"}),
    "reset-before-request": frozenset({"reset-before-request", "reset", "5xx", "gateway-error"}),
    "reset": frozenset({"reset", "5xx", "gateway-error"}),
    "refused": frozenset({"refused-stream", "reset", "5xx", "gateway-error"}),
    "per-try-timeout": frozenset({"5xx", "gateway-error"}),
}
"""What happened → the words that ask for a retry of it. A connection that failed answers as a 503 would."""


def retry_delay_s(attempt: int, base_s: float, cap_s: float, draw: float) -> float:
    """Seconds to wait before retry `attempt` (1 = first); full jitter, so 0 ≤ delay < cap_s.

    draw: uniform in [0, 1). Envoy's range is [0, (2^N − 1)·base), base 25 ms, cap 10·base.
    """
    ceiling: float = min(cap_s, base_s * (2**attempt - 1))
    return draw * ceiling


class CompiledRetry:
    __slots__ = ("_any_4xx", "_grpc", "_is_5xx", "_is_gateway", "_policy", "_statuses", "_words")

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        words = self._words = policy.on
        self._is_5xx = "5xx" in words
        self._is_gateway = "gateway-error" in words
        self._any_4xx = "retriable-4xx" in words
        # Numbers inside retryOn count by themselves; the word without numbers means an empty list (Istio today).
        self._statuses = policy.status_codes
        self._grpc = frozenset(code for word, code in _GRPC_WORDS.items() if word in words)

    def should_retry_status(self, status: int, headers: Sequence[tuple[bytes, bytes]] = ()) -> bool:
        """headers: the response's, names lower-case; grpc-status and x-envoy-ratelimited are looked at."""
        if any(name == b"x-envoy-ratelimited" for name, _ in headers):
            return "envoy-ratelimited" in self._words
        if status in self._statuses or (self._is_5xx and 500 <= status < 600):
            return True
        if self._is_gateway and status in (502, 503, 504):
            return True
        if self._any_4xx and status == 409:
            return True
        if self._grpc:
            return any(name == b"grpc-status" and value in self._grpc for name, value in headers)
        return False

    def should_retry_reset(self, kind: str) -> bool:
        """kind: connect-failure, reset-before-request (no byte of an answer came), reset, refused, per-try-timeout."""
        return not self._words.isdisjoint(_RESET_WORDS[kind])

    def delay_s(self, attempt: int, draw: float) -> float:
        return retry_delay_s(attempt, self._policy.base_interval_s, self._policy.max_interval_s, draw)
