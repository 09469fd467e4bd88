"""Faults of the host and of the proxy's own processes, with the real process group."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

import pytest

from tests.faults.stalling_worker import HELD_S
from tests.faults.traffic import (
    App,
    Callers,
    Figures,
    Record,
    cpu_s,
    descriptors,
    group_pss_mib,
    mesh,
    metric,
    note,
    publish,
    started,
    until,
)
from tests.support.client import Client, post
from tests.support.client import get as request
from tests.support.live_worker import exchange
from tests.support.proxy_process import PATIENCE_S, ProxyProcess, free_port
from tests.support.raw_server import RawServer

REQUEST = b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n"
NO_RETRIES = {"retries": {"attempts": 0}}
EJECTS = {"outlierDetection": {"consecutive5xxErrors": 5, "maxEjectionPercent": 100}}


def configured(directory: Path, *apps: App, route: dict[str, object] | None = None) -> int:
    port = free_port()
    publish(directory, mesh(port, [(app.address, app.port, "") for app in apps], EJECTS, route))
    return port


async def ejections(proxy: ProxyProcess) -> float:
    return await metric(proxy, "envoy_cluster_outlier_detection_ejections_enforced_total")


# ── F11: killed ──


async def test_f11_a_killed_proxy_leaves_nothing_and_is_ready_again_within_a_second(
    tmp_path: Path, record_property: Record
) -> None:
    async with App("a") as app:
        port = configured(tmp_path, app)
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            family = [os.pidfd_open(pid) for pid in proxy.children().values()]
            proxy.process.kill()
            proxy.process.wait(PATIENCE_S)
            killed_at = monotonic()
            for descriptor in family:
                await _ended(descriptor)
            gone_s = monotonic() - killed_at
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        restarted_at = monotonic()
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            ready_s = monotonic() - restarted_at
            assert (await exchange(port, REQUEST, ends=False)).startswith(b"HTTP/1.1 200")
            killed_at = monotonic()
            os.kill(proxy.children()["mesh-worker-0"], signal.SIGKILL)
            assert (await exchange(port, REQUEST, ends=False)).startswith(b"HTTP/1.1 200")
            worker_s = monotonic() - killed_at
    note(record_property, "F11", all_gone_s=gone_s, start_to_ready_s=ready_s, worker_killed_to_served_s=worker_s)
    assert ready_s < 1
    assert worker_s < 1


async def test_an_end_without_traffic_takes_no_time_and_kills_nobody(tmp_path: Path, record_property: Record) -> None:
    """The control process sees the supervisor's end of their link close, and leaves by itself."""
    async with App("a") as app:
        configured(tmp_path, app)
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            began = monotonic()
            proxy.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(proxy.wait_for_end) == 0
            took_s = monotonic() - began
    note(record_property, "end", took_s=took_s)
    assert took_s < 0.8


async def _ended(descriptor: int) -> None:
    """Until the process of a pidfd has ended."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(descriptor, lambda: ended.done() or ended.set_result(None))
    try:
        await asyncio.wait_for(ended, PATIENCE_S)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


# ── F13: the clock ──


@pytest.mark.parametrize("jump_s", [3600, -3600], ids=["an hour ahead", "an hour back"])
async def test_f13_a_jump_of_the_clock_moves_no_deadline(tmp_path: Path, record_property: Record, jump_s: int) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler for a clock that can be moved")
    library, offset = tmp_path / "clock.so", tmp_path / "offset"
    build = [compiler, "-shared", "-fPIC", "-o", library, Path(__file__).with_name("clock.c"), "-ldl"]
    await asyncio.to_thread(subprocess.run, build, check=True)
    offset.write_text("0")
    environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    timeout_s = 1.0
    async with App("a") as app, App("b") as other:
        port = configured(tmp_path, app, other, route={"timeout": f"{timeout_s}s", **NO_RETRIES})
        with ProxyProcess(tmp_path, "--idle-timeout", "1.5", module="meshproxy", environment=environment) as proxy:
            await started(proxy)
            before = proxy.lines[-1]
            async with Client(port) as idle:
                assert (await idle.ask(request())).status == 200
                idle_from = monotonic()
                app.mode = other.mode = "hang"
                began = monotonic()
                hanging = asyncio.ensure_future(exchange(port, REQUEST, ends=False))
                await until(lambda: app.requests + other.requests == 2)
                offset.write_text(str(jump_s))
                answer = await hanging
                took_s = monotonic() - began
                app.mode = other.mode = "ok"
                assert await idle.ended() == "end"
                idle_s = monotonic() - idle_from
            assert (await exchange(port, REQUEST, ends=False)).startswith(b"HTTP/1.1 200")
            publish(tmp_path, mesh(port, [(app.address, app.port, "")], EJECTS))
            await asyncio.to_thread(proxy.wait_for, 'message="snapshot ', 2)
            after = [line for line in proxy.lines if 'message="snapshot ' in line][-1]
            assert await ejections(proxy) == 0
    off_ms, idle_off_ms = (took_s - timeout_s) * 1000, (idle_s - 1.5) * 1000
    note(record_property, f"F13{jump_s:+}", timeout_off_ms=off_ms, idle_off_ms=idle_off_ms)
    assert answer.startswith(b"HTTP/1.1 504")
    assert abs(took_s - timeout_s) < 0.1
    assert -0.05 < idle_s - 1.5 < 0.2
    assert _hour(after) != _hour(before), "the clock did not move at all"


def _hour(line: str) -> str:
    return line.partition("time=")[2][:13]


# ── F14: descriptors ──


async def test_f14_without_descriptors_it_waits_without_spinning_and_blames_nobody(
    tmp_path: Path, record_property: Record
) -> None:
    async with App("a") as app, App("b") as other:
        port = configured(tmp_path, app, other, route=NO_RETRIES)
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            worker = proxy.children()["mesh-worker-0"]
            limit = descriptors(worker) + 8
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (limit, limit))
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
            began, before = monotonic(), cpu_s(worker)
            late = asyncio.ensure_future(exchange(port, REQUEST, ends=False, timeout_s=30))
            # Who was accepted can be told so, but has no upstream: there is no descriptor for one.
            refused = 0
            for reader, writer in held[:6]:
                for _ in range(3):
                    writer.write(request())
                    head = await reader.readuntil(b"\r\n\r\n")
                    refused += head.startswith(b"HTTP/1.1 503")
                    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                    await reader.readexactly(length)
            done, _ = await asyncio.wait([late], timeout=1)
            share = (cpu_s(worker) - before) / (monotonic() - began)
            assert not done, "there was a descriptor left after all"
            for _, writer in held:
                writer.close()
            freed_at = monotonic()
            assert (await late).startswith(b"HTTP/1.1 200")
            recovered_s = monotonic() - freed_at
            ejected = await ejections(proxy)
            errors = await metric(proxy, "meshproxy_accept_errors_total")
    note(record_property, "F14", cpu_percent=100 * share, recovered_s=recovered_s, accept_errors=errors,
         refused_503=refused, ejected=ejected)  # fmt: skip
    assert share < 0.5  # a worker that spins on accept would have used it all
    assert recovered_s < 1
    assert refused > 0 and ejected == 0
    assert errors > 0


# ── F15: memory ──

LIMIT_MIB = 128
STUCK = 400
"""Bodies each way that nobody takes; each may cost 260 KiB, so all of them would need more than 200 MiB."""


@contextlib.contextmanager
def memory_group(mib: int) -> Iterator[Path]:
    """The `cgroup.procs` of a new control group with this limit. Skips where there is none to be had."""
    v1 = Path("/sys/fs/cgroup/memory")
    root, limit, swap = (
        (v1, "memory.limit_in_bytes", "memory.swappiness")
        if (v1 / "memory.limit_in_bytes").exists()
        else (Path("/sys/fs/cgroup"), "memory.max", "memory.swap.max")
    )
    group = root / f"meshproxy-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(mib << 20))
        (group / swap).write_text("0")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"needs root and a memory controller: {error}")
    try:
        yield group / "cgroup.procs"
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        group.rmdir()


async def _swallow_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An upstream that gives a large answer at once and reads nothing of a large request."""
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"POST"):
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8388608\r\n\r\n" + bytes(8 << 20))
    await writer.drain()


async def _press(port: int, proxy: ProxyProcess, figures: Figures) -> None:
    """Large requests nobody reads and large answers nobody reads, on connections that are all open before the first."""
    watch = asyncio.create_task(figures.watch(0.05, pss_mib=lambda: group_pss_mib(proxy)))
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(port)) for _ in range(2 * STUCK)]
        for upload, download in zip(clients[::2], clients[1::2], strict=True):
            download.reader._transport.pause_reading()  # type: ignore[attr-defined]
            download.send(request())
            upload.send(post(bytes(4 << 20)))
            await asyncio.sleep(0)
        await asyncio.sleep(1)  # for what the proxy can still take in: the figure watched is its highest
    watch.cancel()


async def _pressed(name: str, tmp_path: Path, record_property: Record, *flags: str, prefix: Sequence[str] = ()) -> None:
    figures = Figures()
    async with RawServer(_swallow_nothing) as server:
        port = free_port()
        publish(tmp_path, mesh(port, [("127.0.0.1", server.port, "")], route=NO_RETRIES))
        with ProxyProcess(tmp_path, *flags, module="meshproxy", prefix=prefix) as proxy:
            await started(proxy)
            family = proxy.children()
            await _press(port, proxy, figures)
            relieved_at = monotonic()

            async def is_served() -> bool:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    return b"content-length: 8388608" in await exchange(port, REQUEST, ends=False)
                return False

            await until(is_served)
            served_s = monotonic() - relieved_at
            lost = len(family.items() - proxy.children().items())
            shed = {
                action: await metric(proxy, f'meshproxy_overload_total{{action="{action}"}}')
                for action in ("refuse_request", "refuse_connection", "reset_stream")
            }
    highest = figures.highest["pss_mib"]
    note(record_property, name, bodies_mib=STUCK * (4 + 8), highest_pss_mib=highest, processes_lost=lost,
         served_again_s=served_s, **shed)  # fmt: skip
    assert highest < LIMIT_MIB
    assert lost == 0
    assert shed["refuse_request"] > 0 and shed["reset_stream"] > 0
    assert served_s < 5


async def test_f15_bodies_nobody_takes_are_shed_before_the_limit(tmp_path: Path, record_property: Record) -> None:
    await _pressed("F15", tmp_path, record_property, "--memory-limit", f"{LIMIT_MIB}Mi")


async def test_f15_the_limit_of_a_control_group_is_kept_and_kills_nobody(
    tmp_path: Path, record_property: Record
) -> None:
    with memory_group(LIMIT_MIB) as processes:
        enter = ("sh", "-c", f'echo $$ > {processes} && exec "$@"', "sh")
        await _pressed("F15-cgroup", tmp_path, record_property, prefix=enter)


# ── F16: nowhere to write ──


async def _serves_and_drops(port: int, proxy: ProxyProcess, requests: int) -> float:
    async with Callers(port, connections=8) as callers:
        await until(lambda: len(callers.calls) >= requests)
    assert not callers.failures()

    async def dropped() -> bool:  # lines are written by a timer
        return await metric(proxy, 'meshproxy_access_log_lines_total{result="dropped"}') > 0

    await until(dropped)
    return await metric(proxy, 'meshproxy_access_log_lines_total{result="dropped"}')


async def test_f16_a_full_disk_costs_log_lines_and_no_request(tmp_path: Path, record_property: Record) -> None:
    async with App("a") as app:
        port = configured(tmp_path, app)
        with ProxyProcess(tmp_path, "--access-log", "/dev/full", module="meshproxy") as proxy:
            await started(proxy)
            dropped = await _serves_and_drops(port, proxy, 200)
    note(record_property, "F16-full", dropped=dropped)


async def test_f16_a_log_pipe_that_nobody_reads_costs_log_lines_and_no_request(
    tmp_path: Path, record_property: Record
) -> None:
    """Both kinds of lines: the access log fills its pipe, reloads of a broken file fill the other."""
    reader, writer = os.pipe()
    async with App("a") as app:
        port = configured(tmp_path, app)
        with ProxyProcess(tmp_path, "--access-log", "/dev/stdout", module="meshproxy", stdout=writer) as proxy:
            os.close(writer)
            await started(proxy)
            dropped = await _serves_and_drops(port, proxy, 6000)
            os.close(reader)  # and now there is nobody at all
            async with Callers(port, connections=4) as callers:
                await until(lambda: len(callers.calls) >= 200)
            assert not callers.failures()
    note(record_property, "F16-pipe", dropped=dropped)


async def test_f16_a_closed_stdout_costs_no_request(tmp_path: Path) -> None:
    async with App("a") as app:
        port = configured(tmp_path, app)
        closed = ("sh", "-c", 'exec "$@" >&-', "sh")
        with ProxyProcess(tmp_path, "--access-log", "/dev/stdout", module="meshproxy", prefix=closed) as proxy:
            await started(proxy)
            async with Callers(port, connections=4) as callers:
                await until(lambda: len(callers.calls) >= 200)
            assert not callers.failures()


# ── F19, F21: time that is missing ──


async def test_f19_a_stalled_loop_is_counted_and_says_where_it_was(tmp_path: Path, record_property: Record) -> None:
    async with App("a") as app:
        port = configured(tmp_path, app)
        with ProxyProcess(tmp_path, module="tests.faults.stalling_worker") as proxy:
            await started(proxy)
            async with Callers(port, rate=100) as callers:
                await until(lambda: len(callers.calls) > 20)
                os.kill(proxy.children()["mesh-worker-0"], signal.SIGUSR2)
                line = await asyncio.to_thread(proxy.wait_for, "the loop was held for")
            stalled_s = await metric(proxy, "meshproxy_loop_stall_seconds_total")
            longest_s = await metric(proxy, "meshproxy_worker_loop_stall_max_seconds")
            assert not callers.failures()
    note(record_property, "F19", held_ms=HELD_S * 1000, metric_ms=stalled_s * 1000)
    assert "something_slow (stalling_worker.py:" in line
    assert 0.1 < stalled_s <= longest_s + 0.001 < 0.6


async def test_f21_a_stopped_worker_goes_on_where_it_was_and_ejects_nobody(
    tmp_path: Path, record_property: Record
) -> None:
    """Requests in flight run into their timeout meanwhile, by the clock: their answers have come, so they are given."""
    async with contextlib.AsyncExitStack() as stack:
        apps = [await stack.enter_async_context(App(f"app-{index}", delay_s=0.1)) for index in range(3)]
        port = configured(tmp_path, *apps, route={"timeout": "1s", **NO_RETRIES})
        with ProxyProcess(tmp_path, module="meshproxy") as proxy:
            await started(proxy)
            worker = proxy.children()["mesh-worker-0"]
            async with Callers(port, rate=200, connections=64) as callers:
                await until(lambda: len(callers.calls) > 50)
                os.kill(worker, signal.SIGSTOP)
                stopped_at = monotonic()
                await asyncio.sleep(5)
                os.kill(worker, signal.SIGCONT)
                continued_at = monotonic()
                await until(lambda: len(callers.since(continued_at)) > 200)
            caught = [call for call in callers.calls if call.due < continued_at <= call.ended]
            ejected = await ejections(proxy)
    recovered_s = max(call.ended for call in caught) - continued_at
    failed = [call for call in callers.calls if call.status != 200]
    note(record_property, "F21", stopped_s=continued_at - stopped_at, caught=len(caught), failed=len(failed),
         recovered_s=recovered_s, ejected=ejected)  # fmt: skip
    assert ejected == 0
    assert len(caught) >= 64
    assert not failed, failed[:3]
    assert recovered_s < 1
