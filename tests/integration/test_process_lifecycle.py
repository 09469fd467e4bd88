"""Supervisor, control process and workers as real processes: starting, replacing, reloading, draining, ending."""

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.proxy_process import PATIENCE_S, ProxyProcess, ask, free_port


def listener(name: str, port: int) -> str:
    """A TCP service and the egress listener that serves it. One Sidecar holds all listeners of a file."""
    return f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: {name}
spec:
  hosts: [{name}.example]
  location: MESH_INTERNAL
  resolution: STATIC
  ports:
  - {{number: {port}, name: tcp, protocol: TCP}}
  endpoints:
  - {{address: 127.0.0.1, ports: {{tcp: 9}}}}
---
"""


def mesh(**ports: int) -> str:
    egress = "".join(
        f"  - {{port: {{number: {port}, protocol: TCP, name: tcp-{name}}}, bind: 127.0.0.1, "
        f'captureMode: NONE, hosts: ["*/{name}.example"]}}\n'
        for name, port in ports.items()
    )
    sidecar = (
        f"apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata:\n  name: default\nspec:\n  egress:\n{egress}"
    )
    return "".join(listener(name, port) for name, port in ports.items()) + sidecar


class Mesh:
    """A directory with a configuration, and the ports of its listeners."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "conf" / "mesh.yaml"
        self.file.parent.mkdir()
        self.ports: dict[str, int] = {}

    def listen(self, *names: str) -> None:
        for name in names:
            self.ports.setdefault(name, free_port())
        new = self.file.with_name(".new")
        new.write_text(mesh(**{name: self.ports[name] for name in names}))
        os.replace(new, self.file)

    def start(self, *flags: str, **environment: str) -> ProxyProcess:
        return ProxyProcess(self.directory, *flags, environment=environment)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Mesh]:
    mesh = Mesh(tmp_path)
    mesh.listen("a")
    yield mesh


def test_a_change_of_the_file_opens_and_closes_listeners(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: 1 workers")
        ask(made.ports["a"])
        made.listen("a", "b")
        proxy.wait_for("2 listeners")
        assert ask(made.ports["b"])["pid"] == ask(made.ports["a"])["pid"]
        made.listen("b")
        proxy.wait_for("1 listeners", count=2)
        with pytest.raises(OSError):
            while True:  # the worker lets go of it as soon as it has applied the snapshot
                with contextlib.suppress(ValueError):  # one that was queued just then ends without an answer
                    ask(made.ports["a"])
        ask(made.ports["b"])


def test_a_worker_that_dies_is_replaced_and_keeps_its_queue(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: ")
        first = ask(made.ports["a"])["pid"]
        os.kill(first, signal.SIGSTOP)
        with socket.create_connection(("127.0.0.1", made.ports["a"]), PATIENCE_S) as waiting:
            os.kill(first, signal.SIGKILL)
            proxy.wait_for("worker-0 (pid")
            assert waiting.makefile().readline() != ""
        assert ask(made.ports["a"])["pid"] != first


def test_each_of_several_workers_serves(made: Mesh) -> None:
    with made.start("--workers", "2") as proxy:
        proxy.wait_for("ready: 2 workers")
        slots = set()
        while slots != {0, 1}:
            slots.add(ask(made.ports["a"])["slot"])


def test_a_control_process_that_dies_is_replaced_and_workers_do_not_notice(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: ")
        worker, ports = ask(made.ports["a"])["pid"], proxy.ports
        os.kill(proxy.children()["mesh-control"], signal.SIGKILL)
        assert ask(made.ports["a"])["pid"] == worker
        proxy.wait_for("ready: ", count=2)
        assert ask(made.ports["a"])["pid"] == worker
        made.listen("a", "b")
        proxy.wait_for("2 listeners")
        assert ask(made.ports["b"])["pid"] == worker
        assert proxy.ports == ports


def test_a_broken_file_does_not_take_down_what_a_new_control_process_finds(made: Mesh) -> None:
    with made.start("--log-level", "debug") as proxy:
        proxy.wait_for("ready: ")
        proxy.wait_for("last good")
        made.file.write_text("kind: [")
        proxy.wait_for("level=error")
        os.kill(proxy.children()["mesh-control"], signal.SIGKILL)
        proxy.wait_for("ready: ", count=2)
        ask(made.ports["a"])


def test_sigterm_drains_and_ends_with_status_0(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: ")
        children = proxy.children()
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.wait_for_end() == 0
        with pytest.raises(OSError):
            ask(made.ports["a"])
        for pid in children.values():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_nothing_outlives_a_killed_supervisor(made: Mesh) -> None:
    with made.start("--workers", "2") as proxy:
        proxy.wait_for("ready: ")
        descriptors = [os.pidfd_open(pid) for pid in proxy.children().values()]
        assert len(descriptors) == 3
        proxy.process.kill()
        proxy.wait_for_end()
        for descriptor in descriptors:
            # A pidfd becomes readable when its process ends.
            assert select.select([descriptor], [], [], PATIENCE_S)[0]
            os.close(descriptor)
    with made.start() as proxy:
        proxy.wait_for("ready: ")  # at once: no port is held
        ask(made.ports["a"])


def test_sighup_reads_again_and_tells_the_service_manager(made: Mesh, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        with made.start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000") as proxy:
            said = b""
            while b"READY=1" not in said:
                said += manager.recv(4096)
            proxy.process.send_signal(signal.SIGHUP)
            said = b""
            while not (b"RELOADING=1\nMONOTONIC_USEC=" in said and b"READY=1" in said and b"WATCHDOG=1" in said):
                said += manager.recv(4096)
            proxy.process.send_signal(signal.SIGTERM)
            while b"STOPPING=1" not in said:
                said += manager.recv(4096)
            assert proxy.wait_for_end() == 0


def test_an_address_in_use_at_the_start_is_one_sentence_and_status_1(made: Mesh) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", made.ports["a"]))
        other.listen()
        with made.start() as proxy:
            assert proxy.wait_for_end() == 1
            errors = [line for line in proxy.lines if "level=error" in line]
            assert len(errors) == 1
            assert f'message="listener 127.0.0.1:{made.ports["a"]}: cannot bind: address in use"' in errors[0]


def test_an_address_in_use_at_a_reload_leaves_the_others_and_is_tried_again(made: Mesh) -> None:
    with made.start() as proxy, socket.socket() as other:
        proxy.wait_for("ready: ")
        made.ports["b"] = free_port()
        other.bind(("127.0.0.1", made.ports["b"]))
        other.listen()
        made.listen("a", "b", "c")
        proxy.wait_for("cannot bind: address in use")
        proxy.wait_for("2 listeners")
        ask(made.ports["a"])
        ask(made.ports["c"])
        other.close()
        proxy.wait_for("3 listeners")
        ask(made.ports["b"])


def test_an_admin_address_in_use_is_one_sentence_and_status_1(made: Mesh) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with made.start("--admin", f"127.0.0.1:{port}") as proxy:
            assert proxy.wait_for_end() == 1
            errors = [line for line in proxy.lines if "level=error" in line]
            assert [line.partition("message=")[2] for line in errors] == [
                f'"admin 127.0.0.1:{port}: cannot bind: address in use"\n'
            ]


def test_a_worker_that_keeps_dying_is_started_ever_later(made: Mesh) -> None:
    with made.start("--log-level", "debug") as proxy:
        proxy.wait_for("ready: ")
        for count in range(1, 4):
            os.kill(proxy.children()["mesh-worker-0"], signal.SIGKILL)
            proxy.wait_for("worker-0 (pid", count=count)
            proxy.wait_for("is connected", count=count + 1)
        ask(made.ports["a"])


def test_a_service_manager_that_signals_everyone_still_gets_a_drain(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: ")
        for pid in (*proxy.children().values(), proxy.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert proxy.wait_for_end() == 0


def test_version_is_quick_and_imports_nothing_of_the_proxy() -> None:
    code = (
        "import sys\nfrom meshproxy.cli.main import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\n"
        "assert not {'asyncio', 'uvloop', 'ssl', 'yaml', 'cryptography'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("meshproxy ")


def admin(proxy: ProxyProcess, method: str, path: str, port: str = "admin") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.ports[port], timeout=PATIENCE_S)
    connection.request(method, path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_readiness_and_the_log_level_are_the_operators(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: ")
        assert admin(proxy, "GET", "/healthz/ready", "ready")[0] == 200
        assert admin(proxy, "POST", "/logging?level=debug")[0] == 200
        made.listen("a", "b")
        proxy.wait_for("level=debug")
        assert admin(proxy, "POST", "/drain_listeners")[0] == 200
        assert admin(proxy, "GET", "/healthz/ready", "ready")[0] == 503
        assert proxy.process.poll() is None


def test_quitquitquit_drains_and_ends(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: ")
        assert admin(proxy, "GET", "/quitquitquit")[0] == 405
        assert admin(proxy, "POST", "/quitquitquit")[0] == 200
        assert proxy.wait_for_end() == 0


def test_what_is_wrong_with_the_configuration_is_one_line_once(made: Mesh) -> None:
    with made.start() as proxy:
        proxy.wait_for("ready: ")
        good = made.file.read_text()
        made.file.write_text(good + "---\nkind: [\n")
        line = proxy.wait_for("mesh.yaml:")
        assert "level=error process=control" in line
        proxy.process.send_signal(signal.SIGHUP)
        made.listen("a", "b")  # the broken document is gone, and with it the problem
        proxy.wait_for("2 listeners")
        assert len([line for line in proxy.lines if "level=error" in line]) == 1
        assert admin(proxy, "GET", "/problems") == (200, "")
