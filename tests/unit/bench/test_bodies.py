from bench.bodies import pieces


def test_pieces_come_to_exactly_the_total() -> None:
    for total in (0, 1, 7, 65536, 65537, 1_000_003):
        assert sum(map(len, pieces(total))) == total


def test_no_two_pieces_are_alike() -> None:
    sent = list(pieces(64 << 20))
    assert len(set(sent)) == len(sent)
