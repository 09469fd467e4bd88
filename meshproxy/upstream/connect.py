"""Opening one upstream connection: TCP or unix socket, a PROXY header if wanted, TLS, the peer's identity.

Decides: is the peer who it must be (secure naming). Leaves to others: whether to try again (proxy), where (lb).
"""

import asyncio
import errno
import logging
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from meshproxy.codec.proxy_protocol import write_header
from meshproxy.errors import ConfigError
from meshproxy.model.cluster import Cluster, TcpKeepalive, TlsMode
from meshproxy.model.endpoint import Endpoint
from meshproxy.tls.context import origination_context
from meshproxy.tls.transport import SessionSlot, connect_tls
from meshproxy.tls.verify import check_names, check_server
from meshproxy.upstream.transport_choice import TCP_AFTER_S, QuicTries

if TYPE_CHECKING:
    from meshproxy.upstream.cluster_runtime import EndpointRuntime, Waiter, WorkloadRuntime
    from meshproxy.upstream.worker_state import WorkerState

log = logging.getLogger(__name__)

# Istio's ALPN for mesh traffic: the inbound proxy tells mesh mTLS from an application's own TLS by it.
ALPN_HTTP1: tuple[str, ...] = ("istio-http/1.1", "istio", "http/1.1")
MESH_HTTP2 = ("istio-h2", "istio", "h2")
MESH_EITHER = ("istio-h2", "istio-http/1.1", "istio", "http/1.1")
"""A proxy of ours takes HTTP/2 of these, an Envoy under Istio HTTP/1.1: each as its own order has it."""
ALPN_HTTP2 = frozenset({"istio-h2", "h2"})
ALPN_TCP = ("istio-peer-exchange", "istio")
ALPN_SERVER = ("istio-h2", "istio-http/1.1", "istio-http/1.0", "istio-peer-exchange", "istio", "h2", "http/1.1")


@dataclass(slots=True)
class ConnectError:
    """kind: `refused`, `timeout` or `tls`; reason: one line for the access log."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class UpstreamTlsContext:
    """How to speak TLS to one endpoint. Two are equal when a connection made by one may serve for the other."""

    context: ssl.SSLContext
    sni: str
    is_mesh: bool
    expected_ids: tuple[str, ...]
    trust_domain: str

    def refuses(self, ssl_object: ssl.SSLObject) -> str | None:
        """Why the peer is not who it must be; None when it is."""
        if self.is_mesh:
            der = ssl_object.getpeercert(True)
            return check_server(ssl_object.getpeercert(), self.expected_ids, self.trust_domain, der=der, now=time())
        if self.expected_ids:  # else the context checked the host name
            return check_names(ssl_object.getpeercert(), self.expected_ids)
        return None


def upstream_tls(cluster: Cluster, endpoint: Endpoint, workload: "WorkloadRuntime") -> UpstreamTlsContext | None:
    """The TLS to use for one endpoint; None for plaintext."""
    tls = cluster.tls
    mode = tls.mode
    if mode is TlsMode.AUTO:
        # Auto-mTLS: only where both sides can. A workload without certificates has no identity to show.
        mode = TlsMode.ISTIO_MUTUAL if endpoint.speaks_mtls and workload.bundle is not None else TlsMode.DISABLE
    if mode is TlsMode.DISABLE:
        return None
    if mode is TlsMode.ISTIO_MUTUAL:
        if workload.bundle is None:
            return _NO_CERTIFICATES
        alpn: tuple[str, ...]
        if not cluster.protocol.is_http:
            alpn = ALPN_TCP
        elif cluster.speaks_http2:
            alpn = MESH_HTTP2
        else:
            alpn = MESH_EITHER if cluster.offers_http2 else ALPN_HTTP1
        return UpstreamTlsContext(
            context=workload.client_context(alpn),
            sni=tls.sni or f"outbound_.{cluster.port}_.{cluster.subset}_.{cluster.service_host}",
            is_mesh=True,
            expected_ids=tls.subject_alt_names or endpoint.spiffe_ids,
            trust_domain=workload.workload.trust_domain,
        )
    alpn = () if not cluster.protocol.is_http else ("h2", "http/1.1") if cluster.speaks_http2 else ("http/1.1",)
    return UpstreamTlsContext(
        context=origination_context(tls, alpn),
        sni=tls.sni or cluster.service_host,
        is_mesh=False,
        expected_ids=tls.subject_alt_names,
        trust_domain="",
    )


_NO_CERTIFICATES = UpstreamTlsContext(
    context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), sni="", is_mesh=True, expected_ids=(), trust_domain=""
)


class PendingConnect:
    """One attempt to connect, with its deadline. Tells its waiter exactly once, unless the waiter lost interest."""

    __slots__ = ("_factory", "_is_abandoned", "_protocol", "_state", "_task", "deadline", "endpoint", "waiter")

    def __init__(
        self,
        state: "WorkerState",
        endpoint: "EndpointRuntime",
        waiter: "Waiter",
        factory: Callable[["EndpointRuntime"], Any],
    ) -> None:
        self._state = state
        self.endpoint = endpoint
        self.waiter = waiter
        self._factory = factory
        self._protocol: Any = None
        self._is_abandoned = False
        self.deadline = monotonic() + endpoint.cluster.cluster.connect_timeout_s
        state.timed.add(self)
        self._task = state.loop.create_task(self._connect())

    def on_deadline(self, now: float) -> None:
        self.deadline = float("inf")
        self._task.cancel()

    def abandon(self) -> None:
        """The waiter must not hear of it: by now it may wait for another connection, to somewhere else."""
        self._is_abandoned = True
        self._task.cancel()
        # Not in the task itself: one that is cancelled before it began never runs.
        self._task.add_done_callback(lambda _: self._give_up())

    def _give_up(self) -> None:
        self._state.timed.discard(self)
        transport = self._protocol.transport if self._protocol is not None else None
        if transport is None:
            self.endpoint.cluster.connection_closed()
        else:
            transport.abort()  # its connection_lost does the rest

    async def _connect(self) -> None:
        endpoint = self.endpoint
        cluster = endpoint.cluster
        error: ConnectError
        is_theirs = True
        try:
            connection = await self._open()
            if connection.transport.is_closing():
                raise ConnectionAbortedError("closed as soon as it was open")
        except asyncio.CancelledError:
            error = ConnectError("timeout", "connect timeout")
        except ssl.SSLError as problem:
            error = ConnectError("tls", str(problem))
        except (OSError, ConnectionError) as problem:
            error = ConnectError("refused", problem.strerror or str(problem) or type(problem).__name__)
            is_theirs = problem.errno not in HOST_EXHAUSTED
        except _IdentityRefused as problem:
            error = ConnectError("tls", str(problem))
        else:
            if self._is_abandoned:
                return
            cluster.connecting.pop(self.waiter, None)
            self._state.timed.discard(self)
            (endpoint.of or endpoint).connections_total += 1
            cluster.counters.upstream_cx_total += 1
            if cluster.cluster.outlier is not None and cluster.cluster.outlier.split_external_local_origin:
                self._state.report(cluster.key, endpoint.key, 4)
            cluster.opened(endpoint, self.waiter, connection, self._factory)
            return
        if self._is_abandoned:
            return
        cluster.connecting.pop(self.waiter, None)
        (endpoint.of or endpoint).connect_failures += 1
        cluster.counters.upstream_cx_connect_fail += 1
        if is_theirs:
            self._state.report(cluster.key, endpoint.key, 2 if error.kind == "timeout" else 1)
        self._give_up()
        cluster.open_failed(endpoint, self.waiter, error)

    async def _open(self) -> Any:
        tries = _quic_tries(self.endpoint)
        return await (self._open_tcp() if tries is None else self._race(tries))

    async def _race(self, tries: QuicTries) -> Any:
        """QUIC first, TCP too where that fails or takes long: whichever is there first. The other is dropped."""
        from meshproxy.upstream.connection_h3 import connect

        loop, endpoint = self._state.loop, self.endpoint
        quic = loop.create_task(connect(endpoint, tries))
        tcp: asyncio.Task[Any] | None = None
        is_chosen = False
        try:
            # The connect timeout is for both: TCP needs its share of a short one.
            await asyncio.wait((quic,), timeout=min(TCP_AFTER_S, endpoint.cluster.cluster.connect_timeout_s / 2))
            if not _has_worked(quic):
                tcp = loop.create_task(self._open_tcp())
                await asyncio.wait((quic, tcp), return_when=asyncio.FIRST_COMPLETED)
                while not (_has_worked(quic) or _has_worked(tcp) or (quic.done() and tcp.done())):
                    await asyncio.wait((tcp,) if quic.done() else (quic,))
            if not _has_worked(quic):
                assert tcp is not None, "there is no answer without one of the two"
                connection = tcp.result()
                tries.failed(monotonic())
                endpoint.cluster.counters.upstream_http3_broken += 1
                return connection
            tries.worked()
            await self._drop(tcp)
            if not quic.result().is_dead:
                is_chosen = True
                quic.result().adopt()
            else:
                raise ConnectionAbortedError("closed as soon as it was open")
            self._protocol = quic.result()
            return self._protocol
        finally:
            if not is_chosen:
                _end_quic(quic)
            if tcp is not None and not tcp.done():
                tcp.cancel()
                await asyncio.wait((tcp,))

    async def _drop(self, tcp: "asyncio.Task[Any] | None") -> None:
        """QUIC was first. A TCP connection that is there already is counted as one until it has ended."""
        if tcp is None:
            return
        tcp.cancel()
        await asyncio.wait((tcp,))
        protocol, self._protocol = self._protocol, None
        if protocol is not None and protocol.transport is not None:
            self.endpoint.cluster.connections += 1
            protocol.transport.abort()

    async def _open_tcp(self) -> Any:
        endpoint = self.endpoint
        tls = endpoint.tls
        if tls is _NO_CERTIFICATES:
            raise _IdentityRefused("mTLS is required and the workload has no certificates")
        loop = self._state.loop
        where = endpoint.endpoint
        protocol = self._protocol = self._factory(endpoint)
        version = endpoint.cluster.cluster.proxy_protocol
        below: Any = None
        if version:
            downstream, _ = self.waiter.downstream()
            header = write_header(version, downstream.get_extra_info("peername"), downstream.get_extra_info("sockname"))
            below = lambda above: _Announcing(header, above)  # noqa: E731
        transport: Any
        if tls is not None:
            if endpoint.session is None:
                endpoint.session = SessionSlot()
            transport, _ = await connect_tls(
                lambda: protocol,
                where.address,
                where.port,
                tls.context,
                server_name=tls.sni,
                verify=tls.refuses,
                slot=endpoint.session,
                below=below,
            )
        else:
            lowest = below(protocol) if version else protocol
            if where.address.startswith("/"):
                transport, _ = await loop.create_unix_connection(lambda: lowest, where.address)
            else:
                transport, _ = await loop.create_connection(lambda: lowest, where.address, where.port)
        if not where.address.startswith("/"):
            tune(transport.get_extra_info("socket"), endpoint.cluster.cluster.tcp_keepalive)
        return transport.get_protocol()  # what was negotiated may be another than was made


def _quic_tries(endpoint: "EndpointRuntime") -> QuicTries | None:
    """What is known of QUIC to the endpoint; None where it is not to be tried now."""
    spec = endpoint.cluster.cluster
    if (
        not spec.offers_http3
        or not spec.protocol.is_http
        or endpoint.tls is None
        or endpoint.tls is _NO_CERTIFICATES
        or endpoint.of is not None  # its connections are of one downstream
        or endpoint.endpoint.address.startswith("/")
        or not has_quic()
    ):
        return None
    if endpoint.http3 is None:
        endpoint.http3 = QuicTries()
    return endpoint.http3 if endpoint.http3.may_try(monotonic()) else None


@cache
def has_quic() -> bool:
    """Whether HTTP/3 can be spoken at all; the log hears it once where it is wanted and cannot be."""
    is_there = find_spec("aioquic") is not None
    if not is_there:
        log.warning("a DestinationRule offers HTTP/3, which needs aioquic (pip install 'meshproxy[http3]'): TCP it is")
    return is_there


def _has_worked(task: "asyncio.Task[Any]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _end_quic(task: "asyncio.Task[Any]") -> None:
    """An attempt that is not wanted any more, however far it is."""
    if _has_worked(task):
        task.result().abort()
    else:
        task.cancel()


def probe_quic(endpoint: "EndpointRuntime") -> None:
    """Try QUIC again, which did not get through before, beside the TCP connections that serve meanwhile."""
    tries = _quic_tries(endpoint)
    if tries is not None:
        tries.probe = endpoint.cluster.state.loop.create_task(_probe(endpoint, tries))


async def _probe(endpoint: "EndpointRuntime", tries: QuicTries) -> None:
    from meshproxy.upstream.connection_h3 import connect

    cluster = endpoint.cluster
    try:
        async with asyncio.timeout(cluster.cluster.connect_timeout_s):
            connection = await connect(endpoint, tries)
    except (OSError, ConfigError):
        tries.failed(monotonic())
        cluster.counters.upstream_http3_broken += 1
        return
    finally:
        tries.probe = None
    if connection.is_dead:
        return
    tries.worked()
    if endpoint.is_removed or endpoint.is_ejected or cluster.connections >= cluster.cluster.limits.max_connections:
        connection.abort()
        return
    endpoint.close_idle()
    cluster.connections += 1
    endpoint.connections_total += 1
    cluster.counters.upstream_cx_total += 1
    connection.adopt()
    endpoint.expects_h2 = True


class _Announcing(asyncio.Protocol):
    """Writes a PROXY header before anything else is written, then gives way to the protocol above."""

    __slots__ = ("_above", "_header")

    def __init__(self, header: bytes, above: asyncio.Protocol) -> None:
        self._header = header
        self._above = above

    def connection_made(self, transport: Any) -> None:
        transport.write(self._header)
        transport.set_protocol(self._above)
        self._above.connection_made(transport)


HOST_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""This host has nothing left to accept or connect with: no endpoint is to blame."""
_NO_LINGER = struct.pack("ii", 1, 0)


class _IdentityRefused(Exception):
    pass


def reset(transport: Any) -> None:
    """End a connection at once, with RST: the other side must not take it for an orderly end."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        except OSError:  # it has ended already
            pass
    transport.abort()


def tune(sock: socket.socket, keepalive: TcpKeepalive | None) -> None:
    """TCP_NODELAY always (requests are written whole, Nagle only adds delay); keepalive as the cluster says."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keepalive is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for value, option in (
            (keepalive.time_s, socket.TCP_KEEPIDLE),
            (keepalive.interval_s, socket.TCP_KEEPINTVL),
            (keepalive.probes, socket.TCP_KEEPCNT),
        ):
            if value:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
