"""One process, several workloads: who is local, and under which Sidecar."""

from pathlib import Path

import pytest

from meshproxy.model.listener import Direction, MtlsMode
from tests.support.translation import endpoints, service_entry, sidecar, translated

EXAMPLES = Path(__file__).parents[3] / "examples"
SHARED = (EXAMPLES / "shared-sidecar.yaml").read_text()
V2X = (EXAMPLES / "v2x-policy.yaml").read_text()


def workload_entry(name: str, address: str, app: str, extra: str = "") -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: {name}}}
spec: {{address: {address}, labels: {{app: {app}}}, serviceAccount: {app}{extra}}}
"""


def ingress(
    app: str, port: int = 8080, bind: str = "", endpoint: str = "127.0.0.1:9000", protocol: str = "HTTP"
) -> str:
    """A Sidecar for app=<app> with one ingress listener; app empty: for the namespace."""
    selector = f"workloadSelector: {{labels: {{app: {app}}}}}" if app else ""
    return f"""
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {{name: in-{app or "all"}}}
spec:
  {selector}
  ingress:
  - port: {{number: {port}, protocol: {protocol}, name: in}}
    {f"bind: {bind}" if bind else ""}
    captureMode: NONE
    {f"defaultEndpoint: '{endpoint}'" if endpoint else ""}
"""


def test_without_declared_workloads_the_process_is_the_one_workload() -> None:
    result = translated(default_namespace="shop", service_account="till", labels={"app": "till", "version": "v2"})
    (workload,) = result.snapshot.workloads.values()
    assert workload.id == "shop/till"
    assert str(workload.identity) == "spiffe://cluster.local/ns/shop/sa/till"
    assert (workload.metric_labels.app, workload.metric_labels.version) == ("till", "v2")


def test_workload_entries_that_a_sidecar_selects_are_local_each_under_its_own_identity() -> None:
    result = translated(
        ingress("a", bind="127.0.0.2"),
        ingress("b", bind="127.0.0.3"),
        workload_entry("vm-a", "127.0.0.2", "a"),
        workload_entry("vm-b", "127.0.0.3", "b"),
        workload_entry("vm-c", "127.0.0.4", "c"),
    )
    assert {w.id: str(w.identity) for w in result.snapshot.workloads.values()} == {
        "default/vm-a": "spiffe://cluster.local/ns/default/sa/a",
        "default/vm-b": "spiffe://cluster.local/ns/default/sa/b",
    }
    assert {name: listener.workload_id for name, listener in result.snapshot.listeners.items()} == {
        "127.0.0.2_8080": "default/vm-a",
        "127.0.0.3_8080": "default/vm-b",
    }


def test_labels_of_the_process_choose_among_declared_workloads() -> None:
    texts = (
        ingress("a"),
        ingress("b"),
        workload_entry("vm-a", "127.0.0.2", "a"),
        workload_entry("vm-b", "127.0.0.3", "b"),
    )
    assert list(translated(*texts, labels={"app": "b"}).snapshot.workloads) == ["default/vm-b"]


def test_several_workloads_of_one_sidecar_each_listen_on_their_own_address() -> None:
    result = translated(
        ingress("a", endpoint="0.0.0.0:9000"),
        workload_entry("vm-1", "127.0.0.2", "a"),
        workload_entry("vm-2", "127.0.0.3", "a"),
    )
    assert {name: listener.workload_id for name, listener in result.snapshot.listeners.items()} == {
        "127.0.0.2_8080": "default/vm-1",
        "127.0.0.3_8080": "default/vm-2",
    }
    targets = {key: endpoints(cluster)[0].key for key, cluster in result.snapshot.clusters.items()}
    assert targets == {
        "inbound|8080||@default/vm-1": "127.0.0.2:9000",
        "inbound|8080||@default/vm-2": "127.0.0.3:9000",
    }


def test_two_sidecars_that_ask_for_one_address_are_an_error_and_the_first_keeps_it() -> None:
    result = translated(
        ingress("a", bind="0.0.0.0"),
        ingress("b", bind="0.0.0.0"),
        workload_entry("vm-a", "127.0.0.2", "a"),
        workload_entry("vm-b", "127.0.0.3", "b"),
    )
    assert result.snapshot.listeners["0.0.0.0_8080"].workload_id == "default/vm-a"
    assert result.errors == [
        "2.yaml:8: Sidecar default/in-b: spec.ingress[0]: default/vm-b asks for 0.0.0.0:8080, where default/vm-a "
        "listens already; the first listener keeps it; give each workload a Sidecar with its own bind or port"
    ]


def test_app_containers_beside_a_proxy_are_workloads_with_an_identity_each() -> None:
    result = translated(SHARED)
    assert {w.id: (w.service_account, dict(w.labels)) for w in result.snapshot.workloads.values()} == {
        "default/app1": ("app1", {"app": "app1"}),
        "default/app2": ("app2", {"app": "app2"}),
    }


def test_a_pods_service_account_is_that_of_its_containers() -> None:
    text = SHARED.replace("      containers:", "      serviceAccountName: both\n      containers:")
    assert {w.service_account for w in translated(text).snapshot.workloads.values()} == {"both"}


def test_a_deployment_without_a_proxy_container_declares_no_workload() -> None:
    text = SHARED.replace("name: envoy", "name: other").replace("envoyproxy/envoy:", "example/app:")
    assert list(translated(text).snapshot.workloads) == ["default/meshproxy"]


def test_a_proxy_container_is_known_by_its_image_too() -> None:
    text = SHARED.replace("name: envoy", "name: other").replace(
        "envoyproxy/envoy:v1.22-latest", "registry:5000/istio/proxyv2:1.29"
    )
    assert list(translated(text).snapshot.workloads) == ["default/app1", "default/app2"]


def test_containers_take_the_sidecars_that_select_their_name() -> None:
    result = translated(SHARED, ingress("app1", 8081), ingress("app2", 8082))
    assert {name: listener.workload_id for name, listener in result.snapshot.listeners.items()} == {
        "0.0.0.0_8081": "default/app1",
        "0.0.0.0_8082": "default/app2",
    }


def test_a_namespaces_sidecar_holds_for_each_workload_and_only_one_gets_its_address() -> None:
    result = translated(SHARED, sidecar())
    assert result.snapshot.listeners["127.0.0.1_8080"].workload_id == "default/app1"
    assert result.errors == []
    assert "default/app2 asks for 127.0.0.1:8080" in result.warnings[0]


def test_a_sidecar_by_selector_wins_over_the_namespaces_and_that_over_the_roots() -> None:
    root = ingress("", 8001).replace("name: in-all", "name: in-all, namespace: istio-system")
    own, chosen = ingress("", 8002), ingress("a", 8003)
    assert list(translated(root).snapshot.listeners) == ["0.0.0.0_8001"]
    assert list(translated(root, own).snapshot.listeners) == ["0.0.0.0_8002"]
    assert list(translated(root, own, chosen, labels={"app": "a"}).snapshot.listeners) == ["0.0.0.0_8003"]


def test_a_second_sidecar_of_a_namespace_is_reported() -> None:
    second = sidecar().replace("name: egress", "name: second")
    assert "Sidecar default/second" in translated(sidecar(), second).warnings[0]


# ── inbound ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_ingress_listener_sends_everything_to_its_default_endpoint() -> None:
    result = translated(ingress(""))
    listener = result.snapshot.listeners["0.0.0.0_8080"]
    assert listener.direction is Direction.INBOUND
    assert listener.mtls is MtlsMode.PERMISSIVE
    (route,) = result.routes("0.0.0.0_8080", "*")
    assert route.name == "default"
    cluster = result.snapshot.clusters[route.clusters[0].cluster_key]
    assert cluster.name == "inbound|8080||"
    assert cluster.service_host == "meshproxy.default.svc.cluster.local"
    assert [e.key for e in endpoints(cluster)] == ["127.0.0.1:9000"]
    assert route.retry is not None and route.retry.on == {"reset-before-request"}


def test_grpc_is_not_sent_twice_inbound() -> None:
    assert translated(ingress("", protocol="GRPC")).routes("0.0.0.0_8080", "*")[0].retry is None


def test_a_tcp_ingress_listener_has_no_routes_but_a_destination() -> None:
    listener = translated(ingress("", protocol="TCP")).snapshot.listeners["0.0.0.0_8080"]
    assert listener.route_table is None
    assert listener.tcp_routes[0].clusters[0].cluster_key == "inbound|8080||@default/meshproxy"


def test_a_unix_socket_may_be_the_workload() -> None:
    cluster = translated(ingress("", endpoint="unix:///run/app.sock")).cluster("inbound|8080||")
    assert [(e.address, e.port) for e in endpoints(cluster)] == [("/run/app.sock", 0)]


def test_a_listener_that_would_send_to_itself_is_refused() -> None:
    result = translated(ingress("", endpoint="127.0.0.1:8080"))
    assert result.snapshot.listeners == {}
    assert "spec.ingress[0].defaultEndpoint" in result.errors[0]
    assert translated(ingress("", endpoint="")).snapshot.listeners == {}
    assert "127.0.0.2_8080" in translated(ingress("", bind="127.0.0.2", endpoint="")).snapshot.listeners


def test_the_v2x_policy_is_strict_for_its_workload_only() -> None:
    result = translated(
        V2X,
        ingress("rsu-service", 8081),
        ingress("other", 8082),
        workload_entry("rsu", "127.0.0.2", "rsu-service"),
        workload_entry("other", "127.0.0.3", "other"),
    )
    modes = {listener.workload_id: listener.mtls for listener in result.snapshot.listeners.values()}
    assert modes == {"default/rsu": MtlsMode.STRICT, "default/other": MtlsMode.PERMISSIVE}


def test_the_inbound_cluster_is_named_after_the_service_in_front_of_the_workload() -> None:
    result = translated(
        ingress("a", 8080),
        workload_entry("vm-a", "127.0.0.2", "a"),
        service_entry("a.example", extra="workloadSelector: {labels: {app: a}}"),
    )
    cluster = result.cluster("inbound|8080||")
    assert (cluster.service_host, cluster.service_namespace) == ("a.example", "default")


def test_the_sidecars_connection_pool_limits_the_inbound_cluster() -> None:
    text = ingress("") + "    connectionPool: {tcp: {maxConnections: 7}}\n"
    assert translated(text).cluster("inbound|8080||").limits.max_connections == 7


def test_an_endpoint_that_is_one_of_our_own_listeners_speaks_mtls_under_its_identity() -> None:
    texts = (
        ingress("a", 8080, bind="127.0.0.2"),
        sidecar(hosts='"*/*"').replace("name: egress", "name: egress, namespace: istio-system"),
        workload_entry("vm-a", "127.0.0.2", "a"),
        workload_entry("vm-b", "127.0.0.3", "b"),
        service_entry("a.example", "{address: 127.0.0.2}"),
        """
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: out-b}
spec:
  workloadSelector: {labels: {app: b}}
  egress: [{port: {number: 8080, protocol: HTTP, name: out}, captureMode: NONE, hosts: ["*/*"]}]
""",
    )
    (endpoint,) = endpoints(translated(*texts).cluster("outbound|8080||a.example"))
    assert endpoint.speaks_mtls
    assert endpoint.spiffe_ids == ("spiffe://cluster.local/ns/default/sa/a",)
    assert endpoint.workload.workload == "vm-a"


def test_peers_are_known_by_identity_and_by_what_their_workloads_have_in_common() -> None:
    result = translated(
        ingress("a"),
        workload_entry("vm-a", "127.0.0.2", "a"),
        workload_entry("vm-b1", "10.0.0.1", "b"),
        workload_entry("vm-b2", "10.0.0.2", "b"),
    )
    peers = {
        identity.rpartition("/")[2]: (known.workload, known.app) for identity, known in result.snapshot.peers.items()
    }
    assert peers == {"a": ("vm-a", "a"), "b": ("unknown", "b")}


def test_an_endpoint_that_names_only_a_service_account_does_not_hide_what_is_known_of_its_workload() -> None:
    result = translated(
        ingress("a"),
        workload_entry("vm-a", "127.0.0.2", "a"),
        service_entry("a.example", "{address: 10.0.0.1, serviceAccount: a}"),
    )
    known = result.snapshot.peers["spiffe://cluster.local/ns/default/sa/a"]
    assert (known.workload, known.app, known.canonical_revision) == ("vm-a", "a", "latest")


def test_abstract_unix_sockets_are_left_out_and_reported() -> None:
    result = translated(
        ingress("", 8081, endpoint="unix://@app"),
        sidecar().replace("name: egress", "name: egress, namespace: istio-system"),
        service_entry("a.example", "{address: 'unix://@app'}"),
    )
    assert result.snapshot.listeners == {}
    assert "@app is an abstract unix socket" in result.errors[0]
    assert "spec.endpoints[0].address" in result.warnings[0]


@pytest.mark.parametrize(
    ("protocol", "speaks_http2"), [("HTTP", False), ("HTTP2", True), ("GRPC", True), ("GRPC-Web", True)]
)
def test_the_protocol_of_a_port_says_whether_its_workload_is_spoken_to_in_http2(
    protocol: str, speaks_http2: bool
) -> None:
    (cluster,) = translated(ingress("", protocol=protocol)).snapshot.clusters.values()
    assert cluster.speaks_http2 is speaks_http2
