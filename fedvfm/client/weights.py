"""Whether this machine holds the weights that a recipe computes with; they are fetched only where a person says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedvfm import errors
from fedvfm.backbones import stored
from fedvfm.backbones import weights as backbones
from fedvfm.client import state_folder
from fedvfm.trust import locked_recipe, signed_documents


@dataclass(frozen=True)
class Fault:
    """What is wrong with the weights of a recipe on this machine.

    Attributes:
        problem: one sentence.
        remedy: what mends it, the command where one does.
    """

    problem: str
    remedy: str

    @property
    def note(self) -> str:
        """Both, for a terminal; the backbone's name is the coordinator's word."""
        return signed_documents.shown(f"{self.problem}. {self.remedy}")


def fault(recipe: locked_recipe.LockedRecipe) -> Fault | None:
    """What keeps this machine from computing with a recipe's backbone; None where nothing does. Downloads nothing."""
    settings = recipe.recipe.backbone
    if not recipe.backbone_sha256:
        return None
    try:
        located = backbones.locate(settings, download=False)
    except backbones.Missing:
        return Fault(f"backbone '{settings.name}' is not on this machine", backbones.remedy(settings))
    except errors.FedvfmError as error:
        return Fault(str(error), "fedvfm weights verify says what is damaged")
    if located.config_sha256 != recipe.backbone_config_sha256 and recipe.backbone_config_sha256:
        problem = f"'{settings.name}' in {located.folder} has other settings (config.json) than the recipe is locked to"
        return Fault(problem, backbones.remedy(settings))
    return None


def faults(recipes: Iterable[locked_recipe.LockedRecipe], *, fetch: bool = False) -> Sequence[Fault]:
    """What is wrong with the weights of these recipes, each backbone once.

    Args:
        recipes: approved ones.
        fetch: download what is missing first, because a person asked for it.

    Raises:
        WeightsError, ConfigError: if ``fetch`` is asked for and they cannot be brought here.
    """
    needed = {(recipe.backbone_sha256, recipe.recipe.backbone.name): recipe for recipe in recipes}
    remaining = []
    for recipe in needed.values():
        problem = fault(recipe)
        if problem is not None and fetch:
            stored.fetch(recipe.recipe.backbone)
            problem = fault(recipe)
        if problem is not None:
            remaining.append(problem)
    return remaining


def approved(where: state_folder.State) -> list[locked_recipe.LockedRecipe]:
    """The recipes that a person here approved, as far as their files are here."""
    return [where.find(recipe) for recipe in where.approvals.stand() if where.recipe_path(recipe).is_file()]
