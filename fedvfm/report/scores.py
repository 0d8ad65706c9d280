"""Scores as people read them: the names of metrics, the mark of an oracle's, and a table of sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedvfm.report import page

FEW_ROWS = 12
NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95",
    "assd": "ASSD",
    "nsd": "NSD",
    "f1": "F1",
    "map50": "mAP at IoU 0.5",
    "map10": "mAP at IoU 0.1",
    "cpm": "CPM (mean of FROC)",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "ece": "ECE",
    "macro_f1": "macro F1",
    "brier": "Brier",
    "one_minus_brier": "1 - Brier",
    "one_minus_nmae": "1 - MAE/range",
    "quadratic_kappa": "quadratic weighted kappa",
    "mae": "MAE in grades",
    "one_minus_ibs": "1 - integrated Brier",
    "c_index": "C-index (Harrell)",
    "c_index_uno": "C-index (Uno)",
    "calibration_error": "calibration at the horizon (predicted - observed survival)",
}
LOWER_IS_BETTER = ("hd95", "assd", "ece", "brier", "mae")
OF_COLUMN = {
    "dice_": "Dice",
    "ap50_": "AP at IoU 0.5",
    "froc_": "FROC, false alarms an image:",
    "auroc_": "AUROC",
    "auprc_": "AUPRC",
    "mae_": "MAE",
    "r2_": "R2",
}
"""What begins so is the metric of one class or one column; its own name follows."""


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    for begin, name in OF_COLUMN.items():
        if metric.startswith(begin):
            return f"{name} {metric.removeprefix(begin)}"
    return NAMES.get(metric, metric.replace("_", " "))


def shown(name: str, arm: Mapping[str, Any]) -> str:
    """An arm's name as people read it: marked where its scores are an oracle's."""
    return f"{name} ({arm['prompt']})" if arm.get("prompt") else name


def by_site(sites: Mapping[str, Mapping[str, float]], about: str, tolerance: float) -> str:
    """Every metric that sites sent, a site a row.

    Args:
        sites: site -> metric -> value, with ``num_examples``.
        about: what the values are.
        tolerance: of NSD.
    """
    metrics = list(dict.fromkeys(name for row in sites.values() for name in row if name != "num_examples"))
    head = ["site", "test samples", *(_column(name) for name in metrics)]
    rows = [[site, int(row["num_examples"]), *(row.get(name) for name in metrics)] for site, row in sites.items()]
    if "hd95" in metrics:
        about += (
            f"; HD95, ASSD and the tolerance of NSD ({tolerance:g}) in mm where the pixel size is known, else in pixels"
        )
    table = page.table(head, rows, about + ".")
    return table if len(rows) <= FEW_ROWS else page.folded(f"All {len(rows)} sites", table)


def findings(rows: Sequence[Mapping[str, Any]]) -> str:
    """What limits the figures, headlines first: the ``findings`` of a summary."""
    if not rows:
        return ""
    caption = "What limits these figures; docs/reading-a-report.md explains each code."
    cells = [[row["code"], row["arm"], f"{row['text']}."] for row in rows]
    return page.table(("finding", "arm", "what it says"), cells, caption, words=(1, 2))


def _column(metric: str) -> str:
    lower = metric in LOWER_IS_BETTER or metric.startswith("mae_")
    return f"{metric_name(metric)}{' (lower is better)' if lower else ''}"
