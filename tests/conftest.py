"""Fixtures of all tests: one thread, and a tiny random DINOv2 on disk."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved random DINOv2: hidden 32, 4 layers, 2 heads, patch 14, image 56."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("weights") / "tiny-dino"
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Layer scale starts at 1 and the table of positions small: both are made to matter.
        model = transformers.Dinov2Model(transformers.Dinov2Config(**shape, mlp_ratio=2))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        model.layernorm.weight.data.add_(1.0)
    model.save_pretrained(folder)
    return folder
