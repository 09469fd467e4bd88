"""What a route does to a message on its way, and what it answers by itself: seen at the upstream and downstream."""

import uuid
from typing import Any

import pytest

from meshproxy.model.listener import Direction
from meshproxy.model.route import (
    DirectResponse,
    HeaderOps,
    MatchKind,
    Redirect,
    RetryPolicy,
    Rewrite,
    Route,
    RouteMatch,
    StringMatch,
    WeightedCluster,
)
from tests.support.client import Client, get, post
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin, Seen

NOTHING = HeaderOps()


def to(cluster: str, *, request: HeaderOps = NOTHING, response: HeaderOps = NOTHING, **fields: Any) -> Route:
    target = WeightedCluster(cluster_key=cluster, request_headers=request, response_headers=response)
    return Route(clusters=(target,), **fields)


def prefix(value: str) -> RouteMatch:
    return RouteMatch(path=StringMatch(MatchKind.PREFIX, value))


def values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


async def test_request_operations_of_route_and_destination_reach_the_upstream() -> None:
    ops = HeaderOps(set=(("x-set", "route"),), add=(("x-add", "route"),), remove=("x-secret",))
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        route = to(cluster, request=HeaderOps(add=(("x-add", "destination"),)), request_headers=ops)
        async with Client(live.listen(cluster, routes=(route,))) as client:
            data = post(b"body", "X-Set: a", "x-set: b", "X-Add: own", "X-SECRET: 1", "X-Other: 2")
            assert (await client.ask(data)).status == 200
        seen = origin.requests[0]
        assert values(seen.headers, b"x-set") == [b"route"]
        assert sorted(values(seen.headers, b"x-add")) == [b"destination", b"own", b"route"]
        assert seen.header(b"x-secret") is None
        assert (seen.header(b"x-other"), seen.header(b"content-length"), seen.body) == (b"2", b"4", b"body")


async def test_response_operations_reach_the_downstream_and_leave_the_framing() -> None:
    def answer(seen: Seen) -> bytes:
        return b"HTTP/1.1 200 OK\r\nServer: own\r\nX-Debug: 1\r\nVary: a\r\nContent-Length: 2\r\n\r\nok"

    ops = HeaderOps(set=(("server", "mesh"),), add=(("vary", "b"),), remove=("x-debug", "content-length"))
    async with Origin(answer) as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(to(cluster, response_headers=ops),))) as client:
            for _ in range(2):
                got = await client.ask(get())
                assert (got.header(b"server"), got.header(b"x-debug"), got.body) == (b"mesh", None, b"ok")
                assert values(got.headers, b"vary") == [b"a", b"b"]
                assert got.header(b"content-length") == b"2"


async def test_a_rewrite_changes_path_and_authority_and_keeps_the_query() -> None:
    rewrite = Rewrite(path="/new", authority="b.example")
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(to(cluster, match=prefix("/old"), rewrite=rewrite),))) as client:
            await client.ask(get("/old/page?q=/old"))
            assert (await client.ask(get("/other"))).status == 404
        (seen,) = origin.requests
        assert seen.target == b"/new/page?q=/old"
        assert values(seen.headers, b"host") == [b"b.example"]
        assert seen.header(b"x-envoy-original-path") == b"/old/page?q=/old"


@pytest.mark.parametrize(
    ("redirect", "status", "location"),
    [
        (Redirect(path="/home"), 301, b"http://a.example/home?q=1"),
        (Redirect(path="/home?q=2"), 301, b"http://a.example/home?q=2"),
        (Redirect(prefix="/new", code=307), 307, b"http://a.example/new/page?q=1"),
        (Redirect(scheme="https", authority="b.example", code=302), 302, b"https://b.example/old/page?q=1"),
        (Redirect(port=8443, scheme="https", code=308), 308, b"https://a.example:8443/old/page?q=1"),
    ],
)
async def test_a_redirect_is_answered_without_an_upstream(redirect: Redirect, status: int, location: bytes) -> None:
    async with LiveWorker() as live:
        route = Route(match=prefix("/old"), redirect=redirect)
        async with Client(live.listen("nowhere", routes=(route,))) as client:
            for _ in range(2):
                got = await client.ask(get("/old/page?q=1"))
                assert (got.status, got.header(b"location"), got.body) == (status, location, b"")
                assert got.header(b"content-length") == b"0"
        assert live.requests(response_code=str(status), response_flags="-") == 2


async def test_a_direct_response_is_answered_with_its_body_and_the_routes_fields() -> None:
    ops = HeaderOps(add=(("x-why", "maintenance"),))
    async with LiveWorker() as live:
        route = Route(direct_response=DirectResponse(status=503, body=b"be back soon"), response_headers=ops)
        async with Client(live.listen("nowhere", routes=(route,))) as client:
            for _ in range(2):
                got = await client.ask(get())
                assert (got.status, got.body, got.header(b"x-why")) == (503, b"be back soon", b"maintenance")


async def test_the_request_id_is_one_for_all_attempts_and_another_for_each_request() -> None:
    async with Origin(lambda seen: b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n") as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        retry = RetryPolicy(attempts=1, on=frozenset({"5xx"}), base_interval_s=0.0)
        ops = HeaderOps(set=(("x-set", "1"),))
        async with Client(live.listen(cluster, routes=(to(cluster, retry=retry, request_headers=ops),))) as client:
            await client.ask(get())
            await client.ask(get())
        ids = [values(seen.headers, b"x-request-id") for seen in origin.requests]
        assert ids[0] == ids[1] != ids[2] == ids[3]
        for (request_id,) in ids:
            assert uuid.UUID(request_id.decode()).version == 4


@pytest.mark.parametrize("direction", [Direction.OUTBOUND, Direction.INBOUND])
async def test_every_answer_of_an_upstream_tells_its_time_once(direction: Direction) -> None:
    async with Origin(lambda seen: b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n") as origin, LiveWorker() as live:
        port = live.listen(live.cluster([("127.0.0.1", origin.port)]), direction=direction)
        async with Client(port) as client:
            assert int((await client.ask(get())).header(b"x-envoy-upstream-service-time") or b"-1") >= 0


# ── what the proxy adds is there before the route's operations, as in Envoy ──


@pytest.mark.parametrize("attempts", [0, 1])
async def test_a_route_may_replace_and_remove_what_the_proxy_adds_to_a_request(attempts: int) -> None:
    ops = HeaderOps(set=(("x-forwarded-proto", "https"), ("x-request-id", "fixed")), remove=("x-envoy-attempt-count",))
    retry = RetryPolicy(attempts=attempts, on=frozenset({"5xx"}), base_interval_s=0.0)
    async with Origin(lambda seen: b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n") as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(to(cluster, retry=retry, request_headers=ops),))) as client:
            await client.ask(get())
            await client.ask(get("/", "X-Request-Id: own", "X-Forwarded-Proto: http"))
            await client.ask(get("/", "Transfer-Encoding: chunked", "TE: trailers", method="PUT") + b"0\r\n\r\n")
        assert len(origin.requests) == 3 * (1 + attempts)
        for seen in origin.requests:
            assert values(seen.headers, b"x-forwarded-proto") == [b"https"]
            assert values(seen.headers, b"x-request-id") == [b"fixed"]
            assert seen.header(b"x-envoy-attempt-count") is None
        assert values(origin.requests[-1].headers, b"te") == [b"trailers"]


async def test_a_destinations_operations_see_what_the_proxy_adds_too() -> None:
    request = HeaderOps(remove=("x-request-id",), set=(("x-forwarded-proto", "https"),))
    response = HeaderOps(remove=("x-envoy-upstream-service-time",))
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(to(cluster, request=request, response=response),))) as client:
            got = await client.ask(get())
        assert origin.requests[0].header(b"x-request-id") is None
        assert values(origin.requests[0].headers, b"x-forwarded-proto") == [b"https"]
        assert (got.header(b"x-envoy-upstream-service-time"), got.body) == (None, b"ok")


async def test_a_route_may_take_the_upstreams_time_out_of_an_answer() -> None:
    ops = HeaderOps(remove=("x-envoy-upstream-service-time",))
    async with Origin() as origin, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", origin.port)])
        async with Client(live.listen(cluster, routes=(to(cluster, response_headers=ops),))) as client:
            for _ in range(2):
                got = await client.ask(get())
                assert (got.header(b"x-envoy-upstream-service-time"), got.body) == (None, b"ok")
