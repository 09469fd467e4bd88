"""Laws of routing: the compiled table against a reference that only loops, and rewrites that stay inside the path."""

import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshproxy.model.route import (
    HeaderOps,
    MatchKind,
    NamedMatch,
    Rewrite,
    Route,
    RouteMatch,
    RouteTable,
    StringMatch,
    VirtualHost,
    WeightedCluster,
)
from meshproxy.route.match import CompiledMatch
from meshproxy.route.rewrite import CompiledOps, apply_ops, rewrite_path
from meshproxy.route.table import CompiledHost, CompiledRoute, CompiledTable

ONE = (WeightedCluster(cluster_key="one"),)
LABELS = st.sampled_from(["a", "b", "ab", "-a", ""])
NAMES = st.builds(
    lambda labels, port: ".".join(labels) + port, st.lists(LABELS, max_size=4), st.sampled_from(["", ":80", ":8"])
)
PATTERNS = st.one_of(NAMES.filter(bool), NAMES.map(lambda name: f"*.{name}"), NAMES.map(lambda name: f"*{name}"))


def reference_find(hosts: list[VirtualHost], authority: str) -> str | None:
    best: tuple[int, int] = (-1, 0)
    found = None
    for host in hosts:
        for domain in host.domains:
            if domain == "*":
                rank = (0, 0)
            elif domain.startswith("*"):
                suffix = domain[1:]
                if not authority.endswith(suffix) or len(authority) <= len(suffix):
                    continue
                rank = (1, len(suffix))
            elif domain == authority:
                rank = (2, 0)
            else:
                continue
            if rank > best:
                best, found = rank, host.name
    return found


@settings(max_examples=300)
@given(domains=st.lists(st.lists(PATTERNS, min_size=1, max_size=3), max_size=6), asked=st.lists(NAMES, max_size=8))
def test_find_agrees_with_a_search_of_every_domain(domains: list[list[str]], asked: list[str]) -> None:
    hosts = [VirtualHost(name=str(n), domains=tuple(names), routes=()) for n, names in enumerate(domains)]
    table = CompiledTable(RouteTable(name="t", virtual_hosts=tuple(hosts)))
    for authority in (*asked, *asked):
        found = table.find(authority.encode())
        assert (found.name if found else None) == reference_find(hosts, authority)


TEXT = st.text("ab/", max_size=4)
CONDITIONS = st.one_of(
    st.builds(StringMatch, st.sampled_from([MatchKind.EXACT, MatchKind.PREFIX]), TEXT, st.booleans()),
    st.builds(StringMatch, st.just(MatchKind.REGEX), st.sampled_from(["", "a*", "/.*", "/a|b", "[ab/]+"])),
    st.just(StringMatch(MatchKind.PRESENT)),
)
BLOCKS = st.builds(
    RouteMatch,
    path=st.none() | CONDITIONS,
    method=st.none() | CONDITIONS,
    headers=st.lists(st.builds(NamedMatch, st.sampled_from(["x", "y"]), CONDITIONS, st.booleans()), max_size=2).map(
        tuple
    ),
    query=st.lists(st.builds(NamedMatch, st.sampled_from(["q", "r"]), CONDITIONS, st.booleans()), max_size=2).map(
        tuple
    ),
)
TARGETS = st.builds(
    lambda path, query: f"/{path}{query}",
    st.text("abA/", max_size=5),
    st.sampled_from(["", "?", "?q", "?q=a", "?q=b&q=a", "?r=/a&q=", "?r=a?q=a"]),
)
FIELDS = st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), st.text("ab/", max_size=3)), max_size=4)


def satisfies(value: str, match: StringMatch) -> bool:
    if match.kind is MatchKind.PRESENT:
        return True
    if match.kind is MatchKind.REGEX:
        return re.fullmatch(match.value, value) is not None
    left, right = (value.lower(), match.value.lower()) if match.ignores_case else (value, match.value)
    return left == right if match.kind is MatchKind.EXACT else left.startswith(right)


def reference_matches(block: RouteMatch, method: str, target: str, fields: list[tuple[str, str]]) -> bool:
    path, _, query = target.partition("?")
    if block.path is not None and not satisfies(path, block.path):
        return False
    if block.method is not None and not satisfies(method, block.method):
        return False
    for named in block.headers:
        values = [value for name, value in fields if name == named.name]
        if not values and named.is_inverted and named.match.kind is not MatchKind.PRESENT:
            values = [""]
        if any(satisfies(value, named.match) for value in values) is named.is_inverted:
            return False
    pairs = [part.partition("=") for part in query.split("&")] if query else []
    for named in block.query:
        first = next((value for name, _, value in pairs if name == named.name), None)
        if (first is not None and satisfies(first, named.match)) is named.is_inverted:
            return False
    return True


@settings(max_examples=300)
@given(blocks=st.lists(BLOCKS, max_size=5), method=TEXT, target=TARGETS, fields=FIELDS)
def test_pick_agrees_with_asking_every_block_in_turn(
    blocks: list[RouteMatch], method: str, target: str, fields: list[tuple[str, str]]
) -> None:
    routes = tuple(Route(name=str(n), match=block, clusters=ONE) for n, block in enumerate(blocks))
    host = CompiledHost(VirtualHost(name="h", domains=("h",), routes=routes))
    headers = [(name.encode(), value.encode()) for name, value in fields]
    route = host.pick(method.encode(), target.encode(), b"h", b"http", headers)
    expected = next((str(n) for n, b in enumerate(blocks) if reference_matches(b, method, target, fields)), None)
    assert (route.name if route else None) == expected
    if host.only_route is not None:
        assert host.only_route is route
    for block in blocks:
        matches = CompiledMatch(block).matches(method.encode(), target.encode(), b"h", b"http", headers)
        assert matches == reference_matches(block, method, target, fields)


@given(blocks=st.lists(BLOCKS, max_size=5), target=TARGETS, fields=FIELDS)
def test_a_request_without_any_probed_header_need_not_show_its_headers(
    blocks: list[RouteMatch], target: str, fields: list[tuple[str, str]]
) -> None:
    routes = tuple(Route(name=str(n), match=block, clusters=ONE) for n, block in enumerate(blocks))
    host = CompiledHost(VirtualHost(name="h", domains=("h",), routes=routes))
    block = b"".join(b"\r\n%b: %b" % (name.encode(), value.encode()) for name, value in fields)
    headers = [(name.encode(), value.encode()) for name, value in fields]
    if not any(probe in block for probe in host.header_probes):
        shown = host.pick(b"GET", target.encode(), b"h", b"http", headers)
        assert host.pick(b"GET", target.encode(), b"h", b"http", ()) is shown


REWRITES = st.one_of(
    st.builds(Rewrite, path=st.text(min_size=1, max_size=6)),
    st.builds(
        Rewrite,
        path_regex=st.tuples(
            st.sampled_from(["a", "a*", "(a)(b)?", "^/(.*)$", "(.*)b", ".*", "/|b", "$", "(a|b)/"]),
            st.text(max_size=6) | st.sampled_from([r"\0", r"\1\2", r"\\1", "\\", r"\9x", r"/\1"]),
        ),
    ),
)


@settings(max_examples=300)
@given(rewrite=REWRITES, target=TARGETS, match=st.none() | CONDITIONS)
@example(rewrite=Rewrite(path="/\r\nx: y"), target="/?q", match=None)
def test_a_rewritten_target_is_a_target_with_the_query_it_had(
    rewrite: Rewrite, target: str, match: StringMatch | None
) -> None:
    """Whatever configuration says: one slash at least, visible ASCII only, so that one request stays one."""
    route = CompiledRoute(Route(match=RouteMatch(path=match), clusters=ONE, rewrite=rewrite))
    if match is not None and not satisfies(target.partition("?")[0], match):
        return
    new = rewrite_path(route, target.encode()).decode()
    assert re.fullmatch(r'/[!"$-~]*', new)
    assert new.endswith("?" + target.partition("?")[2] if "?" in target else "")


NAMED = st.lists(st.tuples(st.sampled_from(["x", "y", "host", ":path"]), st.sampled_from(["1", "2", ""])), max_size=3)
OPS = st.builds(
    HeaderOps,
    set=NAMED.map(lambda pairs: tuple(dict(pairs).items())),
    add=NAMED.map(lambda pairs: tuple(dict(pairs).items())),
    remove=st.lists(st.sampled_from(["x", "y", "host"]), max_size=2).map(tuple),
)


def reference_ops(layers: list[HeaderOps], fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One operation after the other, as Envoy does: all removals, then each layer's set and add."""
    for ops in layers:
        fields = [(n, v) for n, v in fields if n not in ops.remove or n == "host"]
    for ops in layers:
        for name, value in ops.set:
            if value and name not in ("host", ":path"):
                fields = [*((n, v) for n, v in fields if n != name), (name, value)]
        fields = fields + [(n, v) for n, v in ops.add if v and n not in ("host", ":path")]
    return fields


@given(layers=st.lists(OPS, min_size=1, max_size=2), fields=FIELDS)
def test_prepared_operations_do_what_one_after_the_other_would(
    layers: list[HeaderOps], fields: list[tuple[str, str]]
) -> None:
    fields = [("host", "h"), *fields]
    applied = apply_ops(CompiledOps(*layers), [(name.encode(), value.encode()) for name, value in fields])
    assert [(name.decode(), value.decode()) for name, value in applied] == reference_ops(layers, fields)
