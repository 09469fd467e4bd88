"""Whose certificate it is: SPIFFE identities both ways, secure naming, and what XFCC says of the peer. Pure.

Decides: may this peer go on, and under which identity. Leaves to others: the chain (OpenSSL has verified it before).
Source: SPIFFE X.509-SVID §4–5 (exactly one URI SAN; a leaf is no CA and signs nothing), Istio secure naming, Envoy's
x-forwarded-client-cert.
"""

import hashlib
import re
import ssl
from collections.abc import Container, Iterator, Mapping
from typing import Any

from meshproxy.errors import RemoteProtocolError
from meshproxy.model.identity import SpiffeId

PeerCertificate = Mapping[str, Any]
"""What SSLObject.getpeercert() gives; None without a certificate, {} where nothing was verified."""


class IdentityRefused(RemoteProtocolError, ValueError):
    """The peer's certificate verified and still does not say who may come in. detail: the word to count."""

    def __init__(self, detail: str, sentence: str) -> None:
        super().__init__(detail, 403)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


def peer_identity(
    certificate: PeerCertificate | None,
    *trust_domains: str,
    der: bytes | None = None,
    now: float | None = None,
) -> SpiffeId:
    """The SPIFFE ID of a verified certificate; IdentityRefused when there is none that may be trusted.

    trust_domains: the accepted ones (own and aliases); none given: any that the roots vouch for.
    der: the certificate again (getpeercert(True)), to refuse a leaf that is a CA, which the mapping does not show.
    now: Unix seconds; refuses what expired since a resumed session's first handshake, which OpenSSL does not check.
    """
    if not certificate:
        raise IdentityRefused("tls.no_certificate", "the peer showed no certificate")
    uris = _names(certificate, "URI")
    if len(uris) != 1:
        raise IdentityRefused("tls.uri_san_count", f"the certificate has {len(uris)} URI SANs, not exactly one")
    try:
        identity = SpiffeId.parse(uris[0])
    except ValueError as error:
        raise IdentityRefused("tls.not_spiffe", str(error)) from None
    if trust_domains and identity.trust_domain not in trust_domains:
        raise IdentityRefused("tls.trust_domain", f"{identity} is not of trust domain {' or '.join(trust_domains)}")
    if der is not None and leaf_signs(der):
        raise IdentityRefused("tls.ca_leaf", f"the certificate of {identity} is a CA's, not a workload's")
    if now is not None and now > ssl.cert_time_to_seconds(certificate["notAfter"]):
        raise IdentityRefused("tls.expired", f"the certificate of {identity} expired on {certificate['notAfter']}")
    return identity


def check_server(
    certificate: PeerCertificate | None,
    expected: Container[str],
    trust_domain: str,
    *,
    der: bytes | None = None,
    now: float | None = None,
) -> str | None:
    """Secure naming: why this server may not be talked to, or None when it may.

    expected: SPIFFE URIs; empty: any identity of trust_domain. der and now as in peer_identity.
    """
    # An identity that is expected by name is expected whatever its trust domain (federated meshes).
    domains = () if expected else (trust_domain,)
    try:
        identity = peer_identity(certificate, *domains, der=der, now=now)
    except IdentityRefused as refusal:
        return refusal.sentence
    if expected and str(identity) not in expected:
        return f"the server is {identity}, which does not run this service"
    return None


def check_names(certificate: PeerCertificate | None, subject_alt_names: Container[str]) -> str | None:
    """DestinationRule subjectAltNames: why this server may not be talked to, or None. One matching URI, DNS or IP SAN
    is enough; names match exactly, as in Envoy's exact matcher that Istio configures."""
    if not certificate:
        return "the server showed no certificate that could be verified"
    for kind, name in certificate.get("subjectAltName", ()):
        if kind in ("URI", "DNS", "IP Address") and name in subject_alt_names:
            return None
    return "no subject alternative name of the server's certificate is one of subjectAltNames"


def _names(certificate: PeerCertificate, wanted: str) -> list[str]:
    return [name for kind, name in certificate.get("subjectAltName", ()) if kind == wanted]


# ── x-forwarded-client-cert ──

_NEEDS_QUOTES = re.compile(r'[,;="]')


def xfcc_element(by_uri: str, der: bytes | None, certificate: PeerCertificate | None) -> bytes:
    """One element, without Cert and Chain: By, Hash, Subject, then each URI and DNS SAN.

    by_uri: our own identity; "" leaves By out (a gateway whose certificate has no URI).
    b"" without a certificate.
    """
    if not der or certificate is None:
        return b""
    pairs = [f"By={_value(by_uri)}"] if by_uri else []
    pairs.append(f"Hash={hashlib.sha256(der).hexdigest()}")
    # Quoted always; RFC 2253 has escaped quotes and backslashes already, once more would end the quotes early.
    pairs.append(f'Subject="{_distinguished_name(certificate.get("subject", ()))}"')
    pairs.extend(f"URI={_value(uri)}" for uri in _names(certificate, "URI"))
    pairs.extend(f"DNS={_value(name)}" for name in _names(certificate, "DNS"))
    # A header is one line whatever a certificate holds.
    return _CONTROL.sub("?", ";".join(pairs)).encode()


def append_xfcc(existing: bytes | None, element: bytes) -> bytes:
    """APPEND_FORWARD: what the downstream sent stays in front."""
    if not existing:
        return element
    return existing + b"," + element if element else existing


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _value(text: str) -> str:
    if _NEEDS_QUOTES.search(text):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


_SHORT_NAMES = {
    "commonName": "CN",
    "countryName": "C",
    "stateOrProvinceName": "ST",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "streetAddress": "street",
    "domainComponent": "DC",
    "userId": "UID",
}


def _distinguished_name(subject: Any) -> str:
    """RFC 2253: last relative name first, special characters escaped."""
    return ",".join(
        "+".join(f"{_SHORT_NAMES.get(key, key)}={_escaped(value)}" for key, value in relative)
        for relative in reversed(tuple(subject))
    )


def _escaped(value: str) -> str:
    text = re.sub(r'([,+"\\<>;])', r"\\\1", value)
    if text[:1] in ("#", " "):
        text = "\\" + text
    if text.endswith(" ") and len(text) > 1 and not text.endswith("\\ "):
        text = text[:-1] + "\\ "
    return text


# ── what getpeercert() does not show ──

_BASIC_CONSTRAINTS = bytes.fromhex("551d13")
_KEY_USAGE = bytes.fromhex("551d0f")
_KEY_CERT_SIGN, _CRL_SIGN = 0x04, 0x02


def leaf_signs(der: bytes) -> bool:
    """True when the certificate may sign others: basicConstraints CA:TRUE, or keyUsage keyCertSign or cRLSign.

    Malformed DER counts as signing: what cannot be read is not let in. OpenSSL's purpose check lets a CA's certificate
    be a leaf, with X509_STRICT too, so the extensions are read here.
    Source: RFC 5280 §4.1, X.509-SVID §4.1 and §5.3.
    """
    try:
        return any(_extension_signs(oid, value) for oid, value in _extensions(der))
    except (ValueError, IndexError):
        return True


def _extension_signs(oid: bytes, value: bytes) -> bool:
    if oid == _BASIC_CONSTRAINTS:
        content = _single(value, 0x30)
        first = next(_elements(content), None)
        return first is not None and first[0] == 0x01 and any(first[1])
    if oid == _KEY_USAGE:
        bits = _single(value, 0x03)
        return len(bits) > 1 and bool(bits[1] & (_KEY_CERT_SIGN | _CRL_SIGN))
    return False


def _extensions(der: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(object identifier, content of extnValue) of each extension."""
    certificate = _single(der, 0x30)
    tag, to_be_signed = next(_elements(certificate))
    if tag != 0x30:
        raise ValueError("no TBSCertificate")
    for tag, content in _elements(to_be_signed):
        if tag == 0xA3:
            for tag, extension in _elements(_single(content, 0x30)):
                fields = list(_elements(extension))
                if tag != 0x30 or len(fields) < 2 or fields[0][0] != 0x06 or fields[-1][0] != 0x04:
                    raise ValueError("not an Extension")
                yield fields[0][1], fields[-1][1]


def _single(data: bytes, wanted: int) -> bytes:
    elements = list(_elements(data))
    if len(elements) != 1 or elements[0][0] != wanted:
        raise ValueError("not one element of the wanted kind")
    return elements[0][1]


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(tag, content) of each DER element in a row; ValueError or IndexError where the lengths do not fit."""
    at = 0
    while at < len(data):
        tag, length = data[at], data[at + 1]
        at += 2
        if tag & 0x1F == 0x1F:
            raise ValueError("long tags do not occur in certificates")
        if length & 0x80:
            size = length & 0x7F
            if not 1 <= size <= 3:
                raise ValueError("length out of bounds")
            length = int.from_bytes(data[at : at + size], "big")
            at += size
        if at + length > len(data):
            raise ValueError("element runs over its parent")
        yield tag, data[at : at + length]
        at += length
