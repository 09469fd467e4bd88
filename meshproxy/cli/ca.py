"""`meshproxy ca`: a certificate authority for development, in one directory.

Makes what Istio's CA makes: a root for a trust domain, and workload certificates with one SPIFFE URI, in the layout
that `meshproxy run --certs` reads. Not for production: the root's key lies in a file, and nothing revokes.
"""

import argparse
import datetime
import os
import re
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshproxy.errors import ConfigError
from meshproxy.model.identity import SpiffeId

CA_CERTIFICATE, CA_KEY = "ca-cert.pem", "ca-key.pem"
_BACKDATED = datetime.timedelta(minutes=2)
"""Istio's: a peer whose clock is a little behind accepts a fresh certificate."""
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")

_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "ca",
        help="a development certificate authority",
        description="A certificate authority for development: `ca init` makes a root, `ca issue` a workload's "
        "certificate. The root's key lies unencrypted in DIR; do not use it in production.",
    )
    commands = parser.add_subparsers(dest="ca_command", metavar="COMMAND", required=True)

    init = commands.add_parser(
        "init",
        help="make a root",
        description=f"Makes DIR/{CA_CERTIFICATE} and DIR/{CA_KEY}.",
    )
    init.add_argument("directory", metavar="DIR", type=Path)
    init.add_argument("--trust-domain", default="cluster.local", help="of all identities (default: %(default)s)")
    init.add_argument("--days", type=_positive, default=3650.0, help="how long the root is valid (default: 3650)")
    init.add_argument(
        "--force", action="store_true", help="replace a root that is there; what it issued is worthless then"
    )
    init.set_defaults(run=run)

    issue = commands.add_parser(
        "issue",
        help="make a workload's certificate",
        description="Makes CERTS_DIR/<namespace>/<service account>/{cert-chain,key,root-cert}.pem, which "
        "`meshproxy run --certs CERTS_DIR` reads. Repeat it to rotate: a running proxy takes the new one at once.",
    )
    issue.add_argument("directory", metavar="DIR", type=Path, help="where `ca init` made the root")
    issue.add_argument("--namespace", required=True)
    issue.add_argument("--service-account", required=True)
    issue.add_argument("--out", metavar="CERTS_DIR", type=Path, required=True)
    issue.add_argument("--hours", type=_positive, default=24.0, help="how long it is valid (default: 24)")
    issue.add_argument("--key-type", choices=("ec", "rsa"), default="ec", help="P-256 or RSA 2048 (default: ec)")
    issue.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """0 when done; ConfigError says in one sentence what is in the way."""
    try:
        if arguments.ca_command == "init":
            init(arguments.directory, arguments.trust_domain, days=arguments.days, is_forced=arguments.force)
            print(f"{arguments.directory / CA_CERTIFICATE}: root of trust domain {arguments.trust_domain}")
        else:
            identity, home = issue(
                arguments.directory,
                arguments.namespace,
                arguments.service_account,
                arguments.out,
                hours=arguments.hours,
                key_type=arguments.key_type,
            )
            print(f"{home}: {identity}, valid for {arguments.hours:g} hours")
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return 0


def init(
    directory: Path, trust_domain: str = "cluster.local", *, days: float = 3650.0, is_forced: bool = False
) -> None:
    """Make a root in `directory`; ConfigError when there is one and it is not forced."""
    if not _TRUST_DOMAIN.fullmatch(trust_domain):
        raise ConfigError(
            f"--trust-domain {trust_domain!r}: only lower-case letters, digits, dots, dashes, underscores"
        )
    for path in (directory / CA_CERTIFICATE, directory / CA_KEY):
        if path.exists() and not is_forced:
            raise ConfigError(f"{path}: there is a CA already; --force replaces it")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain[:64])])
    certificate = (
        _builder(name, name, key, datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        # A SPIFFE signing certificate carries its trust domain; `issue` reads it from here.
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    _make_private(directory)
    _replace(directory / CA_KEY, _key_pem(key), 0o600)
    _replace(directory / CA_CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def issue(
    directory: Path,
    namespace: str,
    service_account: str,
    out: Path,
    *,
    hours: float = 24.0,
    key_type: str = "ec",
) -> tuple[SpiffeId, Path]:
    """Make a workload's three files below `out`; the identity and where they are."""
    root, root_key, trust_domain = _load(directory)
    try:
        identity = SpiffeId.parse(f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    except ValueError as error:
        raise ConfigError(f"--namespace and --service-account do not make an identity: {error}") from None
    key: _Key = (
        rsa.generate_private_key(public_exponent=65537, key_size=2048)
        if key_type == "rsa"
        else ec.generate_private_key(ec.SECP256R1())
    )
    lifetime = datetime.timedelta(hours=hours)
    leaf = (
        _builder(x509.Name([]), root.subject, key, lifetime, no_later_than=root.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        # Critical, for the subject is empty (RFC 5280 §4.2.1.6).
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    home = out / namespace / service_account
    for path in (out, out / namespace, home):
        _make_private(path)
    # Each file is renamed into place; who reads between two of them sees that key and chain do not fit and waits.
    _replace(home / "root-cert.pem", root.public_bytes(serialization.Encoding.PEM), 0o644)
    _replace(home / "key.pem", _key_pem(key), 0o600)
    _replace(home / "cert-chain.pem", leaf.public_bytes(serialization.Encoding.PEM), 0o644)
    return identity, home


def _load(directory: Path) -> tuple[x509.Certificate, _Key, str]:
    certificate_path, key_path = directory / CA_CERTIFICATE, directory / CA_KEY
    if not certificate_path.exists():
        raise ConfigError(f"{certificate_path}: there is no CA; `meshproxy ca init {directory}` makes one")
    try:
        root = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound):
        raise ConfigError(f"{certificate_path}: not a certificate of `meshproxy ca init`") from None
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise ConfigError(f"{key_path}: not a key of `meshproxy ca init`") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) or key.public_key() != root.public_key():
        raise ConfigError(f"{key_path}: does not belong to {CA_CERTIFICATE}")
    if root.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise ConfigError(f"{certificate_path}: the root has expired; `meshproxy ca init --force` makes a new one")
    return root, key, uri.removeprefix("spiffe://")


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: _Key,
    lifetime: datetime.timedelta,
    no_later_than: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    try:
        end = now + lifetime
    except OverflowError:
        end = datetime.datetime.max.replace(tzinfo=datetime.UTC)
    # 99991231235959Z is the last moment that X.509 can name.
    end = min(end, no_later_than or end, datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(end)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_private(path: Path) -> None:
    """A directory that is there keeps its mode: it is its owner's business."""
    if not path.is_dir():
        path.mkdir(mode=0o700, parents=True)


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Old content or new, never a part; the mode holds from the first byte on."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
