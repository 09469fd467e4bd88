import json

import pytest

from tests.support.translation import Translated, translated


def gateway(annotation: str | None, name: str = "edge", port: int = 8443) -> str:
    annotations = (
        f", annotations: {{proxy.istio.io/config: {json.dumps(annotation)}}}" if annotation is not None else ""
    )
    return f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: {name}{annotations}}}
spec:
  selector: {{istio: edge}}
  servers: [{{port: {{number: {port}, protocol: TCP, name: p}}, hosts: ['*']}}]
"""


def at_edge(*texts: str) -> Translated:
    return translated(*texts, labels={"istio": "edge"})


@pytest.mark.parametrize(
    "annotation", ["{gatewayTopology: {proxyProtocol: {}}}", "gatewayTopology:\n  proxyProtocol: {}\n"]
)
def test_a_gateway_may_expect_proxy_headers(annotation: str) -> None:
    result = at_edge(gateway(annotation))
    assert result.snapshot.listeners["0.0.0.0_8443"].expects_proxy_header
    assert not result.warnings


@pytest.mark.parametrize("annotation", [None, "", "{}", "{gatewayTopology: {}}"])
def test_otherwise_it_does_not(annotation: str | None) -> None:
    result = at_edge(gateway(annotation))
    assert not result.snapshot.listeners["0.0.0.0_8443"].expects_proxy_header
    assert not result.warnings


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("{gatewayTopology: {proxyProtocol: }}", "gatewayTopology.proxyProtocol: nothing where a mapping is needed"),
        ("{gatewayTopology: {proxyProtocol: true}}", "true where a mapping is needed; write {} to expect headers"),
        ("{gatewayTopology: {proxyprotocol: {}}}", "unknown field; did you mean proxyProtocol?"),
        ("{gatewayTopology: [proxyProtocol]}", "gatewayTopology: a list where a mapping is needed"),
        ("{gatewayTopolgy: {proxyProtocol: {}}}", "gatewayTopolgy: did you mean gatewayTopology?"),
        ("{gatewayTopology: {numTrustedProxies: 1}}", "numTrustedProxies: not supported by this version"),
        ("{concurrency: 2}", "concurrency: only gatewayTopology.proxyProtocol is served"),
        ("[1]", "a list where a mapping is needed"),
        ("gatewayTopology: {", "line 1 of it: "),
    ],
)
def test_what_is_wrong_in_the_annotation_is_said_and_does_nothing(annotation: str, words: str) -> None:
    result = at_edge(gateway(annotation))
    assert not result.snapshot.listeners["0.0.0.0_8443"].expects_proxy_header
    (warning,) = result.warnings
    assert words in warning
    assert warning.startswith("1.yaml:4: Gateway default/edge: metadata.annotations")


def test_servers_of_one_address_must_agree() -> None:
    result = at_edge(gateway("{gatewayTopology: {proxyProtocol: {}}}"), gateway(None, "other"))
    assert result.snapshot.listeners["0.0.0.0_8443"].expects_proxy_header
    (error,) = result.errors
    assert "0.0.0.0:8443 has a server that expects PROXY headers already (from 1.yaml:2)" in error
