"""A real Envoy as the proxy at the other end of HTTP/2, as Istio configures it: in plaintext, and with mutual TLS."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from meshproxy.model.route import Route, RouteTable, VirtualHost, WeightedCluster
from tests.differential.envoy_config import bootstrap
from tests.differential.peers import envoy_path, start_envoy
from tests.support.certificates import Authority, Leaf
from tests.support.client import CHUNKED, Client, get, post
from tests.support.http2_origin import H2Answer, H2Origin, H2Request
from tests.support.live_worker import LiveWorker, until

pytestmark = pytest.mark.peer("envoy")

AUTHORITY = Authority()
EDGE = "spiffe://cluster.local/ns/default/sa/edge"
RSU = "spiffe://cluster.local/ns/default/sa/rsu"
BODY = bytes(range(256)) * 4096
"""1 MiB."""
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
_HTTP = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def _common(leaf: Leaf, peer: str, alpn: tuple[str, ...]) -> dict[str, Any]:
    """Our certificate, and who the other side has to be."""
    name = {"san_type": "URI", "matcher": {"exact": peer}}
    return {
        "tls_certificates": [
            {
                "certificate_chain": {"inline_string": leaf.chain_pem.decode()},
                "private_key": {"inline_string": leaf.key_pem.decode()},
            }
        ],
        "validation_context": {
            "trusted_ca": {"inline_string": leaf.roots_pem.decode()},
            "match_typed_subject_alt_names": [name],
        },
        "alpn_protocols": list(alpn),
    }


async def envoy(
    stack: contextlib.AsyncExitStack,
    tmp_path: Path,
    port: int,
    *,
    accepts: Leaf | None = None,
    shows: Leaf | None = None,
) -> int:
    """Port of an Envoy that sends all over HTTP/2 to a port.

    accepts: it is rsu, and asks for edge's certificate. shows: it is edge, and asks for rsu's.
    """
    route = Route(clusters=(WeightedCluster(cluster_key="a"),))
    table = RouteTable(name="all", virtual_hosts=(VirtualHost(name="all", domains=("*",), routes=(route,)),))
    config = bootstrap(table, {"a": (port,)})
    (listener,), (cluster,) = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    (chain,) = listener["filter_chains"]
    chain["filters"][0]["typed_config"]["http_protocol_options"] = {"enable_trailers": True}
    cluster["typed_extension_protocol_options"] = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": _HTTP,
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    if accepts is not None:
        tls = {"common_tls_context": _common(accepts, EDGE, ("h2", "http/1.1")), "require_client_certificate": True}
        chain["transport_socket"] = {"name": "tls", "typed_config": {"@type": _TLS + "DownstreamTlsContext", **tls}}
    if shows is not None:
        tls = {"common_tls_context": _common(shows, RSU, ("istio-h2", "istio", "h2")), "sni": "a.example"}
        cluster["transport_socket"] = {"name": "tls", "typed_config": {"@type": _TLS + "UpstreamTlsContext", **tls}}
    return await start_envoy(stack, envoy_path(), tmp_path, json.dumps(config))


class Mesh(NamedTuple):
    port: int
    origin: H2Origin
    live: LiveWorker


def give(live: LiveWorker, workload_id: str, account: str) -> None:
    leaf = AUTHORITY.leaf("default", account)
    live.put(m.PutWorkload(live.workload(workload_id, account)))
    live.worker.on_message(m.PutCertificates(workload_id, leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None)


@contextlib.asynccontextmanager
async def envoy_first(tmp_path: Path, is_mtls: bool) -> AsyncIterator[Mesh]:
    """client → Envoy (edge) → meshproxy's inbound listener (rsu) → application."""
    async with contextlib.AsyncExitStack() as stack:
        origin = await stack.enter_async_context(H2Origin())
        live = await stack.enter_async_context(LiveWorker())
        give(live, "default/rsu", "rsu")
        inner = live.listen(
            live.cluster([("127.0.0.1", origin.port)], "inbound|80||", speaks_http2=True),
            direction=Direction.INBOUND,
            mtls=MtlsMode.STRICT if is_mtls else MtlsMode.DISABLE,
            workload_id="default/rsu",
        )
        shows = AUTHORITY.leaf("default", "edge") if is_mtls else None
        yield Mesh(await envoy(stack, tmp_path, inner, shows=shows), origin, live)


@contextlib.asynccontextmanager
async def envoy_second(tmp_path: Path, is_mtls: bool) -> AsyncIterator[Mesh]:
    """client → meshproxy's outbound listener (edge) → Envoy (rsu) → application."""
    async with contextlib.AsyncExitStack() as stack:
        origin = await stack.enter_async_context(H2Origin())
        live = await stack.enter_async_context(LiveWorker())
        give(live, "default/edge", "edge")
        accepts = AUTHORITY.leaf("default", "rsu") if is_mtls else None
        inner = await envoy(stack, tmp_path, origin.port, accepts=accepts)
        cluster = live.cluster(
            [("127.0.0.1", inner)],
            speaks_http2=True,
            tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL if is_mtls else TlsMode.DISABLE),
            endpoint={"speaks_mtls": is_mtls, "spiffe_ids": (RSU,)},
        )
        yield Mesh(live.listen(cluster, workload_id="default/edge"), origin, live)


BOTH = pytest.mark.parametrize("mesh", [envoy_first, envoy_second], ids=["envoy_first", "envoy_second"])
WITH_AND_WITHOUT = pytest.mark.parametrize("is_mtls", [False, True], ids=["plaintext", "mtls"])


@BOTH
@WITH_AND_WITHOUT
async def test_requests_bodies_and_trailers_pass(mesh: Any, is_mtls: bool, tmp_path: Path) -> None:
    def echo(seen: H2Request) -> H2Answer:
        return H2Answer(seen.body, [(b"x-from", b"origin")], trailers=[(b"x-sum", b"1"), *seen.trailers])

    async with mesh(tmp_path, is_mtls) as (port, origin, live), Client(port) as client:
        origin.answer = echo
        answer = await client.ask(get("/path?q=1", "X-Mine: yes"))
        assert (answer.status, answer.body, answer.header(b"x-from")) == (200, b"", b"origin")
        assert (await client.ask(post(BODY))).body == BODY
        chunked = (
            get("/", CHUNKED, "TE: trailers", method="POST") + b"100000\r\n" + BODY + b"\r\n0\r\nX-End: yes\r\n\r\n"
        )
        answer = await client.ask(chunked)
        assert answer.body == BODY
        assert (b"x-sum", b"1") in answer.trailers
        seen = origin.requests
        assert (seen[0].header(b":path"), seen[0].header(b"x-mine")) == (b"/path?q=1", b"yes")
        assert seen[2].trailers == [(b"x-end", b"yes")]
        assert len(origin.connections) == 1
        if is_mtls and mesh is envoy_first:
            assert f"URI={EDGE}".encode() in (seen[0].header(b"x-forwarded-client-cert") or b"")
            assert live.requests(connection_security_policy="mutual_tls", source_principal=EDGE) == 3
        assert live.worker.state.counters.protocol_errors == {}


@BOTH
@WITH_AND_WITHOUT
async def test_a_hundred_requests_share_one_connection(mesh: Any, is_mtls: bool, tmp_path: Path) -> None:
    async with mesh(tmp_path, is_mtls) as (port, origin, live), contextlib.AsyncExitStack() as stack:
        origin.answer = lambda _: None
        clients = [await stack.enter_async_context(Client(port)) for _ in range(100)]
        for number, client in enumerate(clients):
            client.send(get(f"/{number}"))
        await until(lambda: sum(seen.is_whole for seen in origin.requests) == 100)
        for connection in origin.connections:
            for seen in list(connection.open.values()):
                connection.respond(seen, H2Answer(seen.header(b":path") or b""))
            connection.flush()
        answers = await asyncio.gather(*(client.answer() for client in clients))
        assert [answer.body for answer in answers] == [b"/%d" % number for number in range(100)]
        between = live.open_downstreams() if mesh is envoy_first else live.open_upstreams()
        assert between == 1
