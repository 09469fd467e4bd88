"""Real handshakes in memory: what the contexts let in and what they refuse."""

import os
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from meshproxy.errors import ConfigError
from meshproxy.model.cluster import TlsMode, UpstreamTls
from meshproxy.model.listener import ServerTls, ServerTlsMode
from meshproxy.tls.context import (
    Bundle,
    client_context,
    gateway_context,
    origination_context,
    server_context,
)
from meshproxy.tls.verify import check_names, leaf_signs, peer_identity, xfcc_element
from tests.support.certificates import CLIENT_AUTH, CODE_SIGNING, SERVER_AUTH, Authority, Leaf, new_key
from tests.support.handshakes import Ends, client_hello, in_records_of, shake_hands

AUTHORITY = Authority()
SERVER = AUTHORITY.leaf("default", "edge")
CLIENT = AUTHORITY.leaf("default", "rsu")
ALPN_SERVER = ("istio-http/1.1", "istio", "http/1.1")


def handshake(
    *, server: Leaf = SERVER, client: Leaf = CLIENT, alpn: tuple[str, ...] = ("istio",), requires: bool = True
) -> Ends:
    return shake_hands(
        server_context(server.bundle(AUTHORITY.pem), alpn=ALPN_SERVER, requires_client_certificate=requires),
        client_context(client.bundle(AUTHORITY.pem), alpn=alpn),
        server_name="outbound_.80_._.edge.default.svc.cluster.local",
    )


def test_both_ends_know_each_other() -> None:
    ends = handshake()
    assert ends.server.version() == ends.client.version() == "TLSv1.3"
    assert str(peer_identity(ends.server.getpeercert())) == "spiffe://cluster.local/ns/default/sa/rsu"
    assert str(peer_identity(ends.client.getpeercert())) == "spiffe://cluster.local/ns/default/sa/edge"
    assert ends.server.getpeercert(True) == CLIENT.der
    assert ends.server.compression() is None


@pytest.mark.parametrize("key_type", ["ec", "rsa"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_key_types_work_in_both_versions(key_type: str, version: ssl.TLSVersion) -> None:
    server = AUTHORITY.leaf(key_type=key_type)
    context = client_context(CLIENT.bundle(), alpn=("istio",))
    context.maximum_version = version
    ends = shake_hands(server_context(server.bundle(), alpn=ALPN_SERVER), context)
    cipher = ends.client.cipher()
    assert cipher is not None
    assert cipher[0].endswith(("GCM-SHA384", "GCM_SHA384"))


def test_a_chain_through_an_intermediate_verifies() -> None:
    intermediate = Authority("Intermediate", issuer=AUTHORITY)
    assert handshake(client=intermediate.leaf("default", "rsu"))


# ── refused by the server ──


def refused_client(client: Leaf) -> str:
    with pytest.raises(ssl.SSLError) as caught:
        handshake(client=client)
    return getattr(caught.value, "verify_message", None) or str(caught.value.reason)


@pytest.mark.parametrize(
    ("client", "why"),
    [
        (AUTHORITY.leaf(expires_s=-60), "certificate has expired"),
        (AUTHORITY.leaf(starts_s=600), "certificate is not yet valid"),
        (AUTHORITY.leaf(is_self_signed=True), "self-signed certificate"),
        (Authority("Other").leaf(), "unable to get local issuer certificate"),
        # The same name as our root's, another key.
        (Authority().leaf(), "certificate signature failure"),
        (AUTHORITY.leaf(usages=(SERVER_AUTH,)), "unsuitable certificate purpose"),
        (AUTHORITY.leaf(usages=(CODE_SIGNING,)), "unsuitable certificate purpose"),
        (Authority("Leaf as CA", issuer=Authority("Constrained", path_length=0)).leaf(), "unable to get"),
    ],
)
def test_client_certificates_that_do_not_verify_are_refused(client: Leaf, why: str) -> None:
    assert why in refused_client(client)


def test_a_path_longer_than_the_root_allows_is_refused() -> None:
    root = Authority("Constrained", path_length=0)
    leaf = Authority("Below", issuer=root).leaf()
    with pytest.raises(ssl.SSLCertVerificationError, match="path length constraint exceeded"):
        shake_hands(
            server_context(root.leaf().bundle(), alpn=()),
            client_context(leaf.bundle(), alpn=()),
        )


def test_a_leaf_that_signed_another_is_no_ca() -> None:
    """A stolen workload key must not make identities."""
    workload = AUTHORITY.leaf("default", "stolen")
    forger = Authority("Forger")
    forger.issuer, forger.key, forger.name = AUTHORITY, workload.key, workload.certificate.subject
    forged = forger.leaf("istio-system", "admin")
    chain = forged.chain_pem.split(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    bundle = Bundle(chain_pem=chain + workload.chain_pem, key_pem=forged.key_pem, roots_pem=AUTHORITY.pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server_context(SERVER.bundle(), alpn=()), client_context(bundle, alpn=()))


def without_certificate(alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=AUTHORITY.pem.decode())
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_certificate_is_refused(version: ssl.TLSVersion) -> None:
    client = without_certificate()
    client.maximum_version = version
    with pytest.raises(ssl.SSLError) as caught:
        shake_hands(server_context(SERVER.bundle(), alpn=()), client)
    assert caught.value.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"


def test_a_client_certificate_may_be_optional_but_never_wrong() -> None:
    server = server_context(SERVER.bundle(), alpn=(), requires_client_certificate=False)
    assert not shake_hands(server, without_certificate()).server.getpeercert()
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, client_context(AUTHORITY.leaf(expires_s=-60).bundle(), alpn=()))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_versions_are_off(version: ssl.TLSVersion) -> None:
    client = without_certificate()
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = version
    with pytest.raises(ssl.SSLError) as caught:
        shake_hands(server_context(SERVER.bundle(), alpn=()), client)
    assert caught.value.reason in ("UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE")


@pytest.mark.parametrize("ciphers", ["ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-SHA256", "AES128-SHA", "NULL"])
def test_old_ciphers_are_off(ciphers: str) -> None:
    client = without_certificate()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError) as caught:
        shake_hands(server_context(SERVER.bundle(), alpn=()), client)
    assert caught.value.reason == "NO_SHARED_CIPHER"


def test_renegotiation_and_compression_are_off() -> None:
    for context in (server_context(SERVER.bundle(), alpn=()), client_context(CLIENT.bundle(), alpn=())):
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (("istio-http/1.1", "istio", "http/1.1"), "istio-http/1.1"),
        (("http/1.1", "istio"), "istio"),  # the server's order
        (("h2", "http/1.1"), "http/1.1"),
        (("istio-peer-exchange", "istio"), "istio"),
        (("h3",), None),
        (("h2",), None),
    ],
)
def test_alpn_takes_the_servers_first_choice_or_none(offered: tuple[str, ...], chosen: str | None) -> None:
    ends = handshake(alpn=offered)
    assert ends.server.selected_alpn_protocol() == ends.client.selected_alpn_protocol() == chosen


# ── refused by the client ──


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (AUTHORITY.leaf(expires_s=-60), "certificate has expired"),
        (AUTHORITY.leaf(starts_s=600), "certificate is not yet valid"),
        (Authority("Other").leaf(), "unable to get local issuer certificate"),
        (AUTHORITY.leaf(is_self_signed=True), "self-signed certificate"),
        (AUTHORITY.leaf(usages=(CLIENT_AUTH,)), "unsuitable certificate purpose"),
    ],
)
def test_server_certificates_that_do_not_verify_are_refused(server: Leaf, why: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        handshake(server=server)
    assert why in caught.value.verify_message


# ── what OpenSSL lets in and tls.verify does not ──


@pytest.mark.parametrize(
    "client",
    [
        AUTHORITY.leaf(uris=("spiffe://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/a/sa/c")),
        AUTHORITY.leaf(uris=(), dns_names=("edge.default",)),
        AUTHORITY.leaf(trust_domain="other.example"),
        AUTHORITY.leaf(uris=("spiffe://cluster.local:80/ns/a/sa/b",)),
        AUTHORITY.leaf(uris=("spiffe://cluster.local/ns/a/sa/" + "b" * 2048,)),
        AUTHORITY.leaf(is_ca=True),
        AUTHORITY.leaf(signs=True),
    ],
)
def test_identities_that_may_not_come_in_are_refused_after_the_handshake(client: Leaf) -> None:
    server = handshake(client=client).server
    with pytest.raises(ValueError, match=r"."):
        peer_identity(server.getpeercert(), "cluster.local", der=server.getpeercert(True))


def test_openssl_alone_lets_a_ca_be_a_leaf() -> None:
    """Why leaf_signs exists."""
    server = server_context(SERVER.bundle(), alpn=())
    server.verify_flags |= ssl.VERIFY_X509_STRICT
    intermediate = Authority("Intermediate", issuer=AUTHORITY)
    assert leaf_signs(intermediate.leaf(is_ca=True).der)
    assert handshake(client=AUTHORITY.leaf(is_ca=True))


def test_the_subject_of_a_real_certificate_is_in_xfcc() -> None:
    client = AUTHORITY.leaf(subject=((NameOID.ORGANIZATION_NAME, "Acme, Inc"), (NameOID.COMMON_NAME, "edge")))
    server = handshake(client=client).server
    element = xfcc_element("", server.getpeercert(True), server.getpeercert())
    assert b'Subject="CN=edge,O=Acme\\, Inc"' in element


# ── strange hellos ──


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_hello_in_small_records_is_served(size: int) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context(SERVER.bundle(), alpn=ALPN_SERVER).wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(in_records_of(size, client_hello(client_context(CLIENT.bundle(), alpn=("istio",)), "a.example")))
    with pytest.raises(ssl.SSLWantReadError):
        server.do_handshake()
    assert outgoing.read()[:1] == b"\x16"


def test_a_server_name_with_a_nul_is_refused() -> None:
    incoming = ssl.MemoryBIO()
    server = server_context(SERVER.bundle(), alpn=()).wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(client_hello(without_certificate(), "xxxx").replace(b"xxxx", b"x\x00xx"))
    with pytest.raises(ssl.SSLError):
        server.do_handshake()


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x00" * 64, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_plaintext_is_refused(first: bytes) -> None:
    incoming = ssl.MemoryBIO()
    server = server_context(SERVER.bundle(), alpn=()).wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(first)
    with pytest.raises(ssl.SSLError):
        server.do_handshake()


# ── resumption ──


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_resumes_and_keeps_the_identity(version: ssl.TLSVersion) -> None:
    server = server_context(SERVER.bundle(), alpn=ALPN_SERVER)
    client = client_context(CLIENT.bundle(), alpn=("istio",))
    client.maximum_version = version
    session = shake_hands(server, client).client.session
    again = shake_hands(server, client, session=session)
    assert again.client.session_reused
    assert str(peer_identity(again.server.getpeercert())) == "spiffe://cluster.local/ns/default/sa/rsu"
    assert str(peer_identity(again.client.getpeercert())) == "spiffe://cluster.local/ns/default/sa/edge"
    assert again.server.getpeercert(True) == CLIENT.der


def test_a_session_does_not_resume_across_a_change_of_the_servers_roots() -> None:
    client = client_context(CLIENT.bundle(), alpn=())
    session = shake_hands(server_context(SERVER.bundle(), alpn=()), client).client.session
    other = Authority("Other")
    both = server_context(SERVER.bundle(AUTHORITY.pem + other.pem), alpn=())
    assert not shake_hands(both, client, session=session).client.session_reused
    without_us = server_context(SERVER.bundle(other.pem), alpn=())
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(without_us, client, session=session)


def test_a_session_of_another_context_cannot_be_used() -> None:
    server = server_context(SERVER.bundle(), alpn=())
    session = shake_hands(server, client_context(CLIENT.bundle(), alpn=())).client.session
    with pytest.raises(ValueError, match="SSLContext"):
        shake_hands(server, client_context(CLIENT.bundle(), alpn=()), session=session)


# ── bundles ──


def test_equal_bundles_are_equal_and_never_show_the_key() -> None:
    assert SERVER.bundle() == SERVER.bundle()
    assert "PRIVATE" not in repr(SERVER.bundle())


def test_contexts_leave_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    server_context(SERVER.bundle(), alpn=())
    with pytest.raises(ConfigError):
        client_context(Bundle(chain_pem=b"", key_pem=b"", roots_pem=b""), alpn=())
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("bundle", "why"),
    [
        (Bundle(chain_pem=SERVER.chain_pem, key_pem=CLIENT.key_pem, roots_pem=AUTHORITY.pem), "key values mismatch"),
        (Bundle(chain_pem=SERVER.chain_pem, key_pem=b"", roots_pem=AUTHORITY.pem), "do not load"),
        (Bundle(chain_pem=b"junk", key_pem=SERVER.key_pem, roots_pem=AUTHORITY.pem), "do not load"),
        (Bundle(chain_pem=SERVER.chain_pem, key_pem=SERVER.key_pem, roots_pem=b""), "root certificates do not load"),
        (Bundle(chain_pem=SERVER.chain_pem, key_pem=SERVER.key_pem, roots_pem=b"\xff"), "root certificates"),
    ],
)
def test_a_broken_bundle_is_one_sentence(bundle: Bundle, why: str) -> None:
    for make in (server_context, client_context):
        with pytest.raises(ConfigError) as caught:
            make(bundle, alpn=())
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)


# ── gateways and origination ──


@pytest.fixture
def files(tmp_path: Path) -> Path:
    leaf = AUTHORITY.leaf(uris=(), dns_names=("api.example",))
    (tmp_path / "tls.crt").write_bytes(leaf.chain_pem)
    (tmp_path / "tls.key").write_bytes(leaf.key_pem)
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    return tmp_path


def gateway(files: Path, mode: ServerTlsMode = ServerTlsMode.SIMPLE, min_version: str = "TLSV1_2") -> ssl.SSLContext:
    tls = ServerTls(
        mode=mode,
        certificate_file=str(files / "tls.crt"),
        key_file=str(files / "tls.key"),
        ca_file=str(files / "ca.crt") if mode is ServerTlsMode.MUTUAL else None,
        min_version=min_version,
    )
    return gateway_context(tls, ("http/1.1",))


def upstream(files: Path, mode: TlsMode = TlsMode.SIMPLE, **fields: object) -> UpstreamTls:
    if mode is TlsMode.MUTUAL:
        fields = {"certificate_file": str(files / "tls.crt"), "key_file": str(files / "tls.key"), **fields}
    return UpstreamTls(mode=mode, ca_file=str(files / "ca.crt"), **fields)  # type: ignore[arg-type]


def test_simple_checks_the_servers_name(files: Path) -> None:
    context = origination_context(upstream(files), ("http/1.1",))
    assert shake_hands(gateway(files), context, server_name="api.example")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(gateway(files), context, server_name="other.example")


def test_subject_alt_names_are_checked_instead_of_the_name(files: Path) -> None:
    context = origination_context(upstream(files, subject_alt_names=("api.example",)))
    ends = shake_hands(gateway(files), context, server_name="other.example")
    assert check_names(ends.client.getpeercert(), ("api.example",)) is None


def test_skipping_verification_skips_it(files: Path) -> None:
    (files / "ca.crt").write_bytes(Authority("Other").pem)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(gateway(files), origination_context(upstream(files)), server_name="api.example")
    context = origination_context(upstream(files, insecure_skip_verify=True))
    assert shake_hands(gateway(files), context, server_name="other.example")


def test_mutual_shows_a_certificate_and_asks_for_one(files: Path) -> None:
    server = gateway(files, ServerTlsMode.MUTUAL)
    assert shake_hands(server, origination_context(upstream(files, TlsMode.MUTUAL)), server_name="api.example")
    with pytest.raises(ssl.SSLError):
        shake_hands(server, origination_context(upstream(files)), server_name="api.example")


def test_a_gateway_may_ask_for_tls_1_3(files: Path) -> None:
    client = origination_context(upstream(files, insecure_skip_verify=True))
    client_1_2 = without_certificate()
    client_1_2.maximum_version = ssl.TLSVersion.TLSv1_2
    server = gateway(files, min_version="TLSV1_3")
    assert shake_hands(server, client, server_name="api.example")
    with pytest.raises(ssl.SSLError):
        shake_hands(server, client_1_2)


def test_the_same_files_give_the_same_context_until_they_change(files: Path) -> None:
    first = origination_context(upstream(files), ("http/1.1",))
    assert origination_context(upstream(files), ("http/1.1",)) is first
    assert origination_context(upstream(files), ()) is not first
    (files / "ca.crt").write_bytes(AUTHORITY.pem + Authority("Other").pem)
    assert origination_context(upstream(files), ("http/1.1",)) is not first


def test_missing_and_broken_files_are_named(files: Path) -> None:
    (files / "tls.key").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"tls\.key do not load"):
        gateway(files)
    (files / "tls.key").unlink()
    with pytest.raises(ConfigError, match=r"tls\.key: tls\.privateKey cannot be read: No such file"):
        gateway(files)
    (files / "ca.crt").unlink()
    with pytest.raises(ConfigError, match=r"ca\.crt: tls\.caCertificates cannot be read"):
        origination_context(upstream(files))
    with pytest.raises(ConfigError, match=r"tls\.serverCertificate is missing"):
        gateway_context(ServerTls(mode=ServerTlsMode.SIMPLE))


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(files: Path) -> None:
    encrypted = new_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (files / "tls.key").write_bytes(encrypted)
    with pytest.raises(ConfigError, match="do not load"):
        gateway(files)
