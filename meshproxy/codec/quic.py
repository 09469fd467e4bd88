"""aioquic's server connection with what a proxy needs of it: windows that can be held, ids that name the worker.

Decides: how much a client may send ahead, what a connection id says, what a client's signature may be. Leaves to
others: QUIC itself (aioquic), sockets and routing (listener.quic), whose certificate it is (tls.quic).

aioquic doubles a window whenever half of it is used, whether or not anyone takes the data, and has no public way to ask
for a client's certificate: both are overridden here, and tests hold aioquic to the names that this relies on. There is
no session resumption and so no 0-RTT: nothing can be replayed, and every connection shows its certificate.
"""

import hashlib
import hmac
import logging
import os
from typing import Any, Final

from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # it is public, and only re-exported
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import Limit, QuicConnection
from aioquic.quic.crypto import NoCallback
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.recovery import QuicPacketPacer
from aioquic.quic.stream import QuicStream
from aioquic.tls import Epoch, SignatureAlgorithm

logging.getLogger("quic").setLevel(logging.WARNING)  # aioquic tells of every handshake and every stream

ID_BYTES: Final = 8
STREAM_WINDOW: Final = 128 * 1024
"""Of one stream: what may lie between us and an upstream that does not read."""
CONNECTION_WINDOW: Final = 512 * 1024
"""Of a connection, received in whatever order and not taken yet: bounds what can be made to wait for a gap."""
MAX_STREAMS: Final = 100
MAX_PEER_STREAMS: Final = 16
"""Unidirectional ones: three have a use."""
PACING_GRAIN_S: Final = 0.002
LEFT_FOR_HANDSHAKE_BYTES: Final = 512
"""A server has no message to send once the handshake is complete."""
LEAST_FRAME_BYTES: Final = 24
"""Of what is left of a packet, below which no stream is asked for a frame."""
MAX_BURST: Final = 64
"""Datagrams sent at once, whatever the rate: a receiver's socket holds 90 of them by Linux's default."""

_SIGNATURES: Final = (
    SignatureAlgorithm.ECDSA_SECP256R1_SHA256,
    SignatureAlgorithm.RSA_PSS_RSAE_SHA256,
    SignatureAlgorithm.ECDSA_SECP384R1_SHA384,
    SignatureAlgorithm.RSA_PSS_RSAE_SHA384,
    SignatureAlgorithm.ED25519,
)
"""Of the other side's CertificateVerify: RFC 8446 §4.2.3 forbids PKCS #1 and SHA-1 there, aioquic would take them."""


class ConnectionIds:
    """Connection ids of one worker: the first byte names the slot, so that whoever gets a datagram knows whose it is.

    secret: survives a restart, so that ids of before are told apart by their reset tokens (RFC 9000 §10.3.2).
    """

    __slots__ = ("_secret", "slot")

    def __init__(self, slot: int, secret: bytes) -> None:
        self.slot = slot
        self._secret = secret

    def new(self) -> bytes:
        return bytes((self.slot,)) + os.urandom(ID_BYTES - 1)

    def is_ours(self, connection_id: bytes) -> bool:
        return connection_id[0] == self.slot

    def reset_token(self, connection_id: bytes) -> bytes:
        return hmac.digest(self._secret, connection_id, hashlib.sha256)[:16]


class _Pacer(QuicPacketPacer):
    """aioquic lets 16 datagrams go at once and then wants to be called again within microseconds; timers of the loop
    have a grain of a millisecond, which would hold a connection to 19 MB/s and leave the core idle."""

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        super().update_rate(congestion_window, smoothed_rtt)
        assert self.packet_time is not None
        self.bucket_max = max(self.bucket_max, min(PACING_GRAIN_S, MAX_BURST * self.packet_time))


class _Streams(dict[int, QuicStream]):
    """The streams of a connection. aioquic walks `values()` for every packet, and for nothing else than to see whose
    window is to be told: these are all it gets, for a hundred idle streams would cost more than the packet."""

    def __init__(self) -> None:
        super().__init__()
        self.due: dict[int, QuicStream] = {}

    def values(self) -> Any:
        return list(self.due.values()) if self.due else ()


class Connection(QuicConnection):
    """Either side's. Windows grow by what was taken (`take`), never by what merely came."""

    def __init__(self, *, configuration: QuicConfiguration, **more: Any) -> None:
        super().__init__(configuration=configuration, **more)
        self._streams: _Streams = _Streams()
        self._loss._pacer = _Pacer(max_datagram_size=configuration.max_datagram_size)
        self._taken = 0

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls._signature_algorithms = [
            algorithm for algorithm in self.tls._signature_algorithms if algorithm in _SIGNATURES
        ]

    def _write_connection_limits(self, builder: Any, space: Any) -> None:
        # With this value aioquic's own rule (double at half) never holds; ours stands in `value` before it looks.
        limit = self._local_max_data
        used = limit.used
        limit.used = 0
        try:
            super()._write_connection_limits(builder=builder, space=space)
        finally:
            limit.used = used

    def _write_stream_limits(self, builder: Any, space: Any, stream: Any) -> None:
        receiver = stream.receiver
        highest = receiver.highest_offset
        receiver.highest_offset = 0
        try:
            super()._write_stream_limits(builder=builder, space=space, stream=stream)
        finally:
            receiver.highest_offset = highest
        self._streams.due.pop(stream.stream_id, None)

    def _write_stream_frame(self, builder: Any, space: Any, stream: Any, max_offset: int) -> int:
        # Asked of every stream that has something to send, for every packet, and mostly once that is full.
        if builder.remaining_flight_space < LEAST_FRAME_BYTES:
            return 0
        return super()._write_stream_frame(builder=builder, space=space, stream=stream, max_offset=max_offset)

    def _on_max_stream_data_delivery(self, delivery: QuicDeliveryState, stream: QuicStream) -> None:
        super()._on_max_stream_data_delivery(delivery, stream)
        stream_id = stream.stream_id
        if delivery != QuicDeliveryState.ACKED and stream_id is not None and stream_id in self._streams:
            self._streams.due[stream_id] = stream

    # ── for the proxy ──

    def take(self, length: int) -> None:
        """So many bytes of any streams have been taken: the connection may send as many more."""
        self._taken += length
        limit = self._local_max_data
        if self._taken + CONNECTION_WINDOW - limit.value >= CONNECTION_WINDOW // 2:
            limit.value = self._taken + CONNECTION_WINDOW

    def grant(self, stream_id: int, held: int) -> None:
        """Let the stream have its window again, beyond what was taken of it; held: bytes that only lie elsewhere."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.receiver.is_finished:
            return
        limit = stream.receiver.starting_offset() - held + STREAM_WINDOW
        if limit - stream.max_stream_data_local >= STREAM_WINDOW // 4:
            stream.max_stream_data_local = limit
            self._streams.due[stream_id] = stream

    def take_rest(self, stream_id: int) -> None:
        """The client reset the stream: what was counted of it and never came, or waited for a gap, is taken."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self.take(stream.receiver.highest_offset - stream.receiver.starting_offset())

    def waiting_bytes(self, stream_id: int) -> tuple[int, int]:
        """(not sent yet, not acknowledged yet) of what was written to the stream."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return 0, 0
        sender = stream.sender
        if sender.is_finished or sender._reset_error_code is not None:
            return 0, 0
        return max(0, sender._buffer_stop - sender.highest_offset), sender._buffer_stop - sender._buffer_start

    def has_stream(self, stream_id: int) -> bool:
        return stream_id in self._streams

    def acknowledge_now(self) -> None:
        """Acknowledge with what goes out now, rather than a millisecond later in a datagram of its own."""
        space = self._spaces[Epoch.ONE_RTT]
        if space.ack_at is not None:
            space.ack_at = 0.0

    @property
    def is_closing(self) -> bool:
        return self._close_event is not None

    @property
    def peer_chain(self) -> list[Any]:
        """The client's certificates as pyca objects, its own first; empty where it showed none."""
        own = self.tls._peer_certificate
        return [] if own is None else [own, *self.tls._peer_certificate_chain]


_EPOCHS: dict[frozenset[Epoch], frozenset[Epoch]] = {}
"""Each set of epochs once, for all connections."""


class ServerConnection(Connection):
    def __init__(
        self,
        *,
        configuration: QuicConfiguration,
        original_destination_connection_id: bytes,
        retry_source_connection_id: bytes | None,
        ids: ConnectionIds,
        asks_for_certificate: bool,
    ) -> None:
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_destination_connection_id,
            retry_source_connection_id=retry_source_connection_id,
        )
        self._ids = ids
        self._asks_for_certificate = asks_for_certificate
        first = self._host_cids[0]
        first.cid = ids.new()
        first.stateless_reset_token = ids.reset_token(first.cid)
        self.host_cid = self._local_initial_source_connection_id = first.cid
        self._local_max_streams_bidi = Limit(QuicFrameType.MAX_STREAMS_BIDI, "max_streams_bidi", MAX_STREAMS)
        self._local_max_streams_uni = Limit(QuicFrameType.MAX_STREAMS_UNI, "max_streams_uni", MAX_PEER_STREAMS)

    # ── overrides of aioquic's ──

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls._request_client_certificate = self._asks_for_certificate

    def _replenish_connection_ids(self) -> None:
        before = len(self._host_cids)
        super()._replenish_connection_ids()
        for connection_id in self._host_cids[before:]:
            connection_id.cid = self._ids.new()
            connection_id.stateless_reset_token = self._ids.reset_token(connection_id.cid)

    # ── for the proxy ──

    def forget_handshake(self) -> None:
        """Once it is complete: aioquic keeps three buffers of 16 KiB for the messages of a handshake, filled or not."""
        self._crypto_buffers = {epoch: Buffer(capacity=LEFT_FOR_HANDSHAKE_BYTES) for epoch in self._crypto_buffers}
        # A frame's handler stands with the set of epochs that may bring it, 33 sets of four contents: 7 KiB.
        handlers = self._QuicConnection__frame_handlers  # type: ignore[attr-defined]
        pairs: dict[Any, Any] = {}
        for frame_type, (handler, epochs) in handlers.items():
            pair = (handler, _EPOCHS.setdefault(epochs, epochs))
            handlers[frame_type] = pairs.setdefault(pair, pair)
        # What tells aioquic's log of keys that there are new ones, with four partials an epoch: 3 KiB, and no such log.
        for crypto in self._cryptos.values():
            for context in (crypto.recv, crypto.send):
                context._setup_cb = context._teardown_cb = NoCallback

    @property
    def is_begun(self) -> bool:
        """A packet of the client could be read: only then is there anybody to send to."""
        return bool(self._network_paths) and self._spaces[Epoch.INITIAL].largest_received_packet >= 0

    @property
    def next_client_stream_id(self) -> int:
        """Of a request: above all that have been opened."""
        return self._local_max_streams_bidi.used * 4


class ClientConnection(Connection):
    """A connection of ours to a server, whose identity is for us to check: aioquic is told to let any chain pass."""

    def __init__(self, *, configuration: QuicConfiguration) -> None:
        super().__init__(configuration=configuration)
        # HTTP/3 gives a server no use for streams both ways (RFC 9114 §6.1).
        self._local_max_streams_bidi = Limit(QuicFrameType.MAX_STREAMS_BIDI, "max_streams_bidi", 0)
        self._local_max_streams_uni = Limit(QuicFrameType.MAX_STREAMS_UNI, "max_streams_uni", MAX_PEER_STREAMS)

    @property
    def streams_left(self) -> int:
        """Requests that the server allows beyond those that have been begun."""
        return self._remote_max_streams_bidi - self._local_next_stream_id_bidi // 4

    @property
    def probes(self) -> int:
        """Sent in a row without an answer."""
        return self._loss._pto_count

    def is_reset_by(self, datagram: bytes) -> bool:
        """A stateless reset (RFC 9000 §10.3.1): the server knows nothing of this connection any more."""
        token = self._peer_cid.stateless_reset_token
        return bool(token) and datagram[0] < 0x80 and hmac.compare_digest(datagram[-16:], token)
