"""Istio's policy names and the classes behind them; the one file that knows them all.

PASSTHROUGH has no endpoints to choose from; should a cluster have some all the same, any of them serves.
"""

from collections.abc import Callable

from meshproxy.lb.balancer import Policy
from meshproxy.lb.least_request import LeastRequest
from meshproxy.lb.round_robin import RoundRobin
from meshproxy.lb.uniform import Uniform
from meshproxy.model.cluster import LbKind, LbPolicy

POLICIES: dict[LbKind, type[LeastRequest] | type[RoundRobin] | type[Uniform]] = {
    LbKind.LEAST_REQUEST: LeastRequest,
    LbKind.ROUND_ROBIN: RoundRobin,
    LbKind.RANDOM: Uniform,
    LbKind.PASSTHROUGH: Uniform,
}


def make_policy(lb: LbPolicy, draw: Callable[[], float]) -> Policy:
    return POLICIES[lb.kind](draw, lb.slow_start)
