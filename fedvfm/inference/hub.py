"""Hugging Face layouts: the merged model as transformers stores it, and the PEFT form as it was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fedvfm import errors
from fedvfm.backbones import identity, safefile, stock
from fedvfm.inference import delivery, export
from fedvfm.model import adapted_model
from fedvfm.storage import storage

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write(model: adapted_model.AdaptedModel, adapter: Path, folder: Path) -> dict[str, Any]:
    """``config.json`` and ``model.safetensors`` with the adapter folded in, and the head beside them.

    Raises:
        ConfigError: if the backbone is none of transformers', or the kind cannot be folded.
        CheckpointError: if the merged model computes other logits, or the stock class other features.
    """
    if model.recipe.task.prompt == "auto":
        raise errors.ConfigError(
            "--format hf",
            [
                "this adapter proposes its own prompts (recipe.task.prompt = 'auto'), which no stock class of "
                "transformers does: the merged model alone would give other masks. Use onnx or monai"
            ],
        )
    merged: Any = export.merge(model)
    if not callable(getattr(merged, "save_pretrained", None)):
        raise errors.ConfigError(
            "--format hf", [f"backbone '{model.backbone.name}' is no model of transformers; use monai or onnx"]
        )
    with storage.guard(folder), stock.quiet():
        merged.save_pretrained(folder)
        for file in identity.weight_files(folder):
            if file.suffix == ".safetensors":
                safefile.mark(file, export.marks(model))
    export.write_head(model, folder)
    _copy(adapter / export.ABOUT, folder / export.ABOUT)
    loaded = _load(type(merged), folder)
    _require_equal(loaded, merged)
    image = delivery.example(model)
    with torch.no_grad():
        both = (delivery.exact(one) for one in (delivery.on(model, loaded), model))
        found, expected = (delivery.Deliverable(one)(image) for one in both)
    off = delivery.require_same("the merged model", found, expected)
    name = type(merged).__name__
    storage.write_text(folder / "README.md", _card(model, name))
    return {"class": name, "difference": off}


def copy_peft(model: adapted_model.AdaptedModel, adapter: Path, folder: Path) -> dict[str, Any]:
    """PEFT's own files and the head, made again of the adapter's numbers, and the card of its folder.

    Raises:
        ConfigError: if PEFT has no such kind.
        CheckpointError: if the PEFT form holds other numbers than the adapter.
    """
    fresh = export.save(model, folder / "again", {})
    if not all((fresh / name).is_file() for name in PEFT_FILES):
        raise errors.ConfigError(
            "--format peft",
            [f"this adapter has no PEFT form (kind '{model.recipe.adapter.kind}'); use hf, monai or onnx"],
        )
    before = any((adapter / name).is_file() for name in PEFT_FILES)  # a coordinator saves without the backbone
    if before:
        stored, same = _stored_peft(adapter), _stored_peft(fresh)
        if stored.keys() != same.keys() or any(not torch.equal(stored[name], same[name]) for name in stored):
            raise errors.CheckpointError(
                f"{adapter}: adapter_model.safetensors does not hold this adapter's numbers. Export it again"
            )
    if not before or not (adapter / "README.md").is_file():
        _copy(fresh / "README.md", folder / "README.md")
    else:
        _copy(adapter / "README.md", folder / "README.md")
    for name in (*PEFT_FILES, export.HEAD):
        _copy(fresh / name, folder / name)
    shutil.rmtree(fresh)
    about, settings = (json.loads(path.read_text()) for path in (adapter / export.ABOUT, folder / PEFT_FILES[0]))
    settings["base_model_name_or_path"] = about["recipe"]["backbone"]["name"]  # not where it lies on this machine
    storage.write_text(folder / PEFT_FILES[0], json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return {}


def _stored_peft(folder: Path) -> dict[str, torch.Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(folder / PEFT_FILES[1])
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.CheckpointError(
            f"{folder}: adapter_model.safetensors cannot be read ({type(error).__name__}). Export it again"
        ) from None


def _load(stock_class: Any, folder: Path) -> Any:
    """Read it back as anybody would.

    Raises:
        CheckpointError: if the stock class cannot, because the model has parts of another shape.
    """
    try:
        with stock.quiet():
            return stock_class.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise errors.CheckpointError(
            f"{stock_class.__name__} cannot read the merged model ({type(error).__name__}): it is no longer of the "
            f"stock shape. Nothing was written; use monai or onnx"
        ) from error


def _require_equal(loaded: Any, merged: Any) -> None:
    """What ``from_pretrained`` reads is bit for bit what was merged."""
    stored, expected = loaded.state_dict(), merged.state_dict()
    wrong = [name for name in expected if name not in stored or not torch.equal(stored[name], expected[name])]
    if wrong:
        raise errors.CheckpointError(
            f"{type(merged).__name__} reads {len(wrong)} arrays otherwise (first: {wrong[0]}). Nothing was written; "
            f"use monai or onnx"
        )


def _copy(path: Path, to: Path) -> None:
    with storage.guard(to):
        shutil.copyfile(path, to)


def _card(model: adapted_model.AdaptedModel, name: str) -> str:
    import inspect

    import transformers

    recipe = model.recipe
    # A pooling layer that was never trained would be made anew at random, and pooler_output with it.
    pooled = "add_pooling_layer" in inspect.signature(getattr(transformers, name).__init__).parameters
    options = ", add_pooling_layer=False" if pooled else ""
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {recipe.backbone.name}",
        "tags: [federated-learning, fedvfm]",
        "---",
        f"# {recipe.backbone.name} with a federated adapter folded in",
        "",
        "Not a medical device. Trained for research; check it on your own data before any use. The terms of use of the",
        "backbone still hold.",
        "",
        "```python",
        f"from transformers import {name}",
        f'model = {name}.from_pretrained("this folder"{options})',
        "```",
        "",
        *_head(model, name),
        "`fedvfm.load_adapter` on the adapter's own folder gives backbone, adapter and head as one model.",
        "",
        "## What goes in",
        "",
        *delivery.what_goes_in(model),
        *_prompts(model),
        "",
        "There is no `preprocessor_config.json`: no image processor of transformers does these steps.",
        "",
        "## Where it comes from",
        "",
        f"- adapter: kind `{recipe.adapter.kind}`, fingerprint `{model.read().fingerprint}`",
        f"- backbone sha256: `{model.backbone.sha256}`",
        *delivery.licence_line(model),
        f"- recipe hash: `{model.recipe_hash}`",
    ]
    return "\n".join(lines) + "\n"


def _head(model: adapted_model.AdaptedModel, name: str) -> list[str]:
    """What the stock class alone does not give."""
    if model.recipe.words is not None:
        return [
            f"`{export.HEAD}` holds `classes` and `bias`: the logits are `image_embeds @ classes.T + bias`, with the "
            "`image_embeds` that the whole model of transformers makes of this image tower, divided by their length."
        ]
    if not model.task.masks:
        return [f"`{export.HEAD}` holds the {model.recipe.task.kind} head, which transformers does not know."]
    lines = [f"The masks are those of its decoder, so there is no other head and `{export.HEAD}` is empty."]
    if not model.recipe.task.oracle:
        classes = len(model.recipe.data.class_names)
        lines.append(
            f"Without prompts class k is mask token k, 0 to {classes - 1}; the stock class shows some of them."
        )
    if model.backbone.stock_differs:
        lines.append(f"`{name}` itself gives other masks with these weights: {model.backbone.stock_differs}.")
    stock_model: Any = model.backbone.model
    own, size = stock_model.prompt_encoder.input_image_size, list(model.recipe.data.input_size)
    if size != [own, own]:
        lines.append(
            f"`{name}` itself takes {own} x {own} pixels alone; this adapter was trained at {size[0]} x {size[1]}."
        )
    return lines


def _prompts(model: adapted_model.AdaptedModel) -> list[str]:
    """How the stock model gives what was trained, where it was trained with prompts."""
    if not model.recipe.task.oracle:
        return []
    return [
        f"- prompts: trained with prompt = '{model.recipe.task.prompt}'; give the prompt of one class at a time. Class "
        "1 is then the single mask (`multimask_output=False`) where its logit is over 0; class k is mask token k - 1"
    ]
