from meshproxy.model.cluster import Protocol
from meshproxy.model.listener import Direction, ServerTls, ServerTlsMode
from meshproxy.model.route import Redirect
from tests.support.translation import Translated, service_entry, translated, virtual_service

EDGE = {"istio": "edge"}
A = service_entry("a.example", "{address: 10.0.0.1}")
B = service_entry("b.example", "{address: 10.0.0.1}", port=9090)


def gateway(*servers: str, name: str = "edge", selector: str = "istio: edge") -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: {name}}}
spec:
  selector: {{{selector}}}
  servers: [{", ".join(servers)}]
"""


def server(hosts: str = "'*'", port: int = 80, protocol: str = "HTTP", more: str = "") -> str:
    return f"{{port: {{number: {port}, protocol: {protocol}, name: p{port}}}, hosts: [{hosts}]{more}}}"


def routes_to(host: str, destination: str, name: str = "routes", namespace: str = "default") -> str:
    gateways = "edge" if namespace == "default" else "default/edge"
    spec = f"  gateways: [{gateways}]\n  http: [{{name: {name}, route: [{{destination: {{host: {destination}}}}}]}}]"
    return virtual_service(host, spec, name, namespace)


def at_edge(*texts: str) -> Translated:
    return translated(*texts, labels=EDGE)


def test_a_gateway_serves_the_virtual_services_that_name_it() -> None:
    result = at_edge(gateway(server()), A, B, routes_to("shop.example", "b.example"))
    listener = result.snapshot.listeners["0.0.0.0_80"]
    assert (listener.direction, listener.protocol, listener.tls) == (Direction.GATEWAY, Protocol.HTTP, None)
    (route,) = result.routes("0.0.0.0_80", "shop.example")
    assert route.clusters[0].cluster_key == "outbound|9090||b.example"
    assert result.hosts("0.0.0.0_80").keys() == {"shop.example", "shop.example:80"}


def test_a_gateway_that_selects_nobody_here_opens_nothing() -> None:
    assert translated(gateway(server())).snapshot.listeners == {}


def test_a_server_lets_in_only_its_hosts() -> None:
    shop, other = routes_to("shop.example", "b.example"), routes_to("x.other", "b.example", "other")
    result = at_edge(gateway(server("'*.example'")), B, shop, other)
    assert result.hosts("0.0.0.0_80").keys() == {"shop.example", "shop.example:80"}


def test_the_narrower_of_server_host_and_virtual_service_host_is_the_domain() -> None:
    result = at_edge(gateway(server("shop.example")), B, routes_to("'*.example'", "b.example"))
    assert result.hosts("0.0.0.0_80").keys() == {"shop.example", "shop.example:80"}


def test_a_server_host_may_name_the_namespace_it_takes_routes_from() -> None:
    own, foreign = routes_to("a.shop", "b.example", "own"), routes_to("b.shop", "b.example", "foreign", "other")
    assert "b.shop" not in at_edge(gateway(server("'./*'")), B, own, foreign).hosts("0.0.0.0_80")
    assert "b.shop" in at_edge(gateway(server("'other/*'")), B, own, foreign).hosts("0.0.0.0_80")


def test_virtual_services_for_one_host_add_up() -> None:
    spec = "  gateways: [edge]\n  http: [{match: [{uri: {exact: /a}}], route: [{destination: {host: a.example}}]}]"
    result = at_edge(
        gateway(server()), A, B, virtual_service("x.shop", spec, "first"), routes_to("x.shop", "b.example")
    )
    keys = [route.clusters[0].cluster_key for route in result.routes("0.0.0.0_80", "x.shop")]
    assert keys == ["outbound|8080||a.example", "outbound|9090||b.example"]


def test_https_redirect_answers_every_host_of_the_server() -> None:
    result = at_edge(gateway(server("shop.example", more=", tls: {httpsRedirect: true}")), B)
    (route,) = result.routes("0.0.0.0_80", "shop.example")
    assert route.redirect == Redirect(code=301, scheme="https")


def test_https_is_terminated_with_the_named_files() -> None:
    files = "serverCertificate: /c.pem, privateKey: /k.pem"
    result = at_edge(
        gateway(
            server(port=443, protocol="HTTPS", more=f", tls: {{mode: SIMPLE, {files}, minProtocolVersion: TLSV1_3}}"),
            server(port=444, protocol="HTTPS", more=f", tls: {{mode: MUTUAL, {files}, caCertificates: /ca.pem}}"),
            server(port=445, protocol="HTTPS", more=", tls: {mode: ISTIO_MUTUAL}"),
        )
    )
    simple, mutual, mesh = (result.snapshot.listeners[f"0.0.0.0_{port}"] for port in (443, 444, 445))
    assert simple.protocol is Protocol.HTTP
    assert simple.tls == ServerTls(
        mode=ServerTlsMode.SIMPLE, certificate_file="/c.pem", key_file="/k.pem", min_version="TLSV1_3"
    )
    assert mutual.tls == ServerTls(
        mode=ServerTlsMode.MUTUAL, certificate_file="/c.pem", key_file="/k.pem", ca_file="/ca.pem"
    )
    assert mesh.tls == ServerTls(mode=ServerTlsMode.ISTIO_MUTUAL)


def test_passthrough_routes_by_the_name_in_the_client_hello() -> None:
    spec = "  gateways: [edge]\n  tls: [{match: [{sniHosts: [x.shop]}], route: [{destination: {host: b.example}}]}]"
    result = at_edge(
        gateway(server(port=443, protocol="TLS", more=", tls: {mode: PASSTHROUGH}")), B, virtual_service("x.shop", spec)
    )
    listener = result.snapshot.listeners["0.0.0.0_443"]
    assert (listener.protocol, listener.route_table) == (Protocol.TLS, None)
    assert [(r.sni_hosts, r.clusters[0].cluster_key) for r in listener.tcp_routes] == [
        (("x.shop",), "outbound|9090||b.example")
    ]


def test_a_tcp_server_takes_tcp_routes() -> None:
    spec = "  gateways: [edge]\n  tcp: [{match: [{port: 5432}], route: [{destination: {host: b.example}}]}]"
    result = at_edge(gateway(server(port=5432, protocol="TCP")), B, virtual_service("x.shop", spec))
    assert result.snapshot.listeners["0.0.0.0_5432"].tcp_routes[0].clusters[0].cluster_key == "outbound|9090||b.example"


def test_servers_of_one_port_share_a_listener_where_they_speak_alike() -> None:
    second = gateway(server("b.shop"), name="second")
    result = at_edge(gateway(server("a.shop")), second, B, routes_to("a.shop", "b.example"))
    assert list(result.snapshot.listeners) == ["0.0.0.0_80"]
    assert result.errors == []


def test_servers_of_one_port_that_differ_are_an_error() -> None:
    second = gateway(server(port=80, protocol="TCP"), name="second")
    result = at_edge(gateway(server()), second)
    assert "Gateway default/second: spec.servers[0]" in result.errors[0]


def test_a_gateway_for_the_process_itself_stands_beside_declared_workloads() -> None:
    entry = """
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, labels: {istio: edge, app: vm}}
spec: {address: 127.0.0.2}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: vm}
spec:
  workloadSelector: {labels: {app: vm}}
  ingress: [{port: {number: 8080, protocol: HTTP, name: in}, defaultEndpoint: "127.0.0.1:9000"}]
"""
    result = at_edge(entry, gateway(server()))
    assert result.snapshot.listeners["0.0.0.0_80"].workload_id == "default/vm"
