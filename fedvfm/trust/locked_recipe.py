"""LockedRecipe: a recipe, what it trains and what it begins with. Both ends read it without torch.

What people approve is ``recipe.hash``, which covers every resolved value of the recipe, the sha256 of the backbone's
weights among them. The manifest follows from the recipe and is what the site builds again before it trains. As a file
it names the adapter of round 0 by its fingerprint; the arrays lie beside it or stay at the server.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.state import state
from fedvfm.trust import signed_documents

MAX_ARRAYS = 20_000
MOST_BYTES = 2 * 1024**3 - 64 * 1024**2
"""Bytes of an adapter that travels: of a larger reply the public port takes no part."""
ROOM = 100_000
"""Bytes of an invite besides the locked recipe."""

Version = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+-]{0,63}$")]
_Rows = Annotated[tuple[state.ArraySpec, ...], Field(strict=False, max_length=MAX_ARRAYS)]


def version() -> str:
    """The installed release of fedvfm."""
    return metadata.version("fedvfm")


def _manifest(value: Any, rows: Callable[[Any], tuple[state.ArraySpec, ...]]) -> state.Manifest:
    if isinstance(value, state.Manifest):
        return value
    manifest = state.Manifest(rows(value))
    if any(row != spec.to_json() for row, spec in zip(value, manifest, strict=True)):
        raise ValueError("a row does not state every value")
    return manifest


_Written = Annotated[_Rows, pydantic.WrapValidator(_manifest), pydantic.PlainSerializer(state.Manifest.to_json)]


def require_travels(locked: LockedRecipe) -> None:
    """Check that the recipe's adapter and its list of arrays can reach a site, and an update the coordinator.

    Raises:
        AdapterTooLarge: if not, before anything is made of the recipe.
    """
    require_size(locked.manifest)
    text = len(signed_documents.to_text(locked)) + ROOM
    if text > signed_documents.MAX_BYTES:
        length = f"its list of {len(locked.manifest)} arrays makes invites of {text:,} bytes"
        fault = f"{length}; sites read {signed_documents.MAX_BYTES:,} at most. Adapt fewer layers"
        raise errors.AdapterTooLarge("the recipe's adapter", [fault])


def require_size(manifest: state.Manifest) -> None:
    """As :func:`require_travels`, of the numbers alone, before any of them is drawn.

    Raises:
        AdapterTooLarge: if they are too many.
    """
    size = 4 * manifest.parameters
    if size > MOST_BYTES:
        length = f"{manifest.parameters:,} numbers are {size / 1024**3:,.1f} GiB a message"
        fault = f"{length}; {MOST_BYTES / 1024**3:.1f} GiB travel at most. Lower adapter.rank, or adapt fewer layers"
        raise errors.AdapterTooLarge("the recipe's adapter", [fault])


class LockedRecipe(schema.Strict):
    """What a federation starts from. Holds no torch object: the server wing reads it with NumPy alone.

    Attributes:
        hash: of the recipe; checked.
        version: of the fedvfm that locked it.
        recipe: the resolved recipe.
        manifest: the exact arrays of the adapter at the recipe's rank.
        initial: fingerprint of the adapter of round 0.
        backbone_sha256: of the frozen weights; empty where they are made from the seed.
        backbone_config_sha256: of the settings the weights are computed with; empty where it is not known (no
            settings, or a recipe locked without the weights).
        backbone_parameters: number of frozen parameters.
    """

    format: Literal["fedvfm-recipe-1"] = "fedvfm-recipe-1"
    hash: schema.Sha256
    version: Version
    recipe: schema.Recipe
    manifest: Annotated[
        state.Manifest, pydantic.GetPydanticSchema(lambda _, handler: handler.generate_schema(_Written))
    ]
    initial: schema.Sha256
    backbone_sha256: schema.Sha256 | Literal[""]
    backbone_config_sha256: schema.Sha256 | Literal[""] = ""
    backbone_parameters: Annotated[int, Field(ge=0)]

    @pydantic.model_validator(mode="after")
    def _fits(self, info: pydantic.ValidationInfo) -> LockedRecipe:
        if self.recipe.hash != self.hash:
            raise ValueError("the recipe is not the one its hash names")
        # A simulation locks a recipe to whatever weights are here; a file goes to others, who must get the same.
        if info.context == signed_documents.FILE and (self.recipe.backbone.sha256 or "") != self.backbone_sha256:
            raise ValueError("the recipe does not pin the backbone it is locked to")
        names = [spec.name for spec in self.manifest]
        if names != sorted(set(names)):
            raise ValueError("the manifest repeats a name or is not sorted")
        return self

    @classmethod
    def of(
        cls,
        recipe: schema.Recipe,
        manifest: state.Manifest,
        adapter: state.AdapterState,
        backbone_sha256: str = "",
        backbone_parameters: int = 0,
        backbone_config_sha256: str = "",
    ) -> LockedRecipe:
        """A recipe that is locked here, with its adapter of round 0."""
        locked = cls(
            hash=recipe.hash,
            version=version(),
            recipe=recipe,
            manifest=manifest,
            initial=adapter.fingerprint,
            backbone_sha256=backbone_sha256,
            backbone_config_sha256=backbone_config_sha256,
            backbone_parameters=backbone_parameters,
        )
        return locked.with_adapter(adapter)

    @functools.cached_property
    def adapter(self) -> state.AdapterState:
        """The adapter of round 0; no field, so it is in no file and two locked recipes are equal without it.

        Raises:
            CheckpointError: of a locked recipe that was read from its file alone.
        """
        raise errors.CheckpointError("the locked recipe's initial adapter (.safetensors) must lie beside its .json")

    @property
    def holds_adapter(self) -> bool:
        """Whether the adapter of round 0 is at hand: the recipe was locked here, or read from both its files."""
        return "adapter" in self.__dict__

    def with_adapter(self, adapter: state.AdapterState, where: Path | str = "adapter") -> LockedRecipe:
        """The same, holding the adapter of round 0: what the server's round loop takes.

        Raises:
            CheckpointError: if ``adapter``, which comes from ``where``, is not the one it names.
        """
        if adapter.fingerprint != self.initial or not self.manifest.fits(adapter):
            raise errors.CheckpointError(
                f"{where}: is not the initial adapter of recipe {self.hash[:12]}. Lock it again, or restore a backup"
            )
        holding = self.model_copy()
        holding.__dict__["adapter"] = adapter
        return holding
