"""Unlike channels: which of a hospital's files are the recipe's channels, and which channels it lacks.

A hospital says by name what it has (``[data.channels]`` of its file). What it does not name it lacks: the recipe must
allow that (``data.optional_channels``), every image says so (:attr:`fedvfm.data.sample.Pixels.absent`), the channel is
black after intensities are mapped and in every augmented view, and the greeting tells the coordinator its name.

Source: Neverova et al., "ModDrop: Adaptive Multi-Modal Gesture Recognition", TPAMI 2016: training with whole
    modalities dropped, so that a network bears that they are missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fedvfm import errors, registry
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data

ABSENT = -1
"""In a list of channel numbers: none is taken, and the channel is black."""


def lacking(contract: schema.DataContract, source: schema.SourceConfig) -> tuple[str, ...]:
    """The recipe's channels that a site's file does not name; none where it names no channels."""
    return tuple(name for name in contract.channels if name not in source.channels) if source.channels else ()


def lacking_faults(names: Sequence[str], contract: schema.DataContract) -> list[str]:
    """Why a site that lacks these channels cannot take part, one sentence each."""
    wrong = [
        f"'{name}' is no channel of the recipe; it has {', '.join(contract.channels) or 'none with a name'}"
        f"{registry.nearest(name, list(contract.channels))}"
        for name in names
        if name not in contract.channels
    ]
    needed = [name for name in names if name in contract.channels and name not in contract.optional_channels]
    if needed:
        allowed = ", ".join(contract.optional_channels) or "none"
        wrong.append(
            f"channel {', '.join(needed)} is lacking, and recipe.data.optional_channels allows {allowed}; bring it, or "
            "ask for a recipe that allows it"
        )
    if contract.channels and set(names) >= set(contract.channels):
        wrong.append("every channel of the recipe is lacking, so there is nothing to see; bring one at least")
    return wrong


def nowhere(contract: schema.DataContract, sites: Mapping[str, Sequence[str]]) -> str:
    """That every one of these sites lacks some channel; empty where each is at some site.

    Args:
        contract: the recipe's.
        sites: site -> the channels that it lacks.
    """
    gone = [name for name in contract.channels if sites and all(name in lacked for lacked in sites.values())]
    if not gone:
        return ""
    return (
        f"every site lacks channel {', '.join(gone)}, so nothing would be learned of it; bring a site that has it, or "
        "ask for a recipe without it"
    )


def numbers(
    named: Mapping[str, str | int], theirs: Sequence[str], contract: schema.DataContract
) -> tuple[tuple[int, ...], list[errors.Fault]]:
    """Numbers of a hospital's files in the order of the recipe's channels, :data:`ABSENT` for what it lacks.

    Args:
        named: the recipe's channel -> its name in the data, or the number of its file.
        theirs: what the data calls its channels, in their order; empty where it does not say.
        contract: the recipe's.
    """
    ours, plain = list(contract.channels), [name.casefold() for name in theirs]
    wrong = [
        f"data.channels.{name}: no channel of the recipe; it has {', '.join(ours) or 'none with a name'}"
        f"{registry.nearest(name, ours)}"
        for name in named
        if name not in ours
    ]
    placed: dict[str, int] = {}
    for name, value in named.items():
        if isinstance(value, int):
            placed[name] = value
        elif plain.count(value.casefold()) > 1:
            wrong.append(
                f"data.channels.{name} = '{value}': several channels of the data have this name; give each its own in "
                "dataset.json"
            )
        elif value.casefold() in plain:
            placed[name] = plain.index(value.casefold())
        else:
            known = f"it has {', '.join(theirs)}" if theirs else "it names none; give the number of the file, from 0"
            wrong.append(f"data.channels.{name} = '{value}': no channel of the data; {known}")
    taken: dict[int, str] = {}
    for name, number in placed.items():
        other = taken.setdefault(number, name)
        if other != name:
            wrong.append(f"data.channels: {other} and {name} are both file {number}; a file is one channel")
    lacked = [name for name in ours if name not in named]
    wrong += [f"data.channels: {fault}" for fault in lacking_faults(lacked, contract)]
    return tuple(placed.get(name, ABSENT) for name in ours), [defect.CHANNELS.fault(text) for text in wrong]


class Lacking(data.Wrapped):
    """A source some of whose channels count as absent (simulation only).

    Args:
        source: that has them all.
        absent: their numbers.
    """

    def __init__(self, source: data.Source, absent: Sequence[int]) -> None:
        super().__init__(source)
        self._absent = tuple(sorted(absent))

    def read(self, sample: data.Sample) -> data.Pixels:
        """Read one sample; what is absent is black.

        Raises:
            DataError: as the source does.
        """
        pixels = self._source.read(sample)
        return blackened(pixels, self._absent)


def blackened(pixels: data.Pixels, absent: Sequence[int]) -> data.Pixels:
    """The image with these channels absent."""
    image = np.array(pixels.image, dtype=np.float32)
    image[list(absent)] = 0.0
    return dataclasses.replace(pixels, image=image, absent=tuple(absent))
