"""HTTP/3 towards the upstream, and TCP where QUIC does not get through."""

from typing import Any

from meshproxy.control import messages as m
from meshproxy.model.cluster import TlsMode, UpstreamTls
from meshproxy.model.listener import Direction, MtlsMode
from tests.support.certificates import Authority, Leaf
from tests.support.client import Client, get
from tests.support.live_worker import LiveWorker
from tests.support.origin import Origin

AUTHORITY = Authority()
RSU = "spiffe://cluster.local/ns/default/sa/rsu"


def give(live: LiveWorker, leaf: Leaf, workload_id: str = "default/app", account: str = "default") -> None:
    live.put(m.PutWorkload(live.workload(workload_id, account)))
    live.worker.on_message(m.PutCertificates(workload_id, leaf.chain_pem, leaf.key_pem, leaf.roots_pem), None)


def inbound(live: LiveWorker, origin: Origin) -> int:
    """A listener for QUIC in front of the workload rsu."""
    give(live, AUTHORITY.leaf("default", "rsu"), "default/rsu", "rsu")
    cluster = live.cluster([("127.0.0.1", origin.port)], "inbound|80||")
    return live.listen_quic(cluster, direction=Direction.INBOUND, mtls=MtlsMode.STRICT, workload_id="default/rsu")


def outbound(live: LiveWorker, port: int, **fields: Any) -> int:
    """A listener for the traffic of the workload app to a server that must be rsu."""
    give(live, AUTHORITY.leaf("default", "default"))
    cluster = live.cluster(
        [("127.0.0.1", port)],
        "outbound|80||rsu.example",
        tls=UpstreamTls(mode=TlsMode.ISTIO_MUTUAL),
        endpoint={"speaks_mtls": True, "spiffe_ids": (RSU,)},
        **{"offers_http3": True, **fields},
    )
    return live.listen(cluster)


async def test_a_request_goes_through_two_proxies_over_quic_under_both_identities() -> None:
    async with Origin() as origin, LiveWorker() as server, LiveWorker() as live:
        port = outbound(live, inbound(server, origin))
        async with Client(port) as client:
            client.send(get("/path"))
            response = await client.answer()
    assert (response.status, response.body) == (200, b"ok")
    xfcc = origin.requests[0].header(b"x-forwarded-client-cert")
    assert xfcc is not None and xfcc.endswith(b";URI=spiffe://cluster.local/ns/default/sa/default")
