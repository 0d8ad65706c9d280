"""Boxes of nuclei: federated against pooled and each site alone, one seed.

    python benchmarks/detection.py [--output runs/detection] [--rounds N]

Two natural sources of microscopy (``nuclei`` data, ``FEDVFM_DATA``), cultured cells in fluorescence and stained tissue;
masks of instances, whose touching nuclei are drawn apart. Small, so that it takes two processor minutes: 16 training
images a site, and of DINOv2-small the head ``boxes`` alone trains. Needs ``fedvfm weights fetch
dinov2-small-imgfocus``. Scores are the mean over the sites, each by its own test images, and of local-only at home.
Stopped at any moment it goes on where it was. Prints a table and writes ``simulations/results/detection.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from fedvfm.simulation import run
from fedvfm.storage import storage

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "simulations" / "results" / "detection.json"
SHOWN = ("f1", "map50", "map10", "cpm")
SITES, TEST = ("fluo256", "purple320"), 12


def experiment(rounds: int) -> dict[str, Any]:
    """The experiment's values."""
    return {
        "name": "detection",
        "note": "cultured cells and tissue sections, no patients; sources inferred from image size and colour",
        "baselines": ["local-only", "pooled"],
        "personal": {"enabled": False},
        "cache_mib": 2048,
        "data": {"source": "nuclei", "options": {"instances": True}},
        "partition": {"kind": "natural", "include": list(SITES), "train": 16, "val": 2, "test": TEST},
        "recipe": {
            "rounds": rounds,
            "threads": 1,
            "backbone": {"name": "dinov2-small-imgfocus"},
            "adapter": {"kind": "head-only"},
            "task": {"kind": "detection"},
            "data": {
                "class_names": ["background", "nucleus"],
                "modality": "microscopy",
                "input_size": [252, 252],
                "fit": "native",
                "views": 2,
                "intensity": "polarity",
                "augment": ["flip", "rot90"],
            },
            "optimiser": {"learning_rate": 5e-3, "batch_size": 2, "local_epochs": 5},
            "evaluation": {"every": 0},
        },
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/detection"))
    parser.add_argument("--rounds", type=int, default=4)
    chosen = parser.parse_args()
    known = chosen.output.exists()
    done = run.resume(chosen.output) if known else run.simulate(experiment(chosen.rounds), output=chosen.output)
    made = json.loads((done.path / "summary.json").read_text(encoding="utf-8"))
    rows: dict[str, Any] = {
        arm: {
            **{name: round(mean(site[name] for site in part["sites"].values()), 4) for name in SHOWN},
            "sites": {site: {name: round(row[name], 4) for name in SHOWN} for site, row in part["sites"].items()},
        }
        for arm, part in made["arms"].items()
    }
    print("| arm | F1 | mAP50 | mAP10 | CPM |\n|---|---|---|---|---|")
    for arm, row in rows.items():
        print(f"| {arm} | {' | '.join(f'{row[name]:.3f}' for name in SHOWN)} |")
    shown = {"rounds": made["rounds"], "seed": made["seed"], "test_images_a_site": TEST, "arms": rows}
    storage.write_text(RESULT, json.dumps(shown, indent=2) + "\n")


if __name__ == "__main__":
    main()
