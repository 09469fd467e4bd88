import os
from collections.abc import Callable

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from meshproxy.model.cluster import Cluster
from meshproxy.model.workload import UNKNOWN_WORKLOAD, WorkloadLabels
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.telemetry import exposition, metrics
from meshproxy.telemetry.exposition import (
    IDLE_S,
    MAX_SERIES,
    Histogram,
    Statistics,
    families,
    render,
    wants_openmetrics,
)
from meshproxy.telemetry.metrics import Metric, MetricType
from meshproxy.telemetry.process_state import CertificateInfo, ControlCounters, ProcessState, WorkerInfo
from meshproxy.telemetry.recorder import MESSAGE_LABELS, Flush, Recorder, http_labels, tcp_labels

APP = WorkloadLabels("app-v1", "shop", "app", "v1", "app", "v1", "Kubernetes")
HTTP = http_labels(
    reporter="source", source=APP, destination=UNKNOWN_WORKLOAD, service_host="edge.shop.svc", response_code="200"
)
TCP = tcp_labels(reporter="destination", source=UNKNOWN_WORKLOAD, destination=APP, service_host="edge.shop.svc")
CLUSTER = "outbound|80||edge.shop.svc"
UDP_CLUSTER = "outbound|53/udp||dns.example"


def flush_of(recorder: Recorder, pid: int) -> Flush:
    flush = recorder.flush()
    flush.pid = pid
    return flush


def process(**changes: object) -> ProcessState:
    fields: dict[str, object] = {
        "now": 1100.0,
        "state": "LIVE",
        "started_at": 1000.0,
        "snapshot": Snapshot(
            version="abc",
            clusters={
                CLUSTER: Cluster(
                    name=CLUSTER,
                    key=CLUSTER,
                    service_host="edge.shop.svc",
                    service_name="edge",
                    service_namespace="shop",
                    port=80,
                )
            },
        ),
        "counters": ControlCounters(ejections={CLUSTER: 7}),
        "workers": [WorkerInfo(slot=0, pid=os.getpid(), started_at=1000.0, version="abc", apply_stall_s=0.002)],
        "certificates": [
            CertificateInfo(
                workload_id="shop/app", kind="cert_chain", path="a", serial_number="0f", not_before=0.0, not_after=2e9
            )
        ],
        "warnings": 2,
        "errors": 1,
        "endpoint_health": {CLUSTER: {"10.0.0.1:80": "ejected"}},
        "cluster_sizes": {CLUSTER: 3},
    }
    return ProcessState(**(fields | changes))  # type: ignore[arg-type]


def text_of(statistics: Statistics, is_openmetrics: bool = False) -> str:
    return b"".join(render(families(statistics, process()), is_openmetrics=is_openmetrics)).decode()


def samples(statistics: Statistics, name: str) -> list[Sample]:
    return [sample for family in parse_text(text_of(statistics)) for sample in family.samples if sample.name == name]


def value(statistics: Statistics, name: str, **labels: str) -> float:
    if name.endswith("_rq_xx"):
        name += "_total"  # prometheus_client's text parser adds it to every counter
    (found,) = [one for one in samples(statistics, name) if labels.items() <= one.labels.items()]
    return found.value


@pytest.fixture
def busy() -> Statistics:
    statistics = Statistics()
    for pid in (1, 2):
        recorder = Recorder()
        recorder.http_series(HTTP).record(3.0, 100, 2000)
        recorder.http_series(HTTP).record(0.2, 0, 4_000_000)
        series = recorder.tcp_series(TCP)
        series.opened += 2
        series.closed += 1
        series.sent_bytes += 10
        series.received_bytes += 20
        messages = recorder.message_series(HTTP[: len(MESSAGE_LABELS)])
        messages.received += 3
        messages.sent += 5
        cluster = recorder.cluster(CLUSTER, CLUSTER)
        cluster.upstream_rq_total += 2
        cluster.upstream_rq_5xx += 1
        cluster.upstream_cx_active += 3
        listener = recorder.listener("127.0.0.1_80")
        listener.downstream_cx_total += 1
        listener.downstream_rq_2xx += 2
        recorder.process.protocol_error('odd "word"\\')
        recorder.process.access_log_dropped += 4
        recorder.process.loop_stall_max_s = 0.25 * pid
        statistics.merge(flush_of(recorder, pid), now=0.0)
    return statistics


def add_udp(statistics: Statistics) -> None:
    recorder = Recorder()
    recorder.cluster(UDP_CLUSTER, UDP_CLUSTER).udp_sess_rx_datagrams += 5
    recorder.listener("127.0.0.1_53_udp").udp_downstream_sess_total += 1
    statistics.merge(flush_of(recorder, 1), now=0.0)


def test_counts_of_all_workers_add_up(busy: Statistics) -> None:
    assert value(busy, "istio_requests_total") == 4
    assert value(busy, "istio_tcp_connections_opened_total") == 4
    assert value(busy, "istio_tcp_connections_closed_total") == 2
    assert value(busy, "istio_tcp_sent_bytes_total") == 20
    assert value(busy, "istio_tcp_received_bytes_total") == 40
    assert value(busy, "envoy_cluster_upstream_rq_total", envoy_cluster_name=CLUSTER) == 4
    assert value(busy, "envoy_cluster_upstream_cx_active") == 6
    assert value(busy, "envoy_cluster_upstream_rq_xx", envoy_response_code_class="5") == 2
    assert value(busy, "envoy_http_downstream_rq_xx", envoy_response_code_class="2") == 4
    assert value(busy, "envoy_listener_downstream_cx_total") == 2
    assert value(busy, "meshproxy_protocol_errors_total", detail='odd "word"\\') == 2
    assert value(busy, "meshproxy_access_log_lines_total", result="dropped") == 8


def test_names_of_the_udp_proxy_are_shown_where_there_is_udp(busy: Statistics) -> None:
    assert "udp" not in text_of(busy)
    add_udp(busy)
    assert value(busy, "envoy_cluster_udp_sess_rx_datagrams_total", envoy_cluster_name=UDP_CLUSTER) == 5
    assert value(busy, "envoy_udp_downstream_sess_total", envoy_listener_address="127.0.0.1_53_udp") == 1
    assert value(busy, "envoy_udp_downstream_sess_active") == 0


def test_histograms_are_cumulative_with_envoys_buckets(busy: Statistics) -> None:
    buckets = {one.labels["le"]: one.value for one in samples(busy, "istio_request_duration_milliseconds_bucket")}
    assert list(buckets) == (
        "0.5 1 5 10 25 50 100 250 500 1000 2500 5000 10000 30000 60000 300000 600000 1800000 3600000 +Inf".split()
    )
    assert (buckets["0.5"], buckets["1"], buckets["5"], buckets["+Inf"]) == (2, 2, 4, 4)
    assert value(busy, "istio_request_duration_milliseconds_sum") == pytest.approx(6.4)
    assert value(busy, "istio_request_duration_milliseconds_count") == 4
    sizes = {one.labels["le"]: one.value for one in samples(busy, "istio_response_bytes_bucket")}
    assert (sizes["1000"], sizes["2500"], sizes["3600000"], sizes["+Inf"]) == (0, 2, 2, 4)
    assert value(busy, "istio_response_bytes_sum") == 8_004_000


def test_requests_carry_the_25_labels_in_istios_order(busy: Statistics) -> None:
    (line,) = [line for line in text_of(busy).splitlines() if line.startswith("istio_requests_total")]
    names = [pair.partition("=")[0] for pair in line[line.index("{") + 1 : line.index("}")].split(",")]
    assert tuple(names) == metrics.ISTIO_REQUESTS.labels and len(names) == 25


def test_grpc_messages_of_all_workers_without_labels_of_an_outcome(busy: Statistics) -> None:
    assert value(busy, "istio_request_messages_total", source_app="app") == 6
    (sample,) = samples(busy, "istio_response_messages_total")
    assert sample.value == 10
    assert "destination_cluster" in sample.labels and "request_protocol" not in sample.labels
    busy.reset()
    assert value(busy, "istio_response_messages_total") == 0


@pytest.mark.parametrize("is_openmetrics", [False, True])
def test_the_text_is_read_back_whole(busy: Statistics, is_openmetrics: bool) -> None:
    add_udp(busy)
    text = text_of(busy, is_openmetrics)
    parse: Callable[..., object] = parse_openmetrics if is_openmetrics else parse_text
    parsed = list(parse(text))  # type: ignore[call-overload]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert sum(len(family.samples) for family in parsed) == len(lines)
    # The text parser adds _total to every counter that lacks it.
    names = {sample.name for family in parsed for sample in family.samples}
    names |= {name.removesuffix("_total") for name in names}
    for metric in metrics.ALL:
        suffix = "_bucket" if metric.type is MetricType.HISTOGRAM else ""
        assert metric.name + suffix in names, metric.name
    assert all(family.documentation and family.type for family in parsed)


def test_a_counter_keeps_its_name_in_openmetrics(busy: Statistics) -> None:
    text = text_of(busy, is_openmetrics=True)
    assert "# TYPE istio_requests counter\n" in text
    assert "# TYPE envoy_cluster_upstream_rq_retry unknown\n" in text
    assert "\nenvoy_cluster_upstream_rq_retry{" in text
    assert text.endswith("# EOF\n")


def test_a_metric_without_samples_is_left_out() -> None:
    assert "istio_requests_total" not in text_of(Statistics())


def test_label_values_and_help_are_escaped() -> None:
    metric = Metric("m", MetricType.GAUGE, "back\\slash\nline", ("a",))
    text = b"".join(render([(metric, [(('x"\\\ny',), 1)])], is_openmetrics=False)).decode()
    assert text == '# HELP m back\\\\slash\\nline\n# TYPE m gauge\nm{a="x\\"\\\\\\ny"} 1\n'


def test_an_unlabelled_histogram_has_no_empty_braces() -> None:
    metric = Metric("h", MetricType.HISTOGRAM, "x", ())
    text = b"".join(render([(metric, [((), Histogram([1] * 20, 2.5))])], is_openmetrics=True)).decode()
    assert 'h_bucket{le="1.0"} 2\n' in text and "h_sum 2.5\nh_count 20\n" in text


def test_the_text_comes_in_pieces() -> None:
    metric = Metric("m", MetricType.GAUGE, "x", ("a",))
    pieces = list(render([(metric, (((str(i),), i) for i in range(10_000)))], is_openmetrics=False))
    assert len(pieces) > 2 and max(map(len, pieces)) < exposition.CHUNK_BYTES * 1.1


def test_a_worker_that_died_leaves_its_counts_and_takes_its_gauges(busy: Statistics) -> None:
    busy.keep_only({2})
    assert value(busy, "envoy_cluster_upstream_cx_active") == 3
    assert value(busy, "envoy_cluster_upstream_rq_total") == 4
    assert busy.loop_stall_max_s(1) == 0.0 and busy.loop_stall_max_s(2) == 0.5


def test_a_gauge_that_returns_to_zero_shows_zero() -> None:
    statistics, recorder = Statistics(), Recorder()
    counters = recorder.cluster(CLUSTER, CLUSTER)
    for active in (5, 0):
        counters.upstream_cx_active = active
        statistics.merge(recorder.flush(), now=0.0)
        assert value(statistics, "envoy_cluster_upstream_cx_active") == active


def test_clusters_that_share_a_name_show_as_one() -> None:
    statistics, recorder = Statistics(), Recorder()
    for key in ("a", "b"):
        recorder.cluster(key, CLUSTER).upstream_rq_total += 1
    statistics.merge(recorder.flush(), now=0.0)
    assert value(statistics, "envoy_cluster_upstream_rq_total", envoy_cluster_name=CLUSTER) == 2


def test_a_removed_cluster_is_forgotten() -> None:
    statistics, recorder = Statistics(), Recorder()
    recorder.cluster(CLUSTER, CLUSTER).upstream_rq_total += 1
    recorder.remove_cluster(CLUSTER)
    recorder.listener("l").downstream_cx_total += 1
    recorder.remove_listener("l")
    statistics.merge(recorder.flush(), now=0.0)
    assert statistics.cluster_values() == {} and statistics.listener_values() == {}


def test_reset_zeroes_counts_and_keeps_gauges(busy: Statistics) -> None:
    busy.reset()
    assert value(busy, "istio_requests_total") == 0
    assert value(busy, "envoy_cluster_upstream_rq_total") == 0
    assert value(busy, "envoy_cluster_upstream_cx_active") == 6


def test_label_sets_of_a_removed_service_go_after_an_idle_hour(busy: Statistics) -> None:
    busy.evict(IDLE_S + 1, {"edge.shop.svc"})
    assert len(busy.http) == len(busy.tcp) == 1
    busy.evict(IDLE_S - 1, set())
    assert len(busy.http) == len(busy.tcp) == 1
    busy.evict(IDLE_S + 1, set())
    assert busy.http == {} and busy.tcp == {}


def test_label_sets_are_bounded_over_all_workers() -> None:
    statistics = Statistics()
    for pid in range(3):
        recorder = Recorder()
        for i in range(4000):
            recorder.http_series((f"{pid}-{i}",) * 25).record(1.0, 1, 1)
            recorder.tcp_series((f"{pid}-{i}",) * 23).opened += 1
        statistics.merge(flush_of(recorder, pid), now=0.0)
    assert len(statistics.http) == len(statistics.tcp) == MAX_SERIES + 1
    assert sum(one.requests for one in statistics.http.values()) == 12_000
    assert sum(one.opened for one in statistics.tcp.values()) == 12_000


def test_the_process_shows_itself(busy: Statistics) -> None:
    assert value(busy, "envoy_server_live") == 1
    assert value(busy, "envoy_server_uptime") == 100
    assert value(busy, "meshproxy_workers") == 1
    assert value(busy, "meshproxy_worker_is_current", worker="0") == 1
    assert value(busy, "meshproxy_process_resident_bytes", process="control") > 1 << 20
    assert value(busy, "meshproxy_config_problems", severity="error") == 1
    assert value(busy, "meshproxy_snapshot_info", version="abc") == 1
    assert value(busy, "meshproxy_certificate_expiry_timestamp_seconds", workload="shop/app") == 2e9
    assert value(busy, "envoy_cluster_membership_total") == 3
    assert value(busy, "envoy_cluster_membership_healthy") == 2
    assert value(busy, "envoy_cluster_outlier_detection_ejections_active") == 1
    assert value(busy, "envoy_cluster_outlier_detection_ejections_enforced_total") == 7


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("application/openmetrics-text;q=0.4, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
    ],
)
def test_the_format_is_what_the_scraper_prefers(accept: str, answer: bool) -> None:
    assert wants_openmetrics(accept) is answer
