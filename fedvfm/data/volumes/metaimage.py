"""MetaImage as ITK reads it: ``.mha`` with its voxels inside, ``.mhd`` with them in a file beside it, packed or not.

World coordinates are LPS millimetres, row i of ``TransformMatrix`` is the direction of axis i, and ``ElementSpacing``
is the distance of voxels. A header may name the file that holds the voxels: only one of its own folder is opened.

Source: MetaIO, "MetaImage documentation"; ITK, ``itkMetaImageIO.cxx`` and ``metaImage.cxx``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import defect, side_files
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import geometry, nifti
from fedvfm.data.volumes import header as headers

ENDINGS = (".mha", ".mhd")
BESIDE = (".raw", ".zraw")
"""How files with the voxels of a ``.mhd`` are called."""
MOST_HEADER = 1 << 16
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
MODALITIES = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR", "MET_MOD_NM": "NM", "MET_MOD_US": "US"}
NO_DIRECTIONS = "does not say how its axes lie (TransformMatrix), so its sides are a guess: left may be right"
NO_SPACING = "does not say how large a voxel is (ElementSpacing); 1 mm was taken"

Fields = Mapping[str, str]


def beside(path: Path) -> list[Path]:
    """Files that may hold the voxels of a ``.mhd``, by its name; of other files none. They need not be there."""
    return [path.with_suffix(ending) for ending in BESIDE] if path.suffix.lower() == ".mhd" else []


@decoder.apart
def read_header(path: Path) -> headers.Header:
    """Geometry of a MetaImage.

    Raises:
        DataError: if it is missing, damaged, not one grey volume of two or three axes, or in a form that is not read.
    """
    fields, start = _fields(path)
    try:
        header = _header(path, fields)
        _check_length(path, fields, start)
        return header
    except (ValueError, KeyError, OverflowError) as error:
        raise _unreadable(path, type(error).__name__) from None


@decoder.apart
def read_voxels(header: headers.Header) -> NDArray[Any]:
    """All voxels in stored axes, float32 or integers.

    Raises:
        DataError: if they cannot be read.
    """
    return _voxels(header, slice(None))


@decoder.apart
def read_part(header: headers.Header, axis: int, index: int) -> NDArray[Any] | None:
    """One slice across the last stored axis, that axis kept with length 1; None across others and of packed files."""
    fields, _ = _fields(header.path)
    return None if axis != 2 or _flag(fields, "CompressedData") else _voxels(header, slice(index, index + 1))


def _voxels(header: headers.Header, part: slice) -> NDArray[Any]:
    """Slices of the last stored axis; what is not packed is not read whole."""
    path = header.path
    fields, start = _fields(path)
    shape, kind = header.stored.shape, _type(fields)
    first, last, _ = part.indices(shape[2])
    plane = shape[0] * shape[1] * kind.itemsize
    file, offset = _where(path, fields, start)
    try:
        with file.open("rb") as opened:
            if _flag(fields, "CompressedData"):
                opened.seek(offset)
                content = _unpacked(path, opened.read(), plane * shape[2])
            else:
                opened.seek(offset + first * plane)
                content = opened.read((last - first) * plane)
    except (OSError, zlib.error) as error:
        raise _unreadable(path, type(error).__name__) from None
    if len(content) != (last - first) * plane:
        raise _unreadable(path, f"{len(content)} bytes for {(last - first) * plane} bytes of voxels")
    values = np.frombuffer(content, kind).reshape((shape[0], shape[1], last - first), order="F")
    return values.astype(kind.newbyteorder("=")) if kind.kind in "iu" else values.astype(np.float32)


def _unpacked(path: Path, packed: bytes, need: int) -> bytes:
    """Voxels as far as the header claims them.

    Raises:
        DataError: if there is more.
    """
    content = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(packed, need + 1)
    if len(content) > need:
        raise defect.TOO_LARGE.error(
            f"{path}: unpacks to more than the {need} bytes of its header; it is damaged, or made to harm"
        )
    return content


def _fields(path: Path) -> tuple[Fields, int]:
    """The header's lines, up to the one that says where the voxels are, and where that line ends.

    Raises:
        DataError: if the file is missing or begins otherwise.
    """
    if not path.is_file():
        raise defect.NOT_FOUND.error(f"{path}: no such file; check the path, or remove its row or partner")
    fields: dict[str, str] = {}
    try:
        with path.open("rb") as opened:
            while opened.tell() < MOST_HEADER and "ElementDataFile" not in fields:
                line = opened.readline(MOST_HEADER)
                key, equals, value = line.decode("latin-1").partition("=")
                if not equals:
                    break
                fields[key.strip()] = value.strip()
            start = opened.tell()
    except OSError as error:
        raise _unreadable(path, type(error).__name__) from None
    if "ElementDataFile" not in fields:
        raise _unreadable(path, "a header without ElementDataFile")
    return fields, start


def _unreadable(path: Path, reason: str) -> errors.DataError:
    return side_files.unreadable(path, "MetaImage", reason)


def _flag(fields: Fields, *keys: str) -> bool:
    return any(fields.get(key, "").lower().startswith(("t", "1")) for key in keys)


def _type(fields: Fields) -> np.dtype[Any]:
    """How a voxel is stored.

    Raises:
        KeyError: for a type that MetaIO does not know as one number.
    """
    order = ">" if _flag(fields, "BinaryDataByteOrderMSB", "ElementByteOrderMSB") else "<"
    return np.dtype(order + TYPES[fields["ElementType"]])


def _numbers(fields: Fields, *keys: str) -> NDArray[np.float64] | None:
    """Numbers under the first of the keys that is there.

    Raises:
        ValueError: for what is no finite number.
    """
    text = next((fields[key] for key in keys if key in fields), None)
    if text is None:
        return None
    values = np.array([float(word) for word in text.split()], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError
    return values


def _header(path: Path, fields: Fields) -> headers.Header:
    if fields.get("ObjectType", "Image") != "Image" or int(fields.get("ElementNumberOfChannels", "1")) != 1:
        raise defect.CHANNELS.error(f"{path}: several values a voxel; save one grey volume a channel")
    if "BinaryData" in fields and not _flag(fields, "BinaryData"):
        raise defect.COMPRESSED.error(f"{path}: voxels written as text; save it in binary form, as ITK does")
    sizes = tuple(int(word) for word in fields["DimSize"].split())
    axes = len(sizes)
    if axes != int(fields["NDims"]) or axes not in (2, 3) or min(sizes) < 1:
        raise defect.FOUR_AXES.error(
            f"{path}: axes {sizes}; one volume of two or three axes is read, save each channel or time on its own"
        )
    directions = _numbers(fields, "TransformMatrix", "Rotation", "Orientation")
    spacing = _numbers(fields, "ElementSpacing", "ElementSize")
    offset = _numbers(fields, "Offset", "Position", "Origin")
    affine = np.eye(4)
    scale = np.ones(axes) if spacing is None else spacing
    affine[:axes, :axes] = (np.eye(axes) if directions is None else directions.reshape(axes, axes)).T * scale
    affine[:axes, 3] = np.zeros(axes) if offset is None else offset
    shape = (sizes[0], sizes[1], sizes[2] if axes == 3 else 1)
    grid = geometry.Grid(shape, geometry.from_lps(affine), sized=spacing is not None)
    notes = (NO_DIRECTIONS,) * (directions is None) + (NO_SPACING,) * (spacing is None)
    modality = MODALITIES.get(fields.get("Modality", ""), "")
    thick = axes == 3 and spacing is not None
    try:
        return headers.Header(path, "metaimage", grid, nifti.coarsest(grid), modality, notes=notes, thick=thick)
    except errors.DataError as error:
        raise error.at(path) from None


def _where(path: Path, fields: Fields, start: int) -> tuple[Path, int]:
    """The file with the voxels, and where in it they begin.

    Raises:
        DataError: for several files, or one that is not in the header's own folder.
    """
    name, skipped = fields["ElementDataFile"], int(fields.get("HeaderSize", "0"))
    if name.upper() in ("LOCAL", "LOCALFILE"):
        return path, start
    if name.upper().startswith("LIST") or "%" in name:
        raise defect.LINK.error(f"{path}: its voxels are in a file for each slice; save them in one .mha")
    file = path.parent / name
    # A header that names any file could make us read any file of this machine.
    if "\\" in name or Path(name).name != name or file.resolve().parent != path.resolve().parent:
        raise defect.LINK.error(f"{path}: its voxels are in a file of another folder; save them in one .mha")
    if not file.is_file():
        raise defect.NOT_FOUND.error(f"{path}: the file that holds its voxels (ElementDataFile) is missing; bring it")
    return file, max(file.stat().st_size - _claimed(fields), 0) if skipped < 0 else skipped


def _claimed(fields: Fields) -> int:
    """Bytes of all voxels, by the header."""
    return math.prod(int(word) for word in fields["DimSize"].split()) * _type(fields).itemsize


def _check_length(path: Path, fields: Fields, start: int) -> None:
    """Refuse a file that cannot hold the voxels its header claims: reading would take the memory of all of them.

    Raises:
        DataError: with both sizes.
    """
    file, offset = _where(path, fields, start)
    packed = _flag(fields, "CompressedData")
    have, need = (file.stat().st_size - offset) * (nifti.GZIP_RATIO if packed else 1), _claimed(fields)
    if have < need:
        raise _unreadable(path, f"{file.stat().st_size - offset} bytes for {need} bytes of voxels")
