"""HTTP/2 is spoken over TLS where both sides agreed to it, over a TLS fit for it (RFC 9113 §3.2, §9.2), or not."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshproxy.model.listener import Direction, ServerTls, ServerTlsMode
from tests.support.certificates import Authority
from tests.support.client import Client, get
from tests.support.http2_client import INADEQUATE_SECURITY, PROTOCOL_ERROR, Http2Client, headers_frame, request
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin

V12 = ssl.TLSVersion.TLSv1_2
FORWARD_SECRET = "ECDHE-RSA-AES128-GCM-SHA256"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    leaf = Authority().leaf(uris=(), dns_names=("a.example",), key_type="rsa")
    return leaf.write(tmp_path_factory.mktemp("gateway"))


@asynccontextmanager
async def gateway(files: Path) -> AsyncIterator[tuple[Origin, int]]:
    tls = ServerTls(
        mode=ServerTlsMode.SIMPLE, certificate_file=str(files / "cert-chain.pem"), key_file=str(files / "key.pem")
    )
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        yield origin, live.listen(cluster, direction=Direction.GATEWAY, tls=tls)


def client_tls(
    files: Path, *alpn: str, version: ssl.TLSVersion | None = None, ciphers: str | None = None
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files / "root-cert.pem"))
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if ciphers is not None:
        context.set_ciphers(ciphers + ":@SECLEVEL=0")
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


@pytest.mark.parametrize("version", [V12, ssl.TLSVersion.TLSv1_3])
async def test_http2_is_spoken_where_both_agreed_to_it(version: ssl.TLSVersion, files: Path) -> None:
    tls = client_tls(files, "http/1.1", "h2", version=version)
    async with gateway(files) as (origin, port), Http2Client(port, tls=tls) as client:
        await client.handshake()
        client.send(headers_frame(1, request()))
        assert (await client.response(1)).body == b"ok"
        assert len(origin.requests) == 1


@pytest.mark.parametrize("alpn", [("http/1.1",), ("http/1.1", "spdy/3")])
async def test_a_preface_after_agreeing_to_http_1_is_refused(alpn: tuple[str, ...], files: Path) -> None:
    tls = client_tls(files, *alpn)
    async with gateway(files) as (origin, port), Http2Client(port, tls=tls) as client:
        client.send(headers_frame(1, request()))
        await client.expect_goaway(PROTOCOL_ERROR)
        assert origin.requests == []


async def test_http_1_after_agreeing_to_http2_is_refused(files: Path) -> None:
    tls = client_tls(files, "h2")
    async with (
        gateway(files) as (origin, port),
        Http2Client(port, tls=tls, opening=get()) as client,
    ):
        await client.expect_goaway(PROTOCOL_ERROR)
        assert origin.requests == []


@pytest.mark.parametrize("alpn", [(), ("spdy/3",), ("h2c",), ("h3",), ("h2 ",), ("H2",), ("h",)])
async def test_another_name_than_h2_is_not_http2(alpn: tuple[str, ...], files: Path) -> None:
    """And without an agreement HTTP/1.1 is spoken."""
    async with gateway(files) as (_, port), Client(port, client_tls(files, *alpn), sni="a.example") as client:
        assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
        assert (await client.ask(get())).status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
async def test_an_old_tls_is_refused(version: ssl.TLSVersion, files: Path) -> None:
    with pytest.warns(DeprecationWarning):
        tls = client_tls(files, "h2", version=version, ciphers="ALL")
    async with gateway(files) as (origin, port):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with Http2Client(port, tls=tls):
                pass
        assert origin.requests == []


@pytest.mark.parametrize(
    "cipher",
    ["ECDHE-RSA-AES128-SHA256", "ECDHE-RSA-AES256-SHA", "AES128-SHA", "AES256-SHA256", "ECDHE-RSA-CAMELLIA128-SHA256"],
)
async def test_a_cipher_of_blocks_in_a_chain_is_refused(cipher: str, files: Path) -> None:
    tls = client_tls(files, "h2", version=V12, ciphers=cipher)
    async with gateway(files) as (origin, port):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with Http2Client(port, tls=tls):
                pass
        assert origin.requests == []


@pytest.mark.parametrize("cipher", ["AES128-GCM-SHA256", "AES256-GCM-SHA384"])
async def test_http2_is_refused_over_a_cipher_without_forward_secrecy(cipher: str, files: Path) -> None:
    """Istio's list has them for HTTP/1.1; RFC 9113 appendix A forbids them to HTTP/2."""
    async with gateway(files) as (origin, port):
        tls = client_tls(files, "h2", version=V12, ciphers=cipher)
        async with Http2Client(port, tls=tls) as client:
            client.send(headers_frame(1, request()))
            await client.expect_goaway(INADEQUATE_SECURITY)
        assert origin.requests == []
        tls = client_tls(files, "http/1.1", version=V12, ciphers=cipher)
        async with Client(port, tls, sni="a.example") as http1:
            assert (await http1.ask(get())).status == 200
