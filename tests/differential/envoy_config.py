"""Envoy's static configuration for a RouteTable, written as Istio writes it for a sidecar's outbound listener.

Source: istio pilot/pkg/networking/core/route/route.go and listener_builder.go: no default timeout, request attempts
counted, two retries on connect failures; slashes and dot segments stay as they came.
"""

from collections.abc import Mapping
from typing import Any

from meshproxy.model.route import HeaderOps, MatchKind, NamedMatch, Route, RouteTable, StringMatch, WeightedCluster

_TYPES = "type.googleapis.com/envoy.extensions.filters."
_CODES = {
    301: "MOVED_PERMANENTLY",
    302: "FOUND",
    303: "SEE_OTHER",
    307: "TEMPORARY_REDIRECT",
    308: "PERMANENT_REDIRECT",
}
_RETRY = {"retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes", "num_retries": 2}


def bootstrap(table: RouteTable, clusters: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """clusters: name → ports on 127.0.0.1. Listener and admin take free ports."""
    manager = {
        "@type": _TYPES + "network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "outbound",
        "use_remote_address": False,
        "normalize_path": False,
        "merge_slashes": False,
        "stream_idle_timeout": "0s",
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {
            "name": table.name,
            "validate_clusters": False,
            "virtual_hosts": [
                {
                    "name": host.name,
                    "domains": list(host.domains),
                    "include_request_attempt_count": True,
                    "routes": [_route(route) for route in host.routes],
                }
                for host in table.virtual_hosts
            ],
        },
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": _TYPES + "http.router.v3.Router"}}
        ],
    }
    http = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {
        "admin": {"address": _address(0)},
        "static_resources": {
            "listeners": [{"name": "outbound", "address": _address(0), "filter_chains": [{"filters": [http]}]}],
            "clusters": [_cluster(name, ports) for name, ports in clusters.items()],
        },
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _cluster(name: str, ports: tuple[int, ...]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(port)}} for port in ports]
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}
    return {"name": name, "type": "STATIC", "connect_timeout": "10s", "load_assignment": assignment}


def _route(route: Route) -> dict[str, Any]:
    config: dict[str, Any] = {"name": route.name, "match": _match(route), **_header_ops(route)}
    if route.redirect is not None:
        redirect = route.redirect
        config["redirect"] = _given(
            response_code=_CODES[redirect.code],
            host_redirect=redirect.authority,
            path_redirect=redirect.path,
            prefix_rewrite=redirect.prefix,
            scheme_redirect=redirect.scheme,
            port_redirect=redirect.port,
        )
    elif route.direct_response is not None:
        body = route.direct_response.body.decode()
        config["direct_response"] = _given(
            status=route.direct_response.status, body={"inline_string": body} if body else None
        )
    else:
        config["route"] = {"timeout": "0s", "retry_policy": _RETRY, **_rewrite(route), **_target(route.clusters)}
    return config


def _target(clusters: tuple[WeightedCluster, ...]) -> dict[str, Any]:
    if len(clusters) == 1:
        return {"cluster": clusters[0].cluster_key}
    weighted = [{"name": c.cluster_key, "weight": c.weight, **_header_ops(c)} for c in clusters]
    return {"weighted_clusters": {"clusters": weighted}}


def _rewrite(route: Route) -> dict[str, Any]:
    authority = dict(route.request_headers.set).get("host")
    if route.rewrite is None:
        return _given(host_rewrite_literal=authority)
    regex = route.rewrite.path_regex
    return _given(
        host_rewrite_literal=route.rewrite.authority or authority,
        prefix_rewrite=route.rewrite.path,
        regex_rewrite={"pattern": {"regex": regex[0]}, "substitution": regex[1]} if regex else None,
    )


def _match(route: Route) -> dict[str, Any]:
    match = route.match
    config: dict[str, Any] = {"prefix": "/"}
    if match.path is not None:
        value = match.path.value
        key = {MatchKind.EXACT: "path", MatchKind.PREFIX: "prefix", MatchKind.REGEX: "safe_regex"}[match.path.kind]
        config = {key: {"regex": value} if key == "safe_regex" else value}
        if match.path.ignores_case:
            config["case_sensitive"] = False
    parts = ((":method", match.method), (":authority", match.authority), (":scheme", match.scheme))
    headers = [NamedMatch(name, string) for name, string in parts if string is not None]
    config["headers"] = [_named(named) for named in (*headers, *match.headers)]
    config["query_parameters"] = [_named(named) for named in match.query]
    return config


def _named(named: NamedMatch) -> dict[str, Any]:
    if named.match.kind is MatchKind.PRESENT:
        config: dict[str, Any] = {"name": named.name, "present_match": True}
    else:
        config = {"name": named.name, "string_match": _string(named.match)}
        if named.is_inverted:
            config["treat_missing_header_as_empty"] = True
    return {**config, "invert_match": True} if named.is_inverted else config


def _string(match: StringMatch) -> dict[str, Any]:
    if match.kind is MatchKind.REGEX:
        return {"safe_regex": {"regex": match.value}}
    return _given(**{match.kind.value: match.value}, ignore_case=match.ignores_case or None)


def _header_ops(owner: Route | WeightedCluster) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for kind, ops in (("request", owner.request_headers), ("response", owner.response_headers)):
        config[f"{kind}_headers_to_add"] = [*_added(ops, "set"), *_added(ops, "add")]
        config[f"{kind}_headers_to_remove"] = list(ops.remove)
    return config


def _added(ops: HeaderOps, verb: str) -> list[dict[str, Any]]:
    action = {"set": "OVERWRITE_IF_EXISTS_OR_ADD", "add": "APPEND_IF_EXISTS_OR_ADD"}[verb]
    pairs = ops.set if verb == "set" else ops.add
    return [{"header": {"key": k, "value": v}, "append_action": action} for k, v in pairs if k != "host"]


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
