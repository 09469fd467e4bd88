"""The snapshot as a whole: what is reused, what it is called, what it costs."""

from pathlib import Path
from random import Random
from time import process_time

from hypothesis import given
from hypothesis import strategies as st

from meshproxy.model.endpoint import Locality
from meshproxy.model.listener import AccessLogPolicy
from meshproxy.resources.document import Resource
from meshproxy.resources.load import load_text
from meshproxy.snapshot.translate import ProxyContext, translate
from tests.support.translation import destination_rule, service_entry, sidecar, translated, virtual_service

EXAMPLES = Path(__file__).parents[3] / "examples"
A = service_entry("a.example", "{address: 10.0.0.1}", "{address: 10.0.0.2}")
B = service_entry("b.example", "{address: 10.0.0.3}")
TEXTS = (sidecar(), A, B, *(path.read_text() for path in sorted(EXAMPLES.glob("*.yaml"))))


def test_the_same_resources_give_the_previous_snapshot_itself() -> None:
    first = translated(sidecar(), A, B).snapshot
    assert translated(sidecar(), A, B, previous=first).snapshot is first


def test_only_what_changed_is_a_new_object() -> None:
    first = translated(sidecar(), A, B).snapshot
    rule = destination_rule("a.example", "  trafficPolicy: {loadBalancer: {simple: RANDOM}}")
    second = translated(sidecar(), A, B, rule, previous=first).snapshot
    assert second.version != first.version
    assert second.clusters["outbound|8080||a.example"] is not first.clusters["outbound|8080||a.example"]
    assert second.clusters["outbound|8080||b.example"] is first.clusters["outbound|8080||b.example"]
    assert second.listeners is first.listeners
    assert second.route_tables is first.route_tables
    assert second.workloads is first.workloads


def test_a_line_number_is_no_change_of_traffic_but_is_told_truly() -> None:
    first = translated(sidecar(), A).snapshot
    second = translated(sidecar(), "# a comment\n" + A, previous=first).snapshot
    name = "outbound|8080||a.example"
    assert second.clusters[name] == first.clusters[name]
    assert (first.clusters[name].source, second.clusters[name].source) == ("2.yaml:2", "2.yaml:3")
    assert second.version == first.version


@given(st.randoms(use_true_random=False))
def test_the_snapshot_does_not_depend_on_the_order_in_which_resources_arrive(order: Random) -> None:
    resources = [resource for number, text in enumerate(TEXTS) for resource in load_text(text, f"{number}.yaml")[0]]
    context = ProxyContext(locality=Locality("cn-north-1", "zone1", "a"))
    expected, problems = translate(resources, context)
    order.shuffle(resources)
    shuffled, same_problems = translate(resources, context)
    assert shuffled == expected
    assert shuffled.version == expected.version
    assert same_problems == problems


def test_the_version_names_the_content() -> None:
    versions = {
        translated(*texts).snapshot.version
        for texts in (
            (sidecar(), A),
            (sidecar(), B),
            (sidecar(), A, B),
            (sidecar(), A, virtual_service("a.example", "  http: [{directResponse: {status: 404}}]")),
        )
    }
    assert len(versions) == 4


def test_an_empty_configuration_is_a_snapshot_with_the_process_as_its_workload() -> None:
    result = translated()
    assert list(result.snapshot.workloads) == ["default/meshproxy"]
    assert result.snapshot.listeners == {}


def test_the_access_log_is_what_the_process_was_told() -> None:
    policy = AccessLogPolicy(path="/dev/null", encoding="json")
    assert translated(access_log=policy).snapshot.access_log == policy


def test_each_example_translates_without_an_error() -> None:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        assert translated(path.read_text(), locality="cn-north-1/zone1/rack1").errors == [], path.name


def large_mesh(services: int, endpoints: int) -> list[Resource]:
    texts = [sidecar()]
    for number in range(services):
        listed = [
            f"{{address: 10.{number >> 8}.{number & 255}.{index}, locality: r1/z{index % 2}}}"
            for index in range(endpoints)
        ]
        texts.append(service_entry(f"service-{number}.example", *listed))
    resources, problems = load_text("\n---\n".join(texts), "large.yaml")
    assert not problems
    return resources


def test_a_thousand_services_of_ten_endpoints_translate_in_a_second() -> None:
    resources = large_mesh(1000, 10)
    context = ProxyContext(locality=Locality("r1", "z1"))
    started = process_time()
    snapshot, _ = translate(resources, context)
    took = process_time() - started
    assert len(snapshot.clusters) == 1000
    # CPU time, so that what else runs on the machine does not count; 0.3 s where this was written.
    assert took < 1.0
