"""LockedRecipe: a recipe with what a machine that has the backbone's shapes knows: manifest and initial adapter."""

from __future__ import annotations

from dataclasses import dataclass

from fedvfm import config, state


@dataclass(frozen=True)
class LockedRecipe:
    """What a federation starts from. Holds no torch object: the server wing reads it with NumPy alone.

    Attributes:
        recipe: the resolved recipe.
        manifest: the exact arrays of the adapter at the recipe's rank.
        initial: the adapter of round 0.
        backbone_sha256: hash of the frozen weights (empty where they are made from the seed).
        backbone_parameters: number of frozen parameters.
        backbone_config_sha256: hash of the settings the weights are computed with; empty where it is not known (no
            settings, or a recipe locked without the weights).
    """

    recipe: config.Recipe
    manifest: state.Manifest
    initial: state.AdapterState
    backbone_sha256: str
    backbone_parameters: int
    backbone_config_sha256: str = ""
