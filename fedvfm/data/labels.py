"""Class names: those of a source against those of a recipe, and the hospital's map from one to the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from fedvfm import errors, registry
from fedvfm.config import schema
from fedvfm.data import bags, columns, defect, structures
from fedvfm.data import sample as data


def faults(recipe: schema.Recipe, info: data.SourceInfo) -> list[str]:
    """Why a recipe cannot be trained on a source: another task, other classes or another order; one sentence each."""
    return class_faults(recipe.task.kind, recipe.data.class_names, info, of_columns=recipe.target.of_columns)


def class_faults(
    task: str, class_names: Sequence[str], info: data.SourceInfo, *, of_columns: bool = False
) -> list[str]:
    """:func:`faults` of a task's kind and its classes, or the columns of its target."""
    found = []
    theirs, ours = ", ".join(info.class_names), ", ".join(class_names)
    kind = bags.data_of(task)
    if kind in ("segmentation", "classification") and info.task != kind:
        found.append(f"recipe.task.kind = '{task}': source '{info.name}' is for {info.task}")
    if of_columns:
        return found  # names are columns of the table, which are looked for when it is read
    if not info.class_names:
        found.append(
            f"recipe.task.kind = '{task}': the table of source '{info.name}' has no column label; add it, or name "
            "columns in recipe.data.class_names and say in recipe.target what they are"
        )
    elif len(info.class_names) != len(class_names):
        found.append(
            f"recipe.data.class_names: {ours}; source '{info.name}' has {len(info.class_names)} classes: {theirs}"
        )
    elif _mislabelled(kind, info.class_names, class_names):
        found.append(f"recipe.data.class_names: {ours}; source '{info.name}' numbers its classes as {theirs}")
    elif info.named and _others(info.class_names, class_names):
        found.append(
            f"recipe.data.class_names: {ours}; the masks of source '{info.name}' are of {theirs}; say in [labels] "
            "which is which"
        )
    return found


def _others(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether data that names its classes has others than the recipe; the background may be called as one likes."""
    named = [(structures.plain(own), structures.plain(one)) for own, one in zip(theirs[1:], ours[1:], strict=True)]
    return any(own != one and one not in structures.GENERIC and own not in structures.GENERIC for own, one in named)


def _mislabelled(task: str, theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether results would stand under another class's name: one name under two numbers, or other class labels.

    Capitals, hyphens and underscores do not count. Other names of masks may be the user's own: a folder of masks knows
    only numbers.
    """
    own, recipe = ([structures.plain(name) for name in names] for names in (theirs, ours))
    if own == recipe:
        return False
    return task == "classification" or any(name in recipe and recipe.index(name) != at for at, name in enumerate(own))


@runtime_checkable
class Structured(data.Source, Protocol):
    """A source whose masks say what they hold: it has to know what ``[labels]`` makes of it."""

    def mapping(self, words: Sequence[str]) -> Structured:
        """The same where these names and codes are mapped: what they call is never left out."""

    def merged(self, numbers: Sequence[int]) -> Structured:
        """The same where class ``i`` will count as ``numbers[i]``: classes of one number do not overlap."""


class Relabelled(data.Wrapped):
    """A source under other class names.

    Args:
        source: the hospital's.
        numbers: new class number of each of the source's classes.
        class_names: the new names.
    """

    def __init__(self, source: data.Source, numbers: Sequence[int], class_names: Sequence[str]) -> None:
        super().__init__(source)
        self._class_names = tuple(class_names)
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

    def row(self, sample: data.Sample) -> Mapping[str, str]:
        """The cells of the source's table; none where it has no table."""
        return self._source.row(sample) if isinstance(self._source, columns.Tabled) else {}

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one sample, its mask in the new numbers.

        Raises:
            DataError: as the source does, and for a mask outside the source's classes.
        """
        pixels = self._source.read(sample)
        if pixels.mask is None:
            return pixels
        if pixels.mask.size and not 0 <= int(pixels.mask.min()) <= int(pixels.mask.max()) < len(self._numbers):
            raise defect.MASK_VALUE.error(
                f"a mask with values from {int(pixels.mask.min())} to {int(pixels.mask.max())}, but the source has "
                f"{len(self._numbers)} classes; repair the mask"
            )
        return dataclasses.replace(pixels, mask=self._numbers[pixels.mask])


def _by_own_name(source: data.Source, names: Mapping[str, str]) -> dict[str, str]:
    """The map by the source's own class names: it may call them by a code ("SCT:10200004"), or in other capitals."""
    own = source.info.class_names
    aliases: Mapping[str, str] = getattr(source, "aliases", {})
    plain = {structures.plain(name): name for name in own}
    made = {}
    for key, value in names.items():
        other = aliases.get(key.strip().casefold()) or plain.get(structures.plain(key))
        other = other or aliases.get(structures.plain(key))
        made[key if key in own or other is None else other] = value
    return made


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
    source = source.mapping(list(names)) if isinstance(source, Structured) else source
    theirs = source.info.class_names
    names = _by_own_name(source, names)
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
    numbers = [ours.index(names.get(name, name)) for name in theirs]
    return Relabelled(source.merged(numbers) if isinstance(source, Structured) else source, numbers, ours)
