"""Outlier detection against a reference written for clarity, and the law of the allowed share."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.model.cluster import OutlierPolicy
from meshproxy.policy.outlier import OutlierDetector

KEYS = [f"10.0.0.{index}:80" for index in range(6)]
POLICIES = st.builds(
    OutlierPolicy,
    consecutive_5xx=st.integers(0, 3),
    consecutive_gateway_failure=st.integers(0, 3),
    max_ejection_percent=st.sampled_from([0, 10, 20, 34, 50, 100]),
    always_eject_one=st.booleans(),
    interval_s=st.just(10.0),
    base_ejection_s=st.sampled_from([5.0, 30.0]),
    max_ejection_s=st.sampled_from([30.0, 60.0]),
)
RESULT = st.tuples(st.sampled_from(KEYS), st.sampled_from([200, 404, 500, 503, 1, 2, 3, 4]))
STEP = st.one_of(RESULT, RESULT, RESULT, RESULT, st.just("sweep"), st.sampled_from(KEYS))
"""A result, a sweep, or a good active check of an endpoint."""


@dataclass
class Host:
    """The whole history since the last restore, newest last; counting is done by looking back."""

    codes: list[int]
    counted_5xx_from: int = 0
    counted_gateway_from: int = 0
    ejected_at: float | None = None
    restored_at: float = 0.0
    backoff: int = 0

    def tail(self, start: int, codes: set[int]) -> int:
        length = 0
        for code in reversed(self.codes[start:]):
            if code not in codes:
                break
            length += 1
        return length


class Reference:
    def __init__(self, policy: OutlierPolicy) -> None:
        self.policy = policy
        self.hosts = {key: Host([]) for key in KEYS}

    @property
    def out(self) -> set[str]:
        return {key for key, host in self.hosts.items() if host.ejected_at is not None}

    def result(self, key: str, code: int, now: float) -> None:
        host, policy = self.hosts[key], self.policy
        if host.ejected_at is not None:
            return
        host.codes.append({1: 503, 2: 504, 3: 500, 4: 200}.get(code, code))
        if policy.consecutive_gateway_failure and (
            host.tail(host.counted_gateway_from, {502, 503, 504}) == policy.consecutive_gateway_failure
        ):
            host.counted_gateway_from = len(host.codes)
            self.eject(host, now)
        if policy.consecutive_5xx and host.tail(host.counted_5xx_from, {500, 503, 504}) == policy.consecutive_5xx:
            host.counted_5xx_from = len(host.codes)
            self.eject(host, now)

    def eject(self, host: Host, now: float) -> None:
        policy, active = self.policy, len(self.out)
        if host.ejected_at is not None:
            return
        if (active + 1) * 100 <= policy.max_ejection_percent * len(KEYS) or (policy.always_eject_one and active == 0):
            host.ejected_at = now
            longest = max(policy.max_ejection_s, policy.base_ejection_s)
            if host.backoff * policy.base_ejection_s < longest + policy.base_ejection_s:
                host.backoff += 1

    def restore(self, host: Host, now: float) -> None:
        host.ejected_at = None
        host.restored_at = now
        host.codes.clear()
        host.counted_5xx_from = host.counted_gateway_from = 0

    def sweep(self, now: float) -> None:
        policy = self.policy
        longest = max(policy.max_ejection_s, policy.base_ejection_s)
        for host in self.hosts.values():
            if host.ejected_at is not None:
                if now - host.ejected_at >= min(host.backoff * policy.base_ejection_s, longest):
                    self.restore(host, now)
            elif host.backoff and now - host.restored_at >= policy.interval_s:
                host.backoff -= 1


@settings(max_examples=300)
@given(policy=POLICIES, steps=st.lists(STEP, min_size=20, max_size=200))
def test_it_does_what_the_reference_does(policy: OutlierPolicy, steps: list[tuple[str, int] | str]) -> None:
    subject, reference = OutlierDetector(policy, KEYS, 0.0), Reference(policy)
    heard: set[str] = set()
    suspects: set[str] = set()
    now = 0.0
    for step in steps:
        before = reference.out
        if isinstance(step, tuple):
            now += 0.25
            verdicts = subject.on_result(*step, now)
            reference.result(*step, now)
        elif step == "sweep":
            now += 10.0
            verdicts = subject.sweep(now)
            reference.sweep(now)
        else:
            verdicts = subject.on_active_check(step, True, now)
            if step in reference.out:
                reference.restore(reference.hosts[step], now)
        for verdict in verdicts:
            assert (verdict.key in heard) == (verdict.word == "restore")
            if verdict.word in ("eject", "restore"):
                heard ^= {verdict.key}
                suspects.discard(verdict.key)
            else:
                assert (verdict.key in suspects) == (verdict.word == "clear")
                suspects ^= {verdict.key}
        assert heard == reference.out == {key for key in KEYS if subject.is_ejected(key)}
        assert suspects == {key for key in KEYS if subject.is_suspect(key)}
        assert subject.counters.ejections_active == len(heard)
        if len(heard) > len(before):
            share = 100 * len(heard) / len(KEYS)
            assert share <= policy.max_ejection_percent or (policy.always_eject_one and len(heard) == 1)


@given(
    policy=st.builds(
        OutlierPolicy,
        enforce_success_rate=st.booleans(),
        enforce_failure_percentage=st.booleans(),
        success_rate_min_hosts=st.integers(1, 6),
        failure_percentage_min_hosts=st.integers(1, 6),
        max_ejection_percent=st.integers(0, 100),
        always_eject_one=st.booleans(),
    ),
    intervals=st.lists(
        st.lists(
            st.integers(0, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=6, max_size=6
        ),
        max_size=8,
    ),
)
def test_rates_never_eject_more_than_the_allowed_share(
    policy: OutlierPolicy, intervals: list[list[tuple[int, int]]]
) -> None:
    subject = OutlierDetector(policy, KEYS, 0.0)
    out = 0
    for number, interval in enumerate(intervals, start=1):
        for key, (requests, successes) in zip(KEYS, interval, strict=True):
            subject.on_counts(key, requests, successes)
        words = [verdict.word for verdict in subject.sweep(10.0 * number)]
        out += words.count("eject") - words.count("restore")
        assert subject.counters.ejections_active == out == sum(subject.is_ejected(key) for key in KEYS)
        if "eject" in words:
            assert 100 * out <= policy.max_ejection_percent * 6 or (policy.always_eject_one and out == 1)
