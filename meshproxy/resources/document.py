"""Text of one file → its YAML (or JSON) documents as plain values, with the line of any field on request.

Decides: what is a document, what each scalar means (YAML 1.1 as Kubernetes reads it), what is refused outright.
Leaves to others: what the fields mean (schema.py and the tables beside it).

Values are built straight from libyaml's parse events. Composing nodes first costs a third more time and recurses in C
as deep as the text nests, which a line of brackets turns into a crash; here nothing recurses deeper than MAX_DEPTH.
Lines are not kept: a file without problems never needs them, and one that has some is read a second time.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import yaml
from yaml._yaml import CParser

MAX_BYTES: Final = 16 * 1024 * 1024
"""Largest file read, whoever reads it. 14,500 services of ten endpoints in block style are 11 MB, which take four
seconds and 200 MiB to read."""
MAX_DEPTH: Final = 100
"""Deepest nesting. Istio's own API nests 12 levels."""
_TOO_DEEP: Final = f"nested deeper than {MAX_DEPTH} levels"
_SPARE_VALUES: Final = 1000
_MAX_INTERNED: Final = 64

Value = Any
"""dict[str, Value] | list[Value] | str | int | float | bool | None"""

Path = tuple[Any, Any] | None
"""A field as a linked list from the leaf up, (parent, key or index): one small tuple a step, rendered on demand."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document. root is None where it could not be read; refusal then says why."""

    text: str
    first_line: int
    """1-based line of the file on which text begins."""
    line: int = 0
    """Where its first key stands."""
    root: Value = None
    refusal: "Refusal | None" = None

    def line_of(self, path: Path) -> int:
        """Line of the field, or of the nearest field around it that was written."""
        return line_of(_lines(self.text, self.first_line), path)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a document cannot be read at all."""

    line: int
    message: str
    path: Path = None


class Marks(Mapping[str, int]):
    """Field path → line. Looking up never fails: an unwritten field has the line of what is around it.

    Holds the document's text instead of a table: most resources are never asked.
    """

    __slots__ = ("_first_line", "_line", "_moved", "_text")

    def __init__(self, document: Document, moved: Mapping[str, str], *, keeps_text: bool = True) -> None:
        """moved: canonical path → path as written, for fields that were moved to today's place.

        keeps_text: False gives every field the line of the document.
        """
        self._text = document.text if keeps_text else ""
        self._first_line = document.first_line
        self._line = document.line
        self._moved = moved

    def _lines(self) -> "_Lines":
        return _lines(self._text, self._first_line) if self._text else (self._line, None)

    def __getitem__(self, field: str) -> int:
        for today, written in self._moved.items():
            if field == today or field.startswith((f"{today}.", f"{today}[")):
                field = written + field[len(today) :]
                break
        return line_of(self._lines(), path_of(field))

    def __iter__(self) -> Iterator[str]:
        return (path_text(path) for path in _walk(self._lines()))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, field: object) -> bool:
        return isinstance(field, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One Kubernetes or Istio object, checked and in today's spelling. Equal where it says the same."""

    group: str
    """`networking.istio.io`, `security.istio.io`, `discovery.k8s.io`, `apps`, or empty for the core API."""
    kind: str
    namespace: str
    """Empty for Namespace and Node."""
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    """metadata.creationTimestamp, or empty."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Today's fields in today's places, durations in seconds, no nulls. Only to be read: parts may be shared."""
    source: str = field(default="", compare=False)
    """`file:line` of the document's first key."""
    marks: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Field path → line; any path may be asked for."""

    @property
    def label(self) -> str:
        """`Kind namespace/name`, as problems write it."""
        return label_of(self.kind, self.namespace, self.name)


def label_of(kind: str, namespace: str, name: str) -> str:
    """`Kind namespace/name`; the namespace is empty for Namespace and Node."""
    return f"{kind} {namespace}/{name}"


_BARE_KEY = re.compile(r"[A-Za-z0-9_$-]+")
_STEP = re.compile(r'\.?([^.\[\]]+)|\[(\d+)\]|\["((?:[^"\\]|\\.)*)"\]')


def path_text(path: Path) -> str:
    """`spec.http[0].match`; keys that are not plain words are quoted: `spec.selector["app.kubernetes.io/name"]`."""
    keys: list[Any] = []
    while path is not None:
        path, key = path
        keys.append(key)
    text = ""
    for key in reversed(keys):
        if isinstance(key, int):
            text += f"[{key}]"
        elif _BARE_KEY.fullmatch(key):
            text += f".{key}" if text else key
        else:
            quoted = key if len(key) <= 80 else key[:80] + "…"
            text += '["' + quoted.replace("\\", "\\\\").replace('"', '\\"') + '"]'
    return text


def path_of(field: str) -> Path:
    """The inverse of path_text."""
    path: Path = None
    for name, index, quoted in _STEP.findall(field):
        path = (path, name or (int(index) if index else re.sub(r"\\(.)", r"\1", quoted)))
    return path


# ── splitting ────────────────────────────────────────────────────────────────────────────────────────────────────────

# `---` in the first column is a document marker wherever it stands, also inside quotes and block scalars (YAML 1.2
# §9.2), so documents can be cut apart before parsing, as kubectl does: a broken one does not take its neighbours along.
_MARKER = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def documents(data: str | bytes) -> Iterator[Document]:
    """Every document of a file, in order; empty ones are left out. Raises nothing, whatever the bytes."""
    if len(data) > MAX_BYTES:
        limit = MAX_BYTES // 1024 // 1024  # its size is not told: who reads a file stops one byte above
        yield Document("", 1, refusal=Refusal(0, f"larger than {limit} MiB: split it into several files"))
        return
    if isinstance(data, bytes):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as e:
            line = data.count(b"\n", 0, e.start) + 1
            what = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{data[e.start]:02x}"
            yield Document("", 1, refusal=Refusal(line, f"not UTF-8 text ({what})"))
            return
    else:
        text = data
    text = text.removeprefix("\ufeff")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    starts = [0, *(found.start() for found in _MARKER.finditer(text)), len(text)]
    line = 1
    for start, end in pairwise(starts):
        if end > start:
            chunk = text[start:end]
            yield from _read(chunk, line)
            line += chunk.count("\n")


def _read(text: str, first_line: int) -> Iterator[Document]:
    unprintable = _UNPRINTABLE.search(text)
    if unprintable is not None:
        line = first_line + text.count("\n", 0, unprintable.start())
        character = f"U+{ord(unprintable.group()):04X}"
        yield Document(text, first_line, refusal=Refusal(line, f"character {character} is not allowed in YAML"))
        return
    if text.startswith("%") and all(not line or line[0] in "%#" for line in text.splitlines()):
        return  # directives before the first `---`
    builder = _Builder(text, first_line)
    try:
        for line, root in builder.roots():
            if root is not None:
                yield Document(text, first_line, line, root)
    except _Refused as e:
        path: Path = None
        for key in reversed(e.path):
            path = (path, key)
        yield Document(text, first_line, refusal=Refusal(e.line, e.message, path))
    except yaml.MarkedYAMLError as e:
        yield Document(text, first_line, refusal=Refusal(first_line + _line_of_error(e, text), _syntax(e, text)))
    except (yaml.YAMLError, ValueError) as e:
        yield Document(text, first_line, refusal=Refusal(first_line, f"not YAML: {e}"))


def _line_of_error(e: yaml.MarkedYAMLError, text: str) -> int:
    """0-based. What is missed only at the end of the text is shown where it was opened."""
    last = text.rstrip().count("\n")
    mark = e.problem_mark
    if mark is not None and mark.line > last and e.context_mark is not None:
        mark = e.context_mark
    return min(mark.line, last) if mark is not None else 0


_CONTEXTS: Final = {
    "while parsing a flow sequence": "in a list [ … ]",
    "while parsing a flow mapping": "in a mapping { … }",
    "while parsing a flow node": "inside [ … ] or { … }",
    "while scanning a quoted scalar": "in a quoted scalar",
    "while scanning a plain scalar": "quote this value",
}


def _syntax(e: yaml.MarkedYAMLError, text: str) -> str:
    """libyaml's finding in the words of somebody who edits the file."""
    problem = str(e.problem or e.context or "syntax error")
    mark = e.problem_mark
    if problem == "found character that cannot start any token" and mark is not None:
        lines = text.split("\n")
        character = lines[mark.line][mark.column : mark.column + 1] if mark.line < len(lines) else ""
        if character == "\t":
            return "not YAML: a tab indents this line; YAML allows only spaces"
        return f"not YAML: {character!r} cannot begin a value; quote it"
    if problem == "mapping values are not allowed in this context":
        return "not YAML: a second ': ' on this line, or wrong indentation"
    if problem == "exceeded maximum nesting depth":  # libyaml 0.2.6 looks ahead and may get there before we do
        return _TOO_DEEP
    if problem in ("did not find expected key", "did not find expected '-' indicator"):
        return f"not YAML: {problem}; the indentation does not fit the lines above"
    if e.context and e.problem:
        return f"not YAML: {_CONTEXTS.get(e.context, e.context)}, {problem}"
    return f"not YAML: {problem}"


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Refused(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message
        self.path: list[Any] = []  # filled from the leaf up while the recursion unwinds


_MISSING: Final = object()
_RESOLVABLE: Final = frozenset("0123456789+-.~nNtTfFyYoO<=")
"""First characters of plain scalars that may mean something else than their text."""
_WORDS: Final[dict[str, Value]] = {
    **dict.fromkeys(("~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_INTEGER = re.compile(r"[-+]?(?:0b[01]+|0o?[0-7]+|0x[0-9a-fA-F]+|0|[1-9][0-9]*(?:_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_MAX_INTEGER_DIGITS: Final = 20


def _resolve(text: str) -> Value:
    """What an unquoted scalar means. ValueError where it means something JSON cannot say.

    Sexagesimal integers and timestamps of YAML 1.1 stay text, as in Kubernetes' reader.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > _MAX_INTEGER_DIGITS:
            raise ValueError(f"number {text[:20]}… is too large")
        digits = text.replace("_", "")
        sign = -1 if digits[0] == "-" else 1
        digits = digits.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0" and digits[1] not in "box":
            return sign * int(digits, 8)
        return sign * int(digits, 0)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a number that JSON knows")
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError(f"number {text[:20]} is too large")
        return number
    return text


class _Builder:
    """Parse events → values of one chunk of text.

    The number of values may not exceed the number of characters: without aliases it cannot, and with them it is the
    difference between a shorthand and a bomb (ten aliases of ten aliases of …).
    """

    __slots__ = ("_anchors", "_budget", "_first_line", "_memo", "_next")

    def __init__(self, text: str, first_line: int) -> None:
        self._next: Callable[[], Any] = CParser(text).get_event
        self._first_line = first_line
        self._budget = len(text) + _SPARE_VALUES
        self._anchors: dict[str, tuple[Value, int]] = {}
        self._memo: dict[str, Value] = {}

    def roots(self) -> Iterator[tuple[int, Value]]:
        next_event = self._next
        while True:
            event = next_event()
            kind = type(event)
            if kind is yaml.StreamEndEvent:
                return
            if kind is yaml.StreamStartEvent or kind is yaml.DocumentStartEvent or kind is yaml.DocumentEndEvent:
                continue
            self._anchors.clear()
            yield self._first_line + event.start_mark.line, self._build(event, 1)

    def _build(self, event: Any, depth: int) -> Value:
        kind = type(event)
        if kind is yaml.ScalarEvent:
            value = self._scalar(event)
            if event.anchor is not None:
                self._anchors[event.anchor] = (value, 1)
            return value
        if kind is yaml.AliasEvent:
            found = self._anchors.get(event.anchor)
            if found is None:
                raise self._refused(event, f"alias *{event.anchor} has no anchor before it, or stands inside it")
            self._spend(event, found[1])
            return found[0]
        if depth > MAX_DEPTH:
            raise self._refused(event, _TOO_DEEP)
        before = self._budget
        if kind is yaml.MappingStartEvent:
            self._check_tag(event, "tag:yaml.org,2002:map")
            value = self._mapping(event, depth)
        else:
            self._check_tag(event, "tag:yaml.org,2002:seq")
            value = self._sequence(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, before - self._budget + 1)
        return value

    def _mapping(self, start: Any, depth: int) -> dict[str, Value]:
        next_event, memo = self._next, self._memo
        scalar_event, end_event = yaml.ScalarEvent, yaml.MappingEndEvent
        out: dict[str, Value] = {}
        merged: dict[str, Value] | None = None
        key: Any = None
        try:
            while True:
                event = next_event()
                kind = type(event)
                if kind is end_event:
                    break
                key = None
                if kind is not scalar_event:
                    raise self._refused(event, "a key must be text")
                self._budget -= 2
                if self._budget < 0:
                    self._spend(event, 0)
                key = event.value
                if event.implicit[0] and key in ("<<", "=") and not event.style:
                    if key == "=":
                        raise self._refused(event, "key = means something else in YAML; quote it")
                    merged = self._merge(event, self._build(next_event(), depth + 1), merged)
                    continue
                if event.tag is not None or (event.implicit[0] and key in _WORDS):
                    self._check_key(event)
                key = sys.intern(key)
                if key in out:
                    raise self._refused(event, "the key is written twice")
                event = next_event()
                if type(event) is scalar_event and event.anchor is None and event.tag is None:
                    text = event.value
                    if event.implicit[0] and (not text or text[0] in _RESOLVABLE):
                        value = memo.get(text, _MISSING)
                        if value is _MISSING:
                            value = self._scalar(event)
                    else:
                        # Zones, node names and kinds repeat in every endpoint of a large mesh.
                        value = sys.intern(text) if len(text) <= _MAX_INTERNED else text
                else:
                    value = self._build(event, depth + 1)
                out[key] = value
        except _Refused as e:
            if key is not None:
                e.path.append(key)
            raise
        if merged is not None:
            for name, value in merged.items():
                out.setdefault(name, value)
        return out

    def _sequence(self, start: Any, depth: int) -> list[Value]:
        next_event, end_event = self._next, yaml.SequenceEndEvent
        out: list[Value] = []
        try:
            while True:
                event = next_event()
                if type(event) is end_event:
                    return out
                self._budget -= 1
                if self._budget < 0:
                    self._spend(event, 0)
                out.append(self._build(event, depth + 1))
        except _Refused as e:
            e.path.append(len(out))
            raise

    def _scalar(self, event: Any) -> Value:
        text = event.value
        tag = event.tag
        if tag is None or tag == "!":
            if not event.implicit[0] or tag == "!":
                return text
            if not text:
                return None
            if text[0] not in _RESOLVABLE:
                return text
            try:
                value = _resolve(text)
            except ValueError as e:
                raise self._refused(event, f"{e}") from None
            if len(text) <= 32 and len(self._memo) < 4096:
                self._memo[text] = value
            return value
        if tag == "tag:yaml.org,2002:str":
            return text
        for kinds, name in (((bool,), "bool"), ((int,), "int"), ((int, float), "float"), ((type(None),), "null")):
            if tag == f"tag:yaml.org,2002:{name}":
                try:
                    value = _resolve(text) if text else None
                except ValueError as e:
                    raise self._refused(event, f"{e}") from None
                if type(value) in kinds:
                    return value
                raise self._refused(event, f"{text[:40]!r} is not of its tag !!{name}")
        raise self._refused(event, f"tag {_short_tag(tag)} is not allowed")

    def _merge(self, event: Any, value: Value, merged: dict[str, Value] | None) -> dict[str, Value]:
        out = merged if merged is not None else {}
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, dict):
                raise self._refused(event, "<< needs a mapping, or a list of mappings")
            self._spend(event, len(source))
            for key, item in source.items():
                out.setdefault(key, item)
        return out

    def _check_key(self, event: Any) -> None:
        if event.tag is not None and event.tag != "!" and event.tag != "tag:yaml.org,2002:str":
            raise self._refused(event, f"tag {_short_tag(event.tag)} is not allowed on a key")
        if event.tag is None:
            # `on:` and `no:` are booleans to YAML 1.1; to guess which was meant would hide a mistake.
            raise self._refused(event, f"YAML reads the key {event.value} as {_WORDS[event.value]!r}; quote it")

    def _check_tag(self, event: Any, allowed: str) -> None:
        if event.tag is not None and event.tag != allowed and event.tag != "!":
            raise self._refused(event, f"tag {_short_tag(event.tag)} is not allowed")

    def _spend(self, event: Any, values: int) -> None:
        self._budget -= values
        if self._budget < 0:
            raise self._refused(event, "its aliases stand for more values than the text has characters")

    def _refused(self, event: Any, message: str) -> _Refused:
        return _Refused(self._first_line + event.start_mark.line, message)


def _short_tag(tag: str) -> str:
    return "!!" + tag.removeprefix("tag:yaml.org,2002:")[:60] if tag.startswith("tag:yaml.org,2002:") else tag[:60]


# ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_Lines = tuple[int, Any]
"""(line, children): children is a dict by key, a list, or None."""


@lru_cache(maxsize=4)
def _lines(text: str, first_line: int) -> _Lines:
    """Shape and lines of the text's document. Only called for documents that were read without a refusal."""
    next_event: Callable[[], Any] = CParser(text).get_event
    anchors: dict[str, _Lines] = {}

    def read(event: Any, line: int) -> _Lines:
        kind = type(event)
        if kind is yaml.AliasEvent:
            return (line, anchors.get(event.anchor, (0, None))[1])
        children: Any = None
        if kind is yaml.MappingStartEvent:
            children = {}
            while type(key := next_event()) is not yaml.MappingEndEvent:
                at = first_line + key.start_mark.line
                child = read(next_event(), at)
                if key.value == "<<" and key.implicit[0]:
                    for name, value in (child[1] or {}).items() if isinstance(child[1], dict) else ():
                        children.setdefault(name, (at, value[1]))
                else:
                    children[key.value] = child
        elif kind is yaml.SequenceStartEvent:
            children = []
            while type(item := next_event()) is not yaml.SequenceEndEvent:
                children.append(read(item, first_line + item.start_mark.line))
        found = (line, children)
        if event.anchor is not None:
            anchors[event.anchor] = found
        return found

    while True:
        event = next_event()
        if type(event) in (yaml.ScalarEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent):
            return read(event, first_line + event.start_mark.line)


def line_of(lines: _Lines, path: Path) -> int:
    keys: list[Any] = []
    while path is not None:
        path, key = path
        keys.append(key)
    here = lines
    for key in reversed(keys):
        children = here[1]
        if isinstance(key, int):
            if not isinstance(children, list) or key >= len(children):
                break
            here = children[key]
        else:
            if not isinstance(children, dict) or key not in children:
                break
            here = children[key]
    return here[0]


def _walk(lines: _Lines, path: Path = None) -> Iterator[Path]:
    children = lines[1]
    items = children.items() if isinstance(children, dict) else enumerate(children or ())
    for key, child in items:
        yield (path, key)
        yield from _walk(child, (path, key))
