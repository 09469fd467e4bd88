"""The three ports over real loopback connections: what is refused is as much the subject as what is answered."""

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from meshproxy.admin import http
from meshproxy.admin.http import HttpService, Request, Response
from meshproxy.admin.server import serve_admin
from meshproxy.resources.problems import ConfigProblem, Severity
from meshproxy.snapshot.snapshot import Snapshot
from meshproxy.telemetry.process_state import ControlCounters, ProcessState, WorkerInfo
from meshproxy.telemetry.recorder import Recorder

PID = 4242


class OneWorkerControl:
    """A control process with one worker, whose answers a test can hold back."""

    def __init__(self) -> None:
        self.log_level = "info"
        self.problems = [ConfigProblem(Severity.WARNING, "a.yaml", 3, "spec.x", "Sidecar a/b", "is wrong", "ignored")]
        self.recorder = Recorder()
        self.phase = "LIVE"
        self.done: list[str] = []
        self.questions: list[str] = []

    def state(self) -> ProcessState:
        return ProcessState(
            now=1100.0,
            state=self.phase,
            started_at=1000.0,
            snapshot=Snapshot(version="abc"),
            counters=ControlCounters(),
            workers=[WorkerInfo(slot=0, pid=PID, started_at=1000.0, version="abc")],
            certificates=[],
            warnings=1,
            errors=0,
            endpoint_health={},
            cluster_sizes={},
        )

    async def ask_workers(self, what: str) -> list[Any]:
        self.questions.append(what)
        if what == "stats":
            flush = self.recorder.flush()
            flush.pid = PID
            return [flush]
        if what == "connections":
            return [[{"listener": "l", "downstream": "a", "upstream": "b", "workload": "w", "identity": "i"}]]
        return [[]]

    def drain(self) -> None:
        self.done.append("drain")

    def quit(self) -> None:
        self.done.append("quit")

    def set_log_level(self, level: str) -> None:
        if level not in ("debug", "info"):
            raise ValueError(f"log level {level!r} is none of debug, info")
        self.log_level = level


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes, is_head_request: bool = False) -> tuple[int, dict[str, str], bytes]:
        self.writer.write(data)
        return await self.receive(is_head_request)

    async def receive(self, is_head_request: bool = False) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = head.strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = b""
        if is_head_request:
            pass
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline(), 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        else:
            body = await self.reader.read()
        return int(status_line.split(" ")[1]), headers, body

    async def get(self, path: str, *lines: str, method: str = "GET", host: str = "localhost") -> tuple[int, str]:
        extra = "".join(f"{line}\r\n" for line in lines)
        status, _, body = await self.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{extra}\r\n".encode())
        return status, body.decode()


@pytest.fixture
def control() -> OneWorkerControl:
    return OneWorkerControl()


@pytest.fixture
async def ports(control: OneWorkerControl) -> AsyncIterator[dict[str, int]]:
    sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in ("admin", "metrics", "ready")}
    numbers = {name: sock.getsockname()[1] for name, sock in sockets.items()}
    server = await serve_admin(control, sockets, {"node_id": "n1"})
    yield numbers
    await server.close()


async def connect(port: int) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port))


@pytest.fixture
async def admin(ports: dict[str, int]) -> AsyncIterator[Client]:
    client = await connect(ports["admin"])
    yield client
    client.writer.close()


@pytest.mark.parametrize(
    "path",
    [
        "/ready",
        "/clusters",
        "/clusters?format=json",
        "/config_dump",
        "/config_dump?resource=clusters",
        "/listeners",
        "/listeners?format=json",
        "/connections",
        "/certs",
        "/problems",
        "/problems?format=json",
        "/stats",
        "/stats?format=json&usedonly&filter=server",
        "/stats?format=prometheus",
        "/stats/prometheus",
        "/server_info",
        "/memory",
        "/help",
        "/",
    ],
)
async def test_every_page_answers(admin: Client, path: str) -> None:
    status, headers, body = await admin.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert status == 200
    if headers["content-type"] == "application/json":
        json.loads(body)
    head_status, _, head_body = await admin.send(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), True)
    assert head_status == 200 and head_body == b""
    assert (await admin.get("/ready"))[0] == 200  # the connection went on


async def test_help_lists_every_path(admin: Client) -> None:
    status, body = await admin.get("/help")
    assert status == 200 and "/quitquitquit (POST): drain and exit" in body


async def test_an_unknown_path_says_which_there_are(admin: Client) -> None:
    status, body = await admin.get("/nope")
    assert status == 404 and "  /config_dump\n" in body


@pytest.mark.parametrize(
    "path", ["/quitquitquit", "/drain_listeners?graceful", "/reset_counters", "/logging?level=debug"]
)
async def test_nothing_changes_by_get(admin: Client, control: OneWorkerControl, path: str) -> None:
    status, headers, _ = await admin.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert status == 405 and headers["allow"] == "POST"
    assert control.done == [] and control.log_level == "info"


async def test_reading_pages_are_not_posted_to(admin: Client) -> None:
    status, headers, _ = await admin.send(b"POST /stats HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status == 405 and headers["allow"] == "GET, HEAD"


async def test_post_changes(admin: Client, control: OneWorkerControl) -> None:
    assert await admin.get("/drain_listeners?graceful", method="POST") == (200, "OK\n")
    assert await admin.get("/logging?level=debug", method="POST") == (200, "active loggers:\n  meshproxy: debug\n")
    assert await admin.get("/quitquitquit", method="POST") == (200, "OK\n")
    assert control.done == ["drain", "quit"] and control.log_level == "debug"


async def test_a_wrong_log_level_is_one_sentence(admin: Client) -> None:
    assert await admin.get("/logging?level=loud", method="POST") == (400, "log level 'loud' is none of debug, info\n")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "/config_dump?resource=keys",
            "resource 'keys' is none of workloads, listeners, route_tables, clusters, peers\n",
        ),
        ("/stats?format=html", "format 'html' is none of text, json, prometheus\n"),
        ("/stats?filter=(", "filter is not a regular expression: missing ), unterminated subpattern at position 0\n"),
    ],
)
async def test_a_wrong_parameter_is_one_sentence(admin: Client, path: str, sentence: str) -> None:
    assert await admin.get(path) == (400, sentence)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:15000", "127.0.0.1:1", "127.9.9.9", "[::1]:15000", "[::1]"])
async def test_admin_answers_to_loopback_names(admin: Client, host: str) -> None:
    assert (await admin.get("/ready", host=host))[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "10.0.0.1:15000", "127.0.0.1.evil.example", "0.0.0.0"]
)
async def test_admin_refuses_foreign_names(admin: Client, host: str) -> None:
    """A web page whose name was made to resolve to 127.0.0.1."""
    status, body = await admin.get("/config_dump", host=host)
    assert status == 403 and "loopback" in body


async def test_admin_refuses_another_origins_page(admin: Client, control: OneWorkerControl) -> None:
    status, _ = await admin.get("/quitquitquit", "Origin: http://evil.example", method="POST")
    assert status == 403 and control.done == []
    assert (await admin.get("/ready", "Origin: http://localhost"))[0] == 200


async def test_metrics_and_ready_have_only_their_paths(ports: dict[str, int]) -> None:
    metrics, ready = await connect(ports["metrics"]), await connect(ports["ready"])
    for path in ("/metrics", "/stats/prometheus", "/healthz/ready"):
        assert (await metrics.get(path, host="10.0.0.1:15020"))[0] == 200
    assert (await ready.get("/healthz/ready", host="node"))[0] == 200
    for client in (metrics, ready):
        assert (await client.get("/config_dump"))[0] == 404
        assert (await client.get("/quitquitquit", method="POST"))[0] == 404
        client.writer.close()


@pytest.mark.parametrize(("state", "status"), [("LIVE", 200), ("DRAINING", 503), ("INITIALIZING", 503)])
async def test_ready_says_the_state(ports: dict[str, int], control: OneWorkerControl, state: str, status: int) -> None:
    control.phase = state
    client = await connect(ports["ready"])
    assert await client.get("/healthz/ready") == (status, f"{state}\n")
    client.writer.close()


async def test_a_scrape_sees_what_was_counted_a_moment_ago(ports: dict[str, int], control: OneWorkerControl) -> None:
    client = await connect(ports["metrics"])
    control.recorder.listener("l").downstream_cx_total += 1
    assert 'envoy_listener_downstream_cx_total{envoy_listener_address="l"} 1\n' in (await client.get("/metrics"))[1]
    control.recorder.listener("l").downstream_cx_total += 1
    assert 'envoy_listener_downstream_cx_total{envoy_listener_address="l"} 2\n' in (await client.get("/metrics"))[1]
    client.writer.close()


async def test_a_scraper_chooses_openmetrics_and_gzip(ports: dict[str, int]) -> None:
    client = await connect(ports["metrics"])
    status, headers, body = await client.send(
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n"
        b"Accept-Encoding: gzip\r\n\r\n"
    )
    assert status == 200 and headers["content-encoding"] == "gzip"
    assert headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert gzip.decompress(body).endswith(b"# EOF\n")
    _, headers, body = await client.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip;q=0, br\r\n\r\n")
    assert "content-encoding" not in headers and headers["content-type"].startswith("text/plain; version=0.0.4")
    client.writer.close()


async def test_reset_zeroes_what_was_counted(admin: Client, control: OneWorkerControl) -> None:
    control.recorder.listener("l").downstream_cx_total += 5
    assert (await admin.get("/stats?filter=downstream_cx_total"))[1] == "listener.l.downstream_cx_total: 5\n"
    assert await admin.get("/reset_counters", method="POST") == (200, "OK\n")
    assert (await admin.get("/stats?filter=downstream_cx_total"))[1] == "listener.l.downstream_cx_total: 0\n"


async def test_concurrent_scrapes_share_one_question(ports: dict[str, int], control: OneWorkerControl) -> None:
    clients = [await connect(ports["metrics"]) for _ in range(5)]
    control.questions.clear()
    asked, held = asyncio.Event(), asyncio.Event()
    ask = control.ask_workers

    async def slow(what: str) -> list[Any]:
        asked.set()
        await held.wait()
        return await ask(what)

    control.ask_workers = slow  # type: ignore[method-assign]
    scrapes = [asyncio.ensure_future(client.get("/metrics")) for client in clients]
    await asked.wait()
    held.set()
    assert [status for status, _ in await asyncio.gather(*scrapes)] == [200] * 5
    assert control.questions.count("stats") <= 2
    for client in clients:
        client.writer.close()


async def test_http_1_0_gets_the_end_of_the_connection_for_an_end(ports: dict[str, int]) -> None:
    client = await connect(ports["metrics"])
    status, headers, body = await client.send(b"GET /metrics HTTP/1.0\r\nHost: a\r\n\r\n")
    assert status == 200 and "transfer-encoding" not in headers and headers["connection"] == "close"
    assert body.endswith(b"\n") and await client.reader.read() == b""
    client.writer.close()


async def test_pipelined_requests_are_answered_in_order(admin: Client) -> None:
    admin.writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\nGET /nope HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await admin.receive())[0] == 200
    assert (await admin.receive())[0] == 404


async def test_a_small_body_is_taken_and_ignored(admin: Client) -> None:
    status, _, _ = await admin.send(
        b"POST /drain_listeners HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\na=b"
    )
    assert status == 200 and (await admin.get("/ready"))[0] == 200


async def test_a_client_that_asks_and_closes_its_side_is_answered(admin: Client) -> None:
    admin.writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
    admin.writer.write_eof()
    assert (await admin.receive())[0] == 200
    assert await admin.reader.read() == b""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /ready HTTP/1.1\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /ready HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"GET /ready HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET  /ready HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"POST /logging HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n", 413),
        (b"POST /logging HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
        (b"POST /logging HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET /ready HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000, 431),
        (b"GET /ready HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431),
    ],
)
async def test_what_is_not_a_plain_request_is_refused_and_closed(admin: Client, data: bytes, status: int) -> None:
    found, headers, _ = await admin.send(data)
    assert found == status and headers["connection"] == "close"
    assert await admin.reader.read() == b""


async def test_connections_are_bounded(ports: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)
    clients = [await connect(ports["ready"]) for _ in range(2)]
    for client in clients:
        assert (await client.get("/healthz/ready"))[0] == 200
    third = await connect(ports["ready"])
    assert (await third.receive())[0] == 503
    clients[0].writer.close()
    await clients[0].writer.wait_closed()
    for client in (*clients, third):
        client.writer.close()


async def test_a_client_that_says_nothing_is_dropped(ports: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "IDLE_TIMEOUT_S", 0.01)
    client = await connect(ports["ready"])
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await client.reader.readexactly(1)
    client.writer.close()


async def _serve(handler: http.Handler) -> tuple[asyncio.Server, HttpService, int]:
    service = HttpService(handler)
    server = await asyncio.get_running_loop().create_server(service.protocol, "127.0.0.1", 0)
    return server, service, server.sockets[0].getsockname()[1]


async def test_pieces_are_made_only_as_fast_as_they_are_read() -> None:
    made = 0

    async def handle(request: Request) -> Response:
        def pieces() -> Any:
            nonlocal made
            for _ in range(10_000):
                made += 1
                yield b"x" * 65536

        return Response(body=pieces())

    server, service, port = await _serve(handle)
    client = await connect(port)
    client.writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await client.reader.readexactly(1)
    (connection,) = service.connections
    for _ in range(100_000):
        if not connection.can_write:
            break
        await asyncio.sleep(0)
    assert not connection.can_write  # nothing more fits the kernel's buffers
    made_when_full = made
    for _ in range(100):
        await asyncio.sleep(0)
    assert made <= made_when_full + 1
    assert made < 500
    service.close()
    server.close()
    client.writer.close()


async def test_a_failure_is_an_answer_and_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(request: Request) -> Response:
        raise RuntimeError("broken")

    server, service, port = await _serve(handle)
    client = await connect(port)
    assert await client.get("/x") == (500, "an internal error was logged\n")
    assert "GET /x failed" in caplog.text
    service.close()
    server.close()
    client.writer.close()


async def test_a_response_that_fails_half_way_does_not_look_complete(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(request: Request) -> Response:
        def pieces() -> Any:
            yield b"x" * 10
            raise RuntimeError("broken")

        return Response(body=pieces())

    server, service, port = await _serve(handle)
    client = await connect(port)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError, ValueError)):
        await client.get("/x")
    service.close()
    server.close()
    client.writer.close()
