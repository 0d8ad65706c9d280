"""Checkpoints: the global adapter after every round, as safetensors, whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from fedvfm import errors
from fedvfm.state import state
from fedvfm.storage import storage

_RULE = "rule."


def path_of(folder: Path, round_number: int) -> Path:
    """The checkpoint file of a round."""
    return folder / f"round-{round_number:05d}.safetensors"


def save(
    folder: Path,
    round_number: int,
    adapter: state.AdapterState,
    rule_state: Mapping[str, state.Array],
    recipe_hash: str,
) -> Path:
    """Write the checkpoint of a round; the rule's own arrays lie beside the adapter's under ``rule.``."""
    path = path_of(folder, round_number)
    write(path, adapter, {"round": str(round_number), "recipe": recipe_hash}, rule_state)
    return path


def write(
    path: Path, adapter: state.AdapterState, metadata: Mapping[str, str], extra: Mapping[str, state.Array] | None = None
) -> None:
    """Write an adapter as safetensors with its fingerprint in the metadata."""
    arrays = {name: np.asarray(array, order="C") for name, array in adapter.items()}
    arrays |= {_RULE + name: np.asarray(array, order="C") for name, array in (extra or {}).items()}
    marks = {**metadata, "fingerprint": adapter.fingerprint, "kept": state.AdapterState(extra or {}).fingerprint}
    storage.write_bytes(path, safetensors.numpy.save(arrays, metadata=marks))


def read(path: Path) -> tuple[state.AdapterState, dict[str, state.Array], dict[str, str]]:
    """Adapter, rule arrays and metadata.

    Raises:
        CheckpointError: if the file is missing, damaged, or not the bytes its fingerprint names.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            marks = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        adapter = state.AdapterState({name: array for name, array in arrays.items() if not name.startswith(_RULE)})
    except (OSError, TypeError, safetensors.SafetensorError, errors.ProtocolError) as error:
        raise errors.CheckpointError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}). Restore it from a backup"
        ) from None
    if marks.get("fingerprint") != adapter.fingerprint:
        raise errors.CheckpointError(
            f"{path}: the adapter's fingerprint is {adapter.fingerprint[:12]}, the file says "
            f"{str(marks.get('fingerprint'))[:12]}: "
            "the file was changed or is damaged. Restore it from a backup"
        )
    kept = {name[len(_RULE) :]: array for name, array in arrays.items() if name.startswith(_RULE)}
    if marks.get("kept") != state.AdapterState(kept).fingerprint:
        raise errors.CheckpointError(
            f"{path}: what the server kept beside the adapter was changed. Restore it from a backup"
        )
    return adapter, kept, marks


def round_of(path: Path) -> int:
    """The round of a checkpoint file."""
    return int(path.stem.partition("-")[2])


def prune(folder: Path, keep_from: int, keep: Collection[int] = ()) -> None:
    """Remove checkpoints of rounds before ``keep_from`` (round 0 and the best one are not among them).

    Args:
        folder: of the checkpoints.
        keep_from: the first round that stays.
        keep: earlier rounds that stay.
    """
    for path in sorted(folder.glob("round-*.safetensors")):
        if round_of(path) < keep_from and round_of(path) not in keep:
            path.unlink(missing_ok=True)
