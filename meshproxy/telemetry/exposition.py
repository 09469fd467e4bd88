"""All workers' counts as one, and the text Prometheus reads.

Decides: how flushes add up and how a sample is written. Leaves to others: what is counted (telemetry.recorder), what
each metric means (telemetry.metrics), HTTP (admin.server).
Source: Prometheus text format 0.0.4; OpenMetrics 1.0.0.

The text is written here and not by prometheus_client, which makes one object and one dict of labels per line. Measured
in a control process of 23 MiB, PSS after a scrape with 20 / 200 / 1,000 label sets: written here +0 / +0 / +1 MiB,
through a prometheus_client Collector +5 / +36 / +94 MiB (peak +360) and ten times the processor time. Tests read the
text back with prometheus_client's parsers.
"""

import platform
import sys
from array import array
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from meshproxy import __version__
from meshproxy.telemetry import metrics, process_state
from meshproxy.telemetry.metrics import Metric, MetricType
from meshproxy.telemetry.process_state import ProcessState, process_usage
from meshproxy.telemetry.recorder import (
    BUCKET_COUNT,
    CLUSTER_FIELDS,
    DURATION_BOUNDS_MS,
    HTTP_LABELS,
    LISTENER_FIELDS,
    MESSAGE_LABELS,
    OVERFLOW,
    OVERLOAD_ACTIONS,
    SEPARATOR,
    TCP_LABELS,
    Flush,
    HttpRow,
    MessageRow,
    TcpRow,
    is_gauge,
)

MAX_SERIES = 8192
"""Label sets kept, HTTP and TCP each (about 1 KiB apiece); beyond it new ones share the overflow set."""
IDLE_S = 3600.0
"""A label set untouched for so long whose destination has left the configuration is forgotten."""
_MAX_ERROR_WORDS = 256
_STALLS_KEPT = 60  # one flush a second: a minute
_DESTINATION = HTTP_LABELS.index("destination_service")
assert TCP_LABELS[_DESTINATION] == MESSAGE_LABELS[_DESTINATION] == "destination_service"


class HttpTotals:
    """One label set's requests over all workers since the start."""

    __slots__ = ("changed_at", "counts", "duration_sum_ms", "labels", "request_sum_bytes", "response_sum_bytes")

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.changed_at = 0.0
        self.clear()

    def clear(self) -> None:
        self.counts = array("Q", bytes(8 * 3 * BUCKET_COUNT))
        """Buckets of duration, request size, response size, one after the other; not cumulative."""
        self.duration_sum_ms = 0.0
        self.request_sum_bytes = 0
        self.response_sum_bytes = 0

    def add(self, row: HttpRow) -> None:
        counts = self.counts
        at = 0
        for histogram in row[1:4]:
            for count in histogram:
                if count:
                    counts[at] += count
                at += 1
        self.duration_sum_ms += row[4]
        self.request_sum_bytes += row[5]
        self.response_sum_bytes += row[6]

    @property
    def requests(self) -> int:
        return sum(self.counts[:BUCKET_COUNT])


class TcpTotals:
    """One label set's connections over all workers since the start."""

    __slots__ = ("changed_at", "closed", "labels", "opened", "received_bytes", "sent_bytes")

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.changed_at = 0.0
        self.clear()

    def clear(self) -> None:
        self.opened = self.closed = self.sent_bytes = self.received_bytes = 0

    def add(self, row: TcpRow) -> None:
        self.opened += row[1]
        self.closed += row[2]
        self.sent_bytes += row[3]
        self.received_bytes += row[4]


class MessageTotals:
    """One label set's gRPC messages over all workers since the start."""

    __slots__ = ("changed_at", "labels", "received", "sent")

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.changed_at = 0.0
        self.clear()

    def clear(self) -> None:
        self.received = self.sent = 0

    def add(self, row: MessageRow) -> None:
        self.received += row[1]
        self.sent += row[2]


class _FieldTotals:
    """The counters of one cluster or listener: sums, and what each living worker last said of the gauges."""

    __slots__ = ("gauges", "is_gauge", "name", "sums")

    def __init__(self, name: str, gauge_flags: tuple[bool, ...]) -> None:
        self.name = name
        self.is_gauge = gauge_flags
        self.sums = [0] * len(gauge_flags)
        self.gauges: dict[int, list[int]] = {}

    def add(self, pid: int, values: tuple[int, ...]) -> None:
        gauges = []
        for at, value in enumerate(values):
            if self.is_gauge[at]:
                gauges.append(value)
            elif value:
                self.sums[at] += value
        if any(gauges):
            self.gauges[pid] = gauges
        else:
            self.gauges.pop(pid, None)

    def values(self) -> list[int]:
        values = list(self.sums)
        at_gauge = 0
        for at, flag in enumerate(self.is_gauge):
            if flag:
                values[at] = sum(gauges[at_gauge] for gauges in self.gauges.values())
                at_gauge += 1
        return values


_CLUSTER_GAUGES = tuple(is_gauge(field) for field in CLUSTER_FIELDS)
_LISTENER_GAUGES = tuple(is_gauge(field) for field in LISTENER_FIELDS)


class Statistics:
    """What all workers counted. A worker that dies loses what it counted since its last flush, and its gauges."""

    def __init__(self) -> None:
        self.http: dict[str, HttpTotals] = {}
        """By the series' key (recorder.SEPARATOR)."""
        self.tcp: dict[str, TcpTotals] = {}
        self.messages: dict[str, MessageTotals] = {}
        self._clusters: dict[str, _FieldTotals] = {}
        self._listeners: dict[str, _FieldTotals] = {}
        self.protocol_errors: dict[str, int] = {}
        self.overload: dict[str, int] = dict.fromkeys(OVERLOAD_ACTIONS, 0)
        self.access_log_written = 0
        self.access_log_dropped = 0
        self.accept_errors = 0
        self.loop_stall_total_s = 0.0
        self._stalls: dict[int, deque[float]] = {}

    def merge(self, flush: Flush, now: float) -> None:
        """now: monotonic seconds."""
        for http_row in flush.http:
            self._http_totals(http_row[0], now).add(http_row)
        for tcp_row in flush.tcp:
            self._tcp_totals(tcp_row[0], now).add(tcp_row)
        for message_row in flush.messages:
            self._message_totals(message_row[0], now).add(message_row)
        for key, name, values in flush.clusters:
            cluster = self._clusters.get(key)
            if cluster is None:
                cluster = self._clusters[key] = _FieldTotals(name, _CLUSTER_GAUGES)
            cluster.add(flush.pid, values)
        for key in flush.removed_clusters:
            self._clusters.pop(key, None)
        for name, values in flush.listeners:
            listener = self._listeners.get(name)
            if listener is None:
                listener = self._listeners[name] = _FieldTotals(name, _LISTENER_GAUGES)
            listener.add(flush.pid, values)
        for name in flush.removed_listeners:
            self._listeners.pop(name, None)
        for detail, count in flush.protocol_errors.items():
            if detail not in self.protocol_errors and len(self.protocol_errors) >= _MAX_ERROR_WORDS:
                detail = OVERFLOW
            self.protocol_errors[detail] = self.protocol_errors.get(detail, 0) + count
        for action, count in flush.overload.items():
            self.overload[action] += count
        written, dropped, accept_errors, stall_max_s, stall_total_s = flush.process
        self.access_log_written += written
        self.access_log_dropped += dropped
        self.accept_errors += accept_errors
        self.loop_stall_total_s += stall_total_s
        self._stalls.setdefault(flush.pid, deque(maxlen=_STALLS_KEPT)).append(stall_max_s)

    def keep_only(self, pids: Container[int]) -> None:
        """Workers that are not among these are gone: what they had open is closed."""
        for totals in (*self._clusters.values(), *self._listeners.values()):
            for pid in [pid for pid in totals.gauges if pid not in pids]:
                del totals.gauges[pid]
        for pid in [pid for pid in self._stalls if pid not in pids]:
            del self._stalls[pid]

    def evict(self, now: float, services: Container[str]) -> None:
        """Forget label sets long untouched whose destination_service is none of these. now: as in merge."""
        for table in (self.http, self.tcp, self.messages):
            gone = [
                key
                for key, totals in table.items()
                if now - totals.changed_at > IDLE_S and totals.labels[_DESTINATION] not in services
            ]
            for key in gone:
                del table[key]

    def reset(self) -> None:
        """POST /reset_counters: sums go to zero; gauges, which say what is open, stay."""
        for http in self.http.values():
            http.clear()
        for tcp in self.tcp.values():
            tcp.clear()
        for messages in self.messages.values():
            messages.clear()
        for totals in (*self._clusters.values(), *self._listeners.values()):
            totals.sums = [0] * len(totals.sums)
        self.protocol_errors.clear()
        self.overload = dict.fromkeys(OVERLOAD_ACTIONS, 0)
        self.access_log_written = self.access_log_dropped = self.accept_errors = 0
        self.loop_stall_total_s = 0.0

    def cluster_values(self) -> dict[str, dict[str, int]]:
        """Cluster name → field of ClusterCounters → value. Clusters that share a name (one service seen with different
        policies by two workloads) are added up."""
        return _by_name(self._clusters.values(), CLUSTER_FIELDS)

    def listener_values(self) -> dict[str, dict[str, int]]:
        """Listener name → field of ListenerCounters → value."""
        return _by_name(self._listeners.values(), LISTENER_FIELDS)

    def loop_stall_max_s(self, pid: int) -> float:
        """Longest stall of this worker's loop in the last minute; 0.0 for a worker not heard of."""
        return max(self._stalls.get(pid, (0.0,)))

    def _http_totals(self, key: str, now: float) -> HttpTotals:
        totals = self.http.get(key)
        if totals is None:
            if len(self.http) >= MAX_SERIES:
                key = SEPARATOR.join((OVERFLOW,) * len(HTTP_LABELS))
            totals = self.http.get(key) or HttpTotals(_labels(key))
            self.http[key] = totals
        totals.changed_at = now
        return totals

    def _tcp_totals(self, key: str, now: float) -> TcpTotals:
        totals = self.tcp.get(key)
        if totals is None:
            if len(self.tcp) >= MAX_SERIES:
                key = SEPARATOR.join((OVERFLOW,) * len(TCP_LABELS))
            totals = self.tcp.get(key) or TcpTotals(_labels(key))
            self.tcp[key] = totals
        totals.changed_at = now
        return totals

    def _message_totals(self, key: str, now: float) -> MessageTotals:
        totals = self.messages.get(key)
        if totals is None:
            if len(self.messages) >= MAX_SERIES:
                key = SEPARATOR.join((OVERFLOW,) * len(MESSAGE_LABELS))
            totals = self.messages.get(key) or MessageTotals(_labels(key))
            self.messages[key] = totals
        totals.changed_at = now
        return totals


def _labels(key: str) -> tuple[str, ...]:
    # The same few names in thousands of label sets.
    return tuple(map(sys.intern, key.split(SEPARATOR)))


def _by_name(all_totals: Iterable[_FieldTotals], fields: tuple[str, ...]) -> dict[str, dict[str, int]]:
    named: dict[str, dict[str, int]] = {}
    for totals in all_totals:
        values = dict(zip(fields, totals.values(), strict=True))
        if totals.name in named:
            had = named[totals.name]
            values = {field: value + had[field] for field, value in values.items()}
        named[totals.name] = values
    return named


# ── samples ──


@dataclass(frozen=True, slots=True)
class Histogram:
    counts: Iterable[int]
    """Per bucket, not cumulative; as many as BUCKET_COUNT."""
    sum: float


Sample = tuple[tuple[str, ...], float | Histogram]
"""Label values in the order of the metric's labels, and the value; a Histogram where the metric is one."""
Family = tuple[Metric, Iterable[Sample]]


def families(statistics: Statistics, process: ProcessState) -> Iterator[Family]:
    """Every metric that has samples now, in the order of metrics.ALL."""
    yield from _istio(statistics)
    yield from _clusters(statistics, process)
    yield from _listeners(statistics)
    yield from _process(statistics, process)


def _istio(statistics: Statistics) -> Iterator[Family]:
    http = list(statistics.http.values())
    tcp = list(statistics.tcp.values())
    first, second = BUCKET_COUNT, 2 * BUCKET_COUNT
    yield metrics.ISTIO_REQUESTS, ((one.labels, one.requests) for one in http)
    yield (
        metrics.ISTIO_REQUEST_DURATION,
        ((one.labels, Histogram(one.counts[:first], one.duration_sum_ms)) for one in http),
    )
    yield (
        metrics.ISTIO_REQUEST_BYTES,
        ((one.labels, Histogram(one.counts[first:second], one.request_sum_bytes)) for one in http),
    )
    yield (
        metrics.ISTIO_RESPONSE_BYTES,
        ((one.labels, Histogram(one.counts[second:], one.response_sum_bytes)) for one in http),
    )
    messages = list(statistics.messages.values())
    yield metrics.ISTIO_REQUEST_MESSAGES, ((one.labels, one.received) for one in messages)
    yield metrics.ISTIO_RESPONSE_MESSAGES, ((one.labels, one.sent) for one in messages)
    yield metrics.ISTIO_TCP_OPENED, ((one.labels, one.opened) for one in tcp)
    yield metrics.ISTIO_TCP_CLOSED, ((one.labels, one.closed) for one in tcp)
    yield metrics.ISTIO_TCP_SENT, ((one.labels, one.sent_bytes) for one in tcp)
    yield metrics.ISTIO_TCP_RECEIVED, ((one.labels, one.received_bytes) for one in tcp)
    yield metrics.ISTIO_BUILD, [(("proxy", __version__), 1)]


def _clusters(statistics: Statistics, process: ProcessState) -> Iterator[Family]:
    values = statistics.cluster_values()
    udp = {name: fields for name, fields in values.items() if "/udp|" in name}
    for field, metric in metrics.CLUSTER_METRICS.items():
        # Names of Envoy's UDP proxy: of no interest to the thousand clusters that have nothing to do with it.
        shown = udp if field.startswith("udp_") else values
        yield metric, [((name,), fields[field]) for name, fields in shown.items()]
    codes = [(field, code) for field in CLUSTER_FIELDS if (code := metrics.code_class(field)) is not None]
    yield (
        metrics.CLUSTER_CODES,
        [((code, name), fields[field]) for name, fields in values.items() for field, code in codes],
    )
    sizes: dict[str, int] = {}
    out: dict[str, int] = {}
    ejected: dict[str, int] = {}
    for key, cluster in process.snapshot.clusters.items():
        name = cluster.name
        verdicts = process.endpoint_health.get(key, {})
        sizes[name] = sizes.get(name, 0) + process.cluster_sizes.get(key, 0)
        out[name] = out.get(name, 0) + len(verdicts)
        ejected[name] = ejected.get(name, 0) + sum(word == "ejected" for word in verdicts.values())
    yield metrics.CLUSTER_MEMBERS, [((name,), size) for name, size in sizes.items()]
    yield metrics.CLUSTER_HEALTHY, [((name,), max(0, size - out[name])) for name, size in sizes.items()]
    yield metrics.CLUSTER_EJECTED, [((name,), count) for name, count in ejected.items()]
    yield metrics.CLUSTER_EJECTIONS, [((name,), count) for name, count in process.counters.ejections.items()]


def _listeners(statistics: Statistics) -> Iterator[Family]:
    values = statistics.listener_values()
    udp = {name: fields for name, fields in values.items() if name.endswith("_udp")}
    for field, metric in metrics.LISTENER_METRICS.items():
        shown = udp if field.startswith("udp_") else values
        yield metric, [((name,), fields[field]) for name, fields in shown.items()]
    codes = [(field, code) for field in LISTENER_FIELDS if (code := metrics.code_class(field)) is not None]
    yield (
        metrics.LISTENER_CODES,
        [((code, name), fields[field]) for name, fields in values.items() for field, code in codes],
    )


_STATE_NUMBERS = {
    process_state.LIVE: 0,
    process_state.DRAINING: 1,
    process_state.PRE_INITIALIZING: 2,
    process_state.INITIALIZING: 3,
}


def _process(statistics: Statistics, process: ProcessState) -> Iterator[Family]:
    counters = process.counters
    snapshot = process.snapshot
    workers = process.workers
    yield metrics.SERVER_LIVE, [((), int(process.state == process_state.LIVE))]
    yield metrics.SERVER_STATE, [((), _STATE_NUMBERS[process.state])]
    yield metrics.SERVER_UPTIME, [((), int(process.now - process.started_at))]
    yield metrics.BUILD_INFO, [((__version__, platform.python_version()), 1)]
    yield metrics.WORKERS, [((), len(workers))]
    yield metrics.WORKER_RESTARTS, [((), counters.worker_restarts)]
    yield (
        metrics.WORKER_CURRENT,
        [((str(worker.slot),), int(worker.version == snapshot.version)) for worker in workers],
    )
    usages = [(name, usage) for name, pid in process.processes() if (usage := process_usage(pid)) is not None]
    yield metrics.PROCESS_RSS, [((name,), usage.resident_bytes) for name, usage in usages]
    yield (
        metrics.PROCESS_PSS,
        [((name,), usage.pss_bytes) for name, usage in usages if usage.pss_bytes is not None],
    )
    yield (
        metrics.PROCESS_PRIVATE,
        [((name,), usage.private_bytes) for name, usage in usages if usage.private_bytes is not None],
    )
    yield metrics.PROCESS_CPU, [((name,), usage.cpu_s) for name, usage in usages]
    yield metrics.PROCESS_FDS, [((name,), usage.open_fds) for name, usage in usages if usage.open_fds is not None]
    yield metrics.SNAPSHOT_INFO, [((snapshot.version,), 1)]
    yield metrics.SNAPSHOT_PUBLISHED, [((), counters.published_at)]
    yield (
        metrics.SNAPSHOT_OBJECTS,
        [
            (("workload",), len(snapshot.workloads)),
            (("listener",), len(snapshot.listeners)),
            (("route_table",), len(snapshot.route_tables)),
            (("cluster",), len(snapshot.clusters)),
            (("endpoint",), sum(process.cluster_sizes.values())),
        ],
    )
    yield metrics.CONFIG_PROBLEMS, [(("warning",), process.warnings), (("error",), process.errors)]
    yield (
        metrics.CONFIG_RELOADS,
        [(("applied",), counters.reloads_applied), (("rejected",), counters.reloads_rejected)],
    )
    yield metrics.RELOAD_DURATION, [((), counters.reload_duration_s)]
    yield metrics.APPLY_STALL, [((str(worker.slot),), worker.apply_stall_s) for worker in workers]
    yield metrics.LOOP_STALL, [((str(worker.slot),), statistics.loop_stall_max_s(worker.pid)) for worker in workers]
    yield metrics.LOOP_STALL_TOTAL, [((), statistics.loop_stall_total_s)]
    yield (
        metrics.CERTIFICATE_EXPIRY,
        [((one.workload_id, one.kind, one.serial_number), one.not_after) for one in process.certificates],
    )
    yield metrics.PROTOCOL_ERRORS, [((detail,), count) for detail, count in statistics.protocol_errors.items()]
    yield (
        metrics.ACCESS_LOG_LINES,
        [(("written",), statistics.access_log_written), (("dropped",), statistics.access_log_dropped)],
    )
    yield metrics.OVERLOAD, [((action,), count) for action, count in statistics.overload.items()]
    yield metrics.ACCEPT_ERRORS, [((), statistics.accept_errors)]
    yield metrics.METRIC_SERIES, [(("http",), len(statistics.http)), (("tcp",), len(statistics.tcp))]


# ── text ──

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
CHUNK_BYTES = 1 << 15

_BOUNDS = (*(str(int(bound)) if bound.is_integer() else str(bound) for bound in DURATION_BOUNDS_MS), "+Inf")
_BOUNDS_OPENMETRICS = (*(repr(bound) for bound in DURATION_BOUNDS_MS), "+Inf")


def wants_openmetrics(accept: str) -> bool:
    """From the Accept header: OpenMetrics is asked for, and not as the lesser choice."""
    best: dict[str, float] = {}
    for part in accept.split(","):
        name, _, parameters = part.strip().partition(";")
        quality = 1.0
        for parameter in parameters.split(";"):
            key, _, value = parameter.strip().partition("=")
            if key == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        name = name.strip().lower()
        best[name] = max(best.get(name, 0.0), quality)
    wanted = best.get("application/openmetrics-text", 0.0)
    return wanted > 0.0 and wanted >= best.get("text/plain", 0.0)


def render(of: Iterable[Family], *, is_openmetrics: bool) -> Iterator[bytes]:
    """The text in pieces of about CHUNK_BYTES, made as they are asked for: a scrape of a thousand services is tens of
    megabytes, and never all in memory. Families without samples are left out.

    OpenMetrics wants every counter to end in _total. Envoy's do not, and dashboards know them as they are; those are
    written as of unknown type.
    """
    lines: list[str] = []
    size = 0
    for metric, samples in of:
        is_first = True
        for values, value in samples:
            if is_first:
                lines.append(_head(metric, is_openmetrics))
                is_first = False
            labels = ",".join([f'{name}="{_escape(text)}"' for name, text in zip(metric.labels, values, strict=True)])
            text = (
                _histogram_lines(metric.name, labels, value, is_openmetrics)
                if isinstance(value, Histogram)
                else f"{metric.name}{{{labels}}} {_number(value)}\n"
                if labels
                else f"{metric.name} {_number(value)}\n"
            )
            lines.append(text)
            size += len(text)
            if size >= CHUNK_BYTES:
                yield "".join(lines).encode("utf-8", "backslashreplace")
                lines.clear()
                size = 0
    if is_openmetrics:
        lines.append("# EOF\n")
    if lines:
        yield "".join(lines).encode("utf-8", "backslashreplace")


def _head(metric: Metric, is_openmetrics: bool) -> str:
    name, kind = metric.name, metric.type.value
    if is_openmetrics and metric.type is MetricType.COUNTER:
        if name.endswith("_total"):
            name = name.removesuffix("_total")
        else:
            kind = "unknown"
    help = metric.help.replace("\\", "\\\\").replace("\n", "\\n")
    if is_openmetrics:
        help = help.replace('"', '\\"')
    return f"# HELP {name} {help}\n# TYPE {name} {kind}\n"


def _histogram_lines(name: str, labels: str, value: Histogram, is_openmetrics: bool) -> str:
    separator = "," if labels else ""
    bounds = _BOUNDS_OPENMETRICS if is_openmetrics else _BOUNDS
    cumulative = list(accumulate(value.counts))
    buckets = "".join(
        [
            f'{name}_bucket{{{labels}{separator}le="{bound}"}} {count}\n'
            for bound, count in zip(bounds, cumulative, strict=True)
        ]
    )
    braced = f"{{{labels}}}" if labels else ""
    return f"{buckets}{name}_sum{braced} {_number(value.sum)}\n{name}_count{braced} {cumulative[-1]}\n"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(value)


def _escape(value: str) -> str:
    if '"' in value or "\\" in value or "\n" in value:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return value
