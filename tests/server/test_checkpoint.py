"""A checkpoint holds every adapter to the last bit, whatever its arrays' shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.state import checkpoint, state


def test_round_trip_with_the_rules_own_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.standard_normal((3, 4)).astype(np.float32),
        "columns first": np.asarray(rng.standard_normal((3, 4)), dtype=np.float32, order="F"),
        "one number": np.array(0.5, np.float32),
        "none": np.zeros((0, 3), np.float32),
    }
    adapter = state.AdapterState(arrays)
    path = checkpoint.save(tmp_path, 7, adapter, {"momentum": np.ones(2, np.float32)}, "recipe-hash")
    assert path.name == "round-00007.safetensors"
    found, rule, marks = checkpoint.read(path)
    assert found == adapter
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in arrays.items()}
    np.testing.assert_array_equal(rule["momentum"], [1, 1])
    kept = state.AdapterState(rule).fingerprint
    assert marks == {"round": "7", "recipe": "recipe-hash", "fingerprint": adapter.fingerprint, "kept": kept}
    assert path.stat().st_mode & 0o077 == 0, "an adapter is for its owner alone"
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


def test_prune_keeps_the_last_ones_and_others_files(tmp_path: Path) -> None:
    adapter = state.AdapterState({})
    for number in range(1, 5):
        checkpoint.save(tmp_path, number, adapter, {}, "hash")
    checkpoint.write(tmp_path / "best.safetensors", adapter, {})
    checkpoint.prune(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors",
        "round-00003.safetensors",
        "round-00004.safetensors",
    ]


def test_every_cut_and_every_flipped_byte_is_found(tmp_path: Path) -> None:
    adapter = state.AdapterState({"a": np.arange(3, dtype=np.float32)})
    path = checkpoint.save(tmp_path, 1, adapter, {}, "hash")
    data = path.read_bytes()
    start = len(data) - 12
    for damaged in [data[:stop] for stop in range(0, len(data), 7)] + [
        data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :] for i in range(start, len(data))
    ]:
        path.write_bytes(damaged)
        with pytest.raises(errors.CheckpointError, match="Restore it from a backup"):
            checkpoint.read(path)
