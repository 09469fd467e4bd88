"""mTLS through a live worker: who may come in, whom we talk to, and under whose name."""

import asyncio
import hashlib
import ssl
from pathlib import Path

import pytest

from meshproxy.control import messages as m
from meshproxy.model.cluster import Protocol, TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from meshproxy.model.workload import WorkloadLabels
from tests.support.certificates import Authority, Leaf
from tests.support.client import Client, Cut, get, post
from tests.support.live_worker import LiveWorker, until
from tests.support.origin import Origin
from tests.support.raw_server import RawServer

RSU = "spiffe://cluster.local/ns/default/sa/rsu"
OURS = "spiffe://cluster.local/ns/default/sa/"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def give(live: LiveWorker, workload_id: str, leaf: Leaf, account: str) -> None:
    """Put a workload and its certificates, or rotate them."""
    live.put(m.PutWorkload(live.workload(workload_id, account)))
    live.worker.on_message(m.PutCertificates(workload_id, leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None)


def inbound(
    live: LiveWorker, app_port: int, authority: Authority, mode: MtlsMode = MtlsMode.STRICT, **fields: object
) -> int:
    """A listener in front of the workload rsu."""
    give(live, "default/rsu", authority.leaf("default", "rsu"), "rsu")
    protocol = fields.get("protocol", Protocol.HTTP)
    cluster = live.cluster([("127.0.0.1", app_port)], "inbound|80||", protocol=protocol)
    return live.listen(cluster, direction=Direction.INBOUND, mtls=mode, workload_id="default/rsu", **fields)  # type: ignore[arg-type]


def outbound(live: LiveWorker, port: int, workload_id: str, **endpoint: object) -> int:
    """A listener for one workload's traffic to a server that must be rsu."""
    endpoint.setdefault("spiffe_ids", (RSU,))
    cluster = live.cluster(
        [("127.0.0.1", port)],
        "outbound|80||rsu.example",
        tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL),
        endpoint={"speaks_mtls": True, **endpoint},
    )
    return live.listen(cluster, workload_id=workload_id)


def client_context(leaf: Leaf | None, directory: Path, *versions: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if leaf is not None:
        leaf.write(directory)
        context.load_cert_chain(directory / "cert-chain.pem", directory / "key.pem")
    if versions:
        context.minimum_version, context.maximum_version = versions
    return context


async def ask(port: int, context: ssl.SSLContext | None) -> int:
    async with Client(port, context) as client:
        return (await client.ask(get())).status


# ── who may come in ──


async def test_strict_resets_plaintext_and_the_application_hears_nothing(authority: Authority) -> None:
    async with Origin() as app, LiveWorker() as live:
        port = inbound(live, app.port, authority)
        async with Client(port) as client:
            client.send(get())
            assert await client.ended() == "reset"
        assert app.connections == 0
        (listener,) = live.worker.listeners.values()
        assert listener.runtime.counters.plaintext_refused == 1


async def test_permissive_serves_both_and_tells_them_apart(authority: Authority, tmp_path: Path) -> None:
    async with Origin() as app, LiveWorker() as live:
        port = inbound(live, app.port, authority, MtlsMode.PERMISSIVE)
        assert await ask(port, None) == 200
        assert await ask(port, client_context(authority.leaf("default", "edge"), tmp_path)) == 200
        xfcc = [seen.header(b"x-forwarded-client-cert") for seen in app.requests]
        assert xfcc[0] is None and b"URI=spiffe://cluster.local/ns/default/sa/edge" in (xfcc[1] or b"")
        assert live.requests(reporter="destination", connection_security_policy="none", source_principal="unknown") == 1
        assert live.requests(connection_security_policy="mutual_tls", source_principal=OURS + "edge") == 1


async def test_permissive_serves_a_plaintext_request_that_comes_byte_by_byte(authority: Authority) -> None:
    async with Origin() as app, LiveWorker() as live:
        port = inbound(live, app.port, authority, MtlsMode.PERMISSIVE)
        async with Client(port) as client:
            for at in range(len(get())):
                client.send(get()[at : at + 1])
                await client.writer.drain()
                await asyncio.sleep(0.001)
            assert (await client.answer()).status == 200


async def test_disable_leaves_tls_to_the_application(authority: Authority) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"got " + await reader.readexactly(3))

    async with RawServer(serve) as app, LiveWorker() as live:
        port = inbound(live, app.port, authority, MtlsMode.DISABLE, protocol=Protocol.TCP)
        async with Client(port) as client:
            client.send(b"\x16\x03\x01")
            assert await client.bytes(7) == b"got \x16\x03\x01"


BAD_PEERS = {
    "no_certificate": None,
    "other_authority": lambda a: Authority("Other").leaf("default", "edge"),
    "other_trust_domain": lambda a: a.leaf("default", "edge", trust_domain="evil.example"),
    "two_uris": lambda a: a.leaf(uris=(OURS + "edge", OURS + "rsu")),
    "no_uri": lambda a: a.leaf(uris=(), dns_names=("edge.example",)),
    "not_spiffe": lambda a: a.leaf(uris=("https://cluster.local/ns/default/sa/edge",)),
    "expired": lambda a: a.leaf("default", "edge", starts_s=-7200, expires_s=-60),
    "not_yet": lambda a: a.leaf("default", "edge", starts_s=3600, expires_s=7200),
    "authority_itself": lambda a: a.leaf("default", "edge", is_ca=True),
    "wrong_usage": lambda a: a.leaf("default", "edge", usages=()),
}


@pytest.mark.parametrize("name", [name for name in BAD_PEERS if name != "wrong_usage"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_peer_that_cannot_prove_who_it_is_is_refused(
    name: str, version: ssl.TLSVersion, authority: Authority, tmp_path: Path
) -> None:
    make = BAD_PEERS[name]
    context = client_context(make(authority) if make is not None else None, tmp_path, version, version)
    async with Origin() as app, LiveWorker() as live:
        port = inbound(live, app.port, authority)
        with pytest.raises((Cut, ConnectionError, ssl.SSLError)):
            await ask(port, context)
        assert app.connections == 0
        await until(lambda: live.open_downstreams() == 0)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_old_versions_of_tls_are_refused(version: ssl.TLSVersion, authority: Authority, tmp_path: Path) -> None:
    context = client_context(authority.leaf(), tmp_path, version, version)
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with Origin() as app, LiveWorker() as live:
        with pytest.raises((Cut, ConnectionError, ssl.SSLError)):
            await ask(inbound(live, app.port, authority), context)
        assert app.connections == 0


async def test_a_workload_without_certificates_refuses_tls(authority: Authority, tmp_path: Path) -> None:
    async with Origin() as app, LiveWorker() as live:
        cluster = live.cluster([("127.0.0.1", app.port)])
        port = live.listen(cluster, direction=Direction.INBOUND, mtls=MtlsMode.PERMISSIVE)
        with pytest.raises((Cut, ConnectionError, ssl.SSLError)):
            await ask(port, client_context(authority.leaf(), tmp_path))
        assert await ask(port, None) == 200


# ── what the application hears of the peer ──


async def test_the_peer_is_named_after_those_it_speaks_for(authority: Authority, tmp_path: Path) -> None:
    leaf = authority.leaf("default", "edge")
    async with Origin() as app, LiveWorker() as live:
        port = inbound(live, app.port, authority)
        async with Client(port, client_context(leaf, tmp_path)) as client:
            await client.ask(get())
            await client.ask(get("/", "X-Forwarded-Client-Cert: By=a;URI=spiffe://b"))
        fingerprint = hashlib.sha256(leaf.der).hexdigest()
        own = f'By={RSU};Hash={fingerprint};Subject="";URI={OURS}edge'.encode()
        assert [seen.header(b"x-forwarded-client-cert") for seen in app.requests] == [
            own,
            b"By=a;URI=spiffe://b," + own,
        ]


# ── whom we talk to ──


async def test_two_proxies_speak_mtls_with_each_other(authority: Authority) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        async with Client(outbound(live, there, "default/app1")) as client:
            for _ in range(3):
                assert (await client.ask(get())).status == 200
        assert app.requests[0].header(b"x-forwarded-proto") == b"http"
        assert live.requests(reporter="source", source_principal=OURS + "app1", destination_principal=RSU) == 3
        assert live.requests(reporter="destination", source_principal=OURS + "app1", destination_principal=RSU) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"spiffe_ids": (OURS + "other",)},
        {"spiffe_ids": ("spiffe://evil.example/ns/default/sa/rsu",)},
    ],
    ids=["other_account", "other_trust_domain"],
)
async def test_a_server_of_another_name_gets_nothing(wrong: dict[str, object], authority: Authority) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        async with Client(outbound(live, there, "default/app1", **wrong)) as client:
            answer = await client.ask(get())
            assert (answer.status, answer.body[-25:]) == (503, b"remote connection failure")
        assert app.connections == 0
        assert live.requests(reporter="source", response_code="503", response_flags="UF") == 1


@pytest.mark.parametrize(
    "name", ["other_authority", "other_trust_domain", "two_uris", "no_uri", "not_spiffe", "expired", "not_yet"]
)
async def test_a_server_that_cannot_prove_who_it_is_gets_nothing(
    name: str, authority: Authority, tmp_path: Path
) -> None:
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(100))

    make = BAD_PEERS[name]
    assert make is not None
    leaf = make(authority)
    leaf.write(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert-chain.pem", tmp_path / "key.pem")
    async with RawServer(serve, tls) as server, LiveWorker() as live:
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        port = outbound(live, server.port, "default/app1", spiffe_ids=())
        async with Client(port) as client:
            assert (await client.ask(get())).status == 503
        await until(lambda: live.open_upstreams() == 0)
        assert not any(heard)


async def test_a_workload_without_certificates_sends_nothing_where_mtls_is_demanded(authority: Authority) -> None:
    async with Origin() as app, LiveWorker() as live:
        async with Client(outbound(live, app.port, "default/app")) as client:
            assert (await client.ask(get())).status == 503
        assert app.connections == 0


async def test_auto_mtls_speaks_plaintext_to_endpoints_without_a_proxy(authority: Authority) -> None:
    async with Origin() as app, Origin() as plain, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        for port, speaks in ((there, True), (plain.port, False)):
            cluster = live.cluster(
                [("127.0.0.1", port)],
                f"outbound|80||{port}.example",
                tls=UpstreamTls(mode=TlsMode.AUTO),
                endpoint={"speaks_mtls": speaks},
            )
            assert await ask(live.listen(cluster, workload_id="default/app1"), None) == 200
        assert b"app1" in (app.requests[0].header(b"x-forwarded-client-cert") or b"")
        assert plain.requests[0].header(b"x-forwarded-client-cert") is None


# ── two workloads, one worker ──


async def test_each_request_of_two_workloads_goes_under_its_own_name_also_across_rotations(
    authority: Authority,
) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        ports = {}
        for name in ("app1", "app2"):
            give(live, f"default/{name}", authority.leaf("default", name), name)
            ports[name] = outbound(live, there, f"default/{name}")

        async def many(name: str, connection: int) -> None:
            for start in range(0, 250, 50):
                async with Client(ports[name]) as client:
                    for number in range(start, start + 50):
                        assert (await client.ask(get(f"/{name}/{connection}/{number}"))).status == 200

        async def rotate() -> None:
            for _ in range(6):
                await asyncio.sleep(0.05)
                for name in ("app1", "app2", "rsu"):
                    leaf = authority.leaf("default", name)
                    live.worker.on_message(
                        m.PutCertificates(f"default/{name}", leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None
                    )

        await asyncio.gather(rotate(), *(many(name, number) for number in range(4) for name in ports))
        assert len(app.requests) == 2000
        for seen in app.requests:
            name = seen.target.split(b"/")[1].decode()
            assert (seen.header(b"x-forwarded-client-cert") or b"").endswith(f";URI={OURS}{name}".encode())
        for name in ports:
            assert live.requests(reporter="destination", source_principal=OURS + name, response_code="200") == 1000
            assert live.requests(reporter="source", source_principal=OURS + name, response_code="200") == 1000


async def test_a_rotation_drops_no_connection_that_is_open(authority: Authority, tmp_path: Path) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        port = outbound(live, there, "default/app1")
        context = client_context(authority.leaf("default", "edge"), tmp_path)
        async with Client(port) as through, Client(there, context) as direct:
            for _ in range(3):
                assert (await through.ask(get())).status == (await direct.ask(get())).status == 200
                for name in ("rsu", "app1"):
                    leaf = authority.leaf("default", name)
                    live.worker.on_message(
                        m.PutCertificates(f"default/{name}", leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None
                    )
        hashes = {(seen.header(b"x-forwarded-client-cert") or b"").split(b"Hash=")[1][:64] for seen in app.requests}
        assert len(hashes) == 4  # three of app1, one after the other, and edge's


async def test_a_workload_that_changes_its_account_takes_no_connection_along(authority: Authority) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "old"), "old")
        port = outbound(live, there, "default/app1")
        async with Client(port) as client:
            await client.ask(get())
            give(live, "default/app1", authority.leaf("default", "new"), "new")
            await client.ask(get())
        uris = [(seen.header(b"x-forwarded-client-cert") or b"").split(b"URI=")[1] for seen in app.requests]
        assert uris == [(OURS + "old").encode(), (OURS + "new").encode()]


async def test_a_second_connection_resumes_the_session_of_the_first(authority: Authority, tmp_path: Path) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        context = client_context(authority.leaf("default", "edge"), tmp_path)
        loop_context = context
        with_session = None
        reused = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", there)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = loop_context.wrap_bio(incoming, outgoing, session=with_session)
            answer = b""
            is_sent = False
            async with asyncio.timeout(5):
                while b"ok" not in answer:
                    try:
                        if not is_sent:
                            tls.do_handshake()
                            tls.write(get())
                            is_sent = True
                        answer += tls.read(65536)
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
                        incoming.write(await reader.read(65536))
            reused.append(tls.session_reused)
            with_session = tls.session
            writer.transport.abort()
        assert reused == [False, True]
        assert all(b"sa/edge" in (seen.header(b"x-forwarded-client-cert") or b"") for seen in app.requests)


async def test_our_own_second_connection_resumes_the_session_of_the_first(authority: Authority) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        async with Client(outbound(live, there, "default/app1")) as client:
            reused = []
            for _ in range(2):
                await client.ask(get())
                (endpoint,) = [endpoint for endpoint in live.endpoints() if endpoint.tls is not None]
                (connection,) = endpoint.connections
                reused.append(connection.transport.get_extra_info("ssl_object").session_reused)
                endpoint.close_idle()
                await until(lambda connections=endpoint.connections: not connections)  # type: ignore[misc]
            assert reused == [False, True]


@pytest.mark.parametrize("size", [10, 40_000, 400_000])
async def test_a_first_request_of_any_size_may_follow_the_handshake_at_once(
    size: int, authority: Authority, tmp_path: Path
) -> None:
    async with Origin() as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        async with Client(outbound(live, there, "default/app1")) as client:
            assert (await client.ask(post(b"x" * size))).status == 200
        assert len(app.requests[0].body) == size


# ── TCP inside mTLS ──


async def test_tcp_inside_mtls_keeps_halves_and_names(authority: Authority) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.write(b"<bye>")

    async with RawServer(echo) as app, LiveWorker() as live:
        there = inbound(live, app.port, authority, protocol=Protocol.TCP)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        cluster = live.cluster(
            [("127.0.0.1", there)],
            "outbound|80||rsu.example",
            protocol=Protocol.TCP,
            tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL),
            endpoint={"speaks_mtls": True, "spiffe_ids": (RSU,), "workload": WorkloadLabels(workload="rsu")},
        )
        async with Client(live.listen(cluster, protocol=Protocol.TCP, workload_id="default/app1")) as client:
            client.send(b"x" * 500_000)
            client.end()
            assert await client.bytes(500_005) == b"x" * 500_000 + b"<bye>"
            assert await client.ended() == "end"
        await until(lambda: live.open_downstreams() == live.open_upstreams() == 0)
        assert live.tcp(reporter="destination", source_principal=OURS + "app1", destination_principal=RSU) == (
            1,
            1,
            500_005,
            500_000,
        )


@pytest.mark.parametrize("slow", ["downstream", "upstream"])
async def test_a_slow_reader_stops_the_fast_writer_through_two_proxies(slow: str, authority: Authority) -> None:
    size = 64 * 1024 * 1024
    moved = 0
    reads = asyncio.Event()

    async def pour(writer: asyncio.StreamWriter) -> None:
        nonlocal moved
        while moved < size:
            writer.write(b"z" * 65536)
            await writer.drain()
            moved += 65536

    async def take(reader: asyncio.StreamReader) -> None:
        await reads.wait()
        for _ in range(size // 65536):
            await reader.readexactly(65536)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if slow == "downstream":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            await pour(writer)
        else:
            await take(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read()

    async with RawServer(serve) as app, LiveWorker() as live:
        there = inbound(live, app.port, authority)
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        async with Client(outbound(live, there, "default/app1")) as client:
            client.send(get("/", f"Content-Length: {size if slow == 'upstream' else 0}", method="POST"))
            sending = asyncio.ensure_future(pour(client.writer)) if slow == "upstream" else None
            before, still, most = -1, 0, 0
            while still < 40:
                await asyncio.sleep(0.005)
                most = max(most, live.buffered())
                still = still + 1 if moved == before else 0
                before = moved
            assert 0 < moved < size / 2
            assert most <= 2 * 1024 * 1024  # two proxies, watermark and one read each way
            reads.set()
            async with asyncio.timeout(20):
                if sending is None:
                    await client.reader.readuntil(b"\r\n\r\n")
                    await take(client.reader)
                else:
                    await sending
                    assert (await client.answer()).body == b"ok"


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_a_body_until_close_is_whole_only_with_a_goodbye(
    says_goodbye: bool, authority: Authority, tmp_path: Path
) -> None:
    """Without close_notify anyone on the way could have cut it (RFC 8446 §6.1)."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await writer.drain()
        await asyncio.sleep(0.02)
        if not says_goodbye:
            writer.transport.abort()

    authority.leaf("default", "rsu").write(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert-chain.pem", tmp_path / "key.pem")
    async with RawServer(serve, tls) as server, LiveWorker() as live:
        give(live, "default/app1", authority.leaf("default", "app1"), "app1")
        async with Client(outbound(live, server.port, "default/app1")) as client:
            if says_goodbye:
                assert (await client.ask(get())).body == b"abc"
            else:
                with pytest.raises(Cut):
                    await client.ask(get())
