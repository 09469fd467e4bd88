"""What a route changes: path, authority, header fields, and where a redirect points.

Source: VirtualService headers, rewrite, redirect; Envoy's header manipulation, prefix and regex rewrite and redirect,
compared with Envoy 1.40 case by case. Knowingly different: a target never loses its leading slash or gains bytes that a
target may not have, the fields that frame a message are nobody's to change, and a default port is never written.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from meshproxy.model.route import HeaderOps, MatchKind, Redirect, Rewrite, RouteMatch

if TYPE_CHECKING:
    from meshproxy.route.table import CompiledRoute

Headers = Sequence[tuple[bytes, bytes]]

MAX_REGEX_PATH_BYTES: Final = 2048
"""Longest path that a regex rewrite searches; route.table answers 414 beyond it. A search is quadratic on a
backtracking engine: `/(.*)/old/(.*)` takes 24 ms on a path of this length, and 17 s on one that fills a whole head."""

_AUTHORITY: Final = frozenset({"host", ":authority"})
_FRAMING: Final = frozenset(
    {"connection", "content-length", "http2-settings", "keep-alive", "proxy-connection", "te", "transfer-encoding"}
    | {"upgrade"}
)
"""Fields of this hop. A route that removed Content-Length or set Transfer-Encoding would make two messages of one."""


class CompiledOps:
    """Header operations as bytes. authority: what `host` or `:authority` was set to, None where it was not."""

    __slots__ = ("added", "authority", "dropped")

    def __init__(self, *layers: HeaderOps) -> None:
        """layers: applied in this order, after everything that any of them removes; the first authority wins."""
        self.authority: bytes | None = None
        added: list[tuple[bytes, bytes]] = []
        dropped: set[bytes] = set()
        for ops in layers:
            # Setting the authority wins over adding it: there is only one.
            for name, value in (*ops.set, *ops.add):
                if name.lower() in _AUTHORITY and value and self.authority is None:
                    self.authority = _literal(value)
            dropped.update(name.lower().encode() for name in ops.remove if _may_change(name))
            for pair in _pairs(ops.set):
                dropped.add(pair[0])
                added = [other for other in added if other[0] != pair[0]]
                added.append(pair)
            added += _pairs(ops.add)
        self.added = tuple(added)
        self.dropped = frozenset(dropped)


def _may_change(name: str) -> bool:
    """Pseudo-headers and Host are changed by a rewrite, not by name."""
    return not name.startswith(":") and name.lower() != "host" and name.lower() not in _FRAMING


def _pairs(items: Iterable[tuple[str, str]]) -> Iterable[tuple[bytes, bytes]]:
    """Envoy ignores an operation whose value is empty: it neither adds nor empties a header."""
    return ((name.lower().encode(), _literal(value)) for name, value in items if value and _may_change(name))


def _literal(value: str) -> bytes:
    """Envoy writes a percent sign as two; command operators are left as they stand."""
    return value.replace("%%", "%").encode()


def compile_ops(*layers: HeaderOps) -> CompiledOps | None:
    """None where there is nothing to do, so that a request pays one test."""
    ops = CompiledOps(*layers)
    return ops if ops.added or ops.dropped or ops.authority is not None else None


def apply_ops(ops: CompiledOps, headers: Headers) -> list[tuple[bytes, bytes]]:
    """Remove, then set (overwrites), then add (appends). Names in `headers` are lower-case."""
    dropped = ops.dropped
    kept = [pair for pair in headers if pair[0] not in dropped]
    kept += ops.added
    return kept


class PathRewrite:
    """A route's path rewrite, prepared. Takes and gives a path without its query."""

    __slots__ = ("_matched_bytes", "_new", "_parts", "_pattern", "_tries_start_only")

    def __init__(self, rewrite: Rewrite, matched: bytes | None) -> None:
        """matched: the prefix that matched, of which only the length counts; None: the whole path is replaced."""
        self._matched_bytes = len(matched) if matched is not None else None
        self._pattern: re.Pattern[bytes] | None = None
        self._new = b""
        if rewrite.path_regex is not None:
            regex, substitution = rewrite.path_regex
            self._pattern = re.compile(regex.encode())
            self._parts = _substitution(substitution, self._pattern.groups)
            self._tries_start_only = _TAKES_THE_START.match(regex) is not None and "|" not in regex
        else:
            assert rewrite.path is not None, "no rewrite of the path"
            self._new = _target(rewrite.path)

    def apply(self, path: bytes) -> bytes:
        if self._pattern is not None:
            new = self._replace_all(self._pattern, path)
        elif self._matched_bytes is not None:
            new = self._new + path[self._matched_bytes :]
        else:
            new = self._new
        return new if new.startswith(b"/") else b"/" + new

    def _replace_all(self, pattern: re.Pattern[bytes], path: bytes) -> bytes:
        """As RE2's GlobalReplace, which re.sub is not: no empty match where the match before it ended."""
        find = pattern.match if self._tries_start_only else pattern.search
        out: list[bytes] = []
        at, last_end = 0, -1
        while at <= len(path):
            match = find(path, at)
            if match is None:
                break
            start, end = match.span()
            out.append(path[at:start])
            if start == end == last_end:
                out.append(path[at : at + 1])
                at += 1
                continue
            out += [part if isinstance(part, bytes) else match.group(part) or b"" for part in self._parts]
            at = last_end = end
        out.append(path[at:])
        return b"".join(out)


# Where such a regex does not match, it does not match any further on either: `.*` could have taken what was skipped
# (paths have no line ends, which `.` leaves out). (.*)/old/(.*) on a path of 2 KiB: 22 ms by searching, 40 µs so.
_TAKES_THE_START = re.compile(r"(?:\.\*|\(\.\*\))(?![?*+{])")


def _substitution(text: str, groups: int) -> tuple[bytes | int, ...]:
    r"""RE2's: `\0` to `\9` are groups (one digit each), `\\` a backslash. A group that the regex lacks is empty."""
    parts: list[bytes | int] = []
    for literal, digit in re.findall(r"((?:[^\\]|\\[^0-9]|\\\Z)+)|\\([0-9])", text, re.DOTALL):
        if literal:
            parts.append(_target(literal.replace("\\\\", "\\")))
        elif int(digit) <= groups:
            parts.append(int(digit))
    return tuple(parts)


def _target(text: str) -> bytes:
    """What configuration puts into a request target, with the bytes that no target may have percent-encoded."""
    return _NOT_IN_TARGET.sub(lambda found: b"%%%02X" % found[0][0], text.encode())


_NOT_IN_TARGET = re.compile(rb"[^\x21\x22\x24-\x7e]")


def compile_path_rewrite(rewrite: Rewrite | None, match: RouteMatch) -> PathRewrite | None:
    """None where the path stays."""
    if rewrite is None or (rewrite.path is None and rewrite.path_regex is None):
        return None
    return PathRewrite(rewrite, matched_prefix(match))


def rewrite_path(route: "CompiledRoute", path: bytes) -> bytes:
    """The request target after the route's rewrite; the query stays, and so does `*` (OPTIONS), which is no path."""
    rewrite = route.path_rewrite
    if rewrite is None or not path.startswith(b"/"):
        return path
    bare, question, query = path.partition(b"?")
    return rewrite.apply(bare) + question + query


def redirect_location(route: "CompiledRoute", scheme: bytes, authority: bytes, path: bytes) -> bytes:
    """The absolute Location of a redirect. `:80` with http and `:443` with https are never written."""
    redirect = route.redirect
    assert redirect is not None, "only a redirect has a location"
    new_scheme = redirect.scheme.encode() if redirect.scheme else scheme
    host, port = _split(redirect.authority.encode() if redirect.authority else authority)
    if redirect.port is not None:
        port = b"%d" % redirect.port
    elif not redirect.authority and new_scheme != scheme and port == _DEFAULT_PORT.get(scheme):
        port = b""  # the old scheme's default says nothing about the new one's
    if port and port != _DEFAULT_PORT.get(new_scheme):
        host += b":" + port
    return new_scheme + b"://" + host + _redirected(redirect, route.matched_prefix, path)


def _redirected(redirect: Redirect, matched: bytes | None, path: bytes) -> bytes:
    bare, question, query = path.partition(b"?")
    if redirect.path is not None:
        new = _target(redirect.path)
        if b"?" in new:  # a path that brings its own query replaces the request's
            question = query = b""
    elif redirect.prefix is not None:
        new = _target(redirect.prefix) + (bare[len(matched) :] if matched is not None else b"")
    else:
        new = bare
    return (new if new.startswith(b"/") else b"/" + new) + question + query


_DEFAULT_PORT: Final = {b"http": b"80", b"https": b"443"}


def _split(authority: bytes) -> tuple[bytes, bytes]:
    """(host, port or b""); an IPv6 literal keeps its brackets."""
    host, colon, port = authority.rpartition(b":")
    if colon and port.isdigit() and (host.endswith(b"]") or b":" not in host):
        return host, port
    return authority, b""


def matched_prefix(match: RouteMatch) -> bytes | None:
    """What a prefix rewrite replaces: the prefix that matched; None where the match was no prefix (all is replaced)."""
    path = match.path
    return path.value.encode() if path is not None and path.kind is MatchKind.PREFIX else None
