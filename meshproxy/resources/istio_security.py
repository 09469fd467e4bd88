"""security.istio.io: PeerAuthentication whole; policies that this version does not serve are refused, never ignored.

Everything here is strict: in a policy, a field that is not understood may be the one that protects.
Source: istio/api security/v1beta1/peer_authentication.proto; istio pkg/config/validation ValidatePeerAuthentication.
"""

from typing import Any, Final

from meshproxy.resources import names
from meshproxy.resources.document import Path
from meshproxy.resources.schema import Choice, Reading, Struct, Table, Text

_MUTUAL_TLS: Final = Struct({"mode": Choice("UNSET", "DISABLE", "PERMISSIVE", "STRICT")}, is_strict=True)
_SELECTOR: Final = Struct(
    {"matchLabels": Table(Text(names.selector_value, keeps_empty=True), key=names.as_table_key(names.label_key))},
    is_strict=True,
)


def _check_ports(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if value.get("portLevelMtls") and not value.get("selector", {}).get("matchLabels"):
        reading.error((at, "portLevelMtls"), "ports belong to a workload: portLevelMtls needs selector.matchLabels")


PEER_AUTHENTICATION: Final = Struct(
    {
        "selector": _SELECTOR,
        "mtls": _MUTUAL_TLS,
        "portLevelMtls": Table(_MUTUAL_TLS, key=names.as_table_key(names.port_key), at_least=1),
    },
    rules=(_check_ports,),
    is_strict=True,
)

KINDS: Final[dict[str, Struct]] = {"PeerAuthentication": PEER_AUTHENTICATION}

NOT_ENFORCED: Final = "not supported yet; refusing to load it, because ignoring a policy would let traffic through"
REFUSED_KINDS: Final[dict[str, str]] = {
    "AuthorizationPolicy": NOT_ENFORCED,
    "RequestAuthentication": NOT_ENFORCED,
}
REFUSED_GROUPS: Final[dict[str, str]] = {
    # Istio before 1.6; their successors are PeerAuthentication, RequestAuthentication and AuthorizationPolicy.
    "authentication.istio.io": "the API was removed in Istio 1.6; write a PeerAuthentication (security.istio.io/v1)",
    "rbac.istio.io": "the API was removed in Istio 1.6; its successor AuthorizationPolicy is not supported yet",
}
