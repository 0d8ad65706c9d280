"""What each hospital ends with, beside the model that it would have trained alone: the table of docs/personal.md.

    python benchmarks/personal.py                                  # all sets, seeds 0 1 2: hours on two cores
    python benchmarks/personal.py --sets brain-mri --seeds 0       # a part of it
    python benchmarks/personal.py --table                          # of what is finished in --output
    python benchmarks/personal.py --kind head-local                # with arrays that stay at the sites, to another file

With a kind the column "global" is of the global adapter with each site's own arrays.

Finished runs are left alone, a run that was stopped goes on; sets that are not asked for keep their rows.
``FEDVFM_DATA`` as for the experiments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedvfm import seeding
from fedvfm.report import bootstrap
from fedvfm.simulation import experiment, run, run_folder
from fedvfm.simulation.results import compare, statistics
from fedvfm.state import groups

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "simulations" / "results" / "personal.json"
SETS = {
    "brain-mri": ("brain-mri", ['baselines=["local-only", "pooled"]']),
    "nuclei": ("nuclei", ['baselines=["local-only", "pooled"]']),
    "cells": ("cells", ["partition.alpha=0.1", 'baselines=["local-only", "pooled"]']),
    # A quarter of the slices in place of a half, and 16 rounds in place of 60; a seed deals the cases, too.
    "hippocampus": (
        "sam-hippocampus",
        [
            *("data.options.every=4", "data.options.seed={seed}", "recipe.rounds=16"),
            'baselines=["local-only", "pooled"]',
        ],
    ),
}
ARMS = ("federated", "personal", "local-only", "pooled")


def train(name: str, seed: int, folder: Path, kind: str) -> None:
    """One run, from wherever it is."""
    place = run_folder.RunFolder(folder)
    if place.finished:
        return
    if place.begun:
        run.resume(folder)
        return
    what, sets = SETS[name]
    sets = [each.format(seed=seed) for each in sets]
    own = [] if kind == groups.NONE else [f'recipe.personal.kind="{kind}"']
    if kind == groups.DUAL:
        own.append(f"recipe.adapter.options={{personal={experiment.load(what, sets).recipe.adapter.rank}}}")
    run.simulate(experiment.load(what, [*sets, *own, f"recipe.seed={seed}"]), output=folder)


def table(name: str, folders: Sequence[Path]) -> dict[str, Any] | None:
    """Means over seeds and paired intervals of one set, None where no seed is finished."""
    places = [run_folder.RunFolder(folder) for folder in folders]
    finished = [place for place in places if place.finished]
    summaries = [json.loads(place.summary.read_text(encoding="utf-8")) for place in finished]
    if not finished:
        return None
    scores = [compare.scores(place, made) for place, made in zip(finished, summaries, strict=True)]
    sites = sorted({site for made in summaries for site in made["benefit"]["sites"]})
    return {
        "seeds": [made["seed"] for made in summaries],
        "sites": {site: _site(site, summaries, scores) for site in sites},
        "macro": {
            arm: _mean([made["arms"][arm]["macro"] for made in summaries if arm in made["arms"]]) for arm in ARMS
        },
        "minus_local_only": {
            arm: _macro([own[arm] for own in scores], [own[compare.LOCAL] for own in scores])
            for arm in ("personal", "federated")
        },
    }


def _site(
    site: str, summaries: Sequence[dict[str, Any]], scores: Sequence[dict[str, statistics.Scores]]
) -> dict[str, Any]:
    rows = [made["benefit"]["sites"][site] for made in summaries if site in made["benefit"]["sites"]]
    own = [one for one in scores if site in one["personal"].sites and site in one[compare.LOCAL].sites]
    gap = bootstrap.difference(
        [one["personal"].at(site) for one in own],
        [one[compare.LOCAL].at(site) for one in own],
        rng=seeding.stream(0, "benchmark", site),
    )
    return {
        **{key: _mean([row[key] for row in rows]) for key in ("global", "personal", "chosen", "local_only")},
        "choices": [row["choice"] for row in rows],
        "difference": {"mean": gap.mean, "low": gap.low, "high": gap.high, "no_interval": gap.reason},
        "units": gap.units,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _macro(first: Sequence[statistics.Scores], second: Sequence[statistics.Scores]) -> dict[str, Any] | None:
    gap = compare.difference(first, second)
    return None if gap is None else {"mean": gap[0].mean, "low": gap[0].low, "high": gap[0].high}


def lines(name: str, row: dict[str, Any]) -> list[str]:
    """One set as Markdown."""
    head = f"**{name}**, seeds {', '.join(map(str, row['seeds']))}"
    rows = [
        head,
        "",
        "| site | global | personal | as chosen | local-only | chosen minus local-only | chosen by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for site, one in row["sites"].items():
        values = " | ".join(f"{one[key]:.3f}" for key in ("global", "personal", "chosen", "local_only"))
        rows.append(f"| {site} | {values} | {_shown(one['difference'])} | {', '.join(one['choices'])} |")
    macro, minus = row["macro"], row["minus_local_only"]
    pooled = "" if macro["pooled"] is None else f"; pooled {macro['pooled']:.3f}"
    rows += [
        "",
        f"Macro: global {macro['federated']:.3f}, as chosen {macro['personal']:.3f}, local-only "
        f"{macro['local-only']:.3f}{pooled}. Chosen minus local-only {_shown(minus['personal'])}, "
        f"global minus local-only {_shown(minus['federated'])}.",
        "",
    ]
    return rows


def _shown(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return ""
    return f"{gap['mean']:+.3f}" + ("" if gap["low"] is None else f" ({gap['low']:+.3f} to {gap['high']:+.3f})")


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/personal"))
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS.name}, or personal-KIND.json beside it")
    parser.add_argument("--kind", default=groups.NONE, choices=list(groups.KINDS), help="of recipe.personal")
    parser.add_argument("--table", action="store_true", help="train nothing")
    asked = parser.parse_args()
    plain = asked.kind == groups.NONE
    results = asked.results or (RESULTS if plain else RESULTS.with_name(f"personal-{asked.kind}.json"))
    root = asked.output if plain else asked.output / asked.kind
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    for name in asked.sets:
        folders = [root / name / f"seed-{seed}" for seed in asked.seeds]
        for seed, folder in zip(asked.seeds, folders, strict=True):
            if not asked.table:
                train(name, seed, folder, asked.kind)
        row = table(name, folders)
        if row is not None:
            found[name] = row
            print("\n".join(lines(name, row)), flush=True)
            results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
