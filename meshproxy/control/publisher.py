"""From a change of resources to a snapshot in effect.

Decides: when to translate (bursts are one change), which listeners can be had, what is told to the operator.
Leaves to others: the meaning (snapshot.translate), the workers (control.fleet).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from time import perf_counter

from meshproxy.control.fleet import Fleet
from meshproxy.control.sockets import ListeningSockets
from meshproxy.control.store import ResourceStore
from meshproxy.resources.document import Resource
from meshproxy.resources.problems import ConfigProblem, Severity
from meshproxy.snapshot.snapshot import EMPTY_SNAPSHOT, Snapshot
from meshproxy.snapshot.translate import ProxyContext, translate
from meshproxy.telemetry.process_state import ControlCounters

_log = logging.getLogger(__name__)

DEBOUNCE_S = 0.02
_THREAD_ABOVE_RESOURCES = 200
"""Translating more than this takes longer than a scrape should wait."""
_SECURITY_KINDS = frozenset({"PeerAuthentication", "AuthorizationPolicy", "RequestAuthentication"})
_BIND_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)


class Publisher:
    """`snapshot` is what the workers are told; `problems` is what is wrong with what the operator wrote."""

    def __init__(
        self,
        store: ResourceStore,
        context: ProxyContext,
        sockets: ListeningSockets,
        fleet: Fleet,
        counters: ControlCounters,
        on_publishing: Callable[[Snapshot], Awaitable[None]],
        on_published: Callable[[Snapshot], None],
    ) -> None:
        """on_publishing is awaited before the workers hear of a snapshot, on_published called after."""
        self._store = store
        self._context = context
        self._sockets = sockets
        self._fleet = fleet
        self._counters = counters
        self._on_publishing = on_publishing
        self._on_published = on_published
        self._due = asyncio.Event()
        self._logged: frozenset[str] = frozenset()
        self._translated: Snapshot | None = None
        self._bind_tries = 0
        self._is_stopped = False
        self.problems: list[ConfigProblem] = []
        self.bind_failures: dict[str, str] = {}
        """Listener name → one sentence, for those that are not up."""
        self.on_failed_start: Callable[[str], None] | None = None
        """Set by a process that would rather not start than start without a listener: called with one sentence, once,
        instead of publishing. After the first snapshot a listener that cannot be had is only tried again."""
        self._noticed_at = 0.0
        """Monotonic seconds: when the change now on its way was noticed; 0.0: none is."""

    @property
    def snapshot(self) -> Snapshot:
        return self._fleet.current

    def changed(self) -> None:
        """Something changed: publish after a moment in which more may change."""
        self._noticed_at = self._noticed_at or perf_counter()
        self._due.set()

    def in_effect(self) -> None:
        """Every worker routes by the current snapshot."""
        if self._noticed_at and not self._due.is_set():
            self._counters.reload_duration_s = perf_counter() - self._noticed_at
            self._noticed_at = 0.0

    def stop(self) -> None:
        """Draining: listeners stay closed whatever the files say from now on."""
        self._is_stopped = True

    async def run(self) -> None:
        while True:
            await self._due.wait()
            await asyncio.sleep(DEBOUNCE_S)
            await self.publish()

    async def publish(self) -> None:
        """Translate and send now. A failure of ours is logged with its traceback and changes nothing in effect."""
        self._due.clear()
        if self._is_stopped:
            return
        started = perf_counter()
        try:
            resources = self._store.resources()
            previous = self._translated
            if len(resources) > _THREAD_ABOVE_RESOURCES:
                translated, problems = await asyncio.to_thread(translate, resources, self._context, previous)
            else:
                translated, problems = translate(resources, self._context, previous)
        except Exception:
            self._counters.reloads_rejected += 1
            _log.exception("translating the configuration failed; the previous one stays in effect")
            return
        took_s = perf_counter() - started
        self._translated = translated
        self.problems = [*self._store.problems(), *problems]
        self._log_problems()
        unenforced = self._unenforced(resources)
        if unenforced is not None:
            self._counters.reloads_rejected += 1
            if self.on_failed_start is not None:
                self.on_failed_start(f"{unenforced}; refusing to serve without this policy")
            else:
                _log.error(
                    "%s; the previous configuration stays in effect, as without this policy traffic would pass",
                    unenforced,
                )
            return
        if any(problem.severity is Severity.ERROR for problem in self.problems):
            self._counters.reloads_rejected += 1
        else:
            self._counters.reloads_applied += 1
        await self._send(translated, took_s)

    async def _send(self, translated: Snapshot, took_s: float) -> None:
        wanted = {listener.socket_address for listener in translated.listeners.values()}
        before = self._fleet.current
        snapshot = self._with_bound_listeners(translated)
        if self.bind_failures and self.on_failed_start is not None:
            self.on_failed_start(next(iter(self.bind_failures.values())))
            return
        self.on_failed_start = None
        if before is EMPTY_SNAPSHOT or snapshot != before:
            await self._on_publishing(snapshot)
            if self._is_stopped:
                return
            self._fleet.publish(snapshot)
            self._counters.published_at = time.time()
            _log.info(
                "snapshot %s: %d listeners, %d clusters, translated in %.1f ms",
                snapshot.version,
                len(snapshot.listeners),
                len(snapshot.clusters),
                took_s * 1000,
            )
        else:
            self._noticed_at = 0.0
        for address in self._sockets.addresses - wanted:
            self._sockets.close(address)
        self._on_published(snapshot)

    def _with_bound_listeners(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot without the listeners that cannot be had now; they are tried again later."""
        failures: dict[str, str] = {}
        for name, listener in snapshot.listeners.items():
            why_not = self._sockets.bind(listener.socket_address, is_quic=listener.is_quic)
            if why_not is not None:
                failures[name] = why_not
                if self.bind_failures.get(name) != why_not and self.on_failed_start is None:
                    _log.error("%s", why_not)
        self.bind_failures = failures
        if not failures:
            self._bind_tries = 0
            return snapshot
        pause_s = _BIND_RETRY_S[min(self._bind_tries, len(_BIND_RETRY_S) - 1)]
        self._bind_tries += 1
        asyncio.get_running_loop().call_later(pause_s, self.changed)
        bound = {name: listener for name, listener in snapshot.listeners.items() if name not in failures}
        return replace(snapshot, listeners=bound, version=f"{snapshot.version}-{len(failures)}-unbound")

    def _unenforced(self, resources: Sequence[Resource]) -> str | None:
        """The sentence of a security policy that was refused and has no last good version. Leaving it out would let
        pass what it forbids, so nothing is published then (policy fails closed)."""
        known = {resource.label for resource in resources}
        for problem in self._store.problems():
            kind = problem.resource.partition(" ")[0]
            if problem.severity is Severity.ERROR and kind in _SECURITY_KINDS and problem.resource not in known:
                return problem.sentence()
        return None

    def _log_problems(self) -> None:
        """Each sentence once, until it is gone and comes back."""
        sentences = {problem.sentence(): problem.severity for problem in self.problems}
        for sentence, severity in sentences.items():
            if sentence not in self._logged:
                _log.log(logging.ERROR if severity is Severity.ERROR else logging.WARNING, "%s", sentence)
        self._logged = frozenset(sentences)
