import asyncio
from dataclasses import replace

from meshproxy.control.health import EndpointHealth
from meshproxy.control.messages import Health, IntervalCounts, Results
from meshproxy.model.cluster import Cluster, Discovery, OutlierPolicy
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints
from meshproxy.snapshot.snapshot import Snapshot

POLICY = OutlierPolicy(consecutive_5xx=3, interval_s=3600.0, max_ejection_percent=100)


def group(*ports: int) -> tuple[LocalityEndpoints, ...]:
    return (LocalityEndpoints(endpoints=tuple(Endpoint(address="10.0.0.1", port=port) for port in ports)),)


def snapshot(*ports: int, outlier: OutlierPolicy | None = POLICY) -> Snapshot:
    cluster = Cluster(
        name="a",
        key="a",
        service_host="a.example",
        service_name="a",
        service_namespace="default",
        port=80,
        localities=group(*ports),
        outlier=outlier,
    )
    return Snapshot(version="1", clusters={"a": cluster})


class Judge:
    """EndpointHealth and what it told the workers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.heard = asyncio.Event()
        self.resolved: tuple[LocalityEndpoints, ...] = ()
        self.health = EndpointHealth(self.tell, self.localities_of, asyncio.get_running_loop())

    def tell(self, message: Health) -> None:
        self.told.extend((endpoint.rpartition(":")[2], word) for _, endpoint, word in message.verdicts)
        self.heard.set()

    def localities_of(self, cluster: Cluster) -> tuple[LocalityEndpoints, ...]:
        return self.resolved if cluster.discovery is Discovery.STRICT_DNS else cluster.localities

    def fail(self, port: int, times: int = 1, code: int = 500) -> None:
        for _ in range(times):
            self.health.on_results(Results((("a", f"10.0.0.1:{port}", code),)))


async def test_failures_reported_by_any_worker_add_up() -> None:
    judge = Judge()
    judge.health.follow(snapshot(1, 2))
    judge.fail(1)
    assert judge.told == [("1", "suspect")]
    judge.fail(1, times=2)
    assert judge.told[1:] == [("1", "eject")]
    assert judge.health.by_cluster() == {"a": {"10.0.0.1:1": "ejected"}}
    assert judge.health.ejections == {"a": 1}
    judge.health.close()


async def test_a_reload_keeps_counts_and_verdicts() -> None:
    judge = Judge()
    judge.health.follow(snapshot(1, 2))
    judge.fail(1, times=3)
    judge.fail(2, times=2)
    judge.health.follow(snapshot(2, 1, 3))
    judge.fail(2)
    assert judge.told[-1] == ("2", "eject")
    assert ("a", "10.0.0.1:1", "eject") in judge.health.now()
    judge.health.close()


async def test_what_was_said_of_an_endpoint_ends_when_it_leaves() -> None:
    judge = Judge()
    judge.health.follow(snapshot(1, 2))
    judge.fail(1, times=3)
    judge.health.follow(snapshot(2))
    assert judge.told[-1] == ("1", "restore")
    assert judge.health.now() == ()
    judge.health.close()


async def test_a_policy_that_is_taken_away_restores_what_it_ejected() -> None:
    judge = Judge()
    judge.health.follow(snapshot(1, 2))
    judge.fail(1, times=3)
    judge.health.follow(snapshot(1, 2, outlier=None))
    assert judge.told[-1] == ("1", "restore")
    judge.fail(1, times=9)
    assert judge.told[-1] == ("1", "restore")
    judge.health.close()


async def test_reports_of_clusters_that_are_gone_are_ignored() -> None:
    judge = Judge()
    judge.health.follow(snapshot(1))
    judge.fail(1)
    judge.health.follow(Snapshot(version="2"))
    judge.fail(1, times=9)
    judge.health.on_counts(IntervalCounts((("a", "10.0.0.1:1", 100, 1),)))
    assert judge.told == [("1", "suspect")]
    judge.health.close()


async def test_endpoints_that_dns_gives_later_are_judged() -> None:
    judge = Judge()
    before = snapshot()
    cluster = replace(before.clusters["a"], discovery=Discovery.STRICT_DNS)
    judge.health.follow(replace(before, clusters={"a": cluster}))
    judge.fail(1, times=3)
    assert judge.told == []
    judge.resolved = group(1)
    judge.health.resolved("a")
    judge.fail(1, times=3)
    assert judge.told[-1] == ("1", "eject")
    judge.health.close()


async def test_sweeps_restore_when_the_time_is_up() -> None:
    judge = Judge()
    policy = replace(POLICY, interval_s=0.001, base_ejection_s=0.0)
    judge.health.follow(snapshot(1, outlier=policy))
    judge.fail(1, times=3)
    judge.heard.clear()
    async with asyncio.timeout(5):
        await judge.heard.wait()
    assert judge.told[-1] == ("1", "restore")
    judge.health.close()
