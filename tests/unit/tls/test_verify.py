import hashlib
import ssl

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import RemoteProtocolError
from meshproxy.model.identity import SpiffeId
from meshproxy.tls.verify import (
    IdentityRefused,
    append_xfcc,
    check_names,
    check_server,
    leaf_signs,
    peer_identity,
    xfcc_element,
)
from tests.support.certificates import Authority

EDGE = "spiffe://cluster.local/ns/default/sa/edge"
AUTHORITY = Authority()


def certificate(*uris: str, expires: str = "Jan  1 00:00:00 2040 GMT") -> dict[str, object]:
    return {"subjectAltName": tuple(("URI", uri) for uri in uris), "notAfter": expires}


def refusal(*arguments: object, **keywords: object) -> IdentityRefused:
    with pytest.raises(IdentityRefused) as caught:
        peer_identity(*arguments, **keywords)  # type: ignore[arg-type]
    return caught.value


def test_the_identity_is_the_only_uri_san() -> None:
    assert peer_identity(certificate(EDGE), "cluster.local") == SpiffeId("cluster.local", "default", "edge")


def test_other_kinds_of_names_beside_the_uri_do_not_matter() -> None:
    names = {"subjectAltName": (("DNS", "edge.default"), ("URI", EDGE), ("IP Address", "10.0.0.1"))}
    assert str(peer_identity(names)) == EDGE


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_certificate_is_refused(nothing: dict[str, object] | None) -> None:
    assert refusal(nothing).detail == "tls.no_certificate"


@pytest.mark.parametrize("uris", [(), (EDGE, EDGE), (EDGE, "https://example.com/")])
def test_anything_but_one_uri_san_is_refused(uris: tuple[str, ...]) -> None:
    assert refusal(certificate(*uris)).detail == "tls.uri_san_count"


@pytest.mark.parametrize(
    "uri",
    [
        "https://cluster.local/ns/default/sa/edge",
        "spiffe://cluster.local:8080/ns/default/sa/edge",
        "spiffe://user@cluster.local/ns/default/sa/edge",
        "spiffe://cluster.local/ns/default/sa/edge?x=1",
        "spiffe://cluster.local/ns/default/sa/edge#f",
        "spiffe://CLUSTER.local/ns/default/sa/edge",
        "SPIFFE://cluster.local/ns/default/sa/edge",
        "spiffe://cluster.local/ns/default/sa/edge/",
        "spiffe://cluster.local/ns//sa/edge",
        "spiffe://cluster.local/ns/../sa/edge",
        "spiffe://cluster.local/ns/def%61ult/sa/edge",
        "spiffe://cluster.local/ns/default/sa/ed\x00ge",
        "spiffe://cluster.local/ns/default/sa/édge",
        "spiffe:///ns/default/sa/edge",
        "spiffe://cluster.local",
        "spiffe://cluster.local/ns/default/sa/" + "e" * 2048,
    ],
)
def test_what_is_no_workload_identity_is_refused(uri: str) -> None:
    assert refusal(certificate(uri)).detail == "tls.not_spiffe"


def test_another_trust_domain_is_refused() -> None:
    assert refusal(certificate(EDGE), "other.example").detail == "tls.trust_domain"
    # A part of an accepted name is not the name.
    assert refusal(certificate("spiffe://local/ns/default/sa/edge"), "cluster.local").detail == "tls.trust_domain"


def test_aliases_of_the_trust_domain_are_accepted() -> None:
    assert str(peer_identity(certificate(EDGE), "other.example", "cluster.local")) == EDGE


def test_a_refusal_is_a_protocol_error_and_a_value_error_with_a_sentence() -> None:
    error = refusal(certificate(EDGE), "other.example")
    assert isinstance(error, RemoteProtocolError)
    assert isinstance(error, ValueError)
    assert str(error) == f"{EDGE} is not of trust domain other.example"


def test_a_certificate_that_expired_since_its_session_began_is_refused() -> None:
    expires = ssl.cert_time_to_seconds("Jan  1 00:00:00 2040 GMT")
    assert peer_identity(certificate(EDGE), now=expires - 1)
    assert refusal(certificate(EDGE), now=expires + 1).detail == "tls.expired"


def test_a_leaf_that_is_a_ca_is_refused() -> None:
    good, bad = AUTHORITY.leaf(), AUTHORITY.leaf(is_ca=True)
    assert peer_identity(certificate(EDGE), der=good.der)
    assert refusal(certificate(EDGE), der=bad.der).detail == "tls.ca_leaf"


def test_a_leaf_that_may_sign_is_refused() -> None:
    assert not leaf_signs(AUTHORITY.leaf().der)
    assert not leaf_signs(AUTHORITY.leaf(key_type="rsa", dns_names=("a.example",)).der)
    assert leaf_signs(AUTHORITY.leaf(signs=True).der)
    assert leaf_signs(AUTHORITY.leaf(is_ca=True, signs=False).der)
    assert leaf_signs(AUTHORITY.certificate.public_bytes(Encoding.DER))


@given(st.binary(max_size=200))
def test_what_is_no_certificate_counts_as_signing_or_has_no_extensions(junk: bytes) -> None:
    leaf_signs(junk)
    assert leaf_signs(b"") is True


GOOD_DER = AUTHORITY.leaf().der


@given(st.integers(0, len(GOOD_DER) - 1), st.integers(0, 255))
def test_damaged_certificates_never_raise(at: int, byte: int) -> None:
    leaf_signs(GOOD_DER[:at] + bytes([byte]) + GOOD_DER[at + 1 :])
    leaf_signs(GOOD_DER[:at])


# ── secure naming ──


def test_the_server_must_run_the_service() -> None:
    assert check_server(certificate(EDGE), (EDGE,), "cluster.local") is None
    other = "spiffe://cluster.local/ns/default/sa/other"
    assert check_server(certificate(other), (EDGE,), "cluster.local") == (
        f"the server is {other}, which does not run this service"
    )


def test_without_expected_identities_the_trust_domain_decides() -> None:
    assert check_server(certificate(EDGE), (), "cluster.local") is None
    assert "trust domain" in (check_server(certificate(EDGE), (), "other.example") or "")


def test_an_identity_expected_by_name_may_be_of_another_trust_domain() -> None:
    federated = "spiffe://other.example/ns/default/sa/edge"
    assert check_server(certificate(federated), (federated,), "cluster.local") is None


def test_a_server_without_an_identity_is_refused() -> None:
    assert check_server(None, (EDGE,), "cluster.local") == "the peer showed no certificate"
    assert check_server(certificate(EDGE, EDGE), (EDGE,), "cluster.local") is not None
    assert check_server(certificate(EDGE), (EDGE,), "cluster.local", der=AUTHORITY.leaf(is_ca=True).der) is not None


def test_subject_alt_names_match_exactly_and_one_is_enough() -> None:
    names = {"subjectAltName": (("DNS", "a.example"), ("URI", EDGE), ("email", "x@a.example"))}
    assert check_names(names, ("a.example",)) is None
    assert check_names(names, ("b.example", EDGE)) is None
    assert check_names(names, ("example",)) is not None
    assert check_names(names, ("x@a.example",)) is not None
    assert check_names({}, ("a.example",)) is not None


# ── x-forwarded-client-cert ──


def test_an_element_is_written_as_envoy_writes_it() -> None:
    peer = {"subject": (), **certificate("spiffe://cluster.local/ns/default/sa/sleep")}
    element = xfcc_element("spiffe://cluster.local/ns/default/sa/httpbin", b"der", peer)
    digest = hashlib.sha256(b"der").hexdigest()
    assert element.decode() == (
        f'By=spiffe://cluster.local/ns/default/sa/httpbin;Hash={digest};Subject="";'
        "URI=spiffe://cluster.local/ns/default/sa/sleep"
    )


def test_subject_is_quoted_and_other_values_where_they_must_be() -> None:
    peer = {
        "subject": ((("organizationName", 'A "B", C'),), (("commonName", "x=y"),)),
        "subjectAltName": (("URI", "spiffe://a;b"), ("DNS", "plain.example"), ("DNS", 'q"uote')),
    }
    element = xfcc_element("", b"der", peer)
    assert element.endswith(b'Subject="CN=x=y,O=A \\"B\\"\\, C";URI="spiffe://a;b";DNS=plain.example;DNS="q\\"uote"')
    assert element.startswith(b"Hash=")


@pytest.mark.parametrize("hostile", ['x";By="spiffe://cluster.local/ns/a/sa/admin', 'x\\";By=y', "x\\", 'x\\\\";By=y'])
def test_a_certificate_cannot_forge_a_pair(hostile: str) -> None:
    peer = {"subject": ((("commonName", hostile),),), "subjectAltName": (("URI", hostile + ";"),)}
    element = xfcc_element("", b"der", peer).decode()
    outside, quoted, skip = "", False, False
    for character in element:
        if skip:
            skip = False
        elif quoted and character == "\\":
            skip = True
        elif character == '"':
            quoted = not quoted
        elif not quoted:
            outside += character
    assert not quoted
    assert [pair.partition("=")[0] for pair in outside.split(";")] == ["Hash", "Subject", "URI"]


def test_a_certificate_cannot_break_the_line() -> None:
    peer = {"subject": ((("commonName", "a\r\nevil: 1"),),), "subjectAltName": ()}
    element = xfcc_element("", b"der", peer)
    assert b"\r" not in element
    assert b"\n" not in element


def test_no_certificate_gives_no_element() -> None:
    assert xfcc_element("x", None, None) == b""


@pytest.mark.parametrize(
    ("existing", "element", "wanted"),
    [
        (None, b"Hash=1", b"Hash=1"),
        (b"", b"Hash=1", b"Hash=1"),
        (b"Hash=0", b"Hash=1", b"Hash=0,Hash=1"),
        (b"Hash=0", b"", b"Hash=0"),
    ],
)
def test_what_the_downstream_sent_stays_in_front(existing: bytes | None, element: bytes, wanted: bytes) -> None:
    assert append_xfcc(existing, element) == wanted
