import pytest

from meshproxy.model.cluster import CircuitLimits, RetryBudget
from meshproxy.policy.circuit import Circuit


def test_one_connection_one_waiting_the_third_is_refused() -> None:
    """maxConnections 1, http1MaxPendingRequests 1, three slow requests at once: exactly one 503 UO."""
    circuit = Circuit(CircuitLimits(max_connections=1, max_pending_requests=1))
    outcomes = []
    for _ in range(3):
        if circuit.try_connection():
            outcomes.append("connected")
        else:
            outcomes.append("waits" if circuit.try_pending() else "refused")
    assert outcomes == ["connected", "waits", "refused"]


@pytest.mark.parametrize("what", ["connection", "pending", "request", "retry"])
def test_a_release_makes_room_for_one(what: str) -> None:
    circuit = Circuit(CircuitLimits(max_connections=2, max_pending_requests=2, max_requests=2, max_retries=2))
    attempt, release = getattr(circuit, f"try_{what}"), getattr(circuit, f"release_{what}")
    assert [attempt() for _ in range(4)] == [True, True, False, False]
    release()
    assert [attempt() for _ in range(2)] == [True, False]


def test_zero_refuses_everything() -> None:
    circuit = Circuit(CircuitLimits(max_connections=0, max_retries=0))
    assert not circuit.try_connection()
    assert not circuit.try_retry()


def test_without_limits_there_is_room() -> None:
    circuit = Circuit(CircuitLimits())
    assert all(circuit.try_connection() and circuit.try_request() and circuit.try_retry() for _ in range(10_000))


@pytest.mark.parametrize(
    ("active", "percent", "least", "allowed"),
    [(0, 20.0, 3, 3), (10, 20.0, 3, 3), (20, 20.0, 3, 4), (100, 20.0, 3, 20), (99, 20.0, 3, 19), (100, 0.0, 0, 0)],
)
def test_a_budget_is_a_share_of_what_is_under_way(active: int, percent: float, least: int, allowed: int) -> None:
    circuit = Circuit(CircuitLimits(max_retries=1, retry_budget=RetryBudget(percent=percent, min_concurrency=least)))
    for _ in range(active):
        circuit.try_request()
    assert [circuit.try_retry() for _ in range(allowed + 1)] == [True] * allowed + [False]


def test_waiting_requests_count_for_the_budget() -> None:
    circuit = Circuit(CircuitLimits(retry_budget=RetryBudget(percent=50.0, min_concurrency=0)))
    circuit.try_request()
    circuit.try_pending()
    assert circuit.max_retries == 1


def test_tighter_limits_let_what_is_under_way_finish() -> None:
    circuit = Circuit(CircuitLimits(max_requests=3))
    for _ in range(3):
        circuit.try_request()
    circuit.update(CircuitLimits(max_requests=1))
    assert circuit.requests == 3
    for _ in range(2):
        circuit.release_request()
        assert not circuit.try_request()
    circuit.release_request()
    assert circuit.try_request()
