"""`meshproxy bench`: runs the benchmark harness of this checkout; an installed package does not carry it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from meshproxy.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    # The harness parses its own arguments. With no prefix character every argument is positional here, so that
    # `--rounds 5` and `--help` pass through untouched.
    parser = subparsers.add_parser(
        "bench", help="measure the proxy beside Envoy and HAProxy", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "bench" / "__main__.py").is_file():
        raise ConfigError(
            "bench: the harness is part of the source checkout, not of the installed package; run it from there "
            "with `make bench`"
        )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH")))),
    }
    os.execve(sys.executable, [sys.executable, "-m", "bench", *arguments.arguments], environment)
