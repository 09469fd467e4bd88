"""Conditions of a route, compiled to functions that a request's bytes are put to.

Decides: does this value satisfy this condition. Source: VirtualService StringMatch and HTTPMatchRequest; Envoy
StringMatcher, HeaderMatcher, QueryParameterMatcher. Regular expressions match the whole value (RE2 FullMatch); patterns
that RE2 would not take, or that backtrack without bound, are refused when configuration is loaded.
"""

import re
from collections.abc import Callable, Sequence

from meshproxy.model.route import MatchKind, NamedMatch, RouteMatch, StringMatch

Headers = Sequence[tuple[bytes, bytes]]
Test = Callable[[bytes], bool]


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
        return lambda text: full_match(text) is not None
    return lambda text: True


class _Named:
    """One header or query condition."""

    __slots__ = ("is_inverted", "name", "test")

    def __init__(self, named: NamedMatch) -> None:
        self.name = named.name.encode()
        self.test = compile_string(named.match)
        self.is_inverted = named.is_inverted

    def holds(self, value: bytes | None) -> bool:
        """value: None where there is none; a condition on what is absent fails, so its inverse holds."""
        return (value is not None and self.test(value)) is not self.is_inverted


def header_value(headers: Headers, name: bytes) -> bytes | None:
    """All values of a header joined by commas (Envoy); None where it is absent."""
    values = [value for key, value in headers if key == name]
    return b",".join(values) if values else None


def query_value(path: bytes, name: bytes) -> bytes | None:
    """First value of a query parameter, undecoded; b"" for one without `=`; None where it is absent."""
    _, question, query = path.partition(b"?")
    if question:
        for part in query.split(b"&"):
            key, _, value = part.partition(b"=")
            if key == name:
                return value
    return None


class CompiledMatch:
    """All conditions of one match block. `matches` checks the cheap ones first."""

    __slots__ = ("authority", "headers", "is_always", "method", "needs_header", "path", "prefix", "query", "scheme")

    def __init__(self, match: RouteMatch) -> None:
        path = match.path
        self.prefix: bytes | None = None
        self.path: Test | None = None
        if path is not None:
            if path.kind is MatchKind.PREFIX and not path.ignores_case:
                # By far the most common condition: one startswith instead of a call. A query cannot begin inside a
                # prefix that has no question mark, so the whole target may be looked at.
                self.prefix = path.value.encode() if "?" not in path.value else None
            if self.prefix is None:
                self.path = compile_string(path)
            elif self.prefix in (b"", b"/"):
                self.prefix = None
        self.method = compile_string(match.method) if match.method is not None else None
        self.authority = compile_string(match.authority) if match.authority is not None else None
        self.scheme = compile_string(match.scheme) if match.scheme is not None else None
        self.headers = tuple(_Named(named) for named in match.headers)
        self.needs_header = any(not named.is_inverted for named in self.headers)
        """A request without headers cannot match."""
        self.query = tuple(_Named(named) for named in match.query)
        self.is_always = not (
            self.prefix or self.path or self.method or self.authority or self.scheme or self.headers or self.query
        )

    def matches(self, method: bytes, path: bytes, authority: bytes, scheme: bytes, headers: Headers) -> bool:
        if self.prefix is not None and not path.startswith(self.prefix):
            return False
        if self.path is not None and not self.path(path.partition(b"?")[0]):
            return False
        if self.method is not None and not self.method(method):
            return False
        if self.authority is not None and not self.authority(authority):
            return False
        if self.scheme is not None and not self.scheme(scheme):
            return False
        for named in self.headers:
            if not named.holds(header_value(headers, named.name)):
                return False
        return all(named.holds(query_value(path, named.name)) for named in self.query)
