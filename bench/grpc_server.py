"""The origin of the gRPC cases: the real grpcio, echoing whatever it is sent, run as a program of its own:

python -m bench.grpc_server PORT THREADS ADDRESS…

A thread serves one call at a time, a bidirectional one from its first message to its last. Threads, because grpc.aio
costs a server twice as much for a unary call. Messages are plain bytes: no .proto file, nothing to parse.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc  # type: ignore[import-untyped]

SERVICE, UNARY, STREAM = "bench.Echo", "Unary", "Stream"


def _unary(request: bytes, context: Any) -> bytes:
    return request


def _stream(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    return requests


def main() -> None:
    port, threads, *addresses = sys.argv[1:]
    server = grpc.server(ThreadPoolExecutor(int(threads)))
    methods = {
        UNARY: grpc.unary_unary_rpc_method_handler(_unary),
        STREAM: grpc.stream_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    for address in addresses:
        server.add_insecure_port(f"{address}:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
