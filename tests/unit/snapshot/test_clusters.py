"""What a DestinationRule makes of a service."""

from typing import Any

import pytest

from meshproxy.model.cluster import (
    PLAINTEXT,
    CircuitLimits,
    Discovery,
    LbKind,
    LbPolicy,
    OutlierPolicy,
    RetryBudget,
    SlowStart,
    TcpKeepalive,
    TlsMode,
    UpstreamTls,
)
from tests.support.translation import (
    Translated,
    destination_rule,
    endpoints,
    service_entry,
    sidecar,
    translated,
    virtual_service,
)

HOST = "echo.example"
NAME = f"outbound|8080||{HOST}"
ECHO = service_entry(HOST, "{address: 10.0.0.1, locality: r1/z1}", "{address: 10.0.0.2, locality: r1/z2}")


def under(policy: str, **context: Any) -> Translated:
    """The echo service under a trafficPolicy, given as the flow mapping's entries."""
    return translated(sidecar(), ECHO, destination_rule(HOST, f"  trafficPolicy: {{{policy}}}"), **context)


def test_a_service_without_a_rule_has_istios_defaults() -> None:
    cluster = translated(sidecar(), ECHO).cluster(NAME)
    assert cluster.lb == LbPolicy(kind=LbKind.LEAST_REQUEST)
    assert cluster.outlier is None
    assert cluster.limits == CircuitLimits()
    assert cluster.connect_timeout_s == 10.0
    assert cluster.idle_timeout_s == 3600.0
    assert cluster.tls == UpstreamTls(mode=TlsMode.AUTO, sni=f"outbound_.8080_._.{HOST}")
    assert (cluster.service_host, cluster.service_name, cluster.service_namespace) == (HOST, HOST, "default")


@pytest.mark.parametrize(
    ("policy", "lb"),
    [
        ("loadBalancer: {simple: ROUND_ROBIN}", LbPolicy(kind=LbKind.ROUND_ROBIN)),
        ("loadBalancer: {simple: RANDOM}", LbPolicy(kind=LbKind.RANDOM)),
        ("loadBalancer: {simple: LEAST_REQUEST}", LbPolicy(kind=LbKind.LEAST_REQUEST)),
        ("loadBalancer: {simple: UNSPECIFIED}", LbPolicy(kind=LbKind.LEAST_REQUEST)),
        (
            "loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 60s}}",
            LbPolicy(kind=LbKind.ROUND_ROBIN, slow_start=SlowStart(window_s=60.0)),
        ),
        (
            "loadBalancer: {warmup: {duration: 30s, minimumPercent: 20, aggression: 2}}",
            LbPolicy(slow_start=SlowStart(window_s=30.0, min_weight_percent=20.0, aggression=2.0)),
        ),
        ("outlierDetection: {}", LbPolicy(panic_threshold_percent=0.0)),
        ("outlierDetection: {minHealthPercent: 30}", LbPolicy(panic_threshold_percent=30.0)),
    ],
)
def test_load_balancer(policy: str, lb: LbPolicy) -> None:
    assert under(policy).cluster(NAME).lb == lb


def test_passthrough_needs_captured_traffic_and_says_so() -> None:
    result = under("loadBalancer: {simple: PASSTHROUGH}")
    assert result.cluster(NAME).lb.kind is LbKind.LEAST_REQUEST
    assert "spec.trafficPolicy.loadBalancer.simple" in result.warnings[0]


@pytest.mark.parametrize(
    ("detection", "expected"),
    [
        ("{}", OutlierPolicy()),
        ("{consecutive5xxErrors: 3, interval: 5s}", OutlierPolicy(consecutive_5xx=3, interval_s=5.0)),
        ("{consecutive5xxErrors: 0}", OutlierPolicy(consecutive_5xx=0)),
        ("{consecutiveGatewayErrors: 4}", OutlierPolicy(consecutive_gateway_failure=4)),
        ("{consecutiveErrors: 5}", OutlierPolicy(consecutive_5xx=0, consecutive_gateway_failure=5)),
        ("{consecutiveErrors: 5, consecutive5xxErrors: 7}", OutlierPolicy(consecutive_5xx=7)),
        ("{baseEjectionTime: 1m}", OutlierPolicy(base_ejection_s=60.0)),
        ("{baseEjectionTime: 10m}", OutlierPolicy(base_ejection_s=600.0, max_ejection_s=600.0)),
        ("{maxEjectionPercent: 50}", OutlierPolicy(max_ejection_percent=50, always_eject_one=False)),
        ("{maxEjectionPercent: 0}", OutlierPolicy(max_ejection_percent=0, always_eject_one=False)),
        (
            "{splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2}",
            OutlierPolicy(split_external_local_origin=True, consecutive_local_origin_failure=2),
        ),
        ("{outlierDetectionHttpErrorCodes: [429, 503]}", OutlierPolicy(error_codes=frozenset({429, 503}))),
    ],
)
def test_outlier_detection(detection: str, expected: OutlierPolicy) -> None:
    assert under(f"outlierDetection: {detection}").cluster(NAME).outlier == expected


def test_annotations_turn_the_statistical_checks_on() -> None:
    head = 'annotations: {meshproxy.io/success-rate: "true", meshproxy.io/failure-percentage: "true"}'
    rule = destination_rule(HOST, "  trafficPolicy: {outlierDetection: {}}", head=head)
    outlier = translated(sidecar(), ECHO, rule).cluster(NAME).outlier
    assert outlier == OutlierPolicy(enforce_success_rate=True, enforce_failure_percentage=True)


@pytest.mark.parametrize(("word", "is_offered"), [("true", True), ("false", False), ("yes", False)])
def test_an_annotation_offers_http3(word: str, is_offered: bool) -> None:
    rule = destination_rule(HOST, "  trafficPolicy: {}", head=f'annotations: {{meshproxy.io/http3: "{word}"}}')
    assert translated(sidecar(), ECHO, rule).cluster(NAME).offers_http3 is is_offered
    assert not translated(sidecar(), ECHO).cluster(NAME).offers_http3


def test_http3_is_of_http() -> None:
    rule = destination_rule(HOST, "  trafficPolicy: {}", head='annotations: {meshproxy.io/http3: "true"}')
    echo = service_entry(HOST, "{address: 10.0.0.1}", protocol="TCP")
    assert not translated(sidecar(), echo, rule).cluster(NAME).offers_http3


@pytest.mark.parametrize(
    ("pool", "field", "value"),
    [
        ("{tcp: {maxConnections: 5}}", "limits", CircuitLimits(max_connections=5)),
        (
            "{http: {http1MaxPendingRequests: 1, http2MaxRequests: 2, maxRetries: 3}}",
            "limits",
            CircuitLimits(max_pending_requests=1, max_requests=2, max_retries=3),
        ),
        ("{http: {http1MaxPendingRequests: 0, maxRetries: 0}}", "limits", CircuitLimits()),
        ("{tcp: {connectTimeout: 250ms}}", "connect_timeout_s", 0.25),
        ("{tcp: {maxConnectionDuration: 1h}}", "max_connection_duration_s", 3600.0),
        ("{tcp: {idleTimeout: 5s}}", "idle_timeout_s", 3600.0),
        ("{http: {idleTimeout: 5s}}", "idle_timeout_s", 5.0),
        ("{http: {idleTimeout: 0s}}", "idle_timeout_s", None),
        ("{http: {maxRequestsPerConnection: 1}}", "max_requests_per_connection", 1),
        ("{http: {useClientProtocol: true}}", "follows_client", True),
        ("{http: {useClientProtocol: false}}", "follows_client", False),
        (
            "{tcp: {tcpKeepalive: {probes: 3, time: 7200s, interval: 1500ms}}}",
            "tcp_keepalive",
            TcpKeepalive(time_s=7200, interval_s=2, probes=3),
        ),
        ("{tcp: {tcpKeepalive: {}}}", "tcp_keepalive", TcpKeepalive()),
        (
            "{tcp: {tcpKeepalive: {probes: 4294967295, time: 10h, interval: 1ms}}}",
            "tcp_keepalive",
            TcpKeepalive(time_s=32767, interval_s=1, probes=127),
        ),
    ],
)
def test_connection_pool(pool: str, field: str, value: object) -> None:
    assert getattr(under(f"connectionPool: {pool}").cluster(NAME), field) == value


@pytest.mark.parametrize(
    ("protocol", "policy", "follows"),
    [
        ("HTTP2", "{useClientProtocol: true}", True),
        ("GRPC", "{}", False),
        ("TCP", "{useClientProtocol: true}", False),
    ],
)
def test_the_clients_protocol_is_followed_where_the_port_is_http(protocol: str, policy: str, follows: bool) -> None:
    texts = (
        sidecar(protocol=protocol),
        service_entry(HOST, "{address: 10.0.0.1}", protocol=protocol),
        destination_rule(HOST, f"  trafficPolicy: {{connectionPool: {{http: {policy}}}}}"),
    )
    assert translated(*texts).cluster(NAME).follows_client is follows


def test_the_clients_protocol_is_followed_where_the_port_says_none() -> None:
    service = """
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: default}
spec: {selector: {app: echo}, ports: [{port: 8080, name: any}]}
"""
    cluster = translated(sidecar(), service).cluster("outbound|8080||echo.default.svc.cluster.local")
    assert (cluster.follows_client, cluster.speaks_http2) == (True, False)


@pytest.mark.parametrize(
    ("policy", "version"),
    [
        ("", 0),
        ("proxyProtocol: {}", 1),
        ("proxyProtocol: {version: V1}", 1),
        ("proxyProtocol: {version: V2}", 2),
        ("proxyProtocol: {version: V2}, portLevelSettings: [{port: {number: 8080}, loadBalancer: {}}]", 2),
    ],
)
def test_proxy_protocol(policy: str, version: int) -> None:
    result = under(policy)
    assert result.cluster(NAME).proxy_protocol == version
    assert not result.warnings


def test_a_subset_has_its_own_say_about_the_proxy_protocol() -> None:
    spec = """  trafficPolicy: {proxyProtocol: {version: V2}}
  subsets:
  - {name: v1, labels: {version: v1}, trafficPolicy: {proxyProtocol: {version: V1}}}
  - {name: v2, labels: {version: v2}}"""
    result = translated(sidecar(), VERSIONS, destination_rule(HOST, spec), TO_SUBSETS)
    of = {subset: result.cluster(f"outbound|8080|{subset}|{HOST}").proxy_protocol for subset in ("v1", "v2")}
    assert of == {"v1": 1, "v2": 2}


def test_datagrams_go_without_a_proxy_header_and_it_is_said() -> None:
    texts = (
        sidecar(protocol="UDP"),
        service_entry(HOST, "{address: 10.0.0.1}", protocol="UDP"),
        destination_rule(HOST, "  trafficPolicy: {proxyProtocol: {version: V2}}"),
    )
    result = translated(*texts)
    assert result.cluster(f"outbound|8080/udp||{HOST}").proxy_protocol == 0
    assert "a PROXY header begins a connection" in result.warnings[0]


def test_the_idle_timeout_of_a_tcp_port_is_the_tcp_one() -> None:
    texts = (
        sidecar(protocol="TCP"),
        service_entry(HOST, "{address: 10.0.0.1}", protocol="TCP"),
        destination_rule(HOST, "  trafficPolicy: {connectionPool: {tcp: {idleTimeout: 5s}, http: {idleTimeout: 9s}}}"),
    )
    assert translated(*texts).cluster(NAME).idle_timeout_s == 5.0


def test_retry_budget() -> None:
    limits = under("retryBudget: {percent: 40, minRetryConcurrency: 7}").cluster(NAME).limits
    assert limits.retry_budget == RetryBudget(percent=40.0, min_concurrency=7)


@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        ("{mode: DISABLE}", PLAINTEXT),
        ("{mode: SIMPLE}", UpstreamTls(mode=TlsMode.SIMPLE, sni=HOST)),
        (
            "{mode: SIMPLE, sni: a.example, caCertificates: /ca.pem, subjectAltNames: [b.example]}",
            UpstreamTls(mode=TlsMode.SIMPLE, sni="a.example", subject_alt_names=("b.example",), ca_file="/ca.pem"),
        ),
        (
            "{mode: SIMPLE, insecureSkipVerify: true}",
            UpstreamTls(mode=TlsMode.SIMPLE, sni=HOST, insecure_skip_verify=True),
        ),
        (
            "{mode: MUTUAL, clientCertificate: /c.pem, privateKey: /k.pem}",
            UpstreamTls(mode=TlsMode.MUTUAL, sni=HOST, certificate_file="/c.pem", key_file="/k.pem"),
        ),
        ("{mode: ISTIO_MUTUAL}", UpstreamTls(mode=TlsMode.ISTIO_MUTUAL, sni=f"outbound_.8080_._.{HOST}")),
    ],
)
def test_client_tls(tls: str, expected: UpstreamTls) -> None:
    assert under(f"tls: {tls}").cluster(NAME).tls == expected


def test_a_service_outside_the_mesh_is_plaintext_unless_a_rule_says_otherwise() -> None:
    entry = service_entry(HOST, "{address: 10.0.0.1}", location="MESH_EXTERNAL")
    assert translated(sidecar(), entry).cluster(NAME).tls == PLAINTEXT


# ── which rule, which part of it ─────────────────────────────────────────────────────────────────────────────────────


def test_port_level_settings_replace_and_inherit_nothing() -> None:
    result = under(
        "connectionPool: {tcp: {maxConnections: 5}}, outlierDetection: {}, tls: {mode: DISABLE}, "
        "portLevelSettings: [{port: {number: 8080}, loadBalancer: {simple: RANDOM}}]"
    )
    cluster = result.cluster(NAME)
    assert cluster.lb.kind is LbKind.RANDOM
    assert cluster.limits == CircuitLimits()
    assert cluster.outlier is None
    assert cluster.tls.mode is TlsMode.AUTO


def test_settings_of_another_port_change_nothing() -> None:
    result = under(
        "connectionPool: {tcp: {maxConnections: 5}}, "
        "portLevelSettings: [{port: {number: 9090}, loadBalancer: {simple: RANDOM}}]"
    )
    assert result.cluster(NAME).limits.max_connections == 5
    assert result.cluster(NAME).lb.kind is LbKind.LEAST_REQUEST


SUBSETS = """
  trafficPolicy:
    loadBalancer: {simple: RANDOM}
    connectionPool: {tcp: {maxConnections: 5}}
  subsets:
  - name: v1
    labels: {version: v1}
  - name: v2
    labels: {version: v2}
    trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}
"""
VERSIONS = service_entry(
    HOST,
    "{address: 10.0.0.1, labels: {version: v1}}",
    "{address: 10.0.0.2, labels: {version: v2}}",
    "{address: 10.0.0.3, labels: {version: v2, canary: yes}}".replace("yes", "'yes'"),
    "{address: 10.0.0.4}",
)
TO_SUBSETS = virtual_service(
    HOST,
    f"""
  http:
  - match: [{{headers: {{x-v: {{exact: "1"}}}}}}]
    route: [{{destination: {{host: {HOST}, subset: v1}}}}]
  - route: [{{destination: {{host: {HOST}, subset: v2}}}}]
""",
)


def test_a_subset_is_a_cluster_of_the_endpoints_with_its_labels() -> None:
    result = translated(sidecar(), VERSIONS, destination_rule(HOST, SUBSETS), TO_SUBSETS)
    v1, v2 = result.cluster(f"outbound|8080|v1|{HOST}"), result.cluster(f"outbound|8080|v2|{HOST}")
    assert [endpoint.address for endpoint in endpoints(v1)] == ["10.0.0.1"]
    assert [endpoint.address for endpoint in endpoints(v2)] == ["10.0.0.2", "10.0.0.3"]
    assert (v1.subset, v2.subset) == ("v1", "v2")
    assert v1.tls.sni == f"outbound_.8080_.v1_.{HOST}"


def test_a_subset_overrides_block_by_block() -> None:
    result = translated(sidecar(), VERSIONS, destination_rule(HOST, SUBSETS), TO_SUBSETS)
    v1, v2 = result.cluster(f"outbound|8080|v1|{HOST}"), result.cluster(f"outbound|8080|v2|{HOST}")
    assert (v1.lb.kind, v2.lb.kind) == (LbKind.RANDOM, LbKind.ROUND_ROBIN)
    assert (v1.limits.max_connections, v2.limits.max_connections) == (5, 5)


def test_a_destination_in_an_unknown_subset_names_a_cluster_that_does_not_exist() -> None:
    result = translated(sidecar(), VERSIONS, TO_SUBSETS)
    routes = result.routes("127.0.0.1_8080", HOST)
    assert routes[0].clusters[0].cluster_key == f"outbound|8080|v1|{HOST}"
    assert routes[0].clusters[0].cluster_key not in result.snapshot.clusters
    assert "spec.http[0].route[0].destination.subset" in result.warnings[0]
    assert "503" in result.warnings[0]


def connections(host: str, count: int, name: str, namespace: str, more: str = "", head: str = "") -> str:
    spec = f"  trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: {count}}}}}}}\n{more}"
    return destination_rule(host, spec, name, namespace, head)


OF_SHOP = service_entry("echo.shop.example", "{address: 10.0.0.1}", namespace="shop")
SHOP = "outbound|8080||echo.shop.example"


@pytest.mark.parametrize(
    ("namespaces", "used"),
    [
        (["default", "shop", "istio-system"], "default"),
        (["shop", "istio-system"], "shop"),
        (["istio-system"], "istio-system"),
        (["elsewhere"], None),
    ],
)
def test_the_clients_namespace_comes_first_then_the_services_then_the_root(
    namespaces: list[str], used: str | None
) -> None:
    numbers = {"default": 1, "shop": 2, "istio-system": 3, "elsewhere": 4}
    rules = [connections("echo.shop.example", numbers[name], "rule", name) for name in namespaces]
    limits = translated(sidecar(), OF_SHOP, *rules).cluster(SHOP).limits
    assert limits == (CircuitLimits() if used is None else CircuitLimits(max_connections=numbers[used]))


def test_a_rule_that_is_not_exported_rules_only_clients_of_its_namespace() -> None:
    private = connections("echo.shop.example", 2, "rule", "shop", '  exportTo: ["."]')
    assert translated(sidecar(), OF_SHOP, private).cluster(SHOP).limits == CircuitLimits()


def test_the_most_specific_host_wins() -> None:
    rules = [
        connections("*", 1, "all", "default"),
        connections("*.example", 2, "suffix", "default"),
        connections("*.shop.example", 3, "longer", "default"),
    ]
    assert translated(sidecar(), OF_SHOP, *rules).cluster(SHOP).limits.max_connections == 3
    exact = connections("echo.shop.example", 4, "exact", "default")
    assert translated(sidecar(), OF_SHOP, *rules, exact).cluster(SHOP).limits.max_connections == 4


def test_a_workload_selector_narrows_a_rule_to_clients_with_its_labels() -> None:
    chosen = connections(HOST, 1, "chosen", "default", "  workloadSelector: {matchLabels: {app: client}}")
    others = connections(HOST, 2, "others", "default")
    limits = translated(sidecar(), ECHO, others, chosen, labels={"app": "client"}).cluster(NAME).limits
    assert limits.max_connections == 1
    assert translated(sidecar(), ECHO, others, chosen).cluster(NAME).limits.max_connections == 2


def test_two_rules_for_one_host_share_their_subsets_and_the_older_policy_is_used() -> None:
    second = connections(HOST, 9, "second", "default", "  subsets: [{name: v3, labels: {version: v3}}]")
    routes = virtual_service(HOST, f"  http: [{{route: [{{destination: {{host: {HOST}, subset: v3}}}}]}}]")
    result = translated(sidecar(), VERSIONS, destination_rule(HOST, SUBSETS), second, routes)
    assert result.cluster(f"outbound|8080|v3|{HOST}").limits.max_connections == 5
    assert "DestinationRule default/second" in result.warnings[0]


def test_a_short_host_is_completed_by_the_rules_own_namespace() -> None:
    service = """
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec:
  ports: [{name: http, port: 8080}]
"""
    rule = connections("echo", 3, "rule", "shop")
    name = "outbound|8080||echo.shop.svc.cluster.local"
    assert translated(sidecar(), service, rule).cluster(name).limits.max_connections == 3


# ── endpoints ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_endpoint_with_a_proxy_speaks_mtls_under_its_service_account() -> None:
    entry = service_entry(
        HOST,
        "{address: 10.0.0.1, serviceAccount: echo, labels: {security.istio.io/tlsMode: istio}}",
        "{address: 10.0.0.2}",
        extra="subjectAltNames: ['spiffe://other/ns/a/sa/b']",
    )
    proxied, bare = endpoints(translated(sidecar(), entry).cluster(NAME))
    assert proxied.speaks_mtls and not bare.speaks_mtls
    assert proxied.spiffe_ids == ("spiffe://cluster.local/ns/default/sa/echo", "spiffe://other/ns/a/sa/b")
    assert bare.spiffe_ids == ("spiffe://other/ns/a/sa/b",)


def test_an_endpoint_whose_port_disables_mtls_gets_plaintext() -> None:
    labels = "labels: {app: echo, security.istio.io/tlsMode: istio}"
    entry = service_entry(HOST, f"{{address: 10.0.0.1, {labels}, ports: {{out: 9001}}}}")
    policy = """
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: echo}
spec:
  selector: {matchLabels: {app: echo}}
  portLevelMtls: {9001: {mode: DISABLE}}
"""
    assert endpoints(translated(sidecar(), entry).cluster(NAME))[0].speaks_mtls
    assert not endpoints(translated(sidecar(), entry, policy).cluster(NAME))[0].speaks_mtls


def test_endpoint_ports_weights_and_unix_sockets() -> None:
    entry = service_entry(
        HOST, "{address: 10.0.0.1, ports: {out: 9001}, weight: 3}", "{address: 'unix:///run/echo.sock'}"
    )
    tcp, unix = endpoints(translated(sidecar(), entry).cluster(NAME))
    assert (tcp.address, tcp.port, tcp.weight) == ("10.0.0.1", 9001, 3)
    assert (unix.address, unix.port) == ("/run/echo.sock", 0)


def test_the_same_address_twice_is_one_endpoint() -> None:
    entry = service_entry(HOST, "{address: 10.0.0.1}", "{address: 10.0.0.1}")
    assert len(endpoints(translated(sidecar(), entry).cluster(NAME))) == 1


@pytest.mark.parametrize(
    ("resolution", "listed", "discovery", "addresses"),
    [
        ("STATIC", ["{address: 10.0.0.1}"], Discovery.STATIC, ["10.0.0.1"]),
        ("STATIC", ["{address: 'fd00::1'}"], Discovery.STATIC, ["fd00::1"]),
        ("DNS", ["{address: real.example}"], Discovery.STRICT_DNS, ["real.example"]),
        ("DNS", ["{address: 10.0.0.1}"], Discovery.STATIC, ["10.0.0.1"]),
        ("DNS", [], Discovery.STRICT_DNS, [HOST]),
        ("DNS_ROUND_ROBIN", [], Discovery.STRICT_DNS, [HOST]),
        ("NONE", [], Discovery.STRICT_DNS, [HOST]),
    ],
)
def test_what_needs_dns_is_what_has_a_name(
    resolution: str, listed: list[str], discovery: Discovery, addresses: list[str]
) -> None:
    cluster = translated(sidecar(), service_entry(HOST, *listed, resolution=resolution)).cluster(NAME)
    assert cluster.discovery is discovery
    assert [endpoint.address for endpoint in endpoints(cluster)] == addresses


def test_resolution_none_is_said_to_need_captured_traffic() -> None:
    assert "spec.resolution" in translated(sidecar(), service_entry(HOST, resolution="NONE")).warnings[0]


def test_a_workload_groups_probe_checks_its_members() -> None:
    group = """
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: echo}
spec:
  metadata: {labels: {app: echo}}
  template: {serviceAccount: echo}
  probe: {periodSeconds: 5, failureThreshold: 2, httpGet: {path: /healthz, port: 8081}}
"""
    entry = service_entry(HOST, "{address: 10.0.0.1, labels: {app: echo}}")
    check = translated(sidecar(), entry, group).cluster(NAME).health_check
    assert check is not None
    assert (check.kind, check.path, check.port, check.interval_s, check.unhealthy_threshold) == (
        "http",
        "/healthz",
        8081,
        5.0,
        2,
    )
    assert translated(sidecar(), ECHO, group).cluster(NAME).health_check is None


@pytest.mark.parametrize(
    ("probe", "service"), [("{port: 8081}", ""), ("{port: 8081, service: shop.Cart}", "shop.Cart")]
)
def test_a_probe_may_be_of_grpc(probe: str, service: str) -> None:
    group = f"""
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {{name: echo}}
spec:
  metadata: {{labels: {{app: echo}}}}
  template: {{serviceAccount: echo}}
  probe: {{periodSeconds: 5, grpc: {probe}}}
"""
    entry = service_entry(HOST, "{address: 10.0.0.1, labels: {app: echo}}")
    found = translated(sidecar(), entry, group)
    assert not found.warnings
    check = found.cluster(NAME).health_check
    assert check is not None
    assert (check.kind, check.port, check.interval_s, check.service) == ("grpc", 8081, 5.0, service)


def test_the_seeds_old_and_new_spelling_balance_alike() -> None:
    old = """
    loadBalancer: {simple: LEAST_CONN}
    outlierDetection: {consecutiveErrors: 5, interval: 10s}
    localityLbSettings: {enabled: true, distribute: [{from: r1/z1/*, to: {r1/z1/*: 80, r1/z2/*: 20}}]}
"""
    new = """
    loadBalancer:
      simple: LEAST_REQUEST
      localityLbSetting: {enabled: true, distribute: [{from: r1/z1/*, to: {r1/z1/*: 80, r1/z2/*: 20}}]}
    outlierDetection: {consecutive5xxErrors: 5, interval: 10s}
"""
    clusters = [
        translated(sidecar(), ECHO, destination_rule(HOST, f"  trafficPolicy:{spelling}"), locality="r1/z1").cluster(
            NAME
        )
        for spelling in (old, new)
    ]
    assert clusters[0].localities == clusters[1].localities
    assert clusters[0].lb == clusters[1].lb
    assert [group.weight for group in clusters[0].localities] == [80, 20]
