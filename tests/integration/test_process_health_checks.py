import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from meshproxy.control.health_checks import HealthChecks, succeeds
from meshproxy.model.cluster import Cluster, HealthCheck
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints
from tests.support.grpc_app import GrpcApp
from tests.support.http2_origin import H2Answer, H2Origin

SERVING, NOT_SERVING = 1, 2


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


async def test_a_grpc_server_is_asked_whether_it_serves() -> None:
    grpc = HealthCheck(kind="grpc", timeout_s=5.0)
    of_service = HealthCheck(kind="grpc", service="test.Echo", timeout_s=5.0)
    async with GrpcApp() as app:
        assert not await succeeds(grpc, at(app.port)), "it knows of no service"
        app.serving = {"": SERVING, "test.Echo": NOT_SERVING}
        assert await succeeds(grpc, at(app.port))
        assert await succeeds(HealthCheck(kind="grpc", port=app.port, timeout_s=5.0), at(1))
        assert not await succeeds(of_service, at(app.port))
        app.serving["test.Echo"] = SERVING
        assert await succeeds(of_service, at(app.port))
        assert app.calls[0].metadata["user-agent"] == "meshproxy-health-check"
    assert not await succeeds(grpc, at(app.port))


@pytest.mark.parametrize(
    "answer",
    [
        H2Answer(b"\0\0\0\0\x02\x08\x01", trailers=[(b"grpc-status", b"0")]),
        H2Answer(b"\0\0\0\0\x02\x08\x01", trailers=[(b"grpc-status", b"14")]),
        H2Answer(b"\0\0\0\0\x02\x08\x01"),
        H2Answer(b"", [(b"grpc-status", b"0")], ends_with_head=True),
        H2Answer(b"\0\0\0\0\x02\x08\x01", trailers=[(b"grpc-status", b"0")], status=503),
        H2Answer(b"x" * 100_000, trailers=[(b"grpc-status", b"0")]),
        H2Answer(resets=2),
    ],
)
async def test_only_serving_with_status_ok_is_success(answer: H2Answer) -> None:
    check = HealthCheck(kind="grpc", timeout_s=5.0)
    async with H2Origin(lambda seen: answer if seen.is_whole else None) as origin:
        is_good = answer.trailers == [(b"grpc-status", b"0")] and answer.status == 200 and len(answer.body) == 7
        assert await succeeds(check, at(origin.port)) is is_good
        assert origin.requests[0].body == b"\0\0\0\0\0"


async def test_what_speaks_no_http2_fails_a_grpc_check_at_once() -> None:
    async with application() as app:
        app.answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        assert not await succeeds(HealthCheck(kind="grpc", timeout_s=60.0), at(app.port))


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
