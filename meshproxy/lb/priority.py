"""How much traffic each priority takes, and whether it panics. All integers, truncating, as in Envoy.

Source: Envoy load_balancer_impl.cc (distributeLoad, recalculatePerPriorityState, recalculatePerPriorityPanic).
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """Of one priority: endpoints in all, healthy, degraded."""

    total: int
    healthy: int
    degraded: int = 0


@dataclass(frozen=True, slots=True)
class PriorityLoads:
    """Percent of all traffic by priority; healthy and degraded together add up to 100 (0 without any priority)."""

    healthy: tuple[int, ...]
    degraded: tuple[int, ...]
    panics: tuple[bool, ...]
    """A priority in panic balances over all its endpoints, ejected ones too."""


def priority_loads(
    shares: Sequence[Share], panic_threshold_percent: float = 50.0, overprovisioning_percent: int = 140
) -> PriorityLoads:
    """The loads by health; shares[0] is the first priority.

    Nobody available and no panic allowed (threshold 0): all goes to the first priority, where a pick finds nobody.
    """
    if not shares:
        return PriorityLoads((), (), ())
    health = [_availability(share.healthy, share.total, overprovisioning_percent) for share in shares]
    degraded = [_availability(share.degraded, share.total, overprovisioning_percent) for share in shares]
    normalized = min(100, sum(health) + sum(degraded))
    healthy_load = [0] * len(shares)
    degraded_load = [0] * len(shares)
    if normalized > 0:
        left = 100
        for index, value in enumerate(health):
            healthy_load[index] = min(left, value * 100 // normalized)
            left -= healthy_load[index]
        for index, value in enumerate(degraded):
            degraded_load[index] = min(left, value * 100 // normalized)
            left -= degraded_load[index]
        if left:  # what truncation lost goes to the first that can take anything
            first = next((index for index, value in enumerate(health) if value), None)
            if first is not None:
                healthy_load[first] += left
            else:
                degraded_load[next(index for index, value in enumerate(degraded) if value)] += left
    elif panic_threshold_percent <= 0:
        healthy_load[0] = 100
    panics = [
        normalized < 100
        and share.total > 0
        and 100.0 * (share.healthy + share.degraded) / share.total < panic_threshold_percent
        for share in shares
    ]
    populated = [index for index, share in enumerate(shares) if share.total]
    if populated and all(panics[index] for index in populated):
        # Total panic: traffic follows the number of endpoints, not their health.
        total = sum(share.total for share in shares)
        healthy_load = [100 * share.total // total for share in shares]
        healthy_load[populated[0]] += 100 - sum(healthy_load)
        degraded_load = [0] * len(shares)
    elif not populated:
        healthy_load[0] = 100
    return PriorityLoads(tuple(healthy_load), tuple(degraded_load), tuple(panics))


def _availability(count: int, total: int, overprovisioning_percent: int) -> int:
    return min(100, overprovisioning_percent * count // total) if total else 0
