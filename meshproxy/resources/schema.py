"""What a field may hold, as tables; and the one reader that walks a document along them.

Decides: type, range, required, one-of; unknown, old and unsupported fields; the canonical value (durations are seconds,
enums their API word, absent and null the same).
Leaves to others: which fields exist (istio_networking, istio_security, kubernetes), their meaning (snapshot.translate).

Three rules, by what an error would cost:
- a wrong value refuses the resource: to guess would be worse than to keep the last good one;
- a field nobody knows is dropped with a warning, except where it may be the very one that protects (`is_strict`);
- a field of the API that this version does not serve is dropped with a warning, or refuses the resource where ignoring
  it would let through what it forbids.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from meshproxy.resources.document import Document, Path, Value, path_text
from meshproxy.resources.problems import ConfigProblem, Severity

ABSENT: Final = object()
"""A field that holds nothing to keep: null, dropped or wrong."""

IGNORED: Final = "ignored"
REFUSED: Final = "the resource is refused"
_MAX_PROBLEMS: Final = 100


class Reading:
    """One document being read: collects its problems and where moved fields were written."""

    __slots__ = ("_document", "_source", "error_count", "moved", "problems", "resource")

    def __init__(self, document: Document, source: str) -> None:
        self._document = document
        self._source = source
        self.resource = ""
        """`Kind namespace/name`, as soon as it is known."""
        self.problems: list[ConfigProblem] = []
        self.moved: dict[str, str] = {}
        self.error_count = 0

    @property
    def is_refused(self) -> bool:
        return self.error_count > 0

    def error(self, at: Path, message: str, action: str = REFUSED) -> None:
        self.error_count += 1
        self._report(Severity.ERROR, at, message, action)

    def warn(self, at: Path, message: str, action: str = IGNORED) -> None:
        self._report(Severity.WARNING, at, message, action)

    def _report(self, severity: Severity, at: Path, message: str, action: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            line = self._document.line_of(at)
            found = ConfigProblem(severity, self._source, line, path_text(at), self.resource, message, action)
            self.problems.append(found)
        elif len(self.problems) == _MAX_PROBLEMS:
            self.problems.append(
                ConfigProblem(
                    Severity.ERROR if self.is_refused else severity,
                    self._source,
                    self._document.line_of(at),
                    "",
                    self.resource,
                    f"more than {_MAX_PROBLEMS} problems",
                    "the rest is not listed",
                )
            )


class Field:
    """What one field may hold. read() gives the canonical value, or ABSENT after saying why."""

    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        raise NotImplementedError


def shown(value: Value) -> str:
    """A value in a sentence: short, and in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= 60 else text[:60] + "…"
    return f'"{text}"' if isinstance(value, str) else text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or nothing."""
    if len(word) > 64:
        return ""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    if not close:
        folded = {name.lower(): name for name in known}
        close = [folded[word.lower()]] if word.lower() in folded else []
    return f"; did you mean {close[0]}?" if close else ""


Check = Callable[[str], str | None]
"""Text → what is wrong with it, or None."""


class Text(Field):
    """Text, checked by a function. An empty string is the same as an absent field, as in protobuf."""

    __slots__ = ("_check", "_keeps_empty")

    def __init__(self, check: Check | None = None, *, keeps_empty: bool = False) -> None:
        self._check = check
        self._keeps_empty = keeps_empty

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is not str:
            if isinstance(value, dict | list):
                reading.error(at, f"{shown(value)} where text is needed")
            else:
                reading.error(at, f"{shown(value)} where text is needed; put it in quotes")
            return ABSENT
        if not value:
            return value if self._keeps_empty else ABSENT
        if self._check is not None:
            wrong = self._check(value)
            if wrong is not None:
                reading.error(at, wrong)
                return ABSENT
        return value


class Choice(Field):
    """One of the API's words. old: a former word → today's. refused: words of the API this version must not ignore."""

    __slots__ = ("_default", "_old", "_refused", "_words")

    def __init__(
        self,
        *words: str,
        default: str = "",
        old: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """default: the word that means the same as leaving the field out."""
        self._words = frozenset(words)
        self._default = default
        self._old = old or {}
        self._refused = refused or {}

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is str:
            if value in self._words:
                return value
            if value in self._old:
                today = self._old[value]
                reading.warn(at, f"{value} is the old name of {today}", f"read as {today}")
                return today
            if value in self._refused:
                reading.error(at, self._refused[value])
                return ABSENT
            if not value or (value == self._default):
                return ABSENT
        words = ", ".join(sorted(self._words))
        hint = did_you_mean(value, self._words) if type(value) is str else ""
        reading.error(at, f"{shown(value)} is none of {words}{hint}")
        return ABSENT


class Integer(Field):
    __slots__ = ("_high", "_low")

    def __init__(self, low: int = 0, high: int = 2**32 - 1) -> None:
        self._low = low
        self._high = high

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is float and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if type(value) is not int:
            quoted = "; leave out the quotes" if type(value) is str and value.lstrip("-").isdecimal() else ""
            reading.error(at, f"{shown(value)} where a whole number is needed{quoted}")
            return ABSENT
        if not self._low <= value <= self._high:
            reading.error(at, f"{value} is not in {self._low}..{self._high}")
            return ABSENT
        return value


class Number(Field):
    """A float; `over`: the lower bound itself is not allowed."""

    __slots__ = ("_high", "_low", "_over")

    def __init__(self, low: float, high: float, *, over: bool = False) -> None:
        self._low = low
        self._high = high
        self._over = over

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is not int and type(value) is not float:
            reading.error(at, f"{shown(value)} where a number is needed")
            return ABSENT
        if not self._low <= value <= self._high or (self._over and value == self._low):
            upper = "" if self._high == float("inf") else f" and at most {self._high:g}"
            reading.error(at, f"{value:g} must be {'over' if self._over else 'at least'} {self._low:g}{upper}")
            return ABSENT
        return float(value)


class Boolean(Field):
    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is not bool:
            reading.error(at, f"{shown(value)} where true or false is needed")
            return ABSENT
        return value


_DURATION = re.compile(r"(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:h|ms|m|s|us|µs|μs|ns))+")
_DURATION_STEP = re.compile(r"([0-9.]+)(h|ms|m|s|us|µs|μs|ns)")
_UNIT_S: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_MAX_DURATION_S: Final = 315_576_000_000.0  # protobuf's Duration: ten thousand years


def duration_s(text: str) -> float | None:
    """Seconds of Go's `1h2m3.5s`; None where the text is none, negative or beyond protobuf's range."""
    if len(text) > 64 or not _DURATION.fullmatch(text):
        return 0.0 if text == "0" else None
    total = sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION_STEP.findall(text))
    return round(total, 9) if total <= _MAX_DURATION_S else None


class Duration(Field):
    """`10s` → 10.0. Istio takes nothing under a millisecond; zero, where allowed, means never."""

    __slots__ = ("_allows_zero",)

    def __init__(self, *, allows_zero: bool = False) -> None:
        self._allows_zero = allows_zero

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is not str:
            unit = f" with a unit: {value}s" if type(value) in (int, float) else " such as 10s"
            reading.error(at, f"{shown(value)} where a duration is needed{unit}")
            return ABSENT
        seconds = duration_s(value)
        if seconds is None:
            reading.error(at, f"{shown(value)} is not a duration such as 100ms, 10s or 1m30s")
            return ABSENT
        if seconds < 0.001 and not (seconds == 0 and self._allows_zero):
            reading.error(at, f"{shown(value)} is shorter than 1ms")
            return ABSENT
        return seconds


class Items(Field):
    """A list. Entries that are null are errors: they are nearly always wrong indentation."""

    __slots__ = ("_at_least", "_at_most", "_item")

    def __init__(self, item: Field, *, at_least: int = 0, at_most: int = 2**31) -> None:
        self._item = item
        self._at_least = at_least
        self._at_most = at_most

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is not list:
            reading.error(at, f"{shown(value)} where a list is needed")
            return ABSENT
        out = []
        read = self._item.read
        for index, entry in enumerate(value):
            if entry is None:
                reading.error((at, index), "the entry is empty")
                continue
            item = read(entry, (at, index), reading)
            if item is not ABSENT:
                out.append(item)
            elif entry == "":
                reading.error((at, index), "the entry is empty")
        if not self._at_least <= len(value) <= self._at_most:
            bound = f"at least {self._at_least}" if len(value) < self._at_least else f"at most {self._at_most}"
            reading.error(at, f"{len(value)} entries where {bound} may stand")
        return out


class Table(Field):
    """A mapping with free keys: labels, headers, ports by name."""

    __slots__ = ("_at_least", "_key", "_value")

    def __init__(self, value: Field, *, key: Check | None = None, at_least: int = 0) -> None:
        self._value = value
        self._key = key
        self._at_least = at_least

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is not dict:
            reading.error(at, f"{shown(value)} where a mapping is needed")
            return ABSENT
        out = {}
        read = self._value.read
        for key, entry in value.items():
            if self._key is not None:
                wrong = self._key(key)
                if wrong is not None:
                    reading.error((at, key), wrong)
                    continue
            if entry is None:
                reading.error((at, key), "the value is empty")
                continue
            item = read(entry, (at, key), reading)
            if item is not ABSENT:
                out[key] = item
        if len(value) < self._at_least:
            reading.error(at, f"{len(value)} entries where at least {self._at_least} must stand")
        return out


class AnyValue(Field):
    """Kept as it is: nothing here reads it."""

    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        return value


class NotYet(Field):
    """A field of the API that this version does not serve: checked, then dropped with a warning."""

    __slots__ = ("_field", "_instead")

    def __init__(self, field: Field, instead: str = IGNORED) -> None:
        self._field = field
        self._instead = instead

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        found = self._field.read(value, at, reading)
        if found is not ABSENT and found not in (False, [], {}):
            reading.warn(at, "not supported by this version", self._instead)
        return ABSENT


class Never(Field):
    """A field that would protect if it were served: to ignore it would let through what it forbids."""

    __slots__ = ("_why",)

    def __init__(self, why: str) -> None:
        self._why = why

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if value not in (None, "", False, [], {}):
            reading.error(at, f"not supported by this version, and ignoring it would {self._why}")
        return ABSENT


Rule = Callable[[dict[str, Any], Path, Reading], None]
"""Checks or rewrites a struct's canonical value in place, after its fields were read."""


class Struct(Field):
    """A mapping with known fields."""

    __slots__ = ("_fields", "_ignored", "_is_open", "_is_strict", "_old", "_one_of", "_required", "_rules")

    def __init__(
        self,
        fields: Mapping[str, Field],
        *,
        required: Iterable[str] = (),
        one_of: Iterable[Iterable[str]] = (),
        old: Mapping[str, str] | None = None,
        rules: Iterable[Rule] = (),
        ignored: Iterable[str] = (),
        is_strict: bool = False,
        is_open: bool = False,
    ) -> None:
        """one_of: sets of which at most one field may stand. old: a former name → today's name in the same place.

        ignored: known fields that say nothing about traffic. is_strict: an unknown field is an error.
        is_open: a Kubernetes object of which a part is read; unknown fields pass unless they look like a known one.
        """
        self._fields = dict(fields)
        self._required = tuple(required)
        self._one_of = tuple(tuple(names) for names in one_of)
        self._old = dict(old or {})
        self._rules = tuple(rules)
        self._ignored = frozenset(ignored)
        self._is_strict = is_strict
        self._is_open = is_open

    def extended(self, fields: Mapping[str, Field], rules: Iterable[Rule] = ()) -> "Struct":
        """This struct with more fields and rules."""
        return Struct(
            {**self._fields, **fields},
            required=self._required,
            one_of=self._one_of,
            old=self._old,
            rules=(*self._rules, *rules),
            ignored=self._ignored,
            is_strict=self._is_strict,
            is_open=self._is_open,
        )

    @property
    def field_names(self) -> frozenset[str]:
        return frozenset(self._fields)

    def field(self, name: str) -> Field:
        return self._fields[name]

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if type(value) is not dict:
            reading.error(at, f"{shown(value)} where a mapping is needed")
            return ABSENT
        out: dict[str, Any] = {}
        errors_before = reading.error_count
        fields = self._fields
        for key, entry in value.items():
            field = fields.get(key)
            if field is None:
                if key not in self._ignored:
                    self._read_other(key, entry, value, at, reading, out)
            elif entry is not None:
                item = field.read(entry, (at, key), reading)
                if item is not ABSENT:
                    out[key] = item
        for name in self._required:
            if name not in out and value.get(name) in (None, ""):
                reading.error((at, name) if name in value else at, f"{name} is missing")
        for names in self._one_of:
            given = [name for name in out if name in names]
            if len(given) > 1:
                reading.error((at, given[1]), f"only one of {' and '.join(given)} may be given")
        # Rules compare fields: on wrong or missing ones they could only repeat what was said.
        if reading.error_count == errors_before:
            for rule in self._rules:
                rule(out, at, reading)
        return out

    def _read_other(
        self, key: str, entry: Value, value: dict[str, Value], at: Path, reading: Reading, out: dict[str, Any]
    ) -> None:
        today = self._old.get(key)
        if today is None and "_" in key:  # protobuf's own spelling, which its JSON reader takes as well
            head, *tail = key.split("_")
            camel = head + "".join(word[:1].upper() + word[1:] for word in tail)
            today = camel if camel in self._fields else None
        if today is not None:
            if entry is None:
                return
            if value.get(today) is not None:
                reading.warn((at, key), f"{key} is the old name of {today}, which is given too", f"{key} is ignored")
                return
            reading.warn((at, key), f"{key} is the old name of {today}", f"read as {today}")
            item = self._fields[today].read(entry, (at, key), reading)
            if item is not ABSENT:
                out[today] = item
                reading.moved[path_text((at, today))] = path_text((at, key))
            return
        if self._is_open:
            absent = [name for name in self._fields if name not in value]
            close = difflib.get_close_matches(key[:64], absent, n=1, cutoff=0.85)
            if close:
                reading.warn((at, key), f"unknown field; did you mean {close[0]}?")
            return
        hint = did_you_mean(key, self._fields)
        if self._is_strict:
            reading.error(
                (at, key), f"unknown field{hint}", f"{REFUSED}, because this field may be the one that protects"
            )
        else:
            reading.warn((at, key), f"unknown field{hint}")


def needs_one_of(*fields: str) -> Rule:
    """At least one of these fields must stand."""

    def rule(value: dict[str, Any], at: Path, reading: Reading) -> None:
        if not any(name in value for name in fields):
            reading.error(at, f"one of {', '.join(fields)} is needed")

    return rule
