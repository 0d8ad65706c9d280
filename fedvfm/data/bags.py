"""Cases of many images as samples: a source whose samples are the cases of another source's images.

What belongs together is what the data says (:attr:`fedvfm.data.sample.Sample.case`: a study, a folder, a column of the
table), else the slices of one volume; an image of neither is a case of its own. Splits, privacy, minimum counts and
scores then count cases and their patients, since these are the samples. In multiple-instance learning such a case is
called a bag, and its images are its instances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import columns, defect, input_rows, missing_images, whole_volumes
from fedvfm.data import sample as data
from fedvfm.data.sources import index

LABELS_OF: Mapping[str, str] = {"case-classification": "classification"}
"""Tasks whose samples are cases -> the task that their images' labels are for."""

MASKS_OF: Mapping[str, str] = {"detection": "segmentation"}
"""Tasks that learn something else from masks -> the task whose masks they are."""

SHARED = {
    "label": "label",
    "values": "value",
    "inputs": "row",
    "patient": "patient",
    "site": "site",
    "split": "split",
    "without_image": "declaration of an image",
}
"""What all images of a case have in common: fields of a sample, and what is said of them."""


def of(source: data.Source, recipe: schema.Recipe, *, table: bool = True) -> data.Source:
    """The source as a recipe takes it: with columns of its target and its inputs, its cases, or its whole volumes.

    Args:
        source: of images.
        recipe: of the run.
        table: whether the columns of ``recipe.inputs`` are read; where not, every sample is without a row.

    Samples that are declared to be without an image are left out, unless the recipe takes them.

    Raises:
        DataError: listing every case whose images have unlike labels, values, patients, sites or splits, and what is
            wrong with the columns; of whole volumes what is no slice of one, or lacks slices.
    """
    source = missing_images.taken(source, recipe)
    shown = input_rows.InputRows(source, recipe.inputs) if table and recipe.inputs.columns else source
    missing_images.require_rows(shown)
    answered = columns.Columns(shown, recipe) if recipe.target.of_columns else shown
    if recipe.data.depth:
        return whole_volumes.WholeVolumes(answered)
    return Bags(answered) if recipe.task.kind in LABELS_OF else answered


def data_of(task: str) -> str:
    """The task that a source's labels or masks are for, where ``task`` is trained on them."""
    return {**LABELS_OF, **MASKS_OF}.get(task, task)


def images_of(samples: Iterable[data.Sample]) -> list[data.Sample]:
    """The images of cases, and samples that are no cases themselves, in their order."""
    return [image for sample in samples for image in sample.images or (sample,)]


def read_of(samples: Iterable[data.Sample]) -> list[data.Sample]:
    """What is read of samples, each as one: the images of cases, volumes, and images by themselves."""
    return [image for sample in samples for image in (sample.images if sample.bag else (sample,))]


class Bags(data.Wrapped):
    """A source of cases; the case of several images has another stable name than any of them.

    Args:
        source: of the images. Images of one case follow each other in its order; cases are in the order of their first
            image.

    Raises:
        DataError: listing every case whose images have unlike labels, patients, sites or splits.
    """

    def __init__(self, source: data.Source) -> None:
        super().__init__(source)
        groups: dict[str, list[data.Sample]] = {}
        for image in source.samples():
            name = f"unit {image.unit}" if image.case is None else f"case {image.case}"
            groups.setdefault(name, []).append(image)
        faults = [fault for members in groups.values() for fault in _faults(members)]
        index.refuse(Path(source.info.name), faults)
        self._cases = tuple(_case(members) for members in groups.values())

    def samples(self) -> Sequence[data.Sample]:
        """All cases."""
        return self._cases

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one image of a case.

        Raises:
            DataError: as the source does, and for a case, which has no pixels of its own.
        """
        if sample.images:
            raise defect.IMAGE_NEEDED.error(
                f"'{sample.id}' is a case of {len(sample.images)} images and is not read as one; read its images"
            )
        return self._source.read(sample)


def _case(members: Sequence[data.Sample]) -> data.Sample:
    first = members[0]
    name = first.case or first.unit
    shown = members[:1] if first.without_image else members  # one stands for what is not there
    return dataclasses.replace(first, id=name, part=None, case=None, images=tuple(shown))


def _faults(members: Sequence[data.Sample]) -> list[errors.Fault]:
    """What the images of a case do not have in common; ids alone are named, which are safe to log."""
    faults = []
    for key, word in SHARED.items():
        values = [getattr(image, key) for image in members]
        other = next((image for image, value in zip(members, values, strict=True) if value != values[0]), None)
        if other is not None:
            faults.append(
                defect.CASE_MIXED.fault(
                    f"case '{members[0].case or members[0].unit}': its images '{members[0].id}' and '{other.id}' have "
                    f"unlike {word}s; a case has one {word}: correct the table, or make them two cases"
                )
            )
    return faults
