"""Axial slices of the MNI ICBM152 T1 template with grey and white matter, as four virtual hospitals.

The volume and its tissue maps come with the ``nilearn`` wheel (no download) and are read without importing nilearn.
It is one average of 152 brains: neighbouring slices are near duplicates, so every hospital owns a contiguous slab,
and at least 5 mm of unused slices lie between train, val and test and between hospitals. Each hospital has a scanner
of its own (see :data:`SCANNERS`).

Source: Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 54(1), 2011 (release
2009a, symmetric).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, seeding
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.partition import appearance

SIZE = 182
"""Rows and columns of a slice after the crop: 13 patches of 14 pixels; the brain is 181 mm long and 143 mm wide."""

GAP = 5
"""Unused slices (1 mm each) between any two sub-slabs."""

SLABS = {
    "north": {"train": range(140, 150), "val": range(132, 135), "test": range(122, 127)},
    "east": {"train": range(107, 117), "val": range(99, 102), "test": range(89, 94)},
    "south": {"train": range(23, 33), "val": range(38, 41), "test": range(46, 51)},
    "west": {"train": range(56, 66), "val": range(71, 74), "test": range(79, 84)},
}
"""Hospital -> split -> axial slices, counted from the lowest; train lies at the outer end of the two outer slabs."""

SCANNERS = {
    "north": appearance.Appearance(gamma=0.6, resolution=0.8, bias=0.4, noise=0.02),
    "east": appearance.Appearance(inversion=1.0, air=0.15, resolution=0.9, bias=0.4, noise=0.03),
    "south": appearance.Appearance(gamma=1.3, resolution=0.65, bias=0.4, noise=0.05),
    "west": appearance.Appearance(gamma=2.2, bias=0.6, noise=0.03),
}
"""Flat and bright, T2-like, coarse and noisy, dark and uneven; the option ``seed`` draws bias fields and noise."""

_PATTERN = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_SHA256 = {
    "t1": "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
    "gm": "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed",
    "wm": "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db",
}
_REMEDY = "reinstall it: pip install --force-reinstall 'nilearn==0.13.1'"


class BrainMRI:
    """The ``brain-mri`` source.

    Options: ``appearance`` (default true; false gives the slices as they are) and ``seed`` (default 0).

    Raises:
        ConfigError: for unknown options or wrong types, all at once.
        MissingExtra: if nilearn or nibabel is not installed.
    """

    def __init__(self, source: schema.SourceConfig) -> None:
        options = _options(source)
        self._folder = _folder()
        self._seed: int = options["seed"]
        self._scanners = _scanners(self._seed) if options["appearance"] else {}
        self._slices = {f"icbm152-z{z:03d}": z for slab in SLABS.values() for part in slab.values() for z in part}

    @property
    def info(self) -> data.SourceInfo:
        """Name, task, classes, licence and note."""
        return data.SourceInfo(
            name="brain-mri",
            task="segmentation",
            class_names=("rest", "grey", "white"),
            licence="MNI ICBM152: use, copy and change without fee, with this notice: Copyright (C) 1993-2009 "
            "Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University",
            note="one average brain, no patient claim",
        )

    def samples(self) -> Sequence[data.Sample]:
        """All slices with their hospital and split, by hospital, split and height."""
        return [
            data.Sample(id=f"icbm152-z{z:03d}", site=site, split=split)
            for site in sorted(SLABS)
            for split, part in SLABS[site].items()
            for z in part
        ]

    def read(self, sample: data.Sample) -> data.Pixels:
        """One slice, anterior at the top and the left of the brain on the right (radiological), 1 mm pixels.

        Shapes: image (1, 182, 182); mask (182, 182), 0 rest, 1 grey, 2 white: the largest of (1 - g - w, g, w).

        Raises:
            DataError: if the sample is not of this source, or nilearn's files are missing or not the pinned ones.
        """
        if sample.id not in self._slices:
            raise defect.NOT_FOUND.error(
                f"brain-mri has no sample '{sample.id}'; its samples are icbm152-zNNN, see samples()"
            )
        t1, grey, white = load(self._folder)[:, self._slices[sample.id]]
        image = t1[None].astype(np.float32) / 255
        if sample.site in self._scanners:
            rng = seeding.stream(self._seed, sample.site, sample.id, "appearance")
            image = self._scanners[sample.site].apply(image, rng)
        return data.Pixels(image=image, mask=_classes(grey, white), spacing=(1.0, 1.0))


def _options(source: schema.SourceConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"appearance": True, "seed": 0, **source.options}
    faults = [
        f"data.options.{name}: unknown option; known: appearance, seed"
        for name in values
        if name not in ("appearance", "seed")
    ]
    if source.path is not None:
        faults.append(f"data.path = '{source.path}': brain-mri reads the nilearn package and takes no path; remove it")
    if not isinstance(values["appearance"], bool):
        faults.append(f"data.options.appearance = {values['appearance']!r}: give true or false")
    if type(values["seed"]) is not int or values["seed"] < 0:
        faults.append(f"data.options.seed = {values['seed']!r}: give a whole number from 0")
    if faults:
        raise errors.ConfigError("brain-mri", faults)
    return values


def _scanners(seed: int) -> dict[str, appearance.Appearance]:
    return {
        site: dataclasses.replace(scanner, bias_seed=seeding.key(seed, site, "bias") % 2**32)
        for site, scanner in SCANNERS.items()
    }


def _folder() -> Path:
    """The folder of nilearn's volumes, found without importing nilearn (which takes seconds)."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("nibabel") is None:
        raise errors.MissingExtra("brain-mri needs the packages nilearn and nibabel: pip install 'fedvfm[demo]'")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


@functools.lru_cache(maxsize=1)
def load(folder: Path) -> NDArray[np.uint8]:
    """T1, grey and white matter, upright and cropped; read once and kept (19 MB, not writable).

    Shapes: (3, slices from the lowest, SIZE, SIZE).

    Raises:
        DataError: if a file is missing or not the pinned one.
    """
    volumes = np.stack([upright(_open(folder / _PATTERN.format(name), sha256)) for name, sha256 in _SHA256.items()])
    top, left = (_start(np.flatnonzero(volumes[0].any(axis=axes))) for axes in ((0, 2), (0, 1)))
    cropped = np.ascontiguousarray(volumes[:, :, top : top + SIZE, left : left + SIZE], dtype=np.uint8)
    cropped.setflags(write=False)
    return cropped


def _open(path: Path, sha256: str) -> Any:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise defect.UNREADABLE.error(
            f"{path}: nilearn's volume cannot be read ({error.strerror}); {_REMEDY}"
        ) from None
    if found != sha256:
        raise defect.UNREADABLE.error(f"{path}: sha256 is {found[:16]}..., expected {sha256[:16]}...; {_REMEDY}")
    return importlib.import_module("nibabel").load(path)


def upright(image: Any) -> NDArray[Any]:
    """A nibabel volume of any orientation as axial slices that a radiologist would hang.

    Returns:
        (slices, rows, columns): slices run from inferior to superior, rows from anterior to posterior, columns from the
        right of the body to its left.
    """
    orientations: Any = importlib.import_module("nibabel.orientations")
    found = orientations.io_orientation(image.affine)
    wanted = orientations.axcodes2ornt("LPS")
    lps = orientations.apply_orientation(np.asanyarray(image.dataobj), orientations.ornt_transform(found, wanted))
    return np.asarray(lps.transpose(2, 1, 0))


def _start(used: NDArray[np.intp]) -> int:
    """First row (or column) of a window of SIZE around the used ones."""
    return max(0, int(used[0] + used[-1] + 1 - SIZE) // 2)


def _classes(grey: NDArray[np.uint8], white: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Argmax of (1 - g - w, g, w), in whole 255ths so that ties are exact (the first class wins)."""
    g, w = grey.astype(np.int16), white.astype(np.int16)
    return np.asarray(np.argmax(np.stack([255 - g - w, g, w]), axis=0), dtype=np.int64)
