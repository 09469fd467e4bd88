"""What a route changes: path, authority, header fields, and where a redirect points.

Source: VirtualService headers, rewrite, redirect; Envoy header manipulation order and redirect action.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from meshproxy.model.route import HeaderOps, MatchKind

if TYPE_CHECKING:
    from meshproxy.route.table import CompiledRoute

Headers = Sequence[tuple[bytes, bytes]]


class CompiledOps:
    """HeaderOps as bytes. authority: what `host` or `:authority` was set to, None where it was not."""

    __slots__ = ("add", "authority", "drop", "set")

    def __init__(self, ops: HeaderOps) -> None:
        self.authority: bytes | None = None
        # Pseudo-headers and Host cannot be removed or set as fields; setting them rewrites the authority (set wins).
        for name, value in (*ops.set, *ops.add):
            if name.lower() in _AUTHORITY and self.authority is None:
                self.authority = _literal(value)
        self.set = tuple(_pairs(ops.set))
        self.add = tuple(_pairs(ops.add))
        removed = {name.lower().encode() for name in ops.remove if not _is_pseudo(name)}
        self.drop = frozenset(removed | {name for name, _ in self.set})


_AUTHORITY = frozenset({"host", ":authority"})


def _is_pseudo(name: str) -> bool:
    return name.startswith(":") or name.lower() == "host"


def _pairs(items: Iterable[tuple[str, str]]) -> Iterable[tuple[bytes, bytes]]:
    return ((name.lower().encode(), _literal(value)) for name, value in items if not _is_pseudo(name))


def _literal(value: str) -> bytes:
    """Envoy writes a percent sign as two; command operators are left as they stand."""
    return value.replace("%%", "%").encode()


def compile_ops(ops: HeaderOps) -> CompiledOps | None:
    """None where there is nothing to do, so that a request pays one test."""
    return CompiledOps(ops) if ops.set or ops.add or ops.remove else None


def apply_ops(ops: CompiledOps, headers: Headers) -> list[tuple[bytes, bytes]]:
    """Remove, then set (overwrites), then add (appends)."""
    kept = [pair for pair in headers if pair[0] not in ops.drop]
    kept += ops.set
    kept += ops.add
    return kept


def rewrite_path(route: "CompiledRoute", path: bytes) -> bytes:
    """The request target after the route's rewrite; the query string stays."""
    rewrite = route.rewrite
    if rewrite is None:
        return path
    bare, question, query = path.partition(b"?")
    if rewrite.path_regex is not None:
        pattern, substitution = rewrite.path_regex
        bare = re.sub(pattern.encode(), substitution.encode(), bare)
    elif rewrite.path is not None:
        matched = route.matched_prefix
        replacement = rewrite.path.encode()
        if matched is not None:
            bare = replacement + bare[len(matched) :]
        else:
            bare = replacement
    if not bare.startswith(b"/"):
        bare = b"/" + bare
    return bare + question + query


def redirect_location(route: "CompiledRoute", scheme: bytes, authority: bytes, path: bytes) -> bytes:
    """The absolute Location of a redirect. `:80` with http and `:443` with https are never written."""
    redirect = route.redirect
    assert redirect is not None
    new_scheme = redirect.scheme.encode() if redirect.scheme else scheme
    host, port = _split(redirect.authority.encode() if redirect.authority else authority)
    if redirect.port is not None:
        port = b"%d" % redirect.port
    elif redirect.authority is None and redirect.scheme is not None and port in (b"80", b"443"):
        port = b""  # the old scheme's default says nothing about the new one's
    if port and (new_scheme, port) not in ((b"http", b"80"), (b"https", b"443")):
        host += b":" + port
    bare, question, query = path.partition(b"?")
    if redirect.path is not None:
        target = redirect.path.encode()
        # A path that brings its own query replaces the request's.
        target = target if b"?" in target else target + question + query
    elif redirect.prefix is not None:
        matched = route.matched_prefix or b""
        target = redirect.prefix.encode() + bare[len(matched) :] + question + query
    else:
        target = path
    return new_scheme + b"://" + host + target


def _split(authority: bytes) -> tuple[bytes, bytes]:
    """(host, port or b""); an IPv6 literal keeps its brackets."""
    host, colon, port = authority.rpartition(b":")
    if colon and port.isdigit() and (host.endswith(b"]") or b":" not in host):
        return host, port
    return authority, b""


def matched_prefix(kind: MatchKind | None, value: str) -> bytes | None:
    """What a prefix rewrite replaces: the prefix that matched; None where the match was no prefix (all is replaced)."""
    return value.encode() if kind is MatchKind.PREFIX else None
