"""NRRD through pynrrd: files with their voxels inside, in a space whose axes are named."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import geometry, nifti
from fedvfm.data import header as headers

ENDINGS = (".nrrd",)
SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
"""Name of a space -> the signs that make its coordinates RAS."""
PACKED = {"raw": 1, "gzip": nifti.GZIP_RATIO, "gz": nifti.GZIP_RATIO}
"""Encoding -> most voxels a byte of the file can hold; of others nothing is known."""
_BROKEN = (OSError, ValueError, EOFError, KeyError, TypeError, IndexError, struct.error, zlib.error)


def read_header(path: Path) -> headers.Header:
    """Geometry of an NRRD file.

    Raises:
        DataError: if it is missing, damaged, no single grey volume, or does not name its space.
    """
    return _read(path, voxels=False)[0]


def read_voxels(header: headers.Header) -> NDArray[Any]:
    """All voxels in stored axes, float32 or integers.

    Raises:
        DataError: if they cannot be read.
    """
    values = _read(header.path, voxels=True)[1]
    return values.astype(np.float32) if values.dtype.kind not in "iu" else values


def read_part(header: headers.Header, axis: int, index: int) -> NDArray[Any] | None:
    """None: these files are mostly packed as a whole."""
    return None


def _read(path: Path, *, voxels: bool) -> tuple[headers.Header, NDArray[Any]]:
    import nrrd  # the package, not this module

    if not path.is_file():
        raise errors.DataError(f"{path}: no such file; check the path, or remove its row or partner")
    try:
        with path.open("rb") as file:
            fields = nrrd.read_header(file)
            found = _header(path, fields)
            _check_length(path, fields, found)
            values = nrrd.read_data(fields, file, str(path)) if voxels else np.empty(0)
    except (*_BROKEN, nrrd.NRRDError) as error:
        kind = type(error).__name__
        raise errors.DataError(f"{path}: unreadable NRRD ({kind}); copy the file again or remove it") from None
    return found, values


def _check_length(path: Path, fields: Mapping[str, Any], found: headers.Header) -> None:
    """Refuse a file that cannot hold the voxels its header claims: reading would take the memory of all of them.

    Raises:
        DataError: with both sizes.
    """
    least = PACKED.get(str(fields.get("encoding", "")).lower())
    have, need = path.stat().st_size, math.prod(found.stored.shape)
    if least is not None and have * least < need:
        raise errors.DataError(
            f"{path}: damaged or cut short ({have} bytes for {need} voxels); copy the file again or remove it"
        )


def _header(path: Path, fields: Mapping[str, Any]) -> headers.Header:
    # A header that names another file could make us read any file of this machine.
    if any(key.replace(" ", "") == "datafile" for key in fields):
        raise errors.DataError(f"{path}: its voxels are in another file; save them in one .nrrd")
    sizes = tuple(int(side) for side in fields["sizes"])
    if len(sizes) != 3 or 0 in sizes:
        raise errors.DataError(f"{path}: axes {sizes}; one volume of three axes is read, save each channel on its own")
    space = str(fields.get("space", "")).lower()
    if space not in SPACES or "space directions" not in fields:
        raise errors.DataError(
            f"{path}: its header does not say how the axes lie; save it again with a space (LPS or RAS) and space "
            "directions"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(fields["space directions"], dtype=np.float64).T
    affine[:3, 3] = np.asarray(fields.get("space origin", (0.0, 0.0, 0.0)), dtype=np.float64)
    grid = geometry.Grid((sizes[0], sizes[1], sizes[2]), np.diag([*SPACES[space], 1.0]) @ affine)
    try:
        return headers.Header(path, "nrrd", grid, nifti.coarsest(grid))
    except errors.DataError as error:
        raise errors.DataError(f"{path}: {error}") from None
