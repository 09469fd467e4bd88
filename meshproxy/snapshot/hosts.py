"""Host names and namespaces: short names, wildcards, who sees what.

Source: istio pkg/config/host, pilot/pkg/model ResolveShortnameToFQDN, generateVirtualHostDomains.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshproxy.model.address import is_ip

DOMAIN = "cluster.local"
_SERVICE_SUFFIX = f".svc.{DOMAIN}"


def service_fqdn(name: str, namespace: str) -> str:
    return f"{name}.{namespace}{_SERVICE_SUFFIX}"


def qualified(host: str, namespace: str) -> str:
    """The host as a fully qualified name: only a name without a dot is completed, by the namespace of who wrote it."""
    host = host.lower()
    if "." in host or ":" in host or host == "*":
        return host
    return service_fqdn(host, namespace)


def matches(pattern: str, host: str) -> bool:
    """True where `*`, `*.suffix` or an exact name covers the host; the host may itself be a wildcard."""
    if pattern == host or pattern == "*":
        return True
    # `*.example.com` covers `a.example.com` and `*.a.example.com`, not `example.com`.
    return pattern.startswith("*") and host.endswith(pattern[1:]) and len(host) > len(pattern) - 1


def specificity(pattern: str) -> tuple[bool, int]:
    """Orders patterns that match one host: exact names first, then the longest; larger is more specific."""
    return (not pattern.startswith("*"), len(pattern))


def narrower(a: str, b: str) -> str | None:
    """What two host patterns have in common: the more specific of them, or None."""
    if matches(a, b):
        return b
    return a if matches(b, a) else None


def domains(host: str, namespace: str, port: int, addresses: Iterable[str] = ()) -> tuple[str, ...]:
    """What an Authority header may say to mean this host, for a workload of `namespace` on a listener of `port`.

    Short forms of a Kubernetes name are valid only where a resolver's search path would complete them. port 0: none.
    """
    names = [host]
    if host.endswith(_SERVICE_SUFFIX) and not host.startswith("*"):
        name, _, service_namespace = host.removesuffix(_SERVICE_SUFFIX).partition(".")
        if service_namespace:
            names += [f"{name}.{service_namespace}.svc", f"{name}.{service_namespace}"]
            if service_namespace == namespace:
                names.append(name)
    names += [f"[{address}]" if ":" in address else address for address in addresses if is_ip(address)]
    if not port:
        return tuple(names)
    return tuple(form for name in names for form in ((name,) if name == "*" else (name, f"{name}:{port}")))


def is_exported(export_to: Sequence[str], owner_namespace: str, to_namespace: str) -> bool:
    """exportTo: empty means everywhere, `.` the owner's namespace, `~` nowhere."""
    if not export_to or "*" in export_to:
        return True
    return to_namespace in export_to or ("." in export_to and owner_namespace == to_namespace)


class Imports:
    """`hosts` of a Sidecar egress listener: which names of which namespaces its workload may reach."""

    __slots__ = ("_excluded", "_wanted")

    def __init__(self, scoped_hosts: Iterable[str], namespace: str) -> None:
        """namespace: what `.` means. `~/…` imports nothing, `~other/…` takes something out again."""
        self._wanted: list[tuple[str, str]] = []
        self._excluded: list[tuple[str, str]] = []
        for scoped in scoped_hosts:
            owner, slash, name = scoped.partition("/")
            if not slash:
                owner, name = "*", scoped
            patterns = self._excluded if owner.startswith("~") else self._wanted
            owner = owner.removeprefix("~")
            if owner:
                patterns.append((namespace if owner == "." else owner, name.lower()))

    def cover(self, owner: str, host: str) -> bool:
        """owner: namespace of the Service, ServiceEntry or VirtualService that has the host."""
        return _any_covers(self._wanted, owner, host) and not _any_covers(self._excluded, owner, host)


def _any_covers(patterns: Iterable[tuple[str, str]], owner: str, host: str) -> bool:
    return any(wanted in ("*", owner) and matches(name, host) for wanted, name in patterns)


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """True where every label of the selector is there. An empty selector selects everything."""
    return all(labels.get(key) == value for key, value in (selector or {}).items())
