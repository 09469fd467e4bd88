"""What a worker hands to control after requests, answers of its own and resets: labels, codes, sizes, counters."""

import asyncio
from typing import Any

import pytest

from meshproxy.model.listener import Direction
from meshproxy.model.route import DirectResponse, RetryPolicy, Route, WeightedCluster
from meshproxy.model.workload import WorkloadLabels
from meshproxy.telemetry.recorder import CLUSTER_FIELDS, HTTP_LABELS, LISTENER_FIELDS, SEPARATOR, Flush, HttpRow
from tests.support.client import Client, Cut, get, post
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin, Seen
from tests.support.raw_server import RawServer, reset, script, unused_port

REVIEWS = WorkloadLabels(workload="reviews-v2", namespace="books", app="reviews", version="v2")


def flush(live: LiveWorker) -> Flush:
    return live.worker.state.recorder.flush()


def labels(row: HttpRow) -> dict[str, str]:
    return dict(zip(HTTP_LABELS, row[0].split(SEPARATOR), strict=True))


def outcomes(flushed: Flush) -> dict[tuple[str, str], int]:
    """(code, flags) → requests."""
    return {(labels(row)["response_code"], labels(row)["response_flags"]): sum(row[1]) for row in flushed.http}


def cluster_counts(flushed: Flush) -> dict[str, int]:
    ((_, _, values),) = flushed.clusters
    return {name: value for name, value in zip(CLUSTER_FIELDS, values, strict=True) if value}


def listener_counts(flushed: Flush) -> dict[str, int]:
    ((_, values),) = flushed.listeners
    return {name: value for name, value in zip(LISTENER_FIELDS, values, strict=True) if value}


async def test_the_source_reports_itself_the_endpoint_and_the_service() -> None:
    async with Origin() as origin, LiveWorker() as live:
        endpoint: dict[str, Any] = {"workload": REVIEWS}
        async with Client(live.listen(live.cluster([("127.0.0.1", origin.port)], endpoint=endpoint))) as client:
            for _ in range(3):
                await client.ask(get())
            flushed = flush(live)
            (row,) = flushed.http
            told = labels(row)
            assert sum(row[1]) == sum(row[2]) == sum(row[3]) == 3
            assert flush(live).http == []  # differences only
        assert (told["reporter"], told["source_workload"], told["source_app"]) == ("source", "app", "app")
        assert (told["destination_workload"], told["destination_workload_namespace"]) == ("reviews-v2", "books")
        assert (told["destination_app"], told["destination_version"]) == ("reviews", "v2")
        assert (told["destination_service"], told["destination_service_name"]) == ("a.example", "a")
        assert told["destination_service_namespace"] == "default"
        assert (told["request_protocol"], told["response_code"], told["response_flags"]) == ("http", "200", "-")
        assert (told["grpc_response_status"], told["connection_security_policy"]) == ("", "unknown")
        assert cluster_counts(flushed)["upstream_rq_total"] == cluster_counts(flushed)["upstream_rq_2xx"] == 3
        assert listener_counts(flushed)["downstream_rq_total"] == listener_counts(flushed)["downstream_rq_2xx"] == 3
        assert cluster_counts(flushed)["upstream_cx_active"] == listener_counts(flushed)["downstream_cx_active"] == 1


async def test_the_destination_reports_itself_and_that_the_peer_is_unknown() -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]), direction=Direction.INBOUND)
        async with Client(port) as client:
            await client.ask(get())
        (row,) = flush(live).http
        told = labels(row)
        assert (told["reporter"], told["destination_workload"]) == ("destination", "app")
        assert told["source_workload"] == told["source_principal"] == told["destination_principal"] == "unknown"
        assert told["connection_security_policy"] == "none"


async def test_sizes_are_of_whole_messages() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 700\r\n\r\n" + b"r" * 700
    async with Origin(lambda seen: answer) as origin, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            data = post(b"q" * 90_000)
            await client.ask(data)
        (row,) = flush(live).http
        assert row[4] > 0.0
        assert row[5:] == (len(data), len(answer))


async def test_each_status_is_a_series_and_counts_in_its_class() -> None:
    def answer(seen: Seen) -> bytes:
        return b"HTTP/1.1 %b X\r\nContent-Length: 0\r\n\r\n" % seen.target[1:]

    async with Origin(answer) as origin, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", origin.port)]))) as client:
            for status in (201, 302, 404, 404, 500):
                await client.ask(get(f"/{status}"))
        flushed = flush(live)
        assert outcomes(flushed) == {("201", "-"): 1, ("302", "-"): 1, ("404", "-"): 2, ("500", "-"): 1}
        upstream, downstream = cluster_counts(flushed), listener_counts(flushed)
        assert [upstream[f"upstream_rq_{n}xx"] for n in (2, 3, 4, 5)] == [1, 1, 2, 1]
        assert [downstream[f"downstream_rq_{n}xx"] for n in (2, 3, 4, 5)] == [1, 1, 2, 1]
        assert upstream["upstream_rq_total"] == downstream["downstream_rq_total"] == 5


async def test_answers_of_our_own_are_counted_with_their_flags() -> None:
    async with LiveWorker() as live:
        nobody = live.cluster([("127.0.0.1", unused_port())])
        routes = (Route(clusters=(WeightedCluster(cluster_key=nobody),)),)
        async with Client(live.listen(nobody, routes=routes)) as client:
            assert (await client.ask(get())).status == 503
        flushed = flush(live)
        (row,) = flushed.http
        assert outcomes(flushed) == {("503", "UF"): 1}
        assert labels(row)["destination_service"] == "a.example"
        counts = cluster_counts(flushed)
        assert counts["upstream_cx_connect_fail"] == 1
        assert not counts.keys() & {"upstream_cx_active", "upstream_rq_2xx", "upstream_rq_5xx"}
        assert listener_counts(flushed)["downstream_rq_5xx"] == 1

        direct = (Route(direct_response=DirectResponse(status=418, body=b"tea")),)
        async with Client(live.listen(nobody, routes=direct)) as client:
            assert (await client.ask(get())).status == 418
        (row,) = (flushed := flush(live)).http
        assert outcomes(flushed) == {("418", "-"): 1}
        assert labels(row)["destination_service"] == labels(row)["destination_workload"] == "unknown"


async def test_every_request_is_counted_once_however_often_it_is_tried() -> None:
    async with Origin(lambda seen: b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n") as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        retry = RetryPolicy(attempts=2, on=frozenset({"5xx"}), base_interval_s=0.0)
        routes = (Route(clusters=(WeightedCluster(cluster_key=cluster),), retry=retry),)
        async with Client(live.listen(cluster, routes=routes)) as client:
            await client.ask(get())
        flushed = flush(live)
        assert outcomes(flushed) == {("503", "URX"): 1}
        counts = cluster_counts(flushed)
        assert (counts["upstream_rq_total"], counts["upstream_rq_5xx"], counts["upstream_rq_retry"]) == (3, 3, 2)
        assert counts["upstream_rq_retry_limit_exceeded"] == 1
        assert listener_counts(flushed)["downstream_rq_5xx"] == 1


async def test_an_upstream_that_resets_before_its_answer() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reset(writer)

    async with RawServer(serve) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            assert (await client.ask(get())).status == 503
        flushed = flush(live)
        assert outcomes(flushed) == {("503", "UR"): 1}
        assert cluster_counts(flushed)["upstream_rq_rx_reset"] == 1


async def test_an_answer_that_is_cut_keeps_its_code_and_gets_a_flag() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    async with RawServer(script(start, closes=True)) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            with pytest.raises(Cut):
                await client.ask(get())
        assert outcomes(flush(live)) == {("200", "UC"): 1}


@pytest.mark.parametrize(("start", "code"), [(b"", "0"), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", "200")])
async def test_a_downstream_that_leaves_is_counted_with_what_it_had_seen(start: bytes, code: str) -> None:
    async with RawServer(script(start)) as upstream, LiveWorker() as live:
        async with Client(live.listen(live.cluster([("127.0.0.1", upstream.port)]))) as client:
            client.send(get())
            await (client.bytes(1) if start else until(lambda: live.open_upstreams() == upstream.connections == 1))
            await reset(client.writer)  # an end alone would be half a connection, and be answered
        await until(lambda: live.open_downstreams() == live.open_upstreams() == 0)
        flushed = flush(live)
        assert outcomes(flushed) == {(code, "DC"): 1}
        assert cluster_counts(flushed)["upstream_rq_cancelled"] == 1
        assert "upstream_cx_active" not in cluster_counts(flushed)
        assert "downstream_cx_active" not in listener_counts(flushed)


async def test_what_is_not_http_is_counted_by_its_word_and_is_no_request() -> None:
    async with LiveWorker() as live:
        async with Client(live.listen("nowhere")) as client:
            assert (await client.ask(b"GET / HTTP/1.1\r\n\r\n")).status == 400
        flushed = flush(live)
        assert flushed.protocol_errors == {"http1.missing_host": 1}
        assert (flushed.http, flushed.clusters) == ([], [])
        assert listener_counts(flushed)["downstream_cx_protocol_error"] == 1
