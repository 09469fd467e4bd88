"""Certificates and keys become SSLContexts: mesh mTLS both ways, gateway servers, TLS origination.

Decides: versions, ciphers, resumption, whether a certificate is required and against which roots it is checked.
Leaves to others: whose certificate it is (tls.verify), when it changes (control.certificates).

A context is made anew on rotation, never changed: ticket keys and sessions belong to one context, so a session never
resumes across a change of the trust bundle.
Source: semantics of Istio's sidecars (TLS 1.2 at least, the cipher list of istio.io concepts/security).
"""

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from meshproxy.errors import ConfigError
from meshproxy.model.cluster import TlsMode, UpstreamTls
from meshproxy.model.listener import ServerTls, ServerTlsMode

CIPHERS_TLS12 = ":".join(
    (
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-GCM-SHA256",
    )
)
"""TLS 1.3 suites are OpenSSL's own three; all of them are AEAD with forward secrecy."""

_OPTIONS = ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One workload's identity as PEM: its chain (leaf first), the leaf's key, the roots that peers must chain to.

    Equal bundles make interchangeable contexts.
    """

    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    roots_pem: bytes


def server_context(bundle: Bundle, *, alpn: Sequence[str], requires_client_certificate: bool = True) -> ssl.SSLContext:
    """For inbound mesh connections; a client certificate must chain to the bundle's roots.

    requires_client_certificate: False asks for one and goes on without (a certificate that is shown must verify).
    ConfigError where OpenSSL does not take the PEM.
    """
    context = _server(alpn)
    _load_identity(context, bundle)
    _load_roots(context, bundle.roots_pem)
    context.verify_mode = ssl.CERT_REQUIRED if requires_client_certificate else ssl.CERT_OPTIONAL
    return context


def client_context(bundle: Bundle, *, alpn: Sequence[str]) -> ssl.SSLContext:
    """For outbound mesh connections. The chain is verified here; whose it is, by tls.verify.check_server: mesh
    certificates carry SPIFFE URIs and no host names."""
    context = _client(alpn)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    _load_identity(context, bundle)
    _load_roots(context, bundle.roots_pem)
    return context


def gateway_context(tls: ServerTls, alpn: Sequence[str] = ()) -> ssl.SSLContext:
    """For a Gateway server with SIMPLE or MUTUAL; ISTIO_MUTUAL is server_context, PASSTHROUGH has none.

    ConfigError names the file that is missing or does not load.
    """
    assert tls.mode in (ServerTlsMode.SIMPLE, ServerTlsMode.MUTUAL), "other modes have no certificate files"
    context = _server(alpn)
    if tls.min_version == "TLSV1_3":
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_files(context, tls.certificate_file, tls.key_file, "serverCertificate", "privateKey")
    if tls.mode is ServerTlsMode.MUTUAL:
        if tls.ca_file is None:
            raise ConfigError("tls.caCertificates is missing: MUTUAL needs roots to check client certificates against")
        _load_roots_file(context, tls.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def origination_context(tls: UpstreamTls, alpn: Sequence[str] = ()) -> ssl.SSLContext:
    """For DestinationRule SIMPLE and MUTUAL. The same settings and unchanged files give the same context, so that two
    endpoints of a cluster compare equal and sessions resume.

    The server's name is checked against the SNI, or, where subject_alt_names are given, by tls.verify.check_names.
    ConfigError names the file that is missing or does not load.
    """
    assert tls.mode in (TlsMode.SIMPLE, TlsMode.MUTUAL), "mesh TLS is client_context"
    files = (tls.ca_file, tls.certificate_file, tls.key_file)
    return _origination_context(tls, tuple(alpn), tuple(_stamp(path) for path in files))


@lru_cache(maxsize=256)
def _origination_context(
    tls: UpstreamTls, alpn: tuple[str, ...], stamps: tuple[tuple[int, int, int], ...]
) -> ssl.SSLContext:
    context = _client(alpn)
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = not tls.subject_alt_names
        if tls.ca_file is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            _load_roots_file(context, tls.ca_file)
    if tls.mode is TlsMode.MUTUAL:
        _load_files(context, tls.certificate_file, tls.key_file, "clientCertificate", "privateKey")
    return context


def _stamp(path: str | None) -> tuple[int, int, int]:
    """Changes when the file does; a missing file is told by whoever loads it."""
    try:
        status = os.stat(path) if path is not None else None
    except OSError:
        status = None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status is not None else (0, 0, 0)


def _server(alpn: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context, alpn)
    # One ticket per full handshake, not OpenSSL's two: each costs the server 0.2 ms of a 1.25 ms handshake.
    context.num_tickets = 1
    return context


def _client(alpn: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _harden(context, alpn)
    return context


def _harden(context: ssl.SSLContext, alpn: Sequence[str]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= _OPTIONS
    context.set_ciphers(CIPHERS_TLS12)
    if alpn:
        context.set_alpn_protocols(list(alpn))


def _load_identity(context: ssl.SSLContext, bundle: Bundle) -> None:
    """load_cert_chain takes only paths; a memory file has one, and the key never reaches a disk."""
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(bundle.chain_pem + b"\n" + bundle.key_pem)
        _load_chain(context, f"/proc/self/fd/{descriptor}", None)
    except ssl.SSLError as error:
        raise ConfigError(f"certificate chain and key do not load: {_said(error)}") from None
    finally:
        os.close(descriptor)


def _load_roots(context: ssl.SSLContext, roots_pem: bytes) -> None:
    try:
        context.load_verify_locations(cadata=roots_pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"root certificates do not load: {_said(error)}") from None


def _load_files(
    context: ssl.SSLContext, certificate_file: str | None, key_file: str | None, certificate: str, key: str
) -> None:
    for path, field_name in ((certificate_file, certificate), (key_file, key)):
        if path is None:
            raise ConfigError(f"tls.{field_name} is missing")
        _must_be_readable(path, field_name)
    assert certificate_file is not None
    try:
        _load_chain(context, certificate_file, key_file)
    except ssl.SSLError as error:
        raise ConfigError(f"{certificate_file} and {key_file} do not load: {_said(error)}") from None


def _load_roots_file(context: ssl.SSLContext, path: str) -> None:
    _must_be_readable(path, "caCertificates")
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(f"{path}: root certificates do not load: {_said(error)}") from None


def _must_be_readable(path: str, field_name: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: tls.{field_name} cannot be read: {error.strerror}") from None


def _load_chain(context: ssl.SSLContext, certificate_file: str, key_file: str | None) -> None:
    # Without a password OpenSSL would ask for one on the terminal and wait.
    context.load_cert_chain(certificate_file, key_file, password=b"")


def _said(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else "not PEM"
