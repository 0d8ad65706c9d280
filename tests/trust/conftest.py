"""A locked recipe without torch, a server's state folder, and an invite with the fingerprint that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import config, state
from fedvfm.server import enrolment
from fedvfm.trust import documents, invites, lock

SHA = "ab" * 32

MakeLock = Callable[..., lock.LockedRecipe]
MakeServer = Callable[..., enrolment.State]


def make_lock(**values: Any) -> lock.LockedRecipe:
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
    chosen = config.parse(config.Recipe, {**base, **values}, "recipe")
    initial = state.AdapterState({spec.name: np.ones(spec.shape, np.float32) for spec in rows})
    return lock.LockedRecipe.of(chosen, rows, initial, SHA, 1000)


@pytest.fixture(scope="session", name="make_lock")
def make_lock_fixture() -> MakeLock:
    return make_lock


@pytest.fixture(scope="session")
def make_server() -> MakeServer:
    def make(folder: Path, *sites: str, **values: Any) -> enrolment.State:
        plan = enrolment.Plan("trial", "server.example:8443", ("127.0.0.1",), sites or ("north", "south"))
        return enrolment.init(folder, plan, make_lock(**values))

    return make


@pytest.fixture
def server(tmp_path: Path, make_server: MakeServer) -> enrolment.State:
    return make_server(tmp_path / "server")


@pytest.fixture
def invite(server: enrolment.State) -> invites.Invite:
    return documents.read(server.invite_path("north"), invites.Invite, "invite")
