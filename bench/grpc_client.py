"""A gRPC client of the real grpcio that calls as fast as it is answered, run as a program of its own:

python -m bench.grpc_client ADDRESS PORT AUTHORITY unary|stream CONCURRENCY SECONDS

One connection. unary: CONCURRENCY calls at a time. stream: CONCURRENCY bidirectional calls for the whole time, each
with one message under way. Every answer is compared with what was sent. Prints one JSON object.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio  # type: ignore[import-untyped]
import uvloop

from bench.grpc_server import SERVICE, STREAM, UNARY
from bench.paced import percentile

MESSAGE = b"hello, mesh\n"
_READY_S = 20.0


class _Tally:
    """took: seconds of each answer; failed: calls that ended otherwise than they should, and wrong answers."""

    __slots__ = ("end", "failed", "took")

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.failed = 0
        self.took: list[float] = []


async def _call(channel: Any, tally: _Tally) -> None:
    method = channel.unary_unary(f"/{SERVICE}/{UNARY}")
    clock = time.perf_counter
    now = clock()
    while now < tally.end:
        try:
            is_right = await method(MESSAGE) == MESSAGE
        except grpc.aio.AioRpcError:
            is_right = False
        before, now = now, clock()
        if is_right:
            tally.took.append(now - before)
        else:
            tally.failed += 1


async def _talk(channel: Any, tally: _Tally) -> None:
    call = channel.stream_stream(f"/{SERVICE}/{STREAM}")()
    clock = time.perf_counter
    try:
        now = clock()
        while now < tally.end:
            await call.write(MESSAGE)
            if await call.read() != MESSAGE:
                tally.failed += 1
                return
            before, now = now, clock()
            tally.took.append(now - before)
        await call.done_writing()
        if await call.read() is not grpc.aio.EOF or await call.code() is not grpc.StatusCode.OK:
            tally.failed += 1
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        tally.failed += 1


_KINDS: dict[str, Callable[[Any, _Tally], Coroutine[Any, Any, None]]] = {"unary": _call, "stream": _talk}


async def run(target: str, authority: str, kind: str, concurrency: int, seconds: float) -> dict[str, float]:
    """Latency in µs; starting_s: CPU before the first call that counts."""
    async with grpc.aio.insecure_channel(target, options=(("grpc.default_authority", authority),)) as channel:
        first = channel.unary_unary(f"/{SERVICE}/{UNARY}")
        await first(MESSAGE, wait_for_ready=True, timeout=_READY_S)
        start, starting_s = time.perf_counter(), time.process_time()
        tally = _Tally(seconds)
        await asyncio.gather(*(_KINDS[kind](channel, tally) for _ in range(concurrency)))
        elapsed_s = time.perf_counter() - start
    took = sorted(tally.took)
    return {
        "requests": len(took),
        "message_bytes": len(MESSAGE),
        "failed": tally.failed,
        "elapsed_s": elapsed_s,
        "starting_s": starting_s,
        "mean_us": sum(took) / max(1, len(took)) * 1e6,
        "p50_us": percentile(took, 0.5) * 1e6,
        "p99_us": percentile(took, 0.99) * 1e6,
        "max_us": took[-1] * 1e6 if took else 0.0,
    }


def main() -> None:
    address, port, authority, kind, concurrency, seconds = sys.argv[1:]
    gc.disable()
    print(json.dumps(uvloop.run(run(f"{address}:{port}", authority, kind, int(concurrency), float(seconds)))))


if __name__ == "__main__":
    main()
