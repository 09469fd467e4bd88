"""HTTP/3 downstreams against real upstreams: requests, bodies, ends, limits."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshproxy.model.listener import ServerTls, ServerTlsMode
from tests.support.certificates import Authority
from tests.support.http3_client import Http3Client, get
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin

AUTHORITY = Authority()


@pytest.fixture
def server_tls(tmp_path: Path) -> ServerTls:
    directory = AUTHORITY.leaf(dns_names=["a.example"]).write(tmp_path)
    return ServerTls(
        mode=ServerTlsMode.SIMPLE,
        certificate_file=str(directory / "cert-chain.pem"),
        key_file=str(directory / "key.pem"),
    )


@pytest.fixture
async def worker() -> AsyncIterator[LiveWorker]:
    async with LiveWorker() as worker:
        yield worker


async def test_a_request_goes_through_a_gateway_to_an_http1_upstream(worker: LiveWorker, server_tls: ServerTls) -> None:
    async with Origin() as origin:
        port = worker.listen_quic(worker.cluster([("127.0.0.1", origin.port)]), tls=server_tls)
        async with Http3Client.to(port, AUTHORITY.pem) as client:
            answer = await client.request(get("/path?query"))
        assert (answer.status, answer.body) == (200, b"ok")
        assert origin.requests[0].target == b"/path?query"
        assert origin.requests[0].header(b"x-forwarded-proto") == b"https"
