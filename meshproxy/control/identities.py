"""The workloads' certificates, from the files to the workers.

Decides: when the files are looked at, what is told to the operator.
Leaves to others: whether certificates are good (control.certificates), handshakes (the workers).
"""

import asyncio
import logging
from collections.abc import Callable, Iterable

from meshproxy.control.certificates import CertificateStore
from meshproxy.control.messages import PutCertificates
from meshproxy.discovery.watch import PathWatch
from meshproxy.errors import ConfigError
from meshproxy.model.workload import Workload
from meshproxy.telemetry.process_state import CertificateInfo

_log = logging.getLogger(__name__)

PENDING_S = 0.5
"""Between looks at files that do not fit together yet."""
EXPIRY_CHECK_S = 60.0
_SHOUT_AFTER_LOOKS = 3
"""A rotation that is half done is worth no line; one that stays half done is."""


class Identities:
    """Follows the certificate directory for the workloads it is told of; `put` when a workload's are new and good."""

    def __init__(self, directory: str, put: Callable[[PutCertificates], None], loop: asyncio.AbstractEventLoop) -> None:
        self._store = CertificateStore(directory)
        self._put = put
        self._workloads: dict[str, Workload] = {}
        self._logged: dict[str, str] = {}
        self._looks: dict[str, int] = {}
        self._watch = PathWatch([directory], self._look, loop)
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._watch.start()
        self._look_later()

    @property
    def problems(self) -> list[str]:
        """One sentence for each workload whose files are not good as they are."""
        return sorted(self._store.problems.values())

    def describe(self) -> list[CertificateInfo]:
        return self._store.describe()

    def follow(self, workloads: Iterable[Workload]) -> None:
        """These and no others; certificates of those that are new or have another identity are put at once."""
        now = {workload.id: workload for workload in workloads}
        for gone in self._workloads.keys() - now.keys():
            self._store.forget(gone)
            self._logged.pop(gone, None)
        for name, workload in now.items():
            if self._workloads.get(name) == workload:
                continue
            try:
                self._put(self._store.load(workload))
            except ConfigError as error:
                self._log_once(name, f"{error}; workload {name} has no certificate yet")
        self._workloads = now
        self._come_back_if_pending()

    def close(self) -> None:
        self._watch.close()
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        for message in self._store.refresh():
            self._put(message)
            _log.info("workload %s: new certificate in use", message.workload_id)
        problems = self._store.problems
        for name, sentence in problems.items():
            self._looks[name] = self._looks.get(name, 0) + 1
            if self._looks[name] >= _SHOUT_AFTER_LOOKS:
                self._log_once(name, f"{sentence}; what was in use stays in use")
        for name in self._logged.keys() - problems.keys():
            del self._logged[name]
        self._looks = {name: looks for name, looks in self._looks.items() if name in problems}
        self._come_back_if_pending()

    def _come_back_if_pending(self) -> None:
        if self._store.pending:
            # Ever slower: a directory that stays empty for days is not worth two looks a second.
            looks = min(max(self._looks.values(), default=0), 7)
            self._watch.look_again(PENDING_S * 2.0**looks)

    def _look_later(self) -> None:
        """Now and then without any event: certificates expire by themselves."""
        self._timer = self._loop.call_later(EXPIRY_CHECK_S, self._look_later)
        if self._workloads:
            self._look()

    def _log_once(self, name: str, sentence: str) -> None:
        if self._logged.get(name) != sentence:
            self._logged[name] = sentence
            _log.warning("%s", sentence)
