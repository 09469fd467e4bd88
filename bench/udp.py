"""UDP in the clear: an echo through one proxy, a session a client, small datagrams."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable

from bench import datagrams, envoy, mesh, nginx
from bench.case import DIRECT, MESH, Case, Contender, Outcome, Settings, compare
from bench.load import Meter, Sample, Target
from bench.process import CHECKOUT, ORIGIN_NAME, BenchError, Group, Workspace
from bench.services import ECHO_HOST, ORIGIN_ADDRESSES, Place, Service

_SOCKETS = 32
_SIZE_BYTES = 64


def udp_echo(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        address, zone = ORIGIN_ADDRESSES[0]
        origin_port = workspace.port()
        ends = datagrams.command(workspace)
        if len(ends) > 1:
            outcome.notes.append("no C compiler (cc or gcc): load and origin in Python may be what limits the figures")
        # Named as the origin of the other cases: its CPU belongs to the load.
        origin = workspace.start(ORIGIN_NAME, [*ends, "echo", address, str(origin_port)], workspace.pinning.origin)
        _wait(origin, Target(address, origin_port, ECHO_HOST))
        service = Service(ECHO_HOST, (Place(address, origin_port, zone),))
        contenders = []
        if settings.wants(DIRECT):
            contenders.append(Contender(DIRECT, Target(address, origin_port, ECHO_HOST)))
        for name, start in _PROXIES.items():
            if settings.wants(name):
                try:
                    group, port = start(workspace, service)
                    target = Target("127.0.0.1", port, ECHO_HOST)
                    _wait(group, target)
                except BenchError as error:
                    if name == MESH:
                        raise
                    outcome.notes.append(f"{name} is left out: {error}")
                    continue
                contenders.append(Contender(name, target, (group,)))
        compare(outcome, settings, contenders, _load, workspace)
    outcome.ratio(f"UDP echo, {_SOCKETS} clients: req/s over nginx", ["nginx"], "req_s", at_least=0.8)
    outcome.ratio(f"UDP echo, {_SOCKETS} clients: req/s over Envoy", ["envoy"], "req_s")
    outcome.ratio(f"UDP echo, {_SOCKETS} clients: CPU a round trip over nginx", ["nginx"], "cpu_us_per_request")


def _meshproxy(workspace: Workspace, service: Service) -> tuple[Group, int]:
    port = workspace.port()
    proxy = mesh.start(workspace, port, mesh.outbound_resources([service], port, protocol="UDP"))
    return proxy.group, port


_PROXIES: dict[str, Callable[[Workspace, Service], tuple[Group, int]]] = {
    "nginx": nginx.outbound_udp,
    "envoy": envoy.outbound_udp,
    MESH: _meshproxy,
}


def _load(contender: Contender, seconds: float, workspace: Workspace) -> Sample:
    target = contender.target
    meter = Meter(contender.groups, workspace)
    how = (target.address, str(target.port), str(_SOCKETS), str(seconds), str(_SIZE_BYTES))
    run = subprocess.run(
        [*datagrams.command(workspace), "load", *how],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, workspace.pinning.load),
    )
    if run.returncode != 0:
        raise BenchError(f"load against {target.address}:{target.port} failed: {run.stderr[-500:]}")
    figures = json.loads(run.stdout)
    requests, elapsed_s = figures["requests"], figures["elapsed_s"]
    return Sample(
        req_s=requests / elapsed_s,
        bytes_s=requests * _SIZE_BYTES / elapsed_s,
        p50_us=figures["p50_us"],
        p99_us=figures["p99_us"],
        max_us=figures["max_us"],
        failed=figures["lost"],
        cpu_us_per_request=meter.cpu_us_per_request(requests),
        load_busy=meter.load_busy(elapsed_s),
    )


def _wait(group: Group, target: Target, timeout_s: float = 20.0) -> None:
    """Until an echo comes back; BenchError when it never does."""
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.settimeout(0.1)
        probe.connect((target.address, target.port))
        while time.monotonic() < deadline:
            if group.process.poll() is not None:
                raise BenchError(f"{group.name} ended at start:\n{group.tail()}")
            try:
                probe.send(b"ready?")
                probe.recv(64)
            except TimeoutError:
                continue
            except ConnectionRefusedError:
                time.sleep(0.02)
                continue
            return
    raise BenchError(f"{group.name} echoes nothing after {timeout_s:g} s:\n{group.tail()}")


CASES = (Case("udp_echo", f"UDP outbound, {_SOCKETS} clients, {_SIZE_BYTES}-byte datagrams", udp_echo),)
