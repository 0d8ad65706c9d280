"""The model card that lies beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedvfm import factors, state
from fedvfm.client import model as models
from fedvfm.data import prompts
from fedvfm.privacy import stated


def text(
    model: models.AdaptedModel, adapter: state.AdapterState, made: Mapping[str, Any], note: str, *, with_peft: bool
) -> str:
    """The card as Markdown: what it is, how to load it, how it was made, what it scored."""
    recipe = model.recipe
    trainable, way = factors.ever(model.manifest, recipe.adapter.factors), factors.describe(recipe.adapter.factors)
    share = trainable / max(1, model.backbone_parameters)
    lines = [
        "---",
        "library_name: " + ("peft" if with_peft else "fedvfm"),
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
        *_loading(model, with_peft),
        "",
        "## How it was made",
        "",
        f"- task: {recipe.task.kind}, classes: {', '.join(recipe.data.class_names)}",
        f"- trainable numbers: {trainable:,} ({share:.2%} of the backbone), {recipe.rounds} rounds, "
        f"rule `{recipe.aggregation.rule}`",
        *([f"- factors: `{recipe.adapter.factors}`: {way}"] if way else []),
        f"- backbone sha256: `{model.backbone.sha256 or 'made from the seed'}`",
        f"- recipe hash: `{model.recipe_hash}`",
        f"- fingerprint: `{adapter.fingerprint}`",
        f"- differential privacy: {stated.sentence(recipe.privacy, made.get('privacy'))}",
        *([f"- prompts: {prompts.describe(recipe.task)}"] if recipe.task.oracle else []),
        "",
        *_scores(made),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _loading(model: models.AdaptedModel, with_peft: bool) -> list[str]:
    own = ["```python", "import fedvfm", 'model = fedvfm.load_adapter("adapter")  # backbone, adapter and head', "```"]
    if not with_peft:
        return [f"{_why_not_peft(model)}; load it with fedvfm:", "", *own]
    head = "see head.safetensors" if next(model.head.parameters(), None) is not None else _classes(model)
    stock = [
        "```python",
        "from peft import PeftModel",
        f'model = PeftModel.from_pretrained(stock_backbone, "adapter")  # of transformers; {head}',
        "```",
    ]
    return ["With PEFT into the stock backbone:", "", *stock, "", "With fedvfm, head included:", "", *own]


def _classes(model: models.AdaptedModel) -> str:
    classes = len(model.recipe.data.class_names)
    if model.recipe.task.oracle:
        return f"class k, from 1 to {classes - 1}, is mask token k - 1 under its own prompt, where that is over 0"
    return f"class k is mask token k, 0 to {classes - 1}"


def _why_not_peft(model: models.AdaptedModel) -> str:
    backbone = model.backbone
    if backbone.stock_differs:
        return f"Not for the stock backbone: {backbone.stock_differs}"
    if backbone.mask_tokens > backbone.stock_mask_tokens:
        return f"The stock backbone has {backbone.stock_mask_tokens} mask tokens, this one {backbone.mask_tokens}"
    return "This kind is not one of PEFT's"


def _scores(made: Mapping[str, Any]) -> list[str]:
    arms = made.get("arms", {})
    if not arms:
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
        *(
            f"| {name}{_mark(arm)} | {arm['macro']:.3f} | {arm['worst']['site']} {arm['worst']['value']:.3f} |"
            for name, arm in arms.items()
        ),
    ]


def _mark(arm: Mapping[str, Any]) -> str:
    """Scores of an oracle are marked wherever they stand."""
    return f" ({arm['prompt']})" if arm.get("prompt") else ""
