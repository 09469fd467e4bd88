"""STRICT_DNS clusters: the names of their endpoints, resolved and kept fresh.

Decides: when to ask again, what an answer makes of a cluster's endpoints. Every address of a name is an endpoint; an
answer holds until a better one comes: a failing resolver changes nothing.
Leaves to others: the questions themselves (the system's resolver), what workers do with the answer.
Source: Envoy STRICT_DNS; dns_lookup_family V4_PREFERRED.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from meshproxy.model.address import is_ip
from meshproxy.model.cluster import Cluster, Discovery
from meshproxy.model.endpoint import LocalityEndpoints

_log = logging.getLogger(__name__)

REFRESH_S = 5.0
"""After an answer that changed something, and after a failure. Doubles up to MAX_REFRESH_S while nothing changes."""
MAX_REFRESH_S = 30.0
MAX_ADDRESSES = 256
"""Of one name; a resolver that answers with more must not grow us."""
_THREADS = 4
"""getaddrinfo blocks; this many names at once, the others queue."""

Resolve = Callable[[str], Awaitable[Sequence[str]]]


class DnsResolver:
    """Follows the STRICT_DNS clusters it is told of; `on_answer(key, localities)` when their endpoints change."""

    def __init__(
        self,
        on_answer: Callable[[str, tuple[LocalityEndpoints, ...]], None],
        resolve: Resolve | None = None,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._on_answer = on_answer
        self._resolve = resolve or self._ask_system
        self._refresh_s = refresh_s
        self._threads: ThreadPoolExecutor | None = None
        self._clusters: dict[str, Cluster] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._answers: dict[str, tuple[str, ...]] = {}
        self._failing: set[str] = set()
        self._outcomes: dict[str, asyncio.Event] = {}
        """Set once a name has been asked for, whatever came of it."""

    def follow(self, clusters: Iterable[Cluster]) -> None:
        """These and no others from now on; clusters of other kinds are left out."""
        before = self._clusters
        self._clusters = {cluster.key: cluster for cluster in clusters if cluster.discovery is Discovery.STRICT_DNS}
        wanted = {name for cluster in self._clusters.values() for name in names_of(cluster)}
        for name in self._tasks.keys() - wanted:
            self._tasks.pop(name).cancel()
            self._answers.pop(name, None)
            self._outcomes.pop(name, None)
            self._failing.discard(name)
        for name in wanted - self._tasks.keys():
            self._outcomes[name] = asyncio.Event()
            self._tasks[name] = asyncio.get_running_loop().create_task(self._keep_fresh(name))
        for key, cluster in self._clusters.items():
            if before.get(key) != cluster:
                self._answer(cluster)

    async def settled(self, timeout_s: float) -> None:
        """Once every name followed has been asked for, or after timeout_s seconds: a cluster whose first answer is on
        its way should not begin its life without endpoints."""
        try:
            async with asyncio.timeout(timeout_s):
                for outcome in list(self._outcomes.values()):
                    await outcome.wait()
        except TimeoutError:
            pass

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    async def _keep_fresh(self, name: str) -> None:
        pause_s = self._refresh_s
        while True:
            addresses = await self._look_up(name)
            if addresses is not None and addresses != self._answers.get(name):
                self._answers[name] = addresses
                pause_s = self._refresh_s
                for cluster in list(self._clusters.values()):
                    if name in names_of(cluster):
                        self._answer(cluster)
            elif addresses is None:
                pause_s = self._refresh_s
            else:
                pause_s = min(pause_s * 2, max(MAX_REFRESH_S, self._refresh_s))
            self._outcomes[name].set()
            await asyncio.sleep(pause_s)

    async def _look_up(self, name: str) -> tuple[str, ...] | None:
        """Sorted addresses; None where there is no answer, which is logged once until there is one."""
        try:
            addresses = tuple(sorted(set(await self._resolve(name)))[:MAX_ADDRESSES])
        except (OSError, UnicodeError) as error:
            if name not in self._failing:
                self._failing.add(name)
                kept = "the last answer stays" if name in self._answers else "it has no endpoints yet"
                _log.warning("cannot resolve %s: %s; %s", name, error, kept)
            return None
        self._failing.discard(name)
        return addresses

    def _answer(self, cluster: Cluster) -> None:
        if any(name in self._answers for name in names_of(cluster)) or not names_of(cluster):
            self._on_answer(cluster.key, with_addresses(cluster, self._answers))

    async def _ask_system(self, name: str) -> Sequence[str]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="dns")
        return await asyncio.get_running_loop().run_in_executor(self._threads, _getaddrinfo, name)


def names_of(cluster: Cluster) -> set[str]:
    """The endpoint addresses of a cluster that need resolving."""
    return {
        endpoint.address
        for group in cluster.localities
        for endpoint in group.endpoints
        if not endpoint.address.startswith("/") and not is_ip(endpoint.address)
    }


def with_addresses(cluster: Cluster, answers: dict[str, tuple[str, ...]]) -> tuple[LocalityEndpoints, ...]:
    """The cluster's endpoints with each name replaced by its addresses; names without an answer fall away."""
    localities = []
    for group in cluster.localities:
        endpoints = []
        for endpoint in group.endpoints:
            if endpoint.address.startswith("/") or is_ip(endpoint.address):
                endpoints.append(endpoint)
            else:
                endpoints.extend(replace(endpoint, address=ip) for ip in answers.get(endpoint.address, ()))
        localities.append(replace(group, endpoints=tuple(endpoints)))
    return tuple(localities)


def _getaddrinfo(name: str) -> Sequence[str]:
    """IPv4 addresses, or IPv6 ones where there are no others."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    by_family: dict[int, list[str]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, []).append(str(address[0]))
    return by_family.get(socket.AF_INET) or by_family.get(socket.AF_INET6) or []
