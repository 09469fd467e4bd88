"""What a client and an origin see of one case, in a form that two proxies can be compared in."""

import asyncio
import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import h11

from tests.differential.answers import ANSWERS
from tests.differential.cases import Case
from tests.differential.peers import Peers, peers
from tests.differential.routes import TABLE
from tests.support.http2_client import INITIAL_WINDOW_SIZE, Field, Http2Client, Stream, data_frame, headers_frame
from tests.support.origin import Seen

PATIENCE_S: Final = 3.0
"""Longest wait for one case; a proxy that does not answer is compared as one that said nothing."""

_GENERATED: Final = {
    "x-request-id": re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "x-envoy-upstream-service-time": re.compile("[0-9]+"),
}
"""Values that are random, or measured."""

_BROKEN_OFF: Final = "(broken off)"
"""How much arrived before a reset is chance."""

Facts = Mapping[str, str]
"""What is compared: `status`, `body`, `response <header>`, `cluster`, `method`, `target`, `request <header>`, …"""


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    is_whole: bool


async def observe(cases: Iterable[Case]) -> dict[str, dict[str, Facts]]:
    """case name → proxy name → facts."""
    async with peers(TABLE, ANSWERS) as both:
        return {case.name: {name: await _facts(both, name, case) for name in both.ports} for case in cases}


async def observe_http2(cases: Iterable[Case]) -> dict[str, dict[str, Facts]]:
    """As observe, with the same requests over HTTP/2; without those that it has no words for."""
    async with peers(TABLE, ANSWERS) as both:
        return {
            case.name: {name: await _facts_http2(both, name, fields, body, trailers) for name in both.ports}
            for case in cases
            if (converted := as_http2(case)) is not None
            for fields, body, trailers in (converted,)
        }


_OF_HTTP1: Final = frozenset({b"host", b"connection", b"transfer-encoding", b"keep-alive", b"proxy-connection"})


def as_http2(case: Case) -> tuple[list[Field], bytes, list[Field]] | None:
    """Fields, body and trailers of the request; None for one that HTTP/2 cannot say."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    parser.receive_data(case.sent)
    events: list[Any] = []
    try:
        while not events or not isinstance(events[-1], h11.EndOfMessage):
            events.append(parser.next_event())
            if events[-1] is h11.NEED_DATA:
                return None
    except h11.RemoteProtocolError:
        return None
    head = events[0]
    given = {bytes(name): bytes(value) for name, value in head.headers}
    if case.responses > 1 or not head.target.startswith((b"/", b"*")) or head.http_version != b"1.1":
        return None
    if given.keys() & {b"upgrade"} or (b"connection" in given and b"close" not in given[b"connection"]):
        return None
    pseudo = [(b":method", bytes(head.method)), (b":scheme", b"http"), (b":path", bytes(head.target))]
    fields = [(bytes(name), bytes(value)) for name, value in head.headers if bytes(name) not in _OF_HTTP1]
    body = b"".join(bytes(event.data) for event in events[1:-1])
    trailers = [(bytes(name), bytes(value)) for name, value in events[-1].headers]
    return [*pseudo, (b":authority", given[b"host"]), *fields], body, trailers


async def _facts_http2(both: Peers, proxy: str, fields: list[Field], body: bytes, trailers: list[Field]) -> Facts:
    both.seen.clear()
    facts: dict[str, str] = {}
    async with Http2Client(both.ports[proxy], {INITIAL_WINDOW_SIZE: 1 << 20}, acks=True) as client:
        await client.handshake()
        client.send(headers_frame(1, fields, end_stream=not body and not trailers))
        for at in range(0, len(body), 16_384):
            is_last = at + 16_384 >= len(body) and not trailers
            client.send(data_frame(1, body[at : at + 16_384], end_stream=is_last))
        if trailers:
            client.send(headers_frame(1, trailers))
        stream = client.streams.setdefault(1, Stream())
        with contextlib.suppress(AssertionError):  # compared as it is
            await client.until(lambda: stream.has_ended or stream.reset is not None or client.closed)
        blocks = [[(name.decode("latin-1"), value.decode("latin-1")) for name, value in b] for b in stream.blocks]
    heads = [given for given in blocks if given and given[0][0] == ":status"]
    for number, given in enumerate(heads):
        status = int(given[0][1])
        whole = Response(status, tuple(given[1:]), bytes(stream.body) if status >= 200 else b"", stream.has_ended)
        facts |= _of_response(whole, f"{number + 1} " if number else "")
    if len(blocks) > len(heads):
        facts |= _of_headers(blocks[-1], "response trailer ")
    facts |= {"responses": str(len(heads)), "requests": str(len(both.seen))}
    for number, (cluster, seen) in enumerate(both.seen):
        facts |= _of_request(cluster, seen, f"{number + 1} " if number else "")
    return facts


async def _facts(both: Peers, proxy: str, case: Case) -> Facts:
    both.seen.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", both.ports[proxy])
    responses: list[Response] = []
    try:
        writer.write(case.sent)
        is_head = case.sent.startswith(b"HEAD ")
        async with asyncio.timeout(PATIENCE_S):
            finals = 0
            while finals < case.responses:
                response = await _response(reader, is_head)
                responses.append(response)
                finals += response.status >= 200 or response.status == 101
    except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        pass  # compared as it is
    finally:
        writer.close()
    facts: dict[str, str] = {"responses": str(len(responses)), "requests": str(len(both.seen))}
    for number, response in enumerate(responses):
        facts |= _of_response(response, f"{number + 1} " if number else "")
    for number, (cluster, seen) in enumerate(both.seen):
        facts |= _of_request(cluster, seen, f"{number + 1} " if number else "")
    return facts


async def _response(reader: asyncio.StreamReader, is_head: bool) -> Response:
    """The next response, interim ones too; the body as it is without its framing."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    status = int(lines[0].split(" ")[1])
    headers = tuple((name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:]))
    given = dict(headers)
    if is_head or status < 200 or status in (204, 304):
        return Response(status, headers, b"", True)
    body = b""
    try:
        if "transfer-encoding" in given:
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                body += (await reader.readexactly(size + 2))[:-2]
            while (await reader.readuntil(b"\r\n")) != b"\r\n":
                pass
        elif "content-length" in given:
            body = await reader.readexactly(int(given["content-length"]))
        else:
            body = await reader.read(-1)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        return Response(status, headers, body + getattr(error, "partial", b""), False)
    return Response(status, headers, body, True)


def _of_response(response: Response, prefix: str) -> Facts:
    return {
        f"{prefix}status": str(response.status),
        f"{prefix}body": response.body.decode("latin-1") if response.is_whole else _BROKEN_OFF,
        **_of_headers(response.headers, f"{prefix}response "),
    }


def _of_request(cluster: str, seen: Seen, prefix: str) -> Facts:
    headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in seen.headers)
    trailers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in seen.trailers)
    return {
        f"{prefix}cluster": cluster,
        f"{prefix}method": seen.method.decode("latin-1"),
        f"{prefix}target": seen.target.decode("latin-1"),
        f"{prefix}request body": seen.body.decode("latin-1"),
        **_of_headers(headers, f"{prefix}request "),
        **_of_headers(trailers, f"{prefix}request trailer "),
    }


def _of_headers(headers: Iterable[tuple[str, str]], prefix: str) -> Facts:
    """Each name with all its values in their order; the order of different names means nothing."""
    facts: dict[str, str] = {}
    for name, value in headers:
        key = prefix + name.lower()
        generated = _GENERATED.get(name.lower())
        if generated is not None and generated.fullmatch(value):
            value = "(generated)"
        facts[key] = f"{facts[key]} | {value}" if key in facts else value
    return facts
