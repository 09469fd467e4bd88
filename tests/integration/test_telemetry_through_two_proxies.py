"""What two proxies with mTLS between them say of one HTTP request and one TCP session: every label, every log field.

Source: istio.io reference/config/metrics (labels), istio pilot/pkg/model/telemetry_logging.go (the log's fields).
"""

import asyncio
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.faults.traffic import get, started, until
from tests.support.certificates import Authority
from tests.support.client import Client, Cut, post
from tests.support.client import get as get_request
from tests.support.origin import Origin, Seen
from tests.support.proxy_process import ProxyProcess, free_port
from tests.support.raw_server import reset, unused_port

SERVICE = "answers.back.svc.cluster.local"
ANSWERER_ADDRESS = "127.0.82.1"

# Every label of a workload differs from every other, so that none can pass for its neighbour.
WORKLOADS = {
    "caller": {
        "app": "caller-app",
        "version": "v1",
        "service.istio.io/canonical-name": "callers",
        "service.istio.io/canonical-revision": "r1",
        "topology.istio.io/cluster": "east",
    },
    "answerer": {
        "app": "answerer-app",
        "version": "v2",
        "service.istio.io/canonical-name": "answerers",
        "service.istio.io/canonical-revision": "r2",
        "topology.istio.io/cluster": "west",
        "security.istio.io/tlsMode": "istio",
    },
}
SIDES = ("source", "destination")
BETWEEN = {"HTTP/1.1": "DO_NOT_UPGRADE", "HTTP/2": "UPGRADE"}
"""What the two proxies speak with each other → the h2UpgradePolicy that has it so."""


@dataclass(frozen=True)
class Ports:
    http: int = field(default_factory=free_port)
    tcp: int = field(default_factory=free_port)
    inbound_http: int = field(default_factory=free_port)
    inbound_tcp: int = field(default_factory=free_port)


def mesh(ports: Ports, http_app: int, tcp_app: int, between: str, *more: dict[str, object]) -> str:
    """What both proxies read; JSON is YAML. between: see BETWEEN."""
    networking = "networking.istio.io/v1"
    documents: list[dict[str, object]] = [
        {
            "apiVersion": networking,
            "kind": "WorkloadEntry",
            "metadata": {"name": name, "namespace": namespace, "labels": WORKLOADS[name]},
            "spec": {"address": address, "serviceAccount": name},
        }
        for name, namespace, address in (("caller", "front", "127.0.81.1"), ("answerer", "back", ANSWERER_ADDRESS))
    ]
    documents += [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "answers", "namespace": "back"},
            "spec": {
                "selector": {"app": "answerer-app"},
                "ports": [
                    {"name": "http", "port": ports.http, "targetPort": ports.inbound_http},
                    {"name": "tcp", "port": ports.tcp, "targetPort": ports.inbound_tcp},
                ],
            },
        },
        {
            "apiVersion": networking,
            "kind": "Sidecar",
            "metadata": {"name": "caller", "namespace": "front"},
            "spec": {
                "workloadSelector": {"labels": {"app": "caller-app"}},
                "egress": [
                    {
                        "port": {"number": number, "protocol": name.upper(), "name": name},
                        "bind": "127.0.0.1",
                        "captureMode": "NONE",
                        "hosts": ["*/*"],
                    }
                    for name, number in (("http", ports.http), ("tcp", ports.tcp))
                ],
            },
        },
        {
            "apiVersion": networking,
            "kind": "Sidecar",
            "metadata": {"name": "answerer", "namespace": "back"},
            "spec": {
                "workloadSelector": {"labels": {"app": "answerer-app"}},
                "ingress": [
                    {
                        "port": {"number": number, "protocol": name.upper(), "name": name},
                        "bind": ANSWERER_ADDRESS,
                        "captureMode": "NONE",
                        "defaultEndpoint": f"127.0.0.1:{app}",
                    }
                    for name, number, app in (
                        ("http", ports.inbound_http, http_app),
                        ("tcp", ports.inbound_tcp, tcp_app),
                    )
                ],
            },
        },
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "PeerAuthentication",
            "metadata": {"name": "default", "namespace": "back"},
            "spec": {"mtls": {"mode": "STRICT"}},
        },
        {
            "apiVersion": networking,
            "kind": "DestinationRule",
            "metadata": {"name": "answers", "namespace": "back"},
            "spec": {
                "host": SERVICE,
                "trafficPolicy": {"connectionPool": {"http": {"h2UpgradePolicy": BETWEEN[between]}}},
            },
        },
    ]
    return "\n---\n".join(map(json.dumps, [*documents, *more])) + "\n"


REQUEST_BODY = b"q" * 700
ANSWER_BODY = b"a" * 3000
TCP_ASKED = b"t" * 11
TCP_TOLD = b"u" * 23
REQUEST = post(REQUEST_BODY, "User-Agent: a-caller/1.0", "X-Forwarded-For: 203.0.113.7", path="/of/things?x=1")
REQUEST = REQUEST.replace(b"Host: a.example", b"Host: " + SERVICE.encode())


def answer(seen: Seen) -> bytes:
    return b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER_BODY), ANSWER_BODY)


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(len(TCP_ASKED))
    writer.write(TCP_TOLD)
    await reader.read()
    writer.close()


@dataclass
class Heard:
    """What was seen from outside of one request and one session."""

    ports: Ports
    between: str
    callers: dict[str, str]
    """`http`, `tcp` → the caller's address and port."""
    apps: dict[str, str]
    """`http`, `tcp` → address and port of the application."""
    request_id: str
    """That the application saw."""
    metrics: dict[str, str]
    """Side → its page of metrics."""
    logs: dict[str, list[str]]
    """Side → its access log: the request, then the session."""


class Pair:
    """The two proxies, one on each side, with a log each."""

    def __init__(self, directory: Path, encoding: str, configuration: str) -> None:
        self._directory = directory
        self._encoding = encoding
        authority = Authority()
        authority.leaf("front", "caller").write(directory / "certs" / "front" / "caller")
        authority.leaf("back", "answerer").write(directory / "certs" / "back" / "answerer")
        (directory / "conf").mkdir()
        (directory / "conf" / "mesh.yaml").write_text(configuration)

    async def __aenter__(self) -> Self:
        self._stack = ExitStack()
        apps = {"source": "caller-app", "destination": "answerer-app"}
        self._proxies = {side: self._stack.enter_context(self._proxy(side, app)) for side, app in apps.items()}
        for proxy in self._proxies.values():
            await started(proxy)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await asyncio.to_thread(self._stack.__exit__, *error)

    def _proxy(self, side: str, app: str) -> ProxyProcess:
        directory = self._directory
        (directory / side).mkdir()
        flags = ("--certs", str(directory / "certs"), "--labels", f"app={app}")
        log = ("--access-log", str(directory / side / "access.log"), "--access-log-encoding", self._encoding)
        return ProxyProcess(directory / side, *flags, *log, configuration=directory / "conf", module="meshproxy")

    def lines(self, side: str) -> list[str]:
        return (self._directory / side / "access.log").read_text().splitlines()

    async def metrics(self, side: str) -> str:
        return await get(self._proxies[side].ports["metrics"], "/stats/prometheus")

    async def total(self, side: str, name: str) -> float:
        """Of all series."""
        return sum(value for _, value in samples(await self.metrics(side), name))


def samples(page: str, name: str) -> list[tuple[dict[str, str], float]]:
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    ]


async def converse(directory: Path, encoding: str, between: str) -> Heard:
    ports = Ports()
    callers, metrics, logs = {}, {}, {}
    async with Origin(answer) as origin:
        server = await asyncio.start_server(tell, "127.0.0.1", 0)
        tcp_app = server.sockets[0].getsockname()[1]
        async with Pair(directory, encoding, mesh(ports, origin.port, tcp_app, between)) as pair:
            async with Client(ports.http) as client:
                callers["http"] = "{}:{}".format(*client.writer.get_extra_info("sockname"))
                assert (await client.ask(REQUEST, "POST")).body == ANSWER_BODY
            async with Client(ports.tcp) as client:
                callers["tcp"] = "{}:{}".format(*client.writer.get_extra_info("sockname"))
                client.send(TCP_ASKED)
                assert await client.bytes(len(TCP_TOLD)) == TCP_TOLD
                client.end()
                assert await client.ended() == "end"
            for side in SIDES:
                await until(partial(_has_told_both, pair, side))
                metrics[side], logs[side] = await pair.metrics(side), pair.lines(side)
        server.close()
    (seen,) = origin.requests
    request_id = seen.header(b"x-request-id")
    assert request_id is not None
    apps = {"http": f"127.0.0.1:{origin.port}", "tcp": f"127.0.0.1:{tcp_app}"}
    return Heard(ports, between, callers, apps, request_id.decode(), metrics, logs)


async def _has_told_both(pair: Pair, side: str) -> bool:
    closed = await pair.total(side, "istio_tcp_connections_closed_total")
    return len(pair.lines(side)) == 2 and closed == await pair.total(side, "istio_requests_total") == 1


@pytest.fixture(scope="module", params=BETWEEN)
def as_text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Heard:
    return asyncio.run(converse(tmp_path_factory.mktemp("text"), "text", request.param))


@pytest.fixture(scope="module")
def as_json(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    return asyncio.run(converse(tmp_path_factory.mktemp("json"), "json", "HTTP/1.1"))


# ── metrics ──


def workload(side: str, labels: dict[str, str], name: str, namespace: str) -> dict[str, str]:
    return {
        f"{side}_workload": name,
        f"{side}_workload_namespace": namespace,
        f"{side}_principal": f"spiffe://cluster.local/ns/{namespace}/sa/{name}",
        f"{side}_app": labels["app"],
        f"{side}_version": labels["version"],
        f"{side}_canonical_service": labels["service.istio.io/canonical-name"],
        f"{side}_canonical_revision": labels["service.istio.io/canonical-revision"],
        f"{side}_cluster": labels["topology.istio.io/cluster"],
    }


LABELS = {
    **workload("source", WORKLOADS["caller"], "caller", "front"),
    **workload("destination", WORKLOADS["answerer"], "answerer", "back"),
    "destination_service": SERVICE,
    "destination_service_name": "answers",
    "destination_service_namespace": "back",
    "response_flags": "-",
}
OF_HTTP = {**LABELS, "request_protocol": "http", "response_code": "201", "grpc_response_status": ""}
OF_TCP = {**LABELS, "request_protocol": "tcp"}
OF_SIDE = {
    "source": {"reporter": "source", "connection_security_policy": "unknown"},
    "destination": {"reporter": "destination", "connection_security_policy": "mutual_tls"},
}
SAMPLES = {
    "istio_requests_total": OF_HTTP,
    "istio_request_duration_milliseconds_count": OF_HTTP,
    "istio_request_bytes_count": OF_HTTP,
    "istio_response_bytes_count": OF_HTTP,
    "istio_tcp_connections_opened_total": OF_TCP,
    "istio_tcp_connections_closed_total": OF_TCP,
    "istio_tcp_sent_bytes_total": OF_TCP,
    "istio_tcp_received_bytes_total": OF_TCP,
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", SAMPLES)
def test_each_side_tells_every_label(name: str, side: str, as_text: Heard) -> None:
    ((labels, _),) = samples(as_text.metrics[side], name)
    assert labels == {**SAMPLES[name], **OF_SIDE[side]}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("istio_requests_total", 1),
        ("istio_request_duration_milliseconds_count", 1),
        ("istio_request_bytes_count", 1),
        ("istio_response_bytes_count", 1),
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 1),
        ("istio_tcp_sent_bytes_total", len(TCP_TOLD)),
        ("istio_tcp_received_bytes_total", len(TCP_ASKED)),
    ],
)
def test_each_side_counts_what_passed(name: str, value: int, side: str, as_text: Heard) -> None:
    ((_, counted),) = samples(as_text.metrics[side], name)
    assert counted == value


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("name", "low", "high"),
    # Heads are counted; what a proxy adds to them is bounded here, and is not the same on both sides.
    [
        ("istio_request_duration_milliseconds", 0.001, 5000),
        ("istio_request_bytes", len(REQUEST), len(REQUEST) + 300),
        ("istio_response_bytes", len(ANSWER_BODY) + 20, len(ANSWER_BODY) + 300),
    ],
)
def test_each_side_puts_the_request_into_envoys_buckets(
    name: str, low: float, high: float, side: str, as_text: Heard
) -> None:
    page = as_text.metrics[side]
    ((_, total),) = samples(page, f"{name}_sum")
    assert low <= total <= high
    buckets = samples(page, f"{name}_bucket")
    assert [labels["le"] for labels, _ in buckets] == [*BUCKETS, "+Inf"]
    assert [count for _, count in buckets] == [float(total <= float(labels["le"])) for labels, _ in buckets]
    assert all({**labels, "le": ""} == {**OF_HTTP, **OF_SIDE[side], "le": ""} for labels, _ in buckets)


BUCKETS = "0.5 1 5 10 25 50 100 250 500 1000 2500 5000 10000 30000 60000 300000 600000 1800000 3600000".split()

# ── access log ──

START = re.compile(r"20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d\.\d{3}Z")
NUMBER = re.compile(r"\d+")
# In the order of the text; a pattern where the value is not ours to know.
FIELDS = (
    "start_time method path protocol response_code response_flags response_code_details connection_termination_details "
    "upstream_transport_failure_reason bytes_received bytes_sent duration upstream_service_time x_forwarded_for "
    "user_agent request_id authority upstream_host upstream_cluster upstream_local_address downstream_local_address "
    "downstream_remote_address requested_server_name route_name"
).split()
Field = str | int | None | re.Pattern[str]


def expected(heard: Heard, kind: str, side: str, between: str) -> dict[str, Field]:
    """between: address and port of the source's proxy on its connection to the destination's."""
    ports = heard.ports
    asked, served = (ports.http, ports.inbound_http) if kind == "http" else (ports.tcp, ports.inbound_tcp)
    entrance = f"{ANSWERER_ADDRESS}:{served}"
    fields: dict[str, Field] = {
        "start_time": START,
        "method": None,
        "path": None,
        "protocol": None,
        "response_code": 0,
        "response_flags": "-",
        "response_code_details": None,
        "connection_termination_details": None,
        "upstream_transport_failure_reason": None,
        "bytes_received": len(TCP_ASKED),
        "bytes_sent": len(TCP_TOLD),
        "duration": NUMBER,
        "upstream_service_time": None,
        "x_forwarded_for": None,
        "user_agent": None,
        "request_id": None,
        "authority": None,
        "route_name": None,
    }
    if kind == "http":
        fields |= {
            "method": "POST",
            "path": "/of/things?x=1",
            "protocol": "HTTP/1.1" if side == "source" else heard.between,
            "response_code": 201,
            "response_code_details": "via_upstream",
            "bytes_received": len(REQUEST_BODY),
            "bytes_sent": len(ANSWER_BODY),
            "upstream_service_time": NUMBER,
            "x_forwarded_for": "203.0.113.7",
            "user_agent": "a-caller/1.0",
            "request_id": heard.request_id,
            "authority": SERVICE,
            "route_name": "default",
        }
    if side == "source":
        return fields | {
            "upstream_host": entrance,
            "upstream_cluster": f"outbound|{asked}||{SERVICE}",
            "upstream_local_address": between,
            "downstream_local_address": f"127.0.0.1:{asked}",
            "downstream_remote_address": heard.callers[kind],
            "requested_server_name": None,
        }
    return fields | {
        "upstream_host": heard.apps[kind],
        "upstream_cluster": f"inbound|{served}||",
        "upstream_local_address": re.compile(r"127\.0\.0\.1:\d+"),
        "downstream_local_address": entrance,
        "downstream_remote_address": between,
        "requested_server_name": f"outbound_.{asked}_._.{SERVICE}",
    }


def from_text(line: str) -> dict[str, str]:
    """A line in Istio's text format; the request line is one quoted part of it."""
    start, request, *rest = shlex.split(line)
    return dict(zip(FIELDS, (start[1:-1], *request.split(" "), *rest), strict=True))


def differences(told: Mapping[str, Field], wanted: Mapping[str, Field]) -> dict[str, tuple[Field, Field]]:
    def agrees(value: Field, want: Field) -> bool:
        return bool(want.fullmatch(str(value))) if isinstance(want, re.Pattern) else value == want

    assert told.keys() == wanted.keys()
    return {name: (told[name], want) for name, want in wanted.items() if not agrees(told[name], want)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["http", "tcp"])
def test_the_line_has_istios_fields_in_istios_order(kind: str, side: str, as_text: Heard) -> None:
    at = ("http", "tcp").index(kind)
    told = from_text(as_text.logs[side][at])
    between = from_text(as_text.logs["source"][at])["upstream_local_address"]
    wanted = {
        name: "-" if value is None else str(value) if isinstance(value, int) else value
        for name, value in expected(as_text, kind, side, between).items()
    }
    assert differences(told, wanted) == {}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["http", "tcp"])
def test_the_object_has_istios_keys_and_typed_values(kind: str, side: str, as_json: Heard) -> None:
    at = ("http", "tcp").index(kind)
    told = json.loads(as_json.logs[side][at])
    between = json.loads(as_json.logs["source"][at])["upstream_local_address"]
    assert differences(told, expected(as_json, kind, side, between)) == {}
    assert type(told["duration"]) is int


def test_both_sides_and_the_application_know_the_request_by_one_id(as_text: Heard) -> None:
    ids = {from_text(as_text.logs[side][0])["request_id"] for side in SIDES}
    assert ids == {as_text.request_id}
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", as_text.request_id)


# ── what goes wrong ──


def rule(path: str, **fields: object) -> dict[str, object]:
    return {"match": [{"uri": {"prefix": path}}], "route": [{"destination": {"host": SERVICE}}], **fields}


ROUTES: dict[str, object] = {
    "apiVersion": "networking.istio.io/v1",
    "kind": "VirtualService",
    "metadata": {"name": "answers", "namespace": "back"},
    "spec": {
        "hosts": [SERVICE],
        "http": [
            rule("/impatient", name="impatient", timeout="0.2s"),
            rule("/insisting", name="insisting", retries={"attempts": 1, "retryOn": "5xx"}),
            rule("/once", name="once"),
        ],
    },
}


class Misbehaving:
    """An application that does as the path says: breaks off before or amid its answer, or never answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
            self.asked.append(path)
            if path.endswith("half"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")
                await writer.drain()
            elif path.endswith("never"):
                await reader.read()
        writer.close()


@dataclass(frozen=True)
class Told:
    """Of one side's line, and of the series it counted in."""

    code: int
    flags: str
    details: str | None
    route: str | None = None
    lines: int = 1
    knows_destination: bool = True


BEFORE = "upstream_reset_before_response_started{connection_termination}"
AFTER = "upstream_reset_after_response_started{connection_termination}"
# path → (source, destination; None: it never heard of it)
WRONG: dict[str, tuple[Told, Told | None]] = {
    "/nowhere": (Told(404, "NR", "route_not_found", knows_destination=False), None),
    "/impatient/never": (
        Told(504, "UT", "response_timeout", "impatient"),
        Told(0, "DC", "downstream_remote_disconnect", "default"),
    ),
    "/insisting/gone": (
        Told(503, "URX", "via_upstream", "insisting"),
        Told(503, "UC", BEFORE, "default", lines=2),
    ),
    "/once/gone": (Told(503, "-", "via_upstream", "once"), Told(503, "UC", BEFORE, "default")),
    "/once/half": (Told(200, "UC", AFTER, "once"), Told(200, "UC", AFTER, "default")),
    "/once/never": (
        Told(0, "DC", "downstream_remote_disconnect", "once"),
        Told(0, "DC", "downstream_remote_disconnect", "default"),
    ),
}
LINES = [sum(told.lines for told in column if told is not None) + 1 for column in zip(*WRONG.values(), strict=True)]
"""Of each side's log; the last is the TCP session's, to an application that does not listen."""


@dataclass
class Wrong:
    logs: dict[str, list[dict[str, Any]]]
    metrics: dict[str, str]
    nobody: str
    """Address and port of the application that does not listen."""


async def go_wrong(directory: Path) -> Wrong:
    ports, nobody, app = Ports(), unused_port(), Misbehaving()
    server = await asyncio.start_server(app.serve, "127.0.0.1", 0)
    configuration = mesh(ports, server.sockets[0].getsockname()[1], nobody, "HTTP/1.1", ROUTES)
    async with Pair(directory, "json", configuration) as pair:
        for path in WRONG:
            async with Client(ports.http) as client:
                client.send(get_request(path, host=SERVICE))
                if path == "/once/never":
                    await until(lambda: "/once/never" in app.asked)
                    await reset(client.writer)
                else:
                    with suppress(Cut):
                        await client.answer()
        async with Client(ports.tcp) as client:
            client.send(TCP_ASKED)
            assert await client.ended() == "reset"
        metrics = {}
        for side, lines in zip(SIDES, LINES, strict=True):
            await until(partial(_has_told_all, pair, side, lines))
            metrics[side] = await pair.metrics(side)
        logs = {side: [json.loads(line) for line in pair.lines(side)] for side in SIDES}
    server.close()
    return Wrong(logs, metrics, f"127.0.0.1:{nobody}")


async def _has_told_all(pair: Pair, side: str, lines: int) -> bool:
    closed = await pair.total(side, "istio_tcp_connections_closed_total")
    counted = await pair.total(side, "istio_requests_total") + closed
    return len(pair.lines(side)) == counted == lines


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Wrong:
    return asyncio.run(go_wrong(tmp_path_factory.mktemp("wrong")))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("path", WRONG)
def test_each_side_says_why_a_request_failed(path: str, side: str, wrong: Wrong) -> None:
    told = WRONG[path][SIDES.index(side)]
    lines = [line for line in wrong.logs[side] if line["path"] == path]
    assert len(lines) == (told.lines if told is not None else 0)
    for line in lines:
        assert told is not None
        assert (line["response_code"], line["response_flags"]) == (told.code, told.flags)
        assert (line["response_code_details"], line["route_name"]) == (told.details, told.route)
        assert (line["upstream_host"] is not None) == told.knows_destination
    ids = [line["request_id"] for logs in wrong.logs.values() for line in logs if line["path"] == path]
    assert len(set(ids)) == 1 and ids[0]


@pytest.mark.parametrize("side", SIDES)
def test_each_side_counts_failures_by_code_and_flags_under_all_labels(side: str, wrong: Wrong) -> None:
    wanted: Counter[frozenset[tuple[str, str]]] = Counter()
    for sides in WRONG.values():
        told = sides[SIDES.index(side)]
        if told is not None:
            labels = {**OF_HTTP, **OF_SIDE[side], "response_code": str(told.code), "response_flags": told.flags}
            if not told.knows_destination:
                unknown = [name for name in labels if name.startswith("destination_")]
                labels |= dict.fromkeys([*unknown, "source_principal"], "unknown")
            wanted[frozenset(labels.items())] += told.lines
    counted = {frozenset(labels.items()): n for labels, n in samples(wrong.metrics[side], "istio_requests_total")}
    assert counted == wanted


@pytest.mark.parametrize(("side", "flags"), [("source", "-"), ("destination", "UF")])
def test_a_session_that_reaches_nobody_is_told_by_who_tried(side: str, flags: str, wrong: Wrong) -> None:
    line = wrong.logs[side][-1]
    assert (line["response_flags"], line["bytes_sent"], line["method"]) == (flags, 0, None)
    if side == "destination":
        assert line["upstream_host"] == wrong.nobody
        assert line["upstream_transport_failure_reason"] == "Connection refused"
    ((labels, count),) = samples(wrong.metrics[side], "istio_tcp_connections_closed_total")
    assert (labels, count) == ({**OF_TCP, **OF_SIDE[side], "response_flags": flags}, 1)
