"""One UDP socket in one worker: receive datagrams in batches, find or begin each downstream's session.

Decides: who may have a session (PeerAuthentication mode, limits). Leaves to others: where its datagrams go
(proxy.udp_session).

STRICT: a plain datagram shows no identity, so it is dropped, as a plaintext connection is reset.
"""

import resource
import select
import socket

from meshproxy.model.listener import MtlsMode
from meshproxy.proxy.listener_runtime import ListenerRuntime
from meshproxy.proxy.udp_session import BATCH, Downstream, Key, Source, UdpFlows, UdpSession
from meshproxy.route.l4 import L4Table

IP_PKTINFO = 8
"""Not in Python's socket module; linux/in.h."""
MAX_SESSIONS = 16384
"""Of one listener in one worker, and at most a quarter of the descriptors a process may have: each takes one, and
senders' addresses can be made up."""


class UdpListener:
    """Receives until closed. The socket is ours; control keeps a copy, so a successor finds what has come meanwhile."""

    __slots__ = ("_flows", "_is_receiving", "_max_sessions", "_receive", "_sock", "l4", "runtime")

    def __init__(self, sock: socket.socket, runtime: ListenerRuntime) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.runtime = runtime
        self.l4 = L4Table(runtime.listener.tcp_routes)
        self._flows = UdpFlows(sock, runtime)
        self._receive = self._receive_to_one
        if runtime.listener.address in ("0.0.0.0", "::"):
            self._receive = self._receive_to_any
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        self._flows.poller.register(sock.fileno(), select.EPOLLIN)
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_sessions = runtime.listener.max_connections or min(MAX_SESSIONS, descriptors // 4)
        self._is_receiving = True
        runtime.state.loop.add_reader(self._flows.poller.fileno(), self._on_ready)

    def pause(self) -> None:
        """Leave what comes from downstreams in the socket; sessions get their answers."""
        if self._is_receiving:
            self._is_receiving = False
            self._flows.poller.unregister(self._sock.fileno())

    def close(self) -> None:
        """Receive no more: sessions have no other way to their downstreams, so they end."""
        for session in list(self._flows.by_downstream.values()):
            session.end()
        self._close_sockets()

    def drain(self) -> None:
        """Go on for as long as there are sessions: no one can be told to go elsewhere."""
        self._flows.on_empty = self._close_sockets
        if not self._flows.by_downstream:
            self._close_sockets()

    def _close_sockets(self) -> None:
        if self._sock.fileno() >= 0:
            self.runtime.state.loop.remove_reader(self._flows.poller.fileno())
            self._flows.poller.close()
            self._sock.close()

    def _on_ready(self) -> None:
        flows = self._flows
        own = self._sock.fileno()
        sessions = flows.by_descriptor
        for descriptor, _ in flows.poller.poll(0, BATCH):
            if descriptor == own:
                self._receive()
            elif (session := sessions.get(descriptor)) is not None:
                session.on_readable()

    def _receive_to_one(self) -> None:
        receive, buffer, sessions = self._sock.recvfrom_into, self._flows.buffer, self._flows.by_downstream
        for _ in range(BATCH):
            try:
                size, downstream = receive(buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.runtime.counters.udp_downstream_sess_rx_errors += 1
                return
            session = sessions.get(downstream) or self._begin(downstream, downstream, None)
            if session is not None:
                session.forward(buffer[:size])

    def _receive_to_any(self) -> None:
        """Which of the host's addresses a datagram was sent to must be known: the answer has to come from there."""
        receive, buffer, sessions = self._sock.recvmsg_into, self._flows.buffer, self._flows.by_downstream
        whole = (buffer,)
        for _ in range(BATCH):
            try:
                size, ancillary, _, downstream = receive(whole, 64)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.runtime.counters.udp_downstream_sess_rx_errors += 1
                return
            arrival = ancillary[0][2] if ancillary else b""
            key = (downstream, arrival)
            session = sessions.get(key) or self._begin(key, downstream, answering(arrival))
            if session is not None:
                session.forward(buffer[:size])

    def _begin(self, key: Key, downstream: Downstream, source: Source | None) -> UdpSession | None:
        runtime = self.runtime
        state, counters, listener = runtime.state, runtime.counters, runtime.listener
        if listener.mtls is MtlsMode.STRICT:
            counters.plaintext_refused += 1
            return None
        if len(self._flows.by_downstream) >= self._max_sessions or state.open_connections >= state.max_connections:
            counters.downstream_cx_overflow += 1
            return None
        if state.is_overloaded:
            state.counters.overload["refuse_connection"] += 1
            return None
        route = self.l4.find(listener.address)
        if route is None:
            counters.udp_downstream_sess_no_route += 1
            return None
        session = UdpSession(self._flows, key, downstream, source, route.cluster_key(state.draw()))
        return session if session.begin() else None


def answering(arrival: bytes) -> Source | None:
    """What makes an answer leave from where the datagram arrived. arrival: struct in_pktinfo, in6_pktinfo or empty."""
    if len(arrival) == 12:
        return [(socket.IPPROTO_IP, IP_PKTINFO, bytes(4) + arrival[4:8] + bytes(4))]
    if len(arrival) == 20:
        # The interface only where the address means nothing without it: routes may lead back by another.
        interface = arrival[16:] if arrival[:2] == b"\xfe\x80" else bytes(4)
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, arrival[:16] + interface)]
    return None
