"""What hospitals without labels add: macro of a federation without them, with them, and with labels everywhere.

    python benchmarks/unlabelled.py                              # the drawn set, seeds 0 1 2: minutes
    python benchmarks/unlabelled.py --sets brain-mri cells       # real images: an hour and more on two cores
    python benchmarks/unlabelled.py --table                      # of what is finished in --output
    python benchmarks/unlabelled.py --set recipe.unlabelled.threshold=0.7 --output runs/sure

All arms are tested at all hospitals, so macro is over those with labels and those without. "Without" leaves the latter
out of the rounds. ``--write`` puts the tables into ``simulations/results/unlabelled.json``; finished runs are left
alone, a run that was stopped goes on. ``FEDVFM_DATA`` as for the experiments.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedvfm import seeding
from fedvfm.simulation import experiment, run, run_folder
from fedvfm.simulation.results import compare

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "simulations" / "results" / "unlabelled.json"
ARMS = ("without", "unlabelled", "labelled")
SIDE = 32
SITES = {"ash": 6, "birch": 6, "cedar": 24, "elm": 24, "fir": 24, "oak": 24}
"""Hospitals of the drawn set, and their training images."""
BARE = {
    "drawn": ["cedar", "elm", "fir", "oak"],
    "brain-mri": ["north", "south", "west"],
    "cells": ["hospital-3", "hospital-4"],
}
"""Set -> hospitals whose labels are hidden."""
SETTINGS = {"threshold": 0.8, "weight": 0.1}


def draw(folder: Path) -> None:
    """Discs on a textured ground, seen by a scanner for each hospital: 12 test images each, SITES says of training."""
    rows: list[dict[str, str]] = []
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows_of, columns_of = np.mgrid[:SIDE, :SIDE]
    for place, (site, count) in enumerate(SITES.items()):
        for at in range(count + 12):
            rng = seeding.stream(0, "drawn hospital", site, at)
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            for _ in range(int(rng.integers(1, 4))):
                row, column, radius = (*rng.uniform(6, SIDE - 6, 2), rng.uniform(3, 6))
                mask |= (rows_of - row) ** 2 + (columns_of - column) ** 2 < radius**2
            ground = 0.35 + 0.1 * rng.standard_normal((SIDE, SIDE)) + 0.1 * np.sin(columns_of / 3 + rng.uniform(0, 6))
            seen = np.clip(ground + (0.28 - 0.02 * place) * mask, 0, 1) ** (0.7 + 0.2 * place)
            Image.fromarray((255 * seen).astype(np.uint8)).save(folder / "images" / f"{site}-{at}.png")
            Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{site}-{at}.png")
            split = "train" if at < count else "test"
            rows.append({"id": f"{site}-{at}", "patient": f"{site} {at}", "site": site, "split": split})
    with (folder / "patients.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def drawn(root: Path) -> dict[str, Any]:
    """The experiment of the drawn set."""
    if not (root / "drawn-data" / "patients.csv").exists():
        draw(root / "drawn-data")
    return {
        "name": "unlabelled-drawn",
        "data": {"source": "folder", "path": str(root / "drawn-data")},
        "recipe": {
            "rounds": 12,
            "precision": "float32",
            "backbone": {"name": "unet", "options": {"channels": [8, 16]}},
            "adapter": {"kind": "full"},
            "optimiser": {"learning_rate": 0.005, "local_epochs": 2, "batch_size": 4},
            "evaluation": {"every": 0, "surface": False},
            "data": {
                "class_names": ["ground", "disc"],
                "input_size": [SIDE, SIDE],
                "augment": ["flip", "rot90", "intensity", "noise"],
            },
        },
    }


def values_of(name: str, arm: str, seed: int, root: Path) -> dict[str, Any]:
    """The experiment of a set, in one of the arms."""
    values = drawn(root) if name == "drawn" else experiment.read(name)[0]
    recipe = {**values["recipe"], "seed": seed}
    values = {**values, "baselines": [], "recipe": recipe}
    bare = BARE[name]
    if arm == "without":
        values["attack"] = {"kind": "absent", "sites": bare}
    elif arm == "unlabelled":
        values["partition"] = {**values.get("partition", {}), "unlabelled": bare}
        recipe["unlabelled"] = {**SETTINGS, "warmup_rounds": recipe["rounds"] // 3}
    return values


def train(name: str, arm: str, seed: int, root: Path, sets: Sequence[str]) -> None:
    """One run, from wherever it is."""
    folder = root / name / f"{arm}-{seed}"
    place = run_folder.RunFolder(folder)
    if place.finished:
        return
    if place.begun:
        run.resume(folder)
        return
    from fedvfm.config import overrides

    own = sets if arm == "unlabelled" else ()
    run.simulate(overrides.apply(values_of(name, arm, seed, root), own), output=folder)


def table(name: str, seeds: Sequence[int], root: Path) -> dict[str, Any] | None:
    """Macro of each arm, and paired differences over seeds and samples; None where a run is missing."""
    scores: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    macro: dict[str, list[float]] = {arm: [] for arm in ARMS}
    used = []
    for seed in seeds:
        places = {arm: run_folder.RunFolder(root / name / f"{arm}-{seed}") for arm in ARMS}
        if not all(place.finished for place in places.values()):
            continue
        used.append(seed)
        for arm, place in places.items():
            made = json.loads(place.summary.read_text(encoding="utf-8"))
            scores[arm].append(compare.scores(place, made)[compare.FEDERATED])
            macro[arm].append(made["arms"]["federated"]["macro"])
    if not used:
        return None
    gaps = {}
    for first, second in (("unlabelled", "without"), ("labelled", "unlabelled"), ("labelled", "without")):
        gap = compare.difference(scores[first], scores[second])
        gaps[f"{first} minus {second}"] = (
            None if gap is None else {"mean": gap[0].mean, "low": gap[0].low, "high": gap[0].high}
        )
    return {"seeds": used, "bare": BARE[name], "macro": macro, "differences": gaps}


def lines(name: str, row: dict[str, Any]) -> list[str]:
    """One set as Markdown."""
    shown = [f"**{name}**, seeds {', '.join(map(str, row['seeds']))}; no labels at {', '.join(row['bare'])}", ""]
    shown += ["| federation | macro | by seed |", "|---|---|---|"]
    for arm, values in row["macro"].items():
        mean = sum(values) / len(values)
        shown.append(f"| {arm} | {mean:.3f} | {', '.join(f'{value:.3f}' for value in values)} |")
    for what, gap in row["differences"].items():
        if gap is not None:
            bounds = "" if gap["low"] is None else f" ({gap['low']:+.3f} to {gap['high']:+.3f})"
            shown.append(f"\n{what}: {gap['mean']:+.3f}{bounds}")
    return [*shown, ""]


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["drawn"], choices=list(BARE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="changes", action="append", default=[], help="KEY=VALUE of the arm 'unlabelled'")
    parser.add_argument("--output", type=Path, default=Path("runs/unlabelled"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    asked = parser.parse_args()
    tables = {}
    for name in asked.sets:
        for seed in asked.seeds:
            for arm in ARMS:
                if not asked.table:
                    train(name, arm, seed, asked.output, asked.changes)
        row = table(name, asked.seeds, asked.output)
        if row is not None:
            tables[name] = row
            print("\n".join(lines(name, row)), flush=True)
    if asked.write and tables:
        RESULTS.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
