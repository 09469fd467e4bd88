"""PROXY headers towards upstreams: what they say, where they stand, and that no connection serves two downstreams."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshproxy.codec.proxy_protocol import write_header
from meshproxy.model.cluster import Protocol, TlsMode, UpstreamTls
from meshproxy.model.listener import Direction
from tests.support.certificates import Authority
from tests.support.client import Client, get
from tests.support.http2_client import Http2Client, headers_frame, request
from tests.support.http2_origin import H2Origin
from tests.support.live_worker import LiveWorker, until
from tests.support.other_proxies import haproxy, nginx
from tests.support.raw_server import RawServer, pipe

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
async def live() -> AsyncIterator[LiveWorker]:
    async with LiveWorker() as live:
        yield live


class Recorder(RawServer):
    """An upstream that takes one line of header on each connection, then answers requests, or echoes TCP."""

    def __init__(self, *, is_http: bool = True, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(self._answer if is_http else self._echo, tls)
        self.headers: list[bytes] = []
        self.requests: list[tuple[int, bytes]] = []
        """(connection, request line)"""

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.headers)
        self.headers.append(await reader.readuntil(b"\r\n"))
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append((number, head.partition(b"\r\n")[0]))
            writer.write(OK)

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.headers.append(await reader.readuntil(b"\r\n"))
        while data := await reader.read(65536):
            writer.write(data)


def header_of(client: Client, port: int, version: int = 1) -> bytes:
    return write_header(version, client.writer.get_extra_info("sockname"), ("127.0.0.1", port))


async def test_a_tcp_session_begins_with_the_downstreams_own_addresses(live: LiveWorker) -> None:
    async with Recorder(is_http=False) as upstream:
        cluster = live.cluster([("127.0.0.1", upstream.port)], protocol=Protocol.TCP, proxy_protocol=1)
        port = live.listen(cluster, protocol=Protocol.TCP)
        async with Client(port) as client:
            client.send(b"hello")
            assert await client.bytes(5) == b"hello"
            assert upstream.headers == [header_of(client, port)]
        await until(lambda: live.open_downstreams() == live.open_upstreams() == 0)
        assert live.tcp(response_flags="-") == (1, 1, 5, 5)  # the header is no payload


async def test_addresses_that_a_header_brought_are_passed_on(live: LiveWorker) -> None:
    async with Recorder(is_http=False) as upstream:
        cluster = live.cluster([("127.0.0.1", upstream.port)], protocol=Protocol.TCP, proxy_protocol=1)
        port = live.listen(cluster, protocol=Protocol.TCP, direction=Direction.GATEWAY, expects_proxy_header=True)
        async with Client(port) as client:
            client.send(write_header(2, ("192.0.2.7", 56324), ("198.51.100.1", 443)) + b"hello")
            assert await client.bytes(5) == b"hello"
        assert upstream.headers == [b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"]


async def test_http_connections_are_kept_for_the_downstream_they_name(live: LiveWorker) -> None:
    async with Recorder() as upstream:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], proxy_protocol=1))
        async with Client(port) as first, Client(port) as second:
            for path in ("/1", "/2"):
                assert (await first.ask(get(path))).status == (await second.ask(get(path))).status == 200
            assert sorted(upstream.headers) == sorted([header_of(first, port), header_of(second, port)])
            assert len(upstream.requests) == 4
            of_first = upstream.headers.index(header_of(first, port))
            assert [line for number, line in upstream.requests if number == of_first] == [
                b"GET /1 HTTP/1.1",
                b"GET /2 HTTP/1.1",
            ]
            assert live.pooled() == 2


async def test_they_go_when_the_downstream_has_gone(live: LiveWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshproxy.upstream.cluster_runtime._LOOK_AFTER_DOWNSTREAM_S", 0.05)
    async with Recorder() as upstream:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], proxy_protocol=1))
        async with Client(port) as stays, Client(port) as goes:
            assert (await stays.ask(get())).status == (await goes.ask(get())).status == 200
            goes.writer.close()
            await until(lambda: live.open_upstreams() == 1)
            assert (await stays.ask(get())).status == 200
            (endpoint,) = live.endpoints()
            assert len(endpoint.shares) == 1
            assert len(upstream.headers) == 2
        await until(lambda: not endpoint.shares)
        await until(lambda: live.clusters()[0].connections == 0)


async def test_requests_of_one_http2_downstream_share_its_connections(live: LiveWorker) -> None:
    async with Recorder() as upstream:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], proxy_protocol=1))
        async with Http2Client(port) as client:
            await client.handshake()
            for stream_id in (1, 3, 5):
                client.send(headers_frame(stream_id, request()))
                assert (await client.response(stream_id)).status == 200
        assert len(upstream.headers) == 1
        assert [number for number, _ in upstream.requests] == [0, 0, 0]


async def test_http2_upstreams_get_one_connection_for_each_downstream(live: LiveWorker) -> None:
    headers: list[bytes] = []
    async with H2Origin() as origin:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            headers.append(await reader.readuntil(b"\r\n"))
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", origin.port)
            try:
                await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))
            finally:
                up_writer.close()

        async with RawServer(serve) as front:
            port = live.listen(live.cluster([("127.0.0.1", front.port)], proxy_protocol=1, speaks_http2=True))
            async with Client(port) as first, Client(port) as second, Http2Client(port) as third:
                await third.handshake()
                for stream_id in (1, 3):
                    assert (await first.ask(get())).status == (await second.ask(get())).status == 200
                    third.send(headers_frame(stream_id, request()))
                    assert (await third.response(stream_id)).status == 200
                third_name = third.transport.get_extra_info("sockname")
                assert set(headers) == {
                    header_of(first, port),
                    header_of(second, port),
                    write_header(1, third_name, ("127.0.0.1", port)),
                }
                assert len(headers) == len(origin.connections) == 3


async def test_the_header_stands_before_tls(live: LiveWorker) -> None:
    tls = UpstreamTls(mode=TlsMode.SIMPLE, insecure_skip_verify=True)
    first: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first.append(await reader.readuntil(b"\r\n"))
        first.append(await reader.read(3))

    async with RawServer(serve) as upstream:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], proxy_protocol=1, tls=tls))
        async with Client(port) as client:
            assert (await client.ask(get())).status == 503
            assert first == [header_of(client, port), b"\x16\x03\x01"]


async def test_a_change_of_version_leaves_connections_of_the_old_kind(live: LiveWorker) -> None:
    async with Recorder() as upstream:
        port = live.listen(live.cluster([("127.0.0.1", upstream.port)], proxy_protocol=1))
        async with Client(port) as client:
            assert (await client.ask(get())).status == 200
            (before,) = live.endpoints()
            live.cluster([("127.0.0.1", upstream.port)], proxy_protocol=2)
            await until(lambda: not before.connections)
            client.send(get())
            await until(lambda: len(upstream.headers) == 2)
            assert upstream.headers[1] == b"\r\n"  # as version 2 begins


HAPROXY = """
listen all
  mode {mode}
  bind 127.0.0.1:{{port}} accept-proxy
  {answer}
"""


@pytest.mark.parametrize("version", [1, 2])
async def test_haproxy_behind_us_sees_the_downstream(live: LiveWorker, version: int) -> None:
    answer = "http-request return status 200 content-type text/plain lf-string %[src]:%[src_port]>%[dst]:%[dst_port]"
    async with haproxy(HAPROXY.format(mode="http", answer=answer)) as behind:
        port = live.listen(live.cluster([("127.0.0.1", behind)], proxy_protocol=version))
        for _ in range(2):
            async with Client(port) as client:
                own = client.writer.get_extra_info("sockname")
                expected = f"127.0.0.1:{own[1]}>127.0.0.1:{port}".encode()
                assert (await client.ask(get())).body == expected
                assert (await client.ask(get())).body == expected


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("is_tls", [False, True])
async def test_nginx_behind_us_sees_the_downstream(
    live: LiveWorker, version: int, is_tls: bool, tmp_path: Path
) -> None:
    leaf = Authority().leaf(dns_names=("a.example",)).write(tmp_path)
    more = f"ssl_certificate {leaf}/cert-chain.pem; ssl_certificate_key {leaf}/key.pem;" if is_tls else ""
    config = (
        "server {{ listen 127.0.0.1:{port} proxy_protocol"
        + (" ssl;" if is_tls else ";")
        + more
        + ' location / {{ return 200 "$proxy_protocol_addr:$proxy_protocol_port>$proxy_protocol_server_port"; }} }}'
    )
    tls = UpstreamTls(mode=TlsMode.SIMPLE, insecure_skip_verify=True) if is_tls else UpstreamTls()
    async with nginx(config) as behind:
        port = live.listen(live.cluster([("127.0.0.1", behind)], proxy_protocol=version, tls=tls))
        async with Client(port) as client:
            own = client.writer.get_extra_info("sockname")
            for _ in range(2):
                assert (await client.ask(get())).body == f"127.0.0.1:{own[1]}>{port}".encode()
