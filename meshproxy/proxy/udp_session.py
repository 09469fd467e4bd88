"""One downstream's datagrams: pick an endpoint once, then pass datagrams both ways until nothing moves any more.

A session is known by the downstream's address and has a socket of its own, connected to its endpoint: the kernel then
takes datagrams from nobody else, and says when the endpoint's host has no one listening (ICMP port unreachable arrives
as ECONNREFUSED). Datagrams are passed on as they came, or dropped: nothing is kept, nothing is sent twice.

Decides: which endpoint, when a session ends, what counts as a failure of the endpoint. Leaves to others: receiving from
downstreams (listener.udp), whether an endpoint is ejected (control).
Source: Envoy udp_proxy (sessions, idle timeout, names of statistics).
"""

import errno
import select
import socket
from collections.abc import Callable
from time import monotonic, time
from typing import Any

from meshproxy.model.address import is_ip
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.policy.outlier import CONNECT_FAILED, CONNECTED, TIMED_OUT
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.telemetry.recorder import TcpSeries
from meshproxy.upstream.cluster_runtime import ClusterRuntime, EndpointRuntime
from meshproxy.upstream.connect import HOST_EXHAUSTED
from meshproxy.upstream.worker_state import NEVER

Downstream = tuple[Any, ...]
"""Who sent a datagram, as recvfrom says it."""
Key = tuple[Any, ...]
"""What a session is found by: the downstream, and on a listener of all addresses also which of them it sent to."""
Source = list[tuple[int, int, bytes]]
"""Ancillary data for sendmsg that names the address an answer leaves from."""

LARGEST_BYTES = 65535
"""No datagram is larger."""
BATCH = 64
"""Datagrams read from one socket before others have their turn."""
IDLE_TIMEOUT_S = 60.0
"""Where the cluster names none."""
LOOK_EVERY_S = 5.0
"""How often a session is looked at: for idleness, for silence, to add up what it moved."""
SILENT_DATAGRAMS = 3
"""An endpoint that answers others, and from one look to the next does not answer a session that sent it so many, has
failed."""
MAX_CONNECT_ATTEMPTS = 3


class UdpFlows:
    """What the sessions of one listener share."""

    __slots__ = ("buffer", "by_descriptor", "by_downstream", "listener", "on_empty", "poller", "send_to", "sock")

    def __init__(self, sock: socket.socket, listener: ListenerRuntime) -> None:
        self.sock = sock
        """The listener's: answers leave by it."""
        self.send_to = sock.sendto
        self.listener = listener
        # An epoll set of our own, which the loop sees as one descriptor: one call names all sessions that are readable.
        # The loop's own readers would do as well, but uvloop drops one whose descriptor reports an error, and an error
        # is how ICMP arrives. asyncio's datagram transports cost 2 µs a round trip more (uvloop's) or 50 (asyncio's).
        self.poller = select.epoll()
        self.buffer = memoryview(bytearray(LARGEST_BYTES))
        """Where datagrams lie between receiving and sending. A new bytes object of the largest size for each, cut down
        to what came, makes malloc tidy up its whole heap every time."""
        self.by_downstream: dict[Key, UdpSession] = {}
        self.by_descriptor: dict[int, UdpSession] = {}
        self.on_empty: Callable[[], None] | None = None
        """Called when the last session has ended; None: nobody waits for it."""


class UdpSession:
    """Made by `begin`, ended by `end`; the listener finds it by its key in between."""

    __slots__ = (
        "_accounted",
        "_attempts",
        "_failure_reason",
        "_flag",
        "_is_over",
        "_key",
        "_looked",
        "_moved_at",
        "_receive",
        "_send",
        "_series",
        "_source",
        "_started",
        "answers",
        "cluster",
        "cluster_key",
        "datagrams",
        "deadline",
        "downstream",
        "endpoint",
        "flows",
        "received",
        "sent",
        "sock",
    )

    def __init__(
        self, flows: UdpFlows, key: Key, downstream: Downstream, source: Source | None, cluster_key: str
    ) -> None:
        """source: None where the listener has one address anyway."""
        self.flows = flows
        self._key = key
        self._source = source
        self.downstream = downstream
        self.cluster_key = cluster_key
        self.cluster: ClusterRuntime = None  # type: ignore[assignment]  # begin() finds these
        self.endpoint: EndpointRuntime = None  # type: ignore[assignment]
        self.sock: socket.socket = None  # type: ignore[assignment]
        self.datagrams = self.received = 0
        """From the downstream: how many, and their bytes."""
        self.answers = self.sent = 0
        """To the downstream."""
        self.deadline = NEVER
        self._accounted = (0, 0, 0, 0)
        self._looked = (0, 0)
        self._series: TcpSeries = None  # type: ignore[assignment]
        self._attempts = 0
        self._failure_reason: str | None = None
        self._flag = ResponseFlag.NONE.value
        self._is_over = False
        self._started = self._moved_at = 0.0

    # ── life ──

    def begin(self) -> bool:
        """False where no endpoint can be had: the datagram is lost, and the next one tries again."""
        now = monotonic()
        if not self._attach(now, set()):
            return False
        flows = self.flows
        listener = flows.listener
        listener.counters.udp_downstream_sess_total += 1
        listener.counters.udp_downstream_sess_active += 1
        listener.connections.add(self)
        listener.state.open_connections += 1
        listener.state.timed.add(self)
        flows.by_downstream[self._key] = self
        self._started = self._moved_at = now
        # Sessions that began together are not looked at together.
        self.deadline = now + min(LOOK_EVERY_S, self._idle_timeout_s()) * (1 + listener.state.draw()) / 2
        return True

    def end(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._detach()
        flows = self.flows
        listener = flows.listener
        flows.by_downstream.pop(self._key, None)
        listener.connections.discard(self)
        listener.state.open_connections -= 1
        listener.state.timed.discard(self)
        listener.counters.udp_downstream_sess_active -= 1
        self.deadline = NEVER
        if listener.state.access_log is not None:
            self._log()
        if flows.on_empty is not None and not flows.by_downstream:
            flows.on_empty()

    def on_deadline(self, now: float) -> None:
        """Add up what moved; end an idle session; hold an endpoint's silence against it."""
        moved = (self.datagrams, self.answers)
        before, self._looked = self._looked, moved
        idle_timeout_s = self._idle_timeout_s()
        if moved == before:
            if now - self._moved_at >= idle_timeout_s:
                self.flows.listener.counters.udp_idle_timeout += 1
                self.end()
            else:
                self.deadline = min(now + LOOK_EVERY_S, self._moved_at + idle_timeout_s)
            return
        self._moved_at = now
        self.deadline = now + min(LOOK_EVERY_S, idle_timeout_s)
        self._account()
        endpoint = self.endpoint
        if moved[1] == before[1] and moved[0] - before[0] >= SILENT_DATAGRAMS and endpoint.has_answered:
            endpoint.rq_error += 1
            self._failure_reason = "no answer"
            self.flows.listener.state.report(self.cluster.key, endpoint.key, TIMED_OUT)

    def _idle_timeout_s(self) -> float:
        return self.cluster.cluster.idle_timeout_s or IDLE_TIMEOUT_S

    # ── datagrams ──

    def forward(self, data: memoryview) -> None:
        """One datagram from the downstream."""
        endpoint = self.endpoint
        if endpoint.is_ejected or endpoint.is_unhealthy or endpoint.is_removed:
            self._move()
            if self._is_over:
                return
        self.datagrams += 1
        self.received += len(data)
        try:
            self._send(data)
        except OSError as error:
            self._on_send_error(error, data)

    def on_readable(self) -> None:
        """One datagram, or one error, from the endpoint; the poller says so again while there are more."""
        flows = self.flows
        try:
            size = self._receive(flows.buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._on_upstream_error(error)
            return
        endpoint = self.endpoint
        if endpoint.is_suspect:
            flows.listener.state.report(endpoint.cluster.key, endpoint.key, CONNECTED)
        endpoint.has_answered = True
        try:
            if self._source is None:
                flows.send_to(flows.buffer[:size], self.downstream)
            else:
                flows.sock.sendmsg((flows.buffer[:size],), self._source, 0, self.downstream)
        except OSError:  # the buffer is full, or the downstream cannot be reached: datagrams get lost
            flows.listener.counters.udp_downstream_sess_tx_errors += 1
            return
        self.answers += 1
        self.sent += size

    def _on_send_error(self, error: OSError, data: memoryview) -> None:
        if error.errno in _UNREACHABLE:
            # What an earlier datagram met is told to this one, which has not left yet.
            self._on_upstream_error(error)
            if self._is_over:
                return
            try:
                self._send(data)
            except OSError:
                pass
            else:
                return
        self.cluster.counters.udp_sess_tx_errors += 1

    def _on_upstream_error(self, error: OSError) -> None:
        endpoint, cluster = self.endpoint, self.cluster
        cluster.counters.udp_sess_rx_errors += 1
        if error.errno in _UNREACHABLE:
            endpoint.rq_error += 1
            self._failure_reason = error.strerror
            self.flows.listener.state.report(cluster.key, endpoint.key, CONNECT_FAILED)
            self._move(endpoint)

    # ── endpoints ──

    def _attach(self, now: float, tried: set[Any]) -> bool:
        """Pick an endpoint and connect to it; what is tried already is avoided."""
        listener = self.flows.listener
        cluster = listener.workload.cluster(self.cluster_key)
        if cluster is None:
            listener.counters.udp_downstream_sess_no_route += 1
            return False
        if cluster.connections >= cluster.cluster.limits.max_connections:
            cluster.counters.upstream_cx_overflow += 1
            return False
        for _ in range(MAX_CONNECT_ATTEMPTS):
            endpoint: Any = cluster.pick_avoiding(now, tried) if tried else cluster.balancer.pick(now)
            if endpoint is None:
                cluster.counters.upstream_cx_none_healthy += 1
                return False
            if self._connect(cluster, endpoint):
                return True
            tried.add(endpoint)
        return False

    def _connect(self, cluster: ClusterRuntime, endpoint: EndpointRuntime) -> bool:
        listener = self.flows.listener
        self._attempts += 1
        where = endpoint.endpoint
        if endpoint.tls is not None or not is_ip(where.address):
            cluster.counters.upstream_cx_connect_fail += 1
            self._failure_reason = "TLS carries no datagrams" if endpoint.tls is not None else "not an IP address"
            return False
        family = socket.AF_INET6 if ":" in where.address else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError:  # out of descriptors: no endpoint is to blame
            cluster.counters.upstream_cx_connect_fail += 1
            return False
        try:
            sock.connect((where.address, where.port))
        except OSError as error:
            sock.close()
            endpoint.connect_failures += 1
            cluster.counters.upstream_cx_connect_fail += 1
            self._failure_reason = error.strerror
            if error.errno not in HOST_EXHAUSTED:
                listener.state.report(cluster.key, endpoint.key, CONNECT_FAILED)
            return False
        if self.sock is not None:
            self._detach()
        self.sock, self.cluster, self.endpoint = sock, cluster, endpoint
        self._send, self._receive = sock.send, sock.recv_into
        descriptor = sock.fileno()
        self.flows.by_descriptor[descriptor] = self
        self.flows.poller.register(descriptor, select.EPOLLIN)
        endpoint.connections.add(self)
        endpoint.connections_total += 1
        endpoint.active_requests += 1
        endpoint.rq_total += 1
        cluster.connections += 1
        cluster.counters.upstream_cx_total += 1
        cluster.counters.upstream_cx_active += 1
        series = endpoint.series.get(self.peer.number)
        if series is None:
            series = endpoint.series[self.peer.number] = listener.tcp_series(
                self.peer, endpoint, cluster.cluster, ResponseFlag.NONE.value
            )
        self._series = series
        series.opened += 1
        return True

    def _detach(self) -> None:
        """Leave the endpoint; what moved so far is counted as its own."""
        endpoint, cluster, sock = self.endpoint, self.cluster, self.sock
        self._account()
        del self.flows.by_descriptor[sock.fileno()]
        sock.close()  # leaves the poller with it
        endpoint.connections.discard(self)
        endpoint.active_requests -= 1
        cluster.counters.upstream_cx_active -= 1
        cluster.connection_closed()
        self._series.closed += 1

    def _move(self, failed: EndpointRuntime | None = None) -> None:
        """To another endpoint, if there is a better one. Without any, one that is there still stays."""
        endpoint = self.endpoint
        cluster = self.flows.listener.workload.cluster(self.cluster_key)
        now = monotonic()
        if cluster is not None:
            found: Any = cluster.balancer.pick(now) if failed is None else cluster.pick_avoiding(now, {failed})
            is_better = found is not None and found is not endpoint and (found.is_available or endpoint.is_removed)
            if is_better and self._connect(cluster, found):
                return
        if endpoint.is_removed:
            self.end()

    def _account(self) -> None:
        """Hand what moved since the last time to the counters: here, because per datagram it would cost more."""
        cluster, series = self.cluster, self._series
        now = (self.datagrams, self.received, self.answers, self.sent)
        before, self._accounted = self._accounted, now
        datagrams, received = now[0] - before[0], now[1] - before[1]
        answers, sent = now[2] - before[2], now[3] - before[3]
        listener, upstream = self.flows.listener.counters, cluster.counters
        listener.udp_downstream_sess_rx_datagrams += datagrams
        listener.udp_downstream_sess_rx_bytes += received
        listener.udp_downstream_sess_tx_datagrams += answers
        listener.udp_downstream_sess_tx_bytes += sent
        upstream.udp_sess_tx_datagrams += datagrams
        upstream.udp_sess_rx_datagrams += answers
        series.received_bytes += received
        series.sent_bytes += sent

    # ── what the worker asks of any connection ──

    @property
    def peer(self) -> PeerContext:
        return self.flows.listener.plain_peer

    @property
    def transport(self) -> "UdpSession":
        """There is none; what is asked of it the session answers itself."""
        return self

    def abort(self) -> None:
        self.end()

    def is_closing(self) -> bool:
        return self._is_over

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.downstream if name == "peername" else default

    def get_write_buffer_size(self) -> int:
        """What waits to be sent is the kernel's."""
        return 0

    def drain(self) -> None:
        """A datagram cannot say goodbye: the session goes on until it is idle or the drain's deadline."""

    def _log(self) -> None:
        log = self.flows.listener.state.access_log
        assert log is not None
        endpoint, cluster = self.endpoint, self.cluster
        duration_s = monotonic() - self._started
        log.append(
            (
                time() - duration_s,
                duration_s * 1000,
                None,  # method, path, protocol
                None,
                "UDP",
                0,
                self._flag,
                None,  # details, termination details
                None,
                self._failure_reason,
                self.received,
                self.sent,
                None,  # upstream service time, x-forwarded-for, user agent, request id, authority
                None,
                None,
                None,
                None,
                endpoint.key,
                cluster.cluster.name,
                None,  # addresses, server name, route
                None,
                written(self.downstream),
                None,
                None,
                None,  # headers
                None,
                None,
                None,
                self._attempts,
                self.flows.listener.workload.workload.id,
            )
        )


_UNREACHABLE = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH})


def written(address: Downstream) -> str:
    """`10.0.0.1:53` or `[::1]:53`."""
    host, port = address[0], address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
