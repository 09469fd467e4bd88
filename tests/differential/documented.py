"""Where meshproxy answers otherwise than Envoy, and why. Nothing else may differ; docs/differences.md says the same."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Difference:
    """cases, facts: patterns of shell style; facts of the second, third, … message are named as the first's."""

    what: str
    why: str
    cases: tuple[str, ...] = ("*",)
    facts: tuple[str, ...] = ("*",)

    def covers(self, case: str, fact: str) -> bool:
        bare = re.sub(r"^\d+ ", "", fact)
        return any(fnmatchcase(case, p) for p in self.cases) and any(fnmatchcase(bare, p) for p in self.facts)


_LOCAL_BODY = ("body", "response content-length", "response content-type")

DOCUMENTED = (
    Difference("server and date", "an origin's fields stay as they are", facts=("response server", "response date")),
    Difference(
        "bodies of errors",
        "the words of the status where Envoy sends none; retries are not told",
        ("change: nobody listens", "field: connection names*", "form: no host", "target: /a#fragment"),
        _LOCAL_BODY,
    ),
    Difference(
        "default port in a redirect",
        "never written, as VirtualService says",
        ("redirect: default port",),
        ("response location",),
    ),
    Difference(
        "framing of what has no body",
        "a request or an answer to HEAD without one gets no field for it",
        ("redirect: of HEAD", "answer: head chunked", "method: *"),
        ("response transfer-encoding", "response content-length", "request content-length"),
    ),
    Difference(
        "x-envoy-original-host",
        "not sent",
        ("change: *authority*",),
        ("request x-envoy-original-host",),
    ),
    Difference(
        "x-envoy-original-path",
        "sent only where the path changed, and not taken from a client",
        ("change: regex without match", "field: of Envoy"),
        ("request x-envoy-original-path",),
    ),
    Difference(
        "unknown methods",
        "forwarded: a method is any token (RFC 9110)",
        ("method: M-*", "method: unknown", "method: small*"),
    ),
    Difference("OPTIONS *", "a route without a path takes it", ("method: OPTIONS [*]",)),
    Difference(
        "target and Host of different authorities",
        "400: two readings of one request",
        ("method: CONNECT", "target: http://match*", "target: http://plain.example:80/x", "target: http://user@*"),
    ),
    Difference("request trailers", "forwarded", ("body: chunked with trailers",), ("request trailer *",)),
    Difference("Expect: 100-continue", "forwarded; the origin decides (RFC 9110)", ("body: expect continue",)),
    Difference(
        "other upgrades than websocket", "offered to the origin, which decides", ("field: upgrade nobody knows",)
    ),
    Difference(
        "refused websocket",
        "the origin's answer is relayed whole, and the connection kept",
        ("field: websocket refused",),
    ),
    Difference(
        "x-forwarded-proto",
        "http or https, whatever a client says",
        ("field: forwarded proto unknown",),
        ("request x-forwarded-proto",),
    ),
    Difference("HTTP/1.0", "served", ("form: HTTP/1.0",)),
    Difference(
        "other versions", "505, or 400 without one", ("form: HTTP/[2-9]*", "form: HTTP/1.2", "form: no version")
    ),
    Difference("empty Host and two Hosts", "400 (RFC 9112)", ("form: empty host", "form: two hosts")),
    Difference(
        "folded lines, two spaces, bare line feeds",
        "400: one strict grammar",
        ("form: folded line", "form: two spaces", "form: bare line feeds"),
    ),
    Difference(
        "fields that Connection names",
        "dropped in responses too (RFC 9110)",
        ("answer: hop headers",),
        ("response x-hop",),
    ),
    Difference(
        "interim responses",
        "forwarded (RFC 9110); Envoy drops them",
        ("answer: continue", "answer: processing", "answer: early hints"),
    ),
    Difference(
        "x-envoy-decorator-operation",
        "consumed, as Envoy does with tracing on",
        ("answer: envoy headers",),
        ("response x-envoy-decorator-operation",),
    ),
    Difference(
        "a kept connection that closes before an answer",
        "an idempotent request is sent once more, on a fresh one (RFC 9110)",
        ("answer: closes at once",),
        ("requests", "cluster", "method", "target", "request *"),
    ),
    Difference(
        "a response head that breaks off",
        "503, as any lost connection; Envoy 502",
        ("answer: closes in head",),
        ("status", *_LOCAL_BODY),
    ),
    Difference("101 that nobody asked for", "502; Envoy relays it", ("answer: unasked upgrade",)),
)

OVER_HTTP2 = (
    Difference(
        "empty bodies of the proxy's own answers",
        "content-length says 0; Envoy says nothing",
        ("host: *", "redirect: *", "change: *"),
        ("response content-length",),
    ),
    Difference(":authority in capitals", "sent on in small letters", ("host: in capitals",), ("request host",)),
    Difference(
        "x-forwarded-proto that differs from :scheme",
        "believed as over HTTP/1.1, by a sidecar; Envoy goes by :scheme",
        ("match: scheme forwarded", "redirect: forwarded scheme"),
        ("cluster", "response location"),
    ),
    Difference(":path with a fragment", "the stream is reset (RFC 9113 §8.1.1); Envoy 400", ("target: /a#fragment",)),
    Difference(
        "a request without a body",
        "gets no content-length towards HTTP/1.1; Envoy says 0",
        ("body: chunked and empty",),
        ("request content-length",),
    ),
    Difference(
        "the limit of a hundred fields",
        "pseudo-header fields do not count, and the answer is 431; Envoy counts them, and resets the stream",
        ("field: one hundred", "field: more than one hundred"),
    ),
    Difference(
        "response trailers of HTTP/1.1", "forwarded; Envoy drops them", ("answer: trailers",), ("response trailer *",)
    ),
)
"""Over HTTP/2 only, besides what DOCUMENTED says."""
