"""What is proposed of a survey's result, by rules that are written down here; a person reads it, changes it, locks it.

The rules follow nnU-Net's, which plans from a fingerprint of the data set (medians of sizes and spacings, percentiles
of the intensities of structures). Here the fingerprint is a histogram over patients of all sites, so a value is that
of a bin's edge and not of an image. What nothing in the data decides is left as the draft has it, and said.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
    Nature Methods 18, 2021, supplementary note 2 (rule-based parameters); ``nnunetv2/experiment_planning``.
"""

from __future__ import annotations

import math
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.survey import answer, layout
from fedvfm.templates import drafts

ENOUGH = 0.5
"""Share of the patients that a median must be seen of."""
TAILS = (0.005, 0.995)
"""Percentiles of the foreground that a window goes from and to, as nnU-Net clips CT."""
UNSEEN = 0.05
"""Share of a histogram of intensities that may be withheld before its percentiles say nothing."""
LARGEST, SMALLEST = 512, 64
"""(pixels) Bounds of the proposed input: attention costs the fourth power of the side."""
ANISOTROPIC = 3.0
"""Slices that lie so many times as far apart as pixels do are anisotropic, by nnU-Net's rule."""
WEIGHTS = (0.25, 4.0)
"""Bounds of a class weight: a class that is hardly there must not be all that counts."""
FINER = 0.1
"""Quantile of the distance of anisotropic slices that volumes are resampled to, by nnU-Net's rule."""
SURE = 2.0
"""Standard deviations of the noise that a rule reckons with."""
CENTRES, SCALES = "inputs.centres", "inputs.scales"
RESTING = ("data.input_size", "data.window", "data.spacing", "task.class_weights", CENTRES, SCALES)
"""Keys whose values rest on what sites tell."""
APART = 0.1
"""Share of a value by which it must change without a site before that is said."""
DIGITS = 4
"""Significant digits of a proposed centre or scale."""
SPREAD = 3.0 * math.sqrt(2.0)
"""Noise of the variance in noises of a patient's share: var(q/k - (s/k)^2) with q, s, k from 0 to k, at most."""
NARROWEST = 10 / layout.WHOLE
"""(of the range, squared) Variance of a column below which the rounding of its sums would show."""
HALF = 0.5
"""Share of a column's variance that noise may be."""
NEAR = 0.1
"""Share of the patients that noise may move a median by; a tail it may move by no more than the tail itself."""


@dataclass(frozen=True)
class Proposal:
    """What to put into a recipe.

    Attributes:
        values: dotted key -> value.
        reasons: (key, rule and numbers), a sentence each.
        left: (key, why it stays as the draft has it).
        task: of the recipe.
    """

    values: dict[str, Any]
    reasons: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    task: str


@dataclass(frozen=True)
class Histogram:
    """The bins of a group that are intervals.

    Attributes:
        group: its layout.
        counts: patients in each; what is withheld counts as none. With noise as it is, below nought too: noise that is
            cut at nought adds patients to the empty bins at both ends.
        hidden: share of the patients that is not in any bin shown: withheld, or not known; None where that cannot be
            worked out.
        noise: standard deviation of the noise on each count, in patients; 0 for exact ones.
    """

    group: layout.Group
    counts: tuple[float, ...]
    hidden: float | None
    noise: float

    @property
    def total(self) -> float:
        """Patients in all bins."""
        return sum(self.counts)

    def bin_at(self, share: float) -> int:
        """The bin in which this share of the patients is reached."""
        reached = 0.0
        for at, count in enumerate(self.counts):
            reached += count
            if count > 0 and reached >= share * self.total:
                return at
        return len(self.counts) - 1

    def unsure(self, most: float) -> str:
        """Why noise leaves a percentile open, where it may move it by more than this share of the patients; else ""."""
        moved = SURE * self.noise * math.sqrt(len(self.counts)) / self.total
        if moved <= most:
            return ""
        return (
            f"the noise (a standard deviation of {self.noise:.3g} patients a number) may move a percentile by "
            f"{min(moved, 1.0):.0%} of {self.total:.0f} patients; {most:.1%} is the most. Ask for fewer statistics or "
            "bins, or with a larger epsilon"
        )

    def low(self, at: int) -> float:
        """Lower edge of a bin; of the first its upper one."""
        return self.group.edges[max(0, at - 1)]

    def high(self, at: int) -> float:
        """Upper edge of a bin; of the last its lower one."""
        return self.group.edges[min(at, len(self.group.edges) - 1)]


def histogram(result: answer.Merged, name: str) -> Histogram | None:
    """A group's histogram; None where it was not asked for, or all of it is withheld."""
    group = result.group(name)
    if group is None or not group.edges:
        return None
    row = result.values[name]
    counts = tuple(value or 0.0 for value in row[: len(group.edges) + 1])
    if sum(counts) <= 0:
        return None
    whole = result.patients
    if whole is None and not any(result.withheld[name]):
        whole = sum(value or 0.0 for value in row)
    hidden = None if whole is None else max(0.0, 1.0 - sum(counts) / max(whole, sum(counts)))
    return Histogram(group, counts, hidden, result.noise.get(name, 0.0))


def of_answers(
    survey: surveys.Survey,
    answers: Sequence[answer.Answer],
    backbone: str,
    largest: int = LARGEST,
    task: str | None = None,
) -> Proposal:
    """The proposal of what sites answered, of whom one may be wrong, or lie.

    No site counts for more than all others together, and a value that would be another one without a single site says
    so: a tail of intensities is moved by few patients. Both from three sites on.

    Args:
        survey: what was asked.
        answers: of the sites.
        backbone: a name of the table, a Hugging Face name or a folder.
        largest: (pixels) bound of the input's sides.
        task: of the recipe; None takes the survey's.

    Raises:
        ConfigError: if there is none.
    """

    def proposed(some: Sequence[answer.Answer]) -> Proposal:
        return propose(answer.merged(survey, some, answer.weights(survey, some)), backbone, largest, task)

    whole = proposed(answers)
    if len(answers) < answer.LEAST_SITES:
        return whole
    without = {own.site: proposed([other for other in answers if other is not own]).values for own in answers}
    bound = [
        f"site '{site}' counts for {factor:.2%} of the patients that it tells of: for no more than all others together"
        for site, factor in answer.weights(survey, answers).items()
    ]

    def reason(key: str, why: str) -> str:
        if key not in RESTING:
            return why
        others = [(site, values.get(key)) for site, values in sorted(without.items())]
        units = whole.values[SCALES] if key in (CENTRES, SCALES) else None
        hang = [
            f"without site '{site}' {_said(value)}" for site, value in others if _far(whole.values[key], value, units)
        ]
        return "; ".join([why, *bound, *hang])

    return Proposal(whole.values, tuple((key, reason(key, why)) for key, why in whole.reasons), whole.left, whole.task)


def _far(value: list[float], other: list[float] | None, units: list[float] | None) -> bool:
    """Whether two values differ by more than :data:`APART` of the larger number, or of units of their own."""
    if other is None or len(other) != len(value):
        return True
    if units is not None:
        return any(abs(own - theirs) > APART * unit for own, theirs, unit in zip(value, other, units, strict=True))
    most = max(abs(number) for number in value)
    return max(abs(own - theirs) for own, theirs in zip(value, other, strict=True)) > APART * most


def _said(value: list[float] | None) -> str:
    return "it would stay as drafted" if value is None else f"it would be {drafts.literal(value)}"


def propose(result: answer.Merged, backbone: str, largest: int = LARGEST, task: str | None = None) -> Proposal:
    """The proposal for a backbone.

    Args:
        result: of a survey.
        backbone: a name of the table, a Hugging Face name or a folder.
        largest: (pixels) bound of the input's sides.
        task: of the recipe, where it learns something else from the surveyed masks or classes (boxes, cases); None
            takes the survey's.
    """
    task = task or result.survey.task
    values: dict[str, Any] = {}
    reasons: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    ruled: list[Ruled] = []
    volumes = bool(drafts.piece(backbone))
    for rule in (_modality, _size, *((_target_spacing,) if volumes else ()), _window):
        ruled.append(rule(result, backbone, largest))
    for key, value, why in (*ruled, _weights(result, task), _rate(result, backbone, task)):
        if value is None:
            left.append((key, why))
        else:
            values[key] = value
            reasons.append((key, why))
    columns, without = _columns(result, task)
    values |= {key: value for key, value, _ in columns}
    reasons += [(key, why) for key, _, why in columns]
    left += without
    if not volumes:
        left.append(("spacing", _spacing(result)))
    else:
        left.append(("data.depth", "no survey asks how many slices a volume has"))
    left.append(("optimiser.batch_size", "follows from the memory of the sites' machines, which no survey asks for"))
    return Proposal(values, tuple(reasons), tuple(left), task)


TABULAR = ("classification", "case-classification")
"""Tasks that take a table beside the image."""
Ruled = tuple[str, Any, str]
"""Key, value (None to leave it), and why."""


def _modality(result: answer.Merged, backbone: str, largest: int) -> Ruled:
    survey = result.survey
    if survey.modality == "any":
        return "data.modality", None, "the survey asked for none"
    return "data.modality", survey.modality, "as the survey asked"


def _rate(result: answer.Merged, backbone: str, task: str) -> Ruled:
    drafted = tomllib.loads(drafts.recipe(task, backbone, list(result.survey.class_names)))
    why = "one rate for a kind of backbone and a task, whatever the data, as nnU-Net has one for all sets of data"
    return "optimiser.learning_rate", drafted["optimiser"]["learning_rate"], why


def _size(result: answer.Merged, backbone: str, largest: int) -> Ruled:
    key, (side, trained) = "data.input_size", drafts.sides(backbone)
    if trained:
        return key, None, f"{backbone} was trained on squares of {side} pixels: left at that size"
    parts = [histogram(result, name) for name in ("rows", "columns")]
    sizes, medians = [], []
    for part in parts:
        if part is None:
            return key, None, "sizes were not asked for, or all of them are withheld"
        if part.hidden is None or part.hidden > ENOUGH:
            return key, None, f"the sizes of {_share(part.hidden)} of the patients are withheld: no median is known"
        if unsure := part.unsure(NEAR):
            return key, None, unsure
        median = part.low(part.bin_at(0.5))
        medians.append(median)
        bounded = min(max(median, SMALLEST), largest)
        sizes.append(max(1, int(bounded // side)) * side)
    if piece := drafts.piece(backbone):
        return (
            key,
            _fitted(medians, side, piece),
            f"lower edge of the bin with the median over patients ({medians[0]:g} x {medians[1]:g} pixels), made "
            f"smaller along the longer side until a piece has no more voxels than a drafted one "
            f"({' x '.join(map(str, piece))}), as nnU-Net fits a patch into memory, and a multiple of {side}",
        )
    return (
        key,
        sizes,
        f"lower edge of the bin with the median over patients ({medians[0]:g} x {medians[1]:g} pixels), between "
        f"{SMALLEST} and {largest}, rounded down to a multiple of {side}, the grid of {backbone}",
    )


def _fitted(medians: Sequence[float], side: int, piece: Sequence[int]) -> list[int]:
    """Height and width of a piece of a volume, multiples of ``side``, of at most as many voxels as ``piece``."""
    sides = [max(1, int(median // side)) for median in medians]
    while math.prod(sides) * side**2 > math.prod(piece[1:]):
        longest = max(range(len(sides)), key=sides.__getitem__)
        sides[longest] -= 1
    return [number * side for number in sides]


def _target_spacing(result: answer.Merged, backbone: str, largest: int) -> Ruled:
    key, medians = "data.spacing", _spacings(result)
    if None in medians:
        return key, None, f"{_UNKNOWN_SPACING}: voxels keep their size"
    row, column, between = (float(median or 0.0) for median in medians)
    rule = "lower edges of the bins with the medians over patients"
    if between >= ANISOTROPIC * min(row, column):
        part = histogram(result, "slice-spacing")
        rule += f"; slices are {ANISOTROPIC:g} times as far apart or more"
        if part is not None and (part.hidden or 0.0) <= UNSEEN and not part.unsure(FINER / 2):
            between = part.low(part.bin_at(FINER))
            rule += f", so of their distance the {FINER:.0%} quantile"
    return key, [between, row, column], f"{rule} ({between:g} mm from slice to slice, {row:g} x {column:g} mm a voxel)"


def _window(result: answer.Merged, backbone: str, largest: int) -> Ruled:
    key, survey = "data.window", result.survey
    if survey.scale != "file" or survey.modality != "CT":
        return (
            key,
            None,
            "grey values have no unit that is the same everywhere (modality CT and scale file have): each image is "
            "stretched by its own percentiles",
        )
    part = histogram(result, "foreground-0") or histogram(result, "intensity-0")
    if part is None:
        return key, None, "intensities were not asked for, or all of them are withheld"
    if part.hidden is None or part.hidden > UNSEEN:
        return key, None, f"{_share(part.hidden)} of the intensities are withheld: percentiles would be wrong"
    if unsure := part.unsure(TAILS[0]):
        return key, None, unsure
    low, high = part.low(part.bin_at(TAILS[0])), part.high(part.bin_at(TAILS[1]))
    if not low < high:
        return key, None, "all intensities lie in one bin; ask with finer ones"
    what = "structures" if part.group.statistic == "foreground" else "all pixels"
    width = part.group.edges[1] - part.group.edges[0]
    return (
        key,
        [(low + high) / 2, high - low],
        f"centre and width from the 0.5th to the 99.5th percentile of {what} ({low:g} to {high:g}), each to its bin's "
        f"outer edge; a bin is {width:g} wide",
    )


def _weights(result: answer.Merged, task: str) -> Ruled:
    key = "task.class_weights"
    if task == "detection":
        return key, None, "the loss of boxes has no weights of classes"
    shares = result.values.get("class-shares")
    if shares is None:
        return key, None, "class shares were not asked for"
    if any(result.withheld["class-shares"]):
        return key, None, "the share of a class is withheld at a site: too few patients have it there"
    known = [max(0.0, value or 0.0) for value in shares]
    if result.survey.task == "classification":
        return key, None, "training draws all classes equally often (task.options.sampling); weights would count twice"
    if not all(known):
        return key, None, "a class has no share at all"
    noise = result.noise.get("class-shares", 0.0)
    if min(known) < 2 * SURE * noise:
        return key, None, f"the noise (a standard deviation of {noise:.3g} patients) may be half of a class's share"
    total = sum(known)
    weights = [min(max(total / (len(known) * share), WEIGHTS[0]), WEIGHTS[1]) for share in known]
    names = zip(result.survey.class_names, known, strict=True)
    said = ", ".join(f"{name} {share / total:.2%}" for name, share in names)
    return (
        key,
        [round(weight, 3) for weight in weights],
        f"1 / (number of classes x mean share of a patient's pixels), from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}; shares: "
        f"{said}",
    )


_UNKNOWN_SPACING = "no median is known: not asked for, withheld, lost in the noise, or the files do not say it"


def _spacings(result: answer.Merged) -> list[float | None]:
    """Medians of rows, of columns and from slice to slice; None where one is not known."""
    medians: list[float | None] = []
    for name in ("row-spacing", "column-spacing", "slice-spacing"):
        part = histogram(result, name)
        if part is None or part.hidden is None or part.hidden > ENOUGH or part.unsure(NEAR):
            medians.append(None)
        else:
            medians.append(part.low(part.bin_at(0.5)))
    return medians


def _spacing(result: answer.Merged) -> str:
    """Medians of the spacings, and nnU-Net's word on them."""
    row, column, between = _spacings(result)
    if row is None or column is None:
        return _UNKNOWN_SPACING
    said = f"median {row:g} x {column:g} mm a pixel"
    if between is None:
        return f"{said}; a recipe of slices has no target spacing: images are resized (data.fit)"
    said += f", {between:g} mm from slice to slice"
    if between >= ANISOTROPIC * min(row, column):
        return f"{said}: anisotropic, so slices are best cut as the scanner did (data.plane), and each seen by itself"
    return f"{said}; a recipe of slices has no target spacing: images are resized (data.fit)"


def _columns(result: answer.Merged, task: str) -> tuple[list[Ruled], list[tuple[str, str]]]:
    """The columns of a table that a recipe may take, with mean and standard deviation as public constants.

    Those of which these are not known stay out, each with its reason.
    """
    survey, left = result.survey, list[tuple[str, str]]()
    if survey.columns and task not in TABULAR:
        return [], [("inputs", f"task '{task}' takes no table beside the image")]
    known = dict[int, layout.Moments]()
    for at, name in enumerate(survey.columns):
        group = result.group(f"value-{name}")
        seen = None if group is None else layout.moments(group, result.values[group.name])
        if why := _unknown(seen, result.noise.get(f"value-{name}", 0.0)):
            left.append(("inputs.numbers", f"{name} is left out: {why}"))
        elif seen is not None:
            known[at] = seen
    if not known:
        return [], left
    rule = "mean over patients, one value each" + (" with noise" if result.noise else "")
    low, high = zip(*(survey.column_ranges[at] for at in known), strict=True)
    centres = [
        min(max(_rounded(seen.mean), least), most) for seen, least, most in zip(known.values(), low, high, strict=True)
    ]
    why = ", ".join(f"{survey.columns[at]} of {seen.count:.0f} patients" for at, seen in known.items())
    rows: list[Ruled] = [
        ("inputs.numbers", [survey.columns[at] for at in known], "as the survey asked"),
        ("inputs.ranges", [list(survey.column_ranges[at]) for at in known], "as the survey asked"),
        (CENTRES, centres, f"{rule}: {why}"),
        (SCALES, [_rounded(seen.deviation) for seen in known.values()], "standard deviation of the same"),
    ]
    if survey.column_units:
        rows.append(("inputs.units", [survey.column_units[at] for at in known], "as the survey asked"))
    return rows, left


def _unknown(seen: layout.Moments | None, noise: float) -> str:
    """Why a column's mean and standard deviation cannot be proposed; empty where they can."""
    if seen is None:
        return "withheld, as too few patients have a value or one that differs, or lost in the noise"
    if not noise and seen.variance < NARROWEST:
        return f"its values differ by less than {math.sqrt(NARROWEST):.1%} of its range; ask with a narrower one"
    if SURE * SPREAD * noise > HALF * seen.variance * seen.count:
        return (
            f"the noise (a standard deviation of {noise:.3g} patients a number) may be more than {HALF:.0%} of its "
            f"variance over {seen.count:.0f} patients; ask with a larger epsilon, fewer statistics or a narrower range"
        )
    return ""


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.0%}"


def recipe(result: answer.Merged, proposal: Proposal, backbone: str) -> str:
    """A commented recipe.toml with the proposal in it, to be read, changed and locked.

    Raises:
        ConfigError: listing every fault of form.
        UnknownName: for a backbone that nobody knows.
    """
    survey = result.survey
    values = {"data.plane": survey.plane, **proposal.values}
    if survey.channels:
        values["data.channels"] = list(survey.channels)
    text = drafts.fill(drafts.recipe(proposal.task, backbone, list(survey.class_names)), values)
    try:
        schema.parse(schema.Recipe, tomllib.loads(text), "proposed recipe")
    except errors.ConfigError as error:
        raise errors.ConfigError("survey", list(error.faults)) from None
    schema_line, _, rest = text.partition("\n")
    return "\n".join([schema_line, *_head(result, proposal), "#", rest])


def _head(result: answer.Merged, proposal: Proposal) -> list[str]:
    rows: Sequence[str] = [
        f"Proposed by survey {result.survey.hash[:12]} of {len(result.sites)} sites. Nothing is decided: read it, "
        "change it, lock it; each site approves what you lock.",
        *(f"{key} = {drafts.literal(proposal.values[key])}: {why}" for key, why in proposal.reasons),
        *(f"{key}, as drafted: {why}" for key, why in proposal.left),
    ]
    return [
        line
        for row in rows
        for line in textwrap.wrap(
            "".join(char if char.isprintable() else " " for char in row),
            118,
            initial_indent="# ",
            subsequent_indent="#   ",
        )
    ]
