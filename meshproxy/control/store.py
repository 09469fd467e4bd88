"""All resources from all providers, each in its last good version.

Decides: what survives a broken, unreadable or vanished document. Leaves to others: reading (discovery), meaning
(snapshot.translate). Does no IO.
"""

import pickle
import zlib
from collections.abc import Callable, Sequence

from meshproxy.discovery.provider import Document, Update
from meshproxy.resources.document import Resource
from meshproxy.resources.problems import ConfigProblem, Severity

ResourceKey = tuple[str, str, str, str]
"""group, kind, namespace, name."""


def key_of(resource: Resource) -> ResourceKey:
    return resource.group, resource.kind, resource.namespace, resource.name


class ResourceStore:
    """A ResourceSink. on_change is called after every update that changed resources or problems."""

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._held: dict[str, dict[ResourceKey, Resource]] = {}
        self._problems: dict[str, tuple[ConfigProblem, ...]] = {}

    def apply(self, update: Update) -> None:
        changed = False
        for source in update.gone:
            changed |= self._held.pop(source, None) is not None
            changed |= self._problems.pop(source, None) is not None
        for document in update.documents:
            changed |= self._replace(document)
        if changed:
            self._on_change()

    def resources(self) -> list[Resource]:
        """In the order of their documents; where two hold the same resource, the later document's."""
        merged: dict[ResourceKey, Resource] = {}
        for source in sorted(self._held):
            merged.update(self._held[source])
        return list(merged.values())

    def problems(self) -> list[ConfigProblem]:
        """Of the documents as they are now, and of resources that two documents claim."""
        found = [problem for source in sorted(self._problems) for problem in self._problems[source]]
        claimed: dict[ResourceKey, Resource] = {}
        for source in sorted(self._held):
            for key, resource in self._held[source].items():
                if key in claimed:
                    found.append(_claimed_twice(claimed[key], resource))
                claimed[key] = resource
        return found

    def dump(self) -> bytes:
        """Everything held, for a control process that replaces this one while the files are broken."""
        return zlib.compress(pickle.dumps(self._held, pickle.HIGHEST_PROTOCOL), 1)

    def restore(self, dumped: bytes) -> None:
        """Take what `dump` gave in an earlier process of ours; the documents as they are now are applied over it."""
        self._held = pickle.loads(zlib.decompress(dumped))

    def sources(self) -> frozenset[str]:
        return frozenset(self._held)

    def _replace(self, document: Document) -> bool:
        held = self._held.get(document.source, {})
        problems = tuple(document.problems)
        if document.is_unreadable:
            now = held
        else:
            now = {key_of(resource): resource for resource in document.resources}
            missing = [resource for key, resource in held.items() if key not in now]
            now.update((key_of(resource), resource) for resource in _last_good(missing, problems))
        changed = now != held or problems != self._problems.get(document.source, ())
        self._held[document.source] = now
        self._problems[document.source] = problems
        return changed


def _last_good(missing: Sequence[Resource], problems: Sequence[ConfigProblem]) -> list[Resource]:
    """Those that are not gone but in error: an error names them, or names nothing and so may hide any of them."""
    errors = {problem.resource for problem in problems if problem.severity is Severity.ERROR}
    if "" in errors:
        return list(missing)
    return [resource for resource in missing if resource.label in errors]


def _claimed_twice(first: Resource, second: Resource) -> ConfigProblem:
    path, _, line = second.source.rpartition(":")
    return ConfigProblem(
        severity=Severity.WARNING,
        source=path or second.source,
        line=int(line) if line.isdigit() else 0,
        field="metadata.name",
        resource=second.label,
        message=f"the same resource is in {first.source} too",
        action="this one is used",
    )
