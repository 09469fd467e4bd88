"""Stands where a downstream was. A stream and its downstream name each other; putting this in its place cuts the cycle,
so that reference counts free both, and whoever still speaks to the downstream is not heard."""

from typing import Any

from meshproxy.upstream.worker_state import NEVER


class _Gone:
    deadline = NEVER
    transport = None
    protocol = ""
    is_blocked = False

    def __getattr__(self, name: str) -> Any:
        return _ignore


def _ignore(*_: object) -> None:
    return None


GONE: Any = _Gone()
