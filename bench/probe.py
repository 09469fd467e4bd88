"""Asks a proxy's own ports how long they take, run as a program of its own: python -m bench.probe ADMIN METRICS REPORT.

Until SIGTERM; then writes how often it asked and the slowest answer of each.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from bench.process import http_status

_GAP_S = 0.05
_SCRAPE_EVERY = 5
"""Scrapes are the dearer question: one in so many rounds."""


def main() -> None:
    admin, metrics, report = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    stops = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stops
        stops = True

    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(PermissionError):
        # The load keeps our core busy: how long we wait for it is no answer of the proxy's.
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    took_ms: dict[str, list[float]] = {"/ready": [], "/stats/prometheus": []}
    failed = rounds = 0
    while not stops:
        for port, path in ((admin, "/ready"), (metrics, "/stats/prometheus"))[: 1 + (rounds % _SCRAPE_EVERY == 0)]:
            started = time.monotonic()
            failed += http_status(port, path) != 200
            took_ms[path].append((time.monotonic() - started) * 1000)
        rounds += 1
        time.sleep(_GAP_S)
    answers = {
        "failed": failed,
        "asked": sum(map(len, took_ms.values())),
        "slowest_ready_ms": max(took_ms["/ready"], default=0.0),
        "slowest_metrics_ms": max(took_ms["/stats/prometheus"], default=0.0),
    }
    report.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
