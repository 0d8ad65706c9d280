"""A ledger's folder, the site's key, and locked recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm.config import schema
from fedvfm.ledger import ledger
from fedvfm.state import state
from fedvfm.trust import keys, locked_recipe
from tests.privacy.releases import RECIPE


@pytest.fixture(scope="session")
def key() -> keys.Private:
    return keys.make()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def book(folder: Path) -> ledger.Ledger:
    return ledger.Ledger(folder, "north", "record")


@pytest.fixture
def make_private_lock() -> Callable[..., locked_recipe.LockedRecipe]:
    """A locked recipe, without torch, with this ``[privacy]``."""

    def make(privacy: dict[str, Any]) -> locked_recipe.LockedRecipe:
        values = {"backbone": {"name": "x", "sha256": RECIPE}, "data": {"class_names": ["rest", "cell"]}, "rounds": 3}
        chosen = schema.parse(schema.Recipe, {**values, **({"privacy": privacy} if privacy else {})}, "recipe")
        rows = state.Manifest.of([state.ArraySpec("head.bias", (2,), "head")])
        initial = state.AdapterState({"head.bias": np.ones(2, np.float32)})
        return locked_recipe.LockedRecipe.of(chosen, rows, initial, RECIPE, 1000)

    return make
