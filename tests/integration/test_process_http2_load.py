"""h2load against the real processes of a gateway while its configuration changes, and while it drains."""

import asyncio
import re
import shutil
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.traffic import Record, metric, note
from tests.support.certificates import Authority
from tests.support.origin import Origin
from tests.support.proxy_process import ProxyProcess, free_port

REQUESTS = 10_000
PATIENCE_S = 60.0


def mesh(certificates: Path, plain: int, secure: int, upstream_port: int, version: str) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata:
  name: edge
spec:
  selector: {{app: edge}}
  servers:
  - port: {{number: {plain}, name: http, protocol: HTTP}}
    bind: 127.0.0.1
    hosts: ["*"]
  - port: {{number: {secure}, name: https, protocol: HTTPS}}
    bind: 127.0.0.1
    hosts: ["*"]
    tls:
      mode: SIMPLE
      serverCertificate: {certificates}/cert-chain.pem
      privateKey: {certificates}/key.pem
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: a
spec:
  hosts: [a.example]
  resolution: STATIC
  ports:
  - {{number: 80, name: http, protocol: HTTP}}
  endpoints:
  - {{address: 127.0.0.1, ports: {{http: {upstream_port}}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata:
  name: a
spec:
  host: a.example
  trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: 50}}}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: a
spec:
  hosts: ["*"]
  gateways: [edge]
  http:
  - headers: {{request: {{set: {{x-version: "{version}"}}}}}}
    route:
    - destination: {{host: a.example, port: {{number: 80}}}}
"""


class Gateway(NamedTuple):
    proxy: ProxyProcess
    origin: Origin
    ports: dict[str, int]

    def publish(self, version: str) -> None:
        directory = self.proxy.directory
        text = mesh(directory / "certs", self.ports["http"], self.ports["https"], self.origin.port, version)
        (directory / "new").write_text(text)
        (directory / "new").rename(directory / "conf" / "mesh.yaml")

    def versions(self) -> set[bytes | None]:
        """That requests came with, so far."""
        return {seen.header(b"x-version") for seen in self.origin.requests}


@asynccontextmanager
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    Authority().leaf(uris=(), dns_names=("a.example",)).write(tmp_path / "certs")
    (tmp_path / "conf").mkdir()
    ports = {"http": free_port(), "https": free_port()}
    async with Origin() as origin:
        text = mesh(tmp_path / "certs", ports["http"], ports["https"], origin.port, "first")
        (tmp_path / "conf" / "mesh.yaml").write_text(text)
        with ProxyProcess(tmp_path, "--labels", "app=edge", module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            yield Gateway(proxy, origin, ports)


class Load:
    """One run of h2load: ten connections with a hundred requests each under way."""

    def __init__(self, gateway: Gateway, scheme: str) -> None:
        path = shutil.which("h2load")
        if path is None:
            pytest.skip("h2load is not installed")
        url = f"{scheme}://127.0.0.1:{gateway.ports[scheme]}/"
        self._command = (path, "-n", str(REQUESTS), "-c", "10", "-m", "100", url)

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(*self._command, stdout=asyncio.subprocess.PIPE)

    async def result(self) -> dict[str, int]:
        """started, done, succeeded, failed, …; and 2xx to 5xx."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                said, _ = await self._process.communicate()
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        lines = [line for line in said.decode().splitlines() if line.startswith(("requests: ", "status codes: "))]
        assert len(lines) == 2, said.decode()
        return {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", " ".join(lines))}


async def until_asked(gateway: Gateway, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(gateway.origin.requests) < count:  # noqa: ASYNC110 - the origin announces nothing
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_request_fails_while_the_configuration_changes(
    scheme: str, tmp_path: Path, record_property: Record
) -> None:
    async with gateway(tmp_path) as running:
        load = Load(running, scheme)
        await load.start()
        for number in range(1, 6):
            await until_asked(running, number * 1500)
            running.publish(f"version {number}")
        result = await load.result()
        note(record_property, f"h2load_reload_{scheme}", **result, versions=len(running.versions()))
        assert (result["succeeded"], result["2xx"], result["failed"]) == (REQUESTS, REQUESTS, 0)
        assert len(running.versions()) > 1
        assert len(running.origin.requests) == REQUESTS


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_every_request_that_was_sent_is_answered_while_it_drains(
    scheme: str, tmp_path: Path, record_property: Record
) -> None:
    """h2load opens no second connection: what it had not sent when GOAWAY came it calls failed, and where it was about
    to be sent, started. The proxy answers whatever reaches it."""
    async with gateway(tmp_path) as running:
        load = Load(running, scheme)
        await load.start()
        await until_asked(running, 1000)
        drain = f"http://127.0.0.1:{running.proxy.ports['admin']}/drain_listeners"
        await asyncio.to_thread(lambda: urllib.request.urlopen(drain, data=b"", timeout=PATIENCE_S).read())
        result = await load.result()
        note(record_property, f"h2load_drain_{scheme}", **result, reached=len(running.origin.requests))
        assert result["started"] == result["done"]
        assert 1000 <= result["succeeded"] < REQUESTS
        reached = await metric(running.proxy, "istio_requests_total")
        assert result["succeeded"] == result["2xx"] == len(running.origin.requests) == reached
