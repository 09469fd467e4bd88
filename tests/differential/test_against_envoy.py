"""Envoy and meshproxy with the same routes do the same with the same bytes, but for what is documented."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
import uvloop

from tests.differential import cases, messages
from tests.differential.documented import DOCUMENTED, Difference
from tests.differential.observe import Facts, observe

CASES = (*cases.CASES, *messages.CASES)
NAMES = [case.name for case in CASES]
DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"

pytestmark = pytest.mark.peer("envoy")


@pytest.fixture(scope="module")
def observed() -> Mapping[str, Mapping[str, Facts]]:
    """case → envoy and meshproxy → facts."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(observe(CASES))


def differing(both: Mapping[str, Facts]) -> dict[str, tuple[str | None, str | None]]:
    """fact → (Envoy's, meshproxy's)."""
    envoy, ours = both["envoy"], both["meshproxy"]
    return {
        fact: (envoy.get(fact), ours.get(fact)) for fact in sorted({*envoy, *ours}) if envoy.get(fact) != ours.get(fact)
    }


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_same_as_envoy(name: str, observed: Mapping[str, Mapping[str, Facts]]) -> None:
    unexplained = {
        fact: values
        for fact, values in differing(observed[name]).items()
        if not any(difference.covers(name, fact) for difference in DOCUMENTED)
    }
    assert not unexplained


@pytest.mark.parametrize("difference", DOCUMENTED, ids=lambda difference: difference.what)
def test_documented_difference_is_still_there(
    difference: Difference, observed: Mapping[str, Mapping[str, Facts]]
) -> None:
    assert any(difference.covers(name, fact) for name in NAMES for fact in differing(observed[name]))


@pytest.mark.parametrize("difference", DOCUMENTED, ids=lambda difference: difference.what)
def test_documented_difference_is_in_the_documentation(difference: Difference) -> None:
    assert f"| {difference.what} | {difference.why} |" in DIFFERENCES.read_text()
