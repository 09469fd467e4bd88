"""QUIC or TCP to one endpoint: what is remembered of whether QUIC gets through. Pure.

Decides: may QUIC be tried now. Leaves to others: the attempts and their race (upstream.connect).

Source: Envoy's HttpServerPropertiesCache and ConnectivityGrid (HTTP/3 marked broken for 5 minutes, doubling to a day).
Here a minute, doubling to ten: within one network a blocked UDP port is a mistake that somebody is about to mend, and
an attempt costs a request nothing, as TCP serves it meanwhile.
"""

from typing import Any

from meshproxy.upstream.worker_state import NEVER

TCP_AFTER_S = 0.3
"""How far ahead of TCP an attempt by QUIC is (Envoy: 300 ms)."""
BACK_OFF_S = 60.0
MAX_BACK_OFF_S = 600.0


class QuicTries:
    """Monotonic seconds come in; nothing here waits."""

    __slots__ = ("_back_off_s", "made_from", "probe", "retry_at", "setup")

    def __init__(self) -> None:
        self._back_off_s = BACK_OFF_S
        self.retry_at = NEVER
        """When QUIC, which did not get through, is to be tried again; NEVER while nothing speaks against it."""
        self.probe: Any = None
        """The attempt that is made beside TCP connections in use."""
        self.made_from: Any = None
        self.setup: Any = None
        """What an attempt needs, as it was made from the TLS settings `made_from` (upstream.connection_h3)."""

    def may_try(self, now: float) -> bool:
        return self.retry_at is NEVER or self.retry_at <= now

    def is_due(self, now: float) -> bool:
        """It has been left alone for long enough."""
        return self.retry_at <= now and self.probe is None

    def failed(self, now: float) -> None:
        """Not for lack of a server: TCP reached it."""
        self.retry_at = now + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, MAX_BACK_OFF_S)

    def worked(self) -> None:
        self.retry_at = NEVER
        self._back_off_s = BACK_OFF_S
