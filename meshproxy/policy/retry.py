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
_AS_5XX = frozenset({"reset", "5xx", "gateway-error"})
"""Whatever leaves a request without an answer would become a 503 or 504."""
_RESET_WORDS = {
    "connect-failure": _AS_5XX | {"connect-failure", "reset-before-request"},
    "reset-before-request": _AS_5XX | {"reset-before-request"},
    "reset": _AS_5XX,
    "refused": _AS_5XX | {"refused-stream"},
    "per-try-timeout": _AS_5XX,
}
"""What happened → the words that ask for a retry of it."""

# Understood and without effect here: retriable-headers (Istio has no field for the headers) and
# http3-post-connect-failure (no HTTP/3 upstream).


def retry_delay_s(attempt: int, base_s: float, cap_s: float, draw: float) -> float:
    """Seconds to wait before retry `attempt` (1 = first); full jitter, so 0 ≤ delay < cap_s.

    draw: uniform in [0, 1). Envoy's range is [0, (2^N − 1)·base), base 25 ms, cap 10·base.
    """
    ceiling: float = min(cap_s, base_s * (2 ** min(attempt, 64) - 1))
    return draw * ceiling


class CompiledRetry:
    """A RetryPolicy made ready for the hot path: an answer that asks for no retry costs one set lookup."""

    __slots__ = ("_grpc", "_policy", "_retries_rate_limited", "_statuses", "_words")

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        words = self._words = policy.on
        statuses: set[int] = set()
        if "5xx" in words:
            statuses.update(range(500, 600))
        if "gateway-error" in words:
            statuses.update((502, 503, 504))
        if "retriable-4xx" in words:
            statuses.add(409)
        if "retriable-status-codes" in words:
            statuses |= policy.status_codes
        self._statuses = frozenset(statuses)
        self._grpc = frozenset(code for word, code in _GRPC_WORDS.items() if word in words)
        self._retries_rate_limited = "envoy-ratelimited" in words

    def should_retry_status(self, status: int, headers: Sequence[tuple[bytes, bytes]] = ()) -> bool:
        """headers: the response's, names lower-case; grpc-status and x-envoy-ratelimited are looked at."""
        is_retriable = status in self._statuses
        for name, value in headers:
            if name == b"x-envoy-ratelimited":
                # It comes from a proxy that protects the upstream: no other word asks for more of the same.
                return self._retries_rate_limited
            if name == b"grpc-status" and value in self._grpc:
                is_retriable = True
        return is_retriable

    def should_retry_reset(self, kind: str) -> bool:
        """kind: connect-failure, refused (stream refused, not processed), reset, reset-before-request (nothing of the
        request was written), per-try-timeout."""
        return not self._words.isdisjoint(_RESET_WORDS[kind])

    def delay_s(self, attempt: int, draw: float) -> float:
        """Seconds to wait before retry `attempt` (1 = first); draw: uniform in [0, 1)."""
        return retry_delay_s(attempt, self._policy.base_interval_s, self._policy.max_interval_s, draw)
