"""Text of one file → checked resources in today's spelling, and everything that is wrong with it.

Decides: which documents are resources this proxy reads, and their identity (group, kind, namespace, name).
Leaves to others: fields (schema.py and the tables), meaning (snapshot.translate), keeping the last good resource
(control.store): an ERROR names the resource it refuses, or none where the text could not be read that far; then nothing
may be concluded about which resources the file no longer holds.
"""

import re
from collections.abc import Iterator
from typing import Final

from meshproxy.resources import istio_networking, istio_security, kubernetes, names
from meshproxy.resources.document import Document, Marks, Path, Resource, Value, documents, label_of, path_text
from meshproxy.resources.problems import ConfigProblem, Severity
from meshproxy.resources.schema import ABSENT, REFUSED, Reading, Struct, Table, Text, did_you_mean, shown

_MAX_PROBLEMS: Final = 1000


_ISTIO_GROUPS: Final[dict[str, dict[str, Struct]]] = {
    "networking.istio.io": istio_networking.KINDS,
    "security.istio.io": istio_security.KINDS,
}
_ISTIO_VERSIONS: Final = {
    "networking.istio.io": ("v1", "v1beta1", "v1alpha3"),
    "security.istio.io": ("v1", "v1beta1"),
}
_CLUSTER_SCOPED_KINDS: Final = frozenset(kind for _, kind in kubernetes.CLUSTER_SCOPED)
_TOP_FIELDS: Final = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})
_METADATA: Final = Struct(
    {
        "name": Text(names.object_name),
        "namespace": Text(names.dns_label),
        "labels": Table(Text(names.label_value, keeps_empty=True), key=names.as_table_key(names.label_key)),
        "annotations": Table(Text(keeps_empty=True)),
        "creationTimestamp": Text(),
    },
    ignored=(
        "generateName",
        "uid",
        "resourceVersion",
        "generation",
        "managedFields",
        "ownerReferences",
        "finalizers",
        "selfLink",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ),
    required=("name",),
)


def load_text(
    text: str | bytes, source: str, default_namespace: str = "default"
) -> tuple[list[Resource], list[ConfigProblem]]:
    """Every resource of a file that may be used, and every problem. Raises nothing, whatever the text."""
    resources: list[Resource] = []
    problems: list[ConfigProblem] = []
    seen: dict[str, int] = {}
    for document in documents(text):
        for resource in _read(document, source, default_namespace, problems):
            key = f"{resource.group} {resource.label}"
            if key in seen:
                problems.append(
                    ConfigProblem(
                        Severity.WARNING,
                        source,
                        int(resource.source.rpartition(":")[2]),
                        "metadata.name",
                        resource.label,
                        f"the resource is given twice, before at {resources[seen[key]].source}",
                        "this one is used",
                    )
                )
                resources[seen[key]] = resource
                continue
            seen[key] = len(resources)
            resources.append(resource)
        if len(problems) > _MAX_PROBLEMS:
            del problems[_MAX_PROBLEMS:]
            rest = ConfigProblem(
                Severity.ERROR,
                source,
                0,
                "",
                "",
                f"more than {_MAX_PROBLEMS} problems",
                "the rest of the file is not read",
            )
            problems.append(rest)
            break
    return resources, problems


def _read(document: Document, source: str, default_namespace: str, problems: list[ConfigProblem]) -> Iterator[Resource]:
    if document.refusal is not None:
        refusal = document.refusal
        label = _guess_label(document.text, default_namespace)
        problems.append(
            ConfigProblem(
                Severity.ERROR,
                source,
                refusal.line,
                path_text(refusal.path),
                label,
                refusal.message,
                REFUSED if label else "the document is refused",
            )
        )
        return
    yield from _read_object(document, document.root, None, source, default_namespace, problems)


def _read_object(
    document: Document, root: Value, at: Path, source: str, default_namespace: str, problems: list[ConfigProblem]
) -> Iterator[Resource]:
    reading = Reading(document, source)
    try:
        if type(root) is not dict:
            reading.error(at, f"{shown(root)} where a resource is needed (apiVersion, kind, metadata, spec)")
            return
        if root.get("kind") == "List" or (
            str(root.get("kind", "")).endswith("List") and type(root.get("items")) is list
        ):
            items = root.get("items")
            if type(items) is not list:
                reading.error((at, "items"), f"{shown(items)} where a list of resources is needed")
                return
            for index, item in enumerate(items):
                here = ((at, "items"), index)
                yield from _read_object(document, item, here, source, default_namespace, problems)
            return
        resource = _read_resource(document, root, at, reading, source, default_namespace)
        if resource is not None:
            yield resource
    finally:
        problems.extend(sorted(reading.problems, key=lambda problem: problem.line))


def _read_resource(
    document: Document, root: dict[str, Value], at: Path, reading: Reading, source: str, default_namespace: str
) -> Resource | None:
    kind, group = _identify(root, at, reading)
    metadata = root.get("metadata")
    if kind is None:
        reading.resource = _guess(root, default_namespace)
        _relabel(reading)
        return None
    reading.resource = _guess(root, default_namespace)
    is_cluster_scoped = (group, kind) in kubernetes.CLUSTER_SCOPED
    struct = _struct(group, kind, root, at, reading)
    if struct is None:
        return None
    if metadata is None:
        reading.error(at, "metadata is missing")
        metadata = {}
    else:
        metadata = _METADATA.read(metadata, (at, "metadata"), reading)
        if metadata is ABSENT:
            metadata = {}
    namespace = "" if is_cluster_scoped else metadata.get("namespace", default_namespace)
    body, where = _body(group, kind, root, at, reading)
    spec = struct.read(body, where, reading) if body is not ABSENT else ABSENT
    if reading.is_refused:
        return None
    name = metadata["name"]
    line = document.line if at is None else document.line_of(at)
    return Resource(
        group=group,
        kind=kind,
        namespace=namespace,
        name=name,
        labels=metadata.get("labels", {}),
        annotations=metadata.get("annotations", {}),
        created=metadata.get("creationTimestamp", ""),
        spec=spec,
        source=f"{source}:{line}",
        # Slices are the bulk of a large mesh and no later check looks into them: their text is not kept.
        marks=Marks(document, reading.moved, keeps_text=kind != "EndpointSlice"),
    )


def _identify(root: dict[str, Value], at: Path, reading: Reading) -> tuple[str | None, str]:
    """(kind, group); kind is None after saying what is wrong."""
    kind, api_version = root.get("kind"), root.get("apiVersion")
    for name, value in (("apiVersion", api_version), ("kind", kind)):
        if type(value) is not str or not value:
            said = f"{name} is missing" if value in (None, "") else f"{shown(value)} where text is needed"
            reading.error((at, name) if name in root else at, said)
            return None, ""
    assert isinstance(kind, str) and isinstance(api_version, str)
    group, _, version = api_version.rpartition("/")
    today = kubernetes.OLD_VERSIONS.get((group, version))
    if today is not None and kind == "Deployment":
        reading.warn((at, "apiVersion"), f"{api_version} was removed from Kubernetes", f"read as {today}")
        return kind, today.partition("/")[0]
    versions = _ISTIO_VERSIONS.get(group) or kubernetes.VERSIONS.get(group)
    if versions is not None and version not in versions:
        served = ", ".join(f"{group}/{v}" if group else v for v in versions)
        reading.error((at, "apiVersion"), f"{shown(api_version)} is not served (served: {served})")
        return None, group
    return kind, group


def _struct(group: str, kind: str, root: dict[str, Value], at: Path, reading: Reading) -> Struct | None:
    """How to read this kind; None after saying why it is not read, or silently where that is usual."""
    here = (at, "kind")
    if group in istio_security.REFUSED_GROUPS:
        reading.error((at, "apiVersion"), istio_security.REFUSED_GROUPS[group])
        return None
    if group in _ISTIO_GROUPS:
        kinds = _ISTIO_GROUPS[group]
        if kind in kinds:
            return kinds[kind]
        if kind in istio_security.REFUSED_KINDS and group == "security.istio.io":
            reading.error(here, f"{kind} is {istio_security.REFUSED_KINDS[kind]}")
            return None
        if kind in istio_networking.IGNORED_KINDS and group == "networking.istio.io":
            reading.warn(here, f"{kind} is not supported", istio_networking.IGNORED_KINDS[kind])
            return None
        for other, known in _ISTIO_GROUPS.items():
            if kind in known:
                reading.error((at, "apiVersion"), f"{kind} belongs to {other}, not to {group}")
                return None
        hint = did_you_mean(kind, [*kinds, *istio_security.REFUSED_KINDS])
        reading.error(here, f"{shown(kind)} is no kind of {group}{hint}")
        return None
    found = kubernetes.SPEC_KINDS.get((group, kind)) or kubernetes.BODY_KINDS.get((group, kind))
    if found is not None:
        return found
    if (group, kind) in kubernetes.SILENT_KINDS:
        return None
    known_kinds = {k: g for g, k in (*kubernetes.SPEC_KINDS, *kubernetes.BODY_KINDS)}
    known_kinds.update({k: g for g, kinds in _ISTIO_GROUPS.items() for k in kinds})
    known_groups = [*kubernetes.VERSIONS, *_ISTIO_GROUPS]
    if kind in known_kinds and (group in known_groups or did_you_mean(group, known_groups)):
        wanted = known_kinds[kind] or "the core API (apiVersion: v1)"
        reading.error((at, "apiVersion"), f"{kind} belongs to {wanted}")
        return None
    hint = did_you_mean(kind, known_kinds) if group in kubernetes.VERSIONS else ""
    of = f" of {group}" if group else ""
    reading.warn(here, f"{kind}{of} is not a kind this proxy reads{hint}")
    return None


def _body(group: str, kind: str, root: dict[str, Value], at: Path, reading: Reading) -> tuple[Value, Path]:
    if (group, kind) in kubernetes.BODY_KINDS:
        return {key: value for key, value in root.items() if key not in ("apiVersion", "kind", "metadata")}, at
    for key in root:
        if key not in _TOP_FIELDS:
            hint = did_you_mean(key, _TOP_FIELDS)
            struct = _ISTIO_GROUPS.get(group, {}).get(kind)
            if struct is not None and key in struct.field_names:
                hint = "; it belongs under spec"
            if group == "security.istio.io":
                reading.error((at, key), f"unknown field{hint}")
            elif group not in kubernetes.VERSIONS or hint:
                reading.warn((at, key), f"unknown field{hint}")
    spec = root.get("spec")
    if spec is None:
        if "spec" not in root and group in _ISTIO_GROUPS and kind != "PeerAuthentication":
            reading.error(at, "spec is missing")
            return ABSENT, at
        return {}, (at, "spec")
    return spec, (at, "spec")


def _guess(root: dict[str, Value], default_namespace: str) -> str:
    """The resource's label as far as its fields are texts."""
    metadata = root.get("metadata")
    metadata = metadata if type(metadata) is dict else {}
    kind, name = root.get("kind"), metadata.get("name")
    namespace = metadata.get("namespace") or default_namespace
    if not isinstance(kind, str) or not isinstance(name, str) or not isinstance(namespace, str) or not name:
        return ""
    if kind in _CLUSTER_SCOPED_KINDS:
        namespace = ""
    return label_of(kind[:80], namespace[:80], name[:80])


def _relabel(reading: Reading) -> None:
    """Problems found before the resource's name was known."""
    reading.problems[:] = [
        ConfigProblem(p.severity, p.source, p.line, p.field, reading.resource, p.message, p.action)
        for p in reading.problems
    ]


_KIND_LINE = re.compile(r"^kind:[ \t]*[\"']?([A-Za-z]{1,80})", re.MULTILINE)
_METADATA_LINES = re.compile(r"^metadata:[ \t]*\r?\n((?:[ \t]+[^\n]*\n?){1,100})", re.MULTILINE)
_NAME_LINE = re.compile(r"^[ \t]+name:[ \t]*[\"']?([a-z0-9.-]{1,253})", re.MULTILINE)
_NAMESPACE_LINE = re.compile(r"^[ \t]+namespace:[ \t]*[\"']?([a-z0-9-]{1,63})", re.MULTILINE)


def _guess_label(text: str, default_namespace: str) -> str:
    """Which resource a document that cannot be parsed was meant to be, so that its last good version can be kept."""
    kind, metadata = _KIND_LINE.search(text), _METADATA_LINES.search(text)
    if kind is None or metadata is None:
        return ""
    name, namespace = _NAME_LINE.search(metadata[1]), _NAMESPACE_LINE.search(metadata[1])
    if name is None:
        return ""
    if kind[1] in _CLUSTER_SCOPED_KINDS:
        return label_of(kind[1], "", name[1])
    return label_of(kind[1], namespace[1] if namespace else default_namespace, name[1])
