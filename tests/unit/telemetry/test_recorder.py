import pickle

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.model.workload import UNKNOWN_WORKLOAD, WorkloadLabels
from meshproxy.telemetry.recorder import (
    BUCKET_COUNT,
    CLUSTER_FIELDS,
    DURATION_BOUNDS_MS,
    HTTP_LABELS,
    IDLE_FLUSHES,
    MAX_ERROR_WORDS,
    MAX_SERIES,
    OVERFLOW,
    SEPARATOR,
    TCP_LABELS,
    Recorder,
    http_labels,
    tcp_labels,
)

APP = WorkloadLabels("app-v1", "shop", "app", "v1", "app", "v1", "Kubernetes")
HTTP = http_labels(reporter="source", source=APP, destination=UNKNOWN_WORKLOAD, response_code="200")
TCP = tcp_labels(reporter="source", source=APP, destination=UNKNOWN_WORKLOAD)


def test_label_values_stand_in_the_order_of_their_names() -> None:
    named = dict(zip(HTTP_LABELS, HTTP, strict=True))
    assert len(HTTP_LABELS) == 25
    assert named["source_workload"] == "app-v1"
    assert named["source_workload_namespace"] == "shop"
    assert named["destination_workload"] == "unknown"
    assert named["request_protocol"] == "http"
    assert named["response_code"] == "200"
    assert named["response_flags"] == "-"
    assert named["connection_security_policy"] == "unknown"


def test_tcp_series_have_no_response_code() -> None:
    named = dict(zip(TCP_LABELS, TCP, strict=True))
    assert "response_code" not in named and "grpc_response_status" not in named
    assert named["request_protocol"] == "tcp"
    assert named["response_flags"] == "-"


def test_a_series_is_made_once_per_label_set() -> None:
    recorder = Recorder()
    assert recorder.http_series(HTTP) is recorder.http_series(tuple(HTTP))
    assert recorder.tcp_series(TCP) is recorder.tcp_series(tuple(TCP))


@given(st.floats(0, 4e6), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_value_lands_in_the_first_bucket_that_is_not_below_it(duration: float, request: int, response: int) -> None:
    recorder = Recorder()
    recorder.http_series(HTTP).record(duration, request, response)
    ((_, durations, requests, responses, duration_sum, request_sum, response_sum),) = recorder.flush().http
    for value, counts in ((duration, durations), (request, requests), (response, responses)):
        bucket = next((i for i, bound in enumerate(DURATION_BOUNDS_MS) if value <= bound), BUCKET_COUNT - 1)
        assert sum(counts) == 1 and counts[bucket] == 1
    assert (duration_sum, request_sum, response_sum) == (duration, request, response)


def test_a_flush_says_only_what_changed_since_the_last() -> None:
    recorder = Recorder()
    series = recorder.http_series(HTTP)
    series.record(1.0, 10, 20)
    recorder.flush()
    quiet = recorder.flush()
    assert quiet.http == [] and quiet.clusters == [] and quiet.listeners == []
    series.record(2.0, 1, 1)
    ((key, counts, *_),) = recorder.flush().http
    assert key.split(SEPARATOR) == list(HTTP) and sum(counts) == 1


def test_cluster_counts_travel_as_differences_and_gauges_as_they_stand() -> None:
    recorder = Recorder()
    counters = recorder.cluster("k", "outbound|80||a.b")
    counters.upstream_rq_total += 3
    counters.upstream_cx_active += 5
    recorder.flush()
    counters.upstream_rq_total += 1
    counters.upstream_cx_active -= 1
    ((key, name, values),) = recorder.flush().clusters
    named = dict(zip(CLUSTER_FIELDS, values, strict=True))
    assert (key, name) == ("k", "outbound|80||a.b")
    assert named["upstream_rq_total"] == 1 and named["upstream_cx_active"] == 4


def test_a_removed_cluster_says_its_last_counts_and_goes() -> None:
    recorder = Recorder()
    recorder.cluster("k", "n").upstream_rq_total += 1
    recorder.remove_cluster("k")
    flush = recorder.flush()
    assert len(flush.clusters) == 1 and flush.removed_clusters == ["k"]
    assert recorder.flush().removed_clusters == []


def test_a_cluster_that_returns_before_the_flush_was_never_away() -> None:
    recorder = Recorder()
    counters = recorder.cluster("k", "n")
    recorder.remove_cluster("k")
    assert recorder.cluster("k", "n") is counters
    assert recorder.flush().removed_clusters == []


def test_an_idle_series_nobody_holds_is_forgotten_and_a_held_one_stays() -> None:
    recorder = Recorder()
    held = recorder.http_series(HTTP)
    held_tcp = recorder.tcp_series(TCP)
    recorder.http_series(("x",) * 25)
    recorder.tcp_series(("x",) * 23)
    for _ in range(IDLE_FLUSHES + 1):
        recorder.flush()
    held_messages = recorder.message_series(("held",) * 20)
    recorder.message_series(("x",) * 20)
    for _ in range(IDLE_FLUSHES + 1):
        recorder.flush()
    assert recorder.series_count() == (1, 1)
    assert recorder.message_series(("held",) * 20) is held_messages and len(recorder._messages) == 1
    assert recorder.http_series(HTTP) is held and recorder.tcp_series(TCP) is held_tcp


def test_series_are_bounded_and_the_rest_is_counted_together() -> None:
    recorder = Recorder()
    for code in range(MAX_SERIES + 50):
        recorder.http_series((str(code),) * 25).record(1.0, 1, 1)
        recorder.tcp_series((str(code),) * 23).opened += 1
        recorder.message_series((str(code),) * 20).sent += 1
    flush = recorder.flush()
    assert len(flush.http) == len(flush.tcp) == len(flush.messages) == MAX_SERIES + 1
    assert [row[1:] for row in flush.messages if row[0].startswith(OVERFLOW)] == [(0, 50)]
    assert [sum(row[1]) for row in flush.http if row[0].startswith(OVERFLOW)] == [50]
    assert [row[1] for row in flush.tcp if row[0].startswith(OVERFLOW)] == [50]


def test_protocol_error_words_are_bounded() -> None:
    recorder = Recorder()
    for i in range(MAX_ERROR_WORDS * 2):
        recorder.process.protocol_error(f"http1.{i}")
    errors = recorder.flush().protocol_errors
    assert len(errors) == MAX_ERROR_WORDS + 1 and errors[OVERFLOW] == MAX_ERROR_WORDS
    assert recorder.flush().protocol_errors == {}


def test_a_flush_is_picklable() -> None:
    recorder = Recorder()
    recorder.http_series(HTTP).record(1.0, 1, 1)
    recorder.listener("0.0.0.0_80").downstream_cx_total += 1
    flush = recorder.flush()
    assert pickle.loads(pickle.dumps(flush)) == flush
