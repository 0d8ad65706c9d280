"""Layouts of a folder: which files belong together, and every fault in that, before pixels are read.

Here: pairs, tables, cases, classes and nnU-Net. DICOM studies, datalists and BIDS have modules of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvfm import errors, registry
from fedvfm.data import defect, formats, side_files
from fedvfm.data.sources import index, patients
from fedvfm.data.volumes import metaimage

DEFAULT_NAMES = ("background", "foreground")
IGNORED = (".csv", ".db", ".ini", ".json", ".md", ".txt", ".xml")
NO_IMAGE = "none"
"""In a column ``image`` of a table of labels or patients: this case has no image."""
NUMBER = re.compile(r"[+-]?\d{1,15}(?:\.\d*)?", re.ASCII)
IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "segmentations",
    "segmentation",
    "annotations",
    "annotation",
    "groundtruth",
    "ground_truth",
    "gt",
)
SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "test", "testing")
"""Names of folders that are no classes."""
TEST_FOLDERS = ("imagesTs", "labelsTs")
"""Of nnU-Net: images that are kept for its own test."""
REMEDY = (
    "expected images/ and masks/ (or labels/), also in a folder for each hospital, images/ with a table that has a "
    "column label, one folder of images a class, nnU-Net's imagesTr/, labelsTr/ and dataset.json, a datalist "
    "(dataset.json with 'training'), studies/ with a DICOM folder each, cases/ with a folder of images each and a "
    "table that has a column label, slides/ with whole slides and such a table, or BIDS (sub-*/ and derivatives/); "
    "data.options.layout = pairs, table, classes, nnunet, datalist, studies, cases, slides or bids says which; "
    "images alone are for a site of role = 'unlabelled'"
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a folder source, checked for form."""

    layout: str = "auto"
    class_names: tuple[str, ...] = ()
    mask_values: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    ids: str = "numbers"
    fold: int | None = None
    suffix: str = ""
    series: str = ""
    overlap: str = "refuse"
    patients: str = ""
    patients_key: str = ""
    mpp: float = 0.0
    instances: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """Files that belong together.

    Attributes:
        name: as a table of patients calls it.
        images: one file a channel, or one file with all; a folder holds a DICOM series. Empty where a table declares
            that there is none.
        mask: the mask's file, in segmentation; a folder holds DICOM-SEG objects.
        label: the class, in classification.
        patient: where the layout says so; a table speaks first.
        split: where the layout says so; a table speaks first.
        site: where the layout says so; a table speaks first.
        study: name of the study whose folder holds further images that are cases of their own; a table has its row.
        mpp: of a whole slide, the micrometres a pixel that its file may leave unsaid, 0 where nobody says them; None of
            all else.
    """

    name: str
    images: tuple[Path, ...]
    mask: Path | None = None
    label: int | None = None
    patient: str | None = None
    split: str | None = None
    site: str | None = None
    study: str = ""
    mpp: float | None = None


@dataclass
class Layout:
    """What was found: cases in the order of their names, classes, and faults (one sentence each).

    ``names`` are those a table must have a row for, where there are more than usable cases; ``channels`` what the
    folder calls its channels, in their order, where it says so; ``named`` whether the data itself names its classes;
    ``left`` what the folder holds and is left out, one sentence each.
    """

    kind: str
    class_names: tuple[str, ...]
    mask_values: tuple[int, ...] = ()
    cases: list[Case] = field(default_factory=list)
    faults: list[errors.Fault] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    channels: tuple[str, ...] = ()
    named: bool = False
    left: list[str] = field(default_factory=list)


def palette_faults(masks: Sequence[Path], folder: Path, classes: int) -> list[errors.Fault]:
    """A fault for every mask whose palette gives a class number another colour than the first such mask does.

    Palettes of greys are told by their greys, so that their order says nothing.
    """
    first: dict[int, tuple[tuple[int, int, int], Path]] = {}
    found = []
    for mask in masks:
        if formats.ending(mask) not in formats.PICTURES or not mask.is_file():
            continue
        try:
            colours = formats.palette(mask)
        except errors.DataError:
            continue  # told when its header is read
        if not colours or formats.is_grey(colours):
            continue
        for number, colour in enumerate(colours[:classes]):
            other, path = first.setdefault(number, (colour, mask))
            if other != colour:
                found.append(
                    defect.MASK_COLOUR.fault(
                        f"{relative([mask], folder)}: its palette has another colour for number {number} than "
                        f"{relative([path], folder)}, so numbers do not mean the same; save masks as grey class numbers"
                    )
                )
                break
    return found


def links_out(paths: Sequence[Path], folder: Path, roots: Sequence[Path] = ()) -> list[errors.Fault]:
    """A fault for every file, also inside of a folder, that is a link to something outside of the data folder.

    Args:
        paths: files and folders of cases.
        folder: the data folder, for messages.
        roots: where links may lead; without any the data folder alone.
    """
    allowed = [root.resolve() for root in roots or (folder,)]
    found: list[errors.Fault] = []

    def within(path: Path) -> bool:
        return any(path.resolve().is_relative_to(root) for root in allowed)

    inside: dict[Path, bool] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files += [Path(here) / name for here, _, names in os.walk(path) for name in names]
        for file in files:
            if file.parent not in inside:
                inside[file.parent] = within(file.parent)
            if not inside[file.parent] or (file.is_symlink() and not within(file)):
                found.append(
                    defect.LINK.fault(
                        f"{relative([path], folder)}: a link that leaves the data folder; bring the file itself, "
                        "name the folder it leads to in data.roots, or let data.path name the folder that holds both"
                    )
                )
                break
    return found


def folders_in(folder: Path) -> list[Path]:
    """Its folders in the order of their names; hidden ones are left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: runs of digits by their value, so that ``slice-10`` comes after ``slice-9``."""
    parts = re.split(r"(\d{1,18})", name)
    return [(int(part), "") if at % 2 else (-1, part) for at, part in enumerate(parts)]


def images_in(folder: Path, faults: list[errors.Fault], *, deeper: bool = False) -> dict[str, Path]:
    """Image files by their name without ending; what cannot be read or told apart is a fault.

    Folders in it are a fault, too, unless the caller reads them (``deeper``).
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        where = f"{folder.name}/{path.name}"
        if path.name.startswith(".") or (path.is_file() and path.suffix.lower() in IGNORED) or _of_header(path):
            continue
        if path.is_symlink() and not path.exists():
            faults.append(defect.LINK.fault(f"{where}: a link that leads nowhere; bring the file, or remove the link"))
        elif path.is_dir() and deeper:
            continue
        elif path.is_dir():
            faults.append(
                defect.ENDING.fault(f"{where}: a folder inside; move its images up, deeper ones are not read")
            )
        elif not formats.ending(path):
            known = ", ".join(formats.PICTURES + formats.VOLUMES)
            faults.append(
                defect.ENDING.fault(
                    f"{where}: ending '{path.suffix}' is not read; convert it to one of {known}, or move it away"
                )
            )
        elif formats.stem(path) in found:
            faults.append(defect.NAME_TWICE.fault(f"{where}: same name as {found[formats.stem(path)].name}; keep one"))
        else:
            found[formats.stem(path)] = path
    return found


def _of_header(path: Path) -> bool:
    """Whether a file holds the voxels of a MetaImage header of its name beside it."""
    return path.suffix.lower() in metaimage.BESIDE and path.with_suffix(".mhd").is_file()


def folder_of(folder: Path, names: Sequence[str], faults: list[errors.Fault]) -> Path | None:
    """The one folder in it that has one of the names, in any capitals; several are a fault."""
    if not folder.is_dir():
        return None
    found = [path for path in folders_in(folder) if path.name.casefold() in names]
    if len(found) > 1:
        listed = ", ".join(f"{path.name}/" for path in found)
        faults.append(
            defect.NAME_TWICE.fault(f"{listed}: nobody can tell which of them is meant; move the others away")
        )
    return found[0] if found else None


def hospitals_in(folder: Path) -> list[Path]:
    """Folders in it that hold images and masks of their own, one a hospital."""
    return [
        one for one in folders_in(folder) if all(folder_of(one, names, []) for names in (IMAGE_FOLDERS, MASK_FOLDERS))
    ]


def pairs(folder: Path, options: Options) -> Layout:
    """``images/`` and ``masks/`` (or ``labels/``, ...) with files of the same name; or both in a folder a hospital."""
    names = options.class_names or DEFAULT_NAMES
    layout = Layout("pairs", names, options.mask_values or tuple(range(len(names))))
    own = [folder_of(folder, kind, layout.faults) for kind in (IMAGE_FOLDERS, MASK_FOLDERS)]
    hospitals = hospitals_in(folder)
    if hospitals and not any(own):
        for one in hospitals:
            _add_pairs(layout, one, f"{one.name}/", one.name)
            used = [folder_of(one, kind, []) for kind in (IMAGE_FOLDERS, MASK_FOLDERS)]
            layout.left += beside(one, used, f"{one.name}/")
        others = [path.name for path in folders_in(folder) if path not in hospitals]
        layout.faults += [
            defect.ENDING.fault(f"{name}/: no images and masks in it, as the other hospitals have") for name in others
        ]
        return layout
    for kind, found in zip(("images", "masks"), own, strict=True):
        if found is None:
            layout.faults.append(defect.OPTIONS.fault(f"{kind}/: no such folder; {REMEDY}"))
    if not layout.faults:
        _add_pairs(layout, folder, "", None)
        layout.left += beside(folder, own)
    return layout


def _add_pairs(layout: Layout, folder: Path, begin: str, site: str | None) -> None:
    """Images and masks of one folder as cases of a layout."""
    here = [folder_of(folder, kind, layout.faults) for kind in (IMAGE_FOLDERS, MASK_FOLDERS)]
    if here[0] is None or here[1] is None:
        return
    first, second = here[0].name, here[1].name
    images, masks = (images_in(path, layout.faults) for path in (here[0], here[1]))
    layout.faults += alone(
        {name: f"{begin}{first}/{path.name}" for name, path in images.items()},
        {name: f"{begin}{second}/{path.name}" for name, path in masks.items()},
        f"{first}/{{}}.*",
        f"{second}/{{}}.*",
    )
    layout.cases += [
        Case(f"{begin}{name}", (images[name],), masks[name], site=site) for name in sorted(images) if name in masks
    ]


def alone(images: Mapping[str, str], masks: Mapping[str, str], image: str, mask: str) -> list[errors.Fault]:
    """A fault for every image without a mask, and mask without an image.

    Args:
        images: name -> its file, for messages.
        masks: the same of masks.
        image: how the image of a name would be called, with {} for the name.
        mask: the same of its mask.
    """
    return [
        *(
            defect.MASK_MISSING.fault(f"{file}: no mask {mask.format(name)}; add it, or move the image away")
            for name, file in images.items()
            if name not in masks
        ),
        *(
            defect.IMAGE_MISSING.fault(f"{file}: no image {image.format(name)}; add it, or move the mask away")
            for name, file in masks.items()
            if name not in images
        ),
    ]


def beside(folder: Path, used: Sequence[Path | None], begin: str = "") -> list[str]:
    """What a folder holds beside the folders that are read: images, archives, folders with images; a sentence each."""
    found = []
    for path in sorted(folder.iterdir()):
        if path in used or path.name.startswith("."):
            continue
        begins = b"" if path.suffix.lower() in IGNORED else side_files.head(path)
        archive = side_files.instead(begins, side_files.ARCHIVES)
        if path.is_file() and formats.ending(path):
            found.append(f"{begin}{path.name}: an image beside the folders that are read")
        elif archive:
            found.append(f"{begin}{path.name}: {archive}")
        elif path.is_dir():
            images = sum(bool(formats.ending(image)) for image in path.iterdir())
            found += [f"{begin}{path.name}/: {images} image(s) in a folder that is not read"] if images else []
    return found


def lost(folder: Path, begin: str = "") -> list[errors.Fault]:
    """A fault for every link in a folder that leads nowhere."""
    return [
        defect.LINK.fault(f"{begin}{path.name}: a link that leads nowhere; bring what it stands for, or remove it")
        for path in sorted(folder.iterdir())
        if path.is_symlink() and not path.exists()
    ]


def table(folder: Path, options: Options) -> Layout:
    """``images/`` and a table with the columns ``id`` and ``label``: classification.

    Raises:
        DataError: if the table cannot be read.
    """
    layout = Layout("table", options.class_names)
    where = folder_of(folder, IMAGE_FOLDERS, layout.faults)
    rows, bare = labelled(folder), imageless(folder)
    lost_all = where is None and not (rows and set(rows[1]) <= bare)
    if lost_all or rows is None:
        missing = "images/: no such folder" if lost_all else "no table with the columns id and label"
        layout.faults.append((defect.OPTIONS if lost_all else defect.TABLE).fault(f"{missing}; {REMEDY}"))
        return layout
    name, labels = rows
    images = {} if where is None else images_in(where, layout.faults)
    every = with_imageless(layout, name, labels, images, bare)
    layout.faults += table_faults(folder, name, labels, every)
    layout.names = list(every)
    layout.left += beside(folder, [] if where is None else [where])
    classify(layout, name, labels, dict(sorted(every.items())))
    return layout


def imageless(folder: Path) -> frozenset[str]:
    """Ids of the rows that declare themselves to be without an image, with ``none`` in a column ``image``.

    Raises:
        DataError: if a table cannot be read.
    """
    tables = [folder / name for name in patients.STUDY_TABLES if (folder / name).is_file()]
    return frozenset(name for path in tables for name in declared_imageless(path))


def declared_imageless(table: Path) -> list[str]:
    """The same of one table, in its order.

    Raises:
        DataError: if it cannot be read.
    """
    rows = index.read_csv(table, ("id",))
    return [row["id"] for row in rows if row.get("image", "").strip().casefold() == NO_IMAGE]


def has_image_after_all(key: str) -> str:
    """What is wrong where the image is there of a row that declares none."""
    return (
        f"id '{key}' has image = {NO_IMAGE}, and there is an image of that name; correct the row, or take the image "
        "away"
    )


def with_imageless(
    layout: Layout, name: str, labels: Mapping[str, str | None], images: Mapping[str, Path], bare: frozenset[str]
) -> dict[str, Path | None]:
    """The images by name, and None for rows of a table of labels that are declared to be without one."""
    layout.faults += [defect.TABLE.fault(f"{name}: {has_image_after_all(key)}") for key in sorted(bare & images.keys())]
    return {**images, **{key: None for key in labels if key in bare and key not in images}}


def cases(folder: Path, options: Options) -> Layout:
    """``cases/NAME/`` with the images of one case each, and a table with the columns ``id`` and ``label``.

    An image is called ``NAME/FILE``; images of a case stand in the order of their files' names, numbers in them by
    value.

    Raises:
        DataError: if the table cannot be read.
    """
    layout = Layout("cases", options.class_names)
    where, rows = folder / "cases", rows_beside(layout, folder, "cases")
    if rows is None:
        return layout
    name, labels = rows
    folders = {path.name: path for path in folders_in(where)}
    every = with_imageless(layout, name, labels, folders, imageless(folder))
    layout.faults += table_faults(folder, name, labels, every) + lost(where, "cases/")
    layout.left += [*beside(folder, [where]), *beside(where, list(folders.values()), "cases/")]
    layout.names = list(every)
    classify(layout, name, labels, every)
    whole, layout.cases = layout.cases, []
    for case in whole:
        if not case.images:
            layout.cases.append(case)
            continue
        layout.cases += images_of_case(layout, folders[case.name], case.label, "remove it and its row")
    return layout


def rows_beside(layout: Layout, folder: Path, name: str) -> tuple[str, dict[str, str | None]] | None:
    """The table beside a folder ``name``, as :func:`labelled`; None, and a fault of the layout, without one of them."""
    there, rows = (folder / name).is_dir(), labelled(folder)
    if there and rows is not None:
        return rows
    missing = "no table with the columns id and label" if there else f"{name}/: no such folder"
    layout.faults.append((defect.TABLE if there else defect.OPTIONS).fault(f"{missing}; {REMEDY}"))
    return None


def images_of_case(layout: Layout, folder: Path, label: int | None, otherwise: str) -> list[Case]:
    """The images of one case of ``cases/``; a folder without any is a fault of the layout.

    Args:
        layout: what is collected.
        folder: of the case.
        label: of the case.
        otherwise: what else to do about an empty folder than to bring its images.
    """
    images, name = images_in(folder, layout.faults), folder.name
    if not images:
        text = f"cases/{name}: no image in it; bring its images, or {otherwise}"
        layout.faults.append(defect.CASE_EMPTY.fault(text))
    return [Case(f"{name}/{image}", (images[image],), None, label, study=name) for image in sorted(images, key=natural)]


def table_faults(
    folder: Path, name: str, labels: Mapping[str, str | None], images: Collection[str]
) -> list[errors.Fault]:
    """Rows without an image, and another table that gives an image another class."""
    faults = [
        defect.TABLE.fault(f"{name}: id '{key}' has no image; remove the row or bring the file")
        for key in labels
        if key not in images
    ]
    for other, theirs in _label_tables(folder):
        unlike = sorted(key for key in theirs.keys() & labels.keys() if theirs[key] != labels[key])
        if unlike:
            faults.append(
                defect.TABLE.fault(
                    f"{name} and {other} give id '{unlike[0]}' and {len(unlike) - 1} more unlike labels; keep the "
                    "column label in one of them"
                )
            )
    return faults


def _spoken(label: str) -> str:
    """What a label is however it is written: other capitals, 1.0 for 1, signs that nobody sees."""
    seen = "".join(letter for letter in label if letter.isprintable()).casefold()
    return f"{float(seen):g}" if NUMBER.fullmatch(seen) else seen


def classify(layout: Layout, table: str, labels: Mapping[str, str | None], images: Mapping[str, Path | None]) -> None:
    """Images as cases of the classes that a table gives them; without class names those of the table are taken.

    Where the table has no labels, which are None then, its other columns say what a case is, and there are no classes.
    """
    if all(label is None for label in labels.values()):
        layout.class_names = ()
        layout.cases = [Case(name, () if path is None else (path,)) for name, path in images.items()]
        return  # rows that are missing are told where patients are read
    said = {label for label in labels.values() if label is not None and label.casefold() not in patients.NOTHING}
    layout.class_names = layout.class_names or tuple(sorted(said))
    known = list(layout.class_names)
    alike: dict[str, set[str]] = {}
    for written in (*known, *filter(None, labels.values())):
        alike.setdefault(_spoken(written), set()).add(written)
    layout.faults += [
        defect.TABLE.fault(
            f"{table}: labels {' and '.join(map(repr, sorted(those)))} differ in capitals alone, in how a number is "
            "written, or in signs that nobody sees; use one"
        )
        for those in alike.values()
        if len(those) > 1
    ]
    if len(known) < 2:
        layout.faults.append(
            defect.TABLE.fault(
                f"{table}: {len(known)} class(es) in the column 'label'; two are needed, or all classes in "
                "data.options.class_names"
            )
        )
    for name, path in images.items():
        label = labels.get(name)
        if label is None:
            layout.faults.append(defect.TABLE.fault(f"{table}: no row for image '{name}'; add one"))
        elif label in known:
            layout.cases.append(Case(name, () if path is None else (path,), None, known.index(label)))
        else:
            text = f"{table}: id '{name}': label '{label}' stands for no class; classes: {', '.join(known)}"
            layout.faults.append(defect.CLASS_UNKNOWN.fault(text + registry.nearest(label, known)))


def labelled(folder: Path) -> tuple[str, dict[str, str | None]] | None:
    """The first table of a folder that has a column ``label``, its name and id -> class; or None.

    Without one it is ``labels.csv``, which by its name says what cases are, in other columns: every class is None then.

    Raises:
        DataError: if a table cannot be read.
    """
    for name, labels in _label_tables(folder):
        return name, dict(labels)
    rows = index.read_csv(folder / patients.LABELS, ("id",)) if (folder / patients.LABELS).is_file() else []
    if not rows or not patients.further(rows[0]):
        return None
    twice = index.duplicates(rows, "id")
    if twice:
        raise defect.TABLE.error(f"{patients.LABELS}: {twice[0]}")
    return patients.LABELS, {row["id"]: None for row in rows}


def _label_tables(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every table of a folder that has a column ``label``.

    Raises:
        DataError: if one cannot be read, or gives an id twice.
    """
    for name in patients.STUDY_TABLES:
        if (folder / name).is_file():
            rows = index.read_csv(folder / name, ("id",))
            if rows and "label" in rows[0]:
                twice = index.duplicates(rows, "id")
                if twice:
                    raise defect.TABLE.error(f"{name}: {twice[0]}")
                yield name, {row["id"]: row["label"] for row in rows}


def classes(folder: Path, options: Options) -> Layout:
    """One folder a class; ``class_names`` fixes their order and allows for classes this hospital has no image of."""
    folders = {path.name: path for path in folders_in(folder)}
    layout = Layout("classes", options.class_names or tuple(folders))
    if len(layout.class_names) < 2:
        layout.faults.append(
            defect.OPTIONS.fault(
                f"{len(folders)} class folder(s) ({', '.join(folders)}); two are needed, or all classes in "
                "data.options.class_names"
            )
        )
    layout.faults += lost(folder)
    layout.left += [
        f"{path.name}: a file beside the class folders"
        for path in sorted(folder.iterdir())
        if path.is_file() and formats.ending(path)
    ]
    for name, path in folders.items():
        if name not in layout.class_names:
            near = registry.nearest(name, list(layout.class_names))
            layout.faults.append(
                defect.CLASS_UNKNOWN.fault(
                    f"{name}/: no class of data.options.class_names ({', '.join(layout.class_names)}){near}; rename it "
                    "or add the class"
                )
            )
            continue
        images = images_in(path, layout.faults)
        if not images:
            layout.faults.append(
                defect.CLASS_EMPTY.fault(
                    f"{name}/: no images; add some, or remove the folder and name all classes in "
                    "data.options.class_names"
                )
            )
        label = layout.class_names.index(name)
        layout.cases += [Case(f"{name}/{one}", (file,), None, label) for one, file in sorted(images.items())]
    return layout


def nnunet(folder: Path, options: Options) -> Layout:
    """nnU-Net v2 raw: ``imagesTr/CASE_0000.*``, ``labelsTr/CASE.*``, ``dataset.json``. ``imagesTs`` is not read.

    Source: nnU-Net, documentation/dataset_format.md (version 2).
    """
    layout = Layout("nnunet", ())
    settings = read_json(folder / "dataset.json", layout.faults, "nnU-Net's dataset format")
    if settings and "channel_names" not in settings:
        old = " (this looks like version 1; nnUNetv2_convert_old_nnUNet_dataset converts it)"
        layout.faults.append(
            defect.DATASET_JSON.fault(
                f"dataset.json: 'channel_names' is missing{old if 'modality' in settings else ''}"
            )
        )
    if settings.get("dataset"):
        layout.faults.append(
            defect.DATASET_JSON.fault(
                "dataset.json: 'dataset' lists the files of each case itself, which is not read; bring the cases it "
                "lists as imagesTr/ and labelsTr/, and leave 'dataset' out"
            )
        )
    layout.class_names = label_names(settings, layout.faults)
    layout.mask_values, layout.named = tuple(range(len(layout.class_names))), True
    layout.channels = channel_names(settings)
    if options.class_names and layout.class_names and options.class_names != layout.class_names:
        layout.faults.append(
            defect.OPTIONS.fault(
                f"data.options.class_names = {list(options.class_names)}, but dataset.json has "
                f"{list(layout.class_names)}; leave it out"
            )
        )
    for part in ("imagesTr", "labelsTr"):
        if not (folder / part).is_dir():
            layout.faults.append(defect.OPTIONS.fault(f"{part}/: no such folder; {REMEDY}"))
    if layout.faults:
        return layout
    images = _channels(images_in(folder / "imagesTr", layout.faults), settings, layout.faults)
    masks = images_in(folder / "labelsTr", layout.faults)
    layout.faults += alone(
        {case: f"imagesTr/{files[0].name}" for case, files in images.items()},
        {case: f"labelsTr/{path.name}" for case, path in masks.items()},
        "imagesTr/{}_0000.*",
        "labelsTr/{}.*",
    )
    stated = settings.get("numTraining")
    if isinstance(stated, int) and stated != len(images):
        layout.faults.append(
            defect.DATASET_JSON.fault(
                f"dataset.json: numTraining is {stated}, but imagesTr/ has {len(images)} cases; correct it or bring "
                "the missing files"
            )
        )
    layout.cases = [Case(case, images[case], masks[case]) for case in sorted(images) if case in masks]
    layout.left += beside(folder, [folder / name for name in ("imagesTr", "labelsTr", *TEST_FOLDERS)])
    return layout


def read_json(path: Path, faults: list[errors.Fault], format: str) -> dict[str, Any]:
    """A JSON object, or an empty one and a fault."""
    try:
        settings = side_files.read_json(path)
    except errors.DataError as error:
        reason = str(error).removeprefix(f"{path}: ")
        faults.append(defect.DATASET_JSON.fault(f"dataset.json: {reason}; {format} needs it"))
        return {}
    if not isinstance(settings, dict):
        faults.append(defect.DATASET_JSON.fault(f"dataset.json: is no JSON object; see {format}"))
        return {}
    return settings


def channel_names(settings: dict[str, Any]) -> tuple[str, ...]:
    """What nnU-Net (``channel_names``) or the decathlon (``modality``) call the channels, in order; else nothing."""
    named = settings.get("channel_names", settings.get("modality"))
    if not isinstance(named, dict) or sorted(named) != sorted(str(number) for number in range(len(named))):
        return ()
    return tuple(str(named[str(number)]) for number in range(len(named)))


def label_names(settings: dict[str, Any], faults: list[errors.Fault]) -> tuple[str, ...]:
    """Class names in the order of their numbers; regions and 'ignore' cannot be trained on here."""
    labels = settings.get("labels")
    if not isinstance(labels, dict):
        faults.append(defect.DATASET_JSON.fault("dataset.json: 'labels' is missing or no table of name and number"))
        return ()
    numbers = {name: value for name, value in labels.items() if isinstance(value, int) and not isinstance(value, bool)}
    faults += [
        defect.DATASET_JSON.fault(
            f"dataset.json: label '{name}' = {value!r} is no whole number (regions are not read); give each class its "
            "own number"
        )
        for name, value in labels.items()
        if name not in numbers
    ]
    if "ignore" in numbers:
        faults.append(
            defect.DATASET_JSON.fault(
                "dataset.json: label 'ignore' is not supported; remove it and its pixels, or make it a class of "
                "another name"
            )
        )
    if sorted(numbers.values()) != list(range(len(numbers))) or len(numbers) < 2:
        faults.append(
            defect.DATASET_JSON.fault(
                f"dataset.json: label numbers {sorted(numbers.values())}; 0 (background), 1, 2, ... without gaps are "
                "needed"
            )
        )
    return tuple(sorted(numbers, key=lambda name: numbers[name]))


def _channels(
    files: dict[str, Path], settings: dict[str, Any], faults: list[errors.Fault]
) -> dict[str, tuple[Path, ...]]:
    """Files of ``imagesTr`` by case, in the order of their channel numbers."""
    found: dict[str, dict[int, Path]] = {}
    for name, path in files.items():
        match = re.fullmatch(r"(.+)_(\d{4})", name)
        if match is None:
            faults.append(
                defect.CHANNELS_MISSING.fault(
                    f"imagesTr/{path.name}: no channel number; call it {name}_0000{formats.ending(path)}"
                )
            )
        else:
            found.setdefault(match[1], {})[int(match[2])] = path
    wanted = len(settings["channel_names"])
    for case, channels in found.items():
        # A colour picture holds its three channels in one file.
        whole = list(channels) == [0] and wanted == 3 and formats.ending(channels[0]) in formats.PICTURES
        if not whole and sorted(channels) != list(range(wanted)):
            have = ", ".join(f"{number:04d}" for number in sorted(channels))
            faults.append(
                defect.CHANNELS_MISSING.fault(
                    f"imagesTr/{case}: channels {have}, but dataset.json names {wanted}; bring {case}_0000 to "
                    f"{case}_{wanted - 1:04d}"
                )
            )
    return {case: tuple(channels[number] for number in sorted(channels)) for case, channels in found.items()}


def relative(paths: Sequence[Path], folder: Path) -> str:
    """File names as seen from the folder, for messages."""
    return ", ".join(str(path.relative_to(folder)) for path in paths)
