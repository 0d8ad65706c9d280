"""The record beside fetched and imported weights: what they were, so that damage is found later. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedvfm import errors
from fedvfm.config import licence as terms
from fedvfm.storage import storage

FILE = "fedvfm-weights.json"
ORIGINS = ("embedded", "imported", "hub")


@dataclass(frozen=True)
class Record:
    """What was stored under a name.

    Attributes:
        name: of the backbone.
        origin: one of ``ORIGINS``.
        sha256: identity of the weights, as ``weights.Located`` has it.
        config_sha256: identity of the settings.
        files: file name -> its sha256.
        folder: where the files lie, if not beside the record (Hugging Face's own cache).
        source: name and sha256 of the file they were made from, or the revision they were fetched at.
        licence, limits: of the weights, as who imported them said; see :mod:`fedvfm.config.licence`.
    """

    name: str
    origin: str
    sha256: str
    config_sha256: str
    files: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    source: str = ""
    licence: str = ""
    limits: Sequence[str] = ()


def write(folder: Path, record: Record, *, mode: int = 0o600) -> None:
    """Keep the record in ``folder``."""
    text = json.dumps(dataclasses.asdict(record), indent=2, sort_keys=True) + "\n"
    storage.write_text(folder / FILE, text, mode=mode)


def read(folder: Path) -> Record | None:
    """The record in ``folder``; None where there is none.

    Raises:
        WeightsError: if it cannot be read.
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Record(**values)
        texts = (found.name, found.origin, found.sha256, found.config_sha256, found.folder, found.source, found.licence)
        if not all(isinstance(text, str) for text in (*texts, *found.files.values(), *found.limits)):
            raise TypeError("a text is needed")
        if terms.faults(found.licence, found.limits):
            raise ValueError("no licence")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise errors.WeightsError(
            f"{path}: cannot be read ({type(error).__name__}). Remove {folder} and fetch or import the weights again"
        ) from None
    return found
