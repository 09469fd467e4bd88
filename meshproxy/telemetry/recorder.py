"""What one worker counts: plain ints on slotted objects, handed to control once a second.

Decides: how a count is kept on the hot path and what travels to control. Leaves to others: names and help texts
(telemetry.metrics), totals over workers and the text Prometheus reads (telemetry.exposition).
Nothing here locks: one worker, one thread, one recorder.
Source: istio.io reference/config/metrics (names, label order); Envoy's default histogram buckets.
"""

import os
import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter, sub

from meshproxy.model.workload import WorkloadLabels

HTTP_LABELS = (
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_service",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_service_name",
    "destination_service_namespace",
    "destination_cluster",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
)
MESSAGE_LABELS = HTTP_LABELS[: HTTP_LABELS.index("request_protocol")]
"""Of gRPC messages: they are counted while a call goes on, so nothing of its outcome is among them."""
TCP_LABELS = tuple(name for name in HTTP_LABELS if name not in ("response_code", "grpc_response_status"))

DURATION_BOUNDS_MS = (
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10000.0,
    30000.0,
    60000.0,
    300000.0,
    600000.0,
    1800000.0,
    3600000.0,
)
# The same bounds for whole numbers (only 0 is at most 0.5): bisect compares int with int, which is faster.
_SIZE_BOUNDS = tuple(int(bound) for bound in DURATION_BOUNDS_MS)
BUCKET_COUNT = len(DURATION_BOUNDS_MS) + 1
"""The last bucket is +Inf."""

SEPARATOR = "\x1f"
"""Between the label values of a series' key: one string is cheaper to send than 25. No label value holds it."""

MAX_SERIES = 4096
"""Label sets one worker keeps, HTTP and TCP each (about 1 KiB apiece). Beyond it all new ones share one series whose
labels read `overflow`: a hostile upstream can invent response codes, it cannot invent memory."""
OVERFLOW = "overflow"
IDLE_FLUSHES = 600
"""A series that recorded nothing for so many flushes, and that nobody else holds, is forgotten by the worker; control
keeps its totals."""
MAX_ERROR_WORDS = 128


def http_labels(
    *,
    reporter: str,
    source: WorkloadLabels,
    destination: WorkloadLabels,
    source_principal: str = "unknown",
    destination_principal: str = "unknown",
    service_host: str = "unknown",
    service_name: str = "unknown",
    service_namespace: str = "unknown",
    protocol: str = "http",
    response_code: str = "0",
    grpc_status: str = "",
    response_flags: str = "-",
    security_policy: str = "unknown",
) -> tuple[str, ...]:
    """Label values in the order of HTTP_LABELS. response_code "0": the downstream left before a response."""
    return (
        reporter,
        source.workload,
        source.canonical_service,
        source.canonical_revision,
        source.namespace,
        source_principal,
        source.app,
        source.version,
        source.cluster,
        destination.workload,
        destination.namespace,
        destination_principal,
        destination.app,
        destination.version,
        service_host,
        destination.canonical_service,
        destination.canonical_revision,
        service_name,
        service_namespace,
        destination.cluster,
        protocol,
        response_code,
        grpc_status,
        str.__str__(response_flags),  # a ResponseFlag is a str, but hashes as an enum
        security_policy,
    )


def tcp_labels(
    *,
    reporter: str,
    source: WorkloadLabels,
    destination: WorkloadLabels,
    source_principal: str = "unknown",
    destination_principal: str = "unknown",
    service_host: str = "unknown",
    service_name: str = "unknown",
    service_namespace: str = "unknown",
    response_flags: str = "-",
    security_policy: str = "unknown",
    protocol: str = "tcp",
) -> tuple[str, ...]:
    """Label values in the order of TCP_LABELS. protocol: `udp` for sessions of datagrams."""
    labels = http_labels(
        reporter=reporter,
        source=source,
        destination=destination,
        source_principal=source_principal,
        destination_principal=destination_principal,
        service_host=service_host,
        service_name=service_name,
        service_namespace=service_namespace,
        protocol=protocol,
        response_flags=response_flags,
        security_policy=security_policy,
    )
    return labels[:21] + labels[23:]


class HttpSeries:
    """Requests of one label set since the last flush: a count and three histograms, not yet cumulative."""

    __slots__ = (
        "duration_counts",
        "duration_sum_ms",
        "idle_flushes",
        "key",
        "request_counts",
        "request_sum_bytes",
        "response_counts",
        "response_sum_bytes",
    )

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.key = SEPARATOR.join(labels)
        self.idle_flushes = 0
        self.clear()

    def clear(self) -> None:
        self.duration_counts = [0] * BUCKET_COUNT
        self.request_counts = [0] * BUCKET_COUNT
        self.response_counts = [0] * BUCKET_COUNT
        self.duration_sum_ms = 0.0
        self.request_sum_bytes = 0
        self.response_sum_bytes = 0

    # 350–390 ns (python -m timeit, Python 3.11), three bisects of about 60 ns included. The number of requests is not
    # counted apart: it is the sum of any of the histograms.
    def record(self, duration_ms: float, request_bytes: int, response_bytes: int) -> None:
        """One finished request; sizes are of the whole message as received, heads included (Istio's request_bytes)."""
        self.duration_counts[bisect_left(DURATION_BOUNDS_MS, duration_ms)] += 1
        self.request_counts[bisect_left(_SIZE_BOUNDS, request_bytes)] += 1
        self.response_counts[bisect_left(_SIZE_BOUNDS, response_bytes)] += 1
        self.duration_sum_ms += duration_ms
        self.request_sum_bytes += request_bytes
        self.response_sum_bytes += response_bytes


class TcpSeries:
    """Connections of one label set since the last flush. The data path adds to the four numbers directly."""

    __slots__ = ("closed", "idle_flushes", "key", "opened", "received_bytes", "sent_bytes")

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.key = SEPARATOR.join(labels)
        self.idle_flushes = 0
        self.clear()

    def clear(self) -> None:
        self.opened = 0
        self.closed = 0
        self.sent_bytes = 0
        """To the downstream (Istio: total bytes sent during response)."""
        self.received_bytes = 0
        """From the downstream (Istio: total bytes received during request)."""


class MessageSeries:
    """gRPC messages of one label set since the last flush. The data path adds to the two numbers directly."""

    __slots__ = ("idle_flushes", "key", "received", "sent")

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.key = SEPARATOR.join(labels)
        self.idle_flushes = 0
        self.received = 0
        """From the downstream (Istio: request messages)."""
        self.sent = 0
        """To the downstream (Istio: response messages)."""


@dataclass(slots=True)
class ClusterCounters:
    """One cluster's statistics under Envoy's names; what ends in `_active` goes up and down, the rest only up."""

    upstream_rq_total: int = 0
    upstream_rq_active: int = 0
    upstream_rq_pending_total: int = 0
    upstream_rq_pending_active: int = 0
    upstream_rq_pending_overflow: int = 0
    upstream_rq_cancelled: int = 0
    upstream_rq_1xx: int = 0
    upstream_rq_2xx: int = 0
    upstream_rq_3xx: int = 0
    upstream_rq_4xx: int = 0
    upstream_rq_5xx: int = 0
    upstream_rq_timeout: int = 0
    upstream_rq_per_try_timeout: int = 0
    upstream_rq_rx_reset: int = 0
    upstream_rq_tx_reset: int = 0
    upstream_rq_retry: int = 0
    upstream_rq_retry_success: int = 0
    upstream_rq_retry_overflow: int = 0
    upstream_rq_retry_limit_exceeded: int = 0
    upstream_cx_total: int = 0
    upstream_cx_active: int = 0
    upstream_cx_http3_total: int = 0
    upstream_http3_broken: int = 0
    upstream_cx_connect_fail: int = 0
    upstream_cx_connect_timeout: int = 0
    upstream_cx_overflow: int = 0
    upstream_cx_none_healthy: int = 0
    upstream_cx_idle_timeout: int = 0
    upstream_cx_max_requests: int = 0
    upstream_cx_protocol_error: int = 0
    upstream_cx_destroy: int = 0
    upstream_cx_destroy_local: int = 0
    upstream_cx_destroy_remote: int = 0
    upstream_cx_destroy_with_active_rq: int = 0
    upstream_cx_rx_bytes_total: int = 0
    upstream_cx_tx_bytes_total: int = 0
    lb_healthy_panic: int = 0
    ssl_handshake: int = 0
    ssl_session_reused: int = 0
    ssl_connection_error: int = 0
    ssl_fail_verify_error: int = 0
    udp_sess_tx_datagrams: int = 0
    udp_sess_tx_errors: int = 0
    udp_sess_rx_datagrams: int = 0
    udp_sess_rx_errors: int = 0


@dataclass(slots=True)
class ListenerCounters:
    """One listener's statistics under Envoy's names; what ends in `_active` goes up and down, the rest only up."""

    downstream_cx_total: int = 0
    downstream_cx_active: int = 0
    downstream_cx_overflow: int = 0
    downstream_cx_destroy: int = 0
    downstream_cx_idle_timeout: int = 0
    downstream_cx_protocol_error: int = 0
    downstream_cx_rx_bytes_total: int = 0
    downstream_cx_tx_bytes_total: int = 0
    downstream_cx_proxy_proto_error: int = 0
    downstream_pre_cx_timeout: int = 0
    downstream_rq_total: int = 0
    downstream_rq_active: int = 0
    downstream_rq_1xx: int = 0
    downstream_rq_2xx: int = 0
    downstream_rq_3xx: int = 0
    downstream_rq_4xx: int = 0
    downstream_rq_5xx: int = 0
    downstream_rq_timeout: int = 0
    downstream_rq_idle_timeout: int = 0
    downstream_rq_header_timeout: int = 0
    no_filter_chain_match: int = 0
    connection_error: int = 0
    """Connections that broke before their protocol was known."""
    ssl_handshake: int = 0
    ssl_session_reused: int = 0
    ssl_connection_error: int = 0
    ssl_fail_verify_no_cert: int = 0
    ssl_fail_verify_error: int = 0
    plaintext_refused: int = 0
    udp_downstream_sess_total: int = 0
    udp_downstream_sess_active: int = 0
    udp_downstream_sess_no_route: int = 0
    udp_downstream_sess_rx_datagrams: int = 0
    udp_downstream_sess_rx_bytes: int = 0
    udp_downstream_sess_rx_errors: int = 0
    udp_downstream_sess_tx_datagrams: int = 0
    udp_downstream_sess_tx_bytes: int = 0
    udp_downstream_sess_tx_errors: int = 0
    udp_idle_timeout: int = 0

    def count_response(self, status: int) -> None:
        if status < 300:
            self.downstream_rq_2xx += 1
        elif status < 400:
            self.downstream_rq_3xx += 1
        elif status < 500:
            self.downstream_rq_4xx += 1
        else:
            self.downstream_rq_5xx += 1


OVERLOAD_ACTIONS = ("refuse_request", "refuse_connection", "reset_stream")


class ProcessCounters:
    """What belongs to the worker and to no listener or cluster."""

    __slots__ = (
        "accept_errors",
        "access_log_dropped",
        "access_log_written",
        "loop_stall_max_s",
        "loop_stall_total_s",
        "overload",
        "protocol_errors",
    )

    def __init__(self) -> None:
        self.access_log_written = 0
        self.access_log_dropped = 0
        self.accept_errors = 0
        self.overload: dict[str, int] = dict.fromkeys(OVERLOAD_ACTIONS, 0)
        """What was shed since the last flush."""
        self.protocol_errors: dict[str, int] = {}
        """response_code_details word → times since the last flush; see protocol_error()."""
        self.loop_stall_max_s = 0.0
        """Longest stall of the loop since the last flush; who measures it raises it."""
        self.loop_stall_total_s = 0.0

    def protocol_error(self, detail: str) -> None:
        """Count one refused message by its word. Words are ours, so few; the bound holds should one carry input."""
        errors = self.protocol_errors
        if detail not in errors and len(errors) >= MAX_ERROR_WORDS:
            detail = OVERFLOW
        errors[detail] = errors.get(detail, 0) + 1


def is_gauge(field: str) -> bool:
    """True for a field of ClusterCounters or ListenerCounters that goes up and down."""
    return field.endswith("_active")


CLUSTER_FIELDS = tuple(field.name for field in fields(ClusterCounters))
LISTENER_FIELDS = tuple(field.name for field in fields(ListenerCounters))


HttpRow = tuple[str, list[int], list[int], list[int], float, int, int]
"""(key, duration, request and response bucket counts, sum of ms, sum of request bytes, sum of response bytes)."""
TcpRow = tuple[str, int, int, int, int]
"""(key, opened, closed, sent bytes, received bytes)."""
MessageRow = tuple[str, int, int]
"""(key, received messages, sent messages)."""


@dataclass(slots=True)
class Flush:
    """What changed in one worker since its last flush. Whoever reads it needs nothing of an earlier one.

    A key is the label values joined by SEPARATOR: HTTP_LABELS for http, TCP_LABELS for tcp, MESSAGE_LABELS for
    messages.
    """

    pid: int
    http: list[HttpRow]
    tcp: list[TcpRow]
    clusters: list[tuple[str, str, tuple[int, ...]]]
    """(cluster key, cluster name, values in the order of CLUSTER_FIELDS): differences, but `_active` as it stands."""
    removed_clusters: list[str]
    listeners: list[tuple[str, tuple[int, ...]]]
    """(listener name, values in the order of LISTENER_FIELDS): as for clusters."""
    removed_listeners: list[str]
    process: tuple[int, int, int, float, float]
    """(log lines written, dropped, accept errors, longest stall s, stalls in all s)."""
    protocol_errors: dict[str, int]
    overload: dict[str, int]
    """By OVERLOAD_ACTIONS."""
    messages: list[MessageRow] = field(default_factory=list)


_cluster_values: Callable[[ClusterCounters], tuple[int, ...]] = attrgetter(*CLUSTER_FIELDS)
_listener_values: Callable[[ListenerCounters], tuple[int, ...]] = attrgetter(*LISTENER_FIELDS)
_CLUSTER_GAUGES = tuple(at for at, field in enumerate(CLUSTER_FIELDS) if is_gauge(field))
_LISTENER_GAUGES = tuple(at for at, field in enumerate(LISTENER_FIELDS) if is_gauge(field))
_CLUSTER_ZEROS = (0,) * len(CLUSTER_FIELDS)
_LISTENER_ZEROS = (0,) * len(LISTENER_FIELDS)


@dataclass(slots=True)
class _ClusterEntry:
    name: str
    counters: ClusterCounters
    flushed: tuple[int, ...] = _CLUSTER_ZEROS
    is_removed: bool = False


@dataclass(slots=True)
class _ListenerEntry:
    counters: ListenerCounters
    flushed: tuple[int, ...] = _LISTENER_ZEROS
    is_removed: bool = False


class Recorder:
    """All counts of one worker.

    Series and counters are made once, when a route or an endpoint is first used, and held by who records; the lookup
    by labels is not meant for the request path.
    """

    __slots__ = ("_clusters", "_flushed_process", "_http", "_listeners", "_messages", "_tcp", "process")

    def __init__(self) -> None:
        self.process = ProcessCounters()
        self._http: dict[tuple[str, ...], HttpSeries] = {}
        self._tcp: dict[tuple[str, ...], TcpSeries] = {}
        self._messages: dict[tuple[str, ...], MessageSeries] = {}
        self._clusters: dict[str, _ClusterEntry] = {}
        self._listeners: dict[str, _ListenerEntry] = {}
        self._flushed_process = (0, 0, 0, 0.0)

    def http_series(self, labels: tuple[str, ...]) -> HttpSeries:
        """The one series of these labels (order of HTTP_LABELS); the overflow series once there are MAX_SERIES."""
        series = self._http.get(labels)
        if series is None:
            if len(self._http) >= MAX_SERIES:
                labels = (OVERFLOW,) * len(HTTP_LABELS)
                if labels in self._http:
                    return self._http[labels]
            series = self._http[labels] = HttpSeries(labels)
        return series

    def tcp_series(self, labels: tuple[str, ...]) -> TcpSeries:
        """The one series of these labels (order of TCP_LABELS); the overflow series once there are MAX_SERIES."""
        series = self._tcp.get(labels)
        if series is None:
            if len(self._tcp) >= MAX_SERIES:
                labels = (OVERFLOW,) * len(TCP_LABELS)
                if labels in self._tcp:
                    return self._tcp[labels]
            series = self._tcp[labels] = TcpSeries(labels)
        return series

    def message_series(self, labels: tuple[str, ...]) -> MessageSeries:
        """The one series of these labels (order of MESSAGE_LABELS); the overflow series once there are MAX_SERIES."""
        series = self._messages.get(labels)
        if series is None:
            if len(self._messages) >= MAX_SERIES:
                labels = (OVERFLOW,) * len(MESSAGE_LABELS)
                if labels in self._messages:
                    return self._messages[labels]
            series = self._messages[labels] = MessageSeries(labels)
        return series

    def cluster(self, key: str, name: str) -> ClusterCounters:
        """The counters of the cluster with this key; name is what /clusters and metrics show."""
        entry = self._clusters.get(key)
        if entry is None:
            entry = self._clusters[key] = _ClusterEntry(name, ClusterCounters())
        entry.is_removed = False
        return entry.counters

    def remove_cluster(self, key: str) -> None:
        """The cluster has left the snapshot: what it counted so far goes out once more, then it is forgotten."""
        if key in self._clusters:
            self._clusters[key].is_removed = True

    def listener(self, name: str) -> ListenerCounters:
        entry = self._listeners.get(name)
        if entry is None:
            entry = self._listeners[name] = _ListenerEntry(ListenerCounters())
        entry.is_removed = False
        return entry.counters

    def remove_listener(self, name: str) -> None:
        """As remove_cluster."""
        if name in self._listeners:
            self._listeners[name].is_removed = True

    def series_count(self) -> tuple[int, int]:
        """(HTTP, TCP) label sets kept now."""
        return len(self._http), len(self._tcp)

    def flush(self) -> Flush:
        """What changed since the last call; the receiver must get it, it is not said twice."""
        clusters, removed_clusters = self._flush_clusters()
        listeners, removed_listeners = self._flush_listeners()
        process = self.process
        errors, process.protocol_errors = process.protocol_errors, {}
        overload, process.overload = process.overload, dict.fromkeys(OVERLOAD_ACTIONS, 0)
        stall_max_s, process.loop_stall_max_s = process.loop_stall_max_s, 0.0
        now = (
            process.access_log_written,
            process.access_log_dropped,
            process.accept_errors,
            process.loop_stall_total_s,
        )
        before, self._flushed_process = self._flushed_process, now
        return Flush(
            pid=os.getpid(),
            http=self._flush_http(),
            tcp=self._flush_tcp(),
            clusters=clusters,
            removed_clusters=removed_clusters,
            listeners=listeners,
            removed_listeners=removed_listeners,
            process=(now[0] - before[0], now[1] - before[1], now[2] - before[2], stall_max_s, now[3] - before[3]),
            protocol_errors=errors,
            overload=overload,
            messages=self._flush_messages(),
        )

    def _flush_http(self) -> list[HttpRow]:
        rows = []
        idle = []
        for series in self._http.values():
            if any(series.duration_counts):
                rows.append(
                    (
                        series.key,
                        series.duration_counts,
                        series.request_counts,
                        series.response_counts,
                        series.duration_sum_ms,
                        series.request_sum_bytes,
                        series.response_sum_bytes,
                    )
                )
                series.clear()
                series.idle_flushes = 0
            else:
                series.idle_flushes += 1
                # Three references: the table's, this loop's and the call's own. A fourth is a route or an endpoint that
                # may still record, so the series stays.
                if series.idle_flushes > IDLE_FLUSHES and sys.getrefcount(series) <= 3:
                    idle.append(series.key)
        for key in idle:
            del self._http[tuple(key.split(SEPARATOR))]
        return rows

    def _flush_tcp(self) -> list[TcpRow]:
        rows = []
        idle = []
        for series in self._tcp.values():
            if series.opened or series.closed or series.sent_bytes or series.received_bytes:
                rows.append((series.key, series.opened, series.closed, series.sent_bytes, series.received_bytes))
                series.clear()
                series.idle_flushes = 0
            else:
                series.idle_flushes += 1
                if series.idle_flushes > IDLE_FLUSHES and sys.getrefcount(series) <= 3:  # as in _flush_http
                    idle.append(series.key)
        for key in idle:
            del self._tcp[tuple(key.split(SEPARATOR))]
        return rows

    def _flush_messages(self) -> list[MessageRow]:
        rows = []
        idle = []
        for series in self._messages.values():
            if series.received or series.sent:
                rows.append((series.key, series.received, series.sent))
                series.received = series.sent = series.idle_flushes = 0
            else:
                series.idle_flushes += 1
                if series.idle_flushes > IDLE_FLUSHES and sys.getrefcount(series) <= 3:  # as in _flush_http
                    idle.append(series.key)
        for key in idle:
            del self._messages[tuple(key.split(SEPARATOR))]
        return rows

    def _flush_clusters(self) -> tuple[list[tuple[str, str, tuple[int, ...]]], list[str]]:
        rows = []
        removed = []
        for key, cluster in self._clusters.items():
            values = _cluster_values(cluster.counters)
            if values != cluster.flushed:
                changes = list(map(sub, values, cluster.flushed))
                for at in _CLUSTER_GAUGES:
                    changes[at] = values[at]
                rows.append((key, cluster.name, tuple(changes)))
                cluster.flushed = values
            if cluster.is_removed:
                removed.append(key)
        for key in removed:
            del self._clusters[key]
        return rows, removed

    def _flush_listeners(self) -> tuple[list[tuple[str, tuple[int, ...]]], list[str]]:
        rows = []
        removed = []
        for name, listener in self._listeners.items():
            values = _listener_values(listener.counters)
            if values != listener.flushed:
                changes = list(map(sub, values, listener.flushed))
                for at in _LISTENER_GAUGES:
                    changes[at] = values[at]
                rows.append((name, tuple(changes)))
                listener.flushed = values
            if listener.is_removed:
                removed.append(name)
        for name in removed:
            del self._listeners[name]
        return rows, removed
