"""A proxy as real processes, for integration tests. Waits on what the proxy says, never on time."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

PATIENCE_S = 10.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))  # free on 127.0.0.1 alone may still be in use for a listener of all addresses
        port: int = sock.getsockname()[1]
        return port


class ProxyProcess:
    """`meshproxy run …` with ports of the system's choice. `lines` is what it logged."""

    def __init__(
        self,
        directory: Path,
        *flags: str,
        configuration: Path | None = None,
        environment: Mapping[str, str] | None = None,
        module: str = "tests.support.stub_worker",
        prefix: Sequence[str] = (),
        stdout: int | None = None,
    ) -> None:
        """prefix: a command that runs the proxy, as `ip netns exec NAME`. stdout: a descriptor; None: ours."""
        self.directory = directory
        self.ports_file = directory / "ports.json"
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", module, "run", "-c", str(configuration or directory / "conf")),
                *("--admin", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--ready", "127.0.0.1:0"),
                *("--ports-file", str(self.ports_file), "--drain-time", "2", *flags),
            ],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "ProxyProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_S)
        self.process.kill()
        self._reader.join(PATIENCE_S)
        with contextlib.suppress(queue.Empty):
            while (line := self._new.get_nowait()) is not None:
                self.lines.append(line)
        if error is not None:
            print("".join(self.lines), file=sys.stderr)
        assert not any("Traceback" in line for line in self.lines), "".join(self.lines)

    @property
    def ports(self) -> dict[str, int]:
        ports: dict[str, int] = json.loads(self.ports_file.read_text())
        return ports

    def wait_for(self, text: str, count: int = 1) -> str:
        """The line that is the count-th to hold the text, as soon as it is logged."""
        deadline = monotonic() + PATIENCE_S
        while True:
            found = [line for line in self.lines if text in line]
            if len(found) >= count:
                return found[count - 1]
            try:
                line = self._new.get(timeout=max(0.0, deadline - monotonic()))
            except queue.Empty:
                raise AssertionError(f"never logged {text!r}:\n{''.join(self.lines)}") from None
            assert line is not None, f"ended without logging {text!r}:\n{''.join(self.lines)}"
            self.lines.append(line)

    def wait_for_end(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        while (line := self._new.get()) is not None:
            self.lines.append(line)
        return status

    def children(self) -> dict[str, int]:
        """Process name → pid: mesh-control, mesh-worker-0, …"""
        return dict(_children(self.process.pid))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._new.put(line)
        self._new.put(None)


def _children(parent: int) -> Iterator[tuple[str, int]]:
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):
            yield Path(f"/proc/{pid}/comm").read_text().strip(), int(pid)


def ask(port: int) -> dict[str, Any]:
    """What the stub worker behind the port says. OSError where nobody listens."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        answer: dict[str, Any] = json.loads(connection.makefile().readline())
        return answer
