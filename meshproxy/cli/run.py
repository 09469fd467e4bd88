"""`meshproxy run`: the proxy itself. Puts the processes' mains together and hands over to the supervisor."""

import argparse
import contextlib
import os
import resource
import socket
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from meshproxy.cli.settings import add_flags, settings_from
from meshproxy.control.settings import Settings
from meshproxy.model.address import SocketAddress

if TYPE_CHECKING:
    from meshproxy.admin.server import AdminServer
    from meshproxy.control.process import Control


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("run", help="run the proxy", description="Run the proxy until SIGTERM.")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = settings_from(arguments)
    _open_standard_streams()
    _raise_descriptor_limit()
    # Everything a worker needs is imported here, before the fork, so that its pages are shared; the control process
    # imports what only it needs after the fork, so that workers never carry it.
    from meshproxy.telemetry.access_log import formatter
    from meshproxy.worker.process import main as run_worker
    from meshproxy.worker.supervisor import supervise

    if settings.access_log is not None:
        formatter(settings.access_log)  # ConfigError here, once, and not later in every worker
    return supervise(settings, run_worker, run_control)


def run_control(
    settings: Settings,
    link: socket.socket,
    adopted: list[tuple[SocketAddress, int, socket.socket]],
    last_good: int | None,
) -> int:
    from meshproxy.control import process

    return process.run_control(settings, link, adopted, last_good, serve_admin)


async def serve_admin(control: "Control", sockets: Mapping[str, socket.socket]) -> "AdminServer":
    from meshproxy.admin import server

    return await server.serve_admin(control, sockets, options_of(control.settings))


def options_of(settings: Settings) -> dict[str, Any]:
    """The settings as /server_info shows them."""
    options: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, tuple):
            value = list(value)
        options[field.name] = value if isinstance(value, str | int | float | list | dict | None) else str(value)
    return options


def _open_standard_streams() -> None:
    """A service manager may start us with stdin, stdout or stderr closed: their numbers must not become sockets'."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))


def _raise_descriptor_limit() -> None:
    """Two descriptors a request in flight: the soft limit of 1024 is a login shell's, not a proxy's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
