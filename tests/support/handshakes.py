"""TLS handshakes in memory: two SSLObjects, no socket."""

import ssl
from dataclasses import dataclass


@dataclass
class Ends:
    """Both ends of one connection, after the handshake."""

    client: ssl.SSLObject
    server: ssl.SSLObject

    def talk(self) -> None:
        """One byte each way, so that session tickets and late alerts arrive."""
        self.server.write(b"s")
        assert self.client.read(1) == b"s"
        self.client.write(b"c")
        assert self.server.read(1) == b"c"


def shake_hands(
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    *,
    server_name: str | None = None,
    session: ssl.SSLSession | None = None,
) -> Ends:
    """Raises the ssl.SSLError of the end that refuses first, the server's where both do."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = Ends(
        client.wrap_bio(to_client, to_server, server_hostname=server_name, session=session),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    is_done = {"client": False, "server": False}
    for _ in range(10):
        for name, end in (("client", ends.client), ("server", ends.server)):
            if not is_done[name]:
                try:
                    end.do_handshake()
                    is_done[name] = True
                except ssl.SSLWantReadError:
                    pass
        if all(is_done.values()):
            ends.talk()
            return ends
    raise AssertionError("the handshake neither ended nor failed")


def client_hello(context: ssl.SSLContext, server_name: str | None = None) -> bytes:
    """The bytes a real client sends first."""
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=server_name)
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a client waits for an answer")


def in_records_of(size: int, records: bytes) -> bytes:
    """The same handshake message in records of at most `size` bytes."""
    message = b""
    at = 0
    while at < len(records):
        length = int.from_bytes(records[at + 3 : at + 5], "big")
        message += records[at + 5 : at + 5 + length]
        at += 5 + length
    return b"".join(
        b"\x16\x03\x01" + len(message[start : start + size]).to_bytes(2, "big") + message[start : start + size]
        for start in range(0, len(message), size)
    )
