"""What joining gives each hospital: what it ends with, beside the model that it would have trained alone.

Everything is of the hospital's own test split. Differences are paired, image by image; intervals draw whole patients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedvfm.client.personal import choice, statement
from fedvfm.report import bootstrap, page
from fedvfm.simulation import run_folder
from fedvfm.simulation.results import compare, statistics

PERSONAL = "personal"
LEAST = bootstrap.LEAST_UNITS

Scores = Mapping[str, statistics.Scores]
Gaps = Mapping[str, bootstrap.Difference]


def build(run: run_folder.RunFolder, made: Mapping[str, Any], scores: Scores) -> dict[str, Any] | None:
    """The table of sites, the counts and the macro differences; None where no personal adapters were made.

    Args:
        run: the folder of a run whose arms are finished.
        made: its summary.
        scores: per-sample test values by arm.
    """
    if PERSONAL not in made["arms"] or PERSONAL not in scores:
        return None
    pairs = {"personal": PERSONAL, "global": compare.FEDERATED}
    local = scores.get(compare.LOCAL)
    gaps = {of: compare.by_site([scores[arm]], [local]) if local else {} for of, arm in pairs.items()}
    sites = {site: _site(run, made, gaps, site) for site in scores[PERSONAL].sites}
    table: dict[str, Any] = {"sites": sites, "private": made["privacy"] is not None}
    if local:
        table["counts"] = {of: _counts(sites, key) for of, key in KEYS.items()}
        table["macro"] = {of: _macro(scores[arm], local) for of, arm in pairs.items()}
    return table


KEYS = {"personal": "difference", "global": "global_difference"}


def _site(run: run_folder.RunFolder, made: Mapping[str, Any], gaps: Mapping[str, Gaps], site: str) -> dict[str, Any]:
    kept = run.evaluation(f"{PERSONAL}/{site}") or {}
    primary, arms = made["primary"], made["arms"]
    row: dict[str, Any] = {
        "global": arms[compare.FEDERATED]["sites"][site][primary],
        "personal": kept["personal"]["sites"][site][primary],
        "chosen": arms[PERSONAL]["sites"][site][primary],
        "choice": kept["choice"]["name"],
        "validation_units": kept["choice"]["units"],
    }
    for of, key in KEYS.items():
        gap = gaps[of].get(site)
        row |= {} if gap is None else {"units": gap.units, "local_only": gap.second, key: _plain(gap)}
    gap = gaps["personal"].get(site)
    return row if gap is None else {**row, "word": statement.word(row["choice"], gap)}


def _plain(gap: bootstrap.Difference) -> dict[str, Any]:
    return {"mean": gap.mean, "low": gap.low, "high": gap.high, "no_interval": gap.reason, "word": gap.word}


def _counts(sites: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, int]:
    """How many sites gain, lose, keep their own model, and cannot tell."""
    counts = {"gain": 0, "lose": 0, "own": 0, "cannot tell": 0}
    for row in sites.values():
        own = key == KEYS["personal"] and row.get("word") == statement.DECLINED
        said = "own" if own else row.get(key, {}).get("word", bootstrap.UNKNOWN)
        counts[{bootstrap.GAINS: "gain", bootstrap.LOSES: "lose", "own": "own"}.get(said, "cannot tell")] += 1
    return counts


def _macro(first: statistics.Scores, local: statistics.Scores) -> dict[str, Any] | None:
    """Macro mean of an arm minus that of local-only, over the sites that both have."""
    gap = compare.difference(*compare.at_common_sites([first], [local]))
    return None if gap is None else dataclasses.asdict(gap[0])


# -- the report --------------------------------------------------------------------------------------------------------


def cards(benefit: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """The first figures of the report: how many hospitals gain, with their own adapter and with the global one."""
    if not benefit or "counts" not in benefit:
        return []
    number = len(benefit["sites"])
    return [
        (title, f"{benefit['counts'][of]['gain']} of {number}", _counted(benefit["counts"][of]))
        for title, of in (
            ("Hospitals that gain by joining", "personal"),
            ("... with the global adapter alone", "global"),
        )
    ]


def _counted(counts: Mapping[str, int]) -> str:
    own = f", {counts['own']} keep their own model" if counts["own"] else ""
    return f"{counts['lose']} lose, {counts['cannot tell']} cannot tell{own}"


def section(benefit: Mapping[str, Any] | None, name: str) -> str:
    """Counts, macro differences and the table of sites; ``name`` is the metric's."""
    if not benefit:
        return ""
    rows = [_row(site, row) for site, row in benefit["sites"].items()]
    head = (
        "hospital",
        "global",
        "personal",
        "as chosen",
        "the choice",
        "local-only",
        "chosen minus local-only",
        "word",
    )
    caption = (
        f"Test {name} at home. Personal: trained on from the global adapter at the hospital. As chosen: by its "
        "validation patients, among global, personal, mixes of their weights and its own local-only model."
    )
    return _words(benefit) + page.table(head, rows, caption, words=(4, 6, 7)) + page.paragraph(_guard(benefit), "soft")


def _row(site: str, row: Mapping[str, Any]) -> list[page.Cell]:
    between = shown(row["difference"]) if "difference" in row else None
    values = [row["global"], row["personal"], row["chosen"], row["choice"]]
    return [site, *values, row.get("local_only"), between, row.get("word")]


def shown(gap: Mapping[str, Any] | None) -> str | None:
    """A difference with its interval, as people read it."""
    if gap is None:
        return None
    between = "no interval" if gap["low"] is None else f"{gap['low']:+.3f} to {gap['high']:+.3f}"
    return f"{gap['mean']:+.3f} ({between})"


def _words(benefit: Mapping[str, Any]) -> str:
    if "counts" not in benefit:
        return page.paragraph("Without the baseline local-only there is nothing to compare with.")
    lines = []
    for of, subject in (("personal", "With what each hospital chose"), ("global", "With the global adapter alone")):
        counts, macro = benefit["counts"][of], shown(benefit["macro"][of])
        said = f"{subject}: {counts['gain']} of {len(benefit['sites'])} hospitals gain, {_counted(counts)}"
        lines.append(page.paragraph(f"{said}; macro minus local-only {macro}." if macro else f"{said}."))
    return "".join(lines)


def _guard(benefit: Mapping[str, Any]) -> str:
    sites = benefit["sites"].items()
    few = [f"{site} ({row['units']})" for site, row in sites if row.get("units", LEAST) < LEAST]
    bare = (
        " Personal adapters are trained on without noise: they have no differential privacy and must not leave a site."
        if benefit["private"]
        else ""
    )
    note = f" Under {LEAST} independent test units, so no interval: {', '.join(few)}." if few else ""
    thin = [
        f"{site} ({row['validation_units']})"
        for site, row in sites
        if row.get("validation_units", choice.FEW) < choice.FEW
    ]
    if thin:
        note += f" The choice rests on under {choice.FEW} validation patients, and promises little: {', '.join(thin)}."
    return (
        "Joined: better than its own model with the whole 95 % interval; worse: the same the other way; no difference: "
        "the interval holds 0; declined: it chose its own model; cannot tell: too few test units. The counts take no "
        f"difference for cannot tell.{note}{bare}"
    )
