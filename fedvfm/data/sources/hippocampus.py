"""Hippocampus on T1 MR volumes of real people (Medical Segmentation Decathlon, task 4), as six virtual hospitals.

The set comes from one hospital, and which volumes are of one person is not published: hospitals are virtual, and one
speaks of cases and never of patients. Cases are dealt to hospitals of very different size, and each hospital has a
scanner of its own (see :data:`SCANNERS`).

Source: Antonelli et al., "The Medical Segmentation Decathlon", Nature Communications 2022; CC BY-SA 4.0.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from fedvfm import errors, seeding
from fedvfm.config import schema
from fedvfm.data import defect, transforms
from fedvfm.data import sample as data
from fedvfm.data.decoding import decoder
from fedvfm.data.partition import appearance
from fedvfm.data.sources import folder, index

CLASS_NAMES = ("rest", "anterior", "posterior")
SHARES = {
    "north": {"train": 50, "val": 3, "test": 6},
    "centre": {"train": 32, "val": 3, "test": 6},
    "east": {"train": 24, "val": 3, "test": 6},
    "south": {"train": 18, "val": 3, "test": 5},
    "west": {"train": 14, "val": 3, "test": 5},
    "coast": {"train": 10, "val": 3, "test": 5},
}
"""Hospital -> split -> cases, of 199; of another number of cases each has its share."""

SCANNERS = {
    "north": appearance.Appearance(),
    "centre": appearance.Appearance(gamma=0.75, noise=0.02),
    "east": appearance.Appearance(gamma=1.3, bias=0.3, noise=0.02),
    "south": appearance.Appearance(resolution=0.85, noise=0.03),
    "west": appearance.Appearance(gamma=0.85, bias=0.4, noise=0.04),
    "coast": appearance.Appearance(gamma=1.6, resolution=0.9, noise=0.03),
}
"""As it is, bright, dark and uneven, coarse, uneven and noisy, dark and coarse; ``seed`` draws bias fields and noise.
"""

OPTIONS: dict[str, bool | int] = {"appearance": True, "every": 1, "seed": 0}
"""Options and their defaults."""


class Hippocampus(folder.Folder):
    """Volumes ``images/CASE.nii.gz`` and ``labels/CASE.nii.gz`` at six virtual hospitals of unequal size.

    ``fedvfm data fetch hippocampus`` makes the folder.

    Options: ``appearance`` (default true; false gives the volumes as they are), ``every`` (default 1; N trains on every
    N-th slice of a volume, since neighbours are near duplicates; volumes are scored whole all the same) and ``seed``
    (default 0) of the deal and the scanners.

    Raises:
        DataError: if the folder is missing, files do not fit together, or there are too few cases for six hospitals.
        ConfigError: for unknown options or wrong values, all at once.
    """

    def __init__(self, source: schema.SourceConfig, refuse: index.Refuse = index.refuse) -> None:
        self._chosen = _options(source)
        path = index.locate(source, ("images/", "labels/"))
        numbers: list[schema.Scalar] = list(range(len(CLASS_NAMES)))
        plain = {"layout": "pairs", "ids": "names", "class_names": list(CLASS_NAMES), "mask_values": numbers}
        with decoder.trusted():  # a public set, not files of strangers
            super().__init__(source.model_copy(update={"path": str(path), "options": plain}), refuse)
        seed: int = self._chosen["seed"]
        self._homes = deal([case.name for case in self._layout.cases], seed)
        self._scanners = {
            site: dataclasses.replace(scanner, bias_seed=seeding.key(seed, site, "bias") % 2**32)
            for site, scanner in SCANNERS.items()
        }

    @property
    def info(self) -> data.SourceInfo:
        """Name, task, classes, licence and note."""
        note = "cases of one hospital; hospitals and their scanners are virtual, persons are not known"
        total = sum(number for splits in SHARES.values() for number in splits.values())
        # A fetch that was stopped leaves fewer, each of them whole.
        note += f"; {len(self._homes)} of its {total} cases" if len(self._homes) != total else ""
        return data.SourceInfo("hippocampus", "segmentation", CLASS_NAMES, "CC BY-SA 4.0", note, named=True)

    def samples(self) -> Sequence[data.Sample]:
        """The slices of all cases with their hospital and split; of training cases every N-th where asked."""
        chosen = []
        for sample in super().samples():
            site, split = self._homes[sample.unit]
            if split == "train" and sample.part is not None and sample.part.index % self._chosen["every"]:
                continue
            chosen.append(dataclasses.replace(sample, site=site, split=split))
        return chosen

    def read(self, sample: data.Sample) -> data.Pixels:
        """One slice as its hospital's scanner shows it; noise and bias go on top of a slice of full contrast.

        Raises:
            DataError: if the sample is not of this source, or a file cannot be read.
        """
        with decoder.trusted():
            pixels = super().read(sample)
        if not self._chosen["appearance"]:
            return pixels
        site, _ = self._homes[sample.unit]
        rng = seeding.stream(self._chosen["seed"], site, sample.id, "appearance")
        image = self._scanners[site].apply(transforms.stretch(pixels.image), rng)
        return dataclasses.replace(pixels, image=image, units=None)


def deal(cases: Sequence[str], seed: int) -> dict[str, tuple[str, str]]:
    """Case -> hospital and split, by the seed alone.

    Raises:
        DataError: if there are fewer cases than give each hospital one in each split.
    """
    cells = [(site, split, number) for site, splits in SHARES.items() for split, number in splits.items()]
    total = sum(number for _, _, number in cells)
    ends = [round(done * len(cases) / total) for done in itertools.accumulate(number for _, _, number in cells)]
    starts = [0, *ends[:-1]]
    if any(end == start for start, end in zip(starts, ends, strict=True)):
        raise defect.NO_SAMPLES.error(
            f"data source 'hippocampus': {len(cases)} cases are too few for {len(SHARES)} hospitals with training, "
            f"validation and test; bring all {total} ('fedvfm data fetch hippocampus'), or read them with data.source "
            "= 'folder'"
        )
    order = seeding.stream(seed, "hippocampus", "deal").permutation(len(cases))
    names = sorted(cases)
    return {
        names[at]: (site, split)
        for (site, split, _), start, end in zip(cells, starts, ends, strict=True)
        for at in order[start:end]
    }


def _options(source: schema.SourceConfig) -> dict[str, Any]:
    """Values of all options.

    Raises:
        ConfigError: listing every fault.
    """
    faults = index.unknown_options(source, list(OPTIONS))
    values: dict[str, Any] = {**OPTIONS, **source.options}
    if not isinstance(values["appearance"], bool):
        faults.append(f"data.options.appearance = {values['appearance']!r}: give true or false")
    for key, least in (("every", 1), ("seed", 0)):
        if type(values[key]) is not int or values[key] < least:
            faults.append(f"data.options.{key} = {values[key]!r}: give a whole number from {least}")
    if faults:
        raise errors.ConfigError("data source 'hippocampus'", faults)
    return values
