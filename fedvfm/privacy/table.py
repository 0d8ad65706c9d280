"""The table of privacy mechanisms: what is in it can be trained with, what is not is refused."""

from __future__ import annotations

from fedvfm import errors, privacy_config, registry

TABLE = registry.Table("privacy mechanism", {"none": "fedvfm.privacy.base:NoMechanism"})


def faults(settings: privacy_config.RecipePrivacy) -> list[str]:
    """Why a recipe with these settings cannot be trained here; nobody trains it without its mechanism instead."""
    name = settings.mechanism
    if name in TABLE:
        return []
    if name in privacy_config.UNITS:
        known = ", ".join(TABLE.names())
        return [
            f"recipe.privacy.mechanism = '{name}': this release can plan it (fedvfm privacy plan) but not train with "
            f"it, and does not train without what a recipe asks for; known: {known}"
        ]
    return [f"recipe.privacy.mechanism: {TABLE.fault(name)}"]


def require(settings: privacy_config.RecipePrivacy) -> None:
    """Check that the mechanism is there, before anything is built or trained.

    Raises:
        ConfigError: if it is not.
    """
    found = faults(settings)
    if found:
        raise errors.ConfigError("recipe", found)
