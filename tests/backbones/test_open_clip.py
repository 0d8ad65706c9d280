"""CLIP in the layout of open_clip: imported it answers as the model it was written from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.backbones import convert, open_clip_original, weights
from fedvfm.config import schema
from fedvfm.model import adapted_model
from tests.support import two_towers

NAMES = ["lymphocyte", "monocyte"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))


def written(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arrays of ``CLIPModel`` under open_clip's names."""
    back = {new: old for old, new in open_clip_original._OTHERS.items()}
    turned = {new: old for old, new in open_clip_original._TURNED.items()}
    inner = {new: old for old, new in open_clip_original._BLOCK.items()}
    own: dict[str, Tensor] = {}
    for name, value in arrays.items():
        if name in back:
            own[back[name]] = value
        elif name in turned:
            own[turned[name]] = value.T.contiguous()
        else:
            tower, _, _, number, rest = name.split(".", 4)
            part, _, kind = rest.rpartition(".")
            place = f"{'visual.' if tower == 'vision_model' else ''}transformer.resblocks.{number}."
            if part in inner:
                own[f"{place}{inner[part]}.{kind}"] = value
            elif part.endswith("q_proj"):
                three = [arrays[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
                own[f"{place}attn.in_proj_{kind}"] = torch.cat(three)
    return own


@pytest.fixture
def published(tower_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder as open_clip's models are published; blocks of two heads of 16 channels, activation GELU of CLIP."""
    source, folder = tower_folders["clip"], tmp_path / "published"
    folder.mkdir()
    arrays = written(safetensors.torch.load_file(source / "model.safetensors"))
    safetensors.torch.save_file(arrays, folder / "open_clip_model.safetensors")
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    values = json.loads((source / "config.json").read_text())
    text = values["text_config"]
    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": text["vocab_size"],
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / open_clip_original.CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def logits(backbone: str) -> Tensor:
    values = {
        "backbone": {"name": backbone},
        "task": {"kind": "classification"},
        "adapter": {"rank": 2},
        "data": {"class_names": NAMES, "input_size": [32, 32], **two_towers.NORM},
        "precision": "float32",
        "words": {"templates": ["a photo of a {}"]},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    model.write(model.initial())
    with torch.no_grad():
        answers: Tensor = model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    return answers


def test_both_towers_and_the_tokenizer_come_over(published: Path, tower_folders: dict[str, Path]) -> None:
    located = convert.bring(published, "own-clip")
    assert located.config["text_config"]["hidden_act"] == "quick_gelu"
    assert (weights.own_folder("own-clip") / "tokenizer.json").is_file()
    torch.testing.assert_close(logits("own-clip"), logits(str(tower_folders["clip"])), rtol=1e-5, atol=1e-5)


def test_the_three_projections_are_in_torchs_order() -> None:
    """``nn.MultiheadAttention``, whose packed weights open_clip has, gives what the three by themselves give."""
    attention = nn.MultiheadAttention(8, 1, bias=True, batch_first=True)
    arrays = {
        f"visual.transformer.resblocks.0.attn.in_proj_{kind}": getattr(attention, f"in_proj_{kind}")
        for kind in ("weight", "bias")
    }
    parts = open_clip_original.convert(arrays)
    place, image = "vision_model.encoder.layers.0.self_attn", torch.randn(1, 5, 8)
    q, k, v = (
        nn.functional.linear(image, parts[f"{place}.{each}_proj.weight"], parts[f"{place}.{each}_proj.bias"])
        for each in "qkv"
    )
    own = attention.out_proj(nn.functional.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(own, attention(image, image, image)[0])


CHANGES: list[tuple[Any, str]] = [
    (lambda config: config["vision_cfg"].update(timm_model_name="vit"), "vision_cfg.timm_model_name"),
    (lambda config: config["text_cfg"].update(hf_model_name="bert"), "text_cfg.hf_model_name"),
    (lambda config: config["vision_cfg"].update(layers=3), "does not fit"),
    (lambda config: config["text_cfg"].pop("heads"), "does not fit"),
    (lambda config: config.pop("vision_cfg"), "no model_cfg"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_settings_that_are_unclear_are_refused(published: Path, change: Any, said: str) -> None:
    path = published / open_clip_original.CONFIG
    values = json.loads(path.read_text())
    change(values["model_cfg"])
    path.write_text(json.dumps(values))
    with pytest.raises(errors.WeightsError, match=said):
        convert.bring(published, "own-clip")
    assert not weights.in_cache("own-clip")


def test_without_its_settings_nothing_is_guessed_and_they_can_be_named(published: Path, tmp_path: Path) -> None:
    settings = (published / open_clip_original.CONFIG).rename(tmp_path / "settings.json")
    file = published / "open_clip_model.safetensors"
    with pytest.raises(errors.WeightsError, match="do not say which activation"):
        convert.bring(file, "own-clip")
    assert convert.bring(file, "own-clip", config=settings).config["model_type"] == "clip"


@pytest.mark.parametrize("name", ["token_embedding.weight", "visual.ln_post.bias", "text_projection"])
def test_what_lacks_a_part_is_refused(published: Path, name: str) -> None:
    file = published / "open_clip_model.safetensors"
    arrays = safetensors.torch.load_file(file)
    del arrays[name]
    safetensors.torch.save_file(arrays, file)
    with pytest.raises(errors.WeightsError):
        convert.bring(published, "own-clip")


def test_a_part_that_is_not_known_is_refused(published: Path) -> None:
    file = published / "open_clip_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {"visual.ls.gamma": torch.ones(2)}, file)
    with pytest.raises(errors.WeightsError, match=r"not known here \(visual.ls.gamma\)"):
        convert.bring(published, "own-clip")
