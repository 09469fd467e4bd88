"""Endpoints and where they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from meshproxy.model.workload import UNKNOWN_WORKLOAD, WorkloadLabels

NO_LABELS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Locality:
    """region/zone/subzone; empty parts are unknown (Istio: a missing part matches anything)."""

    region: str = ""
    zone: str = ""
    subzone: str = ""

    @classmethod
    def parse(cls, text: str) -> "Locality":
        """`region/zone/subzone`; missing parts become empty; more than three parts is ValueError."""
        parts = text.split("/") if text else []
        if len(parts) > 3:
            raise ValueError(f"locality {text!r} has more than three parts")
        return cls(*parts)

    def __str__(self) -> str:
        return "/".join((self.region, self.zone, self.subzone)).rstrip("/")


NOWHERE = Locality()


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One address of a service."""

    address: str
    """IP literal, DNS name (cluster discovery is STRICT_DNS), or absolute unix socket path."""
    port: int
    """0 for a unix socket."""
    weight: int = 1
    speaks_mtls: bool = False
    """The endpoint's workload has a mesh proxy (label security.istio.io/tlsMode: istio, or it is one of ours)."""
    spiffe_ids: tuple[str, ...] = ()
    """Identities this endpoint may present (secure naming); empty: any identity of the trust domain."""
    workload: WorkloadLabels = UNKNOWN_WORKLOAD
    """What metrics say of it."""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Names the endpoint in health reports: `address:port`."""
        return f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalityEndpoints:
    """The endpoints of one priority in one locality (Envoy LocalityLbEndpoints)."""

    locality: Locality = NOWHERE
    priority: int = 0
    weight: int | None = None
    """Locality weight; None where the cluster is not locality-weighted."""
    endpoints: tuple[Endpoint, ...] = ()
