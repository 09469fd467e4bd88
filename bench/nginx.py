"""nginx's stream proxy for UDP, with one worker: a session a client, kept until it is idle, as ours."""

import os
import shutil
from pathlib import Path

from bench.process import BenchError, Group, Workspace
from bench.services import Service

_MODULES = ("/usr/share/nginx/modules", "/usr/lib/nginx/modules", "/usr/lib64/nginx/modules")
_CONFIG = """{load}daemon off;
worker_processes 1;
user root;
pid {home}/nginx-stream-{port}.pid;
error_log {home}/nginx-stream-error.log warn;
events {{ worker_connections 16384; }}
stream {{
  upstream {host} {{
    least_conn;
{servers}
  }}
  server {{
    listen 127.0.0.1:{port} udp;
    proxy_pass {host};
    proxy_timeout 60s;
  }}
}}
"""
# proxy_responses and proxy_requests stay unset: with a number of answers to expect, nginx would end a session after
# them and open a socket for the next.


def stream_module() -> Path | None:
    """None: not installed (Debian has it in libnginx-mod-stream), or built into nginx."""
    return next((path for where in _MODULES if (path := Path(where, "ngx_stream_module.so")).exists()), None)


def outbound_udp(workspace: Workspace, service: Service) -> tuple[Group, int]:
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        raise BenchError("nginx is not installed (make bench installs it)")
    port = workspace.port()
    module = stream_module()
    servers = "\n".join(f"    server {place.address}:{place.port};" for place in service.endpoints)
    config = workspace.write(
        f"nginx-stream-{port}.conf",
        _CONFIG.format(
            load=f"load_module {module};\n" if module is not None else "",
            home=os.fspath(workspace.path),
            host=service.host,
            servers=servers,
            port=port,
        ),
    )
    group = workspace.start(
        "nginx-stream", [binary, "-p", str(workspace.path), "-c", str(config)], workspace.pinning.proxies
    )
    return group, port
