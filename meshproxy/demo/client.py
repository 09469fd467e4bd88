"""The demo's own client: paced requests over kept-alive connections, with latencies, and what each answer said.

A latency counts from when the request was due, so a stalled proxy cannot hide behind a waiting client.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What came back."""

    endpoints: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    """0: the connection failed."""
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        return self.total - self.statuses[200]

    def percentile_ms(self, percent: float) -> float:
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes

    def says(self, key: str) -> str:
        try:
            return str(json.loads(self.body).get(key, ""))
        except ValueError:
            return ""


async def request(address: str, port: int, host: str, timeout_s: float = 5.0) -> Answer:
    """One request on a connection of its own; OSError when the connection fails or ends without an answer."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(address, port), timeout_s)
    try:
        return await asyncio.wait_for(_ask(reader, writer, host), timeout_s)
    except (asyncio.IncompleteReadError, TimeoutError) as error:
        raise ConnectionResetError("the connection ended without an answer") from error
    finally:
        writer.close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> Answer:
    writer.write(b"GET / HTTP/1.1\r\nhost: %b\r\n\r\n" % host.encode())
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    length = 0
    for line in head.lower().split(b"\r\n")[1:]:
        if line.startswith(b"content-length:"):
            length = int(line[15:])
    return Answer(status, await reader.readexactly(length) if length else b"")


async def load(
    address: str,
    port: int,
    host: str,
    *,
    rate: float,
    seconds: float,
    connections: int = 8,
    tally: Tally | None = None,
    until: Callable[[], bool] | None = None,
) -> Tally:
    """`rate` requests a second for `seconds`, or until `until()` holds; everything into `tally`."""
    tally = tally if tally is not None else Tally()
    started = time.perf_counter()

    async def one(index: int) -> None:
        due = started + index / rate
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        while due < started + seconds and not (until is not None and until()):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            try:
                if reader is None or writer is None:
                    reader, writer = await asyncio.open_connection(address, port)
                answer = await asyncio.wait_for(_ask(reader, writer, host), 5.0)
            except (OSError, asyncio.IncompleteReadError, TimeoutError):
                tally.statuses[0] += 1
                if writer is not None:
                    writer.close()
                reader = writer = None
            else:
                tally.statuses[answer.status] += 1
                tally.latencies_ms.append((time.perf_counter() - due) * 1000)
                if answer.status == 200:
                    tally.endpoints[answer.says("endpoint")] += 1
            due += connections / rate
        if writer is not None:
            writer.close()

    await asyncio.gather(*(one(index) for index in range(connections)))
    return tally
