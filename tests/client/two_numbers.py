"""A recipe whose adapter is two numbers, and a hospital that joined for it: nobody builds or trains a model."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.config import schema
from fedvfm.server import state_folder as enrolment
from fedvfm.state import state
from fedvfm.trust import locked_recipe

SHA = "ab" * 32
ROWS = state.Manifest.of([state.ArraySpec("head.bias", (2,), "head")])


def make_recipe(**values: Any) -> schema.Recipe:
    base = {
        "backbone": {"name": "some/backbone", "sha256": SHA},
        "data": {"class_names": ["rest", "cell"]},
        "rounds": 3,
        "evaluation": {"surface": False},
    }
    return schema.parse(schema.Recipe, {**base, **values}, "recipe")


def adapter(value: float) -> state.AdapterState:
    return state.AdapterState({"head.bias": np.full(2, value, np.float32)})


def build(asked: schema.Recipe) -> locked_recipe.LockedRecipe:
    """What the site itself makes of a recipe."""
    return locked_recipe.LockedRecipe.of(asked, ROWS, adapter(0.0), SHA, 1000)


@dataclass(frozen=True)
class Joined:
    """Both ends of the federation 'trial', and a policy that accepts its recipe and no more."""

    server: enrolment.State
    site: joining.State
    rules: schema.PolicyConfig


def join(folder: Path) -> Joined:
    """The hospital 'north' has approved the recipe; the coordinator has not looked at its request yet."""
    locked = build(make_recipe())
    plan = enrolment.Plan("trial", "a.example:1", (), ("north",))
    server = enrolment.init(folder / "server", plan, locked)
    invite = joining.read_invite(server.invite_path("north"), server.fingerprint())
    site = joining.join(folder / "site", invite, locked.hash)
    text = policy.accepting(policy.Facts.of(locked))
    rules = schema.parse(schema.PolicyConfig, tomllib.loads(text)["policy"], "policy")
    return Joined(server, site, rules)
