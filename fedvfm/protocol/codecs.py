"""Codecs: how the numbers of an adapter are written on the wire. ``recipe.codec`` names one; both ends stand on it.

``fp32`` sends every adapter whole, as it is. Every other codec sends the difference to an adapter that the other end is
known to hold, quantised row by row. What a difference lost is added to the next one that the same sender codes (error
feedback), so that it is sent later and not lost. At a site that is done after a privacy mechanism drew its noise: what
is sent and what is kept for the next round are functions of the noised updates alone (post-processing).

Source: Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
    Speech DNNs", Interspeech 2014 (error feedback); Tang et al., "DoubleSqueeze: Parallel Stochastic Gradient Descent
    with Double-pass Error-Compensated Compression", ICML 2019 (in both directions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedvfm import registry
from fedvfm.state import state

Wide = NDArray[np.float64]
Shape = tuple[int, ...]

PLAIN = "fp32"
TABLE = registry.Table(
    "codec",
    {
        PLAIN: "fedvfm.protocol.codecs:Float32",
        "fp16": "fedvfm.protocol.codecs:Float16",
        "int8": "fedvfm.protocol.codecs:int8",
        "int4": "fedvfm.protocol.codecs:int4",
    },
)


class Codec(Protocol):
    """One array to bytes and back. Whoever decodes reads what a stranger may have written."""

    def size(self, shape: Shape) -> int:
        """Bytes of an array of this shape."""
        ...

    def encode(self, values: Wide) -> bytes:
        """The bytes of finite numbers."""
        ...

    def decode(self, data: bytes, shape: Shape) -> state.Array:
        """The numbers, as float32.

        Args:
            data: of the length that :meth:`size` says.
            shape: of the array.

        Raises:
            ValueError: if no encoder writes these bytes.
        """
        ...


def table_of(shape: Shape) -> tuple[int, int, bool]:
    """How an array lies as rows with a scale each: rows, numbers in a row, and whether it is turned for that.

    Rows run along the longer side, so that there are few scales: A (r, d) has r rows, B (d, r) too.
    """
    first = shape[0] if len(shape) > 1 else 1
    rest = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    return (rest, first, True) if first > rest else (first, rest, False)


def _rows(values: NDArray[Any]) -> NDArray[Any]:
    rows, columns, turned = table_of(values.shape)
    return np.ascontiguousarray(values.reshape(columns, rows).T if turned else values.reshape(rows, columns))


def _whole(rows: NDArray[Any], shape: Shape) -> state.Array:
    turned = table_of(shape)[2]
    return np.array((rows.T if turned else rows).reshape(shape), dtype=np.float32, order="C")


def _scales(rows: Wide, levels: float) -> NDArray[np.float32]:
    """The largest size of each row over ``levels``; 0 for a row whose step float32 does not hold."""
    largest = np.abs(rows).max(axis=1, initial=0.0) / levels
    scales: NDArray[np.float32] = np.minimum(largest, np.finfo(np.float32).max).astype("<f4")
    return scales


def _steps(rows: Wide, scales: NDArray[np.float32]) -> Wide:
    wide = scales.astype(np.float64)[:, None]
    return np.divide(rows, wide, out=np.zeros_like(rows), where=wide > 0)


def _read_scales(data: bytes, rows: int) -> NDArray[np.float32]:
    scales = np.frombuffer(data, dtype="<f4", count=rows)
    if not bool((np.isfinite(scales) & (scales >= 0)).all()):
        raise ValueError("a scale is no finite number from 0")
    return scales


class Float32:
    """Every number as it is."""

    def size(self, shape: Shape) -> int:
        """See :class:`Codec`."""
        return 4 * math.prod(shape)

    def encode(self, values: Wide) -> bytes:
        """See :class:`Codec`."""
        return values.astype("<f4").tobytes()

    def decode(self, data: bytes, shape: Shape) -> state.Array:
        """See :class:`Codec`."""
        return np.frombuffer(data, dtype="<f4").reshape(shape).astype(np.float32)


class Float16:
    """A scale a row, its largest size, and every number as a float16 share of it: off by 2^-12 of itself at most.

    Shares below 2^-14 are off by 2^-25 of the scale.
    """

    def size(self, shape: Shape) -> int:
        """See :class:`Codec`."""
        return 4 * table_of(shape)[0] + 2 * math.prod(shape)

    def encode(self, values: Wide) -> bytes:
        """See :class:`Codec`."""
        rows = _rows(values)
        scales = _scales(rows, 1.0)
        shares = np.clip(_steps(rows, scales), -1.0, 1.0).astype("<f2")
        return scales.tobytes() + shares.tobytes()

    def decode(self, data: bytes, shape: Shape) -> state.Array:
        """See :class:`Codec`."""
        rows, columns, _ = table_of(shape)
        scales = _read_scales(data, rows)
        shares = np.frombuffer(data, dtype="<f2", offset=4 * rows).astype(np.float32).reshape(rows, columns)
        if not bool((np.abs(shares) <= 1.0).all()):
            raise ValueError("a share is not between -1 and 1")
        return _whole(shares * scales[:, None], shape)


@dataclass(frozen=True)
class Steps:
    """A scale a row, its largest size over the levels, and every number as whole steps of it: off by half a step.

    Attributes:
        bits: 8, or 4: two numbers in a byte, the first one in the lower half.
    """

    bits: int

    @property
    def levels(self) -> int:
        """Steps to either side of zero."""
        return (1 << (self.bits - 1)) - 1

    def size(self, shape: Shape) -> int:
        """See :class:`Codec`."""
        return 4 * table_of(shape)[0] + (self.bits * math.prod(shape) + 7) // 8

    def encode(self, values: Wide) -> bytes:
        """See :class:`Codec`."""
        rows = _rows(values)
        scales = _scales(rows, self.levels)
        codes = np.clip(np.rint(_steps(rows, scales)), -self.levels, self.levels).astype(np.int8).reshape(-1)
        return scales.tobytes() + (codes if self.bits == 8 else _packed(codes)).tobytes()

    def decode(self, data: bytes, shape: Shape) -> state.Array:
        """See :class:`Codec`."""
        rows, columns, _ = table_of(shape)
        scales = _read_scales(data, rows)
        codes = np.frombuffer(data, dtype=np.int8, offset=4 * rows)
        codes = codes if self.bits == 8 else _unpacked(codes, rows * columns)
        if bool((codes < -self.levels).any()):
            raise ValueError("a step is out of range")
        with np.errstate(over="ignore"):  # what is not finite is refused by name
            return _whole(codes.reshape(rows, columns).astype(np.float32) * scales[:, None], shape)


def _packed(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    halves = np.zeros(len(codes) + len(codes) % 2, dtype=np.uint8)
    halves[: len(codes)] = codes.view(np.uint8) & 15
    return np.bitwise_or(halves[0::2], np.left_shift(halves[1::2], 4), dtype=np.uint8)


def _unpacked(data: NDArray[np.int8], count: int) -> NDArray[np.int8]:
    halves = np.empty(2 * len(data), dtype=np.int8)
    halves[0::2] = (data << 4) >> 4  # the shift back brings the sign along
    halves[1::2] = data >> 4
    if count % 2 and halves[-1]:
        raise ValueError("the last half byte is not empty")
    return halves[:count]


def int8() -> Steps:
    """A byte a number."""
    return Steps(8)


def int4() -> Steps:
    """Half a byte a number."""
    return Steps(4)


@dataclass(frozen=True, slots=True)
class Difference:
    """What one adapter has beyond another, as it travels.

    Attributes:
        codec: its name.
        base: fingerprint of the adapter that it is added to.
        target: fingerprint of what comes of that, where the base is a whole adapter; empty in an update.
        shapes: of the arrays, by name; the base's others stay as they are.
        data: their bytes, one behind another in the order of the names.
    """

    codec: str
    base: str
    target: str
    shapes: Mapping[str, Shape]
    data: bytes


@dataclass(frozen=True, slots=True)
class Coded:
    """A difference, and what is known of it where it was made.

    Attributes:
        difference: as it travels.
        after: what the other end makes of it: the arrays that travel.
        residual: what it lost, to be added to the next one.
    """

    difference: Difference
    after: state.AdapterState
    residual: dict[str, state.Array]


def encode(
    codec: str, target: Mapping[str, state.Array], base: state.AdapterState, residual: Mapping[str, state.Array]
) -> Coded:
    """Code ``target - base + residual`` of the arrays of ``target``.

    Args:
        codec: its name.
        target: where the other end should come to.
        base: what it holds, whole.
        residual: what the difference before lost; no entry counts as zeros, and so does one of another shape, as a site
            that changed its rank has. Entries of other arrays stay.

    Raises:
        ValueError: if a number is not finite.
    """
    coder: Codec = TABLE.get(codec)()
    pieces, after, lost = [], {}, {name: array for name, array in residual.items() if name not in target}
    for name in sorted(target):
        start = base[name].astype(np.float64)
        wanted = target[name].astype(np.float64)
        if name in residual and residual[name].shape == wanted.shape:
            wanted = wanted + residual[name]
        if not np.isfinite(wanted).all():
            raise ValueError(f"array '{name}' holds NaN or infinity")
        pieces.append(coder.encode(np.asarray(wanted - start)))
        after[name] = added(base[name], coder.decode(pieces[-1], base[name].shape))
        with np.errstate(over="ignore"):
            lost[name] = np.asarray(wanted - after[name], dtype=np.float32)
    shapes = {name: base[name].shape for name in sorted(target)}
    difference = Difference(codec, base.fingerprint, "", shapes, b"".join(pieces))
    return Coded(difference, state.AdapterState(after), lost)


def decode(difference: Difference, base: state.AdapterState) -> state.AdapterState:
    """The arrays that travelled, added to those of the base.

    Raises:
        ValueError: if the bytes are none of this codec, or the base has no such arrays.
    """
    coder: Codec = TABLE.get(difference.codec)()
    sizes = {name: coder.size(shape) for name, shape in difference.shapes.items()}
    if sum(sizes.values()) != len(difference.data):  # before any memory is taken for what is only claimed
        raise ValueError("not the bytes of these arrays")
    after, start = {}, 0
    for name, shape in difference.shapes.items():
        if name not in base or base[name].shape != shape:
            raise ValueError("the base has no such array")
        piece = difference.data[start : start + sizes[name]]
        after[name] = added(base[name], coder.decode(piece, shape))
        start += sizes[name]
    return state.AdapterState(after)


def added(base: state.Array, difference: state.Array) -> state.Array:
    """The sum in float32, rounded once: the same bits at both ends."""
    with np.errstate(over="ignore"):  # what is not finite is refused by name
        return np.asarray(base + difference, dtype=np.float32)
