"""Marks what a real Envoy is known to do differently; no meshproxy run is marked."""

import pytest

from tests.conformance.envoy_differs import ENVOY_DIFFERS
from tests.conformance.http2_peer import IS_ENVOY


def pytest_itemcollected(item: pytest.Item) -> None:
    if IS_ENVOY and isinstance(item, pytest.Function) and "conformance" in item.nodeid:
        case = item.callspec.id if hasattr(item, "callspec") else ""
        reason = ENVOY_DIFFERS.get(case) or ENVOY_DIFFERS.get(item.originalname)
        if reason is not None:
            # Strict: a difference that is gone must leave the list.
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
