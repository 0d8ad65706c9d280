"""A ledger's folder, a budget, and claims on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import config, privacy_config, recipe, state
from fedvfm.privacy import base, ledger
from fedvfm.trust import keys, lock

RECIPE = "ab" * 32
MakeBudget = Callable[..., privacy_config.Budget]
MakeClaim = Callable[..., ledger.Claim]


def make_budget(**values: Any) -> privacy_config.Budget:
    given = {"data_set": "nuclei", "epsilon": 8.0, "delta": 1e-5, "unit": "record", **values}
    return privacy_config.Budget(**given)


def make_claim(round_number: int = 1, first: int = 0, last: int = 40, rounds: int = 1, **event: Any) -> ledger.Claim:
    """A release of records ``first`` to ``last``; rounds come to epsilon 4.02, 5.28, 6.30, 7.20, 8.01."""
    given = {"mechanism": "record-level", "unit": "record", "noise_multiplier": 1.1, "sample_rate": 0.1, "steps": 30}
    made = base.PrivacyEvent(**{**given, "clip": 1.0, **event})
    names = [f"sample {number}" for number in range(first, last)]
    start = hashlib.sha256(f"base {round_number}".encode()).hexdigest()
    return ledger.Claim(RECIPE, round_number, start, made, names, rounds)


@pytest.fixture(scope="session")
def budget() -> MakeBudget:
    return make_budget


@pytest.fixture(scope="session")
def claim() -> MakeClaim:
    return make_claim


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
def make_private_lock() -> Callable[..., lock.Lock]:
    """A locked recipe, without torch, with this ``[privacy]``."""

    def make(privacy: dict[str, Any]) -> lock.Lock:
        values = {"backbone": {"name": "x", "sha256": RECIPE}, "data": {"class_names": ["rest", "cell"]}, "rounds": 3}
        chosen = config.parse(config.Recipe, {**values, **({"privacy": privacy} if privacy else {})}, "recipe")
        rows = state.Manifest.of([state.ArraySpec("head.bias", (2,), "head")])
        initial = state.AdapterState({"head.bias": np.ones(2, np.float32)})
        return lock.of(recipe.LockedRecipe(chosen, rows, initial, RECIPE, 1000))

    return make
