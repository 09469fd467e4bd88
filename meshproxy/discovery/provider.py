"""What every source of resources gives to the control process.

A provider watches one place (files, an API server, a registry) and says what each document there holds now.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshproxy.resources.document import Resource
from meshproxy.resources.problems import ConfigProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What one document (a file, an API object) holds now; replaces what it held before."""

    source: str
    """Names the document: a file path. Later names win where two documents hold the same resource."""
    resources: Sequence[Resource] = ()
    problems: Sequence[ConfigProblem] = ()
    """An error keeps the last good version of the resource it names, or of the whole document if it names none."""
    is_unreadable: bool = False
    """It exists and cannot be read now: all its resources stay as they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    documents: Sequence[Document] = ()
    gone: frozenset[str] = field(default_factory=frozenset)
    """Sources that exist no more: their resources go."""


class ResourceSink(Protocol):
    def apply(self, update: Update) -> None:
        """Take what changed. Cheap: what follows from it is worked out later."""
        ...


class Provider(Protocol):
    async def run(self, sink: ResourceSink) -> None:
        """Report everything once, then every change, until cancelled. Reconnects by itself; never raises."""
        ...
