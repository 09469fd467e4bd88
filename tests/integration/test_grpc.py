"""gRPC, client and server of grpcio, through one proxy and through two with mTLS between."""

import asyncio
from collections.abc import Callable

import grpc
import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import Protocol, TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from tests.support.certificates import Authority
from tests.support.grpc_app import GrpcApp, channel, method, status_of
from tests.support.live_worker import LiveWorker, until

Through = Callable[[LiveWorker, GrpcApp], int]


def _one(live: LiveWorker, app: GrpcApp) -> int:
    cluster = live.cluster([("127.0.0.1", app.port)], protocol=Protocol.GRPC, speaks_http2=True)
    return live.listen(cluster, protocol=Protocol.GRPC)


def _two(live: LiveWorker, app: GrpcApp) -> int:
    """The caller's listener speaks mTLS to the answerer's, which speaks plaintext to the app."""
    authority = Authority()
    for name in ("caller", "answerer"):
        leaf = authority.leaf("default", name)
        live.put(m.PutWorkload(live.workload(f"default/{name}", name)))
        certificates = m.PutCertificates(f"default/{name}", leaf.chain_pem, leaf.key_pem, leaf.roots_pem)
        live.worker.on_message(certificates, None)
    grpc_fields = {"protocol": Protocol.GRPC, "speaks_http2": True}
    local = live.cluster([("127.0.0.1", app.port)], "inbound|80||", **grpc_fields)
    inbound = live.listen(
        local,
        direction=Direction.INBOUND,
        mtls=MtlsMode.STRICT,
        workload_id="default/answerer",
        protocol=Protocol.GRPC,
    )
    remote = live.cluster(
        [("127.0.0.1", inbound)],
        tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL),
        endpoint={"speaks_mtls": True, "spiffe_ids": ("spiffe://cluster.local/ns/default/sa/answerer",)},
        **grpc_fields,
    )
    return live.listen(remote, workload_id="default/caller", protocol=Protocol.GRPC)


@pytest.fixture(params=[_one, _two], ids=["one_proxy", "two_proxies_and_mtls"])
def through(request: pytest.FixtureRequest) -> Through:
    """Gives the port that leads to an app."""
    found: Through = request.param
    return found


async def test_unary(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        call = method(client, "Unary")(b"hello", metadata=(("x-asked", "so"),))
        assert await call == b"hello"
        assert dict(await call.trailing_metadata())["x-trailing"] == "yes"
        assert app.calls[0].metadata["x-asked"] == "so"


async def test_a_client_streams(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        assert await method(client, "ClientStream")(iter([b"a" * 1000, b"", b"b"])) == b"a" * 1000 + b"b"


async def test_a_server_streams(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        assert [piece async for piece in method(client, "ServerStream")(b"abc")] == [b"a", b"b", b"c"]


async def test_both_stream_and_each_message_is_answered_before_the_next_is_sent(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        call = method(client, "Bidi")()
        for number in range(20):
            await call.write(b"%d" % number)
            assert await call.read() == b"%d" % number
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("name", ["Unary", "Bidi"])
async def test_messages_of_4_mib(through: Through, name: str) -> None:
    message = bytes(range(256)) * (4 << 12)
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        if name == "Unary":
            assert await method(client, name)(message) == message
        else:
            assert [piece async for piece in method(client, name)(iter([message] * 3))] == [message] * 3


async def test_a_hundred_calls_at_once(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        unary = method(client, "Unary")
        messages = [b"%d" % number for number in range(100)]
        assert await asyncio.gather(*(unary(message) for message in messages)) == messages


async def test_status_details_and_metadata_survive_where_they_come_alone(through: Through) -> None:
    """Trailers-only: the status is in the answer's only field block."""
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        call = method(client, "Fail")(b"FAILED_PRECONDITION")
        assert await status_of(call) == (grpc.StatusCode.FAILED_PRECONDITION, "no: 100 % of it, ü")
        trailing = dict(await call.trailing_metadata())
        assert (trailing["x-why"], trailing["details-bin"]) == ("told-so", b"\x00\x01\xff")


async def test_status_and_details_survive_after_a_message(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        call = method(client, "FailLate")(b"DATA_LOSS")
        assert await call.read() == b"one"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.DATA_LOSS, "after one")


async def test_a_method_that_the_server_does_not_have(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        assert (await status_of(method(client, "Nothing")(b"")))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_cancelling_reaches_the_server(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        call = method(client, "Hang")(b"")
        await app.started.wait()
        call.cancel()
        await app.calls[0].is_cancelled.wait()
        await until(lambda: live.requests(response_code="0", response_flags="DC", reporter="source") == 1)


async def test_a_deadline_reaches_the_server_and_ends_the_call(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        call = method(client, "Hang")(b"", timeout=0.5)
        assert (await status_of(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        left_s = app.calls[0].left_s
        assert left_s is not None and left_s <= 0.51  # gRPC rounds up
        await app.calls[0].is_cancelled.wait()


async def test_a_call_without_a_deadline_arrives_without_one(through: Through) -> None:
    async with GrpcApp() as app, LiveWorker() as live, channel(through(live, app)) as client:
        await method(client, "Unary")(b"")
        assert app.calls[0].left_s is None
