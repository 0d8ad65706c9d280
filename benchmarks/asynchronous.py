"""Rounds that wait for a slow hospital, buffered rounds, and rounds without it: Dice at equal counted time.

    python benchmarks/asynchronous.py                        # the drawn set, seeds 0 1 2: minutes
    python benchmarks/asynchronous.py --sets brain-mri       # real slices of one brain: an hour and more on two cores
    python benchmarks/asynchronous.py --table                # of what is finished in --output

Four hospitals, of which one trains four times as long as the others. A round that waits for all lasts 4, one without
the slow hospital 1. With ``buffer_size = 3`` a round ends with the first three updates; the last one waits for all, so
that a run of R rounds ends between R and R + 3. Each arm has as many rounds as fit in the time; the learning rate falls
over its own rounds. All arms are tested at all hospitals. ``--write`` puts the tables into
``simulations/results/asynchronous.json``; finished runs are left alone, a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import unlabelled

from fedvfm.simulation import experiment, run, run_folder
from fedvfm.simulation.results import compare
from fedvfm.storage import hash_chain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "simulations" / "results" / "asynchronous.json"
ARMS = ("waits", "buffered", "without")
TIME = 4.0
"""How long the slow hospital trains; the others 1."""
SIZE = 3
SITES = {"drawn": ["cedar", "elm", "fir", "oak"], "brain-mri": ["east", "north", "south", "west"]}
"""Set -> its hospitals, the slow one last."""
TIMES = {"drawn": [12, 24], "brain-mri": [12, 24]}


def rounds_of(arm: str, time: int) -> int:
    """How many rounds fit in a time."""
    return {"waits": int(time / TIME), "buffered": time - int(TIME) + 1, "without": time}[arm]


def values_of(name: str, arm: str, time: int, seed: int, root: Path) -> dict[str, Any]:
    """The experiment of a set, in one of the arms."""
    values = unlabelled.drawn(root) if name == "drawn" else experiment.read(name)[0]
    recipe = {**values["recipe"], "seed": seed, "rounds": rounds_of(arm, time)}
    recipe["evaluation"] = {"every": 0, "surface": False}
    partition = {**values.get("partition", {}), "include": SITES[name]}
    values = {**values, "name": f"asynchronous-{name}", "baselines": [], "recipe": recipe, "partition": partition}
    slow = SITES[name][-1]
    if arm == "buffered":
        recipe["asynchronous"] = {"buffer_size": SIZE}
        values["site_times"] = {slow: TIME}
    elif arm == "without":
        values["attack"] = {"kind": "absent", "sites": [slow]}
    return values


def place_of(name: str, arm: str, time: int, seed: int, root: Path) -> run_folder.RunFolder:
    """The run's folder."""
    return run_folder.RunFolder(root / name / f"{arm}-{time}-{seed}")


def train(name: str, arm: str, time: int, seed: int, root: Path) -> None:
    """One run, from wherever it is."""
    place = place_of(name, arm, time, seed, root)
    if place.finished:
        return
    if place.begun:
        run.resume(place.path)
        return
    run.simulate(values_of(name, arm, time, seed, root), output=place.path)


def clock_of(arm: str, place: run_folder.RunFolder) -> float:
    """The counted time at the end of a run."""
    lines = hash_chain.read(place.path / "journal.jsonl")
    return float(lines[-1]["clock"]) if arm == "buffered" else len(lines) * (TIME if arm == "waits" else 1.0)


def folds_of(place: run_folder.RunFolder, site: str) -> int:
    """How many updates of a site were folded in."""
    return sum(site in line["examples"] for line in hash_chain.read(place.path / "journal.jsonl"))


def table(name: str, time: int, seeds: Sequence[int], root: Path) -> dict[str, Any] | None:
    """Macro of each arm and Dice at the slow hospital, and paired differences; None where no seed is finished."""
    slow, used = SITES[name][-1], []
    scores: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    rows: dict[str, dict[str, list[float]]] = {
        arm: {"macro": [], "slow": [], "clock": [], "updates of the slow one": []} for arm in ARMS
    }
    for seed in seeds:
        places = {arm: place_of(name, arm, time, seed, root) for arm in ARMS}
        if not all(place.finished for place in places.values()):
            continue
        used.append(seed)
        for arm, place in places.items():
            summary = json.loads(place.summary.read_text(encoding="utf-8"))
            scores[arm].append(compare.scores(place, summary)[compare.FEDERATED])
            row, tested = rows[arm], json.loads((place.path / "evaluation.json").read_text(encoding="utf-8"))
            row["macro"].append(summary["arms"]["federated"]["macro"])
            row["slow"].append(tested["last"]["sites"][slow]["dice"])
            row["clock"].append(clock_of(arm, place))
            row["updates of the slow one"].append(folds_of(place, slow))
    if not used:
        return None
    gaps = {}
    for first, second in (("buffered", "waits"), ("buffered", "without")):
        gap = compare.difference(scores[first], scores[second])
        gaps[f"{first} minus {second}"] = (
            None if gap is None else {"mean": gap[0].mean, "low": gap[0].low, "high": gap[0].high}
        )
    rounds = {arm: rounds_of(arm, time) for arm in ARMS}
    return {"seeds": used, "slow": slow, "rounds": rounds, "arms": rows, "differences": gaps}


def lines_of(name: str, time: int, row: dict[str, Any]) -> list[str]:
    """One set and time as Markdown."""
    shown = [f"**{name}**, time {time}, seeds {', '.join(map(str, row['seeds']))}; slow: {row['slow']}", ""]
    shown += [
        "| rounds | number | ends at | updates of the slow one | macro | at the slow one |",
        "|---|---|---|---|---|---|",
    ]
    for arm, own in row["arms"].items():
        mean = {key: sum(values) / len(values) for key, values in own.items()}
        shown.append(
            f"| {arm} | {row['rounds'][arm]} | {mean['clock']:g} | {mean['updates of the slow one']:g} | "
            f"{mean['macro']:.3f} | {mean['slow']:.3f} |"
        )
    for what, gap in row["differences"].items():
        if gap is not None:
            bounds = "" if gap["low"] is None else f" ({gap['low']:+.3f} to {gap['high']:+.3f})"
            shown.append(f"\n{what}: {gap['mean']:+.3f}{bounds}")
    return [*shown, ""]


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["drawn"], choices=list(SITES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/asynchronous"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    asked = parser.parse_args()
    tables: dict[str, Any] = {}
    for name in asked.sets:
        for time in TIMES[name]:
            for seed in asked.seeds:
                for arm in ARMS:
                    if not asked.table:
                        train(name, arm, time, seed, asked.output)
            row = table(name, time, asked.seeds, asked.output)
            if row is not None:
                tables.setdefault(name, {})[str(time)] = row
                print("\n".join(lines_of(name, time, row)), flush=True)
    if asked.write and tables:
        RESULTS.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
