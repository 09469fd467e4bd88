"""HTTP/3 between two gateways, from configuration files to the answer, in real processes."""

import asyncio
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.client import Client, get
from tests.support.origin import Origin
from tests.support.proxy_process import ProxyProcess, free_port

AUTHORITY = Authority()


def mesh(directory: Path, front: int, edge: int, origin: int, offers: str) -> str:
    """The gateway `front` takes HTTP and goes on to the gateway `edge`, which takes HTTPS, by TCP and QUIC."""
    return f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: front}}
spec:
  selector: {{app: edge}}
  servers:
  - {{port: {{number: {front}, name: http, protocol: HTTP}}, bind: 127.0.0.1, hosts: ["*"]}}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: edge}}
spec:
  selector: {{app: edge}}
  servers:
  - port: {{number: {edge}, name: https, protocol: HTTPS}}
    bind: 127.0.0.1
    hosts: ["*"]
    tls: {{mode: SIMPLE, serverCertificate: {directory}/cert-chain.pem, privateKey: {directory}/key.pem}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: edge}}
spec:
  hosts: [edge.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 443, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {edge}}}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: edge, annotations: {{meshproxy.io/http3: "{offers}"}}}}
spec:
  host: edge.example
  trafficPolicy: {{tls: {{mode: SIMPLE, sni: a.example, caCertificates: {directory}/root-cert.pem}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: a}}
spec:
  hosts: [a.example]
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: 127.0.0.1, ports: {{http: {origin}}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: front}}
spec:
  hosts: ["*"]
  gateways: [front]
  http: [{{route: [{{destination: {{host: edge.example, port: {{number: 443}}}}}}]}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: edge}}
spec:
  hosts: ["*"]
  gateways: [edge]
  http: [{{route: [{{destination: {{host: a.example, port: {{number: 80}}}}}}]}}]
"""


async def answers(tmp_path: Path, offers: str, *flags: str) -> list[bytes | None]:
    """What ten answers say of HTTP/3: those that came over TCP say where it is to be had."""
    front, edge = free_port(), free_port()
    AUTHORITY.leaf(dns_names=["a.example"]).write(tmp_path / "certs")
    (tmp_path / "conf").mkdir()
    async with Origin() as origin:
        (tmp_path / "conf" / "mesh.yaml").write_text(mesh(tmp_path / "certs", front, edge, origin.port, offers))
        with ProxyProcess(tmp_path, *flags, "--labels", "app=edge", module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            found = []
            async with Client(front) as client:
                for _ in range(10):
                    client.send(get())
                    response = await client.answer()
                    assert (response.status, response.body) == (200, b"ok")
                    found.append(response.header(b"alt-svc"))
            return found


async def test_what_an_annotation_offers_is_used(tmp_path: Path) -> None:
    assert await answers(tmp_path, "true", "--http3", "on") == [None] * 10


async def test_what_nothing_offers_is_not(tmp_path: Path) -> None:
    assert None not in await answers(tmp_path, "false", "--http3", "on")


async def test_a_gateway_without_quic_is_reached_by_tcp(tmp_path: Path) -> None:
    assert await answers(tmp_path, "true") == [None] * 10
