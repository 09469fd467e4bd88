"""What every contender is configured with: the same services, endpoints, zones and routes, in no one's format."""

from dataclasses import dataclass

REGION = "region-1"
LOCAL_ZONE = "zone1"
LOCALITY = f"{REGION}/{LOCAL_ZONE}/rack1"
SPLIT = {"zone1": 80, "zone2": 20}
"""Share of the traffic each zone gets, percent, as DestinationRule `distribute` says it."""


@dataclass(frozen=True, slots=True)
class Place:
    """One endpoint and the zone it is in."""

    address: str
    port: int
    zone: str


@dataclass(frozen=True, slots=True)
class Service:
    host: str
    endpoints: tuple[Place, ...]


ECHO_HOST = "echo.bench"
ORIGIN_ADDRESSES = (("127.0.0.11", "zone1"), ("127.0.0.12", "zone1"), ("127.0.0.21", "zone2"), ("127.0.0.22", "zone2"))


def echo(port: int) -> Service:
    """The service under load: four endpoints in two zones, all the one origin."""
    return Service(ECHO_HOST, tuple(Place(address, port, zone) for address, zone in ORIGIN_ADDRESSES))


def many(count: int, endpoints: int, first: int = 0) -> tuple[Service, ...]:
    """`count` services that nobody calls, with `endpoints` addresses each out of 127.64.0.0/10, from number `first`."""
    services = []
    number = first
    for index in range(count):
        places = []
        for _ in range(endpoints):
            address = f"127.{64 + (number >> 16 & 63)}.{number >> 8 & 255}.{number & 255}"
            places.append(Place(address, 9000, "zone1" if number % 2 else "zone2"))
            number += 1
        services.append(Service(f"service-{index}.bench", tuple(places)))
    return tuple(services)
