"""SPIFFE identities in Istio's form. Source: SPIFFE-ID standard; istio.io concepts/security."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """`spiffe://<trust_domain>/ns/<namespace>/sa/<service_account>`."""

    trust_domain: str
    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @classmethod
    def parse(cls, uri: str) -> "SpiffeId":
        """ValueError where the text is not an Istio SPIFFE ID (scheme, port, query, user info, path shape, length)."""
        if not uri.startswith("spiffe://") or len(uri) > 2048:
            raise ValueError(f"{uri[:80]!r} is not a SPIFFE ID")
        domain, *path = uri[len("spiffe://") :].split("/")
        if (
            not domain
            or not set(domain) <= _DOMAIN_CHARACTERS
            or len(path) != 4
            or path[0] != "ns"
            or path[2] != "sa"
            or not all(path)
            or any(part in (".", "..") or not set(part) <= _PATH_CHARACTERS for part in path)
        ):
            raise ValueError(f"{uri[:80]!r} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<account>")
        return cls(domain, path[1], path[3])


_DOMAIN_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-._")
_PATH_CHARACTERS = _DOMAIN_CHARACTERS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
