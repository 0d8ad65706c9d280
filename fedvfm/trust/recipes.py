"""A recipe by its file, in every form it has: written by a person, locked, or in an invite. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from fedvfm.config import schema
from fedvfm.trust import invites, locked_recipe, signed_documents


def read(path: Path) -> schema.Recipe | locked_recipe.LockedRecipe | invites.Invite:
    """What a file holds: of TOML the recipe, or an experiment's ``[recipe]``; of JSON a locked recipe or an invite.

    As it is written: it may not be one that can be trained with here, and whom an invite is from is not checked.

    Raises:
        ConfigError: listing every fault of form of a TOML file.
        TrustError: if a JSON file is neither a locked recipe nor an invite.
    """
    if path.suffix != ".json":
        values = schema.read_toml(path)
        inner = values.get("recipe")
        return schema.parse(schema.Recipe, inner if isinstance(inner, dict) else values, str(path))
    data = signed_documents.read_bytes(path, "file")
    if signed_documents.format_of(data) == invites.Invite.model_fields["format"].default:
        return signed_documents.parse(data, invites.Invite, f"invite {path}")
    return signed_documents.parse(data, locked_recipe.LockedRecipe, f"locked recipe {path}")


def written(path: Path) -> schema.Recipe:
    """The recipe alone; see :func:`read`."""
    content = read(path)
    content = content.lock if isinstance(content, invites.Invite) else content
    return content.recipe if isinstance(content, locked_recipe.LockedRecipe) else content
