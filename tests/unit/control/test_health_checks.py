import pytest

from meshproxy.control.health_checks import is_healthy_status, request_of
from meshproxy.model.cluster import HealthCheck
from meshproxy.model.endpoint import Endpoint

ENDPOINT = Endpoint(address="10.0.0.1", port=80)


@pytest.mark.parametrize(
    ("line", "is_healthy"),
    [
        (b"HTTP/1.1 200 OK\r\n", True),
        (b"HTTP/1.0 204\r\n", True),
        (b"HTTP/1.1 302 Found\r\n", True),
        (b"HTTP/1.1 400 Bad Request\r\n", False),
        (b"HTTP/1.1 503 Service Unavailable\r\n", False),
        (b"HTTP/1.1 100 Continue\r\n", False),
        (b"HTTP/1.1 2000 OK\r\n", False),
        (b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n", False),
        (b"SSH-2.0-OpenSSH\r\n", False),
        (b"", False),
    ],
)
def test_a_status_from_200_to_399_is_healthy(line: bytes, is_healthy: bool) -> None:
    assert is_healthy_status(line) is is_healthy


def test_the_request_has_what_the_probe_names() -> None:
    check = HealthCheck(kind="http", path="healthz", host="app.example", headers=(("X-Probe", "1"),))
    request = request_of(check, ENDPOINT)
    assert request.startswith(b"GET /healthz HTTP/1.1\r\nHost: app.example\r\n")
    assert b"\r\nX-Probe: 1\r\n" in request
    assert request.endswith(b"\r\n\r\n")


def test_no_value_of_a_probe_can_start_another_line() -> None:
    check = HealthCheck(kind="http", path="/a b\r\nX: y", host="h", headers=(("A", "b\r\nC: d"), ("E", "f")))
    lines = request_of(check, ENDPOINT).split(b"\r\n")
    assert lines[0] == b"GET /a%20b%0D%0AX:%20y HTTP/1.1"
    assert not any(line.startswith((b"A:", b"C:", b"X:")) for line in lines)
    assert b"E: f" in lines
