"""A network that swallows packets, between namespaces that the test makes itself."""

import asyncio
import socket
from pathlib import Path
from time import monotonic

from tests.faults.network import FAR, NEAR, Pair
from tests.faults.traffic import Record, descriptors, mesh, note, private_mib, publish, started, until
from tests.support.proxy_process import ProxyProcess

PORT, UPSTREAM_PORT = 18080, 18081
HALF_OPEN = 5000
IDLE_TIMEOUT_S = 2.0
REQUEST = b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


def _listening(address: str) -> socket.socket:
    return socket.create_server((address, UPSTREAM_PORT), backlog=256)


async def _ask(connection: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, REQUEST)
    return await asyncio.wait_for(loop.sock_recv(connection, 65536), 10)


async def test_f4_lost_syns_end_at_the_connect_timeout_and_the_next_locality_serves(
    tmp_path: Path, record_property: Record
) -> None:
    with Pair() as pair:
        servers = [
            await asyncio.start_server(_answer, sock=pair.at(name, lambda address=address: _listening(address)))
            for name, address in ((pair.near, "127.0.0.1"), (pair.far, FAR))
        ]
        policy = {"connectionPool": {"tcp": {"connectTimeout": "0.5s"}}}
        lonely = {"retries": {"attempts": 0}}
        publish(tmp_path, mesh(PORT, [(FAR, UPSTREAM_PORT, "")], policy, lonely))
        pair.swallow()
        with ProxyProcess(tmp_path, module="meshproxy", prefix=pair.prefix()) as proxy:
            await started(proxy)
            with await pair.connect(pair.near, "127.0.0.1", PORT) as client:
                began = monotonic()
                answer = await _ask(client)
                lost_s = monotonic() - began
            assert answer.startswith(b"HTTP/1.1 503") and b"reset reason: connection timeout" in answer
            places = [(FAR, UPSTREAM_PORT, "r/far/x"), ("127.0.0.1", UPSTREAM_PORT, "r/next/x")]
            failover = {
                **policy,
                "outlierDetection": {"consecutive5xxErrors": 1, "maxEjectionPercent": 100},
                "loadBalancer": {"localityLbSetting": {"failover": [{"from": "r", "to": "r"}]}},
            }
            retries = {"retries": {"attempts": 2, "retryOn": "connect-failure,reset"}}
            publish(tmp_path, mesh(PORT, places, failover, retries))
            with await pair.connect(pair.near, "127.0.0.1", PORT) as client:
                while not (await _ask(client)).startswith(b"HTTP/1.1 200"):
                    pass  # by the configuration before
                for _ in range(4):
                    assert (await _ask(client)).startswith(b"HTTP/1.1 200")
        for server in servers:
            server.close()
    note(record_property, "F4-lost-syn", failed_after_s=lost_s)
    assert 0.5 <= lost_s < 0.6


async def test_f22_clients_that_vanish_without_a_word_are_freed_in_the_idle_timeout(
    tmp_path: Path, record_property: Record
) -> None:
    loop = asyncio.get_running_loop()
    with Pair() as pair:
        server = await asyncio.start_server(_answer, sock=pair.at(pair.near, lambda: _listening("127.0.0.1")))
        publish(tmp_path, mesh(PORT, [("127.0.0.1", UPSTREAM_PORT, "")]))
        flags = ("--idle-timeout", str(IDLE_TIMEOUT_S))
        with ProxyProcess(tmp_path, *flags, module="meshproxy", prefix=pair.prefix()) as proxy:
            await started(proxy)
            worker = proxy.children()["mesh-worker-0"]
            with await pair.connect(pair.near, "127.0.0.1", PORT) as client:
                assert (await _ask(client)).startswith(b"HTTP/1.1 200")
            before, private_before = descriptors(worker), private_mib(worker)
            clients = pair.at(pair.far, lambda: [socket.socket() for _ in range(HALF_OPEN)])
            began = monotonic()
            for at in range(0, HALF_OPEN, 500):
                batch = clients[at : at + 500]
                for client in batch:
                    client.setblocking(False)
                await asyncio.gather(*(loop.sock_connect(client, (NEAR, PORT)) for client in batch))
            assert (await _ask(clients[-1])).startswith(b"HTTP/1.1 200")
            opened_s = monotonic() - began
            held = descriptors(worker) - before
            private = private_mib(worker)
            pair.cut()
            cut_at = monotonic()
            await until(lambda: descriptors(worker) <= before)
            freed_s = monotonic() - cut_at
            with await pair.connect(pair.near, "127.0.0.1", PORT) as client:
                assert (await _ask(client)).startswith(b"HTTP/1.1 200")
            for client in clients:
                client.close()
        server.close()
    note(record_property, "F22", half_open=held, opened_s=opened_s, freed_s=freed_s, idle_timeout_s=IDLE_TIMEOUT_S,
         kib_each=(private - private_before) * 1024 / HALF_OPEN)  # fmt: skip
    assert freed_s < IDLE_TIMEOUT_S + 1
    assert held >= HALF_OPEN - 1 or opened_s > IDLE_TIMEOUT_S
