"""The result of a survey on disk: ``survey.json`` for scripts, ``survey.md`` for people, ``recipe.toml`` to go on with.

FOLDER/survey.json    every group with its bins, patients in each, at how many sites it is withheld
FOLDER/survey.md      the same as tables, and what is proposed and why
FOLDER/recipe.toml    a commented recipe with what is proposed in it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.report import quantity
from fedvfm.storage import storage
from fedvfm.survey import answer, layout, proposal

FILES = ("survey.json", "survey.md", "recipe.toml")


def write(
    folder: Path, result: answer.Merged, proposed: proposal.Proposal, backbone: str, note: str = ""
) -> list[Path]:
    """Write them; nothing is overwritten.

    Args:
        folder: new, or empty.
        result: of all sites.
        proposed: of it.
        backbone: of the proposed recipe.
        note: a sentence that stands at the head of the page.

    Raises:
        OutputInUse: if the folder holds anything.
    """
    recipe = proposal.recipe(result, proposed, backbone)
    values = {
        **answer.to_json(result),
        "proposed": {"backbone": backbone, "values": proposed.values, "reasons": dict(proposed.reasons)},
        "left_as_drafted": dict(proposed.left),
        "note": note,
    }
    require_free(folder)
    storage.private_folder(folder)
    texts = (json.dumps(values, indent=2, allow_nan=False) + "\n", page(result, proposed, note), recipe)
    for name, text in zip(FILES, texts, strict=True):
        storage.write_text(folder / name, text)
    return [folder / name for name in FILES]


def require_free(folder: Path) -> None:
    """Check that a result can be written here, before anything is computed for it.

    Raises:
        OutputInUse: if the folder holds anything.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise errors.OutputInUse(f"{folder} is not empty and is left as it is. Choose another --output")


def page(result: answer.Merged, proposed: proposal.Proposal, note: str = "") -> str:
    """The page in Markdown."""
    survey = result.survey
    least = f"fewer than {survey.least_patients} patients (or more, where a site's policy says so)"
    exact = f"Numbers that {least} have a part in are withheld."
    if result.noise:
        exact = "Every number has noise on it; the standard deviation stands beside each table."
    lines = [
        f"# {_cell(survey.title)}",
        "",
        *([_cell(survey.purpose), ""] if survey.purpose else []),
        *([f"**{_cell(note)}**", ""] if note else []),
        f"Survey `{survey.hash}`, answered by {quantity.of(len(result.sites), 'site')}: {', '.join(result.sites)}.",
        exact,
        "Each patient counts alike, however many images there are.",
        "",
        "## What is proposed",
        "",
        "| key | value | why |",
        "|---|---|---|",
        *(f"| `{key}` | `{json.dumps(proposed.values[key])}` | {_cell(why)} |" for key, why in proposed.reasons),
        *(f"| `{key}` | as drafted | {_cell(why)} |" for key, why in proposed.left),
        "",
    ]
    for group in layout.groups(survey):
        lines += _group(group, result.values[group.name], result.withheld[group.name], result.noise)
    return "\n".join(lines)


def _group(
    group: layout.Group,
    values: Sequence[float | None],
    withheld: Sequence[int],
    noise: Mapping[str, float],
) -> list[str]:
    unit = f" ({group.unit})" if group.unit else ""
    if group.span is not None:
        return _column(group, values, withheld, noise)
    rows = [
        f"| {_cell(label)} | {f'{value:.2f}'.rstrip('0').rstrip('.')} | {hidden or ''} |"
        for label, value, hidden in zip(group.labels, values, withheld, strict=True)
        if value is not None
    ]
    if not rows:
        return [f"## {group.name}{unit}", "", "All of it is withheld: too few patients in every bin.", ""]
    deviation = f"Noise: {noise[group.name]:.2f} patients." if group.name in noise else ""
    left = len(group.labels) - len(rows)
    bare = f"{quantity.of(left, 'bin')} without a number: nobody, or too few." if left else ""
    more = " ".join(part for part in (deviation, bare) if part)
    heads = ["| bin | patients | sites that withhold it |", "|---|---|---|"]
    return [f"## {group.name}{unit}", "", *heads, *rows, "", *([more, ""] if more else [])]


def _column(
    group: layout.Group, values: Sequence[float | None], withheld: Sequence[int], noise: Mapping[str, float]
) -> list[str]:
    seen, unit = layout.moments(group, values), f" ({_cell(group.unit)})" if group.unit else ""
    head = [f"## {_cell(group.name)}{unit}", ""]
    if seen is None:
        return [
            *head,
            "All of it is withheld: too few patients have a value or one that differs, or noise left none.",
            "",
        ]
    shown = f"{seen.count:.2f} patients, mean {seen.mean:.4g}, standard deviation {seen.deviation:.4g}."
    hidden = f"Withheld at {quantity.of(withheld[0], 'site')}." if withheld[0] else ""
    noised = f"Noise: {noise[group.name]:.2f} patients on each of the three sums." if group.name in noise else ""
    return [*head, " ".join(filter(None, (shown, hidden, noised))), ""]


def _cell(text: str) -> str:
    """Foreign text in Markdown: one line, no table, no markup."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    for char in "\\`*_[]<>|#!":
        plain = plain.replace(char, f"\\{char}")
    return plain
