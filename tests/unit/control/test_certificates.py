import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from meshproxy.control.certificates import CertificateStore
from meshproxy.control.messages import PutCertificates
from meshproxy.errors import ConfigError
from meshproxy.model.workload import Workload
from tests.support.certificates import CLIENT_AUTH, Authority, Leaf, new_key

AUTHORITY = Authority()
EDGE = Workload(id="default/edge-1", name="edge-1", namespace="default", service_account="edge")


def home(directory: Path) -> Path:
    return directory / "default" / "edge"


def wanted(leaf: Leaf, workload: Workload = EDGE) -> PutCertificates:
    return PutCertificates(
        workload_id=workload.id, chain_pem=leaf.chain_pem, key_pem=leaf.key_pem, roots_pem=leaf.roots_pem
    )


@pytest.mark.parametrize("key_type", ["ec", "rsa"])
def test_a_good_triple_is_given_to_the_workload(tmp_path: Path, key_type: str) -> None:
    leaf = AUTHORITY.leaf(key_type=key_type)
    leaf.write(home(tmp_path))
    store = CertificateStore(tmp_path)
    assert store.load(EDGE) == wanted(leaf)
    assert store.refresh() == []
    assert store.problems == {}
    assert not store.pending


def test_workloads_of_one_service_account_share_the_files(tmp_path: Path) -> None:
    leaf = AUTHORITY.leaf()
    leaf.write(home(tmp_path))
    second = Workload(id="default/edge-2", name="edge-2", namespace="default", service_account="edge")
    store = CertificateStore(tmp_path)
    assert [store.load(EDGE), store.load(second)] == [wanted(leaf), wanted(leaf, second)]
    newer = AUTHORITY.leaf()
    newer.write(home(tmp_path))
    assert store.refresh() == [wanted(newer), wanted(newer, second)]


def test_a_chain_through_an_intermediate_is_good(tmp_path: Path) -> None:
    leaf = Authority("Intermediate", issuer=AUTHORITY).leaf()
    leaf.write(home(tmp_path))
    assert CertificateStore(tmp_path).load(EDGE) == wanted(leaf)


def encrypted_key() -> bytes:
    return new_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


@pytest.mark.parametrize(
    ("leaf", "file", "why"),
    [
        (
            AUTHORITY.leaf(account="other"),
            "cert-chain.pem",
            "exactly one URI SAN, spiffe://cluster.local/ns/default/sa/edge",
        ),
        (AUTHORITY.leaf(trust_domain="other.example"), "cert-chain.pem", "it has spiffe://other.example/"),
        (AUTHORITY.leaf(uris=("spiffe://a/ns/b/sa/c", "spiffe://a/ns/b/sa/d")), "cert-chain.pem", "c and spiffe://a"),
        (AUTHORITY.leaf(uris=(), dns_names=("edge",)), "cert-chain.pem", "it has none"),
        (AUTHORITY.leaf(expires_s=-60), "cert-chain.pem", "the certificate expired at 2"),
        (AUTHORITY.leaf(starts_s=600), "cert-chain.pem", "the certificate is valid only from 2"),
        (AUTHORITY.leaf(is_ca=True), "cert-chain.pem", "is a CA's, not a workload's"),
        (AUTHORITY.leaf(signs=True), "cert-chain.pem", "may sign others"),
        (AUTHORITY.leaf(is_self_signed=True), "cert-chain.pem", "does not verify against root-cert.pem: self-signed"),
        (AUTHORITY.leaf(usages=(CLIENT_AUTH,)), "cert-chain.pem", "unsuitable certificate purpose"),
    ],
)
def test_a_certificate_that_is_not_the_workloads_is_one_sentence(
    tmp_path: Path, leaf: Leaf, file: str, why: str
) -> None:
    leaf.write(home(tmp_path))
    with pytest.raises(ConfigError) as caught:
        CertificateStore(tmp_path).load(EDGE)
    sentence = str(caught.value)
    assert sentence.startswith(str(home(tmp_path) / file))
    assert why in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("key.pem", None, "key.pem: cannot be read: No such file or directory"),
        ("cert-chain.pem", None, "cert-chain.pem: cannot be read: No such file or directory"),
        ("root-cert.pem", None, "root-cert.pem: cannot be read: No such file or directory"),
        ("key.pem", b"", "key.pem: holds no PEM private key"),
        ("key.pem", AUTHORITY.leaf().key_pem, "key.pem: the key does not belong to the first certificate"),
        ("key.pem", encrypted_key(), "key.pem: the key is encrypted"),
        ("cert-chain.pem", b"junk", "cert-chain.pem: holds no PEM certificate"),
        ("root-cert.pem", b"\xff\x00", "root-cert.pem: holds no PEM certificate"),
        ("root-cert.pem", Authority("Other").pem, "does not verify against root-cert.pem: unable to get"),
        ("cert-chain.pem", b"x" * (1 << 21), "cert-chain.pem: larger than 1 MiB"),
    ],
)
def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path, file: str, content: bytes | None, why: str) -> None:
    AUTHORITY.leaf().write(home(tmp_path))
    if content is None:
        (home(tmp_path) / file).unlink()
    else:
        (home(tmp_path) / file).write_bytes(content)
    store = CertificateStore(tmp_path)
    with pytest.raises(ConfigError) as caught:
        store.load(EDGE)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)
    assert store.problems == {EDGE.id: str(caught.value)}
    assert store.pending


def test_certificates_that_come_later_are_taken(tmp_path: Path) -> None:
    store = CertificateStore(tmp_path)
    with pytest.raises(ConfigError):
        store.load(EDGE)
    assert store.refresh() == []
    leaf = AUTHORITY.leaf()
    leaf.write(home(tmp_path))
    assert store.refresh() == [wanted(leaf)]
    assert store.problems == {}


def test_a_rotation_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    old, new = AUTHORITY.leaf(), Authority("Next").leaf()
    old.write(home(tmp_path))
    store = CertificateStore(tmp_path)
    store.load(EDGE)
    taken = []
    for file, content in (
        ("root-cert.pem", new.roots_pem),
        ("key.pem", new.key_pem[:40]),
        ("key.pem", new.key_pem),
        ("cert-chain.pem", new.chain_pem[:100]),
        ("cert-chain.pem", new.chain_pem),
    ):
        (home(tmp_path) / file).write_bytes(content)
        taken.append(store.refresh())
    assert taken == [[], [], [], [], [wanted(new)]]
    assert not store.pending


def test_the_last_good_one_stays_in_use_and_the_problem_goes_when_the_files_come_back(tmp_path: Path) -> None:
    leaf = AUTHORITY.leaf()
    leaf.write(home(tmp_path))
    store = CertificateStore(tmp_path)
    store.load(EDGE)
    for file in ("key.pem", "cert-chain.pem"):
        (home(tmp_path) / file).unlink()
        assert store.refresh() == []
        assert "No such file" in store.problems[EDGE.id]
        assert store.load(EDGE) == wanted(leaf)
        leaf.write(home(tmp_path))
        assert store.refresh() == []
        assert store.problems == {}
    (home(tmp_path) / "key.pem").write_bytes(b"junk")
    store.refresh()
    assert store.pending
    leaf.write(home(tmp_path))
    assert store.refresh() == []
    assert store.problems == {}


def test_roots_may_overlap_while_an_authority_is_replaced(tmp_path: Path) -> None:
    leaf = AUTHORITY.leaf()
    leaf.write(home(tmp_path))
    store = CertificateStore(tmp_path)
    store.load(EDGE)
    both = AUTHORITY.pem + Authority("Next").pem
    (home(tmp_path) / "root-cert.pem").write_bytes(both)
    (message,) = store.refresh()
    assert message.roots_pem == both


def test_a_certificate_becomes_good_by_the_clock_alone(tmp_path: Path) -> None:
    leaf = AUTHORITY.leaf(starts_s=1.0)  # the next full second
    leaf.write(home(tmp_path))
    store = CertificateStore(tmp_path)
    with pytest.raises(ConfigError, match="valid only from"):
        store.load(EDGE)
    deadline = time.monotonic() + 10
    while not (taken := store.refresh()):
        assert time.monotonic() < deadline
    assert taken == [wanted(leaf)]


def test_another_identity_of_a_workload_is_another_certificate(tmp_path: Path) -> None:
    AUTHORITY.leaf().write(home(tmp_path))
    store = CertificateStore(tmp_path)
    store.load(EDGE)
    moved = Workload(id=EDGE.id, name="edge-1", namespace="default", service_account="other")
    with pytest.raises(ConfigError, match="No such file"):
        store.load(moved)
    other = AUTHORITY.leaf(account="other")
    other.write(tmp_path / "default" / "other")
    assert store.refresh() == [wanted(other)]


def test_a_forgotten_workload_is_looked_at_no_more(tmp_path: Path) -> None:
    AUTHORITY.leaf().write(home(tmp_path))
    store = CertificateStore(tmp_path)
    store.load(EDGE)
    store.forget(EDGE.id)
    store.forget("never/known")
    AUTHORITY.leaf().write(home(tmp_path))
    assert store.refresh() == []
    assert store.describe() == []


def test_what_is_in_use_is_described_without_the_key(tmp_path: Path) -> None:
    leaf = AUTHORITY.leaf(expires_s=7200)
    leaf.write(home(tmp_path))
    store = CertificateStore(tmp_path)
    store.load(EDGE)
    chain, root = store.describe()
    assert (chain.kind, root.kind) == ("cert_chain", "ca_cert")
    assert chain.serial_number == f"{leaf.certificate.serial_number:x}"
    assert chain.uris == ("spiffe://cluster.local/ns/default/sa/edge",)
    assert chain.path == str(home(tmp_path) / "cert-chain.pem")
    assert root.subject == "O=Test CA"
    now = time.time()
    assert 7100 < store.expiry_s(now)[EDGE.id] <= 7200
    assert store.expiry_s(now + 8000)[EDGE.id] < 0
    assert "PRIVATE" not in repr(store.describe()) + repr(store.refresh()) + repr(store._entries)
