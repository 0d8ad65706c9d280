"""What a value on the wire may be: checked kinds, bounded sizes, and an adapter's arrays as one row of numbers.

Whoever reads a message reads what a stranger may have written. Each function returns a value of its kind or raises one
of :data:`FAULTS`; nothing is unpickled, and no memory is taken for a size that is only claimed.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedvfm.config import schema
from fedvfm.state import state

FAULTS = (KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What a value of no known form raises."""

MAX_TEXT = 500
MAX_LAYOUT = 1_000_000
MAX_ARRAYS = 20_000
MAX_SIDES = 8
MAX_METRICS = 1000
MAX_NAME = 200
MAX_SAMPLES = 1_000_000
"""Values of one metric, or ids, of single samples (simulation only)."""


def text(value: Any, most: int = MAX_TEXT) -> str:
    """Text of at most so many characters."""
    if not isinstance(value, str) or len(value) > most:
        raise TypeError("text")
    value.encode()  # half a character cannot be hashed or written down
    return value


def flag(value: Any) -> bool:
    """Yes or no, and no number."""
    if not isinstance(value, bool):
        raise TypeError("yes or no")
    return value


def whole(value: Any) -> int:
    """A whole number, and no yes or no."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("whole number")
    return value


def count(value: Any) -> int:
    """A whole number from 0 that a float holds exactly."""
    if not 0 <= whole(value) <= 2**53:
        raise ValueError("count")
    return int(value)


def rank(value: Any) -> int:
    """The rank of an adapter."""
    if not 1 <= whole(value) <= schema.MAX_RANK:
        raise ValueError("rank")
    return int(value)


def real(value: Any) -> float:
    """A finite number: the journal is JSON, which has no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("finite number")
    return float(value)


def reals(values: Mapping[str, Any]) -> dict[str, float]:
    """Named numbers: few, and with short names."""
    return {text(name, MAX_NAME): real(value) for name, value in _few(values).items()}


def counts(values: Mapping[str, Any]) -> dict[str, int]:
    """Named counts, in the same bounds."""
    return {text(name, MAX_NAME): count(value) for name, value in _few(values).items()}


def columns(values: Mapping[str, Any]) -> dict[str, list[float]]:
    """Named lists of numbers."""
    return {text(name, MAX_NAME): [real(one) for one in _list(column)] for name, column in _few(values).items()}


def texts(values: Any) -> tuple[str, ...]:
    """A list of texts."""
    return tuple(text(one) for one in _list(values))


def _few(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(values) > MAX_METRICS:
        raise ValueError("too many names")
    return values


def _list(values: Any) -> list[Any]:
    if not isinstance(values, list) or len(values) > MAX_SAMPLES:
        raise TypeError("list")
    return values


@functools.lru_cache(maxsize=64)
def _npy_header(size: int) -> bytes:
    """The ``.npy`` header (version 1.0) of ``size`` little-endian float32 numbers in one row."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (size,)})
    return file.getvalue()


@functools.lru_cache(maxsize=16)
def _parse_layout(layout: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of the arrays that lie one behind another."""
    rows = []
    for name, shape in _list(json.loads(text(layout, MAX_LAYOUT))):
        sides = _list(shape)
        if len(sides) > MAX_SIDES or any(type(side) is not int or side < 0 for side in sides):
            raise TypeError("a name and a shape")
        rows.append((text(name), tuple(sides)))
    if len(rows) > MAX_ARRAYS or len({name for name, _ in rows}) < len(rows):
        raise ValueError("a name is repeated, or there are more than any adapter has")
    return tuple(rows)


def pack(values: state.AdapterState) -> tuple[str, bytes]:
    """Where each array lies, and all of them one behind another as one ``.npy``.

    Flower's transport moves every array as an object of its own and builds each anew at both ends; fifty small ones
    cost more time than their numbers.
    """
    layout = layout_of({name: array.shape for name, array in values.items()})
    numbers = [np.ascontiguousarray(array, dtype="<f4").tobytes() for array in values.values()]
    return layout, b"".join([_npy_header(values.parameters), *numbers])


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Names and shapes as they travel."""
    return json.dumps([[name, shape] for name, shape in shapes.items()], separators=(",", ":"))


def shapes_of(layout: Any) -> dict[str, tuple[int, ...]]:
    """The inverse of :func:`layout_of`."""
    return dict(_parse_layout(layout))


def unpack(layout: Any, data: bytes) -> state.AdapterState:
    """The inverse of :func:`pack`; the arrays are views of ``data``."""
    rows = _parse_layout(layout)
    size = sum(math.prod(shape) for _, shape in rows)
    header = _npy_header(size)
    if len(data) != len(header) + 4 * size or not data.startswith(header):
        raise ValueError("not the numbers of this layout")
    numbers = np.frombuffer(data, dtype="<f4", offset=len(header))
    arrays, start = {}, 0
    for name, shape in rows:
        stop = start + math.prod(shape)
        arrays[name] = numbers[start:stop].reshape(shape)
        start = stop
    return state.AdapterState(arrays)
