"""NIfTI through nibabel: headers, voxels or one slice of them, and label volumes written back."""

from __future__ import annotations

import errno
import gzip
import html
import io
import math
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import defect, side_files, structures
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import geometry
from fedvfm.data.volumes import header as headers
from fedvfm.storage import storage

ENDINGS = (".nii", ".nii.gz")
COARSER = 1.5
WHOLE = (slice(None),) * 3
UNITS = {"meter": 1000.0, "micron": 0.001}
"""Units of length other than millimetres -> millimetres; where none is said, millimetres are meant."""
GZIP_RATIO = 1032
"""Deflate packs no better, so a file that claims more is damaged; asked before memory is taken."""
NO_SPACING = "does not say how large a voxel is along each axis (pixdim is 0); 1 mm was taken"
NO_AFFINE = "neither sform nor qform is set, so its sides are a guess: left may be right"
LABEL = re.compile(
    rb'<Label\b[^<>]*\sKey="(\d{1,9})"[^<>]*>\s*(?:<!\[CDATA\[(.*?)\]\]>|([^<>]*))\s*</Label>', re.DOTALL
)
"""A row of the label table of an extension in the form of GIFTI and CIFTI."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True, slots=True, eq=False)
class Placing:
    """What a file says of where its voxels lie, to be copied.

    Attributes:
        unit: of length, as nibabel calls it.
        sform, qform: both affines, (4, 4), in that unit; None where the file does not set it.
        sform_code, qform_code: what they lead to; None in formats that have neither.
    """

    unit: str
    sform: geometry.Affine | None = None
    sform_code: int | None = None
    qform: geometry.Affine | None = None
    qform_code: int | None = None


def channel(path: Path) -> int | None:
    """Which channel of a file with four axes a path means: ``FILE.nii.gz/2`` is its third; None for a file itself."""
    inside = path.name.isdecimal() and path.parent.name.lower().endswith(ENDINGS) and path.parent.is_file()
    return int(path.name) if inside else None


def file_of(path: Path) -> Path:
    """The file on the disk: that of a channel, else the path itself."""
    return path if channel(path) is None else path.parent


@decoder.apart
def axes(path: Path) -> tuple[int, ...]:
    """How many voxels a file has along each axis; the voxels are not read.

    Raises:
        DataError: if it is missing or damaged.
    """
    return tuple(int(side) for side in _open(path).shape)


def _open(path: Path) -> Any:
    """Open a file; the voxels are not read.

    Raises:
        DataError: if it is missing or damaged.
    """
    from nibabel import filebasedimages, loadsave, nifti1, spatialimages  # only users of volumes pay for it

    path = file_of(path)
    if not path.is_file():
        raise defect.NOT_FOUND.error(f"{path}: no such file; check the path, or remove its row or partner")
    try:
        image = loadsave.load(path)
    except (*_BROKEN, filebasedimages.ImageFileError, spatialimages.HeaderDataError) as error:
        raise side_files.unreadable(path, "NIfTI", error) from None
    # Files of this ending may hold surfaces or matrices (CIFTI-2: .dscalar.nii, .dconn.nii, ...).
    if not isinstance(image, nifti1.Nifti1Pair):
        raise defect.ENDING.error(
            f"{path}: no volume of voxels but {type(image).__name__}; take it out, or export a volume"
        )
    return image


@decoder.apart
def held(path: Path) -> list[structures.Structure]:
    """What the numbers of a mask stand for by the label table in its header; nothing of files without one.

    Connectome Workbench and TotalSegmentator write it, and its numbers change with the release or the task that was
    asked. It may list structures that no mask has.

    Raises:
        DataError: if the file cannot be read.
    """
    content = io.BytesIO()
    _open(path).header.extensions.write_to(content, False)
    rows = []
    for number, quoted, written in LABEL.findall(content.getvalue()):
        name = quoted.decode("utf-8", "replace") or html.unescape(written.decode("utf-8", "replace"))
        if int(number) != 0:  # everything that is no structure
            rows.append(structures.Structure(int(number), "", structures.plain(name), listed=True))
    return rows


@decoder.apart
def read_header(path: Path) -> headers.Header:
    """Geometry of a NIfTI file.

    Raises:
        DataError: if it is missing, damaged, or not one grey volume of two or three axes; also where its two affines
            (qform and sform) turn the axes to different sides.
    """
    image = _open(path)
    if image.get_data_dtype().fields is not None:
        raise defect.CHANNELS.error(f"{path}: colour voxels; save one grey volume a channel")
    if image.get_data_dtype().kind == "c":
        raise defect.CHANNELS.error(f"{path}: complex voxels in two channels, real and imaginary; save the magnitude")
    shape = tuple(int(side) for side in image.shape)
    if channel(path) is not None:
        shape = shape[:3]
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or 0 in shape:
        raise defect.FOUR_AXES.error(
            f"{path}: axes {image.shape}; one volume of two or three axes is read, save each channel or time on its own"
        )
    _check_length(path, image)
    affine = _scaled(np.asarray(image.affine, np.float64), _millimetres(image))
    unsaid = _unsaid(path, image)
    # Of a slice that does not say how thick it is the size of pixels is known all the same.
    sized = not unsaid or (unsaid == {2} and shape[2:] in ((), (1,)))
    grid = geometry.Grid((shape[0], shape[1], shape[2] if len(shape) == 3 else 1), affine, sized=sized)
    try:
        notes = _affines(image, grid) + (NO_SPACING,) * bool(unsaid)
        # Of two axes the header says the size of pixels alone.
        return headers.Header(path, "nifti", grid, coarsest(grid), notes=notes, thick=len(shape) == 3 and not unsaid)
    except errors.DataError as error:
        raise error.at(path) from None


def _unsaid(path: Path, image: Any) -> set[int]:
    """Axes whose spacing the header leaves at 0, and says nowhere else: nibabel takes 1 for it."""
    from nibabel import nifti1, nifti2, openers

    if not (image.header["pixdim"][1:4] == 1.0).any() or image.get_sform(coded=True)[1]:
        return set()
    kind = nifti2.Nifti2Header if isinstance(image.header, nifti2.Nifti2Header) else nifti1.Nifti1Header
    with openers.ImageOpener(file_of(path)) as opened:
        stored = kind(opened.read(kind.sizeof_hdr), endianness=image.header.endianness, check=False)["pixdim"]
    axes = min(len(image.shape), 3)
    return {at for at in range(axes) if stored[at + 1] == 0.0}


def _check_length(path: Path, image: Any) -> None:
    """Refuse a file that cannot hold the voxels its header claims: reading would take the memory of all of them.

    Raises:
        DataError: with both sizes.
    """
    path = file_of(path)
    packed = path.name.lower().endswith(".gz")
    have = path.stat().st_size * (GZIP_RATIO if packed else 1)
    need = math.prod(int(side) for side in image.shape) * image.get_data_dtype().itemsize
    if have < need:
        raise defect.damaged(path, f"{path.stat().st_size} bytes for {need} bytes of voxels")


def _millimetres(image: Any) -> float:
    """Millimetres of the header's unit of length."""
    known = image.header.get_xyzt_units() if hasattr(image.header, "get_xyzt_units") else ("mm", "sec")
    return UNITS.get(known[0], 1.0)


def _scaled(affine: geometry.Affine, factor: float) -> geometry.Affine:
    """An affine to other units of length."""
    return np.diag([factor, factor, factor, 1.0]) @ affine


def _affines(image: Any, grid: geometry.Grid) -> tuple[str, ...]:
    """What is to be said of the two affines where none is set, or both are and differ.

    Raises:
        DataError: if they turn the axes to different sides: one of them is wrong, and no one can tell which.
    """
    if not hasattr(image, "get_qform"):
        return ()
    quaternion, code = image.get_qform(coded=True)
    sform_code = image.get_sform(coded=True)[1]
    if code == 0 and sform_code == 0:
        return (NO_AFFINE,)
    if quaternion is None or code == 0 or sform_code == 0:
        return ()
    other = geometry.Grid(grid.shape, _scaled(np.asarray(quaternion, dtype=np.float64), _millimetres(image)))
    if other.codes != grid.codes:
        raise defect.NO_GEOMETRY.error(
            f"its two affines disagree: the axes run to {grid.codes} by sform, to {other.codes} by qform; find out "
            "which is right and set both to it"
        )
    if other.fits(grid):
        return ()
    return ("qform and sform differ in place or size; sform is taken",)


def coarsest(grid: geometry.Grid) -> int:
    """The canonical axis across which the slices were acquired.

    The one with a single voxel, else the one that is clearly coarser than the other two, else z.
    """
    single = [axis for axis, side in enumerate(grid.canonical().shape) if side == 1]
    if len(single) == 1:
        return single[0]
    sizes = grid.canonical().spacing
    axis = int(np.argmax(sizes))
    others = max(size for other, size in enumerate(sizes) if other != axis)
    return axis if sizes[axis] >= COARSER * others else 2


def read_voxels(header: headers.Header) -> NDArray[Any]:
    """All voxels in stored axes, float32 or integers.

    Those that lie in the file as they are need no decoder: they are read here, once its child has said where they lie.
    Those that are more than a file may take are left to the child, which says so.

    Raises:
        DataError: if they cannot be read.
    """
    plain = _plain(header)
    if plain is None or not decoder.may_take(math.prod(header.stored.shape) * np.dtype(plain.kind).itemsize):
        return _unpacked(header)
    return plain.read(header.path, math.prod(header.stored.shape), header.path).reshape(header.stored.shape, order="F")


@decoder.apart
def _unpacked(header: headers.Header) -> NDArray[Any]:
    return _part(header, WHOLE)


@decoder.apart
def _plain(header: headers.Header) -> headers.Plain | None:
    """Where the voxels lie, as one block of numbers without a scale; None where they have to be decoded.

    Raises:
        DataError: if the file cannot be read.
    """
    proxy = _open(header.path).dataobj
    packed, kind = file_of(header.path).name.lower().endswith(".gz"), np.dtype(proxy.dtype)
    if packed or channel(header.path) is not None or (float(proxy.slope), float(proxy.inter)) != (1.0, 0.0):
        return None
    return headers.Plain(int(proxy.offset), kind.str) if kind.kind in "iu" or kind == np.float32 else None


@decoder.apart
def read_part(header: headers.Header, axis: int, index: int) -> NDArray[Any] | None:
    """One slice across a stored axis, that axis kept with length 1; None where the file is packed as a whole.

    Raises:
        DataError: if it cannot be read.
    """
    if file_of(header.path).name.lower().endswith(".gz"):
        return None
    return _part(header, tuple(slice(index, index + 1) if at == axis else slice(None) for at in range(3)))


@np.errstate(over="ignore")  # what becomes infinite is refused as such
def _part(header: headers.Header, part: tuple[slice, ...]) -> NDArray[Any]:
    proxy = _open(header.path).dataobj
    try:
        number = channel(header.path)
        if number is not None:
            values = np.asanyarray(proxy[(*part, number)])
            return values if values.dtype.kind in "iu" else np.asarray(values, dtype=np.float32)
        scaled = (float(proxy.slope), float(proxy.inter)) != (1.0, 0.0) or proxy.dtype.kind == "f"
        whole = proxy.reshape(header.stored.shape)
        if part != WHOLE:
            values = np.asanyarray(whole[part])
        else:  # asking for float32 keeps scaled volumes from being unfolded in double precision
            values = np.asarray(whole, dtype=np.float32) if scaled else np.asanyarray(whole)
    except _BROKEN as error:
        if getattr(error, "errno", None) == errno.ENOMEM:  # the child's limit, which a file that is mapped meets so
            raise MemoryError from None
        raise defect.damaged(header.path, error) from None
    return values if values.dtype.kind in "iu" else np.asarray(values, dtype=np.float32)


def write(path: Path, labels: NDArray[Any], like: headers.Header) -> None:
    """Write labels in the axes of ``like.stored`` on its grid: small integers, no other text.

    Raises:
        DataError: for another shape, or an ending other than ``.nii`` and ``.nii.gz``.
        StorageError: if the disk refuses.
    """
    from nibabel import nifti1

    if not path.name.lower().endswith(ENDINGS):
        raise defect.ENDING.error(f"{path}: a NIfTI file ends in {' or '.join(ENDINGS)}; choose such a name")
    if labels.shape != like.stored.shape:
        raise defect.MASK_SIZE.error(
            f"{path}: labels {labels.shape} for an input of {like.stored.shape} voxels; put slices back with place_back"
        )
    kind = np.uint8 if labels.size == 0 or (labels.min() >= 0 and labels.max() <= 255) else np.int16
    source = placing(like.path) if like.kind == "nifti" else None
    # In the input's own units: programs that do not heed them must find both at one place, too.
    affine = like.stored.affine if source is None else _scaled(like.stored.affine, 1.0 / UNITS.get(source.unit, 1.0))
    image = nifti1.Nifti1Image(np.ascontiguousarray(labels.astype(kind)), affine)
    image.set_sform(affine, code=1)
    # A quaternion cannot hold a sheared affine (a tilted gantry): better none than a wrong one.
    image.set_qform(affine, code=1)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    if source is not None:
        _place_as(image, source)
    content = image.to_bytes()
    storage.write_bytes(path, gzip.compress(content, 6, mtime=0) if path.name.lower().endswith(".gz") else content)


@decoder.apart
def placing(path: Path) -> Placing:
    """Unit and affines of a file.

    Raises:
        DataError: if it is missing or damaged.
    """
    source = _open(path)
    unit = source.header.get_xyzt_units()[0] if hasattr(source.header, "get_xyzt_units") else "mm"
    if not hasattr(source, "get_qform"):
        return Placing(str(unit))
    (sform, sform_code), (qform, qform_code) = source.get_sform(coded=True), source.get_qform(coded=True)
    return Placing(str(unit), sform, int(sform_code), qform, int(qform_code))


def _place_as(image: Any, source: Placing) -> None:
    """Give an image both affines of the input with their codes, so that every viewer takes the same one of both."""
    if source.sform_code is not None:
        image.set_sform(source.sform, code=source.sform_code)
        image.set_qform(source.qform, code=source.qform_code)
        image.header.set_xyzt_units(source.unit if source.unit in UNITS else "mm")
