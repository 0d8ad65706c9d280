"""The parts of the report that say how a result came to be: rounds, bytes, hospitals, environment, settings."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from fedvfm import config as configs
from fedvfm.data import hospitals as hospital_data
from fedvfm.report import charts, page

FEW_ROWS = 12
PACKAGES = ("fedvfm", "flwr", "torch", "transformers", "peft", "monai", "numpy", "scipy", "scikit-learn", "safetensors")
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
        _curves(_per_site(journal, "train", "loss"), "Training loss", "mean loss of the round", (0.0, math.inf)),
        _curves(_per_site(journal, "validation", primary), f"Validation {name}", name, (0.0, 1.0)),
        _factor_error(journal),
        _aggregate_error(journal),
    ]
    without = (
        "" if any(row["validation"] for row in journal) else page.paragraph("No site validated in this run.", "soft")
    )
    return (
        f'<div class="charts">{"".join(figures)}</div>{without}'
        + _best_round(journal, federated, name)
        + _refusals(journal)
        + page.folded(f"Every round ({len(journal)})", _rounds(journal, primary, name))
    )


def _per_site(journal: Rounds, part: str, metric: str) -> list[charts.Series]:
    names = sorted({site for row in journal for site in row[part]})
    return [
        charts.Series(
            site, [(row["round"], row[part][site][metric]) for row in journal if metric in row[part].get(site, {})]
        )
        for site in names
    ]


def _curves(series: Sequence[charts.Series], title: str, y_label: str, bounds: charts.Range) -> str:
    if not any(one.points for one in series):
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
    """Where sites have ranks of their own, averaging factors means nothing; what the rule lost is shown instead."""
    svg, largest = _error_curve(journal, "aggregate_error", "Relative error of the aggregate over rounds")
    said = (
        "Error of the aggregate under mixed ranks: distance of its products B A from the mean of the sites' products, "
        f"relative; what the cut to the global rank loses. At most {largest:.3f}."
    )
    return page.figure(svg, said) if svg else ""


def _error_curve(journal: Rounds, key: str, title: str) -> tuple[str, float]:
    """A chart of one error over rounds and its largest value; an empty text where no round has it."""
    points = [(row["round"], row[key]) for row in journal if row.get(key) is not None]
    if not points:
        return "", 0.0
    series, bounds = [charts.Series("error", points)], (0.0, math.inf)
    svg = charts.line(series, title=title, x_label="round", y_label="error", bounds=bounds, from_edge=True)
    return svg, max(value for _, value in points)


def _best_round(journal: Rounds, federated: Mapping[str, Any], name: str) -> str:
    last = {"round": journal[-1]["round"], **federated}
    rows = [_round_row("last round", last)]
    if "best" in federated:
        rows.append(_round_row("best validation round", federated["best"]))
    head = ("adapter", "round", f"macro {name}", "weighted", "worst site", "gap")
    caption = "Test values of the federated adapter after the last round and of the round that validated best"
    return page.table(head, rows, caption + ("." if "best" in federated else " (none was kept)."))


def _round_row(label: str, part: Mapping[str, Any]) -> list[page.Cell]:
    worst = part["worst"]
    return [label, part["round"], part["macro"], part["weighted"], f"{worst['site']} {worst['value']:.3f}", part["gap"]]


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
        "1 update was refused." if len(rows) == 1 else f"{len(rows)} updates were refused.",
        words=(1, 2, 3),
    )


def _rounds(journal: Rounds, primary: str, name: str) -> str:
    head = ("round", "sites", "mean loss", f"mean validation {name}", "factor error", "up", "down", "seconds")
    rows: list[list[page.Cell]] = [
        [
            row["round"],
            len(row["cohort"]),
            _mean(row["train"], "loss"),
            _mean(row["validation"], primary),
            None if row.get("factor_error") is None else f"{row['factor_error']:.2e}",
            size(row["bytes"]["up"]),
            size(row["bytes"]["down"]),
            f"{row['seconds']:.1f}",
        ]
        for row in journal
    ]
    return page.table(head, rows, "The federated arm's journal, a round a row.")


def _mean(per_site: Mapping[str, Mapping[str, float]], metric: str) -> float | None:
    values = [row[metric] for row in per_site.values() if metric in row]
    return math.fsum(values) / len(values) if values else None


# -- bytes -------------------------------------------------------------------------------------------------------------


def size(number: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 999.5 * factor else f"{number / factor:,.0f} {unit}"
    return f"{number:.0f} B"


def whole_model(journal: Rounds, made: Mapping[str, Any]) -> int:
    """Bytes of sending the whole model down and up instead: every site of every round, training alone."""
    return 2 * int(made["bytes"]["full_model"]) * sum(len(row["cohort"]) for row in journal)


def traffic_card(journal: Rounds, made: Mapping[str, Any]) -> tuple[str, str, str]:
    """The figure for the head of the report."""
    moved = made["bytes"]["up"] + made["bytes"]["down"]
    full = whole_model(journal, made)
    return "Bytes moved", size(moved), _against_whole(moved, full)


def _against_whole(moved: float, full: float) -> str:
    if not moved or not full:
        return ""
    if moved <= full:
        return f"{_times(full / moved)} less than the whole model"
    return f"{_times(moved / full)} as much as the whole model"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 100 else f"{ratio:.1f} times"


def traffic(journal: Rounds, made: Mapping[str, Any]) -> str:
    """Bytes moved against sending the whole model."""
    moved, full = made["bytes"], whole_model(journal, made)
    total = moved["up"] + moved["down"]
    title = "Bytes moved by the federation and by sending the whole model instead"
    chart = charts.bars([("this run", total, size(total)), ("whole model", full, size(full))], title=title)
    share = 4 * made["trainable_parameters"] / moved["full_model"]
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
        f"{made['trainable_parameters']:,} numbers train, {share:.2%} of backbone and head "
        f"({size(moved['full_model'])} in fp32)."
    )
    return (
        f'<div class="charts">{page.figure(chart, title + ".")}</div>'
        + page.table(("direction", "this run", "whole model"), rows, caption)
        + page.paragraph(text)
    )


# -- hospitals and environment -----------------------------------------------------------------------------------------


def hospitals(members: Sequence[hospital_data.Hospital], what: configs.Experiment) -> str:
    """Counts and notes of every hospital, and where the images come from."""
    if not members:
        return ""
    info = members[0].source.info
    rows: list[list[page.Cell]] = [[one.name, len(one.train), len(one.val), len(one.test)] for one in members]
    rows.append(["all", *(sum(len(one.splits[split]) for one in members) for split in ("train", "val", "test"))])
    caption = f"Samples of {len(members)} virtual hospitals; partition: {what.partition.kind}."
    made = page.table(("site", "train", "validation", "test"), rows, caption)
    notes = list(dict.fromkeys(note for one in members for note in one.notes))
    listed = f"<ul>{''.join(f'<li>{page.text(note)}</li>' for note in notes)}</ul>" if notes else ""
    about = (info.name, info.note, f"classes: {', '.join(info.class_names)}", f"licence: {info.licence}")
    source = f"Source: {'; '.join(part for part in about if part)}."
    if len(members) > FEW_ROWS:
        made = page.folded(f"All {len(members)} hospitals", made)
    if len(notes) > FEW_ROWS:
        listed = page.folded(f"{len(notes)} notes", listed)
    return page.paragraph(source) + made + listed


def environment(what: configs.Experiment, made: Mapping[str, Any]) -> str:
    """What ran where, under which seed and settings."""
    head = ("what", "value")
    rows: list[list[page.Cell]] = [[name, value] for name, value in _environment(what, made)]
    table = page.table(head, rows, "Where and with what this report was made.", words=(1,))
    values = json.dumps(what.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    return table + page.folded("The experiment, every setting resolved", f"<pre>{page.text(values)}</pre>")


def _environment(what: configs.Experiment, made: Mapping[str, Any]) -> list[tuple[str, page.Cell]]:
    recipe, backbone = what.recipe, made["backbone"]
    return [
        ("seed", str(made["seed"])),
        ("recipe hash", _code(recipe.hash)),
        ("adapter fingerprint", _code(made["fingerprint"])),
        ("backbone", f"{backbone['name']}, {backbone['parameters']:,} parameters"),
        ("backbone sha256", _code(backbone["sha256"]) if backbone["sha256"] else "made from the seed"),
        ("engine", made["engine"]),
        ("device", _device(what.device)),
        ("precision", f"{made.get('precision') or 'not recorded'}; the recipe says {recipe.precision}"),
        ("threads", _threads(made)),
        ("wall time", f"{made['wall_s']:,.0f} s, all arms"),
        ("peak memory", f"{made['peak_mib']:,.0f} MiB"),
        ("platform", platform.platform()),
        ("Python", platform.python_version()),
        *((name, version) for name in PACKAGES if (version := _version(name)) is not None),
    ]


def _threads(made: Mapping[str, Any]) -> str:
    """How many threads a site computed with, and how many worker processes there were."""
    workers = f" in each of {made['workers']} workers" if (made["workers"] or 1) > 1 else ""
    return f"{made['threads']}{workers}; the machine has {os.cpu_count()} processors"


def _code(value: str) -> page.Markup:
    return page.Markup(f"<code>{page.text(value)}</code>")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(name: str) -> str:
    if not name.startswith("cuda"):
        return name
    import torch

    return f"{name}: {torch.cuda.get_device_name(name)}" if torch.cuda.is_available() else name
