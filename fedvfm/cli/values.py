"""What keys may be set to, beyond numbers: names in tables, windows, class orders; and exit and error codes.

Nothing is loaded to say it: a table names places, and the docstring there is read from the source.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedvfm import errors, registry
from fedvfm.adapters import table as adapters
from fedvfm.aggregators import table as rules
from fedvfm.backbones import table as backbones
from fedvfm.config import schema
from fedvfm.data.partition import partitioners
from fedvfm.data.readiness import catalogue
from fedvfm.data.sources import table as sources
from fedvfm.protocol import codecs
from fedvfm.simulation import experiment, tables
from fedvfm.tasks import table as tasks

Rows = Mapping[str, str]

AUGMENTATIONS = ("affine", "channel-dropout", "flip", "intensity", "invert", "mirror", "noise", "rot90")
"""Names of the table in :mod:`fedvfm.data.transforms`, which needs torch; a test compares the two."""

_OWN = {
    "appearance": "As iid; each hospital shows its images as a scanner of its own would (options: strength).",
    "k-shot": "As iid; each hospital has partition.shots training samples of a class, and no more.",
}
"""Of names whose place in the source is another's."""

_FOLDER = {
    "layout": "auto (recognised), pairs, table, classes, nnunet, datalist, studies, cases, slides, bids or images.",
    "mpp": "Of slides: micrometres a pixel of those whose files do not say them, 0.25 for 40x.",
    "class_names": "The classes in the order of the masks' values, the background first.",
    "mask_values": "What the masks hold for these classes; left out: 0, 1, 2, ... or 0 and 255.",
    "channels": "Which one or three files of a case, in the order of the recipe's channels.",
    "series": "Which one of a DICOM folder with several: number, modality, plane, 512x512, 1.25mm, most.",
    "overlap": "refuse, or last: of DICOM-SEG or RT structures that overlap the last counts; versions together.",
    "ids": "numbers, or names: file names in results, which often are patient numbers.",
    "patients": "hash: groups DICOM studies by a keyed hash of Patient ID.",
    "patients_key": "File of that hash's key; left out, it is made once and kept in the data folder.",
    "fold": "Of datalist: the fold of training to test on; a list validation stays what it is.",
    "instances": "true: masks number the objects of one class (QuPath, Cellpose); those that touch are drawn apart.",
    "suffix": "Of bids: the ending of the images' names, as T1w.",
}


def _said(place: str) -> str:
    """The first paragraph of the docstring of ``module:name``; empty where there is none."""
    module, _, name = place.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    nodes = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    docs = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds) and node.name == name)
    return " ".join((next(docs, None) or "").split("\n\n")[0].split()).replace("``", "")


def _named(table: registry.Table) -> Callable[[], Rows]:
    def rows() -> Rows:
        places = {name: table.place(name) for name in table.names()}
        return {name: _OWN.get(name) or _said(place) for name, place in places.items()}

    return rows


def _augmentations() -> Rows:
    return {name: _said(f"fedvfm.data.transforms:{name.replace('-', '_')}") for name in AUGMENTATIONS}


def _windows() -> Rows:
    shown = {name: (centre, width) for name, (centre, width) in schema.WINDOWS.items()}
    return {name: f"centre {centre:g}, width {width:g} Hounsfield units" for name, (centre, width) in shown.items()}


def _classes() -> Rows:
    """The class orders of the bundled experiments, which are those of their sources."""
    read = {name: schema.read_toml(path) for name, path in experiment.bundled().items()}
    orders = {name: enumerate(values["recipe"]["data"]["class_names"]) for name, values in read.items()}
    return {name: ", ".join(f"{number} {word}" for number, word in order) for name, order in orders.items()}


def _exit_codes() -> Rows:
    kinds = sorted((kind for kind in errors.tree() if kind.__module__ == errors.__name__), key=lambda k: k.exit_code)
    rows: dict[str, str] = {}
    for kind in kinds:
        text = f"{kind.code}: {' '.join((kind.__doc__ or '').split(chr(10) * 2)[0].split())}"
        rows[str(kind.exit_code)] = f"{rows[str(kind.exit_code)]} / {text}" if str(kind.exit_code) in rows else text
    return rows | {str(errors.NOT_READY): "data check or doctor found something that must be mended first."}


def _errors() -> Rows:
    kinds = {kind.code: kind for kind in errors.tree() if kind.__module__ == errors.__name__}
    texts = {code: " ".join((kind.__doc__ or "").split("\n\n")[0].split()) for code, kind in kinds.items()}
    return {code: f"{texts[code]} Exit code {kinds[code].exit_code}." for code in sorted(kinds)}


def _findings() -> Rows:
    return {code: f"{entry.why} {entry.remedy}" for code, entry in sorted(catalogue.ENTRIES.items())}


LISTS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "adapters": ("recipe.adapter.kind", _named(adapters.TABLE)),
    "attacks": ("experiment.attack.kind", _named(tables.ATTACKS)),
    "augmentations": ("recipe.data.augment", _augmentations),
    "backbones": ("recipe.backbone.name; beside these a Hugging Face name or a folder", _named(backbones.TABLE)),
    "baselines": ("experiment.baselines", _named(tables.BASELINES)),
    "class-orders": ("recipe.data.class_names of the bundled experiments: number and name", _classes),
    "codecs": ("recipe.codec", _named(codecs.TABLE)),
    "engines": ("experiment.engine", _named(tables.ENGINES)),
    "errors": ("codes of errors", _errors),
    "exit-codes": ("what a command ends with; 0: done, 2 also for a wrong command line", _exit_codes),
    "findings": ("codes of 'data check'", _findings),
    "folder-options": ('data.options, with data.source = "folder"', lambda: _FOLDER),
    "partitions": ("experiment.partition.kind", _named(partitioners.TABLE)),
    "rules": ("recipe.aggregation.rule", _named(rules.TABLE)),
    "sources": ("data.source", _named(sources.TABLE)),
    "tasks": ("recipe.task.kind", _named(tasks.TABLE)),
    "windows": ("recipe.data.window", _windows),
}
"""Name of a list -> where its names go, and the rows."""


def named(word: str) -> Iterator[tuple[str, str, str]]:
    """The lists that have this name: list, name, meaning. ``data.options.layout`` is a name of the folder's options."""
    head, _, last = word.rpartition("options.")
    for name, (_, rows) in LISTS.items():
        sought = last if name == "folder-options" and head else word
        if (text := rows().get(sought)) is not None:
            yield name, sought, text
