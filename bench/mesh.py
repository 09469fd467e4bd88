"""meshproxy with one worker, configured with Istio's own resources."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.certificates import Certificates
from bench.process import CHECKOUT, BenchError, Group, Workspace, http_get
from bench.services import LOCALITY, REGION, SPLIT, Service

PYTHON = os.environ.get("BENCH_PYTHON", sys.executable)
_NETWORKING = "networking.istio.io/v1"
_GATEWAY = "gateway"
HTTP3_GATEWAY = ("--http3", "on", "--labels", f"app={_GATEWAY}")
"""Flags with which `gateway_resources` are served over QUIC too."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """One running meshproxy. config: the file it watches."""

    group: Group
    port: int
    admin_port: int
    metrics_port: int
    config: Any

    def metric(self, name: str) -> float | None:
        """Largest value of a metric over its label sets; None when it is not exported."""
        text = http_get(self.metrics_port, "/stats/prometheus")[1].decode()
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(name) and line[len(name) : len(name) + 1] in ("{", " ")
        ]
        return max(values, default=None)


def outbound_resources(
    services: Sequence[Service],
    port: int,
    *,
    protocol: str = "HTTP",
    server_account: str | None = None,
    response_header: tuple[str, str] | None = None,
    inside: str = "h1",
) -> list[dict[str, Any]]:
    """A Sidecar egress listener on 127.0.0.1:port and, per service, its endpoints, policy and routes.

    server_account: the endpoints have proxies of that service account (auto-mTLS); response_header: set on every
    answer, so that a new configuration can be seen from outside; inside: h1 or, by h2UpgradePolicy, h2 upstream, or h3
    by annotation.
    """
    resources: list[dict[str, Any]] = [
        {
            "apiVersion": _NETWORKING,
            "kind": "Sidecar",
            "metadata": {"name": "bench", "namespace": "default"},
            "spec": {
                "egress": [
                    {
                        "port": {"number": port, "protocol": protocol, "name": protocol.lower()},
                        "bind": "127.0.0.1",
                        "captureMode": "NONE",
                        "hosts": ["./*"],
                    }
                ]
            },
        }
    ]
    for service in services:
        resources += _service(service, port, protocol, server_account, response_header, inside)
    return resources


def inbound_resources(port: int, origin_port: int, mtls_mode: str, protocol: str = "HTTP") -> list[dict[str, Any]]:
    """A Sidecar ingress listener in front of 127.0.0.1:origin_port."""
    return [
        {
            "apiVersion": _NETWORKING,
            "kind": "Sidecar",
            "metadata": {"name": "bench", "namespace": "default"},
            "spec": {
                "ingress": [
                    {
                        "port": {"number": port, "protocol": protocol, "name": protocol.lower()},
                        "bind": "127.0.0.1",
                        "captureMode": "NONE",
                        "defaultEndpoint": f"127.0.0.1:{origin_port}",
                    }
                ]
            },
        },
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "PeerAuthentication",
            "metadata": {"name": "bench", "namespace": "default"},
            "spec": {"mtls": {"mode": mtls_mode}},
        },
    ]


def gateway_resources(service: Service, port: int, home: Path, address: str = "127.0.0.1") -> list[dict[str, Any]]:
    """A Gateway on address:port with the certificate in `home`, in front of a service in HTTP/1.1."""
    gateway = {
        "apiVersion": _NETWORKING,
        "kind": "Gateway",
        "metadata": {"name": _GATEWAY, "namespace": "default"},
        "spec": {
            "selector": {"app": _GATEWAY},
            "servers": [
                {
                    "port": {"number": port, "name": "https", "protocol": "HTTPS"},
                    "bind": address,
                    "hosts": ["*"],
                    "tls": {
                        "mode": "SIMPLE",
                        "serverCertificate": str(home / "cert-chain.pem"),
                        "privateKey": str(home / "key.pem"),
                    },
                }
            ],
        },
    }
    resources = _service(service, 80, "HTTP", None, None, "h1")
    resources[-1]["spec"]["gateways"] = [_GATEWAY]
    return [gateway, *resources]


def _service(
    service: Service,
    port: int,
    protocol: str,
    server_account: str | None,
    response_header: tuple[str, str] | None,
    inside: str,
) -> list[dict[str, Any]]:
    name = service.host.replace(".", "-")
    metadata = {"name": name, "namespace": "default"}
    endpoints: list[dict[str, Any]] = []
    for place in service.endpoints:
        endpoint: dict[str, Any] = {
            "address": place.address,
            "ports": {protocol.lower(): place.port},
            "locality": f"{REGION}/{place.zone}/rack1",
        }
        if server_account is not None:
            endpoint["serviceAccount"] = server_account
            endpoint["labels"] = {"security.istio.io/tlsMode": "istio"}
        endpoints.append(endpoint)
    own_zone = LOCALITY.rsplit("/", 1)[0]
    resources: list[dict[str, Any]] = [
        {
            "apiVersion": _NETWORKING,
            "kind": "ServiceEntry",
            "metadata": metadata,
            "spec": {
                "hosts": [service.host],
                "location": "MESH_INTERNAL",
                "resolution": "STATIC",
                "ports": [{"number": port, "name": protocol.lower(), "protocol": protocol}],
                "endpoints": endpoints,
            },
        },
        {
            "apiVersion": _NETWORKING,
            "kind": "DestinationRule",
            "metadata": metadata,
            "spec": {
                "host": service.host,
                "trafficPolicy": {
                    "loadBalancer": {
                        "simple": "LEAST_REQUEST",
                        "localityLbSetting": {
                            "enabled": True,
                            "distribute": [
                                {
                                    "from": f"{own_zone}/*",
                                    "to": {f"{REGION}/{zone}/*": share for zone, share in SPLIT.items()},
                                }
                            ],
                        },
                    },
                    "outlierDetection": {"consecutive5xxErrors": 5, "interval": "10s"},
                },
            },
        },
    ]
    if inside == "h3":
        resources[-1]["metadata"] = {**metadata, "annotations": {"meshproxy.io/http3": "true"}}
    if inside == "h2":
        resources[-1]["spec"]["trafficPolicy"]["connectionPool"] = {"http": {"h2UpgradePolicy": "UPGRADE"}}
    if protocol not in ("HTTP", "GRPC"):
        return resources
    target = {"destination": {"host": service.host}}
    routes: list[dict[str, Any]] = [
        {"match": [{"headers": {"x-canary": {"exact": "1"}}}], "route": [target]},
        {"match": [{"uri": {"prefix": "/api/v1/"}}], "rewrite": {"uri": "/v1/"}, "route": [target]},
        {"route": [target]},
    ]
    if response_header is not None:
        routes[-1]["headers"] = {"response": {"set": dict([response_header])}}
    resources.append(
        {
            "apiVersion": _NETWORKING,
            "kind": "VirtualService",
            "metadata": metadata,
            "spec": {"hosts": [service.host], "http": routes},
        }
    )
    return resources


def render(resources: Sequence[dict[str, Any]]) -> str:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump_all(resources, Dumper=dumper, sort_keys=False)


def start(
    workspace: Workspace,
    port: int,
    resources: Sequence[dict[str, Any]],
    *,
    account: str = "default",
    certificates: Certificates | None = None,
    workers: int = 1,
    flags: Sequence[str] = (),
) -> Mesh:
    """Runs the checkout's meshproxy on these resources and waits until it is ready."""
    config = workspace.write(f"meshproxy-{port}/mesh.yaml", render(resources))
    admin, metrics, ready = workspace.port(), workspace.port(), workspace.port()
    command = [
        PYTHON, "-m", "meshproxy", "run", "-c", str(config), "--workers", str(workers),
        "--admin", f"127.0.0.1:{admin}", "--metrics", f"127.0.0.1:{metrics}", "--ready", f"127.0.0.1:{ready}",
        "--locality", LOCALITY, "--namespace", "default", "--service-account", account,
        *flags,
    ]  # fmt: skip
    if certificates is not None:
        command += ["--certs", str(certificates.directory)]
    if not (CHECKOUT / "meshproxy" / "cli" / "main.py").exists():
        raise BenchError("this checkout has no meshproxy/cli/main.py to run")
    group = workspace.start("meshproxy", command, workspace.pinning.proxies)
    workspace.wait_http(group, ready, "/healthz/ready", timeout_s=30.0)
    return Mesh(group, port, admin, metrics, config)
