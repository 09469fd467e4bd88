"""Requests that Envoy and meshproxy are compared on, as bytes.

A case is (name, bytes sent, how many responses are read). More come in the lists of this folder's other modules.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    sent: bytes
    responses: int = 1


def request(start: str, host: str, *lines: str, body: bytes = b"") -> bytes:
    """start: method and target."""
    return "\r\n".join([f"{start} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode("latin-1") + body


def _match(name: str, target: str, *lines: str, start: str = "GET", host: str = "match.example") -> Case:
    return Case(f"match: {name}", request(f"{start} {target}", host, *lines))


def _redirect(name: str, target: str, host: str = "redirect.example", *lines: str) -> Case:
    return Case(f"redirect: {name}", request(f"GET {target}", host, *lines))


def _change(name: str, target: str, *lines: str, start: str = "GET") -> Case:
    return Case(f"change: {name}", request(f"{start} {target}", "change.example", *lines))


HOSTS = (
    Case("host: unknown", request("GET /", "nobody.example")),
    Case("host: with its port", request("GET /exact", "match.example:8080")),
    Case("host: with another port", request("GET /exact", "match.example:9090")),
    Case("host: in capitals", request("GET /exact", "MATCH.Example")),
    Case("host: suffix", request("GET /", "one.wild.example")),
    Case("host: longest suffix", request("GET /", "one.very.wild.example")),
    Case("host: suffix without a label", request("GET /", "wild.example")),
    Case("host: no route", request("GET /nothing", "change.example")),
    Case("host: trailing dot", request("GET /", "plain.example.")),
)

MATCHES = (
    _match("exact", "/exact"),
    _match("exact with query", "/exact?a=1"),
    _match("exact and more", "/exact/more"),
    _match("exact in other case", "/Exact"),
    _match("exact ignoring case", "/ANYCASE"),
    _match("prefix", "/prefix/and/more"),
    _match("prefix without separator", "/prefixed"),
    _match("prefix ignoring case", "/anyprefix/x"),
    _match("regex", "/regex/123?x=1"),
    _match("regex is a full match", "/regex/123/more"),
    _match("method", "/method", "Content-Length: 0", start="POST"),
    _match("other method", "/method"),
    _match("authority", "/authority"),
    _match("authority with port", "/authority", host="match.example:8080"),
    _match("scheme", "/scheme"),
    _match("scheme forwarded", "/scheme", "X-Forwarded-Proto: https"),
    _match("header exact", "/header/exact", "X-User: jason"),
    _match("header exact, other value", "/header/exact", "X-User: Jason"),
    _match("header exact, sent twice", "/header/exact", "X-User: jason", "X-User: else"),
    _match("header prefix", "/header/prefix", "x-user: jack"),
    _match("header regex", "/header/regex", "x-user: jason"),
    _match("header regex is a full match", "/header/regex", "x-user: jasons"),
    _match("header present", "/header/present", "x-user: x"),
    _match("header present but empty", "/header/present", "x-user:"),
    _match("header not present", "/header/present"),
    _match("header not, absent", "/header/not"),
    _match("header not, equal", "/header/not", "x-user: jason"),
    _match("header absent", "/header/absent"),
    _match("header absent, present", "/header/absent", "x-user: x"),
    _match("query exact", "/query/exact?a=1&user=jason"),
    _match("query exact, other value", "/query/exact?user=json"),
    _match("query given twice", "/query/exact?user=else&user=jason"),
    _match("query percent-encoded", "/query/exact?user=%6aason"),
    _match("query regex", "/query/regex?user=jn"),
    _match("query present", "/query/present?user"),
    _match("query absent", "/query/present?users=1"),
)

REDIRECTS = (
    _redirect("authority", "/plain/x?q=1"),
    _redirect("code", "/code"),
    _redirect("path", "/path/x?q=1"),
    _redirect("path with query", "/asked/x?q=1"),
    _redirect("prefix", "/prefix/rest?q=1"),
    _redirect("scheme", "/https/x"),
    _redirect("scheme drops the old default port", "/https/x", "redirect.example:8080"),
    _redirect("port", "/port/x"),
    _redirect("port replaces", "/port/x", "redirect.example:8080"),
    _redirect("default port", "/default-port"),
    _redirect("header operations", "/headers"),
    _redirect("forwarded scheme", "/plain", "redirect.example", "X-Forwarded-Proto: https"),
    Case("redirect: of HEAD", request("HEAD /plain", "redirect.example")),
    Case("redirect: of POST", request("POST /plain", "redirect.example", "Content-Length: 2", body=b"hi")),
)

CHANGES = (
    _change("prefix", "/prefix/x?q=1"),
    _change("prefix without slash", "/oldest/x"),
    _change("exact", "/whole?q=1"),
    _change("regex", "/regex/one/two/three?q=/regex/1/2"),
    _change("regex without match", "/regex/one"),
    _change("regex everywhere", "/every/oooh?o=o"),
    _change("authority", "/host-rewrite"),
    _change("authority by header", "/host-set"),
    _change("path and authority", "/both/x"),
    _change("request headers", "/request-headers", "X-Set: 1", "X-Add: 1", "X-Remove: 1", "X-Kept: 1", "User-Agent: x"),
    _change("request headers absent", "/request-headers"),
    _change("response headers", "/response-headers", "X-Answer: headers"),
    _change("headers of cluster and route", "/cluster-headers", "X-Answer: headers", "X-Set: 1", "X-Cluster-Remove: 1"),
    _change("weights", "/split"),
    _change("direct response", "/direct/x"),
    _change("direct response to HEAD", "/direct/x", start="HEAD"),
    _change("direct response without body", "/bodyless"),
    _change("direct response with headers", "/direct-headers"),
    _change("nobody listens", "/refused"),
    _change("no endpoints", "/empty"),
    _change("no endpoints, HEAD", "/empty", start="HEAD"),
    _change("no cluster", "/missing"),
)

CASES = (*HOSTS, *MATCHES, *REDIRECTS, *CHANGES)
