"""What all connections of one worker share: the loop, the deadline sweep, reports to the control process.

One instance per worker process; passed down, never global.
"""

import asyncio
import os
from collections.abc import Callable
from random import random
from typing import Protocol

from meshproxy.telemetry.access_log import AccessLog
from meshproxy.telemetry.recorder import ProcessCounters, Recorder

SWEEP_INTERVAL_S = 0.1
MIN_SWEEP_GAP_S = 0.01
"""Between two sweeps, however many deadlines lie close together: how late a deadline may be met."""
NEVER = float("inf")


class Timed(Protocol):
    """Anything with a deadline. The sweep compares one float per object, so setting a deadline costs a store."""

    deadline: float
    """Monotonic seconds; NEVER when there is none."""

    def on_deadline(self, now: float) -> None: ...


class WorkerState:
    __slots__ = (
        "_id_next",
        "_id_prefix",
        "_results",
        "access_log",
        "counters",
        "draw",
        "is_draining",
        "is_overloaded",
        "loop",
        "max_connections",
        "on_buffered",
        "open_connections",
        "recorder",
        "send_results",
        "timed",
        "verdicts",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, recorder: Recorder) -> None:
        self.loop = loop
        self.recorder = recorder
        self.counters: ProcessCounters = recorder.process
        self.access_log: AccessLog | None = None
        self.draw = random
        self.timed: set[Timed] = set()
        self.is_draining = False
        self.is_overloaded = False
        """Memory runs out: new requests and connections are refused (worker.memory_guard)."""
        self.on_buffered: Callable[[], None] = lambda: None
        """A connection has filled its write buffer, and whoever feeds it must wait."""
        self.verdicts: dict[str, dict[tuple[str, str], str]] = {}
        """Standing verdicts by cluster key, for clusters that come to life later: (endpoint key, kind) → word."""
        self.open_connections = 0
        self.max_connections = 1 << 30
        self.send_results: Callable[[list[tuple[str, str, int]]], None] = lambda events: None
        self._results: list[tuple[str, str, int]] = []
        self._id_prefix = b""
        self._id_next = 0

    def report(self, cluster_key: str, endpoint_key: str, code: int) -> None:
        """Tell the outlier detector of one outcome; outcomes of one loop turn travel together."""
        if not self._results:
            self.loop.call_soon(self._flush_results)
        self._results.append((cluster_key, endpoint_key, code))

    def _flush_results(self) -> None:
        results, self._results = self._results, []
        self.send_results(results)

    def sweep(self, now: float) -> float:
        """Call those whose deadline has passed; when to sweep again: at the next deadline, SWEEP_INTERVAL_S at most.

        A deadline shorter than that, set after this sweep, waits for the next one. 5,000 idle connections cost 150 µs.
        """
        next_at = now + SWEEP_INTERVAL_S
        for timed in [timed for timed in self.timed if timed.deadline <= next_at]:
            deadline = timed.deadline
            if deadline <= now:
                timed.on_deadline(now)
            elif deadline < next_at:
                next_at = deadline
        return max(next_at, now + MIN_SWEEP_GAP_S)

    def request_id(self) -> bytes:
        """A UUID (version 4): 80 random bits, drawn anew every 1,024 ids, and a count that starts at random.

        Unique, not secret. A whole UUID from the system's randomness costs 1.5 µs; this 0.2.
        """
        number = self._id_next
        if not number & 1023:
            drawn = os.urandom(16).hex()
            self._id_prefix = f"{drawn[:8]}-{drawn[8:12]}-4{drawn[13:16]}-a{drawn[17:20]}-".encode()
            number = int(drawn[20:], 16) & ~1023
        self._id_next = number + 1
        return b"%b%012x" % (self._id_prefix, number)
