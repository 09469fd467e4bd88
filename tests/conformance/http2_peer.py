"""What a conformance case is, what may come of it, and the proxy that it runs against.

The proxy is meshproxy; MESHPROXY_CONFORMANCE_PEER=envoy runs the same cases against a real Envoy, which tells whether
a case is right. Envoy is allowed what RFC 9113 always allows and we do not allow ourselves, because it harms others on
the connection or hides the cause: a connection error for a stream error, a connection error without a GOAWAY (both
§5.4.1), and a generic error code (§5.4).
Where Envoy still differs, ENVOY_DIFFERS says how.
"""

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hyperframe.frame as h2f
import pytest

from meshproxy.model.cluster import Protocol
from meshproxy.model.route import Route, RouteTable, VirtualHost, WeightedCluster
from tests.differential.envoy_config import bootstrap
from tests.differential.peers import envoy_path, start_envoy
from tests.support.http2_client import INTERNAL_ERROR, PROTOCOL_ERROR, Http2Client, Stream, headers_frame, request
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin, Seen

PEER = os.environ.get("MESHPROXY_CONFORMANCE_PEER", "meshproxy")
IS_ENVOY = PEER == "envoy"

ALIVE_STREAM = (1 << 20) + 1
"""The next request on a connection that must go on: above all identifiers that cases use."""
BIG = b"0123456789" * 10_000

Step = Callable[[Http2Client], Awaitable[object]]
Expect = Callable[[Http2Client], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Case:
    section: str
    what: str
    steps: tuple[bytes | Step, ...]
    """Sent, or awaited, one after another once both sides have acknowledged SETTINGS."""
    expect: Expect
    settings: Mapping[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.section}_{self.what}"


def params(cases: list[Case]) -> list[object]:
    """For parametrize; each name once."""
    names = [case.name for case in cases]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]
    return [pytest.param(case, id=case.name) for case in cases]


def answer(seen: Seen) -> bytes:
    """Of the origin: /hold… is never answered, /big has 100 000 bytes, /empty none, /echo the request's; others ok."""
    if seen.target.startswith(b"/hold"):
        return b""
    body = {b"/big": BIG, b"/empty": b"", b"/echo": seen.body}.get(seen.target, b"ok")
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@contextlib.asynccontextmanager
async def proxy(origin_port: int, protocol: Protocol = Protocol.HTTP) -> AsyncIterator[int]:
    """Port of a proxy in front of the origin."""
    async with contextlib.AsyncExitStack() as stack:
        if not IS_ENVOY:
            worker = await stack.enter_async_context(LiveWorker())
            escaped: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
            yield worker.listen(worker.cluster([("127.0.0.1", origin_port)]), protocol=protocol)
            assert not escaped, f"an exception left the proxy: {escaped}"
            return
        route = Route(clusters=(WeightedCluster(cluster_key="a"),))
        table = RouteTable(name="all", virtual_hosts=(VirtualHost(name="all", domains=("*",), routes=(route,)),))
        config = bootstrap(table, {"a": (origin_port,)})
        manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        manager["http2_protocol_options"] = {"override_stream_error_on_invalid_http_message": True}
        manager["delayed_close_timeout"] = "0.02s"
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield await start_envoy(stack, envoy_path(), directory, json.dumps(config))


async def run(case: Case) -> None:
    """Requests for /bad… must not reach the origin, whatever else happens."""
    async with Origin(answer) as origin, proxy(origin.port) as port, Http2Client(port, case.settings) as client:
        await client.handshake()
        for step in case.steps:
            if isinstance(step, bytes):
                client.send(step)
            else:
                await step(client)
        await case.expect(client)
        assert client.illegal is None, client.illegal
        bad = [seen for seen in origin.requests if seen.target.startswith(b"/bad")]
        assert not bad, f"forwarded: {bad}"
        for goaway in client.frames:
            if isinstance(goaway, h2f.GoAwayFrame):
                answered = [i for i, stream in client.streams.items() if stream.has_ended]
                assert max(answered, default=0) <= goaway.last_stream_id, "GOAWAY disowns an answered stream"


# ── steps ──


def answered(stream_id: int, status: int = 200) -> Step:
    """The request on the stream is answered; the stream is closed then, if the request has ended."""

    async def step(client: Http2Client) -> None:
        response = await client.response(stream_id)
        assert response.status == status, response

    return step


async def read(client: Http2Client) -> None:
    """All that was sent has been read (and answered, where the answer is the proxy's own)."""
    await client.expect_ping(b"read\0\0\0\0")


def was_reset(stream_id: int) -> Step:
    async def step(client: Http2Client) -> None:
        stream = client.streams.setdefault(stream_id, Stream())
        await client.until(lambda: stream.reset is not None or stream.has_ended, f"a refusal on {stream_id}")

    return step


# ── what may come of it ──


async def goes_on(client: Http2Client) -> None:
    """The connection serves the next request, and has no error on it."""
    client.send(headers_frame(ALIVE_STREAM, request("/alive")))
    response = await client.response(ALIVE_STREAM)
    assert (response.status, response.body) == (200, b"ok")
    assert not [frame for frame in client.frames if isinstance(frame, h2f.GoAwayFrame)]


async def ignored(client: Http2Client) -> None:
    await goes_on(client)
    resets = {i: stream.reset for i, stream in client.streams.items() if stream.reset is not None}
    assert not resets


def serves(*stream_ids: int) -> Expect:
    """All is well: these requests are answered with 200, and the connection goes on."""

    async def expect(client: Http2Client) -> None:
        for stream_id in stream_ids:
            await answered(stream_id)(client)
        await ignored(client)

    return expect


def connection_error(*codes: int) -> Expect:
    async def expect(client: Http2Client) -> None:
        await _goaway(client, codes)

    return expect


def stream_error(stream_id: int, *codes: int) -> Expect:
    return _error(stream_id, codes, codes if IS_ENVOY else (), ignores=False)


def either_error(stream_id: int, *codes: int, connection: tuple[int, ...] = ()) -> Expect:
    """A stream error or a connection error, as the RFC leaves open. connection: further codes of the latter."""
    return _error(stream_id, codes, (*codes, *connection), ignores=False)


def error_or_ignored(stream_id: int, *codes: int, connection: tuple[int, ...] = ()) -> Expect:
    return _error(stream_id, codes, (*codes, *connection), ignores=True)


def malformed(stream_id: int = 1) -> Expect:
    """§8.1.1: a stream error PROTOCOL_ERROR; an answer 4xx may come before it, or instead."""

    async def expect(client: Http2Client) -> None:
        stream = client.streams.setdefault(stream_id, Stream())
        await client.until(
            lambda: stream.reset is not None or stream.has_ended or client.closed, f"refusal on {stream_id}"
        )
        if IS_ENVOY and stream.reset is None and not stream.has_ended:
            await _goaway(client, (PROTOCOL_ERROR,))
            return
        assert stream.reset in (PROTOCOL_ERROR, None) or stream.has_ended, stream
        if stream.has_ended:
            response = await client.response(stream_id)
            assert 400 <= response.status < 500, response
        await goes_on(client)
        _reported_once(client, stream_id)

    return expect


def _error(stream_id: int, codes: tuple[int, ...], connection: tuple[int, ...], *, ignores: bool) -> Expect:
    async def expect(client: Http2Client) -> None:
        stream = client.streams.setdefault(stream_id, Stream())
        if ignores:
            client.send(headers_frame(ALIVE_STREAM, request("/alive")))
            alive = client.streams.setdefault(ALIVE_STREAM, Stream())
            await client.until(lambda: alive.has_ended or client.closed, "an answer or the end")
        else:
            await client.until(lambda: stream.reset is not None or client.closed, f"an error on stream {stream_id}")
        if client.closed:
            await _goaway(client, connection)
            return
        if stream.reset is not None:
            await client.expect_rst(stream_id, {*codes, *_generic()})
        if ignores:
            await client.response(ALIVE_STREAM)
        else:
            await goes_on(client)
        _reported_once(client, stream_id)

    return expect


def _reported_once(client: Http2Client, stream_id: int) -> None:
    resets = [f for f in client.frames if isinstance(f, h2f.RstStreamFrame) and f.stream_id == stream_id]
    assert len(resets) <= 1, resets


async def _goaway(client: Http2Client, codes: tuple[int, ...]) -> None:
    if IS_ENVOY:
        await client.expect_closed()
        if not any(isinstance(frame, h2f.GoAwayFrame) for frame in client.frames):
            return
    await client.expect_goaway({*codes, *_generic()})


def _generic() -> set[int]:
    return {PROTOCOL_ERROR, INTERNAL_ERROR} if IS_ENVOY else set()
