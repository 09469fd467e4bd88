"""Egress listeners: what is served where."""

import pytest

from meshproxy.model.cluster import LbKind, Protocol
from meshproxy.model.listener import Direction
from meshproxy.model.route import DirectResponse
from tests.support.translation import destination_rule, service_entry, sidecar, translated, virtual_service

LISTENER = "127.0.0.1_8080"


def test_a_listener_serves_the_imported_services_that_have_its_port() -> None:
    result = translated(
        sidecar(hosts='"./*", "other/c.example"'),
        service_entry("a.example", "{address: 10.0.0.1}"),
        service_entry("b.example", "{address: 10.0.0.1}", port=9090),
        service_entry("c.example", "{address: 10.0.0.1}", namespace="other"),
        service_entry("d.example", "{address: 10.0.0.1}", namespace="other"),
    )
    assert result.hosts(LISTENER).keys() == {"a.example", "a.example:8080", "c.example", "c.example:8080"}
    assert set(result.snapshot.clusters) == {"outbound|8080||a.example", "outbound|8080||c.example"}
    listener = result.snapshot.listeners[LISTENER]
    assert (listener.direction, listener.protocol) == (Direction.OUTBOUND, Protocol.HTTP)


def test_unknown_hosts_are_not_found_unless_only_the_registry_is_allowed() -> None:
    entry = service_entry("a.example", "{address: 10.0.0.1}")
    assert "*" not in translated(sidecar(), entry).hosts(LISTENER)
    blocked = translated(sidecar(extra="outboundTrafficPolicy: {mode: REGISTRY_ONLY}"), entry).routes(LISTENER, "*")
    assert blocked[0].direct_response == DirectResponse(status=502)


@pytest.mark.parametrize(
    ("bind", "name", "address", "port"),
    [
        ("bind: 127.0.0.9", "127.0.0.9_8080", "127.0.0.9", 8080),
        ("bind: '::1'", "::1_8080", "::1", 8080),
        ("bind: unix:///run/out.sock", "/run/out.sock", "/run/out.sock", 0),
    ],
)
def test_a_listener_may_name_where_it_binds(bind: str, name: str, address: str, port: int) -> None:
    text = sidecar().replace("captureMode: NONE", f"captureMode: NONE\n    {bind}")
    if "unix" in bind:
        text = text.replace("number: 8080", "number: 0")
    listener = translated(text, service_entry("a.example", "{address: 10.0.0.1}")).snapshot.listeners[name]
    assert (listener.address, listener.port) == (address, port)


def test_a_unix_socket_serves_each_service_at_its_first_port() -> None:
    text = sidecar().replace("captureMode: NONE", "captureMode: NONE\n    bind: unix:///run/out.sock")
    result = translated(
        text.replace("number: 8080", "number: 0"), service_entry("a.example", "{address: 10.0.0.1}", port=7070)
    )
    (route,) = result.routes("/run/out.sock", "a.example")
    assert route.clusters[0].cluster_key == "outbound|7070||a.example"


def test_without_port_every_port_of_the_imported_services_is_a_listener() -> None:
    text = sidecar().replace("  - port: {number: 8080, protocol: HTTP, name: out}\n    captureMode", "  - captureMode")
    result = translated(
        text,
        service_entry("a.example", "{address: 10.0.0.1}"),
        service_entry("b.example", "{address: 10.0.0.1}"),
        service_entry("c.example", "{address: 10.0.0.1}", port=9090, protocol="TCP"),
    )
    assert set(result.snapshot.listeners) == {LISTENER, "127.0.0.1_9090"}
    assert {"a.example", "b.example"} <= result.hosts(LISTENER).keys()
    assert result.snapshot.listeners["127.0.0.1_9090"].protocol is Protocol.TCP


def test_services_of_one_port_and_two_protocols_are_reported() -> None:
    text = sidecar().replace("  - port: {number: 8080, protocol: HTTP, name: out}\n    captureMode", "  - captureMode")
    result = translated(
        text,
        service_entry("a.example", "{address: 10.0.0.1}"),
        service_entry("b.example", "{address: 10.0.0.1}", protocol="TCP"),
    )
    assert "b.example and a.example share port 8080" in result.warnings[0]


def test_a_listener_without_port_that_is_not_captured_only_limits_what_is_seen() -> None:
    text = sidecar().replace("  - port: {number: 8080, protocol: HTTP, name: out}\n    captureMode: NONE\n", "  -")
    assert translated(text, service_entry("a.example", "{address: 10.0.0.1}")).snapshot.listeners == {}


def test_captured_listeners_are_left_out_and_reported() -> None:
    result = translated(sidecar().replace("captureMode: NONE", "captureMode: IPTABLES"))
    assert result.snapshot.listeners == {}
    assert "spec.egress[0].captureMode" in result.warnings[0]


# ── TCP and TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tcp_listener_sends_to_its_service() -> None:
    result = translated(sidecar(protocol="TCP"), service_entry("a.example", "{address: 10.0.0.1}", protocol="TCP"))
    listener = result.snapshot.listeners[LISTENER]
    assert listener.route_table is None
    assert [c.cluster_key for route in listener.tcp_routes for c in route.clusters] == ["outbound|8080||a.example"]


def test_nothing_tells_two_tcp_services_apart_so_the_first_is_used_and_it_is_said() -> None:
    result = translated(
        sidecar(protocol="TCP"),
        service_entry("a.example", "{address: 10.0.0.1}", protocol="TCP"),
        service_entry("b.example", "{address: 10.0.0.1}", protocol="TCP"),
    )
    routes = result.snapshot.listeners[LISTENER].tcp_routes
    assert [c.cluster_key for route in routes for c in route.clusters] == ["outbound|8080||a.example"]
    assert "nothing tells a.example from b.example" in result.warnings[0]


def test_tcp_routes_of_a_virtual_service() -> None:
    spec = """
  tcp:
  - match: [{destinationSubnets: [10.0.0.0/8]}, {port: 9999}]
    route: [{destination: {host: a.example}, weight: 1}, {destination: {host: b.example}, weight: 3}]
  - route: [{destination: {host: b.example}}]
"""
    result = translated(
        sidecar(protocol="TCP", hosts='"./a.example"'),
        service_entry("a.example", "{address: 10.0.0.1}", protocol="TCP"),
        service_entry("b.example", "{address: 10.0.0.1}", protocol="TCP"),
        virtual_service("a.example", spec),
    )
    first, second = result.snapshot.listeners[LISTENER].tcp_routes
    assert first.destination_subnets == ("10.0.0.0/8",)
    assert [(c.cluster_key, c.weight) for c in first.clusters] == [
        ("outbound|8080||a.example", 1),
        ("outbound|8080||b.example", 3),
    ]
    assert [c.cluster_key for c in second.clusters] == ["outbound|8080||b.example"]


def test_the_name_in_the_client_hello_tells_tls_services_apart() -> None:
    result = translated(
        sidecar(protocol="TLS"),
        service_entry("a.example", "{address: 10.0.0.1}", protocol="TLS"),
        service_entry("b.example", "{address: 10.0.0.1}", protocol="TLS"),
    )
    routes = result.snapshot.listeners[LISTENER].tcp_routes
    assert [(route.sni_hosts, route.clusters[0].cluster_key) for route in routes] == [
        (("a.example",), "outbound|8080||a.example"),
        (("b.example",), "outbound|8080||b.example"),
    ]


def test_tls_routes_of_a_virtual_service() -> None:
    spec = "  tls: [{match: [{sniHosts: [a.example]}], route: [{destination: {host: b.example}}]}]"
    result = translated(
        sidecar(protocol="TLS", hosts='"./a.example"'),
        service_entry("a.example", "{address: 10.0.0.1}", protocol="TLS"),
        service_entry("b.example", "{address: 10.0.0.1}", protocol="TLS"),
        virtual_service("a.example", spec),
    )
    (route,) = result.snapshot.listeners[LISTENER].tcp_routes
    assert (route.sni_hosts, route.clusters[0].cluster_key) == (("a.example",), "outbound|8080||b.example")


# ── several workloads ────────────────────────────────────────────────────────────────────────────────────────────────


def two_clients(*texts: str) -> dict[str, LbKind]:
    """Cluster key → balancer of a.example as two workloads with an egress listener each make it."""
    entry = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: {0}}}
spec: {{address: {1}, labels: {{app: {0}}}}}
"""
    out = """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: {0}}}
spec:
  workloadSelector: {{labels: {{app: {0}}}}}
  egress: [{{port: {{number: 8080, protocol: HTTP, name: out}}, bind: {1}, captureMode: NONE, hosts: ["*/*"]}}]
"""
    result = translated(
        entry.format("one", "127.0.0.2"),
        entry.format("two", "127.0.0.3"),
        out.format("one", "127.0.0.2"),
        out.format("two", "127.0.0.3"),
        service_entry("a.example", "{address: 10.0.0.1}"),
        *texts,
    )
    named = {result.routes(listener, "a.example")[0].clusters[0].cluster_key for listener in result.snapshot.listeners}
    assert named == result.snapshot.clusters.keys()
    return {key: cluster.lb.kind for key, cluster in result.snapshot.clusters.items()}


def test_workloads_that_see_the_same_share_one_cluster() -> None:
    rule = destination_rule("a.example", "  trafficPolicy: {loadBalancer: {simple: RANDOM}}")
    assert two_clients(rule) == {"outbound|8080||a.example": LbKind.RANDOM}


def test_workloads_that_see_different_policies_have_a_cluster_each() -> None:
    rule = destination_rule(
        "a.example",
        "  workloadSelector: {matchLabels: {app: two}}\n  trafficPolicy: {loadBalancer: {simple: RANDOM}}",
    )
    assert two_clients(rule) == {
        "outbound|8080||a.example@default/one": LbKind.LEAST_REQUEST,
        "outbound|8080||a.example@default/two": LbKind.RANDOM,
    }
