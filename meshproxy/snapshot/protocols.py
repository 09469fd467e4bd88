"""Which protocol a port speaks.

Source: istio pkg/config/kube/conversion.go ConvertProtocol; istio.io "Protocol selection".
"""

from collections.abc import Mapping

from meshproxy.model.cluster import Protocol

_APP_PROTOCOLS: Mapping[str, str] = {
    "kubernetes.io/h2c": "http2",
    "kubernetes.io/ws": "http",
    "kubernetes.io/wss": "https",
}
_BY_NAME: Mapping[str, Protocol] = {
    "http": Protocol.HTTP,
    "http_proxy": Protocol.HTTP,
    "http2": Protocol.HTTP2,
    "grpc": Protocol.GRPC,
    "grpc-web": Protocol.GRPC_WEB,
    "https": Protocol.HTTPS,
    "tls": Protocol.TLS,
    "tcp": Protocol.TCP,
    "udp": Protocol.UDP,
    # Istio's filters for these are off by default, which leaves TCP.
    "mongo": Protocol.TCP,
    "mysql": Protocol.TCP,
    "redis": Protocol.TCP,
}
# SMTP, DNS, MySQL, MongoDB: the server speaks first or the bytes look like nothing, so sniffing would hang.
_TCP_PORTS = frozenset({25, 53, 3306, 27017})


def select_protocol(port: int, name: str = "", app_protocol: str = "", transport: str = "TCP") -> Protocol:
    """Protocol of a Kubernetes Service port. AUTO: nothing says it, so the first bytes have to.

    transport: the Service's own `protocol` (TCP, UDP, SCTP).
    """
    if transport.upper() == "UDP":
        return Protocol.UDP
    word = (_APP_PROTOCOLS.get(app_protocol.lower(), app_protocol) or name).lower()
    found = Protocol.GRPC_WEB if word.startswith("grpc-web") else _BY_NAME.get(word.partition("-")[0])
    if found is not None:
        return found
    return Protocol.TCP if port in _TCP_PORTS else Protocol.AUTO


def declared_protocol(port: int, protocol: str, name: str = "") -> Protocol:
    """Protocol of a port of Istio's own resources, which say it outright; without it the name decides."""
    return _BY_NAME.get(protocol.lower()) or select_protocol(port, name)
