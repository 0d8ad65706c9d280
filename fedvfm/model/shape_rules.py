"""Shapes of what torch computes on the meta device by Python code that loads its compiler, worked out here instead.

There an addition or a convolution imports sympy and torch._dynamo: more seconds than all else that ``--dry-run`` does
after torch is loaded. Within :class:`ShapeRules` the common operations of a network are formulas; what these do not
cover, or where they would have to guess, is left to torch, which computes the same later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _python_dispatch

ATEN: Any = torch.ops.aten


class ShapeRules(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which common operations on the meta device give their shape at once.

    Autograd stands above it, so that what is saved for a backward pass, and its storages, are as without it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the method below in what imports the compiler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(func)
        shaped = None if rule is None or kwargs else rule(*args)
        return func(*args, **(kwargs or {})) if shaped is None else shaped


def elementwise(*given: Any) -> Tensor | None:
    """The result of an operation on each element: broadcast, and in memory as the operands lie."""
    tensors = [each for each in given if isinstance(each, Tensor)]
    if not _plain(*tensors) or not tensors[0].is_floating_point():
        return None
    shape = torch.Size(np.broadcast_shapes(*(tensor.shape for tensor in tensors)))  # torch's own loads sympy
    whole = [tensor for tensor in tensors if tensor.shape == shape]
    if all(tensor.is_contiguous() for tensor in tensors):
        return tensors[0].new_empty(shape)
    if len(whole) < len(tensors) or len({tensor.stride() for tensor in whole}) > 1 or not _dense(whole[0]):
        return None
    return torch.empty_strided(shape, whole[0].stride(), dtype=whole[0].dtype, device=whole[0].device)


def softmax(values: Tensor, _dim: int, other: Any = None) -> Tensor | None:
    """Shapes: as ``values``, contiguous."""
    return values.new_empty(values.shape) if _plain(values) and not other and values.is_contiguous() else None


def product(left: Tensor, right: Tensor) -> Tensor | None:
    """Of matrices. Shapes: (..., n, k) and (..., k, m) to (..., n, m)."""
    if not _plain(left, right) or left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-2]:
        return None
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


def product_and_sum(added: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """As :func:`product`, with a bias."""
    return product(left, right) if _plain(added, left) and added.shape[-1] == right.shape[-1] else None


def layer_norm(
    values: Tensor, size: Sequence[int], weight: Tensor | None, bias: Tensor | None, _eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Shapes: as ``values``; mean and deviation (..., 1, ...) over the last ``len(size)`` dimensions."""
    if values.dtype != torch.float32 or not _plain(*(part for part in (values, weight, bias) if part is not None)):
        return None
    kept = (*values.shape[: values.ndim - len(size)], *(1 for _ in size))
    return values.new_empty(values.shape), values.new_empty(kept), values.new_empty(kept)


def group_norm(
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: int,
    _width: int,
    _places: int,
    groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Shapes: as ``values`` (n, channels, ...); mean and deviation (n, groups)."""
    if not _plain(*(part for part in (values, weight, bias) if part is not None)) or not values.is_contiguous():
        return None
    return values.new_empty(values.shape), values.new_empty((count, groups)), values.new_empty((count, groups))


def convolution(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor | None:
    """Shapes: values (n, in, *size), weight (out, in / groups, *kernel), transposed (in, out / groups, *kernel).

    Source: documentation of torch's nn.Conv2d and nn.ConvTranspose2d.
    """
    dimensions = values.ndim - 2
    parts = [list(part) * (dimensions if len(part) == 1 else 1) for part in (stride, padding, dilation)]
    if not _plain(values, weight) or weight.ndim != values.ndim or any(len(part) != dimensions for part in parts):
        return None
    expected, more = weight.shape[0] if transposed else weight.shape[1] * groups, list(output_padding)
    if values.shape[1] != expected or (transposed and len(more) != dimensions):
        return None
    steps = list(zip(values.shape[2:], weight.shape[2:], *parts, strict=True))
    if transposed:
        out = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + m for (n, k, s, p, d), m in zip(steps, more, strict=True)]
    else:
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps]
    if min(out, default=0) < 1:
        return None
    # On the meta device torch's own is contiguous, however its input lies.
    return values.new_empty((values.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], *out))


def concatenation(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """Shapes: (..., n_i, ...) each, equal but in ``dim``."""
    if not tensors or not _plain(*tensors) or tensors[0].ndim == 0:
        return None
    at = dim % tensors[0].ndim
    before, after = tensors[0].shape[:at], tensors[0].shape[at + 1 :]
    if any((tensor.shape[:at], tensor.shape[at + 1 :]) != (before, after) for tensor in tensors):
        return None
    return _empty((*before, sum(tensor.shape[at] for tensor in tensors), *after), *tensors)


def resizing(values: Tensor, size: Sequence[int], *_: Any) -> Tensor | None:
    """Shapes: (n, channels, length or height and width) to (n, channels, ``*size``)."""
    if not _plain(values) or values.ndim != 2 + len(size) or min(size) < 1:
        return None
    return _empty((*values.shape[:2], *size), values)


def _empty(shape: Sequence[int], *tensors: Tensor) -> Tensor:
    """A result of this shape; where the channels of all of these lie last in memory, so do its own, as torch has it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    kept = last is not None and all(
        not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last) for tensor in tensors
    )
    order = last if kept and last is not None else torch.contiguous_format
    return torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device, memory_format=order)


def _plain(*tensors: Tensor) -> bool:
    """Whether all lie on the meta device, hold something, and are of one type."""
    return len({tensor.dtype for tensor in tensors}) == 1 and all(
        tensor.is_meta and tensor.numel() and tensor.layout == torch.strided for tensor in tensors
    )


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill their place in memory, in whatever order."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return span == math.prod(tensor.shape) and min(tensor.stride(), default=1) > 0


RULES: Mapping[Any, Callable[..., Any]] = {
    ATEN._safe_softmax.default: softmax,
    ATEN.add.Tensor: elementwise,
    ATEN.addmm.default: product_and_sum,
    ATEN.bmm.default: product,
    ATEN.cat.default: concatenation,
    ATEN.convolution.default: convolution,
    ATEN.div.Tensor: elementwise,
    ATEN.gelu.default: elementwise,
    ATEN.mm.default: product,
    ATEN.mul.Scalar: elementwise,
    ATEN.mul.Tensor: elementwise,
    ATEN.native_group_norm.default: group_norm,
    ATEN.native_layer_norm.default: layer_norm,
    ATEN.relu.default: elementwise,
    ATEN.sub.Tensor: elementwise,
    ATEN.upsample_bicubic2d.default: resizing,
    ATEN.upsample_bilinear2d.default: resizing,
    ATEN.upsample_linear1d.default: resizing,
}
