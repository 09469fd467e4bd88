"""Every metric the proxy shows: name, type, labels and help, each declared once.

Leaves to others: the counting (telemetry.recorder) and the text (telemetry.exposition).
Source: istio.io reference/config/metrics for `istio_*`, Envoy's statistics reference for `envoy_*`; `meshproxy_*` are
ours.
"""

from dataclasses import dataclass
from enum import Enum

from meshproxy.telemetry.recorder import (
    CLUSTER_FIELDS,
    HTTP_LABELS,
    LISTENER_FIELDS,
    MESSAGE_LABELS,
    TCP_LABELS,
    is_gauge,
)


class MetricType(str, Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """name: as its samples are written, so a counter may end in `_total`; for a histogram the family's name."""

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, MetricType.COUNTER, help, labels)


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, MetricType.GAUGE, help, labels)


# ── istio_*: what the mesh's dashboards read ──

ISTIO_REQUESTS = _counter(
    "istio_requests_total", "Requests finished, by source, destination and outcome.", *HTTP_LABELS
)
ISTIO_REQUEST_DURATION = Metric(
    "istio_request_duration_milliseconds",
    MetricType.HISTOGRAM,
    "Duration of requests in milliseconds, from the first byte of the request to the last of the response.",
    HTTP_LABELS,
)
ISTIO_REQUEST_BYTES = Metric(
    "istio_request_bytes", MetricType.HISTOGRAM, "Size of requests in bytes, heads included.", HTTP_LABELS
)
ISTIO_RESPONSE_BYTES = Metric(
    "istio_response_bytes", MetricType.HISTOGRAM, "Size of responses in bytes, heads included.", HTTP_LABELS
)
ISTIO_REQUEST_MESSAGES = _counter(
    "istio_request_messages_total", "Messages of gRPC calls, received from the downstream.", *MESSAGE_LABELS
)
ISTIO_RESPONSE_MESSAGES = _counter(
    "istio_response_messages_total", "Messages of gRPC calls, sent to the downstream.", *MESSAGE_LABELS
)
ISTIO_TCP_OPENED = _counter("istio_tcp_connections_opened_total", "TCP connections opened.", *TCP_LABELS)
ISTIO_TCP_CLOSED = _counter("istio_tcp_connections_closed_total", "TCP connections closed.", *TCP_LABELS)
ISTIO_TCP_SENT = _counter(
    "istio_tcp_sent_bytes_total", "Bytes sent to the downstream over TCP connections.", *TCP_LABELS
)
ISTIO_TCP_RECEIVED = _counter(
    "istio_tcp_received_bytes_total", "Bytes received from the downstream over TCP connections.", *TCP_LABELS
)
ISTIO_BUILD = _gauge("istio_build", "Always 1; component and version of this proxy.", "component", "tag")

# ── envoy_*: what an operator of one proxy reads ──

_CLUSTER_HELP = {
    "upstream_rq_total": "Requests sent to the cluster.",
    "upstream_rq_active": "Requests in flight.",
    "upstream_rq_pending_total": "Requests that had to wait for a connection.",
    "upstream_rq_pending_active": "Requests waiting for a connection.",
    "upstream_rq_pending_overflow": "Requests refused because too many were waiting or in flight (flag UO).",
    "upstream_rq_cancelled": "Requests given up before a connection was ready.",
    "upstream_rq_timeout": "Requests that ran into the route's timeout (flag UT).",
    "upstream_rq_per_try_timeout": "Attempts that ran into the per-try timeout.",
    "upstream_rq_rx_reset": "Requests the upstream broke off.",
    "upstream_rq_tx_reset": "Requests this proxy broke off.",
    "upstream_rq_retry": "Retries.",
    "upstream_rq_retry_success": "Retries that succeeded.",
    "upstream_rq_retry_overflow": "Retries refused by the retry budget or limit.",
    "upstream_rq_retry_limit_exceeded": "Requests that used up their retries (flag URX).",
    "upstream_cx_total": "Connections opened or being opened.",
    "upstream_cx_active": "Connections open.",
    "upstream_cx_http3_total": "Connections opened to the cluster that speak HTTP/3.",
    "upstream_http3_broken": "Times an endpoint was left to TCP for a while, as QUIC did not get through.",
    "upstream_cx_connect_fail": "Connections that could not be opened.",
    "upstream_cx_connect_timeout": "Connections that ran into the connect timeout.",
    "upstream_cx_overflow": "Times the connection limit was reached.",
    "upstream_cx_none_healthy": "Requests and connections for which no endpoint was available (flag UH).",
    "upstream_cx_idle_timeout": "Connections closed for being idle.",
    "upstream_cx_max_requests": "Connections closed after their maximum of requests.",
    "upstream_cx_protocol_error": "Connections closed because the upstream broke the protocol.",
    "upstream_cx_destroy": "Connections closed.",
    "upstream_cx_destroy_local": "Connections closed by this proxy.",
    "upstream_cx_destroy_remote": "Connections closed by the upstream.",
    "upstream_cx_destroy_with_active_rq": "Connections closed with requests in flight.",
    "upstream_cx_rx_bytes_total": "Bytes received from the upstream.",
    "upstream_cx_tx_bytes_total": "Bytes sent to the upstream.",
    "lb_healthy_panic": "Picks made among all endpoints because too few were healthy.",
    "ssl_handshake": "TLS handshakes completed.",
    "ssl_session_reused": "TLS handshakes that resumed a session.",
    "ssl_connection_error": "TLS handshakes that failed, other than by verification.",
    "ssl_fail_verify_error": "TLS handshakes that failed because the upstream's identity was not the expected one.",
    "udp_sess_tx_datagrams": "Datagrams sent to the cluster.",
    "udp_sess_tx_errors": "Datagrams that could not be sent to the cluster.",
    "udp_sess_rx_datagrams": "Datagrams received from the cluster.",
    "udp_sess_rx_errors": "Errors on receiving from the cluster: its host says that nobody listens there.",
}
_LISTENER_HELP = {
    "downstream_cx_total": "Connections accepted.",
    "downstream_cx_active": "Connections open.",
    "downstream_cx_overflow": "Connections refused by the connection limit.",
    "downstream_cx_destroy": "Connections closed.",
    "downstream_cx_idle_timeout": "Connections closed for being idle.",
    "downstream_cx_protocol_error": "Connections closed because the downstream broke the protocol.",
    "downstream_cx_rx_bytes_total": "Bytes received from downstreams.",
    "downstream_cx_tx_bytes_total": "Bytes sent to downstreams.",
    "downstream_cx_proxy_proto_error": "Connections refused because they began with no PROXY header, or a wrong one.",
    "downstream_pre_cx_timeout": "Connections closed because their first bytes or handshake took too long.",
    "downstream_rq_total": "Requests received.",
    "downstream_rq_active": "Requests in flight.",
    "downstream_rq_timeout": "Requests not received whole in time.",
    "downstream_rq_idle_timeout": "Requests on which nothing moved for too long (flag SI).",
    "downstream_rq_header_timeout": "Requests whose head was not received in time.",
    "no_filter_chain_match": "Connections nothing was configured for (flag NR).",
    "connection_error": "Connections that broke before their protocol was known.",
    "ssl_handshake": "TLS handshakes completed.",
    "ssl_session_reused": "TLS handshakes that resumed a session.",
    "ssl_connection_error": "TLS handshakes that failed, other than by verification.",
    "ssl_fail_verify_no_cert": "TLS handshakes that failed because the downstream showed no certificate.",
    "ssl_fail_verify_error": "TLS handshakes that failed because the downstream's certificate was not accepted.",
    "plaintext_refused": "Plaintext connections closed, and datagrams dropped, by STRICT mutual TLS.",
    "udp_downstream_sess_total": "UDP sessions begun.",
    "udp_downstream_sess_active": "UDP sessions that go on.",
    "udp_downstream_sess_no_route": "Datagrams dropped because nothing was configured for them.",
    "udp_downstream_sess_rx_datagrams": "Datagrams received from downstreams, in sessions.",
    "udp_downstream_sess_rx_bytes": "Bytes received from downstreams in datagrams.",
    "udp_downstream_sess_rx_errors": "Errors on receiving datagrams from downstreams.",
    "udp_downstream_sess_tx_datagrams": "Datagrams sent to downstreams.",
    "udp_downstream_sess_tx_bytes": "Bytes sent to downstreams in datagrams.",
    "udp_downstream_sess_tx_errors": "Datagrams that could not be sent to a downstream.",
    "udp_idle_timeout": "UDP sessions that ended because nothing moved any more.",
}


def code_class(field: str) -> str | None:
    """`5` for `upstream_rq_5xx`; None for a field that counts no class of response codes."""
    return field[-3] if field.endswith("xx") else None


def _of_field(prefix: str, field: str, help: str, label: str) -> Metric:
    return Metric(prefix + field, MetricType.GAUGE if is_gauge(field) else MetricType.COUNTER, help, (label,))


def _prefix(field: str) -> str:
    if field.startswith("udp_"):
        return "envoy_"
    return "envoy_http_" if field.startswith("downstream_rq_") else "envoy_listener_"


CLUSTER_LABEL = "envoy_cluster_name"
LISTENER_LABEL = "envoy_listener_address"
CODE_CLASS_LABEL = "envoy_response_code_class"

CLUSTER_METRICS = {
    field: _of_field("envoy_cluster_", field, _CLUSTER_HELP[field], CLUSTER_LABEL)
    for field in CLUSTER_FIELDS
    if code_class(field) is None
}
CLUSTER_CODES = _counter(
    "envoy_cluster_upstream_rq_xx", "Responses of the cluster by class of code.", CODE_CLASS_LABEL, CLUSTER_LABEL
)
CLUSTER_MEMBERS = _gauge("envoy_cluster_membership_total", "Endpoints of the cluster.", CLUSTER_LABEL)
CLUSTER_HEALTHY = _gauge(
    "envoy_cluster_membership_healthy", "Endpoints neither ejected nor failing their health check.", CLUSTER_LABEL
)
CLUSTER_EJECTED = _gauge(
    "envoy_cluster_outlier_detection_ejections_active", "Endpoints ejected by outlier detection.", CLUSTER_LABEL
)
CLUSTER_EJECTIONS = _counter(
    "envoy_cluster_outlier_detection_ejections_enforced_total", "Ejections by outlier detection.", CLUSTER_LABEL
)
LISTENER_METRICS = {
    # Envoy counts requests on its HTTP connection manager and datagrams on its UDP proxy; ours are all the listener's,
    # under one label.
    field: _of_field(
        _prefix(field),
        field,
        _LISTENER_HELP[field],
        LISTENER_LABEL,
    )
    for field in LISTENER_FIELDS
    if code_class(field) is None
}
LISTENER_CODES = _counter(
    "envoy_http_downstream_rq_xx", "Responses sent by class of code.", CODE_CLASS_LABEL, LISTENER_LABEL
)
SERVER_LIVE = _gauge("envoy_server_live", "1 while the proxy serves and is not draining.")
SERVER_STATE = _gauge("envoy_server_state", "0 live, 1 draining, 2 before its first configuration, 3 initializing.")
SERVER_UPTIME = _gauge("envoy_server_uptime", "Seconds since the control process started.")

# ── meshproxy_*: the process ──

BUILD_INFO = _gauge("meshproxy_build_info", "Always 1; versions of the proxy and of Python.", "version", "python")
WORKERS = _gauge("meshproxy_workers", "Worker processes running.")
WORKER_RESTARTS = _counter("meshproxy_worker_restarts_total", "Workers that died and were replaced.")
WORKER_CURRENT = _gauge("meshproxy_worker_is_current", "1 where the worker has applied the newest snapshot.", "worker")
PROCESS_RSS = _gauge("meshproxy_process_resident_bytes", "Resident memory, shared pages counted whole.", "process")
PROCESS_PSS = _gauge("meshproxy_process_pss_bytes", "Resident memory, shared pages divided by who shares.", "process")
PROCESS_PRIVATE = _gauge("meshproxy_process_private_bytes", "Resident memory no other process shares.", "process")
PROCESS_CPU = _counter("meshproxy_process_cpu_seconds_total", "Processor time, user and system.", "process")
PROCESS_FDS = _gauge("meshproxy_process_open_fds", "Open file descriptors.", "process")
SNAPSHOT_INFO = _gauge("meshproxy_snapshot_info", "Always 1; version of the configuration in effect.", "version")
SNAPSHOT_PUBLISHED = _gauge(
    "meshproxy_snapshot_published_timestamp_seconds", "When the configuration in effect was published."
)
SNAPSHOT_OBJECTS = _gauge("meshproxy_snapshot_objects", "What the configuration in effect holds.", "kind")
CONFIG_PROBLEMS = _gauge("meshproxy_config_problems", "Problems of the configuration as last read.", "severity")
CONFIG_RELOADS = _counter("meshproxy_config_reloads_total", "Times the configuration was read.", "result")
RELOAD_DURATION = _gauge("meshproxy_config_reload_duration_seconds", "The last reload, from the change to all workers.")
APPLY_STALL = _gauge(
    "meshproxy_worker_apply_stall_seconds", "Longest piece in which the last snapshot held the worker's loop.", "worker"
)
LOOP_STALL = _gauge(
    "meshproxy_worker_loop_stall_max_seconds", "Longest time the loop was late in the last minute.", "worker"
)
LOOP_STALL_TOTAL = _counter("meshproxy_loop_stall_seconds_total", "Time the workers' loops were late, added up.")
CERTIFICATE_EXPIRY = _gauge(
    "meshproxy_certificate_expiry_timestamp_seconds",
    "When the certificate runs out.",
    "workload",
    "kind",
    "serial_number",
)
PROTOCOL_ERRORS = _counter(
    "meshproxy_protocol_errors_total",
    "Messages refused because they broke the protocol, by response_code_details.",
    "detail",
)
ACCESS_LOG_LINES = _counter("meshproxy_access_log_lines_total", "Access log lines, written and dropped.", "result")
OVERLOAD = _counter("meshproxy_overload_total", "What was shed because memory ran out.", "action")
ACCEPT_ERRORS = _counter("meshproxy_accept_errors_total", "Connections that could not be accepted.")
METRIC_SERIES = _gauge("meshproxy_metric_series", "Label sets kept for istio_* metrics.", "kind")

ALL: tuple[Metric, ...] = (
    ISTIO_REQUESTS,
    ISTIO_REQUEST_DURATION,
    ISTIO_REQUEST_BYTES,
    ISTIO_RESPONSE_BYTES,
    ISTIO_REQUEST_MESSAGES,
    ISTIO_RESPONSE_MESSAGES,
    ISTIO_TCP_OPENED,
    ISTIO_TCP_CLOSED,
    ISTIO_TCP_SENT,
    ISTIO_TCP_RECEIVED,
    ISTIO_BUILD,
    *CLUSTER_METRICS.values(),
    CLUSTER_CODES,
    CLUSTER_MEMBERS,
    CLUSTER_HEALTHY,
    CLUSTER_EJECTED,
    CLUSTER_EJECTIONS,
    *LISTENER_METRICS.values(),
    LISTENER_CODES,
    SERVER_LIVE,
    SERVER_STATE,
    SERVER_UPTIME,
    BUILD_INFO,
    WORKERS,
    WORKER_RESTARTS,
    WORKER_CURRENT,
    PROCESS_RSS,
    PROCESS_PSS,
    PROCESS_PRIVATE,
    PROCESS_CPU,
    PROCESS_FDS,
    SNAPSHOT_INFO,
    SNAPSHOT_PUBLISHED,
    SNAPSHOT_OBJECTS,
    CONFIG_PROBLEMS,
    CONFIG_RELOADS,
    RELOAD_DURATION,
    APPLY_STALL,
    LOOP_STALL,
    LOOP_STALL_TOTAL,
    CERTIFICATE_EXPIRY,
    PROTOCOL_ERRORS,
    ACCESS_LOG_LINES,
    OVERLOAD,
    ACCEPT_ERRORS,
    METRIC_SERIES,
)
