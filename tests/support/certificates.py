"""Certificates for tests: an authority, and leaves that are right or wrong in one named way.

    authority = Authority()
    leaf = authority.leaf("default", "edge")           # spiffe://cluster.local/ns/default/sa/edge
    leaf = authority.leaf(uris=("spiffe://…", "spiffe://…"), is_ca=True, expires_s=-60)
    leaf.bundle()                                      # tls.context.Bundle
    leaf.write(directory / "default" / "edge")         # {cert-chain,key,root-cert}.pem

Keys are ECDSA P-256 unless said otherwise: an RSA key takes 50 ms to make.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from meshproxy.tls.context import Bundle

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
CODE_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING


def new_key(kind: str = "ec") -> Key:
    """kind: ec or rsa."""
    if kind == "rsa":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass(frozen=True)
class Leaf:
    """A certificate with its key, and the roots its owner trusts."""

    certificate: x509.Certificate
    key: Key
    chain_pem: bytes
    key_pem: bytes
    roots_pem: bytes

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def bundle(self, roots_pem: bytes | None = None) -> Bundle:
        return Bundle(chain_pem=self.chain_pem, key_pem=self.key_pem, roots_pem=roots_pem or self.roots_pem)

    def write(self, directory: Path) -> Path:
        """Over what is there, one file after the other, as a careless rotation does."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "root-cert.pem").write_bytes(self.roots_pem)
        (directory / "cert-chain.pem").write_bytes(self.chain_pem)
        (directory / "key.pem").write_bytes(self.key_pem)
        return directory


class Authority:
    """A root, or an intermediate where `issuer` is given."""

    def __init__(
        self,
        name: str = "Test CA",
        *,
        key_type: str = "ec",
        issuer: "Authority | None" = None,
        path_length: int | None = None,
    ) -> None:
        self.key = new_key(key_type)
        self.name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])
        self.issuer = issuer
        signer_key = issuer.key if issuer is not None else self.key
        builder = _builder(
            self.name, issuer.name if issuer is not None else self.name, self.key, expires_s=86400.0, starts_s=-86400.0
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        builder = builder.add_extension(_usage(signs=True), critical=True)
        self.certificate = builder.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
        ).sign(signer_key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def root(self) -> "Authority":
        return self if self.issuer is None else self.issuer.root

    def leaf(
        self,
        namespace: str = "default",
        account: str = "edge",
        *,
        trust_domain: str = "cluster.local",
        uris: Sequence[str] | None = None,
        dns_names: Sequence[str] = (),
        subject: Sequence[tuple[x509.ObjectIdentifier, str]] = (),
        starts_s: float = -3600.0,
        expires_s: float = 3600.0,
        is_ca: bool = False,
        signs: bool | None = None,
        usages: Sequence[x509.ObjectIdentifier] | None = (SERVER_AUTH, CLIENT_AUTH),
        key_type: str = "ec",
        key: Key | None = None,
        is_self_signed: bool = False,
        raw_alt_names: bytes | None = None,
    ) -> Leaf:
        """A good workload certificate, except for what is said.

        uris: URI SANs instead of the workload's own. starts_s, expires_s: seconds from now. is_ca: CA:TRUE; signs:
        keyCertSign and cRLSign without it. usages: extended key usages, None for no such extension. raw_alt_names: the
        subjectAltName extension's content as DER, for names that cryptography would not write.
        """
        key = key or new_key(key_type)
        name = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
        builder = _builder(name, name if is_self_signed else self.name, key, expires_s=expires_s, starts_s=starts_s)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(uri)
            for uri in ((f"spiffe://{trust_domain}/ns/{namespace}/sa/{account}",) if uris is None else uris)
        ]
        names += [x509.DNSName(dns) for dns in dns_names]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not subject)
        if raw_alt_names is not None:
            oid = ExtensionOID.SUBJECT_ALTERNATIVE_NAME
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, raw_alt_names), critical=True)
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs=is_ca if signs is None else signs), critical=True)
        if usages is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
        certificate = builder.sign(key if is_self_signed else self.key, hashes.SHA256())
        chain = certificate.public_bytes(serialization.Encoding.PEM)
        authority: Authority | None = self
        while authority is not None and authority.issuer is not None:
            chain += authority.pem
            authority = authority.issuer
        return Leaf(certificate, key, chain, key_pem(key), self.root.pem)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Key, *, expires_s: float, starts_s: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(seconds=starts_s))
        .not_valid_after(now + datetime.timedelta(seconds=expires_s))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
