import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.model.route import RetryPolicy
from meshproxy.policy.retry import CompiledRetry, retry_delay_s

ISTIO = RetryPolicy()
KINDS = ["connect-failure", "reset-before-request", "reset", "refused", "per-try-timeout"]
WORDS = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "resource-exhausted",
    "internal",
    "unavailable",
]


def compiled(*words: str, codes: frozenset[int] = frozenset()) -> CompiledRetry:
    return CompiledRetry(RetryPolicy(on=frozenset(words), status_codes=codes))


STATUSES = {
    "5xx": {500, 501, 502, 503, 504, 599},
    "gateway-error": {502, 503, 504},
    "retriable-4xx": {409},
    "retriable-status-codes": {418, 503},
}


@pytest.mark.parametrize("word", WORDS)
def test_statuses_each_word_retries(word: str) -> None:
    retry = compiled(word, codes=frozenset({418, 503}))
    tried = {200, 302, 400, 404, 409, 418, 429, 499, 500, 501, 502, 503, 504, 599}
    assert {status for status in tried if retry.should_retry_status(status)} == STATUSES.get(word, set())


RESETS = {
    "5xx": set(KINDS),
    "gateway-error": set(KINDS),
    "reset": set(KINDS),
    "reset-before-request": {"connect-failure", "reset-before-request"},
    "connect-failure": {"connect-failure"},
    "refused-stream": {"refused"},
}


@pytest.mark.parametrize("word", WORDS)
def test_resets_each_word_retries(word: str) -> None:
    retry = compiled(word)
    assert {kind for kind in KINDS if retry.should_retry_reset(kind)} == RESETS.get(word, set())


GRPC = {"cancelled": 1, "deadline-exceeded": 4, "resource-exhausted": 8, "internal": 13, "unavailable": 14}


@pytest.mark.parametrize("word", WORDS)
def test_grpc_statuses_each_word_retries(word: str) -> None:
    retry = compiled(word)
    retried = {code for code in range(17) if retry.should_retry_status(200, [(b"grpc-status", b"%d" % code)])}
    assert retried == ({GRPC[word]} if word in GRPC else set())


def test_istio_default_retries_what_never_reached_the_upstream() -> None:
    retry = CompiledRetry(ISTIO)
    assert {kind for kind in KINDS if retry.should_retry_reset(kind)} == {"connect-failure", "refused"}
    assert not any(retry.should_retry_status(status) for status in range(200, 600))
    assert retry.should_retry_status(200, [(b"grpc-status", b"14")])


@pytest.mark.parametrize(("words", "retries"), [(("5xx",), False), (("5xx", "envoy-ratelimited"), True)])
def test_a_rate_limited_answer_is_retried_only_by_its_own_word(words: tuple[str, ...], retries: bool) -> None:
    headers = [(b"content-length", b"0"), (b"x-envoy-ratelimited", b"true")]
    assert compiled(*words).should_retry_status(503, headers) == retries


def test_the_list_of_codes_needs_its_word() -> None:
    assert not compiled("connect-failure", codes=frozenset({418})).should_retry_status(418)


@pytest.mark.parametrize(("attempt", "ceiling_s"), [(1, 0.025), (2, 0.075), (3, 0.175), (4, 0.250), (50, 0.250)])
def test_delays_are_drawn_below_a_growing_ceiling(attempt: int, ceiling_s: float) -> None:
    retry = CompiledRetry(ISTIO)
    assert retry.delay_s(attempt, 0.0) == 0.0
    assert retry.delay_s(attempt, 0.5) == pytest.approx(ceiling_s / 2)
    assert retry.delay_s(attempt, 1 - 1e-9) < ceiling_s


@given(
    attempt=st.integers(1, 10_000),
    base_s=st.floats(0.001, 60),
    factor=st.floats(1, 100),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_no_delay_exceeds_the_cap(attempt: int, base_s: float, factor: float, draw: float) -> None:
    assert 0 <= retry_delay_s(attempt, base_s, base_s * factor, draw) <= base_s * factor
