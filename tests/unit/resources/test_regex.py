"""Which regexes may meet what strangers send."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshproxy.resources.regex import check_regex

EVERYDAY = [
    ".*",
    "/api/v[0-9]+/.*",
    ".*foo.*bar.*",
    "^/a(/.*)?$",
    "(a|b)*c",
    "([a-z]+/)*x",
    "(/[a-z]+)*",
    "[a-z]+-[0-9]+-[a-z]+",
    r"\d{3}-\d{4}",
    "(foo|bar|baz)+",
    "^(.*?;)?(user=jason)(;.*)?$",
    "(?i)abc",
    r".*\.(jpg|png|gif)",
    "(en|de)-(us|at)",
    r"(\w+\.)+com",
    "(https?://)?x",
    r"[0-9]{1,3}(\.[0-9]{1,3}){3}",
    "(?P<name>a)",
    r"(?:[a-z0-9-]{1,63}\.)*example\.com",
    r"[\w-]+(\.[\w-]+)*@[\w-]+(\.[\w-]+)+",
    "/([a-z]{2}-[a-z]{2}/)?products(/.*)?",
    "(?:[a-f0-9]{8}-){3}x",
]
REFUSED = [
    ("(a+)+$", "exponential"),
    ("(a*)*", "can be empty"),
    ("(a|a)*", "alternatives"),
    ("(a|aa)+$", "alternatives"),
    ("([a-zA-Z]+)*$", "exponential"),
    ("(.*a){20}", "repeats a repeat"),
    ("(ba+a*)*", "exponential"),
    ("((a|ab)(c|bc))*d", "exponential"),
    ("a?" * 30 + "a" * 30, "thousand ways"),
    ("(a|aa)" * 30, "thousand ways"),
    (".*.*.*x", "cubic"),
    (".{1,50}.{1,50}.{1,50}x", "cubic"),
    ("a++", "RE2 has no possessive"),
    ("(?>a)", "RE2 has no atomic"),
    ("(?=a)b", "RE2 has no look-around"),
    ("(?<!a)b", "RE2 has no look-around"),
    (r"(a)\1", "RE2 has no back-references"),
    ("(a)?(?(1)b|c)", "RE2 has no conditional"),
    (r"\p{L}", "not supported"),
    ("[[:alpha:]]", "POSIX"),
    ("(", "not a regex"),
    ("a{1001}", "at most 1000"),
    ("(a{500}){500}", "too large"),
    ("(" * 200 + "a" + ")" * 200, "too deeply"),
    ("a" * 1025, "may have 1024"),
]


@pytest.mark.parametrize("pattern", EVERYDAY)
def test_everyday_regexes_are_taken(pattern: str) -> None:
    assert check_regex(pattern) is None


@pytest.mark.parametrize(("pattern", "why"), REFUSED, ids=[pattern[:30] for pattern, _ in REFUSED])
def test_what_re2_refuses_or_backtracking_explodes_on_is_refused(pattern: str, why: str) -> None:
    wrong = check_regex(pattern)
    assert wrong is not None
    assert why in wrong


_LEAVES = st.sampled_from(["a", "b", "c", ".", "[ab]"])
_REPEATS = st.sampled_from(["*", "+", "?", "{1,3}", "{2}", "*?", "{3,}", "{12}", "{0,40}"])
_PATTERNS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("({}|{})".format, inner, inner),
        st.builds("({}){}".format, inner, _REPEATS),
    ),
    max_leaves=8,
)
_TEXTS = ["a" * 60 + "!", "ab" * 30 + "!", "b" * 60 + "!", "aab" * 20 + "!", "abc" * 20 + "!"]


@settings(max_examples=400, deadline=None)
@given(_PATTERNS)
def test_a_regex_that_is_taken_fails_fast(pattern: str) -> None:
    """An exponential one would take years on these texts; half a second is for a busy machine."""
    if check_regex(pattern) is not None:
        return
    compiled = re.compile(pattern)
    for text in _TEXTS:
        started = time.process_time()
        compiled.fullmatch(text)
        assert time.process_time() - started < 0.5


@settings(max_examples=300)
@given(st.text(alphabet="ab.|()[]{}*+?\\^$-0123,:=!<>P", max_size=40))
def test_any_text_gets_an_answer(pattern: str) -> None:
    if check_regex(pattern) is None:
        re.compile(pattern)
