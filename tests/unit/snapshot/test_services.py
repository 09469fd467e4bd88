"""Services of Kubernetes and of ServiceEntries, and the workloads behind them."""

import pytest

from meshproxy.model.cluster import Discovery, Protocol
from tests.support.translation import endpoints, service_entry, sidecar, translated

ECHO = "outbound|8080||echo.default.svc.cluster.local"


def service(spec: str, name: str = "echo", namespace: str = "default", head: str = "") -> str:
    more = f", {head}" if head else ""
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}{more}}}
spec:
  ports: [{{name: http, port: 8080, targetPort: 9001}}]
  {spec}
"""


def endpoint_slice(*listed: str, name: str = "echo", ports: str = "{name: http, port: 9001}") -> str:
    return f"""
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{ports}]
endpoints: [{", ".join(listed)}]
"""


def workload_entry(name: str, address: str, labels: str = "app: echo", extra: str = "") -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: {name}}}
spec: {{address: {address}, labels: {{{labels}}}{extra}}}
"""


def test_slices_give_a_services_endpoints_at_their_own_port() -> None:
    texts = (service(""), endpoint_slice("{addresses: [10.0.0.1]}", "{addresses: [10.0.0.2, 10.0.0.3]}"))
    result = translated(sidecar(), *texts)
    assert [(e.address, e.port) for e in endpoints(result.cluster(ECHO))] == [("10.0.0.1", 9001), ("10.0.0.2", 9001)]
    assert result.cluster(ECHO).service_name == "echo"
    assert result.cluster(ECHO).service_host == "echo.default.svc.cluster.local"


def test_an_endpoint_that_is_not_ready_gets_no_traffic() -> None:
    listed = [
        "{addresses: [10.0.0.1], conditions: {ready: false}}",
        "{addresses: [10.0.0.2], conditions: {ready: true}}",
        "{addresses: [10.0.0.3], conditions: {}}",
    ]
    result = translated(sidecar(), service(""), endpoint_slice(*listed))
    assert [e.address for e in endpoints(result.cluster(ECHO))] == ["10.0.0.2", "10.0.0.3"]


def test_a_zone_is_of_the_proxys_region_unless_its_node_says_another() -> None:
    node = """
apiVersion: v1
kind: Node
metadata: {name: far, labels: {topology.kubernetes.io/region: r2, topology.kubernetes.io/zone: z9}}
"""
    listed = [
        "{addresses: [10.0.0.1], zone: z1, nodeName: near}",
        "{addresses: [10.0.0.2], nodeName: far}",
        "{addresses: [10.0.0.3]}",
    ]
    result = translated(sidecar(), service(""), endpoint_slice(*listed), node, locality="r1/z1")
    assert set(result.shares(ECHO)) == {"r1/z1", "r2/z9", ""}


def test_a_known_pod_gives_its_endpoint_labels_and_identity() -> None:
    pod = """
apiVersion: v1
kind: Pod
metadata: {name: echo-1, labels: {app: echo, security.istio.io/tlsMode: istio}}
spec: {serviceAccountName: echo, containers: [{name: app, image: a}]}
"""
    listed = "{addresses: [10.0.0.1], targetRef: {kind: Pod, name: echo-1}}"
    (endpoint,) = endpoints(translated(sidecar(), service(""), endpoint_slice(listed), pod).cluster(ECHO))
    assert endpoint.speaks_mtls
    assert endpoint.spiffe_ids == ("spiffe://cluster.local/ns/default/sa/echo",)
    assert (endpoint.workload.workload, endpoint.workload.app) == ("echo-1", "echo")


def test_a_slice_without_its_services_label_is_reported() -> None:
    text = endpoint_slice("{addresses: [10.0.0.1]}").replace("labels: {kubernetes.io/service-name: echo}", "labels: {}")
    assert "kubernetes.io/service-name" in translated(sidecar(), service(""), text).warnings[0]


def test_a_selector_takes_workload_entries_too() -> None:
    result = translated(
        sidecar(),
        service("selector: {app: echo}"),
        workload_entry("vm-1", "10.0.0.1"),
        workload_entry("vm-2", "10.0.0.2", extra=", ports: {http: 7000}"),
        workload_entry("vm-3", "10.0.0.3", labels="app: other"),
    )
    assert [(e.address, e.port) for e in endpoints(result.cluster(ECHO))] == [("10.0.0.1", 9001), ("10.0.0.2", 7000)]


def test_an_external_name_is_resolved_by_dns() -> None:
    text = service("type: ExternalName\n  externalName: db.example.com")
    cluster = translated(sidecar(), text).cluster(ECHO)
    assert cluster.discovery is Discovery.STRICT_DNS
    assert [(e.address, e.port) for e in endpoints(cluster)] == [("db.example.com", 9001)]


def test_an_external_name_of_a_known_service_is_an_alias_of_it() -> None:
    alias = service("type: ExternalName\n  externalName: real.default.svc.cluster.local")
    real = service("", "real")
    result = translated(sidecar(), alias, real, endpoint_slice("{addresses: [10.0.0.1]}", name="real"))
    assert [e.address for e in endpoints(result.cluster(ECHO))] == ["10.0.0.1"]


def test_traffic_distribution_prefers_the_own_zone() -> None:
    listed = ["{addresses: [10.0.0.1], zone: z1}", "{addresses: [10.0.0.2], zone: z2}"]
    texts = (sidecar(), endpoint_slice(*listed))
    plain = translated(*texts, service(""), locality="r1/z1", labels={"app": "client"})
    assert {priority for priority, _, _ in plain.shares(ECHO).values()} == {0}
    near = translated(*texts, service("trafficDistribution: PreferClose"), locality="r1/z1", labels={"app": "client"})
    assert near.shares(ECHO) == {"r1/z1": (0, 1, 1), "r1/z2": (1, 1, 1)}


def test_an_exported_service_is_seen_where_it_is_exported_to() -> None:
    hidden = service("", namespace="shop", head='annotations: {networking.istio.io/exportTo: "."}')
    assert "echo.shop" not in translated(sidecar(), hidden).hosts("127.0.0.1_8080")
    assert "echo.shop" in translated(sidecar(), service("", namespace="shop")).hosts("127.0.0.1_8080")


def test_a_udp_port_is_no_http_port() -> None:
    text = service("").replace("name: http, port: 8080", "name: http, port: 8080, protocol: UDP")
    assert translated(sidecar(), text).hosts("127.0.0.1_8080") == {}


def test_a_cluster_ip_and_a_service_entry_address_mean_their_service() -> None:
    entry = service_entry("shop.example", "{address: 10.0.0.1}", extra="addresses: [240.0.0.1, 10.9.0.0/16]")
    hosts = translated(sidecar(), service("clusterIP: 10.96.0.7"), entry).hosts("127.0.0.1_8080")
    assert hosts["10.96.0.7:8080"].name == "echo.default.svc.cluster.local:8080"
    assert hosts["240.0.0.1"].name == "shop.example:8080"
    assert not any("10.9.0.0" in domain for domain in hosts)


# ── ServiceEntry ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_workload_selector_takes_workload_entries_of_the_namespace() -> None:
    result = translated(
        sidecar(),
        service_entry("echo.example", extra="workloadSelector: {labels: {app: echo}}"),
        workload_entry("vm-1", "10.0.0.1", extra=", locality: r1/z1, weight: 3, serviceAccount: echo"),
        workload_entry("vm-2", "10.0.0.2").replace("name: vm-2", "name: vm-2, namespace: other"),
    )
    cluster = result.cluster("outbound|8080||echo.example")
    (endpoint,) = endpoints(cluster)
    assert (endpoint.address, endpoint.port, endpoint.weight) == ("10.0.0.1", 8080, 3)
    assert endpoint.spiffe_ids == ("spiffe://cluster.local/ns/default/sa/echo",)
    assert endpoint.workload.workload == "vm-1"
    assert set(result.shares("outbound|8080||echo.example")) == {"r1/z1"}


def test_labels_of_a_workload_entrys_metadata_win_over_those_of_its_spec() -> None:
    entry = workload_entry("vm-1", "10.0.0.1", labels="app: old").replace(
        "name: vm-1", "name: vm-1, labels: {app: echo}"
    )
    result = translated(sidecar(), service_entry("e.example", extra="workloadSelector: {labels: {app: echo}}"), entry)
    assert len(endpoints(result.cluster("outbound|8080||e.example"))) == 1


def test_each_host_of_an_entry_is_a_service() -> None:
    text = service_entry("a.example", "{address: 10.0.0.1}").replace('["a.example"]', "[a.example, b.example]")
    hosts = translated(sidecar(), text).hosts("127.0.0.1_8080")
    assert {"a.example", "b.example"} <= hosts.keys()
    assert hosts["a.example"] != hosts["b.example"]


def test_a_target_port_is_where_endpoints_listen() -> None:
    text = service_entry("a.example", "{address: 10.0.0.1}").replace("number: 8080", "number: 8080, targetPort: 9000")
    (endpoint,) = endpoints(translated(sidecar(), text).cluster("outbound|8080||a.example"))
    assert endpoint.port == 9000


def test_the_second_entry_for_a_host_in_a_namespace_is_reported() -> None:
    first = service_entry("a.example", "{address: 10.0.0.1}")
    second = service_entry("a.example", "{address: 10.0.0.2}").replace("name: a-example", "name: second")
    result = translated(sidecar(), first, second)
    assert [e.address for e in endpoints(result.cluster("outbound|8080||a.example"))] == ["10.0.0.1"]
    assert "ServiceEntry default/second: spec.hosts[0]" in result.warnings[0]


def test_of_one_host_in_two_namespaces_a_client_sees_its_own() -> None:
    foreign = service_entry("a.example", "{address: 10.0.0.1}", namespace="other")
    own = service_entry("a.example", "{address: 10.0.0.2}")
    result = translated(sidecar(), foreign, own)
    assert [e.address for e in endpoints(result.cluster("outbound|8080||a.example"))] == ["10.0.0.2"]
    assert result.warnings == []


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("HTTP", Protocol.HTTP), ("GRPC", Protocol.GRPC), ("HTTP2", Protocol.HTTP2), ("GRPC-WEB", Protocol.GRPC_WEB)],
)
def test_a_cluster_speaks_the_protocol_of_its_port(protocol: str, expected: Protocol) -> None:
    text = service_entry("a.example", "{address: 10.0.0.1}", protocol=protocol)
    assert translated(sidecar(), text).cluster("outbound|8080||a.example").protocol is expected


def test_a_wildcard_host_is_a_wildcard_domain() -> None:
    hosts = translated(sidecar(), service_entry("*.example", "{address: 10.0.0.1}")).hosts("127.0.0.1_8080")
    assert hosts.keys() == {"*.example", "*.example:8080"}
