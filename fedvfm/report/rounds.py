"""Rounds and bytes as parts of a report: from journal and summary of a federation, simulated or real."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedvfm.report import charts, page, quantity

EXACT_BELOW = 0.01

Rounds = Sequence[Mapping[str, Any]]


# -- rounds ------------------------------------------------------------------------------------------------------------


def training(journal: Rounds, primary: str, name: str, federated: Mapping[str, Any]) -> str:
    """Curves per site, errors of aggregation, refusals, best round against last, and every round as a table.

    Args:
        journal: the federated arm's rounds.
        primary: key of the metric that ranks models.
        name: that metric as people write it.
        federated: the federated arm's part of the summary.
    """
    if not journal:
        return ""
    figures = [
        *learning(journal, primary, name),
        _factor_error(journal),
        _aggregate_error(journal),
        _cosines(journal),
        _drift(journal),
        _effective_rank(journal),
    ]
    without = (
        "" if any(row["validation"] for row in journal) else page.paragraph("No site validated in this run.", "soft")
    )
    return (
        f'<div class="charts">{"".join(figures)}</div>{without}'
        + _best_round(journal, federated, name)
        + _refusals(journal)
        + _alignment(journal)
        + _error_by_pair(journal)
        + page.folded(f"Every round ({len(journal)})", every_round(journal, primary, name))
    )


def learning(journal: Rounds, primary: str, name: str) -> list[str]:
    """Loss and validation of every site over rounds, a figure each; empty where no site sent it."""
    return [
        _curves(_per_site(journal, "train", "loss"), "Training loss", "mean loss of the round", (0.0, math.inf)),
        _curves(_per_site(journal, "validation", primary), f"Validation {name}", name, (0.0, 1.0)),
    ]


def pace(journal: Rounds) -> str:
    """How long each round took."""
    points = [(row["round"], row["seconds"]) for row in journal]
    if not points:
        return ""
    svg = _one_curve(points, "seconds", "Seconds a round", "seconds", from_edge=True)
    return page.figure(svg, "Seconds that each round took.")


def _per_site(journal: Rounds, part: str, metric: str) -> list[charts.Series]:
    names = sorted({site for row in journal for site in row[part]})
    return [
        charts.Series(
            site, [(row["round"], row[part][site][metric]) for row in journal if metric in row[part].get(site, {})]
        )
        for site in names
    ]


def _curves(series: Sequence[charts.Series], title: str, y_label: str, bounds: charts.Range) -> str:
    if not any(each.points for each in series):
        return ""
    more = f"; thin lines: {len(series)} sites, thick: their mean" if len(series) > charts.MANY else ""
    svg = charts.line(
        series, title=f"{title} of every site over rounds", x_label="round", y_label=y_label, bounds=bounds
    )
    return page.figure(svg, f"{title} per site{more}.")


def _factor_error(journal: Rounds) -> str:
    svg, largest = _error_curve(journal, "factor_error", "Relative factor-averaging error over rounds")
    verdict = (
        f"It stays below {EXACT_BELOW}: averaging A and B apart loses next to nothing here."
        if largest < EXACT_BELOW
        else f"It reaches {largest:.3f}: above {EXACT_BELOW} an exact rule such as svd can differ from averaging."
    )
    said = f"Factor-averaging error: distance of mean(B) mean(A) from the mean of B A, relative. {verdict}"
    return page.figure(svg, said) if svg else ""


def _aggregate_error(journal: Rounds) -> str:
    """What the rule lost: where sites have ranks of their own, or what averaging misses goes into a residual.

    Under ranks of their own averaging factors means nothing, and no factor error stands beside it.
    """
    svg, largest = _error_curve(journal, "aggregate_error", "Relative error of the aggregate over rounds")
    mixed = all(row.get("factor_error") is None for row in journal)
    where, cut = (" under mixed ranks", "global") if mixed else ("", "residual's")
    products = "products B A" if mixed else "products, the residual's among them,"
    said = (
        f"Error of the aggregate{where}: distance of its {products} from the mean of the sites' products, "
        f"relative; what the cut to the {cut} rank loses. At most {largest:.3f}."
    )
    return page.figure(svg, said) if svg else ""


def _error_curve(journal: Rounds, key: str, title: str) -> tuple[str, float]:
    """A chart of one error over rounds and its largest value; an empty text where no round has it."""
    points = [(row["round"], row[key]) for row in journal if row.get(key) is not None]
    if not points:
        return "", 0.0
    return _one_curve(points, "error", title, "error", from_edge=True), max(value for _, value in points)


def _one_curve(points: Sequence[charts.Point], label: str, title: str, y_label: str, *, from_edge: bool = False) -> str:
    """A chart of one value over rounds that is never below 0."""
    series, bounds = [charts.Series(label, points)], (0.0, math.inf)
    return charts.line(series, title=title, x_label="round", y_label=y_label, bounds=bounds, from_edge=from_edge)


def _cosines(journal: Rounds) -> str:
    """How alike the directions are in which sites move the adapter."""
    rows = [(row["round"], row["divergence"]["cosine"]) for row in journal if row.get("divergence")]
    if not rows:
        return ""
    series = [
        charts.Series("mean over pairs", [(number, cosine["mean"]) for number, cosine in rows]),
        charts.Series("least pair", [(number, cosine["least"]) for number, cosine in rows]),
    ]
    title = "Cosine between sites' updates over rounds"
    svg = charts.line(series, title=title, x_label="round", y_label="cosine", bounds=(-1.0, 1.0))
    last = rows[-1][1]
    said = (
        "Cosine between what two sites changed: 1, the same direction; 0, unrelated, as noise is too; below 0, one "
        f"undoes the other. Least alike in the last round: {' and '.join(last['between'])} ({last['least']:.3f})."
    )
    return page.figure(svg, said)


def _drift(journal: Rounds) -> str:
    """How far sites stand from their mean, relative to how far they went."""
    rows = [(row["round"], row["divergence"]) for row in journal if row.get("divergence")]
    points = [(number, unlike["drift"] / unlike["norm"]) for number, unlike in rows]
    if not points:
        return ""
    said = (
        "Drift: mean distance of a site's update from the mean of all, over the mean norm of an update. 0: all alike; "
        "near 1: what sites learn cancels when it is averaged, and fewer local steps or a smaller rate may help."
    )
    return page.figure(_one_curve(points, "drift", "Drift of the sites over rounds", "drift / norm"), said)


def _effective_rank(journal: Rounds) -> str:
    """How many directions the aggregate's low-rank products use."""
    points = [(row["round"], row["effective_rank"]["mean"]) for row in journal if row.get("effective_rank")]
    if not points:
        return ""
    said = (
        "Effective rank of the aggregate's products B A, mean over pairs: near 1, one direction holds nearly all, and "
        "a smaller rank would do; near the recipe's rank, all are in use."
    )
    title = "Effective rank of the aggregate over rounds"
    return page.figure(_one_curve(points, "mean over pairs", title, "rank"), said)


def _alignment(journal: Rounds) -> str:
    """The last round's cosine of each site with the mean of the others."""
    last = next((row["divergence"] for row in reversed(journal) if row.get("divergence")), None)
    if last is None:
        return ""
    ranked = sorted(last["alignment"].items(), key=lambda row: (row[1], row[0]))
    rows: list[list[page.Cell]] = [[site, value] for site, value in ranked]
    sites = quantity.of(last["sites"], "site")
    caption = f"Cosine of each site's update with the mean of the others in the last round; {sites}."
    return page.folded("Which sites go their own way", page.table(("site", "cosine"), rows, caption))


def _error_by_pair(journal: Rounds) -> str:
    """The last round's factor-averaging error, pair by pair."""
    last = next((row["factor_error_by_pair"] for row in reversed(journal) if row.get("factor_error_by_pair")), None)
    if last is None or not any(last.values()):
        return ""
    rows: list[list[page.Cell]] = [[pair, f"{value:.2e}"] for pair, value in last.items()]
    caption = "Relative factor-averaging error of every measured pair in the last round."
    return page.folded("Factor-averaging error, layer by layer", page.table(("pair", "error"), rows, caption))


def _best_round(journal: Rounds, federated: Mapping[str, Any], name: str) -> str:
    last = {"round": journal[-1]["round"], **federated}
    rows = [_round_row("last round", last)]
    if "best" in federated:
        rows.append(_round_row("best validation round", federated["best"]))
    head = ("adapter", "round", f"macro {name}", "weighted", "worst site", "gap")
    caption = "Test values of the federated adapter after the last round and of the round that validated best"
    return page.table(head, rows, caption + ("." if "best" in federated else " (none was kept)."))


def _round_row(label: str, part: Mapping[str, Any]) -> list[page.Cell]:
    worst = part["worst"]  # None where no site sent the metric
    named = f"{worst['site']} {worst['value']:.3f}" if worst else None
    return [label, part["round"], part["macro"], part["weighted"], named, part["gap"]]


def _refusals(journal: Rounds) -> str:
    rows = [
        [row["round"], site, why["reason"], why["detail"]]
        for row in journal
        for site, why in row.get("refused", {}).items()
    ]
    if not rows:
        return page.paragraph("Every update was admitted.", "soft")
    return page.table(
        ("round", "site", "reason", "detail"),
        rows,
        f"{quantity.of(len(rows), 'update was', 'updates were')} refused.",
        words=(1, 2, 3),
    )


def every_round(journal: Rounds, primary: str, name: str) -> str:
    """All rounds as a table; of asynchronous ones also which sites' updates came how many rounds late."""
    late = any("staleness" in row for row in journal)
    head = ["round", "sites", "mean loss", f"mean validation {name}", "factor error", "up", "down", "seconds"]
    head += ["late"] if late else []
    rows: list[list[page.Cell]] = [
        [
            row["round"],
            len(row["cohort"]),
            mean_loss(row),
            mean_of(row["validation"], primary),
            None if row.get("factor_error") is None else f"{row['factor_error']:.2e}",
            size(row["bytes"]["up"]),
            size(row["bytes"]["down"]),
            f"{row['seconds']:.1f}",
            *([", ".join(f"{site} {by}" for site, by in row.get("staleness", {}).items())] if late else []),
        ]
        for row in journal
    ]
    what = "; late: updates that came so many rounds after the one that asked for them" if late else ""
    return page.table(head, rows, f"The journal, a round a row{what}.")


def mean_of(per_site: Mapping[str, Mapping[str, float]], metric: str) -> float | None:
    """Plain mean over the sites that sent a metric; None where none did."""
    values = [row[metric] for row in per_site.values() if metric in row]
    return math.fsum(values) / len(values) if values else None


def mean_loss(row: Mapping[str, Any]) -> float | None:
    """The mean training loss of a round, over the sites with labels: another is against the adapter's own answers."""
    without = row.get("without_labels", ())
    return mean_of({site: each for site, each in row.get("train", {}).items() if site not in without}, "loss")


# -- bytes -------------------------------------------------------------------------------------------------------------


def size(number: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 999.5 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number:.0f} B"


def whole_model(journal: Rounds, summary: Mapping[str, Any]) -> int:
    """Bytes of sending the whole model down and up instead: every site of every round, training alone."""
    return 2 * int(summary["bytes"]["full_model"]) * sum(len(row["cohort"]) for row in journal)


def traffic_card(journal: Rounds, summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """The figure for the head of the report."""
    moved = summary["bytes"]["up"] + summary["bytes"]["down"]
    full = whole_model(journal, summary)
    return "Bytes moved", size(moved), _against_whole(moved, full)


def _against_whole(moved: float, full: float) -> str:
    if not moved or not full:
        return ""
    if moved <= full:
        return f"{_times(full / moved)} less than the whole model"
    return f"{_times(moved / full)} as much as the whole model"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 100 else f"{ratio:.1f} times"


def traffic(journal: Rounds, summary: Mapping[str, Any]) -> str:
    """Bytes moved against sending the whole model."""
    moved, full = summary["bytes"], whole_model(journal, summary)
    total = moved["up"] + moved["down"]
    title = "Bytes moved by the federation and by sending the whole model instead"
    chart = charts.bars([("this run", total, size(total)), ("whole model", full, size(full))], title=title)
    share = 4 * summary["trainable_parameters"] / moved["full_model"]
    rows: list[list[page.Cell]] = [
        ["up (sites to server)", size(moved["up"]), size(full / 2)],
        ["down (server to sites)", size(moved["down"]), size(full / 2)],
        ["both", size(total), size(full)],
    ]
    caption = (
        "Totals of the federated arm. This run: serialised messages of handshake, training, validation and test. "
        "Whole model: one fp32 copy of backbone and head down and up for every site of every round, and nothing else, "
        "in its favour."
    )
    text = (
        f"{summary['trainable_parameters']:,} numbers train, {share:.2%} of backbone and head "
        f"({size(moved['full_model'])} in fp32)."
    )
    return (
        f'<div class="charts">{page.figure(chart, title + ".")}</div>'
        + page.table(("direction", "this run", "whole model"), rows, caption)
        + page.paragraph(text)
    )
