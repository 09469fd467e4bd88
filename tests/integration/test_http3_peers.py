"""HTTP/3 with clients on three other QUIC stacks: qh3, ngtcp2 with OpenSSL (curl), ngtcp2 with GnuTLS."""

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from meshproxy.control import messages as m
from meshproxy.model.listener import Direction, MtlsMode, ServerTls, ServerTlsMode
from tests.support.certificates import Authority, Leaf
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin, Seen

AUTHORITY = Authority()
BIG = b"0123456789abcdef" * 65536


def answer(seen: Seen) -> bytes:
    body = BIG if seen.target == b"/big" else b"%b %b %d" % (seen.method, seen.target, len(seen.body))
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), b"" if seen.method == b"HEAD" else body)


class Server:
    def __init__(self, worker: LiveWorker, origin: Origin, directory: Path) -> None:
        self.worker = worker
        self.origin = origin
        self.directory = directory
        leaf = AUTHORITY.leaf("default", "app", dns_names=["localhost"])
        leaf.write(directory)
        self.roots = directory / "root-cert.pem"
        tls = ServerTls(
            mode=ServerTlsMode.SIMPLE,
            certificate_file=str(directory / "cert-chain.pem"),
            key_file=str(directory / "key.pem"),
        )
        cluster = worker.cluster([("127.0.0.1", origin.port)])
        self.port = worker.listen_quic(cluster, tls=tls)
        bundle = leaf.bundle()
        worker.put(
            m.PutCertificates(
                "default/app", chain_pem=bundle.chain_pem, key_pem=bundle.key_pem, roots_pem=bundle.roots_pem
            )
        )
        self.mesh_port = worker.listen_quic(cluster, direction=Direction.INBOUND, mtls=MtlsMode.STRICT)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with LiveWorker() as worker, Origin(answer) as origin:
        yield Server(worker, origin, tmp_path)


# ── qh3 ──


async def test_qh3_is_served(server: Server) -> None:
    qh3 = pytest.importorskip("qh3.asyncio.client")
    from qh3.asyncio.protocol import QuicConnectionProtocol
    from qh3.h3.connection import H3Connection
    from qh3.h3.events import DataReceived, HeadersReceived
    from qh3.quic.configuration import QuicConfiguration

    class Client(QuicConnectionProtocol):  # type: ignore[misc]
        http: Any = None
        body = b""
        status = b""

        def quic_event_received(self, event: Any) -> None:
            for http_event in self.http.handle_event(event) if self.http is not None else ():
                if isinstance(http_event, HeadersReceived):
                    self.status = dict(http_event.headers)[b":status"]
                elif isinstance(http_event, DataReceived):
                    self.body += http_event.data
                    if http_event.stream_ended:
                        self.ended.set()

        async def ask(self, method: bytes, path: bytes, body: bytes = b"") -> tuple[bytes, bytes]:
            self.ended = asyncio.Event()
            self.body = b""
            stream = self._quic.get_next_available_stream_id()
            head = [(b":method", method), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", path)]
            self.http.send_headers(stream, head, end_stream=not body)
            if body:
                self.http.send_data(stream, body, end_stream=True)
            self.transmit()
            await asyncio.wait_for(self.ended.wait(), 10)
            return self.status, self.body

    configuration = QuicConfiguration(is_client=True, alpn_protocols=["h3"], verify_mode=ssl.CERT_NONE)
    async with qh3.connect("127.0.0.1", server.port, configuration=configuration, create_protocol=Client) as client:
        client.http = H3Connection(client._quic)
        assert await client.ask(b"GET", b"/a?b=c") == (b"200", b"GET /a?b=c 0")
        assert await client.ask(b"POST", b"/post", b"z" * 200_000) == (b"200", b"POST /post 200000")
        assert await client.ask(b"GET", b"/big") == (b"200", BIG)


# ── curl ──


def curl(port: int, roots: Path, path: str, identity: Path | None = None, **options: Any) -> tuple[int, bytes]:
    """(status, body) over HTTP/3 and nothing else; pycurl.error where the connection fails."""
    import pycurl

    body = BytesIO()
    handle = pycurl.Curl()
    try:
        handle.setopt(handle.URL, f"https://localhost:{port}{path}")
        handle.setopt(handle.CAINFO, str(roots))
        handle.setopt(handle.WRITEDATA, body)
        handle.setopt(handle.HTTP_VERSION, 31)
        handle.setopt(handle.TIMEOUT, 10)
        if identity is not None:
            handle.setopt(handle.SSLCERT, str(identity / "cert-chain.pem"))
            handle.setopt(handle.SSLKEY, str(identity / "key.pem"))
        for name, value in options.items():
            handle.setopt(getattr(handle, name), value)
        handle.perform()
        assert handle.getinfo(46 + 0x200000) == 30  # CURLINFO_HTTP_VERSION, CURL_HTTP_VERSION_3
        return handle.getinfo(handle.RESPONSE_CODE), body.getvalue()
    finally:
        handle.close()


async def test_curl_is_served(server: Server) -> None:
    pytest.importorskip("pycurl")
    assert await asyncio.to_thread(curl, server.port, server.roots, "/a") == (200, b"GET /a 0")
    assert await asyncio.to_thread(curl, server.port, server.roots, "/big") == (200, BIG)
    posted = await asyncio.to_thread(curl, server.port, server.roots, "/post", POSTFIELDS=b"z" * 500_000)
    assert posted == (200, b"POST /post 500000")
    assert await asyncio.to_thread(curl, server.port, server.roots, "/head", NOBODY=True) == (200, b"")


async def test_curl_comes_in_with_an_identity_of_the_mesh_and_not_without(server: Server, tmp_path: Path) -> None:
    pycurl = pytest.importorskip("pycurl")
    good = AUTHORITY.leaf("default", "client").write(tmp_path / "good")
    assert await asyncio.to_thread(curl, server.mesh_port, server.roots, "/a", good) == (200, b"GET /a 0")
    seen = server.origin.requests[0].header(b"x-forwarded-client-cert")
    assert seen is not None
    assert seen.endswith(b"URI=spiffe://cluster.local/ns/default/sa/client")
    for name, leaf in bad_leaves().items():
        identity = leaf.write(tmp_path / name) if leaf is not None else None
        with pytest.raises(pycurl.error):
            await asyncio.to_thread(curl, server.mesh_port, server.roots, "/a", identity)
    assert len(server.origin.requests) == 1


def bad_leaves() -> dict[str, Leaf | None]:
    return {
        "absent": None,
        "self-signed": AUTHORITY.leaf(is_self_signed=True),
        "expired": AUTHORITY.leaf(expires_s=-60),
        "elsewhere": AUTHORITY.leaf(trust_domain="elsewhere.example"),
    }


# ── ngtcp2 ──


async def gtlsclient(server: Server, *options: str, path: str = "/big", count: int = 1) -> bytes:
    """What the client downloaded last; AssertionError where it did not go well."""
    downloads = server.directory / "downloads"
    downloads.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        "gtlsclient",
        *("--download", str(downloads), "-q", "--exit-on-all-streams-close", "-n", str(count), *options),
        *("127.0.0.1", str(server.port), f"https://localhost:{server.port}{path}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, output.decode(errors="replace")[-2000:]
    return (downloads / path[1:]).read_bytes()


OPTIONS = {
    "plainly": (),
    "after version negotiation": ("--version", "0x1a2a3a4a", "--preferred-versions", "v1"),
    "with loss both ways": ("--tx-loss", "0.05", "--rx-loss", "0.05"),
    "from another address": ("--change-local-addr", "2ms"),
    "with new keys": ("--key-update", "2ms"),
    "through small windows": ("--max-data", "30K", "--max-stream-data-bidi-local", "10K"),
}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.skipif(shutil.which("gtlsclient") is None, reason="no gtlsclient (Debian: ngtcp2-client)")
async def test_ngtcp2_downloads_a_megabyte(server: Server, how: str) -> None:
    assert await gtlsclient(server, *OPTIONS[how]) == BIG


@pytest.mark.skipif(shutil.which("gtlsclient") is None, reason="no gtlsclient (Debian: ngtcp2-client)")
async def test_ngtcp2_uploads_from_behind_a_nat_that_rebinds(server: Server) -> None:
    """An upload: who only receives says nothing from its new address, and nobody can know it."""
    (server.directory / "body").write_bytes(BIG)
    options = ("--change-local-addr", "2ms", "--nat-rebinding", "-m", "POST", "-d", str(server.directory / "body"))
    assert await gtlsclient(server, *options, path="/post") == b"POST /post %d" % len(BIG)


@pytest.mark.skipif(shutil.which("gtlsclient") is None, reason="no gtlsclient (Debian: ngtcp2-client)")
async def test_ngtcp2_asks_five_hundred_times(server: Server) -> None:
    assert await gtlsclient(server, path="/small", count=500) == b"GET /small 0"
    assert len(server.origin.requests) == 500
