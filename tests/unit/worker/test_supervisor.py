from meshproxy.worker.supervisor import restart_pause_s


def test_the_first_short_life_is_followed_at_once_and_the_pause_grows_to_a_limit() -> None:
    pauses = [restart_pause_s(short_lives) for short_lives in range(12)]
    assert pauses[:5] == [0.0, 0.0, 0.1, 0.2, 0.4]
    assert pauses == sorted(pauses)
    assert restart_pause_s(10_000) == 10.0
