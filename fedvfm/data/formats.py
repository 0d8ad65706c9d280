"""Picture files to arrays: PNG, JPEG, TIFF and BMP through Pillow. Volumes: :mod:`fedvfm.data.volumes.volumes`.

Images are read as they are meant to be shown: turned upright (EXIF orientation), dark to bright at every depth (TIFF's
WhiteIsZero). Masks are read as the numbers that are stored: the same at 1, 2, 4 and 8 bits, whatever is shown white;
of a palette of greys the grey counts, since a palette's order is the writer's, and of a palette of colours the index.

Sources: PNG (third edition), Section 11.2.1; TIFF 6.0, tags 258, 262 and 274; EXIF 2.32, Section 4.6.4 (orientation).
"""

from __future__ import annotations

import functools
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedvfm import errors
from fedvfm.data import defect, side_files
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import volumes

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUMES = volumes.ENDINGS
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
LOSSY = ("JPEG", "MPO", "jpeg", "tiff_jpeg")
"""Formats, and packings of a TIFF, that give back other values than were put in."""
MIN_SIDE = 2
LARGEST_PIXELS = 2**26
"""A picture of more pixels is refused before memory is taken; a whole slide has to be cut into tiles anyway."""
ORIENTATION, PHOTOMETRIC, BITS = 0x0112, 262, 258
UPRIGHT = 1
SIDEWAYS = (5, 6, 7, 8)
PALETTES = ("P", "PA")
FACTS_IN_MEMORY = 65_536
ROUNDING = 1e-4
"""How far a mask's value may lie from a class number: floats that a scale or an interpolation went over."""

Palette = tuple[tuple[int, int, int], ...]

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
        raise defect.NOT_FOUND.error(f"{path}: no such file; check the path, or remove its row or partner")
    try:
        with warnings.catch_warnings():
            # Of a large picture, half of what is refused: nothing a user could do about it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(path, f"over {LARGEST_PIXELS:,}") from None
    except _BROKEN as error:
        reason = "unknown or damaged content" if isinstance(error, UnidentifiedImageError) else str(error)
        raise side_files.unreadable(path, "picture", reason, "replace or remove the file") from None
    # Phones write JPEG with further pictures inside (MPO); the first is the photograph.
    pages = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if pages > 1:
        picture.close()
        raise defect.SEVERAL_PAGES.error(f"{path}: holds {pages} pages, one is read; save each page as its own file")
    if picture.width * picture.height > LARGEST_PIXELS:
        size = f"{picture.height} x {picture.width}"
        picture.close()
        raise _too_large(path, size)
    return picture


def _too_large(path: Path, size: str) -> errors.DataError:
    return defect.TOO_LARGE.error(
        f"{path}: {size} pixels, {LARGEST_PIXELS:,} are read at most; cut it into tiles, or take it out"
    )


def _orientation(picture: Image.Image) -> int:
    # The base class's method: that of PNG reads all pixels to look behind them.
    return int(Image.Image.getexif(picture).get(ORIENTATION, UPRIGHT) or UPRIGHT)


def orientation(path: Path) -> int:
    """How a picture is turned to be upright (EXIF orientation), 1 where it is not.

    Raises:
        DataError: if it cannot be read.
    """
    return _facts(path).orientation


def _load(path: Path, *, exact: bool = False) -> tuple[Image.Image, bool, int]:
    """Read a picture whole and turned upright; whether small values are shown white, and the bits of a grey value.

    Raises:
        DataError: if it is damaged, cut short, too small, or turned in a way that cannot be read rightly; also if it
            must be ``exact`` and is packed as JPEG, which changes values.
    """
    with _open(path) as picture:
        if exact and (picture.format in LOSSY or picture.info.get("compression") in LOSSY):
            raise defect.MASK_VALUE.error(
                f"{path}: a mask packed as JPEG, which changes class numbers; save it as PNG or uncompressed TIFF"
            )
        if exact and _is_cut(picture):
            raise defect.MASK_VALUE.error(
                f"{path}: a mask of 16 bits in each of several channels, of which 8 would be read; save it as one grey "
                "channel of class numbers"
            )
        try:
            said = _orientation(picture)
            white, bits = _grey(picture)
            if picture.format == "TIFF" and said in SIDEWAYS and picture.tile and picture.tile[0][0] != "libtiff":
                # Pillow 13 reads the rows of these with the width they have once they are turned.
                raise defect.TURNED.error(
                    f"{path}: an uncompressed TIFF that lies on its side (orientation {said}); save it upright"
                )
            picture.load()
            if picture.format == "PNG" and int(picture.getexif().get(ORIENTATION, UPRIGHT) or UPRIGHT) != said:
                raise defect.TURNED.error(f"{path}: says how it is turned behind its pixels only; save it upright")
            upright = ImageOps.exif_transpose(picture)
        except _BROKEN as error:
            raise defect.damaged(path, error) from None
        _check_size(path, upright.height, upright.width)
        return upright.copy() if upright is picture else upright, white, bits


def _grey(picture: Image.Image) -> tuple[bool, int]:
    """Whether a TIFF shows 0 white, and how many bits a grey value has in the file."""
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(BITS, (1,))
        white = picture.tag_v2.get(PHOTOMETRIC) == 0
        return white, int(bits[0] if isinstance(bits, tuple) else bits)
    if picture.format == "PNG" and picture.mode == "L" and picture.tile:
        # Pillow spreads 2 and 4 bits over 8; what it unpacks from says how many there were.
        packed = picture.tile[0][3]
        return False, {"L;2": 2, "L;4": 4}.get(packed if isinstance(packed, str) else "", 8)
    return False, 16 if picture.mode.startswith("I") else 8


def _is_cut(picture: Image.Image) -> bool:
    """Whether a channel has 16 bits of which Pillow gives the upper 8: it does so wherever there are several."""
    packed = picture.tile[0][3] if picture.tile else ""
    raw = packed[0] if isinstance(packed, tuple) and packed else packed
    return picture.mode in ("LA", "RGB", "RGBA") and ";16" in str(raw)


def _check_size(path: Path, height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise defect.TOO_SMALL.error(
            f"{path}: {height} x {width} pixels, at least {MIN_SIDE} x {MIN_SIDE} are needed; replace or remove the "
            "file"
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """What a picture's file says before its pixels are read.

    Attributes:
        size: (height, width), turned upright.
        orientation: EXIF's, 1 for upright.
        indexed: whether its values are places in a palette.
    """

    size: tuple[int, int]
    orientation: int
    indexed: bool


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Pixels as Pillow reads them.

    Attributes:
        values: (H, W) or (H, W, 3).
        mode: Pillow's name of their kind.
        white: whether small values are shown white (TIFF).
        bits: of a grey value in the file.
        palette: its colours; empty where it has none.
        clear: where an image is transparent; None where it is nowhere.
    """

    values: NDArray[Any]
    mode: str
    white: bool
    bits: int
    palette: Palette
    clear: NDArray[np.bool_] | None = None


def _facts(path: Path) -> Facts:
    """Asked several times of each picture, so the last are kept; a changed file is asked again.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        state = path.stat()
    except OSError:
        return examine(path)
    return _remembered(path, state.st_mtime_ns, state.st_size, state.st_ino)


@functools.lru_cache(maxsize=FACTS_IN_MEMORY)
def _remembered(path: Path, *state: int) -> Facts:
    return examine(path)


@decoder.apart
def examine(path: Path) -> Facts:
    """What the header of a picture says; pixels are not read.

    Raises:
        DataError: if it is missing or unreadable.
    """
    with _open(path) as picture:
        try:
            said = _orientation(picture)
            # Pillow gives the size of a TIFF as it will be once it is turned.
            sideways = picture.format != "TIFF" and said in SIDEWAYS
        except _BROKEN as error:
            raise defect.damaged(path, error) from None
        size = (picture.width, picture.height) if sideways else (picture.height, picture.width)
        return Facts(size, said, picture.mode in PALETTES)


@decoder.apart
def _palette(path: Path) -> Palette:
    with _open(path) as picture:
        try:
            return _colours(picture)
        except _BROKEN as error:
            raise defect.damaged(path, error) from None


@decoder.apart
def load(path: Path, mask: bool) -> Stored:
    """The pixels of a picture, turned upright: as an image is shown, or as the numbers of a mask are stored.

    Raises:
        DataError: if it is missing, unreadable, cut short or too small.
    """
    picture, white, bits = _load(path, exact=mask)
    if picture.mode == "La":  # multiplied by its alpha (TIFF); Pillow knows no other way out of it
        picture = picture.convert("LA")
    if mask:
        _refuse_seen_through(path, picture)
    mode, colours = picture.mode, Palette()
    grey = ("1", "L", "LA") if not mask else ("1", "L", "I", "F", "P", "LA", "PA")
    if mode in PALETTES and mask:
        colours = _colours(picture)
    clear = None if mask else _clear(picture)
    if mode == "LA" and not mask:
        picture = picture.convert("L")
    elif mode not in (*grey, "I", "F") and not mode.startswith("I;16"):
        picture = picture.convert("RGB")
    values = np.asarray(picture)
    return Stored(values[..., 0] if mask and mode in ("LA", "PA") else values, mode, white, bits, colours, clear)


def _clear(picture: Image.Image) -> NDArray[np.bool_] | None:
    """Where a picture is transparent, by its alpha or by the colour that a PNG names; None where it is nowhere."""
    named = picture.info.get("transparency")
    if picture.mode in ("RGBA", "LA", "PA"):
        clear = np.asarray(picture.getchannel("A")) == 0
    elif named is None:
        return None
    elif picture.mode == "I;16":
        clear = np.asarray(picture) == named
    else:
        clear = np.asarray(picture.convert("RGBA").getchannel("A")) == 0
    return clear if clear.any() else None


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture from its header, turned upright; pixels are not read.

    Raises:
        DataError: if it is missing, unreadable or too small.
    """
    height, width = _facts(path).size
    _check_size(path, height, width)
    return height, width


def read_image(path: Path) -> NDArray[np.float32]:
    """:func:`read_shown` without where the picture is transparent."""
    return read_shown(path)[0]


def read_shown(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Read a picture: 8 or 16 bits, grey, RGB, RGBA or palette; and where it is transparent, if it is anywhere.

    What lies under a transparent pixel is nowhere shown: it is made dark, and is no grey value.

    Shapes: the first is (C, H, W), C 1 (grey) or 3 (RGB), values in [0, 1] of the format's full scale; the second
        (H, W).

    Raises:
        DataError: if it is missing, unreadable, cut short, too small, or has values whose scale is unknown.
    """
    stored = load(path, False)
    image = _image(path, stored)
    if stored.clear is not None:
        if stored.clear.all():
            raise defect.UNREADABLE.error(
                f"{path}: is transparent everywhere, so a viewer shows nothing of it; save it without its alpha channel"
            )
        image[:, stored.clear] = 0.0
    return image, stored.clear


def _image(path: Path, stored: Stored) -> NDArray[np.float32]:
    if stored.mode == "1":
        return _scaled(stored.values.astype(np.uint8) * np.float32(255.0), 255.0)
    if stored.mode in ("L", "LA"):
        return _scaled(stored.values.astype(np.float32), 255.0)
    if stored.mode in ("I", "F") or stored.mode.startswith("I;16"):
        full = 1.0 if stored.mode == "F" else float(2**stored.bits - 1) if 8 < stored.bits < 16 else 65535.0
        wide = _wide(path, stored.values.astype(np.float64), full)
        # Up to 8 bits Pillow has turned it already.
        return np.float32(1.0) - wide if stored.white else wide
    return _scaled(stored.values.astype(np.float32).transpose(2, 0, 1), 255.0)


def _scaled(values: NDArray[Any], full: float) -> NDArray[np.float32]:
    planes = values[None] if values.ndim == 2 else values
    return np.ascontiguousarray(planes / full, dtype=np.float32)


def _wide(path: Path, values: NDArray[np.float64], full: float) -> NDArray[np.float32]:
    """Grey values of more than 8 bits; floats must already lie in [0, 1]."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= full):
        raise defect.VALUE_RANGE.error(
            f"{path}: values from {low:g} to {high:g}, but a {'float' if full == 1.0 else '16-bit'} picture has 0 to "
            f"{full:g}; save it as 8- or 16-bit grey, or as NIfTI"
        )
    return _scaled(values, full)


def read_mask(path: Path) -> NDArray[np.int64]:
    """Read a mask picture: the numbers that are stored, of a palette of greys the grey, of another palette the index.

    Shapes: the result is (H, W).

    Raises:
        DataError: if it is missing, unreadable, in colour, has values that are no whole numbers, or a palette in
            which two numbers look alike.
    """
    stored = load(path, True)
    values, mode = stored.values, stored.mode
    if mode in PALETTES:
        return _indexed(path, values.astype(np.int64), stored.palette)
    if mode in ("1", "L", "I") or mode.startswith("I;16"):
        return _stored(values.astype(np.int64), mode, stored.white, stored.bits)
    if mode == "LA":
        return values.astype(np.int64)
    if mode == "F":
        return whole(path, values)
    # Some tools save grey masks as RGB; equal planes mean one thing only.
    if (values == values[..., :1]).all():
        return values[..., 0].astype(np.int64)
    raise defect.MASK_COLOUR.error(f"{path}: a mask in colour ({mode}); save it as one grey channel of class numbers")


def _has_clear_numbers(picture: Image.Image) -> bool:
    """Whether a number other than 0 is transparent by a PNG's list of transparent numbers (chunk tRNS)."""
    listed = picture.info.get("transparency")
    if picture.mode not in ("P", "L", "I", "I;16", "1") or listed is None:
        return False
    clear = [at for at, alpha in enumerate(listed) if alpha == 0] if isinstance(listed, bytes) else [listed]
    return bool(np.isin(np.asarray(picture), [number for number in clear if number]).any())


def _refuse_seen_through(path: Path, picture: Image.Image) -> None:
    """Refuse a mask that is transparent in places: what shows there is what lies behind it, whatever number is stored.

    Where transparent pixels all are 0 they are background in both ways to see it.

    Raises:
        DataError: with the remedy.
    """
    if picture.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        seen_through = _has_clear_numbers(picture)
    else:
        planes = np.asarray(picture.convert("RGBA" if picture.mode in ("PA", "RGBa") else picture.mode))
        clear = planes[..., -1] == 0
        seen_through = bool(clear.any() and planes[clear][:, :-1].any())
    if seen_through:
        raise defect.MASK_COLOUR.error(
            f"{path}: a mask that is transparent where it has numbers, so nobody can tell which counts; save it as one "
            "grey channel of class numbers"
        )


def _stored(values: NDArray[np.int64], mode: str, white: bool, bits: int) -> NDArray[np.int64]:
    """The numbers of the file from those of Pillow, which spreads fewer bits over 8 and turns WhiteIsZero round."""
    if mode == "1":
        return 1 - values if white else values
    if mode != "L":
        return values
    full = 2**bits - 1
    turned = 255 - values if white else values
    return np.rint(turned * full / 255).astype(np.int64) if bits < 8 else turned


def _colours(picture: Image.Image) -> Palette:
    flat = picture.getpalette("RGB") or []
    return tuple((flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat) - 2, 3))


def is_grey(palette: Palette) -> bool:
    """Whether all colours of a palette are greys: then a number is told by its grey, not by its place."""
    return bool(palette) and all(red == green == blue for red, green, blue in palette)


def _indexed(path: Path, indices: NDArray[np.int64], palette: Palette) -> NDArray[np.int64]:
    used = [int(index) for index in np.unique(indices)]
    if not palette:
        return indices
    shown = [palette[index] if index < len(palette) else None for index in used]
    if len(set(shown)) < len(shown):
        raise defect.MASK_COLOUR.error(
            f"{path}: a mask with a palette in which two numbers have one colour; save it as one grey channel of class "
            "numbers"
        )
    if not is_grey(palette) or None in shown:
        return indices
    greys = np.array([red for red, _, _ in palette], dtype=np.int64)
    return np.asarray(greys[indices])


def palette(path: Path) -> Palette:
    """The palette of a picture; empty where it has none.

    Raises:
        DataError: if it cannot be read.
    """
    return _palette(path) if _facts(path).indexed else ()


def whole(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """Values as class numbers.

    Raises:
        DataError: if one is no whole number.
    """
    with np.errstate(invalid="ignore"):
        numbers: NDArray[np.int64] = np.rint(values).astype(np.int64)
    if values.size and not np.abs(numbers - values).max() <= ROUNDING:
        raise defect.MASK_VALUE.error(
            f"{path}: a mask with values that are no whole numbers; save class numbers as integers"
        )
    return numbers
