"""How busy a GPU is in training: SAM ViT-B at 1024 px, fed as before and as now, in bfloat16 and float32.

    python benchmarks/gpu_feed.py [--steps 20] [--batch 2] [--device cuda]
    python benchmarks/gpu_feed.py --on-the-cpu          # the same code with a tiny model; its figures mean nothing

SAM ViT-B's shape with random weights, LoRA of rank 4 and the decoder's parts, gradient checkpointing, drawn images with
flip, rot90, intensity and noise, drawn afresh in every epoch. Arms, in turns:

    numpy          images augmented by NumPy in the training thread (as it was)
    thread         the same, in a thread that is one batch ahead
    device         augmented on the device, in the training thread
    thread+device  both (as it is)

Busy is the time of the same steps with their batches already there, over that of the arm. Evaluation is of whole
images, one at a time and in batches. Memory is the highest that torch took of the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedvfm.client.training import evaluator, feed, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model, feature_cache, precision
from fedvfm.model import device as devices

ARMS = {"numpy": (False, False), "thread": (True, False), "device": (False, True), "thread+device": (True, True)}
"""Arm -> whether a thread is ahead, and whether the device augments."""


class Drawn:
    """Images of noise with a box each."""

    name = "north"
    val: tuple[samples.Sample, ...] = ()

    def __init__(self, side: int, count: int) -> None:
        self._side = side
        self.train = tuple(samples.Sample(str(number)) for number in range(count))
        self.test = self.train

    def read(self, sample: samples.Sample) -> samples.Pixels:
        """One image. Shapes: (3, side, side)."""
        rng, side = np.random.default_rng(int(sample.id)), self._side
        mask = np.zeros((side, side), np.int64)
        mask[side // 8 : side // 2, side // 4 : side // 2 + int(sample.id)] = 1
        image = 0.6 * rng.random((3, side, side), dtype=np.float32)
        return samples.Pixels(image + np.float32(0.4) * mask.astype(np.float32), mask)


def save(folder: Path, side: int, *, tiny: bool) -> None:
    """SAM ViT-B with random weights, or a small one of its form."""
    import transformers

    torch.manual_seed(0)
    vision: dict[str, Any] = {"image_size": side}
    if tiny:
        vision |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64}
        vision |= {"window_size": 3, "global_attn_indexes": [1]}
    made = transformers.SamConfig(vision_config=vision, prompt_encoder_config={"image_size": side})
    transformers.SamModel(made).save_pretrained(folder)


def recipe(folder: Path, side: int, batch: int, asked: str) -> schema.Recipe:
    """As the bundled experiment sam-vit-b, with noise."""
    augment = ["flip", "rot90", "intensity", "noise"]
    values = {
        "precision": asked,
        "backbone": {"name": str(folder), "options": {"gradient_checkpointing": True}},
        "adapter": {"kind": "lora", "rank": 4},
        "data": {"class_names": ["rest", "box"], "input_size": [side, side], "augment": augment},
        "optimiser": {"batch_size": batch, "learning_rate": 1e-4},
    }
    return schema.parse(schema.Recipe, values, "benchmark")


@contextlib.contextmanager
def fed(thread: bool, device: bool) -> Iterator[None]:
    """Feed the device in one of the ways."""
    before = feed.helps, sites.augments_there
    feed.helps, sites.augments_there = (lambda model, site: thread), (lambda model: device)
    try:
        yield
    finally:
        feed.helps, sites.augments_there = before


def seconds(model: adapted_model.AdaptedModel, site: sites.Site, steps: int) -> float:
    """Of a step; the first three are left out."""
    taken = trainer.trial(model, site, steps + 3)
    return sum(taken[3:]) / steps


def bare(model: adapted_model.AdaptedModel, site: sites.Site, steps: int) -> float:
    """The same steps with batches that are already there: what the device itself needs."""
    batches = list(trainer._batches(model, site, site.split("train"), 1))[:2]
    optimiser = trainer._optimiser(model, model.recipe.optimiser, 1)
    model.train()
    model.select(1)
    for number in range(steps + 3):
        if number == 3:
            devices.wait(model.device)
            started = time.monotonic()
        trainer._step(model, optimiser, batches[number % len(batches)], site)
    devices.wait(model.device)
    return (time.monotonic() - started) / steps


def peak(device: str) -> str:
    """Highest memory of the GPU since it was last asked."""
    if not device.startswith("cuda"):
        return "-"
    found = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.reset_peak_memory_stats(device)
    return f"{found:,.0f} MiB"


def trained(folder: Path, side: int, batch: int, device: str, steps: int, repeats: int) -> None:
    """Table of training."""
    print("\n| numbers | arm | ms a step | of them the device's | busy | memory |\n|---|---|---|---|---|---|")
    for asked in ("bfloat16", "float32"):
        with precision.taken(device, 0.0):
            model = adapted_model.AdaptedModel(recipe(folder, side, batch, asked), device=device)
        site = sites.Site("north", Drawn(side, 2 * batch), device, cache=feature_cache.FeatureCache(1 << 30))
        model.write(model.initial())
        took: dict[str, list[float]] = {arm: [] for arm in ARMS}
        alone, memory = [], {}
        for _ in range(repeats):
            for arm, ways in ARMS.items():
                with fed(*ways):
                    took[arm].append(seconds(model, site, steps))
                memory[arm] = peak(device)
            with fed(thread=False, device=True):
                alone.append(bare(model, site, steps))
        own = statistics.median(alone)
        for arm, values in took.items():
            step = statistics.median(values)
            print(
                f"| {model.precision} | {arm} | {1e3 * step:.1f} | {1e3 * own:.1f} | {own / step:.0%} | {memory[arm]} |"
            )


def evaluated(folder: Path, side: int, device: str, images: int) -> None:
    """Table of evaluation."""
    print("\n| images at a time | ms an image | memory |\n|---|---|---|")
    model = adapted_model.AdaptedModel(recipe(folder, side, 1, "auto"), device=device).eval()
    model.write(model.initial())
    site = sites.Site("north", Drawn(side, images), device, cache=feature_cache.FeatureCache(1 << 30))
    shown = site.split("test")
    ready = [site.whole(model, one) for one in shown]
    site.cache = feature_cache.FeatureCache()  # nothing of the frozen blocks is kept
    for batch in (1, 2, 4, 8):
        took = []
        for _ in range(3):
            devices.wait(device)
            started = time.monotonic()
            for _ in evaluator.many(model, site, shown, ready, batch):
                pass
            took.append(time.monotonic() - started)
        print(f"| {batch} | {1e3 * min(took) / images:.1f} | {peak(device)} |")


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--on-the-cpu", action="store_true")
    asked = parser.parse_args()
    if not asked.on_the_cpu and not torch.cuda.is_available():
        print(
            "no CUDA device here: nothing was measured. --on-the-cpu runs the same code with a tiny model",
            file=sys.stderr,
        )
        return 2
    if asked.on_the_cpu:
        torch.set_num_threads(1)
    device, side, steps = ("cpu", 64, 2) if asked.on_the_cpu else (devices.choose(asked.device), 1024, asked.steps)
    name = "a CPU, a tiny model: these figures mean nothing" if asked.on_the_cpu else torch.cuda.get_device_name(device)
    print(f"{name}; {side} px, batch {asked.batch}, torch {torch.__version__}; {precision.words('auto', device)}")
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), side, tiny=asked.on_the_cpu)
        trained(Path(folder), side, asked.batch, device, steps, 1 if asked.on_the_cpu else 3)
        evaluated(Path(folder), side, device, 8)
    return 0


if __name__ == "__main__":
    sys.exit(main())
