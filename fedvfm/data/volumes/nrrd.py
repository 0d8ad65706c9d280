"""NRRD through pynrrd: files with their voxels inside, in a space whose axes are named."""

from __future__ import annotations

import bz2
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import defect, side_files, structures
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import geometry, nifti
from fedvfm.data.volumes import header as headers

SEGMENTATION = ".seg.nrrd"
"""How 3D Slicer calls a segmentation; one ending, so that NAME.seg.nrrd is the mask of NAME.nrrd."""
ENDINGS = (SEGMENTATION, ".nrrd")
SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
"""Name of a space -> the signs that make its coordinates RAS."""
MOST_UNCHECKED, SUSPICIOUS = 2**27, 2000
"""A volume of more voxels than the first number must have a byte in the file for each so many of them."""
PACKED = {"raw": 1, "gzip": nifti.GZIP_RATIO, "gz": nifti.GZIP_RATIO}
"""Encoding -> most voxels a byte of the file can hold; of others nothing is known."""
UNITS = {
    "": 1.0,
    "mm": 1.0,
    "millimeter": 1.0,
    "millimetre": 1.0,
    "cm": 10.0,
    "centimeter": 10.0,
    "centimetre": 10.0,
    "m": 1000.0,
    "meter": 1000.0,
    "metre": 1000.0,
    "um": 0.001,
    "micron": 0.001,
    "micrometer": 0.001,
    "micrometre": 0.001,
}
"""Space unit -> millimetres; none said means millimetres."""
MITK = "org.mitk.multilabel.segmentation.labelgroups"
SEGMENT = re.compile(r"Segment\d+_")
TERM, ANY = r"~([^~^]*)\^([^~^]*)\^([^~^]*)", r"[^~]*"
TERMS = re.compile(f"^{ANY}~{ANY}{TERM}{TERM}(?:~{ANY}(?:{TERM}(?:{TERM})?)?)?(?:~|$)")
"""3D Slicer's terminology entry: its list and the category, then type and type modifier, the list of regions, region
and region modifier, each as scheme^code^meaning.
"""
_BROKEN = (OSError, ValueError, EOFError, KeyError, TypeError, IndexError, struct.error, zlib.error)


@decoder.apart
def read_header(path: Path) -> headers.Header:
    """Geometry of an NRRD file.

    Raises:
        DataError: if it is missing, damaged, no single grey volume, or does not name its space.
    """
    return _read(path, voxels=False)[0]


@decoder.apart
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
        raise defect.NOT_FOUND.error(f"{path}: no such file; check the path, or remove its row or partner")
    try:
        with path.open("rb") as file:
            fields = nrrd.read_header(file)
            found = _header(path, fields)
            _check_length(path, fields, found)
            values = _unpacked(path, fields, file) if voxels else np.empty(0)
    except (*_BROKEN, nrrd.NRRDError) as error:
        raise _unreadable(path, type(error).__name__) from None
    return found, values


def _unreadable(path: Path, reason: str) -> errors.DataError:
    return side_files.unreadable(path, "NRRD", reason)


def _check_length(path: Path, fields: Mapping[str, Any], found: headers.Header) -> None:
    """Refuse a file that cannot hold the voxels its header claims: reading would take the memory of all of them.

    Raises:
        DataError: with both sizes.
    """
    least = PACKED.get(str(fields.get("encoding", "")).lower())
    have, need = path.stat().st_size, math.prod(found.stored.shape)
    if least is not None and have * least < need:
        raise defect.damaged(path, f"{have} bytes for {need} voxels")
    if need > MOST_UNCHECKED and need > SUSPICIOUS * have:
        raise defect.TOO_LARGE.error(
            f"{path}: {have} bytes that claim {need} voxels, more than are read at most from so few; it is damaged, or "
            "made to harm"
        )


def _unpacked(path: Path, fields: Mapping[str, Any], file: BinaryIO) -> NDArray[Any]:
    """The voxels; what is packed is unpacked no further than the header claims.

    Raises:
        DataError: for more or fewer bytes than it claims.
    """
    import nrrd

    encoding = str(fields.get("encoding", "")).lower()
    unpack: dict[str, Any] = {
        "gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 32),
        "bzip2": bz2.BZ2Decompressor,
    }
    unpack |= {"gz": unpack["gzip"], "bz2": unpack["bzip2"]}
    if encoding not in unpack:
        return np.asarray(nrrd.read_data(dict(fields), file, str(path)))
    if any(fields.get(key) for key in ("line skip", "lineskip", "byte skip", "byteskip")):
        raise defect.COMPRESSED.error(f"{path}: skips lines or bytes before packed voxels; save it again")
    need = _claimed(fields)
    content = unpack[encoding]().decompress(file.read(), need + 1)
    if len(content) < need:
        raise _unreadable(path, f"{len(content)} bytes for {need} bytes of voxels")
    if len(content) > need:
        raise defect.TOO_LARGE.error(
            f"{path}: unpacks to more than the {need} bytes of its header; it is damaged, or made to harm"
        )
    return np.asarray(nrrd.read_data({**fields, "encoding": "raw"}, io.BytesIO(content)))


def _claimed(fields: Mapping[str, Any]) -> int:
    """Bytes of all voxels, by the header."""
    from nrrd import reader

    kind = np.dtype(reader._determine_datatype(dict(fields)))
    return math.prod(int(side) for side in fields["sizes"]) * int(kind.itemsize)


def _header(path: Path, fields: Mapping[str, Any]) -> headers.Header:
    # A header that names another file could make us read any file of this machine.
    if any(key.replace(" ", "") == "datafile" for key in fields):
        raise defect.LINK.error(f"{path}: its voxels are in another file; save them in one .nrrd")
    sizes = tuple(int(side) for side in fields["sizes"])
    if len(sizes) == 4 and any(SEGMENT.match(key) for key in fields):
        raise defect.MASK_OVERLAP.error(
            f"{path}: segments overlap (3D Slicer keeps them in {sizes[0]} layers), but a voxel has one class; "
            "separate them, or export a label map"
        )
    if len(sizes) != 3 or 0 in sizes:
        raise defect.FOUR_AXES.error(
            f"{path}: axes {sizes}; one volume of three axes is read, save each channel on its own"
        )
    space = str(fields.get("space", "")).lower()
    if space not in SPACES or "space directions" not in fields:
        raise defect.NO_GEOMETRY.error(
            f"{path}: its header does not say how the axes lie; save it again with a space (LPS or RAS) and space "
            "directions"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(fields["space directions"], dtype=np.float64).T
    affine[:3, 3] = np.asarray(fields.get("space origin", (0.0, 0.0, 0.0)), dtype=np.float64)
    signs = np.multiply(SPACES[space], _millimetres(path, fields))
    grid = geometry.Grid((sizes[0], sizes[1], sizes[2]), np.diag([*signs, 1.0]) @ affine)
    try:
        return headers.Header(path, "nrrd", grid, nifti.coarsest(grid))
    except errors.DataError as error:
        raise error.at(path) from None


def _millimetres(path: Path, fields: Mapping[str, Any]) -> list[float]:
    """Millimetres of the unit of each axis of the space.

    Raises:
        DataError: for a unit that is no length.
    """
    said = fields.get("space units") or ["mm"] * 3
    words = [str(word).strip().strip('"').casefold().replace("\u00b5", "u").replace("\u03bc", "u") for word in said]
    known = [UNITS.get(word, UNITS.get(word.rstrip("s"))) for word in words]
    if len(words) != 3 or None in known:
        raise defect.NO_GEOMETRY.error(
            f"{path}: space units {', '.join(words)[:60]}: mm, cm, m or um are read; save it again in mm"
        )
    return [factor for factor in known if factor is not None]


@decoder.apart
def held(path: Path) -> list[structures.Structure]:
    """What the numbers of a segmentation of 3D Slicer (``Segment0_LabelValue``, ...) or MITK stand for, else nothing.

    Raises:
        DataError: if the header cannot be read.
    """
    import nrrd  # the package, not this module

    try:
        fields = nrrd.read_header(str(path))
    except (*_BROKEN, nrrd.NRRDError) as error:
        raise _unreadable(path, type(error).__name__) from None
    found = []
    for begin in dict.fromkeys(match[0] for key in fields if (match := SEGMENT.match(key))):
        name, tags = (str(fields.get(begin + part, "")) for part in ("Name", "Tags"))
        # Before version 4.11 a segment was a layer of its own, drawn as 1, and no number was written.
        found.append(_structure(path, fields.get(f"{begin}LabelValue", 1), name, tags))
    return found or _labels(path, str(fields.get(MITK, "[]")))


def _labels(path: Path, groups: str) -> list[structures.Structure]:
    """The labels of MITK's multi-label segmentation."""
    try:
        labels = [label for group in json.loads(groups) for label in group["labels"]]
        return [structures.Structure(int(label["value"]), "", structures.plain(str(label["name"]))) for label in labels]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise defect.MASK_VALUE.error(f"{path}: labels of MITK without name or value; export it again") from None


def _structure(path: Path, value: Any, name: str, tags: str) -> structures.Structure:
    entry = next((tag[1] for tag in re.finditer(r"TerminologyEntry:([^|]*)", tags)), "")
    terms = TERMS.match(entry)
    said = [text or "" for text in terms.groups()] if terms else [""] * 12
    meaning, side_meaning = said[2], said[5]
    words = {structures.plain(text) for text in (f"{side_meaning} {meaning}", f"{meaning} {side_meaning}")} - {""}
    code = structures.qualified(*(structures.code_of(*said[at : at + 2]) for at in (0, 3, 6, 9)))
    try:
        number = int(value)
    except ValueError:
        raise defect.MASK_VALUE.error(f"{path}: a segment without a whole label value; export it again") from None
    return structures.Structure(number, code, structures.plain(name), tuple(sorted(words)))
