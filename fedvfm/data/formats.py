"""Image files to arrays: PNG, JPEG, TIFF and BMP through Pillow, NIfTI through nibabel. Nothing is unpickled."""

from __future__ import annotations

import functools
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedvfm import errors

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUMES = (".nii", ".nii.gz")
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
MIN_SIDE = 2
VOLUMES_IN_MEMORY = 4

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def ending(path: Path) -> str:
    """The file name's ending in lower case, ``.nii.gz`` as one; empty where it is none that is read here."""
    name = path.name.lower()
    return next((known for known in (*VOLUMES, *PICTURES) if name.endswith(known)), "")


def stem(path: Path) -> str:
    """The file name without its ending."""
    return path.name[: len(path.name) - len(ending(path))] if ending(path) else path.stem


def _open(path: Path) -> Image.Image:
    """Open a picture; the pixels are not read yet.

    Raises:
        DataError: if it is missing, no picture of a known format, or holds several pages.
    """
    if not path.is_file():
        raise errors.DataError(f"{path}: no such file; check the path, or remove its row or partner")
    try:
        picture = Image.open(path, formats=FORMATS)
    except _BROKEN as error:
        reason = "unknown or damaged content" if isinstance(error, UnidentifiedImageError) else str(error)
        raise errors.DataError(f"{path}: unreadable picture ({reason}); replace or remove the file") from None
    # Phones write JPEG with further pictures inside (MPO); the first is the photograph.
    pages = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if pages > 1:
        picture.close()
        raise errors.DataError(f"{path}: holds {pages} pages, one is read; save each page as its own file")
    return picture


def _load(path: Path) -> Image.Image:
    """Read a picture whole and turned upright.

    Raises:
        DataError: if it is damaged, cut short or too small.
    """
    with _open(path) as picture:
        try:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
        except _BROKEN as error:
            raise errors.DataError(
                f"{path}: damaged or cut short ({error}); copy the file again or remove it"
            ) from None
        _check_size(path, upright.height, upright.width)
        return upright.copy() if upright is picture else upright


def _check_size(path: Path, height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise errors.DataError(
            f"{path}: {height} x {width} pixels, at least {MIN_SIDE} x {MIN_SIDE} are needed; replace or remove "
            "the file"
        )


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture from its header, turned upright; pixels are not read.

    Raises:
        DataError: if it is missing, unreadable or too small.
    """
    with _open(path) as picture:
        try:
            # The base class's method: that of PNG reads all pixels to look behind them.
            sideways = Image.Image.getexif(picture).get(0x0112, 1) >= 5
        except _BROKEN as error:
            raise errors.DataError(
                f"{path}: damaged or cut short ({error}); copy the file again or remove it"
            ) from None
        height, width = (picture.width, picture.height) if sideways else (picture.height, picture.width)
    _check_size(path, height, width)
    return height, width


def read_image(path: Path) -> NDArray[np.float32]:
    """Read a picture: 8 or 16 bits, grey, RGB, RGBA (alpha is dropped) or palette.

    Shapes: the result is (C, H, W), C 1 (grey) or 3 (RGB), values in [0, 1] of the format's full scale.

    Raises:
        DataError: if it is missing, unreadable, cut short, too small, or has values whose scale is unknown.
    """
    picture = _load(path)
    if picture.mode in ("1", "L", "LA", "La"):
        return _scaled(np.asarray(picture.convert("L"), dtype=np.float32), 255.0)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _wide(path, np.asarray(picture, dtype=np.float64), is_float=picture.mode == "F")
    return _scaled(np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1), 255.0)


def _scaled(values: NDArray[Any], full: float) -> NDArray[np.float32]:
    planes = values[None] if values.ndim == 2 else values
    return np.ascontiguousarray(planes / full, dtype=np.float32)


def _wide(path: Path, values: NDArray[np.float64], *, is_float: bool) -> NDArray[np.float32]:
    """Grey values of more than 8 bits; floats must already lie in [0, 1]."""
    full = 1.0 if is_float else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= full):
        raise errors.DataError(
            f"{path}: values from {low:g} to {high:g}, but a {'float' if is_float else '16-bit'} picture has 0 to "
            f"{full:g}; "
            "save it as 8- or 16-bit grey, or as NIfTI"
        )
    return _scaled(values, full)


def read_mask(path: Path) -> NDArray[np.int64]:
    """Read a mask picture; a palette picture gives its indices.

    Shapes: the result is (H, W), the values as stored.

    Raises:
        DataError: if it is missing, unreadable, in colour, or has values that are no whole numbers.
    """
    picture = _load(path)
    if picture.mode in ("1", "P", "L", "I") or picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(np.int64)
    if picture.mode in ("LA", "PA"):
        return np.asarray(picture)[..., 0].astype(np.int64)
    if picture.mode == "F":
        return _whole(path, np.asarray(picture))
    planes = np.asarray(picture.convert("RGB"))
    # Some tools save grey masks as RGB; equal planes mean one thing only.
    if (planes == planes[..., :1]).all():
        return planes[..., 0].astype(np.int64)
    raise errors.DataError(f"{path}: a mask in colour ({picture.mode}); save it as one grey channel of class numbers")


def _whole(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    with np.errstate(invalid="ignore"):
        whole: NDArray[np.int64] = np.rint(values).astype(np.int64)
    if not np.array_equal(whole, values):
        raise errors.DataError(f"{path}: a mask with values that are no whole numbers; save class numbers as integers")
    return whole


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a volume's header says.

    Attributes:
        shape: (x, y, z) in voxels, axes turned to right, anterior, superior.
        affine: voxel to world, (4, 4), millimetres.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, float]:
        """(row, column) size of a pixel of an axial slice in millimetres."""
        sizes = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(sizes[1]), float(sizes[0])

    def fits(self, other: Geometry) -> bool:
        """Whether both lie on one grid, to 0.01 voxel or millimetre."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, atol=1e-2)


def _nifti(path: Path) -> tuple[Any, tuple[int, int, int], NDArray[Any]]:
    """Open a NIfTI file: the image (voxels not read), its shape with three axes, and its orientation for nibabel.

    Raises:
        DataError: if it is missing, damaged, or not one grey volume of two or three axes.
    """
    from nibabel import filebasedimages, loadsave, orientations, spatialimages  # only users of volumes pay for it

    if not path.is_file():
        raise errors.DataError(f"{path}: no such file; check the path, or remove its row or partner")
    try:
        image: Any = loadsave.load(path)
    except (*_BROKEN, filebasedimages.ImageFileError, spatialimages.HeaderDataError) as error:
        raise errors.DataError(f"{path}: unreadable NIfTI ({error}); copy the file again or remove it") from None
    if image.get_data_dtype().fields is not None:
        raise errors.DataError(f"{path}: colour voxels; save one grey volume a channel")
    shape = tuple(int(side) for side in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or 0 in shape:
        raise errors.DataError(
            f"{path}: axes {image.shape}; one volume of two or three axes is read, save each channel or time on its own"
        )
    axes: Any = orientations
    orientation: NDArray[Any] = axes.io_orientation(image.affine)
    if not np.isfinite(orientation).all():
        raise errors.DataError(
            f"{path}: its header does not say how the axes lie (affine {image.affine.tolist()}); save it again "
            "with an affine"
        )
    return image, (shape[0], shape[1], shape[2] if len(shape) == 3 else 1), orientation


def volume_geometry(path: Path) -> Geometry:
    """Shape and affine of a NIfTI volume from its header.

    Raises:
        DataError: if it is missing, damaged, or not one grey volume.
    """
    from nibabel import orientations

    image, stored, orientation = _nifti(path)
    shape = [0, 0, 0]
    for axis, side in enumerate(stored):
        shape[int(orientation[axis, 0])] = side
    axes: Any = orientations
    affine = image.affine @ axes.inv_ornt_aff(orientation, stored)
    _check_size(path, shape[1], shape[0])
    return Geometry((shape[0], shape[1], shape[2]), np.asarray(affine, dtype=np.float64))


@functools.lru_cache(maxsize=VOLUMES_IN_MEMORY)
def _voxels(path: Path, changed_ns: int) -> NDArray[Any]:
    """All voxels, axes turned to right, anterior, superior; ``changed_ns`` makes a changed file a new key."""
    from nibabel import orientations

    image, shape, orientation = _nifti(path)
    try:
        # A .nii.gz has to be unpacked whole for one slice, so the last few volumes stay in memory.
        stored = np.asanyarray(image.dataobj).reshape(shape)
    except _BROKEN as error:
        raise errors.DataError(f"{path}: damaged or cut short ({error}); copy the file again or remove it") from None
    axes: Any = orientations
    turned: NDArray[Any] = axes.apply_orientation(stored, orientation)
    voxels = turned.astype(np.float32) if turned.dtype.kind == "f" else turned.copy()
    if not np.isfinite(voxels).all():
        raise errors.DataError(f"{path}: holds voxels that are no finite numbers; replace them before use")
    voxels.flags.writeable = False
    return voxels


def _axial(path: Path, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
    voxels = _voxels(path, path.stat().st_mtime_ns if path.is_file() else 0)
    if not 0 <= index < voxels.shape[2]:
        raise errors.DataError(f"{path}: slice {index} asked, it has 0 to {voxels.shape[2] - 1}")
    # Rows run from anterior to posterior and columns from the patient's right to left, as a radiologist sees it.
    return voxels[::-1, ::-1, index].T, voxels


def read_slice(path: Path, index: int) -> NDArray[np.float32]:
    """One axial slice of a NIfTI volume, scaled by the smallest and largest value of the *volume*.

    Shapes: the result is (1, H, W), values in [0, 1], rows from anterior to posterior, columns from the patient's right
        to left.

    Raises:
        DataError: if the file is missing or damaged, or the slice is outside it.
    """
    plane, voxels = _axial(path, index)
    low, high = float(voxels.min()), float(voxels.max())
    scaled = (plane.astype(np.float64) - low) / (high - low) if high > low else np.zeros(plane.shape)
    return np.ascontiguousarray(scaled[None], dtype=np.float32)


def read_mask_slice(path: Path, index: int) -> NDArray[np.int64]:
    """One axial slice of a NIfTI label volume, (H, W), oriented as :func:`read_slice`.

    Raises:
        DataError: if the file is missing or damaged, or holds values that are no whole numbers.
    """
    plane, _ = _axial(path, index)
    return np.ascontiguousarray(_whole(path, plane))
