"""One UDP socket of QUIC in one worker: datagrams to connections by connection id, timers, datagrams out.

Decides: which connection a datagram belongs to, whether a new one may begin (limits, Retry), when datagrams leave.
Leaves to others: QUIC (codec.quic), identities (tls.quic, ListenerRuntime.identify), requests (proxy.downstream_h3).

Imported only once there is a QUIC listener: aioquic and cryptography take 15 MiB.

Several workers: the kernel hands a datagram to the worker that the first byte of its connection id names
(control.sockets), whatever address it comes from; a client that changes its address stays where it was.
"""

import errno
import heapq
import logging
import os
import socket
import sys
from functools import partial
from time import monotonic
from typing import Any

from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # it is public, and only re-exported
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicFrameType,
    QuicHeader,
    QuicPacketType,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.retry import QuicRetryTokenHandler

from meshproxy.codec.quic import CONNECTION_WINDOW, ID_BYTES, STREAM_WINDOW, ConnectionIds, ServerConnection
from meshproxy.errors import ConfigError
from meshproxy.listener.udp import IP_PKTINFO, answering
from meshproxy.model.listener import ServerTlsMode
from meshproxy.proxy.downstream_h3 import DownstreamH3, idle_timeout_s
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.tls.quic import ClientVerifier, configuration, read_files
from meshproxy.tls.verify import IdentityRefused
from meshproxy.upstream.worker_state import NEVER

log = logging.getLogger(__name__)

BATCH = 64
"""Datagrams taken in one loop turn."""
DATAGRAM_BYTES = 2048
RETRY_AFTER = 100
"""Handshakes under way from which on a client must show that its address is its own (Retry)."""
MAX_HANDSHAKES = 2000
"""Under way at once; each takes about 60 KiB."""
RESETS_PER_SECOND = 100
"""Stateless resets sent at most: they answer what anyone may send."""
TIMER_GRAIN_S = 0.0005
"""Timers that close together go off at once."""
MAX_SEGMENTS = 64
"""Of one system call: the kernel's limit of old."""
MAX_SENT_BYTES = 65_000
_SOL_UDP, _UDP_SEGMENT = 17, 103
"""Not in Python's socket module; linux/udp.h."""
_LEAST_RESET_BYTES = 21
_CERTIFICATE_REQUIRED, _BAD_CERTIFICATE = 116, 42

Address = Any


class _Context:
    """What new connections get, until certificates change."""

    __slots__ = ("configuration", "ids", "verifier")

    def __init__(self, configuration: QuicConfiguration, verifier: ClientVerifier | None, ids: ConnectionIds) -> None:
        self.configuration = configuration
        self.verifier = verifier
        """None: no certificate is asked for."""
        self.ids = ids


class QuicListener:
    """Receives until closed. The socket is ours; control keeps a copy, so a successor finds what has come meanwhile."""

    __slots__ = (
        "_armed_at",
        "_by_id",
        "_context",
        "_dirty",
        "_handshaking",
        "_has_gso",
        "_heap",
        "_is_any",
        "_is_busy",
        "_is_closed",
        "_is_draining",
        "_is_receiving",
        "_made_from",
        "_resets_left",
        "_resets_second",
        "_retry",
        "_sequence",
        "_slot",
        "_sock",
        "_sockname",
        "_source",
        "_timer",
        "_timers",
        "runtime",
    )

    def __init__(
        self,
        sock: socket.socket,
        runtime: ListenerRuntime,
        slot: int = 0,
        predecessor: "QuicListener | None" = None,
    ) -> None:
        """predecessor: was closed, on the same socket; its connections are reached through here until they end."""
        sock.setblocking(False)
        self._sock = sock
        self._sockname = sock.getsockname()
        self._is_any = runtime.listener.address in ("0.0.0.0", "::")
        """Which of the host's addresses a datagram was sent to must be known: the answer has to come from there."""
        if self._is_any and sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        elif self._is_any:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        self._source: Any = ()
        """Of the datagram that is being looked at."""
        self._has_gso = True
        self.runtime = runtime
        self._slot = slot
        self._by_id: dict[bytes, DownstreamH3] = {}
        if predecessor is not None:
            predecessor.pause()
            self._by_id = predecessor._by_id
        self._handshaking: set[DownstreamH3] = set()
        self._dirty: set[DownstreamH3] = set()
        self._is_busy = False
        self._is_draining = self._is_closed = False
        self._context: _Context | None = None
        self._made_from: Any = None
        self._retry = QuicRetryTokenHandler()
        self._resets_second = 0
        self._resets_left = RESETS_PER_SECOND
        self._heap: list[tuple[float, int, DownstreamH3]] = []
        self._timers: dict[DownstreamH3, _Timer] = {}
        self._sequence = 0
        self._timer: Any = None
        self._armed_at = 0.0
        self._is_receiving = True
        runtime.state.loop.add_reader(sock.fileno(), self._on_readable)

    def pause(self) -> None:
        """Leave what comes in the socket."""
        if self._is_receiving:
            self._is_receiving = False
            self.runtime.state.loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        """Take no new connection. Those that are open stay, and so does the socket: they have no other way out."""
        self._is_draining = self._is_closed = True
        if not self.runtime.connections:
            self._close_socket()

    def drain(self) -> None:
        """Take no new connection; those that are told to go are served until they have."""
        self._is_draining = True
        for connection in list(self.runtime.connections):
            connection.drain()

    def _close_socket(self) -> None:
        if self._sock.fileno() >= 0:
            self.pause()
            if self._timer is not None:
                self._timer.cancel()
            self._sock.close()

    # ── in ──

    def _on_readable(self) -> None:
        receive, receive_message = self._sock.recvfrom, self._sock.recvmsg
        by_id, dirty, is_any, arrival = self._by_id, self._dirty, self._is_any, b""
        runtime = self.runtime
        counters = runtime.counters
        now = monotonic()
        self._is_busy = True
        try:
            for _ in range(BATCH):
                try:
                    if is_any:
                        data, ancillary, _, address = receive_message(DATAGRAM_BYTES, 64)
                        arrival = ancillary[0][2] if ancillary else b""
                    else:
                        data, address = receive(DATAGRAM_BYTES)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError:
                    continue  # an ICMP error that came back to this socket
                counters.downstream_cx_rx_bytes_total += len(data)
                connection = by_id.get(data[1 : 1 + ID_BYTES]) if data and data[0] < 0x80 else None
                if connection is None:
                    self._source = answering(arrival) or ()
                    connection = self._find(data, address, now)
                    if connection is None:
                        continue
                    if is_any and connection.source != self._source:
                        connection.source = self._source
                        connection.sockname = (_address_of(arrival), self._sockname[1])
                try:
                    connection.quic.receive_datagram(data, address, now)
                except Exception:
                    self._give_up(connection)
                if connection.listener is runtime:
                    dirty.add(connection)
                else:
                    connection.wake_up()
        finally:
            self._is_busy = False
        self._flush()

    def _find(self, data: bytes, address: Address, now: float) -> DownstreamH3 | None:
        """The connection of a datagram that no short header's id has told; a new one where it may begin."""
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=ID_BYTES)
        except ValueError:
            return None
        connection = self._by_id.get(header.destination_cid)
        if connection is not None:
            return connection
        context = self._current()
        if context is None:
            return None
        if header.packet_type is QuicPacketType.ONE_RTT:
            self._reset(data, header.destination_cid, context, address, now)
            return None
        if len(data) < SMALLEST_MAX_DATAGRAM_SIZE or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            return None
        if header.version not in context.configuration.supported_versions:
            versions = context.configuration.supported_versions
            self._send(encode_quic_version_negotiation(header.destination_cid, header.source_cid, versions), address)
            return None
        if header.packet_type is not QuicPacketType.INITIAL:
            return None
        return self._begin(header, context, address, now)

    def _begin(self, header: QuicHeader, context: _Context, address: Address, now: float) -> DownstreamH3 | None:
        runtime = self.runtime
        state, counters, listener = runtime.state, runtime.counters, runtime.listener
        original, retry_source = header.destination_cid, None
        if header.token:
            # Whether or not Retry is asked for now: a token of a while ago names the id that the client began with.
            try:
                original = self._retry.validate_token(
                    address=address, destination_cid=header.destination_cid, token=header.token, now=now
                )
            except ValueError:
                self._refuse(header, QuicErrorCode.INVALID_TOKEN, address)
                return None
            retry_source = header.destination_cid
        elif len(self._handshaking) >= RETRY_AFTER:
            self._send_retry(header, context, address, now)
            return None
        if self._is_draining:
            self._refuse(header, QuicErrorCode.CONNECTION_REFUSED, address)
            return None
        limit = listener.max_connections
        if (
            (limit is not None and len(runtime.connections) >= limit)
            or state.open_connections >= state.max_connections
            or len(self._handshaking) >= MAX_HANDSHAKES
        ):
            counters.downstream_cx_overflow += 1
            self._refuse(header, QuicErrorCode.CONNECTION_REFUSED, address)
            return None
        if state.is_overloaded:
            state.counters.overload["refuse_connection"] += 1
            self._refuse(header, QuicErrorCode.CONNECTION_REFUSED, address)
            return None
        quic = ServerConnection(
            configuration=context.configuration,
            original_destination_connection_id=original,
            retry_source_connection_id=retry_source,
            ids=context.ids,
            asks_for_certificate=context.verifier is not None,
        )
        authenticate = partial(self._authenticate, context)
        connection = DownstreamH3(runtime, quic, authenticate, self._wake, self._by_id, self._sockname, now)
        connection.add_id(header.destination_cid)
        connection.add_id(quic.host_cid)
        self._handshaking.add(connection)
        return connection

    # ── what is said without a connection ──

    def _send_retry(self, header: QuicHeader, context: _Context, address: Address, now: float) -> None:
        source = context.ids.new()
        token = self._retry.create_token(
            address=address,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source,
            now=now,
        )
        assert header.version is not None
        self._send(
            encode_quic_retry(
                version=header.version,
                source_cid=source,
                destination_cid=header.source_cid,
                original_destination_cid=header.destination_cid,
                retry_token=token,
            ),
            address,
        )

    def _refuse(self, header: QuicHeader, code: int, address: Address) -> None:
        """An Initial packet that says no, under the keys that anyone can derive from the client's (RFC 9001 §5.2)."""
        assert header.version is not None
        crypto = CryptoPair()
        crypto.setup_initial(cid=header.destination_cid, is_client=False, version=header.version)
        builder = QuicPacketBuilder(
            host_cid=header.destination_cid,
            is_client=False,
            max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
            peer_cid=header.source_cid,
            version=header.version,
        )
        builder.start_packet(QuicPacketType.INITIAL, crypto)
        buffer = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY)
        buffer.push_uint_var(code)
        buffer.push_uint_var(QuicFrameType.PADDING)
        buffer.push_uint_var(0)
        self._send(builder.flush()[0][0], address)

    def _reset(self, data: bytes, connection_id: bytes, context: _Context, address: Address, now: float) -> None:
        """Stateless reset (RFC 9000 §10.3): who is still connected to our predecessor learns it now.

        Shorter than what asked for it, so that two ends that know nothing of each other fall silent.
        """
        size = min(len(data) - 1, 2 * _LEAST_RESET_BYTES)
        if size < _LEAST_RESET_BYTES or not context.ids.is_ours(connection_id):
            return
        second = int(now)
        if second != self._resets_second:
            self._resets_second = second
            self._resets_left = RESETS_PER_SECOND
        if self._resets_left:
            self._resets_left -= 1
            drawn = os.urandom(size - 16)
            self._send(bytes((0x40 | drawn[0] & 0x3F,)) + drawn[1:] + context.ids.reset_token(connection_id), address)

    # ── identities ──

    def _current(self) -> _Context | None:
        """None while there are no certificates: datagrams are dropped then."""
        runtime = self.runtime
        tls = runtime.listener.tls
        is_mesh = tls is None or tls.mode is ServerTlsMode.ISTIO_MUTUAL
        source = runtime.workload.bundle if is_mesh else tls
        if source is None:
            runtime.counters.ssl_connection_error += 1
            return None
        if self._made_from is source:
            return self._context
        self._made_from = source
        self._context = None
        try:
            if is_mesh:
                bundle = runtime.workload.bundle
                assert bundle is not None
                chain_pem, key_pem, roots_pem = bundle.chain_pem, bundle.key_pem, bundle.roots_pem
            else:
                assert tls is not None
                chain_pem, key_pem, roots_pem = read_files(tls)
            asks = is_mesh or (tls is not None and tls.mode is ServerTlsMode.MUTUAL)
            made = configuration(chain_pem, key_pem, stream_window=STREAM_WINDOW, connection_window=CONNECTION_WINDOW)
            made.idle_timeout = idle_timeout_s(runtime.listener)
            self._context = _Context(
                made,
                ClientVerifier(roots_pem) if asks else None,
                ConnectionIds(self._slot, key_pem),
            )
        except ConfigError as error:
            log.error("%s: no QUIC: %s", runtime.listener.name, error)
        return self._context

    def _authenticate(self, context: _Context, quic: ServerConnection) -> PeerContext | None:
        if context.verifier is None:
            return self.runtime.plain_peer
        try:
            return self.runtime.identify(*context.verifier.verify(quic.peer_chain))
        except IdentityRefused as refusal:
            self.runtime.refuse_peer(refusal)
            is_absent = refusal.detail == "tls.no_certificate"
            if is_absent:
                self.runtime.counters.ssl_fail_verify_no_cert += 1
            alert = _CERTIFICATE_REQUIRED if is_absent else _BAD_CERTIFICATE
            quic.close(error_code=QuicErrorCode.CRYPTO_ERROR + alert, frame_type=0x6, reason_phrase=refusal.detail)
            return None

    # ── out ──

    def _wake(self, connection: DownstreamH3) -> None:
        if not self._dirty and not self._is_busy:
            self.runtime.state.loop.call_soon(self._flush)
        self._dirty.add(connection)
        connection.quic.acknowledge_now()

    def _flush(self) -> None:
        """Everything that events and answers of this loop turn have made, in as few datagrams as it fits."""
        if not self._dirty:
            return
        now = monotonic()
        self._is_busy = True
        dirty = self._dirty
        try:
            for connection in list(dirty):
                try:
                    connection.on_events(now)
                except Exception:
                    self._give_up(connection)
            self._dirty = set()
            for connection in dirty:
                try:
                    self._transmit(connection, now)
                except Exception:
                    self._give_up(connection)
        finally:
            self._is_busy = False
            if self._dirty:
                self.runtime.state.loop.call_soon(self._flush)

    def _give_up(self, connection: DownstreamH3) -> None:
        """A fault of ours or of aioquic's costs one connection; its client learns it by a stateless reset."""
        log.exception("%s: a QUIC connection failed", self.runtime.listener.name)
        connection.over()
        self._handshaking.discard(connection)
        self._timers.pop(connection, None)

    def _transmit(self, connection: DownstreamH3, now: float) -> None:
        quic = connection.quic
        if not quic.is_begun:  # what looked like a client's first packet was none
            connection.over()
        elif quic.is_closing or not connection.is_over:
            datagrams = quic.datagrams_to_send(now)
            if len(datagrams) > 1:
                self._send_all(datagrams, connection.source)
            elif datagrams:
                self._send_one(*datagrams[0], connection.source)
            connection.after_transmit(now)
        if quic.is_closing:
            # What still comes for it is answered by a stateless reset, should its CONNECTION_CLOSE be lost.
            connection.over()
        if connection.is_over or not connection.is_pending:
            self._handshaking.discard(connection)
        if connection.is_over:
            self._timers.pop(connection, None)
            if self._is_closed and not self.runtime.connections:
                self._close_socket()
        else:
            self._set_timer(connection, quic.get_timer())

    def _send(self, data: bytes, address: Address) -> None:
        """An answer to the datagram that is being looked at."""
        self._send_one(data, address, self._source)

    def _send_one(self, data: bytes, address: Address, source: Any) -> None:
        try:
            if source:
                self._sock.sendmsg((data,), source, 0, address)
            else:
                self._sock.sendto(data, address)
        except OSError:
            return  # as good as lost on the way: QUIC sends it again
        self.runtime.counters.downstream_cx_tx_bytes_total += len(data)

    def _send_all(self, datagrams: list[tuple[bytes, Address]], source: Any) -> None:
        """Datagrams of one size in a row cost one system call (UDP generic segmentation offload)."""
        at, count = 0, len(datagrams)
        while at < count:
            data, address = datagrams[at]
            size = total = len(data)
            end = at + 1
            while self._has_gso and end < count and end - at < MAX_SEGMENTS:
                following, its_address = datagrams[end]
                if len(following) > size or its_address != address or total + size > MAX_SENT_BYTES:
                    break
                total += len(following)
                end += 1
                if len(following) < size:
                    break
            if end - at == 1:
                self._send_one(data, address, source)
            else:
                parts = [datagrams[index][0] for index in range(at, end)]
                segments = (_SOL_UDP, _UDP_SEGMENT, size.to_bytes(2, sys.byteorder))
                try:
                    self._sock.sendmsg(parts, (segments, *source), 0, address)
                except BlockingIOError:
                    pass
                except OSError as error:
                    if error.errno in (errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.EMSGSIZE):
                        self._has_gso = False  # a device, or a kernel, that cannot
                        continue
                else:
                    self.runtime.counters.downstream_cx_tx_bytes_total += total
            at = end

    # ── timers ──

    def _set_timer(self, connection: DownstreamH3, at: float | None) -> None:
        if at is None:
            self._timers.pop(connection, None)
            return
        timer = self._timers.get(connection)
        if timer is None:
            timer = self._timers[connection] = _Timer()
        timer.at = at
        if at < timer.entry_at:  # else its entry comes first, and finds the later time
            self._enter(connection, timer)
            if self._timer is None or at < self._armed_at:
                self._arm(at)

    def _enter(self, connection: DownstreamH3, timer: "_Timer") -> None:
        self._sequence += 1
        timer.entry, timer.entry_at = self._sequence, timer.at
        heapq.heappush(self._heap, (timer.at, self._sequence, connection))

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_at = at
        self._timer = self.runtime.state.loop.call_later(max(0.0, at - monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = monotonic() + TIMER_GRAIN_S
        heap, timers = self._heap, self._timers
        while heap and heap[0][0] <= now:
            _, entry, connection = heapq.heappop(heap)
            timer = timers.get(connection)
            if timer is None or timer.entry != entry:
                continue
            if timer.at > now:
                self._enter(connection, timer)
                continue
            del timers[connection]
            connection.quic.handle_timer(now)
            self._dirty.add(connection)
        self._flush()
        if heap and (self._timer is None or heap[0][0] < self._armed_at):
            self._arm(heap[0][0])


def _address_of(arrival: bytes) -> str:
    """In struct in_pktinfo or in6_pktinfo."""
    if len(arrival) == 12:
        return socket.inet_ntop(socket.AF_INET, arrival[8:12])
    return socket.inet_ntop(socket.AF_INET6, arrival[:16]) if len(arrival) == 20 else ""


class _Timer:
    """When a connection wants to be called, and the one entry of the heap that stands for it."""

    __slots__ = ("at", "entry", "entry_at")

    def __init__(self) -> None:
        self.at = self.entry_at = NEVER
        self.entry = 0
