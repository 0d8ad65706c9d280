"""The folder of a saved adapter in fedvfm's own layout, written without the backbone.

    fedvfm_adapter.safetensors   every array under its wire name
    fedvfm.json                  recipe, manifest, hashes of the backbone, fingerprint
    README.md                    the model card

What stands beside them in another tool's layout needs the backbone's own names, and is made where it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvfm.config import licence, schema
from fedvfm.data import prompts
from fedvfm.privacy import statements
from fedvfm.report import quantity
from fedvfm.state import checkpoint, factors, groups, state
from fedvfm.storage import storage

STATE = "fedvfm_adapter.safetensors"
ABOUT = "fedvfm.json"
CARD = "README.md"
AS_IT_CAME, STATEMENT = "global.safetensors", "statement.json"
"""Beside an adapter with a site's own arrays: the one that came; beside one that a site chose: what it is worth."""
LICENCE = "backbone_licence"
OWN_WAY = (
    "```python",
    "import fedvfm",
    'model = fedvfm.load_adapter("adapter")  # backbone, adapter and head',
    "```",
)


@dataclass(frozen=True)
class Facts:
    """What a saved adapter is.

    Attributes:
        recipe: resolved; with the backbone where it lies here.
        recipe_hash: of the recipe of training.
        manifest: of the adapter.
        sha256, config_sha256, parameters: of the backbone: hashes of its weights and settings (empty where there are
            none, or they are not known), and its size.
        licence: of the backbone's weights.
    """

    recipe: schema.Recipe
    recipe_hash: str
    manifest: state.Manifest
    sha256: str
    config_sha256: str
    parameters: int
    licence: licence.Licence


def write(folder: Path, facts: Facts, adapter: state.AdapterState) -> None:
    """Write the adapter and what it is.

    Raises:
        StorageError: if the disk refuses.
    """
    checkpoint.write(folder / STATE, adapter, {"recipe": facts.recipe.hash})
    about = {
        "recipe": facts.recipe.model_dump(mode="json"),
        "recipe_hash": facts.recipe_hash,
        "backbone_sha256": facts.sha256,
        "backbone_config_sha256": facts.config_sha256,
        "manifest": facts.manifest.to_json(),
        "fingerprint": adapter.fingerprint,
    }
    about |= {LICENCE: facts.licence.to_json()} if facts.licence else {}
    storage.write_text(folder / ABOUT, json.dumps(about, indent=2, sort_keys=True) + "\n")


def card(
    facts: Facts, adapter: state.AdapterState, made: Mapping[str, Any], note: str, library: str, loading: Sequence[str]
) -> str:
    """The model card as Markdown: what it is, how to load it, how it was made, what it scored.

    Args:
        facts: what was saved.
        adapter: its numbers.
        made: a run's summary, or what is known of it: ``experiment``, ``privacy``, ``primary``, ``arms``.
        note: a sentence that stands first.
        library: whose layout it is.
        loading: the lines under "Load it".
    """
    recipe = facts.recipe
    trainable, way = factors.ever(facts.manifest, recipe.adapter.factors), factors.describe(recipe.adapter.factors)
    own = groups.describe(recipe)
    # Under ditto the arrays of a federation's adapter are its own: those that stay only have the same names.
    first = "" if recipe.personal.kind == groups.DITTO else "; in the adapter of a federation these are first values"
    share = trainable / max(1, facts.parameters)
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {recipe.backbone.name}",
        "tags: [federated-learning, fedvfm]",
        "---",
        f"# {made.get('experiment', 'adapter')}: {recipe.adapter.kind} on {recipe.backbone.name}",
        "",
        *([f"**{note}**", ""] if note else []),
        "Not a medical device. Trained for research; check it on your own data before any use.",
        "",
        "## Load it",
        "",
        *loading,
        "",
        "## How it was made",
        "",
        f"- task: {recipe.task.kind}, classes: {', '.join(recipe.data.class_names)}",
        *([f"- sentences: {recipe.words.describe(recipe.data.class_names)}"] if recipe.words is not None else []),
        *([f"- beside each image: columns {', '.join(recipe.inputs.columns)}"] if recipe.inputs.columns else []),
        *(["- cases without an image are answered by their row alone"] if recipe.inputs.images_missing else []),
        f"- trainable numbers: {trainable:,} ({share:.2%} of the backbone), {quantity.of(recipe.rounds, 'round')}, "
        f"rule `{recipe.aggregation.rule}`",
        *([f"- factors: `{recipe.adapter.factors}`: {way}"] if way else []),
        *([f"- {own}{first}"] if own else []),
        f"- backbone sha256: `{facts.sha256 or 'made from the seed'}`",
        *([f"- backbone licence: {facts.licence}"] if facts.sha256 else []),
        f"- recipe hash: `{facts.recipe_hash}`",
        f"- fingerprint: `{adapter.fingerprint}`",
        f"- differential privacy: {statements.sentence(recipe.privacy, made.get('privacy'))}",
        *([f"- prompts: {prompts.describe(recipe.task)}"] if recipe.task.oracle else []),
        "",
        *_scores(made),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _scores(made: Mapping[str, Any]) -> list[str]:
    # Cards are published: they name no site, so not the worst one either, nor arms of one site (KIND/SITE).
    arms = {name: arm for name, arm in made.get("arms", {}).items() if "/" not in name}
    rows = [(name, arm) for name, arm in arms.items() if arm["macro"] is not None]
    if not rows:
        return []
    head = [
        "## Scores",
        "",
        f"Test {made['primary']}, mean over sites (macro) and worst site:",
        "",
        "| arm | macro | worst site |",
        "|---|---|---|",
    ]
    return [
        *head,
        *(f"| {name}{_mark(arm)} | {arm['macro']:.3f} | {arm['worst']['value']:.3f} |" for name, arm in rows),
    ]


def _mark(arm: Mapping[str, Any]) -> str:
    """Scores of an oracle are marked wherever they stand."""
    return f" ({arm['prompt']})" if arm.get("prompt") else ""
