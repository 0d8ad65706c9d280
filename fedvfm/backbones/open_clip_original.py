"""CLIP as OpenAI and open_clip publish it, in the layout of ``transformers``' ``CLIPModel``: both towers.

The arrays do not say which activation the blocks have; ``open_clip_config.json`` beside them does, and is needed.
Models whose image tower is timm's, or whose text tower is another (BiomedCLIP's is a BERT), are none of these: see
:mod:`fedvfm.backbones.vit_original`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import identity

CONFIG = "open_clip_config.json"
_IMAGE, _TEXT = "visual.transformer.resblocks.", "transformer.resblocks."
_KNOWN = {
    "": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"},
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"},
}
"""Keys of ``model_cfg`` that are read or change nothing; any other would compute something else."""
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OTHERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""Matrices that open_clip multiplies from the right, a linear layer from the left."""
_LEFT = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def recognise(names: Collection[str]) -> bool:
    """Whether these are array names of such a model."""
    return {"visual.class_embedding", "visual.conv1.weight", "visual.proj"} <= set(names)


def stated(folder: Path) -> Path | None:
    """The file that says the activation, where a folder has it."""
    return folder / CONFIG if (folder / CONFIG).is_file() else None


def settings_of(path: Path | None, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """``config.json`` of such a model.

    Args:
        path: ``open_clip_config.json``.
        shapes: of the arrays.

    Raises:
        WeightsError: if the file is missing, or says something that is not read here or that the arrays contradict.
    """
    if path is None:
        raise errors.WeightsError(
            f"a CLIP in the layout of open_clip comes without {CONFIG}, and its arrays do not say which activation it "
            f"has. Give the one of the model's page with --config, or import the layout of transformers"
        )
    values = identity.read_json(path).get("model_cfg")
    tables = {"": values, **{key: values.get(key) for key in ("vision_cfg", "text_cfg")}} if values else {}
    if not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise errors.WeightsError(f"{path}: has no model_cfg with vision_cfg and text_cfg. Bring the model's own file")
    strange = [
        f"{where}.{key}".strip(".") for where, known in _KNOWN.items() for key in tables[where] if key not in known
    ]
    if strange:
        raise errors.WeightsError(
            f"{path}: model_cfg.{ascii(strange[0][:60])[1:-1]} is not known here, so the model would compute something "
            "else. Import it in the layout of transformers"
        )
    try:
        return _settings(tables, {name.removeprefix("text."): shape for name, shape in shapes.items()}, path)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        raise errors.WeightsError(
            f"{path}: does not fit the arrays beside it, or they are no whole CLIP. Download both again"
        ) from None


def _settings(tables: Mapping[str, Any], own: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    image, text, joint = tables["vision_cfg"], tables["text_cfg"], tables[""]["embed_dim"]
    width, patch = image["width"], image["patch_size"]
    side = image["image_size"] // patch
    said = {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": (side * side + 1, width),
        "visual.proj": (width, joint),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], joint),
    }
    wrong = [name for name, shape in said.items() if own[name] != shape]
    depths = [_depth(own, prefix) for prefix in (_IMAGE, _TEXT)]
    if wrong or depths != [image["layers"], text["layers"]]:
        raise ValueError
    heads = width // image.get("head_width", 64)
    if width % heads or text["width"] % text["heads"]:
        raise ValueError
    activation = "quick_gelu" if tables[""].get("quick_gelu", False) else "gelu"
    both = {"hidden_act": activation, "layer_norm_eps": 1e-5}
    end = text["vocab_size"] - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": joint,
        "vision_config": {
            **both,
            "hidden_size": width,
            "intermediate_size": own[f"{_IMAGE}0.mlp.c_fc.weight"][0],
            "num_hidden_layers": depths[0],
            "num_attention_heads": heads,
            "image_size": image["image_size"],
            "patch_size": patch,
            "projection_dim": joint,
        },
        "text_config": {
            **both,
            "hidden_size": text["width"],
            "intermediate_size": own[f"{_TEXT}0.mlp.c_fc.weight"][0],
            "num_hidden_layers": depths[1],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
            "projection_dim": joint,
        },
    }


def _depth(own: Mapping[str, Any], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in own if name.startswith(prefix)})


def convert(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays under the names of ``CLIPModel``.

    Shapes: in_proj_weight (3 D, D) becomes three of (D, D), for query, key and value; proj (D, E) becomes (E, D).

    Raises:
        WeightsError: if there is an array that is not known here.
    """
    renamed: dict[str, Tensor] = {}
    for stored, value in arrays.items():
        name = stored.removeprefix("text.")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if name in _LEFT:
            continue
        if name in _OTHERS:
            renamed[_OTHERS[name]] = value.reshape(()) if name == "logit_scale" else value
        elif name in _TURNED:
            renamed[_TURNED[name]] = value.T.contiguous()
        elif block is not None and block[3] in (*_BLOCK, "attn.in_proj"):
            place = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
            if block[3] == "attn.in_proj":
                parts = zip("qkv", value.chunk(3), strict=True)
                renamed |= {f"{place}self_attn.{part}_proj.{block[4]}": array.contiguous() for part, array in parts}
            else:
                renamed[f"{place}{_BLOCK[block[3]]}.{block[4]}"] = value
        else:
            raise errors.WeightsError(
                f"this CLIP has a part that is not known here ({ascii(stored[:80])[1:-1]}), so it would compute "
                "something else. Import it in the layout of transformers, with its config.json"
            )
    return renamed
