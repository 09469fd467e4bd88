"""What every connection of one listener shares in one worker, and who its downstreams are.

A reload that changes routes swaps `table`; a request reads it once and keeps what it read to its end.
"""

import logging
import ssl
from time import time
from typing import Any

from meshproxy.model.cluster import Cluster, Protocol
from meshproxy.model.listener import Direction, Listener, ServerTlsMode
from meshproxy.model.workload import UNKNOWN_WORKLOAD, WorkloadLabels
from meshproxy.route.table import CompiledTable
from meshproxy.telemetry.recorder import (
    MESSAGE_LABELS,
    HttpSeries,
    ListenerCounters,
    MessageSeries,
    TcpSeries,
    http_labels,
    tcp_labels,
)
from meshproxy.tls.context import gateway_context
from meshproxy.tls.verify import IdentityRefused, PeerCertificate, peer_identity, xfcc_element
from meshproxy.upstream.cluster_runtime import EndpointRuntime, WorkloadRuntime
from meshproxy.upstream.worker_state import WorkerState

log = logging.getLogger(__name__)


class PeerContext:
    """One kind of downstream of one listener: what its identity means for headers and metrics.

    number: distinguishes cached metric series (EndpointRuntime.series) of this peer from another's; a multiple of
    1000, so that number + status is a key.
    """

    __slots__ = ("_of_grpc", "grpc_status", "is_mtls", "labels", "number", "principal", "protocol", "xfcc")

    _next_number = 1000

    def __init__(self, principal: str, labels: WorkloadLabels, xfcc: bytes, is_mtls: bool) -> None:
        self.principal = principal
        self.labels = labels
        self.xfcc = xfcc
        """The x-forwarded-client-cert element to add; b"" on plaintext."""
        self.is_mtls = is_mtls
        self.protocol = "http"
        self.grpc_status = ""
        self.number = PeerContext._next_number
        PeerContext._next_number += 1000
        self._of_grpc: dict[int | None, PeerContext] = {}

    def of_grpc(self, status: int | None) -> "PeerContext":
        """The same peer, to metrics: as the downstream of gRPC calls that ended with this grpc-status (None: without).
        Few statuses are known (codec.grpc), so few contexts are made."""
        context = self._of_grpc.get(status)
        if context is None:
            context = self._of_grpc[status] = PeerContext(self.principal, self.labels, self.xfcc, self.is_mtls)
            context.protocol = "grpc"
            context.grpc_status = "" if status is None else str(status)
        return context


class ListenerRuntime:
    __slots__ = (
        "_gateway_context",
        "_peers",
        "alt_svc",
        "connections",
        "counters",
        "head_suffix",
        "is_gateway",
        "is_outbound",
        "listener",
        "peer_labels",
        "plain_peer",
        "state",
        "table",
        "workload",
    )

    def __init__(
        self,
        listener: Listener,
        table: CompiledTable | None,
        workload: WorkloadRuntime,
        state: WorkerState,
        peer_labels: dict[str, WorkloadLabels],
    ) -> None:
        self.listener = listener
        self.table = table
        self.workload = workload
        self.state = state
        self.peer_labels = peer_labels
        self.is_gateway = listener.direction is Direction.GATEWAY
        self.is_outbound = listener.direction is not Direction.INBOUND
        self.counters: ListenerCounters = state.recorder.listener(listener.name)
        self.connections: set[Any] = set()
        self.alt_svc = b""
        """A line for every answer of an upstream: that HTTP/3 is to be had on the same port (RFC 7838)."""
        if listener.advertises_quic:
            self.alt_svc = b'\r\nalt-svc: h3=":%d"; ma=86400' % listener.port
        self._gateway_context: ssl.SSLContext | None = None
        self._peers: dict[tuple[str, bytes], PeerContext] = {}
        self.plain_peer = PeerContext(
            str(workload.workload.identity) if self.is_outbound else "",
            workload.workload.metric_labels if self.is_outbound else UNKNOWN_WORKLOAD,
            b"",
            False,
        )
        suffix = b"\r\nx-forwarded-proto: http"
        if listener.tls is not None:
            suffix += b"s"
        if self.is_outbound:
            suffix += b"\r\nx-envoy-attempt-count: 1"
        self.head_suffix = suffix
        """Field lines every forwarded request gets."""

    def peer(self, principal: str, xfcc: bytes) -> PeerContext:
        """The context of an authenticated downstream; bounded, since certificates come from outside."""
        key = (principal, xfcc)
        context = self._peers.get(key)
        if context is None:
            if len(self._peers) > 1024:
                self._peers.clear()
            labels = self.peer_labels.get(principal, UNKNOWN_WORKLOAD)
            context = self._peers[key] = PeerContext(principal, labels, xfcc, True)
        return context

    def server_context(self) -> ssl.SSLContext | None:
        """mTLS for new connections; None while the workload has no certificates (they are refused then)."""
        return self.workload.server_context()

    def gateway_context(self) -> ssl.SSLContext | None:
        tls = self.listener.tls
        assert tls is not None
        if tls.mode is ServerTlsMode.ISTIO_MUTUAL:
            return self.server_context()
        if self._gateway_context is None:
            self._gateway_context = gateway_context(tls, ("h2", "http/1.1") if self.listener.protocol.is_http else ())
        return self._gateway_context

    def authenticate(self, transport: Any) -> PeerContext | None:
        """Who is at the other end of a finished handshake; None when it was refused (and the connection aborted).

        The TLS library has verified the chain; the SPIFFE identity is verified here, before a byte is read.
        """
        ssl_object = transport.get_extra_info("ssl_object")
        if ssl_object is None:
            return self.plain_peer
        try:
            return self.identify(ssl_object.getpeercert(), ssl_object.getpeercert(True))
        except IdentityRefused as refusal:
            self.refuse_peer(refusal)
            transport.abort()
            return None

    def identify(self, certificate: PeerCertificate | None, der: bytes | None) -> PeerContext:
        """Who showed this certificate, whose chain is verified; IdentityRefused where it may not come in."""
        tls = self.listener.tls
        if tls is not None and tls.mode is not ServerTlsMode.ISTIO_MUTUAL:
            if not certificate:
                return self.plain_peer
            return self.peer("", xfcc_element("", der, certificate))
        own = self.workload.workload
        identity = peer_identity(certificate, own.trust_domain, der=der, now=time())
        return self.peer(str(identity), xfcc_element(str(own.identity), der, certificate))

    def refuse_peer(self, refusal: IdentityRefused) -> None:
        self.counters.ssl_fail_verify_error += 1
        self.state.counters.protocol_error(refusal.detail)
        log.warning("%s: refused a peer: %s", self.listener.name, refusal)

    def http_series(
        self, peer: PeerContext, endpoint: EndpointRuntime | None, cluster: Cluster | None, status: int, flag: str
    ) -> HttpSeries:
        """The series of one kind of request; slow, so callers keep what they get."""
        labels = http_labels(
            **self._labels(peer, endpoint, cluster),
            protocol=peer.protocol,
            response_code=str(status),
            grpc_status=peer.grpc_status,
            response_flags=flag,
        )
        return self.state.recorder.http_series(labels)

    def message_series(self, peer: PeerContext, endpoint: EndpointRuntime, cluster: Cluster) -> MessageSeries:
        """As http_series, for the messages of gRPC calls."""
        labels = http_labels(**self._labels(peer, endpoint, cluster))
        return self.state.recorder.message_series(labels[: len(MESSAGE_LABELS)])

    def tcp_series(
        self, peer: PeerContext, endpoint: EndpointRuntime | None, cluster: Cluster | None, flag: str
    ) -> TcpSeries:
        protocol = "udp" if self.listener.protocol is Protocol.UDP else "tcp"
        labels = tcp_labels(**self._labels(peer, endpoint, cluster), response_flags=flag, protocol=protocol)
        return self.state.recorder.tcp_series(labels)

    def _labels(self, peer: PeerContext, endpoint: EndpointRuntime | None, cluster: Cluster | None) -> dict[str, Any]:
        own = self.workload.workload
        labels: dict[str, Any] = {"source": peer.labels}
        if self.is_outbound:
            is_mtls = endpoint is not None and endpoint.tls is not None and endpoint.tls.is_mesh
            ids = endpoint.endpoint.spiffe_ids if endpoint is not None and is_mtls else ()
            labels["reporter"] = "source"
            labels["destination"] = endpoint.endpoint.workload if endpoint is not None else UNKNOWN_WORKLOAD
            labels["source_principal"] = peer.principal if is_mtls else "unknown"
            labels["destination_principal"] = ids[0] if ids else "unknown"
            labels["security_policy"] = "unknown"  # Istio: only the destination knows
        else:
            labels["reporter"] = "destination"
            labels["destination"] = own.metric_labels
            labels["source_principal"] = peer.principal or "unknown"
            labels["destination_principal"] = str(own.identity) if peer.is_mtls else "unknown"
            labels["security_policy"] = "mutual_tls" if peer.is_mtls else "none"
        if cluster is not None:
            labels["service_host"] = cluster.service_host or "unknown"
            labels["service_name"] = cluster.service_name or "unknown"
            labels["service_namespace"] = cluster.service_namespace or "unknown"
        return labels
