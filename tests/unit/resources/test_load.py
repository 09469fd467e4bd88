"""Documents → checked resources in today's spelling."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshproxy.resources.document import Resource
from meshproxy.resources.load import load_text
from meshproxy.resources.problems import ConfigProblem, Severity

EXAMPLES = Path(__file__).parents[3] / "examples"


def load(text: str | bytes) -> tuple[list[Resource], list[ConfigProblem]]:
    return load_text(text, "file.yaml")


def one(text: str) -> Resource:
    resources, problems = load(text)
    assert [problem.sentence() for problem in problems if problem.severity is Severity.ERROR] == []
    (resource,) = resources
    return resource


def document(kind: str, spec: dict[str, Any], api_version: str = "networking.istio.io/v1") -> str:
    return json.dumps({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}, "spec": spec}, indent=1)


def policy_of(policy: dict[str, Any]) -> Any:
    return one(document("DestinationRule", {"host": "a", "trafficPolicy": policy})).spec["trafficPolicy"]


# ── the published examples ───────────────────────────────────────────────────────────────────────────────────────────


def example_sentences(name: str) -> list[str]:
    _, problems = load_text((EXAMPLES / name).read_bytes(), name)
    assert all(problem.severity is Severity.WARNING for problem in problems)
    return [problem.sentence() for problem in problems]


def test_the_locality_example_loads_with_a_warning_for_each_former_spelling() -> None:
    place = "DestinationRule default/edge-service: spec.trafficPolicy"
    assert example_sentences("locality-lb.yaml") == [
        f"locality-lb.yaml:10: {place}.loadBalancer.simple: LEAST_CONN is the old name of LEAST_REQUEST; "
        "read as LEAST_REQUEST",
        f"locality-lb.yaml:12: {place}.outlierDetection.consecutiveErrors: consecutiveErrors is deprecated: "
        "today it is consecutiveGatewayErrors (502, 503, 504) or consecutive5xxErrors; "
        "read as consecutiveGatewayErrors: 5, counting failed connections as well",
        f"locality-lb.yaml:14: {place}.localityLbSettings: localityLbSettings is not a field here: "
        "today it is loadBalancer.localityLbSetting; read as loadBalancer.localityLbSetting",
    ]


def test_todays_spelling_of_the_locality_example_loads_without_a_word() -> None:
    assert example_sentences("locality-lb.today.yaml") == []


def test_both_spellings_of_the_locality_example_mean_the_same_balancing() -> None:
    former, today = (one((EXAMPLES / name).read_text()).spec for name in ("locality-lb.yaml", "locality-lb.today.yaml"))
    assert former["host"] == today["host"]
    assert former["trafficPolicy"]["loadBalancer"] == today["trafficPolicy"]["loadBalancer"]
    assert former["trafficPolicy"]["outlierDetection"] == {
        "interval": 10.0,
        "consecutiveGatewayErrors": 5,
        "_countsConnectionFailures": True,
    }


def test_the_policy_example_loads_without_a_word() -> None:
    assert example_sentences("v2x-policy.yaml") == []
    resource = one((EXAMPLES / "v2x-policy.yaml").read_text())
    assert (resource.group, resource.kind, resource.namespace) == ("security.istio.io", "PeerAuthentication", "default")
    assert resource.spec == {"mtls": {"mode": "STRICT"}, "selector": {"matchLabels": {"app": "rsu-service"}}}


def test_the_shared_sidecar_example_loads_with_a_warning_for_all_that_is_missing() -> None:
    place = "Deployment default/shared-sidecar: spec"
    assert example_sentences("shared-sidecar.yaml") == [
        f"shared-sidecar.yaml:6: {place}.selector.matchLabels: selector.matchLabels is missing, "
        "which apps/v1 requires; every pod of the template is taken",
        f"shared-sidecar.yaml:7: {place}.template.metadata.labels: template.metadata.labels is missing, "
        "which apps/v1 requires; app: <container name> is assumed for each container's workload",
        f"shared-sidecar.yaml:16: {place}.template.spec.containers[1].image: container app1 has no image; "
        "its workload is served all the same",
        f"shared-sidecar.yaml:18: {place}.template.spec.containers[2].image: container app2 has no image; "
        "its workload is served all the same",
    ]
    resource = one((EXAMPLES / "shared-sidecar.yaml").read_text())
    containers = resource.spec["template"]["spec"]["containers"]
    assert [container["name"] for container in containers] == ["envoy", "app1", "app2"]


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", ["v1", "v1beta1", "v1alpha3"])
def test_every_version_of_the_networking_api_is_read_alike(version: str) -> None:
    assert one(document("DestinationRule", {"host": "a"}, f"networking.istio.io/{version}")).spec == {"host": "a"}


def test_a_list_is_unpacked() -> None:
    text = """\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: a, namespace: edge, labels: {app: a}, creationTimestamp: 2024-01-01T00:00:00Z}
  spec: {ports: [{port: 80}]}
- apiVersion: networking.istio.io/v1
  kind: DestinationRule
  metadata: {name: b}
  spec: {host: a, hosts: b}
"""
    resources, problems = load(text)
    assert [(resource.label, resource.source) for resource in resources] == [
        ("Service edge/a", "file.yaml:4"),
        ("DestinationRule default/b", "file.yaml:8"),
    ]
    assert resources[0].labels == {"app": "a"}
    assert resources[0].created == "2024-01-01T00:00:00Z"
    assert [(problem.line, problem.field) for problem in problems] == [(11, "items[1].spec.hosts")]


def test_the_default_namespace_is_the_one_given() -> None:
    resources, _ = load_text(document("DestinationRule", {"host": "a"}), "file.yaml", "edge")
    assert resources[0].namespace == "edge"


def test_nodes_and_namespaces_have_no_namespace() -> None:
    text = "apiVersion: v1\nkind: Node\nmetadata:\n  name: n1\n  labels: {topology.kubernetes.io/zone: zone1}\n"
    resource = one(text)
    assert (resource.namespace, resource.spec) == ("", {})
    assert resource.labels == {"topology.kubernetes.io/zone": "zone1"}


def test_a_config_map_is_ignored_without_a_word() -> None:
    assert load("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {a: b}\n") == ([], [])


def test_the_second_of_two_resources_of_one_name_is_used() -> None:
    text = document("DestinationRule", {"host": "a"}) + "\n---\n" + document("DestinationRule", {"host": "b"})
    resources, (problem,) = load(text)
    assert [resource.spec["host"] for resource in resources] == ["b"]
    assert "given twice, before at file.yaml:1" in problem.sentence()


def test_a_broken_document_names_the_resource_that_it_was() -> None:
    text = "apiVersion: v1\nkind: Service\nmetadata:\n  labels: {a: b}\n  name: edge\n  namespace: mec\nspec:\n  - [\n"
    resources, (problem,) = load(text)
    assert resources == []
    assert problem.resource == "Service mec/edge"
    assert problem.action == "the resource is refused"


def test_a_broken_document_that_names_nothing_is_an_error_without_a_resource() -> None:
    _, (problem,) = load("spec:\n  - [\n")
    assert problem.resource == ""
    assert problem.severity is Severity.ERROR


def test_a_resource_is_equal_wherever_it_stands() -> None:
    text = document("DestinationRule", {"host": "a"})
    assert load(text)[0] == load("# a comment\n---\n" + text)[0]


def test_an_error_leaves_the_other_resources_of_the_file() -> None:
    bad = document("DestinationRule", {"host": "b", "exportTo": 5})
    good = document("DestinationRule", {"host": "a"}).replace('"x"', '"y"')
    resources, problems = load(f"{bad}\n---\n{good}")
    assert [resource.name for resource in resources] == ["y"]
    assert len(problems) == 1


# ── canonical form ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10.0), ("1m30s", 90.0), ("100ms", 0.1), ("1.5h", 5400.0), ("1h1m1s", 3661.0), ("2500us", 0.0025)],
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    assert policy_of({"outlierDetection": {"interval": text}}) == {"outlierDetection": {"interval": seconds}}


def test_zero_means_never_where_istio_says_so() -> None:
    assert policy_of({"connectionPool": {"tcp": {"idleTimeout": "0s"}}})["connectionPool"]["tcp"]["idleTimeout"] == 0.0


def test_null_and_empty_text_are_absent() -> None:
    assert policy_of({"tls": {"mode": "SIMPLE", "sni": "", "caCertificates": None}}) == {"tls": {"mode": "SIMPLE"}}


def test_unspecified_is_absent() -> None:
    assert policy_of({"loadBalancer": {"simple": "UNSPECIFIED"}}) == {"loadBalancer": {}}


def test_protocols_are_in_capitals() -> None:
    spec = {"hosts": ["a.b"], "ports": [{"number": 80, "name": "a", "protocol": "http"}]}
    assert one(document("ServiceEntry", spec)).spec["ports"] == [{"number": 80, "name": "a", "protocol": "HTTP"}]


_LOCALITY = {"enabled": True, "distribute": [{"from": "a/*", "to": {"a/*": 100}}]}


@pytest.mark.parametrize("name", ["localityLbSetting", "localityLbSettings"])
@pytest.mark.parametrize("place", [(), ("loadBalancer",), ("outlierDetection",)])
def test_the_locality_setting_is_found_wherever_it_was_ever_written(name: str, place: tuple[str, ...]) -> None:
    inner: dict[str, Any] = {name: _LOCALITY}
    for step in reversed(place):
        inner = {step: inner}
    assert policy_of(inner)["loadBalancer"] == {"localityLbSetting": _LOCALITY}
    on_port = {"portLevelSettings": [{"port": {"number": 80}, **inner}]}
    assert policy_of(on_port)["portLevelSettings"][0]["loadBalancer"] == {"localityLbSetting": _LOCALITY}
    subset = one(document("DestinationRule", {"host": "a", "subsets": [{"name": "v1", "trafficPolicy": inner}]}))
    assert subset.spec["subsets"][0]["trafficPolicy"]["loadBalancer"] == {"localityLbSetting": _LOCALITY}


def test_a_moved_field_is_still_found_by_line() -> None:
    resource = one((EXAMPLES / "locality-lb.yaml").read_text())
    assert resource.marks["spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].from"] == 17
    assert resource.marks["spec.trafficPolicy.outlierDetection.consecutiveGatewayErrors"] == 12


def test_the_setting_in_todays_place_wins() -> None:
    policy = {"loadBalancer": {"localityLbSetting": {"enabled": False}}, "localityLbSettings": _LOCALITY}
    assert policy_of(policy) == {"loadBalancer": {"localityLbSetting": {"enabled": False}}}


def test_consecutive_errors_give_way_to_todays_counts() -> None:
    detection = policy_of({"outlierDetection": {"consecutiveErrors": 3, "consecutive5xxErrors": 7}})["outlierDetection"]
    assert detection == {"consecutive5xxErrors": 7}


def test_former_header_operations_move_under_headers() -> None:
    route = {
        "route": [{"destination": {"host": "b"}, "removeResponseHeaders": ["x-b"]}],
        "appendHeaders": {"x-a": "1"},
        "headers": {"request": {"set": {"x-c": "2"}}},
    }
    (http,) = one(document("VirtualService", {"hosts": ["a"], "http": [route]})).spec["http"]
    assert http["headers"] == {"request": {"set": {"x-c": "2"}, "add": {"x-a": "1"}}}
    assert http["route"][0]["headers"] == {"response": {"remove": ["x-b"]}}


def test_routes_behind_a_delegate_keep_their_lines() -> None:
    text = """\
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: x}
spec:
  hosts: [a]
  http:
  - delegate: {name: y}
    match: [{uri: {prefix: /y}}]
  - route: [{destination: {host: b}}]
"""
    resource = one(text)
    assert resource.spec["http"] == [{"route": [{"destination": {"host": "b"}}]}]
    assert resource.marks["spec.http[0].route"] == 9


def test_presence_matches_are_kept() -> None:
    headers = {"x-a": {}, "x-b": {"regex": "*"}}
    spec = {"hosts": ["a"], "http": [{"route": [{"destination": {"host": "b"}}], "match": [{"headers": headers}]}]}
    assert one(document("VirtualService", spec)).spec["http"][0]["match"][0]["headers"] == headers


def test_ports_of_a_policy_are_text_keys() -> None:
    text = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: x}
spec:
  selector: {matchLabels: {app: a}}
  portLevelMtls:
    8080: {mode: DISABLE}
"""
    assert one(text).spec["portLevelMtls"] == {"8080": {"mode": "DISABLE"}}


def test_an_empty_policy_is_one() -> None:
    assert one("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x}\n").spec == {}


def test_a_slice_of_the_beta_api_keeps_its_zone() -> None:
    text = """\
apiVersion: discovery.k8s.io/v1beta1
kind: EndpointSlice
metadata: {name: x}
addressType: IPv4
ports: [{port: 80}]
endpoints:
- addresses: [10.0.0.1]
  topology: {topology.kubernetes.io/zone: zone1, kubernetes.io/hostname: n1}
"""
    assert one(text).spec == {
        "addressType": "IPv4",
        "ports": [{"port": 80}],
        "endpoints": [{"addresses": ["10.0.0.1"], "zone": "zone1"}],
    }


def test_fields_of_a_pod_that_are_not_read_pass_in_silence() -> None:
    pod = {
        "containers": [{"name": "a", "image": "b", "env": [], "livenessProbe": {}}],
        "tolerations": [],
        "volumes": [],
    }
    resources, problems = load(document("Pod", pod, "v1"))
    assert problems == []
    assert resources[0].spec == {"containers": [{"name": "a", "image": "b"}]}


# ── whatever the text ────────────────────────────────────────────────────────────────────────────────────────────────

_SAMPLES = [path.read_text() for path in sorted(EXAMPLES.glob("*.yaml"))]
_SAMPLES.append(
    """\
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: x}
spec:
  hosts: [a.example.com]
  http:
  - match: [{uri: {prefix: /a}, headers: {x-a: {regex: "a+"}}}]
    route: [{destination: {host: b, port: {number: 80}}, weight: 10}, {destination: {host: c}, weight: 90}]
    retries: {attempts: 2, perTryTimeout: 1s, retryOn: 5xx}
    timeout: 10s
  - redirect: {uri: /b, redirectCode: 302}
  tcp:
  - match: [{port: 80, destinationSubnets: [10.0.0.0/8]}]
    route: [{destination: {host: b}}]
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: x}
spec:
  ingress: [{port: {number: 80, protocol: HTTP, name: a}, defaultEndpoint: "127.0.0.1:8080"}]
  egress: [{port: {number: 80, protocol: HTTP}, bind: 127.0.0.1, captureMode: NONE, hosts: ["./*"]}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: x}
spec:
  hosts: [a.b]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 10.0.0.1, ports: {http: 8080}, locality: a/b/c, weight: 2, labels: {a: b}}]
---
apiVersion: v1
kind: Service
metadata: {name: x}
spec: {ports: [{port: 80, targetPort: http}], selector: {a: b}}
"""
)
_OBJECTS = [root for text in _SAMPLES for root in yaml.safe_load_all(text)]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


_JUNK = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 10**12, 1.5),
        *("", "x", "*", "a/*", "10s", "0s", "unix:///a", "\n", "é" * 300),
        *([], [None], [[]], [{}]),
        *({}, {"": None}, {"x": {}}, {"*": "*"}, {"name": "x"}, {"number": 80}, {"exact": "a"}),
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(_OBJECTS), st.data())
def test_a_resource_with_any_field_replaced_is_read_or_refused_with_a_sentence(root: Any, data: st.DataObject) -> None:
    places = list(_places(root))
    broken = root
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        try:
            broken = _replaced(broken, place, data.draw(_JUNK))
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    resources, problems = load(json.dumps(broken))
    assert resources or problems or (isinstance(broken, dict) and broken.get("kind") == "List") or broken is None
    for problem in problems:
        assert "\n" not in problem.sentence()
        assert problem.line == 1
    if not resources and broken is not None:
        assert problems, "nothing is dropped without a word"


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(_SAMPLES), st.data())
@example(_SAMPLES[0], None)
def test_a_mutilated_file_is_read_or_refused_with_sentences(text: str, data: st.DataObject | None) -> None:
    if data is not None:
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(text)))
            end = data.draw(st.integers(start, min(len(text), start + 30)))
            junk = data.draw(
                st.sampled_from(["", " ", "\t", ":", "-", "\n", "{", "[", "'", '"', "&a", "*a", "!", "\0", "%"])
            )
            text = text[:start] + junk + text[end:]
    started = time.process_time()
    _, problems = load(text)
    assert time.process_time() - started < 1
    assert all(problem.line <= text.count("\n") + 1 for problem in problems)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300)))
def test_any_bytes_are_read_or_refused(data: bytes | str) -> None:
    load(data)


def test_a_million_mistakes_are_answered_in_bounded_time_and_space() -> None:
    fields = "".join(f"  f{i}: 1\n" for i in range(100_000))
    started = time.process_time()
    _, problems = load("apiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {name: x}\nspec:\n" + fields)
    assert len(problems) < 200
    assert time.process_time() - started < 10


def test_a_mesh_of_a_thousand_services_loads_in_time() -> None:
    """Ten endpoints each, 2.8 MB. The target is two seconds; the bound here leaves room for a busy machine."""
    parts = []
    for i in range(1000):
        parts.append(document("Service", {"ports": [{"name": "http", "port": 80}]}, "v1").replace('"x"', f'"s{i}"'))
        endpoints = "".join(
            f"- addresses:\n  - 10.{i // 256}.{i % 256}.{j}\n  conditions:\n    ready: true\n    serving: true\n"
            f"  nodeName: node-{j}\n  zone: zone{j % 2}\n  targetRef:\n    kind: Pod\n    name: pod-{j}\n"
            "    namespace: default\n    uid: 3c5ff2c0-7c2e-4b43-bb0c-6b2f6f9d3f0f\n"
            for j in range(10)
        )
        parts.append(
            f"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s{i}\n"
            f"  labels: {{kubernetes.io/service-name: s{i}}}\naddressType: IPv4\nports:\n- port: 8080\n"
            f"endpoints:\n{endpoints}"
        )
    text = "\n---\n".join(parts)
    started = time.process_time()
    resources, problems = load(text)
    taken = time.process_time() - started
    assert (len(resources), problems) == (2000, [])
    assert taken < 6, taken
