"""Outlier detection of one cluster: who is out, from when, for how long. Time comes in; nothing here sleeps or logs.

Decides: eject and restore. Leaves to others: how results reach it (control), what an ejection does (upstream).
Source: Envoy outlier_detection_impl.cc, outlier_detection.proto; Istio OutlierDetection.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from meshproxy.model.cluster import OutlierPolicy

CONNECT_FAILED = 1
TIMED_OUT = 2
RESET = 3
CONNECTED = 4
_LOCAL_ORIGIN = {CONNECT_FAILED: 503, TIMED_OUT: 504, RESET: 500, CONNECTED: 200}
"""What a local-origin event counts as where external and local origin are not told apart."""
_GATEWAY = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class Verdict:
    """word: eject, restore, suspect (tell me of successes too) or clear, as in control.messages.Health."""

    key: str
    word: str


@dataclass(slots=True)
class OutlierCounters:
    """Envoy's outlier_detection statistics."""

    ejections_active: int = 0
    ejections_total: int = 0
    ejections_overflow: int = 0
    ejections_consecutive_5xx: int = 0
    ejections_consecutive_gateway_failure: int = 0
    ejections_consecutive_local_origin_failure: int = 0
    ejections_success_rate: int = 0
    ejections_failure_percentage: int = 0


class _Host:
    __slots__ = (
        "backoff",
        "consecutive_5xx",
        "consecutive_gateway",
        "consecutive_local",
        "ejected_at",
        "is_ejected",
        "is_suspect",
        "requests",
        "restored_at",
        "successes",
    )

    def __init__(self) -> None:
        self.consecutive_5xx = self.consecutive_gateway = self.consecutive_local = 0
        self.requests = self.successes = 0
        self.is_ejected = self.is_suspect = False
        self.ejected_at = 0.0
        self.restored_at = 0.0
        self.backoff = 0
        """Ejections that still count for the length of the next one; only who was ejected before has any."""

    @property
    def counts_failures(self) -> bool:
        return bool(self.consecutive_5xx or self.consecutive_gateway or self.consecutive_local)

    def forget_failures(self) -> None:
        self.consecutive_5xx = self.consecutive_gateway = self.consecutive_local = 0


class OutlierDetector:
    """Not thread-safe; one owner feeds it everything it is to know."""

    __slots__ = ("_hosts", "_policy", "counters")

    def __init__(self, policy: OutlierPolicy, endpoint_keys: Iterable[str], now: float) -> None:
        self._policy = policy
        self._hosts = {key: _Host() for key in endpoint_keys}
        self.counters = OutlierCounters()

    def update(self, policy: OutlierPolicy, endpoint_keys: Iterable[str], now: float) -> list[Verdict]:
        """Another policy or membership; who stays keeps counts and ejection.

        Gives back what was said about those who left: should one of them return, nobody may remember it as ejected.
        """
        old = self._hosts
        self._policy = policy
        self._hosts = {key: old.get(key) or _Host() for key in endpoint_keys}
        self.counters.ejections_active = sum(host.is_ejected for host in self._hosts.values())
        return [
            Verdict(key, "restore" if host.is_ejected else "clear")
            for key, host in old.items()
            if (host.is_ejected or host.is_suspect) and key not in self._hosts
        ]

    def is_ejected(self, key: str) -> bool:
        host = self._hosts.get(key)
        return host is not None and host.is_ejected

    def is_suspect(self, key: str) -> bool:
        """Its failure count is not zero, so successes matter."""
        host = self._hosts.get(key)
        return host is not None and host.is_suspect

    def standing(self) -> list[Verdict]:
        """What holds now, for someone who has heard nothing yet."""
        verdicts = [Verdict(key, "eject") for key, host in self._hosts.items() if host.is_ejected]
        verdicts += [Verdict(key, "suspect") for key, host in self._hosts.items() if host.is_suspect]
        return verdicts

    def on_result(self, key: str, code: int, now: float) -> list[Verdict]:
        """One outcome: an HTTP status, or a local-origin event (CONNECT_FAILED …). Unknown or ejected: nothing."""
        host = self._hosts.get(key)
        if host is None or host.is_ejected:
            return []
        policy = self._policy
        if code in _LOCAL_ORIGIN:
            if policy.split_external_local_origin:
                is_out = self._count_local_origin(host, code, now)
            else:
                is_out = self._count_status(host, _LOCAL_ORIGIN[code], now)
        elif policy.error_codes is None:
            is_out = self._count_status(host, code, now)
        elif code in policy.error_codes:
            is_out = self._count_status(host, code if code >= 500 else 500, now)
        else:
            is_out = self._count_status(host, 200, now)
        if is_out:
            return [Verdict(key, "eject")]
        if host.counts_failures == host.is_suspect:
            return []
        host.is_suspect = host.counts_failures
        return [Verdict(key, "suspect" if host.is_suspect else "clear")]

    def _count_status(self, host: _Host, code: int, now: float) -> bool:
        """True when this one ejected the host. A check that is off counts nothing, so it makes nobody suspect."""
        if code < 500:
            host.consecutive_5xx = host.consecutive_gateway = 0
            return False
        policy = self._policy
        host.consecutive_gateway = host.consecutive_gateway + 1 if code in _GATEWAY else 0
        if host.consecutive_gateway >= (policy.consecutive_gateway_failure or 1):
            host.consecutive_gateway = 0
            if policy.consecutive_gateway_failure and self._eject(host, "consecutive_gateway_failure", now):
                return True
        host.consecutive_5xx += 1
        if host.consecutive_5xx >= (policy.consecutive_5xx or 1):
            host.consecutive_5xx = 0
            if policy.consecutive_5xx and self._eject(host, "consecutive_5xx", now):
                return True
        return False

    def _count_local_origin(self, host: _Host, code: int, now: float) -> bool:
        if code == CONNECTED:
            host.consecutive_local = 0
            return False
        threshold = self._policy.consecutive_local_origin_failure
        host.consecutive_local += 1
        if host.consecutive_local < (threshold or 1):
            return False
        host.consecutive_local = 0
        return threshold > 0 and self._eject(host, "consecutive_local_origin_failure", now)

    def _eject(self, host: _Host, kind: str, now: float) -> bool:
        """Eject if the allowed share of the whole cluster permits; True when it did."""
        policy, counters = self._policy, self.counters
        share = 100.0 * (counters.ejections_active + 1) / len(self._hosts)
        if share > policy.max_ejection_percent and not (policy.always_eject_one and counters.ejections_active == 0):
            counters.ejections_overflow += 1
            return False
        host.is_ejected = True
        host.is_suspect = False  # an ejected host is judged by time alone
        host.ejected_at = now
        maximum = max(policy.max_ejection_s, policy.base_ejection_s)
        if host.backoff * policy.base_ejection_s < maximum + policy.base_ejection_s:
            host.backoff += 1
        counters.ejections_active += 1
        counters.ejections_total += 1
        name = f"ejections_{kind}"
        setattr(counters, name, getattr(counters, name) + 1)
        return True

    def on_counts(self, key: str, requests: int, successes: int) -> None:
        """Requests of one endpoint since the last call, for success rate and failure percentage."""
        host = self._hosts.get(key)
        if host is not None:
            host.requests += requests
            host.successes += successes

    def on_active_check(self, key: str, is_healthy: bool, now: float) -> list[Verdict]:
        """A successful active check brings an ejected endpoint back at once (Envoy's default)."""
        host = self._hosts.get(key)
        if host is None or not is_healthy or not host.is_ejected:
            return []
        return [self._restore(key, host, now)]

    def sweep(self, now: float) -> list[Verdict]:
        """Run every interval_s: restore whose time is over, judge the interval's rates, let old sins fade."""
        policy = self._policy
        maximum = max(policy.max_ejection_s, policy.base_ejection_s)
        verdicts = [
            self._restore(key, host, now)
            for key, host in self._hosts.items()
            if host.is_ejected and min(policy.base_ejection_s * host.backoff, maximum) <= now - host.ejected_at
        ]
        if policy.enforce_success_rate:
            verdicts += self._judge_success_rate(now)
        if policy.enforce_failure_percentage:
            verdicts += self._judge_failure_percentage(now)
        for host in self._hosts.values():
            host.requests = host.successes = 0
            if host.backoff > 0 and not host.is_ejected and now - host.restored_at >= policy.interval_s:
                host.backoff -= 1
        return verdicts

    def restore_all(self, now: float) -> list[Verdict]:
        """The cluster has no outlier detection any more: take back whatever was said."""
        verdicts = [self._restore(key, host, now) for key, host in self._hosts.items() if host.is_ejected]
        verdicts += [Verdict(key, "clear") for key, host in self._hosts.items() if host.is_suspect]
        for host in self._hosts.values():
            host.forget_failures()
            host.is_suspect = False
        return verdicts

    def _restore(self, key: str, host: _Host, now: float) -> Verdict:
        host.is_ejected = False
        host.restored_at = now
        host.forget_failures()
        self.counters.ejections_active -= 1
        return Verdict(key, "restore")

    def _rates(self, volume: int) -> list[tuple[str, _Host, float]]:
        return [
            (key, host, 100.0 * host.successes / host.requests)
            for key, host in self._hosts.items()
            if not host.is_ejected and host.requests >= max(1, volume)
        ]

    def _judge_success_rate(self, now: float) -> list[Verdict]:
        policy = self._policy
        rates = self._rates(policy.success_rate_request_volume)
        if not rates or len(rates) < policy.success_rate_min_hosts:
            return []
        threshold = success_rate_threshold([rate for _, _, rate in rates], policy.success_rate_stdev_factor)
        return [
            Verdict(key, "eject")
            for key, host, rate in rates
            if rate < threshold and self._eject(host, "success_rate", now)
        ]

    def _judge_failure_percentage(self, now: float) -> list[Verdict]:
        policy = self._policy
        rates = self._rates(policy.failure_percentage_request_volume)
        if not rates or len(rates) < policy.failure_percentage_min_hosts:
            return []
        return [
            Verdict(key, "eject")
            for key, host, rate in rates
            if 100.0 - rate >= policy.failure_percentage_threshold and self._eject(host, "failure_percentage", now)
        ]


def success_rate_threshold(rates: list[float], stdev_factor: float) -> float:
    """mean − factor · population standard deviation; rates in percent."""
    mean = sum(rates) / len(rates)
    variance = sum((rate - mean) ** 2 for rate in rates) / len(rates)
    deviation: float = variance**0.5
    return mean - stdev_factor * deviation
