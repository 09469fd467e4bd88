"""A connection that another proxy passes on: its transport, under the names that the PROXY header gave it.

Who asks the transport for its names (log, x-forwarded-for, routes by address) need not know. Costs what is not proxied
nothing, and what is one attribute read a call.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from meshproxy.codec.proxy_protocol import ProxyHeader


class ProxiedTransport:
    """The methods of the transport under it, and the header's names."""

    __slots__ = (
        "_header",
        "_transport",
        "abort",
        "can_write_eof",
        "close",
        "get_protocol",
        "get_write_buffer_limits",
        "get_write_buffer_size",
        "is_closing",
        "is_reading",
        "pause_reading",
        "resume_reading",
        "set_protocol",
        "set_write_buffer_limits",
        "write",
        "write_eof",
        "writelines",
    )

    def __init__(self, transport: Any, header: ProxyHeader) -> None:
        """header: one that has names."""
        self._transport = transport
        self._header = header
        for name in self.__slots__[2:]:
            setattr(self, name, getattr(transport, name))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self._header.source
        if name == "sockname":
            return self._header.destination
        return self._transport.get_extra_info(name, default)


class Introduction(asyncio.Protocol):
    """Stands in a connection's place until it is made, to give its protocol the transport with the right names."""

    __slots__ = ("_factory", "_header")

    def __init__(self, factory: Callable[[], asyncio.BaseProtocol], header: ProxyHeader) -> None:
        self._factory = factory
        self._header = header

    def connection_made(self, transport: Any) -> None:
        protocol = self._factory()
        transport.set_protocol(protocol)
        protocol.connection_made(ProxiedTransport(transport, self._header))  # type: ignore[arg-type]
