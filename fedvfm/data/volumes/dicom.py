"""DICOM headers: which images a folder holds, by series, and only what geometry and grey values need of them.

Nothing that names a person is read: files are opened with a list of tags, and what is not on it is skipped. Because
every text in a DICOM file may name a patient, messages hold numbers, codes from closed lists and the folder's own path,
never text of a header, never an exception's words and never the names of files inside a study (these often are UIDs or
patients' names): a file is called by its place in the order of names.
"""

from __future__ import annotations

import contextlib
import filecmp
import logging
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedvfm import errors
from fedvfm.data import defect, side_files
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import dicom_frames, geometry
from fedvfm.data.volumes import header as headers
from fedvfm.runtime import logs

ENDINGS = (".dcm", ".dicom")
MODALITIES = frozenset(
    "CR CT DX ES GM IO IVUS MG MR NM OCT OP OPT OT PT PX RF RG SC SM TG US XA XC".split()  # noqa: SIM905 (28 lines)
)
"""Codes of DICOM (0008,0060) that images have; others are shown as "other"."""
WITHOUT_PIXELS = frozenset(
    {"AU", "DOC", "ECG", "KO", "PLAN", "PR", "REG", "RTDOSE", "RTIMAGE", "RTPLAN", "RTRECORD", "RTSTRUCT", "SR"}
)
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
DEFLATED = "1.2.840.10008.1.2.1.99"
DEFLATE_RATIO = 1032
LITTLE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
"""Transfer syntaxes whose values lie in the file as they are, little end first."""
PIXEL_DATA = bytes.fromhex("e07f1000")
"""Tag of the pixels, little end first."""
FRAME_BYTES = 8
"""Every compressed frame has a tag and a length before it."""
TAGS = (*dicom_frames.TAGS, "ApprovalStatus", "SeriesInstanceUID", "SeriesNumber", "VOILUTSequence")
PRIVATE = tuple(tag for pair in dicom_frames.TILES.values() for tag in pair)
"""Numbers and creators of private blocks that say that a picture is a mosaic; none of them is a text on a patient."""
REJECTED = "a structure set that was rejected (Approval Status)"
TOGETHER = 16
"""Headers that are asked for in one request."""
HEAD_BYTES = 4096
CHUNK = 1 << 20
MOST_INFLATED = 1 << 28
"""Bytes of a deflated file once unpacked: pydicom unpacks such a file whole."""
MOST_PIXELS = 1 << 27
"""Of one frame: memory is taken for them before the pixels are seen."""
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    struct.error,
)
"""What pydicom and its decoders raise on a file that is not as it should be. Their words may quote the file."""


@dataclass(slots=True)
class Series:
    """Images of one series as found, not yet in order.

    Attributes:
        number: the series number, or None.
        modality: a code of :data:`MODALITIES`, or "other".
        slices: its frames.
        films: whether several frames of it come from one file.
        curved: whether a file of it carries a table for display (VOI LUT), which is not applied.
        notes: what is to be said of its files, without text of them.
    """

    number: int | None
    modality: str
    slices: list[dicom_frames.Slice] = field(default_factory=list)
    films: bool = False
    curved: bool = False
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = sorted({(one.rows, one.columns) for one in self.slices})
        shown = ", ".join(f"{rows} x {columns}" for rows, columns in sizes[:3])
        name = "without number" if self.number is None else str(self.number)
        return f"series {name}: {self.modality}, {len(self.slices)} images of {shown}"

    @property
    def described(self) -> str:
        """All that tells it apart without its texts: what :mod:`fedvfm.data.volumes.series_selector` chooses by."""
        step = None if self.step is None else f"{self.step:g} mm from slice to slice"
        return ", ".join(part for part in (str(self), self.plane, step) if part)

    @property
    def plane(self) -> geometry.Plane | None:
        """The plane its slices lie nearest to, or None where they do not say or disagree."""
        planes = {one.plane for one in self.slices}
        return planes.pop() if len(planes) == 1 else None

    @property
    def step(self) -> float | None:
        """The usual distance from slice to slice in millimetres, to a hundredth; None where it is not known."""
        normal = None if self.plane is None else self.slices[0].normal
        if normal is None or len(self.slices) < 2:
            return None
        along = np.sort([np.dot(one.position, normal) for one in self.slices if one.position is not None])
        gaps = np.diff(along)
        return round(float(np.median(gaps)), 2) if len(gaps) else None


@dataclass(frozen=True, slots=True)
class Contents:
    """What one file holds.

    Attributes:
        modality: a code of :data:`MODALITIES`, or "other".
        uid: its SOP instance UID, never shown.
        holds: what kind of object it is.
        reason: why it is left out; empty where it is not.
        key: what tells its series from others, never shown.
        number: the series number, or None.
        slices: its frames.
        notes: what is to be said of it, without text of the file.
        curved: see :class:`Series`.
    """

    modality: str
    uid: str = field(default="", repr=False)
    holds: Literal["image", "segmentation", "contours"] = "image"
    reason: str = ""
    key: tuple[str, str] = field(default=("", ""), repr=False)
    number: int | None = None
    slices: tuple[dicom_frames.Slice, ...] = ()
    notes: tuple[str, ...] = ()
    curved: bool = False


@dataclass(slots=True)
class Study:
    """What a folder (or one file) holds.

    Attributes:
        series: of images, in the order of their numbers.
        segmentations: DICOM-SEG files.
        contours: RT structure sets.
        left: files that were left out, each with the reason.
    """

    series: list[Series] = field(default_factory=list)
    segmentations: list[Path] = field(default_factory=list)
    contours: list[Path] = field(default_factory=list)
    left: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def notes(self) -> tuple[str, ...]:
        """How many files were left out and why, one sentence a reason; none is named."""
        reasons = [reason for _, reason in self.left]
        return tuple(f"{reasons.count(one)} file(s) left out: {one}" for one in dict.fromkeys(reasons))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which may quote a header, from every output."""
    with logs.limited(logging.CRITICAL + 1, "pydicom"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def damaged(where: str, error: Exception, what: str = "damaged header") -> errors.DataError:
    """What becomes of one of :data:`BROKEN`: its words may quote the file and go no further."""
    return defect.UNREADABLE.error(f"{where}: {what} ({type(error).__name__}); export it again or remove it")


def is_dicom(path: Path) -> bool:
    """Whether the file is DICOM by its content, whatever its name: with the preamble of PS3.10, or without it."""
    return _begins(side_files.head(path, HEAD_BYTES))


def _begins(head: bytes) -> bool:
    return head[128:132] == b"DICM" or is_bare(head)


def begins_bare(path: Path) -> bool:
    """Whether a file begins as a data set does, without the preamble of PS3.10."""
    head = side_files.head(path, HEAD_BYTES)
    return head[128:132] != b"DICM" and is_bare(head)


def is_bare(head: bytes) -> bool:
    """Whether bytes begin as a data set does without the preamble of PS3.10, Section 7.1 (old exports have none)."""
    for order in ("little", "big"):
        at, last = 0, (0, -1)
        for _ in range(3):
            tag = (_number(head, at, 2, order), _number(head, at + 2, 2, order))
            if tag[0] not in (0x0002, 0x0008) or tag <= last:
                break
            last, named = tag, head[at + 4 : at + 6]
            if named.isalpha() and named.isupper():
                long = named in (b"OB", b"OW", b"SQ", b"UN", b"UT")
                size = _number(head, at + 8, 4, order) + 12 if long else _number(head, at + 6, 2, order) + 8
            elif order == "big":
                break
            else:
                size = _number(head, at + 4, 4, order) + 8
            at += size
            if at >= len(head):
                break
        else:
            return True
    return False


def _number(head: bytes, at: int, size: int, order: Any) -> int:
    return int.from_bytes(head[at : at + size], order)


def files_in(path: Path) -> list[Path]:
    """The files of a study folder, deeper ones too, in the order of their names; the file itself where it is one.

    Raises:
        DataError: for a link to a folder, or a folder that cannot be opened: what lies behind would be missing unseen.
    """
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder, deeper, names in os.walk(path, onerror=_unreadable):
        if any((Path(folder) / name).is_symlink() for name in deeper):
            raise defect.LINK.error(
                f"{path}: a link to a folder in it, which is not followed; put the folder itself there, or remove the "
                "link"
            )
        deeper[:] = [name for name in deeper if not name.startswith(".")]  # the trash of a file system, say
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted(one for one in found if one.name.upper() != "DICOMDIR")


def _unreadable(error: OSError) -> None:
    raise defect.UNREADABLE.error(
        f"a folder of a study cannot be read ({error.strerror}); give this user the right to"
    ) from None


def find(path: Path) -> Study:
    """Read the headers of all DICOM files of a folder, or of one file.

    Raises:
        DataError: if it is missing, or a file is damaged.
    """
    if not path.exists():
        raise defect.NOT_FOUND.error(f"{path}: no such file or folder; check the path, or remove its row or partner")
    study, found = Study(), dict[tuple[str, str], Series]()
    files, known = files_in(path), dict[str, Path]()
    asked = list(_asked(path, files, study.left))
    for (file, where), held in zip(asked, _examined(asked), strict=True):
        if any(piece.frame.file != file for piece in held.slices):
            raise defect.DECODER_DIED.error(
                f"{where}: its decoder named another file; it may be made to harm: take it out"
            )
        reason = _add(study, found, file, held, known)
        if reason:
            study.left.append((file, reason))
    study.series = sorted(found.values(), key=lambda one: (one.number is None, one.number or 0, one.modality))
    return study


def _examined(asked: Sequence[tuple[Path, str]]) -> Iterator[Contents]:
    """:func:`examine` of many files, several in one request: an answer for each would take a third of the time."""
    for start in range(0, len(asked), TOGETHER):
        some = asked[start : start + TOGETHER]
        try:
            held = _examine_all(some)
        except errors.DataError:  # asked one by one each file has limits of its own, and the one at fault is named
            yield from examine.each(some)
            continue
        if len(held) != len(some):
            raise defect.DECODER_DIED.error(
                f"{some[0][1]}: its decoder answered for {len(held)} files in place of {len(some)}, of which this is "
                "the first; one of them may be made to harm: take it out"
            )
        yield from held


@decoder.apart
def _examine_all(asked: Sequence[tuple[Path, str]]) -> list[Contents]:
    return [examine.here(*item) for item in asked]


def _asked(path: Path, files: Sequence[Path], left: list[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    """The files that are DICOM, and how messages call them; others are added to those that are left out.

    Raises:
        DataError: for what is a link to nothing, or cannot be opened.
    """
    for number, file in enumerate(files, 1):
        where = f"{path}: file {number} of {len(files)} (in the order of names)" if path.is_dir() else str(path)
        if not file.exists():
            raise defect.LINK.error(f"{where}: a link that leads nowhere; bring the file, or remove the link")
        if not os.access(file, os.R_OK):
            # It may be a slice: without it the volume would be shorter than it is.
            raise defect.UNREADABLE.error(f"{where}: cannot be read; give this user the right to, or remove it")
        if not file.is_file():
            left.append((file, "a pipe, socket or device, no regular file"))
            continue
        head = side_files.head(file, HEAD_BYTES)
        pointer = side_files.instead(head, side_files.POINTERS)
        if pointer:
            raise defect.LINK.error(f"{where}: {pointer}")
        if _begins(head) or file.name.lower().endswith(ENDINGS) or path.is_file():
            yield file, where
        else:
            what = side_files.instead(head, side_files.ARCHIVES) or "no DICOM"
            left.append((file, what if head else "empty, 0 bytes"))


def read_tags(file: Path, where: str, tags: Sequence[str] = TAGS) -> Any:
    """The named elements of a DICOM file, pixels left out.

    Raises:
        DataError: if it is no DICOM file or damaged.
    """
    import pydicom  # only users of DICOM pay for it

    head = side_files.head(file, HEAD_BYTES)
    if DEFLATED.encode() in head:
        _check_inflated(file, where)
    try:
        with quietly():
            wanted = [*(pydicom.tag.Tag(name) for name in tags), *(pydicom.tag.Tag(one) for one in PRIVATE)]
            found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted, force=begins_bare(file))
            for element in found:
                _ = element.value  # values are decoded on first use; better here
            return found
    except (*BROKEN, pydicom.errors.InvalidDicomError) as error:
        raise damaged(where, error, "damaged, cut short or no DICOM") from None


def _check_inflated(file: Path, where: str) -> None:
    """Refuse a file packed as a whole that unpacks to more than is read, before any of it is kept in memory.

    Raises:
        DataError: with the limit.
    """
    import pydicom

    try:
        with file.open("rb") as opened:
            with quietly():
                meta = pydicom.filereader.read_file_meta_info(file)
            opened.seek(132 + 12 + int(meta.get("FileMetaInformationGroupLength", 0)))
            inflated, unpacking = 0, zlib.decompressobj(-zlib.MAX_WBITS)
            while (chunk := opened.read(CHUNK)) and inflated <= MOST_INFLATED:
                while chunk and inflated <= MOST_INFLATED:
                    inflated += len(unpacking.decompress(chunk, CHUNK))
                    chunk = unpacking.unconsumed_tail
    except (*BROKEN, zlib.error, pydicom.errors.InvalidDicomError):
        return  # damaged: told when it is read
    if inflated > MOST_INFLATED:
        raise defect.TOO_LARGE.error(
            f"{where}: packed as a whole (deflated), and larger than the {MOST_INFLATED >> 20} MiB that are read at "
            "most; export it uncompressed"
        )


def named_slice(items: Iterable[Any], slices: Mapping[tuple[str, int], int]) -> int | None:
    """The one slice that image references of a file name (SOP instance UID and frame number), or None.

    An instance named without frame numbers is meant with all its frames (PS3.3, table 10-3): of several none is named.
    """
    named = set()
    for item in items:
        uid, numbers = str(item.get("ReferencedSOPInstanceUID", "")), item.get("ReferencedFrameNumber")
        if numbers is None or numbers == "":
            named |= {at for (other, _), at in slices.items() if other == uid}
            continue
        several = [numbers] if isinstance(numbers, int | str) else list(numbers)
        named |= {slices[uid, int(number) - 1] for number in several if (uid, int(number) - 1) in slices}
    return named.pop() if len(named) == 1 else None


def syntax(tags: Any) -> Any:
    """The transfer syntax UID of a file where the standard knows it, else None; of a bare data set as it was read."""
    import pydicom.uid as uids

    found = tags.file_meta.get("TransferSyntaxUID") if hasattr(tags, "file_meta") else None
    if found is None and tags.original_encoding[0] is not None:
        implicit, little = tags.original_encoding
        explicit = uids.ExplicitVRLittleEndian if little else uids.ExplicitVRBigEndian
        return uids.ImplicitVRLittleEndian if implicit else explicit
    try:
        return found if found is not None and found.is_transfer_syntax and not found.is_private else None
    except ValueError:  # no UID of the standard
        return None


@decoder.apart
def study_of(file: Path, where: str) -> str:
    """The Study Instance UID of a file, never shown; empty where it has none.

    Raises:
        DataError: if it is damaged.
    """
    return str(read_tags(file, where, ("StudyInstanceUID",)).get("StudyInstanceUID") or "")


@decoder.apart
def examine(file: Path, where: str) -> Contents:
    """What one DICOM file holds, by its header.

    Raises:
        DataError: if it is damaged, cut short, larger than is read, or a slide.
    """
    tags = read_tags(file, where)
    with quietly():
        try:
            modality, uid = str(tags.get("Modality") or ""), str(tags.get("SOPInstanceUID") or "")
            kind = modality if modality in MODALITIES else "other"
            if modality == "SEG":
                return Contents(kind, uid, holds="segmentation")
            if modality == "RTSTRUCT":
                rejected = tags.get("ApprovalStatus") == "REJECTED"
                return Contents(kind, uid, holds="contours", reason=REJECTED if rejected else "")
            if modality in WITHOUT_PIXELS or tags.get("Rows") is None:
                if _claims_an_image(tags):
                    raise ValueError
                reason = f"{modality} objects are not read" if modality in WITHOUT_PIXELS else "no image in it"
                return Contents(kind, uid, reason=reason)
            if str(tags.get("SOPClassUID", "")) == WHOLE_SLIDE:
                raise defect.WHOLE_SLIDE.error(f"{where}: a whole-slide image; cut it into tiles and save them as PNG")
            _check_length(tags, file, where)
            packing = syntax(tags)
            options = {"packed": packing == DEFLATED, "bare": tags.preamble is None, "begin": _begin(tags, file)}
            slices, notes = dicom_frames.read(tags, file, where, **options)
            key = (str(tags.get("SeriesInstanceUID", "")), modality)
            number = dicom_frames.whole(tags.get("SeriesNumber"))
            return Contents(kind, uid, "image", "", key, number, tuple(slices), tuple(notes), _curved(tags))
        except BROKEN as error:
            raise damaged(where, error) from None


def _begin(tags: Any, file: Path) -> dicom_frames.Begin | None:
    """Where the grey values of a file begin that lie there as they are, and the file's stamp.

    None where they do not lie so, or it is not certain.

    They are its end then, and right before them stand their tag and their length (PS3.5, Sections 7.1 and 8.1.1).
    """
    packing, size = syntax(tags), dicom_frames.bytes_of_grey(tags)
    if size is None or packing not in LITTLE or tags.preamble is None:
        return None
    even = size + size % 2
    with file.open("rb") as opened:
        stamp = headers.stamp_of(opened)
        begin = opened.seek(0, os.SEEK_END) - even
        opened.seek(max(begin - 12, 0))
        before = opened.read(12)
    length = even.to_bytes(4, "little")
    explicit = [PIXEL_DATA + kind + length for kind in (b"OB\0\0", b"OW\0\0")]
    return (begin, stamp) if before in explicit or before[4:] == PIXEL_DATA + length else None


def _add(study: Study, found: dict[tuple[str, str], Series], file: Path, held: Contents, known: dict[str, Path]) -> str:
    """Put a file where it belongs; the reason where it is left out."""
    if held.uid and held.uid in known and filecmp.cmp(known[held.uid], file, shallow=False):
        return "an exact copy of another file of the study"
    if held.uid:
        known.setdefault(held.uid, file)
    if held.reason:
        return held.reason
    if held.holds == "segmentation":
        study.segmentations.append(file)
    elif held.holds == "contours":
        study.contours.append(file)
    else:
        one = found.setdefault(held.key, Series(held.number, held.modality))
        one.slices += held.slices
        one.films |= len(held.slices) > 1
        one.curved |= held.curved
        one.notes += [note for note in held.notes if note not in one.notes]
    return ""


def _curved(tags: Any) -> bool:
    """Whether the file, or its frames, carry a table that a viewer would show the values through."""
    shared = next(iter(tags.get("SharedFunctionalGroupsSequence") or ()), None)
    levels = [tags, shared, *(tags.get("PerFrameFunctionalGroupsSequence") or ())]
    items = [item for level in levels if level is not None for item in level.get("FrameVOILUTSequence") or ()]
    return any(one.get("VOILUTSequence") for one in (tags, *items))


def _claims_an_image(tags: Any) -> bool:
    """Whether the first lines of a file say that it is an image, so that one without rows is cut short."""
    meta = getattr(tags, "file_meta", {})
    said = meta.get("MediaStorageSOPClassUID") or tags.get("SOPClassUID")
    return said is not None and "Image Storage" in said.name and str(tags.get("Modality")) not in WITHOUT_PIXELS


def _check_length(tags: Any, file: Path, where: str) -> None:
    """Refuse a file that is shorter than its own pixels; of compressed ones the least that frames take is known.

    Raises:
        DataError: with both sizes.
    """
    packing, number, have = syntax(tags), dicom_frames.count(tags), file.stat().st_size
    if int(tags.Rows) * int(tags.Columns) > MOST_PIXELS:
        raise defect.TOO_LARGE.error(
            f"{where}: {tags.Rows} x {tags.Columns} pixels, {MOST_PIXELS:,} are read at most; cut it into tiles"
        )
    if packing is not None and packing.is_deflated:
        have *= DEFLATE_RATIO
    if packing is None or packing.is_compressed:
        if have < number * FRAME_BYTES:
            raise defect.UNREADABLE.error(
                f"{where}: cut short ({have} bytes for {number} frames); export or copy it again, or remove it"
            )
        return
    samples = 2 if tags.get("PhotometricInterpretation") == "YBR_FULL_422" else tags.get("SamplesPerPixel", 1)
    need = number * tags.Rows * tags.Columns * samples * tags.get("BitsAllocated", 8) // 8
    if have < need:
        raise defect.UNREADABLE.error(
            f"{where}: cut short ({have} bytes for {need} bytes of pixels); export or copy it again, or remove it"
        )
