"""What a Gateway's annotation `proxy.istio.io/config` says of the proxies in front of it.

Istio has it on the gateway's pods or in meshConfig.defaultConfig; here the Gateway stands for them.
Source: Istio ProxyConfig gatewayTopology (istio/api mesh/v1alpha1/proxy.proto).
"""

from typing import Any

from meshproxy.resources.document import Resource, documents, path_text
from meshproxy.resources.schema import IGNORED, did_you_mean, shown
from meshproxy.snapshot.findings import Findings

ANNOTATION = "proxy.istio.io/config"
_FIELD = path_text((((None, "metadata"), "annotations"), ANNOTATION))
_OTHERS = ("numTrustedProxies", "forwardClientCertDetails")


def expects_proxy_header(gateway: Resource, findings: Findings) -> bool:
    """gatewayTopology.proxyProtocol: {} stands there. Whatever else does is warned of: it does nothing."""
    text = gateway.annotations.get(ANNOTATION)
    if text is None:
        return False

    def warn(at: str, message: str) -> None:
        findings.warn(gateway, _FIELD, f"{at}: {message}" if at else message, IGNORED)

    config: Any = {}
    for document in documents(text):
        if document.refusal is not None:
            warn("", f"line {document.refusal.line} of it: {document.refusal.message}")
            return False
        config = document.root
    if not isinstance(config, dict):
        warn("", f"{shown(config)} where a mapping is needed")
        return False
    for name in config:
        if name != "gatewayTopology":
            hint = did_you_mean(str(name), ("gatewayTopology",))
            warn(str(name), hint.removeprefix("; ") or "only gatewayTopology.proxyProtocol is served")
    topology = config.get("gatewayTopology", {})
    if not isinstance(topology, dict):
        warn("gatewayTopology", f"{shown(topology)} where a mapping is needed")
        return False
    for name in topology:
        if name in _OTHERS:
            warn(f"gatewayTopology.{name}", "not supported by this version")
        elif name != "proxyProtocol":
            warn(f"gatewayTopology.{name}", "unknown field" + did_you_mean(str(name), ("proxyProtocol", *_OTHERS)))
    if "proxyProtocol" not in topology:
        return False
    wanted = topology["proxyProtocol"]
    if not isinstance(wanted, dict):
        warn(
            "gatewayTopology.proxyProtocol", f"{shown(wanted)} where a mapping is needed; write {{}} to expect headers"
        )
        return False
    for name in wanted:
        warn(f"gatewayTopology.proxyProtocol.{name}", "unknown field")
    return True
