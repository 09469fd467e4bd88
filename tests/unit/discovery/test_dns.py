import asyncio
from collections.abc import Sequence

from meshproxy.discovery.dns import DnsResolver, with_addresses
from meshproxy.model.cluster import Cluster, Discovery
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints


def cluster(*addresses: str, key: str = "a", port: int = 80) -> Cluster:
    return Cluster(
        name=key,
        key=key,
        service_host="a.example",
        service_name="a",
        service_namespace="default",
        port=80,
        discovery=Discovery.STRICT_DNS,
        localities=(LocalityEndpoints(endpoints=tuple(Endpoint(address=address, port=port) for address in addresses)),),
    )


def addresses_of(localities: Sequence[LocalityEndpoints]) -> list[str]:
    return [endpoint.key for group in localities for endpoint in group.endpoints]


class Zone:
    """A scripted resolver: each question takes the next answer, the last one for ever."""

    def __init__(self, **names: list[object]) -> None:
        self.names = names
        self.asked: list[str] = []

    async def resolve(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        answers = self.names[name]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, list)
        return answer


class Answers:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, list[str]]] = asyncio.Queue()

    def __call__(self, key: str, localities: tuple[LocalityEndpoints, ...]) -> None:
        self.queue.put_nowait((key, addresses_of(localities)))

    async def next(self) -> tuple[str, list[str]]:
        async with asyncio.timeout(5):
            return await self.queue.get()


async def test_each_address_of_a_name_is_an_endpoint() -> None:
    zone, answers = Zone(**{"a.example": [["10.0.0.2", "10.0.0.1"]]}), Answers()
    resolver = DnsResolver(answers, zone.resolve)
    resolver.follow([cluster("a.example", "10.9.9.9")])
    assert await answers.next() == ("a", ["10.0.0.1:80", "10.0.0.2:80", "10.9.9.9:80"])
    resolver.close()


async def test_a_failing_resolver_changes_nothing() -> None:
    zone = Zone(**{"a.example": [["10.0.0.1"], OSError("SERVFAIL"), OSError("SERVFAIL"), ["10.0.0.2"]]})
    answers = Answers()
    resolver = DnsResolver(answers, zone.resolve, refresh_s=0.001)
    resolver.follow([cluster("a.example")])
    assert await answers.next() == ("a", ["10.0.0.1:80"])
    assert await answers.next() == ("a", ["10.0.0.2:80"])
    assert len(zone.asked) >= 4
    resolver.close()


async def test_a_name_two_clusters_share_is_asked_for_once() -> None:
    zone, answers = Zone(**{"a.example": [["10.0.0.1"]]}), Answers()
    resolver = DnsResolver(answers, zone.resolve)
    resolver.follow([cluster("a.example", key="a"), cluster("a.example", key="b", port=81)])
    assert sorted([await answers.next(), await answers.next()]) == [("a", ["10.0.0.1:80"]), ("b", ["10.0.0.1:81"])]
    assert zone.asked == ["a.example"]
    resolver.close()


async def test_a_changed_cluster_is_answered_from_what_is_known() -> None:
    zone, answers = Zone(**{"a.example": [["10.0.0.1"]]}), Answers()
    resolver = DnsResolver(answers, zone.resolve)
    resolver.follow([cluster("a.example")])
    await answers.next()
    resolver.follow([cluster("a.example", port=8080)])
    assert await answers.next() == ("a", ["10.0.0.1:8080"])
    assert zone.asked == ["a.example"]
    resolver.follow([])
    assert answers.queue.empty()
    resolver.close()


def test_names_without_an_answer_fall_away() -> None:
    localities = with_addresses(cluster("a.example", "b.example", "/run/b.sock"), {"b.example": ("::1",)})
    assert addresses_of(localities) == ["::1:80", "/run/b.sock:80"]


async def test_the_system_resolver_knows_localhost() -> None:
    answers = Answers()
    resolver = DnsResolver(answers)
    resolver.follow([cluster("localhost")])
    assert await answers.next() == ("a", ["127.0.0.1:80"])
    resolver.close()


async def test_settled_waits_for_the_first_outcome_of_each_name_whatever_it_is() -> None:
    zone = Zone(**{"a.example": [["10.0.0.1"]], "b.example": [OSError("NXDOMAIN")]})
    answers = Answers()
    resolver = DnsResolver(answers, zone.resolve)
    resolver.follow([cluster("a.example", "b.example")])
    await resolver.settled(5.0)
    assert sorted(zone.asked) == ["a.example", "b.example"]
    assert answers.queue.get_nowait() == ("a", ["10.0.0.1:80"])
    resolver.close()


async def test_settled_does_not_wait_for_a_resolver_that_hangs() -> None:
    async def hang(_: str) -> Sequence[str]:
        await asyncio.Event().wait()
        return []

    resolver = DnsResolver(Answers(), hang)
    resolver.follow([cluster("a.example")])
    await resolver.settled(0.001)
    resolver.close()
