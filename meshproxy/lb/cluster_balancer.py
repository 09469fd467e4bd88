"""The balancer of one cluster: priority, then locality, then the cluster's policy.

Decides: which endpoint, given everyone's health. Leaves to others: health itself, connections, retries.
Source: Envoy load_balancer_impl.cc (choosePriority, hostSourceToUse: panic comes before localities).
"""

from collections.abc import Callable, Container, Sequence

from meshproxy.lb.balancer import EndpointState, Policy
from meshproxy.lb.catalog import make_policy
from meshproxy.lb.locality import LocalityChoice, Pick, effective_weight
from meshproxy.lb.priority import PriorityLoads, Share, priority_loads
from meshproxy.model.cluster import LbPolicy
from meshproxy.model.endpoint import Locality

Group = tuple[int, Locality, int | None, Sequence[EndpointState]]
"""(priority, locality, locality weight or None, endpoints)."""
_Place = tuple[int, Locality | None, str]
"""(priority, locality or None for all of them, healthy | degraded | all): what one policy chooses among."""


def _nobody(now: float) -> EndpointState | None:
    return None


def _ignore() -> None:
    pass


class ClusterBalancer:
    """`pick(now)` gives an endpoint, or None where nobody can serve.

    pick is an attribute: for a cluster with one priority and one locality to choose from it *is* the policy's own bound
    method, so the plain case costs one call. Read it anew for each request: health changes replace it.
    """

    __slots__ = ("_choices", "_draw", "_groups", "_lb", "_localities", "_policies", "loads", "on_panic_pick", "pick")

    def __init__(self, lb: LbPolicy, groups: Sequence[Group], draw: Callable[[], float], now: float) -> None:
        """draw: uniform in [0, 1)."""
        self._draw = draw
        self._policies: dict[_Place, Policy] = {}
        self._localities: dict[_Place, LocalityChoice] = {}
        self._choices: list[tuple[int, Pick]] = []
        """(cumulative percent of traffic, where it goes)."""
        self._lb = lb
        self._groups: list[list[Group]] = []
        """By priority, highest first."""
        self.loads = PriorityLoads((), (), ())
        self.pick: Pick = _nobody
        self.on_panic_pick: Callable[[], None] = _ignore
        """Called for each pick made among all endpoints because too few were healthy."""
        self.update(lb, groups, now)

    def update(self, lb: LbPolicy, groups: Sequence[Group], now: float) -> None:
        """Other endpoints, weights or policy. Turns are kept where priority, locality and policy stay the same."""
        if (lb.kind, lb.slow_start) != (self._lb.kind, self._lb.slow_start):
            self._policies.clear()
        self._lb = lb
        by_priority: dict[int, dict[Locality, Group]] = {}
        for priority, locality, weight, endpoints in groups:
            peers = by_priority.setdefault(priority, {})
            same = peers.get(locality)
            if same is not None:  # a locality in two pieces is one locality
                weight = None if weight is None and same[2] is None else (weight or 0) + (same[2] or 0)
                endpoints = [*same[3], *endpoints]
            peers[locality] = (priority, locality, weight, endpoints)
        self._groups = [list(by_priority[priority].values()) for priority in sorted(by_priority)]
        self.recompute(now)

    def recompute(self, now: float) -> None:
        """Someone's health changed. O(endpoints): 10,000 cost 1 ms (3 where weights differ), and no pick pays."""
        by_health = [[_by_health(group[3]) for group in groups] for groups in self._groups]
        shares = [
            Share(
                sum([len(group[3]) for group in groups]),
                sum([len(healthy) for healthy, _ in found]),
                sum([len(degraded) for _, degraded in found]),
            )
            for groups, found in zip(self._groups, by_health, strict=True)
        ]
        lb = self._lb
        loads = self.loads = priority_loads(shares, lb.panic_threshold_percent, lb.overprovisioning_factor_percent)
        policies: dict[_Place, Policy] = {}
        localities: dict[_Place, LocalityChoice] = {}
        choices: list[tuple[int, Pick]] = []
        so_far = 0
        # A draw meets the healthy loads of all priorities first, then the degraded ones.
        for which, percents in ((0, loads.healthy), (1, loads.degraded)):
            for groups, found, percent, panics in zip(self._groups, by_health, percents, loads.panics, strict=True):
                if not percent:
                    continue
                # In panic: everyone, and no locality is preferred.
                lists = [group[3] for group in groups] if panics else [pair[which] for pair in found]
                state = "all" if panics else ("healthy", "degraded")[which]
                so_far += percent
                choice = self._choice(groups, lists, state, policies, localities, now)
                choices.append((so_far, self._counted(choice) if panics else choice))
        self._policies, self._localities, self._choices = policies, localities, choices
        if len(choices) > 1:
            self.pick = self._pick
        else:
            self.pick = choices[0][1] if choices else _nobody

    def _choice(
        self,
        groups: Sequence[Group],
        lists: Sequence[Sequence[EndpointState]],
        state: str,
        policies: dict[_Place, Policy],
        localities: dict[_Place, LocalityChoice],
        now: float,
    ) -> Pick:
        """The pick of one priority: by locality where that is asked for and one can take anything, else of them all."""
        priority = groups[0][0]
        if self._lb.is_locality_weighted and state != "all":
            factor = self._lb.overprovisioning_factor_percent
            weighted: list[tuple[Pick, float]] = []
            for (_, locality, weight, everyone), endpoints in zip(groups, lists, strict=True):
                effective = effective_weight(1 if weight is None else weight, len(endpoints), len(everyone), factor)
                if effective > 0:
                    policy = self._policy((priority, locality, state), endpoints, policies, now)
                    weighted.append((policy.pick, effective))
            if len(weighted) == 1:
                return weighted[0][0]
            if weighted:
                place = (priority, None, state)
                choice = localities[place] = self._localities.get(place) or LocalityChoice()
                choice.update(weighted, self._draw())
                return choice.pick
        everyone = lists[0] if len(lists) == 1 else [endpoint for endpoints in lists for endpoint in endpoints]
        return self._policy((priority, None, state), everyone, policies, now).pick

    def _counted(self, pick: Pick) -> Pick:
        def counted(now: float) -> EndpointState | None:
            self.on_panic_pick()
            return pick(now)

        return counted

    def _policy(
        self, place: _Place, endpoints: Sequence[EndpointState], policies: dict[_Place, Policy], now: float
    ) -> Policy:
        policy = policies[place] = self._policies.get(place) or make_policy(self._lb, self._draw)
        policy.update(endpoints, now)
        return policy

    def _pick(self, now: float) -> EndpointState | None:
        point = self._draw() * 100
        for bound, pick in self._choices:
            if point < bound:
                return pick(now)
        raise AssertionError("loads add up to 100")

    def pick_avoiding(self, now: float, avoid: Container[EndpointState], tries: int = 5) -> EndpointState | None:
        """As pick, for a retry: someone else than `avoid` if there is anybody else who could serve.

        After `tries` more draws (Envoy host_selection_retry_max_attempts) Envoy takes whom it got. Here the rest is
        looked through once: an idle, broken endpoint is the least busy one, and would be drawn again and again.
        """
        endpoint = self.pick(now)
        while endpoint is not None and endpoint in avoid:
            if not tries:
                return self._anyone_but(avoid) or endpoint
            tries -= 1
            endpoint = self.pick(now)
        return endpoint

    def _anyone_but(self, avoid: Container[EndpointState]) -> EndpointState | None:
        """Any available endpoint not in `avoid` of the first priority that has one; None where there is none."""
        for groups in self._groups:
            others = [
                endpoint
                for _, _, weight, endpoints in groups
                if weight != 0 or not self._lb.is_locality_weighted
                for endpoint in endpoints
                if endpoint not in avoid and not (endpoint.is_ejected or endpoint.is_unhealthy)
            ]
            if others:
                return others[int(self._draw() * len(others))]
        return None


def _by_health(endpoints: Sequence[EndpointState]) -> tuple[Sequence[EndpointState], Sequence[EndpointState]]:
    """(healthy, degraded). The whole list as it is where everyone is well: the usual case, and no copy."""
    impaired = [e for e in endpoints if e.is_ejected or e.is_unhealthy or e.is_degraded]
    if not impaired:
        return endpoints, ()
    degraded = [e for e in impaired if not (e.is_ejected or e.is_unhealthy)]
    return [e for e in endpoints if not (e.is_ejected or e.is_unhealthy or e.is_degraded)], degraded
