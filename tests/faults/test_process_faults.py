"""Faults of the host and of the proxy's own processes, with the real process group."""

import asyncio
import os
import resource
import signal
import urllib.request
from pathlib import Path

from tests.integration.test_process_traffic import mesh
from tests.support.live_worker import exchange
from tests.support.origin import Origin
from tests.support.proxy_process import PATIENCE_S, ProxyProcess, free_port

REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"


async def started(proxy: ProxyProcess) -> None:
    await asyncio.to_thread(proxy.wait_for, "ready: 1 workers")


def configured(directory: Path, upstream_port: int) -> int:
    port = free_port()
    (directory / "conf").mkdir()
    (directory / "conf" / "mesh.yaml").write_text(mesh(port, upstream_port, "1"))
    return port


async def stats(proxy: ProxyProcess) -> str:
    url = f"http://127.0.0.1:{proxy.ports['metrics']}/stats/prometheus"
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode())


def total(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def test_a_stopped_worker_goes_on_where_it_was_and_ejects_nobody(tmp_path: Path) -> None:
    async with Origin() as origin:
        port = configured(tmp_path, origin.port)
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            assert (await exchange(port, REQUEST, ends=False)).startswith(b"HTTP/1.1 200")
            worker = proxy.children()["mesh-worker-0"]
            os.kill(worker, signal.SIGSTOP)
            waiting = [asyncio.ensure_future(exchange(port, REQUEST, ends=False, timeout_s=30)) for _ in range(8)]
            done, _ = await asyncio.wait(waiting, timeout=2)
            assert not done
            os.kill(worker, signal.SIGCONT)
            assert all(answer.startswith(b"HTTP/1.1 200") for answer in await asyncio.gather(*waiting))
            assert total(await stats(proxy), "envoy_cluster_outlier_detection_ejections_active") == 0


async def test_without_descriptors_it_waits_and_then_serves_again(tmp_path: Path) -> None:
    async with Origin() as origin:
        port = configured(tmp_path, origin.port)
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            worker = proxy.children()["mesh-worker-0"]
            limit = len(os.listdir(f"/proc/{worker}/fd")) + 8
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
            before = _cpu_ticks(worker)
            late = asyncio.ensure_future(exchange(port, REQUEST, ends=False, timeout_s=30))
            done, _ = await asyncio.wait([late], timeout=1)
            assert not done, "there was a descriptor left after all"
            # A worker that spins on accept would have used the whole second.
            assert _cpu_ticks(worker) - before < os.sysconf("SC_CLK_TCK") // 2
            for _, writer in held:
                writer.close()
            assert (await late).startswith(b"HTTP/1.1 200")


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_a_full_disk_costs_log_lines_and_no_request(tmp_path: Path) -> None:
    async with Origin() as origin:
        port = configured(tmp_path, origin.port)
        with ProxyProcess(tmp_path, "--access-log", "/dev/full", module="meshproxy") as proxy:
            await started(proxy)
            for _ in range(20):
                assert (await exchange(port, REQUEST, ends=False)).startswith(b"HTTP/1.1 200")
            for _ in range(100):  # lines are written by a timer
                if dropped := total(await stats(proxy), 'meshproxy_access_log_lines_total{result="dropped"}'):
                    break
            assert dropped > 0


async def test_a_killed_proxy_leaves_nothing_and_starts_again_at_once(tmp_path: Path) -> None:
    async with Origin() as origin:
        port = configured(tmp_path, origin.port)
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            family = proxy.children()
            proxy.process.kill()
            proxy.process.wait(PATIENCE_S)
            for pid in family.values():
                await _gone(pid)
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            assert (await exchange(port, REQUEST, ends=False)).startswith(b"HTTP/1.1 200")


async def _gone(pid: int) -> None:
    """Until the process has ended; a descriptor of it becomes readable then."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(descriptor, lambda: ended.done() or ended.set_result(None))
    try:
        await asyncio.wait_for(ended, PATIENCE_S)
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
