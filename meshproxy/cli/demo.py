"""`meshproxy demo`: a mesh of real processes on loopback, governed by three files, with every expectation checked."""

import argparse
import asyncio
import sys
import time
from typing import Any

from meshproxy.demo.stage import Stage, StageError
from meshproxy.demo.steps import Demo, Report
from meshproxy.demo.view import View, print_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="a mesh of real processes on loopback, with its expectations checked",
        description="Starts two proxies and six applications on loopback, drives load through them and checks: traffic "
        "by locality, mTLS and identities, STRICT, added latency, an endpoint that is not ready, ejection and return "
        "of a crashed one, loss of a zone, memory. Exit status 0 only if all of it held. Takes about 75 seconds.",
    )
    parser.add_argument(
        "--seconds", type=float, default=6.0, metavar="S", help="length of each load phase (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document; progress goes to stderr")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    view = View(sys.stderr if arguments.json else sys.stdout)
    started = time.perf_counter()
    try:
        report = asyncio.run(_play(view, max(1.0, arguments.seconds)))
    except StageError as error:
        print(f"meshproxy demo: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started
    if arguments.json:
        print_json(report, round(seconds, 1))
    view.summary(report, seconds)
    return 0 if report.holds else 1


async def _play(view: View, seconds: float) -> Report:
    view.step("starting two proxies and six applications")
    async with Stage() as stage:
        return await Demo(stage, view, seconds).run()
