"""What a run's figures must be read with: findings, a classifier's answers, and each hospital against itself."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.report import answers, bootstrap, result_findings
from fedvfm.simulation import run_folder
from fedvfm.simulation.results import compare, statistics

Columns = Mapping[str, Any]


def of_run(
    run: run_folder.RunFolder,
    made: Mapping[str, Any],
    what: schema.Experiment,
    hospitals: Sequence[virtual_hospitals.Hospital] = (),
) -> dict[str, Any]:
    """The keys of summary.json: ``findings``, ``home`` (with a local-only arm) and ``answers`` (of a classification).

    Args:
        run: its folder, every arm tested.
        made: the summary so far.
        what: the experiment.
        hospitals: its hospitals.
    """
    patients = compare.patients_of(hospitals)
    scored = compare.scores(run, made, patients)
    names = what.recipe.data.class_names
    tables = {arm: compare.samples_of(run, arm) for arm in made["arms"]}
    findings = [finding for arm, own in tables.items() for finding in _of_arm(arm, own, made, scored, patients, names)]
    findings += result_findings.of_references({arm: part.get("macro") for arm, part in made["arms"].items()})
    findings += result_findings.of_labels(compare.FEDERATED, {each.name: each.labelled for each in hospitals})
    findings.sort(key=lambda finding: not finding.headline)
    result: dict[str, Any] = {"findings": [finding.row() for finding in findings]}
    changes = home(scored)
    if changes:
        result["home"] = {site: change_row(change) for site, change in changes.items()}
    own = answers.by_site(tables[compare.FEDERATED], names)
    if own:
        together = functools.reduce(operator.add, own.values())
        result["answers"] = {"all": together.row(), "sites": {site: part.row() for site, part in own.items()}}
    return result


def _of_arm(
    arm: str,
    tables: Mapping[str, Columns],
    made: Mapping[str, Any],
    scored: Mapping[str, statistics.Scores],
    patients: compare.Patients | None,
    names: Sequence[str],
) -> list[result_findings.Finding]:
    units = {
        site: [patients[site][name] for name in rows["id"]] if patients else list(rows["id"])
        for site, rows in tables.items()
    }
    found = result_findings.of_samples(arm, tables, names, units)
    if arm != compare.FEDERATED:
        return found
    bounds = compare.interval([scored[arm]]) if arm in scored else None
    own, part = answers.by_site(tables, names), made["arms"][arm]
    found += result_findings.of_macro(arm, own, part["macro"], bounds.low if bounds else None)
    return found + result_findings.missing(arm, part["sites"])


def home(arms: Mapping[str, statistics.Scores]) -> dict[str, bootstrap.Difference]:
    """Federated minus local-only at home, by site; empty where there is no local-only arm."""
    if not {compare.FEDERATED, compare.LOCAL} <= arms.keys():
        return {}
    return compare.by_site([arms[compare.FEDERATED]], [arms[compare.LOCAL]])


def change_row(change: bootstrap.Difference) -> dict[str, Any]:
    """A site's difference as summary.json states it."""
    return {
        "federated": change.first,
        "local-only": change.second,
        "difference": change.mean,
        "low": change.low,
        "high": change.high,
        "units": change.units,
        "word": change.word,
        "no_interval": change.reason,
    }


OF_SAMPLES = ("dice", "f1", "one_minus_brier", "one_minus_nmae", "one_minus_ibs")
"""Metrics of single samples by which the worst is found, where there are no labels."""


def worst_first(tables: Mapping[str, Columns]) -> dict[str, list[str]]:
    """Site -> its test samples, the lowest Dice or F1, the least probable true class or the farthest values first."""
    return {
        site: [name for _, name in sorted(zip(_scores(rows), rows["id"], strict=True))]
        for site, rows in tables.items()
        if "label" in rows or any(name in rows for name in OF_SAMPLES)
    }


def _scores(rows: Columns) -> Sequence[float]:
    if "label" not in rows:
        own: Sequence[float] = rows[next(name for name in OF_SAMPLES if name in rows)]
        return own
    return [rows[f"probability_{int(label)}"][at] for at, label in enumerate(rows["label"])]


def headlines(made: Mapping[str, Any]) -> list[str]:
    """The sentences that must be read first, of a summary."""
    return [finding["text"] for finding in made.get("findings", ()) if finding["headline"]]
