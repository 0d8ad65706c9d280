"""What updates tell of who was trained on: ``fedvfm privacy audit`` of small models, plain, private and masked.

    python benchmarks/privacy_audit.py [--page docs/security/attacks.md] [--runs 4]

A random DINOv2 and a random SAM of a few narrow blocks, three hospitals of 50 drawn patients each, two rounds of SGD.
Some minutes on one core. Writes the table between the page's markers; ends with an error where a claim is refuted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import block
import numpy as np
from PIL import Image

from fedvfm.simulation import privacy_audit

ROOT = Path(__file__).parents[1]
SITES, PATIENTS, TESTED = ("east", "north", "south"), 50, 4
DELTA = 1e-5
SIDES = {"ViT (DINOv2), LoRA": 28, "SAM, LoRA and decoder parts": 64}
PRIVATE = {"clip": 1.0, "epsilon": 8.0, "delta": DELTA}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DP, image level": {"privacy": {"mechanism": "record-level", **PRIVATE}},
    "DP, patient level": {"privacy": {"mechanism": "patient-level", **PRIVATE}},
    "secure aggregation": {"secure_aggregation": {}, "min_sites": 3},
    "both, patient level": {
        "privacy": {"mechanism": "patient-level", **PRIVATE},
        "secure_aggregation": {},
        "min_sites": 3,
    },
}
HEAD = ("model", "updates", "unit", "coins", "right guesses", "epsilon, at least", "most that could show", "claimed")


def write_data(folder: Path, side: int, each: int) -> Path:
    """Discs on noisy ground, ``each`` images of a patient; the last patients of a hospital are tested."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rows = ["id,site,patient,split"]
    for site, name in enumerate(SITES):
        for patient in range(PATIENTS + TESTED):
            for number in range(each):
                rng = np.random.default_rng([site, patient, number])
                lines, columns = np.mgrid[:side, :side]
                middle, radius = rng.uniform(0.3 * side, 0.7 * side, size=2), rng.uniform(0.15 * side, 0.3 * side)
                mask = (lines - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
                image = 40 + 20 * site + 90 * mask + rng.normal(0, 12, size=mask.shape)
                stem = f"{name}-{patient:02d}-{number}"
                Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / "images" / f"{stem}.png")
                Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{stem}.png")
                rows.append(f"{stem},{name},{name} {patient},{'train' if patient < PATIENTS else 'test'}")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_backbones(folder: Path) -> dict[str, Path]:
    """Random models of a few narrow blocks, saved as their published forms are."""
    import torch
    import transformers

    torch.manual_seed(0)
    vit = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=14, image_size=28
    )
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 64,
        "window_size": 3,
        "global_attn_indexes": [1, 3],
        "output_channels": 16,
        "num_pos_feats": 8,
        "mlp_dim": 64,
    }
    sam = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 16, "image_size": 64},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    models = (transformers.Dinov2Model(vit), transformers.SamModel(sam))
    folders = {name: folder / str(number) for number, name in enumerate(SIDES)}
    for path, model in zip(folders.values(), models, strict=True):
        model.save_pretrained(path)
    return folders


def experiment(backbone: Path, data: Path, side: int, more: dict[str, Any]) -> dict[str, Any]:
    """Two rounds of one pass; the noise of epsilon 8 is each site's own."""
    return {
        "name": "audited",
        "data": {"source": "folder", "path": str(data)},
        "partition": {"kind": "natural"},
        "recipe": {
            "rounds": 2,
            "threads": 1,
            "precision": "float32",
            "backbone": {"name": str(backbone)},
            "adapter": {"rank": 2},
            "data": {"class_names": ["background", "disc"], "input_size": [side, side]},
            "optimiser": {"name": "sgd", "learning_rate": 0.02, "batch_size": 10, "weight_decay": 0.0},
            "aggregation": {"weighting": "uniform"},
            **more,
        },
    }


def row(model: str, kind: str, result: privacy_audit.Audit) -> list[str]:
    """One line of the table."""
    shown = result.shown
    claimed = "nothing" if result.claimed is None else f"{result.claimed:.2f}"
    return [
        *(model, kind, result.unit, str(shown.canaries), f"{shown.right} of {shown.guesses}"),
        *(f"{shown.epsilon:.2f}", f"{shown.most:.2f}", claimed),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "security" / "attacks.md")
    parser.add_argument("--runs", type=int, default=4)
    given = parser.parse_args()
    lines, refuted = [HEAD, ("---",) * len(HEAD)], []
    with tempfile.TemporaryDirectory(prefix="fedvfm-audits-") as scratch:
        backbones = write_backbones(Path(scratch))
        for model, side in SIDES.items():
            for kind, more in KINDS.items():
                each = 2 if "patient" in kind else 1
                data = Path(scratch) / f"data-{side}-{each}"
                if not data.exists():
                    write_data(data, side, each)
                result = privacy_audit.audit(experiment(backbones[model], data, side, more), runs=given.runs)
                refuted += [f"{model}, {kind}"] if result.refuted else []
                lines.append(tuple(row(model, kind, result)))
                print(" | ".join(lines[-1]), flush=True)
                block.write(given.page, "privacy audit", "\n".join(f"| {' | '.join(line)} |" for line in lines))
    if refuted:
        sys.exit(f"a claim is refuted: {'; '.join(refuted)}")


if __name__ == "__main__":
    main()
