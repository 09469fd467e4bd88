"""Endpoints of a cluster → localities with priorities and weights.

Decides: which localities a proxy's traffic goes to first, and in what shares. Leaves to others: what happens when
hosts fail (lb), the cluster's policy as a whole (clusters).
Source: Istio localityLbSetting; istio pilot/pkg/networking/core/loadbalancer/loadbalancer.go.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshproxy.model.endpoint import Endpoint, Locality, LocalityEndpoints

NETWORK_LABEL = "topology.istio.io/network"
REGION_LABEL = "topology.kubernetes.io/region"
ZONE_LABEL = "topology.kubernetes.io/zone"
SUBZONE_LABEL = "topology.istio.io/subzone"
HOSTNAME_LABEL = "kubernetes.io/hostname"

_SAME_ZONE = (NETWORK_LABEL, REGION_LABEL, ZONE_LABEL)
TRAFFIC_DISTRIBUTION: Mapping[str, tuple[str, ...]] = {
    "PreferSameZone": _SAME_ZONE,
    "PreferClose": _SAME_ZONE,
    "PreferSameNode": (*_SAME_ZONE, SUBZONE_LABEL, HOSTNAME_LABEL),
}


@dataclass(frozen=True, slots=True)
class Failover:
    from_region: str
    to_region: str


@dataclass(frozen=True, slots=True)
class Distribute:
    """Proxies in a locality that matches `from_pattern` spread over the patterns of `to` by percent."""

    from_pattern: str
    to: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalityPolicy:
    """The one localityLbSetting in effect. At most one of distribute and the failover fields acts; distribute wins."""

    distribute: tuple[Distribute, ...] = ()
    fails_over: bool = False
    """Outlier detection is on, or trafficDistribution forces it: without either, hosts never count as failed."""
    failover: tuple[Failover, ...] = ()
    failover_priority: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placed:
    """An endpoint and where it runs."""

    endpoint: Endpoint
    locality: Locality
    labels: Mapping[str, str]
    """Its labels with those of the topology; only failoverPriority reads them."""


NO_LOCALITY_POLICY = LocalityPolicy()


def effective_policy(
    setting: Mapping[str, Any] | None, traffic_distribution: str, has_outlier_detection: bool
) -> LocalityPolicy:
    """The first of: the DestinationRule's own setting, the Service's trafficDistribution, the mesh default (enabled).

    setting: `loadBalancer.localityLbSetting`, None where absent. There is no merging between levels.
    """
    if setting is not None:
        if setting.get("enabled") is False:
            return NO_LOCALITY_POLICY
        return LocalityPolicy(
            distribute=tuple(
                Distribute(str(entry.get("from", "")), tuple((str(to), int(w)) for to, w in entry["to"].items()))
                for entry in setting.get("distribute") or ()
                if entry.get("to")
            ),
            fails_over=has_outlier_detection,
            failover=tuple(
                Failover(str(entry.get("from", "")), str(entry.get("to", "")))
                for entry in setting.get("failover") or ()
            ),
            failover_priority=tuple(setting.get("failoverPriority") or ()),
        )
    preferred = TRAFFIC_DISTRIBUTION.get(traffic_distribution)
    if preferred is not None:
        return LocalityPolicy(fails_over=True, failover_priority=preferred)
    return LocalityPolicy(fails_over=has_outlier_detection)


def locality_matches(locality: Locality, pattern: str) -> bool:
    """`region/zone/subzone`; `*` or a missing zone or subzone matches anything."""
    region, zone, subzone = [*pattern.split("/"), "", ""][:3]
    return (
        region in ("*", locality.region) and zone in ("", "*", locality.zone) and subzone in ("", "*", locality.subzone)
    )


def arrange(
    placed: Sequence[Placed], policy: LocalityPolicy, proxy: Locality, proxy_labels: Mapping[str, str]
) -> tuple[tuple[LocalityEndpoints, ...], bool]:
    """The cluster's localities in order of priority, and whether their weights choose between them.

    proxy_labels: the proxy's labels with those of the topology.
    """
    if policy.distribute:
        groups = _grouped(placed)
        for entry in policy.distribute:
            if locality_matches(proxy, entry.from_pattern):
                return _distributed(groups, entry.to), True
        return _arranged((locality, 0, group, None) for locality, group in groups.items()), False
    if not policy.fails_over:
        return _arranged((locality, 0, group, None) for locality, group in _grouped(placed).items()), False
    is_weighted = bool(policy.failover or policy.failover_priority)
    by_labels = policy.failover_priority if proxy_labels else ()
    by_region = bool(policy.failover) or not policy.failover_priority
    groups_by_priority: dict[tuple[int, Locality], list[Endpoint]] = {}
    for item in placed:
        priority = _label_priority(item.labels, proxy_labels, by_labels) if by_labels else 0
        if by_region:
            priority = priority * 5 + _locality_priority(item.locality, proxy, policy.failover)
        groups_by_priority.setdefault((priority, item.locality), []).append(item.endpoint)
    # Priorities are made gapless: nobody at the first means that the second is first.
    rank = {priority: index for index, priority in enumerate(sorted({priority for priority, _ in groups_by_priority}))}
    return _arranged(
        (locality, rank[priority], group, _weight(group) if is_weighted else None)
        for (priority, locality), group in groups_by_priority.items()
    ), is_weighted


def topology_labels(locality: Locality, labels: Mapping[str, str]) -> dict[str, str]:
    """Labels as failoverPriority sees them: the locality counts as labels, explicit labels win."""
    topology = {REGION_LABEL: locality.region, ZONE_LABEL: locality.zone, SUBZONE_LABEL: locality.subzone}
    return {**{key: value for key, value in topology.items() if value}, **labels}


def _grouped(placed: Iterable[Placed]) -> dict[Locality, list[Endpoint]]:
    groups: dict[Locality, list[Endpoint]] = {}
    for item in placed:
        groups.setdefault(item.locality, []).append(item.endpoint)
    return groups


def _weight(group: Iterable[Endpoint]) -> int:
    return sum(endpoint.weight for endpoint in group)


def _distributed(
    groups: Mapping[Locality, list[Endpoint]], to: Iterable[tuple[str, int]]
) -> tuple[LocalityEndpoints, ...]:
    unclaimed = dict(groups)
    weighted: list[tuple[Locality, int, list[Endpoint], int | None]] = []
    for pattern, share in to:
        claimed = {locality: group for locality, group in unclaimed.items() if locality_matches(locality, pattern)}
        total = sum(_weight(group) for group in claimed.values())
        for locality, group in claimed.items():
            del unclaimed[locality]
            # ceil, as Istio does: no locality that was given a share rounds to nothing.
            weighted.append((locality, 0, group, -(-_weight(group) * share // total)))
    return _arranged(weighted)


def _locality_priority(locality: Locality, proxy: Locality, failover: Iterable[Failover]) -> int:
    if locality.region == proxy.region:
        if locality.zone != proxy.zone:
            return 2
        return 0 if locality.subzone == proxy.subzone else 1
    for entry in failover:
        if entry.from_region == proxy.region:
            return 3 if entry.to_region == locality.region else 4
    return 3


def _label_priority(labels: Mapping[str, str], proxy_labels: Mapping[str, str], keys: Sequence[str]) -> int:
    """0 where all labels agree; the earlier the first disagreement, the larger."""
    lowest = len(keys)
    offset = 0
    for index, entry in enumerate(keys):
        key, override, value = entry.partition("=")
        wanted = value if override else proxy_labels.get(key, "")
        if labels.get(key, "") == wanted:
            continue
        if index == 0 and key == NETWORK_LABEL:
            # Another network sorts after every endpoint of this one, and is itself ordered by the other labels.
            offset = lowest
            continue
        return offset + lowest - index
    return offset


def _arranged(
    groups: Iterable[tuple[Locality, int, list[Endpoint], int | None]],
) -> tuple[LocalityEndpoints, ...]:
    """Sorted by priority, then by name, so that the order of files does not matter."""
    return tuple(
        LocalityEndpoints(locality=locality, priority=priority, weight=weight, endpoints=tuple(group))
        for locality, priority, group, weight in sorted(
            groups, key=lambda g: (g[1], g[0].region, g[0].zone, g[0].subzone)
        )
    )
