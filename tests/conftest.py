"""The event loop of asynchronous tests: each piece runs on the one it runs on in a proxy."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

_CONTROL = ("tests/unit/admin", "tests/unit/cli", "tests/unit/control", "tests/unit/discovery")


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Workers run on uvloop, the control process on asyncio's own loop (uvloop would cost it memory for nothing)."""
    if item.nodeid.startswith(_CONTROL):
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop}
