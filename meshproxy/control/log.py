"""Log lines of every process: one line each, `key=value`, to stderr, never waiting for who reads it.

A log pipe that nobody empties, or a full disk, must not stop a worker: what cannot be written now is dropped and
counted.
"""

import logging
import os
import select
import time

LEVELS = ("debug", "info", "warning", "error")
_MAX_LINE_BYTES = 4096
"""PIPE_BUF: a pipe that polls writable takes this much without blocking, and in one piece."""
_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


class LineHandler(logging.Handler):
    """`time=… level=… process=… message="…"`; `dropped` counts lines that found no taker."""

    def __init__(self, process: str, descriptor: int = 2) -> None:
        super().__init__()
        self._process = process
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.line(record)
            ready = self._poll.poll(0)
            if not ready or not ready[0][1] & select.POLLOUT:
                self.dropped += 1
                return
            os.write(self._descriptor, line)
        except OSError:
            self.dropped += 1
        except Exception:  # logging must never be what fails
            self.dropped += 1

    def line(self, record: logging.LogRecord) -> bytes:
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        text = (
            f"time={stamp}.{int(record.msecs):03d}Z level={record.levelname.lower()} process={self._process} "
            f'message="{message.translate(_ESCAPED)}"'
        )
        data = text.encode("utf-8", "backslashreplace")
        if len(data) >= _MAX_LINE_BYTES:
            data = data[: _MAX_LINE_BYTES - 6] + b'..."'
        return data + b"\n"


def configure(process: str, level: str) -> LineHandler:
    """Make this process's root logger write to stderr; process names it: supervisor, control, worker-0."""
    handler = LineHandler(process)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    return handler
