"""HTTP/3 towards the upstream, and TCP where QUIC does not get through."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pylsqpack
import pytest
from aioquic.h3.connection import encode_frame

from meshproxy.codec.quic import STREAM_WINDOW
from meshproxy.control import messages as m
from meshproxy.model.cluster import TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from meshproxy.model.route import RetryPolicy, Route, WeightedCluster
from meshproxy.upstream import connect
from tests.support.certificates import Authority, Leaf
from tests.support.client import Client, Cut, get, post
from tests.support.http2_client import Http2Client, headers_frame, request, rst_frame
from tests.support.http3_origin import H3Answer, H3Origin, H3Request
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.other_proxies import caddy

AUTHORITY = Authority()
SERVER = AUTHORITY.leaf("default", "rsu")
REQUEST_REJECTED = 0x10B
BODY = bytes(range(256)) * 4096  # 1 MiB: eight windows of a stream
RSU = "spiffe://cluster.local/ns/default/sa/rsu"
HEAD_START_S = 1.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a QUIC handshake takes longer than the 0.3 s that it has before TCP joins the race."""
    monkeypatch.setattr(connect, "TCP_AFTER_S", HEAD_START_S)


def give(live: LiveWorker, leaf: Leaf, workload_id: str = "default/app", account: str = "default") -> None:
    live.put(m.PutWorkload(live.workload(workload_id, account)))
    live.worker.on_message(m.PutCertificates(workload_id, leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None)


def inbound(live: LiveWorker, app_port: int) -> int:
    """A listener for QUIC in front of the workload rsu."""
    give(live, AUTHORITY.leaf("default", "rsu"), "default/rsu", "rsu")
    cluster = live.cluster([("127.0.0.1", app_port)], "inbound|80||")
    return live.listen_quic(cluster, direction=Direction.INBOUND, mtls=MtlsMode.STRICT, workload_id="default/rsu")


def outbound(live: LiveWorker, port: int, retry: RetryPolicy | None = None, **fields: Any) -> int:
    """A listener for the traffic of the workload app to a server that must be rsu."""
    give(live, AUTHORITY.leaf("default", "default"))
    cluster = live.cluster(
        [("127.0.0.1", port)],
        "outbound|80||rsu.example",
        tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL),
        endpoint={"speaks_mtls": True, "spiffe_ids": (RSU,)},
        **{"offers_http3": True, **fields},
    )
    return live.listen(cluster, routes=(Route(clusters=(WeightedCluster(cluster_key=cluster),), retry=retry),))


async def test_a_request_goes_through_two_proxies_over_quic_under_both_identities() -> None:
    async with Origin() as origin, LiveWorker() as server, LiveWorker() as live:
        port = outbound(live, inbound(server, origin.port))
        async with Client(port) as client:
            client.send(get("/path"))
            response = await client.answer()
    assert (response.status, response.body) == (200, b"ok")
    xfcc = origin.requests[0].header(b"x-forwarded-client-cert")
    assert xfcc is not None and xfcc.endswith(b";URI=spiffe://cluster.local/ns/default/sa/default")


def to(live: LiveWorker, origin: H3Origin, retries: int = 0, **fields: Any) -> int:
    """A listener for the traffic of the workload app to this origin."""
    retry = RetryPolicy(attempts=retries) if retries else None
    return outbound(live, origin.port, retry=retry, **fields)


def streams(live: LiveWorker) -> list[Any]:
    return [
        stream
        for endpoint in live.endpoints()
        for connection in endpoint.connections
        for stream in connection.streams.values()
    ]


def connections(live: LiveWorker) -> list[str]:
    return sorted(type(connection).__name__ for endpoint in live.endpoints() for connection in endpoint.connections)


async def test_a_request_in_http1_arrives_as_http3_and_its_answer_comes_back() -> None:
    answer = H3Answer(b"body", [(b"content-length", b"4"), (b"x-from", b"origin")])
    async with H3Origin(SERVER, lambda _: answer) as origin, LiveWorker() as live, Client(to(live, origin)) as client:
        for _ in range(2):
            client.send(get("/path?q=1", "X-Mine: yes"))
            response = await client.answer()
            assert (response.status, response.body, response.header(b"x-from")) == (200, b"body", b"origin")
        assert connections(live) == ["UpstreamH3"]
    seen = origin.requests[1]
    assert seen.fields[:4] == [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a.example"),
                               (b":path", b"/path?q=1")]  # fmt: skip
    assert seen.header(b"x-mine") == b"yes"
    assert len(seen.header(b"x-request-id") or b"") == 36
    assert seen.header(b"x-request-id") != origin.requests[0].header(b"x-request-id")
    assert seen.header(b"host") is None


async def test_requests_at_the_same_time_share_one_connection_and_get_their_own_answers() -> None:
    def answer(seen: H3Request) -> H3Answer:
        return H3Answer(seen.header(b":path") or b"")

    async with H3Origin(SERVER, answer) as origin, LiveWorker() as live:
        port = to(live, origin)

        async def ask(number: int) -> bytes:
            async with Client(port) as client:
                client.send(get(f"/{number}"))
                return (await client.answer()).body

        for _ in range(4):  # more than the server allows without saying so again
            bodies = await asyncio.gather(*(ask(number) for number in range(50)))
            assert bodies == [b"/%d" % number for number in range(50)]
        assert len(origin.connections) == 1


@pytest.mark.parametrize(("fields", "requests", "each"), [({"max_concurrent_streams": 2}, 3, 2), ({}, 150, 128)])
async def test_more_requests_than_are_allowed_at_once_use_another_connection(
    fields: dict[str, int], requests: int, each: int
) -> None:
    async with H3Origin(SERVER, lambda _: None) as origin, LiveWorker() as live:
        port = to(live, origin, **fields)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(requests):
                client = await stack.enter_async_context(Client(port))
                client.send(get())
            await until(lambda: sum(seen.is_whole for seen in origin.requests) == requests)
        assert sorted(len(connection.requests) for connection in origin.connections) == [requests - each, each]


async def test_bodies_of_many_windows_pass_both_ways_with_trailers() -> None:
    def echo(seen: H3Request) -> H3Answer:
        return H3Answer(seen.body, trailers=[(b"x-sum", b"1"), *seen.trailers])

    async with H3Origin(SERVER, echo) as origin, LiveWorker() as live, Client(to(live, origin)) as client:
        head = b"POST / HTTP/1.1\r\nHost: a.example\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.send(head + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nx-end: yes\r\n\r\n")
        response = await client.answer()
    assert response.body == BODY
    assert response.trailers == [(b"x-sum", b"1"), (b"x-end", b"yes")]


async def test_interim_answers_pass() -> None:
    answer = H3Answer(interim=(103, 103))
    async with H3Origin(SERVER, lambda _: answer) as origin, LiveWorker() as live, Client(to(live, origin)) as client:
        client.send(get())
        response = await client.answer()
    assert (response.status, response.informational) == (200, [103, 103])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_answer_whose_end_comes_later_than_its_head_is_whole(method: str) -> None:
    async with H3Origin(SERVER, lambda _: None) as origin, LiveWorker() as live, Client(to(live, origin)) as client:
        client.send(get(method=method))
        await until(lambda: len(origin.requests) == 1)
        connection, (seen,) = origin.connections[0], origin.requests
        connection.http.send_headers(seen.stream_id, [(b":status", b"200"), (b"content-length", b"0")])
        connection.transmit()
        await until(lambda: next(iter(live.endpoints()[0].connections)).quic._streams[0].receiver.highest_offset > 0)
        connection._quic.send_stream_data(seen.stream_id, b"", True)
        connection.transmit()
        assert (await client.answer(method)).status == 200


@pytest.mark.parametrize(
    ("code", "asks"), [(REQUEST_REJECTED, 2), (0x102, 1), (0x10C, 1)], ids=["rejected", "internal", "cancelled"]
)
async def test_only_a_rejected_request_is_asked_again(code: int, asks: int) -> None:
    answers = [H3Answer(resets=code), H3Answer(b"done")]
    async with H3Origin(SERVER, lambda _: answers.pop(0)) as origin, LiveWorker() as live:
        async with Client(to(live, origin)) as client:
            client.send(post(b""))
            assert (await client.answer()).status == (200 if asks == 2 else 503)
        assert len(origin.requests) == asks
        assert len(origin.connections) == 1


async def test_what_goaway_leaves_out_is_asked_again_on_another_connection() -> None:
    def answer(seen: H3Request) -> H3Answer | None:
        if seen.connection is not origin.connections[0]:
            return H3Answer(b"second")
        if seen.stream_id == 4:
            seen.connection.goaway(4)
        return None

    async with H3Origin(SERVER, answer) as origin, LiveWorker() as live:
        port = to(live, origin)
        async with Client(port) as first, Client(port) as second:
            first.send(get())
            await until(lambda: len(origin.requests) == 1)
            second.send(post(b""))
            assert (await second.answer()).body == b"second"
            seen = origin.requests[0]
            seen.connection.respond(seen, H3Answer(b"first"))
            assert (await first.answer()).body == b"first"
            await until(lambda: origin.connections[0].terminated is not None)


MALFORMED = {
    "upper case": [(b":status", b"200"), (b"X-Upper", b"1")],
    "no status": [(b"x-lower", b"1")],
    "connection field": [(b":status", b"200"), (b"connection", b"close")],
    "line break": [(b":status", b"200"), (b"x-lower", b"1\r\nset-cookie: a=b")],
    "more than it says": [(b":status", b"200"), (b"content-length", b"1")],
    "less than it says": [(b":status", b"200"), (b"content-length", b"100")],
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_answer_costs_its_request_alone(name: str) -> None:
    section = pylsqpack.Encoder().encode(0, MALFORMED[name])[1]
    raw = encode_frame(1, section) + encode_frame(0, b"body")
    async with H3Origin(SERVER, lambda seen: H3Answer(raw=raw)) as origin, LiveWorker() as live:
        port = to(live, origin)
        async with Client(port) as client:
            client.send(get())
            if "it says" in name:
                with contextlib.suppress(Cut):
                    assert (await client.answer()).body != b"body"
            else:
                assert (await client.answer()).status == 502
        origin.answer = lambda _: H3Answer()
        async with Client(port) as client:
            client.send(get())
            assert (await client.answer()).status == 200
        assert len(origin.connections) == 1


BROKEN = {
    "settings on a request": encode_frame(4, b""),
    "data first": encode_frame(0, b"body"),
    "not QPACK": encode_frame(1, b"\x00\x00\xff\xff\xff\xff\xff\xff"),
    "half a frame": b"\x01\x20\x00",
    "a huge head": b"\x01\x80\x10\x00\x00",
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_connection_ends_and_the_next_request_has_another(name: str) -> None:
    async with H3Origin(SERVER, lambda seen: H3Answer(raw=BROKEN[name])) as origin, LiveWorker() as live:
        port = to(live, origin)
        async with Client(port) as client:
            client.send(get())
            assert (await client.answer()).status in (502, 503)
        origin.answer = lambda _: H3Answer()
        async with Client(port) as client:
            client.send(get())
            assert (await client.answer()).status == 200
        assert len(origin.connections) == 2


@pytest.mark.parametrize(("first", "more"), [(1, 1), (15, 20)], ids=["both ways", "one way"])
async def test_a_server_that_opens_streams_nobody_wants_is_left(first: int, more: int) -> None:
    def open_streams(seen: H3Request) -> None:
        quic = seen.connection._quic
        for stream_id in range(first, first + 4 * more, 4):
            quic._remote_max_streams_bidi = quic._remote_max_streams_uni = 1000
            quic.send_stream_data(stream_id, b"\x40")
        seen.connection.transmit()

    async with H3Origin(SERVER, open_streams) as origin, LiveWorker() as live:
        async with Client(to(live, origin)) as client:
            client.send(get())
            assert (await client.answer()).status == 503
            await until(lambda: origin.connections[0].terminated is not None)
            assert origin.connections[0].terminated.error_code == 0x4  # STREAM_LIMIT_ERROR


async def test_a_request_that_is_given_up_is_cancelled_and_the_connection_goes_on() -> None:
    async with H3Origin(SERVER, lambda _: None) as origin, LiveWorker() as live:
        port = to(live, origin)
        async with Http2Client(port, acks=True) as client:
            await client.handshake()
            client.send(headers_frame(1, request("/")))
            await until(lambda: len(origin.requests) == 1)
            client.send(rst_frame(1))
            await until(lambda: origin.requests[0].stopped == 0x10C)
        origin.answer = lambda _: H3Answer()
        async with Client(port) as client:
            client.send(get())
            assert (await client.answer()).status == 200
        assert len(origin.connections) == 1


async def test_an_answer_nobody_reads_stops_its_stream_and_no_other() -> None:
    size = 16 << 20

    def answer(seen: H3Request) -> H3Answer:
        # With a length: chunks would have to be told apart here.
        whole = H3Answer(bytes(size), [(b"content-length", b"%d" % size)])
        return whole if seen.header(b":path") == b"/large" else H3Answer(b"small")

    async with H3Origin(SERVER, answer) as origin, LiveWorker() as live:
        port = to(live, origin)
        async with Client(port) as idle, Client(port) as busy:
            idle.send(get("/large"))
            await until(lambda: any(stream.is_held for stream in streams(live)))
            held = 0
            for _ in range(20):
                busy.send(get())
                assert (await busy.answer()).body == b"small"
                held = max(held, sum(each.held_bytes() for each in live.endpoints()[0].connections))
            assert held < 2 * STREAM_WINDOW
            await idle.reader.readuntil(b"\r\n\r\n")
            left = size
            while left > 0:
                left -= len(await idle.reader.read(left))
        assert len(origin.connections) == 1


async def test_a_request_the_upstream_does_not_take_stops_its_sender_and_no_other() -> None:
    goes_on = asyncio.Event()
    size = 16 << 20

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b" /large " in head:
            await goes_on.wait()
            left = size
            while left:
                left -= len(await reader.read(65536))
        else:
            await reader.readexactly(4)
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as app, LiveWorker() as server, LiveWorker() as live:
        port = outbound(live, inbound(server, app.sockets[0].getsockname()[1]))
        async with Client(port) as large, Client(port) as small:
            large.send(post(bytes(size), path="/large"))
            await until(lambda: any(stream._is_full for stream in streams(live)))
            for _ in range(20):
                small.send(post(b"body"))
                assert (await small.answer()).body == b"ok"
            assert sum(each.held_bytes() for each in live.endpoints()[0].connections) < size // 4
            goes_on.set()
            assert (await large.answer()).body == b"ok"


async def test_a_websocket_goes_on_in_extended_connect() -> None:
    async with H3Origin(SERVER, opens_tunnels=True) as origin, LiveWorker() as live:
        async with Client(to(live, origin)) as client:
            key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
            client.send(get("/chat", "Connection: upgrade", "Upgrade: websocket", key))
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            assert b"\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head
            client.send(b"hello")
            assert await client.reader.readexactly(5) == b"hello"
    assert origin.requests[0].header(b":protocol") == b"websocket"
    assert origin.requests[0].header(b"sec-websocket-key") is None


# ── Caddy, whose QUIC is quic-go's ──

SITE = """https://a.example:{{port}} {{{{
  bind 127.0.0.1
  tls {directory}/cert-chain.pem {directory}/key.pem
  handle /file {{{{
    root * {directory}
    file_server
  }}}}
  handle {{{{
    header x-proto {{{{http.request.proto}}}}
    respond "{{{{http.request.method}}}} {{{{http.request.uri}}}} {{{{http.request.body}}}}"
  }}}}
}}}}
"""


def outside(live: LiveWorker, port: int, directory: Path, **tls: Any) -> int:
    """A listener for traffic to a service outside the mesh."""
    settings = {"mode": TlsMode.SIMPLE, "sni": "a.example", "ca_file": str(directory / "root-cert.pem"), **tls}
    cluster = live.cluster([("127.0.0.1", port)], tls=UpstreamTls(**settings), offers_http3=True)
    return live.listen(cluster)


async def test_caddy_serves_over_http3(tmp_path: Path) -> None:
    AUTHORITY.leaf(uris=(), dns_names=("a.example",)).write(tmp_path)
    (tmp_path / "file").write_bytes(BODY)
    async with caddy(SITE.format(directory=tmp_path)) as peer, LiveWorker() as live:
        async with Client(outside(live, peer, tmp_path)) as client:
            client.send(get("/path?q=1"))
            response = await client.answer()
            assert (response.status, response.body) == (200, b"GET /path?q=1 ")
            assert response.header(b"x-proto") == b"HTTP/3.0"
            client.send(post(b"x" * 300_000))
            assert (await client.answer()).body == b"POST / " + b"x" * 300_000
            client.send(get("/file"))
            assert (await client.answer()).body == BODY
            client.send(get("/file", method="HEAD"))
            assert (await client.answer("HEAD")).header(b"content-length") == b"%d" % len(BODY)
            client.send(get("/file", "If-None-Match: *"))
            assert (await client.answer()).status == 304
        assert connections(live) == ["UpstreamH3"]


@pytest.mark.parametrize(
    ("names", "tls", "is_served"),
    [
        (("a.example",), {}, True),
        (("*.a.example",), {"sni": "b.a.example"}, True),
        (("*.a.example",), {}, False),
        (("b.example",), {}, False),
        (("b.example",), {"subject_alt_names": ("b.example",)}, True),
        (("a.example",), {"subject_alt_names": ("b.example",)}, False),
        (("b.example",), {"insecure_skip_verify": True}, True),
    ],
)
async def test_a_server_outside_the_mesh_is_checked_by_its_name(
    tmp_path: Path, names: tuple[str, ...], tls: dict[str, Any], is_served: bool
) -> None:
    leaf = AUTHORITY.leaf(uris=(), dns_names=names)
    leaf.write(tmp_path)
    async with H3Origin(leaf) as origin, LiveWorker() as live:
        async with Client(outside(live, origin.port, tmp_path, **tls)) as client:
            client.send(get())
            assert (await client.answer()).status == (200 if is_served else 503)
        assert len(origin.requests) == is_served
