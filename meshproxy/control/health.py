"""Who is healthy: the one judge of all workers' results and of the active checks.

Decides nothing by itself: policy.outlier and policy.health do. Owns their state, one detector per cluster that ever had
a failure, the sweeps, and telling every worker. Because all results meet here, five failures spread over two workers
eject as five failures of one do; a verdict is in every worker within a fraction of a millisecond.

A detector is made with the first report of its cluster: a thousand clusters in good health cost nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable

from meshproxy.control.health_checks import HealthChecks
from meshproxy.control.messages import Health, IntervalCounts, Results
from meshproxy.model.cluster import Cluster, HealthCheck
from meshproxy.model.endpoint import LocalityEndpoints
from meshproxy.policy.health import CheckState
from meshproxy.policy.outlier import OutlierDetector, Verdict
from meshproxy.snapshot.snapshot import EMPTY_SNAPSHOT, Snapshot

_log = logging.getLogger(__name__)

_PAST = {"restore": "restored"}
LocalitiesOf = Callable[[Cluster], tuple[LocalityEndpoints, ...]]


class EndpointHealth:
    """send: tells all workers. localities_of: a cluster's endpoints, DNS answers included."""

    def __init__(
        self, send: Callable[[Health], None], localities_of: LocalitiesOf, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._send = send
        self._localities_of = localities_of
        self._loop = loop
        self._snapshot: Snapshot = EMPTY_SNAPSHOT
        self._detectors: dict[str, OutlierDetector] = {}
        self._sweeps: dict[str, asyncio.TimerHandle] = {}
        self._checks = HealthChecks(self._on_check)
        self._standing: dict[tuple[str, str], CheckState] = {}
        self.ejections: dict[str, int] = {}
        """Cluster name → ejections since the start."""

    def follow(self, snapshot: Snapshot) -> None:
        """Another snapshot: endpoints that stay keep their counts and verdicts."""
        self._snapshot = snapshot
        for key in list(self._detectors):
            self._follow_cluster(key)
        self._follow_checks()

    def _follow_checks(self) -> None:
        snapshot = self._snapshot
        self._checks.follow((cluster, self._localities_of(cluster)) for cluster in snapshot.clusters.values())
        checked = {
            (cluster.key, endpoint.key)
            for cluster in snapshot.clusters.values()
            if cluster.health_check is not None
            for group in self._localities_of(cluster)
            for endpoint in group.endpoints
        }
        no_longer = [place for place in self._standing if place not in checked]
        # A check that is gone takes its verdict with it: an endpoint must not stay out with nobody to bring it back.
        self._tell(
            (cluster, endpoint, "healthy")
            for cluster, endpoint in no_longer
            if not self._standing[cluster, endpoint].is_healthy
        )
        for place in no_longer:
            del self._standing[place]

    def resolved(self, cluster_key: str) -> None:
        """DNS gave a cluster other endpoints."""
        if cluster_key in self._detectors:
            self._follow_cluster(cluster_key)
        cluster = self._snapshot.clusters.get(cluster_key)
        if cluster is not None and cluster.health_check is not None:
            self._follow_checks()

    def now(self) -> tuple[tuple[str, str, str], ...]:
        """Every verdict that holds, for a worker that is new."""
        verdicts = [
            (cluster, verdict.key, verdict.word)
            for cluster, detector in self._detectors.items()
            for verdict in detector.standing()
        ]
        verdicts += [(*place, "unhealthy") for place, state in self._standing.items() if not state.is_healthy]
        return tuple(verdicts)

    def by_cluster(self) -> dict[str, dict[str, str]]:
        """Cluster key → endpoint key → ejected | unhealthy."""
        found: dict[str, dict[str, str]] = {}
        for cluster, endpoint, word in self.now():
            if word != "suspect":
                found.setdefault(cluster, {})[endpoint] = "ejected" if word == "eject" else word
        return found

    def on_results(self, results: Results) -> None:
        now = self._loop.time()
        verdicts: list[tuple[str, str, str]] = []
        for cluster_key, endpoint_key, code in results.events:
            detector = self._detectors.get(cluster_key) or self._detector(cluster_key, now)
            if detector is not None:
                found = detector.on_result(endpoint_key, code, now)
                verdicts.extend((cluster_key, verdict.key, verdict.word) for verdict in found)
        self._tell(verdicts)

    def on_counts(self, counts: IntervalCounts) -> None:
        now = self._loop.time()
        for cluster_key, endpoint_key, requests, successes in counts.counts:
            detector = self._detectors.get(cluster_key) or self._detector(cluster_key, now)
            if detector is not None:
                detector.on_counts(endpoint_key, requests, successes)

    def close(self) -> None:
        self._checks.close()
        for sweep in self._sweeps.values():
            sweep.cancel()
        self._sweeps.clear()

    def _endpoint_keys(self, cluster: Cluster) -> list[str]:
        return [endpoint.key for group in self._localities_of(cluster) for endpoint in group.endpoints]

    def _detector(self, cluster_key: str, now: float) -> OutlierDetector | None:
        cluster = self._snapshot.clusters.get(cluster_key)
        if cluster is None or cluster.outlier is None:
            return None
        detector = OutlierDetector(cluster.outlier, self._endpoint_keys(cluster), now)
        self._detectors[cluster_key] = detector
        self._sweep_later(cluster_key, cluster.outlier.interval_s)
        return detector

    def _follow_cluster(self, key: str) -> None:
        cluster = self._snapshot.clusters.get(key)
        detector = self._detectors[key]
        now = self._loop.time()
        if cluster is None or cluster.outlier is None:
            del self._detectors[key]
            self._sweeps.pop(key).cancel()
            if cluster is not None:
                self._tell_cluster(key, detector.restore_all(now))
            return
        self._tell_cluster(key, detector.update(cluster.outlier, self._endpoint_keys(cluster), now))

    def _sweep_later(self, cluster_key: str, interval_s: float) -> None:
        self._sweeps[cluster_key] = self._loop.call_later(interval_s, self._sweep, cluster_key)

    def _sweep(self, cluster_key: str) -> None:
        self._tell_cluster(cluster_key, self._detectors[cluster_key].sweep(self._loop.time()))
        outlier = self._snapshot.clusters[cluster_key].outlier
        assert outlier is not None  # follow() drops the detector and its sweep together with the policy
        self._sweep_later(cluster_key, outlier.interval_s)

    def _on_check(self, cluster_key: str, endpoint_key: str, check: HealthCheck, is_success: bool) -> None:
        place = (cluster_key, endpoint_key)
        state = self._standing.get(place)
        if state is None:
            state = self._standing[place] = CheckState(check)
        word = state.on_check(is_success)
        if word is not None:
            self._tell([(cluster_key, endpoint_key, word)])
        detector = self._detectors.get(cluster_key)
        if detector is not None and is_success:
            self._tell_cluster(cluster_key, detector.on_active_check(endpoint_key, True, self._loop.time()))

    def _tell_cluster(self, cluster_key: str, verdicts: Iterable[Verdict]) -> None:
        self._tell((cluster_key, verdict.key, verdict.word) for verdict in verdicts)

    def _tell(self, verdicts: Iterable[tuple[str, str, str]]) -> None:
        told = tuple(verdicts)
        for cluster_key, endpoint_key, word in told:
            if word == "eject":
                name = self._snapshot.clusters[cluster_key].name
                self.ejections[name] = self.ejections.get(name, 0) + 1
                _log.info("%s of %s is ejected", endpoint_key, name)
            elif word in ("unhealthy", "healthy", "restore"):
                _log.info("%s of %s is %s", endpoint_key, cluster_key, _PAST.get(word, word))
        if told:
            self._send(Health(told))
