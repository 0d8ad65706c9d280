"""Volumes: one value for NIfTI, NRRD, MetaImage and DICOM, its slices as shown, and the way back to the input's grid.

>>> volume = volumes.read_volume(path)                                 # .nii, .nii.gz, .nrrd, .mha, .dcm, or a folder
>>> picture = volumes.slice_of(volume, 12, "axial")                    # (H, W), as a radiologist sees it
>>> labels = volumes.place_back({12: mask}, volume.header, "axial")    # on the input's own grid and axes
>>> volumes.write_nifti(out, labels, volume.header)                    # the same physical points as the input

World coordinates and the way slices are shown are said in :mod:`fedvfm.data.volumes.geometry`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm.data import defect
from fedvfm.data.volumes import dicom, dicom_pixels, dicom_series, geometry, metaimage, nifti, nrrd
from fedvfm.data.volumes import header as headers

ENDINGS = (*nifti.ENDINGS, *nrrd.ENDINGS, *metaimage.ENDINGS, *dicom.ENDINGS)
VOLUMES_IN_MEMORY = 4
BYTES_IN_MEMORY = 2**30
HEADERS_IN_MEMORY = 1024
LARGEST_VOXEL = 4
"""Bytes of a voxel at most."""
READERS: dict[headers.Kind, Any] = {"nifti": nifti, "nrrd": nrrd, "metaimage": metaimage, "dicom": dicom_pixels}

Key = tuple[str, tuple[int, ...], str]
"""Path, what changes with its files, and the words that say which series of a folder is meant."""


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A volume as read.

    Attributes:
        voxels: (x, y, z), or (x, y, z, 3) in colour, in canonical axes; float32 or integers, in the file's units after
            its scale (Hounsfield units for CT). Not writeable: it is shared.
        header: everything else, and the way back.
        padded: where voxels are padding, which is no grey value, of the same shape; None where none is.
    """

    voxels: NDArray[Any]
    header: headers.Header
    padded: NDArray[np.bool_] | None = None

    @property
    def grid(self) -> geometry.Grid:
        """Where the voxels lie."""
        return self.header.grid


_headers: OrderedDict[Key, headers.Header] = OrderedDict()
_ranges: OrderedDict[Key, tuple[float, float]] = OrderedDict()
_volumes: OrderedDict[Key, Volume] = OrderedDict()


def kind_of(path: Path) -> headers.Kind:
    """How a volume is stored, by its ending; a folder holds DICOM.

    Raises:
        DataError: for an ending that is not read.
    """
    name = nifti.file_of(path).name.lower()
    if path.is_dir() or name.endswith(dicom.ENDINGS):
        return "dicom"
    if name.endswith(nifti.ENDINGS):
        return "nifti"
    if name.endswith(nrrd.ENDINGS):
        return "nrrd"
    if name.endswith(metaimage.ENDINGS):
        return "metaimage"
    if dicom.is_dicom(path):
        return "dicom"
    raise defect.ENDING.error(
        f"{path}: no volume; these are read: {', '.join(ENDINGS)}, or a folder with a DICOM series"
    )


def _key(path: Path, words: str) -> Key:
    """A changed file has another key."""
    if path.is_dir():
        return str(path), dicom_series.stamp(path), words
    file = nifti.file_of(path)
    files = [file, *metaimage.beside(file)]
    states = [each.stat() for each in files if each.is_file()]
    return str(path), tuple(number for state in states for number in (state.st_mtime_ns, state.st_size)) or (0,), words


def _remember(store: OrderedDict[Key, Any], key: Key, value: Any, limit: int) -> Any:
    store[key] = value
    while len(store) > limit:
        store.popitem(last=False)
    return value


def read_header(path: Path, words: str = "") -> headers.Header:
    """Geometry and kind of a volume; voxels are not read.

    ``words`` say which series of a DICOM folder is meant (:mod:`fedvfm.data.volumes.series_selector`), here and below.

    Raises:
        DataError: if it is missing, damaged, or not one volume.
    """
    return _header(path, _key(path, words))


def _header(path: Path, key: Key) -> headers.Header:
    if key in _headers:
        return _headers[key]
    kind = kind_of(path)
    readers: dict[headers.Kind, Any] = {**READERS, "dicom": dicom_series}
    words = (key[2],) if kind == "dicom" else ()
    found: headers.Header = readers[kind].read_header(path, *words)
    # Voxels may be read by what the header says, without a decoder: of this file alone, and as many as there can be.
    if found.path != path or min(found.stored.shape) < 1:
        raise defect.DECODER_DIED.error(
            f"{path}: its decoder named another file or sides of {found.stored.shape} voxels; it may be made to harm: "
            "take it out"
        )
    rows, columns = found.size("acquired")
    if min(rows, columns) < 2:
        raise defect.TOO_SMALL.error(
            f"{path}: {rows} x {columns} pixels, at least 2 x 2 are needed; replace or remove it"
        )
    _remember(_headers, key, found, HEADERS_IN_MEMORY)
    return found


def read_volume(path: Path, words: str = "") -> Volume:
    """Read a volume whole: a file of one of :data:`ENDINGS`, or a folder with one DICOM series.

    The last few volumes are kept in memory (4 and 1 GiB at most, one at least).

    Raises:
        DataError: see :func:`read_header`; also for voxels that cannot be decoded or are no finite numbers.
    """
    return _volume(path, _key(path, words))


def _volume(path: Path, key: Key) -> Volume:
    if key in _volumes:
        _volumes.move_to_end(key)
        return _volumes[key]
    header = _header(path, key)
    found = READERS[header.kind].read_voxels(header)
    stored, where = found if header.kind == "dicom" else (found, None)
    voxels = header.stored.turn().apply(_finite(path, stored))
    voxels.flags.writeable = False
    padded = None if where is None else header.stored.turn().apply(where)
    while _volumes and (
        len(_volumes) >= VOLUMES_IN_MEMORY
        or sum(one.voxels.nbytes for one in _volumes.values()) + voxels.nbytes > BYTES_IN_MEMORY
    ):
        _volumes.popitem(last=False)
    _volumes[key] = Volume(voxels, header, padded)
    return _volumes[key]


def _finite(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise defect.NOT_FINITE.error(f"{path}: holds voxels that are no finite numbers; replace them before use")
    return values


def _axis(header: headers.Header, index: int, plane: geometry.Plane) -> int:
    count = header.count(plane)
    if not 0 <= index < count:
        raise defect.NOT_FOUND.error(f"{header.path}: slice {index} asked, it has 0 to {count - 1}")
    return header.axis(plane)


def slice_of(volume: Volume, index: int, plane: geometry.Plane = "axial") -> NDArray[Any]:
    """One slice as a radiologist sees it (:func:`fedvfm.data.volumes.geometry.shown`), in the file's units.

    Shapes: (H, W), or (H, W, 3) in colour.

    Raises:
        DataError: if the volume has no such slice.
    """
    return geometry.shown(volume.voxels, _axis(volume.header, index, plane), index)


def neighbours(header: headers.Header, index: int, plane: geometry.Plane = "axial") -> tuple[int, int, int]:
    """The slices of a 2.5D stack: one before, itself, one after; at the ends itself stands for the missing one."""
    last = header.count(plane) - 1
    return max(index - 1, 0), index, min(index + 1, last)


def stack_of(volume: Volume, index: int, plane: geometry.Plane = "axial") -> NDArray[Any]:
    """A slice between its two neighbours, as three channels (2.5D).

    Shapes: (3, H, W), see :func:`neighbours`.

    Raises:
        DataError: if the volume has no such slice, or is in colour.
    """
    if volume.header.channels != 1:
        raise defect.CHANNELS.error(f"{volume.header.path}: in colour; a stack of neighbouring slices needs grey")
    return np.stack([slice_of(volume, one, plane) for one in neighbours(volume.header, index, plane)])


def read_slice(path: Path, index: int, plane: geometry.Plane = "axial", words: str = "") -> NDArray[Any]:
    """:func:`slice_of` of a file, reading no more of it than the format allows.

    Of a DICOM series cut as acquired that is one file or frame, of an uncompressed NIfTI one slice; others are read
    whole and kept for a while.

    Raises:
        DataError: see there and :func:`read_volume`.
    """
    return _slice(path, _key(path, words), index, plane)[0]


def read_shown(
    path: Path, index: int, plane: geometry.Plane = "axial", words: str = ""
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """:func:`read_slice`, and where its pixels are padding: these are no grey values, and no range is set by them.

    Shapes: (H, W) or (H, W, 3), and (H, W) or None where no pixel is padding.

    Raises:
        DataError: see :func:`read_slice`.
    """
    return _slice(path, _key(path, words), index, plane)


def _slice(path: Path, key: Key, index: int, plane: geometry.Plane) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    header = _header(path, key)
    axis = _axis(header, index, plane)
    if key in _volumes:
        return _of_volume(_volume(path, key), index, plane)
    turn = header.stored.turn()
    stored = turn.axes.index(axis)
    at = header.stored.shape[stored] - 1 - index if turn.flips[stored] else index
    part = READERS[header.kind].read_part(header, stored, at)
    if part is None:
        return _of_volume(_volume(path, key), index, plane)
    values, where = part if header.kind == "dicom" else (part, None)
    padded = None if where is None else geometry.shown(turn.apply(where), axis, 0)
    return geometry.shown(turn.apply(_finite(path, values)), axis, 0), padded


def _of_volume(volume: Volume, index: int, plane: geometry.Plane) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    values = slice_of(volume, index, plane)
    if volume.padded is None:
        return values, None
    padded = geometry.shown(volume.padded, volume.header.axis(plane), index)
    return values, padded if padded.any() else None


def value_range(path: Path, words: str = "") -> tuple[float, float]:
    """Smallest and largest value of a whole volume, padding left out; remembered. In colour: what the format can hold.

    Raises:
        DataError: see :func:`read_volume`.
    """
    key = _key(path, words)
    if key in _ranges:
        return _ranges[key]
    header = _header(path, key)
    plane: geometry.Plane = "acquired"
    if header.channels == 3:
        kind = _slice(path, key, 0, plane)[0].dtype
        found = 0.0, float(np.iinfo(kind).max) if kind.kind in "iu" else 1.0
    else:
        # What will be kept is read whole, once; else slice by slice: a long series need not fit into memory for two
        # numbers.
        if math.prod(header.grid.shape) * LARGEST_VOXEL <= BYTES_IN_MEMORY:
            _volume(path, key)
        parts = (_slice(path, key, index, plane) for index in range(header.count(plane)))
        tissue = (values if padded is None else values[~padded] for values, padded in parts)
        ends = np.array([(part.min(), part.max()) for part in tissue if part.size], dtype=np.float64)
        found = (float(ends[:, 0].min()), float(ends[:, 1].max())) if len(ends) else (0.0, 0.0)
    _remember(_ranges, key, found, HEADERS_IN_MEMORY)
    return found


def place_back(
    slices: Mapping[int, NDArray[Any]], header: headers.Header, plane: geometry.Plane = "axial"
) -> NDArray[Any]:
    """Slices as shown, put back into one array on the input's own grid, in the axes of the file; 0 where none is given.

    Shapes: each (H, W) as :func:`slice_of` gives them; the result has ``header.stored.shape`` (DICOM: column, row,
        slice) and the type of the slices.

    Raises:
        DataError: if there is no slice, or one does not fit.
    """
    if not slices:
        raise defect.NO_SAMPLES.error(f"{header.path}: no slice to put back; predict at least one")
    size = header.size(plane)
    kind = np.result_type(*(one.dtype for one in slices.values()))
    whole = np.zeros(header.grid.shape, dtype=kind)
    for index, one in slices.items():
        axis = _axis(header, index, plane)
        if one.shape != size:
            raise defect.MASK_SIZE.error(
                f"{header.path}: a slice of {one.shape} pixels where the input has {size}; resize it"
            )
        np.moveaxis(whole, axis, 0)[index] = geometry.hidden(one)
    return np.ascontiguousarray(header.stored.turn().undo(whole))


def write_nifti(path: Path, labels: NDArray[Any], like: headers.Header) -> None:
    """Write labels in stored axes (from :func:`place_back`) as NIfTI on the input's physical grid.

    Voxel for voxel and axis for axis as the input was stored; nothing is resampled, and no text of the input is copied.

    Raises:
        DataError: if the labels have another shape than the input.
        StorageError: if the disk refuses.
    """
    nifti.write(path, labels, like)
