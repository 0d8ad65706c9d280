"""What there is to predict below a file or folder: pictures, volumes, DICOM series, each under a name safe to show."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from fedvfm import errors
from fedvfm.config import inputs as config
from fedvfm.data import channels, defect, formats, input_rows
from fedvfm.data.slides import slide_file
from fedvfm.data.sources import index, layouts, slides
from fedvfm.data.volumes import dicom, dicom_series, nrrd, series_selector, volumes

Kind = Literal["picture", "volume", "dicom", "slide", "row"]

KNOWN = tuple(dict.fromkeys((*formats.PICTURES, *volumes.ENDINGS)))

OTHERS = tuple(ending for ending in KNOWN if ending not in dicom.ENDINGS)

SHOWN = 20
"""Series that a message lists."""

LONGEST_FIRST = sorted({*KNOWN, *slide_file.ENDINGS}, key=len, reverse=True)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to predict.

    Attributes:
        name: what its results are called. Of pictures and volumes it is the path below the input, without ending; DICOM
            files and folders are often named after patients, so these are numbered.
        kind: a picture, a volume in one file (NIfTI, NRRD), DICOM (one series, or one file), a whole slide, or the row
            of a table that is declared to be without an image.
        path: the file, or the folder of the series.
        more: further files of the case, one a channel, in the order of their numbers.
        absent: places of the recipe's channels that are lacking; ``files`` are the others.
        parts: the pictures of a case of many images, or the radiographs and clips of a study, in their order; empty for
            all else.
    """

    name: str
    kind: Kind
    path: Path = field(repr=False)
    more: tuple[Path, ...] = field(default=(), repr=False)
    absent: tuple[int, ...] = ()
    parts: tuple[Item, ...] = field(default=(), repr=False)

    @property
    def chosen(self) -> tuple[int, ...]:
        """Which of the files is each channel, :data:`fedvfm.data.channels.ABSENT` where it is lacking; empty: all."""
        if not self.absent:
            return ()
        there = iter(range(len(self.files)))
        places = range(len(self.files) + len(self.absent))
        return tuple(channels.ABSENT if at in self.absent else next(there) for at in places)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the case in the order of its channels."""
        return (self.path, *self.more)


def find(path: Path, series: str = "", *, whole_slides: bool = False, needed: bool = True) -> list[Item]:
    """Everything below a folder in the order of names, or the one file.

    A folder with DICOM files is one study of one series; a folder in which every file is a series of its own
    (radiographs) is as many items, unless ``series`` says which one is meant. Of an adapter for whole slides nothing
    else is looked for.

    Raises:
        DataError: if there is nothing to predict.
    """
    if not path.exists():
        raise defect.NOT_FOUND.error(f"{path}: no such file or folder; check the path")
    if whole_slides:
        return _slides(path, needed=needed)
    found = list(_walk(path, bool(series))) if path.is_dir() else [(_kind(path), path)]
    items = [*_named(path, [one for one in found if one[0] != "dicom"])]
    dicoms = [one for kind, one in found if kind == "dicom"]
    width = max(3, len(str(len(dicoms))))
    items += [Item(f"series-{number:0{width}d}", "dicom", one) for number, one in enumerate(dicoms, 1)]
    if not items and needed:
        raise defect.NO_SAMPLES.error(
            f"{path}: nothing to predict; these are read: {', '.join(KNOWN)}, and DICOM folders"
        )
    return items


def _slides(path: Path, *, needed: bool) -> list[Item]:
    files = [file for file in _files(path) if slides.is_slide(file)] if path.is_dir() else [path]
    if (not files and needed) or not all(map(slides.is_slide, files)):
        raise defect.NO_SAMPLES.error(
            f"{path}: nothing to predict; this adapter takes whole slides: {', '.join(slide_file.ENDINGS)}"
        )
    return list(_named(path, [("slide", file) for file in files]))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder in the order of names; hidden ones are left out."""
    for here, deeper, names in os.walk(folder):
        deeper[:] = sorted(name for name in deeper if not name.startswith("."))
        yield from (Path(here) / name for name in sorted(names) if not name.startswith("."))


def by_case(path: Path, items: Sequence[Item]) -> list[Item]:
    """The items where a model answers for cases of many images, put together as in training.

    The pictures of a folder are one case, called as their folder below the input is (with a slash behind it where
    another case is called so), those that lie in the input itself as the input. Radiographs and clips of one DICOM
    study are one, called as the first of them. Volumes, series of volumes and whole slides are cases by themselves.

    Args:
        path: the input.
        items: what there is to predict.
    """
    folders: dict[str, list[Item]] = {}
    for item in items:
        if item.kind == "picture":
            folders.setdefault(os.path.dirname(item.name), []).append(item)
    taken, whole = {item.name for item in items if item.kind == "volume"}, []
    for folder, own in folders.items():
        name = folder or formats.stem(path.absolute())
        while name in taken:
            name += "/"
        taken.add(name)
        whole.append(Item(name, "picture", own[0].path, parts=tuple(_ordered(own))))
    studies = _by_study([item for item in items if item.kind == "dicom"])
    return [*whole, *(item for item in items if item.kind in ("volume", "slide")), *studies]


def by_table(path: Path, items: Sequence[Item], table: Path) -> list[Item]:
    """The items put together as a table says: whatever has one name in its column ``case`` is answered as one case.

    Images of a case stand in the order of their names, as in training.

    Args:
        path: the input.
        items: what there is to predict.
        table: with the columns ``id``, the name of an input without its ending, of DICOM the folder or file below the
            input; and ``case``.

    Raises:
        DataError: listing what has no row or no input, cases whose name is no plain file name, and cases of unlike
            kinds of files.
    """
    rows = index.read_csv(table, ("id", "case"))
    index.refuse(table, index.duplicates(rows, "id"))
    below = {item.name: item.name for item in items if item.kind != "dicom"}
    below |= {item.name: os.path.relpath(item.path, path) for item in items if item.kind == "dicom"}
    cases, members = {row["id"]: row["case"] for row in rows}, dict[str, list[Item]]()
    faults = [defect.TABLE.fault(f"no row for input '{name}'; add one") for name in below.values() if name not in cases]
    known = set(below.values())
    faults += [defect.TABLE.fault(f"id '{name}' is no input; remove the row") for name in cases if name not in known]
    faults += [
        defect.TABLE.fault(f"case '{name}' is no plain file name; call it otherwise")
        for name in dict.fromkeys(cases.values())
        if not _plain(name)
    ]
    for item in items:
        members.setdefault(cases.get(below[item.name], ""), []).append(item)
    faults += [
        defect.KINDS_MIXED.fault(f"case '{name}' is of {' and '.join(sorted({item.kind for item in own}))} files")
        for name, own in members.items()
        if len({item.kind for item in own}) > 1
    ]
    index.refuse(table, faults)
    ordered = {name: sorted(own, key=lambda item: layouts.natural(below[item.name])) for name, own in members.items()}
    return [Item(name, own[0].kind, own[0].path, parts=tuple(own)) for name, own in ordered.items()]


def rows(
    path: Path, items: Sequence[Item], table: Path, chosen: config.InputsConfig
) -> tuple[dict[str, input_rows.Row], list[str]]:
    """The row of each item of a table that the adapter takes beside the images, and names of the items without one.

    Args:
        path: the input.
        items: what there is to predict.
        table: with the column ``id``, the name of an input or case, of DICOM the file or a folder below the input that
            it lies in, as the images of a study have the study's row; and the columns that the recipe names. Rows of
            others are not looked at.
        chosen: the recipe's columns.

    Raises:
        DataError: if the table lacks a column, no row is of an input, or a cell cannot be meant.
    """
    listed = index.read_csv(table, ("id",))
    index.refuse(table, index.duplicates(listed, "id"))
    lost = [name for name in chosen.columns if name not in (listed[0] if listed else {})]
    if lost:
        raise defect.TABLE.error(
            f"{table}: no column {', '.join(lost)}, which the adapter takes; add it, empty if need be"
        )
    cells, known, faults = {row["id"]: row for row in listed}, dict[str, input_rows.Row](), list[errors.Fault]()
    for item in items:
        row = next((cells[name] for name in _ids(path, item) if name in cells), None)
        if row is not None:
            known[item.name], wrong = input_rows.read(_place(item.name, row["id"]), row, chosen)
            faults += wrong
    index.refuse(table, faults)
    if items and not known:
        raise defect.TABLE.error(f"{table}: no id is the name of an input, as '{items[0].name}' is; correct the ids")
    return known, [item.name for item in items if not known.get(item.name)]


def imageless(path: Path, items: Sequence[Item], table: Path) -> list[Item]:
    """The rows of a table that are declared to be without an image, with ``none`` in a column ``image``.

    Args:
        path: the input.
        items: what there is to predict beside them.
        table: with the column ``id``, which is what the answer is called.

    Raises:
        DataError: listing rows of which there is an image, and names that are no plain file names.
    """
    names, known = layouts.declared_imageless(table), _known(path, items)
    faults = [defect.TABLE.fault(layouts.has_image_after_all(name)) for name in names if name in known]
    faults += [
        defect.TABLE.fault(f"id '{name}' is no plain file name; call it otherwise")
        for name in names
        if not _plain(name)
    ]
    index.refuse(table, faults)
    return [Item(name, "row", table) for name in names]


def not_answered(path: Path, items: Sequence[Item], table: Path) -> list[str]:
    """The same rows by their ids, for an adapter that answers from none: those of which there is no image either.

    Raises:
        DataError: if the table cannot be read.
    """
    known = _known(path, items)
    return [name for name in layouts.declared_imageless(table) if name not in known]


def _known(path: Path, items: Sequence[Item]) -> set[str]:
    return {name for item in items for part in (item, *item.parts) for name in _ids(path, part)}


def _ids(path: Path, item: Item) -> list[str]:
    """What a row of an item may be called: as its results, of DICOM as its file or a folder that it lies in."""
    if item.kind != "dicom":
        return [item.name]
    below = PurePath(os.path.relpath(item.path, path))
    return [item.name, *(place.as_posix() for place in (below, *below.parents))]


def _plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and "/" not in name and "\\" not in name


def _place(name: str, row: str) -> Callable[[str], str]:
    """How a fault of a row names its input."""
    return lambda column: f"sample '{name}' (id '{row}')"


def _by_study(items: Sequence[Item]) -> list[Item]:
    """Radiographs and clips of one study as one item, in the order of their series and files; others as they are.

    What cannot be read goes with its study, which fails then as a whole; of several modalities nobody can tell which
    one is meant, and each image stays by itself.
    """
    grouped: dict[tuple[bool, str], list[tuple[tuple[bool, int, str], str, Item]]] = {}
    for item in items:
        study, modality, place = _study(item)
        grouped.setdefault((bool(study), study or item.name), []).append((place, modality, item))
    whole: list[Item] = []
    for own in grouped.values():
        members = [item for _, _, item in sorted(own, key=operator.itemgetter(0))]
        alike = len({modality for _, modality, _ in own if modality}) == 1
        joined = alike and len(own) > 1
        whole += [dataclasses.replace(own[0][2], parts=tuple(members))] if joined else [item for _, _, item in own]
    return whole


def _study(item: Item) -> tuple[str, str, tuple[bool, int, str]]:
    """Of a radiograph or clip its study, modality and place in the study; the study is empty for all else.

    Of what cannot be read the study, where it is said, without a modality.
    """
    held, series = list[dicom.Series](), None
    with contextlib.suppress(Exception):  # why not is told when it is read
        held = dicom.find(item.path).series
        series = held[0]
    if len(held) > 1 or (series is not None and not dicom_series.is_apart(series)):
        return "", "", (False, 0, "")
    study, file = "", item.path
    with contextlib.suppress(Exception):
        file = series.slices[0].frame.file if series is not None else dicom.files_in(item.path)[0]
        study = dicom.study_of(file, item.name)
    number, modality = (None, "") if series is None else (series.number, series.modality)
    return study, modality, (number is None, number or 0, str(file))


def _ordered(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: layouts.natural(os.path.basename(item.name)))


def unread(path: Path, found: Sequence[Item]) -> dict[str, str]:
    """Files below a folder that are no input, and why; what lies in a DICOM study is told by its own notes.

    Names are those below the folder. Hidden files and DICOMDIR are nobody's image.
    """
    if not path.is_dir():
        return {}
    taken = {file for item in found for file in item.files}
    studies = [item.path if item.path.is_dir() else item.path.parent for item in found if item.kind == "dicom"]
    told: dict[str, str] = {}

    def closed(error: OSError) -> None:
        told[os.path.relpath(error.filename, path)] = "a folder that cannot be opened"

    for here, deeper, names in os.walk(path, onerror=closed):
        deeper[:] = sorted(name for name in deeper if not name.startswith("."))
        told |= {
            (Path(here) / name).relative_to(path).as_posix(): "a link to a folder, which is not followed"
            for name in deeper
            if (Path(here) / name).is_symlink()
        }
        for file in (Path(here) / name for name in sorted(names) if not name.startswith(".")):
            in_study = any(file.is_relative_to(study) for study in studies) and not file.name.lower().endswith(OTHERS)
            if file not in taken and not in_study and file.name.lower() != "dicomdir":
                told[file.relative_to(path).as_posix()] = _why_unread(file)
    return told


def _why_unread(file: Path) -> str:
    if file.name.lower().endswith(nrrd.SEGMENTATION):
        return "a segmentation of 3D Slicer, no image"
    if file.name.lower().endswith(".svs"):
        return "a whole slide, and the adapter was trained on other images"
    return f"ending '{file.suffix}' is not read" if file.suffix else "no DICOM, and without an ending"


def _kind(path: Path) -> Kind:
    """Of one file that was named by hand.

    Raises:
        DataError: if it is of no kind that is read.
    """
    name = path.name.lower()
    if name.endswith(formats.PICTURES):
        return "picture"
    return "dicom" if volumes.kind_of(path) == "dicom" else "volume"


def meant(found: Sequence[Item], series: str) -> dict[str, str]:
    """Names of the DICOM items that hold no series ``series`` fits, and what they hold instead.

    What cannot be read is left to reading.

    Raises:
        ConfigError: for words that are not known, and where there is no DICOM item at all.
        DataError: if no item holds such a series.
    """
    series_selector.require(series, "--series")
    dicoms, others = [item for item in found if item.kind == "dicom"], dict[str, list[dicom.Series]]()
    if not dicoms:
        raise errors.ConfigError("--series", [f"'{series}': there is no DICOM among the inputs; leave it out"])
    for item in dicoms:
        with contextlib.suppress(Exception):  # told when it is read
            held = dicom.find(item.path).series
            if held and not series_selector.among(held, series):
                others[item.name] = held
    if len(others) == len(dicoms):
        listed = series_selector.listed([one for held in others.values() for one in held][:SHOWN])
        raise defect.SERIES_MIXED.error(f"no series fits '{series}'; say it in the words of what was found:{listed}")
    return {name: "; ".join(one.described for one in held) for name, held in others.items()}


def _walk(folder: Path, whole: bool) -> Iterator[tuple[Kind, Path]]:
    study: Path | None = None
    for here, deeper, names in os.walk(folder):
        deeper[:] = sorted(name for name in deeper if not name.startswith("."))
        files = [Path(here) / name for name in sorted(names) if not name.startswith(".")]
        # A study may keep its series in folders of their own: below it only other files are looked for.
        if not (study is not None and Path(here).is_relative_to(study)) and any(_is_dicom(file) for file in files):
            study = Path(here)
            yield from (("dicom", part) for part in ([study] if whole else _parts(study)))
        for file in files:
            if file.name.lower().endswith(OTHERS) and not file.name.lower().endswith(nrrd.SEGMENTATION):
                yield _kind(file), file


def _is_dicom(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith(dicom.ENDINGS) or (not name.endswith(KNOWN) and name != "dicomdir" and dicom.is_dicom(file))


def _parts(folder: Path) -> Sequence[Path]:
    """The folder, or each of its files where each is a series by itself."""
    try:
        study = dicom.find(folder)
    except Exception:
        return [folder]  # told when it is read
    files = [sorted({one.frame.file for one in series.slices}) for series in study.series]
    # Pictures of one series (frontal and lateral radiographs) and clips do not make a volume: each is by itself.
    alone = all(one.position is None for series in study.series for one in series.slices)
    several = sum(map(len, files)) > 1
    if several and (alone or all(len(one) == 1 for one in files)):
        return sorted(file for one in files for file in one)
    return [folder]


def _named(root: Path, found: Sequence[tuple[Kind, Path]]) -> Iterator[Item]:
    """Items with their names; those that would share one keep their endings."""
    full = [path.relative_to(root).as_posix() if path != root else path.name for _, path in found]
    endings = [next(known for known in LONGEST_FIRST if name.lower().endswith(known)) for name in full]
    short = [name[: -len(ending)] for name, ending in zip(full, endings, strict=True)]
    times = Counter(name.lower() for name in short)
    for (kind, path), whole, name in zip(found, full, short, strict=True):
        yield Item(whole if times[name.lower()] > 1 else name, kind, path)
