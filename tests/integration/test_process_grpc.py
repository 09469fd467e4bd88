"""gRPC through the whole proxy, as YAML asks for it; what metrics and the access log say of it."""

import json
from pathlib import Path

import grpc

from tests.faults.traffic import metric, publish, started, until
from tests.support.grpc_app import AUTHORITY, GrpcApp, channel, method, status_of
from tests.support.proxy_process import ProxyProcess, free_port


def mesh(port: int, app_port: int) -> str:
    networking = "networking.istio.io/v1"
    documents: list[dict[str, object]] = [
        {
            "apiVersion": networking,
            "kind": "ServiceEntry",
            "metadata": {"name": "a"},
            "spec": {
                "hosts": [AUTHORITY],
                "location": "MESH_INTERNAL",
                "resolution": "STATIC",
                "ports": [{"number": port, "name": "grpc", "protocol": "GRPC"}],
                "endpoints": [{"address": "127.0.0.1", "ports": {"grpc": app_port}}],
            },
        },
        {
            "apiVersion": networking,
            "kind": "Sidecar",
            "metadata": {"name": "default"},
            "spec": {
                "egress": [
                    {
                        "port": {"number": port, "protocol": "GRPC", "name": "grpc"},
                        "bind": "127.0.0.1",
                        "captureMode": "NONE",
                        "hosts": ["*/*"],
                    }
                ]
            },
        },
    ]
    return "\n---\n".join(map(json.dumps, documents)) + "\n"


async def test_a_port_of_protocol_grpc_and_istios_default_retries(tmp_path: Path) -> None:
    port = free_port()
    async with GrpcApp() as app:
        publish(tmp_path, mesh(port, app.port))
        log = tmp_path / "access.log"
        with ProxyProcess(tmp_path, "--access-log", str(log), module="meshproxy") as proxy:
            await started(proxy)
            async with channel(port) as client:
                app.fails = [grpc.StatusCode.UNAVAILABLE] * 2
                assert await method(client, "Unary")(b"hello") == b"hello"
                assert len(app.calls) == 3, "Istio retries UNAVAILABLE twice where no VirtualService says otherwise"
                assert (await status_of(method(client, "Fail")(b"NOT_FOUND")))[0] is grpc.StatusCode.NOT_FOUND
                call = method(client, "Bidi")(iter([b"1", b"2", b"3"]))
                assert [answer async for answer in call] == [b"1", b"2", b"3"]

            async def counted() -> bool:
                return await metric(proxy, "istio_requests_total{") == 3

            await until(counted)
            assert await metric(proxy, "istio_request_messages_total{") == 5
            assert await metric(proxy, "istio_response_messages_total{") == 4
            await until(lambda: log.exists() and log.read_text().count("\n") == 3)
        lines = log.read_text().splitlines()
        assert [line.split('"')[1] for line in lines] == [
            f"POST /test.Echo/{name} HTTP/2" for name in ("Unary", "Fail", "Bidi")
        ]
        assert all(line.split('"')[2].startswith(" 200 - via_upstream ") for line in lines)
