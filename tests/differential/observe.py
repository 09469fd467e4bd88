"""What a client and an origin see of one case, in a form that two proxies can be compared in."""

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from tests.differential.answers import ANSWERS
from tests.differential.cases import Case
from tests.differential.peers import Peers, peers
from tests.differential.routes import TABLE
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
