"""The table of privacy mechanisms: what is in it can be trained with, what is not is refused."""

from __future__ import annotations

from fedvfm import errors, registry
from fedvfm.config import privacy, schema
from fedvfm.privacy import base

TABLE = registry.Table(
    "privacy mechanism",
    {
        "none": "fedvfm.privacy.base:NoMechanism",
        "record-level": "fedvfm.privacy.example_level:record_level",
        "patient-level": "fedvfm.privacy.example_level:patient_level",
        "site-level": "fedvfm.privacy.site_level:SiteLevel",
        "record-level-shared": "fedvfm.privacy.shared:record_level",
        "patient-level-shared": "fedvfm.privacy.shared:patient_level",
        "site-level-shared": "fedvfm.privacy.shared:site_level",
    },
)


def get(settings: privacy.RecipePrivacy) -> base.Mechanism:
    """The mechanism of these settings.

    Raises:
        UnknownName: if it is not in the table.
    """
    made: base.Mechanism = TABLE.get(settings.mechanism)()
    return made


def faults(recipe: schema.Recipe) -> list[str]:
    """Why a recipe with its mechanism cannot be trained here; nobody trains it without its mechanism instead."""
    name = recipe.privacy.mechanism
    if name in TABLE:
        return get(recipe.privacy).faults(recipe) + _clock_faults(recipe)
    if name in privacy.UNITS:
        known = ", ".join(TABLE.names())
        return [
            f"recipe.privacy.mechanism = '{name}': this release can plan it (fedvfm privacy plan) but not train with "
            f"it, and does not train without what a recipe asks for; known: {known}"
        ]
    return [f"recipe.privacy.mechanism: {TABLE.fault(name)}"]


def _clock_faults(recipe: schema.Recipe) -> list[str]:
    """How many steps fit into a time depends on the images that they drew, and a ledger counts steps beforehand."""
    minutes, name = recipe.optimiser.round_minutes, recipe.privacy.mechanism
    if not minutes or privacy.UNITS.get(name, "site") == "site":
        return []
    return [
        f"recipe.optimiser.round_minutes = {minutes:g}: under mechanism '{name}' a round has the steps that the ledger "
        "was told, and how many fit into a time would tell of the images that were drawn; lower "
        "recipe.optimiser.local_epochs in its place"
    ]


def require(recipe: schema.Recipe) -> None:
    """Check that the mechanism is there and can keep its promise, before anything is built or trained.

    Raises:
        ConfigError: if not.
    """
    found = faults(recipe)
    if found:
        raise errors.ConfigError("recipe", found)
