"""One pass over a site's patients: what each adds to the groups of a survey. No image is kept, and nothing leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from fedvfm import errors
from fedvfm.config import inputs as inputs_config
from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.readiness import survey as passes
from fedvfm.privacy import records
from fedvfm.survey import layout, statistics

Read = Callable[[data.Sample], data.Pixels]
SEEN = ("train", "val")
"""Splits that a survey looks at: what is chosen by it is not chosen by the images that test it."""


OF_LABELS = ("foreground", "classes", "class-shares")
"""Statistics that are true only where every class is labelled."""


def label_faults(survey: surveys.Survey, labelled: Sequence[str], *, without_labels: bool = False) -> list[str]:
    """Why a site that labels some classes only cannot answer: what it does not label would count as background.

    Args:
        survey: what is asked.
        labelled: the classes that are labelled there; empty for all.
        without_labels: whether none is.
    """
    asked = [name for name in OF_LABELS if name in survey.statistics]
    needed = survey.class_names[1:] if survey.task == "segmentation" else survey.class_names
    missing = [name for name in needed if name not in labelled] if labelled or without_labels else []
    if not asked or not missing:
        return []
    return [
        f"statistics: {', '.join(asked)} need every class labelled, and {', '.join(missing)} is not labelled here; ask "
        "this site for a survey without them"
    ]


def imaged(samples: Iterable[data.Sample]) -> list[data.Sample]:
    """Samples that have an image: of no others are histograms of images made, nor their patients counted."""
    return [sample for sample in samples if not sample.without_image]


def contract(survey: surveys.Survey) -> schema.DataContract:
    """How a source shows its images to a survey: as a recipe of the same classes and plane would, not stretched."""
    values = survey.model_dump(include={"class_names", "modality", "plane", "channels"})
    return schema.DataContract(**values, intensity="none")


def inputs(survey: surveys.Survey) -> inputs_config.InputsConfig:
    """The survey's columns as a recipe has them, so that a table is read and refused as in training."""
    spans = survey.column_ranges
    return inputs_config.InputsConfig(
        numbers=survey.columns,
        units=survey.column_units,
        ranges=spans,
        centres=tuple((low + high) / 2 for low, high in spans),
        scales=tuple((high - low) / 4 for low, high in spans),
    )


def patients(samples: Sequence[data.Sample], source: object = None) -> dict[str, list[data.Sample]]:
    """Samples by patient, an image without one by itself; by names that stay when files are added."""
    grouped: dict[str, list[data.Sample]] = {}
    for sample in samples:
        grouped.setdefault(records.group(sample, source), []).append(sample)
    return dict(sorted(grouped.items()))


def totals(
    survey: surveys.Survey,
    grouped: Mapping[str, Sequence[data.Sample]],
    read: Read,
    until: float = float("inf"),
) -> statistics.Totals:
    """What these patients come to.

    Args:
        survey: what is asked.
        grouped: as :func:`patients` gave them.
        read: one sample's pixels.
        until: when to stop, by the monotonic clock.

    Raises:
        DataError: for an image that cannot be used.
        DeadlinePassed: if the time is over.
    """
    groups = layout.groups(survey)

    def rows() -> Iterator[statistics.Row]:
        for samples in grouped.values():
            if time.monotonic() > until:
                raise errors.DeadlinePassed("the time for a survey is over before all patients were looked at")
            yield row(survey, groups, samples, read)

    return statistics.Totals.of(groups, rows())


def row(
    survey: surveys.Survey, groups: Sequence[layout.Group], samples: Sequence[data.Sample], read: Read
) -> statistics.Row:
    """What one patient adds to each group."""
    seen = _Patient(survey, len(samples))
    wanted = {"sizes", "spacings", "intensities"} | (set(OF_LABELS) if survey.task == "segmentation" else set())
    if wanted & set(survey.statistics):
        for _, sample in passes.spaced(samples, survey.images_per_patient):
            image = read(sample)
            try:
                seen.add(sample, image)
            except errors.DataError as error:
                raise error.at(f"sample '{sample.id}'") from None
    if survey.task == "classification" and set(OF_LABELS) & set(survey.statistics):
        seen.label(samples)
    seen.add_values(samples)
    return {group.name: seen.part(group) for group in groups}


class _Patient:
    """Running sums of one patient's images."""

    def __init__(self, survey: surveys.Survey, images: int) -> None:
        self._survey, self._images = survey, images
        self._values: dict[str, list[float]] = {}
        self._edges = np.array(layout.intensity_edges(survey))
        bins = survey.intensity_bins + 2
        self._intensity = np.zeros((2, survey.colours, bins), np.int64)
        self._classes = np.zeros(len(survey.class_names), np.int64)

    def add(self, sample: data.Sample, pixels: data.Pixels) -> None:
        """One image of it.

        Raises:
            DataError: if it has no mask, classes that the survey does not name, or no units where these are asked for.
        """
        rows, columns = pixels.image.shape[1:]
        self._note("rows", rows)
        self._note("columns", columns)
        if pixels.spacing is not None:
            self._note("row-spacing", pixels.spacing[0])
            self._note("column-spacing", pixels.spacing[1])
        if sample.part is not None:
            self._note("slice-spacing", sample.part.step)
        if self._survey.task == "segmentation" and set(OF_LABELS) & set(self._survey.statistics):
            self._add_mask(pixels)
        if {"intensities", "foreground"} & set(self._survey.statistics):
            self._add_intensities(pixels)

    def _note(self, name: str, value: float) -> None:
        self._values.setdefault(name, []).append(value)

    def _add_mask(self, pixels: data.Pixels) -> None:
        mask = pixels.mask
        if mask is None:
            raise defect.MASK_MISSING.error("no mask for this image; add one")
        if mask.shape != pixels.image.shape[1:]:
            raise defect.MASK_SIZE.error(f"a mask of {mask.shape} pixels for an image of {pixels.image.shape[1:]}")
        if mask.size and not 0 <= int(mask.min()) <= int(mask.max()) < len(self._classes):
            raise defect.MASK_VALUE.error(
                f"a mask with values from {int(mask.min())} to {int(mask.max())}; the survey has "
                f"{len(self._classes)} classes"
            )
        self._classes += np.bincount(mask.ravel(), minlength=len(self._classes))

    def _add_intensities(self, pixels: data.Pixels) -> None:
        image = pixels.image.astype(np.float64)
        if self._survey.scale == "file":
            if pixels.units is None:
                raise defect.VOLUME_NEEDED.error(
                    'a picture, but the survey has scale = "file" and needs values in units; bring DICOM or NIfTI'
                )
            low, high = pixels.units
            image = low + image * (high - low)
        if self._survey.colours == 1:
            image = image.mean(axis=0, keepdims=True)
        elif len(image) == 1:
            image = np.repeat(image, 3, axis=0)
        shown = np.ones(image.shape[1:], bool) if pixels.padded is None else ~pixels.padded
        structures = np.zeros_like(shown)
        if "foreground" in self._survey.statistics and pixels.mask is not None:
            structures = shown & (pixels.mask > 0)
        for at, where in enumerate((shown, structures)):
            for channel, plane in enumerate(image):
                places = np.searchsorted(self._edges, plane[where], side="right")
                self._intensity[at, channel] += np.bincount(places, minlength=self._intensity.shape[2])

    def label(self, samples: Sequence[data.Sample]) -> None:
        """The classes of its images, where an image has one."""
        for sample in samples:
            if sample.label is None:
                raise defect.STRUCTURE.error("an image without a class; name it in the table")
            self._classes[sample.label] += 1

    def add_values(self, samples: Sequence[data.Sample]) -> None:
        """Its values in the columns of the table; of several cases, however many images they have, the lower median."""
        rows = {sample.case or sample.unit: sample.inputs for sample in samples if sample.inputs}
        for at, name in enumerate(self._survey.columns):
            for row in rows.values():
                value = row[at]
                if value is not None:
                    self._note(f"value-{name}", value)

    def part(self, group: layout.Group) -> layout.Whole:
        """What it adds to a group."""
        if group.statistic in ("intensities", "foreground"):
            return self._of_intensities(group)
        if group.span is not None:
            return layout.powers(group, self._median(group.name))
        if group.several:
            return np.where(self._classes > 0, layout.WHOLE, 0).astype(np.int64)
        if group.statistic == "class-shares":
            return layout.apportioned(self._classes)
        if group.statistic == "patients":
            return layout.counted(group, 0)
        value = float(self._images) if group.statistic == "images" else self._median(group.name)
        return layout.counted(group, layout.place(group, value))

    def _median(self, name: str) -> float | None:
        """The lower median; None where no image says it."""
        values = sorted(self._values.get(name, ()))
        return values[(len(values) - 1) // 2] if values else None

    def _of_intensities(self, group: layout.Group) -> layout.Whole:
        counts = self._intensity[int(group.statistic == "foreground"), int(group.name.rpartition("-")[2])]
        whole = np.zeros(len(group.labels), np.int64)
        if not counts.any():  # no pixel of a structure, or nothing but padding
            whole[-1] = layout.WHOLE
            return whole
        whole[: len(counts)] = layout.apportioned(counts)
        return whole
