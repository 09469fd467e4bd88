"""Two workloads behind one process: every request arrives under its own workload's identity, whatever changes."""

import asyncio
import json
from collections import Counter

from meshproxy.cli import ca
from meshproxy.demo.files import EDGE_SERVICE
from meshproxy.demo.stage import Stage

REQUESTS = 20_000
CONNECTIONS = 16


async def test_each_request_arrives_under_its_own_identity_across_reloads_and_rotation() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    async with Stage() as stage:
        port = stage.plan.service_port
        left = REQUESTS

        async def client(app: str, address: str) -> None:
            nonlocal left
            reader, writer = await asyncio.open_connection(address, port)
            while left > 0:
                left -= 1
                writer.write(b"GET / HTTP/1.1\r\nhost: %b\r\n\r\n" % EDGE_SERVICE.encode())
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(
                    next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))[15:]
                )
                body = await reader.readexactly(length)
                xfcc = json.loads(body)["xfcc"] if head.startswith(b"HTTP/1.1 200") else head[:20].decode()
                uris = [part[4:] for part in xfcc.split(";") if part.startswith("URI=")]
                seen[app, ",".join(uris) or xfcc] += 1
                if b"\r\nconnection: close" in head.lower():
                    writer.close()
                    reader, writer = await asyncio.open_connection(address, port)
            writer.close()

        clients = [
            asyncio.create_task(client(app, address))
            for _ in range(CONNECTIONS // 2)
            for app, address in stage.plan.egress
        ]
        changes = 0
        while not all(task.done() for task in clients):
            # A rotation of every identity and a reload, as often as they are taken up while requests go on.
            for account in ("app1", "app2", "edge-service"):
                ca.issue(stage.root / "ca", "default", account, stage.root / "certs")
            file = stage.root / "mesh" / "services.yaml"
            file.write_text(file.read_text() + "\n")
            changes += 1
            await asyncio.wait(clients, timeout=0.2)
        await asyncio.gather(*clients)
    wanted = {(app, f"spiffe://cluster.local/ns/default/sa/{app}") for app in ("app1", "app2")}
    assert seen.keys() == wanted, seen
    assert sum(seen.values()) >= REQUESTS
    assert changes >= 5
