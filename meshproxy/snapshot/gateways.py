"""Gateway servers → listeners and route tables.

Source: Istio Gateway; istio pilot/pkg/networking/core/gateway.go.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meshproxy.model.cluster import Protocol
from meshproxy.model.listener import Direction, Listener, ServerTls, ServerTlsMode, TcpRoute
from meshproxy.model.route import Redirect, Route, RouteTable, VirtualHost
from meshproxy.resources.document import Resource
from meshproxy.snapshot.gateway_topology import expects_proxy_header
from meshproxy.snapshot.hosts import domains, selects, specificity
from meshproxy.snapshot.listeners import Bind, Listeners, VirtualHosts
from meshproxy.snapshot.protocols import declared_protocol
from meshproxy.snapshot.routes import Routes, Scope
from meshproxy.snapshot.virtual_services import VirtualServices
from meshproxy.snapshot.workloads import LocalWorkload, ProcessIdentity, process_workload

_TO_HTTPS = (Route(name="https_redirect", redirect=Redirect(code=301, scheme="https")),)


class Gateways:
    """Gateways that select a workload of this process, else the process itself by the labels it was started with."""

    def __init__(
        self, gateways: Iterable[Resource], workloads: Sequence[LocalWorkload], process: ProcessIdentity
    ) -> None:
        self.workloads = list(workloads)
        """Those given, and the process's own where a Gateway needs it."""
        self._chosen: list[tuple[Resource, LocalWorkload]] = []
        for gateway in gateways:
            selector = gateway.spec.get("selector") or {}
            owner = next((local for local in self.workloads if selects(selector, local.workload.labels)), None)
            if owner is None and selects(selector, process.labels):
                own = process_workload(process)
                owner = next((local for local in self.workloads if local.workload.id == own.workload.id), None)
                if owner is None:
                    owner = own
                    self.workloads.append(own)
            if owner is not None:
                self._chosen.append((gateway, owner))

    def add(self, virtual_services: VirtualServices, routes: Routes, listeners: Listeners) -> None:
        builder = _Builder(virtual_services, routes, listeners)
        for gateway, local in self._chosen:
            for index, server in enumerate(gateway.spec.get("servers") or ()):
                builder.add(gateway, f"spec.servers[{index}]", server, local)
        builder.finish()


class _Builder:
    """Servers of one address share a listener where they speak alike: more hosts, the same TLS."""

    def __init__(self, virtual_services: VirtualServices, routes: Routes, listeners: Listeners) -> None:
        self._virtual_services = virtual_services
        self._routes = routes
        self._listeners = listeners
        self._hosts: dict[str, dict[str, tuple[Route, ...]]] = {}
        self._open: dict[str, tuple[Listener, int]] = {}

    def add(self, gateway: Resource, path: str, server: Mapping[str, Any], local: LocalWorkload) -> None:
        port = server["port"]
        number = port.get("number") or 0
        bind = Bind.of(server.get("bind") or "", number, "0.0.0.0")
        protocol = declared_protocol(number, port.get("protocol") or "", port.get("name") or "")
        if protocol is Protocol.UDP:
            message = "a gateway serves no UDP; sidecars do"
            self._listeners.findings.error(gateway, f"{path}.port.protocol", message, "this server is left out")
            return
        tls = server.get("tls") or {}
        server_tls = _server_tls(tls) if protocol in (Protocol.HTTPS, Protocol.TLS) else None
        # HTTPS that is terminated here is HTTP from then on, and TLS is TCP; PASSTHROUGH stays TLS.
        passes_through = server_tls is not None and server_tls.mode is ServerTlsMode.PASSTHROUGH
        if passes_through:
            protocol = Protocol.TLS
        elif protocol in (Protocol.HTTPS, Protocol.TLS):
            protocol = Protocol.HTTP if protocol is Protocol.HTTPS else Protocol.TCP
        is_http = protocol.is_http
        listener = self._listener(gateway, path, bind, protocol, server_tls, local)
        if listener is None:
            return
        scope = Scope(local.workload, number, f"{gateway.namespace}/{gateway.name}")
        bound = self._virtual_services.at_gateway(scope.gateway, gateway.namespace, server.get("hosts") or ())
        if is_http:
            table = self._hosts.setdefault(bind.name, {})
            if tls.get("httpsRedirect"):
                for written in server.get("hosts") or ():
                    table.setdefault(written.rpartition("/")[2].lower(), _TO_HTTPS)
                return
            for host, speakers in bound.items():
                found = [route for speaker in speakers for route in self._routes.http(speaker, scope)]
                if found and table.get(host) is not _TO_HTTPS:
                    table[host] = (*table.get(host, ()), *found)
            return
        found_tcp: list[TcpRoute] = list(listener.tcp_routes)
        for host in sorted(bound, key=specificity, reverse=True):
            for speaker in bound[host]:
                of_speaker = self._routes.tls(speaker, scope) if passes_through else self._routes.tcp(speaker, scope)
                found_tcp += [route for route in of_speaker if route not in found_tcp]
        self._listeners.add(replace(listener, tcp_routes=tuple(found_tcp)))

    def finish(self) -> None:
        """The route tables, once every server has said its hosts."""
        for name, (listener, number) in self._open.items():
            if listener.route_table is None:
                continue
            hosts = VirtualHosts()
            for host, routes in self._hosts.get(name, {}).items():
                hosts.add(VirtualHost(name=f"{host}:{number}", domains=domains(host, "", number), routes=routes))
            self._listeners.route_tables[name] = hosts.table(name)

    def _listener(
        self,
        gateway: Resource,
        path: str,
        bind: Bind,
        protocol: Protocol,
        tls: ServerTls | None,
        local: LocalWorkload,
    ) -> Listener | None:
        """The listener of that address, opened if it is not; None where it is taken by something else."""
        is_proxied = expects_proxy_header(gateway, self._listeners.findings)
        opened = self._open.get(bind.name)
        if opened is not None:
            listener = self._listeners.by_name[bind.name]
            known = (listener.workload_id, listener.protocol, listener.tls, listener.expects_proxy_header)
            if known != (local.workload.id, protocol, tls, is_proxied):
                message = f"{bind} has a server with another protocol, tls or workload already (from {listener.source})"
                if listener.expects_proxy_header is not is_proxied:
                    expects = "expects" if listener.expects_proxy_header else "does not expect"
                    message = f"{bind} has a server that {expects} PROXY headers already (from {listener.source})"
                action = "the first server keeps it; give this one another port"
                self._listeners.findings.error(gateway, path, message, action)
                return None
            return listener
        if not self._listeners.is_free(bind, local.workload.id, gateway, path):
            return None
        listener = Listener(
            name=bind.name,
            address=bind.address,
            port=bind.port,
            direction=Direction.GATEWAY,
            workload_id=local.workload.id,
            protocol=protocol,
            tls=tls,
            route_table=bind.name if protocol.is_http else None,
            idle_timeout_s=self._listeners.idle_timeout_s,
            expects_proxy_header=is_proxied,
            source=gateway.source,
        )
        empty = RouteTable(name=bind.name, virtual_hosts=()) if protocol.is_http else None
        self._listeners.add(listener, empty)
        self._open[bind.name] = (listener, bind.port)
        return listener


def _server_tls(tls: Mapping[str, Any]) -> ServerTls:
    lowest = tls.get("minProtocolVersion") or "TLS_AUTO"
    return ServerTls(
        mode=ServerTlsMode(tls.get("mode") or "PASSTHROUGH"),
        certificate_file=tls.get("serverCertificate"),
        key_file=tls.get("privateKey"),
        ca_file=tls.get("caCertificates"),
        subject_alt_names=tuple(tls.get("subjectAltNames") or ()),
        min_version="TLSV1_3" if lowest == "TLSV1_3" else "TLSV1_2",
    )
