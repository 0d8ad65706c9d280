"""NIfTI through nibabel: headers, voxels or one slice of them, and label volumes written back."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, storage
from fedvfm.data import geometry
from fedvfm.data import header as headers

ENDINGS = (".nii", ".nii.gz")
COARSER = 1.5
WHOLE = (slice(None),) * 3
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def _open(path: Path) -> Any:
    """Open a file; the voxels are not read.

    Raises:
        DataError: if it is missing or damaged.
    """
    from nibabel import filebasedimages, loadsave, spatialimages  # only users of volumes pay for it

    if not path.is_file():
        raise errors.DataError(f"{path}: no such file; check the path, or remove its row or partner")
    try:
        return loadsave.load(path)
    except (*_BROKEN, filebasedimages.ImageFileError, spatialimages.HeaderDataError) as error:
        raise errors.DataError(f"{path}: unreadable NIfTI ({error}); copy the file again or remove it") from None


def read_header(path: Path) -> headers.Header:
    """Geometry of a NIfTI file.

    Raises:
        DataError: if it is missing, damaged, or not one grey volume of two or three axes; also where its two affines
            (qform and sform) turn the axes to different sides.
    """
    image = _open(path)
    if image.get_data_dtype().fields is not None:
        raise errors.DataError(f"{path}: colour voxels; save one grey volume a channel")
    shape = tuple(int(side) for side in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or 0 in shape:
        raise errors.DataError(
            f"{path}: axes {image.shape}; one volume of two or three axes is read, save each channel or time on its own"
        )
    grid = geometry.Grid((shape[0], shape[1], shape[2] if len(shape) == 3 else 1), np.asarray(image.affine, np.float64))
    try:
        notes = _affines(image, grid)
        return headers.Header(path, "nifti", grid, coarsest(grid), notes=notes)
    except errors.DataError as error:
        raise errors.DataError(f"{path}: {error}") from None


def _affines(image: Any, grid: geometry.Grid) -> tuple[str, ...]:
    """What is to be said of the two affines where both are set and differ.

    Raises:
        DataError: if they turn the axes to different sides: one of them is wrong, and no one can tell which.
    """
    if not hasattr(image, "get_qform"):
        return ()
    quaternion, code = image.get_qform(coded=True)
    if quaternion is None or code == 0 or image.get_sform(coded=True)[1] == 0:
        return ()
    other = geometry.Grid(grid.shape, np.asarray(quaternion, dtype=np.float64))
    if other.codes != grid.codes:
        raise errors.DataError(
            f"its two affines disagree: the axes run to {grid.codes} by sform, to {other.codes} by qform; find out "
            "which is right and set both to it"
        )
    if other.fits(grid):
        return ()
    return ("qform and sform differ in place or size; sform is taken",)


def coarsest(grid: geometry.Grid) -> int:
    """The canonical axis that is clearly coarser than the other two, else z: across it the slices were acquired."""
    sizes = grid.canonical().spacing
    axis = int(np.argmax(sizes))
    others = max(size for other, size in enumerate(sizes) if other != axis)
    return axis if sizes[axis] >= COARSER * others else 2


def read_voxels(header: headers.Header) -> NDArray[Any]:
    """All voxels in stored axes, float32 or integers.

    Raises:
        DataError: if they cannot be read.
    """
    return _part(header, WHOLE)


def read_part(header: headers.Header, axis: int, index: int) -> NDArray[Any] | None:
    """One slice across a stored axis, that axis kept with length 1; None where the file is packed as a whole.

    Raises:
        DataError: if it cannot be read.
    """
    if header.path.name.lower().endswith(".gz"):
        return None
    return _part(header, tuple(slice(index, index + 1) if at == axis else slice(None) for at in range(3)))


def _part(header: headers.Header, part: tuple[slice, ...]) -> NDArray[Any]:
    proxy = _open(header.path).dataobj
    try:
        scaled = (float(proxy.slope), float(proxy.inter)) != (1.0, 0.0) or proxy.dtype.kind == "f"
        whole = proxy.reshape(header.stored.shape)
        if part != WHOLE:
            values = np.asanyarray(whole[part])
        else:  # asking for float32 keeps scaled volumes from being unfolded in double precision
            values = np.asarray(whole, dtype=np.float32) if scaled else np.asanyarray(whole)
    except _BROKEN as error:
        raise errors.DataError(
            f"{header.path}: damaged or cut short ({error}); copy the file again or remove it"
        ) from None
    return values if values.dtype.kind in "iu" else np.asarray(values, dtype=np.float32)


def write(path: Path, labels: NDArray[Any], like: headers.Header) -> None:
    """Write labels in the axes of ``like.stored`` on its grid: small integers, no other text.

    Raises:
        DataError: for another shape, or an ending other than ``.nii`` and ``.nii.gz``.
        StorageError: if the disk refuses.
    """
    from nibabel import nifti1

    if not path.name.lower().endswith(ENDINGS):
        raise errors.DataError(f"{path}: a NIfTI file ends in {' or '.join(ENDINGS)}; choose such a name")
    if labels.shape != like.stored.shape:
        raise errors.DataError(
            f"{path}: labels {labels.shape} for an input of {like.stored.shape} voxels; put slices back with place_back"
        )
    kind = np.uint8 if labels.size == 0 or (labels.min() >= 0 and labels.max() <= 255) else np.int16
    image = nifti1.Nifti1Image(np.ascontiguousarray(labels.astype(kind)), like.stored.affine)
    image.set_sform(like.stored.affine, code=1)
    # A quaternion cannot hold a sheared affine (a tilted gantry): better none than a wrong one.
    image.set_qform(like.stored.affine, code=1)
    if not np.allclose(image.get_qform(), like.stored.affine, atol=1e-3):
        image.set_qform(None, code=0)
    if like.kind == "nifti":
        _place_as(image, _open(like.path))
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    storage.write_bytes(path, gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content)


def _place_as(image: Any, source: Any) -> None:
    """Give an image both affines of the input with their codes, so that every viewer takes the same one of both."""
    if hasattr(source, "get_qform"):
        sform, quaternion = source.get_sform(coded=True), source.get_qform(coded=True)
        image.set_sform(sform[0], code=int(sform[1]))
        image.set_qform(quaternion[0], code=int(quaternion[1]))
