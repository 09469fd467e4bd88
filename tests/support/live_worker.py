"""A worker inside the test's own event loop, fed by messages: real sockets, no control process.

async with LiveWorker() as worker:
    port = worker.listen_http([("127.0.0.1", upstream_port)])
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from meshproxy.control import messages as m
from meshproxy.model.cluster import PLAINTEXT, Cluster, LbKind, LbPolicy, OutlierPolicy, Protocol, UpstreamTls
from meshproxy.model.endpoint import Endpoint, LocalityEndpoints
from meshproxy.model.listener import Direction, Listener, MtlsMode, TcpRoute
from meshproxy.model.route import Route, RouteTable, VirtualHost, WeightedCluster
from meshproxy.model.workload import Workload, WorkloadLabels
from meshproxy.telemetry.recorder import HTTP_LABELS, MESSAGE_LABELS, SEPARATOR, TCP_LABELS
from meshproxy.upstream.cluster_runtime import ClusterRuntime, EndpointRuntime
from meshproxy.worker.process import Worker


class LiveWorker:
    def __init__(self) -> None:
        self._version = 0
        self.applied: list[m.Applied] = []
        self._requests: Counter[str] = Counter()
        self._tcp: dict[str, tuple[int, ...]] = {}
        self._messages: dict[str, tuple[int, ...]] = {}

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        ours, self._control = socket.socketpair()
        self.worker = Worker(loop, ours)
        self.put(m.PutWorkload(self.workload("default/app")))
        return self

    async def __aexit__(self, *_: object) -> None:
        worker = self.worker
        for listener in list(worker.listeners):
            worker._close_listener(listener)
        for runtime in worker.retired:
            for connection in list(runtime.connections):
                connection.transport.abort()
        for workload in worker.workloads.values():
            for cluster in workload.clusters.values():
                cluster.remove()
                for endpoint in cluster.endpoints.values():
                    for connection in list(endpoint.connections):
                        connection.transport.abort()
        worker.stopped.cancel()
        worker.channel.close()
        self._control.close()
        worker.timer.cancel()
        for _ in range(5):
            await asyncio.sleep(0)

    def pooled(self) -> int:
        """Idle upstream connections that could serve another request."""
        return sum(len(pool.idle) for endpoint in self.endpoints() for pool in (endpoint, *endpoint.shares.values()))

    def open_upstreams(self) -> int:
        """Upstream connections, idle or busy."""
        return sum(len(endpoint.connections) for endpoint in self.endpoints())

    def open_downstreams(self) -> int:
        return sum(len(listener.runtime.connections) for listener in self.worker.listeners.values())

    def buffered(self) -> int:
        """Bytes that wait in the worker to be written, either way."""
        transports = [
            connection.transport
            for holder in (*(listener.runtime for listener in self.worker.listeners.values()), *self.endpoints())
            for connection in holder.connections
        ]
        return sum(transport.get_write_buffer_size() for transport in transports if not transport.is_closing())

    def requests(self, **labels: str) -> int:
        """Requests that metrics tell of, in all series with these labels."""
        self._flush()
        return sum(count for key, count in self._requests.items() if _has(HTTP_LABELS, key, labels))

    def tcp(self, **labels: str) -> tuple[int, ...]:
        """(opened, closed, sent bytes, received bytes) of all TCP series with these labels."""
        self._flush()
        rows = [values for key, values in self._tcp.items() if _has(TCP_LABELS, key, labels)]
        return tuple(map(sum, zip((0, 0, 0, 0), *rows, strict=True)))

    def reports(self) -> list[tuple[str, str, int]]:
        """(cluster key, endpoint key, code) of each outcome from now on, as the outlier detector would hear of it."""
        heard: list[tuple[str, str, int]] = []
        self.worker.state.send_results = heard.extend
        return heard

    def messages(self, **labels: str) -> tuple[int, ...]:
        """(received, sent) gRPC messages of all series with these labels."""
        self._flush()
        rows = [values for key, values in self._messages.items() if _has(MESSAGE_LABELS, key, labels)]
        return tuple(map(sum, zip((0, 0), *rows, strict=True)))

    def _flush(self) -> None:
        flush = self.worker.state.recorder.flush()
        for key, *counts in flush.messages:
            self._messages[key] = tuple(map(sum, zip(self._messages.get(key, (0, 0)), counts, strict=True)))
        for row in flush.http:
            self._requests[row[0]] += sum(row[1])
        for key, *values in flush.tcp:
            self._tcp[key] = tuple(map(sum, zip(self._tcp.get(key, (0, 0, 0, 0)), values, strict=True)))

    def endpoints(self) -> list[EndpointRuntime]:
        """Of all workloads and clusters."""
        return [endpoint for cluster in self.clusters() for endpoint in cluster.endpoints.values()]

    def clusters(self) -> list[ClusterRuntime]:
        return [cluster for workload in self.worker.workloads.values() for cluster in workload.clusters.values()]

    @staticmethod
    def workload(id: str, service_account: str = "default", **labels: str) -> Workload:
        namespace, name = id.split("/")
        return Workload(
            id=id,
            name=name,
            namespace=namespace,
            service_account=service_account,
            labels=labels,
            metric_labels=WorkloadLabels(workload=name, namespace=namespace, app=name),
        )

    def put(self, *messages: object, sockets: Sequence[socket.socket] = ()) -> None:
        """One snapshot made of these messages."""
        self._version += 1
        version = str(self._version)
        self.worker.on_message(m.Begin(version), None)
        queue = list(sockets)
        for message in messages:
            descriptor = queue.pop(0).detach() if isinstance(message, m.PutListener) else None
            self.worker.on_message(message, descriptor)
        self.worker.on_message(m.Commit(version), None)

    def cluster(self, upstreams: Sequence[tuple[str, int]], name: str = "outbound|80||a.example", **fields: Any) -> str:
        """Put a cluster of these endpoints (or of `localities`); returns its key."""
        fields.setdefault("lb", LbPolicy(kind=LbKind.ROUND_ROBIN))
        fields.setdefault("outlier", OutlierPolicy())
        tls: UpstreamTls = fields.pop("tls", PLAINTEXT)
        endpoint_fields = fields.pop("endpoint", {})
        localities: tuple[LocalityEndpoints, ...] = fields.pop("localities", ())
        endpoints = tuple(Endpoint(address=host, port=port, **endpoint_fields) for host, port in upstreams)
        cluster = Cluster(
            name=name,
            key=name,
            service_host="a.example",
            service_name="a",
            service_namespace="default",
            port=80,
            tls=tls,
            **fields,
        )
        localities = localities or (LocalityEndpoints(endpoints=endpoints),)
        self.put(m.PutCluster(cluster), m.PutEndpoints(name, localities))
        return name

    def listen(
        self,
        cluster_key: str,
        *,
        routes: tuple[Route, ...] | None = None,
        direction: Direction = Direction.OUTBOUND,
        protocol: Protocol = Protocol.HTTP,
        mtls: MtlsMode = MtlsMode.DISABLE,
        workload_id: str = "default/app",
        **fields: Any,
    ) -> int:
        """Put a listener on a free port that sends everything to the cluster (or by `routes`); returns the port."""
        sock = socket.create_server(("127.0.0.1", 0), backlog=256)
        port: int = sock.getsockname()[1]
        weighted = (WeightedCluster(cluster_key=cluster_key),)
        table = RouteTable(
            name=f"table-{port}",
            virtual_hosts=(VirtualHost(name="all", domains=("*",), routes=routes or (Route(clusters=weighted),)),),
        )
        listener = Listener(
            name=f"127.0.0.1_{port}",
            address="127.0.0.1",
            port=port,
            direction=direction,
            workload_id=workload_id,
            protocol=protocol,
            mtls=mtls,
            route_table=table.name if protocol is not Protocol.TCP else None,
            tcp_routes=fields.pop("tcp_routes", (TcpRoute(clusters=weighted),) if not protocol.is_http else ()),
            **fields,
        )
        self.put(m.PutRouteTable(table), m.PutListener(listener), sockets=[sock])
        return port

    def listen_quic(
        self, cluster_key: str, host: str = "127.0.0.1", *, routes: tuple[Route, ...] | None = None, **fields: Any
    ) -> int:
        """Put a QUIC listener on a free port (or `port`) that sends everything to the cluster; returns the port."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, fields.pop("port", 0)))
        port: int = sock.getsockname()[1]
        weighted = (WeightedCluster(cluster_key=cluster_key),)
        table = RouteTable(
            name=f"table-{port}_quic",
            virtual_hosts=(VirtualHost(name="all", domains=("*",), routes=routes or (Route(clusters=weighted),)),),
        )
        listener = Listener(
            **{
                "name": f"{host}_{port}_quic",
                "address": host,
                "port": port,
                "direction": Direction.GATEWAY,
                "workload_id": "default/app",
                "protocol": Protocol.HTTP,
                "route_table": table.name,
                "is_quic": True,
                **fields,
            }
        )
        self.put(m.PutRouteTable(table), m.PutListener(listener), sockets=[sock])
        return port

    def listen_udp(
        self,
        cluster_key: str | None,
        host: str = "127.0.0.1",
        *,
        direction: Direction = Direction.OUTBOUND,
        **fields: Any,
    ) -> int:
        """As listen, for datagrams; cluster_key None: nothing is configured for them."""
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        port: int = fields.pop("port", 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        port = sock.getsockname()[1]
        self.put(
            m.PutListener(
                Listener(
                    name=f"{host}_{port}_udp",
                    address=host,
                    port=port,
                    direction=direction,
                    workload_id="default/app",
                    protocol=Protocol.UDP,
                    tcp_routes=(TcpRoute(clusters=(WeightedCluster(cluster_key=cluster_key),)),) if cluster_key else (),
                    **fields,
                )
            ),
            sockets=[sock],
        )
        return port


def _has(names: Sequence[str], key: str, labels: Mapping[str, str]) -> bool:
    values = dict(zip(names, key.split(SEPARATOR), strict=True))
    return labels.items() <= values.items()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something that happens on this loop and that nobody announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - nothing sets an event
            await asyncio.sleep(0.005)


async def exchange(port: int, data: bytes, *, ends: bool = True, timeout_s: float = 5.0) -> bytes:
    """Send bytes, end our half, and give everything that comes back until the connection closes (reset counts)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if ends:
            writer.write_eof()
        return await asyncio.wait_for(_read_all(reader), timeout_s)
    finally:
        writer.close()


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    received = b""
    while True:
        try:
            piece = await reader.read(65536)
        except ConnectionError:
            return received
        if not piece:
            return received
        received += piece
