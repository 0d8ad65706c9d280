"""Survival by predicted risk: Kaplan-Meier curves of three groups of test cases beside what was predicted for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm.report import charts, page
from fedvfm.tasks import survival_metrics

GROUPS = ("low risk", "middle risk", "high risk")
LEAST = 3
"""Cases a group must have to be shown."""

Floats = NDArray[np.float64]


def section(tables: Mapping[str, Mapping[str, Sequence[Any]]], bins: Sequence[float], unit: str) -> str:
    """Curves and table of all tested cases; empty where none of them has a time.

    Args:
        tables: site -> the columns of :class:`fedvfm.tasks.survival_metrics.SurvivalScores`.
        bins: points in time at which survival was predicted.
        unit: of the time; may be empty.
    """
    own = [table for table in tables.values() if "survival_0" in table]
    if not own or sum(len(table["time"]) for table in own) < LEAST * len(GROUPS):
        return ""
    time, event = (np.concatenate([np.asarray(table[name], float) for table in own]) for name in ("time", "event"))
    predicted = np.stack(
        [np.concatenate([np.asarray(table[f"survival_{at}"], float) for table in own]) for at in range(len(bins))], 1
    )
    risk = 1 - predicted.mean(axis=1)
    ranks = np.argsort(np.argsort(risk, kind="stable"), kind="stable") * len(GROUPS) // len(risk)
    rows, curves = list[list[Any]](), list[charts.Series]()
    points = np.asarray(bins, dtype=np.float64)
    for at, name in enumerate(GROUPS):
        members = ranks == at
        observed = survival_metrics.kaplan_meier(time[members], event[members] > 0)(points)
        rows += [
            [name, f"{end:g}", int((time[members] > end).sum()), seen, expected]
            for end, seen, expected in zip(points, observed, predicted[members].mean(axis=0), strict=True)
        ]
        if all(end == int(end) for end in bins):
            curves.append(charts.Series(name, [(0, 1.0), *zip(map(int, bins), map(float, observed), strict=True)]))
    events = int((event > 0).sum())
    about = (
        f"{len(time)} test cases of all sites, {events} with an event and {len(time) - events} censored, in three "
        "groups of equal size by predicted risk. Observed is Kaplan-Meier's estimate. Hospitals are virtual here; at "
        "real ones no time leaves a site."
    )
    label = f"time{f' ({unit})' if unit else ''}"
    drawn = (
        charts.line(
            curves,
            title="Survival by predicted risk",
            x_label=label,
            y_label="no event",
            bounds=(0.0, 1.0),
            from_edge=True,
        )
        if curves
        else ""
    )
    head = ("group", label, "still followed up", "observed", "predicted")
    return drawn + page.table(head, rows, about)
