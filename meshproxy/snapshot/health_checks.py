"""Probes of WorkloadGroups → active health checks of the workloads that belong to them.

Source: Istio WorkloadGroup.probe (ReadinessProbe; its defaults are Kubernetes').
"""

from collections.abc import Iterable, Mapping
from typing import Any

from meshproxy.model.cluster import HealthCheck
from meshproxy.resources.document import Resource
from meshproxy.snapshot.hosts import selects

_GROUP_ANNOTATION = "istio.io/autoRegistrationGroup"


class Probes:
    """The check of a workload: of the group its annotation names, else of the group whose labels it carries."""

    __slots__ = ("_by_labels", "_by_name")

    def __init__(self, groups: Iterable[Resource]) -> None:
        self._by_name: dict[tuple[str, str], HealthCheck] = {}
        self._by_labels: list[tuple[str, Mapping[str, str], HealthCheck]] = []
        for group in groups:
            probe = group.spec.get("probe")
            check = _health_check(probe) if probe else None
            if check is None:
                continue
            self._by_name[group.namespace, group.name] = check
            labels = (group.spec.get("metadata") or {}).get("labels")
            if labels:
                self._by_labels.append((group.namespace, labels, check))

    def for_entry(self, entry: Resource, labels: Mapping[str, str]) -> HealthCheck | None:
        name = entry.annotations.get(_GROUP_ANNOTATION)
        if name is not None:
            return self._by_name.get((entry.namespace, name))
        return self.for_labels(entry.namespace, labels)

    def for_labels(self, namespace: str, labels: Mapping[str, str]) -> HealthCheck | None:
        for owner, wanted, check in self._by_labels:
            if owner == namespace and selects(wanted, labels):
                return check
        return None


def _health_check(probe: Mapping[str, Any]) -> HealthCheck | None:
    timing: dict[str, Any] = {
        "interval_s": float(probe.get("periodSeconds") or 10),
        "timeout_s": float(probe.get("timeoutSeconds") or 1),
        "initial_delay_s": float(probe.get("initialDelaySeconds") or 0),
        "healthy_threshold": probe.get("successThreshold") or 1,
        "unhealthy_threshold": probe.get("failureThreshold") or 3,
    }
    http = probe.get("httpGet")
    if http is not None:
        return HealthCheck(
            kind="http",
            path=http.get("path") or "/",
            host=http.get("host") or "",
            port=http.get("port"),
            scheme=(http.get("scheme") or "HTTP").lower(),
            headers=tuple((h["name"], str(h.get("value") or "")) for h in http.get("httpHeaders") or ()),
            **timing,
        )
    tcp = probe.get("tcpSocket")
    if tcp is not None:
        return HealthCheck(kind="tcp", host=tcp.get("host") or "", port=tcp.get("port"), **timing)
    grpc = probe.get("grpc")
    if grpc is not None:
        return HealthCheck(kind="grpc", port=grpc.get("port"), service=grpc.get("service") or "", **timing)
    return None
