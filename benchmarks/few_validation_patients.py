"""What the choice at a site loses where one, two or three patients validate, from test values of finished runs.

    python benchmarks/few_validation_patients.py runs/personal/brain-mri/seed-0 ...

Of every site with at least four test units, each set of so many of them (60 drawn ones where there are more) chooses
among the adapter that was trained on, the global one and the site's own, and the other units judge. ``blind`` is the
rule without its guard; a guard of 0.05 is :data:`fedvfm.client.personal.choice.GUARD`. Units are patients; mixes were
not tested, so they are not among the candidates.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedvfm.client.personal import choice
from fedvfm.simulation import run_folder

RESULTS = Path(__file__).parent.parent / "simulations" / "results" / "few_validation_patients.json"
CANDIDATES = (choice.PERSONAL, choice.GLOBAL, choice.ALONE)
DRAWN = 60
BLIND = 2.0
"""As a guard: no difference of two values in [0, 1] is as large."""
HARM = 0.05

Cases = dict[str, list[choice.Case]]


def sites(folder: Path) -> list[tuple[str, Cases]]:
    """Of each site of a run the metric, and the test cases under each candidate, in one order."""
    run = run_folder.RunFolder(folder)
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    groups = (
        json.loads((folder / "groups.json").read_text(encoding="utf-8")) if (folder / "groups.json").exists() else {}
    )
    rows = []
    for name in summary["benefit"]["sites"]:
        parts = {
            choice.PERSONAL: (run.evaluation(f"personal/{name}") or {}).get("personal"),
            choice.GLOBAL: (run.evaluation("federated") or {}).get("last"),
            choice.ALONE: (run.evaluation(f"local-only/{name}") or {}).get("last"),
        }
        if not all(parts.values()):
            continue
        units = {sample: str(group) for sample, group in groups.get(name, {}).items()}
        rows.append(
            (summary["primary"], {key: cases(part, name, summary["primary"], units) for key, part in parts.items()})
        )
    return [(primary, seen) for primary, seen in rows if len({case.unit for case in seen[choice.GLOBAL]}) >= 4]


def cases(record: Any, site: str, primary: str, units: Mapping[str, str]) -> list[choice.Case]:
    """Of one adapter at one site; every class counts as often as it occurs, since few units show not all of them."""
    columns = record["samples"][site]
    rows = choice.cases(columns["id"], columns, primary, units)
    return [choice.Case(case.unit, case.value) for case in rows]


def of(seen: Cases, units: Sequence[str]) -> Cases:
    """The cases of these units."""
    return {name: [case for case in rows if case.unit in units] for name, rows in seen.items()}


def mean(rows: Sequence[choice.Case]) -> float:
    """Over units."""
    names = {case.unit for case in rows}
    return float(np.mean([np.mean([case.value for case in rows if case.unit == name]) for name in sorted(names)]))


def judged(seen: Cases, number: int) -> list[float]:
    """Of a site: value of the choice, its loss to the best, gain over the global adapter, share harmed, least gain.

    Harmed: more than :data:`HARM` below the global adapter.
    """
    units = sorted({case.unit for case in seen[choice.GLOBAL]})
    sets = list(itertools.combinations(units, number))
    if len(sets) > DRAWN:
        rng = np.random.default_rng(0)
        sets = [sets[at] for at in sorted(rng.choice(len(sets), DRAWN, replace=False))]
    rows = []
    for chosen_by in sets:
        name = choice.choose(of(seen, chosen_by)).name
        values = {key: mean(some) for key, some in of(seen, [unit for unit in units if unit not in chosen_by]).items()}
        gain = values[name] - values[choice.GLOBAL]
        rows.append((values[name], max(values.values()) - values[name], gain, float(gain < -HARM)))
    table = np.array(rows)
    return [*table.mean(axis=0), float(table[:, 2].min())]


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    everyone = [row for folder in asked.runs for row in sites(folder)]
    stated, found = choice.GUARD, []
    for metric in sorted({primary for primary, _ in everyone}):
        some = [seen for primary, seen in everyone if primary == metric]
        for number in (1, 2, 3):
            for guard in (BLIND, 0.1, 0.05, 0.02):
                choice.GUARD = guard
                values = np.array([judged(seen, number) for seen in some])
                row = {
                    "metric": metric,
                    "sites": len(some),
                    "validation_units": number,
                    "guard": None if guard == BLIND else guard,
                    **dict(zip(("chosen", "loss", "gain", "harmed"), values[:, :4].mean(axis=0).tolist(), strict=True)),
                    "least": float(values[:, 4].min()),
                }
                found.append(row)
                print(
                    f"| {metric} ({len(some)} sites) | {number} | {'blind' if guard == BLIND else guard} | "
                    f"{row['chosen']:.4f} | {row['loss']:.4f} | {row['harmed']:.3f} | {row['least']:+.3f} |"
                )
    choice.GUARD = stated
    asked.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
