"""Prediction by torch one at a time, in batches, and by onnxruntime in float32 and with weights in 8 bits.

    python benchmarks/prediction.py RUN/adapter [--images 24] [--repeats 3]

The adapter of a finished run on the test images of that run's own data; arms in turns, each in this process, on as many
threads as torch takes. Printed are the medians of seconds an image (model only: images are prepared before), the ratio
to one at a time by torch, the share of pixels with the same class, and macro Dice beside torch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedvfm
from fedvfm.config import schema
from fedvfm.data import transforms
from fedvfm.inference import sessions
from fedvfm.model import sliding_window
from fedvfm.simulation import experiment
from fedvfm.tasks import metrics, segmentation


def images(run: Path, model: Any, most: int) -> list[transforms.Prepared]:
    """Test images of all hospitals in turn."""
    what = schema.parse(schema.Experiment, json.loads((run / "experiment.json").read_text()), "experiment")
    found, contract = [], model.recipe.data
    hospitals = experiment.hospitals(what)
    for number in range(max(len(one.test) for one in hospitals)):
        for one in hospitals:
            if number < len(one.test) and len(found) < most:
                pixels = one.read(one.test[number])
                found.append(
                    transforms.prepare(pixels, contract, len(contract.class_names), multiple=model.backbone.patch)
                )
    return found


def dice(model: Any, masks: Sequence[Any], shown: Sequence[transforms.Prepared]) -> float:
    """Mean over images of the mean over foreground classes."""
    classes = len(model.recipe.data.class_names)
    return float(
        np.mean(
            [metrics.overlap(mask, one.truth, classes)[0][1:].mean() for mask, one in zip(masks, shown, strict=True)]
        )
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = fedvfm.load_adapter(asked.adapter)
    shown = images(asked.adapter.parent, model, asked.images)
    plain = [one.image for one in shown]
    with tempfile.TemporaryDirectory() as folder:
        arms: dict[str, tuple[Callable[..., Any], int]] = {
            "torch, 1 at a time": (sliding_window.alone(model), 1),
            "torch, 4": (sliding_window.alone(model), 4),
            "torch, 8": (sliding_window.alone(model), 8),
        }
        for form in ("onnx", "onnx-int8"):
            fedvfm.export_adapter(asked.adapter, Path(folder) / form, form)
            arms[f"{form}, 1"] = (sessions.Session(Path(folder) / form, model).run, 1)
        took: dict[str, list[float]] = {arm: [] for arm in arms}
        masks: dict[str, list[Any]] = {}
        for _ in range(asked.repeats):
            for arm, (run, batch) in arms.items():
                started = time.process_time()
                found = list(sliding_window.many(model, plain, run, batch))
                took[arm].append((time.process_time() - started) / len(plain))
                masks[arm] = [
                    segmentation.classes_at(one, each.truth.shape) for one, each in zip(found, shown, strict=True)
                ]
    first = next(iter(arms))
    base = statistics.median(took[first])
    print(f"{len(plain)} images, {asked.threads} thread(s), torch computes in {model.precision}; processor seconds\n")
    print("| arm | s an image | ratio | same class | Dice |\n|---|---|---|---|---|")
    for arm, values in took.items():
        same = np.mean([(a == b).mean() for a, b in zip(masks[first], masks[arm], strict=True)])
        own = statistics.median(values)
        print(f"| {arm} | {own:.3f} | {own / base:.2f} | {same:.4%} | {dice(model, masks[arm], shown):.4f} |")


if __name__ == "__main__":
    main()
