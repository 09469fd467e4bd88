"""`python -m tests.faults.stalling_worker run …` is `meshproxy run …` with workers that stand still on SIGUSR2."""

import signal
import socket
import sys
import time

from meshproxy.cli import main as command_line
from meshproxy.worker import process

HELD_S = 0.25
_run = process.main


def something_slow() -> None:
    time.sleep(HELD_S)


def main(sock: socket.socket, slot: int) -> None:
    signal.signal(signal.SIGUSR2, lambda _number, _frame: something_slow())
    _run(sock, slot)


if __name__ == "__main__":
    process.main = main
    raise SystemExit(command_line.main(sys.argv[1:]))
