"""HAProxy, nginx and Caddy as real peers: started with a configuration, ready when their port takes connections."""

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.proxy_process import free_port

PATIENCE_S = 10.0

_HAPROXY = """global
  nbthread 1
defaults
  timeout connect 5s
  timeout client 30s
  timeout server 30s
{config}
"""
_NGINX = """daemon off;
master_process off;
pid {home}/pid;
error_log stderr;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
{config}
}}
"""


_CADDY = """{{
  admin off
  auto_https off
  skip_install_trust
  storage file_system {home}/storage
}}
{config}
"""


@contextlib.asynccontextmanager
async def haproxy(config: str) -> AsyncIterator[int]:
    """config: sections, with {port} where it is to listen on 127.0.0.1. Gives the port."""
    async with _running("haproxy", _HAPROXY, config, ("-db", "-f")) as port:
        yield port


@contextlib.asynccontextmanager
async def nginx(config: str) -> AsyncIterator[int]:
    """config: what stands in `http`, with {port} where it is to listen on 127.0.0.1. Gives the port."""
    async with _running("nginx", _NGINX, config, ("-e", "stderr", "-c")) as port:
        yield port


@contextlib.asynccontextmanager
async def caddy(config: str) -> AsyncIterator[int]:
    """config: site blocks, with {port} where they are to listen on 127.0.0.1, by TCP and QUIC. Gives the port."""
    async with _running("caddy", _CADDY, config, ("run", "--adapter", "caddyfile", "--config")) as port:
        yield port


@contextlib.asynccontextmanager
async def _running(name: str, frame: str, config: str, flags: tuple[str, ...]) -> AsyncIterator[int]:
    binary = shutil.which(name) or shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/sbin")
    if binary is None:
        pytest.skip(f"{name} is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        file = Path(home, "config")
        file.write_text(frame.format(home=home, config=config.format(port=port)))  # noqa: ASYNC240 - one line
        process = await asyncio.create_subprocess_exec(binary, *flags, str(file), stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    assert process.returncode is None, (await process.stderr.read()).decode()
                    with contextlib.suppress(OSError):
                        _, writer = await asyncio.open_connection("127.0.0.1", port)
                        writer.close()
                        break
                    await asyncio.sleep(0.02)  # another process starts: there is nothing here to wait on
            yield port
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()
