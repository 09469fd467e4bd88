"""Closed connections are freed by reference counts: a worker's collector runs too seldom to rely on."""

import asyncio
import gc

import pytest

from meshproxy.model.cluster import Protocol
from meshproxy.proxy.downstream_h1 import DownstreamConnection
from meshproxy.proxy.http_stream import HttpStream
from meshproxy.proxy.tcp_session import TcpSession, TcpUpstream
from meshproxy.upstream.connection_h1 import UpstreamConnection
from tests.support.live_worker import LiveWorker, exchange
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
