"""What this version does not do with UDP is said, and never done in the clear instead."""

import pytest

from tests.support.translation import translated

ENTRY = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: %(name)s, namespace: default}
spec:
  hosts: [%(name)s.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 53, name: dns, protocol: UDP}]
  endpoints: [{address: 10.0.0.1}]
"""
SIDECAR = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: default}
spec:
  egress:
  - port: {number: 53, protocol: UDP, name: dns}
    bind: %s
    captureMode: NONE
    hosts: ["./*"]
"""
INGRESS = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: default, namespace: default}
spec:
  ingress:
  - port: {number: 53, protocol: UDP, name: dns}
    defaultEndpoint: %s
"""
UDP_CLUSTER = "outbound|53/udp||a.example"


def entry(name: str) -> str:
    return ENTRY % {"name": name}


def rule(tls: str) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: a, namespace: default}}
spec:
  host: a.example
  trafficPolicy: {{tls: {{mode: {tls}}}}}
"""


def test_the_first_of_several_services_gets_all_datagrams() -> None:
    result = translated(SIDECAR % "127.0.0.1", entry("a"), entry("b"))
    (listener,) = result.snapshot.listeners.values()
    assert [route.clusters[0].cluster_key for route in listener.tcp_routes] == [UDP_CLUSTER]
    assert "127.0.0.1:53/udp is UDP, where nothing tells a.example from b.example" in result.warnings[0]


def test_a_listener_without_a_service_is_there_and_goes_nowhere() -> None:
    (listener,) = translated(SIDECAR % "127.0.0.1").snapshot.listeners.values()
    assert (listener.name, listener.tcp_routes) == ("127.0.0.1_53_udp", ())


@pytest.mark.parametrize("mode", ["ISTIO_MUTUAL", "SIMPLE"])
def test_tls_that_a_rule_asks_for_is_not_left_out_silently(mode: str) -> None:
    result = translated(SIDECAR % "127.0.0.1", entry("a"), rule(mode))
    assert result.snapshot.clusters[UDP_CLUSTER].tls.mode == mode
    assert f"{mode} for a UDP port" in result.warnings[0]


def test_without_a_rule_datagrams_are_plain() -> None:
    for texts in ((), (rule("DISABLE"),)):
        result = translated(SIDECAR % "127.0.0.1", entry("a"), *texts)
        assert result.snapshot.clusters[UDP_CLUSTER].tls.mode == "DISABLE"
        assert result.warnings == []


def test_unix_sockets_carry_no_datagrams() -> None:
    result = translated((SIDECAR % "unix:///run/dns").replace("number: 53, ", "number: 0, "), entry("a"))
    assert result.snapshot.listeners == {}
    assert "is a unix socket" in result.errors[0]
    result = translated(INGRESS % "unix:///run/dns")
    assert result.snapshot.listeners == {}
    assert "is a unix socket" in result.errors[0]


def test_a_gateway_serves_no_udp() -> None:
    gateway = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: edge, namespace: default}
spec:
  servers:
  - port: {number: 53, name: dns, protocol: UDP}
    hosts: ["*"]
"""
    result = translated(gateway)
    assert result.snapshot.listeners == {}
    assert "a gateway serves no UDP" in result.errors[0]


def test_tcp_and_udp_may_share_a_number_inbound() -> None:
    both = (INGRESS % "127.0.0.1:5300") + "  - port: {number: 53, protocol: TCP, name: dns-tcp}\n"
    both += "    defaultEndpoint: 127.0.0.1:5300\n"
    result = translated(both)
    assert set(result.snapshot.listeners) == {"0.0.0.0_53", "0.0.0.0_53_udp"}
    assert set(result.snapshot.clusters) == {"inbound|53||@default/meshproxy", "inbound|53/udp||@default/meshproxy"}
