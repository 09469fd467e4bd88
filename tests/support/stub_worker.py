"""A worker without a data path, for tests of the processes around it: every listener answers with one line and closes.

The line is JSON: the worker's pid and slot, and the version it applied. It drains, reports and obeys like a real one.
"""

import asyncio
import json
import os
import socket

from meshproxy.control.channel import WorkerChannel
from meshproxy.control.messages import (
    Answer,
    Applied,
    Ask,
    Begin,
    Commit,
    Drain,
    Drained,
    Health,
    PutEndpoints,
    PutListener,
    Remove,
    Resolved,
)


class StubWorker:
    def __init__(self, sock: socket.socket, slot: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.slot = slot
        self.version = ""
        self.listening: dict[str, socket.socket] = {}
        self.staged: list[PutListener | Remove] = []
        self.descriptors: dict[str, int] = {}
        self.endpoints: dict[str, list[str]] = {}
        self.verdicts: list[tuple[str, str, str]] = []
        self.done = asyncio.Event()
        self.channel = WorkerChannel(sock, self.loop, self.on_message, self.done.set)

    def on_message(self, message: object, descriptor: int | None) -> None:
        match message:
            case Begin():
                self.endpoints = {} if message.replaces_all else self.endpoints
            case PutListener():
                assert descriptor is not None
                self.descriptors[message.listener.name] = descriptor
                self.staged.append(message)
            case Remove():
                self.staged.append(message)
            case PutEndpoints() | Resolved():
                self.endpoints[message.cluster_key] = [
                    endpoint.key for group in message.localities for endpoint in group.endpoints
                ]
            case Health():
                self.verdicts.extend(message.verdicts)
            case Ask():
                answer = {"slot": self.slot, "pid": os.getpid(), "verdicts": self.verdicts, **self.endpoints}
                self.channel.send(Answer(message.id, answer))
            case Commit():
                self.commit(message.version)
            case Drain():
                for sock in self.listening.values():
                    self.loop.remove_reader(sock)
                if message.exits:
                    self.channel.send(Drained())
                    self.done.set()

    def commit(self, version: str) -> None:
        for change in self.staged:
            if isinstance(change, Remove):
                if change.kind == "listener":
                    self.close(change.name)
            elif change.listener.name in self.listening:
                os.close(self.descriptors.pop(change.listener.name))
            else:
                sock = socket.socket(fileno=self.descriptors.pop(change.listener.name))
                sock.setblocking(False)
                self.listening[change.listener.name] = sock
                self.loop.add_reader(sock, self.serve, sock)
        self.staged.clear()
        self.version = version
        self.channel.send(Applied(version, 0.0, 0.0))

    def close(self, name: str) -> None:
        if name in self.listening:
            sock = self.listening.pop(name)
            self.loop.remove_reader(sock)
            sock.close()

    def serve(self, sock: socket.socket) -> None:
        """One connection is waiting: say who we are. A line fits into any socket's buffer."""
        try:
            connection, _ = sock.accept()
        except OSError:
            return  # it left again
        with connection:
            line = json.dumps({"pid": os.getpid(), "slot": self.slot, "version": self.version}) + "\n"
            connection.send(line.encode())


def main(sock: socket.socket, slot: int) -> None:
    async def run() -> None:
        await StubWorker(sock, slot).done.wait()

    asyncio.run(run())


if __name__ == "__main__":
    # `python -m tests.support.stub_worker run …` is `meshproxy run …` with this worker.
    import sys

    from meshproxy.cli import main as command_line
    from meshproxy.worker import process

    process.main = main
    raise SystemExit(command_line.main(sys.argv[1:]))
