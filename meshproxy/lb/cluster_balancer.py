"""The balancer of one cluster: priority, then locality, then the cluster's policy.

Decides: which endpoint, given everyone's health. Leaves to others: health itself, connections, retries.
Source: Envoy LoadBalancerBase::choosePriority, ZoneAwareLoadBalancerBase (locality weighted), panic mode.

`pick` is an attribute: for a cluster with one priority and one locality to choose from it *is* the policy's own bound
method, so the plain case costs one call.
"""

from collections.abc import Callable, Container, Sequence

from meshproxy.lb.balancer import EndpointState, Policy
from meshproxy.lb.catalog import make_policy
from meshproxy.lb.edf import EdfScheduler
from meshproxy.lb.locality import effective_weight
from meshproxy.lb.priority import PriorityLoads, Share, priority_loads
from meshproxy.model.cluster import LbPolicy
from meshproxy.model.endpoint import Locality

Group = tuple[int, Locality, int | None, Sequence[EndpointState]]
"""(priority, locality, locality weight or None, endpoints)."""
Pick = Callable[[float], EndpointState | None]


def _nobody(now: float) -> EndpointState | None:
    return None


class _Chooser:
    """Localities of one priority in one state (healthy, degraded, or everyone in panic), by effective weight."""

    __slots__ = ("pick", "scheduler")

    def __init__(self, weighted: list[tuple[Policy, float]], draw: Callable[[], float]) -> None:
        if not weighted:
            self.pick: Pick = _nobody
        elif len(weighted) == 1:
            self.pick = weighted[0][0].pick
        else:
            self.scheduler = EdfScheduler([((policy, weight), weight) for policy, weight in weighted], draw())
            self.pick = self._pick

    def _pick(self, now: float) -> EndpointState | None:
        policy, weight = self.scheduler.peek()
        self.scheduler.advance(weight)
        return policy.pick(now)


class ClusterBalancer:
    __slots__ = ("_choosers", "_draw", "_groups", "_lb", "_policies", "loads", "pick")

    def __init__(self, lb: LbPolicy, groups: Sequence[Group], draw: Callable[[], float], now: float) -> None:
        self._draw = draw
        self._policies: dict[tuple[int, Locality | None, str], Policy] = {}
        self._choosers: list[tuple[int, Pick]] = []
        self._lb = lb
        self._groups: Sequence[Group] = ()
        self.loads = PriorityLoads((), (), ())
        self.pick: Pick = _nobody
        self.update(lb, groups, now)

    def update(self, lb: LbPolicy, groups: Sequence[Group], now: float) -> None:
        """Other endpoints, weights or policy. Policies keep their place where priority and locality are the same."""
        if (lb.kind, lb.slow_start) != (self._lb.kind, self._lb.slow_start):
            self._policies.clear()
        self._lb = lb
        self._groups = groups
        self.recompute(now)

    def recompute(self, now: float) -> None:
        """Someone's health changed: O(endpoints), and nothing is paid per pick."""
        by_priority: dict[int, list[Group]] = {}
        for group in self._groups:
            by_priority.setdefault(group[0], []).append(group)
        priorities = [by_priority[priority] for priority in sorted(by_priority)]
        sorted_out = [[_by_health(group[3]) for group in groups] for groups in priorities]
        shares = [
            Share(
                sum(len(group[3]) for group in groups),
                sum(len(healthy) for healthy, _ in found),
                sum(len(degraded) for _, degraded in found),
            )
            for groups, found in zip(priorities, sorted_out, strict=True)
        ]
        loads = self.loads = priority_loads(
            shares, self._lb.panic_threshold_percent, self._lb.overprovisioning_factor_percent
        )
        used: dict[tuple[int, Locality | None, str], Policy] = {}
        choosers: list[tuple[int, Pick]] = []
        late: list[tuple[int, Pick]] = []
        so_far = 0
        for index, (groups, found) in enumerate(zip(priorities, sorted_out, strict=True)):
            if loads.healthy[index]:
                lists = [group[3] for group in groups] if loads.panics[index] else [healthy for healthy, _ in found]
                state = "panic" if loads.panics[index] else "healthy"
                choosers.append((loads.healthy[index], self._chooser(index, groups, lists, state, used, now)))
            if loads.degraded[index]:
                lists = [degraded for _, degraded in found]
                late.append((loads.degraded[index], self._chooser(index, groups, lists, "degraded", used, now)))
        self._policies = used
        self._choosers = []
        for load, pick in (*choosers, *late):  # Envoy: cumulative over healthy loads first, then degraded
            so_far += load
            self._choosers.append((so_far, pick))
        if not self._choosers:
            self.pick = _nobody
        elif len(self._choosers) == 1:
            self.pick = self._choosers[0][1]
        else:
            self.pick = self._pick

    def _chooser(
        self,
        priority: int,
        groups: Sequence[Group],
        lists: Sequence[Sequence[EndpointState]],
        state: str,
        used: dict[tuple[int, Locality | None, str], Policy],
        now: float,
    ) -> Pick:
        if not self._lb.is_locality_weighted:
            if len(lists) == 1:
                together = lists[0]
            else:
                together = [endpoint for endpoints in lists for endpoint in endpoints]
            return self._policy((priority, None, state), together, used, now).pick
        weighted: list[tuple[Policy, float]] = []
        for group, endpoints in zip(groups, lists, strict=True):
            available = len(group[3]) if state == "panic" else len(endpoints)
            weight = effective_weight(
                group[2] if group[2] is not None else 1,
                available,
                len(group[3]),
                self._lb.overprovisioning_factor_percent,
            )
            if weight > 0:
                weighted.append((self._policy((priority, group[1], state), endpoints, used, now), weight))
        return _Chooser(weighted, self._draw).pick

    def _policy(
        self,
        key: tuple[int, Locality | None, str],
        endpoints: Sequence[EndpointState],
        used: dict[tuple[int, Locality | None, str], Policy],
        now: float,
    ) -> Policy:
        policy = used[key] = self._policies.get(key) or make_policy(self._lb, self._draw)
        policy.update(endpoints, now)
        return policy

    def _pick(self, now: float) -> EndpointState | None:
        point = int(self._draw() * 100) + 1
        for bound, pick in self._choosers:
            if bound >= point:
                return pick(now)
        return self._choosers[-1][1](now)

    def pick_avoiding(self, now: float, avoid: Container[EndpointState], tries: int = 5) -> EndpointState | None:
        """As pick, but not one of `avoid` if `tries` more draws help (Envoy host_selection_retry_max_attempts)."""
        endpoint = self.pick(now)
        while endpoint is not None and tries and endpoint in avoid:
            tries -= 1
            endpoint = self.pick(now)
        return endpoint


def _by_health(endpoints: Sequence[EndpointState]) -> tuple[Sequence[EndpointState], Sequence[EndpointState]]:
    """(healthy, degraded). The whole list as it is where everyone is well: the usual case, and no copy."""
    if not any(e.is_ejected or e.is_unhealthy or e.is_degraded for e in endpoints):
        return endpoints, ()
    available = [e for e in endpoints if not (e.is_ejected or e.is_unhealthy)]
    return [e for e in available if not e.is_degraded], [e for e in available if e.is_degraded]
