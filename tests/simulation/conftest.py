"""Finished runs of a tiny random DINOv2 on drawn images, made once by the real ``simulate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm.simulation import run
from tests.simulation import drawn_cases

SITES = ("east", "north", "west")
SPLITS = ("train",) * 4 + ("val",) * 2 + ("test",) * 4


@dataclass(frozen=True)
class Tiny:
    """Where tiny data and tiny weights lie, and the experiment on them."""

    data: Path
    values: dict[str, Any]


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A noisy grey image (60, 56) with one bright box, and the box as mask of 0 and 1."""
    mask = np.zeros((60, 56), dtype=np.uint8)
    top, left = rng.integers(4, 34, 2)
    mask[top : top + 18, left : left + 16] = 1
    grey = 60 * rng.random(mask.shape) + 150 * mask
    return grey.astype(np.uint8), mask


def _recipe(dino: Path, **more: Any) -> dict[str, Any]:
    return {
        "rounds": 2,
        "threads": 1,
        "backbone": {"name": str(dino)},
        "adapter": {"rank": 2, "layers": [2, 3]},
        "optimiser": {"learning_rate": 1e-2},
        **more,
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_dino: Path) -> Tiny:
    """Segmentation at three sites, two images a patient."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(7)
    drawn_cases.pairs(
        folder,
        (
            ({"id": f"{site}-{at}", "patient": f"{site} {at // 2}", "site": site, "split": split}, *_draw(rng))
            for site in SITES
            for at, split in enumerate(SPLITS)
        ),
    )
    contract = {"class_names": ["background", "box"], "input_size": [56, 56]}
    values = {
        "name": "tiny",
        "title": "Boxes <tiny> & drawn",
        "note": "drawn boxes, no patient claim",
        "baselines": ["local-only", "pooled", "classical"],
        "workers": 1,  # in this process, whose child that decodes serves all tests; each worker would start its own
        "data": {"source": "folder", "path": str(folder)},
        "recipe": _recipe(tiny_dino, data=contract),
    }
    return Tiny(folder, values)


@pytest.fixture(scope="session")
def tiny_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished segmentation run: seed 0, local-only, pooled and classical beside federated, workers as by default."""
    return run.simulate({**tiny.values, "workers": "auto"}, output=tmp_path_factory.mktemp("runs") / "tiny").path


@pytest.fixture(scope="session")
def tiny_seeds(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent folder of two finished runs that differ in their seed alone, federated only."""
    parent = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        values = {**tiny.values, "baselines": [], "recipe": {**tiny.values["recipe"], "seed": seed}}
        run.simulate(values, output=parent / f"seed-{seed}")
    return parent


@pytest.fixture(scope="session")
def tiny_classes(tmp_path_factory: pytest.TempPathFactory, tiny_dino: Path) -> Path:
    """A finished classification run of one round, without validation: two sites, federated and pooled."""
    folder = tmp_path_factory.mktemp("classes")
    rng, rows = np.random.default_rng(8), []
    for site in SITES[:2]:
        for kind in ("box", "empty"):
            (folder / kind).mkdir(exist_ok=True)
            for at, split in enumerate(("train", "train", "train", "test", "test", "test")):
                image, mask = _draw(rng)
                name = f"{site}-{at}"
                shown = image if kind == "box" else np.where(mask == 1, 30, image).astype(np.uint8)
                Image.fromarray(shown).save(folder / kind / f"{name}.png")
                rows.append({"id": f"{kind}/{name}", "site": site, "split": split})
    drawn_cases.table(folder / "index.csv", rows)
    values = {
        "name": "tiny-classes",
        "baselines": ["pooled"],
        "data": {"source": "folder", "path": str(folder)},
        "partition": {"val_share": 0.0},
        "recipe": _recipe(
            tiny_dino,
            rounds=1,
            task={"kind": "classification"},
            data={"class_names": ["box", "empty"], "input_size": [56, 56]},
        ),
    }
    return run.simulate(values, output=tmp_path_factory.mktemp("runs") / "classes").path
