from collections.abc import Sequence

from meshproxy.control.store import ResourceStore
from meshproxy.discovery.provider import Document, Update
from meshproxy.resources.document import Resource
from meshproxy.resources.problems import ConfigProblem, Severity


def rule(name: str, host: str = "a", line: int = 1, source: str = "a.yaml") -> Resource:
    return Resource(
        group="networking.istio.io",
        kind="DestinationRule",
        namespace="default",
        name=name,
        labels={},
        annotations={},
        created="",
        spec={"host": host},
        source=f"{source}:{line}",
        marks={},
    )


def problem(resource: str, severity: Severity = Severity.ERROR) -> ConfigProblem:
    return ConfigProblem(
        severity=severity, source="a.yaml", line=1, field="spec", resource=resource, message="is wrong", action=""
    )


def store_with(*resources: Resource) -> ResourceStore:
    store = ResourceStore()
    store.apply(Update(documents=[Document(source="a.yaml", resources=resources)]))
    return store


def say(store: ResourceStore, resources: Sequence[Resource] = (), problems: Sequence[ConfigProblem] = ()) -> None:
    store.apply(Update(documents=[Document(source="a.yaml", resources=resources, problems=problems)]))


def test_a_resource_in_error_keeps_its_last_good_version() -> None:
    store = store_with(rule("one"), rule("two"))
    say(store, [rule("two", host="b")], [problem("DestinationRule default/one")])
    assert {r.name: r.spec["host"] for r in store.resources()} == {"one": "a", "two": "b"}


def test_a_resource_that_was_taken_out_goes_although_another_is_in_error() -> None:
    store = store_with(rule("one"), rule("two"), rule("three"))
    say(store, [rule("two")], [problem("DestinationRule default/one")])
    assert {r.name for r in store.resources()} == {"one", "two"}


def test_an_error_that_names_no_resource_may_hide_any_and_so_keeps_all() -> None:
    store = store_with(rule("one"), rule("two"))
    say(store, [rule("two", host="b")], [problem("")])
    assert {r.name: r.spec["host"] for r in store.resources()} == {"one": "a", "two": "b"}


def test_a_warning_keeps_nothing() -> None:
    store = store_with(rule("one"))
    say(store, [], [problem("DestinationRule default/one", Severity.WARNING)])
    assert store.resources() == []


def test_a_file_that_cannot_be_read_keeps_what_it_had_and_says_so() -> None:
    store = store_with(rule("one"))
    store.apply(Update(documents=[Document(source="a.yaml", is_unreadable=True, problems=[problem("")])]))
    assert [r.name for r in store.resources()] == ["one"]
    assert store.problems() == [problem("")]


def test_a_file_that_vanished_takes_its_resources_and_problems_with_it() -> None:
    store = store_with(rule("one"))
    say(store, [rule("one")], [problem("DestinationRule default/other")])
    store.apply(Update(gone=frozenset({"a.yaml"})))
    assert store.resources() == []
    assert store.problems() == []


def test_the_later_document_wins_and_the_clash_is_reported() -> None:
    store = store_with(rule("one", host="a"))
    later = rule("one", host="b", line=7, source="b.yaml")
    store.apply(Update(documents=[Document(source="b.yaml", resources=[later])]))
    assert store.resources() == [later]
    (found,) = store.problems()
    assert found.severity is Severity.WARNING
    assert found.sentence().startswith("b.yaml:7: DestinationRule default/one: metadata.name: ")


def test_only_a_change_is_reported() -> None:
    changes = []
    store = ResourceStore(lambda: changes.append(None))
    say(store, [rule("one")])
    say(store, [rule("one")])
    store.apply(Update(gone=frozenset({"never-seen.yaml"})))
    assert len(changes) == 1
    say(store, [rule("one")], [problem("", Severity.WARNING)])
    assert len(changes) == 2
