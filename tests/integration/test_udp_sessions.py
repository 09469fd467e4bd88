"""UDP through a live worker: datagrams both ways, one endpoint a session, and what happens when it is gone."""

import asyncio
import json
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import CircuitLimits, LbPolicy, Protocol, TlsMode, UpstreamTls
from meshproxy.model.endpoint import Endpoint, Locality, LocalityEndpoints
from meshproxy.model.listener import AccessLogPolicy, Direction, MtlsMode
from meshproxy.policy.outlier import CONNECT_FAILED, TIMED_OUT
from meshproxy.proxy.udp_session import SILENT_DATAGRAMS
from meshproxy.telemetry.access_log import AccessLog
from meshproxy.telemetry.recorder import ClusterCounters, ListenerCounters
from tests.support.datagrams import Downstream, Upstream, unused_udp_port
from tests.support.live_worker import LiveWorker, until
from tests.support.proxy_process import ProxyProcess

KEY = "outbound|53/udp||a.example"


def listen(live: LiveWorker, *upstreams: tuple[str, int], host: str = "127.0.0.1", **fields: Any) -> int:
    """fields: of the cluster."""
    return live.listen_udp(live.cluster(upstreams, KEY, protocol=Protocol.UDP, **fields), host)


def listener(live: LiveWorker) -> ListenerCounters:
    (only,) = live.worker.listeners.values()
    return only.runtime.counters


def cluster(live: LiveWorker) -> ClusterCounters:
    return live.worker.state.recorder.cluster(KEY, KEY)


async def looked_at(live: LiveWorker) -> None:
    """Until the one session is looked at again, and what it moved is counted."""
    counters = listener(live)

    def counted() -> int:
        return counters.udp_downstream_sess_rx_datagrams + counters.udp_downstream_sess_tx_datagrams

    before = counted()
    await until(lambda: counted() > before)


async def nothing_left(live: LiveWorker) -> None:
    await until(lambda: live.open_downstreams() == live.open_upstreams() == 0)
    assert live.worker.state.open_connections == 0
    for one in live.clusters():
        assert one.connections == one.counters.upstream_cx_active == 0
        assert all(endpoint.active_requests == 0 for endpoint in one.endpoints.values())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagrams_pass_both_ways_as_they_came(host: str) -> None:
    async with Upstream(host=host) as upstream, LiveWorker() as live:
        async with Downstream(listen(live, upstream.address, host=host), host) as client:
            for data in (b"hello", b"", os.urandom(1200), os.urandom(65000)):
                assert await client.ask(data) == data
        assert len(upstream.senders) == 1


async def test_ipv4_downstreams_reach_an_ipv6_endpoint() -> None:
    async with Upstream(host="::1") as upstream, LiveWorker() as live:
        async with Downstream(listen(live, upstream.address)) as client:
            assert await client.ask(b"hello") == b"hello"


@pytest.mark.parametrize(("bound", "asked"), [("0.0.0.0", "127.0.0.2"), ("0.0.0.0", "127.0.0.1"), ("::", "::1")])
async def test_an_answer_comes_from_the_address_that_was_asked(bound: str, asked: str) -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        port = listen(live, upstream.address, host=bound)
        async with Downstream(port, asked) as client:  # connected: it takes nothing from elsewhere
            assert await client.ask(b"one") == b"one"
            assert await client.ask(b"two") == b"two"
        assert len(upstream.senders) == 1


# ── one endpoint a session ──


async def test_a_session_keeps_its_endpoint_and_sessions_share_the_endpoints() -> None:
    async with Upstream("a") as a, Upstream("b") as b, Upstream("c") as c, LiveWorker() as live:
        port = listen(live, a.address, b.address, c.address)
        names = []
        for _ in range(6):
            async with Downstream(port) as client:
                answers = {await client.ask(b"x") for _ in range(5)}
                assert len(answers) == 1
                names += answers
        assert sorted(names) == [b"a:x", b"a:x", b"b:x", b"b:x", b"c:x", b"c:x"]
        assert [len(upstream.senders) for upstream in (a, b, c)] == [2, 2, 2]


async def test_sessions_follow_the_weights_of_localities() -> None:
    async with Upstream("near") as near, Upstream("far") as far, LiveWorker() as live:
        localities = tuple(
            LocalityEndpoints(
                locality=Locality("r1", zone),
                weight=weight,
                endpoints=(Endpoint(address=upstream.address[0], port=upstream.address[1]),),
            )
            for zone, weight, upstream in (("z1", 80, near), ("z2", 20, far))
        )
        live.cluster([], KEY, protocol=Protocol.UDP, lb=LbPolicy(is_locality_weighted=True), localities=localities)
        port = live.listen_udp(KEY)
        async with AsyncExitStack() as stack:  # all at once, or ports would be used again
            for _ in range(500):
                client = await stack.enter_async_context(Downstream(port))
                await client.ask(b"x")
        assert len(near.senders) + len(far.senders) == 500
        assert 355 < len(near.senders) < 445  # five standard deviations


# ── endpoints that are gone ──


async def test_a_session_moves_on_when_nobody_listens_at_its_endpoint() -> None:
    async with Upstream("b") as b, LiveWorker() as live:
        gone = ("127.0.0.1", unused_udp_port())
        reports = live.reports()
        port = listen(live, gone, b.address)
        async with Downstream(port) as client, Downstream(port) as other:
            for each in (client, other):  # one of them at least begins at the one that is gone
                assert await each.ask_until_answered(b"x") == b"b:x"
        assert (KEY, f"127.0.0.1:{gone[1]}", CONNECT_FAILED) in reports
        assert cluster(live).udp_sess_rx_errors >= 1
        assert [endpoint.active_requests for endpoint in live.endpoints()] == [0, 2]


async def test_an_endpoint_that_is_the_only_one_is_asked_again() -> None:
    port = unused_udp_port()
    async with LiveWorker() as live, Downstream(listen(live, ("127.0.0.1", port))) as client:
        client.send(b"lost")
        await until(lambda: cluster(live).udp_sess_rx_errors == 1)
        async with Upstream("a", port=port):
            assert await client.ask_until_answered(b"x") == b"a:x"
        assert listener(live).udp_downstream_sess_total == 1


async def test_a_session_leaves_an_endpoint_that_is_ejected_and_stays_where_it_went() -> None:
    async with Upstream("a") as a, Upstream("b") as b, LiveWorker() as live:
        async with Downstream(listen(live, a.address, b.address)) as client:
            first = (await client.ask(b"x"))[:1].decode()
            key = "{}:{}".format(*(a if first == "a" else b).address)
            live.worker.on_message(m.Health(((KEY, key, "eject"),)), None)
            other = "b" if first == "a" else "a"
            assert await client.ask(b"x") == other.encode() + b":x"
            live.worker.on_message(m.Health(((KEY, key, "restore"),)), None)
            assert await client.ask(b"x") == other.encode() + b":x"
        assert listener(live).udp_downstream_sess_total == 1
        assert live.tcp(request_protocol="udp")[:2] == (2, 1)


async def test_a_session_leaves_an_endpoint_that_is_removed() -> None:
    async with Upstream("a") as a, Upstream("b") as b, LiveWorker() as live:
        async with Downstream(listen(live, a.address)) as client:
            assert await client.ask(b"x") == b"a:x"
            live.cluster([b.address], KEY, protocol=Protocol.UDP)
            assert await client.ask(b"x") == b"b:x"
            live.cluster([], KEY, protocol=Protocol.UDP)
            client.send(b"lost")
            await nothing_left(live)
            live.cluster([a.address], KEY, protocol=Protocol.UDP)
            assert await client.ask_until_answered(b"x") == b"a:x"


async def test_silence_of_an_endpoint_that_answers_others_is_a_failure() -> None:
    async with Upstream("a", is_silent=True) as a, LiveWorker() as live:
        reports = live.reports()
        port = listen(live, a.address, idle_timeout_s=0.1)  # looked at as often
        async with Downstream(port) as client:
            for _ in range(10):
                for _ in range(SILENT_DATAGRAMS):
                    client.send(b"one way")
                await looked_at(live)
            assert reports == []
            a.is_silent = False
            assert await client.ask_until_answered(b"x") in (b"a:x", b"a:one way")
            a.is_silent = True

            def is_reported() -> bool:
                client.send(b"both ways")
                return bool(reports)

            await until(is_reported)
            assert set(reports) == {(KEY, "{}:{}".format(*a.address), TIMED_OUT)}


# ── limits and refusals ──


async def test_a_session_on_which_nothing_moves_ends() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        async with Downstream(listen(live, upstream.address, idle_timeout_s=0.1)) as client:
            assert await client.ask(b"four") == b"four"
            await nothing_left(live)
            counters = listener(live)
            assert (counters.udp_idle_timeout, counters.udp_downstream_sess_active) == (1, 0)
            assert (counters.udp_downstream_sess_rx_datagrams, counters.udp_downstream_sess_rx_bytes) == (1, 4)
            assert (counters.udp_downstream_sess_tx_datagrams, counters.udp_downstream_sess_tx_bytes) == (1, 4)
            assert (cluster(live).udp_sess_tx_datagrams, cluster(live).udp_sess_rx_datagrams) == (1, 1)
            assert live.tcp(request_protocol="udp", response_flags="-") == (1, 1, 4, 4)
            assert await client.ask(b"five") == b"five"
        assert len(upstream.senders) == 2


async def test_what_comes_from_the_upstream_alone_keeps_a_session() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        async with Downstream(listen(live, upstream.address, idle_timeout_s=0.2)) as client:
            await client.ask(b"x")
            (session,) = upstream.senders
            for _ in range(10):
                upstream.say(b"news", session)
                assert await client.answer() == b"news"
                await looked_at(live)
            assert listener(live).udp_downstream_sess_total == 1


async def test_sessions_beyond_the_listeners_limit_are_dropped() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        port = live.listen_udp(live.cluster([upstream.address], KEY, protocol=Protocol.UDP), max_connections=2)
        async with Downstream(port) as first, Downstream(port) as second, Downstream(port) as third:
            assert await first.ask(b"1") == b"1"
            assert await second.ask(b"2") == b"2"
            third.send(b"3")
            await until(lambda: listener(live).downstream_cx_overflow == 1)
            assert await first.ask(b"1") == b"1"
            assert not third.has_answer and len(upstream.senders) == 2


async def test_sessions_beyond_the_clusters_limit_are_dropped() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        port = listen(live, upstream.address, limits=CircuitLimits(max_connections=1))
        async with Downstream(port) as first, Downstream(port) as second:
            assert await first.ask(b"1") == b"1"
            second.send(b"2")
            await until(lambda: cluster(live).upstream_cx_overflow == 1)
            assert not second.has_answer


@pytest.mark.parametrize("mode", [MtlsMode.PERMISSIVE, MtlsMode.DISABLE])
async def test_plain_datagrams_pass_where_mutual_tls_is_not_strict(mode: MtlsMode) -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        key = live.cluster([upstream.address], KEY, protocol=Protocol.UDP)
        async with Downstream(live.listen_udp(key, direction=Direction.INBOUND, mtls=mode)) as client:
            assert await client.ask(b"x") == b"x"


async def test_plain_datagrams_are_dropped_where_mutual_tls_is_strict() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        key = live.cluster([upstream.address], KEY, protocol=Protocol.UDP)
        port = live.listen_udp(key, direction=Direction.INBOUND, mtls=MtlsMode.STRICT)
        async with Downstream(port) as client:
            for _ in range(3):
                client.send(b"x")
            await until(lambda: listener(live).plaintext_refused == 3)
            assert not client.has_answer and upstream.received == []


@pytest.mark.parametrize("mode", [TlsMode.ISTIO_MUTUAL, TlsMode.SIMPLE])
async def test_datagrams_that_must_be_encrypted_are_dropped(mode: TlsMode) -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        async with Downstream(listen(live, upstream.address, tls=UpstreamTls(mode=mode))) as client:
            client.send(b"secret")
            await until(lambda: cluster(live).upstream_cx_connect_fail > 0)
            assert not client.has_answer and upstream.received == []
        await nothing_left(live)


async def test_datagrams_that_have_nowhere_to_go_are_dropped() -> None:
    async with LiveWorker() as live:
        async with Downstream(live.listen_udp(None)) as client:
            client.send(b"x")
            await until(lambda: listener(live).udp_downstream_sess_no_route == 1)
    async with LiveWorker() as live:
        async with Downstream(listen(live)) as client:
            client.send(b"x")
            await until(lambda: cluster(live).upstream_cx_none_healthy == 1)
        assert listener(live).udp_downstream_sess_total == 0


# ── the end of a listener, the log ──


async def test_draining_lets_sessions_go_on_and_begin_until_nothing_moves() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        port = listen(live, upstream.address, idle_timeout_s=0.2)
        async with Downstream(port) as old, Downstream(port) as new:
            assert await old.ask(b"1") == b"1"
            live.worker.on_message(m.Drain(deadline_s=5.0), None)
            assert await old.ask(b"2") == b"2"
            assert await new.ask(b"3") == b"3"
            async with asyncio.timeout(5):
                await live.worker.stopped
            with pytest.raises(ConnectionRefusedError):  # nobody listens any more
                await old.ask(b"4")
                await old.ask(b"5")


async def test_draining_ends_at_its_deadline() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        async with Downstream(listen(live, upstream.address)) as client:
            assert await client.ask(b"1") == b"1"
            live.worker.on_message(m.Drain(deadline_s=0.1), None)
            async with asyncio.timeout(5):
                await live.worker.stopped
            await nothing_left(live)


async def test_a_listener_that_is_removed_or_changed_ends_its_sessions() -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        key = live.cluster([upstream.address], KEY, protocol=Protocol.UDP)
        port = live.listen_udp(key, direction=Direction.INBOUND, mtls=MtlsMode.PERMISSIVE)
        async with Downstream(port) as client:
            assert await client.ask(b"1") == b"1"
            live.listen_udp(key, direction=Direction.INBOUND, mtls=MtlsMode.STRICT, port=port)
            client.send(b"2")
            await until(lambda: listener(live).plaintext_refused == 1)
            live.put(m.Remove("listener", f"127.0.0.1_{port}_udp"))
            await nothing_left(live)
            with pytest.raises(ConnectionRefusedError):
                await client.ask(b"3")


async def test_a_session_is_one_line_of_the_access_log(tmp_path: Path) -> None:
    async with Upstream() as upstream, LiveWorker() as live:
        port = listen(live, upstream.address, idle_timeout_s=0.1)
        log = live.worker.state.access_log = AccessLog(AccessLogPolicy(path=str(tmp_path / "log"), encoding="json"))
        async with Downstream(port) as client:
            await client.ask(b"four")
            await nothing_left(live)
        log.close()
        entry = json.loads((tmp_path / "log").read_text())
        assert (entry["protocol"], entry["bytes_received"], entry["bytes_sent"]) == ("UDP", 4, 4)
        assert entry["upstream_cluster"] == KEY
        assert entry["upstream_host"] == "{}:{}".format(*upstream.address)
        assert entry["downstream_remote_address"] == client.address
        assert entry["duration"] >= 100


# ── the whole proxy ──


def mesh(port: int, upstreams: Sequence[tuple[str, int]]) -> str:
    endpoints = "\n".join(f"  - {{address: {host}, ports: {{udp: {number}}}}}" for host, number in upstreams)
    return f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: a}}
spec:
  hosts: [a.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports:
  - {{number: {port}, name: udp, protocol: UDP}}
  endpoints:
{endpoints}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: a}}
spec:
  host: a.example
  trafficPolicy:
    loadBalancer: {{simple: ROUND_ROBIN}}
    outlierDetection: {{consecutive5xxErrors: 3, baseEjectionTime: 60s}}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: default}}
spec:
  egress:
  - port: {{number: {port}, protocol: UDP, name: udp}}
    bind: 127.0.0.1
    captureMode: NONE
    hosts: ["*/*"]
"""


async def test_an_endpoint_where_nobody_listens_is_ejected_for_all_workers(tmp_path: Path) -> None:
    port = unused_udp_port()
    gone = ("127.0.0.1", unused_udp_port())
    (tmp_path / "conf").mkdir()
    async with Upstream("a") as a:
        (tmp_path / "conf" / "mesh.yaml").write_text(mesh(port, [gone, a.address]))
        with ProxyProcess(tmp_path, "--workers", "2", module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: 2 workers")
            ejected = asyncio.create_task(asyncio.to_thread(proxy.wait_for, f"127.0.0.1:{gone[1]} of"))
            async with AsyncExitStack() as stack:
                while not ejected.done():
                    client = await stack.enter_async_context(Downstream(port))
                    assert await client.ask_until_answered(b"x") == b"a:x"
                assert "is ejected" in await ejected
                at_once = 0
                while at_once < 20:  # from now on, or as soon as both workers have heard of it
                    client = await stack.enter_async_context(Downstream(port))
                    client.send(b"x")
                    try:
                        at_once += await client.answer(0.5) == b"a:x"
                    except TimeoutError:
                        at_once = 0


async def test_datagrams_sent_while_a_worker_is_replaced_are_answered(tmp_path: Path) -> None:
    port = unused_udp_port()
    (tmp_path / "conf").mkdir()
    async with Upstream("a") as a:
        (tmp_path / "conf" / "mesh.yaml").write_text(mesh(port, [a.address]))
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: 1 workers")
            async with Downstream(port) as client:
                assert await client.ask(b"before") == b"a:before"
                os.kill(proxy.children()["mesh-worker-0"], signal.SIGKILL)
                client.send(b"meanwhile")
                assert await client.answer() == b"a:meanwhile"
                assert len(a.senders) == 2


async def test_a_session_is_listed_among_the_connections(tmp_path: Path) -> None:
    port = unused_udp_port()
    (tmp_path / "conf").mkdir()
    async with Upstream("a") as a:
        (tmp_path / "conf" / "mesh.yaml").write_text(mesh(port, [a.address]))
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: 1 workers")
            async with Downstream(port) as client:
                await client.ask(b"x")
                url = f"http://127.0.0.1:{proxy.ports['admin']}/connections"
                (listed,) = json.loads(await asyncio.to_thread(lambda: urlopen(url).read()))["connections"]
                assert listed["listener"] == f"127.0.0.1_{port}_udp"
                assert client.address.rpartition(":")[2] in listed["downstream"]
