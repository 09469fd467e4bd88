"""Text → values and lines."""

import re
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.resources.document import MAX_BYTES, Document, Marks, documents, path_of, path_text


def values(text: str | bytes) -> list[object]:
    return [document.root for document in documents(text)]


def refusal(text: str | bytes) -> str:
    (document,) = documents(text)
    assert document.refusal is not None
    return document.refusal.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 15),
        ("1_000", 1000),
        ("08", "08"),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("1.10", 1.1),
        ("yes", True),
        ("Off", False),
        ("y", "y"),
        ("~", None),
        ("", None),
        ("null", None),
        ('"5"', "5"),
        ("'yes'", "yes"),
        ("10.0.0.1", "10.0.0.1"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("10s", "10s"),
    ],
)
def test_scalars_mean_what_kubernetes_reads(text: str, value: object) -> None:
    assert values(f"a: {text}\n") == [{"a": value}]


def test_number_keys_are_text() -> None:
    assert values("8080: {mode: DISABLE}\n") == [{"8080": {"mode": "DISABLE"}}]


def test_json_with_tabs_is_read() -> None:
    assert values('{\n\t"a": [1, "b"],\n\t"c": {"d": null}\n}\n') == [{"a": [1, "b"], "c": {"d": None}}]


def test_a_byte_order_mark_and_windows_line_ends_are_read() -> None:
    assert values(b"\xef\xbb\xbfa: 1\r\n---\r\nb: 2\r\n") == [{"a": 1}, {"b": 2}]


def test_empty_documents_are_left_out() -> None:
    assert values("---\n---\n# only a comment\n---\na: 1\n---\n") == [{"a": 1}]


def test_directives_before_the_first_marker_are_read() -> None:
    assert values("%YAML 1.1\n---\na: 1\n") == [{"a": 1}]


def test_a_broken_document_leaves_its_neighbours() -> None:
    found = list(documents("a: 1\n---\nb: [\n---\nc: 3\n"))
    assert [document.root for document in found] == [{"a": 1}, None, {"c": 3}]
    assert found[1].refusal is not None and found[1].refusal.line == 3


def test_aliases_and_merges_are_expanded() -> None:
    text = "base: &base {a: 1, b: 2}\none: {<<: *base, b: 3}\nmany: {<<: [*base, {c: 4}]}\nlist: [*base]\n"
    assert values(text) == [
        {
            "base": {"a": 1, "b": 2},
            "one": {"a": 1, "b": 3},
            "many": {"a": 1, "b": 2, "c": 4},
            "list": [{"a": 1, "b": 2}],
        }
    ]


def test_an_anchor_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    started = time.process_time()
    assert "aliases stand for more values" in refusal("\n".join(lines))
    assert time.process_time() - started < 1


def test_a_bomb_of_merges_is_refused() -> None:
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(50)) + "}"]
    lines += [f"b{i}: {{<<: [{', '.join(['*a0'] * 50)}]}}" for i in range(50)]
    assert "aliases stand for more values" in refusal("\n".join(lines))


@pytest.mark.parametrize("text", ["[" * 1_000_000, "- " * 1_000_000, "{a: " * 1_000_000, "? " * 1_000_000])
def test_deep_nesting_is_refused_at_once(text: str) -> None:
    started = time.process_time()
    assert "nested deeper than 100" in refusal(text) or "a key must be text" in refusal(text)
    assert time.process_time() - started < 2


def test_a_file_over_the_limit_is_refused_at_once() -> None:
    started = time.process_time()
    said = refusal(b"#" * (MAX_BYTES + 1))
    assert said.endswith("larger than 16 MiB: split it into several files")
    assert time.process_time() - started < 1


def test_a_file_of_the_limit_is_read() -> None:
    assert values(b"a: b\n" + b"#" * (MAX_BYTES - 5)) == [{"a": "b"}]


def test_a_large_file_is_read_in_time_that_grows_with_its_size() -> None:
    count = MAX_BYTES // 8 // 20
    started = time.process_time()
    (root,) = values("x:\n" + "- {a: 1, b: [c, d]}\n" * count)
    assert isinstance(root, dict) and len(root["x"]) == count
    assert time.process_time() - started < 5


def test_bytes_that_are_no_text_are_refused() -> None:
    assert "not UTF-8" in refusal(b"a: \xff\n")
    assert "UTF-16" in refusal("a: 1".encode("utf-16"))


def test_lines_of_fields() -> None:
    text = "---\na:\n  b:\n  - c: 1\n  - c: 2\n    d: {e: 3}\n---\nf: 1\n"
    first, second = documents(text)
    for field, line in [("a", 2), ("a.b", 3), ("a.b[0]", 4), ("a.b[1].c", 5), ("a.b[1].d.e", 6)]:
        assert first.line_of(path_of(field)) == line
    assert second.line == second.line_of(path_of("f")) == 8


def test_a_field_that_is_not_written_has_the_line_of_what_is_around_it() -> None:
    (document,) = documents("a:\n  b:\n  - c: 1\n")
    assert document.line_of(path_of("a.b[0].x.y")) == 3
    assert document.line_of(path_of("a.b[7]")) == 2
    assert document.line_of(path_of("z")) == 1


def test_lines_with_old_line_ends() -> None:
    _, second = documents("a: 1\r---\rb:\r  c: 2\r")
    assert second.line_of(path_of("b.c")) == 4


def test_lines_inside_a_merge_are_where_it_is_merged() -> None:
    (document,) = documents("base: &x\n  a: 1\nhere:\n  <<: *x\n")
    assert document.line_of(path_of("here.a")) == 4


def test_marks_know_where_a_moved_field_was_written() -> None:
    (document,) = documents("spec:\n  old:\n    a: 1\n")
    marks = Marks(document, {"spec.new.place": "spec.old"})
    assert marks["spec.new.place"] == 2
    assert marks["spec.new.place.a"] == 3
    assert marks["spec.new.placeholder"] == 1
    assert list(marks) == ["spec", "spec.old", "spec.old.a"]


def test_marks_without_the_text_give_the_line_of_the_document() -> None:
    (document,) = documents("\n\nspec:\n  a: 1\n")
    assert Marks(document, {}, keeps_text=False)["spec.a"] == 3


_KEYS = st.one_of(st.integers(0, 9), st.text(min_size=1, max_size=20))


@given(st.lists(_KEYS, min_size=1, max_size=5))
def test_a_path_survives_being_written(keys: list[int | str]) -> None:
    path = None
    for key in keys:
        path = (path, key)
    assert path_of(path_text(path)) == path


_JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**9), 10**9),
        st.floats(-1e6, 1e6),
        # PyYAML writes text such as 1E5 without quotes; Kubernetes reads a number there, and so do we.
        st.text(alphabet=st.characters(blacklist_categories=("Cc", "Cs", "Cn")), max_size=20).filter(
            lambda text: re.fullmatch(r"[-+]?[0-9]+[eE][-+]?[0-9]+", text) is None
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text("abcdefgh-/.", min_size=1, max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(_JSON)
def test_what_was_written_as_yaml_is_read_back(value: object) -> None:
    text = yaml.dump({"root": value}, allow_unicode=True)
    assert values(text) == [{"root": value}]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_any_bytes_give_documents_or_refusals(data: bytes | str) -> None:
    for document in documents(data):
        assert isinstance(document, Document)
        assert (document.root is None) == (document.refusal is not None)
