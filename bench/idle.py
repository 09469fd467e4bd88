"""How many idle keep-alive connections one worker holds in 128 MiB, in the clear and under mutual TLS.

Each connection has had one request answered before it idles, and has another answered after memory was measured: only
connections that work count.
"""

import resource
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench import certificates, mesh, origin
from bench.case import Case, Figure, Outcome, Settings, say
from bench.load import Target
from bench.paced import content_length
from bench.process import BenchError, Workspace
from bench.services import ECHO_HOST, echo

_MEMORY_MIB = 128.0
_AT_LEAST = 5000
_PLAIN_COUNTS = (5000, 10000)
_TLS_COUNTS = (2000, 5000)
_PER_SOURCE_ADDRESS = 5000
"""Connections from one loopback address: well within its ephemeral ports."""
_SPARE_DESCRIPTORS = 200
_CLIENT, _SERVER = "client", "server"


def source_address(number: int) -> str:
    """Where connection `number` (from 0) comes from: 127.0.1.1 and on."""
    index = number // _PER_SOURCE_ADDRESS
    return f"127.0.{1 + index // 254}.{1 + index % 254}"


def that_fit(budget_mib: float, base_mib: float, per_connection_kib: float) -> int:
    """How many connections bring a process group of base_mib to budget_mib."""
    return max(0, int((budget_mib - base_mib) * 1024 / per_connection_kib)) if per_connection_kib > 0 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A proxy's memory with the largest count of connections."""

    count: int
    base_mib: float
    """With one connection."""
    pss_mib: float

    @property
    def each_kib(self) -> float:
        return (self.pss_mib - self.base_mib) * 1024 / (self.count - 1)

    @property
    def fit(self) -> int:
        return that_fit(_MEMORY_MIB, self.base_mib, self.each_kib)


class Held:
    """Open connections to one target. tls: a client's context, None for plaintext."""

    def __init__(self, target: Target, tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls = tls
        self._request = f"GET {target.path} HTTP/1.1\r\nhost: {target.host}\r\n\r\n".encode()
        self._connections: list[socket.socket] = []

    def grow(self, count: int) -> None:
        """Up to `count` connections, each asked once."""
        while len(self._connections) < count:
            number = len(self._connections)
            connection = socket.create_connection(
                (self._target.address, self._target.port), 10, (source_address(number), 0)
            )
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection)
            self._connections.append(connection)
            self._ask(connection, number)

    def ask_all(self) -> None:
        for number, connection in enumerate(self._connections):
            self._ask(connection, number)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _ask(self, connection: socket.socket, number: int) -> None:
        data = b""
        try:
            connection.sendall(self._request)
            while (end := data.find(b"\r\n\r\n")) < 0 or len(data) < end + 4 + content_length(data[:end]):
                chunk = connection.recv(65536)
                if not chunk:
                    break
                data += chunk
        except OSError as error:
            raise BenchError(f"connection {number + 1} to port {self._target.port}: {error}") from error
        if not data.startswith(b"HTTP/1.1 200"):
            raise BenchError(f"connection {number + 1} to port {self._target.port} was not answered with 200")


def idle(settings: Settings, outcome: Outcome) -> None:
    limit = raise_descriptor_limit()
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        port = workspace.port()
        proxy = mesh.start(workspace, port, mesh.outbound_resources([echo(source.port)], port))
        held = Held(Target("127.0.0.1", port, ECHO_HOST))
        plain = _fill(settings, outcome, "plain", proxy, held, _within(limit, _PLAIN_COUNTS, outcome))
    with Workspace(settings.pinned("split")) as workspace:
        source = origin.start(workspace)
        issued = certificates.issue(workspace.path / "certs", (_CLIENT, _SERVER))
        port = workspace.port()
        resources = mesh.inbound_resources(port, source.port, "STRICT")
        proxy = mesh.start(workspace, port, resources, account=_SERVER, certificates=issued)
        held = Held(Target("127.0.0.1", port, ECHO_HOST), _client_context(issued))
        tls = _fill(settings, outcome, "mTLS", proxy, held, _within(limit, _TLS_COUNTS, outcome))

    figures = outcome.figures
    name = f"PSS of all processes with {plain.count:,} idle HTTP/1.1 connections"
    figures.append(Figure(name, plain.pss_mib, "MiB", at_most=_MEMORY_MIB if plain.count >= _AT_LEAST else None))
    figures.append(Figure("Idle HTTP/1.1 connections in 128 MiB", plain.fit, "connections", at_least=_AT_LEAST))
    figures.append(Figure("Memory of an idle HTTP/1.1 connection", plain.each_kib, "KiB"))
    figures.append(Figure("Idle mTLS connections in 128 MiB", tls.fit, "connections"))
    figures.append(Figure("Memory of an idle mTLS connection", tls.each_kib, "KiB"))
    outcome.notes.append(
        f"how many fit in 128 MiB is reckoned from what each of {plain.count:,} plain and {tls.count:,} mTLS "
        "connections took"
    )


def raise_descriptor_limit() -> int:
    """As many descriptors as this user may have, for us and for what we start; how many that is."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _within(limit: int, counts: Sequence[int], outcome: Outcome) -> list[int]:
    most = limit - _SPARE_DESCRIPTORS
    if most < counts[-1]:
        outcome.notes.append(f"only {most:,} connections: the descriptor limit is {limit:,}")
    return sorted({min(count, most) for count in counts})


def _client_context(issued: certificates.Certificates) -> ssl.SSLContext:
    home = issued.of(_CLIENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # a SPIFFE identity has no host name
    context.load_verify_locations(home / "root-cert.pem")
    context.load_cert_chain(home / "cert-chain.pem", home / "key.pem")
    context.set_alpn_protocols(["http/1.1"])
    return context


def _fill(
    settings: Settings, outcome: Outcome, name: str, proxy: mesh.Mesh, held: Held, counts: Sequence[int]
) -> Filled:
    """Opens as many connections as each of the ascending counts says, and measures at each."""
    try:
        held.grow(1)
        time.sleep(settings.seconds)
        base = proxy.group.memory()
        row = base.as_row()
        for count in counts:
            before = time.monotonic()
            held.grow(count)
            took_s = time.monotonic() - before
            time.sleep(settings.seconds)
            memory = proxy.group.memory()
            filled = Filled(count=count, base_mib=base.pss_mib, pss_mib=memory.pss_mib)
            row |= {f"{key}_{count}": value for key, value in memory.as_row().items()}
            row[f"kib_each_{count}"] = filled.each_kib
            say(
                f"  {outcome.case} {name}: {count:,} connections (opened in {took_s:.1f} s): "
                f"PSS {base.pss_mib:.1f} → {memory.pss_mib:.1f} MiB, {filled.each_kib:.2f} KiB each"
            )
        held.ask_all()
        outcome.rows[name] = row
        return filled
    finally:
        held.close()


CASES = (Case("idle", "Idle keep-alive connections held in 128 MiB, in the clear and under mTLS", idle),)
