"""What the operator asks the proxy: admin (15000, loopback), metrics (15020), readiness (15021).

Decides: paths, methods, who may ask. Leaves to others: HTTP (admin.http), shapes (admin.views, telemetry.exposition),
the doing (control.process).
Source: Envoy docs/root/operations/admin.rst for paths; Istio's port conventions.

Nothing changes but by POST, and a web page must not be able to ask: the admin port answers only requests whose Host is
a loopback address or localhost (DNS rebinding gives a foreign name), and refuses those another origin's page sends.
"""

import asyncio
import ipaddress
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from meshproxy import __version__
from meshproxy.admin import views
from meshproxy.admin.http import HttpService, Request, Response
from meshproxy.resources.problems import ConfigProblem
from meshproxy.telemetry import exposition
from meshproxy.telemetry.exposition import Statistics
from meshproxy.telemetry.process_state import LIVE, ProcessState, process_usage
from meshproxy.telemetry.recorder import Flush

_log = logging.getLogger(__name__)

FLUSH_EVERY_S = 1.0
"""How often the workers' counts are fetched: what a worker that dies can lose."""
_EVICT_EVERY_S = 60.0
_JSON = "application/json"
_PIECE_CHARACTERS = 1 << 15


class ControlState(Protocol):
    """What the control process must offer."""

    log_level: str

    @property
    def problems(self) -> Sequence[ConfigProblem]: ...

    def state(self) -> ProcessState: ...

    async def ask_workers(self, what: str) -> list[Any]:
        """The answers of the workers that answered in time."""
        ...

    def drain(self) -> None: ...

    def quit(self) -> None: ...

    def set_log_level(self, level: str) -> None:
        """ValueError with one sentence where there is no such level."""
        ...


@dataclass(frozen=True, slots=True)
class _Page:
    handler: Callable[[Request], Awaitable[Response]]
    help: str
    is_mutation: bool = False
    """Asked by POST; all others by GET or HEAD."""


class AdminServer:
    """Answers on the three ports and keeps the workers' counts.

    options: settings shown in /server_info (plain JSON values).
    """

    def __init__(self, control: ControlState, options: Mapping[str, Any] | None = None) -> None:
        self._control = control
        self._options = dict(options or {})
        self.statistics = Statistics()
        self._servers: list[asyncio.Server] = []
        self._services: list[HttpService] = []
        self._refreshing: asyncio.Task[None] | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._evicted_at = time.monotonic()
        ready = _Page(self._ready, "200 when the proxy serves, 503 before and while it drains")
        metrics = _Page(self._metrics, "metrics for Prometheus, also as OpenMetrics")
        self._pages: dict[str, dict[str, _Page]] = {
            "admin": {
                "/ready": ready,
                "/clusters": _Page(self._clusters, "endpoints with health and counts (?format=json)"),
                "/config_dump": _Page(self._config_dump, "configuration in effect (?resource=" + _resources() + ")"),
                "/listeners": _Page(self._listeners, "listeners (?format=json)"),
                "/connections": _Page(self._connections, "open connections"),
                "/certs": _Page(self._certs, "certificates in use"),
                "/problems": _Page(self._problems, "what is wrong with the configuration (?format=json)"),
                "/stats": _Page(self._stats, "statistics (?format=text|json|prometheus&filter=REGEX&usedonly)"),
                "/stats/prometheus": metrics,
                "/server_info": _Page(self._server_info, "version, state, workers"),
                "/memory": _Page(self._memory, "memory of each process"),
                "/help": _Page(self._help, "this list"),
                "/logging": _Page(self._logging, "show, or set, the log level (?level=LEVEL)", True),
                "/drain_listeners": _Page(self._drain, "accept no more connections (?graceful)", True),
                "/reset_counters": _Page(self._reset, "all counters to zero", True),
                "/quitquitquit": _Page(self._quit, "drain and exit", True),
            },
            "metrics": {"/stats/prometheus": metrics, "/metrics": metrics, "/healthz/ready": ready},
            "ready": {"/healthz/ready": ready},
        }

    async def start(self, sockets: Mapping[str, Any]) -> None:
        """sockets: bound ones by name: admin, metrics, ready. Begins to fetch counts."""
        loop = asyncio.get_running_loop()
        for name, sock in sockets.items():
            service = HttpService(self._handler(name))
            self._services.append(service)
            self._servers.append(await loop.create_server(service.protocol, sock=sock, backlog=64))
        self._tick()

    async def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        for server in self._servers:
            server.close()
        for service in self._services:
            service.close()
        for server in self._servers:
            await server.wait_closed()

    # ── counts ──

    async def refresh(self) -> None:
        """Fetch the workers' counts now; callers at the same time share one question."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._fetch())
        await asyncio.shield(self._refreshing)

    async def _fetch(self) -> None:
        answers = await self._control.ask_workers("stats")
        now = time.monotonic()
        for answer in answers:
            if isinstance(answer, Flush):
                self.statistics.merge(answer, now)
        process = self._control.state()
        self.statistics.keep_only({worker.pid for worker in process.workers})
        if now - self._evicted_at > _EVICT_EVERY_S:
            self._evicted_at = now
            self.statistics.evict(now, {cluster.service_host for cluster in process.snapshot.clusters.values()})

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(FLUSH_EVERY_S, self._tick)
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = loop.create_task(self._fetch())
            self._refreshing.add_done_callback(_log_failure)

    # ── dispatch ──

    def _handler(self, port: str) -> Callable[[Request], Awaitable[Response]]:
        pages = self._pages[port]

        async def handle(request: Request) -> Response:
            if port == "admin":
                refusal = _refusal(request)
                if refusal is not None:
                    return Response(status=403, body=f"{refusal}\n".encode())
            path = request.path.rstrip("/") or "/"
            if path == "/" and port == "admin":
                path = "/help"
            page = pages.get(path)
            if page is None:
                known = "".join(f"  {name}\n" for name in pages)
                return Response(status=404, body=f"there is no such path; there are:\n{known}".encode())
            methods = ("POST",) if page.is_mutation else ("GET", "HEAD")
            if request.method not in methods:
                allowed = ", ".join(methods)
                return Response(
                    status=405, body=f"{path} is asked by {allowed}\n".encode(), headers=(("allow", allowed),)
                )
            return await page.handler(request)

        return handle

    # ── pages ──

    async def _ready(self, request: Request) -> Response:
        state = self._control.state().state
        return Response(status=200 if state == LIVE else 503, body=f"{state}\n".encode())

    async def _metrics(self, request: Request) -> Response:
        await self.refresh()
        is_openmetrics = exposition.wants_openmetrics(request.header("accept"))
        return Response(
            body=exposition.render(
                exposition.families(self.statistics, self._control.state()), is_openmetrics=is_openmetrics
            ),
            content_type=exposition.OPENMETRICS_TYPE if is_openmetrics else exposition.TEXT_TYPE,
            headers=(("vary", "accept, accept-encoding"),),
        )

    async def _clusters(self, request: Request) -> Response:
        clusters = views.merge_clusters(await self._control.ask_workers("clusters"))
        snapshot = self._control.state().snapshot
        if request.query.get("format") == "json":
            return _json_list("cluster_statuses", views.cluster_statuses(clusters, snapshot))
        return Response(body=_pieces(views.clusters_text(clusters, snapshot)))

    async def _config_dump(self, request: Request) -> Response:
        resource = request.query.get("resource")
        if resource is not None and resource not in views.RESOURCES:
            return _bad(f"resource {resource!r} is none of {', '.join(views.RESOURCES)}")
        process = self._control.state()
        published_at = process.counters.published_at or process.now
        return Response(body=_pieces(views.config_dump(process.snapshot, published_at, resource)), content_type=_JSON)

    async def _listeners(self, request: Request) -> Response:
        snapshot = self._control.state().snapshot
        if request.query.get("format") == "json":
            return _json_list("listener_statuses", views.listener_statuses(snapshot))
        return Response(body=views.listeners_text(snapshot).encode())

    async def _connections(self, request: Request) -> Response:
        answers = await self._control.ask_workers("connections")
        return _json_list("connections", (connection for answer in answers for connection in answer))

    async def _certs(self, request: Request) -> Response:
        process = self._control.state()
        return _json(views.certificates(process.certificates, process.now))

    async def _problems(self, request: Request) -> Response:
        problems = self._control.problems
        if request.query.get("format") == "json":
            return _json(views.problems(problems))
        return Response(body="".join(f"{problem.sentence()}\n" for problem in problems).encode())

    async def _stats(self, request: Request) -> Response:
        form = request.query.get("format", "text")
        if form == "prometheus":
            return await self._metrics(request)
        if form not in ("text", "json"):
            return _bad(f"format {form!r} is none of text, json, prometheus")
        pattern = None
        if request.query.get("filter"):
            try:
                pattern = re.compile(request.query["filter"][:256])
            except re.error as error:
                return _bad(f"filter is not a regular expression: {error}")
        await self.refresh()
        found = views.stats(
            self.statistics, self._control.state(), pattern=pattern, used_only="usedonly" in request.query
        )
        if form == "json":
            return Response(body=_pieces(views.stats_json(found)), content_type=_JSON)
        return Response(body=_pieces(views.stats_text(found)))

    async def _server_info(self, request: Request) -> Response:
        process = self._control.state()
        return _json(views.server_info(process, __version__, self._control.log_level, self._options))

    async def _memory(self, request: Request) -> Response:
        found = [
            (name, pid, usage)
            for name, pid in self._control.state().processes()
            if (usage := process_usage(pid)) is not None
        ]
        return _json(views.memory(found))

    async def _help(self, request: Request) -> Response:
        lines = [
            f"  {path}{' (POST)' if page.is_mutation else ''}: {page.help}\n"
            for path, page in self._pages["admin"].items()
        ]
        return Response(body=("admin commands are:\n" + "".join(lines)).encode())

    async def _logging(self, request: Request) -> Response:
        level = request.query.get("level")
        if level is not None:
            try:
                self._control.set_log_level(level)
            except ValueError as error:
                return _bad(str(error))
        return Response(body=f"active loggers:\n  meshproxy: {self._control.log_level}\n".encode())

    async def _drain(self, request: Request) -> Response:
        self._control.drain()
        return _ok()

    async def _reset(self, request: Request) -> Response:
        await self.refresh()
        self.statistics.reset()
        return _ok()

    async def _quit(self, request: Request) -> Response:
        response = _ok()
        response.after = self._control.quit
        return response


async def serve_admin(
    control: ControlState, sockets: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> AdminServer:
    """Answer on the bound sockets `admin`, `metrics` and `ready`; keep the result, and close() it at the end."""
    server = AdminServer(control, options)
    await server.start(sockets)
    return server


def _refusal(request: Request) -> str | None:
    """Why the admin port does not answer this request; None where it does."""
    if not _is_loopback(request.authority):
        return f"Host {request.authority!r} is not a loopback address or localhost"
    origin = request.header("origin")
    if origin and origin != f"http://{request.authority}":
        return f"requests of origin {origin!r} are not answered"
    return None


def _is_loopback(authority: str) -> bool:
    host = authority.rpartition(":")[0] if re.search(r":[0-9]*$", authority) else authority
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _resources() -> str:
    return "|".join(views.RESOURCES)


def _ok() -> Response:
    return Response(body=b"OK\n")


def _bad(sentence: str) -> Response:
    return Response(status=400, body=f"{sentence}\n".encode("utf-8", "backslashreplace"))


def _json(value: views.Json) -> Response:
    return Response(body=json.dumps(value, indent=1).encode() + b"\n", content_type=_JSON)


def _json_list(name: str, items: Iterable[views.Json]) -> Response:
    """`{"<name>":[…]}`, one item after the other."""

    def text() -> Iterator[str]:
        yield f'{{"{name}":['
        separator = "\n"
        for item in items:
            yield separator + json.dumps(item)
            separator = ",\n"
        yield "]}\n"

    return Response(body=_pieces(text()), content_type=_JSON)


def _pieces(text: Iterable[str]) -> Iterator[bytes]:
    """The same text in pieces worth a write each."""
    gathered: list[str] = []
    size = 0
    for part in text:
        gathered.append(part)
        size += len(part)
        if size >= _PIECE_CHARACTERS:
            yield "".join(gathered).encode("utf-8", "backslashreplace")
            gathered.clear()
            size = 0
    if gathered:
        yield "".join(gathered).encode("utf-8", "backslashreplace")


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("the workers' counts could not be fetched", exc_info=task.exception())
