"""Outlier detection row by row: counting, whom to eject, for how long, rates."""

from collections.abc import Iterable

import pytest

from meshproxy.model.cluster import OutlierPolicy
from meshproxy.policy.outlier import (
    CONNECT_FAILED,
    CONNECTED,
    RESET,
    TIMED_OUT,
    OutlierDetector,
    Verdict,
    success_rate_threshold,
)

KEYS = [f"10.0.0.{index}:80" for index in range(10)]
KEY = KEYS[0]


def policy(**fields: object) -> OutlierPolicy:
    """One in ten may go, as Istio has it, unless a test says otherwise."""
    return OutlierPolicy(**{"always_eject_one": False, **fields})  # type: ignore[arg-type]


def detector(count: int = 10, **fields: object) -> OutlierDetector:
    return OutlierDetector(policy(**fields), KEYS[:count], 0.0)


def feed(subject: OutlierDetector, codes: Iterable[int], key: str = KEY, now: float = 0.0) -> list[str]:
    """The words said about `key`, in order."""
    return [verdict.word for code in codes for verdict in subject.on_result(key, code, now)]


@pytest.mark.parametrize(
    ("fields", "codes", "ejects"),
    [
        pytest.param({}, [500] * 4 + [200] + [500] * 4, False, id="a success in between begins the count anew"),
        pytest.param({}, [500] * 4, False, id="one short"),
        pytest.param({}, [500] * 5, True, id="the fifth in a row"),
        pytest.param({}, [500, 501, 502, 503, 599], True, id="any 5xx counts"),
        pytest.param({}, [400, 404, 429, 499, 499], False, id="4xx do not count"),
        pytest.param({"consecutive_5xx": 0}, [500] * 50, False, id="zero turns the check off"),
        pytest.param(
            {"consecutive_5xx": 0, "consecutive_gateway_failure": 3},
            [503, 503, 500, 503, 503],
            False,
            id="gateway: another 5xx in between",
        ),
        pytest.param(
            {"consecutive_5xx": 0, "consecutive_gateway_failure": 3}, [503] * 3, True, id="gateway: three in a row"
        ),
        pytest.param(
            {"consecutive_5xx": 0, "consecutive_gateway_failure": 3}, [502, 503, 504], True, id="gateway: 502, 503, 504"
        ),
        pytest.param({"consecutive_gateway_failure": 0}, [503] * 4, False, id="gateway: off by default"),
        pytest.param({"consecutive_gateway_failure": 7}, [503] * 5, True, id="gateway errors are 5xx too"),
        pytest.param(
            {"consecutive_5xx": 3}, [TIMED_OUT, TIMED_OUT, 500], True, id="two connect timeouts and a 500 are three"
        ),
        pytest.param({}, [CONNECT_FAILED] * 5, True, id="failures to connect are 503"),
        pytest.param({}, [RESET] * 5, True, id="resets are 500"),
        pytest.param({}, [CONNECT_FAILED] * 4 + [CONNECTED, CONNECT_FAILED], False, id="TCP: a connect is a success"),
        pytest.param(
            {"consecutive_5xx": 0, "consecutive_gateway_failure": 3},
            [CONNECT_FAILED, TIMED_OUT, CONNECT_FAILED],
            True,
            id="connect failures and timeouts are gateway errors",
        ),
        pytest.param({"consecutive_5xx": 0, "consecutive_gateway_failure": 3}, [RESET] * 9, False, id="resets are not"),
        pytest.param(
            {"split_external_local_origin": True},
            [CONNECT_FAILED, TIMED_OUT, RESET] * 2,
            True,
            id="split: local origin",
        ),
        pytest.param(
            {"split_external_local_origin": True},
            [CONNECT_FAILED] * 4 + [CONNECTED] + [CONNECT_FAILED] * 4,
            False,
            id="split: a connect begins anew",
        ),
        pytest.param(
            {"split_external_local_origin": True, "consecutive_local_origin_failure": 2},
            [CONNECT_FAILED, 200, CONNECT_FAILED],
            True,
            id="split: an answer is not a connect",
        ),
        pytest.param(
            {"split_external_local_origin": True}, [500, CONNECT_FAILED] * 4, False, id="split: counted apart"
        ),
        pytest.param(
            {"split_external_local_origin": True, "consecutive_local_origin_failure": 0},
            [CONNECT_FAILED] * 50,
            False,
            id="split: zero turns it off",
        ),
        pytest.param({"error_codes": frozenset({429})}, [429] * 5, True, id="codes of one's own count"),
        pytest.param({"error_codes": frozenset({429})}, [503] * 9, False, id="and nothing else does"),
        pytest.param({"error_codes": frozenset({429})}, [429] * 4 + [503, 429], False, id="what else is a success"),
        pytest.param(
            {"error_codes": frozenset({503}), "consecutive_5xx": 0, "consecutive_gateway_failure": 2},
            [503, 503],
            True,
            id="a 5xx among one's own codes stays what it is",
        ),
        pytest.param(
            {"error_codes": frozenset({429})}, [CONNECT_FAILED] * 5, True, id="own codes are about answers only"
        ),
    ],
)
def test_counting(fields: dict[str, object], codes: list[int], ejects: bool) -> None:
    subject = detector(10, **fields)
    words = feed(subject, codes)
    assert ("eject" in words) == ejects
    assert words.count("eject") <= 1
    assert subject.is_ejected(KEY) == ejects
    if ejects:
        assert words[-1] == "eject"


def test_errors_in_flight_after_the_ejection_are_ignored() -> None:
    subject = detector()
    feed(subject, [500] * 5)
    assert feed(subject, [500] * 20 + [200]) == []
    assert subject.counters.ejections_total == 1


def test_a_refused_ejection_begins_the_count_anew() -> None:
    subject = detector(count=3)
    feed(subject, [500] * 5)
    assert subject.counters.ejections_overflow == 1
    feed(subject, [500] * 4)
    assert subject.counters.ejections_overflow == 1
    feed(subject, [500])
    assert subject.counters.ejections_overflow == 2


@pytest.mark.parametrize(
    ("hosts", "percent", "always_one", "ejected"),
    [
        (3, 10, False, 0),
        (9, 10, False, 0),
        (10, 10, False, 1),
        (19, 10, False, 1),
        (20, 10, False, 2),
        (3, 34, False, 1),
        (4, 50, False, 2),
        (10, 0, False, 0),
        (5, 100, False, 5),
        (3, 10, True, 1),
        (1, 10, True, 1),
        (10, 0, True, 1),
        (20, 10, True, 2),
        (5, 100, True, 5),
    ],
)
def test_how_many_may_be_out_at_once(hosts: int, percent: int, always_one: bool, ejected: int) -> None:
    keys = [f"10.0.0.{index}:80" for index in range(hosts)]
    subject = OutlierDetector(policy(max_ejection_percent=percent, always_eject_one=always_one), keys, 0.0)
    for key in keys:
        feed(subject, [500] * 5, key)
    counters = subject.counters
    assert sum(subject.is_ejected(key) for key in keys) == ejected
    assert (counters.ejections_active, counters.ejections_total) == (ejected, ejected)
    assert counters.ejections_overflow == hosts - ejected


def test_by_default_one_of_three_may_go() -> None:
    subject = OutlierDetector(OutlierPolicy(), KEYS[:3], 0.0)
    assert [feed(subject, [500] * 5, key)[-1] for key in KEYS[:2]] == ["eject", "clear"]


def back_at(subject: OutlierDetector, now: float, every: float = 1.0) -> float:
    """Sweep every so many seconds after `now`; when KEY came back. No sweep follows."""
    for _ in range(1000):
        now += every
        if Verdict(KEY, "restore") in subject.sweep(now):
            return now
    raise AssertionError("never came back")


def test_an_ejection_ends_at_the_first_sweep_after_its_time() -> None:
    subject = detector()
    feed(subject, [500] * 5, now=3.0)
    assert back_at(subject, 0.0, every=10.0) == 40.0
    assert subject.counters.ejections_active == 0


def test_each_ejection_lasts_longer_up_to_the_maximum() -> None:
    subject = detector()
    now, lasted = 0.0, []
    for _ in range(12):
        feed(subject, [500] * 5, now=now)
        back = back_at(subject, now)
        lasted.append(back - now)
        now = back
    assert lasted == [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300, 300]


def test_a_base_above_the_maximum_counts() -> None:
    subject = detector(base_ejection_s=400.0)
    feed(subject, [500] * 5)
    assert back_at(subject, 0.0, every=10.0) == 400.0


@pytest.mark.parametrize(
    ("ejections", "quiet", "lasts"),
    [(10, 0, 300), (10, 1, 300), (10, 5, 180), (10, 9, 60), (10, 10, 30), (10, 50, 30), (30, 10, 60), (30, 11, 30)],
)
def test_each_quiet_sweep_forgives_one_ejection(ejections: int, quiet: int, lasts: float) -> None:
    """Those past the maximum are not remembered: eleven quiet sweeps forgive any number."""
    subject = detector()
    now = 0.0
    for _ in range(ejections):
        feed(subject, [500] * 5, now=now)
        now = back_at(subject, now)
    for _ in range(quiet):
        now += 10.0
        subject.sweep(now)
    feed(subject, [500] * 5, now=now)
    assert back_at(subject, now) - now == lasts


def test_the_sweep_that_restores_does_not_forgive() -> None:
    subject = detector()
    feed(subject, [500] * 5)
    subject.sweep(30.0)
    feed(subject, [500] * 5, now=30.0)
    assert back_at(subject, 30.0) == 90.0


def test_failures_before_the_ejection_do_not_count_after_it() -> None:
    subject = detector(consecutive_gateway_failure=3)
    assert feed(subject, [500, 503, 503, 503])[-1] == "eject"
    subject.sweep(30.0)
    assert "eject" not in feed(subject, [500] * 4, now=30.0)


def test_a_good_active_check_restores_at_once() -> None:
    subject = detector()
    feed(subject, [500] * 5)
    assert subject.on_active_check(KEY, False, 1.0) == []
    assert subject.on_active_check(KEY, True, 1.0) == [Verdict(KEY, "restore")]
    assert subject.on_active_check(KEY, True, 2.0) == []
    assert "eject" not in feed(subject, [500] * 4, now=2.0)


class TestSuspicion:
    """Workers report successes of suspects only, so the detector must say who they are."""

    def test_from_the_first_failure_to_the_next_success(self) -> None:
        subject = detector()
        assert feed(subject, [200, 500, 500, 200, 200]) == ["suspect", "clear"]
        assert not subject.is_suspect(KEY)

    def test_the_ejected_are_not_suspect(self) -> None:
        subject = detector()
        assert feed(subject, [500] * 5) == ["suspect", "eject"]
        assert not subject.is_suspect(KEY)
        assert subject.standing() == [Verdict(KEY, "eject")]
        assert subject.sweep(30.0) == [Verdict(KEY, "restore")]
        assert subject.standing() == []
        assert feed(subject, [500], now=30.0) == ["suspect"]

    def test_a_refused_ejection_clears(self) -> None:
        assert feed(detector(count=3), [500] * 5) == ["suspect", "clear"]

    def test_an_ejection_by_rate_ends_it(self) -> None:
        subject = detector(enforce_failure_percentage=True, max_ejection_percent=100, failure_percentage_min_hosts=1)
        assert feed(subject, [500]) == ["suspect"]
        subject.on_counts(KEY, 100, 0)
        assert subject.sweep(10.0) == [Verdict(KEY, "eject")]
        assert subject.standing() == [Verdict(KEY, "eject")]

    def test_a_check_that_is_off_suspects_nobody(self) -> None:
        assert feed(detector(consecutive_5xx=0), [500, 503, RESET]) == []


RATES = {
    "50 among hundreds": ([50, 100, 100, 100, 100], [0]),
    "90 among hundreds": ([90, 100, 100, 100, 100], [0]),
    "all equal": ([97, 97, 97, 97, 97], []),
    "all failing alike": ([0, 0, 0, 0, 0], []),
    "too few endpoints": ([50, 100, 100, 100], []),
}


@pytest.mark.parametrize(("rates", "out"), RATES.values(), ids=RATES.keys())
def test_success_rate(rates: list[int], out: list[int]) -> None:
    subject = detector(count=len(rates), enforce_success_rate=True, max_ejection_percent=100)
    for key, rate in zip(KEYS, rates, strict=False):
        subject.on_counts(key, 100, rate)
    assert subject.sweep(10.0) == [Verdict(KEYS[index], "eject") for index in out]
    assert subject.counters.ejections_success_rate == len(out)


@pytest.mark.parametrize(
    ("rates", "threshold"), [([50, 100, 100, 100, 100], 52.0), ([90, 100, 100, 100, 100], 90.4), ([80.0] * 5, 80.0)]
)
def test_success_rate_threshold(rates: list[float], threshold: float) -> None:
    assert success_rate_threshold(rates, 1.9) == pytest.approx(threshold)


def test_success_rate_needs_volume_in_one_interval() -> None:
    subject = detector(count=5, enforce_success_rate=True, max_ejection_percent=100)
    for _ in range(2):  # 60 in each interval, never 100 in one
        for index, key in enumerate(KEYS[:5]):
            subject.on_counts(key, 60, 60 if index else 0)
        assert subject.sweep(10.0) == []


def test_the_ejected_do_not_weigh_on_the_mean() -> None:
    subject = detector(count=6, enforce_success_rate=True, max_ejection_percent=100)
    feed(subject, [500] * 5, KEYS[5])
    for key, rate in zip(KEYS[:6], [50, 100, 100, 100, 100, 0], strict=True):
        subject.on_counts(key, 100, rate)
    assert subject.sweep(10.0) == [Verdict(KEY, "eject")]


def test_success_rate_is_off_unless_enforced() -> None:
    subject = detector(count=5, max_ejection_percent=100)
    for key, rate in zip(KEYS, [0, 100, 100, 100, 100], strict=False):
        subject.on_counts(key, 1000, rate * 10)
    assert subject.sweep(10.0) == []


@pytest.mark.parametrize(
    ("count", "requests", "successes", "out"),
    [(5, 100, 15, True), (5, 100, 16, False), (5, 50, 0, True), (5, 49, 0, False), (4, 100, 0, False)],
)
def test_failure_percentage(count: int, requests: int, successes: int, out: bool) -> None:
    subject = detector(count=count, enforce_failure_percentage=True, max_ejection_percent=100)
    for key in KEYS[1:count]:
        subject.on_counts(key, requests, requests)
    subject.on_counts(KEY, requests, successes)
    assert subject.sweep(10.0) == ([Verdict(KEY, "eject")] if out else [])
    assert subject.counters.ejections_failure_percentage == out


def test_ejections_are_counted_by_kind() -> None:
    subject = detector(consecutive_gateway_failure=2, max_ejection_percent=100)
    feed(subject, [503] * 2, KEYS[0])
    feed(subject, [500] * 5, KEYS[1])
    counters = subject.counters
    assert (counters.ejections_consecutive_gateway_failure, counters.ejections_consecutive_5xx) == (1, 1)
    assert (counters.ejections_active, counters.ejections_total) == (2, 2)


class TestUpdate:
    def test_who_stays_keeps_count_and_ejection(self) -> None:
        subject = detector(max_ejection_percent=100)
        feed(subject, [500] * 5, KEYS[0])
        feed(subject, [500] * 4, KEYS[1])
        assert subject.update(policy(max_ejection_percent=100), [*KEYS[:2], "10.9.9.9:80"], 5.0) == []
        assert subject.is_ejected(KEYS[0])
        assert feed(subject, [500], KEYS[1]) == ["eject"]
        assert subject.counters.ejections_active == 2

    def test_who_leaves_makes_room(self) -> None:
        subject = detector()
        feed(subject, [500] * 5, KEYS[0])
        feed(subject, [500], KEYS[1])
        left = subject.update(policy(), [*KEYS[2:], "10.9.9.8:80", "10.9.9.9:80"], 5.0)
        assert left == [Verdict(KEYS[0], "restore"), Verdict(KEYS[1], "clear")]
        assert subject.counters.ejections_active == 0
        assert "eject" in feed(subject, [500] * 5, KEYS[2])

    def test_who_is_unknown_is_ignored(self) -> None:
        subject = detector()
        assert feed(subject, [500] * 9, "10.9.9.9:80") == []
        subject.on_counts("10.9.9.9:80", 1, 1)
        assert subject.on_active_check("10.9.9.9:80", True, 0.0) == []

    def test_a_lower_threshold_counts_at_once(self) -> None:
        subject = detector()
        feed(subject, [500] * 4)
        subject.update(policy(consecutive_5xx=2), KEYS, 5.0)
        assert feed(subject, [500]) == ["eject"]

    def test_without_detection_everything_said_is_taken_back(self) -> None:
        subject = detector()
        feed(subject, [500] * 5, KEYS[0])
        feed(subject, [500], KEYS[1])
        assert subject.restore_all(5.0) == [Verdict(KEYS[0], "restore"), Verdict(KEYS[1], "clear")]
        assert subject.standing() == []
