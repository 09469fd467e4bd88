"""How much of a priority's traffic each of its localities takes.

Source: Envoy locality_weight.rst, HostSetImpl::effectiveLocalityWeight (floating point, unlike priorities).
"""


def effective_weight(weight: int, available: int, total: int, overprovisioning_percent: int = 140) -> float:
    """The locality's weight, less what its missing endpoints cannot carry; 0.0 when it takes nothing."""
    if not total or not available:
        return 0.0
    return weight * min(1.0, overprovisioning_percent / 100 * available / total)
