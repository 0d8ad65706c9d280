"""The parts of the report that say how a result came to be: hospitals, environment, settings.

Rounds and bytes: :mod:`fedvfm.report.rounds`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from fedvfm.backbones import licences
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import feature_counts
from fedvfm.report import page

FEW_ROWS = 12
PACKAGES = ("fedvfm", "flwr", "torch", "transformers", "peft", "monai", "numpy", "scipy", "safetensors")


# -- hospitals and environment -----------------------------------------------------------------------------------------


def hospitals(members: Sequence[virtual_hospitals.Hospital], what: schema.Experiment) -> str:
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


def environment(what: schema.Experiment, made: Mapping[str, Any]) -> str:
    """What ran where, under which seed and settings."""
    head = ("what", "value")
    rows: list[list[page.Cell]] = [[name, value] for name, value in _environment(what, made)]
    table = page.table(head, rows, "Where and with what this report was made.", words=(1,))
    values = json.dumps(what.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    return table + page.folded("The experiment, every setting resolved", f"<pre>{page.text(values)}</pre>")


def _environment(what: schema.Experiment, made: Mapping[str, Any]) -> list[tuple[str, page.Cell]]:
    recipe, backbone = what.recipe, made["backbone"]
    return [
        ("seed", str(made["seed"])),
        ("recipe hash", _code(recipe.hash)),
        ("adapter fingerprint", _code(made["fingerprint"])),
        ("backbone", f"{backbone['name']}, {backbone['parameters']:,} parameters"),
        ("backbone sha256", _code(backbone["sha256"]) if backbone["sha256"] else "made from the seed"),
        *((("backbone licence", str(licences.of(recipe.backbone))),) if backbone["sha256"] else ()),
        ("engine", made["engine"]),
        ("device", _device(what.device)),
        ("precision", f"{made.get('precision') or 'not recorded'}; the recipe says {recipe.precision}"),
        ("threads", _threads(made)),
        ("wall time", f"{made['wall_s']:,.0f} s, all arms"),
        ("peak memory", f"{made['peak_mib']:,.0f} MiB"),
        *((("features", str(feature_counts.Counts(**made["features"]))),) if made.get("features") else ()),
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
