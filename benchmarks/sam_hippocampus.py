"""LiteMedSAM on the hippocampus of real people at six virtual hospitals: what must travel, and what prompts are worth.

    python benchmarks/sam_hippocampus.py run [--seeds 0 1 2] [--arms unet automatic ...]   resumes run by run
    python benchmarks/sam_hippocampus.py jitter                                                   after the arm "oracle"
    python benchmarks/sam_hippocampus.py neighbours                                               after the arm "deep"
    python benchmarks/sam_hippocampus.py recorded                                                 after the arm "deep"
    python benchmarks/sam_hippocampus.py speed
    python benchmarks/sam_hippocampus.py report

``fedvfm data fetch hippocampus`` and ``fedvfm weights fetch litemedsam`` first. ``run`` runs the bundled experiment
``sam-hippocampus`` as each of :data:`ARMS` differs from it; the first seed of the first arm has the experiment's
baselines. ``jitter`` scores boxes drawn from the truth, whose sides are moved by more and more, with the adapter of
round 0 and with that of the arm "oracle". ``neighbours`` scores the adapter of the arm "deep" on validation volumes,
with more and less of the neighbouring slices in the answer for each slice. ``recorded`` scores every adapter of the
arms "deep" and "deep-45" on the test volumes as they were recorded, without what the virtual scanners do to them.
``speed`` times a round of six hospitals with 20 cases each once their features are kept, and prediction. ``report``
writes ``simulations/results/sam_hippocampus.json`` and the block in ``simulations/README.md``; runs that are no longer
there keep their rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import block

from fedvfm.client.training import evaluator
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data.sources import index
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.protocol import protocol
from fedvfm.simulation import experiment
from fedvfm.simulation.results import compare
from fedvfm.state import state

ROOT = Path(__file__).parents[1]
EXPERIMENT, RESULTS = "sam-hippocampus", ROOT / "simulations" / "results" / "sam_hippocampus.json"
JITTERS = (0.0, 0.1, 0.2, 0.3)
RECORDED = ("deep", "deep-45")
SHARES = (0.0, 0.15, 0.25, 1 / 3)
TARGET = 0.865

LORA = ('recipe.adapter.kind="lora"', "recipe.optimiser.learning_rate=1e-3", "recipe.optimiser.head_learning_rate=4e-3")
LAST = (*LORA, "recipe.adapter.rank=8", "recipe.adapter.layers=[9]")
ALL = (*LAST, 'recipe.adapter.targets=["q", "k", "v", "o", "fc1", "fc2"]')
MASKS = (
    'recipe.task.head="sam-masks"',  # decoder parts have most of the numbers that may travel
    *LAST,
    # A step draws every class by SAM's decoder and costs many times that of the other heads: ten training volumes a
    # hospital, every sixth slice of them, and three volumes to test on.
    *("recipe.rounds=8", "recipe.evaluation.every=4", "data.options.every=6"),
    *("partition.train=60", "partition.val=40", "partition.test=110"),
)
SHALLOW = (
    "recipe.rounds=60",
    'recipe.task.head="unet"',
    "recipe.task.options={}",
    'recipe.data.augment=["mirror", "intensity"]',
    "recipe.data.views=2",
    "recipe.aggregation.server_momentum=0.6",
)
"""What the experiment was before."""
WHOLE_VOLUMES = (
    *SHALLOW,
    "recipe.rounds=20",
    "recipe.aggregation.server_momentum=0.8",
    'recipe.backbone.name="unet3d"',
    'recipe.adapter.kind="full"',
    'recipe.task.head="voxel"',
    "data.options.every=1",
    "recipe.data.stack=1",
    'recipe.data.fit="native"',
    "recipe.data.depth=32",
    "recipe.data.input_size=[48, 32]",
    "recipe.data.views=0",
    "recipe.optimiser.batch_size=2",
    "recipe.optimiser.local_epochs=4",
    "recipe.optimiser.learning_rate=2e-3",
)
"""What makes the experiment one of volumes: all slices, pieces of nearly a whole volume, steps as in the other arms."""
ARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "deep": ("head unet-deep on the frozen encoder, no decoder", ()),
    "deep-45": ("the same in 45 rounds", ("recipe.rounds=45",)),
    "monai-dice": ("the same with MONAI's Dice loss", ("recipe.task.options={neighbours=0.25}",)),
    "unet": ("head unet on the frozen encoder, before", SHALLOW),
    "few-steps": (
        "head unet, before, in 20 rounds with steps of four slices",
        (
            *SHALLOW,
            "recipe.rounds=20",
            "recipe.optimiser.batch_size=4",
            "recipe.optimiser.learning_rate=4e-3",
            "recipe.aggregation.server_momentum=0.8",
        ),
    ),
    "affine": (
        "head unet, before, in 40 rounds with four views an image, moved, turned and scaled too",
        (
            *SHALLOW,
            'recipe.data.augment=["mirror", "intensity", "affine"]',
            "recipe.data.views=4",
            "recipe.rounds=40",
        ),
    ),
    "lora": ("as deep, and LoRA on the encoder's last block", ALL),
    "pyramid": ("head pyramid on the frozen encoder", ('recipe.task.head="pyramid"',)),
    "image-dice": ("as deep, Dice of each image", ('recipe.task.dice="image"',)),
    "prompt-free": ("prompt-free: LoRA + upscale, hypernetworks, mask tokens", MASKS),
    "automatic": ("automatic prompts, the same and the light head", (*MASKS, 'recipe.task.prompt="auto"')),
    "oracle": (
        "boxes from the truth (oracle), the same",
        (*MASKS, 'recipe.task.prompt="box"', "recipe.task.options={smooth=1e-12}"),
    ),
    "lora-only": ("LoRA alone", (*MASKS, "recipe.adapter.parts=[]")),
    "parts-only": ("upscale, hypernetworks, mask tokens alone", (*MASKS, 'recipe.adapter.kind="head-only"')),
    "decoder": (
        "the whole decoder alone",
        (*MASKS, 'recipe.adapter.kind="head-only"', 'recipe.adapter.parts=["decoder"]'),
    ),
    "unet3d": ("a 3D U-Net of whole volumes from scratch, no SAM", WHOLE_VOLUMES),
}
BESIDE = ("oracle", "unet3d")
"""Arms that the target is not of: one is told where the classes are, the other is no SAM."""
TINY = ("recipe.rounds=1", "partition.train=2", "partition.val=1", "partition.test=1", "recipe.data.views=1")


def run(arms: Sequence[str], seeds: Sequence[int], output: Path, sets: Sequence[str], *, baselines: bool) -> None:
    """Run or resume every arm of every seed, arms first."""
    for seed in seeds:
        for arm in arms:
            folder = output / arm / f"seed-{seed}"
            if (folder / "summary.json").exists():
                continue
            alone = [] if baselines and arm == next(iter(ARMS)) and seed == seeds[0] else ["baselines=[]"]
            chosen = [f"recipe.seed={seed}", f"data.options.seed={seed}", *alone, *ARMS[arm][1], *sets]
            if (folder / "experiment.json").exists():
                simulate(["--resume", str(folder)])
            else:
                simulate([EXPERIMENT, "--output", str(folder)], chosen)


def simulate(arguments: Sequence[str], sets: Sequence[str] = ()) -> None:
    """``fedvfm simulate`` in a process of its own."""
    words = [*arguments, *(word for value in sets for word in ("--set", value))]
    subprocess.run([sys.executable, "-m", "fedvfm.cli", "simulate", *words], check=True)


# -- prompts -----------------------------------------------------------------------------------------------------------


def jitter(folder: Path) -> dict[str, dict[str, float]]:
    """Macro Dice on the test volumes of every hospital by jitter, of round 0 and of the trained adapter."""
    model, hospitals = finished(folder)
    adapters = {"before": model.initial(), "after": model.read()}
    return {
        when: {f"{most:g}": macro(another(model, prompt_jitter=most), adapter, hospitals) for most in JITTERS}
        for when, adapter in adapters.items()
    }


def neighbours(folder: Path) -> dict[str, float]:
    """Macro Dice on the validation volumes of every hospital by the share of each neighbouring slice."""
    model, hospitals = finished(folder)
    options = model.recipe.task.options
    shared = {share: another(model, options={**options, "neighbours": share}) for share in SHARES}
    return {f"{share:.2f}": macro(one, model.read(), hospitals, "val") for share, one in shared.items()}


def recorded(folders: Sequence[Path]) -> dict[str, float]:
    """Macro Dice on the test volumes of every hospital without its virtual scanner, by arm and seed."""
    scores = {}
    for folder in folders:
        name = f"{folder.parent.name}, seed {folder.name.removeprefix('seed-')}"
        what = read(folder)
        plain = what.data.model_copy(update={"options": {**what.data.options, "appearance": False}})
        hospitals = experiment.hospitals(what.model_copy(update={"data": plain}))
        model = export.load_adapter(folder / "adapter")
        scores[name] = macro(model, model.read(), hospitals)
    return scores


def finished(folder: Path) -> tuple[adapted_model.AdaptedModel, Sequence[Any]]:
    """A run's adapter, and its hospitals."""
    return export.load_adapter(folder / "adapter"), experiment.hospitals(read(folder))


def read(folder: Path) -> schema.Experiment:
    """The experiment of a run."""
    return schema.parse(schema.Experiment, json.loads((folder / "experiment.json").read_text()), "experiment")


def another(model: adapted_model.AdaptedModel, **task: Any) -> adapted_model.AdaptedModel:
    """The same model with other settings of its task."""
    made = model.under(model.recipe.model_copy(update={"task": model.recipe.task.model_copy(update=task)}))
    made.task = type(model.task)(made.recipe)
    return made


def macro(
    model: adapted_model.AdaptedModel, adapter: state.AdapterState, hospitals: Sequence[Any], split: str = "test"
) -> float:
    """Mean over hospitals of the mean Dice of their volumes of a split."""
    task = protocol.Task(model.recipe, split=split)
    values = []
    for hospital in hospitals:
        site = sites.Site(hospital.name, hospital, simulated=True)
        values.append(evaluator.evaluate(model, site, adapter, task).metrics["dice"])
    return mean(values)


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(output: Path, sets: Sequence[str]) -> dict[str, float]:
    """Seconds of a round of six hospitals with 20 cases each, features kept, and slices predicted in a second."""
    every = schema.parse(schema.Experiment, experiment.read(EXPERIMENT)[0], EXPERIMENT).data.options["every"]
    slices = 20 * -(-36 // int(str(every)))
    chosen = ['partition.kind="iid"', "partition.sites=6", f"partition.train={slices}", "recipe.data.views=1"]
    chosen += ["recipe.rounds=3", "recipe.evaluation.every=0", "partition.val=1", "partition.test=1", "baselines=[]"]
    folder = output / "speed"
    if not (folder / "summary.json").exists():
        simulate([EXPERIMENT, "--output", str(folder)], [*chosen, *sets])
    rounds = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    images = sum(rounds[-1]["examples"].values())
    with tempfile.TemporaryDirectory() as scratch:
        volumes = Path(scratch) / "volumes"
        volumes.mkdir()
        for file in sorted((index.by_name("hippocampus") / "images").glob("*.nii.gz"))[:8]:
            (volumes / file.name).write_bytes(file.read_bytes())
        words = [sys.executable, "-m", "fedvfm.cli", "predict", str(folder / "adapter"), str(volumes), "--json"]
        answer = subprocess.run([*words, "-o", f"{scratch}/masks"], check=True, capture_output=True, text=True)
    summary = json.loads(answer.stdout)
    count = sum(row["size"][2] for row in summary["inputs"])
    return {
        "round_s": rounds[-1]["seconds"],
        "first_round_s": rounds[0]["seconds"],
        "images_a_round": images,
        "workers": rounds[-1]["workers"],
        "threads": rounds[-1]["threads"],
        "predicted_slices": count,
        "predict_s": summary["wall_s"],
        "slices_a_second": count / summary["wall_s"],
    }


# -- report ------------------------------------------------------------------------------------------------------------


def collect(output: Path) -> dict[str, Any]:
    """The figures of all finished arms; those of arms that are not there, of ``jitter`` and ``speed`` stay."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    done = [arm for arm in ARMS if any((output / arm).glob("seed-*/summary.json"))]
    first = done[0] if done else ""
    groups = {arm: seeds_of(output / arm) for arm in done}
    rows = {
        arm: {
            **compare.table([groups[one] for one in dict.fromkeys((first, arm))])["runs"][-1],
            "against": first,
            "worst": worst(groups[arm]),
        }
        for arm in done
    }
    runs, curves = {}, {}
    for arm in done:
        folder = sorted((output / arm).glob("seed-*/summary.json"))[0].parent
        runs[arm] = json.loads((folder / "summary.json").read_text())
        curves[arm] = [point(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    tested = {
        arm: unfinished(folder)
        for arm in ARMS
        if arm not in done
        for folder in sorted((output / arm).glob("seed-*"))[:1]
        if (folder / "evaluation.json").exists()
    }
    found = {"arms": rows, "runs": runs, "curves": curves, "unfinished": tested}
    for key, own in found.items():
        merged = {**kept.get(key, {}), **own}
        found[key] = {arm: merged[arm] for arm in ARMS if arm in merged and not (key == "unfinished" and arm in done)}
    return {**kept, **found}


def seeds_of(folder: Path) -> compare.Group:
    """All finished runs of an arm together: a seed deals the cases to the hospitals, too."""
    finished = [path.parent for path in folder.glob("seed-*/summary.json")]
    runs = [run for group in compare.load(finished) for run in group.runs]
    return compare.Group(folder.name, tuple(sorted(runs, key=lambda run: run.seed)))


def worst(group: compare.Group) -> dict[str, Any]:
    """The hospital with the lowest mean over the seeds."""
    tested = [run.summary["arms"]["federated"]["sites"] for run in group.runs]
    means = {site: mean(sites[site]["dice"] for sites in tested) for site in tested[0]}
    site = min(means, key=lambda name: means[name])
    return {"site": site, "value": means[site]}


def unfinished(folder: Path) -> dict[str, Any]:
    """What is known of a run whose federation is tested, and whose baselines may be, before it is at its end."""

    def dice(where: Path) -> dict[str, float]:
        tested = json.loads((where / "evaluation.json").read_text())["last"]["sites"]
        return {site: values["dice"] for site, values in tested.items()}

    home = {
        where.name: dice(where)[where.name]
        for where in sorted((folder / "arms" / "local-only").glob("*"))
        if (where / "evaluation.json").exists()
    }
    pooled = folder / "arms" / "pooled"
    return {
        "seed": folder.name.removeprefix("seed-"),
        "curve": [point(line) for line in (folder / "journal.jsonl").read_text().splitlines()],
        "federated": dice(folder),
        "pooled": dice(pooled) if (pooled / "evaluation.json").exists() else {},
        "local-only": home,
    }


def point(line: str) -> dict[str, Any]:
    """Round, mean training loss and macro Dice on validation volumes, where there were any."""
    values = json.loads(line)
    losses = [row["loss"] for row in values["train"].values()]
    scores = [row["dice"] for row in values["validation"].values()]
    return {"round": values["round"], "loss": mean(losses), "dice": mean(scores) if scores else None}


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """The block as Markdown."""
    rows, runs = figures["arms"], figures["runs"]
    if rows:
        yield from _arms(rows, runs)
        yield from _curves(figures["curves"])
    for arm, row in figures["unfinished"].items():
        yield from _unfinished(arm, row)
    if "jitter" in figures:
        yield from _jitter(figures["jitter"])
    if "neighbours" in figures:
        yield from _neighbours(figures["neighbours"])
    if "recorded" in figures:
        yield from _recorded(figures["recorded"])
    if "speed" in figures:
        yield _speed(figures["speed"])


def _arms(rows: Mapping[str, Any], runs: Mapping[str, Any]) -> Iterator[str]:
    first = next(iter(rows))
    seeds = ", ".join(str(seed) for seed in rows[first]["seeds"])
    yield f"`{EXPERIMENT}`, {first} over {runs[first]['rounds']} rounds, seeds {seeds}; a seed deals the cases, too."
    yield "Dice of whole test volumes, mean of both classes, then over the six hospitals (macro); 95 % bootstrap"
    yield "intervals over cases, differences paired, where both have the same seeds. Worst hospital: mean over seeds."
    yield "MB: both ways, whole run. By seed: " + "; ".join(f"{arm} {by_seed(row)}" for arm, row in rows.items()) + "."
    yield ""
    columns = ("what trains", "rounds", "numbers", "share", "MB", "macro Dice", "95 % interval", f"minus {first}")
    yield f"| {' | '.join((*columns, 'worst hospital'))} |"
    yield "|---" * (len(columns) + 1) + "|"
    for arm, row in rows.items():
        summary, score, gap = runs[arm], row["arms"]["federated"], row["difference"]
        numbers, moves = summary["trainable_parameters"], (summary["bytes"]["up"] + summary["bytes"]["down"]) / 1e6
        beside = gap and gap["paired"] and arm != first and row["against"] == first
        shown = f"{gap['mean']:+.3f} ({block.interval(gap, '+.3f')})" if beside else ""
        lowest = row.get("worst", summary["arms"]["federated"]["worst"])
        yield (
            f"| {ARMS[arm][0]} | {summary['rounds']} | {numbers:,} | "
            f"{numbers / summary['backbone']['parameters']:.2%} | {moves:.1f} | "
            f"{score['macro']:.3f} | {block.interval(score, '.3f')} | {shown} | "
            f"{lowest['site']} {lowest['value']:.3f} |"
        )
    yield ""
    others = {name: row for name, row in rows[first]["arms"].items() if name != "federated"}
    if others:
        yield f"Beside {first}: " + ", ".join(f"{name} {row['macro']:.3f}" for name, row in others.items()) + "."
        yield ""
    own = [row["arms"]["federated"]["macro"] for arm, row in rows.items() if arm not in BESIDE]
    if own:
        yield from _reached(own[0])


def by_seed(row: Mapping[str, Any]) -> str:
    """The macro Dice of each seed."""
    return ", ".join(f"{value:.4f} ({seed})" for seed, value in row["arms"]["federated"]["by_seed"].items())


def _reached(score: float) -> Iterator[str]:
    yield f"Target {TARGET} without an oracle: {score:.3f} ({'' if score >= TARGET else 'not '}reached)."
    yield ""


def _unfinished(arm: str, row: Mapping[str, Any]) -> Iterator[str]:
    yield f"{arm} ({ARMS[arm][0]}), seed {row['seed']}, {row['curve'][-1]['round']} rounds, a run that has not ended."
    yield "Dice of whole test volumes, mean of both classes; five or six volumes a hospital, so there are no intervals."
    yield ""
    yield "| arm | " + " | ".join(row["federated"]) + " | macro |"
    yield "|---" * (2 + len(row["federated"])) + "|"
    for name, words in (("federated", "federated"), ("local-only", "alone, at home"), ("pooled", "pooled")):
        values = row[name]
        if values.keys() == row["federated"].keys():
            shown = [f"{values[site]:.3f}" for site in row["federated"]]
            yield f"| {words} | " + " | ".join([*shown, f"{mean(values.values()):.3f}"]) + " |"
    yield ""
    if arm not in BESIDE:
        yield from _reached(mean(row["federated"].values()))
    yield from _curves({arm: row["curve"]})


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    yield "Macro Dice on validation volumes by round (training loss): "
    yield ""
    for arm, points in curves.items():
        shown = [f"{row['round']}: {row['dice']:.3f} ({row['loss']:.3f})" for row in points if row["dice"] is not None]
        yield f"- {arm}: {', '.join(shown)}"
    yield ""


def _neighbours(rows: Mapping[str, float]) -> Iterator[str]:
    yield "Share of each neighbouring slice in the answer for a slice; macro Dice on validation volumes, arm deep:"
    yield ""
    yield "| share | " + " | ".join(rows) + " |"
    yield "|---" * (1 + len(rows)) + "|"
    yield "| Dice | " + " | ".join(f"{value:.4f}" for value in rows.values()) + " |"
    yield ""


def _recorded(rows: Mapping[str, float]) -> Iterator[str]:
    yield "The same test volumes as they were recorded, without the virtual scanners (what `fedvfm predict` sees of new"
    yield f"cases), macro Dice: {'; '.join(f'{name}: {value:.4f}' for name, value in rows.items())}."
    yield ""


def _jitter(rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield "Boxes from the truth, each side moved by up to this share of the box's width or height; macro Dice:"
    yield ""
    yield "| jitter | " + " | ".join(f"{float(most):g}" for most in rows["before"]) + " |"
    yield "|---" * (1 + len(rows["before"])) + "|"
    for when, words in (("before", "LiteMedSAM as it is"), ("after", "after federated tuning with jitter 0.1")):
        yield f"| {words} | " + " | ".join(f"{value:.3f}" for value in rows[when].values()) + " |"
    yield ""


def _speed(row: Mapping[str, float]) -> str:
    return (
        f"A round of six hospitals with 20 cases each, {row['images_a_round']:.0f} slices, {row['workers']:.0f} "
        f"workers of {row['threads']:.0f} thread: {row['round_s']:.1f} s with kept features, "
        f"{row['first_round_s']:.1f} s if they are computed. Prediction of {row['predicted_slices']:.0f} slices, "
        f"start included: {row['slices_a_second']:.1f} a second."
    )


def write(figures: Mapping[str, Any]) -> None:
    """``simulations/results/sam_hippocampus.json`` and the block in ``simulations/README.md``."""
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    block.write(ROOT / "simulations" / "README.md", EXPERIMENT, "\n".join(lines(figures)))


def main(words: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "jitter", "neighbours", "recorded", "speed", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--output", type=Path, default=Path("runs/sam-hippocampus"))
    parser.add_argument("--set", action="append", default=[], help="a setting of the experiment, as in fedvfm simulate")
    parser.add_argument("--quick", action="store_true", help="try everything once, tiny; write nothing")
    asked = parser.parse_args(words)
    sets = [*asked.set, *(TINY if asked.quick else ())]
    measured: dict[str, Any] = {}
    if asked.what == "run":
        run(asked.arms, asked.seeds, asked.output, sets, baselines=not asked.quick)
    elif asked.what == "jitter":
        measured["jitter"] = jitter(sorted((asked.output / "oracle").glob("seed-*"))[0])
    elif asked.what == "neighbours":
        measured["neighbours"] = neighbours(sorted((asked.output / "deep").glob("seed-*"))[0])
    elif asked.what == "recorded":
        folders = [path.parent for arm in RECORDED for path in sorted((asked.output / arm).glob("seed-*/summary.json"))]
        measured["recorded"] = recorded(folders)
    elif asked.what == "speed":
        measured["speed"] = speed(asked.output, sets)
    figures = collect(asked.output)
    for key, own in measured.items():
        figures[key] = {**figures.get(key, {}), **own}
    print("\n".join(lines(figures)))
    if not asked.quick:
        write(figures)


if __name__ == "__main__":
    main()
