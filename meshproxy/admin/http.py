"""The small HTTP/1.1 server behind the admin, metrics and ready ports.

Decides: limits, keep-alive, how a body is sent. Leaves to others: the grammar of requests (codec.http1, the same strict
one the data path has), what is answered (admin.server).
Everything is bounded: head, body, connections, how long a client may be idle or not read. A body may be an iterator;
its pieces are made only as fast as the client takes them.
"""

import asyncio
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

from meshproxy.codec.http1 import CHUNKED, RequestHead, find_field, request_head, skip_empty_lines
from meshproxy.errors import RemoteProtocolError

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8192
MAX_BODY_BYTES = 8192
"""Bodies mean nothing here and are thrown away; curl sends an empty one with every POST."""
MAX_CONNECTIONS = 64
IDLE_TIMEOUT_S = 30.0
"""For a whole request to arrive, between requests, and for a client to take what was sent."""

_REASONS = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class Request:
    """method and path are text; query holds the last value of each parameter, "" for one without."""

    __slots__ = ("_head", "authority", "method", "path", "query")

    def __init__(self, head: RequestHead) -> None:
        self._head = head
        self.method = head.method.decode("latin-1")
        self.authority = head.authority.decode("latin-1")
        path, _, query = head.path.decode("latin-1").partition("?")
        self.path = path
        self.query = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=16))

    def header(self, name: str) -> str:
        """ "" where there is none."""
        return (find_field(self._head.block, name.encode("latin-1")) or b"").decode("latin-1")

    @property
    def accepts_gzip(self) -> bool:
        for part in self.header("accept-encoding").lower().split(","):
            coding, _, quality = part.replace(" ", "").partition(";q=")
            if coding in ("gzip", "*"):
                return quality.strip("0.") != "" or not quality
        return False


@dataclass(slots=True, kw_only=True)
class Response:
    """body: all of it, or pieces to be sent as they are made."""

    status: int = 200
    body: bytes | Iterator[bytes] = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()
    after: Callable[[], None] | None = None
    """Called when the response has been handed to the kernel's buffer."""


Handler = Callable[[Request], Awaitable[Response]]


class HttpService:
    """One handler; protocol() is the factory for loop.create_server."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections: set[Connection] = set()

    def protocol(self) -> "Connection":
        return Connection(self)

    def close(self) -> None:
        """Drop what is open."""
        for connection in list(self.connections):
            connection.abort()


class Connection(asyncio.Protocol):
    """One client; one request at a time, later ones wait in the buffer or in the kernel."""

    def __init__(self, service: HttpService) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._has_continued = False
        self._is_ended = False
        """The client has said all it will say."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._service.connections.add(self)
        if len(self._service.connections) > MAX_CONNECTIONS:
            self._refuse(503, "too many connections")
        else:
            self._arm()

    def connection_lost(self, error: Exception | None) -> None:
        self._service.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._buffer += data
        if self._task is None:
            self._read()
        elif len(self._buffer) > MAX_HEAD_BYTES:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._is_ended = True
        return self._task is not None

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    @property
    def can_write(self) -> bool:
        """False while the client is behind with reading."""
        return self._can_write.is_set()

    def abort(self) -> None:
        self._transport.abort()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(IDLE_TIMEOUT_S, self.abort)

    def _read(self) -> None:
        """Start on the request at the front of the buffer, if it is there whole."""
        data = bytes(self._buffer)
        at = skip_empty_lines(data)
        try:
            head = request_head(data, at)
        except RemoteProtocolError as error:
            self._refuse(error.status, error.detail)
            return
        if head is None or head.length > MAX_HEAD_BYTES:
            if len(data) - at > MAX_HEAD_BYTES:
                self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")
            return
        if head.body == CHUNKED or head.body > MAX_BODY_BYTES:
            self._refuse(413, f"a request's body may have at most {MAX_BODY_BYTES} bytes, with Content-Length")
            return
        end = at + head.length + head.body
        if len(data) < end:
            if head.expects_continue and not self._has_continued:
                self._has_continued = True
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        del self._buffer[:end]
        self._has_continued = False
        self._arm()
        self._task = self._loop.create_task(self._answer(head))
        self._task.add_done_callback(self._on_answered)

    def _refuse(self, status: int, why: str) -> None:
        body = f"{why}\n".encode("latin-1", "backslashreplace")
        self._transport.write(_head_bytes(status, "text/plain; charset=utf-8", len(body), False, ()) + body)
        self._transport.close()

    async def _answer(self, head: RequestHead) -> None:
        request = Request(head)
        try:
            response = await self._service.handler(request)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            response = Response(status=500, body=b"an internal error was logged\n")
        keeps_alive = head.keeps_alive and not self._is_ended
        is_head_request = request.method == "HEAD"
        if isinstance(response.body, bytes):
            self._transport.write(
                _head_bytes(response.status, response.content_type, len(response.body), keeps_alive, response.headers)
            )
            if not is_head_request:
                self._transport.write(response.body)
        else:
            keeps_alive = await self._stream(request, response, response.body, head.minor, keeps_alive)
        await self._can_write.wait()
        if response.after is not None:
            response.after()
        if not keeps_alive:
            self._transport.close()

    async def _stream(
        self, request: Request, response: Response, pieces: Iterator[bytes], minor: int, keeps_alive: bool
    ) -> bool:
        """Whether the connection can go on: HTTP/1.0 knows no chunks, there the end is the end."""
        is_chunked = minor >= 1
        keeps_alive = keeps_alive and is_chunked
        headers = response.headers
        compressor = None
        if request.accepts_gzip:
            compressor = zlib.compressobj(1, zlib.DEFLATED, 31)  # 31: gzip's wrapping
            headers = (*headers, ("content-encoding", "gzip"))
        if is_chunked:
            headers = (*headers, ("transfer-encoding", "chunked"))
        self._transport.write(_head_bytes(response.status, response.content_type, None, keeps_alive, headers))
        if request.method == "HEAD":
            return keeps_alive
        for piece in pieces:
            self._write_piece(piece if compressor is None else compressor.compress(piece), is_chunked)
            await self._can_write.wait()
            self._arm()
            # A scrape of a thousand services is hundreds of pieces: others get their turn between two.
            await asyncio.sleep(0)
        if compressor is not None:
            self._write_piece(compressor.flush(), is_chunked)
        if is_chunked:
            self._transport.write(b"0\r\n\r\n")
        return keeps_alive

    def _write_piece(self, piece: bytes, is_chunked: bool) -> None:
        if piece:
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)

    def _on_answered(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        if task.exception() is not None:
            # The response has begun: all that is left is to not let it look complete.
            _log.error("a response failed half-way", exc_info=task.exception())
            self.abort()
            return
        if self._transport.is_closing():
            return
        if self._is_ended and not self._buffer:
            self._transport.close()
            return
        self._arm()
        self._transport.resume_reading()
        if self._buffer:
            self._read()


def _head_bytes(
    status: int, content_type: str, length: int | None, keeps_alive: bool, headers: tuple[tuple[str, str], ...]
) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, '')}",
        f"date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
        f"content-type: {content_type}",
        "cache-control: no-cache, max-age=0",
        "x-content-type-options: nosniff",
        "server: meshproxy",
    ]
    if length is not None:
        lines.append(f"content-length: {length}")
    if not keeps_alive:
        lines.append("connection: close")
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
