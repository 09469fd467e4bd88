"""The demo's processes: applications and two proxies, all on loopback, all gone when the stage closes."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from meshproxy.cli import ca
from meshproxy.demo import files
from meshproxy.demo.files import Instance, Plan
from meshproxy.errors import MeshproxyError

START_TIMEOUT_S = 20.0


class StageError(MeshproxyError):
    """A process did not start or died; the text ends with the last lines it logged."""


class Proxy:
    """One `meshproxy run` with its files, as an operator would start it."""

    def __init__(self, name: str, root: Path, folders: list[str], arguments: list[str]) -> None:
        self.name = name
        self._ports_file = root / f"{name}.ports"
        self._log = root / f"{name}.log"
        command = [sys.executable, "-m", "meshproxy", "run", "--ports-file", str(self._ports_file)]
        command += ["--admin", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--ready", "127.0.0.1:0"]
        command += ["--certs", str(root / "certs"), "--locality", files.LOCALITY]
        for folder in folders:
            command += ["-c", str(root / folder)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command + arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def ready(self) -> None:
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while True:
            if self.process.poll() is not None:
                raise StageError(f"the proxy of {self.name} ended at once:\n{self.last_lines()}")
            try:
                await asyncio.to_thread(self.get, "ready", "/healthz/ready")
                return
            except (OSError, ValueError, KeyError):
                if asyncio.get_running_loop().time() > deadline:
                    raise StageError(f"the proxy of {self.name} is not ready:\n{self.last_lines()}") from None
            await asyncio.sleep(0.05)

    def get(self, which: str, path: str) -> bytes:
        """GET from the admin, metrics or ready port."""
        where = json.loads(self._ports_file.read_text())[which]
        port = where if isinstance(where, int) else where.rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            body: bytes = answer.read()
            return body

    def clusters(self) -> Any:
        return json.loads(self.get("admin", "/clusters?format=json"))

    def version(self) -> str:
        return str(json.loads(self.get("admin", "/server_info"))["snapshot"]["version"])

    def last_lines(self, count: int = 8) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-count:])

    def memory_mib(self) -> dict[str, float]:
        """PSS of each process of the proxy, by role and pid."""
        found: dict[str, float] = {}
        for pid in _family(self.process.pid):
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            kib = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            found[f"{self.name} {pid}"] = kib / 1024
        return found


class Stage:
    """Starts everything in __aenter__, ends everything in __aexit__, whatever happened in between."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="meshproxy-demo-")
        self.root = Path(self._temporary.name)
        ports = free_ports(8)
        names = ("edge-1a", "edge-1b", "edge-1c", "edge-2a", "edge-2b", "rsu-1")
        self.plan = Plan(
            instances=tuple(
                Instance(
                    name=name,
                    app="rsu-service" if name.startswith("rsu") else "edge-service",
                    zone="zone2" if name.startswith("edge-2") else "zone1",
                    address=f"127.0.77.{index + 1}",
                    app_port=ports[index],
                )
                for index, name in enumerate(names)
            ),
            inbound_port=ports[6],
            service_port=ports[7],
            egress=(("app1", "127.0.78.1"), ("app2", "127.0.78.2")),
        )
        self._applications: dict[str, subprocess.Popen[bytes]] = {}
        self.proxies: list[Proxy] = []

    @property
    def this_node(self) -> Proxy:
        return self.proxies[0]

    async def __aenter__(self) -> Self:
        try:
            files.write(self.root, self.plan)
            self._issue_certificates()
            for instance in self.plan.instances:
                self.start_application(instance)
            self.proxies = [
                Proxy("this-node", self.root, ["mesh", "this-node"], []),
                Proxy("other-node", self.root, ["mesh/services.yaml", "mesh/v2x-policy.yaml", "other-node"], []),
            ]
            for proxy in self.proxies:
                await proxy.ready()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _issue_certificates(self) -> None:
        authority = self.root / "ca"
        ca.init(authority)
        for account in ("app1", "app2", "edge-service", "rsu-service"):
            ca.issue(authority, "default", account, self.root / "certs")

    def start_application(self, instance: Instance) -> None:
        command = [sys.executable, "-m", "meshproxy.demo.server", instance.name, str(instance.app_port)]
        self._applications[instance.name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def kill_application(self, instance: Instance) -> None:
        process = self._applications.pop(instance.name)
        process.kill()
        process.wait()

    def set_ready(self, instance: Instance, is_ready: bool) -> None:
        """What the application answers to its readiness probe from now on."""
        self._applications[instance.name].send_signal(signal.SIGUSR2 if is_ready else signal.SIGUSR1)

    def instance(self, name: str) -> Instance:
        return next(instance for instance in self.plan.instances if instance.name == name)

    def allow_emptying_a_zone(self) -> None:
        """Edit the locality file in place, as an operator would: written beside, then renamed over."""
        text = (self.root / "mesh" / "locality-lb.yaml").read_text()
        self._put("locality-lb.yaml", files.without_ejection_limit(text))

    def add_probe(self) -> None:
        self._put("readiness.yaml", files.readiness(self.plan))

    def remove_probe(self) -> None:
        (self.root / "mesh" / "readiness.yaml").unlink()

    def _put(self, name: str, text: str) -> None:
        path = self.root / "mesh" / name
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, path)

    def _close(self) -> None:
        processes = [proxy.process for proxy in self.proxies] + list(self._applications.values())
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._temporary.cleanup()


def free_ports(count: int) -> list[int]:
    """Ports that are free on all addresses now; held together while choosing so that they differ."""
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _family(pid: int) -> list[int]:
    """The process and its descendants."""
    family = [pid]
    for parent in family:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        family += [int(child) for child in children]
    return family
