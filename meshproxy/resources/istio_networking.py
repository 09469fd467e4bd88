"""networking.istio.io: DestinationRule, VirtualService, ServiceEntry, WorkloadEntry, WorkloadGroup, Sidecar, Gateway.

Field tables of the v1 API (v1beta1 and v1alpha3 have the same fields), former spellings, and the checks that Istio's
own validation makes beyond types. Source: istio/api networking/v1alpha3/*.proto; istio pkg/config/validation.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final

from meshproxy.resources import names
from meshproxy.resources.document import Path, Value, path_text
from meshproxy.resources.regex import check_regex
from meshproxy.resources.schema import (
    ABSENT,
    IGNORED,
    Boolean,
    Choice,
    Duration,
    Field,
    Integer,
    Items,
    Never,
    NotYet,
    Number,
    Reading,
    Struct,
    Table,
    Text,
    needs_one_of,
    shown,
)

PORT: Final = Integer(1, 65535)
_COUNT: Final = Integer(0, 2**31 - 1)
_PERCENT: Final = Integer(0, 100)
_DURATION: Final = Duration()
_TEXTS: Final = Items(Text())
LABELS: Final = Table(Text(names.label_value, keeps_empty=True), key=names.label_key)
_SELECTOR_LABELS: Final = Table(Text(names.selector_value, keeps_empty=True), key=names.label_key)
_EXPORT_TO: Final = Items(Text(names.export_target))
_HOST: Final = Text(names.host)


class _Protocol(Field):
    """Protocol of a port, in capitals; Istio reads any case."""

    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        text = Text(names.protocol).read(value, at, reading)
        return text.upper() if text is not ABSENT else ABSENT


PROTOCOL: Final = _Protocol()


class _Network(Text):
    """Multi-network meshes are not served: an endpoint of another network would need its gateway."""

    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        text = super().read(value, at, reading)
        if text is not ABSENT:
            reading.warn(
                at, "networks are not supported by this version", "the address is used as if it were reachable"
            )
        return ABSENT


class _Locality(Text):
    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        text = super().read(value, at, reading)
        if text is not ABSENT and (text.count("/") > 2 or any(not part for part in text.split("/")) or "*" in text):
            reading.error(at, f"{shown(text)} is not region, region/zone or region/zone/subzone")
            return ABSENT
        return text


# ── DestinationRule ──────────────────────────────────────────────────────────────────────────────────────────────────


def _check_localities(localities: Iterable[tuple[str, Path]], reading: Reading) -> None:
    """Wildcard only as the end, no empty part, and no two that can match one place: the order must not matter."""
    seen: list[tuple[list[str], str]] = []
    for text, at in localities:
        parts = text.split("/", 2)
        if "*" in text and (text.count("*") > 1 or not text.endswith("*")):
            reading.error(at, f"locality {shown(text)} may have one * and only at its end")
            continue
        if any(not part for part in parts):
            reading.error(at, f"locality {shown(text)} has an empty part")
            continue
        for other, written in seen:
            # A missing part matches everything, as * does.
            if all(a == b or "*" in (a, b) for a, b in zip(parts, other, strict=False)):
                reading.error(at, f"locality {shown(text)} overlaps {shown(written)}")
                break
        seen.append((parts, text))


def _check_locality_setting(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if value.get("distribute") and value.get("failover"):
        reading.error((at, "failover"), "distribute and failover exclude each other")
    topology = {"topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"}
    if value.get("failover"):
        for index, label in enumerate(value.get("failoverPriority", ())):
            if label in topology:
                reading.error(
                    ((at, "failoverPriority"), index), f"failover and {label} in failoverPriority exclude each other"
                )
    for index, rule in enumerate(value.get("distribute", ())):
        here = ((at, "distribute"), index)
        to = rule.get("to", {})
        _check_localities(((text, ((here, "to"), text)) for text in to), reading)
        total = sum(to.values())
        if total != 100:
            reading.error((here, "to"), f"the weights add up to {total} and must to 100")
    _check_localities(
        (
            (rule["from"], (((at, "distribute"), index), "from"))
            for index, rule in enumerate(value.get("distribute", ()))
            if "from" in rule
        ),
        reading,
    )


def _check_failover(value: dict[str, Any], at: Path, reading: Reading) -> None:
    for side in ("from", "to"):
        region = value.get(side, "")
        if "/" in region or "*" in region:
            reading.error((at, side), f"{shown(region)} is not a region; failover takes no zones and no *")
    if value.get("from") == value.get("to"):
        reading.error(at, "failover from a region to itself")


_FAILOVER: Final = Items(Struct({"from": Text(), "to": Text()}, required=("from", "to"), rules=(_check_failover,)))
LOCALITY_LB: Final = Struct(
    {
        "enabled": Boolean(),
        "distribute": Items(
            Struct({"from": Text(), "to": Table(Integer(1, 100), at_least=1)}, required=("from", "to"))
        ),
        "failover": _FAILOVER,
        "failoverPriority": _TEXTS,
    },
    rules=(_check_locality_setting,),
)


def _read_consecutive_errors(value: dict[str, Any], at: Path, reading: Reading) -> None:
    """consecutiveErrors counted 502, 503, 504 and failed connections. Istio no longer translates it; this does."""
    count = value.pop("consecutiveErrors", 0)
    if not count:
        return
    here = (at, "consecutiveErrors")
    today = (
        "consecutiveErrors is deprecated: today it is consecutiveGatewayErrors (502, 503, 504) or consecutive5xxErrors"
    )
    if "consecutive5xxErrors" in value or "consecutiveGatewayErrors" in value:
        reading.warn(here, f"{today}, which is given too")
        return
    reading.warn(here, today, f"read as consecutiveGatewayErrors: {count}, counting failed connections as well")
    value["consecutiveGatewayErrors"] = count
    value["_countsConnectionFailures"] = True
    reading.moved[path_text((at, "consecutiveGatewayErrors"))] = path_text(here)


def _check_local_origin(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if value.get("consecutiveLocalOriginFailures") and not value.get("splitExternalLocalOriginErrors"):
        reading.error((at, "consecutiveLocalOriginFailures"), "it needs splitExternalLocalOriginErrors: true")


_MISPLACED: Final = ("localityLbSetting", "localityLbSettings")
OUTLIER_DETECTION: Final = Struct(
    {
        "splitExternalLocalOriginErrors": Boolean(),
        "consecutiveErrors": _COUNT,
        "consecutiveLocalOriginFailures": Integer(),
        "consecutiveGatewayErrors": Integer(),
        "consecutive5xxErrors": Integer(),
        "interval": _DURATION,
        "baseEjectionTime": _DURATION,
        "maxEjectionPercent": _PERCENT,
        "minHealthPercent": _PERCENT,
        "outlierDetectionHttpErrorCodes": Items(Integer(100, 599)),
        **dict.fromkeys(_MISPLACED, LOCALITY_LB),
    },
    rules=(_read_consecutive_errors, _check_local_origin),
)


_CONSISTENT_HASH: Final = Struct(
    {
        "httpHeaderName": Text(names.header_name),
        "httpCookie": Struct(
            {
                "name": Text(),
                "path": Text(),
                "ttl": Duration(allows_zero=True),
                "attributes": Items(Struct({"name": Text(), "value": Text()}, required=("name",))),
            },
            required=("name",),
        ),
        "useSourceIp": Boolean(),
        "httpQueryParameterName": Text(),
        "ringHash": Struct({"minimumRingSize": Integer()}),
        "maglev": Struct({"tableSize": Integer(1, 5_000_010)}),
        "minimumRingSize": Integer(),
    },
    one_of=(("httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName"), ("ringHash", "maglev")),
)


def _read_warmup_seconds(value: dict[str, Any], at: Path, reading: Reading) -> None:
    seconds = value.pop("warmupDurationSecs", None)
    if seconds is None:
        return
    here = (at, "warmupDurationSecs")
    if "warmup" in value:
        reading.warn(here, "warmupDurationSecs is the old name of warmup.duration, which is given too")
        return
    reading.warn(here, "warmupDurationSecs is the old name of warmup.duration", "read as warmup.duration")
    value["warmup"] = {"duration": seconds}
    reading.moved[path_text((at, "warmup"))] = path_text(here)


LOAD_BALANCER: Final = Struct(
    {
        "simple": Choice(
            "RANDOM",
            "PASSTHROUGH",
            "ROUND_ROBIN",
            "LEAST_REQUEST",
            default="UNSPECIFIED",
            old={"LEAST_CONN": "LEAST_REQUEST"},
        ),
        "consistentHash": NotYet(_CONSISTENT_HASH, "requests are balanced by LEAST_REQUEST"),
        "localityLbSetting": LOCALITY_LB,
        "zoneAwareLbSetting": NotYet(
            Struct(
                {
                    "enabled": Boolean(),
                    "failover": _FAILOVER,
                    "failoverPriority": _TEXTS,
                    "minClusterSize": Integer(1),
                }
            )
        ),
        "warmup": Struct(
            {
                "duration": _DURATION,
                "minimumPercent": Number(0, 100),
                "aggression": Number(0, float("inf"), over=True),
            },
            required=("duration",),
        ),
        "warmupDurationSecs": _DURATION,
    },
    one_of=(("simple", "consistentHash"), ("localityLbSetting", "zoneAwareLbSetting")),
    old={"localityLbSettings": "localityLbSetting"},
    rules=(_read_warmup_seconds,),
)


def _check_client_protocol(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if value.get("useClientProtocol") and value.get("h2UpgradePolicy") == "UPGRADE":
        reading.error((at, "useClientProtocol"), "useClientProtocol and h2UpgradePolicy UPGRADE exclude each other")


CONNECTION_POOL: Final = Struct(
    {
        "tcp": Struct(
            {
                "maxConnections": _COUNT,
                "connectTimeout": _DURATION,
                "tcpKeepalive": Struct({"probes": Integer(), "time": _DURATION, "interval": _DURATION}),
                "maxConnectionDuration": _DURATION,
                "idleTimeout": Duration(allows_zero=True),
            }
        ),
        "http": Struct(
            {
                "http1MaxPendingRequests": _COUNT,
                "http2MaxRequests": _COUNT,
                "maxRequestsPerConnection": _COUNT,
                "maxRetries": _COUNT,
                "idleTimeout": Duration(allows_zero=True),
                "h2UpgradePolicy": Choice("DO_NOT_UPGRADE", "UPGRADE", default="DEFAULT"),
                "useClientProtocol": Boolean(),
                "maxConcurrentStreams": _COUNT,
                "http2KeepAlive": NotYet(
                    Struct({"interval": _DURATION, "timeout": _DURATION}, required=("interval", "timeout"))
                ),
            },
            rules=(_check_client_protocol,),
        ),
    },
)


def _check_client_tls(value: dict[str, Any], at: Path, reading: Reading) -> None:
    mode = value.get("mode", "DISABLE")
    certificates = [name for name in ("clientCertificate", "privateKey", "caCertificates") if name in value]
    if mode == "ISTIO_MUTUAL" and certificates:
        reading.error((at, certificates[0]), "ISTIO_MUTUAL uses the workload's own certificate; leave this field out")
    if mode == "MUTUAL":
        for name in ("clientCertificate", "privateKey"):
            if name not in value:
                reading.error(at, f"mode MUTUAL needs {name}")
    if value.get("insecureSkipVerify") and mode in ("SIMPLE", "MUTUAL"):
        for name in ("caCertificates", "subjectAltNames"):
            if name in value:
                reading.error((at, name), "it says what to verify, and insecureSkipVerify says not to")


CLIENT_TLS: Final = Struct(
    {
        "mode": Choice("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"),
        "clientCertificate": Text(),
        "privateKey": Text(),
        "caCertificates": Text(),
        "credentialName": Never("leave out the certificates to present and to trust; name files instead"),
        "subjectAltNames": _TEXTS,
        "sni": Text(),
        "insecureSkipVerify": Boolean(),
        "caCrl": Never("accept revoked certificates"),
    },
    rules=(_check_client_tls,),
    is_strict=True,
)


def _move_locality_setting(value: dict[str, Any], at: Path, reading: Reading) -> None:
    """localityLbSetting written beside loadBalancer or inside outlierDetection → loadBalancer.localityLbSetting."""
    for place, here in ((value.get("outlierDetection", {}), (at, "outlierDetection")), (value, at)):
        for name in _MISPLACED:
            setting = place.pop(name, None)
            if setting is None:
                continue
            today = f"{name} is not a field here: today it is loadBalancer.localityLbSetting"
            load_balancer = value.setdefault("loadBalancer", {})
            if "localityLbSetting" in load_balancer:
                reading.warn((here, name), f"{today}, which is given too")
                continue
            reading.warn((here, name), today, "read as loadBalancer.localityLbSetting")
            load_balancer["localityLbSetting"] = setting
            reading.moved[path_text(((at, "loadBalancer"), "localityLbSetting"))] = path_text((here, name))


def _check_failover_has_detection(value: dict[str, Any], at: Path, reading: Reading) -> None:
    setting = value.get("loadBalancer", {}).get("localityLbSetting", {})
    for name in ("failover", "failoverPriority"):
        if setting.get(name) and "outlierDetection" not in value:
            here = (((at, "loadBalancer"), "localityLbSetting"), name)
            reading.warn(
                here, "failover needs outlierDetection to notice that endpoints fail", "the setting has no effect"
            )


_POLICY_FIELDS: Final[dict[str, Field]] = {
    "loadBalancer": LOAD_BALANCER,
    "connectionPool": CONNECTION_POOL,
    "outlierDetection": OUTLIER_DETECTION,
    "tls": CLIENT_TLS,
    **dict.fromkeys(_MISPLACED, LOCALITY_LB),
}
_POLICY_RULES: Final = (_move_locality_setting, _check_failover_has_detection)


def _check_port_policies(value: dict[str, Any], at: Path, reading: Reading) -> None:
    seen: set[int] = set()
    for index, policy in enumerate(value.get("portLevelSettings", ())):
        number = policy.get("port", {}).get("number")
        if number in seen:
            reading.error((((at, "portLevelSettings"), index), "port"), f"port {number} has settings already")
        seen.add(number)


TRAFFIC_POLICY: Final = Struct(
    {
        **_POLICY_FIELDS,
        "portLevelSettings": Items(
            Struct(
                {**_POLICY_FIELDS, "port": Struct({"number": PORT}, required=("number",))},
                required=("port",),
                rules=_POLICY_RULES,
            ),
            at_most=4096,
        ),
        "tunnel": NotYet(
            Struct(
                {
                    "protocol": Choice("CONNECT", "POST"),
                    "targetHost": Text(names.exact_host_or_ip),
                    "targetPort": PORT,
                },
                required=("targetHost", "targetPort"),
            )
        ),
        "proxyProtocol": Struct({"version": Choice("V1", "V2")}),
        "retryBudget": Struct(
            {"percent": Number(0, 100), "minRetryConcurrency": Integer(), "budgetInterval": NotYet(_DURATION)}
        ),
    },
    one_of=(("tunnel", "proxyProtocol"),),
    rules=(*_POLICY_RULES, _check_port_policies),
)


def _check_unique(list_name: str, field: str, what: str, *, is_error: bool = True) -> Any:
    """Rule: no two entries of a list have the same value in a field."""

    def rule(value: dict[str, Any], at: Path, reading: Reading) -> None:
        seen: set[Any] = set()
        for index, entry in enumerate(value.get(list_name, ())):
            name = entry.get(field)
            if name is not None and name in seen:
                here = (((at, list_name), index), field)
                if is_error:
                    reading.error(here, f"{what} {shown(name)} is given twice")
                else:
                    reading.warn(here, f"{what} {shown(name)} is given twice", "the first counts")
            seen.add(name)

    return rule


DESTINATION_RULE: Final = Struct(
    {
        "host": _HOST,
        "trafficPolicy": TRAFFIC_POLICY,
        "subsets": Items(
            Struct(
                {"name": Text(names.dns_label), "labels": LABELS, "trafficPolicy": TRAFFIC_POLICY},
                required=("name",),
            )
        ),
        "exportTo": _EXPORT_TO,
        "workloadSelector": Struct({"matchLabels": _SELECTOR_LABELS}),
    },
    required=("host",),
    rules=(_check_unique("subsets", "name", "subset"),),
)

# ── VirtualService ───────────────────────────────────────────────────────────────────────────────────────────────────


class _Regex(Text):
    """`*` alone is Istio's word for `present` and no regex."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(lambda text: None if text == "*" else check_regex(text))

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if value == "":
            reading.error(at, "the regex is empty")
            return ABSENT
        return super().read(value, at, reading)


def _needs_prefix(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if value.get("prefix") == "":
        reading.error((at, "prefix"), "the prefix is empty")


_STRING_MATCH_FIELDS: Final[dict[str, Field]] = {
    "exact": Text(keeps_empty=True),
    "prefix": Text(keeps_empty=True),
    "regex": _Regex(),
}
_ONE_MATCH: Final = (("exact", "prefix", "regex"),)
_URI_MATCH: Final = Struct(_STRING_MATCH_FIELDS, one_of=_ONE_MATCH, is_strict=True)
_STRING_MATCH: Final = Struct(_STRING_MATCH_FIELDS, one_of=_ONE_MATCH, rules=(_needs_prefix,), is_strict=True)
_GATEWAYS: Final = Items(Text(names.gateway_name))
_HEADER_MATCHES: Final = Table(_STRING_MATCH, key=names.as_table_key(names.matched_header))

_HTTP_MATCH: Final = Struct(
    {
        "name": Text(),
        "uri": _URI_MATCH,
        "scheme": _STRING_MATCH,
        "method": _STRING_MATCH,
        "authority": _STRING_MATCH,
        "headers": _HEADER_MATCHES,
        "port": PORT,
        "sourceLabels": LABELS,
        "gateways": _GATEWAYS,
        "queryParams": Table(_STRING_MATCH),
        "ignoreUriCase": Boolean(),
        "withoutHeaders": _HEADER_MATCHES,
        "sourceNamespace": Text(names.dns_label),
        "statPrefix": NotYet(Text()),
    },
    # An unknown condition would be dropped and the route would take more traffic than was meant.
    is_strict=True,
)

_DESTINATION: Final = Struct(
    {
        "host": Text(names.host_not_all),
        "subset": Text(names.dns_label),
        "port": Struct({"number": PORT}, required=("number",)),
    },
    required=("host",),
)
_HEADER_VALUE: Final = Text(names.header_value, keeps_empty=True)
_HEADERS: Final = Struct(
    {
        "request": Struct(
            {
                "set": Table(_HEADER_VALUE, key=names.as_table_key(names.request_header)),
                "add": Table(_HEADER_VALUE, key=names.as_table_key(names.request_header)),
                "remove": Items(Text(names.changed_header)),
            }
        ),
        "response": Struct(
            {
                "set": Table(_HEADER_VALUE, key=names.as_table_key(names.changed_header)),
                "add": Table(_HEADER_VALUE, key=names.as_table_key(names.changed_header)),
                "remove": Items(Text(names.changed_header)),
            }
        ),
    }
)


def _check_weights(value: dict[str, Any], at: Path, reading: Reading) -> None:
    routes = value.get("route", ())
    if len(routes) > 1 and not any(route.get("weight", 0) for route in routes):
        reading.error((at, "route"), "all weights are 0 or missing, so no destination gets traffic")


_RETRY_ON: Final = frozenset(
    {
        "5xx",
        "gateway-error",
        "reset",
        "reset-before-request",
        "connect-failure",
        "envoy-ratelimited",
        "retriable-4xx",
        "refused-stream",
        "retriable-status-codes",
        "retriable-headers",
        "http3-post-connect-failure",
        "cancelled",
        "deadline-exceeded",
        "internal",
        "resource-exhausted",
        "unavailable",
    }
)
_STATUS_CODES: Final = frozenset(str(int(status)) for status in HTTPStatus)


def _retry_on(text: str) -> str | None:
    for word in text.split(","):
        if word.strip() not in _RETRY_ON and word.strip() not in _STATUS_CODES:
            return (
                f"{shown(word.strip())} is no condition to retry on ({', '.join(sorted(_RETRY_ON))}, or a status code)"
            )
    return None


def _check_retries(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if not value.get("attempts"):
        for name in ("perTryTimeout", "retryOn"):
            if name in value:
                reading.error((at, name), "retries are off: attempts is 0 or missing")


_HTTP_RETRIES: Final = Struct(
    {
        "attempts": _COUNT,
        "perTryTimeout": _DURATION,
        "retryOn": Text(_retry_on),
        "retryRemoteLocalities": NotYet(Boolean()),
        "retryIgnorePreviousHosts": Boolean(),
        "backoff": _DURATION,
    },
    rules=(_check_retries,),
)


def _check_regex_rewrite(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if "match" not in value or "rewrite" not in value:
        return
    groups = re.compile(value["match"]).groups
    for number in re.findall(r"\\(\d+)", value["rewrite"].replace("\\\\", "")):
        if int(number) > groups:
            reading.error((at, "rewrite"), rf"\{number} names a group, and the match has {groups}")


_REWRITE: Final = Struct(
    {
        "uri": Text(),
        "authority": Text(names.header_value),
        "uriRegexRewrite": Struct(
            {"match": Text(check_regex), "rewrite": Text()},
            required=("match", "rewrite"),
            rules=(_check_regex_rewrite,),
        ),
    },
    one_of=(("uri", "uriRegexRewrite"),),
    rules=(needs_one_of("uri", "uriRegexRewrite", "authority"),),
)


class _RedirectCode(Field):
    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        code = Integer().read(value, at, reading)
        if code is ABSENT or code == 0:
            return ABSENT
        if code not in (301, 302, 303, 307, 308):
            reading.error(at, f"{code} is none of 301, 302, 303, 307, 308")
            return ABSENT
        return code


_REDIRECT: Final = Struct(
    {
        "uri": Text(),
        "prefixRewrite": Text(),
        "authority": Text(names.header_value),
        "port": PORT,
        "derivePort": Choice("FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"),
        "scheme": Choice("http", "https"),
        "redirectCode": _RedirectCode(),
    },
    one_of=(("uri", "prefixRewrite"), ("port", "derivePort")),
    rules=(needs_one_of("uri", "prefixRewrite", "authority", "port", "derivePort", "scheme"),),
)
_MAX_BODY_BYTES: Final = 1024 * 1024


def _base64(text: str) -> str | None:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return "not base64"
    return None


def _check_body(value: dict[str, Any], at: Path, reading: Reading) -> None:
    size = len(value.get("string", "").encode()) or len(value.get("bytes", "")) * 3 // 4
    if size > _MAX_BODY_BYTES:
        reading.error(at, f"the body has {size} bytes and may have {_MAX_BODY_BYTES}")


_DIRECT_RESPONSE: Final = Struct(
    {
        "status": Integer(200, 599),
        "body": Struct({"string": Text(), "bytes": Text(_base64)}, one_of=(("string", "bytes"),), rules=(_check_body,)),
    },
    required=("status",),
)
_MIRROR_PERCENT: Final = Struct({"value": Number(0, 100)})
_HTTP_STATUS: Final = Integer(200, 599)
_FAULT: Final = Struct(
    {
        "delay": Struct(
            {
                "percent": _PERCENT,
                "percentage": _MIRROR_PERCENT,
                "fixedDelay": _DURATION,
                "exponentialDelay": _DURATION,
            },
            one_of=(("fixedDelay", "exponentialDelay"),),
        ),
        "abort": Struct(
            {
                "percentage": _MIRROR_PERCENT,
                "httpStatus": _HTTP_STATUS,
                "grpcStatus": Text(),
                "http2Error": Text(),
            },
            one_of=(("httpStatus", "grpcStatus", "http2Error"),),
        ),
    }
)
_CORS: Final = Struct(
    {
        "allowOrigin": _TEXTS,
        "allowOrigins": Items(_STRING_MATCH),
        "allowMethods": _TEXTS,
        "allowHeaders": _TEXTS,
        "exposeHeaders": _TEXTS,
        "maxAge": Duration(allows_zero=True),
        "allowCredentials": Boolean(),
        "unmatchedPreflights": Choice("FORWARD", "IGNORE", default="UNSPECIFIED"),
    }
)

# v1alpha3 of Istio 0.8 to 1.0 wrote header operations beside the route: where they stand today.
_OLD_HEADERS: Final = {
    "appendHeaders": ("request", "add"),
    "appendRequestHeaders": ("request", "add"),
    "removeRequestHeaders": ("request", "remove"),
    "appendResponseHeaders": ("response", "add"),
    "removeResponseHeaders": ("response", "remove"),
}


def _move_old_headers(value: dict[str, Any], at: Path, reading: Reading) -> None:
    for name, (side, operation) in _OLD_HEADERS.items():
        old = value.pop(name, None)
        if old is None:
            continue
        today = f"headers.{side}.{operation}"
        operations = value.setdefault("headers", {}).setdefault(side, {})
        if operation in operations:
            reading.warn((at, name), f"{name} is the old name of {today}, which is given too")
            continue
        reading.warn((at, name), f"{name} is the old name of {today}", f"read as {today}")
        operations[operation] = old
        reading.moved[path_text((((at, "headers"), side), operation))] = path_text((at, name))


_REQUEST_VALUES: Final = Table(_HEADER_VALUE, key=names.as_table_key(names.request_header))
_RESPONSE_VALUES: Final = Table(_HEADER_VALUE, key=names.as_table_key(names.changed_header))
_HEADER_NAMES: Final = Items(Text(names.changed_header))
_OLD_HEADER_FIELDS: Final[dict[str, Field]] = {
    "appendHeaders": _REQUEST_VALUES,
    "appendRequestHeaders": _REQUEST_VALUES,
    "removeRequestHeaders": _HEADER_NAMES,
    "appendResponseHeaders": _RESPONSE_VALUES,
    "removeResponseHeaders": _HEADER_NAMES,
}


def _check_http_action(value: dict[str, Any], at: Path, reading: Reading) -> None:
    """Exactly one of route, redirect and directResponse; and what cannot go with it."""
    if "delegate" in value:
        # Istio too leaves out a route whose delegate it does not find.
        reading.warn((at, "delegate"), "delegates are not supported by this version", "this http route is left out")
        value.clear()
        value["_isLeftOut"] = True
        return
    actions = [name for name in ("route", "redirect", "directResponse") if value.get(name)]
    if not actions:
        reading.error(at, "route, redirect or directResponse is needed")
    if len(actions) > 1:
        reading.error((at, actions[1]), f"only one of {' and '.join(actions)} may be given")
    if actions and actions[0] != "route" and "rewrite" in value:
        reading.error((at, "rewrite"), f"rewrite and {actions[0]} exclude each other")
    if value.get("redirect", {}).get("prefixRewrite"):
        for index, match in enumerate(value.get("match", ())):
            if "uri" in match and "prefix" not in match["uri"]:
                reading.error((((at, "match"), index), "uri"), "redirect.prefixRewrite needs a prefix match")


def _check_authority(value: dict[str, Any], at: Path, reading: Reading) -> None:
    """The authority may be rewritten in one place only."""
    places = []
    if "authority" in value.get("rewrite", {}):
        places.append((at, "rewrite"))
    for operation in ("set", "add"):
        here = (((at, "headers"), "request"), operation)
        for name in value.get("headers", {}).get("request", {}).get(operation, {}):
            if name.lower() in ("host", ":authority"):
                places.append((here, name))  # noqa: PERF401
    if len(places) > 1:
        reading.error(places[1], "the authority is rewritten a second time")


_HTTP_ROUTE: Final = Struct(
    {
        "name": Text(),
        "match": Items(_HTTP_MATCH),
        "route": Items(
            Struct(
                {
                    "destination": _DESTINATION,
                    "weight": _COUNT,
                    "headers": _HEADERS,
                    **_OLD_HEADER_FIELDS,
                },
                required=("destination",),
                rules=(_move_old_headers,),
            )
        ),
        "redirect": _REDIRECT,
        "directResponse": _DIRECT_RESPONSE,
        "delegate": Struct({"name": Text(), "namespace": Text()}),
        "rewrite": _REWRITE,
        "timeout": _DURATION,
        "retries": _HTTP_RETRIES,
        "fault": NotYet(_FAULT),
        "mirror": NotYet(_DESTINATION, "nothing is mirrored"),
        "mirrors": NotYet(
            Items(Struct({"destination": _DESTINATION, "percentage": _MIRROR_PERCENT}, required=("destination",))),
            "nothing is mirrored",
        ),
        "mirrorPercent": NotYet(_PERCENT),
        "mirrorPercentage": NotYet(_MIRROR_PERCENT),
        "corsPolicy": NotYet(_CORS),
        "headers": _HEADERS,
        "websocketUpgrade": Boolean(),
        **_OLD_HEADER_FIELDS,
    },
    one_of=(("mirror", "mirrors"),),
    rules=(_move_old_headers, _check_http_action, _check_weights, _check_authority),
)


def _drop_websocket_upgrade(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if value.pop("websocketUpgrade", None) is not None:
        reading.warn((at, "websocketUpgrade"), "websocketUpgrade is no longer a field: upgrades always pass")


_ROUTE: Final = Items(Struct({"destination": _DESTINATION, "weight": _COUNT}, required=("destination",)), at_least=1)
_SUBNETS: Final = Items(Text(names.subnet))
_L4_MATCH_FIELDS: Final[dict[str, Field]] = {
    "destinationSubnets": _SUBNETS,
    "port": PORT,
    "sourceLabels": LABELS,
    "gateways": _GATEWAYS,
    "sourceNamespace": Text(names.dns_label),
}
_TCP_ROUTE: Final = Struct(
    {
        "match": Items(
            Struct(
                {**_L4_MATCH_FIELDS, "sourceSubnet": Never("send more connections this way than were meant")},
                is_strict=True,
            )
        ),
        "route": _ROUTE,
    },
    required=("route",),
    rules=(_check_weights,),
)
_TLS_ROUTE: Final = Struct(
    {
        "match": Items(
            Struct(
                {**_L4_MATCH_FIELDS, "sniHosts": Items(Text(names.host_or_ip), at_least=1)},
                required=("sniHosts",),
                is_strict=True,
            ),
            at_least=1,
        ),
        "route": _ROUTE,
    },
    required=("match", "route"),
    rules=(_check_weights,),
)


def _is_part_of(name: str, pattern: str) -> bool:
    """Every host that `name` (exact or wildcard) stands for is one that `pattern` stands for."""
    if pattern.startswith("*"):
        return name.removeprefix("*").endswith(pattern[1:])
    return name == pattern


def _check_hosts(value: dict[str, Any], at: Path, reading: Reading) -> None:
    hosts = value.get("hosts", [])
    if not hosts:
        reading.warn(
            at,
            "a VirtualService without hosts is a delegate, which is not supported by this version",
            "it has no effect",
        )
    gateways = value.get("gateways", ["mesh"])
    for index, name in enumerate(hosts):
        here = ((at, "hosts"), index)
        if name == "*" and "mesh" in gateways:
            reading.error(here, "host * needs gateways other than mesh")
        if any(_is_part_of(name, other) or _is_part_of(other, name) for other in hosts[:index]):
            reading.error(here, f"host {shown(name)} overlaps one before it")
    for index, route in enumerate(value.get("tls", ())):
        for number, match in enumerate(route.get("match", ())):
            for position, sni in enumerate(match.get("sniHosts", ())):
                if hosts and not any(_is_part_of(sni, name) for name in hosts):
                    where = ((((((at, "tls"), index), "match"), number), "sniHosts"), position)
                    reading.error(where, f"{shown(sni)} is not among the hosts of this VirtualService")


def _drop_left_out_routes(value: dict[str, Any], at: Path, reading: Reading) -> None:
    routes = value.get("http", [])
    kept = [(index, route) for index, route in enumerate(routes) if not route.get("_isLeftOut")]
    if len(kept) < len(routes):
        value["http"] = [route for _, route in kept]
        for today, (written, _) in enumerate(kept):
            if today != written:
                reading.moved[path_text(((at, "http"), today))] = path_text(((at, "http"), written))


def _check_reach(value: dict[str, Any], at: Path, reading: Reading) -> None:
    """Routes behind one that takes everything are never reached."""
    for kind in ("http", "tcp"):
        routes = value.get(kind, ())
        for index, route in enumerate(routes[:-1]):
            matches = route.get("match", ())
            if "_isLeftOut" not in route and (not matches or any(not match for match in matches)):
                here = ((at, kind), index + 1)
                reading.warn(
                    here, f"{kind}[{index}] has no condition and takes everything", "routes after it have no effect"
                )
                break


VIRTUAL_SERVICE: Final = Struct(
    {
        "hosts": Items(Text(names.host_or_ip)),
        "gateways": _GATEWAYS,
        "http": Items(_HTTP_ROUTE.extended({}, (_drop_websocket_upgrade,))),
        "tls": Items(_TLS_ROUTE),
        "tcp": Items(_TCP_ROUTE),
        "exportTo": _EXPORT_TO,
    },
    rules=(needs_one_of("http", "tls", "tcp"), _check_hosts, _check_reach, _drop_left_out_routes),
)

# ── ServiceEntry, WorkloadEntry, WorkloadGroup ───────────────────────────────────────────────────────────────────────


def _check_address(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if "address" not in value:
        reading.error(at, "address is missing")
    if value.get("address", "").startswith("unix://") and value.get("ports"):
        reading.error((at, "ports"), "a unix socket has no ports")


_WORKLOAD_FIELDS: Final[dict[str, Field]] = {
    "address": Text(names.workload_address),
    "ports": Table(PORT, key=names.as_table_key(names.dns_label)),
    "labels": LABELS,
    "network": _Network(),
    "locality": _Locality(),
    "weight": Integer(),
    "serviceAccount": Text(names.object_name),
}
WORKLOAD_ENTRY: Final = Struct(_WORKLOAD_FIELDS, rules=(_check_address,))

_WORKLOAD_SELECTOR: Final = Struct({"labels": _SELECTOR_LABELS}, old={"matchLabels": "labels"}, is_strict=True)


def _check_service_entry(value: dict[str, Any], at: Path, reading: Reading) -> None:
    resolution = value.get("resolution", "NONE")
    endpoints = value.get("endpoints", ())
    ports = value.get("ports", ())
    port_names = {port.get("name") for port in ports}
    if resolution == "NONE" and endpoints:
        reading.error((at, "endpoints"), "resolution NONE takes no endpoints; write STATIC or DNS")
    if resolution == "NONE" and "workloadSelector" in value:
        reading.warn(
            (at, "workloadSelector"), "resolution NONE sends connections where they were going", "it has no effect"
        )
    if resolution == "DNS_ROUND_ROBIN" and len(endpoints) > 1:
        reading.error((at, "endpoints"), "resolution DNS_ROUND_ROBIN takes at most one endpoint")
    if resolution in ("DNS", "DNS_ROUND_ROBIN") and not endpoints and "workloadSelector" not in value:
        for index, name in enumerate(value.get("hosts", ())):
            if "*" in name:
                reading.error(((at, "hosts"), index), f"{shown(name)} cannot be looked up by DNS; give endpoints")
    if resolution not in ("NONE", "STATIC"):
        for index, address in enumerate(value.get("addresses", ())):
            if "/" in address:
                reading.error(((at, "addresses"), index), f"networks need resolution NONE or STATIC, not {resolution}")
    if resolution == "STATIC":
        for index, endpoint in enumerate(endpoints):
            address = endpoint.get("address", "")
            if address and not address.startswith("unix://") and not names.is_ip(address):
                here = (((at, "endpoints"), index), "address")
                reading.error(here, f"{shown(address)} is not an IP address; resolution STATIC needs one")
    for index, endpoint in enumerate(endpoints):
        for name in endpoint.get("ports", {}):
            if name not in port_names:
                port_at = ((((at, "endpoints"), index), "ports"), name)
                reading.error(port_at, f"port {shown(name)} is none of this ServiceEntry's ports")
    if resolution != "NONE" and len(value.get("hosts", ())) > 1:
        for index, port in enumerate(ports):
            protocol = port.get("protocol", "TCP")
            if protocol not in names.HTTP_PROTOCOLS and protocol not in names.TLS_PROTOCOLS:
                reading.error(
                    (((at, "ports"), index), "protocol"),
                    f"several hosts cannot share a {protocol} port: nothing tells them apart",
                )
                break


SERVICE_ENTRY: Final = Struct(
    {
        "hosts": Items(Text(names.host_not_all), at_least=1, at_most=256),
        "addresses": Items(Text(names.subnet), at_most=256),
        "ports": Items(
            Struct(
                {"number": PORT, "protocol": PROTOCOL, "name": Text(names.dns_label), "targetPort": PORT},
                required=("number", "name"),
            ),
            at_most=256,
        ),
        "location": Choice("MESH_EXTERNAL", "MESH_INTERNAL"),
        "resolution": Choice(
            "NONE",
            "STATIC",
            "DNS",
            "DNS_ROUND_ROBIN",
            refused={"DYNAMIC_DNS": "resolution DYNAMIC_DNS is not supported by this version"},
        ),
        "endpoints": Items(WORKLOAD_ENTRY, at_most=4096),
        "workloadSelector": _WORKLOAD_SELECTOR,
        "exportTo": _EXPORT_TO,
        "subjectAltNames": _TEXTS,
    },
    required=("hosts",),
    one_of=(("workloadSelector", "endpoints"),),
    rules=(
        _check_unique("ports", "name", "port name"),
        _check_unique("ports", "number", "port"),
        _check_service_entry,
    ),
)

_PROBE_HEADERS: Final = Items(
    Struct({"name": Text(names.probe_header_name), "value": Text(names.header_value)}, required=("name",))
)
_SECONDS: Final = Integer(0, 2**31 - 1)


def _check_probe(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if not any(name in value for name in ("httpGet", "tcpSocket", "grpc")):
        value.clear()


_PROBE: Final = Struct(
    {
        "initialDelaySeconds": _SECONDS,
        "timeoutSeconds": _SECONDS,
        "periodSeconds": _SECONDS,
        "successThreshold": _SECONDS,
        "failureThreshold": _SECONDS,
        "httpGet": Struct(
            {
                "path": Text(),
                "port": PORT,
                "host": Text(names.exact_host_or_ip),
                "scheme": Choice("HTTP", "HTTPS"),
                "httpHeaders": _PROBE_HEADERS,
            },
            required=("port",),
        ),
        "tcpSocket": Struct({"host": Text(names.exact_host_or_ip), "port": PORT}, required=("port",)),
        "exec": NotYet(Struct({"command": Items(Text(), at_least=1)}, required=("command",)), "the probe is not run"),
        "grpc": Struct({"port": PORT, "service": Text(keeps_empty=True)}),
    },
    one_of=(("httpGet", "tcpSocket", "exec", "grpc"),),
    rules=(_check_probe,),
)
WORKLOAD_GROUP: Final = Struct(
    {
        "metadata": Struct({"labels": LABELS, "annotations": Table(Text(keeps_empty=True))}),
        "template": Struct(_WORKLOAD_FIELDS),
        "probe": _PROBE,
    },
    required=("template",),
)

# ── Sidecar ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_CAPTURE_MODE: Final = Choice("DEFAULT", "IPTABLES", "NONE")


class _NoTargetPort(Field):
    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if Integer().read(value, at, reading) not in (ABSENT, 0):
            reading.warn(at, "targetPort has no effect here; defaultEndpoint says where traffic goes")
        return ABSENT


_SIDECAR_PORT: Final = Struct(
    {
        "number": Integer(0, 65535),
        "protocol": PROTOCOL,
        "name": Text(names.dns_label),
        "targetPort": _NoTargetPort(),
    },
)


def _check_ingress(value: dict[str, Any], at: Path, reading: Reading) -> None:
    port = value.get("port", {})
    if "port" in value and not port.get("number"):
        reading.error((at, "port"), "an ingress listener needs a port number")
    pool = value.get("connectionPool", {})
    protocol = port.get("protocol", "")
    if "http" in pool and protocol and protocol not in names.HTTP_PROTOCOLS:
        reading.warn(((at, "connectionPool"), "http"), f"the port is {protocol}", "only the tcp settings apply")


_SERVER_TLS_CERTIFICATE: Final = Struct(
    {"serverCertificate": Text(), "privateKey": Text(), "caCertificates": Text()}, is_strict=True
)
_INGRESS: Final = Struct(
    {
        "port": _SIDECAR_PORT,
        "bind": Text(names.bind_address),
        "captureMode": _CAPTURE_MODE,
        "defaultEndpoint": Text(names.local_endpoint),
        "tls": Never("serve in plain text what should be encrypted"),
        "connectionPool": CONNECTION_POOL,
    },
    required=("port",),
    rules=(_check_ingress,),
)


def _check_egress(value: dict[str, Any], at: Path, reading: Reading) -> None:
    bind = value.get("bind", "")
    capture = value.get("captureMode", "DEFAULT")
    port = value.get("port")
    if port is None:
        return
    is_unix = bind.startswith("unix://")
    if not port.get("number") and not is_unix:
        reading.error((at, "port"), "a port number is needed unless bind is unix:///path")
    if port.get("number") and is_unix:
        reading.error(((at, "port"), "number"), "a unix socket has no port; write 0")
    if is_unix and capture == "IPTABLES":
        reading.error((at, "captureMode"), "a unix socket cannot capture; write NONE")


_EGRESS: Final = Struct(
    {
        "port": _SIDECAR_PORT,
        "bind": Text(names.bind_address),
        "captureMode": _CAPTURE_MODE,
        "hosts": Items(Text(names.scoped_host), at_least=1),
    },
    required=("hosts",),
    rules=(_check_egress,),
)


def _check_listeners(value: dict[str, Any], at: Path, reading: Reading) -> None:
    if not any(name in value for name in ("ingress", "egress", "outboundTrafficPolicy", "inboundConnectionPool")):
        reading.error(at, "a Sidecar needs ingress, egress, outboundTrafficPolicy or inboundConnectionPool")
    for kind in ("ingress", "egress"):
        seen: set[Any] = set()
        listeners = value.get(kind, ())
        for index, listener in enumerate(listeners):
            here = ((at, kind), index)
            if "port" not in listener:
                if kind == "egress" and index < len(listeners) - 1:
                    reading.error(here, "the egress listener without a port must be the last")
                continue
            number = listener["port"].get("number", 0)
            # Istio, which ignores UDP, has one listener for a number; here TCP's and UDP's are two.
            is_udp = (listener["port"].get("protocol") or "").upper() == "UDP"
            address = (listener.get("bind", ""), number, is_udp) if number else listener.get("bind")
            if address in seen:
                where = f"port {number}" if number else f"socket {shown(address)}"
                reading.error((here, "port"), f"{where} has a listener already")
            seen.add(address)


SIDECAR: Final = Struct(
    {
        "workloadSelector": _WORKLOAD_SELECTOR,
        "ingress": Items(_INGRESS),
        "egress": Items(_EGRESS),
        "inboundConnectionPool": CONNECTION_POOL,
        "outboundTrafficPolicy": Struct(
            {"mode": Choice("REGISTRY_ONLY", "ALLOW_ANY"), "egressProxy": NotYet(_DESTINATION)}
        ),
    },
    rules=(_check_listeners,),
)

# ── Gateway ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_TLS_VERSION: Final = Choice(
    "TLSV1_2",
    "TLSV1_3",
    default="TLS_AUTO",
    old={},
)


class _LowestTls(Field):
    """TLS before 1.2 is not served, whatever is asked for."""

    __slots__ = ()

    def read(self, value: Value, at: Path, reading: Reading) -> Any:
        if value in ("TLSV1_0", "TLSV1_1"):
            reading.warn(at, f"{value} is not served: it is broken", "read as TLSV1_2")
            return "TLSV1_2"
        return _TLS_VERSION.read(value, at, reading)


def _check_server_tls(value: dict[str, Any], at: Path, reading: Reading) -> None:
    mode = value.get("mode", "PASSTHROUGH")
    files = [name for name in ("serverCertificate", "privateKey", "caCertificates") if name in value]
    if mode == "ISTIO_MUTUAL" and files:
        reading.error((at, files[0]), "ISTIO_MUTUAL uses the workload's own certificate; leave this field out")
    if mode == "PASSTHROUGH" and files:
        reading.warn((at, files[0]), "PASSTHROUGH leaves TLS to the destination and uses no certificates")
    if mode in ("SIMPLE", "MUTUAL"):
        for name in ("serverCertificate", "privateKey"):
            if name not in value:
                reading.error(at, f"mode {mode} needs {name}")
    if mode == "MUTUAL" and "caCertificates" not in value:
        reading.error(at, "mode MUTUAL needs caCertificates")


_SECRETS: Final = "serve without the certificates it names: they are Kubernetes Secrets; name files instead"
SERVER_TLS: Final = Struct(
    {
        "httpsRedirect": Boolean(),
        "mode": Choice(
            "PASSTHROUGH",
            "SIMPLE",
            "MUTUAL",
            "ISTIO_MUTUAL",
            refused={
                "AUTO_PASSTHROUGH": "mode AUTO_PASSTHROUGH is not supported by this version",
                "OPTIONAL_MUTUAL": "mode OPTIONAL_MUTUAL is not supported by this version",
            },
        ),
        "serverCertificate": Text(),
        "privateKey": Text(),
        "caCertificates": Text(),
        "subjectAltNames": _TEXTS,
        "minProtocolVersion": _LowestTls(),
        "maxProtocolVersion": NotYet(Choice("TLSV1_0", "TLSV1_1", "TLSV1_2", "TLSV1_3", default="TLS_AUTO")),
        "cipherSuites": NotYet(_TEXTS, "OpenSSL's secure defaults are used"),
        "insecureSkipVerify": NotYet(Boolean(), "client certificates are verified"),
        "credentialName": Never(_SECRETS),
        "credentialNames": Never(_SECRETS),
        "caCertCredentialName": Never(_SECRETS),
        "tlsCertificates": Never("serve fewer certificates than were meant; name one in serverCertificate"),
        "caCrl": Never("accept revoked certificates"),
        "verifyCertificateSpki": Never("accept certificates that it excludes"),
        "verifyCertificateHash": Never("accept certificates that it excludes"),
    },
    rules=(_check_server_tls,),
    is_strict=True,
)


def _check_server(value: dict[str, Any], at: Path, reading: Reading) -> None:
    port = value.get("port", {})
    protocol = port.get("protocol", "")
    tls = value.get("tls")
    is_unix = value.get("bind", "").startswith("unix://")
    if is_unix and port.get("number"):
        reading.error(((at, "port"), "number"), "a unix socket has no port; write 0")
    if not is_unix and port and not port.get("number") and "number" in port:
        reading.error(((at, "port"), "number"), "0 is not in 1..65535")
    if protocol in names.TLS_PROTOCOLS and tls is None:
        reading.error(at, f"protocol {protocol} needs tls")
    if tls is not None and protocol and protocol not in names.TLS_PROTOCOLS:
        if protocol not in names.HTTP_PROTOCOLS:
            reading.error((at, "tls"), f"protocol {protocol} takes no tls; write TLS or HTTPS")
        elif tls.get("mode", "PASSTHROUGH") != "PASSTHROUGH":
            reading.error((at, "tls"), f"protocol {protocol} takes only tls.httpsRedirect; write HTTPS to serve TLS")
    if tls is not None and tls.get("httpsRedirect") and protocol not in names.HTTP_PROTOCOLS:
        reading.warn(((at, "tls"), "httpsRedirect"), f"only HTTP servers redirect, and this is {protocol or 'none'}")


GATEWAY: Final = Struct(
    {
        "servers": Items(
            Struct(
                {
                    "port": Struct(
                        {
                            "number": Integer(0, 65535),
                            "protocol": PROTOCOL,
                            "name": Text(),
                            "targetPort": _NoTargetPort(),
                        },
                        required=("number", "protocol", "name"),
                    ),
                    "bind": Text(names.bind_address),
                    "hosts": Items(Text(names.gateway_host), at_least=1),
                    "tls": SERVER_TLS,
                    "defaultEndpoint": NotYet(Text()),
                    "name": Text(),
                },
                required=("port", "hosts"),
                rules=(_check_server,),
            ),
            at_least=1,
        ),
        "selector": LABELS,
    },
    required=("servers",),
)


def _check_port_names(value: dict[str, Any], at: Path, reading: Reading) -> None:
    seen: set[str] = set()
    for index, server in enumerate(value.get("servers", ())):
        name = server.get("port", {}).get("name")
        if name is not None and name in seen:
            reading.error(((((at, "servers"), index), "port"), "name"), f"port name {shown(name)} is given twice")
        seen.add(name)


KINDS: Final[dict[str, Struct]] = {
    "DestinationRule": DESTINATION_RULE,
    "VirtualService": VIRTUAL_SERVICE,
    "ServiceEntry": SERVICE_ENTRY,
    "WorkloadEntry": WORKLOAD_ENTRY,
    "WorkloadGroup": WORKLOAD_GROUP,
    "Sidecar": SIDECAR,
    "Gateway": GATEWAY.extended({}, (_check_port_names,)),
}
IGNORED_KINDS: Final = {
    "EnvoyFilter": f"it configures Envoy; {IGNORED}",
    "ProxyConfig": IGNORED,
}
