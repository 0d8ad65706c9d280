"""What passes between a site and the process that decodes its files: JSON of a fixed form, then the bytes of arrays.

A message begins with 25 bytes: ``FVD2``, its kind, its number, the length of the JSON and that of all arrays; an answer
has the number of its request, so that no file ever gets what belongs to another. What is received is built by the type
that is expected and by nothing in the message, so that a process that a file took over can answer wrong values and no
more: no code, no other type, no array that is larger than is allowed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import select
import struct
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np
from numpy.typing import NDArray

MAGIC = b"FVD2"
HEAD = struct.Struct("<4sBIQQ")
REQUEST, READY, VALUE, FAULT, BROKEN, MEMORY, MISSING = range(7)
"""Kinds of messages: from the site the first, from the child the others; the last four carry texts."""
MOST_TEXT = 1 << 28
"""Bytes of JSON; the header of a series of 10,000 slices has 4 MB."""
MOST_ARRAYS = 8
MOST_AXES = 8
ARRAY = "array"
"""Key of what stands in the JSON for an array: its number."""
KINDS = "biuf"
"""Kinds of numpy types that are taken: no objects, no records, no text."""

Arrays = Sequence[NDArray[Any]]
Maker = Callable[[Any, Arrays], Any]


class Ended(Exception):
    """The other end closed its pipe."""


class Overdue(Exception):
    """Nothing more came in time."""


class Malformed(Exception):
    """What came is no message, or none of the type that was expected."""


def send(pipe: int, content: Sequence[memoryview], deadline: float | None = None) -> None:
    """Write one message.

    Args:
        pipe: where to; one with a deadline does not block.
        content: what :func:`packed` made.
        deadline: until when, by :func:`time.monotonic`; None waits for ever.

    Raises:
        OSError: if the other end is gone.
        Overdue: if the other end does not read.
    """
    for left in content:
        while left:
            if deadline is not None:
                _wait(pipe, select.POLLOUT, deadline)
            left = left[os.write(pipe, left) :]


def packed(kind: int, value: Any, number: int = 0) -> list[memoryview]:
    """The bytes of a message: its first part, and the arrays that follow it.

    Raises:
        ValueError: if it is longer than is read.
    """
    arrays: list[NDArray[Any]] = []
    placed: list[tuple[str, tuple[int, ...], list[int]]] = []

    def plain(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            order = sorted(range(item.ndim), key=lambda axis: -abs(item.strides[axis]))
            # Axes in the order they lie in memory: sums over the result run as they would over the original.
            arrays.append(np.asarray(item.transpose(order), order="C"))
            placed.append((item.dtype.str, arrays[-1].shape, order))
            return {ARRAY: len(arrays) - 1}
        if isinstance(item, np.generic):
            return item.item()
        if dataclasses.is_dataclass(item):
            return [getattr(item, name) for name in _names(item.__class__)]
        return sorted(item) if isinstance(item, set | frozenset) else os.fspath(item)

    # The list of arrays is full once the value before it is written.
    content = json.dumps({"value": value, "arrays": placed}, default=plain).encode("ascii")
    if len(content) > MOST_TEXT or len(arrays) > MOST_ARRAYS:
        raise ValueError(f"a message of {len(content)} bytes and {len(arrays)} arrays")
    head = HEAD.pack(MAGIC, kind, number, len(content), sum(item.nbytes for item in arrays))
    return [memoryview(head + content), *(_bytes(item) for item in arrays)]


def _bytes(contiguous: NDArray[Any]) -> memoryview:
    """The bytes of an array, whatever their order in a number."""
    return contiguous.reshape(-1).view(np.uint8).data


def receive(
    pipe: int, kinds: Mapping[int, Any], most: int, deadline: float | None = None, number: int = 0
) -> tuple[int, Any]:
    """Read one message: its kind, and its value as the type that belongs to it.

    Args:
        pipe: what to read.
        kinds: the kinds that may come, each with its type as written in the annotation of a function.
        most: bytes of arrays that are taken at most.
        deadline: until when, see :func:`parts`.
        number: that of the request that is answered.

    Raises:
        Ended, Overdue, Malformed: see :func:`parts`; also for a value of another type, and for another number.
    """
    kind, answered, value, arrays = parts(pipe, list(kinds), most, deadline)
    if answered != number:
        raise Malformed(f"an answer to request {answered} where {number} was asked")
    return kind, built(kinds[kind], value, arrays)


def built(hint: Any, value: Any, arrays: Arrays) -> Any:
    """A value of a type out of JSON.

    Raises:
        Malformed: if it is none.
    """
    try:
        return maker(hint)(value, arrays)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise Malformed(type(error).__name__) from None


def parts(pipe: int, kinds: Sequence[int], most: int, deadline: float | None = None) -> tuple[int, int, Any, Arrays]:
    """Read one message: its kind, its number, its JSON and its arrays.

    Args:
        pipe: what to read.
        kinds: the kinds that may come.
        most: bytes of arrays that are taken at most.
        deadline: until when, by :func:`time.monotonic`; None waits for ever.

    Raises:
        Ended: if the other end is gone.
        Overdue: after the deadline.
        Malformed: for anything else than such a message.
    """
    magic, kind, number, length, total = HEAD.unpack(_read(pipe, HEAD.size, deadline))
    if magic != MAGIC or kind not in kinds or length > MOST_TEXT or total > most:
        raise Malformed(f"{length} bytes of text, {total} bytes of arrays where {most} are taken at most")
    try:
        content = json.loads(bytes(_read(pipe, length, deadline)))
        arrays = [_empty(*item) for item in content["arrays"]]
        if len(arrays) > MOST_ARRAYS or sum(base.nbytes for base, _ in arrays) != total:
            raise ValueError
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise Malformed(type(error).__name__) from None
    for base, _ in arrays:
        _fill(pipe, _bytes(base), deadline)
    return kind, number, content.get("value"), [turned for _, turned in arrays]


def _empty(kind: str, shape: Sequence[int], order: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """An array to be filled, and the same with its axes turned as the sender had them.

    Raises:
        ValueError, TypeError: for what is no plain array.
    """
    dtype = np.dtype(kind)
    sides = [int(side) for side in shape]
    if dtype.kind not in KINDS or len(sides) > MOST_AXES or sorted(order) != list(range(len(sides))):
        raise ValueError
    if min(sides, default=0) < 0 or math.prod(sides) * dtype.itemsize > 1 << 48:
        raise ValueError
    base = np.empty(sides, dtype)
    return base, base.transpose(np.argsort(order)) if sides else base


def _read(pipe: int, length: int, deadline: float | None) -> bytearray:
    content = bytearray(length)
    _fill(pipe, memoryview(content), deadline)
    return content


def _fill(pipe: int, view: memoryview, deadline: float | None) -> None:
    while view:
        if deadline is not None:
            _wait(pipe, select.POLLIN, deadline)
        got = os.readv(pipe, [view])
        if not got:
            raise Ended
        view = view[got:]


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise Overdue


@functools.cache
def hints(function: Any) -> tuple[dict[str, Any], Any]:
    """The types of a function's arguments in their order, and that of its result."""
    named = typing.get_type_hints(function)
    result = named.pop("return")
    return named, result


@functools.cache
def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


@functools.cache
def _fields(cls: type) -> list[Maker]:
    named = typing.get_type_hints(cls)
    return [maker(named[field.name]) for field in dataclasses.fields(cls)]


@functools.cache
def maker(hint: Any) -> Maker:
    """What builds a value of a type out of JSON; it raises ValueError or TypeError where that does not fit.

    Raises:
        NotImplementedError: for a type that no message has.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, str, bool, type(None), None):
        return functools.partial(_exactly, type(None) if hint is None else hint)
    if hint is float:
        return _number
    if hint is Path:
        return lambda value, _: Path(_exactly(str, value, _))
    if origin is Literal:
        return functools.partial(_one_of, inner)
    if origin in (Union, types.UnionType):
        return functools.partial(_either, [maker(item) for item in inner])
    if origin is np.ndarray or hint is np.ndarray:
        return functools.partial(_array, _scalar(inner))
    if origin in (tuple, list, set, frozenset, Sequence):
        return _sequence(origin, inner)
    if dataclasses.is_dataclass(hint):
        return functools.partial(_dataclass, hint)
    raise NotImplementedError(f"{hint} in a message")


def _exactly(kind: type, value: Any, _: Arrays) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value


def _number(value: Any, _: Arrays) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _one_of(allowed: Sequence[Any], value: Any, _: Arrays) -> Any:
    if not any(type(value) is type(item) and value == item for item in allowed):
        raise ValueError
    return value


def _either(makers: Sequence[Maker], value: Any, arrays: Arrays) -> Any:
    for item in makers:
        try:
            return item(value, arrays)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _scalar(inner: Sequence[Any]) -> Any:
    """The type of an array's values, where its annotation says it."""
    said = typing.get_args(inner[1])[:1] if len(inner) > 1 else ()
    known = bool(said) and isinstance(said[0], type) and issubclass(said[0], np.generic)
    return said[0] if known else np.generic


def _array(kind: Any, value: Any, arrays: Arrays) -> NDArray[Any]:
    number = value[ARRAY] if isinstance(value, dict) and list(value) == [ARRAY] else None
    if type(number) is not int or not 0 <= number < len(arrays) or not issubclass(arrays[number].dtype.type, kind):
        raise TypeError
    return arrays[number]


def _sequence(origin: Any, inner: Sequence[Any]) -> Maker:
    kind = list if origin is Sequence else origin
    if origin is tuple and (len(inner) < 2 or inner[1] is not Ellipsis):
        return functools.partial(_fixed, [maker(item) for item in inner])
    return functools.partial(_many, kind, maker(inner[0]))


def _fixed(makers: Sequence[Maker], value: Any, arrays: Arrays) -> tuple[Any, ...]:
    if type(value) is not list:
        raise TypeError
    return tuple(make(item, arrays) for make, item in zip(makers, value, strict=True))


def _many(kind: Any, make: Maker, value: Any, arrays: Arrays) -> Any:
    if type(value) is not list:
        raise TypeError
    return kind(make(item, arrays) for item in value)


def _dataclass(cls: Any, value: Any, arrays: Arrays) -> Any:
    return cls(*_fixed(_fields(cls), value, arrays))
