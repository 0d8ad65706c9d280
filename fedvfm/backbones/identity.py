"""What names a backbone: the hash of its weights, and that of the settings they are computed with. Imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.storage import hash_chain

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
"""Beside the weights of a model of images and sentences; recipes pin the first."""
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
REMARKS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "source",
        "torch_dtype",
        "transformers_version",
    }
)
"""Keys of ``config.json`` that change nothing here: every backbone is read as float32, without a class head."""
_REFUSED = {
    "compression_config": "asks for compressed weights",
    "quantization_config": "asks for quantised weights",
    "transformers_weights": "names another file of weights than the one that is hashed",
}
"""Keys of ``config.json`` by which transformers would read other numbers than those of the weights that are pinned."""


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces, and once a process while the file's time and size stay what they are."""
    seen = path.stat()
    return _sha256_of(path, seen.st_mtime_ns, seen.st_size)


@functools.lru_cache(maxsize=256)
def _sha256_of(path: Path, changed_ns: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_settings(values: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of the settings, without remarks that change nothing (names, versions, labels)."""
    return hashlib.sha256(hash_chain.canonical(_settings(values)).encode()).hexdigest()


def _settings(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _settings(value) for key, value in values.items() if key not in REMARKS}
    return values


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that make the weights: one, or the shards and their index.

    Raises:
        WeightsError: if there are none, or a shard is missing.
    """
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        raise errors.WeightsError(
            f"{folder}: has no {SINGLE}; other formats are not read (they can carry code). Convert them once: "
            "fedvfm weights import FILE --name NAME"
        )
    places = read_json(folder / INDEX).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    wrong = [name for name in names if not _SHARD.fullmatch(name) or not (folder / name).is_file()]
    if wrong or not names:
        what = f"{len(wrong)} of {len(names)} shards are missing (first: {wrong[0]})" if wrong else "it names no shard"
        raise errors.WeightsError(f"{folder / INDEX}: {what}. Bring the folder here as a whole")
    return (*(folder / name for name in names), folder / INDEX)


def of_weights(files: Mapping[str, str]) -> str:
    """The hash that names weights, from the hashes of their files: the file's own, or that of a list of shards."""
    if len(files) == 1:
        return next(iter(files.values()))
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_files(files: Sequence[Path]) -> dict[str, str]:
    """File name -> sha256.

    Raises:
        WeightsError: if one cannot be read.
    """
    try:
        return {file.name: sha256_of(file) for file in files}
    except OSError as error:
        raise errors.WeightsError(f"{error.filename}: cannot be read: {error.strerror}") from None


def read_config(folder: Path) -> Mapping[str, Any]:
    """The values of a folder's ``config.json``.

    Raises:
        WeightsError: if it is missing or no table of settings, or asks for other numbers than those of the weights.
    """
    values = read_json(folder / CONFIG)
    found = _refused(values)
    if found:
        raise errors.WeightsError(
            f"{folder / CONFIG}: '{found}' {_REFUSED[found]}, which is not supported. Take a backbone without it"
        )
    return values


def _refused(values: Any) -> str:
    """The first key that is not followed, at any depth; empty where there is none."""
    inner = values.items() if isinstance(values, Mapping) else ()
    return next((found for key, value in inner if (found := key if key in _REFUSED else _refused(value))), "")


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file of settings.

    Raises:
        WeightsError: if it is missing or no table.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        hash_chain.canonical(values)
    except (OSError, ValueError, RecursionError) as error:
        raise errors.WeightsError(
            f"{path}: cannot be read ({type(error).__name__}). Fetch the backbone again"
        ) from None
    if not isinstance(values, dict):
        raise errors.WeightsError(f"{path}: is not a table of settings. Fetch the backbone again")
    return values
