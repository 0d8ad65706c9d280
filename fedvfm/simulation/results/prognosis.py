"""Survival by predicted risk: Kaplan-Meier curves of three groups of test cases, beside what was predicted for them."""

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
        tables: site -> the columns of :class:`fedvfm.tasks.survival_metrics.SurvivalScores`, or of ``CoxScores``.
        bins: points in time at which survival is shown.
        unit: of the time; may be empty.
    """
    own = [table for table in tables.values() if "event" in table]
    if not own or sum(len(table["time"]) for table in own) < LEAST * len(GROUPS):
        return ""
    time, event = (np.concatenate([np.asarray(table[name], float) for table in own]) for name in ("time", "event"))
    cox = "log_risk" in own[0]
    predicted = None if cox else _predicted(own, len(bins))
    if predicted is None:
        ranks = np.concatenate([_thirds(np.asarray(table["log_risk"], float)) for table in own])
    else:
        ranks = _thirds(1 - predicted.mean(axis=1))
    rows, curves = list[list[Any]](), list[charts.Series]()
    points = np.asarray(bins, dtype=np.float64)
    for at, name in enumerate(GROUPS):
        members = ranks == at
        if not members.any():  # of two cases a site none is in the middle
            continue
        observed = survival_metrics.kaplan_meier(time[members], event[members] > 0)(points)
        shown = np.stack([observed] if predicted is None else [observed, predicted[members].mean(axis=0)], 1)
        rows += [
            [name, f"{end:g}", int((time[members] > end).sum()), *map(float, values)]
            for end, values in zip(points, shown, strict=True)
        ]
        if all(end == int(end) for end in bins):
            curves.append(charts.Series(name, [(0, 1.0), *zip(map(int, bins), map(float, observed), strict=True)]))
    events = int((event > 0).sum())
    about = (
        f"{len(time)} test cases of all sites, {events} with an event and {len(time) - events} censored, in three "
        f"groups of equal size by predicted risk{' among the cases of each site' if cox else ''}. Observed is "
        "Kaplan-Meier's estimate. Hospitals are virtual here; at real ones no time leaves a site."
    )
    if cox:
        about += (
            " Cox's model orders cases and gives no chance of survival: its baseline hazard would be made of single "
            "event times. So there is no integrated Brier score and no calibration."
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
    head = ("group", label, "still followed up", "observed", *(() if cox else ("predicted",)))
    return drawn + page.table(head, rows, about)


def _predicted(own: Sequence[Mapping[str, Sequence[Any]]], points: int) -> Floats:
    """Predicted survival of the cases of all sites. Shapes: (N, points)."""
    each = [np.stack([np.asarray(table[f"survival_{at}"], float) for at in range(points)], 1) for table in own]
    return np.concatenate(each)


def _thirds(risk: Floats) -> NDArray[np.int64]:
    """Group of each case by its rank. Shapes: (N,) -> (N,)."""
    ranks = np.argsort(np.argsort(risk, kind="stable"), kind="stable")
    return (2 * ranks + 1) * len(GROUPS) // (2 * len(risk))
