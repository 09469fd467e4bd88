"""QUIC beside TCP in real processes: bound by control, served by workers, absent unless it is asked for."""

import asyncio
import os
import signal
import socket
import ssl
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.http3_client import Http3Client, Listening, get
from tests.support.live_worker import until
from tests.support.origin import Origin
from tests.support.proxy_process import PATIENCE_S, ProxyProcess, free_port
from tests.support.raw_server import RawServer

AUTHORITY = Authority()
MODULES = ("aioquic", "cryptography", "OpenSSL")


def mesh(directory: Path, port: int, upstream_port: int) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata:
  name: edge
spec:
  selector: {{app: edge}}
  servers:
  - port: {{number: {port}, name: https, protocol: HTTPS}}
    bind: 127.0.0.1
    hosts: ["*"]
    tls:
      mode: SIMPLE
      serverCertificate: {directory}/cert-chain.pem
      privateKey: {directory}/key.pem
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata:
  name: a
spec:
  hosts: [a.example]
  resolution: STATIC
  ports:
  - {{number: 80, name: http, protocol: HTTP}}
  endpoints:
  - {{address: 127.0.0.1, ports: {{http: {upstream_port}}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata:
  name: a
spec:
  hosts: [a.example]
  gateways: [edge]
  http:
  - route:
    - destination: {{host: a.example, port: {{number: 80}}}}
"""


def write(tmp_path: Path, upstream_port: int) -> int:
    """The configuration; returns the gateway's port."""
    port = free_port()
    AUTHORITY.leaf(dns_names=["a.example"]).write(tmp_path / "certs")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mesh.yaml").write_text(mesh(tmp_path / "certs", port, upstream_port))
    return port


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def over_tcp(port: int, protocol: str) -> str:
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.set_alpn_protocols([protocol])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as tcp,
        context.wrap_socket(tcp, server_hostname="a.example") as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
        return tls.recv(65536).decode()


async def test_a_gateway_serves_http3_beside_https_from_every_worker(tmp_path: Path) -> None:
    async with Origin() as origin:
        port = write(tmp_path, origin.port)
        with ProxyProcess(
            tmp_path, "--http3", "on", "--labels", "app=edge", "--workers", "2", module="meshproxy"
        ) as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            # Over TCP, clients learn that there is QUIC.
            assert f'alt-svc: h3=":{port}"; ma=86400' in await asyncio.to_thread(over_tcp, port, "http/1.1")
            slots = set()
            for _ in range(16):
                async with Http3Client.to(port, AUTHORITY.pem) as client:
                    assert (await client.request(get("/"))).body == b"ok"
                    slots.add(client._quic._peer_cid.cid[0])
                    # From another address: the kernel would choose by it, the connection id says otherwise.
                    await client.move()
                    assert (await client.request(get("/"))).body == b"ok"
            assert slots == {0, 1}


async def test_after_a_worker_is_killed_its_clients_learn_it_at_once_and_the_next_are_served(tmp_path: Path) -> None:
    async with Origin() as origin:
        port = write(tmp_path, origin.port)
        with ProxyProcess(tmp_path, "--http3", "on", "--labels", "app=edge", module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            async with Listening.to(port, AUTHORITY.pem) as client:
                assert (await client.request(get("/"))).body == b"ok"
                os.kill(proxy.children()["mesh-worker-0"], signal.SIGKILL)
                client.send(get("/"))  # waits in the socket, which outlives the worker
                token = client._quic._peer_cid.stateless_reset_token
                await until(lambda: client.received[-1][-16:] == token, 10)
            async with Http3Client.to(port, AUTHORITY.pem) as client:
                assert (await client.request(get("/"))).body == b"ok"


async def test_a_proxy_that_ends_serves_what_is_under_way_and_takes_no_new_connection(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    async with RawServer(slow) as upstream:
        port = write(tmp_path, upstream.port)
        log = tmp_path / "access.log"
        with ProxyProcess(
            tmp_path, "--http3", "on", "--labels", "app=edge", "--access-log", str(log), module="meshproxy"
        ) as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            async with Http3Client.to(port, AUTHORITY.pem) as client:
                stream = client.send(get("/slow"))
                await until(lambda: upstream.connections == 1 and client.control_stream != b"")
                settings = client.control_stream
                proxy.process.send_signal(signal.SIGTERM)
                await client.until(lambda: client.control_stream.startswith(settings + b"\x07"))  # GOAWAY
                async with Http3Client.to(port, AUTHORITY.pem) as late:
                    assert (await late.refusal()).error_code == 0x2  # CONNECTION_REFUSED
                go.set()
                assert (await client.answer(stream)).body == b"ok"
                assert (await client.refusal()).error_code == 0x100
            assert await asyncio.to_thread(proxy.wait_for_end) == 0
        line = log.read_text()
        assert '"GET /slow HTTP/3" 200 - via_upstream' in line
        assert f" 127.0.0.1:{port} " in line


async def test_without_the_flag_no_worker_loads_quic_and_no_udp_port_is_bound(tmp_path: Path) -> None:
    async with Origin() as origin:
        port = write(tmp_path, origin.port)
        with ProxyProcess(tmp_path, "--labels", "app=edge", module="meshproxy") as proxy:
            await asyncio.to_thread(proxy.wait_for, "ready: ")
            worker = proxy.children()["mesh-worker-0"]
            assert not [name for name in MODULES if f"/{name}/" in mapped(worker)]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(("127.0.0.1", port))
