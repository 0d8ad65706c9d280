"""DICOM pixels to values: decompressed, in the file's units, dark to bright, colour as RGB.

Decoders: pydicom's own (uncompressed, deflated, RLE), GDCM (JPEG of every process, JPEG-LS, JPEG 2000), Pillow as
second choice. High-throughput JPEG 2000 has none and is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import dicom
from fedvfm.data import header as headers

AIR_HU = -1024
"""Scanners mark what lies outside their field with values far below air; these are raised to it."""
IN_UNITS = ("CT", "PT", "NM")
"""Modalities whose values are measurements: they are not turned round where the file asks for a dark-on-bright look."""
UNREAD = frozenset({"1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"})
"""Transfer syntaxes without a decoder: high-throughput JPEG 2000 (HTJ2K)."""
LUTS = tuple(
    f"{kind}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)


def read_voxels(header: headers.Header) -> NDArray[Any]:
    """All voxels in stored axes (column, row, slice[, colour]), float32 or integers.

    Raises:
        DataError: if a frame cannot be decoded.
    """
    first = read_frame(header, 0)
    whole = np.empty((len(header.frames), *first.shape), dtype=first.dtype)
    whole[0] = first
    for number in range(1, len(header.frames)):
        frame = read_frame(header, number)
        # Slopes or bits may differ from slice to slice (PET): the wider type holds both.
        if not np.can_cast(frame.dtype, whole.dtype, "safe"):
            whole = whole.astype(np.result_type(frame.dtype, whole.dtype))
        whole[number] = frame
    return whole.transpose(2, 1, 0, *range(3, whole.ndim))


def read_part(header: headers.Header, axis: int, index: int) -> NDArray[Any] | None:
    """One stored slice (axis 2), that axis kept with length 1; None for slices across the others."""
    return read_frame(header, index).swapaxes(0, 1)[:, :, None] if axis == 2 else None


def read_frame(header: headers.Header, number: int) -> NDArray[Any]:
    """One slice in the order of ``header.frames``.

    Shapes: (rows, columns) or (rows, columns, 3). Colour is as wide as stored; grey is in the file's units.

    Raises:
        DataError: if it cannot be decoded.
    """
    import pydicom
    from pydicom.pixels import utils as pixels

    frame, tags = header.frames[number], pydicom.Dataset()
    extra: list[int] = [pydicom.tag.Tag(name) for name in (*LUTS, "ModalityLUTSequence")]
    try:
        with dicom.quietly():
            # Frames of other files are found by their place in the file; these have to be unpacked first.
            if frame.deflated:
                tags = pydicom.dcmread(frame.file, specific_tags=[*dicom.TAGS, "PlanarConfiguration", "PixelData"])
            source = {"src": tags} if frame.deflated else {"src": frame.file, "ds_out": tags, "specific_tags": extra}
            stored = pixels.pixel_array(**source, index=frame.number)
            return _values(stored, tags, header, frame)
    except (*dicom.BROKEN, pydicom.errors.InvalidDicomError) as error:
        raise errors.DataError(f"{_where(header, number)}: {_reason(frame, error)}") from None


def _where(header: headers.Header, number: int) -> str:
    several = len(header.frames) > 1
    return f"{header.path}: slice {number + 1} of {len(header.frames)}" if several else str(header.path)


def _reason(frame: headers.Frame, error: Exception) -> str:
    """Why a frame cannot be decoded, without the exception's words: they may quote the file."""
    syntax = dicom.syntax(dicom.read_tags(frame.file, "", ("Rows",)))
    if syntax is None:
        return "packed in a way that is not known; export it again uncompressed"
    if syntax in UNREAD:
        return (
            f"pixels packed as '{syntax.name}', for which there is no decoder here; export them uncompressed, or as "
            "JPEG 2000 or JPEG-LS"
        )
    if syntax.is_compressed and isinstance(error, NotImplementedError | RuntimeError):
        return f"pixels packed as '{syntax.name}' cannot be unpacked; export them uncompressed, or the file is damaged"
    return f"damaged or cut short pixels ({type(error).__name__}); export it again or remove it"


def _values(stored: NDArray[Any], tags: Any, header: headers.Header, frame: headers.Frame) -> NDArray[Any]:
    from pydicom.pixels import processing

    if tags.PhotometricInterpretation == "PALETTE COLOR":
        return np.asarray(processing.apply_color_lut(stored, tags))[..., :3]
    if header.channels == 3:
        return stored
    if tags.get("ModalityLUTSequence"):
        return np.asarray(processing.apply_modality_lut(stored, tags), dtype=np.float32)
    if header.inverted and header.modality not in IN_UNITS:
        stored = sum(_limits(tags)) - stored.astype(np.int64)
    scaled = _rescaled(stored, frame.slope, frame.intercept)
    return np.maximum(scaled, scaled.dtype.type(AIR_HU)) if header.modality == "CT" else scaled


def _limits(tags: Any) -> tuple[int, int]:
    """Smallest and largest value that the stored bits can hold."""
    bits = int(tags.get("BitsStored", tags.get("BitsAllocated", 16)))
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if tags.get("PixelRepresentation", 0) == 1 else (0, 2**bits - 1)


def _rescaled(values: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """Integers where they stay integers, in 16 bits where these hold them; else float32."""
    if values.dtype.kind not in "iu" or slope != 1.0 or not intercept.is_integer():
        return np.asarray(values.astype(np.float64) * slope + intercept, dtype=np.float32)
    wide = values.astype(np.int64) + int(intercept)
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= wide.min() and wide.max() <= np.iinfo(kind).max:
            return wide.astype(kind)
    return wide.astype(np.float32)
