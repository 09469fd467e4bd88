import argparse
import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from meshproxy.cli import ca
from meshproxy.cli.main import main
from meshproxy.control.certificates import CertificateStore
from meshproxy.errors import ConfigError
from meshproxy.model.workload import Workload
from meshproxy.tls.context import Bundle, client_context, server_context
from meshproxy.tls.verify import leaf_signs, peer_identity
from tests.support.handshakes import shake_hands


def workload(account: str, trust_domain: str = "cluster.local") -> Workload:
    return Workload(
        id=f"default/{account}", name=account, namespace="default", service_account=account, trust_domain=trust_domain
    )


def bundle(certs: Path, account: str, trust_domain: str = "cluster.local") -> Bundle:
    message = CertificateStore(certs).load(workload(account, trust_domain))
    return Bundle(chain_pem=message.chain_pem, key_pem=message.key_pem, roots_pem=message.roots_pem)


def issue(directory: Path, account: str, *more: str) -> int:
    return main(
        [
            *("ca", "issue", str(directory / "ca"), "--namespace", "default", "--service-account", account),
            *("--out", str(directory / "certs"), *more),
        ]
    )


@pytest.mark.parametrize("key_type", ["ec", "rsa"])
def test_what_it_issues_shakes_hands(tmp_path: Path, key_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", "init", str(tmp_path / "ca"), "--trust-domain", "edge.example"]) == 0
    for account in ("a", "b"):
        assert issue(tmp_path, account, "--key-type", key_type) == 0
    assert "spiffe://edge.example/ns/default/sa/b, valid for 24 hours" in capsys.readouterr().out
    ends = shake_hands(
        server_context(bundle(tmp_path / "certs", "a", "edge.example"), alpn=()),
        client_context(bundle(tmp_path / "certs", "b", "edge.example"), alpn=()),
    )
    identity = peer_identity(ends.server.getpeercert(), "edge.example", der=ends.server.getpeercert(True))
    assert identity.service_account == "b"


def test_what_it_issues_is_strict_and_cannot_sign(tmp_path: Path) -> None:
    ca.init(tmp_path / "ca")
    _, home = ca.issue(tmp_path / "ca", "default", "a", tmp_path / "certs", hours=1000)
    certificate = x509.load_pem_x509_certificate((home / "cert-chain.pem").read_bytes())
    assert not leaf_signs(ssl.PEM_cert_to_DER_cert((home / "cert-chain.pem").read_text()))
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(hours=999) < left <= datetime.timedelta(hours=1000)
    server = server_context(bundle(tmp_path / "certs", "a"), alpn=())
    client = client_context(bundle(tmp_path / "certs", "a"), alpn=())
    for context in (server, client):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert shake_hands(server, client)


def test_a_leaf_never_outlives_its_root(tmp_path: Path) -> None:
    ca.init(tmp_path / "ca", days=1)
    _, home = ca.issue(tmp_path / "ca", "default", "a", tmp_path / "certs", hours=1e8)
    leaf = x509.load_pem_x509_certificate((home / "cert-chain.pem").read_bytes())
    root = x509.load_pem_x509_certificate((home / "root-cert.pem").read_bytes())
    assert leaf.not_valid_after_utc == root.not_valid_after_utc


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    ca.init(tmp_path / "ca")
    _, home = ca.issue(tmp_path / "ca", "default", "a", tmp_path / "certs")
    for key in (tmp_path / "ca" / "ca-key.pem", home / "key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for directory in (tmp_path / "ca", tmp_path / "certs", home.parent, home):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert sorted(path.name for path in home.iterdir()) == ["cert-chain.pem", "key.pem", "root-cert.pem"]


def test_issuing_again_rotates(tmp_path: Path) -> None:
    ca.init(tmp_path / "ca")
    ca.issue(tmp_path / "ca", "default", "a", tmp_path / "certs")
    store = CertificateStore(tmp_path / "certs")
    before = store.load(workload("a"))
    ca.issue(tmp_path / "ca", "default", "a", tmp_path / "certs")
    (after,) = store.refresh()
    assert after.key_pem != before.key_pem
    assert after.roots_pem == before.roots_pem


def test_a_root_is_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", "init", str(tmp_path / "ca")]) == 0
    before = (tmp_path / "ca" / "ca-key.pem").read_bytes()
    assert main(["ca", "init", str(tmp_path / "ca")]) == 1
    assert "there is a CA already; --force replaces it" in capsys.readouterr().err
    assert (tmp_path / "ca" / "ca-key.pem").read_bytes() == before
    assert main(["ca", "init", str(tmp_path / "ca"), "--force"]) == 0
    assert (tmp_path / "ca" / "ca-key.pem").read_bytes() != before


@pytest.mark.parametrize(
    ("account", "why"),
    [("a/b", "do not make an identity"), ("", "do not make an identity"), ("..", "do not make an identity")],
)
def test_names_that_make_no_identity_are_refused(
    tmp_path: Path, account: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ca.init(tmp_path / "ca")
    assert issue(tmp_path, account) == 1
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1
    assert not (tmp_path / "certs").exists()


def test_a_wrong_trust_domain_is_refused(tmp_path: Path) -> None:
    for wrong in ("Upper.example", "a/b", "", "a:80"):
        with pytest.raises(ConfigError, match="--trust-domain"):
            ca.init(tmp_path / "ca", wrong)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("ca-cert.pem", None, "there is no CA; `meshproxy ca init"),
        ("ca-cert.pem", b"junk", "not a certificate of `meshproxy ca init`"),
        ("ca-key.pem", None, "No such file"),
        ("ca-key.pem", b"junk", "not a key of `meshproxy ca init`"),
    ],
)
def test_a_broken_ca_is_one_sentence(
    tmp_path: Path, file: str, content: bytes | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ca.init(tmp_path / "ca")
    if content is None:
        (tmp_path / "ca" / file).unlink()
    else:
        (tmp_path / "ca" / file).write_bytes(content)
    assert issue(tmp_path, "a") == 1
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


def test_a_key_of_another_ca_is_refused(tmp_path: Path) -> None:
    ca.init(tmp_path / "ca")
    ca.init(tmp_path / "other")
    (tmp_path / "other" / "ca-key.pem").replace(tmp_path / "ca" / "ca-key.pem")
    with pytest.raises(ConfigError, match="does not belong to"):
        ca.issue(tmp_path / "ca", "default", "a", tmp_path / "certs")


@pytest.mark.parametrize("hours", ["0", "-1", "x", "nan", "inf"])
def test_a_lifetime_is_a_positive_number(tmp_path: Path, hours: str) -> None:
    with pytest.raises(SystemExit) as caught:
        issue(tmp_path, "a", "--hours", hours)
    assert caught.value.code == 2


def test_the_parser_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    ca.add_parser(parser.add_subparsers())
    for command in (["ca", "--help"], ["ca", "init", "--help"], ["ca", "issue", "--help"]):
        with pytest.raises(SystemExit):
            parser.parse_args(command)
    assert "do not use it in production" in " ".join(capsys.readouterr().out.split())
