"""An origin of known capacity, run as a program of its own: python -m bench.limited PORT CONCURRENCY SERVICE_MS.

It works on CONCURRENCY requests at a time, SERVICE_MS each; what comes beyond that waits its turn, however many.
"""

import asyncio
import sys

_BODY = b"done\n"
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


async def _serve(port: int, concurrency: int, service_s: float) -> None:
    turns = asyncio.Semaphore(concurrency)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = b""
            while b"\r\nconnection: close" not in head.lower():
                head = await reader.readuntil(b"\r\n\r\n")
                async with turns:
                    await asyncio.sleep(service_s)
                writer.write(_ANSWER)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000))
