"""HTTP/3 as RFC 9114 asks of a server: each test breaks one rule with raw bytes on raw QUIC streams.

The list is that of h3spec and of the mapping of HTTP/2's downgrade attacks (RFC 9114 §4.2, §4.3, §10.3).
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pylsqpack
import pytest
from aioquic.buffer import Buffer
from aioquic.quic.events import QuicEvent, StopSendingReceived, StreamDataReceived, StreamReset
from aioquic.tls import Epoch

from meshproxy.codec.http3 import frame, number
from meshproxy.model.listener import ServerTls, ServerTlsMode
from tests.support.certificates import Authority
from tests.support.http3_client import Headers, Http3Client, get
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin

AUTHORITY = Authority()
DATA, HEADERS, CANCEL_PUSH, SETTINGS, PUSH_PROMISE, GOAWAY, MAX_PUSH_ID = 0, 1, 3, 4, 5, 7, 13
STREAM_CREATION_ERROR, CLOSED_CRITICAL_STREAM, FRAME_UNEXPECTED, FRAME_ERROR = 0x103, 0x104, 0x105, 0x106
EXCESSIVE_LOAD, ID_ERROR, SETTINGS_ERROR, MISSING_SETTINGS = 0x107, 0x108, 0x109, 0x10A
REQUEST_INCOMPLETE, MESSAGE_ERROR = 0x10D, 0x10E
DECOMPRESSION_FAILED, ENCODER_STREAM_ERROR, DECODER_STREAM_ERROR = 0x200, 0x201, 0x202


class RawClient(Http3Client):
    """QUIC without HTTP/3: what is on each stream is the test's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for stream_id in list(self._quic._streams):
            del self._quic._streams[stream_id]  # what the HTTP/3 layer would have sent
        self._quic._streams_queue.clear()
        self._quic._streams_blocked_uni.clear()
        self._quic._local_next_stream_id_uni = 2
        self.streams: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.stops: dict[int, int] = {}

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self.streams[event.stream_id] = self.streams.get(event.stream_id, b"") + event.data
            if event.end_stream:
                self.ended.add(event.stream_id)
        elif isinstance(event, StreamReset):
            self.resets[event.stream_id] = event.error_code
        elif isinstance(event, StopSendingReceived):
            self.stops[event.stream_id] = event.error_code
        else:
            super().quic_event_received(event)
        self.changed.set()

    def put(self, data: bytes, ends: bool = False, stream: int | None = None, is_uni: bool = False) -> int:
        if stream is None:
            stream = self._quic.get_next_available_stream_id(is_unidirectional=is_uni)
        self._quic.send_stream_data(stream, data, ends)
        self.transmit()
        return stream

    def control(self, data: bytes = frame(SETTINGS, b""), ends: bool = False) -> int:
        return self.put(b"\x00" + data, ends, is_uni=True)

    async def closed_with(self, code: int) -> None:
        ended = await self.refusal()
        assert ended.error_code == code, ended

    async def reset_with(self, stream: int, code: int) -> None:
        await self.until(lambda: self.terminated or stream in self.resets)
        assert self.terminated is None, self.terminated
        assert self.resets[stream] == code


def block(headers: Headers) -> bytes:
    section: bytes = pylsqpack.Encoder().encode(0, headers)[1]
    return section


def head(headers: Headers) -> bytes:
    return frame(HEADERS, block(headers))


class Proxy:
    def __init__(self, worker: LiveWorker, client: RawClient, origin: Origin) -> None:
        self.worker = worker
        self.client = client
        self.origin = origin

    @property
    def connection(self) -> Any:
        (listener,) = self.worker.worker.listeners.values()
        return next(iter(listener.runtime.connections))

    async def still_serves(self) -> None:
        stream = self.client.put(head(get("/after")), True)
        await self.client.until(lambda: self.client.terminated or stream in self.client.ended)
        assert self.client.terminated is None
        assert self.client.streams[stream].endswith(b"ok")


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    directory = AUTHORITY.leaf(dns_names=["a.example"]).write(tmp_path)
    tls = ServerTls(
        mode=ServerTlsMode.SIMPLE,
        certificate_file=str(directory / "cert-chain.pem"),
        key_file=str(directory / "key.pem"),
    )
    async with LiveWorker() as worker, Origin() as origin:
        port = worker.listen_quic(worker.cluster([("127.0.0.1", origin.port)]), tls=tls)
        async with RawClient.to(port, AUTHORITY.pem) as client:
            await client.wait_connected()
            yield Proxy(worker, client, origin)


async def test_the_server_sends_settings_first_and_no_dynamic_table(proxy: Proxy) -> None:
    await proxy.client.until(lambda: proxy.client.streams)
    settings = number(1) + number(0) + number(7) + number(0) + number(6) + number(61440) + number(8) + number(1)
    assert list(proxy.client.streams.values()) == [b"\x00" + frame(SETTINGS, settings)]


# ── frames on request streams ──

UNEXPECTED = {
    "DATA before HEADERS": frame(DATA, b"x"),
    "HEADERS after trailers": head(get("/")) + head([(b"a", b"b")]) + head([(b"a", b"b")]),
    "DATA after trailers": head(get("/")) + head([(b"a", b"b")]) + frame(DATA, b"x"),
    "SETTINGS": frame(SETTINGS, b""),
    "CANCEL_PUSH": frame(CANCEL_PUSH, b"\x00"),
    "PUSH_PROMISE": frame(PUSH_PROMISE, b"\x00"),
    "GOAWAY": frame(GOAWAY, b"\x00"),
    "MAX_PUSH_ID": frame(MAX_PUSH_ID, b"\x00"),
    "PRIORITY of HTTP/2": frame(0x2, bytes(5)),
    "PING of HTTP/2": frame(0x6, bytes(8)),
    "WINDOW_UPDATE of HTTP/2": frame(0x8, bytes(4)),
    "CONTINUATION of HTTP/2": frame(0x9, b""),
}


@pytest.mark.parametrize("name", UNEXPECTED)
async def test_a_frame_out_of_place_ends_the_connection(proxy: Proxy, name: str) -> None:
    proxy.client.put(UNEXPECTED[name])
    await proxy.client.closed_with(FRAME_UNEXPECTED)


@pytest.mark.parametrize("cut", [1, 2, 10])
async def test_a_frame_cut_by_the_end_of_its_stream_ends_the_connection(proxy: Proxy, cut: int) -> None:
    proxy.client.put(head(get("/"))[:cut], True)
    await proxy.client.closed_with(FRAME_ERROR)


async def test_data_cut_by_the_end_of_its_stream_never_looks_whole_upstream(proxy: Proxy) -> None:
    proxy.client.put(head(get("/", "POST")) + frame(DATA, b"whole")[:-1], True)
    await proxy.client.closed_with(FRAME_ERROR)
    assert not proxy.origin.requests


async def test_unknown_frames_are_passed_over_wherever_they_stand(proxy: Proxy) -> None:
    grease = frame(0x21 + 0x1F * 7, b"z" * 100_000)
    data = grease + head(get("/", "POST")) + grease + frame(DATA, b"a") + grease + frame(DATA, b"b") + grease
    stream = proxy.client.put(data, True)
    await proxy.client.until(lambda: stream in proxy.client.ended)
    assert proxy.origin.requests[0].body == b"ab"


async def test_a_request_may_come_byte_by_byte(proxy: Proxy) -> None:
    data = head(get("/", "POST")) + frame(DATA, b"body") + head([(b"x-sum", b"1")])
    stream = proxy.client.put(data[:1])
    for at in range(1, len(data)):
        proxy.client.put(data[at : at + 1], at == len(data) - 1, stream)
    await proxy.client.until(lambda: stream in proxy.client.ended)
    assert (proxy.origin.requests[0].body, proxy.origin.requests[0].trailers) == (b"body", [(b"x-sum", b"1")])


async def test_a_stream_without_a_request_is_reset(proxy: Proxy) -> None:
    await proxy.client.reset_with(proxy.client.put(b"", True), REQUEST_INCOMPLETE)
    await proxy.still_serves()


# ── malformed requests: the stream ends, the connection goes on, the upstream sees nothing ──

MALFORMED: dict[str, Headers] = {
    "duplicate :method": [(b":method", b"GET"), *get("/")],
    "no :path": [field for field in get("/") if field[0] != b":path"],
    "no :scheme": [field for field in get("/") if field[0] != b":scheme"],
    "no :authority": [field for field in get("/") if field[0] != b":authority"],
    "empty :path": get(""),
    "path without slash": get("a"),
    "path with fragment": get("/a#b"),
    "path with space": get("/a b"),
    ":status in a request": [(b":status", b"200"), *get("/")],
    "unknown pseudo field": [(b":what", b"x"), *get("/")],
    "pseudo field after others": [*get("/")[:3], (b"a", b"b"), get("/")[3]],
    "upper case name": [*get("/"), (b"X-Thing", b"1")],
    "space in name": [*get("/"), (b"x thing", b"1")],
    "colon in name": [*get("/"), (b"x:thing", b"1")],
    "line break in value": [*get("/"), (b"x", b"1\r\nhost: evil")],
    "bare line feed in value": [*get("/"), (b"x", b"1\nhost: evil")],
    "NUL in value": [*get("/"), (b"x", b"1\x00")],
    "value begins with space": [*get("/"), (b"x", b" 1")],
    "line break in path": get("/ HTTP/1.1\r\nhost: evil\r\n\r\nGET /"),
    "line break in authority": get("/", authority="a\r\nx: y"),
    "line break in method": get("/", "GET / HTTP/1.1\r\nx: y\r\n\r\nGET"),
    "transfer-encoding": [*get("/", "POST"), (b"transfer-encoding", b"chunked")],
    "connection": [*get("/"), (b"connection", b"close")],
    "keep-alive": [*get("/"), (b"keep-alive", b"1")],
    "upgrade": [*get("/"), (b"upgrade", b"websocket")],
    "te other than trailers": [*get("/"), (b"te", b"gzip")],
    "two lengths": [*get("/", "POST"), (b"content-length", b"1"), (b"content-length", b"2")],
    "a length that is none": [*get("/", "POST"), (b"content-length", b"+1")],
    "host differs": [*get("/"), (b"host", b"b.example")],
    "two hosts": [*get("/"), (b"host", b"a.example"), (b"host", b"a.example")],
    "CONNECT with path": [(b":method", b"CONNECT"), *get("/")[1:]],
    ":protocol without CONNECT": [*get("/")[:3], (b":protocol", b"websocket"), get("/")[3]],
    "userinfo in authority": get("/", authority="user@a.example"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_request_is_reset_and_nothing_reaches_the_upstream(proxy: Proxy, name: str) -> None:
    stream = proxy.client.put(head(MALFORMED[name]))
    await proxy.client.reset_with(stream, MESSAGE_ERROR)
    assert proxy.origin.connections == 0
    await proxy.still_serves()


LENGTHS = {
    "more than said": frame(DATA, b"12345"),
    "less than said": frame(DATA, b"12"),
    "none at all": b"",
    "less, and trailers": frame(DATA, b"12") + head([(b"a", b"b")]),
}


@pytest.mark.parametrize("name", LENGTHS)
async def test_a_body_of_another_length_than_said_is_reset(proxy: Proxy, name: str) -> None:
    opening = head([*get("/", "POST"), (b"content-length", b"4")])
    stream = proxy.client.put(opening + LENGTHS[name], True)
    await proxy.client.reset_with(stream, MESSAGE_ERROR)
    assert not proxy.origin.requests
    await proxy.still_serves()


async def test_pseudo_fields_in_trailers_are_malformed(proxy: Proxy) -> None:
    stream = proxy.client.put(head(get("/", "POST")) + head([(b":path", b"/")]), True)
    await proxy.client.reset_with(stream, MESSAGE_ERROR)
    assert not proxy.origin.requests


# ── limits ──


async def test_a_hundred_and_one_fields_are_too_many(proxy: Proxy) -> None:
    stream = proxy.client.put(head([*get("/"), *((b"x", b"%d" % number) for number in range(101))]), True)
    await proxy.client.until(lambda: stream in proxy.client.ended)
    assert proxy.origin.connections == 0
    assert block([(b":status", b"431")])[2:] in proxy.client.streams[stream]
    await proxy.still_serves()


async def test_a_section_that_is_too_long_once_decoded_is_answered(proxy: Proxy) -> None:
    stream = proxy.client.put(head([*get("/"), (b"x", b"0" * 61_400)]), True)
    await proxy.client.until(lambda: stream in proxy.client.ended)
    assert block([(b":status", b"431")])[2:] in proxy.client.streams[stream]
    await proxy.still_serves()


async def test_a_section_that_is_too_long_as_it_comes_ends_the_connection_before_it_is_there(proxy: Proxy) -> None:
    proxy.client.put(number(HEADERS) + number(1 << 40) + b"z" * 100)
    await proxy.client.closed_with(EXCESSIVE_LOAD)


async def test_a_section_of_thousands_of_lines_ends_the_connection(proxy: Proxy) -> None:
    proxy.client.put(frame(HEADERS, block(get("/")) + b"\xd1" * 50_000), True)
    await proxy.client.closed_with(EXCESSIVE_LOAD)
    assert proxy.origin.connections == 0


async def test_more_streams_than_allowed_end_the_connection(proxy: Proxy) -> None:
    proxy.client._quic._remote_max_streams_bidi = 1 << 20
    proxy.client.put(head(get("/")), True, stream=4 * 400)
    await proxy.client.closed_with(0x4)  # STREAM_LIMIT_ERROR


async def test_more_data_than_allowed_ends_the_connection(proxy: Proxy) -> None:
    quic = proxy.client._quic
    quic._remote_max_data = quic._remote_max_stream_data_bidi_remote = 1 << 30
    stream = proxy.client.put(number(HEADERS) + number(50_000))
    quic._streams[stream].max_stream_data_remote = 1 << 30
    proxy.client.put(b"z" * 49_000, stream=stream)  # waits for the rest of its frame: nothing of it is taken
    quic._streams[stream].sender.highest_offset += 1 << 20
    quic._streams[stream].sender._buffer_start = quic._streams[stream].sender.highest_offset
    quic._streams[stream].sender._buffer_stop = quic._streams[stream].sender.highest_offset
    quic._streams[stream].sender._buffer.clear()
    proxy.client.put(b"z", stream=stream)
    await proxy.client.closed_with(0x3)  # FLOW_CONTROL_ERROR


async def test_resetting_requests_as_fast_as_they_are_made_ends_the_connection(proxy: Proxy) -> None:
    client = proxy.client
    for _ in range(400):
        if client.terminated:
            break
        stream = client.put(head(get("/", "POST")))
        client._quic.reset_stream(stream, 0x10C)
        client.transmit()
        if stream % 200 == 0:
            with contextlib.suppress(ConnectionError):
                await client.ping()
    await client.closed_with(EXCESSIVE_LOAD)


# ── unidirectional streams ──

CONTROL = {
    "no SETTINGS first": (frame(GOAWAY, b"\x00"), MISSING_SETTINGS),
    "unknown frame first": (frame(0x21, b""), MISSING_SETTINGS),
    "SETTINGS twice": (frame(SETTINGS, b"") * 2, FRAME_UNEXPECTED),
    "DATA": (frame(SETTINGS, b"") + frame(DATA, b""), FRAME_UNEXPECTED),
    "HEADERS": (frame(SETTINGS, b"") + frame(HEADERS, b""), FRAME_UNEXPECTED),
    "PUSH_PROMISE": (frame(SETTINGS, b"") + frame(PUSH_PROMISE, b""), FRAME_UNEXPECTED),
    "frame of HTTP/2": (frame(SETTINGS, b"") + frame(0x6, b""), FRAME_UNEXPECTED),
    "setting of HTTP/2": (frame(SETTINGS, b"\x03\x01"), SETTINGS_ERROR),
    "setting twice": (frame(SETTINGS, b"\x06\x01\x06\x01"), SETTINGS_ERROR),
    "setting cut": (frame(SETTINGS, b"\x06"), FRAME_ERROR),
    "huge SETTINGS": (number(SETTINGS) + number(1 << 20), EXCESSIVE_LOAD),
    "MAX_PUSH_ID reduced": (
        frame(SETTINGS, b"") + frame(MAX_PUSH_ID, b"\x05") + frame(MAX_PUSH_ID, b"\x04"),
        ID_ERROR,
    ),
    "GOAWAY of no number": (frame(SETTINGS, b"") + frame(GOAWAY, b""), FRAME_ERROR),
    "CANCEL_PUSH of nothing": (frame(SETTINGS, b"") + frame(CANCEL_PUSH, b"\x00"), ID_ERROR),
}


@pytest.mark.parametrize("name", CONTROL)
async def test_the_control_stream_keeps_to_its_rules(proxy: Proxy, name: str) -> None:
    data, code = CONTROL[name]
    proxy.client.control(data)
    await proxy.client.closed_with(code)


async def test_a_control_stream_may_say_what_is_not_known(proxy: Proxy) -> None:
    grease = frame(0x21 + 0x1F * 3, b"z" * 5000)
    proxy.client.control(
        frame(SETTINGS, number(0x21 + 0x1F) + number(7)) + grease + frame(MAX_PUSH_ID, b"\x05") + grease
    )
    await proxy.still_serves()


async def test_a_second_control_stream_ends_the_connection(proxy: Proxy) -> None:
    proxy.client.control()
    proxy.client.control()
    await proxy.client.closed_with(STREAM_CREATION_ERROR)


async def test_a_push_stream_of_a_client_ends_the_connection(proxy: Proxy) -> None:
    proxy.client.put(b"\x01\x00", is_uni=True)
    await proxy.client.closed_with(STREAM_CREATION_ERROR)


@pytest.mark.parametrize("kind", [0, 2, 3])
async def test_a_critical_stream_that_ends_ends_the_connection(proxy: Proxy, kind: int) -> None:
    stream = proxy.client.put(number(kind), is_uni=True)
    proxy.client.put(b"", True, stream)
    await proxy.client.closed_with(CLOSED_CRITICAL_STREAM)


async def test_a_critical_stream_that_is_reset_ends_the_connection(proxy: Proxy) -> None:
    stream = proxy.client.control()
    await proxy.still_serves()
    proxy.client._quic.reset_stream(stream, 0x100)
    proxy.client.transmit()
    await proxy.client.closed_with(CLOSED_CRITICAL_STREAM)


async def test_a_stream_of_an_unknown_kind_is_stopped_and_disturbs_nobody(proxy: Proxy) -> None:
    stream = proxy.client.put(number(0x21) + b"z" * 100, is_uni=True)
    await proxy.client.until(lambda: stream in proxy.client.stops)
    assert proxy.client.stops[stream] == STREAM_CREATION_ERROR
    await proxy.still_serves()


async def test_what_follows_on_a_stream_of_an_unknown_kind_is_not_taken_for_another_kind(proxy: Proxy) -> None:
    client = proxy.client
    client._quic._QuicConnection__frame_handlers[0x05] = (lambda context, kind, buffer: _skip(buffer), frozenset(Epoch))
    client.control()
    stream = client.put(number(0x21) + b"z", is_uni=True)
    await proxy.still_serves()
    client.put(b"\x00" + frame(SETTINGS, b""), stream=stream)
    await proxy.still_serves()
    client.put(b"\x02\x00", True, stream)
    await proxy.still_serves()


async def test_streams_that_are_reset_before_their_kind_is_known_leave_nothing(proxy: Proxy) -> None:
    for _ in range(40):
        stream = proxy.client.put(b"\x40", is_uni=True)  # half of a number
        proxy.client._quic.reset_stream(stream, 0x100)
        proxy.client.transmit()
        await proxy.client.ping()
    streams = proxy.connection._client_streams
    await until(lambda: not streams._buffers)
    assert not streams._kinds


def _skip(buffer: Buffer) -> None:
    """A STOP_SENDING that the client does not look at."""
    buffer.pull_uint_var()
    buffer.pull_uint_var()


# ── QPACK ──


async def test_a_static_index_that_is_not_there_ends_the_connection(proxy: Proxy) -> None:
    proxy.client.put(frame(HEADERS, b"\x00\x00\xff\x64"), True)
    await proxy.client.closed_with(DECOMPRESSION_FAILED)


async def test_a_reference_to_the_dynamic_table_ends_the_connection(proxy: Proxy) -> None:
    proxy.client.put(frame(HEADERS, b"\x02\x00\x80"), True)
    await proxy.client.closed_with(DECOMPRESSION_FAILED)


@pytest.mark.parametrize("instruction", [b"\x3f\xe1\x1f", b"\x41a\x01b", b"\xc0\x01b"])
async def test_an_insertion_into_a_table_of_no_size_ends_the_connection(proxy: Proxy, instruction: bytes) -> None:
    proxy.client.put(b"\x02" + instruction, is_uni=True)
    await proxy.client.closed_with(ENCODER_STREAM_ERROR)


async def test_a_capacity_of_nothing_may_be_said(proxy: Proxy) -> None:
    proxy.client.put(b"\x02\x20", is_uni=True)
    await proxy.still_serves()


@pytest.mark.parametrize("instruction", [b"\x00", b"\x01", b"\x80"])
async def test_an_acknowledgement_of_nothing_ends_the_connection(proxy: Proxy, instruction: bytes) -> None:
    proxy.client.put(b"\x03" + instruction, is_uni=True)
    await proxy.client.closed_with(DECODER_STREAM_ERROR)


async def test_a_cancelled_stream_may_be_told_to_the_encoder(proxy: Proxy) -> None:
    proxy.client.put(b"\x03\x44\x7f\x85\x01", is_uni=True)
    await proxy.still_serves()
