"""Workload certificates from files: checked here once, so that a worker never meets a broken one.

Decides: is a triple of files complete, consistent and this workload's; keeps the last good one while it is not.
Leaves to others: when files may have changed (discovery.watch), what is done with them (tls.context in the workers).

Layout: <directory>/<namespace>/<service account>/{cert-chain,key,root-cert}.pem, Istio's own file names.
A rotation writes three files; between the first and the last the triple does not fit together. Such a moment is no
error to shout about: what was good stays in use, `pending` says to look again soon.
"""

import datetime
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from meshproxy.control.messages import PutCertificates
from meshproxy.errors import ConfigError
from meshproxy.model.workload import Workload
from meshproxy.telemetry.process_state import CertificateInfo

CHAIN, KEY, ROOTS = "cert-chain.pem", "key.pem", "root-cert.pem"
_MAX_FILE_BYTES = 1 << 20
_V_NOT_YET_VALID = 9
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID."""


@dataclass(slots=True)
class _Triple:
    """What the three files held at one moment."""

    chain: bytes
    key: bytes = field(repr=False)
    roots: bytes


@dataclass(slots=True)
class _Entry:
    workload: Workload
    good: _Triple | None = None
    seen: _Triple | None = None
    """The last one checked, good or not; an unchanged one is not checked again. None: check whatever is there."""
    leaf: x509.Certificate | None = None
    problem: str | None = None
    infos: list[CertificateInfo] = field(default_factory=list)


class CertificateStore:
    """The certificates of this process's workloads."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._entries: dict[str, _Entry] = {}

    def load(self, workload: Workload) -> PutCertificates:
        """The workload's certificates, checked. ConfigError: one sentence that names the file; the workload is
        remembered all the same, and refresh() gives its certificates as soon as they are good."""
        entry = self._entries.get(workload.id)
        if entry is None or entry.workload.identity != workload.identity:
            entry = self._entries[workload.id] = _Entry(workload)
        entry.workload = workload
        self._look(entry)
        if entry.good is None:
            raise ConfigError(entry.problem or f"{self._home(workload)}: no certificates")
        return _message(entry)

    def forget(self, workload_id: str) -> None:
        """The process does not serve this workload any more."""
        self._entries.pop(workload_id, None)

    def refresh(self) -> list[PutCertificates]:
        """Look at all files again; the certificates of each workload whose triple changed and is good."""
        return [_message(entry) for entry in list(self._entries.values()) if self._look(entry)]

    @property
    def problems(self) -> dict[str, str]:
        """Workload id → what is wrong with its files now, in one sentence, whether or not older ones are in use."""
        return {name: entry.problem for name, entry in self._entries.items() if entry.problem is not None}

    @property
    def pending(self) -> bool:
        """Some workload's files are not good as they are: maybe a rotation is half done, look again within a second."""
        return any(entry.problem is not None for entry in self._entries.values())

    def expiry_s(self, now: float) -> dict[str, float]:
        """Workload id → seconds until the certificate in use expires (negative: it has). now: Unix seconds."""
        return {
            name: entry.leaf.not_valid_after_utc.timestamp() - now
            for name, entry in self._entries.items()
            if entry.leaf is not None
        }

    def describe(self) -> list[CertificateInfo]:
        """Every certificate in use, for /certs and metrics; never a key."""
        return [info for entry in self._entries.values() for info in entry.infos]

    def _home(self, workload: Workload) -> Path:
        return self.directory / workload.namespace / workload.service_account

    def _look(self, entry: _Entry) -> bool:
        """True when another triple became the good one."""
        home = self._home(entry.workload)
        try:
            triple = _read(home)
            if triple == entry.seen:
                if entry.problem is None and entry.leaf is not None:
                    entry.problem = _expiry_problem(entry.leaf, home / CHAIN)
                return False
            leaf = _check(triple, home, entry.workload)
        except _NotYet as error:
            entry.problem, entry.seen = str(error), None
            return False
        except ConfigError as error:
            entry.problem, entry.seen = str(error), triple
            return False
        is_new = triple != entry.good
        entry.seen = entry.good = triple
        entry.leaf, entry.problem = leaf, None
        entry.infos = [
            *_infos(entry.workload.id, "cert_chain", triple.chain, home / CHAIN),
            *_infos(entry.workload.id, "ca_cert", triple.roots, home / ROOTS),
        ]
        return is_new


class _NotYet(ConfigError):
    """Time or another process may mend it while the files stay as they are: check again at the next look."""


def _message(entry: _Entry) -> PutCertificates:
    assert entry.good is not None, "callers ask only after a good look"
    return PutCertificates(
        workload_id=entry.workload.id,
        chain_pem=entry.good.chain,
        key_pem=entry.good.key,
        roots_pem=entry.good.roots,
    )


def _read(home: Path) -> _Triple:
    chain, key, roots = (_read_file(home / name) for name in (CHAIN, KEY, ROOTS))
    return _Triple(chain, key, roots)


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _NotYet(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise _NotYet(f"{path}: larger than 1 MiB, which no certificate file is")
    return data


def _check(triple: _Triple, home: Path, workload: Workload) -> x509.Certificate:
    """The leaf, when everything fits; ConfigError otherwise, about the first thing that does not."""
    chain = _certificates(triple.chain, home / CHAIN)
    roots = _certificates(triple.roots, home / ROOTS)
    leaf = chain[0]
    _check_key(triple.key, leaf, home)
    _check_identity(leaf, workload, home / CHAIN)
    now = datetime.datetime.now(datetime.UTC)
    for certificate, path in [*((item, home / CHAIN) for item in chain), *((item, home / ROOTS) for item in roots)]:
        # Old roots may stay beside the new; only what must be shown or trusted has to be in time.
        if path.name == ROOTS and len(roots) > 1:
            continue
        if certificate.not_valid_after_utc <= now:
            raise ConfigError(f"{path}: the certificate expired at {_time(certificate.not_valid_after_utc)}")
        if certificate.not_valid_before_utc > now:
            raise _NotYet(f"{path}: the certificate is valid only from {_time(certificate.not_valid_before_utc)}")
    _check_handshake(triple, home)
    return leaf


def _certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(f"{path}: holds no PEM certificate that can be read") from None


def _check_key(pem: bytes, leaf: x509.Certificate, home: Path) -> None:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(f"{home / KEY}: the key is encrypted; meshproxy has no password for it") from None
    except Exception:
        # cryptography names many reasons, some with parts of the input: say none of them about a key.
        raise ConfigError(f"{home / KEY}: holds no PEM private key that can be read") from None
    if _spki(key.public_key()) != _spki(leaf.public_key()):
        raise ConfigError(f"{home / KEY}: the key does not belong to the first certificate of {CHAIN}")


def _spki(public_key: Any) -> bytes:
    spki: bytes = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return spki


def _check_identity(leaf: x509.Certificate, workload: Workload, path: Path) -> None:
    uris = _uris(leaf)
    if uris != [str(workload.identity)]:
        found = " and ".join(uris) if uris else "none"
        raise ConfigError(
            f"{path}: the certificate must have exactly one URI SAN, {workload.identity} (workload {workload.id}); "
            f"it has {found}"
        )
    try:
        if leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ConfigError(f"{path}: the first certificate is a CA's, not a workload's")
    except x509.ExtensionNotFound:
        pass
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        if usage.key_cert_sign or usage.crl_sign:
            raise ConfigError(f"{path}: the first certificate may sign others, which a workload's must not")
    except x509.ExtensionNotFound:
        pass


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _check_handshake(triple: _Triple, home: Path) -> None:
    """Shake hands with ourselves: OpenSSL's own word on chain, purposes and key, the same as a peer's will be."""
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(triple.chain + b"\n" + triple.key)
        for context in (server, client):
            context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=b"")
            context.load_verify_locations(cadata=triple.roots.decode("ascii", "ignore"))
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise ConfigError(f"{home}: OpenSSL does not load the certificates: {error.reason}") from None
    finally:
        os.close(descriptor)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for end in (*ends, *ends, ends[1]):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError as error:
        # OpenSSL's clock counts whole seconds and may be a tick behind ours.
        kind = _NotYet if error.verify_code == _V_NOT_YET_VALID else ConfigError
        raise kind(f"{home / CHAIN}: the certificate does not verify against {ROOTS}: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise ConfigError(f"{home}: a TLS handshake with these certificates fails: {error.reason}") from None


def _expiry_problem(leaf: x509.Certificate, path: Path) -> str | None:
    if leaf.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        return f"{path}: the certificate in use expired at {_time(leaf.not_valid_after_utc)}"
    return None


def _infos(workload_id: str, kind: str, pem: bytes, path: Path) -> list[CertificateInfo]:
    return [
        CertificateInfo(
            workload_id=workload_id,
            kind=kind,
            path=str(path),
            serial_number=f"{certificate.serial_number:x}",
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
            uris=tuple(_uris(certificate)),
            subject=certificate.subject.rfc4514_string(),
        )
        for certificate in _certificates(pem, path)
    ]


def _time(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
