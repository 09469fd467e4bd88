"""Connections that begin with a PROXY header: from real proxies, from curl, and from those who do not keep to it."""

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from meshproxy.codec.proxy_protocol import write_header
from meshproxy.model.cluster import Protocol
from meshproxy.model.listener import AccessLogPolicy, Direction, ServerTls, ServerTlsMode, TcpRoute
from meshproxy.model.route import WeightedCluster
from meshproxy.telemetry.access_log import AccessLog
from tests.support.certificates import Authority
from tests.support.client import Client, get
from tests.support.handshakes import client_hello
from tests.support.http2_client import PREFACE, Http2Client, headers_frame, request, settings_frame
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.other_proxies import haproxy
from tests.support.raw_server import RawServer

CLIENT, VIP = ("192.0.2.7", 56324), ("198.51.100.1", 443)
V1, V2 = write_header(1, CLIENT, VIP), write_header(2, CLIENT, VIP)
GATEWAY: dict[str, Any] = {"direction": Direction.GATEWAY, "expects_proxy_header": True}


def listen(live: LiveWorker, *origins: Origin | RawServer, **fields: Any) -> int:
    """A gateway's listener that expects the header."""
    protocol = fields.get("protocol", Protocol.HTTP)
    cluster = live.cluster([("127.0.0.1", origin.port) for origin in origins], protocol=protocol)
    return live.listen(cluster, **{**GATEWAY, **fields})


def log_to(live: LiveWorker, path: Path) -> AccessLog:
    """The access log from now on; a configuration put later has its own."""
    live.worker.state.access_log = log = AccessLog(AccessLogPolicy(path=str(path), encoding="json"))
    return log


@pytest.mark.parametrize("header", [V1, V2])
async def test_the_source_of_the_header_is_the_downstream_to_upstreams_and_the_log(
    header: bytes, tmp_path: Path
) -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = listen(live, origin)
        log = log_to(live, tmp_path / "log")
        async with Client(port) as client:
            assert (await client.ask(header + get())).status == 200
            assert (await client.ask(get())).status == 200
        await until(lambda: not live.open_downstreams())
        log.close()
    assert [seen.header(b"x-forwarded-for") for seen in origin.requests] == [b"192.0.2.7"] * 2
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [entry["downstream_remote_address"] for entry in entries] == ["192.0.2.7:56324"] * 2
    assert [entry["downstream_local_address"] for entry in entries] == ["198.51.100.1:443"] * 2


@pytest.mark.parametrize("header", [V1, V2])
async def test_a_header_may_come_byte_by_byte(header: bytes) -> None:
    async with Origin() as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            for byte in header + get():
                client.send(bytes([byte]))
                await asyncio.sleep(0)
            assert (await client.answer()).status == 200
    assert origin.requests[0].header(b"x-forwarded-for") == b"192.0.2.7"


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", write_header(2, None, None)])
async def test_a_connection_of_the_proxy_itself_keeps_its_own_address(header: bytes) -> None:
    async with Origin() as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            assert (await client.ask(header + get())).status == 200
    assert origin.requests[0].header(b"x-forwarded-for") == b"127.0.0.1"


@pytest.mark.parametrize("first", [get(), V1.replace(b"TCP4", b"TCP6") + get(), V2[:14] + b"\xff" * 3000])
async def test_a_connection_that_begins_with_something_else_is_reset_and_counted(first: bytes) -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = listen(live, origin)
        async with Client(port) as client:
            client.send(first)
            assert await client.ended() == "reset"
        (listener,) = live.worker.listeners.values()
        assert listener.runtime.counters.downstream_cx_proxy_proto_error == 1
        assert live.worker.state.counters.protocol_errors == {"proxy_protocol.no_header": 1}
    assert not origin.requests


async def test_half_a_header_and_an_end_is_no_header() -> None:
    async with Origin() as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as client:
            client.send(V1[:20])
            client.end()
            assert await client.ended() == "reset"


async def test_silence_is_waited_for_as_long_as_for_other_first_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.listener.tcp.FIRST_BYTES_TIMEOUT_S", 0.2)
    async with Origin() as origin, LiveWorker() as live:
        async with Client(listen(live, origin)) as silent, Client(live_port(live)) as half:
            half.send(V2[:20])
            assert await half.ended() == "reset"
            assert await silent.ended() == "reset"
        (listener,) = live.worker.listeners.values()
        assert listener.runtime.counters.downstream_pre_cx_timeout == 2


def live_port(live: LiveWorker) -> int:
    (listener,) = live.worker.listeners.values()
    return listener.runtime.listener.port


async def test_the_header_comes_before_tls(tmp_path: Path) -> None:
    authority = Authority()
    leaf = authority.leaf(dns_names=("a.example",)).write(tmp_path)
    tls = ServerTls(
        mode=ServerTlsMode.SIMPLE,
        certificate_file=str(leaf / "cert-chain.pem"),
        key_file=str(leaf / "key.pem"),
    )
    context = ssl.create_default_context(cadata=authority.pem.decode())
    async with Origin() as origin, LiveWorker() as live:
        port = listen(live, origin, tls=tls)
        async with (
            haproxy(
                f"listen all\n  mode tcp\n  bind 127.0.0.1:{{port}}\n  server us 127.0.0.1:{port} send-proxy-v2"
            ) as front,
            Client(front, context) as client,
        ):
            own = client.writer.get_extra_info("sockname")
            assert (await client.ask(get())).status == 200
            (downstream,) = next(iter(live.worker.listeners.values())).runtime.connections
            assert downstream.transport.get_extra_info("peername") == own
    assert origin.requests[0].header(b"x-forwarded-for") == b"127.0.0.1"


async def test_http2_may_follow_the_header() -> None:
    async with Origin() as origin, LiveWorker() as live:
        async with Http2Client(listen(live, origin), opening=V2 + PREFACE + settings_frame()) as client:
            await client.handshake()
            client.send(headers_frame(1, request()))
            assert (await client.response(1)).status == 200
    assert origin.requests[0].header(b"x-forwarded-for") == b"192.0.2.7"


async def test_routes_by_address_go_by_the_one_that_the_header_names() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await reader.read()

    async with RawServer(serve) as upstream, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", upstream.port)], protocol=Protocol.TCP)
        weighted = (WeightedCluster(cluster_key=cluster),)
        routes = (TcpRoute(clusters=weighted, destination_subnets=("198.51.100.0/24",)),)
        port = live.listen(cluster, protocol=Protocol.TCP, tcp_routes=routes, **GATEWAY)
        async with Client(port) as client:
            client.send(V2)
            assert await client.bytes(5) == b"hello"
        async with Client(port) as other:
            other.send(write_header(2, CLIENT, ("203.0.113.1", 443)))
            assert await other.ended() == "reset"


async def test_tls_that_passes_through_may_follow_the_header() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(65536))

    hello = client_hello(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "a.example")
    passthrough = ServerTls(mode=ServerTlsMode.PASSTHROUGH)
    async with RawServer(echo) as upstream, LiveWorker() as live:
        async with Client(listen(live, upstream, protocol=Protocol.TCP, tls=passthrough)) as client:
            client.send(V1 + hello)
            assert await client.bytes(len(hello)) == hello


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"])
async def test_haproxy_passes_its_client_on(option: str, tmp_path: Path) -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = listen(live, origin)
        log = log_to(live, tmp_path / "log")
        config = (
            "listen all\n  mode http\n  bind 127.0.0.1:{port}\n  unique-id-format %[uuid()]\n"
            f"  http-reuse never\n  server us 127.0.0.1:{port} {option}"
        )
        async with haproxy(config) as front, Client(front) as client:
            own = client.writer.get_extra_info("sockname")
            assert (await client.ask(get())).status == 200
        await until(lambda: not live.open_downstreams())
        log.close()
    (line,) = (tmp_path / "log").read_text().splitlines()
    entry = json.loads(line)
    assert entry["downstream_remote_address"] == f"127.0.0.1:{own[1]}"


async def test_curl_may_say_where_it_comes_from() -> None:
    async with Origin() as origin, LiveWorker() as live:
        url = f"http://127.0.0.1:{listen(live, origin)}/"
        process = await asyncio.create_subprocess_exec(
            *("curl", "--noproxy", "*", "-s", "--haproxy-protocol", url), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert out == b"ok"
    assert origin.requests[0].header(b"x-forwarded-for") == b"127.0.0.1"
