"""Ingress listeners of a workload's Sidecar → listeners, their one route, and the cluster that is the workload itself.

Source: Istio Sidecar ingress; istio pilot/pkg/networking/core/listener_inbound.go, cluster inbound.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from meshproxy.model.cluster import Cluster, Protocol
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints
from meshproxy.model.listener import Direction, Listener, MtlsMode, TcpRoute
from meshproxy.model.route import RetryPolicy, Route, RouteTable, VirtualHost, WeightedCluster
from meshproxy.resources.document import Resource
from meshproxy.snapshot.clusters import OutboundClusters, OwnPort
from meshproxy.snapshot.destination_rules import Setting
from meshproxy.snapshot.findings import Findings
from meshproxy.snapshot.hosts import service_fqdn
from meshproxy.snapshot.listeners import Bind, Listeners
from meshproxy.snapshot.peer_authentication import PeerAuthentications
from meshproxy.snapshot.protocols import declared_protocol
from meshproxy.snapshot.services import Service
from meshproxy.snapshot.traffic_policy import pool_settings
from meshproxy.snapshot.workload_names import spiffe_uri
from meshproxy.snapshot.workloads import LocalWorkload

_ANY = frozenset({"0.0.0.0", "::"})
# Istio's inbound default: a request that a dying keep-alive connection never took is safe to send again.
_INBOUND_RETRY = RetryPolicy(attempts=2, on=frozenset({"reset-before-request"}))
_GRPC = frozenset({Protocol.GRPC, Protocol.GRPC_WEB})


@dataclass(frozen=True, slots=True)
class Ingress:
    """One ingress listener, its address settled."""

    local: LocalWorkload
    sidecar: Resource
    path: str
    bind: Bind
    port: int
    """The workload's port: what PeerAuthentication and the cluster's name call it."""
    protocol: Protocol
    target: Bind
    mtls: MtlsMode
    pool: Mapping[str, Any] | None


class Inbound:
    """Settles ingress listeners first, so that clusters know which endpoints are this process itself."""

    def __init__(
        self,
        workloads: Iterable[LocalWorkload],
        peer_authentications: PeerAuthentications,
        listeners: Listeners,
        findings: Findings,
    ) -> None:
        self._peer_authentications = peer_authentications
        self._listeners = listeners
        self._findings = findings
        locals_ = list(workloads)
        self._ingresses: list[Ingress] = []
        taken: dict[str, Ingress] = {}
        for local in locals_:
            for ingress in self._settled(local, len(locals_) > 1):
                first = taken.setdefault(ingress.bind.name, ingress)
                if first is ingress:
                    self._ingresses.append(ingress)
                    continue
                asker, owner = ingress.local.workload.id, first.local.workload.id
                message = f"{asker} asks for {ingress.bind}, where {owner} listens already"
                action = "the first listener keeps it; give each workload a Sidecar with its own bind or port"
                report = findings.warn if ingress.sidecar is first.sidecar else findings.error
                report(ingress.sidecar, ingress.path, message, action)

    def own_ports(self) -> dict[tuple[str, int, bool], OwnPort]:
        """(address, port, whether it is UDP) → the workload that other workloads meet there."""
        found: dict[tuple[str, int, bool], OwnPort] = {}
        for ingress in self._ingresses:
            local, bind = ingress.local, ingress.bind
            workload = local.workload
            identity = spiffe_uri(workload.trust_domain, workload.namespace, workload.service_account)
            own = OwnPort(identity, ingress.mtls is not MtlsMode.DISABLE, workload.metric_labels)
            addresses = [local.address, "127.0.0.1", "::1"] if bind.address in _ANY else [bind.address]
            for address in addresses:
                if address:
                    found.setdefault((address, bind.port, bind.is_udp), own)
        return found

    def add(self, services: Iterable[Service], clusters: OutboundClusters) -> None:
        by_instance: dict[tuple[str, int, bool], Service] = {}
        addresses = {ingress.local.address for ingress in self._ingresses} - {""}
        for service in services if addresses else ():
            for instance in service.instances:
                if instance.address in addresses:
                    for port in (*service.ports, *service.udp_ports):
                        number = instance.port_for(port)
                        if number is not None:
                            is_udp = port.protocol is Protocol.UDP
                            by_instance.setdefault((instance.address, number, is_udp), service)
        for ingress in self._ingresses:
            cluster = self._cluster(
                ingress, by_instance.get((ingress.local.address, ingress.port, ingress.bind.is_udp))
            )
            clusters.add(cluster)
            self._add_listener(ingress, cluster.key)

    def _settled(self, local: LocalWorkload, is_shared: bool) -> Iterable[Ingress]:
        sidecar = local.sidecar
        if sidecar is None:
            return
        workload = local.workload
        # Several workloads behind one process each have their own address, if they say one; 0.0.0.0 would be taken
        # by the first of them.
        default_bind = local.address if is_shared and local.address else "0.0.0.0"
        for index, spec in enumerate(sidecar.spec.get("ingress") or ()):
            path = f"spec.ingress[{index}]"
            if spec.get("captureMode") == "IPTABLES":
                message = "captured traffic is not supported by this version"
                self._findings.warn(sidecar, f"{path}.captureMode", message, "this listener is left out")
                continue
            port = spec["port"]
            number = port["number"]
            protocol = declared_protocol(number, port.get("protocol") or "", port.get("name") or "")
            is_udp = protocol is Protocol.UDP
            bind = Bind.of(spec.get("bind") or "", number, default_bind, is_udp=is_udp)
            if not self._listeners.can_bind(bind, sidecar, f"{path}.bind"):
                continue
            target = _target(spec.get("defaultEndpoint") or "", number, local.address)
            if target.is_abstract:
                message = f"{target} is an abstract unix socket, which this version does not connect to"
                self._findings.error(sidecar, f"{path}.defaultEndpoint", message, "this listener is left out")
                continue
            if target.is_unix and is_udp:
                message = f"{target} is a unix socket, where datagrams are not sent"
                self._findings.error(sidecar, f"{path}.defaultEndpoint", message, "this listener is left out")
                continue
            if (
                not target.is_unix
                and target.port == bind.port
                and (bind.address in _ANY or bind.address == target.address)
            ):
                message = f"the workload is said to listen on {target}, which {bind} itself takes"
                action = "this listener is left out; give defaultEndpoint another port, or bind another address"
                self._findings.error(sidecar, f"{path}.defaultEndpoint", message, action)
                continue
            yield Ingress(
                local=local,
                sidecar=sidecar,
                path=path,
                bind=bind,
                port=number,
                protocol=protocol,
                target=target,
                mtls=self._peer_authentications.mode(workload.namespace, workload.labels, number, is_local=True),
                pool=spec.get("connectionPool") or sidecar.spec.get("inboundConnectionPool"),
            )

    def _cluster(self, ingress: Ingress, service: Service | None) -> Cluster:
        workload = ingress.local.workload
        name = f"inbound|{ingress.port}{'/udp' if ingress.bind.is_udp else ''}||"
        endpoint = Endpoint(address=ingress.target.address, port=ingress.target.port, workload=workload.metric_labels)
        pool = Setting(ingress.pool, ingress.sidecar, ingress.path) if ingress.pool else None
        fallback = workload.metric_labels.canonical_service
        return Cluster(
            name=name,
            # Each workload has an inbound cluster of its own, whatever other workloads of this process have.
            key=f"{name}@{workload.id}",
            service_host=service.host if service else service_fqdn(fallback, workload.namespace),
            service_name=service.name if service else fallback,
            service_namespace=service.namespace if service else workload.namespace,
            port=ingress.port,
            protocol=ingress.protocol,
            localities=(LocalityEndpoints(locality=ingress.local.locality, endpoints=(endpoint,)),),
            source=ingress.sidecar.source,
            **pool_settings(pool, None, ingress.protocol),
        )

    def _add_listener(self, ingress: Ingress, cluster_key: str) -> None:
        bind, protocol = ingress.bind, ingress.protocol
        target = (WeightedCluster(cluster_key=cluster_key),)
        table = None
        if protocol.is_http or protocol is Protocol.AUTO:
            name = f"inbound|http|{ingress.port}"
            route = Route(
                clusters=target, retry=None if protocol in _GRPC else _INBOUND_RETRY, source=ingress.sidecar.source
            )
            host = VirtualHost(name=name, domains=("*",), routes=(route,))
            table = RouteTable(name=bind.name, virtual_hosts=(host,))
        self._listeners.add(
            Listener(
                name=bind.name,
                address=bind.address,
                port=bind.port,
                direction=Direction.INBOUND,
                workload_id=ingress.local.workload.id,
                protocol=protocol,
                mtls=ingress.mtls,
                route_table=table.name if table is not None else None,
                tcp_routes=() if protocol.is_http else (TcpRoute(clusters=target),),
                idle_timeout_s=None if bind.is_udp else self._listeners.idle_timeout_s,
                source=ingress.sidecar.source,
            ),
            table,
        )


def _target(written: str, port: int, own_address: str) -> Bind:
    """defaultEndpoint. 0.0.0.0 and `[::]` mean the workload's own address; nothing means its loopback, same port."""
    if not written:
        return Bind("127.0.0.1", port)
    if written.startswith("unix://"):
        return Bind.of(written, 0, "")
    host, _, number = written.rpartition(":")
    host = host.strip("[]")
    if host in ("", "0.0.0.0", "::"):
        host = own_address or ("::1" if host == "::" else "127.0.0.1")
    return Bind(host, int(number))
