"""HD95, ASSD and NSD by ``fedvfm.tasks.surfaces`` beside MONAI's functions: processor time, interleaved, as ratios.

Run: ``python benchmarks/surfaces.py [--repeats 5]``. Both get the box around both masks, on one thread. MONAI is asked
for HD95 and NSD alone, and for all three; ours are always all three. Ends with an error if a value differs by more
than 1e-4.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from monai import metrics as monai_metrics
from scipy import ndimage

from fedvfm.tasks import metrics, surfaces

TOLERANCE = 2.0
THICK = (2.5, 0.8, 0.8)
Case = tuple[str, np.ndarray, np.ndarray, tuple[float, ...] | None]


def sphere(shape: tuple[int, ...], centre: tuple[int, ...], radius: float, step: float = 1.0) -> np.ndarray:
    """A disc, or a ball that is ``step`` times shorter along the slices."""
    steps = [step, 1.0, 1.0][-len(shape) :] if len(shape) == 3 else [1.0, 1.0]
    grid = np.indices(shape)
    return sum(((axis - at) * s) ** 2 for axis, at, s in zip(grid, centre, steps, strict=True)) <= radius**2


def blobs(shape: tuple[int, ...], coarse: float, fine: float, level: float, noise: float) -> list[np.ndarray]:
    """A prediction and a truth with the same smooth blobs, whose outlines differ by a finer noise."""
    rng = np.random.default_rng(0)
    fields = [ndimage.gaussian_filter(rng.standard_normal(shape), sigma) for sigma in (coarse, fine)]
    base, other = (field / field.std() for field in fields)
    return [base + noise * other > level, base > level]


def cases() -> Iterator[Case]:
    yield "512 x 512, discs", sphere((512, 512), (258, 255), 175), sphere((512, 512), (250, 250), 180), None
    yield "512 x 512, blobs", *blobs((512, 512), 40, 6, 0.3, 0.15), (0.7, 0.7)
    yield "512 x 512, nuclei", *blobs((512, 512), 5, 3, 1.0, 0.2), None
    noise = np.random.default_rng(0).random((2, 512, 512)) < 0.5
    yield "512 x 512, noise", noise[0], noise[1], None
    shape = (96, 256, 256)
    yield (
        "96 x 256 x 256, balls",
        sphere(shape, (47, 130, 124), 97, 2.5),
        sphere(shape, (48, 128, 128), 100, 2.5),
        THICK,
    )
    yield "96 x 256 x 256, blobs", *blobs(shape, 12, 3, 0.3, 0.15), THICK
    yield "96 x 256 x 256, fine blobs", *blobs(shape, 3, 3, 1.0, 0.2), THICK


def by_monai(pair: list[torch.Tensor], spacing: tuple[float, ...] | None, mean: bool) -> list[float]:
    reference: Any = monai_metrics
    options = {"include_background": True, "spacing": spacing}
    found = [reference.compute_hausdorff_distance(*pair, percentile=95, **options)]
    found += [reference.compute_average_surface_distance(*pair, symmetric=True, **options)] if mean else []
    found += [reference.compute_surface_dice(*pair, [TOLERANCE], **options)]
    return [float(number) for number in found]


def compare(repeats: int, ways: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """(Median of the processor seconds of each way, what each returned); the ways take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, Any] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            values[name] = way()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, values


def line(name: str, edges: int, took: dict[str, float]) -> str:
    ratios = [took["ours"] / took[other] for other in ("two", "three")]
    milliseconds = [1000 * took[other] for other in ("two", "three", "ours")]
    return (
        f"| {name} | {edges} | "
        + " | ".join([*(f"{n:.1f}" for n in milliseconds), *(f"{r:.2f}" for r in ratios)])
        + " |"
    )


def several_classes(repeats: int, classes: int) -> None:
    """A label map as a metric set scores it: every class in its own box."""
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.standard_normal((classes, 512, 512)), (0, 12, 12))
    truth = field.argmax(axis=0)
    predicted = (field + 0.1 * ndimage.gaussian_filter(rng.standard_normal(field.shape), (0, 4, 4))).argmax(axis=0)

    def ours() -> list[float]:
        scores = metrics.SegmentationScores([str(k) for k in range(classes)], nsd_tolerance=TOLERANCE)
        scores.add("a", predicted, truth)
        return [scores.value()[name] for name in ("hd95", "assd", "nsd")]

    def reference(mean: bool) -> list[float]:
        rows = []
        for k in range(1, classes):
            box = surfaces.around(*_boxes(predicted == k, truth == k))
            pair = [torch.from_numpy(np.ascontiguousarray(mask[box] == k))[None, None] for mask in (predicted, truth)]
            rows.append(by_monai(pair, None, mean))
        return list(np.mean(rows, axis=0))

    edges = sum(int(surfaces.edge(mask == k).sum()) for k in range(1, classes) for mask in (predicted, truth))
    took, values = compare(repeats, {"two": lambda: reference(False), "three": lambda: reference(True), "ours": ours})
    print(line(f"512 x 512, {classes} classes, with Dice and IoU", edges, took), flush=True)
    check(values)


def _boxes(*masks: np.ndarray) -> list[surfaces.Box]:
    return [ndimage.find_objects(mask.astype(np.uint8), 1)[0] for mask in masks]


def check(values: dict[str, Any]) -> None:
    worst = float(np.abs(np.subtract(values["ours"], values["three"])).max())
    if not worst <= 1e-4:
        raise SystemExit(f"ours {values['ours']} and MONAI's {values['three']} differ by {worst}; the limit is 1e-4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
    print("| masks | edge pixels | MONAI: HD95, NSD (ms) | all three (ms) | ours (ms) | ours / first | ours / second |")
    print("|---|---|---|---|---|---|---|")
    for name, predicted, truth, spacing in cases():
        box = surfaces.around(*_boxes(predicted, truth))
        masks = [np.ascontiguousarray(mask[box]) for mask in (predicted, truth)]
        tensors = [torch.from_numpy(mask)[None, None] for mask in masks]
        took, values = compare(
            repeats,
            {
                "two": lambda tensors=tensors, spacing=spacing: by_monai(tensors, spacing, False),
                "three": lambda tensors=tensors, spacing=spacing: by_monai(tensors, spacing, True),
                "ours": lambda masks=masks, spacing=spacing: surfaces.scores(*masks, spacing, TOLERANCE),
            },
        )
        print(line(name, sum(int(surfaces.edge(mask).sum()) for mask in masks), took), flush=True)
        check(values)
    several_classes(repeats, 21)


if __name__ == "__main__":
    main()
