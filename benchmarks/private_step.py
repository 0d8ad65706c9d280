"""What a private step costs: time and memory against the plain step, and against stock Opacus where stock is right.

    python benchmarks/private_step.py [--steps 6] [--repeats 3] [--batch 8] [--write]

Models of real shapes with random weights: DINOv2-small at 224 px with LoRA r8 and the default head, and a SAM-shaped
model (384 wide, 6 blocks, 256 px) with LoRA and the mask decoder's output layers. Every arm runs in a process of its
own, one after the other and round about, on one thread; the first step of each is left out. Memory is the highest
resident set above that of the loaded model; seconds are the processor's. Stock is Opacus' GradSampleModule and
DPOptimizer as its tutorials use them; on SAM it has no right answer to compare with. Printed are medians and ratios;
``--write`` puts the table into ``docs/privacy.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import block
import numpy as np
import psutil

PAGE = Path(__file__).parents[1] / "docs" / "privacy.md"
MIB = 1 << 20
SIZES = {"vit": 224, "sam": 256}
ARMS = [("vit", "plain"), ("vit", "private"), ("vit", "opacus"), ("vit", "hooks"), ("sam", "plain"), ("sam", "private")]
SAID = {
    "plain": "plain step",
    "private": "private step",
    "opacus": "stock Opacus",
    "hooks": "private step, hooks (as on a GPU)",
}
MODELS = {"vit": "DINOv2-small, 224 px", "sam": "SAM-shaped, 256 px"}
PRIVACY = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}


@dataclass(frozen=True)
class Drawn:
    """Images of noise with one box each."""

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
        image = 0.6 * rng.random((3, self.side, self.side)).astype(np.float32)
        return samples.Pixels(image + 0.4 * mask.astype(np.float32), mask)


def save(folder: Path) -> None:
    """Both backbones, once."""
    import torch
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=224)).save_pretrained(folder / "vit")
    vision = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": 256}
    vision |= {"window_size": 7, "global_attn_indexes": [2, 5], "mlp_dim": 1536}
    made = transformers.SamConfig(vision_config=vision, prompt_encoder_config={"image_size": 256})
    transformers.SamModel(made).save_pretrained(folder / "sam")


def build(folder: Path, model: str, arm: str, batch: int) -> tuple[Any, Any]:
    """The adapted model and a site with as many images as a batch has."""
    from fedvfm.client.training import site as sites
    from fedvfm.config import schema
    from fedvfm.model import adapted_model, feature_cache

    values = {
        "backbone": {"name": str(folder / model)},
        "data": {"class_names": ["rest", "box"], "input_size": [SIZES[model]] * 2, "views": 1},
        "optimiser": {"batch_size": batch},
        "aggregation": {"weighting": "uniform"},
        "privacy": {} if arm in ("plain", "opacus") else PRIVACY,
    }
    made = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "benchmark"))
    return made, sites.Site("north", Drawn(SIZES[model], batch), cache=feature_cache.FeatureCache(64 * MIB))


def stock(model: Any, site: Any, steps: int) -> list[float]:
    """The same step as Opacus' tutorials write it."""
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from fedvfm.client.training import site as sites

    model.write(model.initial())
    for module in model.modules():
        module.training = True
    parameters = [one for group in model.trainable(1).values() for one in group]
    wrapped = GradSampleModule(model, strict=False)
    batch = model.recipe.optimiser.batch_size
    private = DPOptimizer(
        torch.optim.AdamW(parameters), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch
    )
    taken = []
    for _ in range(steps):
        started = time.process_time()
        examples = [site.example(model, one, 0, ("x",)) for one in site.split("train")]
        target = torch.stack([torch.as_tensor(model.task.target(one.prepared, None)) for one in examples])
        private.zero_grad()
        model.task.loss(wrapped(*sites.collate(examples, model)), target).backward()
        private.step()
        taken.append(time.process_time() - started)
    return taken


class Peak:
    """The highest resident set while it is watched, above that at the start."""

    def __init__(self) -> None:
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self.highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.highest = max(self.highest, self._process.memory_info().rss)

    def end(self) -> float:
        """MiB."""
        self._over.set()
        self._thread.join()
        return (self.highest - self._before) / MIB


def child(folder: Path, model: str, arm: str, steps: int, batch: int) -> None:
    """One arm; a line of JSON."""
    warnings.simplefilter("ignore")
    import torch

    from fedvfm.client.training import trainer
    from fedvfm.privacy import gradients

    torch.set_num_threads(1)
    if arm == "hooks":
        gradients.worthwhile = lambda parameters: True
    made, site = build(folder, model, arm, batch)
    peak = Peak()
    # On a machine that does other work beside, processor time of the one thread is what a step costs.
    trainer.time = types.SimpleNamespace(monotonic=time.process_time)  # type: ignore[assignment]
    taken = stock(made, site, steps) if arm == "opacus" else trainer.trial(made, site, steps)
    private = {"private": "loop", "hooks": "hooks" if any(gradients._proven.get(made, {}).values()) else "loop"}
    way = private.get(arm, "")
    print(json.dumps({"seconds": statistics.median(taken[1:]), "mib": peak.end(), "way": way}))


def measure(folder: Path, steps: int, repeats: int, batch: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Medians over the repeats, arms round about."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    for _ in range(repeats):
        for model, arm in ARMS:
            command = [sys.executable, __file__, "--child", str(folder), model, arm]
            command += ["--steps", str(steps), "--batch", str(batch)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.setdefault((model, arm), []).append(json.loads(done.stdout.splitlines()[-1]))
    return {
        key: {name: statistics.median(one[name] for one in found) for name in ("seconds", "mib")}
        | {"way": found[0]["way"]}
        for key, found in rows.items()
    }


def table(found: dict[tuple[str, str], dict[str, Any]], batch: int) -> str:
    """Markdown."""
    lines = ["| model | step | way | seconds | times the plain step | memory, MiB | times the plain step |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (model, arm), row in found.items():
        plain = found[model, "plain"]
        ratios = [f"{row[name] / plain[name]:.2f}" for name in ("seconds", "mib")]
        said = [f"{MODELS[model]}, batch {batch}", SAID[arm], row["way"] or "-"]
        said += [f"{row['seconds']:.2f}", ratios[0], f"{row['mib']:.0f}", ratios[1]]
        lines.append(f"| {' | '.join(said)} |")
    own, other = found["vit", "private"], found["vit", "opacus"]
    time_ratio, memory_ratio = (f"{own[name] / other[name]:.2f}" for name in ("seconds", "mib"))
    lines += ["", f"Ours against stock Opacus on the ViT: {time_ratio} of its time, {memory_ratio} of its memory."]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="put the table into docs/privacy.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Path(given.child[0]), given.child[1], given.child[2], given.steps, given.batch)
        return
    with tempfile.TemporaryDirectory(prefix="fedvfm-private-") as folder:
        save(Path(folder))
        text = table(measure(Path(folder), given.steps, given.repeats, given.batch), given.batch)
    print(text)
    if given.write:
        block.write(PAGE, "private step", text)


if __name__ == "__main__":
    main()
