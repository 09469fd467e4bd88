"""Sheds load before the kernel kills for memory: Envoy's overload manager, for one worker.

Decides: from the worker's own memory and its share of the limit, when requests are refused (503), when connections are
refused, and which streams are cut. Leaves to others: what the share is (control.memory), how each of them ends.

Source: Envoy overload manager (stop_accepting_requests, stop_accepting_connections, reset_high_memory_stream,
shrink_heap).
"""

import logging
import os
from time import monotonic
from typing import Any, Protocol

from meshproxy.upstream.worker_state import WorkerState

log = logging.getLogger(__name__)

REFUSE_AT = 0.80
"""Of the share: no new requests, no new connections. Ends at CALM_AT, so that it does not flutter."""
CALM_AT = 0.75
CUT_AT = 0.90
"""Of the share: the streams that hold most are reset until REFUSE_AT is in reach."""
LOOK_EVERY = 16
"""Streams that fill their buffers between two looks outside the tick; each holds at most about 320 KiB."""
TRIM_GAP_S = 0.5
CONNECTION_BYTES = 8 * 1024
"""What a connection with empty buffers is taken to cost (with TLS more; see docs/benchmarks.md)."""
LEAST_HELD = 1 / 8
"""Of the share: where connections hold less than this, shedding them would not help, and nothing is shed."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Holder(Protocol):
    """A connection that may hold bytes that it cannot pass on."""

    def held_bytes(self) -> int: ...

    def shed(self) -> None:
        """Reset it and whoever feeds it."""


class MemoryGuard:
    """look() is called on every tick and, through WorkerState.on_buffered, when many streams fill their buffers."""

    __slots__ = ("_filled", "_has_warned", "_state", "_statm", "_trimmed_at", "share_bytes")

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._filled = 0
        self._trimmed_at = 0.0
        self._has_warned = False
        self.share_bytes: int | None = None
        """None: no limit, nothing is ever shed."""
        state.on_buffered = self._on_buffered

    def used_bytes(self) -> int:
        """Anonymous memory: what is mapped from files is shared, and the kernel can take it back."""
        _, resident, shared, _ = os.pread(self._statm, 128, 0).split(b" ", 3)
        return (int(resident) - int(shared)) * _PAGE

    def _on_buffered(self) -> None:
        self._filled += 1
        if self._filled >= LOOK_EVERY:
            self.look()

    def look(self) -> None:
        self._filled = 0
        share = self.share_bytes
        if share is None:
            self._state.is_overloaded = False
            return
        used = self.used_bytes()
        if used < share * (CALM_AT if self._state.is_overloaded else REFUSE_AT):
            self._calm()
            return
        if self._trim():
            used = self.used_bytes()
            if used < share * REFUSE_AT:
                self._calm()
                return
        holders = self._holders()
        held = sum(size for size, _ in holders) + self._state.open_connections * CONNECTION_BYTES
        if held < share * LEAST_HELD:
            self._warn(used, share)
            self._calm()
            return
        if not self._state.is_overloaded:
            self._state.is_overloaded = True
            log.warning(
                "memory: %d of %d MiB used, connections hold %d: new requests and connections are refused",
                used >> 20,
                share >> 20,
                held >> 20,
            )
        if used >= share * CUT_AT:
            self._cut(holders, used - int(share * REFUSE_AT))

    def _calm(self) -> None:
        if self._state.is_overloaded:
            self._state.is_overloaded = False
            log.warning("memory: back below the limit, new requests are served again")

    def _holders(self) -> list[tuple[int, Any]]:
        """(bytes, connection), only those that hold something."""
        holders = []
        for timed in self._state.timed:
            held_bytes = getattr(timed, "held_bytes", None)  # what only waits for its first bytes has none
            if held_bytes is not None and (size := held_bytes()):
                holders.append((size, timed))
        return holders

    def _cut(self, holders: list[tuple[int, Holder]], excess: int) -> None:
        holders.sort(key=lambda holder: holder[0], reverse=True)
        for size, connection in holders:
            if excess <= 0:
                return
            self._state.counters.overload["reset_stream"] += 1
            connection.shed()
            excess -= size

    def _trim(self) -> bool:
        """Give freed pages back, or memory would look used long after the load is gone. Costs a millisecond or so."""
        now = monotonic()
        if now - self._trimmed_at < TRIM_GAP_S:
            return False
        self._trimmed_at = now
        import ctypes  # 1 MiB that a worker without pressure does not pay

        try:
            ctypes.CDLL(None).malloc_trim(0)
        except AttributeError:
            return False  # not glibc
        return True

    def _warn(self, used: int, share: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "memory: the limit leaves this worker %d MiB and its configuration alone takes %d: raise the limit",
                share >> 20,
                used >> 20,
            )
