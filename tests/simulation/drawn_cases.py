"""Drawn cases: small volumes of noise with labels, of which some hold a bright spot on one slice."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

SIDE, SLICES = 30, 4
SPLITS = ("train",) * 4 + ("val",) * 2 + ("test",) * 2


def voxels(rng: np.random.Generator, *, spot: bool, slices: int = SLICES) -> np.ndarray:
    """Shapes: (SIDE, SIDE, slices), from 0 to 255."""
    made = rng.integers(0, 90, (SIDE, SIDE, slices)).astype(np.uint8)
    if spot:
        at = int(rng.integers(slices))
        made[8:22, 8:22, at] = 250
    return made


def table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def pairs(folder: Path, drawn: Iterable[tuple[dict[str, str], np.ndarray, np.ndarray]]) -> None:
    """Pictures with masks: a row of ``patients.csv``, the picture and the mask of each, called as the row's ``id``."""
    rows = []
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for row, image, mask in drawn:
        Image.fromarray(image).save(folder / "images" / f"{row['id']}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{row['id']}.png")
        rows.append(row)
    table(folder / "patients.csv", rows)


def rows(site: str, splits: Sequence[str] = SPLITS) -> list[dict[str, str]]:
    """Two cases of a site and split in turn: one with a spot, one without."""
    return [
        {
            "id": f"{site}-{at}",
            "label": "spot" if at % 2 else "plain",
            "patient": f"p {site} {at}",
            "site": site,
            "split": split,
        }
        for at, split in enumerate(splits)
    ]


def volumes(folder: Path, sites: Sequence[str]) -> Path:
    """``images/`` with a NIfTI a case, and ``index.csv``."""
    rng, found = np.random.default_rng(5), [row for site in sites for row in rows(site)]
    (folder / "images").mkdir(parents=True)
    for at, row in enumerate(found):
        made = voxels(rng, spot=row["label"] == "spot", slices=SLICES + at % 2)
        nibabel.Nifti1Image(made, np.diag([1.0, 1.0, 3.0, 1.0])).to_filename(folder / "images" / f"{row['id']}.nii.gz")
    table(folder / "index.csv", found)
    return folder


def pictures(folder: Path, sites: Sequence[str], images: int = 11) -> Path:
    """``cases/NAME/`` with pictures 1 to ``images``, and ``index.csv``."""
    rng, found = np.random.default_rng(6), [row for site in sites for row in rows(site)]
    for row in found:
        (folder / "cases" / row["id"]).mkdir(parents=True)
        made = voxels(rng, spot=row["label"] == "spot", slices=images)
        for at in range(images):
            Image.fromarray(made[..., at]).save(folder / "cases" / row["id"] / f"view-{at + 1}.png")
    table(folder / "index.csv", found)
    return folder


def recipe(backbone: Path, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rounds": 2,
        "threads": 1,
        "backbone": {"name": str(backbone)},
        "adapter": {"kind": "head-only"},
        "task": {"kind": "case-classification", "head": "attention-mil"},
        "optimiser": {"learning_rate": 1e-2, "batch_size": 2},
        "data": {"class_names": ["plain", "spot"], "input_size": [28, 28], "views": 2, "augment": ["mirror"]},
    }
    return values | more
