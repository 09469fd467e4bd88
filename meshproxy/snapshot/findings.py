"""What translation has to say about resources that are each well formed but do not fit together."""

from meshproxy.resources.document import Resource
from meshproxy.resources.problems import ConfigProblem, Severity


class Findings:
    """Collects problems in the order found. The same finding met on several paths is kept once."""

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: dict[ConfigProblem, None] = {}

    def warn(self, resource: Resource, field: str, message: str, action: str) -> None:
        """The resource is used; field (`spec.http[0].route[1]`) is not taken as written."""
        self._add(Severity.WARNING, resource, field, message, action)

    def error(self, resource: Resource, field: str, message: str, action: str) -> None:
        """Something the operator asked for is not there."""
        self._add(Severity.ERROR, resource, field, message, action)

    def all(self) -> list[ConfigProblem]:
        return list(self._found)

    def _add(self, severity: Severity, resource: Resource, field: str, message: str, action: str) -> None:
        path, first_line = place_of(resource)
        problem = ConfigProblem(
            severity=severity,
            source=path,
            line=resource.marks.get(field, first_line) or first_line,
            field=field,
            resource=f"{resource.kind} {resource.namespace}/{resource.name}",
            message=message,
            action=action,
        )
        self._found.setdefault(problem)


def place_of(resource: Resource) -> tuple[str, int]:
    """File and line of the resource; line 0 where unknown."""
    path, colon, line = resource.source.rpartition(":")
    return (path, int(line)) if colon and line.isdigit() else (resource.source, 0)


def age_order(resource: Resource) -> tuple[str, str, int]:
    """Sorts oldest first. Undated resources are younger than dated ones and keep the order of their files."""
    return (resource.created or "~", *place_of(resource))
