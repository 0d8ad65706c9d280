"""Findings about images and masks: empty, blank, sizes, colour, polarity, spacing, orientation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fedvfm.data.readiness import dataset, finding, survey

MOSTLY = 0.5
SPREAD = 4.0
SPACING_SPREAD = 2.0
STRETCHED = 1.5
SMALL = 32
NEAR_ZERO = 1e-4
LITTLE_LOST = 0.9
"""Mean of kept Dice below which it is said: no model comes near to what it would score without the loss."""
MIXED = 0.1
BRIGHT, DARK = 0.6, 0.4
"""Medians above and below which a picture is of one polarity or the other, if there are both."""

Findings = list[finding.Finding]
Rows = Sequence[survey.Row]


def findings(seen: dataset.Looked) -> Findings:
    """All findings of this module."""
    rows = seen.found.rows
    if not rows:
        return []
    return [
        *_masks(seen, rows),
        *_volumes(seen, rows),
        *_window(seen, rows),
        *_blank(rows),
        *_sizes(seen, rows),
        *_detail(seen, rows),
        *_colour(seen, rows),
        *_spacing(seen, rows),
        *_orientation(rows),
    ]


def _numbers(rows: Rows) -> list[int]:
    return [row.number for row in rows]


def _masks(seen: dataset.Looked, rows: Rows) -> Findings:
    if not seen.segmentation:
        return []
    empty = [row for row in rows if row.classes <= {0}]
    full = [row for row in rows if 0 not in row.classes]
    found = []
    if empty:
        share = len(empty) / len(rows)
        code = "masks-all-empty" if share == 1 else "masks-mostly-empty" if share > MOSTLY else "mask-empty"
        problem = f"{len(empty):,} of {finding.number(len(rows), 'mask')} mark nothing"
        found.append(finding.make(code, problem, len(empty), _numbers(empty)))
    if full:
        problem = f"{finding.number(len(full), 'mask')} without any background"
        found.append(finding.make("mask-full", problem, len(full), _numbers(full)))
    return found


def _by_volume(rows: Rows) -> dict[str, list[survey.Row]]:
    slices: dict[str, list[survey.Row]] = {}
    for row in rows:
        if row.volume is not None:
            slices.setdefault(row.volume, []).append(row)
    return slices


def _window(seen: dataset.Looked, rows: Rows) -> Findings:
    """Volumes without one value below 0 under a window that begins there: Hounsfield units of a body have air and fat.

    NIfTI, NRRD and MetaImage do not say their unit: values may be shifted (stored without rescale), or made pictures.
    """
    limits = seen.contract.limits if seen.contract is not None else None
    if limits is None or limits[0] >= 0:
        return []
    zero = -limits[0] / (limits[1] - limits[0])
    shown = _by_volume([row for row in rows if row.units == limits])
    without = [members for members in shown.values() if all(row.low >= zero - NEAR_ZERO for row in members)]
    if not without:
        return []
    numbers = [number for members in without for number in _numbers(members)]
    problem = f"{len(without):,} of {finding.number(len(shown), 'volume')} without a value below 0"
    return [finding.make("never-negative", problem, len(without), numbers)]


def _volumes(seen: dataset.Looked, rows: Rows) -> Findings:
    """Volumes whose slices all were looked at and hold no mark."""
    if not seen.segmentation or all(row.classes <= {0} for row in rows):
        return []
    volumes = [members for members in _by_volume(rows).values() if len(members) > 1]
    empty = [members for members in volumes if all(row.classes <= {0} for row in members)]
    if not empty or seen.limited:
        return []
    problem = f"{len(empty):,} of {finding.number(len(volumes), 'volume')} without a single mark"
    return [finding.make("volume-empty", problem, len(empty), [row.number for members in empty for row in members])]


def _blank(rows: Rows) -> Findings:
    found = []
    blank = [row for row in rows if row.blank]
    if blank:
        code = "all-blank" if len(blank) == len(rows) else "blank"
        problem = f"{len(blank):,} of {finding.number(len(rows), 'image')} have one value only"
        found.append(finding.make(code, problem, len(blank), _numbers(blank)))
    outside = [row for row in rows if row.low < 0.0 or row.high > 1.0]
    if outside:
        low, high = min(row.low for row in outside), max(row.high for row in outside)
        problem = f"{finding.number(len(outside), 'image')} with values from {low:.3g} to {high:.3g}"
        found.append(finding.make("out-of-range", problem, len(outside), _numbers(outside)))
    return found


def _sizes(seen: dataset.Looked, rows: Rows) -> Findings:
    found = []
    wanted = seen.contract.input_size if seen.contract is not None else None
    floor = min(wanted) / 2 if wanted is not None else SMALL
    small = [row for row in rows if min(row.size) < floor]
    if small:
        problem = f"{finding.number(len(small), 'image')} with a side under {floor:g} pixels"
        if wanted is not None:
            problem += f"; the recipe takes {wanted[0]} x {wanted[1]}"
        found.append(finding.make("small-images", problem, len(small), _numbers(small)))
    sides = [max(row.size) for row in rows]
    if max(sides) > SPREAD * min(sides):
        found.append(
            finding.make("sizes-vary", f"longer sides from {min(sides):,} to {max(sides):,} pixels", len(rows))
        )
    if wanted is not None and seen.contract is not None and seen.contract.fit == "resize":
        found += _stretched(rows, wanted[0] / wanted[1])
    return found


def _stretched(rows: Rows, aspect: float) -> Findings:
    ratios = [row.size[0] / row.size[1] / aspect for row in rows]
    members = [row for row, ratio in zip(rows, ratios, strict=True) if max(ratio, 1 / ratio) > STRETCHED]
    if not members:
        return []
    worst = max(max(ratio, 1 / ratio) for ratio in ratios)
    problem = f"{finding.number(len(members), 'image')} stretched along one side by up to {worst:.1f}"
    return [finding.make("distorted", problem, len(members), _numbers(members))]


def _detail(seen: dataset.Looked, rows: Rows) -> Findings:
    lost = lost_detail([row.kept for row in rows], seen.classes)
    if not lost or seen.contract is None:
        return []
    height, width = seen.contract.input_size
    problem = f"brought to {height} x {width} pixels and back, masks keep a Dice of {lost} with themselves"
    return [finding.make("detail-lost", problem, sum(bool(row.kept) for row in rows))]


def lost_detail(rows: Sequence[Mapping[int, float]], names: Sequence[str]) -> str:
    """The classes of which the recipe's size loses much, in words; empty where it loses little.

    Args:
        rows: :func:`~fedvfm.data.transforms.kept_dice` of masks.
        names: of the classes.
    """
    by_class = {name: [row[at] for row in rows if at in row] for at, name in enumerate(names)}
    kept = {name: statistics.mean(values) for name, values in by_class.items() if values}
    return ", ".join(f"{name} {value:.2f}" for name, value in kept.items() if value < LITTLE_LOST)


def _colour(seen: dataset.Looked, rows: Rows) -> Findings:
    found = []
    # In a stack the channels are neighbouring slices.
    stacked = seen.contract is not None and seen.contract.stack > 1
    colour = [row for row in rows if row.colour and not stacked]
    if seen.contract is not None and seen.contract.grey and colour:
        problem = f"{finding.number(len(colour), 'image')} in colour, and the recipe takes grey"
        found.append(finding.make("colour-where-grey", problem, len(colour), _numbers(colour)))
    elif 0 < len(colour) < len(rows):
        problem = f"{len(colour):,} of {finding.number(len(rows), 'image')} in colour"
        found.append(finding.make("colour-mixed", problem, len(colour), _numbers(colour)))
    return [*found, *_polarity(seen, rows)]


def _polarity(seen: dataset.Looked, rows: Rows) -> Findings:
    """Pictures of both polarities: two groups with hardly an image between them.

    Images with units (DICOM, NIfTI) are left out: DICOM says what is bright, and is read so. Pictures of one polarity
    have medians all over the middle, and turning the brighter ones round would make them worse.
    """
    pictures = [row for row in rows if row.units is None]
    bright, dark = ([row for row in pictures if test(row.median)] for test in (BRIGHT.__lt__, DARK.__gt__))
    between = len(pictures) - len(bright) - len(dark)
    asked = seen.contract is not None and seen.contract.intensity == "polarity"
    if asked or min(len(bright), len(dark)) < max(1, MIXED * len(pictures)) or between > MIXED * len(pictures):
        return []
    problem = f"{len(bright):,} of {finding.number(len(pictures), 'picture')} are bright throughout, {len(dark):,} dark"
    return [finding.make("polarity-mixed", problem, len(bright))]


def _spacing(seen: dataset.Looked, rows: Rows) -> Findings:
    known = [row.spacing for row in rows if row.spacing is not None]
    if not known:
        wanted = seen.segmentation
        return [finding.make("spacing-unknown", "no image says how large a pixel is", len(rows))] if wanted else []
    found = []
    if len(known) < len(rows):
        without = [row for row in rows if row.spacing is None]
        problem = f"{len(without):,} of {finding.number(len(rows), 'image')} do not say how large a pixel is"
        found.append(finding.make("spacing-partly", problem, len(without), _numbers(without)))
    sides = [max(one) for one in known]
    if max(sides) > SPACING_SPREAD * min(sides):
        problem = f"pixels from {min(sides):.3g} to {max(sides):.3g} mm"
        found.append(finding.make("spacing-varies", problem, len(known)))
    return found


def _orientation(rows: Rows) -> Findings:
    codes = sorted({row.orientation for row in rows if row.orientation})
    if len(codes) < 2:
        return []
    return [finding.make("orientation-mixed", f"axes stored as {', '.join(codes)}", len(codes))]
