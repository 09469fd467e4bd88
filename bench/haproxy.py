"""HAProxy with one thread: the same routes, weights, connection reuse and error observation."""

import shutil
from collections.abc import Sequence

from bench.process import BenchError, Group, Workspace
from bench.services import SPLIT, Service

_GLOBAL = """global
  nbthread 1
  maxconn 5000
  stats socket {home}/haproxy-{port}.sock
defaults
  mode {mode}
  maxconn 5000
  timeout connect 10s
  timeout client 1h
  timeout server 1h
"""


def outbound(workspace: Workspace, services: Sequence[Service], mode: str) -> tuple[Group, int]:
    """(process, port); mode: http, or tcp for the first service alone. Checks run for up to 100 services."""
    binary = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if binary is None:
        raise BenchError("haproxy is not installed (make bench installs it)")
    port = workspace.port()
    lines = [
        _GLOBAL.format(home=workspace.path, port=port, mode=mode),
        f"frontend outbound\n  bind 127.0.0.1:{port}",
    ]
    if mode == "http":
        lines.append(
            "  option forwardfor\n  unique-id-format %[uuid()]\n  unique-id-header x-request-id\n"
            "  acl canary req.hdr(x-canary) 1\n  acl api path_beg /api/v1/\n"
            "  use_backend %[req.hdr(host),field(1,:),lower] if canary\n"
            "  use_backend %[req.hdr(host),field(1,:),lower] if api\n"
            "  use_backend %[req.hdr(host),field(1,:),lower]"
        )
    else:
        lines.append(f"  default_backend {services[0].host}")
    observed = "layer7" if mode == "http" else "layer4"
    checks = f"check inter 10s observe {observed} error-limit 5 on-error mark-down" if len(services) <= 100 else ""
    for service in services:
        lines.append(f"backend {service.host}\n  balance leastconn")
        if mode == "http":
            lines.append("  http-reuse always\n  http-request replace-path /api/v1/(.*) /v1/\\1")
        for number, place in enumerate(service.endpoints):
            lines.append(f"  server s{number} {place.address}:{place.port} weight {SPLIT[place.zone]} {checks}")
    config = workspace.write(f"haproxy-{port}.cfg", "\n".join(lines) + "\n")
    group = workspace.start("haproxy", [binary, "-db", "-f", str(config)], workspace.pinning.proxies)
    workspace.wait_http(group, port, host=services[0].host)
    return group, port
