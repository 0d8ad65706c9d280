"""Class names: those of a source against those of a recipe, and the hospital's map from one to the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fedvfm import config, errors, registry
from fedvfm.data import sample as data


def faults(recipe: config.Recipe, info: data.SourceInfo) -> list[str]:
    """Why a recipe cannot be trained on a source: another task, other classes or another order; one sentence each."""
    found = []
    theirs, ours = ", ".join(info.class_names), ", ".join(recipe.data.class_names)
    if recipe.task.kind in ("segmentation", "classification") and info.task != recipe.task.kind:
        found.append(f"recipe.task.kind = '{recipe.task.kind}': source '{info.name}' is for {info.task}")
    if len(info.class_names) != len(recipe.data.class_names):
        found.append(
            f"recipe.data.class_names: {ours}; source '{info.name}' has {len(info.class_names)} classes: {theirs}"
        )
    elif _mislabelled(recipe.task.kind, info.class_names, recipe.data.class_names):
        found.append(f"recipe.data.class_names: {ours}; source '{info.name}' numbers its classes as {theirs}")
    return found


def _mislabelled(task: str, theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether results would stand under another class's name: the same names in another order, or other class labels.

    Names of masks may be the user's own: a folder of masks knows only numbers.
    """
    if tuple(theirs) == tuple(ours):
        return False
    return task == "classification" or set(theirs) == set(ours)


class Relabelled:
    """A source under other class names.

    Args:
        source: the hospital's.
        numbers: new class number of each of the source's classes.
        class_names: the new names.
    """

    def __init__(self, source: data.Source, numbers: Sequence[int], class_names: Sequence[str]) -> None:
        self._source, self._class_names = source, tuple(class_names)
        self._numbers = np.asarray(numbers, dtype=np.int64)

    @property
    def info(self) -> data.SourceInfo:
        """That of the source, with the new names."""
        return dataclasses.replace(self._source.info, class_names=self._class_names)

    def samples(self) -> Sequence[data.Sample]:
        """All samples with their new labels."""
        return tuple(
            one if one.label is None else dataclasses.replace(one, label=int(self._numbers[one.label]))
            for one in self._source.samples()
        )

    def stable(self, sample: data.Sample) -> tuple[str, str | None]:
        """The source's names that stay when files are added; its ids where it has no others."""
        found = getattr(self._source, "stable", None)
        return (sample.id, sample.patient) if found is None else found(sample)

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one sample, its mask in the new numbers.

        Raises:
            DataError: as the source does, and for a mask outside the source's classes.
        """
        pixels = self._source.read(sample)
        if pixels.mask is None:
            return pixels
        if pixels.mask.size and not 0 <= int(pixels.mask.min()) <= int(pixels.mask.max()) < len(self._numbers):
            raise errors.DataError(
                f"a mask with values from {int(pixels.mask.min())} to {int(pixels.mask.max())}, but the source has "
                f"{len(self._numbers)} classes; repair the mask"
            )
        return dataclasses.replace(pixels, mask=self._numbers[pixels.mask])


def mapped(source: data.Source, names: Mapping[str, str], wanted: Sequence[str] = ()) -> data.Source:
    """The source under the classes of the recipe; without a map the source itself.

    Args:
        source: the hospital's.
        names: the source's class name -> the recipe's; a class that is not in it keeps its name.
        wanted: the recipe's class names in their order; empty where no recipe is known.

    Raises:
        ConfigError: listing every name that fits nothing.
    """
    if not names:
        return source
    theirs = source.info.class_names
    found = [
        f"labels.{name}: the data has no such class{registry.nearest(name, list(theirs))}"
        for name in names
        if name not in theirs
    ]
    ours = tuple(wanted) or tuple(dict.fromkeys(names.get(name, name) for name in theirs))
    found += [
        f"labels: a class becomes '{names.get(name, name)}', which the recipe does not have; it has {', '.join(ours)}"
        if name in names
        else "labels: a class of the data is neither in this table nor in the recipe; map it to one of "
        + ", ".join(ours)
        for name in theirs
        if names.get(name, name) not in ours
    ]
    if found:
        raise errors.ConfigError("labels", list(dict.fromkeys(found)))
    return Relabelled(source, [ours.index(names.get(name, name)) for name in theirs], ours)
