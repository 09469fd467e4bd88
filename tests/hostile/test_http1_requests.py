"""Malformed requests through a live worker: the strict answer, and nothing at the upstream."""

import re

import pytest

from tests.hostile.http1_requests import LEGAL, MALFORMED
from tests.support.live_worker import LiveWorker, exchange
from tests.support.origin import Origin


@pytest.mark.parametrize(("name", "data", "status"), MALFORMED, ids=[case[0] for case in MALFORMED])
async def test_malformed_request_is_refused_and_never_forwarded(name: str, data: bytes, status: int) -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, data)
        assert origin.requests == [], name
        assert origin.errors == []
        if answer:
            statuses = re.findall(rb"HTTP/1\.1 (\d{3})", answer)
            assert len(statuses) == 1, answer
            assert status == 0 or int(statuses[0]) == status
            assert b"connection: close" in answer
        else:
            assert status == 0


@pytest.mark.parametrize(("name", "data"), LEGAL, ids=[case[0] for case in LEGAL])
async def test_odd_but_legal_request_arrives_as_exactly_one(name: str, data: bytes) -> None:
    async with Origin() as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]))
        answer = await exchange(port, data)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert len(origin.requests) == 1
        assert origin.errors == []
