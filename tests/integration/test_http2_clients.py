"""curl, nghttp and h2load as clients of a Gateway's listener: by prior knowledge, and over TLS by ALPN."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshproxy.model.cluster import CircuitLimits
from meshproxy.model.listener import Direction, ServerTls, ServerTlsMode
from tests.support.certificates import Authority
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin, Seen

PATIENCE_S = 30.0
BODY = bytes(range(256)) * 4096
"""1 MiB."""
BOTH = pytest.mark.parametrize("scheme", ["http", "https"])


def answer(seen: Seen) -> bytes:
    """/echo: the body, with its length and that of the trailers; /trailers: a trailer; others: ok."""
    if seen.target == b"/trailers":
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n"
    body = seen.body if seen.target == b"/echo" else b"ok"
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Authority().leaf(uris=(), dns_names=("a.example",)).write(tmp_path_factory.mktemp("gateway"))


@asynccontextmanager
async def gateway(files: Path, scheme: str) -> AsyncIterator[tuple[Origin, int]]:
    tls = ServerTls(
        mode=ServerTlsMode.SIMPLE, certificate_file=str(files / "cert-chain.pem"), key_file=str(files / "key.pem")
    )
    async with Origin(answer) as origin, LiveWorker() as live:
        # As many connections as the origin's queue holds; requests wait for one.
        limits = CircuitLimits(max_connections=50)
        cluster = live.cluster([("127.0.0.1", origin.port)], limits=limits)
        yield origin, live.listen(cluster, direction=Direction.GATEWAY, tls=tls if scheme == "https" else None)
        assert live.worker.state.counters.protocol_errors == {}


async def run(name: str, *arguments: str | Path) -> str:
    """What the program says; it has to end well."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    process = await asyncio.create_subprocess_exec(
        path, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = said.decode("latin-1")
    assert process.returncode == 0, text[-2000:]
    return text


async def curl(files: Path, scheme: str, port: int, path: str, *arguments: str | Path) -> str:
    version = "--http2" if scheme == "https" else "--http2-prior-knowledge"
    trust = ("--cacert", files / "root-cert.pem", "--resolve", f"a.example:{port}:127.0.0.1")
    return await run("curl", "-sS", version, *trust, *arguments, f"{scheme}://a.example:{port}{path}")


# ── curl ──


@BOTH
async def test_curl_gets_an_answer_in_http2(scheme: str, files: Path) -> None:
    async with gateway(files, scheme) as (origin, port):
        said = await curl(files, scheme, port, "/", "-i", "-w", "[%{http_version} %{response_code}]")
        assert said.startswith("HTTP/2 200")
        assert said.endswith("ok[2 200]")
        assert origin.requests[0].header(b"x-forwarded-proto") == scheme.encode()


@BOTH
async def test_curl_sends_a_body_and_gets_it_back(scheme: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(BODY)
    async with gateway(files, scheme) as (_, port):
        for extra in ((), ("-H", "Expect: 100-continue")):
            sent = ("--data-binary", f"@{tmp_path / 'sent'}", "-o", tmp_path / "got")
            await curl(files, scheme, port, "/echo", *sent, *extra)
            assert (tmp_path / "got").read_bytes() == BODY


@BOTH
async def test_curl_sends_head_and_reads_trailers(scheme: str, files: Path) -> None:
    async with gateway(files, scheme) as (_, port):
        assert (await curl(files, scheme, port, "/", "--head")).startswith("HTTP/2 200")
        assert "x-sum: 1" in await curl(files, scheme, port, "/trailers", "-v")


async def test_curl_asks_for_a_hundred_at_once(files: Path) -> None:
    # Over TLS only: curl 7.88 cannot share a connection that it has begun by prior knowledge.
    async with gateway(files, "https") as (origin, port):
        said = await curl(files, "https", port, "/[1-200]", "-Z", "--parallel-max", "100", "-w", "[%{response_code}]")
        assert said.count("[200]") == 200
        assert {seen.target for seen in origin.requests} == {b"/%d" % number for number in range(1, 201)}


async def test_curl_that_offers_an_upgrade_to_h2c_is_served_in_http1(files: Path) -> None:
    async with gateway(files, "http") as (_, port):
        said = await run("curl", "-sS", "--http2", "-w", "[%{http_version}]", f"http://127.0.0.1:{port}/")
        assert said == "ok[1.1]"


# ── nghttp ──


@BOTH
async def test_nghttp_pads_its_frames_and_sends_trailers(scheme: str, files: Path, tmp_path: Path) -> None:
    """Without a content-length: HTTP/1.1 has trailers after chunks only."""
    (tmp_path / "sent").write_bytes(BODY)
    async with gateway(files, scheme) as (origin, port):
        sent = ("-d", tmp_path / "sent", "--trailer", "x-end: yes", "--no-content-length", "-b", "200")
        said = await run("nghttp", "-v", "-n", *sent, f"{scheme}://127.0.0.1:{port}/echo")
        assert ":status: 200" in said
        (seen,) = origin.requests
        assert seen.body == BODY
        assert seen.trailers == [(b"x-end", b"yes")]
        assert "GOAWAY" not in said.split("send GOAWAY")[0]


@BOTH
async def test_nghttp_gets_trailers_with_small_windows_and_no_table(scheme: str, files: Path) -> None:
    async with gateway(files, scheme) as (_, port):
        said = await run(
            "nghttp", "-v", "-w", "10", "-W", "10", "-c", "0", "-m", "50", f"{scheme}://127.0.0.1:{port}/trailers"
        )
        assert said.count("x-sum: 1") == 50
        assert said.count(":status: 200") == 50


# ── h2load ──


@BOTH
@pytest.mark.parametrize("body", [False, True], ids=["GET", "POST"])
async def test_h2load_loses_no_request(body: bool, scheme: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"a" * 20_000)
    async with gateway(files, scheme) as (_, port):
        sent = ("-d", tmp_path / "sent") if body else ()
        said = await run("h2load", "-n", "3000", "-c", "10", "-m", "100", *sent, f"{scheme}://127.0.0.1:{port}/echo")
    assert re.search(r"3000 succeeded, 0 failed, 0 errored, 0 timeout", said), said
    assert "status codes: 3000 2xx, 0 3xx, 0 4xx, 0 5xx" in said


@BOTH
async def test_uploads_that_wait_for_a_connection_hold_up_none_that_has_one(
    scheme: str, files: Path, tmp_path: Path
) -> None:
    # Far more than the connections upstream, and each more than a stream's window: what waits fills its window.
    (tmp_path / "sent").write_bytes(b"a" * 200_000)
    async with gateway(files, scheme) as (_, port):
        sent = ("-d", tmp_path / "sent")
        said = await run("h2load", "-n", "1000", "-c", "5", "-m", "100", *sent, f"{scheme}://127.0.0.1:{port}/other")
    assert "1000 succeeded, 0 failed, 0 errored, 0 timeout" in said, said
