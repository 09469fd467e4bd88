"""Between two proxies of the mesh: QUIC where it gets through, TCP where it does not, and nothing lost either way."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from random import Random
from time import monotonic
from typing import Any

import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from meshproxy.model.route import RetryPolicy, Route, WeightedCluster
from meshproxy.upstream import connect, connection_h3
from meshproxy.upstream.cluster_runtime import EndpointRuntime
from meshproxy.upstream.transport_choice import BACK_OFF_S
from tests.support.certificates import CLIENT_AUTH, Authority, Leaf
from tests.support.client import Client, get, post
from tests.support.http2_client import Http2Client, headers_frame, request, rst_frame
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin

AUTHORITY = Authority()
IMPOSTOR = Authority("Test CA")
RSU = "spiffe://cluster.local/ns/default/sa/rsu"
HEAD_START_S = 1.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a QUIC handshake takes longer than the 0.3 s that it has before TCP joins the race."""
    monkeypatch.setattr(connect, "TCP_AFTER_S", HEAD_START_S)


def give(live: LiveWorker, leaf: Leaf, workload_id: str = "default/app", account: str = "default") -> None:
    live.put(m.PutWorkload(live.workload(workload_id, account)))
    live.worker.on_message(m.PutCertificates(workload_id, leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None)


class Pair:
    """A proxy in front of the workload rsu, and one that sends the workload app's requests to it."""

    def __init__(self, server: LiveWorker, client: LiveWorker, origin: Origin) -> None:
        self.server, self.client, self.origin = server, client, origin
        give(client, AUTHORITY.leaf("default", "default"))
        self.show(AUTHORITY.leaf("default", "rsu"))

    def show(self, leaf: Leaf) -> None:
        """What the server's proxy shows."""
        give(self.server, leaf, "default/rsu", "rsu")
        self._inbound = self.server.cluster([("127.0.0.1", self.origin.port)], "inbound|80||")

    def listen_tcp(self) -> int:
        """On a port that is free for UDP as well."""
        where: dict[str, Any] = {"direction": Direction.INBOUND, "mtls": MtlsMode.STRICT, "workload_id": "default/rsu"}
        while True:
            port = self.server.listen(self._inbound, **where)
            with contextlib.suppress(OSError), black_hole(port):
                return port

    def listen_quic(self, port: int = 0) -> int:
        where: dict[str, Any] = {"direction": Direction.INBOUND, "mtls": MtlsMode.STRICT, "workload_id": "default/rsu"}
        return self.server.listen_quic(self._inbound, port=port, **where)

    def towards(self, port: int, retries: int = 0, **fields: Any) -> int:
        cluster = self.client.cluster(
            [("127.0.0.1", port)],
            "outbound|80||rsu.example",
            tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL),
            endpoint={"speaks_mtls": True, "spiffe_ids": (RSU,)},
            **{"offers_http3": True, **fields},
        )
        retry = RetryPolicy(attempts=retries, on=frozenset({"reset"})) if retries else None
        return self.client.listen(
            cluster, routes=(Route(clusters=(WeightedCluster(cluster_key=cluster),), retry=retry),)
        )

    @property
    def endpoint(self) -> EndpointRuntime:
        (endpoint,) = self.client.endpoints()
        return endpoint

    def connections(self) -> list[str]:
        return sorted(type(connection).__name__ for connection in self.endpoint.connections)


@pytest.fixture
async def pair() -> Any:
    async with Origin() as origin, LiveWorker() as server, LiveWorker() as client:
        yield Pair(server, client, origin)


@contextlib.contextmanager
def black_hole(port: int) -> Iterator[None]:
    """A socket that takes datagrams and that nobody reads."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", port))
        yield


async def ask(port: int, times: int = 1) -> list[int]:
    """Statuses of so many requests at once."""

    async def one() -> int:
        async with Client(port) as client:
            client.send(get())
            return (await client.answer()).status

    return await asyncio.gather(*(one() for _ in range(times)))


async def test_quic_is_taken_where_both_are_there(pair: Pair) -> None:
    port = pair.towards(pair.listen_quic(pair.listen_tcp()))
    assert await ask(port, 20) == [200] * 20
    assert pair.connections() == ["UpstreamH3"]
    assert pair.endpoint.http3 is not None and pair.endpoint.http3.may_try(monotonic())
    counters = pair.endpoint.cluster.counters
    assert (counters.upstream_cx_total, counters.upstream_cx_http3_total, counters.upstream_http3_broken) == (1, 1, 0)


async def test_without_the_annotation_there_is_no_quic(pair: Pair) -> None:
    port = pair.towards(pair.listen_quic(pair.listen_tcp()), offers_http3=False)
    assert await ask(port) == [200]
    assert pair.connections() == ["UpstreamH2"]


async def test_a_closed_udp_port_costs_no_request_and_no_wait(pair: Pair) -> None:
    port = pair.towards(pair.listen_tcp())
    begun = monotonic()
    assert await ask(port, 50) == [200] * 50
    assert monotonic() - begun < HEAD_START_S + 0.5
    assert pair.connections() == ["UpstreamH2"]
    assert len(pair.origin.requests) == 50
    counters = pair.endpoint.cluster.counters
    assert (counters.upstream_cx_total, counters.upstream_cx_http3_total, counters.upstream_http3_broken) == (1, 0, 1)
    assert counters.upstream_cx_connect_fail == 0


async def test_datagrams_that_vanish_cost_one_head_start_once(pair: Pair) -> None:
    port = pair.towards(tcp := pair.listen_tcp())
    with black_hole(tcp):
        begun = monotonic()
        assert await ask(port, 50) == [200] * 50
        assert HEAD_START_S <= monotonic() - begun < HEAD_START_S + 1.0
        assert pair.connections() == ["UpstreamH2"]
        assert len(pair.origin.requests) == 50
        tries = pair.endpoint.http3
        assert tries is not None and BACK_OFF_S - 5 < tries.retry_at - monotonic() <= BACK_OFF_S
        # Another connection is opened without a head start.
        pair.endpoint.close_idle()
        await until(lambda: not pair.endpoint.connections)
        begun = monotonic()
        assert await ask(port) == [200]
        assert monotonic() - begun < HEAD_START_S
    assert pair.endpoint.cluster.connections == 1


async def test_a_connect_timeout_shorter_than_the_head_start_leaves_time_for_tcp(pair: Pair) -> None:
    port = pair.towards(tcp := pair.listen_tcp(), connect_timeout_s=0.25)
    with black_hole(tcp):
        assert await ask(port, 10) == [200] * 10


class BadCable(asyncio.DatagramProtocol):
    """Between a client and a server: of a hundred datagrams three are lost, three late, three come twice."""

    def __init__(self, server_port: int) -> None:
        self._server = ("127.0.0.1", server_port)
        self._client: Any = None
        self._chance = Random(7)
        self.lost = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        if address != self._server:
            self._client = address
        to = self._client if address == self._server else self._server
        fate = self._chance.random()
        if fate < 0.03:
            self.lost += 1
        elif fate < 0.06:
            asyncio.get_running_loop().call_later(0.005, self._transport.sendto, data, to)
        else:
            self._transport.sendto(data, to)
            if fate < 0.09:
                self._transport.sendto(data, to)


async def test_nothing_is_lost_where_datagrams_are(pair: Pair) -> None:
    body = bytes(range(256)) * 256
    pair.origin.answer = lambda seen: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(seen.body) + seen.body
    loop = asyncio.get_running_loop()
    server = pair.listen_quic()
    cable, relay = await loop.create_datagram_endpoint(lambda: BadCable(server), local_addr=("127.0.0.1", 0))
    try:
        port = pair.towards(cable.get_extra_info("sockname")[1])

        async def one(number: int) -> None:
            async with Client(port) as client:
                for _ in range(4):
                    client.send(post(body, f"X-Number: {number}"))
                    answer = await client.answer()
                    assert (answer.status, answer.body) == (200, body)

        await asyncio.gather(*(one(number) for number in range(8)))
        assert relay.lost > 10
        assert pair.connections() == ["UpstreamH3"]
    finally:
        cable.close()


async def test_who_leaves_during_the_race_leaves_nothing_behind(pair: Pair) -> None:
    port = pair.towards(tcp := pair.listen_tcp())
    before, files = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    with black_hole(tcp):
        for turns in (0, 1, 2, 5):
            async with Http2Client(port, acks=True) as client:
                await client.handshake()
                client.send(headers_frame(1, request("/")))
                await until(lambda: bool(pair.client.endpoints() and pair.endpoint.cluster.connecting))
                for _ in range(turns):
                    await asyncio.sleep(0)
                client.send(rst_frame(1))
                await until(lambda: pair.endpoint.cluster.connections == 0)
    assert not pair.endpoint.connections
    assert pair.origin.requests == []
    await until(lambda: len(asyncio.all_tasks()) <= before and len(os.listdir("/proc/self/fd")) <= files)
    assert await ask(port) == [200]


async def test_quic_takes_over_when_the_back_off_has_passed_and_it_gets_through(pair: Pair) -> None:
    port = pair.towards(tcp := pair.listen_tcp())
    assert await ask(port) == [200]
    pair.listen_quic(tcp)
    tries = pair.endpoint.http3
    assert tries is not None
    assert await ask(port) == [200]
    assert pair.connections() == ["UpstreamH2"]
    tries.retry_at = monotonic()
    assert await ask(port, 10) == [200] * 10
    await until(lambda: pair.connections() == ["UpstreamH3"])
    assert await ask(port, 10) == [200] * 10
    assert pair.connections() == ["UpstreamH3"]
    assert pair.endpoint.cluster.connections == 1
    assert tries.may_try(monotonic())


async def test_a_back_off_that_passes_in_vain_is_twice_as_long(pair: Pair) -> None:
    port = pair.towards(pair.listen_tcp())
    assert await ask(port) == [200]
    tries = pair.endpoint.http3
    assert tries is not None
    tries.retry_at = monotonic()
    assert await ask(port) == [200]
    await until(lambda: tries.probe is None and tries.retry_at > monotonic() + BACK_OFF_S)
    assert tries.retry_at - monotonic() <= 2 * BACK_OFF_S
    assert pair.connections() == ["UpstreamH2"]


async def test_neither_there_is_one_failure(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    assert await ask(pair.towards(nobody), 10) == [503] * 10
    await until(lambda: pair.endpoint.cluster.connections == 0)
    assert pair.endpoint.connect_failures == 1
    assert not pair.endpoint.connections


async def test_a_server_that_says_goodbye_to_quic_is_reached_by_tcp(pair: Pair) -> None:
    port = pair.towards(udp := pair.listen_quic(pair.listen_tcp()))
    assert await ask(port) == [200]
    pair.server.worker._close_listener(f"127.0.0.1_{udp}_quic")
    await until(lambda: not pair.endpoint.connections)
    assert await ask(port, 10) == [200] * 10
    assert pair.connections() == ["UpstreamH2"]


async def test_a_server_whose_quic_is_gone_without_a_word_is_reached_by_tcp(pair: Pair) -> None:
    port = pair.towards(udp := pair.listen_quic(pair.listen_tcp()), idle_timeout_s=None)
    assert await ask(port) == [200]
    listener = pair.server.worker.listeners[f"127.0.0.1_{udp}_quic"]
    listener.pause()
    listener._sock.close()
    assert await ask(port) in ([200], [503])  # it may have been served before the end
    await until(lambda: not pair.endpoint.connections)
    assert await ask(port, 10) == [200] * 10
    assert pair.connections() == ["UpstreamH2"]


async def test_a_server_that_drains_loses_no_request(pair: Pair) -> None:
    port = pair.towards(udp := pair.listen_quic(pair.listen_tcp()))
    ends = asyncio.Event()

    async def keep_asking() -> list[int]:
        statuses = []
        async with Client(port) as client:
            while not ends.is_set():
                client.send(get())
                statuses.append((await client.answer()).status)
        return statuses

    asking = [asyncio.create_task(keep_asking()) for _ in range(8)]
    await until(lambda: len(pair.origin.requests) > 50)
    assert pair.connections() == ["UpstreamH3"]
    pair.server.worker.listeners[f"127.0.0.1_{udp}_quic"].drain()
    await until(lambda: pair.connections() == ["UpstreamH2"])
    served = len(pair.origin.requests)
    await until(lambda: len(pair.origin.requests) > served + 50)
    ends.set()
    statuses = [status for each in await asyncio.gather(*asking) for status in each]
    assert set(statuses) == {200}
    assert len(statuses) == len(pair.origin.requests)


async def test_removed_endpoints_close_their_quic_connections(pair: Pair) -> None:
    port = pair.towards(pair.listen_quic(pair.listen_tcp()))
    assert await ask(port) == [200]
    (listener,) = [each for name, each in pair.server.worker.listeners.items() if name.endswith("_quic")]
    assert len(listener.runtime.connections) == 1
    pair.towards(pair.listen_tcp())  # the cluster has another endpoint now
    await until(lambda: not listener.runtime.connections)
    assert pair.client.open_upstreams() == 0


async def test_a_worker_that_ends_closes_its_quic_connections(pair: Pair) -> None:
    port = pair.towards(pair.listen_quic(pair.listen_tcp()))
    assert await ask(port) == [200]
    (listener,) = [each for name, each in pair.server.worker.listeners.items() if name.endswith("_quic")]
    pair.client.worker.on_message(m.Drain(deadline_s=0.0, exits=True), None)
    await asyncio.wait_for(asyncio.shield(pair.client.worker.stopped), 5.0)
    await until(lambda: not listener.runtime.connections)


async def test_a_way_that_goes_silent_is_left_for_tcp(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_h3, "SILENCE_S", 0.2)
    port = pair.towards(udp := pair.listen_quic(pair.listen_tcp()), retries=1)
    assert await ask(port) == [200]
    pair.server.worker.listeners[f"127.0.0.1_{udp}_quic"].pause()
    assert await ask(port, 10) == [200] * 10
    assert pair.connections() == ["UpstreamH2"]
    assert pair.endpoint.http3 is not None and not pair.endpoint.http3.may_try(monotonic())
    assert pair.endpoint.cluster.connections == 1


WRONG = {
    "another workload": lambda: AUTHORITY.leaf("default", "other"),
    "another trust domain": lambda: AUTHORITY.leaf("default", "rsu", trust_domain="evil.example"),
    "another authority": lambda: IMPOSTOR.leaf("default", "rsu"),
    "self-signed": lambda: AUTHORITY.leaf("default", "rsu", is_self_signed=True),
    "expired": lambda: AUTHORITY.leaf("default", "rsu", expires_s=-60),
    "not yet valid": lambda: AUTHORITY.leaf("default", "rsu", starts_s=1800),
    "for clients only": lambda: AUTHORITY.leaf("default", "rsu", usages=(CLIENT_AUTH,)),
    "a CA's": lambda: AUTHORITY.leaf("default", "rsu", is_ca=True),
    "no SPIFFE": lambda: AUTHORITY.leaf("default", "rsu", uris=(), dns_names=("a.example",)),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("has_tcp", [False, True])
async def test_a_server_with_a_wrong_identity_gets_no_request(pair: Pair, name: str, has_tcp: bool) -> None:
    pair.show(WRONG[name]())
    port = pair.towards(pair.listen_quic(pair.listen_tcp() if has_tcp else 0))
    assert await ask(port, 3) == [503] * 3
    assert (pair.origin.connections, pair.origin.requests) == (0, [])
    await until(lambda: pair.endpoint.cluster.connections == 0)
    for where, listener in pair.server.worker.listeners.items():
        assert listener.runtime.counters.downstream_rq_total == 0
        if where.endswith("_quic"):  # where not even who we are has been told
            assert listener.runtime.counters.ssl_handshake == 0


async def test_a_client_without_a_place_in_the_mesh_is_refused_by_quic_too(pair: Pair) -> None:
    port = pair.towards(pair.listen_quic(pair.listen_tcp()))
    leaf = IMPOSTOR.leaf("default", "default")
    pair.client.worker.on_message(m.PutCertificates("default/app", leaf.chain_pem, leaf.key_pem, AUTHORITY.pem), None)
    assert await ask(port) == [503]
    assert pair.origin.requests == []


async def test_new_certificates_are_shown_on_the_next_connection(pair: Pair) -> None:
    port = pair.towards(pair.listen_quic(pair.listen_tcp()))
    assert await ask(port) == [200]
    first = next(iter(pair.endpoint.connections))
    give(pair.client, AUTHORITY.leaf("default", "default"))
    assert await ask(port) == [200]
    assert pair.connections() == ["UpstreamH3"]
    assert next(iter(pair.endpoint.connections)) is not first
