"""TCP and TLS routes: destination subnets, server names, weights."""

import pytest

from meshproxy.model.listener import TcpRoute
from meshproxy.model.route import WeightedCluster
from meshproxy.route.l4 import L4Table


def to(cluster: str, *, subnets: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> TcpRoute:
    return TcpRoute(clusters=(WeightedCluster(cluster_key=cluster),), destination_subnets=subnets, sni_hosts=names)


SUBNETS = L4Table(
    [to("ten", subnets=("10.0.0.0/8",)), to("one", subnets=("192.0.2.7", "2001:db8::/32")), to("named", names=("a.b",))]
)


@pytest.mark.parametrize(
    ("address", "cluster"),
    [
        ("10.1.2.3", "ten"),
        ("192.0.2.7", "one"),
        ("192.0.2.8", None),
        ("2001:db8::1", "one"),
        ("2001:db9::1", None),
        ("", None),
    ],
)
def test_a_route_serves_its_destination_subnets_and_no_other_address(address: str, cluster: str | None) -> None:
    route = SUBNETS.find(address)
    assert (route.cluster_key(0.5) if route is not None else None) == cluster


def test_a_route_without_subnets_serves_every_address_and_unix_sockets() -> None:
    table = L4Table([to("all")])
    assert [table.find(address) is not None for address in ("127.0.0.1", "::1", "")] == [True, True, True]


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("a.b.example", "exact"),
        ("A.B.Example", "exact"),
        ("c.b.example", "long"),
        ("c.example", "short"),
        ("example", "rest"),
        ("", "rest"),
    ],
)
def test_the_most_specific_server_name_wins(name: str, cluster: str) -> None:
    table = L4Table(
        [
            to("rest"),
            to("short", names=("*.example",)),
            to("long", names=("*.b.example",)),
            to("exact", names=("a.b.example",)),
        ]
    )
    route = table.find_by_name("127.0.0.1", name)
    assert route is not None
    assert route.cluster_key(0.0) == cluster


def test_a_server_name_outside_the_routes_subnets_finds_nothing() -> None:
    table = L4Table([to("far", names=("a.b",), subnets=("10.0.0.0/8",))])
    assert table.find_by_name("127.0.0.1", "a.b") is None


def test_weights_split_and_zero_gets_nothing() -> None:
    clusters = tuple(WeightedCluster(cluster_key=key, weight=weight) for key, weight in (("a", 3), ("b", 0), ("c", 1)))
    route = L4Table([TcpRoute(clusters=clusters)]).find("")
    assert route is not None
    keys = [route.cluster_key(draw / 1000) for draw in range(1000)]
    assert (keys.count("a"), keys.count("b"), keys.count("c")) == (750, 0, 250)
