"""useClientProtocol, and ports whose protocol nobody says: the upstream hears the version the downstream speaks."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import CircuitLimits, Protocol, TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from tests.support.certificates import Authority
from tests.support.client import Client, get
from tests.support.http2_client import PREFACE, Http2Client, headers_frame, request
from tests.support.http2_origin import H2Answer, H2Origin, H2Request
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.raw_server import RawServer, pipe


@pytest.fixture
async def live() -> AsyncIterator[LiveWorker]:
    async with LiveWorker() as live:
        yield live


def answer(seen: H2Request) -> H2Answer:
    return H2Answer(b"two")


class Either:
    """One port in front of an HTTP/1.1 origin and an HTTP/2 one: the first bytes say which it is."""

    def __init__(self, origin: Origin, h2_origin: H2Origin) -> None:
        self._ports = {True: h2_origin.port, False: origin.port}
        self.front = RawServer(self._serve)
        self.versions: list[str] = []
        """Of each connection."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readexactly(3)
        is_http2 = PREFACE.startswith(first)
        self.versions.append("HTTP/2" if is_http2 else "HTTP/1.1")
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._ports[is_http2])
        up_writer.write(first)
        try:
            await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))
        finally:
            up_writer.close()


async def ask_http2(client: Http2Client, stream_id: int) -> bytes:
    client.send(headers_frame(stream_id, request()))
    return (await client.response(stream_id)).body


@pytest.mark.parametrize("cluster", [{"follows_client": True}, {"follows_client": True, "speaks_http2": True}])
async def test_each_downstream_is_passed_on_in_its_own_version(live: LiveWorker, cluster: dict[str, Any]) -> None:
    async with Origin() as origin, H2Origin(answer) as h2_origin:
        either = Either(origin, h2_origin)
        async with either.front as front:
            port = live.listen(live.cluster([("127.0.0.1", front.port)], **cluster))
            async with Client(port) as one, Http2Client(port) as two:
                await two.handshake()
                for stream_id in (1, 3):
                    assert (await one.ask(get())).body == b"ok"
                    assert await ask_http2(two, stream_id) == b"two"
            assert sorted(either.versions) == ["HTTP/1.1", "HTTP/2"]  # one connection each, used again
            async with Client(port) as one, Http2Client(port) as two:
                await two.handshake()
                assert await ask_http2(two, 1) == b"two"
                assert (await one.ask(get())).body == b"ok"
            assert len(either.versions) == 2
            assert live.pooled() == 1


async def test_many_at_the_same_time_get_connections_of_their_own_version(live: LiveWorker) -> None:
    async with Origin() as origin, H2Origin(answer) as h2_origin:
        either = Either(origin, h2_origin)
        async with either.front as front:
            port = live.listen(live.cluster([("127.0.0.1", front.port)], follows_client=True))

            async def one() -> bytes:
                async with Client(port) as client:
                    return (await client.ask(get())).body

            async def two() -> bytes:
                async with Http2Client(port) as client:
                    await client.handshake()
                    return await ask_http2(client, 1)

            bodies = await asyncio.gather(*(ask() for _ in range(20) for ask in (one, two)))
            assert bodies == [b"ok", b"two"] * 20
            assert either.versions.count("HTTP/2") == 1
        await until(lambda: live.open_upstreams() == 0)
        assert live.clusters()[0].connections == 0


async def test_an_idle_connection_of_one_version_gives_its_place_to_the_other(live: LiveWorker) -> None:
    async with Origin() as origin, H2Origin(answer) as h2_origin:
        either = Either(origin, h2_origin)
        async with either.front as front:
            limits = CircuitLimits(max_connections=1)
            port = live.listen(live.cluster([("127.0.0.1", front.port)], follows_client=True, limits=limits))
            async with Client(port) as one, Http2Client(port) as two:
                await two.handshake()
                assert (await one.ask(get())).body == b"ok"
                assert await ask_http2(two, 1) == b"two"


async def test_a_downstream_that_goes_while_it_waits_is_forgotten(live: LiveWorker) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    tls = UpstreamTls(mode=TlsMode.SIMPLE, insecure_skip_verify=True)
    async with RawServer(silent) as upstream:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], follows_client=True, tls=tls))
        async with Http2Client(port) as first, Http2Client(port) as second:
            for client in (first, second):
                await client.handshake()
                client.send(headers_frame(1, request()))
            await until(lambda: live.clusters()[0].active_requests == 2)
        await until(lambda: live.clusters()[0].active_requests == 0)
        await until(lambda: live.clusters()[0].connections == 0)
        assert not live.clusters()[0].connecting


async def test_ejection_takes_the_connections_of_both_versions(live: LiveWorker) -> None:
    async with Origin() as origin, H2Origin(answer) as h2_origin:
        either = Either(origin, h2_origin)
        async with either.front as front:
            port = live.listen(live.cluster([("127.0.0.1", front.port)], follows_client=True))
            async with Client(port) as one, Http2Client(port) as two:
                await two.handshake()
                assert (await one.ask(get())).body == b"ok"
                assert await ask_http2(two, 1) == b"two"
                (cluster,) = live.clusters()
                (key,) = cluster.endpoints
                cluster.set_health(key, "eject", 0.0)
                await until(lambda: live.open_upstreams() == 0)
                cluster.set_health(key, "restore", 0.0)
                assert (await one.ask(get())).body == b"ok"
                assert await ask_http2(two, 3) == b"two"
                assert live.pooled() == 1


async def test_a_port_of_no_protocol_carries_both_versions_and_what_is_neither(live: LiveWorker) -> None:
    async with Origin() as origin, H2Origin(answer) as h2_origin:
        either = Either(origin, h2_origin)
        async with either.front as front:
            key = live.cluster([("127.0.0.1", front.port)], protocol=Protocol.AUTO, follows_client=True)
            port = live.listen(key, protocol=Protocol.AUTO)
            async with Client(port) as one, Http2Client(port) as two:
                await two.handshake()
                assert (await one.ask(get())).body == b"ok"
                assert await ask_http2(two, 1) == b"two"
            async with Client(port) as other:
                other.send(b"\x00\x01\x02 bytes")
                await until(lambda: len(either.versions) == 3)


async def test_the_version_goes_through_two_proxies_of_a_mesh(live: LiveWorker) -> None:
    """Ports of no protocol all the way: without useClientProtocol two proxies would speak HTTP/2 to each other."""
    authority = Authority()
    for account in ("app", "rsu"):
        leaf = authority.leaf("default", account)
        live.put(m.PutWorkload(live.workload(f"default/{account}", account)))
        certificates = m.PutCertificates(f"default/{account}", leaf.chain_pem, leaf.key_pem, leaf.roots_pem)
        live.worker.on_message(certificates, None)
    auto: dict[str, Any] = {"protocol": Protocol.AUTO, "follows_client": True}
    async with Origin() as origin, H2Origin(answer) as h2_origin:
        either = Either(origin, h2_origin)
        async with either.front as front:
            app = live.cluster([("127.0.0.1", front.port)], "inbound|80||", **auto)
            inbound = live.listen(
                app,
                direction=Direction.INBOUND,
                mtls=MtlsMode.STRICT,
                workload_id="default/rsu",
                protocol=Protocol.AUTO,
            )
            tls = UpstreamTls(mode=TlsMode.ISTIO_MUTUAL)
            endpoint = {"speaks_mtls": True, "spiffe_ids": ("spiffe://cluster.local/ns/default/sa/rsu",)}
            key = live.cluster([("127.0.0.1", inbound)], "outbound|80||rsu", tls=tls, endpoint=endpoint, **auto)
            port = live.listen(key, protocol=Protocol.AUTO)
            async with Client(port) as one, Http2Client(port) as two:
                await two.handshake()
                for stream_id in (1, 3):
                    assert (await one.ask(get())).body == b"ok"
                    assert await ask_http2(two, stream_id) == b"two"
            assert sorted(either.versions) == ["HTTP/1.1", "HTTP/2"]


@pytest.mark.parametrize(("downstream", "chosen"), [("HTTP/1.1", "http/1.1"), ("HTTP/2", "h2")])
async def test_over_tls_only_the_downstreams_version_is_offered(
    live: LiveWorker, server_tls: ssl.SSLContext, downstream: str, chosen: str
) -> None:
    offered: list[str | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        offered.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await reader.read()

    tls = UpstreamTls(mode=TlsMode.SIMPLE, insecure_skip_verify=True)
    async with RawServer(serve, server_tls) as upstream:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], follows_client=True, tls=tls))
        if downstream == "HTTP/2":
            async with Http2Client(port) as client:
                await client.handshake()
                client.send(headers_frame(1, request()))
                await until(lambda: bool(offered))
        else:
            async with Client(port) as plain:
                plain.send(get())
                await until(lambda: bool(offered))
    assert offered == [chosen]


@pytest.fixture
def server_tls(tmp_path: Path) -> ssl.SSLContext:
    leaf = Authority().leaf(dns_names=("a.example",)).write(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf / "cert-chain.pem", leaf / "key.pem")
    # A server that takes its own order: it would choose HTTP/2 where both are offered.
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context
