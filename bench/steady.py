"""A client that accounts for every request, run as a program of its own: python -m bench.steady ….

It behaves as a careful HTTP client does: it honours `Connection: close`, notices a closed idle connection before it
uses it, and takes the next address when one refuses connections (as a client behind any load balancer). Everything
else that is not a whole 200 answer is a failed request and is written down with its moment.
"""

import heapq
import json
import select
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from bench.paced import content_length

_TIMEOUT_S = 10.0


class Client:
    """One connection at a time; requests one after the other."""

    __slots__ = ("_addresses", "_request", "buffer", "failures", "in_flight_since", "next_at", "socket", "turn")

    def __init__(self, addresses: list[tuple[str, int]], request: bytes, failures: list[dict[str, object]]) -> None:
        self._addresses = addresses
        self._request = request
        self.failures = failures
        self.socket: socket.socket | None = None
        self.buffer = b""
        self.in_flight_since = 0.0
        self.next_at = 0.0
        self.turn = 0

    def send(self) -> bool:
        """Sends the next request; False when it failed before anything was sent."""
        if self.socket is not None and self._was_closed():
            self.close()
        if self.socket is None and not self._connect():
            self._fail("refused")
            return False
        assert self.socket is not None
        self.in_flight_since = time.monotonic()
        try:
            self.socket.send(self._request)
        except OSError as error:
            self._fail(f"send: {error.strerror}")
            return False
        return True

    def receive(self) -> bool | None:
        """True: answered with 200; False: failed; None: not whole yet, or an idle connection was closed."""
        assert self.socket is not None
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return None
        except OSError as error:
            data = b""
            reason = error.strerror or "error"
        else:
            reason = "closed"
        if not data:
            if not self.in_flight_since:
                self.close()
                return None
            self._fail(reason)
            return False
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0 or len(self.buffer) < end + 4 + content_length(self.buffer[:end]):
            return None
        head = self.buffer[:end].lower()
        status = int(head[9:12])
        if status != 200:
            self._fail(f"status {status}")
            return False
        self.buffer = b""
        self.in_flight_since = 0.0
        if b"\r\nconnection: close" in head:
            self.close()
        return True

    def expire(self, now: float) -> bool:
        if self.in_flight_since and now - self.in_flight_since > _TIMEOUT_S:
            self._fail("timeout")
            return True
        return False

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.socket = None
        self.buffer = b""
        self.in_flight_since = 0.0

    def _was_closed(self) -> bool:
        assert self.socket is not None
        try:
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _connect(self) -> bool:
        for _ in self._addresses:
            try:
                self.socket = socket.create_connection(self._addresses[self.turn], _TIMEOUT_S)
            except ConnectionRefusedError:
                self.turn = (self.turn + 1) % len(self._addresses)
                continue
            except OSError:
                return False
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.setblocking(False)
            return True
        return False

    def _fail(self, reason: str) -> None:
        self.failures.append({"at": time.monotonic(), "reason": reason, "was_sent": self.in_flight_since > 0})
        self.close()


def main() -> None:
    addresses = [(address.rpartition(":")[0], int(address.rpartition(":")[2])) for address in sys.argv[1].split(",")]
    authority, path, rate, count, report = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
    request = f"GET {path} HTTP/1.1\r\nhost: {authority}\r\n\r\n".encode()
    failures: list[dict[str, object]] = []
    clients = [Client(addresses, request, failures) for _ in range(count)]
    stops = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stops
        stops = True

    signal.signal(signal.SIGTERM, stop)
    gap_s = count / rate
    now = time.monotonic()
    schedule = [(now + index * gap_s / count, index) for index in range(count)]
    poll = select.epoll()
    answered = requests = 0
    slowest_s = 0.0
    last_sweep = now
    while not stops or any(client.in_flight_since for client in clients):
        now = time.monotonic()
        while schedule and schedule[0][0] <= now and not stops:
            at, index = heapq.heappop(schedule)
            client = clients[index]
            if client.in_flight_since:  # still waiting: the next one goes out when this one is answered
                heapq.heappush(schedule, (now + gap_s, index))
                continue
            before = client.socket
            requests += 1
            if client.send() and client.socket is not before and client.socket is not None:
                poll.register(client.socket.fileno(), select.EPOLLIN)
                _BY_FD[client.socket.fileno()] = client
            heapq.heappush(schedule, (max(at + gap_s, now), index))
        timeout = max(0.0, schedule[0][0] - time.monotonic()) if schedule and not stops else 0.1
        for fd, _ in poll.poll(min(timeout, 0.1)):
            client = _BY_FD[fd]
            if client.socket is None or client.socket.fileno() != fd:
                continue
            since = client.in_flight_since
            if client.receive():
                answered += 1
                slowest_s = max(slowest_s, time.monotonic() - since)
        if now - last_sweep > 1:
            last_sweep = now
            for client in clients:
                client.expire(now)
    for client in clients:
        client.close()
    Path(report).write_text(
        json.dumps({"requests": requests, "answered": answered, "slowest_ms": slowest_s * 1000, "failures": failures})
    )


_BY_FD: dict[int, Client] = {}

if __name__ == "__main__":
    main()
