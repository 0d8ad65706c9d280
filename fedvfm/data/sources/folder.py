"""The hospital's own folder: pictures, volumes and DICOM studies in one of ten layouts."""

from __future__ import annotations

import collections
import copy
import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import slides as slides_config
from fedvfm.data import channels, defect, formats, instances, structures
from fedvfm.data import sample as data
from fedvfm.data.decoding import decoder
from fedvfm.data.sources import cases, index, layouts, patients, recognise, slides, studies
from fedvfm.data.volumes import dicom_seg, nifti, patient_id, series_selector
from fedvfm.data.volumes import slices as volume_slices

OPTIONS = (
    "channels",
    "class_names",
    "fold",
    "ids",
    "instances",
    "layout",
    "mask_values",
    "mpp",
    "overlap",
    "patients",
    "patients_key",
    "series",
    "suffix",
)
SAME_PATIENT = (
    "another study has the same Patient ID, but nobody says so: patients.csv (id,patient), or "
    'data.options.patients = "hash", keeps both in one split'
)

LABELLED = ("studies", "table", "cases", "images", "slides")
"""Layouts whose ``labels.csv`` may say the patients, too."""
UNREADABLE = (
    defect.UNREADABLE,
    defect.NOT_FOUND,
    defect.COMPRESSED,
    defect.TOO_LARGE,
    defect.NOT_FINITE,
    defect.READER_FAILED,
    defect.DECODING_MEMORY,
    defect.DECODING_TIME,
    defect.DECODER_DIED,
)
"""Kinds of faults that ``[data] unreadable = "skip"`` passes over: files nobody can read, not ones that do not fit."""
SEVERAL = (defect.SERIES_MIXED, defect.NO_GEOMETRY)
"""Kinds of faults of a study's folder that holds several images."""
WHITE = 255
"""Of two classes the second may be drawn white."""

Item = TypeVar("Item", str, int)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample's pixels are."""

    sample: data.Sample
    case: layouts.Case
    seen: cases.Seen
    slice: int


class Folder:
    """Images of one hospital, or of several where a table says so.

    ============ ==========================================================================================
    ``pairs``    ``images/NAME.*`` and ``masks/NAME.*`` (or ``labels/``, ...); segmentation; or both in a folder a
                 hospital, whose name is the site
    ``table``    ``images/NAME.*`` and a table with the columns ``id`` and ``label``; classification
    ``classes``  one folder a class with its images; classification, classes in the order of their names
    ``nnunet``   ``imagesTr/CASE_0000.*``, ``labelsTr/CASE.*``, ``dataset.json`` (nnU-Net v2); segmentation
    ``datalist`` ``dataset.json`` with ``training = [{image, label}]`` (MONAI, Decathlon); both tasks
    ``studies``  ``studies/NAME/`` with one DICOM series each; masks as DICOM-SEG or RTSTRUCT in it, or
                 ``masks/NAME.*`` (segmentation), or a table with a column ``label`` (classification)
    ``bids``     ``sub-*/`` and masks in ``derivatives/``; segmentation
    ``cases``    ``cases/NAME/`` with the images of one case each, and a table with the columns ``id`` (NAME) and
                 ``label``; classification
    ``images``   no labels: ``studies/``, ``cases/`` or ``images/`` as above, else the images of the folder itself
    ``slides``   ``slides/NAME.svs`` or ``.tif``, whole slides, and such a table; their tiles are the images
    ============ ==========================================================================================

    Pictures are PNG, JPEG, TIFF or BMP; volumes NIfTI, NRRD or DICOM; one DICOM file with one frame (a radiograph)
    stands where a picture may stand. Every slice of a volume is a sample, all slices of a volume are one patient, and
    volumes are scored whole. A table ``patients.csv`` (or ``index.csv``, ``labels.csv``) may add columns ``id,
    patient[, split][, site]``; ``id`` is the file's or folder's name without ending (``CLASS/NAME`` in ``classes``,
    ``CASE`` in ``nnunet``, the folder in ``cases``). A column ``case`` says which images are one case where a task is
    of cases (``case-classification``); else it is a volume with its slices, or a study or folder with its images.
    Images of a case stand in the order of their names, numbers in them by value. Where labels stand in a table, a row
    with ``none`` in a column ``image`` is a case without an image; without it a row that names no image is a fault.

    Masks that say what their numbers are (DICOM-SEG, RT structure sets, 3D Slicer's NRRD, dcmqi's JSON, BIDS tables)
    are read by code and name (:mod:`fedvfm.data.structures`).

    Options: ``layout`` (else recognised by content); ``class_names`` and ``mask_values`` (background and foreground,
    values 0 and 1, or 0 and 255, where not given; of DICOM-SEG the values are segment numbers); ``channels`` (the one
    or three channel numbers to take); ``fold`` (``datalist``: the fold to test on); ``suffix`` (``bids``); ``series``
    (which one of a DICOM folder with several, as ``"CT axial most"``: see :mod:`fedvfm.data.volumes.series_selector`);
    ``overlap = "last"`` (of classes that overlap in DICOM-SEG or structure sets the one with the higher number counts;
    else they are refused); ``ids = "names"`` shows file names in results. The default, ``"numbers"``, shows neither
    file names nor patients, because in a hospital both often are patient numbers. ``patients = "hash"`` groups DICOM
    studies by a keyed hash of Patient ID (:mod:`fedvfm.data.volumes.patient_id`); the key is made once and kept at
    ``patients_key``, else in the data folder.

    Raises:
        DataError: listing every fault of the structure: missing partners, unreadable headers, sizes that differ, tables
            that do not fit. Pixels are checked when they are read.
        ConfigError: for wrong options.
    """

    def __init__(self, source: schema.SourceConfig, refuse: index.Refuse = index.refuse) -> None:
        options = read_options(source)
        self._limits = source.limits
        decoder.limit(self._limits)
        self._folder = Path(source.path or "").expanduser()
        self._refuse = refuse
        self._layout = recognise.find(self._folder, options)
        self._channels, self._by_name, self._named = options.channels, options.ids == "names", dict(source.channels)
        if self._named:  # until a recipe says in which order, what is taken first
            self._channels = (next((each for each in self._named.values() if isinstance(each, int)), 0),)
        self._view = volume_slices.View(series=options.series)
        files = [file for case in self._layout.cases for file in (*case.images, case.mask) if file is not None]
        roots = [self._folder, *(Path(root).expanduser() for root in source.roots)]
        self._layout.faults += layouts.links_out(list(dict.fromkeys(files)), self._folder, roots)
        self._seen, faults = _look(self._folder, self._layout, options.series)
        names = self._layout.names or [case.name for case in self._layout.cases]
        tables = patients.STUDY_TABLES if self._layout.kind in LABELLED else patients.TABLES
        self._table, table_faults = patients.read_table(self._folder, names, tables)
        self._skipped: list[layouts.Case] = []
        if source.unreadable == "skip":
            faults = self._skip_unreadable(faults)
        self._further: patients.Tables | None = None
        self._same: frozenset[str] | None = None
        if options.patients == "hash":
            self._give_patients(options)
        self._own_numbers = bool(options.mask_values)
        self._instances = options.instances
        if options.instances and len(self._layout.class_names) > 2:
            listed = ", ".join(self._layout.class_names)
            fault = f"data.options.instances: such masks are of one class beside the background, not of {listed}"
            raise errors.ConfigError("data source 'folder'", [fault])
        self._stated = bool(options.class_names)
        self._wanted: tuple[str, ...] = ()
        self._codes: Mapping[str, str] = {}
        self._mapped: tuple[str, ...] = ()
        self._merging = dicom_seg.Merging(last=options.overlap == "last")
        self._assigned = self._structures()
        masks = [case.mask for case in self._layout.cases if case.mask is not None]
        named = [
            *self._assigned.faults,
            *layouts.palette_faults(masks, self._folder, max(self._layout.mask_values, default=0) + 1),
        ]
        refuse(self._folder, list(dict.fromkeys([*self._layout.faults, *faults.values(), *table_faults, *named])))
        if not self._layout.cases:
            known = ", ".join(formats.PICTURES + formats.VOLUMES)
            raise defect.NO_SAMPLES.error(f"{self._folder}: no images; these are read: {known}")
        self._places = self._arranged()

    def _skip_unreadable(self, faults: Mapping[str, errors.Fault]) -> dict[str, errors.Fault]:
        """Leave out the cases whose files cannot be read, their pixels too; the faults of the others remain."""
        wrong = dict(faults)
        for case in self._layout.cases:
            if case.name in self._seen:
                try:
                    cases.read_whole(case, self._seen[case.name], self._view)
                except errors.DataError as error:
                    wrong[case.name] = _told(self._folder, case, error).fault(self._folder)
        lost = {name: fault for name, fault in wrong.items() if fault.code in UNREADABLE}
        self._layout.left += [f'{name}: skipped (unreadable = "skip"): {fault}' for name, fault in lost.items()]
        self._skipped = [case for case in self._layout.cases if case.name in lost]
        self._layout.cases = [case for case in self._layout.cases if case.name not in lost]
        self._seen = {name: seen for name, seen in self._seen.items() if name not in lost}
        # Faults of pixels that are not skipped are told when they are read, as always.
        return {name: fault for name, fault in faults.items() if name not in lost}

    def _give_patients(self, options: layouts.Options) -> None:
        """Give DICOM cases whose patient nobody says the keyed hash of their Patient ID.

        Raises:
            ConfigError: if the key cannot be used, no case is DICOM, or a row without an image has no patient.
        """
        path = Path(options.patients_key).expanduser() if options.patients_key else self._folder / patient_id.KEY_NAME
        unsaid = self._without_patient()
        if self._seen and not any(seen.header and seen.header.frames for seen in self._seen.values()):
            text = "data.options.patients = 'hash': no DICOM here has a Patient ID; give patients.csv (id,patient)"
            raise errors.ConfigError("data source 'folder'", [text])
        bare = [case for case in self._layout.cases if not case.images and not self._row(case).get("patient")]
        if bare:
            text = (
                f"data.options.patients = 'hash': {len(bare)} rows with image = {layouts.NO_IMAGE} have no Patient ID"
                " that would say whether an image here is of the same patient; give them a column patient"
            )
            raise errors.ConfigError("data source 'folder'", [text])
        secret = patient_id.key(path)
        named = {name: self._patient_of(name, secret) for name in unsaid}
        self._layout.cases = [
            dataclasses.replace(case, patient=named.get(case.name) or case.patient) for case in self._layout.cases
        ]

    def _without_patient(self) -> list[str]:
        """DICOM cases of which neither the layout nor a table says the patient."""
        return [
            case.name
            for case in self._layout.cases
            if case.name in self._seen and (header := self._seen[case.name].header) and header.frames
            if not (case.patient or self._row(case).get("patient"))
        ]

    def _same_patients(self) -> frozenset[str]:
        """Cases that share a Patient ID with another although nobody says so; looked for once."""
        if self._same is None:
            secret = secrets.token_bytes(patient_id.KEY_BYTES)
            named = {name: self._patient_of(name, secret) for name in self._without_patient()}
            study = {case.name: case.study or case.name for case in self._layout.cases}
            # Images of one study folder are kept together anyway.
            pairs = {(study[case], name) for case, name in named.items() if name is not None}
            times = collections.Counter(name for _, name in pairs)
            self._same = frozenset(case for case, name in named.items() if name is not None and times[name] > 1)
        return self._same

    def row(self, sample: data.Sample) -> Mapping[str, str]:
        """The further cells of a sample's row, of all tables, by column; none where no table has a row for it.

        What the row of an image leaves empty, that of its case says, where tables have both.

        Raises:
            DataError: if a table cannot be read, or two have one column.
        """
        own, of_case = (self._tables().rows.get(name, {}) for name in self._row_ids(sample))
        return {**of_case, **{name: cell for name, cell in own.items() if cell or name not in of_case}}

    def row_place(self, sample: data.Sample, column: str) -> str:
        """Table, line and id of the row whose cell :meth:`row` gives: what a person looks for to mend it.

        The id is the hospital's own and is for this machine alone.
        """
        tables, ids = self._tables(), self._row_ids(sample)
        table = tables.owner.get(column, patients.INPUTS)
        held = [name for name in ids if (table, name) in tables.lines]
        if not held:
            return f"{table} has no row with id '{ids[0]}'"
        name = next((name for name in held if tables.rows[name].get(column)), held[0])
        return f"{table} line {tables.lines[table, name]}, id '{name}'"

    def _row_ids(self, sample: data.Sample) -> tuple[str, str]:
        """Under which id a sample has a row, and its case; the latter is empty where there is none."""
        case = self._place(sample).case
        return case.study or case.name, self._row(case).get("case", "")

    def _tables(self) -> patients.Tables:
        if self._further is None:
            self._further = patients.columns(self._folder)
        return self._further

    @property
    def unused_rows(self) -> int:
        """How many rows of the tables name no image, study or case that is here; those of skipped ones are here.

        Raises:
            DataError: as :meth:`row`.
        """
        return len(set(self._tables().rows) - self._named_by(self._layout.cases) - self._named_by(self._skipped))

    def _named_by(self, chosen: Sequence[layouts.Case]) -> set[str]:
        """The ids that rows of these cases may have."""
        return {name for case in chosen for name in (case.study or case.name, self._row(case).get("case", ""))}

    def _row(self, case: layouts.Case) -> patients.Row:
        """What the table of patients says of a case, or of the study it is of."""
        return self._table.get(case.study or case.name, {})

    def _patient_of(self, case: str, secret: bytes) -> str | None:
        header = self._seen[case].header
        return patient_id.keyed(header.frames[0].file, secret) if header is not None and header.frames else None

    def _held(self) -> structures.Found:
        return {name: seen.held for name, seen in self._seen.items() if seen.held}

    def _structures(self) -> structures.Assigned:
        """What the numbers of all masks stand for; where their names are the classes', masks are read by them."""
        layout = self._layout
        found = structures.assign(
            self._held(),
            layout.class_names,
            layout.mask_values,
            numbers=self._own_numbers,
            stated=self._stated or layout.named,
            mapped=self._mapped,
        )
        if found.names != layout.class_names:
            layout.class_names, layout.mask_values = found.names, tuple(range(len(found.names)))
        return found

    def _structures_under(self, wanted: Sequence[str], codes: Mapping[str, str]) -> list[errors.Fault]:
        """Read masks by the recipe's classes, where only the masks say what they are; the faults of that."""
        if self._stated or self._own_numbers or (self._layout.named and not self._wanted):
            return []
        assigned = structures.under(self._held(), wanted, self._mapped, codes)
        if assigned is None:
            return []
        numbers = tuple(range(len(assigned.names)))
        self._layout = dataclasses.replace(self._layout, class_names=assigned.names, mask_values=numbers, named=True)
        self._assigned, self._wanted, self._codes = assigned, tuple(wanted), dict(codes)
        return list(assigned.faults)

    def mapping(self, words: Sequence[str]) -> Self:
        """The same images where ``[labels]`` maps these names and codes: a region it names is never left out.

        Raises:
            DataError: for such a region that fits no class.
        """
        changed = copy.copy(self)
        changed._mapped = tuple(words)
        if self._wanted:
            faults = changed._structures_under(self._wanted, self._codes)
        else:
            changed._layout = dataclasses.replace(self._layout)
            changed._assigned = changed._structures()
            faults = list(changed._assigned.faults)
        self._refuse(self._folder, [fault for fault in faults if fault not in self._assigned.faults])
        return changed

    def merged(self, numbers: Sequence[int]) -> Self:
        """The same images where class ``i`` will count as ``numbers[i]``: classes of one number do not overlap."""
        changed = copy.copy(self)
        changed._merging = dataclasses.replace(self._merging, numbers=tuple(numbers))
        return changed

    @property
    def left(self) -> tuple[str, ...]:
        """What the folder holds and was left out, each with its reason; for those who may see names of files."""
        found = [*self._layout.left, *self._assigned.left]
        for seen in self._seen.values():
            if seen.header is not None:
                found += [f"{layouts.relative([file], self._folder)}: {reason}" for file, reason in seen.header.left]
        return tuple(found)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Codes and plain names by which ``[labels]`` may call a class, beside its own name."""
        return self._assigned.aliases

    @classmethod
    def tolerant(cls, source: schema.SourceConfig, faults: list[str]) -> Folder:
        """The folder without the cases that have a fault; the faults are added to the list instead of raised.

        Raises:
            DataError, ConfigError: where nothing can be read at all.
        """
        return cls(source, refuse=lambda _, found: faults.extend(found))

    def under(self, contract: schema.DataContract) -> Self:
        """The same images as a recipe asks for them: cut in its plane, stacked, seen through its window.

        Raises:
            DataError: listing images of another modality or with other channels, and pictures where the recipe needs
                volumes.
        """
        found = copy.copy(self)
        faults: list[errors.Fault] = []
        if self._named:
            found._channels, faults = channels.numbers(self._named, self._layout.channels, contract)
        faults += cases.order_faults(self._layout, contract, found._channels)
        faults += found._structures_under(contract.class_names, contract.codes)
        found._view = volume_slices.View.of(contract, self._view.series)
        for case in self._layout.cases:
            if case.name in self._seen:
                wrong = cases.faults_under(case, self._seen[case.name], self._folder, contract, found._channels)
                wrong = [errors.Fault(_called(self._folder, case, one), one.code, one.values) for one in wrong]
                faults += wrong
                if wrong:
                    found._seen = {name: seen for name, seen in found._seen.items() if name != case.name}
        self._refuse(self._folder, faults)
        found._places = found._arranged()
        return found

    def _arranged(self) -> dict[str, Place]:
        made = _places(self._layout.cases, self._seen, self._table, self._view, by_name=self._by_name)
        return {place.sample.id: place for place in made}

    @property
    def info(self) -> data.SourceInfo:
        """Name, task, classes; the licence is the owner's."""
        task = "segmentation" if any(case.mask for case in self._layout.cases) else "classification"
        note = f"the owner's data, layout '{self._layout.kind}'"
        note += f"; {len(self._skipped)} case(s) skipped as unreadable" if self._skipped else ""
        read = {*self._table, *(self._further.rows if self._further is not None else ())}
        with_them = read & (self._named_by(self._skipped) - self._named_by(self._layout.cases))
        note += f", and {len(with_them)} row(s) of the tables with them" if with_them else ""
        unused = self.unused_rows if self._further is not None else 0
        note += f"; {unused} row(s) of the tables of nothing that is here" if unused else ""
        return data.SourceInfo("folder", task, self._layout.class_names, "the owner's", note, self._layout.named)

    def samples(self) -> Sequence[data.Sample]:
        """All samples in the order of the files' names."""
        return tuple(place.sample for place in self._places.values())

    def path_of(self, sample: data.Sample) -> Path:
        """The (first) image file of a sample, for those who may see it; of a DICOM study its folder.

        Raises:
            DataError: if the sample is not of this source, or has no image.
        """
        return nifti.file_of(self._imaged(sample).case.images[0])

    def notes_of(self, sample: data.Sample) -> tuple[str, ...]:
        """What is to be said of a sample's volume, one sentence each, without text of its file.

        Raises:
            DataError: if the sample is not of this source.
        """
        place = self._place(sample)
        header, more = place.seen.header, (*place.seen.notes, *self._assigned.notes.get(place.case.name, ()))
        more += (SAME_PATIENT,) if place.case.name in self._same_patients() else ()
        return more if header is None else (*header.notes, *more)

    def _place(self, sample: data.Sample) -> Place:
        if sample.id not in self._places:
            raise defect.NOT_FOUND.error(f"{self._folder}: no sample '{sample.id}'; it is of another source")
        return self._places[sample.id]

    def _imaged(self, sample: data.Sample) -> Place:
        place = self._place(sample)
        if not place.case.images:
            raise defect.IMAGE_NEEDED.error(
                f"{self._folder}: '{sample.id}' has no image (image = {layouts.NO_IMAGE} in its table), and one is "
                "read; take its row out"
            )
        return place

    def stable(self, sample: data.Sample) -> tuple[str, str | None]:
        """A sample and its patient by names that stay when files are added, which numbers do not.

        For the privacy ledger, which keeps hashes of them; they are not safe to log.
        """
        place = self._place(sample.images[0] if sample.images else sample)
        name, row = place.case.name, self._row(place.case)
        patient = _patient(place.case, row) or (None if place.seen.alone else name)
        if sample.images:
            return f"case {row.get('case') or place.case.study or name}", patient
        if place.seen.slide is not None:
            return f"{name} slide", patient  # however it is cut into tiles
        return f"{name} {place.slice}", patient

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read the image, and the mask where there is one.

        Raises:
            DataError: naming the file, for pixels that cannot be read and mask values outside the classes.
        """
        decoder.limit(self._limits)
        place = self._imaged(sample)
        try:
            return self._read(place)
        except errors.DataError as error:
            raise _told(self._folder, place.case, error) from None

    def _read(self, place: Place) -> data.Pixels:
        pixels = cases.read_image(place.case, place.seen, place.slice, self._view, self._channels)
        pixels = dataclasses.replace(pixels, part=place.sample.part)
        if place.case.mask is None:
            return pixels
        file, size = place.case.mask, pixels.image.shape[1:]
        stored = cases.read_mask(file, place.seen, place.slice, self._view, self._assigned.table, self._merging)
        if self._instances:
            stored = instances.apart(stored)
        elif self._layout.mask_values == (0, 1) and not self._own_numbers and cases.is_black_and_white(file, stored):
            stored = np.where(stored == WHITE, 1, stored)
        if stored.shape != size:
            raise defect.MASK_SIZE.error(
                f"{file}: {stored.shape} pixels for an image of {size}; repair or remove the pair"
            )
        return dataclasses.replace(pixels, mask=to_classes(stored, file, self._layout))


def read_options(source: schema.SourceConfig) -> layouts.Options:
    """The options, checked.

    Raises:
        ConfigError: listing every fault.
    """
    faults = [] if source.path else ["data.path: required, the folder that holds the images"]
    faults += index.unknown_options(source, OPTIONS)
    given = source.options
    allowed_words = {
        "layout": ("auto", *recognise.KINDS),
        "ids": ("numbers", "names"),
        "overlap": ("refuse", "last"),
        "patients": ("", "hash"),
    }
    chosen = {key: given.get(key, allowed[0]) for key, allowed in allowed_words.items()}
    for key, allowed in allowed_words.items():
        if chosen[key] not in allowed:
            faults.append(f"data.options.{key} = {chosen[key]!r}: one of {', '.join(allowed)} is needed")
    names = _listed(given, "class_names", str, faults)
    values = _listed(given, "mask_values", int, faults)
    numbers = _listed(given, "channels", int, faults)
    expected = names or layouts.DEFAULT_NAMES
    if names and (len(names) < 2 or len(set(names)) < len(names)):
        faults.append(f"data.options.class_names = {list(names)}: at least two different names are needed")
    if values and (len(values) != len(expected) or len(set(values)) < len(values)):
        faults.append(
            f"data.options.mask_values = {list(values)}: one different value for each of {', '.join(expected)} is "
            "needed"
        )
    if numbers and source.channels:
        faults.append("data.options.channels and [data.channels] both say which files are taken; leave one of them out")
    if numbers and (len(numbers) not in (1, 3) or min(numbers) < 0):
        faults.append(f"data.options.channels = {list(numbers)}: one or three channel numbers from 0 are needed")
    fold, suffix, series = given.get("fold"), given.get("suffix", ""), given.get("series", "")
    where = given.get("patients_key", "")
    if not isinstance(where, str) or (where and not chosen["patients"]):
        faults.append(
            f"data.options.patients_key = {where!r}: a path, beside data.options.patients = 'hash', is needed"
        )
    mpp = given.get("mpp", 0.0)
    if (
        isinstance(mpp, bool)
        or not isinstance(mpp, int | float)
        or (mpp and not slides_config.FINEST <= mpp <= slides_config.COARSEST)
    ):
        faults.append(
            f"data.options.mpp = {mpp!r}: the scale of slides that do not say it, {slides_config.SCALES}, is needed"
        )
    single = given.get("instances", False)
    if not isinstance(single, bool) or (single and values):
        faults.append(f"data.options.instances = {single!r}: true or false, without mask_values, is needed")
    if fold is not None and (not isinstance(fold, int) or isinstance(fold, bool) or fold < 0):
        faults.append(f"data.options.fold = {fold!r}: a whole number from 0 is needed")
    if not isinstance(suffix, str):
        faults.append(f"data.options.suffix = {suffix!r}: a name like 'T1w' is needed")
    if isinstance(series, bool) or not isinstance(series, str | int):
        faults.append(f"data.options.series = {series!r}: a series number, or words like 'CT axial', are needed")
    elif "series" in given:
        faults += [f"data.options.series: {fault}" for fault in series_selector.faults(str(series))]
    if faults:
        raise errors.ConfigError("data source 'folder'", faults)
    number = fold if isinstance(fold, int) else None
    return layouts.Options(
        str(chosen["layout"]),
        names,
        values,
        numbers,
        str(chosen["ids"]),
        number,
        str(suffix),
        str(series),
        str(chosen["overlap"]),
        str(chosen["patients"]),
        str(where),
        float(str(mpp)),
        single is True,
    )


def _listed(given: Mapping[str, schema.Option], key: str, kind: type[Item], faults: list[str]) -> tuple[Item, ...]:
    """An option that is a list of one kind; where it is not, a fault is noted."""
    value = given.get(key, [])
    items = value if isinstance(value, list) else []
    good = tuple(item for item in items if isinstance(item, kind) and not isinstance(item, bool))
    if not isinstance(value, list) or len(good) < len(items):
        faults.append(
            f"data.options.{key} = {value!r}: a list of {'names' if kind is str else 'whole numbers'} is needed"
        )
    return good


def _look(folder: Path, layout: layouts.Layout, series: str) -> tuple[dict[str, cases.Seen], dict[str, errors.Fault]]:
    """Headers by case name, and a fault for every case whose files are unreadable or do not fit.

    A study of several radiographs or clips becomes as many cases of the layout.
    """
    seen, faults = {}, dict[str, errors.Fault]()
    waiting, layout.cases = list(reversed(layout.cases)), []
    while waiting:
        case = waiting.pop()
        try:
            seen[case.name] = cases.look(folder, case, series)
        except errors.DataError as error:
            apart = _parts(folder, layout, case, series) if error.code in SEVERAL else []
            waiting += reversed(apart)
            if apart:
                continue
            faults[case.name] = _told(folder, case, error).fault(folder)
        layout.cases.append(case)
    return seen, faults


def _parts(folder: Path, layout: layouts.Layout, case: layouts.Case, series: str) -> list[layouts.Case]:
    """The images of a study as cases of their own, or none; what else lies in it is left out by name."""
    if not case.images[0].is_dir():
        return []
    apart, study = studies.parts(case, series)
    if apart:
        layout.left += [f"{layouts.relative([file], folder)}: {reason}" for file, reason in study.left]
    return apart


def _called(folder: Path, case: layouts.Case, text: str) -> str:
    """A text with the case's name in place of its file's: files inside a study are often called after patients."""
    if not case.study:
        return text
    file = case.images[0]
    name = f"{layouts.relative([file.parent], folder)}: image {case.name.rpartition('/')[2]}"
    shown = text.replace(str(file), str(folder / name)).replace(layouts.relative([file], folder), name)
    return shown if name in shown else f"{name}: {shown}"


def _told(folder: Path, case: layouts.Case, error: errors.DataError) -> errors.DataError:
    """An error that names no file inside a study, but which image of it."""
    if not case.study:
        return error
    return errors.DataError(_called(folder, case, str(error)), error.faults, code=error.code, values=error.values)


def _places(
    found: Sequence[layouts.Case],
    seen: Mapping[str, cases.Seen],
    table: Mapping[str, patients.Row],
    view: volume_slices.View,
    *,
    by_name: bool,
) -> list[Place]:
    """The samples: one a picture, one a slice of a volume."""
    imaged = [case for case in found if case.images]
    width = max(4, len(str(len(imaged))))
    rows = {case.name: table.get(case.study or case.name, {}) for case in found}
    given = {case.name: _patient(case, rows[case.name]) or None for case in found}
    known = _numbered({name: given[name] or "" for name in given}, imaged, str)
    whole = {case.name: rows[case.name].get("case") or case.study for case in found}
    numbers = _numbered({name: case for name, case in whole.items() if case}, imaged, layouts.natural)
    ordered = list(found)
    if any(row.get("case") for row in rows.values()):
        ordered.sort(key=lambda case: (layouts.natural(whole[case.name]), layouts.natural(case.name)))
    ordered.sort(key=lambda case: not case.images)
    places = []
    for number, case in enumerate(ordered, 1):
        if case.name not in seen:
            continue  # a fault that was told and not raised
        row, what, stated = rows[case.name], seen[case.name], given[case.name]
        kind = "image" if case.images else "row"
        name = case.name if by_name else f"{kind}-{number:0{width}d}"
        # Slices of one volume are near duplicates, so they stay together even without a table.
        patient = name if not what.alone else None
        if stated:
            patient = stated if by_name else f"patient-{known[stated]:0{width}d}"
        site = row.get("site") or case.site
        belongs = whole[case.name] or None
        if belongs and not by_name:
            belongs = f"case-{numbers[belongs]:0{width}d}"
        split = row.get("split") or case.split
        one = data.Sample(name, case.label, site, patient, split, case=belongs, without_image=not case.images)
        if what.slide is not None:
            places += _tiles(one, case, what, view)
            continue
        places += [Place(one, case, what, 0)] if what.alone or what.header is None else _slices(one, case, what, view)
    return places


def _numbered(names: Mapping[str, str], imaged: Sequence[layouts.Case], order: Callable[[str], Any]) -> dict[str, int]:
    """Numbers of patients or cases from 1; of those with an image the numbers that they have without the others.

    Args:
        names: case of the layout -> the patient's or case's name.
        imaged: cases with an image.
        order: of names.
    """
    first = sorted({names[case.name] for case in imaged if case.name in names}, key=order)
    rest = sorted({*names.values()} - {*first}, key=order)
    return {name: number for number, name in enumerate([*first, *rest], 1)}


def _patient(case: layouts.Case, row: patients.Row) -> str:
    """Whose an image is, as far as anybody says: images of one study or one case are of one patient; empty else."""
    return row.get("patient") or case.patient or case.study or row.get("case") or ""


def _slices(one: data.Sample, case: layouts.Case, seen: cases.Seen, view: volume_slices.View) -> list[Place]:
    """A sample for every slice of a volume, or every moment of a film."""
    header = seen.header
    if header is None:
        return []
    return [
        Place(
            dataclasses.replace(one, id=f"{one.id}-{number}", part=volume_slices.part_of(header, one.id, at, view)),
            case,
            seen,
            at,
        )
        for at, number in enumerate(volume_slices.names(header, view))
    ]


def _tiles(image: data.Sample, case: layouts.Case, seen: cases.Seen, view: volume_slices.View) -> list[Place]:
    """A sample for every tile of a slide; a slide is a case, unless the table puts several into one."""
    if seen.slide is None:
        return []
    return [
        Place(dataclasses.replace(image, id=f"{image.id}-{name}", case=image.case or image.id), case, seen, at)
        for at, name in enumerate(slides.names(seen.slide, view.slides))
    ]


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
            if layout.kind in ("pairs", "studies", "bids")
            else "add it to dataset.json"
        )
        raise defect.MASK_VALUE.error(
            f"{file}: value {value} in {np.count_nonzero(outside == value)} pixels is no class; classes: {known}; "
            f"repair the mask, or {remedy}",
            [value],
        )
    return classes
