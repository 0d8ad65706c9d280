"""Sample, Pixels and the Source protocol: what every data source provides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Truth = int | tuple[float | None, ...] | None
"""What is known of a sample besides its pixels: a class index, or values of columns of which some may be missing."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which slice of which volume a sample is. Volumes are scored whole, in three dimensions.

    Attributes:
        volume: unique in its source; safe to log.
        index: of the slice, from 0.
        of: slices of the whole volume, all of which are samples.
        step: millimetres from slice to slice.
    """

    volume: str
    index: int
    of: int
    step: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, not yet read.

    Attributes:
        id: unique in its source; safe to log (never a patient's name or number).
        label: class index for classification, else None.
        site: the natural site, where real.
        patient: samples of one patient (or slide) are never split between train, val and test, nor between hospitals.
        split: "train", "val" or "test" where the source prescribes it.
        part: the slice it is of a volume, else None.
        case: the name of what it is a part of, where the data says which images are labelled together; else None.
        images: of a case the images it consists of, in their order; empty for one image. A case is not read, its images
            are.
        whole: whether these are all slices of one volume, which is read as one (:mod:`fedvfm.data.whole_volumes`).
        without_image: whether the data declares that it has no image; a case says so, and the one image that stands for
            it. It cannot be read, and a recipe that does not take such samples sees none.
        values: of the columns that a recipe's target names, in their order, None where one is missing; empty where it
            names none.
        inputs: of the columns that ``recipe.inputs`` names, in their order: numbers in their units, words by their
            number, None where one is missing; empty where the sample has no row, or no table is an input.
        labelled: numbers of the recipe's classes that were labelled in it; empty where all were. What was not is no
            background (:mod:`fedvfm.data.partial_labels`).
    """

    id: str
    label: int | None = None
    site: str | None = None
    patient: str | None = None
    split: str | None = None
    part: Part | None = None
    case: str | None = None
    images: tuple[Sample, ...] = ()
    values: tuple[float | None, ...] = ()
    inputs: tuple[float | None, ...] = ()
    labelled: tuple[int, ...] = ()
    whole: bool = False
    without_image: bool = False

    @property
    def bag(self) -> bool:
        """Whether it is a case, whose images are read one by one."""
        return bool(self.images) and not self.whole

    @property
    def truth(self) -> Truth:
        """What the sample's answer is compared with: the values of columns, else its label."""
        return self.values or self.label

    @property
    def unit(self) -> str:
        """What its score is called: the volume's name for a slice, else its own id."""
        return self.id if self.part is None else self.part.volume

    @property
    def subject(self) -> str:
        """Who counts as one where patients are counted: the patient, or what is scored where none is known."""
        return self.unit if self.patient is None else self.patient


@dataclass(frozen=True, slots=True)
class Pixels:
    """One image as read, or one whole volume, which has a further axis of slices before rows and columns.

    Attributes:
        image: float32 (C, H, W), C in {1, 3}, values in [0, 1]; of a volume (C, D, H, W).
        mask: int64 (H, W), or (D, H, W), of class indices, or None in classification.
        spacing: (row, column) size of a pixel in millimetres, of a volume (slice, row, column), or None where unknown
            (distances are then in pixels).
        units: what 0 and 1 stand for in the file's units (Hounsfield units for CT), or None where it has none.
        orientation: to where the file's axes run ("RAS", "LPS", ...), or None where it does not say.
        part: the slice it is of a volume, else None.
        padded: bool, as the mask, where pixels are padding and no grey value; None where none is.
        absent: numbers of the channels that the site lacks; they are 0 everywhere.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.int64] | None = None
    spacing: tuple[float, ...] | None = None
    units: tuple[float, float] | None = None
    orientation: str | None = None
    part: Part | None = None
    padded: NDArray[np.bool_] | None = None
    absent: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a source says about itself.

    Attributes:
        name: of the source.
        task: "segmentation" or "classification".
        class_names: in the order of their numbers.
        licence: of the data.
        note: shown with every result.
        named: whether the data itself says what its classes are (a dataset.json, coded segments): then a recipe must
            name the same, or the site map them.
    """

    name: str
    task: str
    class_names: tuple[str, ...]
    licence: str
    note: str = ""
    named: bool = False


class Source(Protocol):
    """Where samples come from. Cheap to build (it may index files but reads no pixels)."""

    @property
    def info(self) -> SourceInfo:
        """Name, task, class names, licence and a note shown with every result."""
        ...

    def samples(self) -> Sequence[Sample]:
        """All samples in a fixed order."""
        ...

    def read(self, sample: Sample) -> Pixels:
        """Read one sample's pixels.

        Raises:
            DataError: naming the file and the remedy.
        """
        ...


class Wrapped:
    """A source that shows another one otherwise; what a kind of it does not change is that of the source.

    Args:
        source: the other one.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def info(self) -> SourceInfo:
        """That of the source."""
        return self._source.info

    def samples(self) -> Sequence[Sample]:
        """Those of the source."""
        return self._source.samples()

    def stable(self, sample: Sample) -> tuple[str, str | None]:
        """The source's names that stay when files are added; its ids where it has no others."""
        named = getattr(self._source, "stable", None)
        return (sample.id, sample.patient) if named is None else named(sample)

    def row_place(self, sample: Sample, column: str) -> str:
        """Where the cell of a sample stands, as the source says it; empty where it has no tables."""
        place = getattr(self._source, "row_place", None)
        return "" if place is None else str(place(sample, column))

    def read(self, sample: Sample) -> Pixels:
        """Read one sample.

        Raises:
            DataError: as the source does.
        """
        return self._source.read(sample)
