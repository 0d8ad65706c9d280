"""Which layout a folder has: named by the option, or recognised by what lies in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fedvfm import errors
from fedvfm.data import defect, formats, side_files
from fedvfm.data.sources import bids, datalist, layouts, plain_images, slides, studies

COLLECT: dict[str, Callable[[Path, layouts.Options], layouts.Layout]] = {
    "pairs": layouts.pairs,
    "classes": layouts.classes,
    "nnunet": layouts.nnunet,
    "datalist": datalist.collect,
    "studies": studies.collect,
    "bids": bids.collect,
    "table": layouts.table,
    "cases": layouts.cases,
    "images": plain_images.collect,
    "slides": slides.collect,
}
KINDS = tuple(COLLECT)
OWN_OPTIONS = {
    "mask_values": ("pairs", "studies", "bids"),
    "fold": ("datalist",),
    "suffix": ("bids",),
    "series": ("studies", "datalist", "images"),
    "mpp": ("slides",),
}
"""Options that only some layouts have."""
PARTS = ("mask", "label", "annot", "image", "img", "truth", "segment")
"""In names of folders that hold the parts of pairs."""
LOOKED_AT, FEW = 3, 8


def find(folder: Path, options: layouts.Options) -> layouts.Layout:
    """Recognise the layout, or take the one that is named, and collect its cases.

    Raises:
        DataError: if there is no folder or no known layout in it.
    """
    if not folder.is_dir():
        raise defect.OPTIONS.error(f"{folder}: no such folder; set data.path to the folder that holds the images")
    kind = options.layout if options.layout != "auto" else kind_of(folder, named=bool(options.class_names))
    layout = COLLECT[kind](folder, options)
    given = {key: getattr(options, key) not in (None, "", (), 0.0) for key in OWN_OPTIONS}
    layout.faults += [
        defect.OPTIONS.fault(f"data.options.{key}: only for layout {', '.join(kinds)}, this is '{kind}'; leave it out")
        for key, kinds in OWN_OPTIONS.items()
        if given[key] and kind not in kinds
    ]
    return layout


def kind_of(folder: Path, *, named: bool = False) -> str:
    """The layout of a folder, by what lies in it; ``named`` where the classes are said, so that folders may be classes.

    Raises:
        DataError: if none is known.
    """
    if (folder / "dataset_description.json").is_file():
        return "bids"
    if (folder / "dataset.json").is_file():
        return "datalist" if _has_training(folder / "dataset.json") else "nnunet"
    for name, kind in (("imagesTr", "nnunet"), ("studies", "studies")):
        if (folder / name).is_dir():
            return kind
    images, masks = (layouts.folder_of(folder, names, []) for names in (layouts.IMAGE_FOLDERS, layouts.MASK_FOLDERS))
    if images and not masks and layouts.labelled(folder) is not None:
        return "table"
    if not images and not masks and (folder / "cases").is_dir() and layouts.labelled(folder) is not None:
        return "cases"
    if not images and not masks and (folder / slides.FOLDER).is_dir():
        return "slides"
    if images or masks or layouts.hospitals_in(folder):
        return "pairs"
    rows = layouts.labelled(folder)
    if rows is not None and set(rows[1]) <= layouts.imageless(folder):
        return "table"
    lists = [path.name for path in sorted(folder.glob("*.json")) if _has_training(path)]
    if lists:
        raise defect.OPTIONS.error(
            f"{folder}: no known layout: {', '.join(lists)} lists training images, but a datalist has to be called "
            "dataset.json; rename it"
        )
    held = layouts.folders_in(folder)
    if any(formats.ending(path) for sub in held for path in sub.iterdir()):
        if not named:
            _refuse_no_classes(folder, held)
        return "classes"
    raise defect.OPTIONS.error(f"{folder}: no known layout; {layouts.REMEDY}")


def _refuse_no_classes(folder: Path, held: Sequence[Path]) -> None:
    """Refuse folders that are no classes by their names, or hold files of the same names.

    Raises:
        DataError: with the remedy.
    """
    splits = [path.name for path in held if path.name.casefold() in layouts.SPLIT_FOLDERS]
    if splits:
        raise defect.OPTIONS.error(
            f"{folder}: no known layout: {', '.join(splits)} are splits, not classes; write the split into a table "
            f"(patients.csv: id,patient,split), and {layouts.REMEDY}"
        )
    stems = [{formats.stem(path): path for path in sub.iterdir() if formats.ending(path)} for sub in held]
    alike = len(held) > 1 and bool(stems[0]) and all(one.keys() == stems[0].keys() for one in stems[1:])
    named = any(word in path.name.casefold() for path in held for word in PARTS)
    if alike and (named or len({_drawn(one) for one in stems}) > 1):
        listed = ", ".join(path.name for path in held)
        raise defect.OPTIONS.error(
            f"{folder}: no known layout: {listed} hold files of the same names, as images and masks do, not classes; "
            f"{layouts.REMEDY}"
        )


def _drawn(files: Mapping[str, Path]) -> bool:
    """Whether the first pictures of a folder hold a few numbers only, as masks do and images do not."""
    shown = [files[name] for name in sorted(files) if formats.ending(files[name]) in formats.PICTURES][:LOOKED_AT]
    try:
        return bool(shown) and all(len(np.unique(formats.read_mask(path))) <= FEW for path in shown)
    except errors.DataError:
        return False


def _has_training(path: Path) -> bool:
    """Whether a dataset.json lists its cases; one that cannot be read is left to the layout to complain of."""
    try:
        settings = side_files.read_json(path)
    except errors.DataError:
        return False
    return isinstance(settings, dict) and "training" in settings and "channel_names" not in settings
