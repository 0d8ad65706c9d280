"""A recipe whose adapter is two numbers, and a hospital that joined for it: nobody builds or trains a model."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedvfm import config, state
from fedvfm.client import joining, policy
from fedvfm.server import enrolment
from fedvfm.trust import lock

SHA = "ab" * 32
ROWS = state.Manifest.of([state.ArraySpec("head.bias", (2,), "head")])


def make_recipe(**values: Any) -> config.Recipe:
    base = {
        "backbone": {"name": "some/backbone", "sha256": SHA},
        "data": {"class_names": ["rest", "cell"]},
        "rounds": 3,
        "evaluation": {"surface": False},
    }
    return config.parse(config.Recipe, {**base, **values}, "recipe")


def adapter(value: float) -> state.AdapterState:
    return state.AdapterState({"head.bias": np.full(2, value, np.float32)})


def build(asked: config.Recipe) -> lock.LockedRecipe:
    """What the site itself makes of a recipe."""
    return lock.LockedRecipe.of(asked, ROWS, adapter(0.0), SHA, 1000)


@dataclass(frozen=True)
class Joined:
    """Both ends of the federation 'trial', and a policy that accepts its recipe and no more."""

    server: enrolment.State
    site: joining.State
    rules: config.PolicyConfig


def join(folder: Path) -> Joined:
    """The hospital 'north' has approved the recipe; the coordinator has not looked at its request yet."""
    locked = build(make_recipe())
    plan = enrolment.Plan("trial", "a.example:1", (), ("north",))
    server = enrolment.init(folder / "server", plan, locked)
    invite = joining.read_invite(server.invite_path("north"), server.fingerprint())
    site = joining.join(folder / "site", invite, locked.hash)
    text = policy.accepting(policy.Facts.of(locked))
    rules = config.parse(config.PolicyConfig, tomllib.loads(text)["policy"], "policy")
    return Joined(server, site, rules)
