"""What a step costs with a cache that holds all, 75 % or 50 % of what is needed, and with files beside it.

    python benchmarks/cache.py [--rounds 4] [--images 10]

Two models with random weights: DINOv2-small at the demo's size (182 px, LoRA on the last 4 of 12 blocks, batch 2, two
epochs a round, 4 views), and a SAM-shaped one whose encoder is all frozen (256 px, 384 wide, 6 blocks, head and decoder
parts train). Every arm has a cache of its own and is filled by one pass over all views; then the arms train round and
round about, one round each, on one thread. Printed are medians of processor and wall seconds a step, as ratios to the
full cache, and how much of what was asked for was computed. "Half + files" has memory for half and files for the rest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"DINOv2-small": 182, "SAM-shaped": 256}
ARMS = {"full": (1.0, 0), "75 %": (0.75, 0), "50 %": (0.5, 0), "half + files": (0.5, 1 << 34), "files": (0.0, 1 << 34)}
"""Arm -> share of what is needed that fits into memory, bytes of files."""


@dataclass(frozen=True)
class Drawn:
    """Noisy images with one box each."""

    side: int
    count: int
    name: str = "north"
    val: tuple[Any, ...] = ()
    test: tuple[Any, ...] = ()

    @property
    def train(self) -> tuple[Any, ...]:
        """All images."""
        from fedvfm.data import sample as samples

        return tuple(samples.Sample(str(at)) for at in range(self.count))

    def read(self, sample: Any) -> Any:
        """One image."""
        from fedvfm.data import sample as samples

        rng = np.random.default_rng(int(sample.id))
        mask = np.zeros((self.side, self.side), np.int64)
        mask[20:90, 30 : 80 + 5 * int(sample.id)] = 1
        return samples.Pixels(0.6 * rng.random((1, self.side, self.side)).astype(np.float32) + 0.4 * mask[None], mask)


@dataclass
class Taken:
    """What an arm took.

    Attributes:
        cpu, wall: seconds a step, one entry a round.
        asked, computed: features.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    asked: int = 0
    computed: int = 0


def save(folder: Path) -> None:
    """Both backbones."""
    import torch
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=182)).save_pretrained(
        folder / "DINOv2-small"
    )
    vision = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": 256}
    vision |= {"window_size": 7, "global_attn_indexes": [2, 5], "mlp_dim": 1536}
    made = transformers.SamConfig(vision_config=vision, prompt_encoder_config={"image_size": 256})
    transformers.SamModel(made).save_pretrained(folder / "SAM-shaped")


def build(folder: Path, model: str) -> Any:
    """The adapted model."""
    from fedvfm.config import schema
    from fedvfm.model import adapted_model

    lora = {"kind": "lora", "rank": 8, "alpha": 16, "layers": [8, 9, 10, 11]}
    values = {
        "rounds": 1000,
        "threads": 1,
        "precision": "float32",
        "backbone": {"name": str(folder / model)},
        "adapter": lora if model == "DINOv2-small" else {"kind": "head-only"},
        "data": {
            "class_names": ["rest", "grey", "white"],
            "input_size": [SIZES[model]] * 2,
            "views": 4,
            "augment": ["mirror", "intensity"],
        },
        "optimiser": {"batch_size": 2, "local_epochs": 2},
    }
    return adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "benchmark"))


def needed(model: Any, count: int) -> int:
    """Bytes of all images and features of all views."""
    from fedvfm.client.training import site as sites
    from fedvfm.model import feature_cache

    site = sites.Site("north", Drawn(side(model), count), cache=feature_cache.FeatureCache(1 << 40))
    fill(model, site)
    return site.cache.held


def side(model: Any) -> int:
    """Pixels of an image's side."""
    return int(model.recipe.data.input_size[0])


def fill(model: Any, site: Any) -> None:
    """One pass over all views."""
    for view in range(model.recipe.data.views):
        for sample in site.split("train"):
            site.example(model, sample, view)


def measure(model: Any, folder: Path, rounds: int, count: int) -> dict[str, Taken]:
    """Every arm, round about."""
    from fedvfm.client.training import site as sites
    from fedvfm.client.training import trainer
    from fedvfm.model import feature_cache, feature_files

    need, places, taken = needed(model, count), {}, {name: Taken() for name in ARMS}
    for number, (name, (share, disk)) in enumerate(ARMS.items()):
        files = feature_files.FeatureFiles(folder / f"features-{number}", disk) if disk else None
        if files is not None:
            files.prepare()
        cache = feature_cache.FeatureCache(int(need * share), files)
        places[name] = sites.Site("north", Drawn(side(model), count), cache=cache)
        fill(model, places[name])
    print(f"  needed: {need / (1 << 20):.0f} MiB")
    base = model.initial()
    for number in range(1, rounds + 1):
        for name, site in places.items():
            before, cpu, wall = site.cache.counts, time.process_time(), time.monotonic()
            update = trainer.train(model, site, base, number)
            steps, row, now = update.metrics["steps"], taken[name], site.cache.counts - before
            row.cpu.append((time.process_time() - cpu) / steps)
            row.wall.append((time.monotonic() - wall) / steps)
            row.asked += now.computed + now.memory + now.files
            row.computed += now.computed
    return taken


def show(taken: dict[str, Taken]) -> None:
    """The table."""
    full = taken["full"]
    for name, row in taken.items():
        # Each round of an arm beside the full cache's round just before or after it.
        cpu = statistics.median(ours / theirs for ours, theirs in zip(row.cpu, full.cpu, strict=True))
        wall = statistics.median(ours / theirs for ours, theirs in zip(row.wall, full.wall, strict=True))
        print(
            f"  {name:>13}: step {statistics.median(row.cpu):6.3f} CPU s; beside full {cpu:5.2f} CPU, {wall:5.2f} "
            f"wall; computed {row.computed / row.asked:4.0%}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--images", type=int, default=10)
    settings = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedvfm-cache-") as name:
        folder = Path(name)
        save(folder)
        for model in SIZES:
            print(f"{model}, {SIZES[model]} px, {settings.images} images x 4 views")
            made = build(folder, model)
            print(f"  frozen blocks: {made.frozen_blocks} of {made.backbone.depth}")
            (folder / f"{model}-features").mkdir()
            show(measure(made, folder / f"{model}-features", settings.rounds, settings.images))


if __name__ == "__main__":
    main()
