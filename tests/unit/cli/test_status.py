import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from meshproxy.admin import views
from meshproxy.admin.http import HttpService, Request, Response
from meshproxy.cli import status
from meshproxy.cli.main import main
from meshproxy.cli.status import Painter, table
from meshproxy.model.cluster import Cluster, Protocol
from meshproxy.model.listener import Direction, Listener, MtlsMode
from meshproxy.model.route import (
    DirectResponse,
    MatchKind,
    NamedMatch,
    Redirect,
    Route,
    RouteMatch,
    RouteTable,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from meshproxy.resources.problems import ConfigProblem, Severity
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.telemetry.process_state import CertificateInfo, ControlCounters, ProcessState, ProcessUsage, WorkerInfo

PLAIN = Painter(has_colours=False)
COLOURS = Painter(has_colours=True)
NAME = "outbound|80||edge.shop.svc"


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_stand_right() -> None:
    text = table(("NAME", "COUNT"), [["a", "5"], ["longer", "12345"]], PLAIN)
    assert text == "NAME    COUNT\na           5\nlonger  12345\n"


def test_colours_do_not_move_columns() -> None:
    rows: list[list[status.Cell]] = [[("\x1b[31m", "ejected"), "x"], ["ok", "y"]]
    coloured = table(("HEALTH", "N"), rows, COLOURS)
    assert "\x1b[31mejected\x1b[0m  x\n" in coloured
    stripped = coloured.replace("\x1b[31m", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert stripped == table(("HEALTH", "N"), rows, PLAIN)


def test_a_table_without_rows_says_so() -> None:
    assert table(("A",), [], PLAIN) == "none\n"


def test_a_name_cannot_drive_the_terminal() -> None:
    assert "\x1b" not in table(("A",), [["\x1b[2Jx"]], PLAIN)


def test_colours_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Painter.of(Terminal())("\x1b[31m", "x") == "\x1b[31mx\x1b[0m"  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert Painter.of(Terminal())("\x1b[31m", "x") == "x"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (61, "1m 1s"), (3600, "1h"), (90061, "1d 1h"), (86400 * 3, "3d")]
)
def test_durations_show_their_two_largest_units(seconds: int, text: str) -> None:
    assert status._duration(seconds) == text


SNAPSHOT = Snapshot(
    version="abc",
    clusters={
        NAME: Cluster(
            name=NAME,
            key=NAME,
            service_host="edge",
            service_name="edge",
            service_namespace="shop",
            port=80,
            source="a:1",
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
            route_table="80",
            source="a.yaml:9",
        )
    },
    route_tables={
        "80": RouteTable(
            name="80",
            virtual_hosts=(
                VirtualHost(
                    name="v",
                    domains=("edge", "edge.shop", "edge.shop.svc"),
                    routes=(
                        Route(
                            name="split",
                            match=RouteMatch(
                                path=StringMatch(MatchKind.PREFIX, "/v2"),
                                headers=(NamedMatch("x-a", StringMatch(MatchKind.EXACT, "1"), is_inverted=True),),
                            ),
                            clusters=(
                                WeightedCluster(cluster_key="c1", weight=80),
                                WeightedCluster(cluster_key="c2", weight=20),
                            ),
                            source="a.yaml:4",
                        ),
                        Route(redirect=Redirect(code=308, authority="other")),
                        Route(direct_response=DirectResponse(status=404)),
                    ),
                ),
            ),
        )
    },
)
PROCESS = ProcessState(
    now=1000.0 + 3700,
    state="LIVE",
    started_at=1000.0,
    snapshot=SNAPSHOT,
    counters=ControlCounters(published_at=1000.0, worker_restarts=1),
    workers=[WorkerInfo(slot=0, pid=7, started_at=1000.0, version="old")],
    certificates=[],
    warnings=1,
    errors=0,
    endpoint_health={},
    cluster_sizes={NAME: 2},
)
ENDPOINT = {
    "address": "10.0.0.1",
    "port": 80,
    "locality": "r/z",
    "weight": 1,
    "priority": 0,
    "is_ejected": True,
    "is_unhealthy": False,
    "active_requests": 1,
    "rq_total": 10,
    "rq_success": 8,
    "rq_error": 2,
    "cx_active": 3,
    "cx_total": 3,
    "cx_connect_fail": 0,
}
USAGE = ProcessUsage(resident_bytes=100 << 20, pss_bytes=20 << 20, private_bytes=None, cpu_s=1.25, open_fds=9)


def _clusters_json() -> Any:
    answer: list[dict[str, Any]] = [
        {
            "cluster_key": NAME,
            "cluster_name": NAME,
            "endpoints": [ENDPOINT, ENDPOINT | {"port": 81, "is_ejected": False}],
        },
        {"cluster_key": "empty", "cluster_name": "empty", "endpoints": []},
    ]
    return {"cluster_statuses": list(views.cluster_statuses(views.merge_clusters([answer]), SNAPSHOT))}


ANSWERS: dict[str, Callable[[], Any]] = {
    "/clusters": _clusters_json,
    "/listeners": lambda: {"listener_statuses": list(views.listener_statuses(SNAPSHOT))},
    "/config_dump": lambda: json.loads("".join(views.config_dump(SNAPSHOT, 0.0))),
    "/server_info": lambda: views.server_info(PROCESS, "1.2.3", "info", {"node_id": "n1"}),
    "/memory": lambda: views.memory([("control", 6, USAGE), ("worker_0", 7, USAGE)]),
    "/problems": lambda: views.problems(
        [ConfigProblem(Severity.WARNING, "a.yaml", 3, "spec.x", "Sidecar a/b", "is wrong", "ignored")]
    ),
    "/certs": lambda: views.certificates(
        [
            CertificateInfo(
                workload_id="shop/edge",
                kind="cert_chain",
                path="p",
                serial_number="0a",
                not_before=0.0,
                not_after=3 * 86400.0,
                uris=("spiffe://cluster.local/ns/shop/sa/edge",),
            )
        ],
        now=0.0,
    ),
}


@pytest.fixture
async def proxy() -> AsyncIterator[str]:
    """The admin address of something that answers with what admin.views make."""

    async def handle(request: Request) -> Response:
        if request.path not in ANSWERS:
            return Response(status=404, body=b"there is no such path")
        return Response(body=json.dumps(ANSWERS[request.path]()).encode(), content_type="application/json")

    service = HttpService(handle)
    server = await asyncio.get_running_loop().create_server(service.protocol, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    service.close()
    server.close()


async def shown(*arguments: str) -> int:
    return await asyncio.to_thread(main, arguments)


async def test_clusters(proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await shown("clusters", "--admin", proxy) == 0
    head, *lines = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert head == ["CLUSTER", "ENDPOINT", "LOCALITY", "PRIO", "HEALTH"]
    assert lines == [
        ["empty", "-", "-", "-", "no"],
        [NAME, "10.0.0.1:80", "r/z", "0", "ejected"],
        [NAME, "10.0.0.1:81", "r/z", "0", "healthy"],
    ]


async def test_routes(proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await shown("routes", "--admin", proxy) == 0
    out = capsys.readouterr().out
    assert "edge, edge.shop, +1" in out
    assert "path prefix /v2 and not header x-a exact 1" in out
    assert "c1 80, c2 20" in out and "a.yaml:4" in out
    assert "redirect 308 other" in out and "respond 404" in out


async def test_listeners(proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await shown("listeners", "--admin", proxy) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["127.0.0.1_80", "127.0.0.1:80", "inbound", "shop/edge", "HTTP", "STRICT", "80", "a.yaml:9"]


async def test_certs(proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await shown("certs", "--admin", proxy) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == [
        "shop/edge",
        "chain",
        "spiffe://cluster.local/ns/shop/sa/edge",
        "0a",
        "1970-01-04T00:00:00Z",
        "3d",
    ]


async def test_config(proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await shown("config", "--admin", proxy) == 0
    out = capsys.readouterr().out
    assert out.startswith("snapshot abc\n")
    assert ["cluster", NAME, "a:1"] in [line.split() for line in out.splitlines()]


async def test_status(proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await shown("status", "--admin", proxy) == 0
    out = capsys.readouterr().out
    assert out.startswith("meshproxy 1.2.3  LIVE  up 1h 1m  n1\nsnapshot abc, published 1970-01-01T00:16:40Z: ")
    assert ["worker_0", "7", "20.0", "-", "1.2", "9", "old"] in [line.split() for line in out.splitlines()]
    assert "1 workers died and were replaced" in out
    assert "warning: a.yaml:3: Sidecar a/b: spec.x: is wrong; ignored" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("command", ["status", "clusters", "routes", "listeners", "certs", "config"])
async def test_every_command_speaks_json(proxy: str, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert await shown(command, "--admin", proxy, "-o", "json") == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize("command", ["status", "clusters", "routes", "listeners", "certs", "config"])
def test_no_proxy_is_one_sentence(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert main([command, "--admin", address]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"meshproxy: no proxy answers on {address}: connection refused\n"


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:99999", ":x"])
def test_a_wrong_address_is_one_sentence(capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert main(["status", "--admin", address]) == 1
    assert capsys.readouterr().err == f"meshproxy: --admin {address!r} is not of the form HOST:PORT\n"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"cluster_statuses": [{}]}', b"\xff"])
async def test_something_else_on_the_port_is_one_sentence(capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    async def handle(request: Request) -> Response:
        return Response(body=body)

    service = HttpService(handle)
    server = await asyncio.get_running_loop().create_server(service.protocol, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert await shown("clusters", "--admin", address) == 1
    assert capsys.readouterr().err == f"meshproxy: {address} does not answer like a proxy's admin interface\n"
    service.close()
    server.close()


async def test_a_refusal_is_passed_on(proxy: str, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = argparse.Namespace(admin=proxy, output="table")
    with pytest.raises(Exception, match="answers /nope with 404: there is no such path"):
        await asyncio.to_thread(status._shown, parsed, "/nope", status.clusters_table)
