"""Mutual TLS over QUIC: who may not come in, and that nothing of theirs reaches the upstream.

aioquic's server accepts an absent certificate and looks at no chain: each test is one way in that this would leave.
The clients send their request with, or before, the last packet of the handshake: it must be thrown away unread.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshproxy.control import messages as m
from meshproxy.model.listener import Direction, MtlsMode, ServerTls, ServerTlsMode
from tests.support.certificates import CODE_SIGNING, Authority, Leaf, new_key
from tests.support.http3_client import Http3Client, get
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin

AUTHORITY = Authority()
STRANGER = Authority("Another CA")
IMPOSTOR = Authority("Test CA")
"""Its name is that of the mesh's authority, its key is not."""
SERVER = AUTHORITY.leaf("default", "app", dns_names=["a.example"])
BAD_CERTIFICATE, CERTIFICATE_REQUIRED, DECRYPT_ERROR = 0x100 + 42, 0x100 + 116, 0x100 + 51


class Mesh:
    def __init__(self, worker: LiveWorker, origin: Origin, port: int) -> None:
        self.worker = worker
        self.origin = origin
        self.port = port

    @property
    def runtime(self) -> Any:
        return next(iter(self.worker.worker.listeners.values())).runtime

    async def is_refused(self, identity: Leaf | None, code: int, detail: str | None) -> None:
        """The connection ends with this code, the word is counted, and the upstream has seen nothing at all."""
        async with Http3Client.to(self.port, AUTHORITY.pem, identity) as client:
            for _ in range(3):
                client.send(get("/secret"))
            ended = await client.refusal()
            assert ended.error_code == code, ended
            assert not client.answers
            await until(lambda: not self.runtime.connections)
        assert (self.origin.connections, self.origin.requests) == (0, [])
        assert self.runtime.counters.downstream_rq_total == 0
        assert self.runtime.counters.ssl_connection_error == 1
        if detail is not None:
            assert self.runtime.counters.ssl_fail_verify_error == 1
            assert self.worker.worker.state.counters.protocol_errors[detail] == 1


@pytest.fixture
async def mesh(mode: MtlsMode = MtlsMode.STRICT) -> AsyncIterator[Mesh]:
    async with LiveWorker() as worker, Origin() as origin:
        bundle = SERVER.bundle()
        worker.put(
            m.PutCertificates(
                "default/app", chain_pem=bundle.chain_pem, key_pem=bundle.key_pem, roots_pem=bundle.roots_pem
            )
        )
        cluster = worker.cluster([("127.0.0.1", origin.port)])
        port = worker.listen_quic(cluster, direction=Direction.INBOUND, mtls=MtlsMode.STRICT)
        yield Mesh(worker, origin, port)


async def test_a_workload_of_the_mesh_comes_in_under_its_name(mesh: Mesh) -> None:
    client_leaf = AUTHORITY.leaf("default", "client")
    async with Http3Client.to(mesh.port, AUTHORITY.pem, client_leaf) as client:
        assert (await client.request(get("/"))).body == b"ok"
    xfcc = mesh.origin.requests[0].header(b"x-forwarded-client-cert")
    assert xfcc is not None
    assert xfcc.startswith(b"By=spiffe://cluster.local/ns/default/sa/default;Hash=")
    assert xfcc.endswith(b";URI=spiffe://cluster.local/ns/default/sa/client")
    assert mesh.worker.requests(
        connection_security_policy="mutual_tls",
        source_principal="spiffe://cluster.local/ns/default/sa/client",
    )


async def test_a_client_under_an_intermediate_comes_in(mesh: Mesh) -> None:
    intermediate = Authority("Intermediate", issuer=AUTHORITY)
    async with Http3Client.to(mesh.port, AUTHORITY.pem, intermediate.leaf()) as client:
        client._quic.configuration.certificate_chain = [intermediate.certificate]
        client._quic.tls.certificate_chain = [intermediate.certificate]
        assert (await client.request(get("/"))).body == b"ok"


async def test_a_client_without_a_certificate_is_refused(mesh: Mesh) -> None:
    await mesh.is_refused(None, CERTIFICATE_REQUIRED, "tls.no_certificate")
    assert mesh.runtime.counters.ssl_fail_verify_no_cert == 1


BAD_LEAVES = {
    "self-signed": (lambda: AUTHORITY.leaf(is_self_signed=True), "tls.certificate_verify_failed"),
    "of another authority": (lambda: STRANGER.leaf(), "tls.certificate_verify_failed"),
    "of an impostor": (lambda: IMPOSTOR.leaf(), "tls.certificate_verify_failed"),
    "expired": (lambda: AUTHORITY.leaf(expires_s=-60), "tls.certificate_verify_failed"),
    "not yet valid": (lambda: AUTHORITY.leaf(starts_s=1800), "tls.certificate_verify_failed"),
    "under an intermediate it does not show": (
        lambda: Authority("Intermediate", issuer=AUTHORITY).leaf(),
        "tls.certificate_verify_failed",
    ),
    "signed by a leaf": (lambda: _under_a_leaf(), "tls.certificate_verify_failed"),
    "of another trust domain": (lambda: AUTHORITY.leaf(trust_domain="elsewhere.example"), "tls.trust_domain"),
    "no SPIFFE": (lambda: AUTHORITY.leaf(uris=("https://cluster.local/ns/default/sa/x",)), "tls.not_spiffe"),
    "no name": (lambda: AUTHORITY.leaf(uris=()), "tls.uri_san_count"),
    "two names": (
        lambda: AUTHORITY.leaf(uris=("spiffe://cluster.local/ns/a/sa/a", "spiffe://cluster.local/ns/b/sa/b")),
        "tls.uri_san_count",
    ),
    "a CA's": (lambda: AUTHORITY.leaf(is_ca=True), "tls.ca_leaf"),
    "for code signing": (lambda: AUTHORITY.leaf(usages=(CODE_SIGNING,)), "tls.wrong_usage"),
}


def _under_a_leaf() -> Leaf:
    """Signed with the key of an honest workload, which is no authority; the chain leads to the root."""
    honest = AUTHORITY.leaf("default", "client")
    forger = Authority("Forger", issuer=AUTHORITY)
    forger.key = honest.key
    forged = forger.leaf("default", "admin")
    return replace(forged, chain_pem=forged.chain_pem + honest.chain_pem)


@pytest.mark.parametrize("name", BAD_LEAVES)
async def test_a_client_whose_certificate_is_wrong_is_refused(mesh: Mesh, name: str) -> None:
    make, detail = BAD_LEAVES[name]
    await mesh.is_refused(make(), BAD_CERTIFICATE, detail)


async def test_another_ones_certificate_without_its_key_is_refused(mesh: Mesh) -> None:
    honest = AUTHORITY.leaf("default", "client")
    await mesh.is_refused(replace(honest, key=new_key()), DECRYPT_ERROR, None)


async def test_a_chain_of_more_certificates_than_anyone_needs_is_refused(mesh: Mesh) -> None:
    leaf = AUTHORITY.leaf()
    async with Http3Client.to(mesh.port, AUTHORITY.pem, leaf) as client:
        client._quic.tls.certificate_chain = [AUTHORITY.certificate] * 10
        client.send(get("/"))
        assert (await client.refusal()).error_code == BAD_CERTIFICATE
    assert mesh.origin.connections == 0


async def test_a_client_that_leaves_certificate_and_verify_out_is_refused(mesh: Mesh) -> None:
    """Finished where Certificate must be: what a stack without client certificates sends."""
    async with Http3Client.to(mesh.port, AUTHORITY.pem) as client:
        original = client._quic.tls._client_handle_certificate_request

        def ignore(buffer: Any) -> None:
            original(buffer)
            client._quic.tls._certificate_request = None

        client._quic.tls._client_handle_certificate_request = ignore  # type: ignore[method-assign]
        client.send(get("/"))
        ended = await client.refusal()
        assert ended.error_code == 0x100 + 10  # unexpected_message
    assert mesh.origin.connections == 0


async def test_after_a_rotation_of_the_roots_their_clients_are_refused(mesh: Mesh) -> None:
    new_server = STRANGER.leaf("default", "app", dns_names=["a.example"])
    bundle = new_server.bundle(STRANGER.pem)
    leaf = AUTHORITY.leaf("default", "client")
    async with Http3Client.to(mesh.port, AUTHORITY.pem, leaf) as client:
        assert (await client.request(get("/"))).status == 200
        mesh.worker.put(
            m.PutCertificates(
                "default/app", chain_pem=bundle.chain_pem, key_pem=bundle.key_pem, roots_pem=bundle.roots_pem
            )
        )
        assert (await client.request(get("/"))).status == 200  # open connections stay, as on TCP
    async with Http3Client.to(mesh.port, STRANGER.pem, leaf) as client:
        client.send(get("/"))
        assert (await client.refusal()).error_code == BAD_CERTIFICATE
    async with Http3Client.to(mesh.port, STRANGER.pem, STRANGER.leaf()) as client:
        assert (await client.request(get("/"))).status == 200


@pytest.mark.parametrize("mode", [ServerTlsMode.MUTUAL, ServerTlsMode.ISTIO_MUTUAL])
async def test_a_gateway_with_mutual_tls_lets_in_whose_chain_leads_to_its_roots(
    tmp_path: Path, mode: ServerTlsMode
) -> None:
    directory = SERVER.write(tmp_path)
    tls = ServerTls(
        mode=mode,
        certificate_file=str(directory / "cert-chain.pem"),
        key_file=str(directory / "key.pem"),
        ca_file=str(directory / "root-cert.pem"),
    )
    async with LiveWorker() as worker, Origin() as origin:
        bundle = SERVER.bundle()
        worker.put(
            m.PutCertificates(
                "default/app", chain_pem=bundle.chain_pem, key_pem=bundle.key_pem, roots_pem=bundle.roots_pem
            )
        )
        port = worker.listen_quic(worker.cluster([("127.0.0.1", origin.port)]), tls=tls)
        async with Http3Client.to(port, AUTHORITY.pem, AUTHORITY.leaf()) as client:
            assert (await client.request(get("/"))).status == 200
        xfcc = origin.requests[0].header(b"x-forwarded-client-cert")
        assert xfcc is not None
        assert b"URI=spiffe://cluster.local/ns/default/sa/edge" in xfcc
        for identity in (None, STRANGER.leaf(), AUTHORITY.leaf(expires_s=-60)):
            async with Http3Client.to(port, AUTHORITY.pem, identity) as client:
                client.send(get("/"))
                assert (await client.refusal()).error_code in (BAD_CERTIFICATE, CERTIFICATE_REQUIRED)
        assert len(origin.requests) == 1


async def test_a_gateway_with_mutual_tls_and_no_roots_lets_in_nobody(tmp_path: Path) -> None:
    directory = SERVER.write(tmp_path)
    tls = ServerTls(
        mode=ServerTlsMode.MUTUAL,
        certificate_file=str(directory / "cert-chain.pem"),
        key_file=str(directory / "key.pem"),
    )
    async with LiveWorker() as worker, Origin() as origin:
        port = worker.listen_quic(worker.cluster([("127.0.0.1", origin.port)]), tls=tls)
        runtime = next(iter(worker.worker.listeners.values())).runtime
        async with Http3Client.to(port, AUTHORITY.pem, AUTHORITY.leaf()) as client:
            client.send(get("/"))
            await until(lambda: runtime.counters.downstream_cx_rx_bytes_total > 0)
            assert not runtime.connections
        assert origin.connections == 0


async def test_a_listener_without_certificates_answers_nothing() -> None:
    async with LiveWorker() as worker, Origin() as origin:
        cluster = worker.cluster([("127.0.0.1", origin.port)])
        port = worker.listen_quic(cluster, direction=Direction.INBOUND, mtls=MtlsMode.STRICT)
        runtime = next(iter(worker.worker.listeners.values())).runtime
        async with Http3Client.to(port, AUTHORITY.pem, AUTHORITY.leaf()) as client:
            client.send(get("/"))
            await until(lambda: runtime.counters.ssl_connection_error > 0)
            assert not runtime.connections
            assert not client.answers
