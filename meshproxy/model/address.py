"""Socket addresses and host names as the mesh writes them."""

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class SocketAddress:
    """An IP address or host name with a port, or a unix socket path with port 0."""

    host: str
    port: int
    is_udp: bool = False
    """A UDP port; it and the TCP port of the same number have nothing to do with each other."""

    @property
    def is_unix(self) -> bool:
        return self.host.startswith("/")

    def __str__(self) -> str:
        if self.is_unix:
            return self.host
        written = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return f"{written}/udp" if self.is_udp else written


def is_ip(host: str) -> bool:
    """True for an IPv4 or IPv6 literal; False for a name that needs resolving."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
