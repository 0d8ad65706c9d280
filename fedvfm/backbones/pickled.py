"""Pickled state dicts, read without running them.

A pickle is a program. ``torch.load(weights_only=True)`` runs none of it: it builds tensors and plain containers and
refuses everything else, but for what training scripts keep beside their weights in published checkpoints: their
arguments (``argparse.Namespace``, a bag of values), and losses as NumPy numbers, in whose place an empty object is made
so that no code of NumPy runs. Both are left behind. What comes out is written as safetensors, and the pickle is never
read again.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import safefile

SUFFIXES = (".bin", ".pth", ".pt", ".tar")
"""``.tar`` as in ``.pth.tar``: training scripts call a pickle so; real tar files are refused."""
WRAPPERS = ("state_dict", "model_state_dict", "model")
OTHERS = ("teacher", "student", "model_ema", "ema", "ema_state_dict", "state_dict_ema")
"""What training scripts call further sets of weights: of several the user names one."""
MOST = 4
"""How many times the size of its file the tensors of a pickle may take: views can claim any size."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class LeftBehind:
    """In place of a NumPy number beside the weights; whatever it was made of is thrown away."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_BESIDE: list[Any] = [
    argparse.Namespace,
    *((LeftBehind, f"numpy.{name}") for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")),
]
"""What a pickle may name besides tensors and plain containers."""


def read(path: Path, key: str = "") -> dict[str, Tensor]:
    """The state dict of a pickle; nothing in it is run.

    Args:
        path: of the pickle.
        key: name of the set of weights that is meant, where the file holds several.

    Raises:
        WeightsError: if it is damaged, or holds anything but tensors.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(_BESIDE):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a hostile or damaged pickle breaks the reader in a dozen ways
        raise errors.WeightsError(
            f"{path}: refused ({type(error).__name__}): the pickle is damaged, or holds code or Python objects besides "
            "tensors. Take the model's safetensors"
        ) from None
    tensors = _chosen(path, values, key)
    require_plain(path, tensors)
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return dict(tensors)


def _check_zip(path: Path) -> None:
    """The zip files of torch are uncompressed, and it maps them into memory without a look at their check sums.

    Compressed members would be taken for numbers as they lie, or grow without bound when they are unpacked.

    Raises:
        WeightsError: if members are compressed or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            broken = None if packed else archive.testzip()
    except Exception as error:  # as in read
        raise errors.WeightsError(
            f"{path}: refused ({type(error).__name__}): the file is damaged. Copy it again"
        ) from None
    if packed:
        raise errors.WeightsError(
            f"{path}: refused: it is a compressed zip file, which torch does not write. Take the model's safetensors"
        )
    if broken is not None:
        raise errors.WeightsError(f"{path}: refused: a check sum in it is wrong, so it is damaged. Copy it again")


def require_plain(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse a state dict that holds anything but plain tensors, or more numbers than its file can.

    Raises:
        WeightsError: saying what.
    """
    wrong = [ascii(name)[1:-1] for name, value in tensors.items() if not _plain(name, value)]
    if wrong or not tensors:
        what = f"'{wrong[0][:80]}' is no plain tensor" if wrong else "it holds no tensors"
        raise errors.WeightsError(f"{path}: is no state dict: {what}. Take the model's safetensors")
    total, size = sum(value.numel() * value.element_size() for value in tensors.values()), path.stat().st_size
    if total > MOST * size:
        raise errors.WeightsError(
            f"{path}: refused: its tensors would take {total:,} bytes, the file has {size:,}. Take the model's "
            "safetensors"
        )


def _chosen(path: Path, values: Any, key: str) -> Mapping[str, Any]:
    """The set of weights that is meant.

    Raises:
        WeightsError: if there are several and none is named, or there is none of that name.
    """
    named = (*WRAPPERS, *OTHERS)
    sets = [name for name in named if isinstance(values, Mapping) and isinstance(values.get(name), Mapping)]
    if key and key not in sets:
        raise errors.WeightsError(f"{path}: holds no set of weights '{key}'; it has: {', '.join(sets) or 'one alone'}")
    if not key and len(sets) > 1 and any(name in OTHERS for name in sets):
        raise errors.WeightsError(
            f"{path}: holds several sets of weights ({', '.join(sets)}); say with --key which is meant, as the model's "
            "page does"
        )
    if key or (len(sets) == 1 and sets[0] in OTHERS):
        return _unwrapped(values[key or sets[0]])
    return _unwrapped(values)


def _unwrapped(values: Any) -> Mapping[str, Any]:
    """The state dict inside what training scripts put round it (optimizer, epoch and the like are left behind)."""
    for _ in range(4):  # a pickled dictionary may hold itself
        inner = [
            values[key] for key in WRAPPERS if isinstance(values, Mapping) and isinstance(values.get(key), Mapping)
        ]
        if not inner:
            break
        values = inner[0]
    return values if isinstance(values, Mapping) else {}


def _plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()  # half a surrogate pair cannot be written
        and isinstance(value, Tensor)
        and not value.is_nested
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPES
    )


def row(name: str, value: Tensor) -> safefile.Row:
    """The tensor as an array of a safetensors file."""
    numbers = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return safefile.Row(name, DTYPES[value.dtype], tuple(value.shape), memoryview(numbers.data))
