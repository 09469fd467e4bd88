"""The command line: finds the subcommand and runs it.

Each subcommand lives in a module of its own that has `add_parser(subparsers)` and sets `run`, a function from the
parsed arguments to the exit status. Only the module of the command that was named is imported, so that
`meshproxy validate` does not pay for `meshproxy run`.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from meshproxy import __version__
from meshproxy.errors import ConfigError

_MODULE_OF = {
    "run": "run",
    "validate": "validate",
    "status": "status",
    "clusters": "status",
    "routes": "status",
    "listeners": "status",
    "certs": "status",
    "config": "status",
    "ca": "ca",
    "demo": "demo",
    "bench": "bench",
}
"""Command → module of this package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 it failed (one sentence on stderr), 2 the command line itself is wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="meshproxy", description="A service-mesh data plane that speaks Istio.")
    parser.add_argument("--version", action="version", version=f"meshproxy {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = _MODULE_OF.get(arguments[0]) if arguments else None
    for module in [named] if named is not None else dict.fromkeys(_MODULE_OF.values()):
        if importlib.util.find_spec(f"meshproxy.cli.{module}") is not None:
            importlib.import_module(f"meshproxy.cli.{module}").add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    try:
        status: int | None = parsed.run(parsed)
    except ConfigError as error:
        print(f"meshproxy: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0
