"""An open-loop HTTP/1.1 client at a constant rate, run as a program of its own: python -m bench.paced ….

A request is due at start + i/rate whatever the answers do, and its latency counts from then: a proxy that stalls is
charged for every request that should have been sent meanwhile (no coordinated omission).
"""

import ctypes
import gc
import json
import select
import socket
import sys
import time
from collections import deque

_PR_SET_TIMERSLACK = 29


class Connection:
    """One keep-alive connection with at most one request in flight. head: of the last response."""

    __slots__ = ("buffer", "due", "head", "needed", "socket")

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, 5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.buffer = b""
        self.head = b""
        self.needed = -1
        self.due = 0.0

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive(self) -> int | None:
        """Status once the response is whole; None while bytes are missing; 0 when the connection broke."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            return 0
        if not data:
            return 0
        self.buffer += data
        if self.needed < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return None
            self.head = self.buffer[:end]
            self.needed = end + 4 + content_length(self.head)
        if len(self.buffer) < self.needed:
            return None
        status = int(self.buffer[9:12])
        self.buffer = self.buffer[self.needed :]
        self.needed = -1
        return status


def content_length(head: bytes) -> int:
    """Of a response head; 0 where there is none (the origin of the benchmark always sends it)."""
    at = head.lower().find(b"\r\ncontent-length:")
    return int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


def run(address: tuple[str, int], request: bytes, rate: int, seconds: float, count: int) -> dict[str, float]:
    """Latency percentiles in µs; failed: broken connections and answers that are not 200."""
    idle = deque(Connection(address) for _ in range(count))
    busy: dict[int, Connection] = {}
    waiting: deque[float] = deque()
    latencies: list[float] = []
    failed = sent = 0
    total = int(rate * seconds)
    clock = time.perf_counter
    start = clock() + 0.01
    while sent < total or busy or waiting:
        now = clock()
        while sent < total and start + sent / rate <= now:
            waiting.append(start + sent / rate)
            sent += 1
        while waiting and idle:
            connection = idle.popleft()
            connection.due = waiting.popleft()
            connection.socket.send(request)
            busy[connection.fileno()] = connection
        timeout = max(0.0, start + sent / rate - clock()) if sent < total else 1.0
        readable = select.select(list(busy.values()), (), (), timeout)[0]  # select: the one wait with µs resolution
        now = clock()
        for connection in readable:
            status = connection.receive()
            if status is None:
                continue
            del busy[connection.fileno()]
            latencies.append(now - connection.due)
            if status != 200:
                failed += 1
            if status == 0:
                connection.socket.close()
                connection = Connection(address)
            idle.append(connection)
        if sent >= total and now > start + total / rate + 10:
            failed += len(busy) + len(waiting)
            break
    latencies.sort()
    return {
        "requests": len(latencies),
        "failed": failed,
        "p50_us": percentile(latencies, 0.5) * 1e6,
        "p99_us": percentile(latencies, 0.99) * 1e6,
        "p999_us": percentile(latencies, 0.999) * 1e6,
        "max_us": latencies[-1] * 1e6 if latencies else 0.0,
    }


def percentile(ordered: list[float], share: float) -> float:
    """Nearest rank of an ascending list; 0.0 for an empty one."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def main() -> None:
    host, port, authority, path, rate, seconds, connections = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # wake when a request is due, not up to 50 µs later
    request = f"GET {path} HTTP/1.1\r\nhost: {authority}\r\n\r\n".encode()
    gc.disable()
    run((host, int(port)), request, 1000, 0.3, int(connections))  # connections pooled, caches warm
    print(json.dumps(run((host, int(port)), request, int(rate), float(seconds), int(connections))))


if __name__ == "__main__":
    main()
