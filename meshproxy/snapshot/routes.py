"""VirtualService → routes.

Decides: matches, actions and their order; what can be told now (source labels, port, gateway) is settled here, so the
data path never sees it. Leaves to others: which VirtualService speaks for a host (virtual_services).
Source: istio pilot/pkg/networking/core/route/route.go, route/retry/retry.go.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshproxy.model.listener import TcpRoute
from meshproxy.model.route import (
    MATCH_ALL,
    NO_HEADER_OPS,
    DirectResponse,
    HeaderOps,
    MatchKind,
    NamedMatch,
    Redirect,
    RetryPolicy,
    Rewrite,
    Route,
    RouteMatch,
    StringMatch,
    WeightedCluster,
)
from meshproxy.model.workload import Workload
from meshproxy.resources.document import Resource
from meshproxy.snapshot.clusters import OutboundClusters, outbound_name
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import selects
from meshproxy.snapshot.services import Service, Services
from meshproxy.snapshot.virtual_services import VirtualService, gateway_name

DEFAULT_RETRY = RetryPolicy()
"""Istio retries every outbound HTTP route that does not say otherwise."""
_ANY_PATH = StringMatch(MatchKind.PREFIX, "/")
_PRESENT = StringMatch(MatchKind.PRESENT)
_NO_CONDITIONS: tuple[Mapping[str, Any], ...] = ({},)
_AUTHORITY_NAMES = frozenset({"host", ":authority"})


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose traffic, on which port, through which gateway (`mesh` or `namespace/name`)."""

    workload: Workload
    port: int
    gateway: str


class Routes:
    def __init__(self, services: Services, clusters: OutboundClusters, findings: Findings) -> None:
        self._services = services
        self._clusters = clusters
        self._findings = findings
        self._http: dict[tuple[int, str, int, str], tuple[Route, ...]] = {}

    def to_service(self, service: Service, port: int, workload: Workload) -> tuple[Route, ...]:
        """What holds for a service that no VirtualService speaks for."""
        key = self._clusters.key(service, port, "", workload.id)
        assert key is not None, "the caller chose a port that the service has"
        return (
            Route(clusters=(WeightedCluster(cluster_key=key),), retry=DEFAULT_RETRY, source=service.resource.source),
        )

    def http(self, virtual_service: VirtualService, scope: Scope) -> tuple[Route, ...]:
        """In order of precedence. What matches none of them is not found: it does not fall through to the service."""
        at = (id(virtual_service), scope.workload.id, scope.port, scope.gateway)
        if at not in self._http:
            self._http[at] = tuple(self._http_routes(virtual_service.resource, scope))
        return self._http[at]

    def tcp(self, virtual_service: VirtualService, scope: Scope) -> tuple[TcpRoute, ...]:
        """First match wins; nothing matches: the connection is closed."""
        resource = virtual_service.resource
        return tuple(
            TcpRoute(
                clusters=self._weighted(route["route"], resource, f"spec.tcp[{index}]", scope),
                destination_subnets=tuple(match.get("destinationSubnets") or ()),
            )
            for index, route in enumerate(resource.spec.get("tcp") or ())
            for match in route.get("match") or _NO_CONDITIONS
            if _applies(match, scope, resource.namespace)
        )

    def tls(self, virtual_service: VirtualService, scope: Scope) -> tuple[TcpRoute, ...]:
        """Routes by the name in the TLS ClientHello; the TLS itself is left alone."""
        resource = virtual_service.resource
        return tuple(
            TcpRoute(
                clusters=self._weighted(route["route"], resource, f"spec.tls[{index}]", scope),
                destination_subnets=tuple(match.get("destinationSubnets") or ()),
                sni_hosts=tuple(host.lower() for host in match.get("sniHosts") or ()),
            )
            for index, route in enumerate(resource.spec.get("tls") or ())
            for match in route.get("match") or ()
            if _applies(match, scope, resource.namespace)
        )

    def _http_routes(self, resource: Resource, scope: Scope) -> Iterator[Route]:
        for index, spec in enumerate(resource.spec.get("http") or ()):
            action: dict[str, Any] | None = None
            for block in spec.get("match") or _NO_CONDITIONS:
                if not _applies(block, scope, resource.namespace):
                    continue
                if action is None:
                    action = self._action(spec, resource, f"spec.http[{index}]", scope)
                match = _match(block)
                if match.path is None and _needs_prefix(action):
                    # Without a uri condition the matched prefix is `/`, and that is what a rewrite replaces.
                    match = RouteMatch(
                        path=_ANY_PATH,
                        method=match.method,
                        authority=match.authority,
                        scheme=match.scheme,
                        headers=match.headers,
                        query=match.query,
                    )
                name = ".".join(part for part in (spec.get("name"), block.get("name")) if part)
                yield Route(name=name, match=match, source=resource.source, **action)
                if match in (MATCH_ALL, _MATCH_ANY_PATH):
                    return  # nothing after a catch-all can be reached

    def _action(self, spec: Mapping[str, Any], resource: Resource, path: str, scope: Scope) -> dict[str, Any]:
        headers = spec.get("headers") or {}
        fields: dict[str, Any] = {
            "request_headers": _header_ops(headers.get("request")),
            "response_headers": _header_ops(headers.get("response")),
        }
        if spec.get("redirect"):
            fields["redirect"] = _redirect(spec["redirect"], scope.port)
            return fields
        if spec.get("directResponse"):
            response = spec["directResponse"]
            fields["direct_response"] = DirectResponse(
                status=response["status"], body=_body(response.get("body") or {})
            )
            return fields
        fields["clusters"] = self._weighted(spec.get("route") or (), resource, path, scope)
        if spec.get("rewrite"):
            fields["rewrite"] = _rewrite(spec["rewrite"])
        fields["timeout_s"] = spec.get("timeout") or None
        fields["retry"] = _retry(spec.get("retries"))
        return fields

    def _weighted(
        self, destinations: Iterable[Mapping[str, Any]], resource: Resource, path: str, scope: Scope
    ) -> tuple[WeightedCluster, ...]:
        found = list(enumerate(destinations))
        if len(found) > 1:
            # A destination of weight 0 among several gets nothing; of a single one the weight does not matter.
            found = [(index, entry) for index, entry in found if entry.get("weight")]
        weighted = []
        for index, entry in found:
            headers = entry.get("headers") or {}
            where = f"{path}.route[{index}].destination"
            weighted.append(
                WeightedCluster(
                    cluster_key=self._cluster_key(entry["destination"], resource, where, scope),
                    weight=entry["weight"] if len(found) > 1 else 100,
                    request_headers=_header_ops(headers.get("request")),
                    response_headers=_header_ops(headers.get("response")),
                )
            )
        return tuple(weighted)

    def _cluster_key(self, destination: Mapping[str, Any], resource: Resource, path: str, scope: Scope) -> str:
        """A destination that does not exist keeps its route, which then answers 503 NC, as in Istio."""
        host, service = self._services.resolve(destination["host"], resource.namespace, scope.workload.namespace)
        subset = destination.get("subset") or ""
        port = (destination.get("port") or {}).get("number")
        action = "requests sent there are answered 503 (flag NC)"
        if service is None:
            name = outbound_name(port or scope.port, subset, host)
            message = f"no service {host} is known in namespace {scope.workload.namespace}"
            self._findings.warn(resource, f"{path}.host", message, action)
            return name
        if port is None:
            port = service.ports[0].number if len(service.ports) == 1 else scope.port
        key = self._clusters.key(service, port, subset, scope.workload.id)
        if key is not None:
            return key
        if service.port(port) is None:
            numbers = ", ".join(str(known.number) for known in service.ports) or "none"
            message = f"{host} has no port {port} (its ports: {numbers})"
            self._findings.warn(resource, f"{path}.port", message, action)
        else:
            message = f"no DestinationRule in effect defines subset {subset} of {host}"
            self._findings.warn(resource, f"{path}.subset", message, action)
        return outbound_name(port, subset, host)


_MATCH_ANY_PATH = RouteMatch(path=_ANY_PATH)


def _applies(match: Mapping[str, Any], scope: Scope, namespace: str) -> bool:
    """The conditions on who asks and where, which are known before any request."""
    if match.get("port") not in (None, scope.port):
        return False
    if not selects(match.get("sourceLabels"), scope.workload.labels):
        return False
    if match.get("sourceNamespace") not in (None, "", scope.workload.namespace):
        return False
    gateways = match.get("gateways")
    return not gateways or scope.gateway in {gateway_name(name, namespace) for name in gateways}


def _match(block: Mapping[str, Any]) -> RouteMatch:
    ignores_case = bool(block.get("ignoreUriCase"))
    uri = block.get("uri")
    path = _string_match(uri, ignores_case) if uri else None
    if path is not None and (path.kind is MatchKind.PRESENT or (path.kind is MatchKind.PREFIX and not path.value)):
        path = None  # every request has a path
    headers = [NamedMatch(name.lower(), _string_match(m)) for name, m in (block.get("headers") or {}).items()]
    headers += [
        NamedMatch(name.lower(), _string_match(m), is_inverted=True)
        for name, m in (block.get("withoutHeaders") or {}).items()
    ]
    return RouteMatch(
        path=path,
        method=_optional(block.get("method")),
        authority=_optional(block.get("authority")),
        scheme=_optional(block.get("scheme")),
        headers=tuple(headers),
        query=tuple(NamedMatch(name, _string_match(m)) for name, m in (block.get("queryParams") or {}).items()),
    )


def _optional(match: Mapping[str, Any] | None) -> StringMatch | None:
    """Of what every request has; mere presence is no condition."""
    found = _string_match(match) if match else _PRESENT
    return None if found.kind is MatchKind.PRESENT else found


def _string_match(match: Mapping[str, Any] | None, ignores_case: bool = False) -> StringMatch:
    """An empty match, or the regex `*` (which is none), means that the thing is there."""
    if match:
        if "exact" in match:
            return StringMatch(MatchKind.EXACT, match["exact"], ignores_case)
        if "prefix" in match:
            return StringMatch(MatchKind.PREFIX, match["prefix"], ignores_case)
        if match.get("regex") not in (None, "*"):
            return StringMatch(MatchKind.REGEX, match["regex"])
    return _PRESENT


def _header_ops(spec: Mapping[str, Any] | None) -> HeaderOps:
    if not spec:
        return NO_HEADER_OPS
    replaced = {name.lower(): value for name, value in (spec.get("set") or {}).items()}
    added = {name.lower(): value for name, value in (spec.get("add") or {}).items()}
    for name in _AUTHORITY_NAMES & added.keys():
        # There is one authority: adding one means replacing it, unless `set` does.
        value = added.pop(name)
        if not _AUTHORITY_NAMES & replaced.keys():
            replaced[name] = value
    return HeaderOps(
        set=tuple(replaced.items()),
        add=tuple(added.items()),
        remove=tuple(name.lower() for name in spec.get("remove") or ()),
    )


def _redirect(spec: Mapping[str, Any], listener_port: int) -> Redirect:
    port = spec.get("port")
    if spec.get("derivePort") == "FROM_REQUEST_PORT":
        port = listener_port
    return Redirect(
        code=spec.get("redirectCode") or 301,
        authority=spec.get("authority") or None,
        path=spec.get("uri") or None,
        prefix=spec.get("prefixRewrite") or None,
        scheme=spec.get("scheme") or None,
        port=port,
    )


def _body(body: Mapping[str, Any]) -> bytes:
    if body.get("bytes"):
        return base64.b64decode(body["bytes"])
    return str(body.get("string") or "").encode()


def _rewrite(spec: Mapping[str, Any]) -> Rewrite:
    regex = spec.get("uriRegexRewrite")
    return Rewrite(
        path=spec.get("uri") or None,
        path_regex=(regex["match"], regex["rewrite"]) if regex else None,
        authority=spec.get("authority") or None,
    )


def _needs_prefix(action: Mapping[str, Any]) -> bool:
    rewrite, redirect = action.get("rewrite"), action.get("redirect")
    return (rewrite is not None and rewrite.path is not None) or (redirect is not None and redirect.prefix is not None)


def _retry(spec: Mapping[str, Any] | None) -> RetryPolicy | None:
    """Absent: Istio's default. attempts absent or 0: no retries."""
    if spec is None:
        return DEFAULT_RETRY
    if not spec.get("attempts"):
        return None
    words = [word.strip() for word in (spec.get("retryOn") or "").split(",") if word.strip()]
    codes = frozenset(int(word) for word in words if word.isdigit())
    conditions = frozenset(word for word in words if not word.isdigit())
    if codes:
        conditions |= {"retriable-status-codes"}
    backoff: dict[str, float] = {}
    if spec.get("backoff"):
        # Envoy's cap is ten times the base unless one is given.
        backoff = {"base_interval_s": spec["backoff"], "max_interval_s": spec["backoff"] * 10}
    return RetryPolicy(
        attempts=spec["attempts"],
        on=conditions or DEFAULT_RETRY.on,
        status_codes=codes,
        per_try_timeout_s=spec.get("perTryTimeout") or None,
        avoids_previous_hosts=spec.get("retryIgnorePreviousHosts") is not False,
        **backoff,
    )
