"""Which DestinationRule, and which of its settings, rule the traffic of a workload to a service.

Source: istio pilot/pkg/model/push_context.go destinationRule, destination_rule.go mergeDestinationRule;
pilot/pkg/networking/util MergeTrafficPolicy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshproxy.model.workload import Workload
from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import is_exported, matches, selects, specificity
from meshproxy.snapshot.services import Service, Services

_COMPONENTS = ("loadBalancer", "connectionPool", "outlierDetection", "tls")
"""What a portLevelSettings entry replaces, whether it names it or not."""
_INHERITED = ("retryBudget", "proxyProtocol")


@dataclass(frozen=True, slots=True)
class Subset:
    labels: Mapping[str, str]
    policy: Mapping[str, Any]
    resource: Resource
    path: str


@dataclass(slots=True, eq=False)
class Rule:
    """All DestinationRules of one namespace for one host and one selector."""

    resource: Resource
    host: str
    selector: Mapping[str, str]
    export_to: tuple[str, ...]
    policy: Mapping[str, Any]
    subsets: dict[str, Subset] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setting:
    """One component of a trafficPolicy and where it is written."""

    value: Mapping[str, Any]
    resource: Resource
    path: str


class DestinationRules:
    """First hit of: the client's namespace, the service's, the root. Nothing is merged between namespaces."""

    __slots__ = ("_by_host", "_root_namespace", "_wildcards")

    def __init__(self, rules: Iterable[Resource], services: Services, root_namespace: str, findings: Findings) -> None:
        self._root_namespace = root_namespace
        self._by_host: dict[tuple[str, str], list[Rule]] = {}
        for resource in rules:
            host, _ = services.resolve(resource.spec["host"], resource.namespace, resource.namespace)
            _merge(self._by_host.setdefault((resource.namespace, host), []), resource, host, findings)
        self._wildcards: dict[str, list[str]] = {}
        for namespace, host in self._by_host:
            if host.startswith("*"):
                self._wildcards.setdefault(namespace, []).append(host)
        for hosts in self._wildcards.values():
            hosts.sort(key=specificity, reverse=True)

    def find(self, service: Service, workload: Workload) -> Rule | None:
        """The rule for traffic of the workload to the service."""
        if not self._by_host:
            return None
        client, root = workload.namespace, self._root_namespace
        found = self._find_in(client, service.host, workload, needs_export=False)
        if found is None and service.namespace != client:
            found = self._find_in(service.namespace, service.host, workload)
        if found is None and root not in (client, service.namespace):
            found = self._find_in(root, service.host, workload)
        return found

    def _find_in(self, namespace: str, host: str, workload: Workload, needs_export: bool = True) -> Rule | None:
        patterns = [host, *(p for p in self._wildcards.get(namespace, ()) if p != host and matches(p, host))]
        for pattern in patterns:
            for rule in self._by_host.get((namespace, pattern), ()):
                if rule.selector and not (workload.namespace == namespace and selects(rule.selector, workload.labels)):
                    continue
                if needs_export and not is_exported(rule.export_to, namespace, workload.namespace):
                    continue
                return rule
        return None


def _merge(rules: list[Rule], resource: Resource, host: str, findings: Findings) -> None:
    spec = resource.spec
    selector = (spec.get("workloadSelector") or {}).get("matchLabels") or {}
    policy = spec.get("trafficPolicy") or {}
    rule = next((rule for rule in rules if rule.selector == selector), None)
    if rule is None:
        rule = Rule(resource, host, selector, tuple(spec.get("exportTo") or ()), policy)
        rules.append(rule)
        # Rules for chosen workloads go before the rule for everybody.
        rules.sort(key=lambda rule: not rule.selector)
    elif policy and rule.policy:
        message = f"DestinationRule {rule.resource.name} at {rule.resource.source} is older and has a policy for {host}"
        findings.warn(resource, "spec.trafficPolicy", message, "this trafficPolicy is ignored; its subsets are used")
    elif policy:
        rule.policy, rule.resource = policy, resource
    for index, subset in enumerate(spec.get("subsets") or ()):
        path = f"spec.subsets[{index}]"
        if subset["name"] in rule.subsets:
            message = f"subset {subset['name']} of {host} is defined twice"
            findings.warn(resource, f"{path}.name", message, "the first is used")
            continue
        rule.subsets[subset["name"]] = Subset(
            subset.get("labels") or {}, subset.get("trafficPolicy") or {}, resource, f"{path}.trafficPolicy"
        )


def settings_for(rule: Rule | None, port: int, subset: Subset | None) -> Mapping[str, Setting]:
    """Component name → what holds for one port: the top level, then the subset over it, port by port.

    An entry of portLevelSettings inherits nothing: what it leaves out is at its default.
    """
    found: dict[str, Setting] = {}
    if rule is not None:
        _overlay(found, rule.policy, rule.resource, "spec.trafficPolicy", port)
    if subset is not None:
        _overlay(found, subset.policy, subset.resource, subset.path, port)
    return found


def _overlay(found: dict[str, Setting], policy: Mapping[str, Any], resource: Resource, path: str, port: int) -> None:
    for name in (*_COMPONENTS, *_INHERITED):
        if policy.get(name) is not None:
            found[name] = Setting(policy[name], resource, f"{path}.{name}")
    for index, level in enumerate(policy.get("portLevelSettings") or ()):
        if (level.get("port") or {}).get("number") != port:
            continue
        for name in _COMPONENTS:
            found.pop(name, None)
            if level.get(name) is not None:
                found[name] = Setting(level[name], resource, f"{path}.portLevelSettings[{index}].{name}")
        return
