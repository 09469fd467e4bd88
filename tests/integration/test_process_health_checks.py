import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from meshproxy.control.health_checks import HealthChecks, succeeds
from meshproxy.model.cluster import Cluster, HealthCheck
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints


class App:
    """An application whose answer a test may change."""

    def __init__(self) -> None:
        self.answer = b"HTTP/1.1 200 OK\r\n\r\n"
        self.requests: list[bytes] = []
        self.released = asyncio.Event()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if not self.answer:
                await self.released.wait()
            writer.write(self.answer)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def application() -> AsyncIterator[App]:
    app = App()
    server = await asyncio.start_server(app.serve, "127.0.0.1", 0)
    app.port = server.sockets[0].getsockname()[1]
    yield app
    app.released.set()
    server.close()
    await server.wait_closed()


HTTP = HealthCheck(kind="http", path="/ready", interval_s=0.001, timeout_s=5.0)


def at(port: int) -> Endpoint:
    return Endpoint(address="127.0.0.1", port=port)


async def test_an_endpoint_is_asked_as_the_probe_says() -> None:
    async with application() as app:
        assert await succeeds(HTTP, at(app.port))
        assert app.requests[0].startswith(b"GET /ready HTTP/1.1\r\n")
        assert await succeeds(HealthCheck(kind="tcp"), at(app.port))
        assert await succeeds(HealthCheck(kind="tcp", port=app.port), at(1))
        app.answer = b"HTTP/1.1 500 Oops\r\n\r\n"
        assert not await succeeds(HTTP, at(app.port))


async def test_no_answer_garbage_or_nobody_there_is_a_failure() -> None:
    async with application() as app:
        app.answer = b"\x15\x03\x01" * 5000
        assert not await succeeds(HTTP, at(app.port))
        assert not await succeeds(HealthCheck(kind="http", scheme="https", timeout_s=5.0), at(app.port))
        app.answer = b""
        assert not await succeeds(HealthCheck(kind="http", timeout_s=0.01), at(app.port))
        port = app.port
    assert not await succeeds(HTTP, at(port))
    assert not await succeeds(HealthCheck(kind="tcp"), at(port))


async def test_checks_go_on_until_the_cluster_is_followed_no_more() -> None:
    results: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue()
    checks = HealthChecks(
        lambda cluster, endpoint, _, is_success: results.put_nowait((cluster, endpoint, is_success)), lambda: 0.0
    )
    async with application() as app, asyncio.timeout(5):
        group = LocalityEndpoints(endpoints=(at(app.port),))
        cluster = Cluster(
            name="a",
            key="a",
            service_host="a.example",
            service_name="a",
            service_namespace="default",
            port=80,
            health_check=HTTP,
        )
        checks.follow([(cluster, (group,))])
        assert [await results.get() for _ in range(3)] == [("a", f"127.0.0.1:{app.port}", True)] * 3
        app.answer = b"HTTP/1.1 503 No\r\n\r\n"
        while (await results.get())[2]:
            pass
        checking = [task for task in asyncio.all_tasks() if "_keep_checking" in repr(task)]
        assert len(checking) == 1
        checks.follow([])
        await asyncio.wait(checking)
        assert checking[0].cancelled()
