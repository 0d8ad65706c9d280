"""An adapter that could not travel is refused before a folder, an invite or a round is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.flower import guards
from fedvfm.model import locking
from fedvfm.server import state_folder
from fedvfm.state import state
from fedvfm.trust import locked_recipe, signed_documents


def big(*shape: int) -> state.Manifest:
    return state.Manifest.of([state.ArraySpec("head.weight", shape, "head")])


def test_the_largest_one_fits_the_public_port() -> None:
    assert locked_recipe.MOST_BYTES + 32 * 1024**2 <= guards.MAX_REPLY
    assert guards.most_parts(guards.MAX_REPLY) >= -(-locked_recipe.MOST_BYTES // guards.PART_BYTES) + 16


def test_too_many_numbers() -> None:
    locked_recipe.require_size(big(1024, locked_recipe.MOST_BYTES // 4 // 1024))
    with pytest.raises(errors.AdapterTooLarge) as caught:
        locked_recipe.require_size(big(1024, 1 + locked_recipe.MOST_BYTES // 4 // 1024))
    assert caught.value.code == "adapter-too-large"


def test_init_makes_nothing_of_one(tmp_path: Path, make_lock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = state_folder.Plan("trial", "server.example:8443", (), ("north",))
    monkeypatch.setattr(locked_recipe, "MOST_BYTES", 100)
    with pytest.raises(errors.AdapterTooLarge):
        state_folder.init(tmp_path / "server", plan, make_lock())
    with pytest.raises(errors.AdapterTooLarge):
        locking.write(tmp_path / "recipe.json", make_lock())
    assert list(tmp_path.iterdir()) == []


def test_a_list_of_arrays_that_no_site_would_read(tmp_path: Path, make_lock: Any) -> None:
    rows = state.Manifest.of([state.ArraySpec(f"head.{at:05d}.{'x' * 90}", (1,), "head") for at in range(15_000)])
    arrays = state.AdapterState({spec.name: np.zeros(1, np.float32) for spec in rows})
    small = make_lock()
    locked = locked_recipe.LockedRecipe.of(small.recipe, rows, arrays, small.backbone_sha256, 1000)
    assert len(signed_documents.to_text(locked)) > signed_documents.MAX_BYTES
    plan = state_folder.Plan("trial", "server.example:8443", (), ("north",))
    with pytest.raises(errors.AdapterTooLarge):
        state_folder.init(tmp_path / "server", plan, locked)
    assert list(tmp_path.iterdir()) == []
