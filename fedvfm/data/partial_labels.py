"""Unlike label sets: a hospital that labels only some of the recipe's classes.

What nobody labelled there is no background: the hospital says which classes it labels (``labelled`` in its file, by
the recipe's names), and every sample carries it (:attr:`fedvfm.data.sample.Sample.labelled`). Losses and metrics go by
it (:mod:`fedvfm.tasks.segmentation`, :mod:`fedvfm.tasks.classification`). In masks a pixel of a class that the hospital
does not label counts as not labelled, so value 0 means "background, or a class that is not labelled here". An image
whose class is none of the labelled ones has no label and is refused.

The recipe must allow it (``task.partial_labels``): the names travel in the greeting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedvfm import errors, registry
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data

SEGMENTATION = "segmentation"


def required(recipe: schema.Recipe) -> tuple[str, ...]:
    """The classes that some site must label: all, in segmentation all but the background."""
    return recipe.data.class_names[1 if recipe.task.kind == SEGMENTATION else 0 :]


def faults(names: Sequence[str], recipe: schema.Recipe) -> list[str]:
    """Why a recipe cannot be trained on data of which these classes are labelled, one sentence each."""
    known = recipe.data.class_names
    wrong = [
        f"labelled: '{name}' is no class of the recipe; it has {', '.join(known)}{registry.nearest(name, list(known))}"
        for name in names
        if name not in known
    ]
    own = set(names) & set(required(recipe))
    least = 1 if recipe.task.kind == SEGMENTATION else 2
    if not wrong and len(own) < least:
        wrong.append(
            f"labelled: {', '.join(sorted(own)) or 'the background alone'}; at least {least} of "
            f"{', '.join(required(recipe))} is needed, or there is nothing to tell apart"
        )
    if not wrong and len(own) < len(required(recipe)) and not recipe.task.partial_labels:
        missing = ", ".join(name for name in required(recipe) if name not in own)
        wrong.append(
            f"labelled: {missing} is not labelled here, and the recipe takes what is not labelled for background. Ask "
            "for one with task.partial_labels = true, or label the class"
        )
    return wrong


def nobody(recipe: schema.Recipe, sites: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The classes that none of these sites labels; a site that says nothing labels all.

    Args:
        recipe: whose classes.
        sites: site -> the classes that it labels, empty for all.
    """
    if not all(sites.values()):
        return ()
    known = {name for names in sites.values() for name in names}
    return tuple(name for name in required(recipe) if name not in known)


def said(recipe: schema.Recipe, sites: Mapping[str, Sequence[str]]) -> str:
    """That nobody labels some classes, and who labels what; empty where every class has a site."""
    missing = nobody(recipe, sites)
    if not missing:
        return ""
    rows = "; ".join(f"{site}: {', '.join(names)}" for site, names in sorted(sites.items()))
    return (
        f"no site labels {', '.join(missing)} ({rows}), so nothing would be learned of it. Bring a site that labels "
        "it, or leave the class out of recipe.data.class_names"
    )


class PartlyLabelled(data.Wrapped):
    """A source of which some classes are labelled.

    Args:
        source: the hospital's, under the recipe's classes.
        numbers: of the labelled classes, ascending.
        task: of the recipe; in segmentation the background, class 0, is among the numbers.
    """

    def __init__(self, source: data.Source, numbers: Sequence[int], task: str) -> None:
        super().__init__(source)
        self.numbers = tuple(numbers)
        hidden = np.arange(256)
        hidden[[number for number in range(256) if number not in self.numbers]] = 0
        self._masks = hidden.astype(np.int64) if task == SEGMENTATION else None

    def samples(self) -> Sequence[data.Sample]:
        """All samples, each with what is labelled in it.

        Raises:
            DataError: if the label of one is a class that is not labelled here.
        """
        everything = self._source.samples()
        strange = [sample for sample in everything if sample.label is not None and sample.label not in self.numbers]
        if strange:
            numbers = sorted({sample.label for sample in strange if sample.label is not None})
            classes = ", ".join(self.info.class_names[number] for number in numbers)
            raise defect.LABEL_NOT_DECLARED.error(
                f"{len(strange)} samples are of {classes}, which is not among the classes that this site "
                "says it labels. Add it to labelled, or take these samples out"
            )
        return tuple(map(self.marked, everything))

    def marked(self, sample: data.Sample) -> data.Sample:
        """A sample with what is labelled in it."""
        return dataclasses.replace(sample, labelled=self.numbers)

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one sample; in its mask what is not labelled is 0.

        Raises:
            DataError: as the source does, and for a mask outside the classes.
        """
        pixels = self._source.read(sample)
        if pixels.mask is None or self._masks is None or not pixels.mask.size:
            return pixels
        low, high = int(pixels.mask.min()), int(pixels.mask.max())
        if not 0 <= low <= high < len(self.info.class_names):
            raise defect.MASK_VALUE.error(
                f"a mask with values from {low} to {high}, but there are {len(self.info.class_names)} classes; repair "
                "the mask"
            )
        return dataclasses.replace(pixels, mask=self._masks[pixels.mask])


def numbers_of(names: Collection[str], recipe: schema.Recipe) -> tuple[int, ...]:
    """Class numbers of labelled classes, ascending; in segmentation the background is always one of them."""
    chosen = {recipe.data.class_names.index(name) for name in names}
    return tuple(sorted(chosen | ({0} if recipe.task.kind == SEGMENTATION else set())))


def declared(source: data.Source, names: Sequence[str], recipe: schema.Recipe | None) -> data.Source:
    """The source as the hospital says it is labelled; without a word, or a recipe, the source itself.

    Raises:
        ConfigError: listing every name that fits nothing, and where the recipe does not allow it.
    """
    if not names or recipe is None:
        return source
    wrong = faults(names, recipe)
    if wrong:
        raise errors.ConfigError("labelled", wrong)
    if set(required(recipe)) <= set(names):
        return source
    return PartlyLabelled(source, numbers_of(names, recipe), recipe.task.kind)
