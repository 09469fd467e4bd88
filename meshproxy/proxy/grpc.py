"""gRPC calls: an HttpStream that knows what their heads and trailers say.

Decides: how a call's end is counted, judged, retried and answered by ourselves; what gRPC-Web becomes for an upstream
that speaks gRPC. Leaves to others: the wire words (codec.grpc, codec.grpc_web), everything that gRPC shares with HTTP
(proxy.http_stream).

A connection serves its requests by plain HttpStreams until the first gRPC request comes; then it takes one of these,
which serves other requests as before. So a request that is no gRPC pays one attribute test, and without a body none.

Source: Envoy Grpc::Common, router filter (grpc-status, grpc-timeout), Utility::sendLocalReply, grpc_web filter; Istio
route.go (every route lets grpc-timeout set the timeout, the VirtualService's being the most), istio_stats (labels),
listener_builder.go (gRPC-Web is translated on ports of that protocol).
"""

from copy import copy
from time import monotonic

from meshproxy.codec import grpc, grpc_web
from meshproxy.codec.http1 import CHUNKED, NO_BODY, UNSAID, RequestHead, ResponseHead, find_field, without_field
from meshproxy.errors import RemoteProtocolError
from meshproxy.model.cluster import Protocol
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.proxy import local_reply
from meshproxy.proxy.http_stream import Downstream, HttpStream
from meshproxy.proxy.listener_runtime import ListenerRuntime, PeerContext
from meshproxy.proxy.local_reply import LocalReply

MAX_MESSAGE_BYTES = 4096
"""Of another answer's body, in grpc-message."""


class GrpcStream(HttpStream):
    knows_grpc = True

    __slots__ = (
        "_has_own_deadline",
        "_judged_as",
        "_received",
        "_sent",
        "_text",
        "_web_type",
        "grpc_status",
        "is_call",
    )

    def __init__(self, down: Downstream, listener: ListenerRuntime, peer: PeerContext) -> None:
        super().__init__(down, listener, peer)
        self.is_call = False
        """The request under way is gRPC, or was before it became so."""
        self._web_type = b""
        """The content type of its answer where it is translated from gRPC-Web; b"" where it is not."""
        self._text: grpc_web.TextDecoder | None = None
        self._received = grpc.MessageCounter()
        self._sent = grpc.MessageCounter()
        self.grpc_status: int | None = None
        self._judged_as: int | None = None
        """The HTTP status that a grpc-status in the head stands for."""
        self._has_own_deadline = False
        """timeout_at is the caller's, not the route's."""

    def start(self, head: RequestHead, now: float) -> None:
        kind = head.grpc
        self.is_call = kind == grpc.CONTENT_TYPE or grpc.is_grpc(kind)
        self.grpc_status = self._judged_as = None
        self._has_own_deadline = False
        self._web_type, self._text = b"", None
        if not self.is_call and kind and self.listener.listener.protocol is Protocol.GRPC_WEB:
            self.is_call = grpc_web.is_grpc_web(kind)
            if self.is_call:
                head = self._translated(head)
        if self.is_call:
            self._received.begin()
            self._sent.begin()
        super().start(head, now)
        if not self.is_call or not self.is_active:
            return
        timeout_s = grpc.timeout_in(head.lowered, head.received)
        if timeout_s and now + timeout_s < self.timeout_at:
            self.timeout_at = now + timeout_s
            self.down.deadline = min(self.down.deadline, self.timeout_at)
            self._has_own_deadline = self.route is not None and not self.route.timeout_s

    def _translated(self, head: RequestHead) -> RequestHead:
        """The request as gRPC; a copy, since an HTTP/2 connection gives equal requests the same head."""
        self._text = grpc_web.TextDecoder() if grpc_web.is_text(head.grpc) else None
        wants_text = grpc_web.is_text(find_field(head.block, b"accept") or b"")
        self._web_type = grpc_web.TEXT if wants_text else grpc_web.BINARY
        head = copy(head)
        # The length is that of the text, or of a body that HTTP/2 would compare with its frames.
        head.block = without_field(without_field(head.block, b"content-type"), b"content-length")
        head.block += b"\r\ncontent-type: application/grpc"
        if find_field(head.block, b"grpc-accept-encoding") is None:
            head.block += b"\r\ngrpc-accept-encoding: identity"
        head.te_trailers = True
        head.is_plain = False
        if head.body != NO_BODY:
            head.body = CHUNKED
        return head

    def on_request_body(self, data: bytes, is_complete: bool, trailers: bytes = b"") -> None:
        if self._text is not None:
            try:
                data = self._text.feed(data, is_complete)
            except RemoteProtocolError as error:
                self._refuse(error)
                return
        if self.is_call:
            self._received.feed(data)
        super().on_request_body(data, is_complete, trailers)

    def _refuse(self, error: RemoteProtocolError) -> None:
        self.state.counters.protocol_error(error.detail)
        self._drop_upstream()
        if not self.response_head_bytes:
            self.reply(LocalReply(400, ResponseFlag.NONE, error.detail, b"Bad gRPC-web request, invalid base64 data."))
            return
        self.details = error.detail
        self.down.abort()
        self._finish_accounting(monotonic())

    # ── the upstream's side ──

    def on_response(self, head: ResponseHead, body: bytes, is_complete: bool) -> None:
        status = grpc.status_in(head.block) if self.is_call else None
        self._judged_as = None
        if status is not None:
            self.grpc_status = status
            self._judged_as = grpc.to_http(status)
            if self._count_status(head):
                return
        if self._web_type:
            is_grpc = status is not None or (head.status == 200 and grpc.content_type(head.block.lower()) != b"")
            head = copy(head)
            head.block = without_field(without_field(head.block, b"content-type"), b"content-length")
            head.block += b"\r\ncontent-type: " + self._web_type
            if not is_grpc:
                # A gRPC-Web client reads the fields of such an answer, and not its body.
                head.block += _status_fields(grpc.from_http(head.status), body[:MAX_MESSAGE_BYTES])
                self._leave_upstream()
                body, is_complete = b"", True
            head.body = UNSAID if is_complete and not body else CHUNKED
        if body and self.is_call:
            self._sent.feed(body)
            if self._web_type is grpc_web.TEXT:
                body = grpc_web.encoded(body)
        super().on_response(head, body, is_complete)

    def _count_status(self, head: ResponseHead) -> bool:
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
        if body and self.is_call:
            self._sent.feed(body)
            if not is_complete:  # else they are counted with the call
                self._count_messages()
        if self._web_type:
            if trailers:
                body += grpc_web.trailer_frame(trailers)
                trailers = b""
            if body and self._web_type is grpc_web.TEXT:
                body = grpc_web.encoded(body)
        super().on_response_body(body, is_complete, trailers)

    def _count_messages(self) -> None:
        """Those that were not counted yet: a call may go on for days."""
        received, sent, endpoint, cluster = self._received, self._sent, self.endpoint, self.cluster
        if endpoint is None or cluster is None or not (received.count or sent.count):
            return
        key = -self.peer.number  # keys of requests and connections are positive
        series = endpoint.series.get(key)
        if series is None:
            series = endpoint.series[key] = self.listener.message_series(self.peer, endpoint, cluster.cluster)
        series.received += received.count
        series.sent += sent.count
        received.count = sent.count = 0

    def _leave_upstream(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.release(False, monotonic())

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
        self.response_bytes = 0
        block = b"\r\ncontent-type: " + (self._web_type or grpc.CONTENT_TYPE)
        block += _status_fields(self.grpc_status, reply.body)
        block += b"\r\nserver: meshproxy" + reply.extra + without_field(extra, b"content-type")
        if not self._web_type:  # which keeps the HTTP status
            self.status = 200
        self.down.send_response(_head(self.status, block), b"", b"", True)

    def _finish_accounting(self, now: float) -> None:
        if not self.is_call or not self.is_active:
            super()._finish_accounting(now)
            return
        status = self.grpc_status
        if status is None and self.status:
            status = grpc.from_http(self.status)
        self._count_messages()
        peer = self.peer
        self.peer = peer.of_grpc(status)
        super()._finish_accounting(now)
        self.peer = peer


def _status_fields(status: int, message: bytes) -> bytes:
    lines = b"\r\ngrpc-status: %d" % status
    return lines + b"\r\ngrpc-message: " + grpc.encoded_message(message) if message else lines


def _head(status: int, block: bytes) -> ResponseHead:
    """Of an answer without a body."""
    head = ResponseHead()
    head.status = status
    head.reason = local_reply.reason_phrase(status)
    head.minor = 1
    head.keeps_alive = True
    head.upgrade = b""
    head.body = UNSAID
    head.block = block
    head.length = len(block)
    return head
