"""A proxy under attack: real processes, an upstream that counts, and a caller elsewhere who must not notice.

async with Siege(tmp_path) as siege:
    async with siege.attack(record, "rapid_reset") as figures:
        …                       # what the attacker does with connections to siege.port
    assert figures.upstream_requests <= 500
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Self

from tests.faults.traffic import (
    Callers,
    Figures,
    Record,
    mesh,
    metric,
    note,
    private_mib,
    publish,
    quantile,
    started,
    until,
)
from tests.support.proxy_process import ProxyProcess, free_port
from tests.support.raw_server import RawServer

RATE = 200.0
"""Requests a second of the caller who is served meanwhile."""
SLOWEST_S = 2.0
"""Asked of every one of them; attacker, caller, upstream and proxy share the processors, and a finer bound would
measure those. The figures tell the rest."""
WARM_CALLS, BASE_CALLS = 10, 50
"""Of the caller, before an attack: not counted, then the ones to compare with."""
MIB = bytes(1 << 20)


@dataclass
class Measured:
    """Of one attack; complete when its `async with` has ended. frames: as many as the attacker says it sent."""

    upstream_requests: int = 0
    frames: int = 0
    took_s: float = 0.0
    grown_mib: float = 0.0
    """Private memory of the worker, the highest during the attack, less what it had before."""
    worker_cpu_s: float = 0.0
    caller_requests: int = 0
    caller_failures: int = 0
    caller_p99_ms: float = 0.0
    caller_slowest_ms: float = 0.0
    caller_p99_before_ms: float = 0.0


class Siege:
    """The upstream answers /hold never, /big with 1 MiB, everything else with `ok`; `seen` are the targets of all
    requests but the caller's."""

    def __init__(self, directory: Path, route: Mapping[str, Any] | None = None, *flags: str) -> None:
        self._directory = directory
        self._flags = flags
        self._route = route
        self._stack = contextlib.AsyncExitStack()
        self.port = free_port()
        self.seen: list[bytes] = []
        self.holding = 0
        """Requests that have not been answered, or not been given up."""

    async def __aenter__(self) -> Self:
        upstream = await self._stack.enter_async_context(RawServer(self._serve))
        publish(self._directory, mesh(self.port, [("127.0.0.1", upstream.port, "")], None, self._route))
        self.proxy = self._stack.enter_context(ProxyProcess(self._directory, *self._flags, module="meshproxy"))
        await started(self.proxy)
        self.worker = self.proxy.children()["mesh-worker-0"]
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            assert self.proxy.children().get("mesh-worker-0") == self.worker, "the worker has been replaced"
        finally:
            await self._stack.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # asyncio's streams log a handler that is cancelled
            await self._answer(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            target = head.split(b" ", 2)[1]
            if target != b"/caller":
                self.seen.append(target)
            self.holding += 1
            try:
                if target == b"/hold":
                    await _read_all(reader)
                    return
                body = MIB if target == b"/big" else b"ok"
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
                await writer.drain()
            finally:
                self.holding -= 1

    @contextlib.asynccontextmanager
    async def attack(self, record: Record, row: str) -> AsyncIterator[Measured]:
        """Measured from entry to exit, noted as `row`. The caller asks before, during, and after; each of its requests
        must be answered with 200, in SLOWEST_S. When the attacker has gone, nothing of it is left at the upstream."""
        measured = Measured()
        async with Callers(self.port, rate=RATE, connections=8, target="/caller") as callers:
            await until(lambda: len(callers.calls) > WARM_CALLS + BASE_CALLS)
            began, seen = monotonic(), len(self.seen)
            memory, cpu = private_mib(self.worker), self.worker_cpu_s()
            figures = Figures()
            watch = asyncio.create_task(figures.watch(0.02, memory=lambda: private_mib(self.worker)))
            try:
                yield measured
            finally:
                watch.cancel()
            measured.worker_cpu_s = self.worker_cpu_s() - cpu
            highest = max(figures.highest.get("memory", memory), private_mib(self.worker))
            measured.grown_mib = max(0.0, highest - memory)
            await until(lambda: self.holding == 0)
            ended, answered = monotonic(), len(callers.calls)
            await until(lambda: len(callers.calls) > answered + WARM_CALLS)
        measured.took_s = ended - began
        measured.upstream_requests = len(self.seen) - seen
        during = [call.took_s * 1000 for call in callers.since(began)]
        measured.caller_requests = len(during)
        measured.caller_failures = len(callers.failures())
        measured.caller_p99_ms = quantile(during, 0.99)
        measured.caller_slowest_ms = max(during)
        measured.caller_p99_before_ms = quantile(
            [call.took_s * 1000 for call in callers.calls[WARM_CALLS : WARM_CALLS + BASE_CALLS]], 0.99
        )
        note(record, row, **vars(measured))
        assert measured.caller_failures == 0, callers.failures()[:3]
        assert measured.caller_slowest_ms < SLOWEST_S * 1000

    def worker_cpu_s(self) -> float:
        """In finer steps than the clock ticks of its `stat`."""
        tasks = Path(f"/proc/{self.worker}/task").glob("*/schedstat")
        return sum(int(path.read_text().split()[0]) for path in tasks) / 1e9

    async def metric(self, name: str) -> float:
        return await metric(self.proxy, name)


async def _read_all(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(65536):
            pass
