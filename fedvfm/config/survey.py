"""A survey: which statistics of their data the sites are asked for before anything is trained.

It is to statistics what a recipe is to training: its hash is its name, a person at each site approves exactly that
hash, and what the site's policy does not name is refused.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base, inputs, policy, schema
from fedvfm.storage import hash_chain

STATISTICS = policy.STATISTICS
MOST_EDGES = 512
LATER = Field(exclude_if=lambda given: not given)
"""Of a key that came later: written only where it is given, so that surveys before it keep their hashes."""

Statistic = Literal[
    "patients", "images", "sizes", "spacings", "intensities", "foreground", "classes", "class-shares", "columns"
]
Edges = Annotated[tuple[base.Positive, ...], Field(strict=False, min_length=1, max_length=MOST_EDGES)]
_SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 3072, 4096)
_SPACINGS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0)


class SurveyPrivacy(schema.Strict):
    """Noise on every number of an answer, for whole patients; charged to the site's privacy ledger."""

    epsilon: base.Positive
    """Of the whole answer, at patient level. Change: down for more noise and coarser statistics."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """(probability) That goes with epsilon: well below 1 / the number of patients of the smallest site. Change: with
    the size of that site."""


class Survey(schema.Strict):
    """What the sites are asked for. Bins are public: they are the same everywhere and do not depend on the data."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    """What the survey is called. Change: to a name that the sites' people know it by."""
    purpose: Annotated[str, Field(max_length=2000)] = ""
    """What the statistics are for; shown to the person who approves. Change: always say it."""
    task: Literal["segmentation", "classification"]
    """segmentation (masks) or classification (one class an image). Change: to what the labels are."""
    class_names: Annotated[tuple[base.Name, ...], Field(min_length=2, max_length=256, strict=False)]
    """The classes that all sites have; in segmentation the first is the background. Change: to your classes."""
    statistics: Annotated[tuple[Statistic, ...], Field(strict=False, min_length=1)]
    """What is asked: patients, images, sizes, spacings, intensities, foreground, classes, class-shares, columns.
    Change: leave out what you do not need; each site's policy names what it lets out."""
    least_patients: Annotated[int, Field(ge=2, le=10_000)] = 10
    """(patients) What fewer have a part in is withheld; a site's policy may ask for more. Change: up where even ten are
    too few to speak of."""
    images_per_patient: Annotated[int, Field(ge=1, le=1024)] = 16
    """(images) Most that are opened of one patient, evenly spaced; every patient counts alike. Change: up where a
    patient's images are unlike one another, down to save time."""
    modality: str = "any"
    """With a code of DICOM in it (CT, MR, ...) DICOM files of another are refused. Change: to CT, MR, ... where sites
    have several in one folder."""
    plane: Literal["axial", "coronal", "sagittal", "acquired"] = "axial"
    """How volumes are cut: axial, coronal, sagittal, or acquired. Change: to the plane that you will train in."""
    channels: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Names of the files of a case that are a channel each. Change: where a case is several sequences."""
    colours: Literal[1, 3] = 1
    """(channels) 1: the mean of the channels; 3: each by itself. Change: to 3 for pictures in colour, or for three
    sequences."""
    scale: Literal["unit", "file"] = "unit"
    """unit: 0 to 1, as an image is read; file: the file's own units, Hounsfield units for CT. Change: to file for CT.
    """
    intensity_range: Annotated[tuple[float, float], Field(strict=False)] = (0.0, 1.0)
    """Lowest and highest edge of the histogram of intensities; one bin lies below and one above. Change: to [-1024,
    3072] for CT."""
    intensity_bins: Annotated[int, Field(ge=1, le=MOST_EDGES)] = 64
    """(bins) Between the two. Change: to 256 for CT, so that a bin is 16 Hounsfield units wide."""
    size_edges: Edges = _SIZES
    """(pixels) Edges of the bins of rows and columns. Change: to the sizes that you have to tell apart; few patients in
    a bin are withheld."""
    spacing_edges: Edges = _SPACINGS
    """(millimetres) Edges of the bins of pixels and slices. Change: as size_edges."""
    columns: Annotated[tuple[base.Name, ...], base.names(), LATER] = ()
    """Columns of numbers of the sites' tables, for the statistic columns, as recipe.inputs.numbers names them. Change:
    to those that a recipe will take beside the images."""
    column_ranges: Annotated[tuple[inputs.Range, ...], base.names(), LATER] = ()
    """(units of the column) The least and the greatest value of each of columns; what lies outside is refused, and a
    patient weighs no more than the greatest. Change: to what is possible at all; the narrower, the less noise."""
    column_units: Annotated[tuple[base.Name, ...], base.names(), LATER] = ()
    """The unit of each of columns, as whoever approves reads it. Change: to that of the tables; sites convert theirs.
    """
    privacy: SurveyPrivacy | None = None
    """Noise for whole patients; left out, exact numbers without what few have a part in."""

    @pydantic.model_validator(mode="after")
    def _agree(self) -> Survey:
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names: class names must differ")
        if len(set(self.statistics)) < len(self.statistics):
            raise ValueError("statistics: each once")
        if self.task != "segmentation" and "foreground" in self.statistics:
            raise ValueError('statistics: "foreground" needs masks, task = "segmentation"')
        if not self.intensity_range[0] < self.intensity_range[1]:
            raise ValueError("intensity_range: the first must be below the second")
        low, high, bins = *self.intensity_range, self.intensity_bins
        if not math.isfinite((high - low) * bins) or not high - (high - low) / bins < high:
            raise ValueError("intensity_range: too wide, or too narrow for intensity_bins: its edges would not ascend")
        for name in ("size_edges", "spacing_edges"):
            edges = getattr(self, name)
            if list(edges) != sorted(set(edges)):
                raise ValueError(f"{name}: each edge must be above the one before")
        self._agree_on_columns()
        if len(self.channels) not in (0, 1, 3) or (len(self.channels) == 3 and self.colours == 1):
            raise ValueError("channels: one name, or three with colours = 3")
        return self

    def _agree_on_columns(self) -> None:
        names = self.columns
        if bool(names) != ("columns" in self.statistics):
            raise ValueError(
                'columns: names of columns and the statistic "columns" go together; leave out both or none'
            )
        if len(set(names)) < len(names) or set(names) & set(inputs.OWN):
            raise ValueError(f"columns: each once, and none of {', '.join(inputs.OWN)}")
        if len(self.column_ranges) != len(names) or len(self.column_units) not in (0, len(names)):
            raise ValueError("column_ranges, column_units: one for each of columns; units may be left out")
        if any(not low < high or not math.isfinite(high - low) for low, high in self.column_ranges):
            raise ValueError("column_ranges: the first must be below the second")

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of the resolved values: what people approve. No recipe has the same."""
        values = hash_chain.canonical(self.model_dump(mode="json"))
        return hashlib.sha256(f"fedvfm survey 1\n{values}".encode()).hexdigest()
