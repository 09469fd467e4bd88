import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshproxy.snapshot.hosts import Imports, domains, is_exported, matches, narrower, qualified, specificity


@pytest.mark.parametrize(
    ("written", "full"),
    [
        ("reviews", "reviews.shop.svc.cluster.local"),
        ("reviews.other", "reviews.other"),
        ("Reviews.Example.COM", "reviews.example.com"),
        ("*", "*"),
        ("*.example.com", "*.example.com"),
        ("10.0.0.1", "10.0.0.1"),
        ("fd00::1", "fd00::1"),
    ],
)
def test_only_a_name_without_dots_is_completed(written: str, full: str) -> None:
    assert qualified(written, "shop") == full


@pytest.mark.parametrize(
    ("pattern", "host", "does"),
    [
        ("*", "a.example.com", True),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "*.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "aexample.com", False),
        ("a.example.com", "a.example.com", True),
        ("a.example.com", "*.example.com", False),
    ],
)
def test_a_pattern_covers_what_its_suffix_says(pattern: str, host: str, does: bool) -> None:
    assert matches(pattern, host) is does


def test_exact_names_come_before_long_wildcards_and_those_before_short_ones() -> None:
    patterns = ["*", "*.com", "a.com", "*.example.com"]
    assert sorted(patterns, key=specificity, reverse=True) == ["a.com", "*.example.com", "*.com", "*"]


_HOSTS = st.lists(st.sampled_from(["a", "b", "example", "com"]), min_size=1, max_size=4).map(".".join)
_PATTERNS = st.one_of(_HOSTS, _HOSTS.map("*.{}".format), st.just("*"))


@given(_PATTERNS, _PATTERNS, _HOSTS)
def test_what_two_patterns_have_in_common_covers_exactly_what_both_do(a: str, b: str, host: str) -> None:
    both = narrower(a, b)
    assert (both is not None and matches(both, host)) == (matches(a, host) and matches(b, host))


def test_short_names_mean_a_service_only_from_where_a_resolver_would_complete_them() -> None:
    host = "reviews.shop.svc.cluster.local"
    assert domains(host, "shop", 80) == (
        "reviews.shop.svc.cluster.local",
        "reviews.shop.svc.cluster.local:80",
        "reviews.shop.svc",
        "reviews.shop.svc:80",
        "reviews.shop",
        "reviews.shop:80",
        "reviews",
        "reviews:80",
    )
    assert "reviews" not in domains(host, "other", 80)
    assert "reviews.shop" in domains(host, "other", 80)


def test_virtual_addresses_mean_their_service() -> None:
    assert domains("a.example", "shop", 80, ["10.0.0.1", "fd00::1"]) == (
        "a.example",
        "a.example:80",
        "10.0.0.1",
        "10.0.0.1:80",
        "[fd00::1]",
        "[fd00::1]:80",
    )


@pytest.mark.parametrize(
    ("export_to", "to", "is_visible"),
    [
        ([], "other", True),
        (["*"], "other", True),
        (["."], "owner", True),
        (["."], "other", False),
        (["other"], "other", True),
        (["other"], "owner", False),
        (["~"], "owner", False),
    ],
)
def test_export_to_decides_who_sees_a_resource(export_to: list[str], to: str, is_visible: bool) -> None:
    assert is_exported(export_to, "owner", to) is is_visible


@pytest.mark.parametrize(
    ("hosts", "owner", "host", "does"),
    [
        (["./*"], "mine", "a.example", True),
        (["./*"], "other", "a.example", False),
        (["*/*"], "other", "a.example", True),
        (["other/a.example"], "other", "a.example", True),
        (["other/a.example"], "other", "b.example", False),
        (["*/*.example"], "other", "b.example", True),
        (["~/*"], "mine", "a.example", False),
        (["*/*", "~other/*"], "other", "a.example", False),
        (["*/*", "~other/*"], "mine", "a.example", True),
    ],
)
def test_egress_hosts_import_by_namespace_and_name(hosts: list[str], owner: str, host: str, does: bool) -> None:
    assert Imports(hosts, "mine").cover(owner, host) is does
