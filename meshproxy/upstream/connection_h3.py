"""One HTTP/3 upstream connection, shared by many requests; each stream of it looks like a connection to its request.

Decides: is the server who it must be, how many requests may share the connection, when it takes no more. Leaves to
others: QUIC (codec.quic), frames (codec.http3), what field lists may hold (codec.http2_fields), QUIC or TCP
(upstream.transport_choice), what the response means (proxy.http_stream).

Each connection has a connected UDP socket of its own: what the network says of the endpoint (ICMP) reaches the right
one, and nobody else's datagrams do. No session is resumed and nothing is sent before the server's certificate is
verified: not a byte of a request, nor our own certificate.

Imported only once a cluster asks for HTTP/3: aioquic and cryptography take 15 MiB.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import lru_cache, partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicErrorCode

from meshproxy.codec import http3
from meshproxy.codec.http1 import NO_BODY, RequestHead, ResponseHead
from meshproxy.codec.http2 import StreamError
from meshproxy.codec.http2_fields import (
    extended_connect,
    from_block,
    from_trailers,
    response_head,
    trailers,
    tunnel_opened,
)
from meshproxy.codec.http3 import FieldDecoder, Http3Error, ResponseReader, ServerStreams
from meshproxy.codec.quic import CONNECTION_WINDOW, STREAM_WINDOW, ClientConnection
from meshproxy.errors import ConfigError, RemoteProtocolError
from meshproxy.tls.quic import ServerVerifier, check_host, client_configuration
from meshproxy.tls.verify import IdentityRefused, check_names, check_server
from meshproxy.upstream.connection_h1 import HIGH_WATER_BYTES, LOW_WATER_BYTES, MAX_INFORMATIONAL, Stream
from meshproxy.upstream.transport_choice import QuicTries
from meshproxy.upstream.worker_state import NEVER

if TYPE_CHECKING:
    from meshproxy.upstream.cluster_runtime import EndpointRuntime
    from meshproxy.upstream.connect import UpstreamTlsContext

BATCH = 64
"""Datagrams taken in one loop turn."""
DATAGRAM_BYTES = 2048
UNACKNOWLEDGED_HIGH_BYTES = 1024 * 1024
"""Of a request that is sent and not acknowledged; kept, as it may have to be sent again."""
KEEP_ALIVE_S = 15.0
"""Between PINGs while a request is under way, so that a slow answer does not make the connection look idle."""
SILENCE_S = 10.0
"""Of probes without an answer: the way is gone. TCP would go on for minutes."""
TIMER_GRAIN_S = 0.0005
"""Timers that close together go off at once."""
MAX_REFUSALS = 3
"""Port unreachable, in a row: anyone may forge one, so that one alone ends nothing (RFC 9000 §14.2.1)."""
MAX_FREE = 32
MAX_KNOWN = 256
"""Field sections of answers remembered by a connection."""
MAX_SECTIONS = 1024
"""Of requests, by the process: the shorter ones."""
MAX_KNOWN_BYTES = 2048
_BAD_CERTIFICATE = 42
_ENABLE_CONNECT_PROTOCOL = 0x8
_REQUEST_ID = b"\r\nx-request-id: "
_LITERAL_REQUEST_ID = b"\x37\x05x-request-id\x24"
"""A literal that is never indexed, its name spelt out (RFC 9204 §4.5.6), and the length of its value."""

Refuses = Callable[[ClientConnection], str | None]
"""Why the server is not who it must be; None when it is."""

_sections: dict[Any, bytes] = {}
"""Requests' field sections. They refer to no table of a connection's own, so one dictionary serves the process."""


async def connect(endpoint: "EndpointRuntime", tries: QuicTries) -> "UpstreamH3":
    """A connection whose server is verified; adopt() makes it one of the endpoint's.

    OSError (ConnectionError) where it does not come about, ConfigError where certificates do not load. Ends only with
    an answer: what comes from nowhere is for the caller to end.
    """
    loop = endpoint.cluster.state.loop
    if tries.made_from is not endpoint.tls:
        tries.setup = _setup(endpoint)
        tries.made_from = endpoint.tls
    configuration, refuses = tries.setup
    where = endpoint.endpoint
    family = socket.AF_INET6 if ":" in where.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect((where.address, where.port))
    except OSError:
        sock.close()
        raise
    done: asyncio.Future[None] = loop.create_future()
    connection = UpstreamH3(
        endpoint, ClientConnection(configuration=configuration), sock, refuses, partial(_tell, done)
    )
    try:
        await done
    except BaseException:
        connection.abort()
        raise
    return connection


def _tell(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _setup(endpoint: "EndpointRuntime") -> tuple[QuicConfiguration, Refuses]:
    """What upstream_tls says for TCP, said for QUIC."""
    tls = endpoint.tls
    assert tls is not None, "there is no QUIC without TLS"
    if tls.is_mesh:
        bundle = endpoint.cluster.workload.bundle
        assert bundle is not None, "mesh TLS without certificates is refused before"
        chain_pem, key_pem, roots_pem = bundle.chain_pem, bundle.key_pem, bundle.roots_pem
    else:
        spec = endpoint.cluster.cluster.tls
        chain_pem, key_pem = _read(spec.certificate_file), _read(spec.key_file)
        roots_pem = b""
        if not spec.insecure_skip_verify:
            roots_pem = _read(spec.ca_file or ssl.get_default_verify_paths().cafile)
    configuration = _configuration(chain_pem, key_pem, tls.sni)
    return configuration, partial(_refuses, tls, _verifier(roots_pem) if roots_pem else None)


def _refuses(tls: "UpstreamTlsContext", verifier: ServerVerifier | None, quic: ClientConnection) -> str | None:
    chain = quic.peer_chain
    if verifier is None:
        return None if not tls.is_mesh else "there are no roots to check the server against"
    try:
        certificate, der = verifier.verify(chain)
    except IdentityRefused as refusal:
        return refusal.sentence
    if tls.is_mesh:
        return check_server(certificate, tls.expected_ids, tls.trust_domain, der=der)
    if tls.expected_ids:
        return check_names(certificate, tls.expected_ids)
    return check_host(chain[0], tls.sni)


def _read(path: str | None) -> bytes:
    if path is None:
        return b""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


@lru_cache(maxsize=64)
def _configuration(chain_pem: bytes, key_pem: bytes, server_name: str) -> QuicConfiguration:
    return client_configuration(
        chain_pem,
        key_pem,
        server_name=server_name,
        stream_window=STREAM_WINDOW,
        connection_window=CONNECTION_WINDOW,
    )


@lru_cache(maxsize=16)
def _verifier(roots_pem: bytes) -> ServerVerifier:
    return ServerVerifier(roots_pem)


class UpstreamH3:
    """The connection; for whoever asks for a transport, it is that as well."""

    __slots__ = (
        "_address",
        "_armed_at",
        "_decoder",
        "_free",
        "_is_adopted",
        "_is_waking",
        "_memo",
        "_on_done",
        "_opened_at",
        "_ping_at",
        "_refusals",
        "_refuses",
        "_server",
        "_silent_since",
        "_sock",
        "_sockname",
        "_timer",
        "_upgrades",
        "_watched",
        "deadline",
        "endpoint",
        "is_dead",
        "is_going",
        "is_open",
        "quic",
        "requests",
        "scheme",
        "streams",
        "transport",
    )

    def __init__(
        self,
        endpoint: "EndpointRuntime",
        quic: ClientConnection,
        sock: socket.socket,
        refuses: Refuses,
        on_done: Callable[[Exception | None], None],
    ) -> None:
        """sock: connected to the endpoint. on_done: called once, when the server is verified or the attempt failed."""
        self.endpoint = endpoint
        self.quic = quic
        self.deadline = NEVER
        self.requests = 0
        self.is_open = False
        """The handshake is complete, and the server who it must be."""
        self.is_going = False
        """It takes no more requests, and closes when it has none."""
        self.is_dead = False
        self.scheme = b"https"
        self.streams: dict[int, UpstreamH3Stream] = {}
        self.transport = self
        self._refuses = refuses
        self._on_done: Callable[[Exception | None], None] | None = on_done
        self._sock = sock
        self._sockname = sock.getsockname()
        self._address = sock.getpeername()
        self._server = _Server(self)
        self._decoder = FieldDecoder()
        self._free: list[UpstreamH3Stream] = []
        self._memo: dict[tuple[bytes, bool, bool], ResponseHead] = {}
        self._watched: set[UpstreamH3Stream] = set()
        """Streams whose request waits for the server."""
        self._upgrades: list[UpstreamH3Stream] = []
        """Tunnels that wait to hear whether the server knows extended CONNECT."""
        self._is_adopted = False
        self._is_waking = False
        self._refusals = 0
        self._ping_at = NEVER
        self._timer: Any = None
        self._armed_at = NEVER
        self._opened_at = self._silent_since = monotonic()
        endpoint.cluster.state.loop.add_reader(sock.fileno(), self._on_readable)
        quic.connect(self._address, self._opened_at)
        self._transmit(self._opened_at)

    # ── the pool's side ──

    def adopt(self) -> None:
        """It is chosen: from now on it is one of the endpoint's connections."""
        endpoint = self.endpoint
        self._is_adopted = True
        endpoint.connections.add(self)
        endpoint.shared.append(self)
        endpoint.cluster.state.timed.add(self)
        counters = endpoint.cluster.counters
        counters.upstream_cx_active += 1
        counters.upstream_cx_http3_total += 1

    def has_room(self) -> bool:
        spec = self.endpoint.cluster.cluster
        limit = spec.max_concurrent_streams
        if self.is_going or self.is_closing() or (limit and len(self.streams) >= limit) or self.quic.streams_left <= 0:
            return False
        if (
            0 < spec.max_requests_per_connection <= self.requests
            or (spec.max_connection_duration_s or NEVER) <= monotonic() - self._opened_at
        ):
            self.retire()
            return False
        return True

    def open_stream(self) -> "UpstreamH3Stream":
        """A place for one request; only after has_room(), and for one that is sent in this turn."""
        return self._free.pop() if self._free else UpstreamH3Stream(self)

    def begin(self, stream: "UpstreamH3Stream") -> None:
        stream.open(self.quic.get_next_available_stream_id())
        self.streams[stream.id] = stream
        self.requests += 1
        if self._ping_at is NEVER:
            self.deadline = self._ping_at = monotonic() + KEEP_ALIVE_S

    def retire(self) -> None:
        """No more requests; those it has are finished."""
        self.is_going = True
        if self in self.endpoint.shared:
            self.endpoint.shared.remove(self)
        if not self.streams:
            self._close(http3.NO_ERROR)

    def stream_over(self, stream: "UpstreamH3Stream") -> None:
        self._watched.discard(stream)
        if len(self._free) < MAX_FREE and not self.is_dead:
            self._free.append(stream)
        if self.streams or self.is_dead:
            return
        self._ping_at = NEVER
        endpoint = self.endpoint
        if self.is_going or endpoint.is_removed or endpoint.is_ejected:
            self.retire()
            return
        idle_timeout_s = endpoint.cluster.cluster.idle_timeout_s
        self.deadline = NEVER if idle_timeout_s is None else monotonic() + idle_timeout_s

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        if self.streams:
            self.deadline = self._ping_at = now + KEEP_ALIVE_S
            self.quic.send_ping(0)
            self.wake()
        else:
            self.endpoint.cluster.counters.upstream_cx_idle_timeout += 1
            self.retire()

    def held_bytes(self) -> int:
        return self.get_write_buffer_size() + sum(stream.untaken for stream in self.streams.values())

    def shed(self) -> None:
        self.abort()

    # ── a transport, as far as others ask for one ──

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self._address
        return self._sockname if name == "sockname" else default

    def is_closing(self) -> bool:
        return self.is_dead or self.quic.is_closing

    def get_write_buffer_size(self) -> int:
        return sum(sum(self.quic.waiting_bytes(stream_id)) for stream_id in self.streams)

    def close(self) -> None:
        self.retire()

    def abort(self) -> None:
        self._close(http3.NO_ERROR)

    # ── datagrams and timers ──

    def _on_readable(self) -> None:
        receive, quic = self._sock.recv, self.quic
        now = monotonic()
        for _ in range(BATCH):
            try:
                data = receive(DATAGRAM_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._on_refused(error)
                break
            self._refusals = 0
            if not data:
                continue
            if quic.is_reset_by(data):
                self.over("connection_termination", ConnectionResetError("stateless reset"))
                return
            quic.receive_datagram(data, self._address, now)
        self._settle(now)

    def _on_refused(self, error: OSError) -> None:
        """The network says that nobody is there."""
        self._refusals += 1
        if not self.is_open or self._refusals >= MAX_REFUSALS:
            self.over("connection_termination", error)

    def _settle(self, now: float) -> None:
        if self.is_dead:
            return
        try:
            self._take_events()
        except Http3Error as error:
            self._fail(error)
        if not self.is_dead:
            self._transmit(now)

    def wake(self) -> None:
        if not self._is_waking:
            self._is_waking = True
            self.quic.acknowledge_now()
            self.endpoint.cluster.state.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_waking = False
        if not self.is_dead:
            self._transmit(monotonic())

    def _transmit(self, now: float) -> None:
        quic = self.quic
        for data, _ in quic.datagrams_to_send(now):
            try:
                self._sock.send(data)
            except BlockingIOError:
                break  # as good as lost on the way: QUIC sends it again
            except OSError as error:
                self._on_refused(error)
                if self.is_dead:
                    return
        if quic.is_closing:
            self.over("connection_termination", ConnectionAbortedError("closed"))
            return
        if self._watched:
            self._look()
        at = quic.get_timer()
        if at is not None and at < self._armed_at:
            self._arm(at)

    def _arm(self, at: float) -> None:
        """A timer that goes off before its time is armed again then: most are put off before they go off."""
        if self._timer is not None:
            self._timer.cancel()
        self._armed_at = at
        self._timer = self.endpoint.cluster.state.loop.call_later(max(0.0, at - monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._armed_at = NEVER
        now = monotonic()
        at = self.quic.get_timer()
        if at is not None and at > now + TIMER_GRAIN_S:
            self._arm(at)
            return
        self.quic.handle_timer(now + TIMER_GRAIN_S)
        probes = self.quic.probes
        if probes <= 1:
            self._silent_since = now
        elif self.is_open and now - self._silent_since >= SILENCE_S:
            if self.endpoint.http3 is not None:
                self.endpoint.http3.failed(now)
                self.endpoint.cluster.counters.upstream_http3_broken += 1
            self.over("connection_termination", TimeoutError("no answer"))
            return
        self._settle(now)

    # ── events ──

    def _take_events(self) -> None:
        quic = self.quic
        while (event := quic.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                if self.is_open and not quic.is_closing:
                    self._on_stream_data(event.stream_id, event.data, event.end_stream)
            elif isinstance(event, events.HandshakeCompleted):
                self._on_handshake()
            elif isinstance(event, events.StreamReset):
                self._on_reset(event.stream_id, event.error_code)
            elif isinstance(event, events.StopSendingReceived):
                self._on_stop_sending(event.stream_id, event.error_code)
            elif isinstance(event, events.ConnectionTerminated):
                self.over("connection_termination", ConnectionAbortedError(event.reason_phrase or "closed"))
                return

    def _on_handshake(self) -> None:
        quic = self.quic
        reason = self._refuses(quic)
        if reason is not None:
            code = QuicErrorCode.CRYPTO_ERROR + _BAD_CERTIFICATE
            quic.close(error_code=code, frame_type=0x6, reason_phrase="bad certificate")
            self._done(ConnectionAbortedError(reason))
            return
        self.is_open = True
        control = quic.get_next_available_stream_id(is_unidirectional=True)
        quic.send_stream_data(control, b"\x00" + http3.our_settings())
        self._done(None)

    def _done(self, error: Exception | None) -> None:
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            on_done(error)

    def _on_stream_data(self, stream_id: int, data: bytes, is_end: bool) -> None:
        quic = self.quic
        if stream_id & 1:
            if not stream_id & 2:
                raise Http3Error(http3.STREAM_CREATION_ERROR, "stream_of_the_server")
            quic.take(len(data))
            if not self._server.receive(stream_id, data, is_end) and not is_end and quic.has_stream(stream_id):
                quic.stop_stream(stream_id, http3.STREAM_CREATION_ERROR)
            quic.grant(stream_id, 0)
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            quic.take(len(data))
            return
        stream.is_peer_ended = is_end
        stream.receive(data, is_end)
        if stream.id != stream_id:
            quic.take(len(data))
        elif stream.is_held:
            stream.untaken += len(data)
        else:
            quic.take(len(data))
            if not is_end:
                quic.grant(stream_id, stream.held)

    def _on_reset(self, stream_id: int, code: int) -> None:
        if stream_id & 1:
            if self._server.is_critical(stream_id):
                raise Http3Error(http3.CLOSED_CRITICAL_STREAM, "critical_stream_reset")
            return
        self.quic.take_rest(stream_id)
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.is_peer_ended = True
            stream.lose("refused_stream" if code == http3.REQUEST_REJECTED else "reset")

    def _on_stop_sending(self, stream_id: int, code: int) -> None:
        """The server wants no more of the request; aioquic has reset our side already."""
        if stream_id & 2:
            raise Http3Error(http3.CLOSED_CRITICAL_STREAM, "critical_stream_stopped")
        stream = self.streams.get(stream_id)
        if stream is not None:
            stream.is_ended = True
            stream.on_writable()
            self._watched.discard(stream)

    def head_of(self, block: bytes, is_head_request: bool, is_end: bool) -> ResponseHead:
        """The head of a field section: what came before in the same bytes is not read again."""
        key = (block, is_end, is_head_request)
        head = self._memo.get(key)
        if head is None:
            fields = self._decoder.decode(block)
            if fields is None:
                raise RemoteProtocolError("http3.headers_too_large", 502)
            head = response_head(fields, is_head_request, is_end)
            if len(block) <= MAX_KNOWN_BYTES:
                if len(self._memo) >= MAX_KNOWN:
                    self._memo.clear()
                self._memo[key] = head
        return head

    def trailers_of(self, block: bytes) -> bytes:
        fields = self._decoder.decode(block)
        if fields is None:
            raise RemoteProtocolError("http3.trailers_too_large", 502)
        return trailers(fields)

    def on_settings(self, settings: dict[int, int]) -> None:
        waiting, self._upgrades = self._upgrades, []
        for stream in waiting:
            stream.send_upgrade()

    def on_goaway(self, stream_id: int) -> None:
        """Requests from stream_id on were never looked at: they may go elsewhere (RFC 9114 §5.2)."""
        self.is_going = True
        if self in self.endpoint.shared:
            self.endpoint.shared.remove(self)
        for stream in [stream for stream in self.streams.values() if stream.id >= stream_id]:
            stream.lose("refused_stream")
        if not self.streams:
            self._close(http3.NO_ERROR)

    @property
    def has_settings(self) -> bool:
        return self._server.has_settings

    @property
    def allows_tunnels(self) -> bool:
        return self._server.settings.get(_ENABLE_CONNECT_PROTOCOL) == 1

    # ── requests that wait for the server ──

    def watch(self, stream: "UpstreamH3Stream") -> None:
        self._watched.add(stream)

    def await_settings(self, stream: "UpstreamH3Stream") -> None:
        self._upgrades.append(stream)

    def forget_upgrade(self, stream: "UpstreamH3Stream") -> None:
        if stream in self._upgrades:
            self._upgrades.remove(stream)

    def _look(self) -> None:
        waiting = self.quic.waiting_bytes
        for stream in list(self._watched):
            unsent, unacknowledged = waiting(stream.id)
            if unsent <= LOW_WATER_BYTES and unacknowledged <= UNACKNOWLEDGED_HIGH_BYTES:
                self._watched.discard(stream)
                stream.on_writable()

    # ── ending ──

    def _fail(self, error: Http3Error) -> None:
        self.count_broken(error.detail)
        self.quic.close(error_code=error.code, reason_phrase=error.detail)

    def count_broken(self, detail: str) -> None:
        self.endpoint.cluster.counters.upstream_cx_protocol_error += 1
        self.endpoint.cluster.state.counters.protocol_error(detail)

    def _close(self, code: int) -> None:
        """At once: CONNECTION_CLOSE goes out, and what comes after it is nobody's."""
        if self.is_dead:
            return
        self.quic.close(error_code=code)
        for data, _ in self.quic.datagrams_to_send(monotonic()):
            try:
                self._sock.send(data)
            except OSError:
                break
        self.over("connection_termination", ConnectionAbortedError("closed"))

    def over(self, detail: str, error: Exception) -> None:
        """The connection is no more; idempotent."""
        if self.is_dead:
            return
        self.is_dead = True
        self.deadline = NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        endpoint = self.endpoint
        cluster = endpoint.cluster
        cluster.state.loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self in endpoint.shared:
            endpoint.shared.remove(self)
        self._free.clear()
        self._done(error)
        waiting, self._upgrades = self._upgrades, []
        for stream in [*self.streams.values(), *waiting]:
            stream.lose(detail)
        if self._is_adopted:
            endpoint.connections.discard(self)
            cluster.state.timed.discard(self)
            cluster.counters.upstream_cx_active -= 1
            cluster.connection_closed()


class _Server(ServerStreams):
    """The server's own streams, and whom to tell of what they say."""

    __slots__ = ("_connection", "has_settings")

    def __init__(self, connection: UpstreamH3) -> None:
        super().__init__()
        self._connection = connection
        self.has_settings = False

    def on_settings(self) -> None:
        self.has_settings = True
        self._connection.on_settings(self.settings)

    def on_goaway(self, stream_id: int) -> None:
        self._connection.on_goaway(stream_id)


class UpstreamH3Stream(ResponseReader):
    """One request's share of the connection: what proxy.http_stream takes for a connection."""

    __slots__ = (
        "_expected",
        "_has_head",
        "_http",
        "_informational",
        "_is_full",
        "_is_head_request",
        "_is_tunnel",
        "_trailers",
        "_upgrade",
        "_upgrade_head",
        "connection",
        "id",
        "is_ended",
        "is_held",
        "is_peer_ended",
        "untaken",
    )

    def __init__(self, connection: UpstreamH3) -> None:
        super().__init__()
        self.connection = connection
        self._upgrade = b""
        self._http: Stream | None = None
        """None before send and after release."""
        self.id = -1
        self.untaken = 0
        """Bytes that have come and whose window is not given back: the downstream does not take more."""
        self.is_held = self.is_ended = self.is_peer_ended = False

    def open(self, stream_id: int) -> None:
        self.restart()
        self.id = stream_id
        self.untaken = 0
        self._expected = -1
        """Of the body, as content-length says; -1: unknown."""
        self._informational = 0
        self._trailers = b""
        self.is_ended = self.is_peer_ended = self._has_head = self._is_full = False

    @property
    def requests(self) -> int:
        """1: a server says by GOAWAY or a rejected stream what it has not looked at; nothing has to be guessed."""
        return 1

    @property
    def endpoint(self) -> "EndpointRuntime":
        return self.connection.endpoint

    @property
    def transport(self) -> UpstreamH3:
        return self.connection

    # ── proxy.http_stream's side ──

    def send(self, stream: Stream, head: RequestHead, path: bytes, block: bytes, suffix: bytes) -> None:
        connection = self.connection
        self._http = stream
        method = head.method
        self._is_head_request = method == b"HEAD"
        self._is_tunnel = self.is_held = False
        self._upgrade = head.upgrade
        if head.upgrade:
            self._upgrade_head = (path, block + suffix)
            self.is_ended = False
            if connection.has_settings:
                connection.endpoint.cluster.state.loop.call_soon(self.send_upgrade)
            else:
                connection.await_settings(self)
            return
        section = request_section(connection.scheme, method, path, block, suffix)
        connection.begin(self)
        self._write(b"\x01" + http3.number(len(section)) + section, head.body == NO_BODY)

    def send_upgrade(self) -> None:
        """Extended CONNECT (RFC 9220): what HTTP/1.1 calls an upgrade. Its key and proof exist in HTTP/1.1 only."""
        connection = self.connection
        if self._http is None or not self._upgrade or self.id >= 0:
            return  # it left meanwhile, or is another request's by now
        if not connection.allows_tunnels or not connection.has_room():
            self.lose("upstream.http3.no_extended_connect")
            return
        connection.begin(self)
        path, lines = self._upgrade_head
        section = http3.encode(extended_connect(self._upgrade, connection.scheme, path, lines))
        self._write(http3.frame(http3.HEADERS, section), False)

    def send_body(self, data: bytes, is_complete: bool, trailers: bytes) -> None:
        if self._upgrade:
            return
        framed = b"\x00" + http3.number(len(data)) + data if data else b""
        if trailers:
            framed += http3.frame(http3.HEADERS, http3.encode(from_trailers(trailers)))
        if framed or is_complete:
            self._write(framed, is_complete)

    def send_tunnel(self, data: bytes) -> None:
        self._write(http3.frame(http3.DATA, data), False)

    def send_eof(self) -> None:
        self._write(b"", True)

    def start_tunnel(self) -> None:
        self._is_tunnel = True

    def _write(self, data: bytes, is_end: bool) -> None:
        connection = self.connection
        quic = connection.quic
        if self.is_ended or self.id < 0 or connection.is_dead:
            return
        quic.send_stream_data(self.id, data, is_end)
        if is_end:
            self.is_ended = True
        elif not self._is_full:
            unsent, unacknowledged = quic.waiting_bytes(self.id)
            if unsent > HIGH_WATER_BYTES or unacknowledged > UNACKNOWLEDGED_HIGH_BYTES:
                self._is_full = True
                connection.watch(self)
                connection.endpoint.cluster.state.on_buffered()
                if self._http is not None:
                    self._http.on_upstream_writable(False)
        connection.wake()

    def pause_reading(self) -> None:
        self.is_held = True

    def resume_reading(self) -> None:
        if self.is_held:
            self.is_held = False
            self._take_untaken()
            connection = self.connection
            if self.id >= 0 and not self.is_peer_ended and not connection.is_dead:
                connection.quic.grant(self.id, self.held)
            connection.wake()

    def _take_untaken(self) -> None:
        if self.untaken:
            self.connection.quic.take(self.untaken)
            self.untaken = 0

    def release(self, may_reuse: bool, now: float) -> None:
        """The request is done with it."""
        self._http = None
        self._leave(http3.REQUEST_CANCELLED)

    def close(self) -> None:
        self.release(False, 0.0)

    def end_tunnel(self) -> None:
        self.release(False, 0.0)

    def _leave(self, code: int) -> None:
        connection = self.connection
        quic = connection.quic
        self._take_untaken()
        if self.id >= 0:
            connection.streams.pop(self.id, None)
            if not connection.is_dead and quic.has_stream(self.id):
                if not self.is_peer_ended:
                    quic.stop_stream(self.id, code)
                if not self.is_ended:
                    quic.reset_stream(self.id, code)
                if not (self.is_ended and self.is_peer_ended):
                    connection.wake()
            self.id = -1
        elif self._upgrade:
            connection.forget_upgrade(self)
        connection.stream_over(self)

    # ── codec.http3's side ──

    def on_headers(self, block: bytes, is_end: bool) -> None:
        http = self._http
        if http is None:
            return
        connection = self.connection
        try:
            if self._has_head:
                if self._expected > 0:
                    raise StreamError(http3.MESSAGE_ERROR, "content_length_mismatch")
                self._trailers = connection.trailers_of(block)
                if is_end:
                    self._end(http)
                return
            head = connection.head_of(block, self._is_head_request, is_end)
            if head.status < 200:
                self._informational += 1
                if is_end or self._informational > MAX_INFORMATIONAL:
                    raise StreamError(http3.MESSAGE_ERROR, "too_many_informational")
        except (StreamError, RemoteProtocolError) as error:
            self._break(error.detail)
            return
        if head.status < 200:
            self.was_informational()
            http.on_informational(head)
            return
        self._has_head = True
        if self._upgrade and head.status < 300 and not is_end:
            http.on_response(tunnel_opened(head, self._upgrade, self._upgrade_head[1]), b"", False)
            return
        if head.body > 0:
            self._expected = head.body
        elif head.body == NO_BODY and not is_end:
            self._expected = 0
        http.on_response(head, b"", is_end)

    def on_data(self, data: bytes, is_end: bool) -> None:
        http = self._http
        if http is None:
            return
        if self._expected >= 0:
            self._expected -= len(data)
            if self._expected < 0 or (is_end and self._expected):
                self._break("http3.content_length_mismatch")
                return
        if self._is_tunnel:
            if data:
                http.on_tunnel_data(data)
            if is_end:
                http.on_upstream_eof()
        elif is_end and not data:
            self._end(http)
        else:
            http.on_response_body(data, is_end, b"")

    def _end(self, http: Stream) -> None:
        http.on_response_body(b"", True, self._trailers)

    def on_incomplete(self) -> None:
        self._break("http3.incomplete_response")

    def _break(self, detail: str) -> None:
        """The answer is malformed (RFC 9114 §4.1.2): this stream is over, the connection goes on."""
        self.connection.count_broken(detail)
        self.lose(f"upstream.{detail}", http3.MESSAGE_ERROR)

    # ── the connection's side ──

    def on_writable(self) -> None:
        if self._is_full:
            self._is_full = False
            if self._http is not None:
                self._http.on_upstream_writable(True)

    def lose(self, detail: str, code: int = http3.REQUEST_CANCELLED) -> None:
        """The answer will not come, or not come whole."""
        http, self._http = self._http, None
        if http is None:
            return
        has_answered = self.id >= 0 and self._has_head
        self._leave(code)
        http.on_upstream_lost(detail, has_answered)


def request_section(scheme: bytes, method: bytes, path: bytes, block: bytes, suffix: bytes) -> bytes:
    """The field section of a request; block and suffix: field lines, Host among them. What was said before costs one
    look-up, but for the request id, of which every one is another."""
    at = suffix.rfind(_REQUEST_ID)
    literal = b""
    if at >= 0 and len(suffix) - at == len(_REQUEST_ID) + 36:
        literal = _LITERAL_REQUEST_ID + suffix[at + len(_REQUEST_ID) :]
        suffix = suffix[:at]
    key = (scheme, method, path, block, suffix)
    section = _sections.get(key)
    if section is None:
        lines = from_block(block + suffix)
        section = http3.encode(
            [
                (b":method", method, False),
                (b":scheme", scheme, False),
                (b":authority", next((value for name, value, _ in lines if name == b"host"), b""), False),
                (b":path", path, False),
                *(line for line in lines if line[0] != b"host"),
            ]
        )
        if len(path) + len(block) + len(suffix) <= MAX_KNOWN_BYTES:
            if len(_sections) >= MAX_SECTIONS:
                _sections.clear()
            _sections[key] = section
    return section + literal
