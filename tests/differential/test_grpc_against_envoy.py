"""gRPC and gRPC-Web calls through the real Envoy, configured as Istio does it, and through us: the same answers."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from meshproxy.model.cluster import Protocol
from meshproxy.model.route import (
    DirectResponse,
    MatchKind,
    RetryPolicy,
    Route,
    RouteMatch,
    RouteTable,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from tests.differential.envoy_config import bootstrap
from tests.differential.peers import envoy_path, start_envoy
from tests.support.grpc_app import SERVICE, GrpcApp
from tests.support.http2_client import Http2Client, Response, data_frame, headers_frame, request
from tests.support.http2_origin import H2Answer, H2Origin
from tests.support.live_worker import LiveWorker
from tests.support.raw_server import unused_port

HTTP2 = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
TYPE = "type.googleapis.com/"
RETRIED, NOT_TOLD = b"retried and the latest reset reason", b"reset reason"
"""docs/differences.md: an answer of ours does not tell of retries."""
WEB = "application/grpc-web+proto"
DIFFERS = {
    (WEB, "/none/x"): "Envoy gives no grpc-status where its answer has no body",
    (WEB, "/html/x"): "Envoy keeps a foreign answer's body back, and makes it grpc-message",
}
NOT_COMPARED = (b"date", b"server", b"x-envoy-upstream-service-time")


def _prefix(value: str) -> RouteMatch:
    return RouteMatch(path=StringMatch(MatchKind.PREFIX, value))


def _to(cluster: str) -> tuple[WeightedCluster, ...]:
    return (WeightedCluster(cluster_key=cluster),)


STATUSES = (400, 401, 403, 404, 408, 429, 500, 502, 503, 504)
RETRY = RetryPolicy()
ROUTES = (
    *(
        Route(match=_prefix(f"/{status}/"), direct_response=DirectResponse(status=status, body=b"50 % of it"))
        for status in STATUSES
    ),
    *(Route(match=_prefix(f"/{name}/"), clusters=_to(name), retry=RETRY) for name in ("dead", "nobody", "html")),
    Route(match=_prefix(f"/{SERVICE}/"), clusters=_to("app"), retry=RETRY),
)
TABLE = RouteTable(name="t", virtual_hosts=(VirtualHost(name="all", domains=("a.example",), routes=ROUTES),))


@contextlib.asynccontextmanager
async def both(directory: Path) -> AsyncIterator[tuple[int, int]]:
    """Envoy's port, and ours."""
    async with contextlib.AsyncExitStack() as stack:
        app = await stack.enter_async_context(GrpcApp())
        html = H2Answer(b"<html>", [(b"content-type", b"text/html")], status=404)
        origin = await stack.enter_async_context(H2Origin(lambda seen: html if seen.is_whole else None))
        live = await stack.enter_async_context(LiveWorker())
        clusters = {"app": (app.port,), "html": (origin.port,), "dead": (unused_port(),), "nobody": ()}
        config = bootstrap(TABLE, clusters)
        for cluster in config["static_resources"]["clusters"]:
            cluster["typed_extension_protocol_options"] = {
                HTTP2: {"@type": TYPE + HTTP2, "explicit_http_config": {"http2_protocol_options": {}}}
            }
        manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        web = TYPE + "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"
        manager["http_filters"].insert(0, {"name": "envoy.filters.http.grpc_web", "typed_config": {"@type": web}})
        envoy = await start_envoy(stack, envoy_path(), directory, json.dumps(config))
        for name, ports in clusters.items():
            live.cluster([("127.0.0.1", port) for port in ports], name, protocol=Protocol.GRPC_WEB, speaks_http2=True)
        ours = live.listen("app", routes=ROUTES, protocol=Protocol.GRPC_WEB)
        yield envoy, ours


async def call(port: int, path: str, kind: str, body: bytes) -> Response:
    async with Http2Client(port, acks=True) as client:
        await client.handshake()
        head = request(
            path, (b"content-type", kind.encode()), (b"accept", kind.encode()), (b"te", b"trailers"), method="POST"
        )
        client.send(headers_frame(1, head, end_stream=False), data_frame(1, body))
        return await client.response(1)


def seen(response: Response) -> dict[str, Any]:
    fields = {name: value for name, value in response.headers if name not in NOT_COMPARED}
    if (message := fields.get(b"grpc-message")) is not None:
        fields[b"grpc-message"] = message.replace(RETRIED, NOT_TOLD)
    if not response.body and fields.get(b"content-length") == b"0":
        del fields[b"content-length"]
    return {"status": response.status, "fields": fields, "body": response.body, "trailers": dict(response.trailers)}


MESSAGE = b"\0\0\0\0\x09NOT_FOUND"
PATHS = [
    *(f"/{status}/x" for status in STATUSES),
    *("/dead/x", "/nobody/x", "/html/x", "/none/x", f"/{SERVICE}/Unary", f"/{SERVICE}/Fail", f"/{SERVICE}/Nothing"),
]


@pytest.mark.peer("envoy")
@pytest.mark.parametrize("kind", ["application/grpc", WEB])
async def test_envoy_and_we_answer_alike(tmp_path: Path, kind: str) -> None:
    async with both(tmp_path) as ports:
        differences = []
        for path in PATHS:
            theirs, ours = [seen(await call(port, path, kind, MESSAGE)) for port in ports]
            if (theirs != ours) is not ((kind, path) in DIFFERS):
                differences.append(f"{path}\n  Envoy {theirs}\n  ours  {ours}")
        assert not differences, "\n".join(differences)
