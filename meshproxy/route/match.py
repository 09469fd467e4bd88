"""Conditions of a route, compiled to functions that a request's bytes are put to.

Decides: does this request satisfy this match block. Leaves to others: which block is asked first (route.table).
Source: VirtualService StringMatch and HTTPMatchRequest; Envoy's path, header and query parameter matchers, compared
with Envoy 1.40 case by case. Regular expressions match the whole value, byte by byte as Envoy's do; those that RE2
would not take, or that backtrack without bound, are refused when configuration is loaded.
"""

import re
from collections.abc import Callable, Sequence
from typing import Final

from meshproxy.model.route import MatchKind, NamedMatch, RouteMatch, StringMatch

Headers = Sequence[tuple[bytes, bytes]]
Test = Callable[[bytes], bool]

MAX_REGEX_BYTES = 4096
"""Longer values match no regex. `.*a.*b` is quadratic on a backtracking engine: 8 ms on a value of this length, and
seconds on one that fills the largest head."""

_METHOD, _PATH, _AUTHORITY, _SCHEME = range(4)
_REQUEST_LINE: Final = {
    ":method": _METHOD,
    ":path": _PATH,
    ":authority": _AUTHORITY,
    "host": _AUTHORITY,
    ":scheme": _SCHEME,
}
"""What a header condition may call the parts of the request line; `:path` means the whole target, query included."""


def compile_string(match: StringMatch) -> Test:
    """A function of the value's bytes. PRESENT is true of any value, the empty one included."""
    value = match.value.encode()
    if match.kind is MatchKind.EXACT:
        if match.ignores_case:
            folded = value.lower()
            return lambda text: text.lower() == folded
        return value.__eq__
    if match.kind is MatchKind.PREFIX:
        if match.ignores_case:
            folded = value.lower()
            return lambda text: text.lower().startswith(folded)
        return lambda text: text.startswith(value)
    if match.kind is MatchKind.REGEX:
        full_match = re.compile(value).fullmatch
        return lambda text: len(text) <= MAX_REGEX_BYTES and full_match(text) is not None
    return lambda text: True


def _compile_path(match: StringMatch) -> Test:
    """A function of the whole target that looks at no more than the path in it."""
    if match.kind is MatchKind.EXACT and not match.ignores_case:
        path, path_and_more = match.value.encode(), match.value.encode() + b"?"
        return lambda target: target.startswith(path) and (target == path or target.startswith(path_and_more))
    test = compile_string(match)
    return lambda target: test(target.partition(b"?")[0])


def _inverse(test: Test) -> Test:
    return lambda text: not test(text)


class HeaderTest:
    """One header condition. A header sent several times satisfies it with any of its values (Envoy since 1.39; joined
    values would let a second field hide the first from an inverted condition)."""

    __slots__ = ("_if_absent", "_is_inverted", "_name", "_test")

    def __init__(self, named: NamedMatch) -> None:
        self._name = named.name.encode()
        self._test = compile_string(named.match)
        self._is_inverted = named.is_inverted
        # Istio lets an inverted condition see an absent header as an empty one (treat_missing_header_as_empty), except
        # where mere presence is asked for.
        self._if_absent = named.is_inverted and (named.match.kind is MatchKind.PRESENT or not self._test(b""))

    def holds(self, headers: Headers) -> bool:
        name, test = self._name, self._test
        is_absent = True
        for key, value in headers:
            if key == name:
                if test(value):
                    return not self._is_inverted
                is_absent = False
        return self._if_absent if is_absent else self._is_inverted


class QueryTest:
    """One query parameter condition, on the first value of that name."""

    __slots__ = ("_is_inverted", "_name", "_test")

    def __init__(self, named: NamedMatch) -> None:
        self._name = named.name.encode()
        self._test = compile_string(named.match)
        self._is_inverted = named.is_inverted

    def holds(self, target: bytes) -> bool:
        value = query_value(target, self._name)
        return (value is not None and self._test(value)) is not self._is_inverted


def query_value(target: bytes, name: bytes) -> bytes | None:
    """First value of a query parameter, undecoded; b"" for one without `=`; None where it is absent."""
    _, question, query = target.partition(b"?")
    if question:
        for part in query.split(b"&"):
            key, _, value = part.partition(b"=")
            if key == name:
                return value
    return None


class CompiledMatch:
    """All conditions of one match block."""

    __slots__ = ("_headers", "_path", "_query", "_request_line", "header_names", "is_always", "needs_header", "prefix")

    def __init__(self, match: RouteMatch) -> None:
        self.prefix: bytes | None = None
        """A case-sensitive path prefix: by far the most common condition, tested by the caller without a call."""
        self._path: Test | None = None
        path = match.path
        if path is None or path.kind is MatchKind.PRESENT:
            pass
        elif path.kind is MatchKind.PREFIX and not path.ignores_case and "?" not in path.value:
            # A query cannot begin inside a prefix that has no question mark, so the whole target may be looked at.
            self.prefix = path.value.encode() if path.value not in ("", "/") else None
        else:
            self._path = _compile_path(path)
        request_line: list[tuple[int, Test]] = []
        for part, condition in (
            (_METHOD, match.method),
            (_AUTHORITY, match.authority),
            (_SCHEME, match.scheme),
        ):
            if condition is not None and condition.kind is not MatchKind.PRESENT:
                request_line.append((part, _compile_part(part, condition)))
        headers = []
        for named in match.headers:
            named_part = _REQUEST_LINE.get(named.name)
            if named_part is None:
                headers.append(named)
            else:
                test = _compile_part(named_part, named.match)
                request_line.append((named_part, _inverse(test) if named.is_inverted else test))
        self._request_line = tuple(request_line)
        self._headers = tuple(HeaderTest(named) for named in headers)
        self._query = tuple(QueryTest(named) for named in match.query)
        self.header_names = frozenset(named.name.encode() for named in headers)
        self.needs_header = any(not named.is_inverted for named in headers)
        """A request without headers cannot match."""
        is_rest_empty = not (self._path or self._request_line or self._headers or self._query)
        self.is_always = self.prefix is None and is_rest_empty

    @property
    def is_prefix_only(self) -> bool:
        return not (self._path or self._request_line or self._headers or self._query)

    def matches(self, method: bytes, path: bytes, authority: bytes, scheme: bytes, headers: Headers) -> bool:
        if self.prefix is not None and not path.startswith(self.prefix):
            return False
        return self.matches_rest(method, path, authority, scheme, headers)

    def matches_rest(self, method: bytes, path: bytes, authority: bytes, scheme: bytes, headers: Headers) -> bool:
        """All conditions but `prefix`, the cheap ones first."""
        if self._path is not None and not self._path(path):
            return False
        if self._request_line:
            parts = (method, path, authority, scheme)
            for part, test in self._request_line:
                if not test(parts[part]):
                    return False
        for header in self._headers:
            if not header.holds(headers):
                return False
        return all([parameter.holds(path) for parameter in self._query]) if self._query else True


def _compile_part(part: int, match: StringMatch) -> Test:
    """Authorities arrive in lower case, so what is written in the configuration is lowered too: case means nothing."""
    if part == _AUTHORITY and match.kind in (MatchKind.EXACT, MatchKind.PREFIX):
        match = StringMatch(match.kind, match.value.lower())
    return compile_string(match)
