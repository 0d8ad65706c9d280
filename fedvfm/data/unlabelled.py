"""Hospitals without labels: a source that shows images alone, whatever lies beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from fedvfm.config import schema
from fedvfm.data import columns, labels
from fedvfm.data import sample as data


def bare(sample: data.Sample) -> data.Sample:
    """A sample, or a case with its images, of which nobody says what it shows; its row of inputs stays."""
    images = tuple(map(bare, sample.images))
    return dataclasses.replace(sample, label=None, values=(), labelled=(), images=images)


class Unlabelled(data.Wrapped):
    """A source without its labels.

    Args:
        source: of images, with labels or without.
        kept: ids of the samples that keep their labels: of a virtual hospital those that it is tested with.
    """

    def __init__(self, source: data.Source, kept: Collection[str] = ()) -> None:
        super().__init__(source)
        self._kept = frozenset(kept)

    @property
    def info(self) -> data.SourceInfo:
        """That of the source; where no label is left, of no masks and no classes."""
        info = self._source.info
        return info if self._kept else dataclasses.replace(info, task="classification", class_names=())

    def samples(self) -> Sequence[data.Sample]:
        """All samples, without labels but for those that keep them."""
        return tuple(each if each.id in self._kept else bare(each) for each in self._source.samples())

    def row(self, sample: data.Sample) -> Mapping[str, str]:
        """The cells of the source's table; none where it has no table."""
        return self._source.row(sample) if isinstance(self._source, columns.Tabled) else {}

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one sample, without a mask unless it keeps it.

        Raises:
            DataError: as the source does.
        """
        pixels = self._source.read(sample)
        return pixels if sample.id in self._kept else dataclasses.replace(pixels, mask=None)


def shown(
    source: data.Source, own: Mapping[str, str], class_names: Sequence[str], *, without_labels: bool
) -> data.Source:
    """A site's source without labels, or under a recipe's classes (:func:`fedvfm.data.labels.mapped`)."""
    return Unlabelled(source) if without_labels else labels.mapped(source, own, class_names)


def faults(recipe: schema.Recipe) -> list[str]:
    """Why a recipe takes no hospital without labels, one sentence."""
    if recipe.unlabelled is not None:
        return []
    return [
        "role = 'unlabelled': the recipe takes no site without labels. Ask for one with [recipe.unlabelled], or label "
        "the images"
    ]


def nobody(sites: Collection[bool]) -> str:
    """That no site has labels; empty where one has.

    Args:
        sites: of each, whether it is without labels.
    """
    if not sites or not all(sites):
        return ""
    return (
        f"none of {len(sites)} sites has labels, so there is nothing to learn from. Bring a site that labels its images"
    )
