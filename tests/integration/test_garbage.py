"""Closed connections are freed by reference counts: a worker's collector runs too seldom to rely on."""

import asyncio
import gc
import ssl
from collections import Counter
from pathlib import Path

import pytest

from meshproxy.model.cluster import Protocol
from meshproxy.model.listener import Direction, ServerTls, ServerTlsMode
from meshproxy.proxy.downstream_h1 import DownstreamConnection
from meshproxy.proxy.downstream_h2 import DownstreamH2, DownstreamStream
from meshproxy.proxy.http_stream import HttpStream
from meshproxy.proxy.tcp_session import TcpSession, TcpUpstream
from meshproxy.tls.transport import TlsTransport
from meshproxy.upstream.connection_h1 import UpstreamConnection
from tests.support.certificates import Authority
from tests.support.http2_client import Http2Client, goaway_frame, headers_frame, request
from tests.support.live_worker import LiveWorker, exchange, until
from tests.support.origin import Origin

REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"


def alive(*kinds: type) -> int:
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("protocol", "kinds"),
    [(Protocol.HTTP, (DownstreamConnection, HttpStream)), (Protocol.TCP, (TcpSession, TcpUpstream))],
)
async def test_closed_connections_need_no_collector(protocol: Protocol, kinds: tuple[type, ...]) -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]), protocol=protocol)
        await exchange(port, REQUEST)
        gc.collect()
        gc.disable()
        try:
            before = alive(*kinds, UpstreamConnection)
            for _ in range(30):
                assert (await exchange(port, REQUEST)).startswith(b"HTTP/1.1 200")
            for _ in range(20):
                await asyncio.sleep(0)
            assert alive(*kinds, UpstreamConnection) - before <= 4
        finally:
            gc.enable()


async def once_http2(port: int, tls: ssl.SSLContext | None, how: str) -> None:
    async with Http2Client(port, acks=True, tls=tls) as client:
        await client.handshake()
        client.send(headers_frame(1, request()))
        if how != "left":
            await client.response(1)
        if how == "goodbye":
            client.send(goaway_frame())
            await client.expect_closed()


@pytest.mark.parametrize("how", ["answered", "left", "goodbye"])
@pytest.mark.parametrize("is_tls", [True, False], ids=["tls", "plain"])
async def test_closed_http2_connections_need_no_collector(is_tls: bool, how: str, tmp_path: Path) -> None:
    authority = Authority()
    files = authority.leaf(uris=(), dns_names=("a.example",)).write(tmp_path)
    tls = ServerTls(
        mode=ServerTlsMode.SIMPLE, certificate_file=str(files / "cert-chain.pem"), key_file=str(files / "key.pem")
    )
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    used = context if is_tls else None
    kinds = (DownstreamConnection, DownstreamH2, DownstreamStream, HttpStream, TlsTransport)
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        port = live.listen(cluster, direction=Direction.GATEWAY, tls=tls if is_tls else None)
        await once_http2(port, used, how)
        await until(lambda: live.open_downstreams() == 0)
        gc.collect()
        gc.disable()
        try:
            before = Counter(type(thing) for thing in gc.get_objects())
            for _ in range(10):
                await once_http2(port, used, how)
            await until(lambda: live.open_downstreams() == 0)
            for _ in range(20):
                await asyncio.sleep(0)
            after = Counter(type(thing) for thing in gc.get_objects())
            assert {kind: after[kind] - before[kind] for kind in kinds if after[kind] - before[kind] > 2} == {}
        finally:
            gc.enable()
