"""The origin: one nginx worker that answers a few bytes, or 1 MiB at /1m, in HTTP/1.1 and, on a port of its own, HTTP/2
with prior knowledge.
"""

import shutil
from dataclasses import dataclass

from bench.process import ORIGIN_NAME, BenchError, Group, Workspace
from bench.services import ORIGIN_ADDRESSES

BODY = "hello, mesh\n"
_CONFIG = """daemon off;
worker_processes 1;
user root;
pid {home}/nginx.pid;
error_log {home}/nginx-error.log warn;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  server_tokens off;
  sendfile on;
  tcp_nodelay on;
  keepalive_timeout 3600s;
  keepalive_requests 1000000000;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{
{listens}
    default_type text/plain;
    location / {{ return 200 "hello, mesh\\n"; }}
    location = /1m {{ alias {home}/1m; }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Origin:
    group: Group
    address: str
    port: int
    http2_port: int


def start(workspace: Workspace) -> Origin:
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        raise BenchError("nginx is not installed (make bench installs it)")
    port, http2_port = workspace.port(), workspace.port()
    (workspace.path / "1m").write_bytes(b"m" * (1 << 20))
    listens = "\n".join(
        f"    listen {address}:{port} backlog=4096;\n    listen {address}:{http2_port} http2 backlog=4096;"
        for address in ("127.0.0.1", *(a for a, _ in ORIGIN_ADDRESSES))
    )
    config = workspace.write("nginx.conf", _CONFIG.format(home=workspace.path, listens=listens))
    group = workspace.start(
        ORIGIN_NAME, [binary, "-p", str(workspace.path), "-c", str(config)], workspace.pinning.origin
    )
    workspace.wait_http(group, port)
    return Origin(group, ORIGIN_ADDRESSES[0][0], port, http2_port)
