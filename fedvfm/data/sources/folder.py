"""The hospital's own folder, in one of three layouts: ``images/`` + ``masks/``, one folder a class, nnU-Net v2 raw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedvfm import config, errors
from fedvfm.data import formats
from fedvfm.data import sample as data
from fedvfm.data.sources import index, layouts

OPTIONS = ("channels", "class_names", "ids", "layout", "mask_values")
SPLITS = ("train", "val", "test")
TABLES = ("patients.csv", "index.csv")

Row = Mapping[str, str]
Item = TypeVar("Item", str, int)


@dataclass(frozen=True, slots=True)
class Header:
    """What the headers of a case say: size of a slice, how many slices (None: pictures), size of a pixel."""

    size: tuple[int, int]
    slices: int | None = None
    spacing: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample's pixels are."""

    sample: data.Sample
    case: layouts.Case
    header: Header
    slice: int | None


class Folder:
    """Images of one hospital, or of several where a table says so.

    =========== ==========================================================================================
    ``pairs``   ``images/NAME.*`` and ``masks/NAME.*``; segmentation
    ``classes`` one folder a class with its images; classification, classes in the order of their names
    ``nnunet``  ``imagesTr/CASE_0000.*``, ``labelsTr/CASE.*``, ``dataset.json`` (nnU-Net v2); segmentation
    =========== ==========================================================================================

    Pictures are PNG, JPEG, TIFF or BMP. Of NIfTI volumes every axial slice is a sample, and all slices of a volume are
    one patient. ``patients.csv`` (or ``index.csv``) may add columns ``id, patient[, split][, site]``; ``id`` is the
    file's name without ending (``CLASS/NAME`` in ``classes``, ``CASE`` in ``nnunet``).

    Options: ``layout`` (else recognised by content); ``class_names`` and ``mask_values`` (``pairs``: background and
    foreground, values 0 and 1, where not given; ``mask_values = [0, 255]`` for black and white masks); ``channels``
    (the one or three channel numbers to take); ``ids = "names"`` shows file names in results. The default,
    ``"numbers"``, shows neither file names nor patients, because in a hospital both often are patient numbers.

    Raises:
        DataError: listing every fault of the structure: missing partners, unreadable headers, sizes that differ, tables
            that do not fit. Pixels are checked when they are read.
        ConfigError: for wrong options.
    """

    def __init__(self, source: config.SourceConfig) -> None:
        options = read_options(source)
        self._folder = Path(source.path or "").expanduser()
        self._layout = layouts.find(self._folder, options)
        self._channels = options.channels
        headers, faults = _headers(self._folder, self._layout.cases)
        table, table_faults = _read_table(self._folder, [case.name for case in self._layout.cases])
        index.refuse(self._folder, [*self._layout.faults, *faults, *table_faults])
        if not self._layout.cases:
            known = ", ".join(formats.PICTURES + formats.VOLUMES)
            raise errors.DataError(f"{self._folder}: no images; these are read: {known}")
        places = _places(self._layout.cases, headers, table, by_name=options.ids == "names")
        self._places = {place.sample.id: place for place in places}

    @property
    def info(self) -> data.SourceInfo:
        """Name, task, classes; the licence is the owner's."""
        task = "classification" if self._layout.kind == "classes" else "segmentation"
        note = f"the owner's data, layout '{self._layout.kind}'"
        return data.SourceInfo("folder", task, self._layout.class_names, "the owner's", note)

    def samples(self) -> Sequence[data.Sample]:
        """All samples in the order of the files' names."""
        return tuple(place.sample for place in self._places.values())

    def path_of(self, sample: data.Sample) -> Path:
        """The (first) image file of a sample, for those who may see it.

        Raises:
            DataError: if the sample is not of this source.
        """
        return self._place(sample).case.images[0]

    def _place(self, sample: data.Sample) -> Place:
        if sample.id not in self._places:
            raise errors.DataError(f"{self._folder}: no sample '{sample.id}'; it is of another source")
        return self._places[sample.id]

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read the image, and the mask where there is one.

        Raises:
            DataError: naming the file, for pixels that cannot be read and mask values outside the classes.
        """
        place = self._place(sample)
        image = _read_image(place, self._channels)
        if place.case.mask is None:
            return data.Pixels(image, None, place.header.spacing)
        file = place.case.mask
        stored = formats.read_mask(file) if place.slice is None else formats.read_mask_slice(file, place.slice)
        if stored.shape != image.shape[1:]:
            raise errors.DataError(
                f"{file}: {stored.shape} pixels for an image of {image.shape[1:]}; repair or remove the pair"
            )
        return data.Pixels(image, to_classes(stored, file, self._layout), place.header.spacing)


def read_options(source: config.SourceConfig) -> layouts.Options:
    """The options, checked.

    Raises:
        ConfigError: listing every fault.
    """
    faults = [] if source.path else ["data.path: required, the folder that holds the images"]
    faults += index.unknown_options(source, OPTIONS)
    given = source.options
    chosen = {"layout": given.get("layout", "auto"), "ids": given.get("ids", "numbers")}
    for key, allowed in (("layout", ("auto", *layouts.KINDS)), ("ids", ("numbers", "names"))):
        if chosen[key] not in allowed:
            faults.append(f"data.options.{key} = {chosen[key]!r}: one of {', '.join(allowed)} is needed")
    names = _listed(given, "class_names", str, faults)
    values = _listed(given, "mask_values", int, faults)
    channels = _listed(given, "channels", int, faults)
    expected = names or layouts.DEFAULT_NAMES
    if names and (len(names) < 2 or len(set(names)) < len(names)):
        faults.append(f"data.options.class_names = {list(names)}: at least two different names are needed")
    if values and (len(values) != len(expected) or len(set(values)) < len(values)):
        faults.append(
            f"data.options.mask_values = {list(values)}: one different value for each of {', '.join(expected)} is "
            "needed"
        )
    if channels and (len(channels) not in (1, 3) or min(channels) < 0):
        faults.append(f"data.options.channels = {list(channels)}: one or three channel numbers from 0 are needed")
    if faults:
        raise errors.ConfigError("data source 'folder'", faults)
    return layouts.Options(str(chosen["layout"]), names, values, channels, str(chosen["ids"]))


def _listed(given: Mapping[str, config.Option], key: str, kind: type[Item], faults: list[str]) -> tuple[Item, ...]:
    """An option that is a list of one kind; where it is not, a fault is noted."""
    value = given.get(key, [])
    items = value if isinstance(value, list) else []
    good = tuple(item for item in items if isinstance(item, kind) and not isinstance(item, bool))
    if not isinstance(value, list) or len(good) < len(items):
        faults.append(
            f"data.options.{key} = {value!r}: a list of {'names' if kind is str else 'whole numbers'} is needed"
        )
    return good


def _headers(folder: Path, cases: Sequence[layouts.Case]) -> tuple[dict[str, Header], list[str]]:
    """Headers by case name, and a fault for every case whose files are unreadable or do not fit."""
    headers, faults = {}, []
    for case in cases:
        try:
            headers[case.name] = _header(folder, case)
        except errors.DataError as error:
            faults.append(str(error).replace(f"{folder}/", "", 1))
    return headers, faults


def _header(folder: Path, case: layouts.Case) -> Header:
    """Read the headers of a case.

    Raises:
        DataError: if one is unreadable, or they differ in size or place.
    """
    files = [*case.images, *([case.mask] if case.mask else [])]
    volumes = [formats.ending(file) in formats.VOLUMES for file in files]
    if len(set(volumes)) > 1:
        raise errors.DataError(
            f"{layouts.relative(files, folder)}: pictures and volumes mixed; convert one to the other's kind"
        )
    if volumes[0]:
        return _volume_header(folder, files)
    sizes = [formats.picture_size(file) for file in files]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise errors.DataError(
                f"{layouts.relative([file], folder)} is {size[0]} x {size[1]} pixels, "
                f"{layouts.relative(files[:1], folder)} is "
                f"{sizes[0][0]} x {sizes[0][1]}; repair or remove the pair"
            )
    return Header(sizes[0])


def _volume_header(folder: Path, files: Sequence[Path]) -> Header:
    grids = [formats.volume_geometry(file) for file in files]
    for file, grid in zip(files, grids, strict=True):
        if not grid.fits(grids[0]):
            raise errors.DataError(
                f"{layouts.relative([file], folder)} (voxels {grid.shape}) and {layouts.relative(files[:1], folder)} "
                f"(voxels {grids[0].shape}) differ in size, spacing or place; resample one onto the other"
            )
    x, y, z = grids[0].shape
    return Header((y, x), z, grids[0].spacing)


def _read_table(folder: Path, names: Sequence[str]) -> tuple[dict[str, Row], list[str]]:
    """Rows by ``id`` of the first table that is there, and its faults.

    Raises:
        DataError: if the table cannot be read at all.
    """
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}, []
    rows = index.read_csv(path, ("id",))
    faults = [f"{path.name}: {fault}" for fault in index.duplicates(rows, "id")]
    table: dict[str, Row] = {row["id"]: row for row in rows}
    faults += [
        f"{path.name}: id '{name}' has no image; remove the row or bring the file"
        for name in table
        if name not in set(names)
    ]
    faults += [f"{path.name}: no row for image '{name}'; add one" for name in names if name not in table]
    splits: dict[str, set[str]] = {}
    for name, row in table.items():
        faults += [
            f"{path.name}: id '{name}' has no {key}; fill it in or drop the column"
            for key in ("patient", "split", "site")
            if row.get(key) == ""
        ]
        if row.get("split", "train") not in ("", *SPLITS):
            faults.append(f"{path.name}: id '{name}' has split '{row['split']}'; one of {', '.join(SPLITS)} is needed")
        if row.get("patient") and row.get("split"):
            splits.setdefault(row["patient"], set()).add(row["split"])
    faults += [
        f"{path.name}: a patient with images in {' and '.join(sorted(parts))} (id '{_first_of(table, patient)}' is "
        "one); keep a patient in one split"
        for patient, parts in splits.items()
        if len(parts) > 1
    ]
    return table, faults


def _first_of(table: Mapping[str, Row], patient: str) -> str:
    return next(name for name, row in table.items() if row["patient"] == patient)


def _places(
    cases: Sequence[layouts.Case], headers: Mapping[str, Header], table: Mapping[str, Row], *, by_name: bool
) -> list[Place]:
    """The samples: one a picture, one a slice of a volume."""
    width = max(4, len(str(len(cases))))
    patients = {
        name: number for number, name in enumerate(sorted({row.get("patient", "") for row in table.values()}), 1)
    }
    places = []
    for number, case in enumerate(cases, 1):
        row, header = table.get(case.name, {}), headers[case.name]
        name = case.name if by_name else f"image-{number:0{width}d}"
        # Slices of one volume are near duplicates, so they stay together even without a table.
        patient = name if header.slices is not None else None
        if row.get("patient"):
            patient = row["patient"] if by_name else f"patient-{patients[row['patient']]:0{width}d}"
        for z in range(header.slices) if header.slices is not None else (None,):
            id_ = name if z is None else f"{name}-z{z:03d}"
            one = data.Sample(id_, case.label, row.get("site"), patient, row.get("split"))
            places.append(Place(one, case, header, z))
    return places


def _read_image(place: Place, channels: Sequence[int]) -> NDArray[np.float32]:
    """All channels of a case as (C, H, W), or those that are chosen.

    Raises:
        DataError: for files that cannot be read, or channel counts other than one and three.
    """
    files, z = place.case.images, place.slice
    image = np.concatenate([formats.read_image(file) if z is None else formats.read_slice(file, z) for file in files])
    if channels:
        if max(channels) >= len(image):
            raise errors.DataError(
                f"{files[0]}: data.options.channels = {list(channels)}, but there are {len(image)} channels, from 0"
            )
        image = image[list(channels)]
    if len(image) not in (1, 3):
        raise errors.DataError(
            f"{files[0]}: {len(image)} channels; choose one or three with data.options.channels = [0]"
        )
    return image


def to_classes(stored: NDArray[np.int64], file: Path, layout: layouts.Layout) -> NDArray[np.int64]:
    """Stored values to class numbers.

    Shapes: (H, W) in, (H, W) out.

    Raises:
        DataError: naming the first value that stands for no class, and how often it occurs.
    """
    classes = np.full(stored.shape, -1, dtype=np.int64)
    for number, value in enumerate(layout.mask_values):
        classes[stored == value] = number
    outside = stored[classes < 0]
    if outside.size:
        value = int(outside.min())
        known = ", ".join(f"{value} {name}" for value, name in zip(layout.mask_values, layout.class_names, strict=True))
        remedy = (
            "data.options.class_names and mask_values name what is missing"
            if layout.kind == "pairs"
            else "add it to dataset.json"
        )
        raise errors.DataError(
            f"{file}: value {value} in {np.count_nonzero(outside == value)} pixels is no class; classes: {known}; "
            f"repair the mask, or {remedy}"
        )
    return classes
