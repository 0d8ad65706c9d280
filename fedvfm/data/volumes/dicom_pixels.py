"""DICOM pixels to values: decompressed, in the file's units, dark to bright, colour as RGB.

Decoders: pydicom's own (uncompressed, deflated, RLE), GDCM (JPEG, JPEG-LS, JPEG 2000), Pillow as second choice. What
pydicom's way to GDCM refuses (JPEG Extended of 12 bits) is read by GDCM's own reader, where it is grey.
High-throughput JPEG 2000 has no decoder and is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import defect
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import dicom, dicom_frames
from fedvfm.data.volumes import header as headers

AIR_HU = -1024
"""Scanners mark what lies outside their field with values far below air; these are raised to it."""
IN_UNITS = ("CT", "PT", "NM")
"""Modalities whose values are measurements: they are not turned round where the file asks for a dark-on-bright look."""
WIDEST = 8
"""Bytes of a value while it is rescaled."""
UNREAD = frozenset({"1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203"})
"""Transfer syntaxes without a decoder: high-throughput JPEG 2000 (HTJ2K)."""
LUTS = tuple(
    f"{kind}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)


Values = NDArray[Any]
Padding = NDArray[np.bool_] | None
"""Where values are padding (PS3.3, C.7.5.1.1.2); None where none is."""


def read_voxels(header: headers.Header) -> tuple[Values, Padding]:
    """All voxels in stored axes (column, row, slice[, colour]), float32 or integers, and where they are padding.

    Raises:
        DataError: if a frame cannot be decoded.
    """
    frames = _frames(header, range(len(header.frames)))
    first, padded = next(frames)
    whole = np.empty((len(header.frames), *first.shape), dtype=first.dtype)
    whole[0] = first
    where = np.zeros(whole.shape, dtype=np.bool_) if header.padded else None
    if where is not None and padded is not None:
        where[0] = padded
    for number, (frame, padded) in enumerate(frames, 1):
        # Slopes or bits may differ from slice to slice (PET): the wider type holds both.
        if not np.can_cast(frame.dtype, whole.dtype, "safe"):
            whole = whole.astype(np.result_type(frame.dtype, whole.dtype))
        whole[number] = frame
        if where is not None and padded is not None:
            where[number] = padded
    order = (2, 1, 0, *range(3, whole.ndim))
    return whole.transpose(order), None if where is None or not where.any() else where.transpose(order)


def read_part(header: headers.Header, axis: int, index: int) -> tuple[Values, Padding] | None:
    """One stored slice (axis 2), that axis kept with length 1; None for slices across the others."""
    if axis != 2:
        return None
    values, padded = read_frame(header, index)
    return values.swapaxes(0, 1)[:, :, None], None if padded is None else padded.T[:, :, None]


def read_frame(header: headers.Header, number: int) -> tuple[Values, Padding]:
    """One slice in the order of ``header.frames``, and where it is padding, which is given its darkest value.

    Shapes: (rows, columns) or (rows, columns, 3). Colour is as wide as stored; grey is in the file's units.

    Raises:
        DataError: if it cannot be decoded.
    """
    return next(_frames(header, [number]))


def _frames(header: headers.Header, numbers: Sequence[int]) -> Iterator[tuple[Values, Padding]]:
    """:func:`read_frame` of several slices; values that lie in the files as they are need no decoder."""
    places = [_plain(header, header.frames[number]) for number in numbers]
    columns, rows, _ = header.stored.shape
    if None in places:
        yield from decode.each(_alone(header, number) for number in numbers)
        return
    for number, place in zip(numbers, filter(None, places), strict=True):
        frame = header.frames[number]
        stored = place.read(frame.file, rows * columns, _where(header, number)).reshape(rows, columns)
        yield _without_padding(stored, _in_units(stored, header, frame), header, frame)


def _plain(header: headers.Header, frame: headers.Frame) -> headers.Plain | None:
    """Where stored values lie that only have to be rescaled, if that takes no more memory than a file may."""
    if frame.table or _turned(header, frame):
        return None
    return frame.plain if decoder.may_take(WIDEST * math.prod(header.stored.shape[:2])) else None


def _turned(header: headers.Header, frame: headers.Frame) -> bool:
    return frame.inverted and header.modality not in IN_UNITS


def _alone(header: headers.Header, number: int) -> tuple[headers.Header, str]:
    """The header with one frame only, and how messages call that; a long series need not travel with each slice."""
    alone = dataclasses.replace(header, frames=(header.frames[number],), notes=(), left=())
    return alone, _where(header, number)


@decoder.apart
def decode(header: headers.Header, where: str) -> tuple[Values, Padding]:
    """:func:`read_frame` of the one frame of a header."""
    frame = header.frames[0]
    stored, tags = _decoded(frame, where)
    try:
        with dicom.quietly():
            values = _values(stored, tags, header, frame)
    except dicom.BROKEN as error:
        raise _fault(where, frame, error) from None
    return _without_padding(stored, values, header, frame)


def _without_padding(
    stored: Values, values: Values, header: headers.Header, frame: headers.Frame
) -> tuple[Values, Padding]:
    """Values and where they are padding, which is given the darkest of them."""
    padded = _is_padding(stored, frame)
    if padded is None or not padded.any():
        return values, None
    values = values.copy()
    values[padded] = _fill(values[~padded], header)
    return values, padded


def _is_padding(stored: NDArray[Any], frame: headers.Frame) -> NDArray[np.bool_] | None:
    if frame.padding is None or stored.ndim != 2:
        return None
    return np.asarray((stored >= frame.padding[0]) & (stored <= frame.padding[1]))


def _fill(tissue: NDArray[Any], header: headers.Header) -> Any:
    """What stands for padding: air where the values are Hounsfield units, else the darkest value of the slice."""
    if header.hounsfield:
        return AIR_HU
    return tissue.min() if tissue.size else 0


def _decoded(frame: headers.Frame, where: str) -> tuple[NDArray[Any], Any]:
    """Stored values of one frame, and the elements that say what they mean.

    Raises:
        DataError: if it cannot be decoded.
    """
    import pydicom
    from pydicom.pixels import utils as pixels

    tags = pydicom.Dataset()
    extra: list[int] = [pydicom.tag.Tag(name) for name in (*LUTS, "ModalityLUTSequence")]
    try:
        with dicom.quietly():
            # Frames of other files are found by their place in the file; these have to be unpacked first.
            together = frame.together or frame.bare
            if together:
                tags = _whole(frame)
                if dicom_frames.has_split_bytes(tags):
                    return _all(tags)[frame.number], tags
            source = {"src": tags} if together else {"src": frame.file, "ds_out": tags, "specific_tags": extra}
            try:
                return pixels.pixel_array(**source, index=frame.number), tags
            except (NotImplementedError, RuntimeError):
                return _by_gdcm(frame), pydicom.dcmread(frame.file, stop_before_pixels=True)
            except ValueError:
                # Where elements have no VR, though compressed files must have it, pydicom looks for frames at a wrong
                # place, unless it reads the file element by element.
                whole = pydicom.dcmread(frame.file)
                return pixels.pixel_array(whole, index=frame.number), whole
    except (*dicom.BROKEN, pydicom.errors.InvalidDicomError) as error:
        raise _fault(where, frame, error) from None


def _whole(frame: headers.Frame) -> Any:
    """A file with its pixels in memory: one that is packed as a whole, or has no preamble."""
    import pydicom

    wanted = [*dicom.TAGS, *LUTS, "PlanarConfiguration", "HighBit", "PixelData"]
    tags = pydicom.dcmread(frame.file, specific_tags=wanted, force=frame.bare)
    if frame.bare and "TransferSyntaxUID" not in tags.file_meta:
        tags.file_meta.TransferSyntaxUID = dicom.syntax(tags)
    return tags


def _all(tags: Any) -> Values:
    """All frames of a grey file with its pixels in memory. Shapes: (frames, rows, columns)."""
    from pydicom.pixels import utils as pixels

    return np.asarray(pixels.pixel_array(tags)).reshape(-1, int(tags.Rows), int(tags.Columns))


def stored(file: Path, where: str, tags: Any) -> Iterator[Values]:
    """Values of the frames of a grey file as they are stored, in their order; a large file is not unpacked whole.

    Shapes: (rows, columns) each.

    Args:
        file: the file.
        where: for messages.
        tags: its elements :data:`dicom_frames.TAGS`, as far as it has them.

    Raises:
        DataError: if one cannot be decoded.
    """
    import pydicom
    from pydicom.pixels import utils as pixels

    bare = dicom.begins_bare(file)
    together = bare or dicom.syntax(tags) == dicom.DEFLATED or dicom_frames.has_split_bytes(tags)
    frame = headers.Frame(file, together=together, bare=bare)
    try:
        with dicom.quietly():
            if together:
                yield from _all(_whole(frame))
                return
            for number in range(dicom_frames.count(tags)):
                yield np.asarray(pixels.pixel_array(file, index=number))
    except (*dicom.BROKEN, pydicom.errors.InvalidDicomError) as error:
        raise _fault(where, frame, error) from None


def _by_gdcm(frame: headers.Frame) -> NDArray[Any]:
    """Stored values of a grey frame by GDCM's own reader, which knows packings that pydicom does not hand to it.

    Raises:
        ValueError, RuntimeError: if it cannot read them, or they are not as large as the header says.
    """
    import gdcm

    tags = dicom.read_tags(frame.file, "")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(frame.file))
    if int(tags.get("SamplesPerPixel", 1)) != 1 or not reader.Read():
        raise RuntimeError
    image = reader.GetImage()
    shape = (dicom_frames.count(tags), int(tags.Rows), int(tags.Columns))
    allocated, signed = int(tags.BitsAllocated), tags.get("PixelRepresentation", 0) == 1
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    if image.GetBufferLength() != math.prod(shape) * kind.itemsize:
        raise ValueError
    text = image.GetBuffer()
    content = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
    values = np.frombuffer(content, kind).reshape(shape)[frame.number]
    unused = allocated - int(tags.get("BitsStored", allocated))
    return np.asarray((values << unused) >> unused) if signed else values


def _where(header: headers.Header, number: int) -> str:
    several = len(header.frames) > 1
    return f"{header.path}: slice {number + 1} of {len(header.frames)}" if several else str(header.path)


def _fault(where: str, frame: headers.Frame, error: Exception) -> errors.DataError:
    """Why a frame cannot be decoded, without the exception's words: they may quote the file."""
    tags = dicom.read_tags(frame.file, "", ("Rows", *dicom_frames.NEEDED))
    lacking = [words for name, words in dicom_frames.NEEDED.items() if tags.get(name) is None]
    if lacking:
        return defect.UNREADABLE.error(
            f"{where}: {', '.join(lacking)} missing in the header, without which nobody knows what the pixels mean; "
            "export it again or remove it"
        )
    syntax = dicom.syntax(tags)
    if syntax is None:
        return defect.COMPRESSED.error(f"{where}: packed in a way that is not known; export it again uncompressed")
    if syntax in UNREAD:
        return defect.COMPRESSED.error(
            f"{where}: pixels packed as '{syntax.name}', for which there is no decoder here; export them uncompressed, "
            "or as JPEG 2000 or JPEG-LS"
        )
    if syntax.is_compressed and isinstance(error, NotImplementedError | RuntimeError):
        return defect.COMPRESSED.error(
            f"{where}: pixels packed as '{syntax.name}' cannot be unpacked; export them uncompressed, or the file is "
            "damaged"
        )
    return dicom.damaged(where, error, "damaged or cut short pixels")


def _values(stored: NDArray[Any], tags: Any, header: headers.Header, frame: headers.Frame) -> NDArray[Any]:
    from pydicom.pixels import processing

    if tags.PhotometricInterpretation == "PALETTE COLOR":
        return np.asarray(processing.apply_color_lut(stored, tags))[..., :3]
    if header.channels == 3:
        return _filled(stored, tags)
    turned = _turned(header, frame)
    if frame.table and tags.get("ModalityLUTSequence"):
        # The table's outputs run from 0 to what the bits of its entries hold (PS3.3, C.11.1.1). Some writers say 10
        # or 12, but
        # entries take two bytes then, which pydicom knows as 16 alone.
        entries, first, bits = (int(one) for one in tags.ModalityLUTSequence[0].LUTDescriptor)
        if 8 < bits < 16:
            tags.ModalityLUTSequence[0].LUTDescriptor = [entries, first, 16]
        values = np.asarray(processing.apply_modality_lut(stored, tags), dtype=np.float32)
        return np.float32(2**bits - 1) - values if turned else values
    if turned:
        stored = sum(_limits(tags)) - stored.astype(np.int64)
    return _in_units(stored, header, frame)


def _in_units(stored: Values, header: headers.Header, frame: headers.Frame) -> Values:
    scaled = _rescaled(stored, frame.slope, frame.intercept)
    return np.maximum(scaled, scaled.dtype.type(AIR_HU)) if header.hounsfield else scaled


def _filled(colours: NDArray[Any], tags: Any) -> NDArray[Any]:
    """Colours of which fewer bits are used than there is room for, spread over all of them: full is full."""
    room = 8 * colours.dtype.itemsize
    used = int(tags.get("BitsStored", room))
    if used >= room or colours.dtype.kind != "u":
        return colours
    return np.asarray(np.rint(colours * ((2**room - 1) / (2**used - 1))), dtype=colours.dtype)


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
