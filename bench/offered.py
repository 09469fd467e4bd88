"""An open-loop HTTP/1.1 client that keeps a record of every answer, run as a program of its own:

python -m bench.offered ADDRESS PORT AUTHORITY REPORT RATE:SECONDS…

Requests are due at a constant rate, phase after phase, whatever the answers do, and their latency counts from then.
Where no connection is free another one is opened, up to a bound; beyond it they wait. Unlike bench.paced it takes
answers that are not 200, and connections that close after them, for what they are.
"""

import gc
import json
import select
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from bench.paced import Connection

_MAX_CONNECTIONS = 1000
_PATIENCE_S = 10.0
"""After the last request was due; what has no answer by then has status 0."""


class Call(NamedTuple):
    """due_s: since the start; status: 0 where none came; says_when: the answer carried retry-after."""

    due_s: float
    took_s: float
    status: int
    says_when: bool


def dues(phases: list[tuple[float, float]]) -> list[float]:
    """When requests are due, in seconds since the start. phases: (requests a second, seconds), one after the other."""
    found: list[float] = []
    start = 0.0
    for rate, seconds in phases:
        found += [start + number / rate for number in range(int(rate * seconds))]
        start += seconds
    return found


def run(address: tuple[str, int], request: bytes, phases: list[tuple[float, float]]) -> list[Call]:
    calls: list[Call] = []
    schedule = deque(dues(phases))
    end_s = sum(seconds for _, seconds in phases) + _PATIENCE_S
    idle: list[Connection] = []
    busy: dict[int, Connection] = {}
    poll = select.epoll()
    start = time.perf_counter()
    while (schedule or busy) and (now := time.perf_counter() - start) < end_s:
        while schedule and schedule[0] <= now and (idle or len(busy) < _MAX_CONNECTIONS):
            due_s = schedule.popleft()
            try:
                connection = idle.pop() if idle else _opened(address, poll)
                connection.due = due_s
                connection.socket.send(request)
                busy[connection.fileno()] = connection
            except OSError:
                calls.append(Call(due_s, time.perf_counter() - start - due_s, 0, False))
        timeout = max(0.0, schedule[0] - now) if schedule and len(busy) < _MAX_CONNECTIONS else 0.1
        for descriptor, _ in poll.poll(timeout):
            found = busy.get(descriptor)
            if found is None:  # an idle one was closed
                closed = next(connection for connection in idle if connection.fileno() == descriptor)
                idle.remove(closed)
                closed.socket.close()
                continue
            status = found.receive()
            if status is None:
                continue
            del busy[descriptor]
            head = found.head.lower()
            says_when = status != 0 and b"\r\nretry-after:" in head
            calls.append(Call(found.due, time.perf_counter() - start - found.due, status, says_when))
            if status == 0 or b"\r\nconnection: close" in head:
                found.socket.close()
            else:
                idle.append(found)
    now = time.perf_counter() - start
    calls += [Call(connection.due, now - connection.due, 0, False) for connection in busy.values()]
    calls += [Call(due_s, now - due_s, 0, False) for due_s in schedule]
    return calls


def _opened(address: tuple[str, int], poll: select.epoll) -> Connection:
    connection = Connection(address)
    poll.register(connection.fileno(), select.EPOLLIN)
    return connection


def main() -> None:
    host, port, authority, report, *words = sys.argv[1:]
    phases = [(float(rate), float(seconds)) for rate, _, seconds in (word.partition(":") for word in words)]
    gc.disable()
    calls = run((host, int(port)), f"GET / HTTP/1.1\r\nhost: {authority}\r\n\r\n".encode(), phases)
    Path(report).write_text(json.dumps(calls))


if __name__ == "__main__":
    main()
