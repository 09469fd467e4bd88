"""Active health checks: ask each endpoint of the clusters that declare a probe whether it works.

Decides: when to ask, what counts as an answer. Leaves to others: how many answers make a verdict (policy.health),
telling the workers (control.health).
Source: Istio WorkloadGroup probe (readiness probes of Kubernetes: a status from 200 to 399, or SERVING, is success).
"""

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable, Iterable

from meshproxy.model.cluster import Cluster, HealthCheck
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints

_JITTER = 0.1
"""Share of the interval by which each pause varies, so that checks of many endpoints spread out."""
_HEAD_BYTES = 4096
MAX_AT_ONCE = 64
"""Checks under way at the same time; each holds a descriptor."""

OnResult = Callable[[str, str, HealthCheck, bool], None]
"""(cluster key, endpoint key, the check, whether it succeeded)."""


class HealthChecks:
    """One task per checked endpoint. Endpoints count as healthy until a check says otherwise: a restart of the control
    process must not empty the mesh."""

    def __init__(self, on_result: OnResult, draw: Callable[[], float] = random.random) -> None:
        self._on_result = on_result
        self._draw = draw
        self._tasks: dict[tuple[str, str, HealthCheck], asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(MAX_AT_ONCE)

    def follow(self, clusters: Iterable[tuple[Cluster, tuple[LocalityEndpoints, ...]]]) -> None:
        """Check the endpoints of these and no others from now on; clusters without a check are left out."""
        wanted = {
            (cluster.key, endpoint.key, cluster.health_check): endpoint
            for cluster, localities in clusters
            if cluster.health_check is not None
            for group in localities
            for endpoint in group.endpoints
        }
        for key in self._tasks.keys() - wanted.keys():
            self._tasks.pop(key).cancel()
        for key in wanted.keys() - self._tasks.keys():
            cluster_key, _, check = key
            job = self._keep_checking(cluster_key, wanted[key], check)
            self._tasks[key] = asyncio.get_running_loop().create_task(job)

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    async def _keep_checking(self, cluster_key: str, endpoint: Endpoint, check: HealthCheck) -> None:
        # The first checks spread over an interval (at most a second), the others keep that distance.
        await asyncio.sleep(check.initial_delay_s + min(1.0, check.interval_s) * self._draw())
        while True:
            async with self._room:
                is_success = await succeeds(check, endpoint)
            self._on_result(cluster_key, endpoint.key, check, is_success)
            await asyncio.sleep(check.interval_s * (1 + _JITTER * (2 * self._draw() - 1)))


async def succeeds(check: HealthCheck, endpoint: Endpoint) -> bool:
    """One check, over within its timeout. Any fault of the endpoint is a failure, none is an error."""
    try:
        async with asyncio.timeout(check.timeout_s):
            return await _ask(check, endpoint)
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):  # TimeoutError and SSLError are OSErrors
        return False


async def _ask(check: HealthCheck, endpoint: Endpoint) -> bool:
    if check.kind == "grpc":
        from meshproxy.control.grpc_check import is_serving

        return await is_serving(endpoint.address, check.port or endpoint.port, endpoint.address, check.service)
    context = _unverified() if check.kind == "http" and check.scheme.lower() == "https" else None
    if endpoint.address.startswith("/"):
        reader, writer = await asyncio.open_unix_connection(endpoint.address, limit=_HEAD_BYTES, ssl=context)
    else:
        reader, writer = await asyncio.open_connection(
            endpoint.address, check.port or endpoint.port, limit=_HEAD_BYTES, ssl=context
        )
    try:
        if check.kind != "http":
            return True
        writer.write(request_of(check, endpoint))
        return is_healthy_status(await reader.readline())
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            writer.transport.abort()


def request_of(check: HealthCheck, endpoint: Endpoint) -> bytes:
    """The probe's GET. A value that could not stand in one header line is left out."""
    host = check.host or endpoint.address
    headers = {"Host": host, "User-Agent": "meshproxy-health-check", "Connection": "close", "Accept": "*/*"}
    headers.update(check.headers)
    path = check.path if check.path.startswith("/") else "/" + check.path
    path = "".join(c if "!" <= c <= "~" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in path)
    lines = [f"GET {path} HTTP/1.1"]
    lines.extend(f"{name}: {value}" for name, value in headers.items() if not {"\r", "\n"} & set(name + value))
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def is_healthy_status(line: bytes) -> bool:
    """`HTTP/1.1 204 No Content` → True."""
    parts = line.split(None, 2)
    return len(parts) >= 2 and parts[0].startswith(b"HTTP/1.") and parts[1].isdigit() and 200 <= int(parts[1]) < 400


def _unverified() -> ssl.SSLContext:
    # As the kubelet: a probe asks whether the endpoint answers, not who it is.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
