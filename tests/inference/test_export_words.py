"""Sentences in exports: saved and loaded, folded into a matrix, and held against transformers' own image embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import fedvfm
from fedvfm import errors
from fedvfm.config import schema
from fedvfm.inference import delivery, export, graph
from fedvfm.model import adapted_model
from fedvfm.state import state
from tests.inference import test_export_formats as formats
from tests.support import two_towers

WORDS = {"mode": "prompt-learning", "templates": ["{}"], "context": 3}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def adapter(request: pytest.FixtureRequest, tower_folders: dict[str, Path], tmp_path_factory: Any) -> Path:
    """A saved adapter of context vectors and LoRA, both off their start."""
    values = {
        "backbone": {"name": str(tower_folders[request.param])},
        "adapter": {"kind": "lora", "rank": 2},
        "task": {"kind": "classification"},
        "data": {"class_names": ["rest", "cell", "wall"], "input_size": [32, 32], **two_towers.NORM},
        "words": WORDS,
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    rng = np.random.default_rng(1)
    start = model.initial()
    moved = {name: value + rng.normal(0, 0.3, value.shape).astype(np.float32) for name, value in start.items()}
    model.write(state.AdapterState(moved))
    return export.save(model.eval(), tmp_path_factory.mktemp("words") / "adapter", {})


def test_what_is_saved_is_loaded_and_the_card_says_the_sentences(adapter: Path) -> None:
    model = fedvfm.load_adapter(adapter)
    assert np.array_equal(
        model.read()["head.context"], safetensors.torch.load_file(adapter / "head.safetensors")["context"]
    )
    card = (adapter / "README.md").read_text()
    assert "sentences: each image is held against 'rest'; 'cell'; 'wall', where 3 learned vectors" in card


def test_the_matrix_answers_as_the_sentences(adapter: Path, tmp_path: Path) -> None:
    """With LoRA merged into the stock model and ``classes`` beside it, transformers alone gives the logits."""
    fedvfm.export_adapter(adapter, tmp_path / "hf")
    model, pixels = fedvfm.load_adapter(adapter), formats.prepared(fedvfm.load_adapter(adapter)) - 0.5
    head = safetensors.torch.load_file(tmp_path / "hf" / "head.safetensors")
    kind = json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"].partition("_")[0]
    name = model.recipe.backbone.name
    whole: Any = (transformers.CLIPModel if kind == "clip" else transformers.SiglipModel).from_pretrained(name)
    merged: Any = transformers.CLIPVisionModel if kind == "clip" else transformers.SiglipVisionModel
    whole.vision_model.load_state_dict(merged.from_pretrained(tmp_path / "hf").state_dict(), strict=False)
    with torch.no_grad():
        vectors = whole.eval().get_image_features(pixels).pooler_output
        logits = vectors / vectors.norm(dim=-1, keepdim=True) @ head["classes"].T + head["bias"]
        torch.testing.assert_close(logits, model(pixels), rtol=1e-4, atol=1e-4)


def test_a_folded_model_has_no_text_tower(adapter: Path) -> None:
    model = fedvfm.load_adapter(adapter)
    plain = delivery.Deliverable(delivery.exact(delivery.folded(model))).eval()
    assert not [name for name in plain.state_dict() if "text" in name or "token_embedding" in name]
    image = formats.prepared(model)
    with torch.no_grad():
        torch.testing.assert_close(plain(image), formats.expected(model, image), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_holds_the_encoder_and_the_matrix(adapter: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    facts = fedvfm.export_adapter(adapter, tmp_path / "onnx", form="onnx")
    assert facts["difference"] < 1e-4
    names = [value.name for value in onnx.load(tmp_path / "onnx" / graph.FILE).graph.initializer]
    assert not [name for name in names if "text" in name or "token_embedding" in name]


def test_a_bundle_brings_its_tokenizer(adapter: Path, tmp_path: Path) -> None:
    facts = fedvfm.export_adapter(adapter, tmp_path / "bundle", form="monai")
    assert facts["difference"] == 0.0
    beside = tmp_path / "bundle" / "models" / "backbone" / "tokenizer.json"
    beside.write_text(beside.read_text() + " ")
    about = tmp_path / "bundle" / "models" / "adapter" / "fedvfm.json"
    assert about.is_file()
    beside.unlink()
    with pytest.raises(errors.TokenizerError):
        export.load_adapter(tmp_path / "bundle" / "models" / "adapter", backbone=str(beside.parent))
