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

_COMMANDS = {
    "run": ("run", "run the proxy"),
    "validate": ("validate", "check configuration files"),
    "status": ("status", "what a running proxy does"),
    "clusters": ("status", "its clusters, their endpoints and health"),
    "routes": ("status", "its routes"),
    "listeners": ("status", "its listeners"),
    "certs": ("status", "its certificates"),
    "config": ("status", "its whole configuration"),
    "ca": ("ca", "a certificate authority for development"),
    "demo": ("demo", "see it work on this machine"),
    "bench": ("bench", "measure it beside other proxies"),
}
"""Command → its module in this package, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 it failed (one sentence on stderr), 2 the command line itself is wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="meshproxy", description="A service-mesh data plane that speaks Istio.")
    parser.add_argument("--version", action="version", version=f"meshproxy {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = _COMMANDS[arguments[0]][0] if arguments and arguments[0] in _COMMANDS else None
    if module is not None and _exists(module):
        importlib.import_module(f"meshproxy.cli.{module}").add_parser(subparsers)
    else:
        for name, (module, does) in _COMMANDS.items():
            if _exists(module):
                subparsers.add_parser(name, help=does)
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


def _exists(module: str) -> bool:
    return importlib.util.find_spec(f"meshproxy.cli.{module}") is not None
