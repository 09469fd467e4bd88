"""Malformed configurations: each gets its one sentence, with file, line and field, and never a traceback."""

from dataclasses import dataclass

import pytest

from meshproxy.resources.load import load_text
from meshproxy.resources.problems import ConfigProblem, Severity

E, W = Severity.ERROR, Severity.WARNING


@dataclass(frozen=True)
class Case:
    name: str
    text: str
    severity: Severity
    line: int
    field: str
    fragment: str
    """Part of the sentence that tells this mistake from others."""


def documents(kind: str, api_version: str, cases: str) -> str:
    return f"apiVersion: {api_version}\nkind: {kind}\nmetadata:\n  name: x\n{cases}"


def rule(body: str) -> str:
    """A DestinationRule; its body begins on line 7."""
    return documents("DestinationRule", "networking.istio.io/v1", f"spec:\n  host: a.example.com\n{body}")


def policy(body: str) -> str:
    """The trafficPolicy of a DestinationRule; its body begins on line 8."""
    return rule(f"  trafficPolicy:\n{body}")


def virtual(body: str) -> str:
    """A VirtualService; its body begins on line 7."""
    return documents("VirtualService", "networking.istio.io/v1", f"spec:\n  hosts: [a.example.com]\n{body}")


def http(body: str) -> str:
    """An http route; its body begins on line 8 and is indented by four."""
    return virtual(f"  http:\n{body}")


def routed(body: str) -> str:
    """An http route with a destination; the body begins on line 9."""
    return http(f"  - route: [{{destination: {{host: b}}}}]\n{body}")


def entry(body: str) -> str:
    """A ServiceEntry; its body begins on line 6."""
    return documents("ServiceEntry", "networking.istio.io/v1", f"spec:\n{body}")


def sidecar(body: str) -> str:
    return documents("Sidecar", "networking.istio.io/v1", f"spec:\n{body}")


def gateway(body: str) -> str:
    return documents("Gateway", "networking.istio.io/v1", f"spec:\n{body}")


def peer(body: str) -> str:
    return documents("PeerAuthentication", "security.istio.io/v1", f"spec:\n{body}")


def service(body: str) -> str:
    return documents("Service", "v1", f"spec:\n{body}")


def endpoint_slice(body: str) -> str:
    """An EndpointSlice; its body begins on line 5."""
    return documents("EndpointSlice", "discovery.k8s.io/v1", body)


DISTRIBUTE = "    loadBalancer:\n      localityLbSetting:\n        distribute:\n"

CASES = [
    # ── not YAML, or not the YAML that Kubernetes reads ──
    Case("tab", "spec:\n\thost: a\n", E, 2, "", "a tab indents this line"),
    Case("unclosed bracket", "a: 1\nb: [1, 2\n", E, 2, "", "not YAML"),
    Case("unclosed quote", 'a: 1\nb: "x\nc: d\n', E, 2, "", "quoted scalar"),
    Case("second colon", "a: 1\nb: c: d\n", E, 2, "", "second ': ' on this line"),
    Case("bad indentation", "a:\n  b: 1\n c: 2\n", E, 3, "", "indentation"),
    Case("NUL", "a: 1\nb: \0\n", E, 2, "", "U+0000"),
    Case("duplicate key", rule("  host: b.example.com\n"), E, 7, "spec.host", "written twice"),
    Case("duplicate key in a list", http("  - name: a\n    name: b\n"), E, 9, "spec.http[0].name", "written twice"),
    Case("key that is a list", "a: 1\n? [b]\n: c\n", E, 2, "", "a key must be text"),
    Case("key that is a boolean", rule("  on: 1\n"), E, 7, "spec.on", "quote it"),
    Case("null key", rule("  ~: 1\n"), E, 7, 'spec["~"]', "quote it"),
    Case("NaN", rule("  exportTo: .nan\n"), E, 7, "spec.exportTo", "not a number that JSON knows"),
    Case("infinity", rule("  exportTo: .inf\n"), E, 7, "spec.exportTo", "not a number that JSON knows"),
    Case("huge number", rule(f"  exportTo: {'9' * 5000}\n"), E, 7, "spec.exportTo", "too large"),
    Case("python tag", rule("  exportTo: !!python/name:os.system x\n"), E, 7, "spec.exportTo", "tag !!python"),
    Case("own tag", rule("  exportTo: !secret x\n"), E, 7, "spec.exportTo", "tag !secret"),
    Case("alias without anchor", rule("  exportTo: *x\n"), E, 7, "spec.exportTo", "has no anchor"),
    Case("alias of itself", rule("  exportTo: &x [*x]\n"), E, 7, "spec.exportTo[0]", "has no anchor"),
    Case("merge of a text", rule("  <<: text\n"), E, 7, 'spec["<<"]', "needs a mapping"),
    Case("too deep", "a: " + "[" * 150 + "]" * 150, E, 1, "a" + "[0]" * 99, "deeper than 100"),
    Case("not UTF-8", "a: 1\nb: \udcff\n", E, 2, "", "U+DCFF"),
    # ── not a resource ──
    Case("a text", "just words\n", E, 1, "", "where a resource is needed"),
    Case("a list", "- a\n- b\n", E, 1, "", "where a resource is needed"),
    Case("no kind", "apiVersion: v1\nmetadata: {name: x}\n", E, 1, "", "kind is missing"),
    Case("no apiVersion", "kind: Service\nmetadata: {name: x}\n", E, 1, "", "apiVersion is missing"),
    Case("kind is a number", "apiVersion: v1\nkind: 7\n", E, 2, "kind", "where text is needed"),
    Case(
        "misspelt kind",
        documents("DestinatonRule", "networking.istio.io/v1", "spec: {}\n"),
        E,
        2,
        "kind",
        "did you mean DestinationRule?",
    ),
    Case(
        "unknown version",
        documents("DestinationRule", "networking.istio.io/v2", "spec: {host: a}\n"),
        E,
        1,
        "apiVersion",
        "is not served",
    ),
    Case(
        "kind of another group",
        documents("PeerAuthentication", "networking.istio.io/v1", "spec: {}\n"),
        E,
        1,
        "apiVersion",
        "belongs to security.istio.io",
    ),
    Case("core kind of another group", documents("Service", "apps/v1", "spec: {}\n"), E, 1, "apiVersion", "core API"),
    Case(
        "misspelt group",
        documents("Sidecar", "networking.istio.oi/v1", "spec: {}\n"),
        E,
        1,
        "apiVersion",
        "belongs to networking.istio.io",
    ),
    Case(
        "Gateway of the Gateway API",
        documents("Gateway", "gateway.networking.k8s.io/v1", "spec: {}\n"),
        W,
        2,
        "kind",
        "Gateway of gateway.networking.k8s.io is not a kind this proxy reads",
    ),
    Case(
        "policy that is not enforced",
        documents("AuthorizationPolicy", "security.istio.io/v1", "spec: {}\n"),
        E,
        2,
        "kind",
        "would let traffic through",
    ),
    Case(
        "token check that is not enforced",
        documents("RequestAuthentication", "security.istio.io/v1beta1", "spec: {}\n"),
        E,
        2,
        "kind",
        "would let traffic through",
    ),
    Case(
        "policy of Istio 1.0",
        documents("Policy", "authentication.istio.io/v1alpha1", "spec: {}\n"),
        E,
        1,
        "apiVersion",
        "write a PeerAuthentication",
    ),
    Case("ignored kind", documents("Secret", "v1", "data: {}\n"), W, 2, "kind", "not a kind this proxy reads"),
    Case(
        "Envoy's kind",
        documents("EnvoyFilter", "networking.istio.io/v1alpha3", "spec: {}\n"),
        W,
        2,
        "kind",
        "EnvoyFilter is not supported",
    ),
    Case(
        "no metadata",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nspec: {host: a}\n",
        E,
        1,
        "",
        "metadata is missing",
    ),
    Case(
        "no name",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {}\nspec: {host: a}\n",
        E,
        3,
        "metadata",
        "name is missing",
    ),
    Case(
        "name in capitals",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: Edge}\nspec: {host: a}\n",
        E,
        3,
        "metadata.name",
        "is not a name",
    ),
    Case(
        "label is a number",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata:\n  name: x\n  labels:\n    version: 1\n"
        "spec: {host: a}\n",
        E,
        6,
        "metadata.labels.version",
        "put it in quotes",
    ),
    Case(
        "misspelt spec",
        documents("Sidecar", "networking.istio.io/v1", "spec: {egress: [{hosts: ['./*']}]}\nspecs: {}\n"),
        W,
        6,
        "specs",
        "did you mean spec?",
    ),
    Case(
        "field beside spec",
        documents("DestinationRule", "networking.istio.io/v1", "spec: {host: a}\nexportTo: ['.']\n"),
        W,
        6,
        "exportTo",
        "belongs under spec",
    ),
    Case("no spec", documents("Gateway", "networking.istio.io/v1", ""), E, 1, "", "spec is missing"),
    Case(
        "spec is a list",
        documents("Gateway", "networking.istio.io/v1", "spec: []\n"),
        E,
        5,
        "spec",
        "a list where a mapping",
    ),
    # ── DestinationRule ──
    Case(
        "no host",
        documents("DestinationRule", "networking.istio.io/v1", "spec:\n  exportTo: ['*']\n"),
        E,
        5,
        "spec",
        "host is missing",
    ),
    Case("misspelt field", rule("  trafficPolcy: {}\n"), W, 7, "spec.trafficPolcy", "did you mean trafficPolicy?"),
    Case("field in snake case", rule("  export_to: ['.']\n"), W, 7, "spec.export_to", "read as exportTo"),
    Case("host with a space", rule("  subsets: [{name: 'v 1'}]\n"), E, 7, "spec.subsets[0].name", "not a DNS label"),
    Case("subset twice", rule("  subsets:\n  - name: v1\n  - name: v1\n"), E, 9, "spec.subsets[1].name", "given twice"),
    Case("empty subset", rule("  subsets:\n  - name: v1\n  -\n"), E, 9, "spec.subsets[1]", "the entry is empty"),
    Case(
        "unknown balancer",
        policy("    loadBalancer: {simple: LEAST_REQEST}\n"),
        E,
        8,
        "spec.trafficPolicy.loadBalancer.simple",
        "did you mean LEAST_REQUEST?",
    ),
    Case(
        "former balancer",
        policy("    loadBalancer: {simple: LEAST_CONN}\n"),
        W,
        8,
        "spec.trafficPolicy.loadBalancer.simple",
        "read as LEAST_REQUEST",
    ),
    Case(
        "consistent hash",
        policy("    loadBalancer:\n      consistentHash: {useSourceIp: true}\n"),
        W,
        9,
        "spec.trafficPolicy.loadBalancer.consistentHash",
        "not supported by this version",
    ),
    Case(
        "former warm-up",
        policy("    loadBalancer:\n      warmupDurationSecs: 10s\n"),
        W,
        9,
        "spec.trafficPolicy.loadBalancer.warmupDurationSecs",
        "warmup.duration",
    ),
    Case(
        "warm-up without duration",
        policy("    loadBalancer:\n      warmup: {aggression: 2}\n"),
        E,
        9,
        "spec.trafficPolicy.loadBalancer.warmup",
        "duration is missing",
    ),
    Case(
        "weights under 100",
        policy(DISTRIBUTE + "        - from: a/b/*\n          to: {a/b/*: 80, a/c/*: 10}\n"),
        E,
        12,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to",
        "add up to 90",
    ),
    Case(
        "weight 0",
        policy(DISTRIBUTE + "        - from: a/b/*\n          to:\n            a/b/*: 100\n            a/c/*: 0\n"),
        E,
        14,
        'spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to["a/c/*"]',
        "0 is not in 1..100",
    ),
    Case(
        "overlapping localities",
        policy(DISTRIBUTE + "        - from: a/b/*\n          to: {a/*: 50, a/z1/*: 50}\n"),
        E,
        12,
        'spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to["a/z1/*"]',
        "overlaps",
    ),
    Case(
        "overlapping sources",
        policy(DISTRIBUTE + "        - {from: a/*, to: {a/*: 100}}\n        - {from: a/b/c, to: {a/*: 100}}\n"),
        E,
        12,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[1].from",
        "overlaps",
    ),
    Case(
        "wildcard in the middle",
        policy(DISTRIBUTE + "        - from: a/*/c\n          to: {a/b/*: 100}\n"),
        E,
        11,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].from",
        "only at its end",
    ),
    Case(
        "empty part of a locality",
        policy(DISTRIBUTE + "        - from: a//c\n          to: {a/b/*: 100}\n"),
        E,
        11,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].from",
        "empty part",
    ),
    Case(
        "distribute and failover",
        policy(
            "    outlierDetection: {interval: 10s}\n"
            + DISTRIBUTE
            + "        - {from: a/*, to: {a/*: 100}}\n        failover:\n        - {from: a, to: b}\n"
        ),
        E,
        13,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.failover",
        "exclude each other",
    ),
    Case(
        "failover to itself",
        policy(
            "    outlierDetection: {interval: 10s}\n    loadBalancer:\n      localityLbSetting:\n"
            "        failover:\n        - {from: a, to: a}\n"
        ),
        E,
        12,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.failover[0]",
        "to itself",
    ),
    Case(
        "failover of a zone",
        policy(
            "    outlierDetection: {interval: 10s}\n    loadBalancer:\n      localityLbSetting:\n"
            "        failover:\n        - {from: a/b, to: c}\n"
        ),
        E,
        12,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.failover[0].from",
        "takes no zones",
    ),
    Case(
        "failover without detection",
        policy("    loadBalancer:\n      localityLbSetting:\n        failover: [{from: a, to: b}]\n"),
        W,
        10,
        "spec.trafficPolicy.loadBalancer.localityLbSetting.failover",
        "needs outlierDetection",
    ),
    Case(
        "locality setting inside detection",
        policy("    outlierDetection:\n      localityLbSetting: {enabled: false}\n"),
        W,
        9,
        "spec.trafficPolicy.outlierDetection.localityLbSetting",
        "read as loadBalancer.localityLbSetting",
    ),
    Case(
        "duration without unit",
        policy("    outlierDetection:\n      interval: 10\n"),
        E,
        9,
        "spec.trafficPolicy.outlierDetection.interval",
        "with a unit: 10s",
    ),
    Case(
        "duration in days",
        policy("    outlierDetection:\n      interval: 1d\n"),
        E,
        9,
        "spec.trafficPolicy.outlierDetection.interval",
        "is not a duration",
    ),
    Case(
        "negative duration",
        policy("    outlierDetection:\n      interval: -1s\n"),
        E,
        9,
        "spec.trafficPolicy.outlierDetection.interval",
        "is not a duration",
    ),
    Case(
        "microseconds",
        policy("    connectionPool:\n      tcp: {connectTimeout: 10us}\n"),
        E,
        9,
        "spec.trafficPolicy.connectionPool.tcp.connectTimeout",
        "shorter than 1ms",
    ),
    Case(
        "former error count",
        policy("    outlierDetection:\n      consecutiveErrors: 5\n"),
        W,
        9,
        "spec.trafficPolicy.outlierDetection.consecutiveErrors",
        "consecutiveGatewayErrors",
    ),
    Case(
        "former error count beside today's",
        policy("    outlierDetection:\n      consecutive5xxErrors: 3\n      consecutiveErrors: 5\n"),
        W,
        10,
        "spec.trafficPolicy.outlierDetection.consecutiveErrors",
        "which is given too",
    ),
    Case(
        "percent over 100",
        policy("    outlierDetection:\n      maxEjectionPercent: 101\n"),
        E,
        9,
        "spec.trafficPolicy.outlierDetection.maxEjectionPercent",
        "not in 0..100",
    ),
    Case(
        "quoted number",
        policy('    outlierDetection:\n      maxEjectionPercent: "50"\n'),
        E,
        9,
        "spec.trafficPolicy.outlierDetection.maxEjectionPercent",
        "leave out the quotes",
    ),
    Case(
        "local origin without the split",
        policy("    outlierDetection:\n      consecutiveLocalOriginFailures: 3\n"),
        E,
        9,
        "spec.trafficPolicy.outlierDetection.consecutiveLocalOriginFailures",
        "splitExternalLocalOriginErrors",
    ),
    Case(
        "negative limit",
        policy("    connectionPool:\n      http: {maxRetries: -1}\n"),
        E,
        9,
        "spec.trafficPolicy.connectionPool.http.maxRetries",
        "-1 is not in",
    ),
    Case(
        "the client's protocol and another",
        policy("    connectionPool:\n      http: {useClientProtocol: true, h2UpgradePolicy: UPGRADE}\n"),
        E,
        9,
        "spec.trafficPolicy.connectionPool.http.useClientProtocol",
        "exclude each other",
    ),
    Case(
        "unknown version of the PROXY protocol",
        policy("    proxyProtocol: {version: V3}\n"),
        E,
        8,
        "spec.trafficPolicy.proxyProtocol.version",
        '"V3" is none of V1, V2',
    ),
    Case(
        "misspelt TLS field",
        policy("    tls:\n      mod: MUTUAL\n"),
        E,
        9,
        "spec.trafficPolicy.tls.mod",
        "did you mean mode?",
    ),
    Case(
        "MUTUAL without a key",
        policy("    tls:\n      mode: MUTUAL\n      clientCertificate: /c.pem\n"),
        E,
        8,
        "spec.trafficPolicy.tls",
        "needs privateKey",
    ),
    Case(
        "ISTIO_MUTUAL with files",
        policy("    tls:\n      mode: ISTIO_MUTUAL\n      caCertificates: /ca.pem\n"),
        E,
        10,
        "spec.trafficPolicy.tls.caCertificates",
        "leave this field out",
    ),
    Case(
        "revocation list",
        policy("    tls:\n      mode: SIMPLE\n      caCrl: /crl.pem\n"),
        E,
        10,
        "spec.trafficPolicy.tls.caCrl",
        "accept revoked certificates",
    ),
    Case(
        "port settings without port",
        policy("    portLevelSettings:\n    - tls: {mode: DISABLE}\n"),
        E,
        9,
        "spec.trafficPolicy.portLevelSettings[0]",
        "port is missing",
    ),
    Case(
        "port settings twice",
        policy("    portLevelSettings:\n    - port: {number: 80}\n    - port: {number: 80}\n"),
        E,
        10,
        "spec.trafficPolicy.portLevelSettings[1].port",
        "has settings already",
    ),
    # ── VirtualService ──
    Case("no routes", virtual("  exportTo: ['*']\n"), E, 5, "spec", "one of http, tls, tcp is needed"),
    Case("route without action", http("  - name: a\n"), E, 8, "spec.http[0]", "route, redirect or directResponse"),
    Case(
        "route and redirect",
        routed("    redirect: {uri: /x}\n"),
        E,
        9,
        "spec.http[0].redirect",
        "only one of route and redirect",
    ),
    Case(
        "rewrite and redirect",
        http("  - redirect: {uri: /x}\n    rewrite: {uri: /y}\n"),
        E,
        9,
        "spec.http[0].rewrite",
        "exclude each other",
    ),
    Case(
        "weights all zero",
        http("  - route:\n    - destination: {host: a}\n      weight: 0\n    - destination: {host: b}\n"),
        E,
        8,
        "spec.http[0].route",
        "all weights are 0",
    ),
    Case(
        "negative weight",
        http("  - route:\n    - destination: {host: a}\n      weight: -1\n"),
        E,
        10,
        "spec.http[0].route[0].weight",
        "-1 is not in",
    ),
    Case(
        "no destination", http("  - route:\n    - weight: 1\n"), E, 9, "spec.http[0].route[0]", "destination is missing"
    ),
    Case(
        "port 70000",
        http("  - route: [{destination: {host: a, port: {number: 70000}}}]\n"),
        E,
        8,
        "spec.http[0].route[0].destination.port.number",
        "70000 is not in 1..65535",
    ),
    Case(
        "host *",
        http("  - route: [{destination: {host: '*'}}]\n"),
        E,
        8,
        "spec.http[0].route[0].destination.host",
        "host * is not allowed",
    ),
    Case(
        "misspelt condition",
        routed("    match:\n    - ur: {prefix: /}\n"),
        E,
        10,
        "spec.http[0].match[0].ur",
        "did you mean uri?",
    ),
    Case(
        "two kinds of match",
        routed("    match:\n    - uri: {prefix: /, exact: /a}\n"),
        E,
        10,
        "spec.http[0].match[0].uri.exact",
        "only one of",
    ),
    Case(
        "text where a match is needed",
        routed("    match:\n    - uri: /a\n"),
        E,
        10,
        "spec.http[0].match[0].uri",
        "where a mapping is needed",
    ),
    Case(
        "empty prefix",
        routed("    match:\n    - headers:\n        x-a: {prefix: ''}\n"),
        E,
        11,
        "spec.http[0].match[0].headers.x-a.prefix",
        "prefix is empty",
    ),
    Case(
        "broken regex",
        routed("    match:\n    - uri: {regex: '('}\n"),
        E,
        10,
        "spec.http[0].match[0].uri.regex",
        "not a regex",
    ),
    Case(
        "exponential regex",
        routed("    match:\n    - uri: {regex: '/(a+)+$'}\n"),
        E,
        10,
        "spec.http[0].match[0].uri.regex",
        "exponential time",
    ),
    Case(
        "look-ahead",
        routed("    match:\n    - uri: {regex: '/(?!admin).*'}\n"),
        E,
        10,
        "spec.http[0].match[0].uri.regex",
        "RE2 has no look-around",
    ),
    Case(
        "regex of 2000 characters",
        routed(f"    match:\n    - uri: {{regex: '{'a' * 2000}'}}\n"),
        E,
        10,
        "spec.http[0].match[0].uri.regex",
        "may have 1024",
    ),
    Case(
        "bad header name",
        routed("    match:\n    - headers: {'x a': {exact: b}}\n"),
        E,
        10,
        'spec.http[0].match[0].headers["x a"]',
        "not a header name",
    ),
    Case(
        "removing the host",
        routed("    headers: {request: {remove: [Host]}}\n"),
        E,
        9,
        "spec.http[0].headers.request.remove[0]",
        "cannot be changed",
    ),
    Case(
        "header with a line break",
        routed('    headers: {response: {set: {x-a: "b\\r\\nx: y"}}}\n'),
        E,
        9,
        "spec.http[0].headers.response.set.x-a",
        "control characters",
    ),
    Case(
        "authority twice",
        routed("    rewrite: {authority: a}\n    headers: {request: {set: {host: b}}}\n"),
        E,
        10,
        "spec.http[0].headers.request.set.host",
        "a second time",
    ),
    Case("zero timeout", routed("    timeout: 0s\n"), E, 9, "spec.http[0].timeout", "shorter than 1ms"),
    Case(
        "retry on a word",
        routed("    retries: {attempts: 2, retryOn: '5xx,sometimes'}\n"),
        E,
        9,
        "spec.http[0].retries.retryOn",
        '"sometimes" is no condition',
    ),
    Case(
        "retries off and on",
        routed("    retries: {attempts: 0, perTryTimeout: 1s}\n"),
        E,
        9,
        "spec.http[0].retries.perTryTimeout",
        "retries are off",
    ),
    Case(
        "redirect with 200",
        http("  - redirect: {uri: /x, redirectCode: 200}\n"),
        E,
        8,
        "spec.http[0].redirect.redirectCode",
        "none of 301",
    ),
    Case("empty redirect", http("  - redirect: {}\n    route: []\n"), E, 8, "spec.http[0].redirect", "is needed"),
    Case(
        "prefixRewrite of an exact match",
        http("  - redirect: {prefixRewrite: /x}\n    match: [{uri: {exact: /a}}]\n"),
        E,
        9,
        "spec.http[0].match[0].uri",
        "needs a prefix match",
    ),
    Case("empty rewrite", routed("    rewrite: {}\n"), E, 9, "spec.http[0].rewrite", "is needed"),
    Case(
        "group that is not there",
        routed("    rewrite: {uriRegexRewrite: {match: '/(a)', rewrite: '/\\2'}}\n"),
        E,
        9,
        "spec.http[0].rewrite.uriRegexRewrite.rewrite",
        "\\2 names a group",
    ),
    Case(
        "status 700",
        http("  - directResponse: {status: 700}\n"),
        E,
        8,
        "spec.http[0].directResponse.status",
        "not in 200..599",
    ),
    Case(
        "body that is not base64",
        http("  - directResponse: {status: 200, body: {bytes: '%'}}\n"),
        E,
        8,
        "spec.http[0].directResponse.body.bytes",
        "not base64",
    ),
    Case("fault", routed("    fault: {abort: {httpStatus: 500}}\n"), W, 9, "spec.http[0].fault", "not supported"),
    Case("mirror", routed("    mirror: {host: c}\n"), W, 9, "spec.http[0].mirror", "nothing is mirrored"),
    Case(
        "CORS", routed("    corsPolicy: {allowCredentials: true}\n"), W, 9, "spec.http[0].corsPolicy", "not supported"
    ),
    Case("delegate", http("  - delegate: {name: y}\n"), W, 8, "spec.http[0].delegate", "this http route is left out"),
    Case(
        "former header operation",
        routed("    appendHeaders: {x-a: b}\n"),
        W,
        9,
        "spec.http[0].appendHeaders",
        "read as headers.request.add",
    ),
    Case(
        "unreachable route",
        http("  - route: [{destination: {host: a}}]\n  - redirect: {uri: /x}\n"),
        W,
        9,
        "spec.http[1]",
        "takes everything",
    ),
    Case(
        "host twice",
        documents(
            "VirtualService",
            "networking.istio.io/v1",
            "spec:\n  hosts: ['*.example.com', a.example.com]\n  http: [{route: [{destination: {host: b}}]}]\n",
        ),
        E,
        6,
        "spec.hosts[1]",
        "overlaps",
    ),
    Case(
        "all hosts in the mesh",
        documents(
            "VirtualService",
            "networking.istio.io/v1",
            "spec:\n  hosts: ['*']\n  http: [{route: [{destination: {host: b}}]}]\n",
        ),
        E,
        6,
        "spec.hosts[0]",
        "needs gateways",
    ),
    Case(
        "host with an underscore",
        documents(
            "VirtualService",
            "networking.istio.io/v1",
            "spec:\n  hosts: [a_b.example.com]\n  http: [{route: [{destination: {host: b}}]}]\n",
        ),
        E,
        6,
        "spec.hosts[0]",
        "not a host name",
    ),
    Case(
        "bad subnet",
        virtual("  tcp:\n  - match: [{destinationSubnets: [10.0.0.0/33]}]\n    route: [{destination: {host: b}}]\n"),
        E,
        8,
        "spec.tcp[0].match[0].destinationSubnets[0]",
        "neither an IP address nor a network",
    ),
    Case(
        "SNI of another host",
        virtual("  tls:\n  - match: [{sniHosts: [b.example.com]}]\n    route: [{destination: {host: b}}]\n"),
        E,
        8,
        "spec.tls[0].match[0].sniHosts[0]",
        "not among the hosts",
    ),
    # ── ServiceEntry, WorkloadEntry, WorkloadGroup ──
    Case("no hosts", entry("  ports: [{number: 80, name: http}]\n"), E, 5, "spec", "hosts is missing"),
    Case("entry for all", entry("  hosts: ['*']\n"), E, 6, "spec.hosts[0]", "host * is not allowed"),
    Case(
        "port twice",
        entry("  hosts: [a.b]\n  ports:\n  - {number: 80, name: a}\n  - {number: 80, name: b}\n"),
        E,
        9,
        "spec.ports[1].number",
        "given twice",
    ),
    Case(
        "unknown protocol",
        entry("  hosts: [a.b]\n  ports:\n  - {number: 80, name: a, protocol: HTPP}\n"),
        E,
        8,
        "spec.ports[0].protocol",
        "is not a protocol",
    ),
    Case(
        "endpoints without resolution",
        entry("  hosts: [a.b]\n  endpoints:\n  - address: 10.0.0.1\n"),
        E,
        7,
        "spec.endpoints",
        "resolution NONE takes no endpoints",
    ),
    Case(
        "name in a static entry",
        entry("  hosts: [a.b]\n  resolution: STATIC\n  endpoints:\n  - address: c.d\n"),
        E,
        9,
        "spec.endpoints[0].address",
        "STATIC needs one",
    ),
    Case(
        "endpoint port unknown",
        entry("  hosts: [a.b]\n  resolution: STATIC\n  endpoints:\n  - address: 10.0.0.1\n    ports: {http: 80}\n"),
        E,
        10,
        "spec.endpoints[0].ports.http",
        "none of this ServiceEntry's ports",
    ),
    Case(
        "wildcard looked up",
        entry("  hosts: ['*.b.c']\n  resolution: DNS\n"),
        E,
        6,
        "spec.hosts[0]",
        "cannot be looked up by DNS",
    ),
    Case(
        "two hosts on one TCP port",
        entry("  hosts: [a.b, c.d]\n  resolution: DNS\n  ports:\n  - {number: 1, name: a, protocol: TCP}\n"),
        E,
        9,
        "spec.ports[0].protocol",
        "nothing tells them apart",
    ),
    Case(
        "network with DNS",
        entry("  hosts: [a.b]\n  resolution: DNS\n  addresses: [10.0.0.0/8]\n"),
        E,
        8,
        "spec.addresses[0]",
        "need resolution NONE or STATIC",
    ),
    Case(
        "selector and endpoints",
        entry(
            "  hosts: [a.b]\n  resolution: STATIC\n  workloadSelector: {labels: {a: b}}\n"
            "  endpoints:\n  - address: 10.0.0.1\n"
        ),
        E,
        9,
        "spec.endpoints",
        "only one of",
    ),
    Case(
        "no address",
        documents("WorkloadEntry", "networking.istio.io/v1", "spec:\n  weight: 1\n"),
        E,
        5,
        "spec",
        "address is missing",
    ),
    Case(
        "bad address",
        documents("WorkloadEntry", "networking.istio.io/v1", "spec:\n  address: 10.0.0.256\n"),
        E,
        6,
        "spec.address",
        "neither an IP address",
    ),
    Case(
        "socket with ports",
        documents("WorkloadEntry", "networking.istio.io/v1", "spec:\n  address: unix:///a\n  ports: {http: 80}\n"),
        E,
        7,
        "spec.ports",
        "a unix socket has no ports",
    ),
    Case(
        "bad locality",
        documents("WorkloadEntry", "networking.istio.io/v1", "spec:\n  address: 10.0.0.1\n  locality: a/b/c/d\n"),
        E,
        7,
        "spec.locality",
        "is not region",
    ),
    Case(
        "probe without port",
        documents(
            "WorkloadGroup", "networking.istio.io/v1", "spec:\n  template: {}\n  probe:\n    httpGet: {path: /}\n"
        ),
        E,
        8,
        "spec.probe.httpGet",
        "port is missing",
    ),
    # ── Sidecar, Gateway ──
    Case("empty sidecar", sidecar("  workloadSelector: {labels: {a: b}}\n"), E, 5, "spec", "a Sidecar needs ingress"),
    Case(
        "egress host without namespace",
        sidecar("  egress:\n  - hosts: [a.example.com]\n"),
        E,
        7,
        "spec.egress[0].hosts[0]",
        "is not namespace/host",
    ),
    Case(
        "egress host with a short name",
        sidecar("  egress:\n  - hosts: [default/a]\n"),
        E,
        7,
        "spec.egress[0].hosts[0]",
        "is a short name",
    ),
    Case(
        "open listener first",
        sidecar("  egress:\n  - hosts: ['./*']\n  - port: {number: 80, protocol: HTTP}\n    hosts: ['./*']\n"),
        E,
        7,
        "spec.egress[0]",
        "must be the last",
    ),
    Case(
        "listener port twice",
        sidecar(
            "  egress:\n  - {port: {number: 80, protocol: HTTP}, hosts: ['./*']}\n"
            "  - {port: {number: 80, protocol: HTTP}, hosts: ['./*']}\n"
        ),
        E,
        8,
        "spec.egress[1].port",
        "has a listener already",
    ),
    Case(
        "remote default endpoint",
        sidecar("  ingress:\n  - port: {number: 80, protocol: HTTP}\n    defaultEndpoint: 10.1.1.1:80\n"),
        E,
        8,
        "spec.ingress[0].defaultEndpoint",
        "is none of 127.0.0.1:port",
    ),
    Case(
        "ingress TLS",
        sidecar("  ingress:\n  - port: {number: 80, protocol: HTTPS}\n    tls: {mode: SIMPLE}\n"),
        E,
        8,
        "spec.ingress[0].tls",
        "serve in plain text",
    ),
    Case("no servers", gateway("  selector: {a: b}\n"), E, 5, "spec", "servers is missing"),
    Case(
        "HTTPS without tls",
        gateway("  servers:\n  - port: {number: 443, protocol: HTTPS, name: a}\n    hosts: ['*']\n"),
        E,
        7,
        "spec.servers[0]",
        "needs tls",
    ),
    Case(
        "secret",
        gateway(
            "  servers:\n  - port: {number: 443, protocol: HTTPS, name: a}\n    hosts: ['*']\n"
            "    tls: {mode: PASSTHROUGH, credentialName: s}\n"
        ),
        E,
        9,
        "spec.servers[0].tls.credentialName",
        "Kubernetes Secrets",
    ),
    Case(
        "old TLS",
        gateway(
            "  servers:\n  - port: {number: 443, protocol: HTTPS, name: a}\n    hosts: ['*']\n"
            "    tls: {mode: ISTIO_MUTUAL, minProtocolVersion: TLSV1_0}\n"
        ),
        W,
        9,
        "spec.servers[0].tls.minProtocolVersion",
        "read as TLSV1_2",
    ),
    Case(
        "port name twice",
        gateway(
            "  servers:\n  - {port: {number: 80, protocol: HTTP, name: a}, hosts: ['*']}\n"
            "  - {port: {number: 81, protocol: HTTP, name: a}, hosts: ['*']}\n"
        ),
        E,
        8,
        "spec.servers[1].port.name",
        "given twice",
    ),
    # ── PeerAuthentication ──
    Case("unknown mode", peer("  mtls: {mode: STRICTLY}\n"), E, 6, "spec.mtls.mode", "did you mean STRICT?"),
    Case("mode in small letters", peer("  mtls: {mode: strict}\n"), E, 6, "spec.mtls.mode", "did you mean STRICT?"),
    Case("mode is a boolean", peer("  mtls: {mode: yes}\n"), E, 6, "spec.mtls.mode", "true is none of"),
    Case("misspelt policy field", peer("  mtl: {mode: STRICT}\n"), E, 6, "spec.mtl", "may be the one that protects"),
    Case(
        "misspelt selector",
        peer("  selector: {matchLabel: {a: b}}\n  mtls: {mode: STRICT}\n"),
        E,
        6,
        "spec.selector.matchLabel",
        "did you mean matchLabels?",
    ),
    Case(
        "ports without a selector",
        peer("  portLevelMtls:\n    8080: {mode: DISABLE}\n"),
        E,
        6,
        "spec.portLevelMtls",
        "needs selector.matchLabels",
    ),
    Case(
        "port 0",
        peer("  selector: {matchLabels: {a: b}}\n  portLevelMtls:\n    0: {mode: DISABLE}\n"),
        E,
        8,
        "spec.portLevelMtls.0",
        "is not a port",
    ),
    Case(
        "wildcard in a selector",
        peer("  selector: {matchLabels: {a: '*'}}\n  mtls: {mode: STRICT}\n"),
        E,
        6,
        "spec.selector.matchLabels.a",
        "takes no wildcard",
    ),
    # ── Kubernetes ──
    Case("service without ports", service("  selector: {a: b}\n"), E, 5, "spec", "ports is missing"),
    Case("service port 0", service("  ports: [{port: 0}]\n"), E, 6, "spec.ports[0].port", "not in 1..65535"),
    Case(
        "unnamed ports",
        service("  ports:\n  - {name: a, port: 1}\n  - {port: 2}\n"),
        E,
        8,
        "spec.ports[1]",
        "needs a name",
    ),
    Case(
        "misspelt selector of a service",
        service("  ports: [{port: 1}]\n  selectr: {}\n"),
        W,
        7,
        "spec.selectr",
        "selector?",
    ),
    Case("slice without type", endpoint_slice("endpoints: []\n"), E, 1, "", "addressType is missing"),
    Case(
        "address of another type",
        endpoint_slice("addressType: IPv6\nendpoints:\n- addresses:\n  - 10.0.0.1\n"),
        E,
        8,
        "endpoints[0].addresses[0]",
        "not of addressType IPv6",
    ),
    Case(
        "ready is a text",
        endpoint_slice("addressType: IPv4\nendpoints:\n- addresses: [10.0.0.1]\n  conditions: {ready: 'yes'}\n"),
        E,
        8,
        "endpoints[0].conditions.ready",
        "true or false",
    ),
    Case(
        "container without a name",
        documents(
            "Deployment",
            "apps/v1",
            "spec:\n  selector: {matchLabels: {a: b}}\n  template:\n    metadata: {labels: {a: b}}\n"
            "    spec:\n      containers:\n      - image: x\n",
        ),
        E,
        11,
        "spec.template.spec.containers[0]",
        "name is missing",
    ),
    Case(
        "removed Deployment API",
        documents(
            "Deployment",
            "extensions/v1beta1",
            "spec:\n  selector: {matchLabels: {a: b}}\n  template:\n    metadata: {labels: {a: b}}\n"
            "    spec: {containers: [{name: x, image: y}]}\n",
        ),
        W,
        1,
        "apiVersion",
        "read as apps/v1",
    ),
]


def load(text: str) -> tuple[int, list[ConfigProblem]]:
    resources, problems = load_text(text, "file.yaml")
    return len(resources), problems


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_malformed_configuration_gets_its_one_sentence(case: Case) -> None:
    count, problems = load(case.text)
    assert [problem.sentence() for problem in problems][1:] == []
    (problem,) = problems
    sentence = problem.sentence()
    assert case.fragment in sentence
    assert (problem.severity, problem.line, problem.field) == (case.severity, case.line, case.field), sentence
    assert sentence.startswith(f"file.yaml:{case.line}: ")
    assert "\n" not in sentence
    if case.severity is Severity.ERROR:
        assert count == 0, "a resource with an error is refused"


def test_the_names_of_the_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60
