"""The model card that lies beside an adapter, where its backbone is: how to load it with fedvfm, and with PEFT."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from fedvfm.config import licence
from fedvfm.model import adapted_model, adapter_folder
from fedvfm.state import state


def text(
    model: adapted_model.AdaptedModel,
    adapter: state.AdapterState,
    made: Mapping[str, Any],
    note: str,
    *,
    with_peft: bool,
) -> str:
    """The card as Markdown; see :func:`fedvfm.model.adapter_folder.card`."""
    library = "peft" if with_peft else "fedvfm"
    return adapter_folder.card(facts(model), adapter, made, note, library, _loading(model, with_peft))


def facts(model: adapted_model.AdaptedModel) -> adapter_folder.Facts:
    """What the adapter of a model is."""
    return adapter_folder.Facts(
        model.recipe,
        model.recipe_hash,
        model.manifest,
        model.backbone.sha256,
        model.backbone.config_sha256,
        model.backbone_parameters,
        model.licence,
    )


def _loading(model: adapted_model.AdaptedModel, with_peft: bool) -> list[str]:
    own = adapter_folder.OWN_WAY
    if not with_peft:
        return [f"{_why_not_peft(model)}; load it with fedvfm:", "", *own]
    beside = model.recipe.words is not None or next(model.head.parameters(), None) is not None
    head = "see head.safetensors" if beside else _classes(model)
    stock = [
        "```python",
        "from peft import PeftModel",
        f'model = PeftModel.from_pretrained(stock_backbone, "adapter")  # of transformers; {head}',
        "```",
    ]
    return [
        f"With PEFT into the stock backbone ({_named_by()}):",
        "",
        *stock,
        "",
        "With fedvfm, head included:",
        "",
        *own,
    ]


def _named_by() -> str:
    """Which transformers knows the layers by the names in adapter_config.json: they changed between releases."""
    version = importlib.metadata.version("transformers")
    return f"names of its layers are those of transformers {version}; transformers >= 5 is needed"


def _classes(model: adapted_model.AdaptedModel) -> str:
    classes = len(model.recipe.data.class_names)
    if model.recipe.task.oracle:
        return f"class k, from 1 to {classes - 1}, is mask token k - 1 under its own prompt, where that is over 0"
    return f"class k is mask token k, 0 to {classes - 1}"


def holds_weights(model: adapted_model.AdaptedModel) -> bool:
    """Whether the PEFT form has layers of the backbone as they are after training: norms, parts of a mask decoder."""
    return model.recipe.adapter.kind == "norm" or bool(model.recipe.adapter.parts)


def _why_not_peft(model: adapted_model.AdaptedModel) -> str:
    backbone = model.backbone
    if model.recipe.task.prompt == "auto":
        return "Not for the stock backbone: this adapter proposes its own prompts"
    if backbone.stock_differs:
        return f"Not for the stock backbone: {backbone.stock_differs}"
    if backbone.mask_tokens > backbone.stock_mask_tokens:
        return f"The stock backbone has {backbone.stock_mask_tokens} mask tokens, this one {backbone.mask_tokens}"
    if holds_weights(model) and licence.NO_DERIVATIVES in model.licence.limits:
        return f"No PEFT form: it would hold changed layers of weights under {model.licence}"
    return "This kind is not one of PEFT's"
