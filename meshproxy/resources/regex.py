"""Is this regular expression safe to run on what strangers send?

Istio's regexes are RE2: linear time, no back-references, no look-around. Python's engine backtracks, so an expression
is taken only if RE2 would take it and backtracking cannot explode on it. What is allowed means the same in both.

Source: RE2 syntax (github.com/google/re2/wiki/Syntax); Istio's limit of 1024 characters.
"""

import re
import warnings
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, Final

MAX_LENGTH: Final = 1024
_MAX_REPEAT: Final = 1000  # RE2's own bound on {n,m}
_MAX_SIZE: Final = 10_000  # characters after counted repeats are written out: (a{1000}){1000} is short and huge


def check_regex(pattern: str) -> str | None:
    """What is wrong with the expression, as a clause after its field; None where it may be used with fullmatch."""
    if len(pattern) > MAX_LENGTH:
        return f"the regex has {len(pattern)} characters and may have {MAX_LENGTH}"
    if "[[:" in pattern or "[^[:" in pattern:
        return r"POSIX classes such as [[:alpha:]] are not supported; write the range"
    if re.search(r"\\[pPQECz]", re.sub(r"\\\\", "", pattern)):
        return r"\p, \P, \Q, \E, \C and \z are not supported"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern)
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        what = getattr(e, "msg", "") or "too complex"
        return f"not a regex: {what}"
    try:
        _walk(tree, 0)
    except _Unsafe as e:
        return str(e)
    return None


class _Unsafe(Exception):
    pass


class _Chars:
    """Which characters an item may begin with; `every` where that is not worth working out."""

    __slots__ = ("every", "ranges")

    def __init__(self, ranges: tuple[tuple[int, int], ...] = (), every: bool = False) -> None:
        self.ranges = ranges
        self.every = every

    def __or__(self, other: "_Chars") -> "_Chars":
        return _Chars((*self.ranges, *other.ranges), self.every or other.every)

    def meets(self, other: "_Chars") -> bool:
        if self.every:
            return other.every or bool(other.ranges)
        if other.every:
            return bool(self.ranges)
        return any(low <= high2 and low2 <= high for low, high in self.ranges for low2, high2 in other.ranges)


_EVERY: Final = _Chars(every=True)
_NOTHING: Final = _Chars()
_CATEGORIES: Final = {
    op.CATEGORY_DIGIT: ((48, 57),),
    op.CATEGORY_SPACE: ((9, 13), (32, 32)),
    op.CATEGORY_WORD: ((48, 57), (65, 90), (95, 95), (97, 122), (128, 0x10FFFF)),
}


class _Shape:
    """What matters of a part: the characters it may begin with, all it may hold, whether it may be empty, its size."""

    __slots__ = ("can_be_empty", "first", "has_open_repeat", "holds", "size")

    def __init__(
        self, first: _Chars, holds: _Chars, can_be_empty: bool, size: int = 1, has_open_repeat: bool = False
    ) -> None:
        self.first = first
        self.holds = holds
        self.can_be_empty = can_be_empty
        self.size = size
        self.has_open_repeat = has_open_repeat


_EMPTY: Final = _Shape(_NOTHING, _NOTHING, True, 0)


def _walk(items: Any, depth: int) -> _Shape:
    """Shape of a sequence; raises where matching it could take more than quadratic time."""
    if depth > 50:
        raise _Unsafe("the regex nests too deeply")
    shapes = [_item(code, argument, depth) for code, argument in items]
    _refuse_runs(shapes, [code for code, _ in items])
    first, holds, can_be_empty, size, has_open = _NOTHING, _NOTHING, True, 0, False
    for shape in shapes:
        if can_be_empty:
            first |= shape.first
        holds |= shape.holds
        can_be_empty = can_be_empty and shape.can_be_empty
        size += shape.size
        has_open = has_open or shape.has_open_repeat
    if size > _MAX_SIZE:
        raise _Unsafe("the regex is too large once its counted repeats are written out")
    return _Shape(first, holds, can_be_empty, size, has_open)


def _refuse_runs(shapes: list[_Shape], codes: list[Any]) -> None:
    """Open repeats that can trade characters: each one more is another power of the text's length.

    Two are quadratic, and `.*a.*` is everyday; three are refused.
    """
    run = 0
    reach = _NOTHING
    for shape, code in zip(shapes, codes, strict=True):
        if shape.has_open_repeat:
            if run and not reach.meets(shape.holds):
                run = 0
            run += 1
            reach = shape.holds
            if run > 2 and code in _REPEATS:
                raise _Unsafe("three unbounded repeats in a row can match the same text, which takes cubic time")
        elif not shape.can_be_empty and run and not reach.meets(shape.first):
            run = 0
            reach = _NOTHING


_REPEATS: Final = (op.MAX_REPEAT, op.MIN_REPEAT)


def _item(code: Any, argument: Any, depth: int) -> _Shape:
    if code in (op.LITERAL, op.NOT_LITERAL, op.IN, op.ANY):
        chars = _chars(code, argument)
        return _Shape(chars, chars, False)
    if code is op.AT:
        return _EMPTY
    if code is op.SUBPATTERN:
        return _walk(argument[3], depth + 1)
    if code is op.BRANCH:
        return _branch(argument[1], depth)
    if code in _REPEATS:
        return _repeat(argument, depth)
    name = _NAMES.get(code)
    raise _Unsafe(f"RE2 has no {name or str(code).lower()}")


_NAMES: Final = {
    op.GROUPREF: r"back-references such as \1",
    op.GROUPREF_IGNORE: r"back-references such as \1",
    op.GROUPREF_EXISTS: "conditional groups",
    op.ASSERT: "look-around such as (?=…) and (?<=…)",
    op.ASSERT_NOT: "look-around such as (?!…) and (?<!…)",
    op.ATOMIC_GROUP: "atomic groups (?>…)",
    op.POSSESSIVE_REPEAT: "possessive repeats such as a++",
}


def _branch(branches: Any, depth: int) -> _Shape:
    shapes = [_walk(branch, depth + 1) for branch in branches]
    first, holds = _NOTHING, _NOTHING
    for shape in shapes:
        first |= shape.first
        holds |= shape.holds
    return _Shape(
        first,
        holds,
        any(shape.can_be_empty for shape in shapes),
        sum(shape.size for shape in shapes) + 1,
        any(shape.has_open_repeat for shape in shapes),
    )


def _repeat(argument: Any, depth: int) -> _Shape:
    low, high, body = argument
    shape = _walk(body, depth + 1)
    is_open = high is op.MAXREPEAT
    if (not is_open and high > _MAX_REPEAT) or low > _MAX_REPEAT:
        raise _Unsafe(f"RE2 repeats at most {_MAX_REPEAT} times")
    repeats_itself = is_open or high > 1
    if repeats_itself:
        if shape.can_be_empty and is_open:
            raise _Unsafe(
                "it repeats something that can be empty without bound, as in (a*)*, which can take exponential time"
            )
        if shape.has_open_repeat and (is_open or high > 2) and _is_ambiguous(body, shape):
            raise _Unsafe("it repeats a repeat without bound, as in (a+)+, which can take exponential time")
        if (is_open or high > 10) and _has_overlapping_branches(body, depth):
            raise _Unsafe(
                "it repeats alternatives that can match the same text, as in (a|a)*, which can take exponential time"
            )
    size = shape.size * (max(low, 1) if is_open else max(high, 1))
    return _Shape(shape.first, shape.holds, shape.can_be_empty or low == 0, size, is_open or shape.has_open_repeat)


def _is_ambiguous(body: Any, shape: _Shape) -> bool:
    """Can one text be cut into rounds of this body in several ways?

    Not if each round begins with something its open repeats cannot hold, as in (/[a-z]+)*, or ends so: ([a-z]+/)*.
    """
    items = list(_flat(body))
    held = _open_parts(items)
    shapes = [_item(code, argument, 1) for code, argument in items]
    for end in (shapes[0], shapes[-1]) if shapes else ():
        if not end.can_be_empty and not end.has_open_repeat and not end.holds.meets(held):
            return False
    return True


def _flat(items: Any) -> Any:
    """The sequence with plain groups opened."""
    for code, argument in items:
        if code is op.SUBPATTERN:
            yield from _flat(argument[3])
        else:
            yield code, argument


def _open_parts(items: Any) -> _Chars:
    held = _NOTHING
    for code, argument in items:
        shape = _item(code, argument, 1)
        if shape.has_open_repeat:
            held |= shape.holds
    return held


def _has_overlapping_branches(body: Any, depth: int) -> bool:
    """Alternatives (or optional parts) of a repeated body that begin alike, so that each round has two ways to go."""
    items = list(_flat(body))
    for index, (code, argument) in enumerate(items):
        if code is op.BRANCH:
            shapes = [_walk(branch, depth + 1) for branch in argument[1]]
            for at, shape in enumerate(shapes):
                if any(shape.first.meets(other.first) for other in shapes[:at]) and not _are_distinct_words(
                    argument[1]
                ):
                    return True
        if code in _REPEATS and argument[0] != argument[1]:
            # a? a, or a{1,3}: what follows (or the next round) may begin with what the optional part holds.
            shape = _item(code, argument, depth + 1)
            following = items[index + 1 :] or items
            if not shape.has_open_repeat and any(
                shape.holds.meets(_item(c, a, depth + 1).first) for c, a in following[:1]
            ):
                return True
    return False


def _are_distinct_words(branches: Any) -> bool:
    """Only literal words, none the beginning of another: at most one of them fits any text."""
    words = []
    for branch in branches:
        if not all(code is op.LITERAL for code, _ in branch):
            return False
        words.append(tuple(argument for _, argument in branch))
    return not any(a[: len(b)] == b for i, a in enumerate(words) for j, b in enumerate(words) if i != j)


def _chars(code: Any, argument: Any) -> _Chars:
    if code is op.LITERAL:
        # Either case: (?i) is not tracked, and too wide a set only refuses more.
        text = chr(argument)
        return _Chars(tuple((ord(c), ord(c)) for c in {text, text.lower()[:1], text.upper()[:1]} if c))
    if code is op.IN:
        ranges: list[tuple[int, int]] = []
        is_negated = False
        for kind, value in argument:
            if kind is op.NEGATE:
                is_negated = True
            elif kind is op.LITERAL:
                ranges.append((value, value))
            elif kind is op.RANGE:
                ranges.append((value[0], value[1]))
            elif kind is op.CATEGORY and value in _CATEGORIES:
                ranges.extend(_CATEGORIES[value])
            else:
                return _EVERY
        return _Chars(_complement(ranges) if is_negated else tuple(ranges))
    if code is op.NOT_LITERAL:
        return _Chars(_complement([(argument, argument)]))
    return _EVERY


def _complement(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    out = []
    start = 0
    for low, high in sorted(ranges):
        if low > start:
            out.append((start, low - 1))
        start = max(start, high + 1)
    if start <= 0x10FFFF:
        out.append((start, 0x10FFFF))
    return tuple(out)
