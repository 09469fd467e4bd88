"""A security policy that cannot be enforced stops the proxy from serving; it is never left out silently."""

from pathlib import Path

import pytest

from tests.support.proxy_process import ProxyProcess

AUTHORIZATION = """apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: nobody
spec: {}
"""
MISSPELT = """apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
spec:
  mtls:
    mode: STRICTT
"""
HARMLESS = """apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: a
spec:
  hosts: [a.example]
  resolution: STATIC
  ports:
  - {number: 80, name: http, protocol: HTTP}
"""


@pytest.mark.parametrize("policy", [AUTHORIZATION, MISSPELT], ids=["not supported", "wrong value"])
def test_it_does_not_start_without_a_policy_it_was_given(tmp_path: Path, policy: str) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "policy.yaml").write_text(policy)
    with ProxyProcess(tmp_path, module="meshproxy") as proxy:
        assert proxy.wait_for_end() == 1
        assert "refusing to serve without this policy" in "".join(proxy.lines)


def test_a_policy_that_arrives_broken_leaves_the_previous_configuration_in_effect(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.yaml").write_text(HARMLESS)
    with ProxyProcess(tmp_path, module="meshproxy") as proxy:
        proxy.wait_for("ready: 1 workers")
        snapshots = len([line for line in proxy.lines if 'message="snapshot ' in line])
        (tmp_path / "conf" / "policy.yaml").write_text(AUTHORIZATION + "---\n" + HARMLESS.replace("name: a", "name: b"))
        proxy.wait_for("the previous configuration stays in effect")
        assert len([line for line in proxy.lines if 'message="snapshot ' in line]) == snapshots
