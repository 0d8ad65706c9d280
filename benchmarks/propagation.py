"""Boxes followed through volumes: what is lost against a box on every slice, and what wins it back.

    python benchmarks/propagation.py [--cases 8] [--write]

``fedvfm data fetch hippocampus`` and ``fedvfm weights fetch litemedsam`` first. LiteMedSAM as it was published, nothing
trained, is told boxes of the truth: on every slice, or on a few slices of each class from which they are followed as
``fedvfm predict --propagate`` does it (:mod:`fedvfm.inference.propagation`), as far as the next drawn slice; from one
slice through the whole volume. Of three and five slices one is the first and one the last that has the class. Dice is
of whole volumes, the mean of both classes and all cases; missed and added are slices of a class without a mask, and
slices with a mask beyond the class, as shares of the slices that have it.
``--write`` puts the table into ``docs/guide.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import block
import numpy as np
import torch
from numpy.typing import NDArray

from fedvfm.config import schema
from fedvfm.data import prompts as simulated
from fedvfm.data import transforms
from fedvfm.data.sources import table
from fedvfm.inference import boxes as prompting
from fedvfm.inference import propagation
from fedvfm.model import adapted_model, sliding_window
from fedvfm.tasks import segmentation

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"
CLASSES = 2
RECIPE: dict[str, Any] = {
    "threads": 1,
    "precision": "float32",
    "backbone": {"name": "litemedsam"},
    "adapter": {"kind": "head-only", "parts": ["mask_tokens"]},
    "task": {"prompt": "box"},
    "data": {
        "class_names": ["rest", "anterior", "posterior"],
        "input_size": [256, 256],
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    },
}


@dataclass(frozen=True)
class Arm:
    """How boxes are given and followed.

    Attributes:
        places: where of a class's extent it is drawn on, from 0 (first slice) to 1; () for the slice with most of it.
        settings: constants of the module that are otherwise.
    """

    places: tuple[float, ...] = ()
    settings: tuple[tuple[str, float], ...] = ()


EVERY = "a box on every slice"
ONE, THREE, FIVE = (), (0.0, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)
WIDE = (("MARGIN", 0.1), ("OUTWARDS", 1.0))
ALONE = (*WIDE, ("APART", 0.0))
ARMS = {
    "one slice, the largest; margin of a twentieth, half a pixel at least": Arm(ONE),
    "the same, margin of a tenth, a pixel at least": Arm(ONE, WIDE),
    "the same, no margin": Arm(ONE, (("MARGIN", 0.0), ("OUTWARDS", 0.0))),
    "three slices, margin of a tenth, boxes followed": Arm(THREE, ALONE),
    "three slices, margin of a tenth, boxes between them interpolated": Arm(THREE, WIDE),
    "five slices, margin of a tenth, boxes followed": Arm(FIVE, ALONE),
    "five slices, margin of a tenth, boxes between them interpolated": Arm(FIVE, WIDE),
}


class Case:
    """One volume, each slice of which is encoded once.

    Args:
        model: LiteMedSAM.
        read: slice -> its pixels.
        count: slices.

    Attributes:
        truth: class numbers. Shapes: (D, H, W).
    """

    def __init__(self, model: adapted_model.AdaptedModel, read: Callable[[int], Any], count: int) -> None:
        self._model, self._pixels = model, [read(at) for at in range(count)]
        self.truth = np.stack([pixels.mask for pixels in self._pixels])
        self._encoded: dict[int, tuple[torch.Tensor, Any]] = {}
        self._drawn: dict[tuple[int, bytes], NDArray[np.uint8]] = {}

    def _of(self, at: int) -> tuple[torch.Tensor, Any]:
        if at not in self._encoded:
            contract = self._model.recipe.data
            ready = transforms.prepare(self._pixels[at], contract, len(contract.class_names))
            pixels = torch.from_numpy(transforms.normalise(ready.image[None], contract))
            self._encoded[at] = pixels, self._model.frozen_prefix(pixels)
        return self._encoded[at]

    @torch.no_grad()
    def draw(self, asked: Mapping[int, sliding_window.Boxes]) -> dict[int, NDArray[np.uint8]]:
        """Masks from boxes, as prediction draws them."""
        masks, size = {}, self.truth.shape[1:]
        for at, own in asked.items():
            key = at, b"/".join(boxes.tobytes() for boxes in own)  # arms ask for much of the same
            if key in self._drawn:
                masks[at] = self._drawn[key]
                continue
            pixels, prefix = self._of(at)
            scaled = prompting.scaled(own, size, pixels.shape[-2:])
            (logits,) = self._model(pixels, prefix, sliding_window.drawing([scaled]))
            masks[at] = self._drawn[key] = segmentation.classes_at(logits, size).astype(np.uint8)
        return masks

    def boxes(self, places: Mapping[int, list[int]]) -> dict[int, sliding_window.Boxes]:
        """Class -> slices, to the boxes of the truth there."""
        told = schema.TaskConfig(kind="segmentation", prompt="box", prompt_jitter=0.0)
        found: dict[int, list[NDArray[np.float64]]] = {}
        for number, slices in places.items():
            for at in slices:
                drawn = simulated.draw(self.truth[at], CLASSES + 1, told, np.random.default_rng(0))
                own = found.setdefault(at, [np.zeros((0, 4)) for _ in range(CLASSES)])
                own[number - 1] = np.asarray(drawn.boxes, np.float64)[number - 1 : number]
        return {at: tuple(own) for at, own in sorted(found.items())}

    def extent(self, number: int) -> list[int]:
        """Slices that have a class."""
        return [int(at) for at in np.flatnonzero((self.truth == number).any(axis=(1, 2)))]


@contextlib.contextmanager
def changed(settings: tuple[tuple[str, float], ...]) -> Iterator[None]:
    """The module with other constants."""
    before = [(name, getattr(propagation, name)) for name, _ in settings]
    for name, value in settings:
        setattr(propagation, name, value)
    try:
        yield
    finally:
        for name, value in before:
            setattr(propagation, name, value)


def drawn_on(case: Case, places: tuple[float, ...]) -> dict[int, list[int]]:
    """Class -> the slices that it is drawn on."""
    chosen = {}
    for number in range(1, CLASSES + 1):
        slices = case.extent(number)
        largest = max(slices, key=lambda at, number=number: int((case.truth[at] == number).sum()))  # type: ignore[misc]
        chosen[number] = sorted({slices[round(place * (len(slices) - 1))] for place in places} or {largest})
    return chosen


def steps(places: Mapping[int, list[int]]) -> int:
    """Slices that boxes are followed: as far as from one drawn slice to the next; of one slice through all."""
    gaps = [last - first for slices in places.values() for first, last in itertools.pairwise(slices)]
    return max(gaps, default=1000)


def scores(case: Case, masks: Mapping[int, NDArray[np.uint8]]) -> list[tuple[float, float, float]]:
    """Of each class Dice, and shares of slices missed and added."""
    volume = np.zeros(case.truth.shape, dtype=np.uint8)
    for at, mask in masks.items():
        volume[at] = mask
    rows = []
    for number in range(1, CLASSES + 1):
        own, truth = volume == number, case.truth == number
        here, there = own.any(axis=(1, 2)), truth.any(axis=(1, 2))
        dice = 2 * (own & truth).sum() / (own.sum() + truth.sum())
        rows.append(
            (float(dice), float((there & ~here).sum() / there.sum()), float((here & ~there).sum() / there.sum()))
        )
    return rows


def cases(model: adapted_model.AdaptedModel, most: int) -> Iterator[Case]:
    """The first test volumes of the hippocampus set that have both classes, as they were acquired."""
    given = schema.SourceConfig(source="hippocampus", options={"appearance": False})
    source = table.make(given, model.recipe.data)
    volumes: dict[str, list[Any]] = {}
    for sample in source.samples():
        if sample.split == "test":
            volumes.setdefault(sample.unit, []).append(sample)
    for name in sorted(volumes)[:most]:
        slices = sorted(volumes[name], key=lambda sample: sample.part.index)
        yield Case(model, lambda at, slices=slices: source.read(slices[at]), len(slices))  # type: ignore[misc]


def shown(rows: Mapping[str, list[tuple[float, float, float]]], given: Mapping[str, list[int]]) -> str:
    """The table."""
    lines = ["| boxes | drawn slices a class | Dice | missed | added |", "|---|---|---|---|---|"]
    for name, own in rows.items():
        dice, missed, added = np.mean(own, axis=0)
        lines.append(f"| {name} | {np.mean(given[name]):.0f} | {dice:.3f} | {missed:.0%} | {added:.0%} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, RECIPE, "recipe")).eval()
    model.write(model.initial())
    text, rows = "", dict[str, list[tuple[float, float, float]]]()
    given: dict[str, list[int]] = {}
    for case in cases(model, asked.cases):
        every = {number: case.extent(number) for number in range(1, CLASSES + 1)}
        rows.setdefault(EVERY, []).extend(scores(case, case.draw(case.boxes(every))))
        given.setdefault(EVERY, []).extend(map(len, every.values()))
        for name, arm in ARMS.items():
            places = drawn_on(case, arm.places)
            with changed(arm.settings):
                _, masks = propagation.follow(case.boxes(places), len(case.truth), steps(places), case.draw)
            rows.setdefault(name, []).extend(scores(case, masks))
            given.setdefault(name, []).extend(map(len, places.values()))
        text = shown(rows, given)
        print(f"{len(rows[EVERY]) // CLASSES} cases\n{text}", flush=True)
    if asked.write:
        block.write(GUIDE, "propagation", text)


if __name__ == "__main__":
    main()
