"""The access log of one worker: a request leaves a tuple; text is made and written later, from the worker's timer.

Decides: what a line looks like and when lines are dropped. Leaves to others: what happened (the entry says it), when to
call flush (the worker, every 100 ms), how many lines were lost (ProcessCounters, shown as a metric).
A reader that is slow, gone or a full disk costs lines, never a request: writes do not block, the buffer is bounded.
Source: Envoy "Access logging" command operators; istio pilot/pkg/model/telemetry_logging.go for the two defaults.
"""

import errno
import os
import re
import select
import socket
import stat
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from meshproxy.errors import ConfigError
from meshproxy.model.listener import AccessLogPolicy
from meshproxy.telemetry.recorder import ProcessCounters

if TYPE_CHECKING:
    import asyncio

Headers = Sequence[tuple[bytes, bytes]]
Value = int | str | bytes | None
Entry = tuple[
    float,  # start_time: wall clock, seconds since the epoch
    float,  # duration_ms: from the first byte of the request to the last of the response
    bytes | None,  # method; None for TCP, so too path, protocol and the headers
    bytes | None,  # path: as it arrived, before any rewrite
    str | None,  # protocol: "HTTP/1.1"
    int,  # response_code: 0 where there was none
    str,  # response_flags: "-" or Envoy's short names joined by commas
    str | None,  # response_code_details: "via_upstream", "route_not_found", …
    str | None,  # connection_termination_details
    str | None,  # upstream_transport_failure_reason
    int,  # bytes_received: body of the request, or bytes from the downstream
    int,  # bytes_sent: body of the response, or bytes to the downstream
    int | None,  # upstream_service_time_ms
    bytes | None,  # x_forwarded_for; this and the next two: None asks the log to look into request_headers
    bytes | None,  # user_agent
    bytes | None,  # request_id
    bytes | None,  # authority: after normalisation, before any rewrite
    str | None,  # upstream_host: "10.0.0.1:80"
    str | None,  # upstream_cluster: Cluster.name
    str | None,  # upstream_local_address
    str | None,  # downstream_local_address
    str | None,  # downstream_remote_address
    str | None,  # requested_server_name: SNI
    str | None,  # route_name
    Headers | None,  # request_headers: names lower-case
    Headers | None,  # response_headers: names lower-case
    str | None,  # downstream_peer_uri_san
    str | None,  # downstream_tls_version: "TLSv1.3"
    int,  # upstream_request_attempt_count: 0 where no upstream was tried
    str | None,  # workload_id: whose listener this was (ours: %WORKLOAD_ID%)
]
"""One finished request or connection, in this order. A plain tuple: making it must cost the request nothing else."""

ENTRY_FIELDS = (
    "start_time",
    "duration_ms",
    "method",
    "path",
    "protocol",
    "response_code",
    "response_flags",
    "response_code_details",
    "connection_termination_details",
    "upstream_transport_failure_reason",
    "bytes_received",
    "bytes_sent",
    "upstream_service_time_ms",
    "x_forwarded_for",
    "user_agent",
    "request_id",
    "authority",
    "upstream_host",
    "upstream_cluster",
    "upstream_local_address",
    "downstream_local_address",
    "downstream_remote_address",
    "requested_server_name",
    "route_name",
    "request_headers",
    "response_headers",
    "downstream_peer_uri_san",
    "downstream_tls_version",
    "upstream_request_attempt_count",
    "workload_id",
)

ISTIO_TEXT_FORMAT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% '
    '%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% '
    '%BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" '
    '"%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% '
    "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)
ISTIO_JSON_FORMAT = {
    "start_time": "%START_TIME%",
    "route_name": "%ROUTE_NAME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
    "protocol": "%PROTOCOL%",
    "response_code": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration": "%DURATION%",
    "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
    "user_agent": "%REQ(USER-AGENT)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "authority": "%REQ(:AUTHORITY)%",
    "upstream_host": "%UPSTREAM_HOST%",
    "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
    "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
    "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "requested_server_name": "%REQUESTED_SERVER_NAME%",
    "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}

BUFFER_BYTES = 1 << 20
MAX_PENDING = 8192
"""Entries not yet formatted; with lines of about 300 bytes twice what BUFFER_BYTES holds."""
LINES_PER_FLUSH = 128
"""Formatting a line costs about 8 µs, so one flush holds the loop for about 1 ms."""
_REOPEN_S = 5.0
_PIPE_ATOMIC_BYTES = 4096  # PIPE_BUF: up to here the lines of two workers in one pipe never mix
_WRITE_BYTES = 1 << 16
_NEWLINE = 10

# ── what a connection tells ──


def local_address(transport: "asyncio.BaseTransport") -> str | None:
    """Our end's address and port, or path; also of a connection that is over."""
    return _written(transport.get_extra_info("sockname"))


def remote_address(transport: "asyncio.BaseTransport") -> str | None:
    return _written(transport.get_extra_info("peername"))


def _written(name: object) -> str | None:
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return str(name) if name else None


def tls_version(transport: "asyncio.BaseTransport") -> str | None:
    """TLSv1.2 or TLSv1.3; None on plaintext."""
    tls: Any = transport.get_extra_info("ssl_object")
    version: str | None = tls.version() if tls is not None else None
    return version


# ── values ──


def _field(name: str) -> Callable[[Entry], Value]:
    return itemgetter(ENTRY_FIELDS.index(name))


_REQUEST_HEADERS = ENTRY_FIELDS.index("request_headers")
_RESPONSE_HEADERS = ENTRY_FIELDS.index("response_headers")


def _header(name: str, source: int) -> Callable[[Entry], Value]:
    wanted = name.lower().encode("latin-1")

    def read(entry: Entry) -> Value:
        headers: Headers | None = entry[source]  # type: ignore[assignment]
        found = [value for key, value in headers or () if key == wanted]
        return b",".join(found) if found else None

    return read


def _first(readers: Sequence[Callable[[Entry], Value]]) -> Callable[[Entry], Value]:
    if len(readers) == 1:
        return readers[0]

    def read(entry: Entry) -> Value:
        for reader in readers:
            value = reader(entry)
            if value is not None:
                return value
        return None

    return read


_REQUEST_FIELDS = {
    ":method": "method",
    ":path": "path",
    ":authority": "authority",
    "host": "authority",
    "x-forwarded-for": "x_forwarded_for",
    "user-agent": "user_agent",
    "x-request-id": "request_id",
}


def _request_header(name: str) -> Callable[[Entry], Value]:
    # The entry's path is the one that arrived, which is what x-envoy-original-path says after a rewrite.
    if name == "x-envoy-original-path":
        return _field("path")
    if name not in _REQUEST_FIELDS:
        return _header(name, _REQUEST_HEADERS)
    field = _field(_REQUEST_FIELDS[name])
    return field if name.startswith(":") else _first((field, _header(name, _REQUEST_HEADERS)))


def _response_header(name: str) -> Callable[[Entry], Value]:
    if name == "x-envoy-upstream-service-time":
        return _first((_field("upstream_service_time_ms"), _header(name, _RESPONSE_HEADERS)))
    if name == ":status":
        return _field("response_code")
    return _header(name, _RESPONSE_HEADERS)


def _truncated(reader: Callable[[Entry], Value], length: int) -> Callable[[Entry], Value]:
    def read(entry: Entry) -> Value:
        value = reader(entry)
        return value[:length] if isinstance(value, str | bytes) else value

    return read


def _without_spaces(reader: Callable[[Entry], Value]) -> Callable[[Entry], Value]:
    """Envoy writes the details operators with underscores: they stand unquoted in a line split by spaces."""

    def read(entry: Entry) -> Value:
        value = reader(entry)
        return value.replace(" ", "_") if isinstance(value, str) else value

    return read


def _host_part(reader: Callable[[Entry], Value]) -> Callable[[Entry], Value]:
    def read(entry: Entry) -> Value:
        value = reader(entry)
        return value.rpartition(":")[0].strip("[]") or value if isinstance(value, str) else value

    return read


def _flags(entry: Entry) -> Value:
    return str.__str__(entry[6])  # a ResponseFlag is a str, but prints as its member's name


def _duration(entry: Entry) -> Value:
    return int(entry[1])


class _StartTime:
    """UTC with milliseconds, or strftime with Envoy's additions %f (µs; %3f ms, %6f, %9f) and %s. The second is cached:
    thousands of lines share it."""

    __slots__ = ("_format", "_second", "_text")

    def __init__(self, format: str | None) -> None:
        self._format = format
        self._second = -1
        self._text = ""

    def __call__(self, entry: Entry) -> Value:
        second, micros = divmod(round(entry[0] * 1_000_000), 1_000_000)
        if second != self._second:
            self._second = second
            pattern = "%Y-%m-%dT%H:%M:%S" if self._format is None else self._format
            pattern = pattern.replace("%s", str(self._second))
            pattern = re.sub(r"%([1-9]?)f", r"%%\1f", pattern)
            self._text = time.strftime(pattern, time.gmtime(self._second)).replace("%%", "%")
        if self._format is None:
            return f"{self._text}.{micros // 1000:03d}Z"
        if "%" not in self._text:
            return self._text
        digits = f"{micros:06d}000"
        return re.sub(r"%([1-9]?)f", lambda found: digits[: int(found[1] or 6)], self._text)


_OPERATORS: dict[str, Callable[[Entry], Value]] = {
    "PROTOCOL": _field("protocol"),
    "RESPONSE_CODE": _field("response_code"),
    "RESPONSE_FLAGS": _flags,
    "RESPONSE_CODE_DETAILS": _without_spaces(_field("response_code_details")),
    "CONNECTION_TERMINATION_DETAILS": _without_spaces(_field("connection_termination_details")),
    "UPSTREAM_TRANSPORT_FAILURE_REASON": _field("upstream_transport_failure_reason"),
    "BYTES_RECEIVED": _field("bytes_received"),
    "BYTES_SENT": _field("bytes_sent"),
    "DURATION": _duration,
    "UPSTREAM_HOST": _field("upstream_host"),
    "UPSTREAM_CLUSTER": _field("upstream_cluster"),
    "UPSTREAM_CLUSTER_RAW": _field("upstream_cluster"),
    "UPSTREAM_LOCAL_ADDRESS": _field("upstream_local_address"),
    "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": _host_part(_field("upstream_local_address")),
    "UPSTREAM_REMOTE_ADDRESS": _field("upstream_host"),
    "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": _host_part(_field("upstream_host")),
    "UPSTREAM_REQUEST_ATTEMPT_COUNT": _field("upstream_request_attempt_count"),
    "DOWNSTREAM_LOCAL_ADDRESS": _field("downstream_local_address"),
    "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": _host_part(_field("downstream_local_address")),
    "DOWNSTREAM_REMOTE_ADDRESS": _field("downstream_remote_address"),
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": _host_part(_field("downstream_remote_address")),
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS": _field("downstream_remote_address"),
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT": _host_part(_field("downstream_remote_address")),
    "DOWNSTREAM_PEER_URI_SAN": _field("downstream_peer_uri_san"),
    "DOWNSTREAM_TLS_VERSION": _field("downstream_tls_version"),
    "REQUESTED_SERVER_NAME": _field("requested_server_name"),
    "ROUTE_NAME": _field("route_name"),
    "WORKLOAD_ID": _field("workload_id"),
}
_OPERATOR = re.compile(r"%%|%([A-Z_0-9]+)(?:\(([^)]*)\))?(?::([0-9]+))?%|%")


def _reader(operator: str, argument: str | None, length: str | None) -> Callable[[Entry], Value]:
    """The reader of one operator; ConfigError where there is no such operator."""
    reader: Callable[[Entry], Value]
    if operator == "START_TIME":
        reader = _StartTime(argument)
    elif operator in ("REQ", "RESP"):
        names = (argument or "").lower().split("?")
        if not all(names):
            raise ConfigError(f"access log format: %{operator}(…)% needs a header name")
        named = _request_header if operator == "REQ" else _response_header
        reader = _first(tuple(named(name) for name in names))
    elif operator == "HOSTNAME":
        hostname = socket.gethostname()
        reader = lambda entry: hostname  # noqa: E731
    elif operator in _OPERATORS and argument is None:
        reader = _OPERATORS[operator]
    else:
        shown = operator if argument is None else f"{operator}({argument})"
        raise ConfigError(f"access log format: unknown operator %{shown}%")
    return reader if length is None else _truncated(reader, int(length))


def _split(format: str) -> tuple[list[str], list[Callable[[Entry], Value]]]:
    """Literal parts and the readers between them; one literal more than readers."""
    literals = [""]
    readers: list[Callable[[Entry], Value]] = []
    at = 0
    for found in _OPERATOR.finditer(format):
        literals[-1] += format[at : found.start()]
        at = found.end()
        if found[0] == "%%":
            literals[-1] += "%"
        elif found[1] is None:
            raise ConfigError(f"access log format: the % at position {found.start() + 1} opens no operator")
        else:
            readers.append(_reader(found[1], found[2], found[3]))
            literals.append("")
    literals[-1] += format[at:]
    return literals, readers


# ── text ──

_UNSAFE = re.compile(r"[^ !#-\[\]-~]")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _plain(value: Value) -> str:
    """`-` for what is not set; nothing escaped."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value or "-"
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def text_formatter(format: str | None) -> Callable[[Entry], bytes]:
    """Entry → line, as the format says; a newline is added where it lacks one. ConfigError on an unknown operator.

    Quotes, backslashes, control and non-ASCII characters in values are escaped: whoever sends a header must not be able
    to forge a line or a field.
    """
    if format is None:
        format = ISTIO_TEXT_FORMAT
    elif not format.endswith("\n"):
        format += "\n"
    literals, readers = _split(format)
    template = "%s".join(literal.replace("%", "%%") for literal in literals)

    def write(entry: Entry) -> bytes:
        values = [_plain(reader(entry)) for reader in readers]
        # One look at all values together; escaping each by the regex costs 5 µs a line.
        joined = "".join(values)
        if not (joined.isascii() and joined.isprintable()) or '"' in joined or "\\" in joined:
            values = [_UNSAFE.sub(_escape, value) for value in values]
        return (template % tuple(values)).encode("utf-8", "backslashreplace")

    return write


# ── JSON ──


def json_formatter(format: str | None) -> Callable[[Entry], bytes]:
    """Entry → one JSON object and a newline. Numbers stay numbers, what is not set is null.

    format: a JSON object whose values are strings with operators, or objects of such; None: Istio's 24 keys.
    """
    from json import loads  # here, not above: a worker that writes text does not need it
    from json.encoder import encode_basestring_ascii

    tree: Any = ISTIO_JSON_FORMAT
    if format is not None:
        try:
            tree = loads(format)
        except ValueError as error:
            raise ConfigError(f"access log format: not a JSON object: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError("access log format: not a JSON object")

    def encode(value: Value) -> str:
        if value is None:
            return "null"
        if isinstance(value, int):
            return str(value)
        return encode_basestring_ascii(value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value)

    writers: list[Callable[[Entry], str]] = []

    def compile_leaf(text: str) -> Callable[[Entry], str]:
        literals, readers = _split(text)
        if len(readers) == 1 and not any(literals):
            reader = readers[0]
            return lambda entry: encode(reader(entry))
        template = "%s".join(literal.replace("%", "%%") for literal in literals)
        return lambda entry: encode(template % tuple([_plain(reader(entry)) for reader in readers]))

    def compile_tree(node: object, path: str) -> str:
        if isinstance(node, dict):
            members = (
                f"{encode(str(key)).replace('%', '%%')}:{compile_tree(value, f'{path}.{key}')}"
                for key, value in node.items()
            )
            return "{" + ",".join(members) + "}"
        if not isinstance(node, str):
            raise ConfigError(f"access log format: {path[1:]} is neither a string nor an object")
        writers.append(compile_leaf(node))
        return "%s"

    template = compile_tree(tree, "") + "\n"
    return lambda entry: (template % tuple([writer(entry) for writer in writers])).encode("ascii")


def formatter(policy: AccessLogPolicy) -> Callable[[Entry], bytes]:
    """ConfigError where the policy's encoding or format is wrong."""
    if policy.encoding == "text":
        return text_formatter(policy.format)
    if policy.encoding == "json":
        return json_formatter(policy.format)
    raise ConfigError(f"access log encoding {policy.encoding!r}: must be text or json")


# ── writing ──


class _Output:
    """An open log file whose writes never wait for a reader."""

    __slots__ = ("_is_pipe", "_may_block", "_socket", "fd")

    def __init__(self, path: str) -> None:
        """OSError where it cannot be opened."""
        inherited = {"/dev/stdout": 1, "/dev/stderr": 2}.get(path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        self._socket: socket.socket | None = None
        self._may_block = False
        if inherited is None:
            self.fd = os.open(path, flags | os.O_CREAT, 0o640)
        else:
            # O_NONBLOCK belongs to the open file, which the shell and the other processes share; so a pipe or terminal
            # is opened anew. A regular file is not: it is their common offset that keeps our writes apart. A socket
            # (systemd's journal) cannot be.
            kind = os.fstat(inherited).st_mode
            if stat.S_ISSOCK(kind):
                self._socket = socket.socket(fileno=os.dup(inherited))
                self.fd = self._socket.fileno()
            elif stat.S_ISREG(kind):
                self.fd = os.dup(inherited)
            else:
                try:
                    self.fd = os.open(f"/proc/self/fd/{inherited}", flags)
                except OSError:  # another user's pipe, as in a container that dropped its privileges
                    self.fd = os.dup(inherited)
                    self._may_block = True
        self._is_pipe = stat.S_ISFIFO(os.fstat(self.fd).st_mode)

    def write(self, buffer: bytearray) -> int:
        """Bytes taken, 0 when the reader is behind. OSError for a reader that is gone or a full disk."""
        length = min(len(buffer), _WRITE_BYTES)
        if self._is_pipe or self._may_block:
            length = min(length, _PIPE_ATOMIC_BYTES)
        if length < len(buffer):
            length = buffer.rfind(b"\n", 0, length) + 1 or length
        with memoryview(buffer) as view, view[:length] as chunk:
            try:
                if self._socket is not None:
                    return self._socket.send(chunk, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                if self._may_block and not self._has_room():
                    return 0
                return os.write(self.fd, chunk)
            except BlockingIOError:
                return 0

    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(0))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self.fd)


class AccessLog:
    """append() on the request path, flush() from the worker's timer.

    counters: where written and dropped lines are counted (Recorder.process).
    """

    __slots__ = (
        "_buffer",
        "_format",
        "_is_mid_line",
        "_is_torn",
        "_output",
        "_pending",
        "_retry_at",
        "counters",
        "policy",
        "problem",
    )

    def __init__(self, policy: AccessLogPolicy, counters: ProcessCounters | None = None) -> None:
        """ConfigError for a wrong format. A file that cannot be opened is no error: see problem."""
        self.policy = policy
        self.counters = ProcessCounters() if counters is None else counters
        self.problem: str | None = None
        """One sentence while lines cannot be written, None otherwise."""
        self._format = formatter(policy)
        self._pending: list[Entry] = []
        self._buffer = bytearray()
        self._is_mid_line = False
        self._is_torn = False
        """The end of a half-written line was dropped: the buffer starts with a newline that ends it."""
        self._output: _Output | None = None
        self._retry_at = 0.0
        self._open()

    def append(self, entry: Entry) -> None:
        """Remember one finished request; about 60 ns."""
        if len(self._pending) < MAX_PENDING:
            self._pending.append(entry)
        else:
            self.counters.access_log_dropped += 1

    def flush(self, lines: int = LINES_PER_FLUSH) -> bool:
        """Format at most so many lines and write what the file takes. True: more entries wait, call again soon.

        Who calls again only after 100 ms loses no line either: of a long queue half is done at once.
        """
        pending = self._pending
        if pending:
            lines = max(lines, len(pending) // 2)
            batch = pending[:lines]
            del pending[:lines]
            buffer = self._buffer
            format = self._format
            for at, entry in enumerate(batch):
                if len(buffer) >= BUFFER_BYTES:
                    self.counters.access_log_dropped += len(batch) - at
                    break
                buffer += format(entry)
        if self._buffer:
            self._write()
        return bool(pending)

    def reopen(self) -> None:
        """Open the path again (SIGHUP after the log was rotated)."""
        if self._output is not None:
            self._output.close()
            self._output = None
        self._open()

    def close(self) -> None:
        """Write what can be written at once; what remains is counted as dropped."""
        while self.flush():
            pass
        self._drop_buffer()
        if self._output is not None:
            self._output.close()
            self._output = None

    def _open(self) -> None:
        try:
            self._output = _Output(self.policy.path)
        except OSError as error:
            self._fail(error)
        else:
            self.problem = None

    def _write(self) -> None:
        if self._output is None and time.monotonic() >= self._retry_at:
            self._open()
        if self._output is None:
            self._drop_buffer()
            return
        buffer = self._buffer
        while buffer:
            try:
                taken = self._output.write(buffer)
            except OSError as error:
                self._fail(error)
                return
            if not taken:
                return
            # The newline that ends a torn line is no line of its own.
            self.counters.access_log_written += buffer.count(b"\n", 0, taken) - self._is_torn
            self._is_torn = False
            self._is_mid_line = buffer[taken - 1] != _NEWLINE
            del buffer[:taken]
            self.problem = None

    def _fail(self, error: OSError) -> None:
        self.problem = f"access log {self.policy.path}: {error.strerror or error}; lines are dropped"
        self._retry_at = time.monotonic() + _REOPEN_S
        self._drop_buffer()
        # A pipe whose reader has gone may have a new one; a full disk may have room: the file stays open, the pipe not.
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF) and self._output is not None:
            self._output.close()
            self._output = None
            self._is_mid_line = False

    def _drop_buffer(self) -> None:
        self.counters.access_log_dropped += self._buffer.count(b"\n") - self._is_torn
        self._buffer.clear()
        self._is_torn = self._is_mid_line
        if self._is_torn:
            self._buffer += b"\n"
