"""summary.json and metrics.csv of one federation, from journal and final test; shared by a simulation's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm.report import result_findings
from fedvfm.state import factors
from fedvfm.storage import storage
from fedvfm.tasks import metrics
from fedvfm.trust import locked_recipe

COLUMNS = ("arm", "round", "split", "site", "metric", "value")
ARM = "federated"

Rounds = Sequence[Mapping[str, Any]]


def build(
    name: str, locked: locked_recipe.LockedRecipe, primary: str, journal: Rounds, evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary of a finished federation: the keys of a simulation's that one without baselines can have.

    Args:
        name: of the federation.
        locked: its recipe.
        primary: the metric that ranks models of its task.
        journal: its rounds.
        evaluation: its final test, with what the policies of the sites let out.
    """
    moved = [row["bytes"] for row in (*journal, evaluation)]
    oracle = locked.recipe.task.oracle
    sites = evaluation["last"]["sites"]
    arm = {**over_sites(sites, primary), "rounds": int(evaluation["round"])}
    findings = result_findings.of_values(ARM, sites, locked.recipe.data.class_names)
    labelled = {site: names for line in journal for site, names in line.get("labelled", {}).items()}
    findings += result_findings.of_labels(ARM, {site: labelled.get(site, ()) for site in sites})
    without = {site for line in journal for site in line.get("without_labels", ())}
    findings += result_findings.of_unlabelled(ARM, sorted(without))
    return {
        "experiment": name,
        "seed": locked.recipe.seed,
        "engine": "deployment",
        "rounds": int(evaluation["round"]),
        "precision": precision(journal),
        "fingerprint": evaluation["fingerprint"],
        "backbone": backbone_of(locked),
        "trainable_parameters": factors.ever(locked.manifest, locked.recipe.adapter.factors),
        "bytes": {
            **{way: sum(row[way] for row in moved) for way in ("up", "down")},
            "full_model": full_model_bytes(locked),
        },
        "wall_s": round(sum(row.get("seconds", 0.0) for row in (*journal, evaluation)), 1),
        "peak_mib": max(row.get("peak_mib", 0.0) for row in (*journal, evaluation)),
        "primary": primary,
        "prompt": oracle or None,
        "privacy": journal[-1].get("privacy") if journal else None,
        "acceptance": dict(evaluation.get("acceptance", {})),
        "arms": {ARM: {**arm, **({"prompt": oracle} if oracle else {})}},
        "findings": [finding.row() for finding in findings],
    }


def over_sites(sites: Mapping[str, Mapping[str, float]], primary: str) -> dict[str, Any]:
    """Every site's values, and the primary one over the sites that sent it; None for these where no site did."""
    counts = {
        site: int(row["num_examples"]) for site, row in sites.items() if math.isfinite(row.get(primary, math.nan))
    }
    sent = {site: sites[site] for site, count in counts.items() if count}
    over: dict[str, Any] = dict.fromkeys(("macro", "weighted", "worst", "gap"))
    over |= metrics.summarise(sent, counts, primary) if sent else {}
    return {"sites": {site: dict(row) for site, row in sites.items()}, **over}


def precision(journal: Rounds) -> str | None:
    """What the sites computed in, joined where they differ; None where the journal does not say so (an older run)."""
    return " and ".join(sorted({word for row in journal for word in row.get("precision", {}).values()})) or None


def backbone_of(locked: locked_recipe.LockedRecipe) -> dict[str, Any]:
    """Name, sha256 and size of the backbone."""
    return {
        "name": locked.recipe.backbone.name,
        "sha256": locked.backbone_sha256,
        "parameters": locked.backbone_parameters,
    }


def full_model_bytes(locked: locked_recipe.LockedRecipe) -> int:
    """One fp32 copy of backbone and head."""
    head = sum(spec.size for spec in locked.manifest if spec.group == "head")
    return 4 * (locked.backbone_parameters + head)


def as_json(made: Mapping[str, Any]) -> str:
    """The text of summary.json."""
    return json.dumps(made, indent=2, ensure_ascii=False, allow_nan=False)


def metric_rows(arm: str, journal: Rounds, evaluation: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The rows of metrics.csv; see ``COLUMNS``."""
    for line in journal:
        for split, per_site in (("train", line["train"]), ("val", line["validation"])):
            yield from ((arm, line["round"], split, s, m, v) for s, row in per_site.items() for m, v in row.items())
    tested = evaluation["last"]["sites"]
    yield from ((arm, evaluation["round"], "test", s, m, v) for s, row in tested.items() for m, v in row.items())


def write_csv(path: Path, head: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """Write a table.

    Raises:
        StorageError: if the disk refuses.
    """
    storage.write_text(path, storage.table(head, rows))
