"""Both ends of the UDP case in Python, for hosts without a C compiler: as datagrams.c, and slower, so that it may be
what limits the figures. `command` chooses between the two.
"""

import json
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic

from bench.paced import percentile
from bench.process import BenchError, Workspace

LOST_S = 0.5
_SOURCE = Path(__file__).with_name("datagrams.c")


def command(workspace: Workspace) -> list[str]:
    """What to run; the C program is compiled into the workspace, once."""
    program = workspace.path / "datagrams"
    if program.exists():
        return [str(program)]
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return [sys.executable, "-m", "bench.datagrams"]
    built = subprocess.run([compiler, "-O2", "-o", program, _SOURCE], capture_output=True, text=True)
    if built.returncode != 0:
        raise BenchError(f"{compiler} cannot compile {_SOURCE.name}: {built.stderr[-500:]}")
    return [str(program)]


def echo(address: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        buffer = memoryview(bytearray(65536))
        while True:
            size, sender = sock.recvfrom_into(buffer)
            sock.sendto(buffer[:size], sender)


def load(address: tuple[str, int], sockets: int, seconds: float, size: int) -> dict[str, float]:
    """Figures as datagrams.c prints them."""
    data = bytes(size)
    poller = select.epoll()
    clients: dict[int, socket.socket] = {}
    sent_at: dict[int, float] = {}
    took_s: list[float] = []
    lost = 0
    start = now = monotonic()
    for _ in range(sockets):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.setblocking(False)
        client.connect(address)
        clients[client.fileno()] = client
        poller.register(client.fileno(), select.EPOLLIN)
        sent_at[client.fileno()] = monotonic()
        client.send(data)
    look_at = start + LOST_S
    while now < start + seconds:
        for descriptor, _ in poller.poll(0.05):
            client = clients[descriptor]
            try:
                client.recv(65536)
            except OSError:  # nobody listens: counted as lost
                continue
            now = monotonic()
            took_s.append(now - sent_at[descriptor])
            sent_at[descriptor] = now
            client.send(data)
        now = monotonic()
        if now < look_at:
            continue
        look_at = now + LOST_S
        for descriptor, client in clients.items():
            if now - sent_at[descriptor] > LOST_S:
                lost += 1
                sent_at[descriptor] = now
                client.send(data)
    took_s.sort()
    return {
        "requests": len(took_s),
        "elapsed_s": monotonic() - start,
        "p50_us": percentile(took_s, 0.5) * 1e6,
        "p99_us": percentile(took_s, 0.99) * 1e6,
        "max_us": took_s[-1] * 1e6 if took_s else 0.0,
        "lost": lost,
    }


def main(words: list[str]) -> None:
    kind, host, port, *rest = words
    if kind == "echo":
        echo((host, int(port)))
    else:
        print(json.dumps(load((host, int(port)), int(rest[0]), float(rest[1]), int(rest[2]))))


if __name__ == "__main__":
    main(sys.argv[1:])
