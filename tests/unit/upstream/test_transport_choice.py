"""When QUIC is tried again that did not get through."""

from meshproxy.upstream.transport_choice import BACK_OFF_S, MAX_BACK_OFF_S, QuicTries


def test_quic_is_tried_until_it_fails() -> None:
    tries = QuicTries()
    assert tries.may_try(0.0)
    assert not tries.is_due(1e9)
    tries.worked()
    assert tries.may_try(0.0)


def test_after_a_failure_it_is_left_alone_for_a_back_off() -> None:
    tries = QuicTries()
    tries.failed(100.0)
    assert not tries.may_try(100.0 + BACK_OFF_S - 0.1)
    assert tries.may_try(100.0 + BACK_OFF_S)
    assert tries.is_due(100.0 + BACK_OFF_S)


def test_the_back_off_doubles_up_to_its_limit_and_begins_anew_after_a_success() -> None:
    tries = QuicTries()
    waits = []
    for _ in range(6):
        tries.failed(0.0)
        waits.append(tries.retry_at)
    assert waits == [60.0, 120.0, 240.0, 480.0, 600.0, 600.0]
    assert waits[-1] == MAX_BACK_OFF_S
    tries.worked()
    assert not tries.is_due(1e9)
    tries.failed(0.0)
    assert tries.retry_at == BACK_OFF_S


def test_one_probe_is_made_at_a_time() -> None:
    tries = QuicTries()
    tries.failed(0.0)
    tries.probe = object()
    assert not tries.is_due(1e9)
