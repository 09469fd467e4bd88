"""What a fault test needs around a proxy: upstreams that can go wrong, callers who count every answer, figures.

async with App("a") as app: …        # an upstream whose behaviour the test changes while it runs
async with Callers(port, rate=200) as callers: …    # so many requests a second, whatever the answers do
"""

import asyncio
import contextlib
import json
import os
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Self

from tests.support.proxy_process import PATIENCE_S, ProxyProcess
from tests.support.raw_server import reset

HOST = "a.example"
Record = Callable[[str, object], None]
"""pytest's record_property: figures for docs/faults.md."""


def note(record: Record, row: str, **figures: object) -> None:
    """Keep a row's figures with the test's result, and show them under `pytest -s`."""
    for name, value in figures.items():
        record(f"{row}.{name}", round(value, 3) if isinstance(value, float) else value)
    shown = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    print(f"{row}: {shown}")


# ── configuration ──


def mesh(
    port: int,
    endpoints: Sequence[tuple[str, int, str]],
    policy: Mapping[str, Any] | None = None,
    route: Mapping[str, Any] | None = None,
) -> str:
    """One HTTP service behind one egress listener, as YAML. endpoints: (address, port, locality or empty);
    policy: the DestinationRule's trafficPolicy; route: fields of the VirtualService's only HTTP route."""
    networking = "networking.istio.io/v1"
    places = [
        {"address": address, "ports": {"http": number}, **({"locality": locality} if locality else {})}
        for address, number, locality in endpoints
    ]
    documents: list[dict[str, Any]] = [
        {
            "apiVersion": networking,
            "kind": "ServiceEntry",
            "metadata": {"name": "a"},
            "spec": {
                "hosts": [HOST],
                "location": "MESH_INTERNAL",
                "resolution": "STATIC",
                "ports": [{"number": port, "name": "http", "protocol": "HTTP"}],
                "endpoints": places,
            },
        },
        {
            "apiVersion": networking,
            "kind": "VirtualService",
            "metadata": {"name": "a"},
            "spec": {"hosts": [HOST], "http": [{"route": [{"destination": {"host": HOST}}], **(route or {})}]},
        },
        {
            "apiVersion": networking,
            "kind": "Sidecar",
            "metadata": {"name": "default"},
            "spec": {
                "egress": [
                    {
                        "port": {"number": port, "protocol": "HTTP", "name": "http"},
                        "bind": "0.0.0.0",
                        "captureMode": "NONE",
                        "hosts": ["*/*"],
                    }
                ]
            },
        },
    ]
    if policy is not None:
        spec = {"host": HOST, "trafficPolicy": policy}
        documents.append({"apiVersion": networking, "kind": "DestinationRule", "metadata": {"name": "a"}, "spec": spec})
    return "\n---\n".join(json.dumps(document) for document in documents) + "\n"


def publish(directory: Path, text: str) -> None:
    """Written beside the watched directory, then renamed into it."""
    (directory / "conf").mkdir(exist_ok=True)
    (directory / "mesh.new").write_text(text)
    os.replace(directory / "mesh.new", directory / "conf" / "mesh.yaml")


async def started(proxy: ProxyProcess, workers: int = 1) -> None:
    await asyncio.to_thread(proxy.wait_for, f"ready: {workers} workers")


# ── upstreams ──


class App:
    """An HTTP/1.1 upstream in the test's own loop that answers with its name. What it does is `mode`, at any time:
    ok, error (503), hang (takes the request, never answers), reset (RST instead of an answer)."""

    def __init__(self, name: str, address: str = "127.0.0.1", *, delay_s: float = 0.0) -> None:
        self.name = name
        self.address = address
        self.port = 0
        self.mode = "ok"
        self.delay_s = delay_s
        self.requests = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def start(self) -> None:
        """Listen; after die() again on the same port."""
        self._server = await asyncio.start_server(self._serve, self.address, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """As kill -9 looks from outside: no listener, every connection reset."""
        self._server.close()
        for writer in list(self._writers):
            with contextlib.suppress(ConnectionError):
                await reset(writer)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                if self.mode == "hang":
                    await reader.read()
                    return
                if self.mode == "reset":
                    await reset(writer)
                    return
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                status = b"503 Service Unavailable" if self.mode == "error" else b"200 OK"
                name = self.name.encode()
                writer.write(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(name), name))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # asyncio's streams log a handler that ends by being cancelled
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()


# ── callers ──


@dataclass(frozen=True, slots=True)
class Call:
    """One request: when it was due and when answered (monotonic), its status (0: none came) and the answer's body."""

    due: float
    ended: float
    status: int
    body: str

    @property
    def took_s(self) -> float:
        return self.ended - self.due


class Callers:
    """`rate` requests a second on keep-alive connections, each on a free one; latency counts from when it was due.
    With rate None each of `connections` callers asks as fast as it is answered. Never more than `connections`."""

    def __init__(
        self,
        port: int,
        *,
        rate: float | None = None,
        connections: int = 32,
        address: str = "127.0.0.1",
        host: str = HOST,
        target: str = "/",
    ) -> None:
        self.port = port
        self.address = address
        self.calls: list[Call] = []
        self.unsent = 0
        """Requests that found no connection free: they were due and never sent."""
        self._rate = rate
        self._limit = connections
        self._request = f"GET {target} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._open = 0
        self._jobs: set[asyncio.Task[None]] = set()
        self._is_over = False

    async def __aenter__(self) -> Self:
        if self._rate is not None:
            self._driver = asyncio.create_task(self._drive(1 / self._rate))
        else:
            self._driver = asyncio.create_task(asyncio.sleep(0))
            for _ in range(self._limit):
                self._spawn(self._ask_on())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """No more requests; those under way are waited for."""
        self._is_over = True
        await self._driver
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._jobs)
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    def since(self, moment: float, until: float = float("inf")) -> list[Call]:
        """Calls that were due then."""
        return [call for call in self.calls if moment <= call.due < until]

    def failures(self) -> list[Call]:
        return [call for call in self.calls if call.status != 200]

    def by_body(self, calls: Sequence[Call] | None = None) -> Counter[str]:
        return Counter(call.body for call in (self.calls if calls is None else calls))

    def _spawn(self, job: Any) -> None:
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _drive(self, gap_s: float) -> None:
        due = monotonic()
        while not self._is_over:
            if due > monotonic():
                await asyncio.sleep(due - monotonic())
            if self._idle or self._open < self._limit:
                self._spawn(self._ask_once(due))
            else:
                self.unsent += 1
            due += gap_s

    async def _ask_on(self) -> None:
        while not self._is_over:
            await self._ask_once(monotonic())

    async def _ask_once(self, due: float) -> None:
        status, body, keeps = 0, "", False
        connection = self._idle.pop() if self._idle else None
        try:
            if connection is None:
                self._open += 1
                connection = await asyncio.open_connection(self.address, self.port)
            reader, writer = connection
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r")[0] or 0)
            body = (await reader.readexactly(length)).decode()
            status, keeps = int(head[9:12]), "\r\nconnection: close" not in head
        except (OSError, asyncio.IncompleteReadError) as error:
            body = repr(error)
        self.calls.append(Call(due, monotonic(), status, body))
        if keeps and connection is not None:
            self._idle.append(connection)
        else:
            self._open -= 1
            if connection is not None:
                connection[1].close()


def quantile(values: Sequence[float], share: float) -> float:
    """0.99: the value that 99 % stay below; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


# ── what the proxy's processes hold ──


async def get(port: int, path: str) -> str:
    """Of the admin, metrics or ready port."""
    url = f"http://127.0.0.1:{port}{path}"
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode())


async def metric(proxy: ProxyProcess, name: str) -> float:
    """Sum of the samples whose line starts so: a name, or a name with its labels."""
    text = await get(proxy.ports["metrics"], "/stats/prometheus")
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def until(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> None:
    """Wait for something outside this process that nobody announces. condition: a bool, or a coroutine of one."""
    async with asyncio.timeout(timeout_s):
        while True:
            held = condition()
            if asyncio.iscoroutine(held):
                held = await held
            if held:
                return
            await asyncio.sleep(0.02)


def pss_mib(pid: int) -> float:
    return _rollup(pid, "Pss:")


def private_mib(pid: int) -> float:
    return _rollup(pid, "Private_Clean:") + _rollup(pid, "Private_Dirty:")


def _rollup(pid: int, name: str) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name)) / 1024


def group_pss_mib(proxy: ProxyProcess) -> float:
    """All processes of a proxy."""
    return sum(pss_mib(pid) for pid in (proxy.process.pid, *proxy.children().values()))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Figures:
    """The highest a measure went, sampled while something runs."""

    highest: dict[str, float] = field(default_factory=dict)

    async def watch(self, every_s: float, **measures: Callable[[], float]) -> None:
        """Until cancelled."""
        while True:
            for name, measure in measures.items():
                with contextlib.suppress(OSError):
                    self.highest[name] = max(self.highest.get(name, 0.0), measure())
            await asyncio.sleep(every_s)
