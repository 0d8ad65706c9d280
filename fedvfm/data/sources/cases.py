"""What the headers of a case say, whether its image and mask fit together, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import channels, defect, formats, label_tables, structures
from fedvfm.data import sample as data
from fedvfm.data.slides import slide_file
from fedvfm.data.sources import layouts
from fedvfm.data.sources import slides as slide_cases
from fedvfm.data.volumes import dicom, dicom_seg, geometry, nifti, nrrd, slices, volumes
from fedvfm.data.volumes import header as headers

SAME: dict[str, tuple[str, ...]] = {
    "MRI": ("MR",),
    "PET": ("PT",),
    "ULTRASOUND": ("US",),
    "MAMMOGRAPHY": ("MG",),
    "RADIOGRAPHY": ("CR", "DX", "RG"),
    "X-RAY": ("CR", "DX", "RG"),
    "CR": ("CR", "DX", "RG"),
    "DX": ("CR", "DX", "RG"),
}
"""Words of a recipe's modality that stand for DICOM's codes; a radiograph may have any of three."""


Held = tuple[tuple[structures.Structure, ...], ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the headers of a case say.

    Attributes:
        size: (rows, columns) of a picture.
        header: of the first image, where it is a volume or DICOM; else None.
        alone: whether the case is one image: a picture, or one DICOM file with one frame.
        held: what the numbers of its mask stand for, by the mask's files; empty where these do not say.
        notes: what is to be said of its mask, one sentence each, without text of a file.
        slide: of a whole slide what its header says; else None.
    """

    size: tuple[int, int]
    header: headers.Header | None = None
    alone: bool = True
    held: Held = ()
    notes: tuple[str, ...] = ()
    slide: slide_file.Slide | None = None


def is_volume(file: Path) -> bool:
    """Whether a file is read as a volume: NIfTI, NRRD, DICOM, or a folder with a DICOM series."""
    return file.is_dir() or formats.ending(file) not in formats.PICTURES


def look(folder: Path, case: layouts.Case, series: str = "") -> Seen:
    """Read the headers of a case; ``series`` are words that say which one of a DICOM folder is meant.

    Raises:
        DataError: if one is unreadable, or they differ in size or place.
    """
    if not case.images:
        return Seen((0, 0))
    if case.mpp is not None:
        slide = slide_cases.look(case.images[0], case.mpp)
        return Seen((slide.levels[0][1], slide.levels[0][0]), alone=False, slide=slide)
    if any(is_volume(file) for file in case.images):
        return _look_at_volume(folder, case, series)
    files = [*case.images, *([case.mask] if case.mask else [])]
    if any(is_volume(file) for file in files):
        raise defect.KINDS_MIXED.error(
            f"{layouts.relative(files, folder)}: pictures and volumes mixed; convert one to the other's kind"
        )
    sizes = [formats.picture_size(file) for file in files]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise defect.MASK_SIZE.error(
                f"{layouts.relative([file], folder)} is {size[0]} x {size[1]} pixels, "
                f"{layouts.relative(files[:1], folder)} is {sizes[0][0]} x {sizes[0][1]}; repair or remove the pair"
            )
    _check_turned(folder, files, sizes[0])
    return Seen(sizes[0])


def _check_turned(folder: Path, files: Sequence[Path], size: tuple[int, int]) -> None:
    """Refuse pictures that are turned differently (EXIF orientation) where sizes cannot tell which way they fit.

    A mask of the upright picture's size fits one that lies on its side; turned by half a turn, mirrored, or square, the
    size says nothing.

    Raises:
        DataError: with both orientations.
    """
    turned = [formats.orientation(file) for file in files]
    for file, one in zip(files[1:], turned[1:], strict=True):
        told_by_size = formats.UPRIGHT in (one, turned[0]) and max(one, turned[0]) >= 5 and size[0] != size[1]
        if one != turned[0] and not told_by_size:
            raise defect.MASK_SIZE.error(
                f"{layouts.relative([file], folder)} is turned by EXIF orientation {one}, "
                f"{layouts.relative(files[:1], folder)} by {turned[0]}: nobody can tell whether the mask was drawn on "
                "the turned picture; save both upright, without the orientation"
            )


def _look_at_volume(folder: Path, case: layouts.Case, series: str) -> Seen:
    if not all(is_volume(file) for file in case.images):
        raise defect.KINDS_MIXED.error(
            f"{layouts.relative(case.images, folder)}: pictures and volumes mixed; convert one to the other's kind"
        )
    found = [volumes.read_header(file, series) for file in case.images]
    for file, header in zip(case.images, found, strict=True):
        _fit(folder, file, header, case.images[0], found[0])
    first = found[0]
    alone = first.kind == "dicom" and len(first.frames) == 1 and not case.images[0].is_dir()
    held: Held = ()
    notes: tuple[str, ...] = ()
    if case.mask is not None:
        notes = _check_mask(folder, case, case.mask, first)
        held = _held(case.mask, first)
        for one in held:
            structures.require_distinct(layouts.relative([case.mask], folder), one)
    return Seen(first.size("acquired"), first, alone, held, notes)


def _held(mask: Path, image: headers.Header) -> Held:
    """What the numbers of a mask stand for, where it says so (DICOM-SEG, NRRD, NIfTI), or a table beside it does."""
    if dicom_seg.is_segmentation(mask):
        return tuple(tuple(one) for one in dicom_seg.held(mask, image) if one)
    if not is_volume(mask):
        return ()
    reader = {"nrrd": nrrd.held, "nifti": nifti.held}.get(volumes.kind_of(mask))
    own, beside = () if reader is None else tuple(reader(mask)), label_tables.beside(mask)
    _require_one_word(mask, own, beside)
    return tuple(one for one in (own or beside,) if one)


def _require_one_word(mask: Path, own: Sequence[structures.Structure], beside: Sequence[structures.Structure]) -> None:
    """Refuse a mask whose header and the table beside it give one name to unlike numbers: one of them is of another.

    Raises:
        DataError: naming the numbers.
    """
    numbers: dict[str, set[int]] = {}
    for structure in own:
        numbers.setdefault(structure.name, set()).add(structure.value)
    for structure in beside:
        for name in filter(None, (structure.name, *structure.meanings)):
            if structure.value not in numbers.get(name, {structure.value}):
                raise defect.MASK_VALUE.error(
                    f"{mask}: a structure is number {min(numbers[name])} in its header and number {structure.value} in "
                    "the table beside it; correct or remove the wrong one"
                )


def _fit(folder: Path, file: Path, header: headers.Header, other: Path, first: headers.Header) -> None:
    """Refuse what lies on another grid; where neither says its place, shapes alone count.

    Raises:
        DataError: naming both files.
    """
    one, two = header.grid, first.grid
    if one.shape == two.shape if not first.stored.placed else one.fits(two):
        return
    raise defect.MASK_GEOMETRY.error(
        f"{layouts.relative([file], folder)} (voxels {one.shape}) and {layouts.relative([other], folder)} (voxels "
        f"{two.shape}) differ in size, spacing or place; resample one onto the other"
    )


def _check_mask(folder: Path, case: layouts.Case, mask: Path, image: headers.Header) -> tuple[str, ...]:
    """Refuse a mask that does not fit its image; what is to be said of it, one sentence each."""
    if dicom_seg.is_segmentation(mask):
        return dicom_seg.check(mask, image)
    if is_volume(mask):
        header = volumes.read_header(mask)
        if _crop(header, image) is None:
            _fit(folder, mask, header, case.images[0], image)
        _check_sides(folder, case, header, image)
    elif len(image.frames) != 1:
        raise defect.KINDS_MIXED.error(
            f"{layouts.relative([*case.images, mask], folder)}: pictures and volumes mixed; convert one to the other's "
            "kind"
        )
    else:
        _check_drawn(folder, case, mask, image)
    return ()


def _check_sides(folder: Path, case: layouts.Case, mask: headers.Header, image: headers.Header) -> None:
    """Refuse a mask whose axes run to other sides than those of an image without a place in the patient.

    There shapes alone are compared, and a mask saved without directions would be turned upside down unseen.

    Raises:
        DataError: with both directions.
    """
    if image.stored.placed or not mask.stored.placed or mask.stored.codes == image.stored.codes:
        return
    raise defect.MASK_GEOMETRY.error(
        f"{layouts.relative([mask.path], folder)}: its axes run to {mask.stored.codes}, those of "
        f"{layouts.relative(case.images[:1], folder)} as stored (columns, rows) to {image.stored.codes}: another grid; "
        "save it with the image's directions, or as PNG"
    )


def _check_drawn(folder: Path, case: layouts.Case, mask: Path, image: headers.Header) -> None:
    """A picture as the mask of one DICOM image: it has the image's rows and columns, as stored.

    Raises:
        DataError: for another size, or an image that is shown turned.
    """
    size, wanted = formats.picture_size(mask), image.size("acquired")
    if size != wanted:
        raise defect.MASK_SIZE.error(
            f"{layouts.relative([mask], folder)} is {size[0]} x {size[1]} pixels, "
            f"{layouts.relative(case.images[:1], folder)} is {wanted[0]} x {wanted[1]}; repair or remove the pair"
        )
    turn = image.stored.turn()
    # Shown rows and columns are those of the file where its columns run against the second canonical axis shown.
    kept = [axis for axis in range(3) if axis != image.slices]
    if [turn.axes[0], turn.axes[1]] != kept or turn.flips[:2] != (True, True):
        raise defect.MASK_GEOMETRY.error(
            f"{layouts.relative(case.images[:1], folder)}: its rows and columns are not those it is shown with; give "
            "the mask as NIfTI or DICOM-SEG"
        )


def faults_under(
    case: layouts.Case, seen: Seen, folder: Path, contract: schema.DataContract, chosen: Sequence[int] = ()
) -> list[errors.Fault]:
    """Why a case cannot be used under a recipe's data contract, one sentence each.

    Args:
        case: which.
        seen: what its headers say.
        folder: for messages.
        contract: the recipe's.
        chosen: the channel numbers to take; empty for all.
    """
    if not case.images:
        return []
    where = layouts.relative(case.images[:1], folder)
    if seen.slide is not None or contract.slides is not None:
        return slide_cases.faults_under(seen.slide, where, contract)
    others = _channel_faults(case, seen, where, contract, chosen)
    if seen.header is None:
        return others + [
            defect.VOLUME_NEEDED.fault(
                f"{where}: a picture, but recipe.data.{key} needs {needs}; bring DICOM or NIfTI, or leave it out of "
                "the recipe"
            )
            for key, needs, asked in (
                ("stack", "neighbouring slices", contract.stack > 1),
                ("depth", "whole volumes", contract.depth > 0),
                ("window", "values in units", contract.limits is not None),
            )
            if asked
        ]
    if contract.limits is not None and seen.header.hounsfield is False:
        return [
            defect.GREY_UNITS.fault(
                f"{where}: its values are not in Hounsfield units, but recipe.data.window is; export the series again "
                "with its rescale values, or leave it out"
            )
        ]
    wanted, have = modalities(contract.modality), seen.header.modality
    if wanted and have and have not in wanted:
        return [
            defect.MODALITY.fault(
                f"{where}: modality {have}, but recipe.data.modality is '{contract.modality}'; leave it out, or ask "
                "for a recipe that fits"
            )
        ]
    return others


def _channel_faults(
    case: layouts.Case, seen: Seen, where: str, contract: schema.DataContract, chosen: Sequence[int]
) -> list[errors.Fault]:
    """Other channels than the recipe names; of one picture they are known only once it is read."""
    named, files = contract.channels, len(case.images)
    each = 1 if seen.header is None else seen.header.channels
    have = 1 if contract.grey and files == 1 else len(chosen) if chosen else files * each
    if not named and files > 1 and have > 1:
        return [
            defect.CHANNELS.fault(
                f"{where}: one of {have} channels in files of their own, but recipe.data.channels names none, so "
                "nobody could tell what the model takes; name them in the recipe "
                '(channels = ["...", "...", "..."]), or take one with data.options.channels = [0]'
            )
        ]
    known = bool(chosen) or files > 1 or seen.header is not None
    if not named or not known or have == len(named):
        return []
    remedy = "choose with data.options.channels" if have > len(named) else "bring a file for each"
    return [defect.CHANNELS.fault(f"{where}: {count(have)}, but recipe.data.channels names {shown(named)}; {remedy}")]


def count(number: int) -> str:
    """How many channels, in words of a message."""
    return "1 channel" if number == 1 else f"{number} channels"


def shown(named: Sequence[str]) -> str:
    """The channels of a recipe for messages: how many, and which."""
    return f"{len(named)} ({', '.join(named)})"


def order_faults(layout: layouts.Layout, contract: schema.DataContract, chosen: Sequence[int]) -> list[errors.Fault]:
    """Faults where the folder knows names of the recipe's channels, and takes one of them for another.

    Where its names are not the recipe's nobody can tell; there the order counts, as in nnU-Net.
    """
    have, named = [name.casefold() for name in layout.channels], [name.casefold() for name in contract.channels]
    numbers = list(chosen) or list(range(len(have)))
    if not named or not have or max(numbers) >= len(have):
        return []
    if not set(named) <= set(have):
        return _swapped(layout, contract, numbers)
    right = [have.index(name) for name in named]
    if [at if number != channels.ABSENT else number for at, number in zip(right, numbers, strict=False)] == numbers:
        return []
    taken = ", ".join(layout.channels[at] for at in numbers if at != channels.ABSENT)
    return [
        defect.CHANNELS.fault(
            f"dataset.json: the channels taken are {taken}, but recipe.data.channels names {shown(contract.channels)}; "
            f"set data.options.channels = {right}"
        )
    ]


def _swapped(layout: layouts.Layout, contract: schema.DataContract, chosen: Sequence[int]) -> list[errors.Fault]:
    """Of a folder that knows some of the recipe's names: a file of one of them that is taken for another channel."""
    named, wrong = {name.casefold(): name for name in contract.channels}, []
    for name, number in zip(contract.channels, chosen, strict=False):
        theirs = layout.channels[number] if 0 <= number < len(layout.channels) else ""
        other = named.get(theirs.casefold(), name)
        if other != name:
            wrong.append(
                defect.CHANNELS.fault(
                    f"dataset.json: file {number} is {theirs}, and it is taken for the recipe's {name}; its channel "
                    f"{other} is another one"
                )
            )
    return wrong


def modalities(text: str) -> frozenset[str]:
    """DICOM's codes in a recipe's modality ("CT", "T1 MR", "mri"); empty where it has none: then nothing is refused."""
    words = re.findall(r"[A-Za-z][A-Za-z-]*", text)
    found: set[str] = set()
    for word in words:
        if word.upper() in SAME:
            found |= set(SAME[word.upper()])
        elif word in dicom.MODALITIES or (len(words) == 1 and word.upper() in dicom.MODALITIES):
            found.add(word.upper())
    return frozenset(found)


def read_image(case: layouts.Case, seen: Seen, index: int, view: slices.View, chosen: Sequence[int]) -> data.Pixels:
    """All channels of an image or slice as (C, H, W), or those that are chosen; black where one is absent.

    Raises:
        DataError: for files that cannot be read, or channel counts other than one and three.
    """
    files = case.images
    if seen.slide is not None:
        return slide_cases.read(seen.slide, index, view.slides)
    if seen.header is None:
        shown = [formats.read_shown(file) for file in files]
        clear = [where for _, where in shown if where is not None]
        padded = np.logical_and.reduce(clear) if len(clear) == len(files) else None
        images = [image for image, _ in shown]
        if len(files) > 1:
            images = [_one_channel(file, image) for file, image in zip(files, images, strict=True)]
        pixels = data.Pixels(np.concatenate(images), padded=padded)
    elif chosen and seen.header.channels == 1:
        # One file a channel: those that are not asked for need not be read.
        _check_channels(files[0], chosen, len(files))
        there = [number for number in chosen if number != channels.ABSENT]
        pixels = slices.read([files[number] for number in there], index, view)
        chosen = _renumbered(chosen, there)
    elif len(files) > 1 and seen.header.channels > 1:
        raise _in_colour(files[0])
    else:
        pixels = slices.read(files, index, view)
    return _chosen(files[0], pixels, chosen)


def _one_channel(file: Path, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The channel of one of several files; of a grey picture saved in colour any of its equal planes is.

    Raises:
        DataError: if it is in colour: a number would count its planes, and no file.
    """
    if not (image == image[:1]).all():
        raise _in_colour(file)
    return image[:1]


def _in_colour(file: Path) -> errors.DataError:
    return defect.CHANNELS.error(
        f"{file}: in colour, and one of several files that are one channel each; save it as one grey channel"
    )


def _renumbered(chosen: Sequence[int], there: Sequence[int]) -> list[int]:
    """The same choice of what was read of it."""
    return [channels.ABSENT if number == channels.ABSENT else there.index(number) for number in chosen]


def _check_channels(file: Path, chosen: Sequence[int], have: int) -> None:
    if max(chosen) >= have:
        taken = [number for number in chosen if number != channels.ABSENT]
        raise defect.CHANNELS.error(f"{file}: channels = {taken}, but there are {have}, from 0")


def _chosen(file: Path, pixels: data.Pixels, chosen: Sequence[int]) -> data.Pixels:
    image, absent = pixels.image, tuple(at for at, number in enumerate(chosen) if number == channels.ABSENT)
    if chosen:
        _check_channels(file, chosen, len(image))
        image = image[list(chosen)]
        image[list(absent)] = 0.0
    if len(image) not in (1, 3):
        raise defect.CHANNELS.error(
            f"{file}: {len(image)} channels; choose one or three with data.options.channels = [0]"
        )
    about = (pixels.spacing, pixels.units, pixels.orientation)
    return data.Pixels(image, None, *about, padded=pixels.padded, absent=absent)


def _crop(mask: headers.Header, image: headers.Header) -> tuple[int, int, int] | None:
    """Where a segmentation that 3D Slicer cropped begins in the image, in canonical voxels; None for other masks."""
    cropped = mask.path.name.lower().endswith(nrrd.SEGMENTATION) or bool(mask.kind == "nrrd" and nrrd.held(mask.path))
    if not cropped or mask.grid.shape == image.grid.shape:
        return None
    return image.grid.holds(mask.grid)


def read_mask(
    mask: Path,
    seen: Seen,
    index: int,
    view: slices.View,
    table: Mapping[structures.Key, int] | None = None,
    merging: dicom_seg.Merging = dicom_seg.APART,
) -> NDArray[np.int64]:
    """The mask of an image or slice: class numbers where the table knows its structures, else its values as stored.

    Shapes: (H, W), as :func:`read_image` shows the image.

    Raises:
        DataError: if it cannot be read, or holds values that are no whole numbers, or no described structure.
    """
    if seen.header is None or not is_volume(mask):
        return formats.read_mask(mask)
    if dicom_seg.is_segmentation(mask):
        axis = seen.header.axis(slices.plane_of(seen.header, view))
        drawn = dicom_seg.read(mask, seen.header, table, merging)
        return np.ascontiguousarray(geometry.shown(drawn, axis, index).astype(np.int64))
    start = _crop(volumes.read_header(mask), seen.header)
    if start is None:
        stored = formats.whole(mask, slices.read_mask(mask, index, seen.header, view))
    else:
        stored = formats.whole(mask, _placed(volumes.read_volume(mask), seen.header, start, index, view))
    return np.ascontiguousarray(stored if not seen.held else _named(mask, stored, seen.held[0], table))


def read_whole(case: layouts.Case, seen: Seen, view: slices.View) -> None:
    """Read every pixel of a case once, to know that it can be.

    Raises:
        DataError: naming the file that cannot be read.
    """
    if seen.slide is not None:
        for number, _ in enumerate(slide_cases.names(seen.slide, view.slides)):
            slide_cases.read(seen.slide, number, view.slides)
        return
    for file in (*case.images, case.mask):
        if file is None:
            continue
        if not is_volume(file):
            formats.read_mask(file) if file == case.mask else formats.read_image(file)
        elif file == case.mask and dicom_seg.is_segmentation(file) and seen.header is not None:
            dicom_seg.read(file, seen.header)
        else:
            volumes.read_volume(file, view.series if file != case.mask else "")


def is_black_and_white(mask: Path, stored: NDArray[np.int64]) -> bool:
    """Whether a mask has the values 0 and 255 alone: the file as a whole, of which ``stored`` is one slice."""
    if not (stored == 255).any() or not np.isin(stored, (0, 255)).all():
        return False
    if not is_volume(mask) or dicom_seg.is_segmentation(mask):
        return not is_volume(mask)
    return bool(np.isin(volumes.read_volume(mask).voxels, (0, 255)).all())


def _placed(
    mask: volumes.Volume, image: headers.Header, start: tuple[int, int, int], index: int, view: slices.View
) -> NDArray[Any]:
    """One slice of a cropped mask on the image's grid, 0 around it. Shapes: (H, W), as the image is shown."""
    axis = image.axis(slices.plane_of(image, view))
    shape = image.grid.shape
    whole = np.zeros([1 if at == axis else shape[at] for at in range(3)], dtype=mask.voxels.dtype)
    at = index - start[axis]
    if 0 <= at < mask.voxels.shape[axis]:
        part = np.take(mask.voxels, [at], axis=axis)
        place = tuple(
            slice(0, 1) if side == axis else slice(start[side], start[side] + part.shape[side]) for side in range(3)
        )
        whole[place] = part
    return geometry.shown(whole, axis, 0)


def _named(
    mask: Path,
    stored: NDArray[np.int64],
    held: Sequence[structures.Structure],
    table: Mapping[structures.Key, int] | None,
) -> NDArray[np.int64]:
    """Class numbers for the numbers of one file.

    Raises:
        DataError: for a number that the file describes nowhere, or as what is no class.
    """
    becomes = {
        structure.value: structure.value if table is None else table.get(structure.key, 0)
        for structure in held
        if table is None or structure.key in table or not structure.listed
    }
    classes = np.zeros(stored.shape, dtype=np.int64)
    for value in np.unique(stored):
        if int(value) in becomes:
            classes[stored == value] = becomes[int(value)]
        elif value:
            other = any(structure.value == value for structure in held)
            raise defect.MASK_VALUE.error(
                f"{mask}: value {int(value)} in {np.count_nonzero(stored == value)} pixels is no class: "
                + (
                    "its table names a structure that is none; name it in data.options.class_names and map it in "
                    "[labels], to the background if it does not count"
                    if other
                    else "the file describes no structure of that number; repair the mask"
                ),
                [int(value)],
            )
    return classes
