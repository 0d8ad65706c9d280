"""A locked recipe without torch, a server's state folder, and an invite with the fingerprint that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm.config import schema
from fedvfm.server import state_folder
from fedvfm.state import state
from fedvfm.trust import invites, locked_recipe, signed_documents

SHA = "ab" * 32

MakeLock = Callable[..., locked_recipe.LockedRecipe]
MakeServer = Callable[..., state_folder.State]


def make_lock(**values: Any) -> locked_recipe.LockedRecipe:
    rows = state.Manifest.of(
        [
            state.ArraySpec("block.00.q.A", (2, 7), "lora", "A", "block.00.q", 2.0),
            state.ArraySpec("block.00.q.B", (5, 2), "lora", "B", "block.00.q", 2.0),
            state.ArraySpec("head.bias", (2,), "head"),
        ]
    )
    base = {
        "backbone": {"name": "some/backbone", "sha256": SHA},
        "data": {"class_names": ["rest", "cell"]},
        "rounds": 3,
    }
    chosen = schema.parse(schema.Recipe, {**base, **values}, "recipe")
    initial = state.AdapterState({spec.name: np.ones(spec.shape, np.float32) for spec in rows})
    return locked_recipe.LockedRecipe.of(chosen, rows, initial, SHA, 1000)


@pytest.fixture(scope="session", name="make_lock")
def make_lock_fixture() -> MakeLock:
    return make_lock


@pytest.fixture(scope="session")
def make_server() -> MakeServer:
    def make(folder: Path, *sites: str, **values: Any) -> state_folder.State:
        plan = state_folder.Plan("trial", "server.example:8443", ("127.0.0.1",), sites or ("north", "south"))
        return state_folder.init(folder, plan, make_lock(**values))

    return make


@pytest.fixture
def server(tmp_path: Path, make_server: MakeServer) -> state_folder.State:
    return make_server(tmp_path / "server")


@pytest.fixture
def invite(server: state_folder.State) -> invites.Invite:
    return signed_documents.read(server.invite_path("north"), invites.Invite, "invite")
