"""As test_against_envoy, with the requests in HTTP/2; the origins speak HTTP/1.1 as there."""

import asyncio
from collections.abc import Mapping

import pytest
import uvloop

from tests.differential.documented import DOCUMENTED, OVER_HTTP2, Difference
from tests.differential.observe import Facts, as_http2, observe_http2
from tests.differential.test_against_envoy import CASES, DIFFERENCES, differing

NAMES = [case.name for case in CASES if as_http2(case) is not None]

pytestmark = pytest.mark.peer("envoy")


@pytest.fixture(scope="module")
def observed() -> Mapping[str, Mapping[str, Facts]]:
    """case → envoy and meshproxy → facts."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(observe_http2(CASES))


@pytest.mark.parametrize("name", NAMES)
def test_same_as_envoy(name: str, observed: Mapping[str, Mapping[str, Facts]]) -> None:
    unexplained = {
        fact: values
        for fact, values in differing(observed[name]).items()
        if not any(difference.covers(name, fact) for difference in (*DOCUMENTED, *OVER_HTTP2))
    }
    assert not unexplained


@pytest.mark.parametrize("difference", OVER_HTTP2, ids=lambda difference: difference.what)
def test_documented_difference_is_still_there(
    difference: Difference, observed: Mapping[str, Mapping[str, Facts]]
) -> None:
    assert any(difference.covers(name, fact) for name in NAMES for fact in differing(observed[name]))


@pytest.mark.parametrize("difference", OVER_HTTP2, ids=lambda difference: difference.what)
def test_documented_difference_is_in_the_documentation(difference: Difference) -> None:
    assert f"| {difference.what} | {difference.why} |" in DIFFERENCES.read_text()
