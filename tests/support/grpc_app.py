"""A gRPC server of the real grpcio, and calls of its methods; messages are plain bytes, so nothing is generated.

async with GrpcApp() as app: …               # app.port; app.calls tells what came
async with channel(port) as through: answer = await unary(through, b"hello")
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio

SERVICE = "test.Echo"
AUTHORITY = "a.example"
BIG: Sequence[tuple[str, Any]] = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
)
Metadata = tuple[tuple[str, str], ...]


@dataclass
class Called:
    """One call as the server saw it."""

    method: str
    metadata: dict[str, str]
    left_s: float | None
    """Time to its deadline when it came; None without one."""
    is_cancelled: asyncio.Event = field(default_factory=asyncio.Event)


class GrpcApp:
    """Methods: Unary (echoes), ClientStream (joins), ServerStream (its request's letters), Bidi (echoes each),
    Fail (a status instead of a message), FailLate (a status after one message), Hang (until it is cancelled).
    `fails`, while not empty: Unary gives these statuses first. `serving`: service → HealthCheckResponse's status."""

    def __init__(self) -> None:
        self.calls: list[Called] = []
        self.fails: list[grpc.StatusCode] = []
        self.serving: dict[str, int] = {}
        self.started = asyncio.Event()
        """Some call has come."""

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(options=BIG)
        rpcs = {
            "Unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "ClientStream": grpc.stream_unary_rpc_method_handler(self._client_stream),
            "ServerStream": grpc.unary_stream_rpc_method_handler(self._server_stream),
            "Bidi": grpc.stream_stream_rpc_method_handler(self._bidi),
            "Fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "FailLate": grpc.unary_stream_rpc_method_handler(self._fail_late),
            "Hang": grpc.unary_unary_rpc_method_handler(self._hang),
        }
        health = {"Check": grpc.unary_unary_rpc_method_handler(self._check)}
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, rpcs),
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),
            )
        )
        self.port: int = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    def _called(self, method: str, context: Any) -> Called:
        call = Called(method, dict(context.invocation_metadata()), context.time_remaining())
        self.calls.append(call)
        self.started.set()
        return call

    async def _unary(self, request: bytes, context: Any) -> bytes:
        self._called("Unary", context)
        if self.fails:
            await context.abort(self.fails.pop(0), "as told")
        context.set_trailing_metadata((("x-trailing", "yes"),))
        return request

    async def _client_stream(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        self._called("ClientStream", context)
        return b"".join([request async for request in requests])

    async def _server_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self._called("ServerStream", context)
        for letter in request:
            yield bytes([letter])

    async def _bidi(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self._called("Bidi", context)
        async for request in requests:
            yield request

    async def _fail(self, request: bytes, context: Any) -> bytes:
        self._called("Fail", context)
        context.set_trailing_metadata((("x-why", "told-so"), ("details-bin", b"\x00\x01\xff")))
        await context.abort(grpc.StatusCode(_code(request)), "no: 100 % of it, ü")
        raise AssertionError

    async def _fail_late(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self._called("FailLate", context)
        yield b"one"
        await context.abort(_code(request), "after one")

    async def _check(self, request: bytes, context: Any) -> bytes:
        self._called("Check", context)
        status = self.serving.get(request[2:].decode())
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return b"\x08%c" % status

    async def _hang(self, request: bytes, context: Any) -> bytes:
        call = self._called("Hang", context)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            call.is_cancelled.set()
            raise
        return b""


def _code(request: bytes) -> grpc.StatusCode:
    return grpc.StatusCode[request.decode()]


def channel(port: int) -> grpc.aio.Channel:
    """To a proxy, for what it knows as AUTHORITY; without grpcio's own retries."""
    options = [*BIG, ("grpc.default_authority", AUTHORITY), ("grpc.enable_retries", 0)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)


def method(through: grpc.aio.Channel, name: str) -> Callable[..., Any]:
    """A call of a method by name: given a request, or an iterator of them."""
    kinds = {
        "ClientStream": through.stream_unary,
        "ServerStream": through.unary_stream,
        "FailLate": through.unary_stream,
        "Bidi": through.stream_stream,
    }
    return kinds.get(name, through.unary_unary)(f"/{SERVICE}/{name}")


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """(code, details) of a call that is not expected to succeed."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("it succeeded")
