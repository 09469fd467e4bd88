"""bench.datagrams: both ends, as the case runs them, agree on what they print."""

import json
import shutil
import subprocess
import sys

import pytest

from bench import datagrams
from bench.process import PINNINGS, Workspace


def test_the_program_in_python_counts_every_echo() -> None:
    check([sys.executable, "-m", "bench.datagrams"])


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
def test_the_program_in_c_counts_every_echo() -> None:
    with Workspace(PINNINGS["free"]) as workspace:
        command = datagrams.command(workspace)
        assert len(command) == 1
        check(command)


def check(command: list[str]) -> None:
    with Workspace(PINNINGS["free"]) as workspace:
        port = str(workspace.port())
        workspace.start("echo", [*command, "echo", "127.0.0.1", port], workspace.pinning.origin)
        run = [*command, "load", "127.0.0.1", port, "4", "1.2", "64"]
        figures = json.loads(subprocess.run(run, capture_output=True, check=True, text=True).stdout)
    assert set(figures) == {"requests", "elapsed_s", "p50_us", "p99_us", "max_us", "lost"}
    assert figures["requests"] > 100
    assert figures["elapsed_s"] >= 1.2
    assert 0 < figures["p50_us"] <= figures["p99_us"] <= figures["max_us"]
