"""Egress listeners of a workload's Sidecar → listeners and route tables.

Decides: which services a listener serves, by name (HTTP) or as the only one (TCP). Leaves to others: the routes of a
host (routes), what a cluster is (clusters).
Source: Istio Sidecar; istio pilot/pkg/networking/core/listener.go, httproute.go.
"""

from collections.abc import Iterable, Sequence

from meshproxy.model.cluster import Protocol
from meshproxy.model.listener import Direction, Listener, TcpRoute
from meshproxy.model.route import DirectResponse, Route, VirtualHost, WeightedCluster
from meshproxy.resources.document import Resource
from meshproxy.snapshot.clusters import OutboundClusters
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import Imports, domains
from meshproxy.snapshot.listeners import Bind, Listeners, VirtualHosts
from meshproxy.snapshot.protocols import declared_protocol
from meshproxy.snapshot.routes import Routes, Scope
from meshproxy.snapshot.services import Service, Services
from meshproxy.snapshot.virtual_services import MESH, VirtualServices
from meshproxy.snapshot.workloads import LocalWorkload

_TLS_PROTOCOLS = frozenset({Protocol.TLS, Protocol.HTTPS})
_LOOPBACK = "127.0.0.1"
# BlockAll of Istio's REGISTRY_ONLY: HTTP is answered 502 (pilot httproute.go).
_BLOCK_ALL = VirtualHost(
    name="block_all",
    domains=("*",),
    routes=(Route(name="block_all", direct_response=DirectResponse(status=502)),),
)


class Outbound:
    def __init__(
        self,
        services: Services,
        virtual_services: VirtualServices,
        clusters: OutboundClusters,
        routes: Routes,
        listeners: Listeners,
        findings: Findings,
    ) -> None:
        self._services = services
        self._virtual_services = virtual_services
        self._clusters = clusters
        self._routes = routes
        self._listeners = listeners
        self._findings = findings

    def add(self, local: LocalWorkload) -> None:
        """All egress listeners of one workload."""
        sidecar = local.sidecar
        if sidecar is None:
            return
        visible: list[Service] | None = None
        for index, egress in enumerate(sidecar.spec.get("egress") or ()):
            path = f"spec.egress[{index}]"
            capture = egress.get("captureMode") or "DEFAULT"
            port = egress.get("port")
            if capture == "IPTABLES":
                message = "captured traffic is not supported by this version"
                self._findings.warn(sidecar, f"{path}.captureMode", message, "this listener is left out")
                continue
            if port is None and capture != "NONE":
                continue  # says what may be reached, not where to listen
            if visible is None:
                visible = self._services.visible_to(local.workload.namespace)
            imports = Imports(egress.get("hosts") or ("*/*",), local.workload.namespace)
            imported = [service for service in visible if imports.cover(service.namespace, service.host)]
            written = egress.get("bind") or ""
            if port is None:
                self._add_each_port(local, sidecar, path, written, imported, imports)
                continue
            number = port.get("number") or 0
            protocol = declared_protocol(number, port.get("protocol") or "", port.get("name") or "")
            if protocol is Protocol.UDP:
                serving = [service for service in imported if service.port(number, is_udp=True) is not None]
                self._add_udp(local, sidecar, path, written, number, serving)
                continue
            bind = Bind.of(written, number, _LOOPBACK)
            serving = [service for service in imported if not number or service.port(number) is not None]
            self._add(local, sidecar, path, bind, number, protocol, serving, imports)

    def _add_each_port(
        self,
        local: LocalWorkload,
        sidecar: Resource,
        path: str,
        written: str,
        imported: Iterable[Service],
        imports: Imports,
    ) -> None:
        """A listener without port and captureMode NONE: one per port of the imported services."""
        by_port: dict[int, list[Service]] = {}
        for service in imported:
            for port in service.ports:
                by_port.setdefault(port.number, []).append(service)
        for number, services in sorted(by_port.items()):
            bind = Bind.of(written, number, _LOOPBACK)
            if bind.name in self._listeners.by_name:
                # A listener that names its port is meant; this one fills in the rest.
                if self._listeners.by_name[bind.name].workload_id == local.workload.id:
                    continue
            protocols = [_protocol(service, number) for service in services]
            protocol = protocols[0]
            fitting = [s for s, p in zip(services, protocols, strict=True) if p.is_http == protocol.is_http]
            for service in services:
                if service not in fitting:
                    message = f"{service.host} and {fitting[0].host} share port {number} but not the protocol"
                    self._findings.warn(sidecar, path, message, f"{bind} serves {fitting[0].host}, which is older")
            self._add(local, sidecar, path, bind, number, protocol, fitting, imports)
        udp_by_port: dict[int, list[Service]] = {}
        for service in imported:
            for port in service.udp_ports:
                udp_by_port.setdefault(port.number, []).append(service)
        for number, services in sorted(udp_by_port.items()):
            taken = self._listeners.by_name.get(Bind.of(written, number, _LOOPBACK, is_udp=True).name)
            if taken is None or taken.workload_id != local.workload.id:
                self._add_udp(local, sidecar, path, written, number, services)

    def _add_udp(
        self,
        local: LocalWorkload,
        sidecar: Resource,
        path: str,
        written: str,
        number: int,
        services: Sequence[Service],
    ) -> None:
        """Nothing in a datagram tells services apart, so the first is the one. VirtualServices have no say: their tcp
        routes are for TCP."""
        workload = local.workload
        bind = Bind.of(written, number, _LOOPBACK, is_udp=True)
        if not self._listeners.is_free(bind, workload.id, sidecar, path):
            return
        routes: tuple[TcpRoute, ...] = ()
        if services:
            key = self._clusters.key(services[0], number, "", workload.id, is_udp=True)
            assert key is not None, "the caller chose services that have the port"
            routes = (TcpRoute(clusters=(WeightedCluster(cluster_key=key),)),)
        if len(services) > 1:
            others = ", ".join(other.host for other in services[1:4])
            message = f"{bind} is UDP, where nothing tells {services[0].host} from {others}"
            self._findings.warn(sidecar, f"{path}.hosts", message, f"all datagrams go to {services[0].host}")
        self._listeners.add(
            Listener(
                name=bind.name,
                address=bind.address,
                port=bind.port,
                direction=Direction.OUTBOUND,
                workload_id=workload.id,
                protocol=Protocol.UDP,
                tcp_routes=routes,
                idle_timeout_s=None,
                source=sidecar.source,
            )
        )

    def _add(
        self,
        local: LocalWorkload,
        sidecar: Resource,
        path: str,
        bind: Bind,
        number: int,
        protocol: Protocol,
        services: Sequence[Service],
        imports: Imports,
    ) -> None:
        workload = local.workload
        if not self._listeners.is_free(bind, workload.id, sidecar, path):
            return
        is_http = protocol.is_http or protocol is Protocol.AUTO
        hosts = self._virtual_hosts(local, number, services, imports) if is_http else None
        tcp_routes: tuple[TcpRoute, ...] = ()
        if not protocol.is_http:
            fallback = [s for s in services if protocol is not Protocol.AUTO or not _protocol(s, number).is_http]
            tcp_routes = self._tcp_routes(local, sidecar, path, bind, number, protocol, fallback, imports)
        listener = Listener(
            name=bind.name,
            address=bind.address,
            port=bind.port,
            direction=Direction.OUTBOUND,
            workload_id=workload.id,
            protocol=protocol,
            route_table=bind.name if hosts is not None else None,
            tcp_routes=tcp_routes,
            idle_timeout_s=self._listeners.idle_timeout_s,
            source=sidecar.source,
        )
        self._listeners.add(listener, hosts.table(bind.name) if hosts is not None else None)

    def _virtual_hosts(
        self, local: LocalWorkload, number: int, services: Sequence[Service], imports: Imports
    ) -> VirtualHosts:
        """By service, then for hosts that only VirtualServices know."""
        workload, namespace = local.workload, local.workload.namespace
        hosts = VirtualHosts()
        scope = Scope(workload, number, MESH)
        for service in services:
            port = number or (service.ports[0].number if service.ports else 0)
            if service.port(port) is None:
                continue
            speaker = self._virtual_services.in_mesh(service.host, namespace, imports)
            routes = (
                self._routes.http(speaker, Scope(workload, port, MESH))
                if speaker is not None and speaker.resource.spec.get("http")
                else self._routes.to_service(service, port, workload)
            )
            names = domains(service.host, namespace, number, service.addresses)
            hosts.add(VirtualHost(name=f"{service.host}:{port}", domains=names, routes=routes))
        for host in self._virtual_services.hosts_in_mesh(namespace, imports):
            if hosts.has(host) or self._services.find(host, namespace) is not None:
                continue
            speaker = self._virtual_services.in_mesh(host, namespace, imports)
            if speaker is not None and speaker.resource.spec.get("http"):
                names = domains(host, namespace, number)
                hosts.add(VirtualHost(name=f"{host}:{number}", domains=names, routes=self._routes.http(speaker, scope)))
        mode = ((local.sidecar.spec if local.sidecar else {}).get("outboundTrafficPolicy") or {}).get("mode")
        if mode == "REGISTRY_ONLY":
            hosts.add(_BLOCK_ALL)
        # ALLOW_ANY lets other hosts through to where the client was going, which without captured traffic is
        # nowhere: they are answered 404 (flag NR).
        return hosts

    def _tcp_routes(
        self,
        local: LocalWorkload,
        sidecar: Resource,
        path: str,
        bind: Bind,
        number: int,
        protocol: Protocol,
        services: Sequence[Service],
        imports: Imports,
    ) -> tuple[TcpRoute, ...]:
        """Names of a TLS ClientHello tell services apart; bare TCP has nothing, so the first service is the one."""
        workload = local.workload
        scope = Scope(workload, number, MESH)
        found: list[TcpRoute] = []
        for service in services:
            speaker = self._virtual_services.in_mesh(service.host, workload.namespace, imports)
            routes: tuple[TcpRoute, ...] = ()
            if speaker is not None:
                routes = self._routes.tls(speaker, scope) if protocol in _TLS_PROTOCOLS else ()
                routes += self._routes.tcp(speaker, scope)
            found += [route for route in routes if route not in found]
            if not routes:
                found.append(self._to_service(service, number, workload.id, protocol, len(services) > 1))
            if protocol not in _TLS_PROTOCOLS and service is not services[-1]:
                others = ", ".join(other.host for other in services[1:4])
                message = f"{bind} is {protocol.value}, where nothing tells {service.host} from {others}"
                self._findings.warn(sidecar, f"{path}.hosts", message, f"all connections go to {service.host}")
                break
        return tuple(found)

    def _to_service(
        self, service: Service, number: int, workload_id: str, protocol: Protocol, is_one_of_many: bool
    ) -> TcpRoute:
        port = number or service.ports[0].number
        key = self._clusters.key(service, port, "", workload_id)
        assert key is not None, "the caller chose services that have the port"
        by_name = protocol in _TLS_PROTOCOLS and is_one_of_many
        return TcpRoute(
            clusters=(WeightedCluster(cluster_key=key),),
            sni_hosts=(service.host,) if by_name else (),
        )


def _protocol(service: Service, number: int) -> Protocol:
    port = service.port(number) or (service.ports[0] if service.ports else None)
    return port.protocol if port is not None else Protocol.TCP
