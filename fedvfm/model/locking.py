"""Lock a recipe: pin the backbone's weights, write down what trains, and make the adapter of round 0.

Needs torch and the backbone's shapes; the weights themselves are hashed but not loaded, and not needed where the recipe
pins their sha256. What comes out, ``NAME.json`` and ``NAME.safetensors``, is read without torch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import licences, tokens, weights
from fedvfm.config import schema
from fedvfm.config import words as words_config
from fedvfm.protocol import codecs
from fedvfm.state import checkpoint, state
from fedvfm.trust import invites, locked_recipe, recipes, signed_documents

LOG = logging.getLogger(__name__)


def open_recipe(path: Path, start: Path | None = None) -> locked_recipe.LockedRecipe:
    """A recipe by its file: TOML is locked now, JSON was locked before and gets its adapter, if that lies beside it.

    Args:
        path: the recipe.
        start: an adapter of an earlier recipe to go on from, for TOML.

    Raises:
        ConfigError, TrustError, WeightsError, CheckpointError: if a file cannot be used.
        MissingExtra: if a TOML file is given where torch is not installed.
    """
    if start is not None and path.suffix == ".json":
        raise errors.ConfigError(str(path), ["was locked before, with the adapter it starts from; leave --from out"])
    content = recipes.read(path)
    if isinstance(content, schema.Recipe):
        locked = make(content, None if start is None else checkpoint.read(start)[0])
    else:
        beside = path.with_suffix(".safetensors")
        locked = content.lock if isinstance(content, invites.Invite) else content
        locked = locked.with_adapter(checkpoint.read(beside)[0], beside) if beside.exists() else locked
    _warn(locked)
    return locked


def make(recipe: schema.Recipe, start: state.AdapterState | None = None) -> locked_recipe.LockedRecipe:
    """Lock a recipe on this machine.

    Args:
        recipe: what to lock.
        start: the adapter to begin with in place of one from the seed; the locked recipe names it.

    Raises:
        ConfigError: with all faults of names and per-kind parameters.
        CheckpointError: if ``start`` is no adapter of this recipe.
        WeightsError: if the weights are not here and the recipe does not pin them.
        AdapterTooLarge: if what trains is too large to travel.
        MissingExtra: without torch.
    """
    shapes, wrong = examine(recipe)
    if recipe.start is not None and (start is None or start.fingerprint != recipe.start):
        wrong.append(f"recipe.start: give the adapter {recipe.start[:12]} with --from ADAPTER.safetensors")
    if wrong or shapes is None:
        raise errors.ConfigError("recipe", wrong)
    locked_recipe.require_size(shapes.manifest)
    if start is not None:
        _require_fit(start, shapes.manifest)
    sha256, config_sha256 = _pin(recipe, shapes)
    pins: dict[str, Any] = {"backbone": licences.stated(recipe.backbone).model_copy(update={"sha256": sha256 or None})}
    if recipe.words is not None:
        pins["words"] = _pin_words(recipe, recipe.words)
    pinned = shapes.recipe.model_copy(update=pins if start is None else {**pins, "start": start.fingerprint})
    parts = (shapes.manifest, start or shapes.initial(), sha256, shapes.backbone_parameters, config_sha256)
    return locked_recipe.LockedRecipe.of(pinned, *parts)


def examine(recipe: schema.Recipe) -> tuple[Any, list[str]]:
    """The recipe's model on the meta device, and all faults of names and per-kind parameters, one sentence each.

    Raises:
        WeightsError: if the backbone's shape is not known on this machine.
        MissingExtra: without torch.
    """
    shapes, wrong = _models().examine(recipe)
    return shapes, [*wrong, *_table_faults(recipe)]


def _warn(locked: locked_recipe.LockedRecipe) -> None:
    """Log what the coordinator should know of a locked recipe before it goes out."""
    name, here = locked.recipe.backbone.name, locked_recipe.version()
    if locked.backbone_sha256 and weights.is_folder(name):
        LOG.warning(
            f"note: backbone '{name}' is a folder of this machine; every site needs the same weights at this path"
        )
    if locked.version != here:
        LOG.warning(f"note: locked by fedvfm {locked.version}, here is {here}; install the same at all ends")


def _models() -> Any:
    try:
        from fedvfm.model import adapted_model
    except ModuleNotFoundError as error:
        raise errors.MissingExtra(
            f"locking a recipe needs {error.name}, which is not installed here. On a machine with the whole fedvfm run "
            "'fedvfm recipe lock RECIPE.toml -o recipe.json' and bring recipe.json and recipe.safetensors"
        ) from None
    return adapted_model


def _table_faults(recipe: schema.Recipe) -> list[str]:
    from fedvfm.aggregators import table as rules
    from fedvfm.data import transforms

    rows = [("aggregation.rule", rules.TABLE, recipe.aggregation.rule), ("codec", codecs.TABLE, recipe.codec)]
    rows += [("data.augment", transforms.AUGMENTATIONS, name) for name in recipe.data.augment]
    found = [f"recipe.{where}: {table.fault(name)}" for where, table, name in rows if name not in table]
    return found + rules.faults(recipe)


def _pin(recipe: schema.Recipe, shapes: Any) -> tuple[str, str]:
    """sha256 of the weights and of their settings; empty where they are made from the seed."""
    if not shapes.backbone.pretrained:
        return "", ""
    try:
        found = weights.locate(recipe.backbone, download=False)
    except weights.Damaged:
        raise
    except errors.WeightsError as error:
        pinned, config_sha256 = weights.pinned(recipe.backbone)
        if recipe.backbone.sha256 is None or not pinned:
            raise errors.WeightsError(
                f"{error}. Or write the sha256 of its weights into the recipe (backbone.sha256): every site runs the "
                "weights that the lock names and no others"
            ) from None
        return pinned, config_sha256
    return found.sha256, found.config_sha256


def _pin_words(recipe: schema.Recipe, words: words_config.WordsConfig) -> words_config.WordsConfig:
    """The sentences with the hash of the tokenizer that reads them, each of which was read once.

    Raises:
        TokenizerError: if the tokenizer is not here and the recipe does not pin it.
        WordsError: if a sentence cannot be read as it is meant.
    """
    try:
        here = weights.locate(recipe.backbone, download=False)
    except weights.Missing:
        filled = weights.describe(recipe.backbone).get("model_type") == tokens.SIGLIP
        if words.tokenizer_sha256 is None or (filled and words.pad is None):
            raise errors.TokenizerError(
                f"backbone '{recipe.backbone.name}' is not on this machine, so nobody has read the sentences of "
                f"recipe.words. {weights.remedy(recipe.backbone)}; or write tokenizer_sha256{' and pad' * filled} into "
                "recipe.words"
            ) from None
        return words
    return tokens.pinned(here.folder, here.config, words, recipe.data.class_names)


def _require_fit(start: state.AdapterState, manifest: state.Manifest) -> None:
    if not manifest.fits(start):
        raise errors.CheckpointError(
            f"the adapter to start from has {len(start)} arrays and {start.parameters:,} numbers, the recipe trains "
            f"{len(manifest)} and {manifest.parameters:,}, or their shapes differ. Same backbone, kind and rank?"
        )


def write(path: Path, locked: locked_recipe.LockedRecipe) -> tuple[Path, Path]:
    """Write ``NAME.json`` and, beside it, the initial adapter; neither may exist.

    Raises:
        OutputInUse: if one does.
    """
    paths = (path, path.with_suffix(".safetensors"))
    for output in paths:
        if output.exists():
            raise errors.OutputInUse(f"{output} exists and is left as it is. Choose another --output")
    locked_recipe.require_travels(locked)
    checkpoint.write(paths[1], locked.adapter, {"round": "0", "recipe": locked.hash})
    signed_documents.write(path, locked)
    return paths
