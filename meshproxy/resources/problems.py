"""What is wrong with a configuration, in one sentence: which file, line and field, what was done instead.

A problem is a value, not an exception: bad configuration is an expected outcome and never stops the mesh.
"""

from dataclasses import dataclass
from enum import Enum


class Severity(str, Enum):
    WARNING = "WARNING"
    """The resource is used; one field was ignored, or read in today's spelling."""
    ERROR = "ERROR"
    """The resource was refused whole; whoever keeps resources goes on with the last good one of that name."""


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One finding. Equal findings are equal values, so a reload can report only what is new."""

    severity: Severity
    source: str
    """File the resource came from; `-` for standard input."""
    line: int
    """1-based; 0 where no line is known."""
    field: str
    """`spec.trafficPolicy.tls.mode`; empty where the problem is the document itself."""
    resource: str
    """`DestinationRule default/edge-service`; empty where the text could not be read that far."""
    message: str
    """What is wrong."""
    action: str
    """What was done instead."""

    def sentence(self) -> str:
        """`file:line: Kind namespace/name: field: what is wrong; what was done`, on one line."""
        place = f"{self.source}:{self.line}" if self.line else self.source
        parts = [part for part in (place, self.resource, self.field) if part]
        text = ": ".join([*parts, self.message])
        if self.action:
            text = f"{text}; {self.action}"
        # Names and values come from the file: none of them may forge a second line or drive a terminal.
        return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
