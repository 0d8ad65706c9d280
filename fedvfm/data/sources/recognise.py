"""Which layout a folder has: named by the option, or recognised by what lies in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fedvfm import errors
from fedvfm.data import formats
from fedvfm.data.sources import bids, datalist, layouts, studies

COLLECT: dict[str, Callable[[Path, layouts.Options], layouts.Layout]] = {
    "pairs": layouts.pairs,
    "classes": layouts.classes,
    "nnunet": layouts.nnunet,
    "datalist": datalist.collect,
    "studies": studies.collect,
    "bids": bids.collect,
}
KINDS = tuple(COLLECT)
OWN_OPTIONS = {
    "mask_values": ("pairs", "studies", "bids"),
    "fold": ("datalist",),
    "suffix": ("bids",),
    "series": ("studies", "datalist"),
}
"""Options that only some layouts have."""


def find(folder: Path, options: layouts.Options) -> layouts.Layout:
    """Recognise the layout, or take the one that is named, and collect its cases.

    Raises:
        DataError: if there is no folder or no known layout in it.
    """
    if not folder.is_dir():
        raise errors.DataError(f"{folder}: no such folder; set data.path to the folder that holds the images")
    kind = options.layout if options.layout != "auto" else kind_of(folder)
    layout = COLLECT[kind](folder, options)
    given = {key: getattr(options, key) not in (None, "", ()) for key in OWN_OPTIONS}
    layout.faults += [
        f"data.options.{key}: only for layout {', '.join(kinds)}, this is '{kind}'; leave it out"
        for key, kinds in OWN_OPTIONS.items()
        if given[key] and kind not in kinds
    ]
    return layout


def kind_of(folder: Path) -> str:
    """The layout of a folder, by what lies in it.

    Raises:
        DataError: if none is known.
    """
    if (folder / "dataset_description.json").is_file():
        return "bids"
    if (folder / "dataset.json").is_file():
        return "datalist" if _has_training(folder / "dataset.json") else "nnunet"
    for name, kind in (("imagesTr", "nnunet"), ("studies", "studies"), ("images", "pairs"), ("masks", "pairs")):
        if (folder / name).is_dir():
            return kind
    if any(formats.ending(path) for sub in layouts.folders_in(folder) for path in sub.iterdir()):
        return "classes"
    raise errors.DataError(f"{folder}: no known layout; {layouts.REMEDY}")


def _has_training(path: Path) -> bool:
    """Whether a dataset.json lists its cases; one that cannot be read is left to the layout to complain of."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "training" in settings and "channel_names" not in settings
