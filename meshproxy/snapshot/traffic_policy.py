"""Settings of a DestinationRule → how a cluster balances, limits, ejects and encrypts.

Source: Istio DestinationRule; istio pilot/pkg/networking/core/cluster_traffic_policy.go, cluster_tls.go.
"""

from collections.abc import Mapping
from typing import Any

from meshproxy.model.cluster import (
    PLAINTEXT,
    CircuitLimits,
    LbKind,
    LbPolicy,
    OutlierPolicy,
    Protocol,
    RetryBudget,
    SlowStart,
    TcpKeepalive,
    TlsMode,
    UpstreamTls,
)
from meshproxy.snapshot.destination_rules import Rule, Setting, Subset
from meshproxy.snapshot.findings import Findings

_LB_KINDS = {
    "LEAST_REQUEST": LbKind.LEAST_REQUEST,
    "ROUND_ROBIN": LbKind.ROUND_ROBIN,
    "RANDOM": LbKind.RANDOM,
    "PASSTHROUGH": LbKind.PASSTHROUGH,
}
_HTTP3_ANNOTATION = "meshproxy.io/http3"
_SUCCESS_RATE_ANNOTATION = "meshproxy.io/success-rate"
_FAILURE_PERCENTAGE_ANNOTATION = "meshproxy.io/failure-percentage"
_DEFAULT_OUTLIER = OutlierPolicy()
UDP_IDLE_TIMEOUT_S = 60.0
"""Of a session on which nothing moves, unless connectionPool.tcp.idleTimeout says otherwise (Envoy's udp_proxy)."""


def lb_policy(
    setting: Setting | None, outlier: Setting | None, is_locality_weighted: bool, findings: Findings
) -> LbPolicy:
    kind, slow_start = LbKind.LEAST_REQUEST, None
    if setting is not None:
        value = setting.value
        kind = _LB_KINDS.get(value.get("simple") or "", LbKind.LEAST_REQUEST)
        if kind is LbKind.PASSTHROUGH:
            message = "PASSTHROUGH means the address the client meant to reach, which only captured traffic has"
            findings.warn(setting.resource, f"{setting.path}.simple", message, "LEAST_REQUEST is used instead")
            kind = LbKind.LEAST_REQUEST
        slow_start = _slow_start(value)
    # Istio turns panic off as soon as hosts can be ejected: better no answer than one from a host known to fail.
    panic = 50.0 if outlier is None else float(outlier.value.get("minHealthPercent") or 0)
    return LbPolicy(
        kind=kind,
        slow_start=slow_start if kind is not LbKind.RANDOM else None,
        is_locality_weighted=is_locality_weighted,
        panic_threshold_percent=panic,
    )


def _slow_start(value: Mapping[str, Any]) -> SlowStart | None:
    warmup = value.get("warmup") or {}
    window_s = warmup.get("duration")
    if not window_s:
        return None
    return SlowStart(
        window_s=float(window_s),
        min_weight_percent=float(_number(warmup.get("minimumPercent"), 10.0)),
        aggression=float(_number(warmup.get("aggression"), 1.0)),
    )


def _number(value: Any, default: float) -> float:
    """A number, bare or as `{value: n}`."""
    if isinstance(value, Mapping):
        value = value.get("value")
    return default if value is None else float(value)


def outlier_policy(setting: Setting | None) -> OutlierPolicy | None:
    """None where there is no outlierDetection: hosts are never ejected."""
    if setting is None:
        return None
    value, default = setting.value, _DEFAULT_OUTLIER
    consecutive_5xx = value.get("consecutive5xxErrors", default.consecutive_5xx)
    if value.get("_countsConnectionFailures"):
        # The old consecutiveErrors counted 502, 503, 504 and failures to connect. Those last count as 503 and 504
        # anyway while local-origin errors are not split, so the gateway counter alone is what it meant.
        consecutive_5xx = 0
    base_ejection_s = value.get("baseEjectionTime") or default.base_ejection_s
    codes = value.get("outlierDetectionHttpErrorCodes")
    percent = value.get("maxEjectionPercent")
    annotations = setting.resource.annotations
    return OutlierPolicy(
        consecutive_5xx=consecutive_5xx,
        consecutive_gateway_failure=value.get("consecutiveGatewayErrors") or 0,
        consecutive_local_origin_failure=value.get("consecutiveLocalOriginFailures")
        or default.consecutive_local_origin_failure,
        split_external_local_origin=bool(value.get("splitExternalLocalOriginErrors")),
        interval_s=value.get("interval") or default.interval_s,
        base_ejection_s=base_ejection_s,
        max_ejection_s=max(default.max_ejection_s, base_ejection_s),
        max_ejection_percent=default.max_ejection_percent if percent is None else percent,
        # Who writes a percentage gets exactly that, as in Istio.
        always_eject_one=percent is None,
        enforce_success_rate=annotations.get(_SUCCESS_RATE_ANNOTATION) == "true",
        enforce_failure_percentage=annotations.get(_FAILURE_PERCENTAGE_ANNOTATION) == "true",
        error_codes=frozenset(int(code) for code in codes) if codes else None,
    )


def offers_http3(rule: Rule | None, subset: Subset | None) -> bool:
    """h2UpgradePolicy has no word for HTTP/3, so an annotation of the DestinationRule has one."""
    resources = [found.resource for found in (rule, subset) if found is not None]
    return any(resource.annotations.get(_HTTP3_ANNOTATION) == "true" for resource in resources)


def pool_settings(pool: Setting | None, retry_budget: Setting | None, protocol: Protocol) -> dict[str, Any]:
    """The Cluster fields that connectionPool and retryBudget set. Zero means "not given", as in Istio."""
    tcp = (pool.value.get("tcp") if pool else None) or {}
    http = (pool.value.get("http") if pool else None) or {}
    limits: dict[str, Any] = {
        "max_connections": tcp.get("maxConnections"),
        "max_pending_requests": http.get("http1MaxPendingRequests"),
        "max_requests": http.get("http2MaxRequests"),
        "max_retries": http.get("maxRetries"),
    }
    limits = {name: number for name, number in limits.items() if number}
    if retry_budget is not None:
        limits["retry_budget"] = RetryBudget(
            percent=_number(retry_budget.value.get("percent"), 20.0),
            min_concurrency=retry_budget.value.get("minRetryConcurrency") or 3,
        )
    found: dict[str, Any] = {"limits": CircuitLimits(**limits)} if limits else {}
    if tcp.get("connectTimeout"):
        found["connect_timeout_s"] = tcp["connectTimeout"]
    if tcp.get("maxConnectionDuration"):
        found["max_connection_duration_s"] = tcp["maxConnectionDuration"]
    if tcp.get("tcpKeepalive") is not None:
        found["tcp_keepalive"] = _keepalive(tcp["tcpKeepalive"])
    if http.get("maxRequestsPerConnection"):
        found["max_requests_per_connection"] = http["maxRequestsPerConnection"]
    if http.get("maxConcurrentStreams"):
        found["max_concurrent_streams"] = http["maxConcurrentStreams"]
    if protocol in (Protocol.HTTP2, Protocol.GRPC, Protocol.GRPC_WEB) or (
        protocol is Protocol.HTTP and http.get("h2UpgradePolicy") == "UPGRADE"
    ):
        found["speaks_http2"] = True
    if protocol is Protocol.AUTO or (protocol.is_http and http.get("useClientProtocol")):
        found["follows_client"] = True
    if http.get("h2UpgradePolicy") == "DO_NOT_UPGRADE":
        found["offers_http2"] = False
    idle_s = (http if protocol.is_http else tcp).get("idleTimeout")
    if protocol is Protocol.UDP:
        # Nothing else ever ends a session, so it cannot be switched off (as in Envoy's udp_proxy).
        found["idle_timeout_s"] = idle_s or UDP_IDLE_TIMEOUT_S
    elif idle_s is not None:
        found["idle_timeout_s"] = idle_s or None
    return found


def _keepalive(value: Mapping[str, Any]) -> TcpKeepalive:
    """setsockopt takes whole seconds, at least one; more than Linux takes is the most it takes: refusing it would cost
    every connection of the cluster."""

    def seconds(name: str) -> int | None:
        return min(_MAX_KEEPALIVE_S, max(1, round(value[name]))) if value.get(name) else None

    probes = min(_MAX_KEEPALIVE_PROBES, value.get("probes") or 0)
    return TcpKeepalive(time_s=seconds("time"), interval_s=seconds("interval"), probes=probes or None)


# include/net/tcp.h: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL, MAX_TCP_KEEPCNT.
_MAX_KEEPALIVE_S = 32767
_MAX_KEEPALIVE_PROBES = 127


def upstream_tls(setting: Setting | None, host: str, port: int, subset: str, is_external: bool) -> UpstreamTls:
    """Without tls: auto-mTLS inside the mesh, plaintext to the outside."""
    mesh_sni = f"outbound_.{port}_.{subset}_.{host}"
    if setting is None:
        return PLAINTEXT if is_external else UpstreamTls(mode=TlsMode.AUTO, sni=mesh_sni)
    value = setting.value
    mode = TlsMode(value.get("mode") or "DISABLE")
    if mode is TlsMode.DISABLE:
        return PLAINTEXT
    sans = tuple(value.get("subjectAltNames") or ())
    if mode is TlsMode.ISTIO_MUTUAL:
        return UpstreamTls(mode=mode, sni=value.get("sni") or mesh_sni, subject_alt_names=sans)
    return UpstreamTls(
        mode=mode,
        # Istio sends the request's authority; the host is what clients of this cluster call it by.
        sni=value.get("sni") or ("" if host.startswith("*") else host),
        subject_alt_names=sans,
        ca_file=value.get("caCertificates"),
        certificate_file=value.get("clientCertificate"),
        key_file=value.get("privateKey"),
        insecure_skip_verify=bool(value.get("insecureSkipVerify")),
    )


def proxy_protocol(setting: Setting | None, protocol: Protocol, findings: Findings) -> int:
    """Version of the PROXY header towards upstreams; 0: none."""
    if setting is None:
        return 0
    if protocol is Protocol.UDP:
        message = "a PROXY header begins a connection, and datagrams have none"
        findings.warn(setting.resource, setting.path, message, "datagrams are sent without")
        return 0
    return 2 if setting.value.get("version") == "V2" else 1


def warn_of_udp_tls(setting: Setting | None, findings: Findings) -> None:
    """A DestinationRule that wants UDP encrypted is not obeyed by sending it in the clear."""
    mode = (setting.value.get("mode") or "DISABLE") if setting is not None else "DISABLE"
    if setting is not None and mode != "DISABLE":
        message = f"{mode} for a UDP port, and TLS carries no datagrams"
        findings.warn(setting.resource, f"{setting.path}.mode", message, "datagrams sent there are dropped")
