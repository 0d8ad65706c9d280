"""What the rules judge: the samples, their splits, what the pass found, and what a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedvfm.config import inputs, schema
from fedvfm.data import sample as data
from fedvfm.data.readiness import survey


@dataclass(frozen=True)
class Looked:
    """All that is known of a hospital's data.

    Attributes:
        info: what the source says about itself.
        classes: class names as they may be shown.
        samples: all of them; the number of a sample is its place here, from 1.
        found: what the pass over the pixels found.
        splits: split -> sample numbers.
        torn: numbers of samples whose patient stands in several splits.
        contract: what the recipe asks of images, where there is one.
        names_shown: whether ids are file names.
        limited: whether only some samples were looked at.
        inputs: columns of the table that the recipe takes beside the images, where this site has them.
        unused_rows: how many rows of such a table are of nothing that is here.
        not_taken: how many samples have no image, where the recipe takes none of these.
    """

    info: data.SourceInfo
    classes: tuple[str, ...]
    samples: Sequence[data.Sample]
    found: survey.Survey
    splits: Mapping[str, Sequence[int]]
    torn: Sequence[int] = ()
    contract: schema.DataContract | None = None
    names_shown: bool = False
    limited: bool = False
    inputs: inputs.InputsConfig | None = None
    unused_rows: int = 0
    not_taken: int = 0
    split_of: Mapping[int, str] = field(init=False)

    def __post_init__(self) -> None:
        """Turn the splits round."""
        turned = {number: name for name, members in self.splits.items() for number in members}
        object.__setattr__(self, "split_of", turned)

    @property
    def segmentation(self) -> bool:
        """Whether the samples carry masks."""
        return self.info.task == "segmentation"

    def patients(self) -> dict[str, list[int]]:
        """Sample numbers by patient, where patients are known."""
        grouped: dict[str, list[int]] = {}
        for number, one in enumerate(self.samples, 1):
            if one.patient is not None and not assumed(one):
                grouped.setdefault(one.patient, []).append(number)
        return grouped

    def class_counts(self) -> list[int]:
        """Samples of each class: by label, or by what the masks hold among the samples looked at."""
        counts = [0] * len(self.classes)
        if self.segmentation:
            for row in self.found.rows:
                for at in row.classes:
                    counts[at] += 1
        else:
            for one in self.samples:
                if one.label is not None:
                    counts[one.label] += 1
        return counts

    def classes_in(self, split: str) -> set[int]:
        """Class numbers that occur in a split."""
        if not self.segmentation:
            labels = (self.samples[number - 1].label for number in self.splits.get(split, ()))
            return {label for label in labels if label is not None}
        return {at for row in self.found.rows if self.split_of.get(row.number) == split for at in row.classes}


def assumed(one: data.Sample) -> bool:
    """Whether a volume or slide was taken for a patient of its own because nobody said whose it is."""
    slide = f"{one.patient}-x"  # a tile's name begins with its slide's
    if (
        one.images
        and one.patient
        and all(image.case == one.patient and image.id.startswith(slide) for image in one.images)
    ):
        return True
    of_volume = [image.part.volume for image in one.images or (one,) if image.part is not None]
    return bool(of_volume) and of_volume.count(one.patient or "") == len(of_volume)
