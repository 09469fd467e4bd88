"""TLS between a TCP transport and the protocol above it, driven through memory BIOs.

Decides: when the handshake is done, how records become calls, what an end of stream means. Leaves to others: versions
and roots (tls.context), whose certificate it is (the `verify` that is passed in).

One object is the protocol of the transport below and the transport of the protocol above. Measured, a 200-byte message
in and out over TLS 1.3 costs 8 µs of CPU here, 27 µs with uvloop's own TLS, 5 µs in plaintext. OpenSSL is asked for
more only when there is more: each exception that says "want read" costs 1.6 µs.

The protocol above sees a connection only once it is authenticated: connection_made comes after handshake and verify.
A stream that ends without close_notify was cut, not ended: connection_lost with ConnectionResetError.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from meshproxy.tls.client_hello import ClientHello, ClientHelloReader

HANDSHAKE_TIMEOUT_S = 15.0
MAX_HANDSHAKE_BYTES = 32 * 1024
"""Of one peer. A hello and a chain of four RSA-4096 certificates come to 8 KiB; a chain of a hundred is refused before
anything is verified."""
_RECORD_BYTES = 16 * 1024
"""What one read of OpenSSL gives at most. Asking for more only allocates more: 64 KiB costs 0.7 µs a read."""
_SLICE_BYTES = 3 * _RECORD_BYTES
"""A memory BIO keeps the size of its largest content for the connection's life: bulk goes through in slices. In two
runs of 1 MiB messages 48 KiB gave the server 9-36 % more MiB per CPU second than 32 or 64 KiB."""
_MAX_CONTROL_BYTES = 64 * 1024
"""Unsent answers to the peer's key updates; a peer that asks and does not read is cut."""
_NO_LINGER = struct.pack("ii", 1, 0)

_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST"})
"""OpenSSL's reasons when the first bytes are no TLS record: reset, for there is nobody who would read an alert."""

Verify = Callable[[ssl.SSLObject], str | None]
"""Says why this peer may not go on; None when it may. Runs once, after the handshake, before a byte is delivered."""


class HandshakeError(ssl.SSLError):
    """detail: the word to count, e.g. `tls.certificate_verify_failed`; str() is one sentence for the log."""

    reason: str
    detail: str

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(1, sentence)
        self.reason = reason
        self.detail = f"tls.{reason.lower()}"[:60]
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


SESSION_RENEWAL_S = 1800.0
"""A quarter of the lifetime of OpenSSL's tickets."""
SESSION_GAP_S = 60.0
"""Between two looks for a session where the last look found none, or the peer did not take it."""


class SessionSlot:
    """The last session of one endpoint, so that the next connection need not prove everything again.

    One slot per (endpoint, identity): give it to every connection there. A session of an older context (before a
    rotation) is not used.

    Reading SSLObject.session leaks a copy of it, 6 KiB (seen in CPython 3.11.2 and 3.11.7): a slot therefore looks
    seldom, and not at every connection.
    """

    __slots__ = ("_context", "_look_at", "_session")

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None
        self._session: ssl.SSLSession | None = None
        self._look_at = 0.0
        """Not before this (monotonic seconds), unless the context is another."""

    def session_for(self, context: ssl.SSLContext) -> ssl.SSLSession | None:
        return self._session if self._context is context else None

    def look(self, tls: ssl.SSLObject) -> None:
        """Keep this connection's session, if it is time for another one."""
        context = tls.context
        now = monotonic()
        if self._context is context and now < self._look_at:
            return
        session = tls.session
        self._context = context
        self._session = session if session is not None and session.has_ticket else None
        self._look_at = now + (SESSION_RENEWAL_S if self._session is not None else SESSION_GAP_S)

    def clear(self) -> None:
        """The session was refused, or the handshake with it failed."""
        self._session = None
        self._look_at = min(self._look_at, monotonic() + SESSION_GAP_S)


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """Protocol of the TCP transport below, transport of the protocol above.

    On a connection whose first bytes were read already: tls.connection_made(transport), transport.set_protocol(tls),
    tls.data_received(first).
    """

    __slots__ = (
        "_app",
        "_app_data_received",
        "_app_is_made",
        "_control_bytes",
        "_cut",
        "_handshake_bytes",
        "_handshake_timeout_s",
        "_has_eof",
        "_hello",
        "_incoming",
        "_is_closing",
        "_is_handshaking",
        "_is_server",
        "_lower",
        "_lower_write",
        "_obj",
        "_offered_session",
        "_on_done",
        "_outgoing",
        "_read",
        "_requested_server_name",
        "_slot",
        "_timer",
        "_verify",
        "_wrote_eof",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        app: asyncio.BaseProtocol,
        *,
        is_server: bool,
        server_name: str | None = None,
        verify: Verify | None = None,
        slot: SessionSlot | None = None,
        on_done: Callable[["HandshakeError | None"], None] | None = None,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        keeps_server_name: bool = False,
    ) -> None:
        """on_done: called once, with None after app.connection_made, or with the reason why there will be none.
        keeps_server_name: a server's get_extra_info("requested_server_name") is what the client asked for.

        HandshakeError where server_name cannot be one (a NUL, a leading dot, over 255 bytes).
        """
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        session = slot.session_for(context) if slot is not None else None
        self._offered_session = session is not None
        try:
            self._obj = context.wrap_bio(
                self._incoming,
                self._outgoing,
                server_side=is_server,
                server_hostname=server_name or None,
                session=session,
            )
        except (TypeError, ValueError, ssl.SSLError):
            raise HandshakeError("BAD_SERVER_NAME", f"{server_name!r} cannot be a TLS server name") from None
        self._read: Callable[[int], bytes] = self._obj.read
        self._is_server = is_server
        self._verify = verify
        self._slot = slot
        self._on_done = on_done
        self._handshake_timeout_s = handshake_timeout_s
        self._app: Any = app
        self._app_data_received: Callable[[bytes], None] = _nobody
        self._app_is_made = False
        self._lower: Any = None
        self._lower_write: Callable[[bytes], None] = _nobody
        self._timer: asyncio.TimerHandle | None = None
        self._is_handshaking = True
        # Read by ourselves: a name that is not ASCII makes Python's sni_callback end the handshake with a traceback.
        self._hello = ClientHelloReader() if keeps_server_name else None
        self._requested_server_name: str | None = None
        self._handshake_bytes = 0
        self._control_bytes = 0
        self._is_closing = False
        self._wrote_eof = False
        self._has_eof = False
        self._cut: Exception | None = None

    # ── protocol of the transport below ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._lower = transport
        self._lower_write = self._lower.write
        # uvloop's default low-water mark is 16 bytes. The app may set others once it is there.
        self._lower.set_write_buffer_limits(64 * 1024, 16 * 1024)
        self._timer = asyncio.get_running_loop().call_later(self._handshake_timeout_s, self._on_timeout)
        self._handshake()

    def data_received(self, data: bytes) -> None:
        incoming = self._incoming
        if self._is_handshaking:
            room = MAX_HANDSHAKE_BYTES - self._handshake_bytes
            self._handshake_bytes += len(data)
            if self._is_closing:
                return
            if self._hello is not None:
                self._hello.feed(data)
            incoming.write(data[:room] if len(data) > room else data)
            self._handshake()
            if len(data) > room:  # what a client has to say may follow its last flight at once, and be long
                if self._is_handshaking:
                    self._refuse(HandshakeError("HANDSHAKE_TOO_LARGE", "the peer's handshake exceeds 32 KiB"))
                elif not self._is_closing:
                    self.data_received(data[room:])
            return
        if len(data) > _SLICE_BYTES:
            self._bulk_received(data)
            return
        incoming.write(data)
        try:
            clear = self._read(_RECORD_BYTES)
        except ssl.SSLWantReadError:  # part of a record, or only a ticket or a key update
            self._after_control()
            return
        except ssl.SSLError as error:
            self._fail(error)
            return
        if incoming.pending or self._outgoing.pending or not clear:
            self._read_on(clear)
        else:
            self._app_data_received(clear)

    def eof_received(self) -> bool:
        if self._has_eof:
            # close_notify came before: what the app still has to say may go out, unless it has said it.
            return not (self._is_closing or self._wrote_eof)
        if not self._is_handshaking and not self._is_closing:
            self._cut = ConnectionResetError("closed without close_notify")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closing = True
        if self._is_handshaking:
            self._finish(HandshakeError("CONNECTION_CLOSED", _sentence(exc, "the peer closed during the handshake")))
        app, self._app = self._app, None
        self._app_data_received = self._lower_write = _nobody
        if self._app_is_made:
            self._app_is_made = False
            self._keep_session()
            app.connection_lost(self._cut or exc)

    def pause_writing(self) -> None:
        if self._app_is_made:
            self._app.pause_writing()

    def resume_writing(self) -> None:
        if self._app_is_made:
            self._app.resume_writing()

    # ── handshake ──

    def _handshake(self) -> None:
        try:
            self._obj.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._refuse(_handshake_error(error))
            return
        self._flush()
        try:
            self._obj.getpeercert()
        except ValueError:  # a SAN that is not UTF-8; nobody after us shall stumble over it
            self._refuse(
                HandshakeError("UNREADABLE_CERTIFICATE", "the peer's certificate holds names that are no text")
            )
            return
        refusal = self._verify(self._obj) if self._verify is not None else None
        if refusal is not None:
            self._refuse(HandshakeError("PEER_IDENTITY_REFUSED", refusal))
            return
        # What came along with the last flight is read before the app may end its own side: OpenSSL takes data that is
        # there at our close_notify for an error.
        early: list[bytes] = []
        is_ended = False
        try:
            is_ended = self._drain(early)
        except ssl.SSLError as error:
            self._refuse(_handshake_error(error))
            return
        self._finish(None)
        if early and not self._is_closing:
            self._app_data_received(b"".join(early))
        if is_ended:
            self._on_close_notify()

    def _finish(self, error: HandshakeError | None) -> None:
        """The handshake is over, this way or that."""
        self._is_handshaking = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        on_done, self._on_done = self._on_done, None
        self._verify = None
        if self._hello is not None:
            hello = self._hello.feed(b"")
            self._requested_server_name = hello.server_name if isinstance(hello, ClientHello) else None
            self._hello = None
        if error is None:
            if self._offered_session and not self._obj.session_reused and self._slot is not None:
                self._slot.clear()
            self._app_data_received = self._app.data_received
            self._app_is_made = True
            self._app.connection_made(self)
        elif self._slot is not None:
            self._slot.clear()
        if on_done is not None:
            on_done(error)

    def _refuse(self, error: HandshakeError) -> None:
        lower = self._lower
        self._is_closing = True
        if error.reason in _NOT_TLS and self._is_server:
            sock = lower.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            lower.abort()
        else:
            self._flush()  # the alert
            lower.close()
        self._finish(error)

    def _on_timeout(self) -> None:
        self._timer = None
        self._is_closing = True
        self._lower.abort()
        self._finish(HandshakeError("HANDSHAKE_TIMEOUT", f"no handshake within {self._handshake_timeout_s:g} s"))

    # ── records ──

    def _read_on(self, clear: bytes) -> None:
        """The slower rest of data_received: several records, an end, or something to answer by ourselves."""
        parts = [clear] if clear else []
        is_ended = not clear
        if clear:
            try:
                is_ended = self._drain(parts)
            except ssl.SSLError as error:
                self._fail(error)
                return
        self._after_control()
        self._deliver(parts, is_ended)

    def _bulk_received(self, data: bytes) -> None:
        view = memoryview(data)
        parts: list[bytes] = []
        is_ended = False
        try:
            for start in range(0, len(view), _SLICE_BYTES):
                self._incoming.write(view[start : start + _SLICE_BYTES])
                is_ended = self._drain(parts)
        except ssl.SSLError as error:
            self._fail(error)
            return
        self._after_control()
        self._deliver(parts, is_ended)

    def _drain(self, parts: list[bytes]) -> bool:
        """Read what whole records there are; True at close_notify. SSLError when the peer broke TLS."""
        incoming = self._incoming
        read = self._read
        try:
            while incoming.pending:
                clear = read(_RECORD_BYTES)
                if not clear:
                    return True
                parts.append(clear)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            return True
        return False

    def _deliver(self, parts: list[bytes], is_ended: bool) -> None:
        if parts and not self._is_closing:
            self._app_data_received(parts[0] if len(parts) == 1 else b"".join(parts))
        if is_ended:
            self._on_close_notify()

    def _on_close_notify(self) -> None:
        if self._has_eof or self._is_closing:
            return
        self._has_eof = True
        if not self._app.eof_received():
            self.close()

    def _after_control(self) -> None:
        """A ticket, a key update: keep the one, answer the other."""
        self._keep_session()
        if not self._outgoing.pending:
            return
        lower = self._lower
        self._control_bytes = self._control_bytes + self._outgoing.pending if lower.get_write_buffer_size() else 0
        if self._control_bytes > _MAX_CONTROL_BYTES:
            self._cut = ConnectionAbortedError("tls.control_flood")
            self.abort()
            return
        self._flush()

    def _keep_session(self) -> None:
        if self._slot is not None:
            self._slot.look(self._obj)

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self._lower_write(data)

    def _fail(self, error: ssl.SSLError) -> None:
        """The peer broke TLS, or said goodbye with an alert: nothing more can be read or written."""
        if isinstance(error, ssl.SSLZeroReturnError):
            self._on_close_notify()
            return
        self._cut = ConnectionAbortedError(_handshake_error(error).detail)
        self._is_closing = True
        self._flush()  # the alert
        self._lower.close()

    # ── transport of the protocol above ──

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypts now; the watermarks count ciphertext. After close or write_eof: dropped."""
        if not data or self._is_closing or self._wrote_eof:
            return
        try:
            if len(data) > _SLICE_BYTES:
                view = memoryview(data)
                for start in range(0, len(view), _SLICE_BYTES):
                    self._obj.write(view[start : start + _SLICE_BYTES])
                    self._lower_write(self._outgoing.read())
            else:
                self._obj.write(data)
                self._lower_write(self._outgoing.read())
        except ssl.SSLError as error:
            self._fail(error)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        """Ends our half with close_notify; the peer's half stays open until it does the same."""
        if not self._is_closing and not self._wrote_eof:
            self._wrote_eof = True
            self._send_close_notify()

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        """close_notify, what was written, then the TCP connection. The peer's close_notify is not waited for."""
        if self._is_closing:
            return
        self._is_closing = True
        if self._is_handshaking:
            self._lower.abort()
            return
        if not self._wrote_eof:
            self._send_close_notify()
        self._lower.close()

    def abort(self) -> None:
        self._is_closing = True
        if self._lower is not None:
            self._lower.abort()

    def is_closing(self) -> bool:
        return self._is_closing or bool(self._lower.is_closing())

    def _send_close_notify(self) -> None:
        # unwrap sends close_notify, then finds that the peer's is not there yet.
        with contextlib.suppress(ssl.SSLError):
            self._obj.unwrap()
        self._flush()

    def pause_reading(self) -> None:
        self._lower.pause_reading()

    def resume_reading(self) -> None:
        self._lower.resume_reading()

    def is_reading(self) -> bool:
        return bool(self._lower.is_reading())

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._lower.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return int(self._lower.get_write_buffer_size())

    def get_write_buffer_limits(self) -> tuple[int, int]:
        low, high = self._lower.get_write_buffer_limits()
        return low, high

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another app from now on; as in asyncio, its connection_made is the caller's business."""
        self._app = protocol
        self._app_data_received = self._app.data_received

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._app
        return protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """ssl_object, sslcontext, peercert, cipher as asyncio has them; requested_server_name (None where it was not
        kept, or not asked for); others are the TCP transport's."""
        if name == "ssl_object":
            return self._obj
        if name == "sslcontext":
            return self._obj.context
        if name == "peercert":
            return self._obj.getpeercert()
        if name == "cipher":
            return self._obj.cipher()
        if name == "requested_server_name":
            return self._requested_server_name
        return self._lower.get_extra_info(name, default)


def _nobody(data: bytes) -> None:
    """Where bytes go when there is nobody to take them."""


def _sentence(error: Exception | None, otherwise: str) -> str:
    return str(error) if error is not None and str(error) else otherwise


def _handshake_error(error: ssl.SSLError) -> HandshakeError:
    reason = error.reason or "HANDSHAKE_FAILED"
    text = reason.replace("_", " ").lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"certificate verify failed: {error.verify_message}"
    return HandshakeError(reason, text)


# ── as asyncio's own calls with ssl=, on these transports ──

Below = Callable[[TlsTransport], asyncio.Protocol]
"""Makes what the TCP transport sees first: it has its say before TLS, then calls connection_made of TLS."""


async def accept_tls(
    factory: Callable[[], asyncio.Protocol],
    connection: socket.socket,
    context: ssl.SSLContext,
    *,
    verify: Verify | None = None,
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    keeps_server_name: bool = False,
    below: Below | None = None,
) -> tuple[TlsTransport, asyncio.Protocol]:
    """Serve TLS on an accepted socket, as loop.connect_accepted_socket(…, ssl=context); HandshakeError or OSError."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    app = factory()
    tls = TlsTransport(
        context,
        app,
        is_server=True,
        verify=verify,
        on_done=lambda error: _settle(done, error),
        handshake_timeout_s=handshake_timeout_s,
        keeps_server_name=keeps_server_name,
    )
    await loop.connect_accepted_socket(lambda: below(tls) if below is not None else tls, connection)
    return await _until(done, tls), app


async def connect_tls(
    factory: Callable[[], asyncio.Protocol],
    host: str,
    port: int,
    context: ssl.SSLContext,
    *,
    server_name: str | None = None,
    verify: Verify | None = None,
    slot: SessionSlot | None = None,
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    below: Below | None = None,
) -> tuple[TlsTransport, asyncio.Protocol]:
    """Connect and finish the handshake, as loop.create_connection(…, ssl=context); HandshakeError or OSError.

    host: an absolute path is a unix socket, port is unused then. Cancelling it aborts the connection.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    app = factory()
    tls = TlsTransport(
        context,
        app,
        is_server=False,
        server_name=server_name,
        verify=verify,
        slot=slot,
        on_done=lambda error: _settle(done, error),
        handshake_timeout_s=handshake_timeout_s,
    )
    lowest = below(tls) if below is not None else tls
    if host.startswith("/"):
        await loop.create_unix_connection(lambda: lowest, host)
    else:
        await loop.create_connection(lambda: lowest, host, port)
    return await _until(done, tls), app


def _settle(done: asyncio.Future[None], error: HandshakeError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


async def _until(done: asyncio.Future[None], tls: TlsTransport) -> TlsTransport:
    try:
        await done
    except asyncio.CancelledError:
        tls.abort()
        raise
    return tls
