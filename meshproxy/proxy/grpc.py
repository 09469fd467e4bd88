"""gRPC calls: an HttpStream that knows what their heads and trailers say.

Decides: how a call's end is counted, judged, retried and answered by ourselves. Leaves to others: the wire words
(codec.grpc), everything that gRPC shares with HTTP (proxy.http_stream).

A connection serves its requests by plain HttpStreams until the first gRPC request comes; then it takes one of these,
which serves other requests as before. So a request that is no gRPC pays one attribute test, and without a body none.

Source: Envoy Grpc::Common, router filter (grpc-status, grpc-timeout), Utility::sendLocalReply; Istio route.go (every
route lets grpc-timeout set the timeout, the VirtualService's being the most), istio_stats (labels).
"""

from meshproxy.codec import grpc
from meshproxy.codec.http1 import NO_BODY, RequestHead, ResponseHead, without_field
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.proxy import local_reply
from meshproxy.proxy.http_stream import Downstream, HttpStream
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.proxy.local_reply import LocalReply


class GrpcStream(HttpStream):
    knows_grpc = True

    __slots__ = ("_has_own_deadline", "_judged_as", "grpc_status", "is_call")

    def __init__(self, down: Downstream, listener: ListenerRuntime, peer: PeerContext) -> None:
        super().__init__(down, listener, peer)
        self.is_call = False
        """The request under way is gRPC."""
        self.grpc_status: int | None = None
        self._judged_as: int | None = None
        """The HTTP status that a grpc-status in the head stands for."""
        self._has_own_deadline = False
        """timeout_at is the caller's, not the route's."""

    def start(self, head: RequestHead, now: float) -> None:
        self.is_call = grpc.is_grpc(head.grpc)
        self.grpc_status = self._judged_as = None
        self._has_own_deadline = False
        super().start(head, now)
        if not self.is_call or not self.is_active:
            return
        timeout_s = grpc.timeout_in(head.lowered, head.received)
        if timeout_s and now + timeout_s < self.timeout_at:
            self.timeout_at = now + timeout_s
            self.down.deadline = min(self.down.deadline, self.timeout_at)
            self._has_own_deadline = self.route is not None and not self.route.timeout_s

    # ── the upstream's side ──

    def on_response(self, head: ResponseHead, body: bytes, is_complete: bool) -> None:
        status = grpc.status_in(head.block) if self.is_call else None
        self._judged_as = None
        if status is not None:
            self.grpc_status = status
            self._judged_as = grpc.to_http(status)
            if self._end_early(head):
                return
        super().on_response(head, body, is_complete)

    def _end_early(self, head: ResponseHead) -> bool:
        """What a grpc-status in the head means for the endpoint; True where the call is tried again."""
        route, endpoint, cluster = self.route, self.endpoint, self.cluster
        assert route is not None and endpoint is not None and cluster is not None and self._judged_as is not None
        if head.status >= 300:
            return False
        was_suspect = endpoint.is_suspect
        if not was_suspect:  # else the answer is judged where it is counted
            super()._judge(self._judged_as)
        if self._judged_as >= 500:
            endpoint.rq_error += 1
        if route.retry is None or self.grpc_status == grpc.OK:
            return False
        if not self._retry_status(head.status, head):
            return False
        endpoint.rq_total += 1
        cluster.counters.upstream_rq_total += 1
        cluster.counters.upstream_rq_2xx += 1
        if was_suspect:
            self.state.report(cluster.key, endpoint.key, self._judged_as)
        self.grpc_status = None
        return True

    def _judge(self, status: int) -> None:
        super()._judge(status if self._judged_as is None else self._judged_as)

    def on_response_body(self, body: bytes, is_complete: bool, trailers: bytes) -> None:
        if trailers and self.is_call and self.grpc_status is None:
            self.grpc_status = grpc.status_in(b"\r\n" + trailers)
            # Too late for outlier detection and for a retry, as in Envoy: the answer is out.
            if self.endpoint is not None and (self.grpc_status is None or grpc.to_http(self.grpc_status) >= 500):
                self.endpoint.rq_error += 1
        super().on_response_body(body, is_complete, trailers)

    # ── endings ──

    def on_deadline(self, now: float) -> None:
        if not self._has_own_deadline or now < self.timeout_at:
            super().on_deadline(now)
            return
        # The caller has given up by itself by now, or is gone. Nobody has failed.
        self._drop_upstream()
        reply = local_reply.DURATION_TIMEOUT
        if not self.response_head_bytes:
            self.reply(reply)
            return
        self.flag = reply.flag.value
        self.details = reply.details
        self.down.abort()
        self._finish_accounting(now)

    def _send_reply(self, reply: LocalReply, extra: bytes) -> None:
        """A gRPC client reads only grpc-status and grpc-message: the answer is those, and no body."""
        if not self.is_call:
            super()._send_reply(reply, extra)
            return
        is_overdue = reply.flag is ResponseFlag.DURATION_TIMEOUT
        self.grpc_status = grpc.DEADLINE_EXCEEDED if is_overdue else grpc.from_http(reply.status)
        self.status = 200
        block = b"\r\ncontent-type: application/grpc\r\ngrpc-status: %d" % self.grpc_status
        if reply.body:
            block += b"\r\ngrpc-message: " + grpc.encoded_message(reply.body)
        block += b"\r\nserver: meshproxy" + reply.extra + without_field(extra, b"content-type")
        if self.down.protocol != "HTTP/2":
            block += b"\r\ncontent-length: 0"
        self.response_bytes = 0
        self.down.send_response(_head(block), b"", b"", True)

    def _finish_accounting(self, now: float) -> None:
        if not self.is_call or not self.is_active:
            super()._finish_accounting(now)
            return
        status = self.grpc_status
        if status is None and self.status:
            status = grpc.from_http(self.status)
        peer = self.peer
        self.peer = peer.of_grpc(status)
        super()._finish_accounting(now)
        self.peer = peer


def _head(block: bytes) -> ResponseHead:
    """Of an answer without a body."""
    head = ResponseHead()
    head.status = 200
    head.reason = b"OK"
    head.minor = 1
    head.keeps_alive = True
    head.upgrade = b""
    head.body = NO_BODY
    head.block = block
    head.length = len(block)
    return head
