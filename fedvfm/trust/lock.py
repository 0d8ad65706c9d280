"""Lock: a locked recipe as a file. Both ends read it without torch; the arrays lie beside it or stay at the server.

What people approve is ``recipe.hash``, which covers every resolved value of the recipe, the sha256 of the backbone's
weights among them. The manifest follows from the recipe and is what the site builds again before it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm import config, state
from fedvfm import recipe as recipes

MAX_ARRAYS = 20_000

Version = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+-]{0,63}$")]
Side = Annotated[int, Field(ge=0, le=10**9)]


def version() -> str:
    """The installed release of fedvfm."""
    return metadata.version("fedvfm")


class ArrayRow(config.Strict):
    """One array of the manifest; see :class:`fedvfm.state.ArraySpec`."""

    name: config.Name
    shape: Annotated[tuple[Side, ...], Field(strict=False, max_length=8)]
    group: config.Name
    role: Literal["A", "B", "dense"]
    pair: Annotated[str, Field(max_length=200)]
    scale: float
    dtype: Literal["float32"]


class Lock(config.Strict):
    """A recipe, what it trains, and the fingerprint of the adapter it begins with.

    Attributes:
        hash: of the recipe; checked.
        version: of the fedvfm that locked it.
        initial: fingerprint of the adapter of round 0.
        backbone_sha256: of the frozen weights; empty where they are made from the seed.
    """

    format: Literal["fedvfm-recipe-1"] = "fedvfm-recipe-1"
    hash: config.Sha256
    version: Version
    recipe: config.Recipe
    manifest: Annotated[tuple[ArrayRow, ...], Field(strict=False, max_length=MAX_ARRAYS)]
    initial: config.Sha256
    backbone_sha256: config.Sha256 | Literal[""]
    backbone_config_sha256: config.Sha256 | Literal[""] = ""
    backbone_parameters: Annotated[int, Field(ge=0)]

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Lock:
        if self.recipe.hash != self.hash:
            raise ValueError("the recipe is not the one its hash names")
        if (self.recipe.backbone.sha256 or "") != self.backbone_sha256:
            raise ValueError("the recipe does not pin the backbone it is locked to")
        names = [row.name for row in self.manifest]
        if names != sorted(set(names)):
            raise ValueError("the manifest repeats a name or is not sorted")
        return self

    @property
    def rows(self) -> state.Manifest:
        """The manifest."""
        return state.Manifest.from_json(row.model_dump() for row in self.manifest)

    def with_initial(self, initial: state.AdapterState) -> recipes.LockedRecipe:
        """What the server's round loop takes.

        Raises:
            ValueError: if ``initial`` is not the adapter the lock names.
        """
        if initial.fingerprint != self.initial:
            raise ValueError("another initial adapter")
        return recipes.LockedRecipe(
            self.recipe,
            self.rows,
            initial,
            self.backbone_sha256,
            self.backbone_parameters,
            self.backbone_config_sha256,
        )


def of(locked: recipes.LockedRecipe) -> Lock:
    """The file form of a locked recipe; the recipe must pin its backbone."""
    return Lock(
        hash=locked.recipe.hash,
        version=version(),
        recipe=locked.recipe,
        manifest=tuple(ArrayRow(**{**row, "shape": tuple(row["shape"])}) for row in locked.manifest.to_json()),
        initial=locked.initial.fingerprint,
        backbone_sha256=locked.backbone_sha256,
        backbone_config_sha256=locked.backbone_config_sha256,
        backbone_parameters=locked.backbone_parameters,
    )


def find(known: Sequence[str], asked: str) -> list[str]:
    """Of known hashes those that ``asked`` names: itself, or all it begins, if it is 12 letters or more."""
    return [one for one in known if one == asked or (len(asked) >= 12 and one.startswith(asked))]
