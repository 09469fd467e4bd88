"""HTTP/3: how many requests one QUIC connection carries, beside Envoy; what lost packets do to it; its memory.

No load generator at hand speaks HTTP/3, so an Envoy is the client: wrk asks it in HTTP/1.1, and it asks the proxy under
test in HTTP/3 on one connection. It shares the load's core with wrk and the origin. Where that core is full (load_busy
near 1), req/s is its limit, which flatters the slower proxy, and CPU per request tells the proxies apart.
"""

import os
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

from bench import certificates, envoy, lossy, mesh, origin
from bench.case import MESH, Case, Contender, Figure, Outcome, Settings, compare, flat_out
from bench.load import Target
from bench.process import CHECKOUT, BenchError, Workspace
from bench.services import ECHO_HOST, LOCAL_ZONE, Place, Service, echo

_STREAMS = 32
_FIRST, _IDLE = 20, 400
"""Connections that are there before memory is measured, and those it is then measured for."""
_LOSS_PERCENT = 1
_HTTP2, _HTTP3 = "http2", "http3"
_CLIENT, _SERVER = "client", "server"


def _driver(
    workspace: Workspace, port: int, issued: certificates.Certificates, inside: str = "h3", address: str = "127.0.0.1"
) -> envoy.Driver:
    service = Service(ECHO_HOST, (Place(address, port, LOCAL_ZONE),))
    return envoy.driver(workspace, service, inside, tls=(issued, _CLIENT, _SERVER))


def h3_in(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        service = echo(source.port)
        issued = certificates.issue(workspace.path / "certs", (_CLIENT, _SERVER), ECHO_HOST)
        contenders, drivers = [], []
        if settings.wants("envoy"):
            group, port = envoy.gateway_http3(workspace, service, tls=(issued, _SERVER))
            drivers.append(_driver(workspace, port, issued))
            contenders.append(Contender("envoy", Target("127.0.0.1", drivers[-1].port, ECHO_HOST), (group,)))
        if settings.wants(MESH):
            port = workspace.port()
            resources = mesh.gateway_resources(service, port, issued.of(_SERVER))
            proxy = mesh.start(workspace, port, resources, flags=mesh.HTTP3_GATEWAY)
            drivers.append(_driver(workspace, port, issued))
            contenders.append(Contender(MESH, Target("127.0.0.1", drivers[-1].port, ECHO_HOST), (proxy.group,)))
        compare(outcome, settings, contenders, flat_out(_STREAMS), workspace)
        for contender, driver in zip(contenders, drivers, strict=True):
            if (connections := driver.connections()) != 1:
                outcome.notes.append(f"{contender.name}: driven on {connections} connections, not one")
    for contender in contenders:
        busy, rate = outcome.median(contender.name, "load_busy"), outcome.median(contender.name, "req_s")
        if busy and rate:
            outcome.notes.append(
                f"{contender.name}: wrk, driver and origin needed {busy * 1e6 / rate:.0f} µs of CPU for each request"
            )
    outcome.ratio("HTTP/3 in, 32 streams: req/s over Envoy", ["envoy"], "req_s", at_least=0.45)
    outcome.per_cpu("HTTP/3 in, 32 streams: requests for the same CPU over Envoy", ["envoy"])


class Held:
    """Open QUIC connections to a port, in a process of their own; each is asked whenever their number is set."""

    def __init__(self, workspace: Workspace, port: int, issued: certificates.Certificates) -> None:
        roots = issued.of(_CLIENT) / "root-cert.pem"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.quic_clients", str(port), ECHO_HOST, str(roots)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, workspace.pinning.load),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.__exit__(kind, error, at)  # closes its stdin, which ends it

    def ask(self, count: int) -> None:
        """As many as that are open, and answered; BenchError when one is not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        if self._process.stdout.readline() != f"{count}\n":
            raise BenchError(f"not all of {count} QUIC connections were answered")


def quic_memory(settings: Settings, outcome: Outcome) -> None:
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        issued = certificates.issue(workspace.path / "certs", (_CLIENT, _SERVER), ECHO_HOST)
        port = workspace.port()
        resources = mesh.gateway_resources(echo(source.port), port, issued.of(_SERVER))
        proxy = mesh.start(workspace, port, resources, flags=mesh.HTTP3_GATEWAY)
        row: dict[str, float] = {}
        with Held(workspace, port, issued) as held:
            for count in (_FIRST, _FIRST + _IDLE):
                held.ask(count)
                time.sleep(settings.seconds)
                row |= {f"{name}_{count}": value for name, value in proxy.group.memory().as_row().items()}
            held.ask(_FIRST + _IDLE)  # only connections that still work count
        each = (row[f"private_mib_{_FIRST + _IDLE}"] - row[f"private_mib_{_FIRST}"]) * 1024 / _IDLE
        outcome.pinning = workspace.pinning.name
        outcome.rows[MESH] = {**row, "kib_each": each}
    outcome.figures.append(Figure("Private memory of an idle QUIC connection", each, "KiB", at_most=60.0))


def h3_loss(settings: Settings, outcome: Outcome) -> None:
    if (why := lossy.hindrance()) is not None:
        outcome.notes.append(f"left out: {why}")
        return
    with Workspace(settings.pinned("split")) as workspace, lossy.Cable(_LOSS_PERCENT) as cable:
        issued = certificates.issue(workspace.path / "certs", (_CLIENT, _SERVER), ECHO_HOST)
        port = workspace.port()
        with cable.far():
            source = origin.start(workspace)
            resources = mesh.gateway_resources(echo(source.port), port, issued.of(_SERVER), lossy.FAR)
            proxy = mesh.start(workspace, port, resources, flags=mesh.HTTP3_GATEWAY)
        with cable.near():
            contenders = []
            for name, inside in ((_HTTP2, "h2"), (_HTTP3, "h3")):
                driver = _driver(workspace, port, issued, inside, lossy.FAR)
                contenders.append(Contender(name, Target("127.0.0.1", driver.port, ECHO_HOST), (proxy.group,)))
            compare(outcome, settings, contenders, flat_out(_STREAMS), workspace)
        outcome.notes.append(
            f"{cable.lost_percent():.2f} % of the packets were lost, between ends that are microseconds apart: where "
            "TCP has nothing in flight after a lost segment, it waits for its least timeout, 200 ms"
        )
    mine, theirs = outcome.median(_HTTP3, "p99_us"), outcome.median(_HTTP2, "p99_us")
    if mine is not None and theirs:
        name = f"{_LOSS_PERCENT} % of packets lost, {_STREAMS} streams: p99 in HTTP/3 over p99 in HTTP/2"
        outcome.figures.append(Figure(name, mine / theirs, "×", at_most=0.7))


CASES = (
    Case("h3_in", "HTTP/3 in on one QUIC connection, 32 streams at a time, HTTP/1.1 out", h3_in),
    Case("h3_loss", "HTTP/3 and HTTP/2 in through meshproxy, 32 streams on one connection, 1 % packet loss", h3_loss),
    Case("quic_memory", "Memory of idle QUIC connections that have been asked once", quic_memory),
)
