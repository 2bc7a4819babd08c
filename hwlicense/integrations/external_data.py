"""ONNX's external data: the files that a network names for its weights. Nothing here needs a framework."""

from __future__ import annotations

import re
from array import array
from bisect import bisect, bisect_left
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEY: Final = b"location"
_LENGTH_DELIMITED: Final = 2
_SKIPPED: Final = {1: 8, 3: 0, 4: 0, 5: 4}
"""Bytes of the other types of fields; groups are no more than a mark at either end."""
_LONGEST: Final = 10
"""Bytes of a number."""
_TAG: Final = 0xFFFFFFFF
"""Bits of a tag: parsers drop those above."""
WITHIN: Final = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Where tensors lie in the messages of onnx.proto, by the numbers of fields."""


def locations(network: memoryview) -> list[str]:
    """Each location once, as it is written. Nothing of what is no protocol buffer, which frameworks refuse themselves.

    Only this tells a location from a tensor of that name, and finds one however it was serialized.
    """
    keys = array("Q", (found.start() for found in re.finditer(_KEY, network)))  # in large networks mostly none
    found: dict[bytes, None] = {}
    left = [("model", 0, len(network))] if keys else []
    while left:
        kind, start, end = left.pop()
        if kind == "entry":
            entry = {number: bytes(network[at:to]) for number, at, to in _fields(network, start, end)}
            if entry.get(1) == _KEY:
                found[entry.get(2, b"")] = None
            continue
        within = WITHIN[kind]
        for number, at, to in _fields(network, start, end):
            if number in within and to - at > len(_KEY) and bisect(keys, to) > bisect_left(keys, at):
                left.append((within[number], at, to))
    return [each.decode("utf-8", "replace") for each in found]


def _fields(message: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that has a length."""
    while at < end:
        tag, at = _varint(message, at, end)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at, end)
        elif kind == _LENGTH_DELIMITED:
            size, at = _varint(message, at, end)
            if size > end - at:
                return
            yield (tag & _TAG) >> 3, at, at + size
            at += size
        elif kind in _SKIPPED:
            at += _SKIPPED[kind]
        else:
            return


def _varint(message: memoryview, start: int, end: int) -> tuple[int, int]:
    """A number and where it ends, which is beyond `end` where it is cut, or longer than any."""
    value = shift = 0
    for at in range(start, min(end, start + _LONGEST)):
        byte = message[at]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:  # noqa: PLR2004  # the bit that says that more follow
            return value, at + 1
    return value, end + 1
