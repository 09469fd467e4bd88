"""Is this regular expression safe to run on what strangers send?

Istio's regexes are RE2: linear time, no back-references, no look-around. Python's engine backtracks, so an expression
is taken only if RE2 would take it and backtracking cannot explode on it. What is allowed means the same in both.

Source: RE2 syntax (github.com/google/re2/wiki/Syntax); Istio's limit of 1024 characters.
"""

import math
import re
import warnings
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, Final

MAX_LENGTH: Final = 1024
_MAX_REPEAT: Final = 1000  # RE2's own bound on {n,m}
_MAX_DEPTH: Final = 50
_MAX_CHOICE_BITS: Final = 10  # a thousand ways to match one text, each tried before giving up
_OPEN_ENOUGH: Final = 32  # {0,32} is counted as unbounded
_MAX_SIZE: Final = 10_000  # characters after counted repeats are written out: (a{1000}){1000} is short and huge


def check_regex(pattern: str) -> str | None:
    """What is wrong with the expression, as a clause after its field; None where it may be used with fullmatch."""
    if len(pattern) > MAX_LENGTH:
        return f"the regex has {len(pattern)} characters and may have {MAX_LENGTH}"
    if "[[:" in pattern or "[^[:" in pattern:
        return r"POSIX classes such as [[:alpha:]] are not supported; write the range"
    if re.search(r"\\[pPQECzZ]", re.sub(r"\\\\", "", pattern)):
        return r"\p, \P, \Q, \E, \C, \z and \Z are not supported"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern)
            re.compile(pattern.encode())  # requests are matched as bytes, which know no \\u and no (?u)
    except (re.error, OverflowError, RecursionError) as e:
        what = getattr(e, "msg", "") or "too complex"
        return f"not a regex: {what}"
    try:
        walk = _Walk()
        walk.sequence(tree, 0)
        if walk.choice_bits(tree) > _MAX_CHOICE_BITS:
            return "one text can be matched in more than a thousand ways, as by a?a?a?…, and each may be tried"
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
    """What matters of a part of the regex."""

    __slots__ = ("can_be_empty", "first", "holds", "powers", "size")

    def __init__(self, first: _Chars, holds: _Chars, can_be_empty: bool, size: int = 1, powers: int = 0) -> None:
        """first: characters it may begin with; holds: characters it may contain; size: with repeats written out.

        powers: unbounded repeats in it that can trade characters, each another power of the text's length in time.
        """
        self.first = first
        self.holds = holds
        self.can_be_empty = can_be_empty
        self.size = size
        self.powers = powers


_EMPTY: Final = _Shape(_NOTHING, _NOTHING, True, 0)
_REPEATS: Final = (op.MAX_REPEAT, op.MIN_REPEAT)
_NAMES: Final = {
    op.GROUPREF: r"back-references such as \1",
    op.GROUPREF_IGNORE: r"back-references such as \1",
    op.GROUPREF_EXISTS: "conditional groups",
    op.ASSERT: "look-around such as (?=…) and (?<=…)",
    op.ASSERT_NOT: "look-around such as (?!…) and (?<!…)",
    op.ATOMIC_GROUP: "atomic groups (?>…)",
    op.POSSESSIVE_REPEAT: "possessive repeats such as a++",
}


class _Walk:
    """Works out shapes from the leaves up; raises _Unsafe at the first part that could explode.

    Looks one character ahead, and so refuses some harmless regexes. Shapes are kept by the identity of their part: the
    parts of nested repeats are asked for at every level.
    """

    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, int], _Shape] = {}

    def sequence(self, items: Any, depth: int) -> _Shape:
        if depth > _MAX_DEPTH:
            raise _Unsafe("the regex nests too deeply")
        shapes = [self._item(code, argument, depth) for code, argument in items]
        first, holds, can_be_empty, size = _NOTHING, _NOTHING, True, 0
        for shape in shapes:
            if can_be_empty:
                first |= shape.first
            holds |= shape.holds
            can_be_empty = can_be_empty and shape.can_be_empty
            size += shape.size
        if size > _MAX_SIZE:
            raise _Unsafe("the regex is too large once its counted repeats are written out")
        # `.*` at the end takes whatever is left and never gives back.
        trading = shapes[:-1] if depth == 0 and shapes and _takes_all(*items[-1]) else shapes
        return _Shape(first, holds, can_be_empty, size, _powers(trading))

    def _item(self, code: Any, argument: Any, depth: int) -> _Shape:
        if code in (op.LITERAL, op.NOT_LITERAL, op.IN, op.ANY):
            chars = _chars(code, argument)
            return _Shape(chars, chars, False)
        if code is op.AT:
            return _EMPTY
        key = (int(code), id(argument))
        shape = self._shapes.get(key)
        if shape is None:
            if code is op.SUBPATTERN:
                shape = self.sequence(argument[3], depth + 1)
            elif code is op.BRANCH:
                shape = self._branch(argument[1], depth)
            elif code in _REPEATS:
                shape = self._repeat(argument, depth)
            else:
                raise _Unsafe(f"RE2 has no {_NAMES.get(code) or str(code).lower()}")
            self._shapes[key] = shape
        return shape

    def _branch(self, branches: Any, depth: int) -> _Shape:
        shapes = [self.sequence(branch, depth + 1) for branch in branches]
        first, holds = _NOTHING, _NOTHING
        for shape in shapes:
            first |= shape.first
            holds |= shape.holds
        return _Shape(
            first,
            holds,
            any(shape.can_be_empty for shape in shapes),
            sum(shape.size for shape in shapes) + 1,
            max(shape.powers for shape in shapes),
        )

    def _repeat(self, argument: Any, depth: int) -> _Shape:
        low, high, body = argument
        shape = self.sequence(body, depth + 1)
        is_open = high is op.MAXREPEAT
        if (not is_open and high > _MAX_REPEAT) or low > _MAX_REPEAT:
            raise _Unsafe(f"RE2 repeats at most {_MAX_REPEAT} times")
        if is_open and shape.can_be_empty:
            raise _Unsafe(
                "it repeats something that can be empty without bound, as in (a*)*, which can take exponential time"
            )
        if (is_open or high > 1) and shape.powers and self._has_ambiguous_bounds(body):
            raise _Unsafe("it repeats a repeat without bound, as in (a+)+, which can take exponential time")
        if is_open and self.choice_bits(body, shape.first, depth + 1, is_repeated=True) > 0:
            raise _Unsafe(
                "it repeats alternatives that can match the same text, as in (a|a)*, which can take exponential time"
            )
        size = shape.size * (max(low, 1) if is_open else max(high, 1))
        powers = max(shape.powers, 1) if is_open or high - low >= _OPEN_ENOUGH else shape.powers
        return _Shape(shape.first, shape.holds, shape.can_be_empty or low == 0, size, powers)

    def _has_ambiguous_bounds(self, body: Any) -> bool:
        """Can one text be cut into rounds of this body in several ways?

        Not if each round begins with something its open repeats cannot hold, as in (/[a-z]+)*, or ends so: ([a-z]+/)*.
        """
        shapes = [self._item(code, argument, 1) for code, argument in _flat(body)]
        held = _NOTHING
        for shape in shapes:
            if shape.powers:
                held |= shape.holds
        return all(end.can_be_empty or end.powers or end.holds.meets(held) for end in (shapes[0], shapes[-1]))

    def choice_bits(self, items: Any, after: _Chars = _NOTHING, depth: int = 0, *, is_repeated: bool = False) -> float:
        """Binary logarithm of the ways in which one text can be matched. after: what may follow the items.

        Unbounded repeats of the top level are not counted: their ways are the powers of a shape.
        """
        shapes = [self._item(code, argument, depth) for code, argument in items]
        bits = 0.0
        for index, (code, argument) in enumerate(items):
            following = _first_of(shapes[index + 1 :], after)
            if code is op.SUBPATTERN:
                bits += self.choice_bits(argument[3], following, depth + 1, is_repeated=is_repeated)
            elif code is op.BRANCH:
                branches = [self.sequence(branch, depth + 1) for branch in argument[1]]
                empty = sum(branch.can_be_empty for branch in branches)
                if (
                    empty > 1
                    or (empty and shapes[index].holds.meets(following))
                    or (
                        not _are_distinct_words(argument[1])
                        and any(
                            branch.first.meets(other.first)
                            for at, branch in enumerate(branches)
                            for other in branches[:at]
                        )
                    )
                ):
                    bits += math.log2(len(branches))
                bits += max(
                    self.choice_bits(branch, following, depth + 1, is_repeated=is_repeated) for branch in argument[1]
                )
            elif code in _REPEATS:
                low, high, body = argument
                is_open = high is op.MAXREPEAT
                if low != high and shapes[index].holds.meets(following) and (is_repeated or not is_open):
                    bits += 1 if is_open else math.log2(high - low + 1)
                if not is_open:
                    inside = self.choice_bits(
                        body, following | shapes[index].first, depth + 1, is_repeated=is_repeated or high > 1
                    )
                    bits += inside * max(high, 1)
        return bits


def _takes_all(code: Any, argument: Any) -> bool:
    return code in _REPEATS and argument[1] is op.MAXREPEAT and [kind for kind, _ in argument[2]] == [op.ANY]


def _powers(shapes: list[_Shape]) -> int:
    """Most powers of any run of parts that can trade characters: two are everyday (`.*a.*b`), three are refused."""
    most = run = 0
    reach = _NOTHING
    for shape in shapes:
        if shape.powers:
            run = run + shape.powers if reach.meets(shape.holds) else shape.powers
            reach = shape.holds
            most = max(most, run)
            if run > 2:
                raise _Unsafe("three unbounded repeats in a row can match the same text, which takes cubic time")
        elif not shape.can_be_empty and not reach.meets(shape.first):
            run = 0
            reach = _NOTHING
    return most


def _flat(items: Any) -> Any:
    """The sequence with plain groups opened."""
    for code, argument in items:
        if code is op.SUBPATTERN:
            yield from _flat(argument[3])
        else:
            yield code, argument


def _first_of(shapes: list[_Shape], after: _Chars) -> _Chars:
    """The characters with which the shapes, or what comes after them, may begin."""
    first = _NOTHING
    for shape in shapes:
        first |= shape.first
        if not shape.can_be_empty:
            return first
    return first | after


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
