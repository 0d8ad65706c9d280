"""BIDS with masks as derivatives: ``sub-01/anat/sub-01_T1w.nii.gz`` and ``derivatives/*/sub-01/..._dseg.nii.gz``.

The subject is the patient. Masks end in ``_dseg`` (classes) or ``_mask`` (one class) and share the image's subject,
session and other entities; ``data.options.suffix`` says which images ("T1w", "FLAIR"), needed where there are several.

Source: Brain Imaging Data Structure, version 1.10, "Imaging data" and "Derivatives: imaging data types".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedvfm import errors
from fedvfm.data import defect, formats
from fedvfm.data.sources import layouts

MASKS = ("dseg", "mask")
SAME = ("sub", "ses", "run", "acq", "ce", "trc", "rec", "dir", "mod", "echo", "flip", "inv", "mt", "part")
"""Entities a mask shares with its image, where the mask has them."""
OTHERS = ("space", "hemi", "res", "den")
"""Entities that make a mask another image's where the image lacks them: of another grid, or of one half."""
WAYS = ("desc", "atlas", "seg")
"""Entities that say how a mask was made, or after which atlas."""
NATIVE = ("orig", "individual")
"""Spaces that are the image's own."""
MATRIX = re.compile(r"\.(?:[dps]{1,2}(?:conn(?:series|scalar)?|t?series|scalar|label)|dfan|fiberTEMP)$", re.IGNORECASE)
"""How the names of CIFTI-2 files end before ``.nii``; other dots are part of a name (``desc-0.8mm``)."""

Entities = dict[str, str]
Kind = tuple[str, Entities]
"""Suffix and entities of a file."""


def collect(folder: Path, options: layouts.Options) -> layouts.Layout:
    """Every image of the suffix with its one mask."""
    names = options.class_names or layouts.DEFAULT_NAMES
    layout = layouts.Layout("bids", names, options.mask_values or tuple(range(len(names))))
    images = _volumes((path for sub in sorted(folder.glob("sub-*")) for path in sorted(sub.rglob("*"))), folder, layout)
    suffixes = sorted({suffix for suffix, _ in images.values()})
    suffix = options.suffix or (suffixes[0] if len(suffixes) == 1 else "")
    if suffix not in suffixes:
        layout.faults.append(
            defect.OPTIONS.fault(
                f"data.options.suffix = '{suffix}': there are images of {', '.join(suffixes) or 'none'}; say which"
            )
        )
        return layout
    masks = _volumes(sorted((folder / "derivatives").rglob("sub-*")), folder, layout)
    drawn: dict[str, dict[Path, Entities]] = {}
    for mask, (ends, theirs) in masks.items():
        if ends in MASKS:
            drawn.setdefault(theirs["sub"], {})[mask] = theirs
    taken: dict[Path, Path] = {}
    for path, (own, entities) in images.items():
        if own != suffix:
            continue
        where = layouts.relative([path], folder)
        of_subject = drawn.get(entities["sub"], {})
        fitting = {mask: theirs for mask, theirs in of_subject.items() if _match(entities, theirs)}
        own_grid = [mask for mask, theirs in fitting.items() if _same_grid(suffix, entities, theirs)]
        # Of several the one that names no space is the image's own, as pybids takes it.
        plain = [mask for mask in own_grid if "space" not in fitting[mask]]
        found = plain if len(own_grid) > 1 and len(plain) == 1 else own_grid
        if len(found) != 1:
            kind = defect.NAME_TWICE if found else defect.MASK_MISSING
            remedy = "keep one" if found else "add it, or move the image away"
            elsewhere = f" ({len(fitting)} of another space, side or resolution)" if fitting and not found else ""
            layout.faults.append(
                kind.fault(
                    f"{where}: {f'{len(found)} masks' if found else 'no mask'} in derivatives/{elsewhere}; {remedy}"
                )
            )
            continue
        other = taken.setdefault(found[0], path)
        if other != path:
            layout.faults.append(
                defect.NAME_TWICE.fault(
                    f"{where}: its mask in derivatives/ is that of {layouts.relative([other], folder)}, too; name the "
                    "run or acquisition in the mask's file name, or move one image away"
                )
            )
            continue
        name = formats.stem(path).removesuffix(f"_{suffix}")
        layout.cases.append(layouts.Case(name, (path,), found[0], None, f"sub-{entities['sub']}"))
    layout.faults += _of_several_kinds(layout, masks)
    layout.left += _left(folder, layout, suffix, images, masks)
    return layout


def _of_several_kinds(layout: layouts.Layout, masks: Mapping[Path, Kind]) -> list[errors.Fault]:
    """A fault where masks were made in several ways, which no two subjects' numbers could be compared over."""
    taken = [masks[case.mask] for case in layout.cases if case.mask is not None]
    found = []
    for key in WAYS:
        ways = sorted({entities.get(key, "") for _, entities in taken})
        if len(ways) > 1:
            listed = ", ".join(f"{key}-{way}" if way else f"no {key}" for way in ways)
            found.append(
                defect.OPTIONS.fault(
                    f"derivatives/: masks made in several ways ({listed}), one a subject; keep the masks of one way"
                )
            )
    return found


def _left(
    folder: Path, layout: layouts.Layout, suffix: str, images: Mapping[Path, Kind], masks: Mapping[Path, Kind]
) -> list[str]:
    """Subjects without an image of the suffix, and masks that are no image's."""
    used = {case.mask for case in layout.cases}
    with_images = {entities["sub"] for own, entities in images.values() if own == suffix}
    subjects = [path.name for path in sorted(folder.glob("sub-*")) if path.name.removeprefix("sub-") not in with_images]
    return [
        *(f"{name}: no image of suffix {suffix}" for name in subjects),
        *(
            f"{layouts.relative([mask], folder)}: a mask that is taken for no image"
            for mask, (kind, _) in masks.items()
            if kind in MASKS and mask not in used
        ),
    ]


def _volumes(paths: Iterable[Path], folder: Path, layout: layouts.Layout) -> dict[Path, Kind]:
    """NIfTI files with their suffix and entities; a link that leads nowhere (git-annex has no file) is a fault.

    Surfaces and matrices (CIFTI-2: ``.dtseries.nii``, ...) are no images.
    """
    found = {}
    for path in paths:
        if path.is_symlink() and not path.exists():
            layout.faults.append(
                defect.LINK.fault(
                    f"{layouts.relative([path], folder)}: a link that leads nowhere; bring the file, or remove the link"
                )
            )
        elif path.is_file() and formats.ending(path) in (".nii", ".nii.gz") and not MATRIX.search(formats.stem(path)):
            *pairs, suffix = formats.stem(path).split("_")
            matches = [re.fullmatch(r"([a-z]+)-(.+)", pair) for pair in pairs]
            entities: Entities = {match[1]: match[2] for match in matches if match}
            if "sub" in entities:
                found[path] = (suffix, entities)
    return found


def _same_grid(suffix: str, image: Entities, mask: Entities) -> bool:
    """Whether a mask names no space, side or resolution that its image lacks."""
    own = {"space": (*NATIVE, suffix)}
    return all(mask[key] == image.get(key) or mask[key] in own.get(key, ()) for key in OTHERS if key in mask)


def _match(image: Entities, mask: Entities) -> bool:
    """Whether a mask belongs to an image: same subject, and every shared entity that the mask names is the image's."""
    return all(image.get(key) == mask[key] for key in SAME if key in mask) and image.get("ses") == mask.get("ses")
