import pytest

from meshproxy.model.cluster import Protocol
from meshproxy.snapshot.protocols import declared_protocol, select_protocol


@pytest.mark.parametrize(
    ("port", "name", "app_protocol", "transport", "protocol"),
    [
        (80, "http-web", "", "TCP", Protocol.HTTP),
        (80, "web-http", "", "TCP", Protocol.AUTO),
        (8080, "grpc", "", "TCP", Protocol.GRPC),
        (8080, "grpc-web-x", "", "TCP", Protocol.GRPC_WEB),
        (8080, "GRPC-Web", "", "TCP", Protocol.GRPC_WEB),
        (3306, "db", "", "TCP", Protocol.TCP),
        (3306, "database", "mysql", "TCP", Protocol.TCP),
        (9000, "foo", "kubernetes.io/h2c", "TCP", Protocol.HTTP2),
        (9000, "foo", "kubernetes.io/ws", "TCP", Protocol.HTTP),
        (9000, "foo", "kubernetes.io/wss", "TCP", Protocol.HTTPS),
        (9000, "http", "tcp", "TCP", Protocol.TCP),
        (53, "dns-udp", "", "UDP", Protocol.UDP),
        (53, "dns", "", "TCP", Protocol.TCP),
        (25, "", "", "TCP", Protocol.TCP),
        (27017, "", "", "TCP", Protocol.TCP),
        (8080, "", "", "TCP", Protocol.AUTO),
        (443, "HTTPS", "", "TCP", Protocol.HTTPS),
        (443, "tls-db", "", "TCP", Protocol.TLS),
        (6379, "redis", "", "TCP", Protocol.TCP),
        (80, "http2", "", "TCP", Protocol.HTTP2),
        (80, "http_proxy", "", "TCP", Protocol.HTTP),
    ],
)
def test_a_service_port_speaks_what_its_name_and_app_protocol_say(
    port: int, name: str, app_protocol: str, transport: str, protocol: Protocol
) -> None:
    assert select_protocol(port, name, app_protocol, transport) is protocol


def test_what_a_port_declares_wins_over_its_name() -> None:
    assert declared_protocol(80, "TCP", "http-web") is Protocol.TCP


def test_a_port_that_declares_nothing_speaks_what_its_name_says() -> None:
    assert declared_protocol(80, "", "http-web") is Protocol.HTTP
