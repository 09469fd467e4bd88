"""What connectionPool.tcp asks of sockets, read from connections that are open."""

import socket
from typing import Any

import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import Protocol, TcpKeepalive, TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from tests.support.certificates import Authority
from tests.support.client import Client, get
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin

KEEPALIVE = TcpKeepalive(time_s=11, interval_s=12, probes=13)
MOST = TcpKeepalive(time_s=32767, interval_s=32767, probes=127)


def options(live: LiveWorker, cluster: str) -> dict[str, int]:
    """Of the cluster's only connection."""
    (connection,) = [
        connection
        for runtime in live.clusters()
        if runtime.key == cluster
        for endpoint in runtime.endpoints.values()
        for connection in endpoint.connections
    ]
    sock: Any = connection.transport.get_extra_info("socket")
    of_tcp = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}")) for name in OF_TCP}
    return {"KEEPALIVE": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), **of_tcp}


OF_TCP = ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "NODELAY")


def system() -> dict[str, int]:
    """What a socket has that nobody tuned, but for NODELAY, which we always set."""
    with socket.socket() as sock:
        of_tcp = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}")) for name in OF_TCP}
    return {"KEEPALIVE": 0, **of_tcp, "NODELAY": 1}


def wanted(keepalive: TcpKeepalive) -> dict[str, Any]:
    of_tcp = {"KEEPIDLE": keepalive.time_s, "KEEPINTVL": keepalive.interval_s, "KEEPCNT": keepalive.probes}
    return system() | {"KEEPALIVE": 1} | {name: value for name, value in of_tcp.items() if value}


@pytest.mark.parametrize("protocol", [Protocol.HTTP, Protocol.TCP])
@pytest.mark.parametrize("keepalive", [KEEPALIVE, MOST, TcpKeepalive(interval_s=12), TcpKeepalive(), None])
async def test_a_connection_has_the_keepalive_its_cluster_asks_for(
    keepalive: TcpKeepalive | None, protocol: Protocol
) -> None:
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)], protocol=protocol, tcp_keepalive=keepalive)
        async with Client(live.listen(cluster, protocol=protocol)) as client:
            assert (await client.ask(get())).status == 200
            assert options(live, cluster) == (wanted(keepalive) if keepalive is not None else system())


@pytest.mark.parametrize("protocol", [Protocol.HTTP, Protocol.TCP])
async def test_so_has_a_connection_with_mtls(protocol: Protocol) -> None:
    leaf = Authority().leaf("default", "app")
    async with Origin() as origin, LiveWorker() as live:
        live.put(m.PutWorkload(live.workload("default/app", "app")))
        live.worker.on_message(m.PutCertificates("default/app", leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None)
        inner = live.cluster([("127.0.0.1", origin.port)], "inbound|80||", protocol=protocol)
        strict = live.listen(inner, direction=Direction.INBOUND, protocol=protocol, mtls=MtlsMode.STRICT)
        outer = live.cluster(
            [("127.0.0.1", strict)],
            protocol=protocol,
            tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL),
            endpoint={"spiffe_ids": ("spiffe://cluster.local/ns/default/sa/app",)},
            tcp_keepalive=KEEPALIVE,
        )
        async with Client(live.listen(outer, protocol=protocol)) as client:
            assert (await client.ask(get())).status == 200
            assert options(live, outer) == wanted(KEEPALIVE)
            assert options(live, inner) == system()
