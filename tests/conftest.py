"""Fixtures of all tests: one thread, a tiny random DINOv2 on disk, and where data sets lie."""

from __future__ import annotations

import io
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import forks

# A shell that starts the tests in the background tells them to ignore Ctrl-C, and so every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads that wait for each other sleep: where several tests share two cores, waiting in a loop takes what others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if not os.environ.get("FEDVFM_DATA") and BESIDE.is_dir():
    os.environ["FEDVFM_DATA"] = str(BESIDE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where slow tests alone are asked for, a file that has none is not imported, which takes seconds."""
    asked = str(config.getoption("markexpr"))
    if not (asked == "slow" or asked.startswith("slow and")) or collection_path.suffix != ".py":
        return None
    return "mark.slow" not in collection_path.read_text(encoding="utf-8") or None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def float32_unless_told() -> None:
    """Recipes of precision "auto" compute in the same numbers on every machine that runs the tests."""
    from fedvfm.model import precision

    precision.take("cpu", math.inf)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Only a machine that stops loses what the kernel has; no test stops one. tests/storage/test_storage.py counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What fedvfm logged since the test began; other libraries' records are left out."""
    caplog.set_level(logging.INFO, logger="fedvfm")
    return lambda: [record.getMessage() for record in caplog.records if record.name.split(".")[0] == "fedvfm"]


@pytest.fixture(scope="session")
def template() -> Iterator[forks.Template]:
    """What processes of the command line are forked from; nothing starts before the first call."""
    template = forks.Template()
    yield template
    template.close()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., forks.Answer]]:
    """The command line in this process: no start-up, the same entry point; ``answer`` is what a person types."""
    from fedvfm.cli import main

    def call(*arguments: str | Path, answer: str | None = None) -> forks.Answer:
        monkeypatch.setattr(sys, "argv", ["fedvfm", *map(str, arguments)])
        if answer is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        capsys.readouterr()
        code = 0
        try:
            main.main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        made = capsys.readouterr()
        assert "Traceback" not in made.err
        return forks.Answer(code, made.out, made.err)

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


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


@pytest.fixture(scope="session")
def tiny_swin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved random Swin: widths 8 to 64, stages of 1, 2, 3 and 2 blocks, windows of 2 x 2 cells."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("swin") / "tiny-swin"
    shape = {"embed_dim": 8, "depths": (1, 2, 3, 2), "num_heads": (1, 2, 2, 4), "window_size": 2, "image_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = transformers.SwinModel(transformers.SwinConfig(**shape))
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.data.add_(1.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tower_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind ("clip", "siglip") -> folder of a tiny model of images and words, random but for its tokenizer: 32 px."""
    from tests.support import two_towers

    folders = {kind: tmp_path_factory.mktemp("towers") / kind for kind in ("clip", "siglip")}
    for kind, folder in folders.items():
        two_towers.save(folder, kind)
    return folders


@pytest.fixture(scope="session")
def sam_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of a saved random promptable model: 4 to 6 narrow blocks, some windowed; 64 px (SAM 3: 56 px).

    Every number is random, so that no table, scale or bias is left out unnoticed.
    """
    import torch
    import transformers

    from fedvfm.backbones import sam3

    root = tmp_path_factory.mktemp("sam")
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    plain = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "window_size": 3}
    vision = {**plain, "global_attn_indexes": [1, 3], "output_channels": 16, "num_pos_feats": 8, "mlp_dim": 64}
    parts = {"prompt_encoder_config": {"hidden_size": 16, "image_size": 64}, "mask_decoder_config": decoder}
    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 2, 2, 1],
        "global_attention_blocks": [4],
    }
    pyramid = {"fpn_hidden_size": 16, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    vision2 = {
        "model_type": "sam2_vision_model",
        "backbone_config": hiera,
        "backbone_channel_list": [64, 32, 16, 8],
        **pyramid,
    }
    vit = {"model_type": "sam3_vit_model", **plain, "image_size": 56, "intermediate_size": 64}
    vit |= {"global_attn_indexes": [1, 3], "pretrain_image_size": 28}
    vision3 = {"model_type": "sam3_vision_model", "backbone_config": vit, **pyramid}
    configs = {
        "sam": transformers.SamConfig(vision_config=vision, **parts),
        "sam_hq": transformers.SamHQConfig(
            vision_config=vision, **{**parts, "mask_decoder_config": {**decoder, "vit_dim": 32}}
        ),
        "sam2": transformers.Sam2Config(vision_config=vision2, **parts),
        "sam3": transformers.Sam3TrackerConfig(
            vision_config=vision3,
            prompt_encoder_config={"hidden_size": 16, "image_size": 56},
            mask_decoder_config=decoder,
        ),
    }
    sam3.register()
    classes = {"sam": "SamModel", "sam_hq": "SamHQModel", "sam2": "Sam2Model", "sam3": "Sam3TrackerModel"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for name, config in configs.items():
            model = getattr(transformers, classes[name])(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            for module in model.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.weight.data.add_(1.0)
            model.save_pretrained(root / name)
    _light_sam(root / "tinyvit")
    return {name: root / name for name in (*configs, "tinyvit")}


def _light_sam(folder: Path) -> None:
    """A light SAM in our own layout, as an import leaves it."""
    import json

    import safetensors.torch

    from fedvfm.backbones import tinyvit_original
    from tests.backbones import light_sam

    arrays = light_sam.arrays()
    folder.mkdir()
    settings = tinyvit_original.settings({name: tuple(value.shape) for name, value in arrays.items()})
    (folder / "config.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(tinyvit_original.convert(arrays), folder / "model.safetensors")
