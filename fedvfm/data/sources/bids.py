"""BIDS with masks as derivatives: ``sub-01/anat/sub-01_T1w.nii.gz`` and ``derivatives/*/sub-01/..._dseg.nii.gz``.

The subject is the patient. Masks end in ``_dseg`` (classes) or ``_mask`` (one class) and share the image's subject,
session and other entities; ``data.options.suffix`` says which images ("T1w", "FLAIR"), needed where there are several.

Source: Brain Imaging Data Structure, version 1.10, "Imaging data" and "Derivatives: imaging data types".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fedvfm.data import formats
from fedvfm.data.sources import layouts

MASKS = ("dseg", "mask")
SAME = ("sub", "ses", "run", "acq")
"""Entities a mask shares with its image, where the mask has them."""

Entities = dict[str, str]


def collect(folder: Path, options: layouts.Options) -> layouts.Layout:
    """Every image of the suffix with its one mask."""
    names = options.class_names or layouts.DEFAULT_NAMES
    layout = layouts.Layout("bids", names, options.mask_values or tuple(range(len(names))))
    images = _volumes(path for sub in sorted(folder.glob("sub-*")) for path in sorted(sub.rglob("*")))
    suffixes = sorted({suffix for suffix, _ in images.values()})
    suffix = options.suffix or (suffixes[0] if len(suffixes) == 1 else "")
    if suffix not in suffixes:
        layout.faults.append(
            f"data.options.suffix = '{suffix}': there are images of {', '.join(suffixes) or 'none'}; say which"
        )
        return layout
    masks = _volumes(sorted((folder / "derivatives").rglob("sub-*")))
    taken: dict[Path, Path] = {}
    for path, (own, entities) in images.items():
        if own != suffix:
            continue
        where = layouts.relative([path], folder)
        found = [mask for mask, (kind, theirs) in masks.items() if kind in MASKS and _match(entities, theirs)]
        if len(found) != 1:
            remedy = "add it, or move the image away" if not found else "keep one"
            layout.faults.append(
                f"{where}: {'no mask' if not found else f'{len(found)} masks'} in derivatives/; {remedy}"
            )
            continue
        other = taken.setdefault(found[0], path)
        if other != path:
            layout.faults.append(
                f"{where}: its mask in derivatives/ is that of {layouts.relative([other], folder)}, too; name the run "
                "or acquisition in the mask's file name, or move one image away"
            )
            continue
        name = formats.stem(path).removesuffix(f"_{suffix}")
        layout.cases.append(layouts.Case(name, (path,), found[0], None, f"sub-{entities['sub']}"))
    return layout


def _volumes(paths: Iterable[Path]) -> dict[Path, tuple[str, Entities]]:
    """NIfTI files with their suffix and entities."""
    found = {}
    for path in paths:
        if path.is_file() and formats.ending(path) in (".nii", ".nii.gz"):
            *pairs, suffix = formats.stem(path).split("_")
            matches = [re.fullmatch(r"([a-z]+)-(.+)", pair) for pair in pairs]
            entities: Entities = {match[1]: match[2] for match in matches if match}
            if "sub" in entities:
                found[path] = (suffix, entities)
    return found


def _match(image: Entities, mask: Entities) -> bool:
    """Whether a mask belongs to an image: same subject, and every shared entity that the mask names is the image's."""
    return all(image.get(key) == mask[key] for key in SAME if key in mask) and image.get("ses") == mask.get("ses")
