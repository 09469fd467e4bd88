import pytest

from bench.idle import source_address, that_fit


@pytest.mark.parametrize(
    ("base_mib", "each_kib", "fit"),
    [(28.0, 10.0, 10240), (127.0, 1024.0, 1), (128.0, 10.0, 0), (200.0, 10.0, 0), (28.0, 0.0, 0)],
)
def test_as_many_fit_as_the_budget_leaves_room_for(base_mib: float, each_kib: float, fit: int) -> None:
    assert that_fit(128.0, base_mib, each_kib) == fit


def test_no_source_address_has_more_connections_than_it_has_ports() -> None:
    addresses = [source_address(number) for number in range(0, 3_000_000, 1000)]
    assert max(addresses.count(address) for address in set(addresses)) * 1000 <= 5000
    assert addresses[0] == "127.0.1.1"
    assert all(0 < int(address.rsplit(".", 1)[1]) < 255 for address in addresses)
