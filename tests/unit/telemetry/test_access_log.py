import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.errors import ConfigError
from meshproxy.model.listener import AccessLogPolicy
from meshproxy.model.response_flag import ResponseFlag
from meshproxy.telemetry import access_log
from meshproxy.telemetry.access_log import (
    ENTRY_FIELDS,
    ISTIO_JSON_FORMAT,
    MAX_PENDING,
    AccessLog,
    Entry,
    json_formatter,
    text_formatter,
)

# The line istio.io shows in its task "Envoy Access Logs".
GOLDEN = (
    '[2020-11-25T21:26:18.409Z] "GET /status/418 HTTP/1.1" 418 - via_upstream - "-" 0 135 4 4 "-" "curl/7.73.0-DEV" '
    '"84961386-6d84-929d-98bd-c5aee93b5c88" "httpbin:8000" "10.44.1.27:80" '
    "outbound|8000||httpbin.foo.svc.cluster.local 10.44.1.23:37652 10.0.45.184:8000 10.44.1.23:46520 - default\n"
)
GOLDEN_ENTRY: dict[str, Any] = {
    "start_time": 1606339578.409,
    "duration_ms": 4.7,
    "method": b"GET",
    "path": b"/status/418",
    "protocol": "HTTP/1.1",
    "response_code": 418,
    "response_flags": "-",
    "response_code_details": "via_upstream",
    "connection_termination_details": None,
    "upstream_transport_failure_reason": None,
    "bytes_received": 0,
    "bytes_sent": 135,
    "upstream_service_time_ms": 4,
    "x_forwarded_for": None,
    "user_agent": b"curl/7.73.0-DEV",
    "request_id": b"84961386-6d84-929d-98bd-c5aee93b5c88",
    "authority": b"httpbin:8000",
    "upstream_host": "10.44.1.27:80",
    "upstream_cluster": "outbound|8000||httpbin.foo.svc.cluster.local",
    "upstream_local_address": "10.44.1.23:37652",
    "downstream_local_address": "10.0.45.184:8000",
    "downstream_remote_address": "10.44.1.23:46520",
    "requested_server_name": None,
    "route_name": "default",
    "request_headers": None,
    "response_headers": None,
    "downstream_peer_uri_san": None,
    "downstream_tls_version": None,
    "upstream_request_attempt_count": 1,
    "workload_id": "foo/sleep",
}


def entry(**changes: object) -> Entry:
    values = GOLDEN_ENTRY | changes
    assert list(values) == list(ENTRY_FIELDS)
    return tuple(values.values())


TCP = dict.fromkeys(ENTRY_FIELDS) | {
    "start_time": 0.0,
    "duration_ms": 12.0,
    "response_code": 0,
    "response_flags": "UF",
    "bytes_received": 3,
    "bytes_sent": 0,
    "upstream_request_attempt_count": 1,
    "upstream_transport_failure_reason": "delayed connect error: 111",
}


def line(format: str | None, **changes: object) -> str:
    return text_formatter(format)(entry(**changes)).decode()


def test_the_default_text_is_istios() -> None:
    assert line(None) == GOLDEN


def test_a_tcp_connection_shows_what_it_has_and_dashes() -> None:
    assert text_formatter(None)(tuple(TCP.values())).decode() == (  # type: ignore[arg-type]
        '[1970-01-01T00:00:00.000Z] "- - -" 0 UF - - "delayed connect error: 111" 3 0 12 - "-" "-" "-" "-" "-" '
        "- - - - - -\n"
    )


def test_the_default_json_has_the_24_keys_with_numbers_and_null() -> None:
    value = json.loads(json_formatter(None)(entry()))
    assert list(value) == list(ISTIO_JSON_FORMAT) and len(value) == 24
    assert value["response_code"] == 418 and value["duration"] == 4 and value["upstream_service_time"] == 4
    assert value["x_forwarded_for"] is None and value["method"] == "GET"
    assert value["start_time"] == "2020-11-25T21:26:18.409Z"


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("100%% %PROTOCOL%", "100% HTTP/1.1"),
        ("%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/status/418"),
        ("%REQ(X-A?X-B)%", "one,two"),
        ("%REQ(x-b):2%", "on"),
        ("%REQ(HOST)%", "httpbin:8000"),
        ("%RESP(CONTENT-TYPE)% %RESP(:STATUS)%", "text/plain 418"),
        ("%REQ(X-MISSING)%", "-"),
        ("%START_TIME(%Y/%m/%d %H:%M:%S)%", "2020/11/25 21:26:18"),
        ("%START_TIME(%s.%3f)%", "1606339578.409"),
        ("%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "10.44.1.27"),
        ("%WORKLOAD_ID% %UPSTREAM_REQUEST_ATTEMPT_COUNT%", "foo/sleep 1"),
        ("%RESPONSE_CODE_DETAILS%", "via_upstream"),
    ],
)
def test_operator(format: str, text: str) -> None:
    headers = ((b"x-b", b"one"), (b"x-b", b"two"))
    assert line(format, request_headers=headers, response_headers=((b"content-type", b"text/plain"),)) == text + "\n"


def test_headers_the_entry_does_not_name_are_found_in_the_request() -> None:
    headers = ((b"user-agent", b"probe"), (b"x-forwarded-for", b"10.0.0.9"))
    changes = {"user_agent": None, "request_headers": headers}
    assert line("%REQ(USER-AGENT)% %REQ(X-FORWARDED-FOR)%", **changes) == "probe 10.0.0.9\n"


def test_a_flag_is_written_by_its_short_name() -> None:
    assert line("%RESPONSE_FLAGS%", response_flags=ResponseFlag.NO_ROUTE) == "NR\n"
    assert json.loads(json_formatter(None)(entry(response_flags=ResponseFlag.NONE)))["response_flags"] == "-"


def test_details_are_one_word() -> None:
    assert line("%RESPONSE_CODE_DETAILS%", response_code_details="a b c") == "a_b_c\n"


@pytest.mark.parametrize(
    ("format", "sentence"),
    [
        ("%NOPE%", "access log format: unknown operator %NOPE%"),
        ("%REQ%", "access log format: %REQ(…)% needs a header name"),
        ("a % b", "access log format: the % at position 3 opens no operator"),
        ("%PROTOCOL(X)%", "access log format: unknown operator %PROTOCOL(X)%"),
    ],
)
def test_a_wrong_format_is_one_sentence(format: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        text_formatter(format)
    assert str(raised.value) == sentence


@pytest.mark.parametrize("format", ["[]", "{", '{"a": 1}', '{"a": "%X%"}'])
def test_a_wrong_json_format_is_one_sentence(format: str) -> None:
    with pytest.raises(ConfigError, match=r"access log format: [^\n]+$"):
        json_formatter(format)


def test_an_unknown_encoding_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="must be text or json"):
        AccessLog(AccessLogPolicy(path="/dev/null", encoding="xml"))


def test_a_json_format_nests_and_keeps_single_operators_typed() -> None:
    format = '{"http": {"code": "%RESPONSE_CODE%", "line": "%REQ(:METHOD)% 100%%"}, "100%": "%DURATION%"}'
    assert json.loads(json_formatter(format)(entry())) == {"http": {"code": 418, "line": "GET 100%"}, "100%": 4}


@given(st.binary(max_size=60))
def test_a_header_can_forge_neither_a_line_nor_a_field(agent: bytes) -> None:
    text = text_formatter('"%REQ(USER-AGENT)%"')(entry(user_agent=agent))
    assert text.isascii() and text.endswith(b"\n")
    inner = text[1:-2]
    assert all(32 <= byte < 127 for byte in inner)
    assert b'"' not in inner.replace(b"\\\\", b"").replace(b'\\"', b"")
    assert set(json.loads(json_formatter(None)(entry(user_agent=agent)))) == set(ISTIO_JSON_FORMAT)


@given(st.text(max_size=40))
def test_any_text_of_the_mesh_makes_one_line(name: str) -> None:
    assert text_formatter("%ROUTE_NAME%")(entry(route_name=name)).count(b"\n") == 1
    assert json_formatter(None)(entry(route_name=name)).count(b"\n") == 1


def test_lines_reach_the_file_only_at_the_flush(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogPolicy(path=str(path)))
    log.append(entry())
    assert path.read_text() == ""
    assert log.flush() is False
    assert path.read_text() == GOLDEN
    assert (log.counters.access_log_written, log.counters.access_log_dropped) == (1, 0)
    log.close()


def test_a_flush_formats_a_bounded_number_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogPolicy(path=str(path), format="x"))
    for _ in range(5):
        log.append(entry())
    assert log.flush(3) is True and path.read_text() == "x\n" * 3
    assert log.flush(3) is False and path.read_text() == "x\n" * 5
    log.close()


def test_a_busy_log_keeps_up_with_ten_flushes_a_second() -> None:
    log = AccessLog(AccessLogPolicy(path="/dev/null", format="x"))
    for _ in range(10):
        for _ in range(2000):
            log.append(entry())
        log.flush()
    assert log.counters.access_log_dropped == 0
    log.close()
    assert log.counters.access_log_written == 20_000


def test_after_rotation_lines_go_to_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogPolicy(path=str(path), format="x"))
    path.rename(tmp_path / "access.log.1")
    log.reopen()
    log.append(entry())
    log.close()
    assert path.read_text() == "x\n" and (tmp_path / "access.log.1").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_costs_lines_and_says_so() -> None:
    log = AccessLog(AccessLogPolicy(path="/dev/full"))
    for _ in range(3):
        log.append(entry())
    log.flush()
    assert (log.counters.access_log_written, log.counters.access_log_dropped) == (0, 3)
    assert log.problem == f"access log /dev/full: {os.strerror(errno.ENOSPC)}; lines are dropped"
    log.close()


def test_a_file_that_cannot_be_opened_costs_lines_and_says_so(tmp_path: Path) -> None:
    log = AccessLog(AccessLogPolicy(path=str(tmp_path / "absent" / "log")))
    log.append(entry())
    log.flush()
    assert log.counters.access_log_dropped == 1
    assert log.problem is not None and "No such file or directory" in log.problem
    log.close()


def test_entries_waiting_for_a_flush_are_bounded() -> None:
    log = AccessLog(AccessLogPolicy(path="/dev/null"))
    for _ in range(MAX_PENDING + 7):
        log.append(entry())
    assert log.counters.access_log_dropped == 7
    log.close()


@pytest.fixture
def fifo(tmp_path: Path) -> tuple[Path, int]:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path, os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def test_a_reader_that_stalls_costs_lines_and_no_wait(fifo: tuple[Path, int]) -> None:
    path, reader = fifo
    log = AccessLog(AccessLogPolicy(path=str(path)))
    total = 6000
    for _ in range(total):
        log.append(entry())
    while log.flush():
        pass
    log.flush()
    in_pipe = log.counters.access_log_written
    assert 0 < in_pipe < 400
    assert log.counters.access_log_dropped > 0
    received = b""
    while log.counters.access_log_written + log.counters.access_log_dropped < total:
        received += os.read(reader, 1 << 16)
        log.flush()
    received += os.read(reader, 1 << 16)
    assert set(received.split(b"\n")) == {GOLDEN.rstrip("\n").encode(), b""}
    assert received.count(b"\n") == log.counters.access_log_written
    os.close(reader)
    log.close()


def test_a_reader_that_goes_costs_lines_and_a_new_one_gets_whole_lines(
    fifo: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reader = fifo
    monkeypatch.setattr(access_log, "_REOPEN_S", 0.0)
    log = AccessLog(AccessLogPolicy(path=str(path)))
    os.close(reader)
    log.append(entry())
    log.flush()
    assert log.counters.access_log_dropped == 1 and log.problem is not None
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log.append(entry())
    log.flush()
    assert os.read(reader, 4096).decode() == GOLDEN
    assert log.problem is None
    os.close(reader)
    log.close()


def test_a_line_torn_by_a_full_disk_is_ended_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of a line: the kernel takes a part, then refuses."""
    path = tmp_path / "access.log"
    log = AccessLog(AccessLogPolicy(path=str(path), format="0123456789"))
    write = os.write
    script: list[int | None] = [15, None]

    def scripted(fd: int, data: memoryview) -> int:
        if not script:
            return write(fd, data)
        length = script.pop(0)
        if length is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:length])

    monkeypatch.setattr(os, "write", scripted)
    for _ in range(3):
        log.append(entry())
    log.flush()
    log.append(entry())
    log.flush()
    monkeypatch.undo()
    assert path.read_text() == "0123456789\n0123\n0123456789\n"
    assert (log.counters.access_log_written, log.counters.access_log_dropped) == (2, 2)
    log.close()


def test_standard_output_that_is_a_socket_is_written_without_waiting() -> None:
    """systemd gives services a socket as standard output; it cannot be opened by path."""
    ours, theirs = socket.socketpair()
    saved = os.dup(1)
    try:
        os.dup2(theirs.fileno(), 1)
        log = AccessLog(AccessLogPolicy(path="/dev/stdout"))
        log.append(entry())
        log.flush()
        log.close()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert ours.recv(4096).decode() == GOLDEN
    assert os.get_blocking(theirs.fileno())
    ours.close()
    theirs.close()


def test_opening_standard_output_leaves_the_shared_pipe_blocking() -> None:
    reader, writer = os.pipe()
    saved = os.dup(1)
    try:
        os.dup2(writer, 1)
        log = AccessLog(AccessLogPolicy(path="/dev/stdout"))
        log.append(entry())
        log.flush()
        log.close()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert os.get_blocking(writer)
    assert os.read(reader, 4096).decode() == GOLDEN
    os.close(reader)
    os.close(writer)
