"""Which mTLS mode an inbound port is under.

Source: istio pilot/pkg/security/authn/policy_applier.go ComposePeerAuthentication, pilot/pkg/model/authentication.go.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from meshproxy.model.listener import MtlsMode
from meshproxy.resources.document import Resource
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import selects

_UNSET = "UNSET"


class PeerAuthentications:
    """Mesh → namespace → workload → port; UNSET inherits; the oldest of a scope is the scope's."""

    __slots__ = ("_can_disable", "_findings", "_mesh", "_namespaces", "_workloads")

    def __init__(self, policies: Iterable[Resource], root_namespace: str, findings: Findings) -> None:
        self._findings = findings
        self._mesh: Resource | None = None
        self._namespaces: dict[str, Resource] = {}
        self._workloads: dict[str, list[Resource]] = {}
        self._can_disable = False
        for policy in policies:
            selector = _selector(policy)
            in_root = policy.namespace == root_namespace
            if selector and in_root:
                message = f"a policy with a selector has no effect in the root namespace {root_namespace}"
                findings.warn(policy, "spec.selector", message, "the policy is ignored")
                continue
            if selector:
                self._workloads.setdefault(policy.namespace, []).append(policy)
            else:
                older = self._mesh if in_root else self._namespaces.get(policy.namespace)
                if older is not None:
                    _warn_of_older(findings, policy, older, "the whole mesh" if in_root else "the namespace")
                    continue
                if in_root:
                    self._mesh = policy
                else:
                    self._namespaces[policy.namespace] = policy
            self._can_disable |= _may_disable(policy)

    def mode(self, namespace: str, labels: Mapping[str, str], port: int, *, is_local: bool = False) -> MtlsMode:
        """port: the workload's own, not the Service's. is_local: policies that lose to an older one are reported."""
        mode = MtlsMode.PERMISSIVE
        for policy in (self._mesh, self._namespaces.get(namespace)):
            if policy is not None:
                mode = _inherit(mode, policy.spec.get("mtls"))
        matching = [p for p in self._workloads.get(namespace, ()) if selects(_selector(p), labels)]
        if not matching:
            return mode
        if is_local:
            for younger in matching[1:]:
                _warn_of_older(self._findings, younger, matching[0], "the same workload")
        spec = matching[0].spec
        mode = _inherit(mode, spec.get("mtls"))
        ports = spec.get("portLevelMtls") or {}
        return _inherit(mode, ports.get(str(port), ports.get(port)))

    def is_disabled(self, namespace: str, labels: Mapping[str, str], port: int) -> bool:
        """A proxy at the other end takes plaintext only."""
        return self._can_disable and self.mode(namespace, labels, port) is MtlsMode.DISABLE


def _selector(policy: Resource) -> Mapping[str, Any]:
    return (policy.spec.get("selector") or {}).get("matchLabels") or {}


def _inherit(mode: MtlsMode, mtls: Mapping[str, Any] | None) -> MtlsMode:
    word = (mtls or {}).get("mode") or _UNSET
    return mode if word == _UNSET else MtlsMode(word)


def _may_disable(policy: Resource) -> bool:
    levels = [policy.spec.get("mtls"), *(policy.spec.get("portLevelMtls") or {}).values()]
    return any((level or {}).get("mode") == "DISABLE" for level in levels)


def _warn_of_older(findings: Findings, younger: Resource, older: Resource, scope: str) -> None:
    message = f"PeerAuthentication {older.name} at {older.source} is older and covers {scope} too"
    findings.warn(younger, "metadata.name", message, "this one is ignored")
