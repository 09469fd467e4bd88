import fcntl
import logging
import os

from meshproxy.control.log import LineHandler


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("meshproxy", logging.WARNING, "file.py", 1, message, args, None)


def test_a_line_is_one_line_whatever_the_message_holds() -> None:
    line = LineHandler("control").line(record('a "quoted"\nsecond %s', "line"))
    assert line.count(b"\n") == 1
    assert line.endswith(b'level=warning process=control message="a \\"quoted\\"\\nsecond line"\n')


def test_a_long_line_is_cut_to_what_a_pipe_takes_in_one_piece() -> None:
    line = LineHandler("control").line(record("x" * 10000))
    assert len(line) <= 4096
    assert line.endswith(b'..."\n')


def test_a_log_nobody_reads_is_dropped_and_never_waited_for() -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    handler = LineHandler("worker-0", write)
    for _ in range(200):
        handler.emit(record("x" * 100))
    assert handler.dropped > 0
    os.close(read)
    handler.emit(record("no reader at all"))
    os.close(write)
