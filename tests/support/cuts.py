"""Bytes in pieces, for laws that hold however a stream is cut."""

from collections.abc import Iterable


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The pieces between these offsets, in order; together they are the data. Empty pieces are among them."""
    ends = sorted(min(place, len(data)) for place in places)
    return [data[begin:end] for begin, end in zip([0, *ends], [*ends, len(data)], strict=True)]
