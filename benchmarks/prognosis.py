"""Prognosis on simulated outcomes: how near federated training comes to the risk that the outcomes were drawn from.

    python benchmarks/sam_hippocampus.py run --arms unet3d --seeds 0
    python benchmarks/prognosis.py --adapter RUN/adapter [--train fluid] [--seeds 0 1 2] [--output runs/prognosis]
    python benchmarks/prognosis.py --target cox [--table-alone] [--output runs/prognosis]

Volumes are real T1 MR crops of hippocampi (Medical Segmentation Decathlon; ``FEDVFM_DATA``). Their outcomes are not
real: the hazard of a case is drawn to grow with one measure of its anatomy, by the set's own masks; times are
exponential, and follow-up ends at a drawn time. So the true risk is known, and no patient is spoken of. Each seed draws
outcomes of its own. Measures: ``fluid``, the share of dark voxels within 6 mm of the hippocampus (fluid takes the place
of what shrinks; radiologists rate it); ``length`` of the hippocampus' long axis; ``volume``.

Two recipes one after the other, at the six virtual hospitals of ``sam-hippocampus``. The first is a segmentation, a 3D
U-Net that learns from the masks of the hospitals' training cases; its final adapter draws masks of all cases (``fedvfm
predict``). What is measured by these is the table beside the images of the second, a prognosis: target ``survival``,
frozen DINOv2 (``fedvfm weights fetch dinov2-small-imgfocus``) on eight coronal slices, trained on the same training
cases and tested on all others, whose masks nothing reads but the drawing of outcomes. Baselines: pooled, the image
alone, the table alone. With ``--target cox`` it is Cox's partial likelihood inside each hospital, all of whose training
cases are in one step, with as many steps; there Cox's regression on frozen features is a baseline, too. With
``--table-alone`` the head sees the table only, and two slices stand for the images: federated and pooled, in minutes.

C-indices are Harrell's over the test cases of all hospitals together: of each arm, of what was measured by itself (as a
Cox model of it has), of a pooled Cox model of the three sides of the crops, whose size tells something of what they
were cut around, and of the true risk, as a Cox model of it has. Stopped at any moment it goes on with the run that was
stopped. Prints a table, and writes ``simulations/results/prognosis.json``, of other forms a file
of their own.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import cases
import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

import fedvfm
from fedvfm.data.sources import hippocampus, index
from fedvfm.simulation import run
from fedvfm.storage import storage
from fedvfm.tasks import survival_metrics

RESULTS = Path(__file__).parents[1] / "simulations" / "results"
SHOWN, NEAR, DRAWS = 8, 6.0, 100
"""Coronal slices of each volume that the prognosis sees; mm around the hippocampus; draws of outcomes without training.
"""
BINS = [6.0, 12.0, 18.0, 24.0, 36.0]
EFFECT, MEDIAN, LONGEST = 1.2, 18.0, 60.0
"""Log hazard a standard deviation; median time in months at the mean; longest follow-up."""

Numbers = NDArray[np.float64]


def fluid(image: Numbers, mask: NDArray[np.bool_], sides: Numbers) -> float:
    """Share of the dark voxels among those within :data:`NEAR` mm of the mask, without it.

    Dark is the lowest of three classes of grey, by Otsu's criterion over the whole crop: on T1 that is fluid.
    """
    near = (ndimage.distance_transform_edt(~mask, sampling=sides) <= NEAR) & ~mask
    low, high = np.percentile(image, [0.5, 99.5])
    values = np.clip((image - low) / (high - low), 0.0, 1.0)
    return float((values[near] < lower(values)).mean())


def lower(values: Numbers) -> float:
    """The lower of the two thresholds that part values from 0 to 1 in three classes.

    Source: Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE Trans. SMC 9, 1979, section IV.
    """
    counts, edges = np.histogram(values, 64, (0.0, 1.0))
    weight = np.concatenate([[0.0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * (edges[1:] + edges[:-1]) / 2)])
    first, second = np.triu_indices(64, 1)
    between = np.zeros(len(first))
    for start, end in ((np.zeros_like(first), first), (first, second), (second, np.full_like(second, 64))):
        own = np.maximum(weight[end] - weight[start], 1e-9)
        between += (moment[end] - moment[start]) ** 2 / own
    return float(edges[first[between.argmax()]])


def length(image: Numbers, mask: NDArray[np.bool_], sides: Numbers) -> float:
    """Length of the long axis in mm: four standard deviations along it, as PyRadiomics' MajorAxisLength."""
    places = np.argwhere(mask) * sides
    return 4.0 * float(np.sqrt(np.linalg.eigvalsh(np.cov(places.T))[-1]))


def volume(image: Numbers, mask: NDArray[np.bool_], sides: Numbers) -> float:
    """Millilitres."""
    return float(mask.sum() * np.prod(sides)) / 1000.0


@dataclass(frozen=True)
class Measure:
    """What outcomes depend on, and what the second recipe says of its column.

    Attributes:
        of: of an image, a mask on it, and the sides of a voxel in mm.
        bounds: range of the column.
        centre: where a usual value lies.
        scale: how far values usually lie from it.
        sign: 1 where more is worse.
    """

    of: Callable[[Numbers, NDArray[np.bool_], Numbers], float]
    bounds: tuple[float, float]
    centre: float
    scale: float
    sign: float


MEASURES = {
    "fluid": Measure(fluid, (0.0, 1.0), 0.25, 0.05, 1.0),
    "length": Measure(length, (10.0, 100.0), 46.0, 3.0, -1.0),
    "volume": Measure(volume, (0.1, 10.0), 3.3, 0.45, -1.0),
}


def measured(masks: Path, measure: Measure) -> dict[str, float]:
    """Case -> what its mask in a folder measures; a case without a mask is left out."""
    images, values = index.by_name("hippocampus") / "images", dict[str, float]()
    for path in sorted(masks.glob("*.nii.gz")):
        image, mask = nibabel.load(images / path.name), np.asarray(nibabel.load(path).dataobj) > 0
        sides = np.array(image.header.get_zooms()[:3], dtype=np.float64)
        if mask.sum() > 1:
            values[path.name.removesuffix(".nii.gz")] = measure.of(np.asarray(image.dataobj, float), mask, sides)
    return values


@dataclass(frozen=True)
class Outcomes:
    """Of every case, in one order. Shapes: (N,)."""

    time: Numbers
    event: NDArray[np.bool_]


def drawn(risk: Numbers, seed: int) -> Outcomes:
    """Months until the event or until follow-up ends, and which of both. Shapes: risk (N,), a log hazard ratio."""
    rng = np.random.default_rng([18, seed])
    happened = rng.exponential(MEDIAN / np.log(2) * np.exp(-risk))
    ended = rng.uniform(8.0, LONGEST, len(risk))
    return Outcomes(np.minimum(happened, ended), happened <= ended)


def followed(
    folder: Path, kind: str, table: Mapping[str, float], outcomes: Mapping[str, tuple[float, bool]], shown: int
) -> None:
    """A hospital's folder: slices of all cases with months, events, and the table."""
    source = index.by_name("hippocampus") / "images"
    (folder / "images").mkdir(parents=True)
    homes, rows = hippocampus.deal(list(outcomes), 0), []
    for name, (time, event) in outcomes.items():
        slices(source / f"{name}.nii.gz", folder / "images" / f"{name}.nii.gz", shown)
        site, split = homes[name]
        row = {"id": name, "months": f"{time:.4f}", "event": str(int(event)), "site": site}
        rows.append({**row, "split": "train" if split == "train" else "test"})
    cases.table(folder / "labels.csv", rows)
    cases.table(folder / "table.csv", [{"id": name, kind: f"{value:.6f}"} for name, value in table.items()])


def slices(source: Path, target: Path, shown: int) -> None:
    """Every few coronal slices of a volume, as many of each."""
    image = nibabel.load(source)
    pixels = np.asarray(image.dataobj)
    places = np.linspace(4, pixels.shape[1] - 5, shown).round().astype(int)
    affine = image.affine.copy()
    affine[:, 1] *= (places[-1] - places[0]) / (shown - 1)
    nibabel.Nifti1Image(pixels[:, places], affine).to_filename(target)


def experiment(data: Path, kind: str, seed: int, target: str, *, alone: bool) -> dict[str, Any]:
    """The second recipe's experiment."""
    measure, cox = MEASURES[kind], target == "cox"
    steps = {"batch_size": 32, "local_epochs": 16} if cox else {"batch_size": 8, "local_epochs": 4}
    return {
        "name": f"prognosis-{kind}",
        "note": "outcomes are simulated from anatomy; no clinical claim",
        "baselines": ["pooled", *([] if alone else ["image-alone", "table-alone", *(["classical"] if cox else [])])],
        "workers": 1,
        "data": {"source": "folder", "path": str(data), "options": {"ids": "names"}},
        "partition": {"kind": "natural", "val_share": 0.0},
        "recipe": {
            "rounds": 12,
            "seed": seed,
            "threads": 1,
            "backbone": {"name": "dinov2-small-imgfocus"},
            "adapter": {"kind": "head-only"},
            "task": {"kind": "case-classification", "head": "mean"},
            "target": {"kind": target, "bins": BINS, "units": ["months", "yes or no"]},
            "inputs": {
                "numbers": [kind],
                "ranges": [list(measure.bounds)],
                "centres": [measure.centre],
                "scales": [measure.scale],
                "dropout": 0.0,
                "images": not alone,
            },
            "data": {"class_names": ["months", "event"], "input_size": [112, 112], "views": 1, "plane": "coronal"},
            "optimiser": {"learning_rate": 1e-3, **steps},
            "evaluation": {"every": 0},
        },
    }


def cox(rows: Numbers, time: Numbers, event: NDArray[np.bool_]) -> Numbers:
    """Coefficients of Cox's model by its partial likelihood, without ties. Shapes: rows (N, C) -> (C,)."""
    order = np.argsort(-time)
    rows, event = rows[order], event[order]

    def loss(weights: Numbers) -> float:
        scores = rows @ weights
        return float(-(scores - np.logaddexp.accumulate(scores))[event].sum())

    return np.asarray(optimize.minimize(loss, np.zeros(rows.shape[1])).x)


def arms(place: Path, ids: Sequence[str]) -> dict[str, Numbers]:
    """Arm -> risks of cases in their order."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    with (place / "samples.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["arm"], {}).setdefault(row["sample"], {})[row["metric"]] = float(row["value"])
    return {arm: np.array([risk_of(samples[name]) for name in ids]) for arm, samples in values.items()}


def risk_of(row: Mapping[str, float]) -> float:
    """What orders cases: the logarithm of a hazard ratio, or 1 minus mean survival."""
    return row["log_risk"] if "log_risk" in row else 1 - mean(row[f"survival_{k}"] for k in range(len(BINS)))


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean of each column, and its values."""
    return {
        name: {"mean": round(mean(row[name] for row in rows), 4), "seeds": [round(row[name], 4) for row in rows]}
        for name in rows[0]
    }


def main() -> None:
    """Run what is asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="*", default=["fluid"], choices=list(MEASURES), help="measures to train with")
    parser.add_argument("--target", default="survival", choices=["survival", "cox"], help="of the second recipe")
    parser.add_argument("--table-alone", action="store_true", help="the head sees no image")
    parser.add_argument("--adapter", type=Path, help="of a segmentation of the hippocampus, an adapter folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/prognosis"))
    chosen = parser.parse_args()
    output = chosen.output.absolute()
    named = [*(["cox"] if chosen.target == "cox" else []), *(["table"] if chosen.table_alone else [])]
    runs, written = "".join(f"{word}-" for word in named), "-".join(["prognosis", *named]) + ".json"
    masks, source = output / "measured", index.by_name("hippocampus")
    if not (masks / "summary.json").exists():
        if chosen.adapter is None:
            parser.error(f"nothing is measured in {masks}; give the adapter of a segmentation with --adapter")
        shutil.rmtree(masks, ignore_errors=True)
        fedvfm.predict(chosen.adapter, source / "images", masks)
    drawn_by = json.loads((masks / "summary.json").read_text())["adapter"]["fingerprint"]
    result: dict[str, Any] = {"masks by adapter": drawn_by}
    for kind, measure in MEASURES.items():
        truth, table = measured(source / "labels", measure), measured(masks, measure)
        names, homes = list(truth), hippocampus.deal(list(truth), 0)
        tested = np.array([homes[name][1] != "train" for name in names])
        values = np.array([truth[name] for name in names])
        seen = np.array([table.get(name, mean(table.values())) for name in names])
        risk = measure.sign * EFFECT * (values - values.mean()) / values.std()
        sides = np.array([nibabel.load(source / "images" / f"{name}.nii.gz").shape for name in names], dtype=np.float64)
        sides = (sides - sides[~tested].mean(axis=0)) / sides[~tested].std(axis=0)

        def against(seed: int, scores: Mapping[str, Numbers], risk: Numbers = risk, tested: Any = tested) -> Any:
            outcome = drawn(risk, seed)
            time, event = outcome.time[tested], outcome.event[tested]
            return {name: survival_metrics.concordance(time, event, own) or 0.0 for name, own in scores.items()}

        fixed = {"true risk": risk[tested], "measured": (measure.sign * seen)[tested]}
        wide = summary([against(seed, fixed) for seed in range(DRAWS)])
        result[kind] = {
            "correlation": round(float(np.corrcoef(values[tested], seen[tested])[0, 1]), 4),
            "tested": int(tested.sum()),
            f"of {DRAWS} draws": {name: own["mean"] for name, own in wide.items()},
        }
        print(kind, result[kind], flush=True)
        rows = []
        for seed in chosen.seeds if kind in chosen.train else ():
            data, place, outcome = (
                output / f"{runs}{kind}-data-{seed}",
                output / f"{runs}{kind}-{seed}",
                drawn(risk, seed),
            )
            shutil.rmtree(data, ignore_errors=True)
            pairs = zip(outcome.time.tolist(), outcome.event.tolist(), strict=True)
            followed(data, kind, table, dict(zip(names, pairs, strict=True)), 2 if chosen.table_alone else SHOWN)
            if not (place / "summary.json").exists():
                shutil.rmtree(place, ignore_errors=True)
                run.simulate(experiment(data, kind, seed, chosen.target, alone=chosen.table_alone), output=place)
            own = arms(place, [name for name, there in zip(names, tested, strict=True) if there])
            weights = cox(sides[~tested], outcome.time[~tested], outcome.event[~tested])
            rows.append(against(seed, {**fixed, **own, "crop sides": sides[tested] @ weights}))
            rows[-1]["events"] = int(outcome.event[tested].sum())
            print(kind, seed, {name: round(value, 3) for name, value in rows[-1].items()}, flush=True)
            result[kind] |= {"seeds": chosen.seeds[: len(rows)], "c-index": summary(rows)}
            storage.write_text(RESULTS / written, json.dumps(result, indent=2) + "\n")
    storage.write_text(RESULTS / written, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
