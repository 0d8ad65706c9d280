"""summary.json (the machine's view of a run, stable), metrics.csv and samples.csv."""

from __future__ import annotations

import csv
import html
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import feature_counts
from fedvfm.report import charts, scores
from fedvfm.server.rounds import journal
from fedvfm.server.rounds import summary as summaries
from fedvfm.simulation import baselines, run_folder
from fedvfm.simulation.results import examination, simulated_epsilon
from fedvfm.state import factors
from fedvfm.storage import hash_chain
from fedvfm.tasks import metrics
from fedvfm.tasks import table as tasks
from fedvfm.trust import locked_recipe


def build(
    what: schema.Experiment,
    run: run_folder.RunFolder,
    arms: Sequence[baselines.Arm],
    locked: locked_recipe.LockedRecipe,
    elapsed: float,
    hospitals: Sequence[virtual_hospitals.Hospital] = (),
) -> dict[str, Any]:
    """The summary of a finished run; its keys are documented in ``simulations/README.md`` and do not change.

    Bytes, seconds and peak memory are those of every process that took part, from the journals. What a killed process
    had sent and used since its last line is not in them, and the round it was in counts once.
    """
    found = {arm.name: run.evaluation(arm.name) or {} for arm in arms}
    journals = {arm.name: hash_chain.read(run.arm(arm.name) / "journal.jsonl") for arm in arms}
    records = [row for rows in (*journals.values(), found.values()) for row in rows]
    federated = found["federated"]
    moved = [*(row["bytes"] for row in journals["federated"]), federated["bytes"]]
    primary = tasks.TABLE.get(what.recipe.task.kind)(what.recipe).primary
    made: dict[str, Any] = {
        "experiment": what.name,
        "seed": what.recipe.seed,
        "engine": what.engine,
        "rounds": what.recipe.rounds,
        "precision": summaries.precision(journals["federated"]),
        "fingerprint": federated["fingerprint"],
        "backbone": summaries.backbone_of(locked),
        "trainable_parameters": factors.ever(locked.manifest, locked.recipe.adapter.factors),
        "bytes": {
            "up": sum(m["up"] for m in moved),
            "down": sum(m["down"] for m in moved),
            "full_model": summaries.full_model_bytes(locked),
        },
        "wall_s": round(max(_busy_s(records), elapsed), 1),
        "peak_mib": max([journal.peak_mib(), *(row.get("peak_mib", 0.0) for row in records)]),
        "threads": federated.get("threads"),
        "workers": federated.get("workers"),
        "features": _features(journals),
        "primary": primary,
        "prompt": what.recipe.task.oracle or None,
        "attack": None if what.attack is None else what.attack.model_dump(mode="json"),
        "privacy": simulated_epsilon.of_arm(arms[0], journals["federated"], hospitals),
        "arms": {
            group: {**_arm(group, arms, found, primary), **_epsilon(group, arms, journals, hospitals)}
            for group in dict.fromkeys(arm.group for arm in arms)
        },
    }
    return {**made, **examination.of_run(run, made, what, hospitals)}


def _features(journals: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int] | None:
    """How often training asked for what the frozen blocks compute, over all arms, by where it came from; else None."""
    sites = [site for rows in journals.values() for row in rows for site in row["train"].values()]
    if not any(feature_counts.METRICS["computed"] in site for site in sites):
        return None
    return {name: int(sum(site.get(metric, 0.0) for site in sites)) for name, metric in feature_counts.METRICS.items()}


def too_small(made: Mapping[str, Any]) -> str:
    """What a person must know of a cache that did not hold all; empty where it did."""
    found = made.get("features")
    if not found or not found["again"]:
        return ""
    counts = feature_counts.Counts(**found)
    return f"the cache was too small: features of the frozen blocks: {counts}; --dry-run says to how much"


def _busy_s(records: Sequence[Mapping[str, Any]]) -> float:
    """Seconds in which some arm was at work, in whichever process; arms that go on side by side count once."""
    total, last = 0.0, -math.inf
    spans = ((row["ended"] - row["seconds"], row["ended"]) for row in records if "ended" in row)
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, last))
        last = max(last, ended)
    return total + sum(float(row.get("seconds", 0.0)) for row in records if "ended" not in row)


def _arm(group: str, arms: Sequence[baselines.Arm], found: Mapping[str, Any], primary: str) -> dict[str, Any]:
    members = [arm for arm in arms if arm.group == group]
    mark = _mark(members[0])
    rounds = max(int(found[arm.name]["round"]) for arm in members)
    if group == "local-only":
        matrix = {
            arm.train_sites[0]: {s: row[primary] for s, row in found[arm.name]["last"]["sites"].items()}
            for arm in members
        }
        rows = {arm.train_sites[0]: found[arm.name]["last"]["sites"][arm.train_sites[0]] for arm in members}
        few = min(map(len, matrix.values()))
        capped = {"matrix_sites": few} if few < len(matrix) else {}
        values = {**_values(rows, primary), **mark, "rounds": rounds, "matrix": matrix, "abroad": _abroad(matrix)}
        return values | capped
    if group == "personal":  # nothing of it is rounds of a federation
        rounds = members[0].recipe.rounds if members[0].recipe is not None else 0
    rows = {site: row for arm in members for site, row in found[arm.name]["last"]["sites"].items()}
    result = {**_values(rows, primary), **mark, "rounds": rounds}
    best = found[members[0].name].get("best")
    if best:
        result["best"] = {"round": best["round"], **_values(best["sites"], primary)}
    if "rule" in found[members[0].name]:
        result["rule"] = found[members[0].name]["rule"]
    return result


def _epsilon(
    group: str,
    arms: Sequence[baselines.Arm],
    journals: Mapping[str, Any],
    hospitals: Sequence[virtual_hospitals.Hospital],
) -> dict[str, Any]:
    """``simulated_epsilon`` of a private arm: the largest of its trainings, each by itself; null where not bounded."""
    spent = [simulated_epsilon.of_arm(arm, journals[arm.name], hospitals) for arm in arms if arm.group == group]
    values = [one["epsilon"] for one in spent if one is not None]
    return {"simulated_epsilon": None if None in values else max(values)} if values else {}


def _mark(arm: baselines.Arm) -> dict[str, str]:
    """``prompt`` of an arm whose scores are an oracle's."""
    oracle = arm.recipe.task.oracle if arm.recipe is not None else ""
    return {"prompt": oracle} if oracle else {}


def _values(rows: Mapping[str, Mapping[str, float]], primary: str) -> dict[str, Any]:
    counts = {site: int(row["num_examples"]) for site, row in rows.items()}
    return {"sites": {site: dict(row) for site, row in rows.items()}, **metrics.summarise(rows, counts, primary)}


def _abroad(matrix: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean over all pairs of a model and a hospital it was not trained at."""
    values = [value for home, row in matrix.items() for site, value in row.items() if site != home]
    return sum(values) / len(values) if values else None


def as_html(made: Mapping[str, Any]) -> str:
    """A small table: an arm a row."""
    rows = "".join(
        f"<tr><td>{html.escape(scores.shown(name, arm))}</td><td>{arm['macro']:.3f}</td>"
        f"<td>{html.escape(arm['worst']['site'])} {arm['worst']['value']:.3f}</td></tr>"
        for name, arm in made["arms"].items()
    )
    read = "".join(f"<p><b>{html.escape(text)}.</b></p>" for text in examination.headlines(made))
    head = f"<tr><th>arm</th><th>macro {html.escape(made['primary'])}</th><th>worst site</th></tr>"
    return f"{read}<table>{head}{rows}</table>"


def curves(path: Path, metric: str, arm: str) -> charts.Picture:
    """A value of every site over rounds, out of metrics.csv: a loss as trained, a score on the validation split.

    Raises:
        CheckpointError: if the file is not there.
        ConfigError: if the arm has no such value by round, with those that there are.
    """
    if not path.is_file():
        raise errors.CheckpointError(f"{path} is not there: this run has no values yet. Let it finish")
    by_split: dict[str, dict[str, list[charts.Point]]] = {}
    known: set[str] = set()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == "test" or not row["value"]:
                continue
            known.add(f"{row['metric']} of {row['arm']}")
            if row["metric"] == metric and row["arm"] == arm:
                sites = by_split.setdefault(row["split"], {})
                sites.setdefault(row["site"], []).append((float(row["round"]), float(row["value"])))
    if not by_split:
        listed = ", ".join(sorted(known)) or "none"
        raise errors.ConfigError("plot", [f"there is no {metric} of {arm} by round; there are: {listed}"])
    split, sites = sorted(by_split.items())[-1]
    series = [charts.Series(site, sorted(points)) for site, points in sorted(sites.items())]
    title = f"{metric} ({split}) of every site over rounds"
    return charts.Picture.of(charts.line(series, title=title, x_label="round", y_label=f"{metric} ({split})"))


def write_tables(run: run_folder.RunFolder, made: Mapping[str, Any]) -> None:
    """metrics.csv (arm, round, split, site, metric, value) and samples.csv (one row a sample and metric).

    Where scores are an oracle's, both have a last column ``prompt``, which says so row by row.
    """
    names = [
        "federated",
        *sorted(str(p.parent.relative_to(run.path / "arms")) for p in (run.path / "arms").rglob("evaluation.json")),
    ]
    tables = {
        "metrics.csv": (summaries.COLUMNS, _metric_rows),
        "samples.csv": (("arm", "site", "sample", "metric", "value"), _sample_rows),
    }
    marks = {name: ((run.evaluation(name) or {}).get("prompt", "none"),) if made["prompt"] else () for name in names}
    for file, (columns, rows_of) in tables.items():
        head = (*columns, "prompt") if made["prompt"] else columns
        summaries.write_csv(
            run.path / file, head, ((*row, *marks[name]) for name in names for row in rows_of(run, name))
        )


def frame(path: Path) -> Any:
    """A table of a run as a ``pandas.DataFrame``; a list of rows, each a dict, where pandas is not installed.

    Raises:
        CheckpointError: if the file is not there.
    """
    if not path.is_file():
        raise errors.CheckpointError(
            f"{path} is not there. Is the run finished? fedvfm simulate --resume {path.parent}"
        )
    try:
        pandas = importlib.import_module("pandas")
    except ModuleNotFoundError:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: _typed(key, text) for key, text in row.items()} for row in csv.DictReader(file)]
    return pandas.read_csv(path, dtype={"sample": str, "site": str}, keep_default_na=False, na_values={"value": [""]})


def _typed(column: str, text: str) -> str | int | float:
    if column == "value":
        return float(text) if text else math.nan
    return int(text) if column == "round" and text.isdigit() else text


def _metric_rows(run: run_folder.RunFolder, name: str) -> Iterator[tuple[Any, ...]]:
    journal = hash_chain.read(run.arm(name) / "journal.jsonl")
    yield from summaries.metric_rows(name, journal, run.evaluation(name) or {})


def _sample_rows(run: run_folder.RunFolder, name: str) -> Iterator[tuple[Any, ...]]:
    found = run.evaluation(name) or {}
    for site, columns in found["last"]["samples"].items():
        for metric, values in columns.items():
            if metric != "id":
                yield from (
                    (name, site, sample, metric, value) for sample, value in zip(columns["id"], values, strict=True)
                )
