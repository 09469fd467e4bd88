"""One listening TCP or unix socket in one worker: accept, tell TLS from plaintext, hand the connection on.

Decides: which chain a connection takes (PeerAuthentication mode, gateway TLS, protocol). Leaves to others: identities
(ListenerRuntime.authenticate), requests (proxy.downstream_h1), bytes (proxy.tcp_session).

STRICT: a connection whose first bytes are not TLS is reset. PERMISSIVE: the first bytes decide; they are peeked at, not
read, so that the TLS library or the codec sees them all. SO_RCVLOWAT keeps a one-byte start from waking us in a loop.
A PROXY header, where the listener has them, is taken off the socket before anything else looks at it.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Any

from meshproxy.codec import proxy_protocol
from meshproxy.codec.proxy_protocol import ProxyHeader, read_header
from meshproxy.listener.detect import LONGEST_NEEDED_BYTES, First, detect, is_tls
from meshproxy.listener.proxied import Introduction
from meshproxy.model.cluster import Protocol
from meshproxy.model.listener import MtlsMode, ServerTlsMode
from meshproxy.proxy.downstream_h1 import DownstreamConnection
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.proxy.tcp_session import TcpSession
from meshproxy.route.l4 import L4Route, L4Table
from meshproxy.tls.client_hello import ClientHello, Verdict, parse_client_hello
from meshproxy.tls.transport import HandshakeError, accept_tls
from meshproxy.upstream.connect import HOST_EXHAUSTED
from meshproxy.upstream.worker_state import NEVER

log = logging.getLogger(__name__)

ACCEPTS_PER_TURN = 32
FIRST_BYTES_TIMEOUT_S = 15.0
"""Envoy's listener_filters_timeout. After it a PERMISSIVE or detecting listener treats the connection as plaintext."""
TLS_HANDSHAKE_TIMEOUT_S = 15.0
ACCEPT_PAUSE_S = 0.1
"""How long accepting rests when the process is out of descriptors."""


class TcpListener:
    """Accepts until closed. The socket is ours; control keeps a copy, so a successor finds the same queue."""

    __slots__ = ("_handshakes", "_is_accepting", "_pending", "_sock", "l4", "peeking", "runtime")

    def __init__(self, sock: socket.socket, runtime: ListenerRuntime) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.runtime = runtime
        self.l4 = L4Table(runtime.listener.tcp_routes)
        self._is_accepting = False
        self._pending: set[asyncio.Task[None]] = set()
        self._handshakes = 0
        self.peeking: set[_Peek] = set()
        """Connections that have not said yet what they are."""
        self._resume()

    def _resume(self) -> None:
        if not self._is_accepting and self._sock.fileno() >= 0:
            self._is_accepting = True
            self.runtime.state.loop.add_reader(self._sock.fileno(), self._accept)

    def pause(self) -> None:
        if self._is_accepting:
            self._is_accepting = False
            self.runtime.state.loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        """Stop accepting. Connections that are open stay."""
        self.pause()
        self._sock.close()

    def _accept(self) -> None:
        runtime = self.runtime
        state = runtime.state
        limit = runtime.listener.max_connections
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                state.counters.accept_errors += 1
                if error.errno in HOST_EXHAUSTED:
                    self.pause()
                    state.loop.call_later(ACCEPT_PAUSE_S, self._resume)
                return
            # Who has said nothing yet, or is in its handshake, has a place: silence must not be a way past the limit.
            undecided = len(self.peeking) + self._handshakes
            if (limit is not None and len(runtime.connections) + undecided >= limit) or (
                state.open_connections + undecided >= state.max_connections
            ):
                runtime.counters.downstream_cx_overflow += 1
                connection.close()
                continue
            if state.is_overloaded:
                state.counters.overload["refuse_connection"] += 1
                _reset(connection)
                continue
            connection.setblocking(False)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if runtime.listener.expects_proxy_header:
                _Peek(self, connection, self._on_proxy_header, proxy_protocol.MAX_V2_BYTES)
            else:
                self._choose(connection, None)

    # ── which chain ──

    def _on_proxy_header(self, connection: socket.socket, first: bytes, is_late: bool) -> bool:
        header = read_header(first)
        if header is proxy_protocol.NEED_MORE and not is_late:
            return False
        if isinstance(header, ProxyHeader):
            try:
                connection.recv(header.length)
            except OSError:
                connection.close()
            else:
                self._choose(connection, header if header.source is not None else None)
        else:
            self.runtime.counters.downstream_cx_proxy_proto_error += 1
            self.runtime.state.counters.protocol_error("proxy_protocol.no_header")
            _reset(connection)
        return True

    def _choose(self, connection: socket.socket, proxied: ProxyHeader | None) -> None:
        """proxied: the names that a proxy before us gave it."""
        listener = self.runtime.listener
        if listener.tls is not None:
            if listener.tls.mode is ServerTlsMode.PASSTHROUGH:
                _Peek(self, connection, lambda *seen: self._on_client_hello(proxied, *seen), 65536)
            else:
                self._serve(connection, self.runtime.gateway_context(), proxied)
        elif listener.mtls is MtlsMode.DISABLE:
            self._serve(connection, None, proxied)
        else:
            _Peek(self, connection, self._on_first_bytes, 3)

    def _on_first_bytes(self, connection: socket.socket, first: bytes, is_late: bool) -> bool:
        """PeerAuthentication: TLS goes to mTLS; plaintext passes where the mode permits it."""
        tls = is_tls(first)
        if tls is None and not is_late:
            return False
        if tls:
            context = self.runtime.server_context()
            if context is None:
                self.runtime.counters.ssl_connection_error += 1
                _reset(connection)
            else:
                self._serve(connection, context)
        elif self.runtime.listener.mtls is MtlsMode.STRICT:
            self.runtime.counters.plaintext_refused += 1
            _reset(connection)
        else:
            self._serve(connection, None)
        return True

    def _on_client_hello(
        self, proxied: ProxyHeader | None, connection: socket.socket, first: bytes, is_late: bool
    ) -> bool:
        """TLS passthrough: the server name chooses the cluster; TLS itself is not ours to end."""
        hello = parse_client_hello(first)
        if hello is Verdict.NEED_MORE and not is_late:
            return False
        name = hello.server_name if isinstance(hello, ClientHello) else None
        route = self.l4.find_by_name(_destination(connection, proxied), name or "")
        if route is None:
            self.runtime.counters.no_filter_chain_match += 1
            _reset(connection)
        else:
            self._start(connection, None, lambda: self._tcp(self.runtime.plain_peer, route, name), proxied)
        return True

    def _serve(
        self, connection: socket.socket, context: ssl.SSLContext | None, proxied: ProxyHeader | None = None
    ) -> None:
        runtime = self.runtime
        peer = runtime.plain_peer if context is None else None
        protocol = runtime.listener.protocol
        factory: Callable[[], asyncio.Protocol]
        if protocol.is_http:
            factory = lambda: DownstreamConnection(runtime, peer)  # noqa: E731
        elif protocol is Protocol.AUTO:
            factory = lambda: _Detecting(self, peer)  # noqa: E731
        else:
            route = self.l4.find(_destination(connection, proxied))
            if route is None:
                runtime.counters.no_filter_chain_match += 1
                _reset(connection)
                return
            factory = lambda: self._tcp(peer, route)  # noqa: E731
        self._start(connection, context, factory, proxied)

    def _tcp(self, peer: PeerContext | None, route: L4Route, server_name: str | None = None) -> TcpSession:
        return TcpSession(self.runtime, peer, route.cluster_key(self.runtime.state.draw()), server_name)

    def _start(
        self,
        connection: socket.socket,
        context: ssl.SSLContext | None,
        factory: Callable[[], asyncio.Protocol],
        proxied: ProxyHeader | None,
    ) -> None:
        task = self.runtime.state.loop.create_task(self._adopt(connection, context, factory, proxied))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _adopt(
        self,
        connection: socket.socket,
        context: ssl.SSLContext | None,
        factory: Callable[[], asyncio.Protocol],
        proxied: ProxyHeader | None,
    ) -> None:
        loop = self.runtime.state.loop
        counters = self.runtime.counters
        try:
            if context is None:
                if proxied is not None:
                    await loop.connect_accepted_socket(lambda: Introduction(factory, proxied), connection)
                else:
                    await loop.connect_accepted_socket(factory, connection)
            else:
                self._handshakes += 1
                try:
                    await accept_tls(
                        factory,
                        connection,
                        context,
                        handshake_timeout_s=TLS_HANDSHAKE_TIMEOUT_S,
                        keeps_server_name=self.runtime.state.access_log is not None,
                        below=(lambda tls: Introduction(lambda: tls, proxied)) if proxied is not None else None,
                    )
                finally:
                    self._handshakes -= 1
                counters.ssl_handshake += 1
        except HandshakeError as error:
            counters.ssl_connection_error += 1
            self.runtime.state.counters.protocol_error(error.detail)
            connection.close()
        except (TimeoutError, OSError):
            counters.ssl_connection_error += 1
            connection.close()


_Decide = Callable[[socket.socket, bytes, bool], bool]
"""(connection, what has come, whether no more will) → whether that was enough."""


class _Peek:
    """Waits for a connection's first bytes without taking them off the socket."""

    __slots__ = ("_connection", "_decide", "_listener", "_seen", "_want", "deadline")

    def __init__(
        self,
        listener: TcpListener,
        connection: socket.socket,
        decide: _Decide,
        want: int,
    ) -> None:
        self._listener = listener
        self._connection = connection
        self._decide = decide
        self._want = want
        self._seen = 0
        self.deadline = NEVER
        if self._try(False):
            return
        self.deadline = monotonic() + FIRST_BYTES_TIMEOUT_S
        state = listener.runtime.state
        listener.peeking.add(self)
        state.timed.add(self)
        state.loop.add_reader(connection.fileno(), self._on_readable)

    def _try(self, is_late: bool) -> bool:
        try:
            first = self._connection.recv(self._want, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            first = b""
        except OSError:
            self._connection.close()
            return True
        else:
            if not first:  # closed without a word
                self._connection.close()
                return True
        # Readable without anything new: the other side has ended its half, no more will come.
        is_late = is_late or 0 < len(first) == self._seen
        self._seen = len(first)
        if self._decide(self._connection, first, is_late):
            return True
        if first:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(len(first) + 1, self._want))
        return False

    def _on_readable(self) -> None:
        before = self._connection.fileno()
        self._stop(before)
        if self._try(False):
            return
        state = self._listener.runtime.state
        self._listener.peeking.add(self)
        state.timed.add(self)
        state.loop.add_reader(before, self._on_readable)

    def _stop(self, descriptor: int) -> None:
        state = self._listener.runtime.state
        state.loop.remove_reader(descriptor)
        state.timed.discard(self)
        self._listener.peeking.discard(self)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def on_deadline(self, now: float) -> None:
        self.deadline = NEVER
        self._listener.runtime.counters.downstream_pre_cx_timeout += 1
        self._stop(self._connection.fileno())
        self._try(True)


class _Detecting(asyncio.Protocol):
    """Reads until the protocol of a (decrypted) stream can be told, then gives way to the protocol that serves it."""

    __slots__ = ("_data", "_listener", "_peer", "_transport", "deadline")

    def __init__(self, listener: TcpListener, peer: PeerContext | None) -> None:
        self._listener = listener
        self._peer = peer
        self._data = b""
        self._transport: Any = None
        self.deadline = NEVER

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        runtime = self._listener.runtime
        if self._peer is None:
            self._peer = runtime.authenticate(transport)
            if self._peer is None:
                return
        self.deadline = monotonic() + FIRST_BYTES_TIMEOUT_S
        runtime.state.timed.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.runtime.state.timed.discard(self)

    def data_received(self, data: bytes) -> None:
        self._data += data
        first = detect(self._data[:LONGEST_NEEDED_BYTES])
        if first is not First.NEED_MORE:
            self._become(first)

    def eof_received(self) -> bool:
        self._become(First.OPAQUE)
        protocol = self._transport.get_protocol()
        return protocol is not self and bool(protocol.eof_received())

    def on_deadline(self, now: float) -> None:
        self._become(First.OPAQUE)

    def _become(self, first: First) -> None:
        runtime = self._listener.runtime
        runtime.state.timed.discard(self)
        transport, data = self._transport, self._data
        if transport.is_closing():
            return
        protocol: DownstreamConnection | TcpSession
        if first in (First.HTTP1, First.HTTP2) and runtime.table is not None:
            protocol = DownstreamConnection(runtime, self._peer)
        else:
            route = self._listener.l4.find(_ip(transport.get_extra_info("sockname")))
            if route is None:
                runtime.counters.no_filter_chain_match += 1
                transport.abort()
                return
            protocol = self._listener._tcp(self._peer, route)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:
            protocol.data_received(data)


def _reset(connection: socket.socket) -> None:
    """Close with RST: the downstream must not take it for an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()


def _destination(connection: socket.socket, proxied: ProxyHeader | None) -> str:
    """The address that the downstream meant to reach, by which routes may choose."""
    return _ip(connection.getsockname() if proxied is None else proxied.destination)


def _ip(name: object) -> str:
    """The address in a socket's name; "" for a unix socket."""
    return str(name[0]) if isinstance(name, tuple) else ""
