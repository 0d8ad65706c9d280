"""Picture files to arrays: PNG, JPEG, TIFF and BMP through Pillow. Volumes: :mod:`fedvfm.data.volumes`."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedvfm import errors
from fedvfm.data import volumes

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUMES = volumes.ENDINGS
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
MIN_SIDE = 2

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
        with warnings.catch_warnings():
            # Of a large picture, half of what is refused: nothing a user could do about it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
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
        return whole(path, np.asarray(picture))
    planes = np.asarray(picture.convert("RGB"))
    # Some tools save grey masks as RGB; equal planes mean one thing only.
    if (planes == planes[..., :1]).all():
        return planes[..., 0].astype(np.int64)
    raise errors.DataError(f"{path}: a mask in colour ({picture.mode}); save it as one grey channel of class numbers")


def whole(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """Values as class numbers.

    Raises:
        DataError: if one is no whole number.
    """
    with np.errstate(invalid="ignore"):
        numbers: NDArray[np.int64] = np.rint(values).astype(np.int64)
    if not np.array_equal(numbers, values):
        raise errors.DataError(f"{path}: a mask with values that are no whole numbers; save class numbers as integers")
    return numbers
