"""Which listeners have one of QUIC beside them, and which never."""

import pytest

from meshproxy.model.listener import Direction
from tests.support.translation import Translated, translated
from tests.unit.snapshot.test_gateways import EDGE, gateway, server

FILES = "serverCertificate: /c, privateKey: /k, caCertificates: /r"
INBOUND = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: default}
spec:
  ingress:
  - port: {number: 8080, protocol: %s, name: in}
    defaultEndpoint: 127.0.0.1:9000
"""
PEERS = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: %s}}
"""


def names(result: Translated) -> set[str]:
    return {name for name in result.snapshot.listeners if name.endswith("_quic")}


@pytest.mark.parametrize("mode", ["SIMPLE", "MUTUAL", "ISTIO_MUTUAL"])
def test_https_that_ends_at_a_gateway_has_quic_beside_it(mode: str) -> None:
    files = "" if mode == "ISTIO_MUTUAL" else f", {FILES}"
    text = gateway(server(port=443, protocol="HTTPS", more=f", tls: {{mode: {mode}{files}}}"))
    result = translated(text, labels=EDGE, has_http3=True)
    tcp, quic = result.snapshot.listeners["0.0.0.0_443"], result.snapshot.listeners["0.0.0.0_443_quic"]
    assert (tcp.is_quic, tcp.advertises_quic) == (False, True)
    assert (quic.is_quic, quic.advertises_quic) == (True, False)
    assert (quic.tls, quic.route_table, quic.direction) == (tcp.tls, tcp.route_table, Direction.GATEWAY)
    assert (str(tcp.socket_address), str(quic.socket_address)) == ("0.0.0.0:443", "0.0.0.0:443/udp")
    assert names(translated(text, labels=EDGE)) == set()


def test_what_is_not_https_that_ends_here_has_none() -> None:
    text = gateway(
        server(port=80),
        server(port=443, protocol="HTTPS", more=", tls: {mode: PASSTHROUGH}"),
        server(port=444, protocol="TLS", more=f", tls: {{mode: SIMPLE, {FILES}}}"),
    )
    assert names(translated(text, labels=EDGE, has_http3=True)) == set()


@pytest.mark.parametrize(
    ("mode", "protocol", "has_quic"),
    [("STRICT", "HTTP", True), ("PERMISSIVE", "HTTP", True), ("DISABLE", "HTTP", False), ("STRICT", "TCP", False)],
)
def test_inbound_http_has_quic_where_there_is_mutual_tls(mode: str, protocol: str, has_quic: bool) -> None:
    result = translated(INBOUND % protocol, PEERS % mode, has_http3=True)
    (tcp,) = (listener for listener in result.snapshot.listeners.values() if not listener.is_quic)
    assert names(result) == ({f"{tcp.name}_quic"} if has_quic else set())
    assert not tcp.advertises_quic  # the mesh knows without asking


def test_a_udp_port_that_is_taken_stays_whose_it_is() -> None:
    text = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: default}
spec:
  ingress:
  - port: {number: 8080, protocol: HTTP, name: http}
    defaultEndpoint: 127.0.0.1:9000
  - port: {number: 8080, protocol: UDP, name: udp}
    defaultEndpoint: 127.0.0.1:9001
"""
    result = translated(text, PEERS % "PERMISSIVE", has_http3=True)
    assert len([name for name in result.snapshot.listeners if name.endswith("_udp")]) == 1
    assert names(result) == set()
