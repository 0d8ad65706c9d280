"""Answers for cases of many images: federated against pooled, and heads against each other, over seeds.

    python benchmarks/cases.py [cells lesions lesions-people] [--seeds 0 1 2] [--heads mst vote] [--rounds N]

``cells``: the crops of a blood smear are one case; does it hold a platelet? Six virtual hospitals, frozen DINOv2; heads
``attention-mil`` and ``mean``. Needs the cells data (``FEDVFM_DATA``).

``lesions``: volumes of 40 slices made of one real T1 (``brain-mri``), each turned, moved, mirrored and with noise of
its own; half of them hold one disc, brighter than all tissue, on one slice. Drawn lesions in one average brain: no
patient claim. Four virtual hospitals with drawn scanners; head ``mst``, and task ``classification`` on the slices,
whose probabilities are averaged: a vote. ``lesions-people``: the same in the volumes of ``hippocampus``, each of a real
person, twice without a disc and twice with one that is twice as bright as the brightest tissue, turned and moved
otherwise each time. All images of a person are seen by that person's hospital alone.

All need ``fedvfm weights fetch dinov2-small-imgfocus``. AUROC is the mean over the hospitals, each by its own test
cases. Stopped at any moment it goes on where it was. Prints a table and writes ``simulations/results/cases.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedvfm.data.sources import brain_mri, index
from fedvfm.storage import storage

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "simulations" / "results" / "cases.json"
CASES, PAIRS, SLICES, RADIUS = 480, 2, 40, (14.0, 20.0)
TISSUE, TISSUE_OF_PEOPLE, LESION = 0.7, 0.5, 1.0
"""Brightest tissue of the one brain and of the many, and lesion. Where anatomies differ a frozen backbone needs more to
tell a lesion from them: with .7 the head `mst` learned nothing of 398 volumes."""
HEADS = {"cells": ("attention-mil", "mean"), "lesions": ("mst", "vote"), "lesions-people": ("mst", "vote")}
ROUNDS, VOTES = {"cells": 10, "lesions": 24, "lesions-people": 24}, 12


def table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """A CSV with the columns of the first row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def smears(folder: Path) -> None:
    """The cells of each slide as one case: with a platelet, or without."""
    source = index.by_name("cells")
    with (source / "index.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    held = {row["slide"] for row in rows if row["label"] == "platelet"}
    (folder / "images").mkdir(parents=True)
    for row in rows:
        shutil.copyfile(source / "images" / f"{row['id']}.png", folder / "images" / f"{row['id']}.png")
    made = [
        {
            "id": row["id"],
            "case": row["slide"],
            "patient": row["slide"],
            "label": "platelet" if row["slide"] in held else "none",
        }
        for row in rows
    ]
    table(folder / "index.csv", made)


def volume(rng: np.random.Generator, base: NDArray[np.float32], *, lesion: bool) -> NDArray[np.uint8]:
    """One case. Shapes: base (slices, rows, columns) in [0, 1] -> (columns, rows, slices)."""
    scale = base.shape[1] / brain_mri.SIZE
    angle, shift = rng.uniform(-8, 8), scale * rng.uniform(-6, 6, 2)
    mirrored = bool(rng.integers(2))
    made = []
    gamma, at = rng.uniform(0.85, 1.2), int(rng.integers(5, len(base) - 5))
    for number, slice_ in enumerate(base):
        image = ndimage.rotate(slice_, angle, reshape=False, order=1)
        image = ndimage.shift(image, shift, order=1)
        image = image[:, ::-1] if mirrored else image
        image = image**gamma
        if lesion and number == at:
            tissue = np.argwhere(ndimage.binary_erosion(image > 0.25, iterations=max(1, round(6 * scale))))
            centre = tissue[int(rng.integers(len(tissue)))]
            y, x = np.mgrid[: image.shape[0], : image.shape[1]]
            distance = np.hypot(y - centre[0], x - centre[1])
            share = 1 / (1 + np.exp(distance - scale * rng.uniform(*RADIUS)))
            image = image * (1 - share) + LESION * share
        made.append(image + rng.normal(0, 0.02, image.shape))
    stored = (255 * np.clip(np.stack(made), 0, 1)).astype(np.uint8)
    return np.ascontiguousarray(stored.transpose(2, 1, 0)[:, ::-1])


def brains() -> Iterator[tuple[str, NDArray[np.float32], bool]]:
    """Patient, slices of (rows, columns) from 0 to the brightest tissue, and whether a lesion comes in: one brain."""
    whole = brain_mri.load(brain_mri._folder())[0]
    base = TISSUE * whole[25 : 25 + 3 * SLICES : 3].astype(np.float32) / 255
    for number in range(CASES):
        yield f"case-{number:03d}", base, bool(number % 2)


def people() -> Iterator[tuple[str, NDArray[np.float32], bool]]:
    """The same of real people: all axial slices around a hippocampus, as often without a lesion as with one."""
    for file in sorted((index.by_name("hippocampus") / "images").glob("*.nii.gz")):
        values = np.asanyarray(nibabel.load(file).dataobj).astype(np.float32).transpose(2, 1, 0)[:, ::-1]
        low, high = np.percentile(values, (0.5, 99.5))
        base = TISSUE_OF_PEOPLE * np.clip((values - low) / (high - low), 0, 1)
        for number in range(2 * PAIRS):
            yield file.name.removesuffix(".nii.gz"), base, bool(number % 2)


def lesions(folder: Path, bases: Iterator[tuple[str, NDArray[np.float32], bool]]) -> None:
    """Volumes of these slices."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, (patient, base, lesion) in enumerate(bases):
        rng, name = np.random.default_rng([18, number]), f"case-{number:03d}"
        made = nibabel.Nifti1Image(volume(rng, base, lesion=lesion), np.diag([-1.0, 1.0, 3.0, 1.0]))
        made.to_filename(folder / "images" / f"{name}.nii.gz")
        rows.append({"id": name, "label": "lesion" if lesion else "none", "patient": patient})
    table(folder / "index.csv", rows)


MAKE: Mapping[str, Callable[[Path], None]] = {
    "cells": smears,
    "lesions": lambda folder: lesions(folder, brains()),
    "lesions-people": lambda folder: lesions(folder, people()),
}


def experiment(name: str, head: str, data: Path, seed: int, rounds: int) -> dict[str, Any]:
    """An experiment's values."""
    cells = name == "cells"
    task: dict[str, Any] = {"kind": "case-classification", "head": head, "options": {"sampling": "balanced"}}
    if head == "vote":
        task = {"kind": "classification", "options": {"sampling": "balanced"}}
    contract = {
        "class_names": ["none", "platelet"] if cells else ["lesion", "none"],
        "input_size": [112, 112],
        "views": 1,
        "augment": [],
    }
    return {
        "name": f"{name}-{head}",
        "note": "no clinical claim",
        "baselines": ["pooled", "local-only", "classical"] if cells else [] if head == "vote" else ["pooled"],
        "data": {"source": "folder", "path": str(data)},
        "partition": {
            "kind": "iid" if cells else "appearance",
            "sites": 6 if cells else 4,
            "val_share": 0.1,
            "test_share": 0.35,
            **({} if cells else {"options": {"strength": 0.25}}),
        },
        "recipe": {
            "rounds": rounds,
            "seed": seed,
            "threads": 1,
            "backbone": {"name": "dinov2-small-imgfocus"},
            "adapter": {"kind": "head-only"},
            "task": task,
            "data": contract,
            "optimiser": {
                "learning_rate": 1e-3,
                "batch_size": 32 if head == "vote" else 8,
                "local_epochs": 1 if head == "vote" else 4,
            },
            **({} if cells else {"aggregation": {"server_momentum": 0.6}}),
            "evaluation": {"every": 0},
        },
    }


def train(place: Path, values: dict[str, Any]) -> None:
    """Run or resume one."""
    if (place / "summary.json").exists():
        return
    if (place / "experiment.json").exists():
        arguments = ["--resume", str(place)]
    else:
        file = place.with_suffix(".toml")
        storage.write_text(file, toml(values))
        arguments = [str(file), "--output", str(place)]
    subprocess.run([sys.executable, "-m", "fedvfm.cli", "simulate", *arguments, "--workers", "1"], check=True)


def toml(values: dict[str, Any], where: str = "") -> str:
    """A TOML text of nested tables."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    tables = [toml(value, f"{where}{key}.") for key, value in values.items() if isinstance(value, dict)]
    head = [f"\n[{where[:-1]}]"] if where else []
    return "\n".join([*head, *plain, *tables]) + "\n"


def areas(place: Path) -> dict[str, float]:
    """AUROC of each arm: the mean over hospitals, and of local-only models at home."""
    found = {}
    for arm in json.loads((place / "summary.json").read_text())["arms"].items():
        rows = [row["auroc"] for row in arm[1].get("sites", {}).values() if "auroc" in row]
        if rows:
            found[arm[0]] = mean(rows)
    return found


def main() -> None:
    """Run what is asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/cases"))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--heads", nargs="+", default=[])
    chosen = parser.parse_args()
    output = chosen.output.absolute()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in chosen.names or list(HEADS):
        data = output / f"{name}-data"
        if not (data / "index.csv").exists():
            shutil.rmtree(data, ignore_errors=True)
            MAKE[name](data)
        heads = result.setdefault(name, {})
        for head in chosen.heads or HEADS[name]:
            rounds = chosen.rounds or (VOTES if head == "vote" else ROUNDS[name])
            rows = []
            for seed in chosen.seeds:
                place = output / f"{name}-{head}-{seed}"
                train(place, experiment(name, head, data, seed, rounds))
                rows.append(areas(place))
            shown = {arm: [round(row[arm], 4) for row in rows if arm in row] for arm in rows[0]}
            auroc = {arm: {"mean": round(mean(v), 4), "seeds": v} for arm, v in shown.items()}
            heads[head] = {"rounds": rounds, "seeds": chosen.seeds, "auroc": auroc}
            for arm, values in auroc.items():
                print(f"{name:8} {head:14} {arm:12} {values['mean']:.3f}  {values['seeds']}", flush=True)
            storage.write_text(RESULT, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
