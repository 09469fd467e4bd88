"""The two messages of grpc.health.v1.Health/Check, as protobuf has them. Pure.

Source: grpc-proto health.proto; protobuf's wire format (varints, length-delimited fields).
"""

from typing import Final

METHOD: Final = b"/grpc.health.v1.Health/Check"
_SERVING = 1


def request(service: str) -> bytes:
    """HealthCheckRequest with its length prefix; the service may be empty: the server as a whole."""
    name = service.encode()
    message = b"\x0a" + _varint(len(name)) + name if name else b""
    return b"\0" + len(message).to_bytes(4, "big") + message


def is_serving(body: bytes) -> bool:
    """Whether this is one HealthCheckResponse, with its length prefix, that says SERVING."""
    if len(body) < 5 or body[0] != 0 or int.from_bytes(body[1:5], "big") != len(body) - 5:
        return False
    try:
        return _status(body[5:]) == _SERVING
    except IndexError:  # it ends within a field
        return False


def _status(message: bytes) -> int:
    """Field 1; fields that are not known are left out, the last one given counts, none is 0 (UNKNOWN)."""
    status = at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _read_varint(message, at)
            if tag >> 3 == 1:
                status = value
        elif kind == 2:
            length, at = _read_varint(message, at)
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise IndexError
        if at > len(message):
            raise IndexError
    return status


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, offset behind it); IndexError where it does not end within ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError
