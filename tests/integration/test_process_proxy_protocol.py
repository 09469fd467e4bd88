"""From a load balancer through the whole proxy to a server that both speak the PROXY protocol, as resources say it."""

import asyncio
from pathlib import Path

from tests.support.client import Client, get
from tests.support.other_proxies import haproxy
from tests.support.proxy_process import ProxyProcess, free_port


def edge(port: int, upstream_port: int) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata:
  name: edge
  annotations:
    proxy.istio.io/config: |
      gatewayTopology:
        proxyProtocol: {{}}
spec:
  selector: {{istio: edge}}
  servers:
  - port: {{number: {port}, protocol: HTTP, name: http}}
    bind: 127.0.0.1
    hosts: ["*"]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: a}}
spec:
  hosts: [a.example]
  gateways: [edge]
  http:
  - route: [{{destination: {{host: a.example}}}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: a}}
spec:
  hosts: [a.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {upstream_port}}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: a}}
spec:
  host: a.example
  trafficPolicy:
    proxyProtocol: {{version: V2}}
    connectionPool: {{http: {{useClientProtocol: true}}}}
"""


BEHIND = """
listen all
  mode http
  bind 127.0.0.1:{port} accept-proxy
  http-request return status 200 content-type text/plain lf-string %[src]:%[src_port]
"""


async def test_the_address_of_the_client_goes_all_the_way(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    port = free_port()
    front = f"listen all\n  mode tcp\n  bind 127.0.0.1:{{port}}\n  server us 127.0.0.1:{port} send-proxy-v2"
    async with haproxy(BEHIND) as behind:
        (tmp_path / "conf" / "edge.yaml").write_text(edge(port, behind))
        with ProxyProcess(tmp_path, "--labels", "istio=edge", module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            async with haproxy(front) as before, Client(before) as client:
                host, number = client.writer.get_extra_info("sockname")
                for _ in range(2):
                    assert (await client.ask(get())).body == f"{host}:{number}".encode()
            assert not [line for line in proxy.lines if "WARNING" in line]
