"""The whole proxy under load while its processes and its configuration change: not one request may fail."""

import asyncio
import os
import signal
from pathlib import Path

from tests.support.origin import Origin
from tests.support.proxy_process import ProxyProcess, free_port

CONNECTIONS = 4


def mesh(port: int, upstream_port: int, comment: str) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: a
spec:
  hosts: [a.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports:
  - {{number: {port}, name: http, protocol: HTTP}}
  endpoints:
  - {{address: 127.0.0.1, ports: {{http: {upstream_port}}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: a
spec:
  hosts: [a.example]
  http:
  - headers: {{response: {{set: {{x-version: "{comment}"}}}}}}
    route:
    - destination: {{host: a.example}}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata:
  name: default
spec:
  egress:
  - port: {{number: {port}, protocol: HTTP, name: http}}
    bind: 127.0.0.1
    captureMode: NONE
    hosts: ["*/*"]
"""


class Load:
    """Keep-alive connections that ask one request after the other; `versions` is what they saw."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests = 0
        self.failures: list[str] = []
        self.versions: set[str] = set()
        self.connections = 0
        self.is_over = False
        self._progress = asyncio.Event()

    async def run(self) -> None:
        while not self.is_over:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.connections += 1
            try:
                while not self.is_over and await self._ask(reader, writer):
                    pass
            except (OSError, asyncio.IncompleteReadError) as error:
                self.failures.append(repr(error))
            finally:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False where the proxy asks for another connection."""
        writer.write(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        body = await reader.readexactly(2)
        if not head.startswith("http/1.1 200 ") or body != b"ok":
            self.failures.append(head.partition("\r")[0])
        self.requests += 1
        self.versions.update(line[11:] for line in head.split("\r\n") if line.startswith("x-version: "))
        self._progress.set()
        return "\r\nconnection: close" not in head

    async def sees(self, version: str) -> None:
        async with asyncio.timeout(10):
            while version not in self.versions:
                self._progress.clear()
                await self._progress.wait()


async def test_no_request_fails_across_reloads_and_a_killed_control_process(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf" / "mesh.yaml"
    port = free_port()
    async with Origin() as origin:

        def write(version: str) -> None:
            (tmp_path / "new").write_text(mesh(port, origin.port, version))
            os.replace(tmp_path / "new", file)

        write("first")
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            load = Load(port)
            jobs = [asyncio.create_task(load.run()) for _ in range(CONNECTIONS)]
            await load.sees("first")
            for count in range(20):
                write(f"reload-{count}")
                await load.sees(f"reload-{count}")
            proxy.process.send_signal(signal.SIGHUP)
            os.kill(proxy.children()["mesh-control"], signal.SIGKILL)
            await asyncio.to_thread(proxy.wait_for, "ready: ", 2)
            write("last")
            await load.sees("last")
            load.is_over = True
            await asyncio.gather(*jobs)
    assert load.failures == []
    assert load.connections == CONNECTIONS  # none was closed, not even in good order


async def test_no_request_fails_while_it_drains(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    port = free_port()
    async with Origin() as origin:
        (tmp_path / "conf" / "mesh.yaml").write_text(mesh(port, origin.port, "first"))
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            load = Load(port)
            jobs = [asyncio.create_task(load.run()) for _ in range(CONNECTIONS)]
            await load.sees("first")
            proxy.process.send_signal(signal.SIGTERM)
            # Each connection is told to close; the next one is refused, which ends its job.
            done = await asyncio.gather(*jobs, return_exceptions=True)
            assert [type(outcome) for outcome in done] == [ConnectionRefusedError] * CONNECTIONS
            assert await asyncio.to_thread(proxy.wait_for_end) == 0
    assert load.failures == []
