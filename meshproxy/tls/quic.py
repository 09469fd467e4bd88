"""TLS for QUIC connections: what our side shows, and whether the other's chain may be believed.

Decides: does the chain lead to the roots, is every certificate of it fit for its place. Leaves to others: whose it is
(tls.verify), the handshake and the proof that the client has the key (aioquic; codec.quic says with which signatures).

aioquic's server checks the client's signature and nothing else: no chain, no dates, and an empty certificate passes.
Here the same is asked as OpenSSL asks of TCP connections (tls.context): by OpenSSL's own chain building, and what it
only asks within a handshake (purpose, key sizes, digests) in so many words.

Imported by a worker only once it has a QUIC listener: it brings aioquic and cryptography, 15 MiB.
"""

import ssl
from ipaddress import ip_address
from typing import Any, Final

from aioquic.quic.configuration import QuicConfiguration
from aioquic.tls import CipherSuite, load_pem_private_key, load_pem_x509_certificates
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import crypto
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address

from meshproxy.errors import ConfigError
from meshproxy.model.listener import ServerTls
from meshproxy.tls.context import Bundle
from meshproxy.tls.verify import IdentityRefused

MAX_CHAIN: Final = 10
"""Certificates of a client, its own included; OpenSSL's default depth."""
_LEAST_RSA_BITS = 2048
_LEAST_EC_BITS = 224
_ANY_USAGE = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE


def configuration(chain_pem: bytes, key_pem: bytes, *, stream_window: int, connection_window: int) -> QuicConfiguration:
    """ConfigError where the PEM does not load or the key is not the certificate's."""
    made = _configuration(False, stream_window, connection_window)
    _show(made, chain_pem, key_pem)
    return made


def client_configuration(
    chain_pem: bytes, key_pem: bytes, *, server_name: str, stream_window: int, connection_window: int
) -> QuicConfiguration:
    """chain_pem: empty where there is no certificate to show. aioquic checks no chain: that is for ServerVerifier."""
    made = _configuration(True, stream_window, connection_window)
    made.verify_mode = ssl.CERT_NONE
    made.server_name = server_name or None
    if chain_pem:
        _show(made, chain_pem, key_pem)
    return made


def _configuration(is_client: bool, stream_window: int, connection_window: int) -> QuicConfiguration:
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=["h3"],
        max_data=connection_window,
        max_stream_data=stream_window,
        cipher_suites=[CipherSuite.AES_128_GCM_SHA256, CipherSuite.AES_256_GCM_SHA384],
    )


def _show(made: QuicConfiguration, chain_pem: bytes, key_pem: bytes) -> None:
    try:
        certificates = load_pem_x509_certificates(chain_pem)
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"certificate chain and key do not load: {error}") from None
    if not certificates or _public(certificates[0].public_key()) != _public(key.public_key()):
        raise ConfigError("certificate chain and key do not load: key values mismatch")
    made.certificate, *made.certificate_chain = certificates
    made.private_key = key


def read_files(tls: ServerTls) -> tuple[bytes, bytes, bytes]:
    """(chain, key, roots) of a Gateway server with SIMPLE or MUTUAL, as PEM; no roots where no client is asked.

    ConfigError names the file that is missing.
    """
    found = []
    for path, field in (
        (tls.certificate_file, "serverCertificate"),
        (tls.key_file, "privateKey"),
        (tls.ca_file, "caCertificates"),
    ):
        if path is None:
            if field != "caCertificates":
                raise ConfigError(f"tls.{field} is missing")
            found.append(b"")
            continue
        try:
            with open(path, "rb") as file:
                found.append(file.read())
        except OSError as error:
            raise ConfigError(f"{path}: tls.{field} cannot be read: {error.strerror}") from None
    chain_pem, key_pem, roots_pem = found
    return chain_pem, key_pem, roots_pem


class ClientVerifier:
    """Whether a client's chain leads to these roots."""

    __slots__ = ("_store",)

    _usage = ExtendedKeyUsageOID.CLIENT_AUTH

    def __init__(self, roots_pem: bytes) -> None:
        self._store = crypto.X509Store()
        try:
            roots = load_pem_x509_certificates(roots_pem)
            for root in roots:
                self._store.add_cert(crypto.X509.from_cryptography(root))
        except (ValueError, crypto.Error) as error:
            raise ConfigError(f"root certificates do not load: {error}") from None
        if not roots:
            raise ConfigError("root certificates do not load: not PEM")

    def verify(self, chain: list[Any]) -> tuple[dict[str, Any], bytes]:
        """(what getpeercert() would say, DER) of the peer's certificate; IdentityRefused where it is not believed."""
        if not chain:
            raise IdentityRefused("tls.no_certificate", "the peer showed no certificate")
        if len(chain) > MAX_CHAIN:
            raise IdentityRefused("tls.chain_too_long", f"the peer showed {len(chain)} certificates")
        context = crypto.X509StoreContext(
            self._store,
            crypto.X509.from_cryptography(chain[0]),
            [crypto.X509.from_cryptography(certificate) for certificate in chain[1:]],
        )
        try:
            verified = context.get_verified_chain()
        except crypto.X509StoreContextError as error:
            raise IdentityRefused("tls.certificate_verify_failed", f"certificate verify failed: {error}") from None
        try:
            # The last one is a root of ours: how it is signed says nothing.
            for depth, each in enumerate(verified[:-1] or verified):
                _check(each.to_cryptography(), self._usage, is_leaf=depth == 0)
            return _peercert(chain[0]), chain[0].public_bytes(serialization.Encoding.DER)
        except IdentityRefused:
            raise
        except (ValueError, x509.DuplicateExtension) as error:
            raise IdentityRefused("tls.bad_certificate", f"the certificate cannot be read: {error}") from None


class ServerVerifier(ClientVerifier):
    """Whether a server's chain leads to these roots."""

    __slots__ = ()

    _usage = ExtendedKeyUsageOID.SERVER_AUTH


def check_host(certificate: x509.Certificate, name: str) -> str | None:
    """Why the server may not be talked to under this DNS name or IP address, or None (RFC 6125)."""
    try:
        try:
            ip_address(name)
        except ValueError:
            verify_certificate_hostname(certificate, name)
        else:
            verify_certificate_ip_address(certificate, name)
    except (CertificateError, VerificationError, ValueError):
        return f"the server's certificate is not for {name}"
    return None


def _check(certificate: x509.Certificate, wanted: x509.ObjectIdentifier, *, is_leaf: bool) -> None:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        is_strong = key.key_size >= _LEAST_RSA_BITS
    elif isinstance(key, ec.EllipticCurvePublicKey):
        is_strong = key.key_size >= _LEAST_EC_BITS
    else:
        is_strong = isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey))
    if not is_strong or isinstance(certificate.signature_hash_algorithm, (hashes.MD5, hashes.SHA1)):
        raise IdentityRefused("tls.weak_certificate", "a key or digest of the peer's chain is too weak")
    usages = _extension(certificate, x509.ExtendedKeyUsage)
    if usages is not None and not any(usage in (wanted, _ANY_USAGE) for usage in usages):
        raise IdentityRefused("tls.wrong_usage", "a certificate of the peer's chain is not for its side")
    usage = _extension(certificate, x509.KeyUsage) if is_leaf else None
    if usage is not None and not usage.digital_signature and not usage.key_agreement:
        raise IdentityRefused("tls.wrong_usage", "the peer's certificate is not for signatures")


def _extension(certificate: x509.Certificate, kind: Any) -> Any:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


_NAMES = {
    NameOID.COMMON_NAME: "commonName",
    NameOID.COUNTRY_NAME: "countryName",
    NameOID.STATE_OR_PROVINCE_NAME: "stateOrProvinceName",
    NameOID.LOCALITY_NAME: "localityName",
    NameOID.ORGANIZATION_NAME: "organizationName",
    NameOID.ORGANIZATIONAL_UNIT_NAME: "organizationalUnitName",
    NameOID.STREET_ADDRESS: "streetAddress",
    NameOID.DOMAIN_COMPONENT: "domainComponent",
    NameOID.USER_ID: "userId",
}


def _peercert(certificate: x509.Certificate) -> dict[str, Any]:
    """As SSLObject.getpeercert() says it, as far as tls.verify reads it."""
    names: list[tuple[str, str]] = []
    for name in _extension(certificate, x509.SubjectAlternativeName) or ():
        if isinstance(name, x509.UniformResourceIdentifier):
            names.append(("URI", name.value))
        elif isinstance(name, x509.DNSName):
            names.append(("DNS", name.value))
    subject = tuple(
        tuple((_NAMES.get(part.oid, part.oid.dotted_string), str(part.value)) for part in relative)
        for relative in certificate.subject.rdns
    )
    ends = certificate.not_valid_after_utc
    months = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
    not_after = f"{months[ends.month - 1]} {ends.day:2d} {ends:%H:%M:%S} {ends.year} GMT"
    assert ssl.cert_time_to_seconds(not_after) == ends.timestamp()
    return {"subject": subject, "subjectAltName": tuple(names), "notAfter": not_after}


def _public(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, form)
    return encoded


def of_bundle(bundle: Bundle, *, stream_window: int, connection_window: int) -> QuicConfiguration:
    return configuration(
        bundle.chain_pem, bundle.key_pem, stream_window=stream_window, connection_window=connection_window
    )
