import json
import re
from typing import Any

import pytest

from meshproxy.admin import views
from meshproxy.model.cluster import CircuitLimits, Cluster, Protocol
from meshproxy.model.endpoint import Endpoint, Locality, LocalityEndpoints
from meshproxy.model.listener import Direction, Listener, MtlsMode
from meshproxy.model.route import DirectResponse, Route, RouteTable, VirtualHost
from meshproxy.resources.problems import ConfigProblem, Severity
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.telemetry.exposition import Statistics
from meshproxy.telemetry.process_state import CertificateInfo, ControlCounters, ProcessState, ProcessUsage, WorkerInfo
from meshproxy.telemetry.recorder import Recorder

NAME = "outbound|80||edge.shop.svc"
SNAPSHOT = Snapshot(
    version="abc",
    clusters={
        NAME: Cluster(
            name=NAME,
            key=NAME,
            service_host="edge.shop.svc",
            service_name="edge",
            service_namespace="shop",
            port=80,
            limits=CircuitLimits(max_connections=7),
            localities=(
                LocalityEndpoints(
                    locality=Locality("r", "z"), endpoints=(Endpoint(address="10.0.0.1", port=80, labels={"v": "1"}),)
                ),
            ),
            source="a.yaml:3",
        )
    },
    listeners={
        "127.0.0.1_80": Listener(
            name="127.0.0.1_80",
            address="127.0.0.1",
            port=80,
            direction=Direction.INBOUND,
            workload_id="shop/edge",
            protocol=Protocol.HTTP,
            mtls=MtlsMode.STRICT,
            route_table="t",
        )
    },
    route_tables={
        "t": RouteTable(
            name="t",
            virtual_hosts=(
                VirtualHost(
                    name="v",
                    domains=("*",),
                    routes=(Route(direct_response=DirectResponse(status=200, body=b"\xff")),),
                ),
            ),
        )
    },
)


def endpoint(**changes: Any) -> dict[str, Any]:
    return {
        "address": "10.0.0.1",
        "port": 80,
        "locality": "r/z/s",
        "weight": 1,
        "priority": 0,
        "is_ejected": False,
        "is_unhealthy": False,
        "active_requests": 1,
        "rq_total": 10,
        "rq_success": 8,
        "rq_error": 2,
        "cx_active": 1,
        "cx_total": 3,
        "cx_connect_fail": 0,
    } | changes


def answer(*endpoints: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"cluster_key": NAME, "cluster_name": NAME, "endpoints": list(endpoints)}]


def process() -> ProcessState:
    return ProcessState(
        now=1000.0 + 86400,
        state="LIVE",
        started_at=1000.0,
        snapshot=SNAPSHOT,
        counters=ControlCounters(published_at=1000.0, worker_restarts=2),
        workers=[WorkerInfo(slot=0, pid=4242, started_at=1000.0, version="old")],
        certificates=[],
        warnings=1,
        errors=0,
        endpoint_health={},
        cluster_sizes={NAME: 1},
    )


def test_workers_answers_add_up_and_a_verdict_of_one_is_shown() -> None:
    (cluster,) = views.merge_clusters([answer(endpoint()), answer(endpoint(is_ejected=True, rq_total=5))])
    (merged,) = cluster["endpoints"]
    assert merged["rq_total"] == 15 and merged["active_requests"] == 2
    assert merged["is_ejected"] is True


def test_a_locality_may_come_as_the_model_has_it() -> None:
    (cluster,) = views.merge_clusters([answer(endpoint(locality=Locality("r", "z")))])
    assert cluster["endpoints"][0]["locality"] == "r/z"


def test_clusters_are_shown_in_envoys_lines() -> None:
    clusters = views.merge_clusters([answer(endpoint(is_ejected=True, is_unhealthy=True))])
    lines = "".join(views.clusters_text(clusters, SNAPSHOT)).splitlines()
    assert f"{NAME}::default_priority::max_connections::7" in lines
    assert f"{NAME}::10.0.0.1:80::rq_total::10" in lines
    assert f"{NAME}::10.0.0.1:80::health_flags::/failed_active_hc/failed_outlier_check" in lines
    assert f"{NAME}::10.0.0.1:80::sub_zone::s" in lines


def test_clusters_are_shown_with_envoys_keys() -> None:
    clusters = views.merge_clusters([answer(endpoint(is_ejected=True), endpoint(address="/run/x.sock", port=0))])
    (status,) = views.cluster_statuses(clusters, SNAPSHOT)
    first, second = status["host_statuses"]
    assert first["address"] == {"socket_address": {"address": "10.0.0.1", "port_value": 80}}
    assert second["address"] == {"pipe": {"path": "/run/x.sock"}}
    assert first["health_status"] == {"eds_health_status": "HEALTHY", "failed_outlier_check": True}
    assert {"name": "rq_total", "value": "10"} in first["stats"]
    assert first["locality"] == {"region": "r", "zone": "z", "sub_zone": "s"}
    assert status["circuit_breakers"] == {"thresholds": [{"max_connections": 7}]}


@pytest.mark.parametrize(("address", "shown"), [("10.0.0.1", "10.0.0.1:80"), ("fd00::1", "[fd00::1]:80")])
def test_an_endpoint_is_named_as_a_url_would(address: str, shown: str) -> None:
    text = "".join(views.clusters_text(views.merge_clusters([answer(endpoint(address=address))]), SNAPSHOT))
    assert f"::{shown}::weight::1" in text


def test_listeners() -> None:
    assert views.listeners_text(SNAPSHOT) == "127.0.0.1_80::127.0.0.1:80\n"
    (status,) = views.listener_statuses(SNAPSHOT)
    assert status["local_address"] == {"socket_address": {"address": "127.0.0.1", "port_value": 80}}
    assert (status["mtls"], status["direction"], status["workload"]) == ("STRICT", "inbound", "shop/edge")


def test_certificates_are_grouped_by_workload_with_envoys_keys() -> None:
    leaf = CertificateInfo(
        workload_id="shop/edge",
        kind="cert_chain",
        path="/certs/cert-chain.pem",
        serial_number="0a",
        not_before=0.0,
        not_after=3.5 * 86400,
        uris=("spiffe://cluster.local/ns/shop/sa/edge",),
    )
    root = CertificateInfo(
        workload_id="shop/edge", kind="ca_cert", path="r", serial_number="1", not_before=0.0, not_after=1.0
    )
    (item,) = views.certificates([leaf, root], now=86400.0)["certificates"]
    (shown,) = item["cert_chain"]
    assert shown["days_until_expiration"] == "2"
    assert shown["subject_alt_names"] == [{"uri": "spiffe://cluster.local/ns/shop/sa/edge"}]
    assert shown["expiration_time"] == "1970-01-04T12:00:00Z"
    assert item["ca_cert"][0]["days_until_expiration"] == "0"


def test_the_config_dump_is_the_whole_snapshot() -> None:
    dump = json.loads("".join(views.config_dump(SNAPSHOT, 0.0)))
    kinds = {config["@type"]: config for config in dump["configs"]}
    assert set(kinds) == {
        f"meshproxy.{kind}ConfigDump"
        for kind in ("Workloads", "Listeners", "RouteTables", "Clusters", "Peers", "AccessLog")
    }
    cluster = kinds["meshproxy.ClustersConfigDump"]["clusters"][NAME]
    assert cluster["localities"][0]["endpoints"][0]["labels"] == {"v": "1"}
    assert cluster["lb"]["kind"] == "LEAST_REQUEST" and cluster["source"] == "a.yaml:3"
    assert kinds["meshproxy.ClustersConfigDump"]["version_info"] == "abc"


def test_the_config_dump_can_be_of_one_resource() -> None:
    dump = json.loads("".join(views.config_dump(SNAPSHOT, 0.0, "listeners")))
    assert [config["@type"] for config in dump["configs"]] == ["meshproxy.ListenersConfigDump"]


def test_an_empty_snapshot_dumps_as_json() -> None:
    assert len(json.loads("".join(views.config_dump(Snapshot(version="0"), 0.0)))["configs"]) == 6


def test_server_info_says_which_workers_lag_behind() -> None:
    info = views.server_info(process(), "1.2.3", "info", {"node_id": "n1", "locality": "r/z"})
    assert info["version"] == "1.2.3" and info["state"] == "LIVE"
    assert info["uptime_current_epoch"] == "86400s" and info["node"]["id"] == "n1"
    assert info["workers"][0]["is_current"] is False and info["worker_restarts"] == 2
    assert info["snapshot"]["endpoints"] == 1
    json.dumps(info)


def test_memory_adds_up_shares_not_residents() -> None:
    usage = ProcessUsage(resident_bytes=100, pss_bytes=40, private_bytes=30, cpu_s=1.0, open_fds=9)
    shown = views.memory([("control", 1, usage), ("worker_0", 2, usage)])
    assert shown["allocated"] == "80" and shown["processes"][1]["name"] == "worker_0"


def test_problems_carry_their_sentence() -> None:
    problem = ConfigProblem(Severity.WARNING, "a.yaml", 3, "spec.x", "Sidecar a/b", "is wrong", "ignored")
    (shown,) = views.problems([problem])["problems"]
    assert shown["severity"] == "WARNING" and shown["line"] == 3
    assert shown["sentence"] == "a.yaml:3: Sidecar a/b: spec.x: is wrong; ignored"


@pytest.mark.parametrize(
    ("counts", "q", "value"),
    [
        ({0: 10}, 0.5, 0.25),
        ({0: 10}, 1.0, 0.5),
        ({3: 4}, 0.5, 7.5),
        ({0: 1, 3: 1}, 0.0, 0.0),
        ({0: 50, 2: 50}, 0.75, 3.0),
        ({19: 1}, 0.5, 3600000.0),
        ({}, 0.5, None),
    ],
)
def test_quantile(counts: dict[int, int], q: float, value: float | None) -> None:
    assert views.quantile([counts.get(i, 0) for i in range(20)], q) == value


@pytest.fixture
def statistics() -> Statistics:
    recorder = Recorder()
    recorder.cluster(NAME, NAME).upstream_rq_total += 3
    recorder.listener("127.0.0.1_80").downstream_rq_total += 3
    recorder.listener("127.0.0.1_80").downstream_cx_total += 1
    recorder.http_series(("a",) * 25).record(3.0, 1, 1)
    statistics = Statistics()
    statistics.merge(recorder.flush(), now=0.0)
    return statistics


def test_statistics_have_envoys_dotted_names(statistics: Statistics) -> None:
    text = "".join(views.stats_text(views.stats(statistics, process())))
    lines = text.splitlines()
    assert f"cluster.{NAME}.upstream_rq_total: 3" in lines
    assert f"cluster.{NAME}.ssl.handshake: 0" in lines
    assert "listener.127.0.0.1_80.downstream_cx_total: 1" in lines
    assert "http.127.0.0.1_80.downstream_rq_total: 3" in lines
    assert "server.live: 1" in lines
    (histogram,) = [line for line in lines if line.startswith("istio_request_duration_milliseconds{")]
    assert "P50(nan,3)" in histogram


def test_statistics_can_be_only_those_used_or_found(statistics: Statistics) -> None:
    used = dict(views.stats(statistics, process(), used_only=True))
    assert f"cluster.{NAME}.upstream_rq_total" in used and f"cluster.{NAME}.upstream_rq_retry" not in used
    found = dict(views.stats(statistics, process(), pattern=re.compile(r"^http\..*_rq_total$")))
    assert found == {"http.127.0.0.1_80.downstream_rq_total": 3}


def test_statistics_as_json(statistics: Statistics) -> None:
    stats = json.loads("".join(views.stats_json(views.stats(statistics, process()))))["stats"]
    assert {"name": f"cluster.{NAME}.upstream_rq_total", "value": 3} in stats
    names = [one["name"] for one in stats[-1]["histograms"]["computed_quantiles"]]
    assert any(name.startswith("istio_request_bytes") for name in names)


def test_no_statistics_are_still_json() -> None:
    text = "".join(views.stats_json(views.stats(Statistics(), process(), pattern=re.compile("nothing at all"))))
    assert len(json.loads(text)["stats"]) == 1
