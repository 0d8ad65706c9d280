"""What a smaller student and an ONNX graph in 8 bits cost and keep, beside the adapter that they are made of.

    python benchmarks/edge.py RUN [RUN ...] [--student unet] [--epochs 40] [--most 2000] [--write]

Of each finished run of a segmentation experiment in slices or pictures, without prompts: its adapter by torch and its
ONNX export, both in float32, the export in 8 bits (``--int8``), and students (``fedvfm distil``), as each of
:data:`STUDENTS` is fitted. The run's training images are written as files without labels: students learn from them, and
ranges of 8 bits are measured on them. Test images serve for nothing but what is told: Dice, the mean over hospitals
(whole volumes where the data are volumes), and processor seconds of the model alone on one thread, the median over
``--images`` test images, all kinds in turns. Bytes are all files that a prediction needs: of an adapter its folder and
its backbone.

What is made or measured lies in ``--output`` by the adapter's fingerprint, and is not made again. Writes
``simulations/results/edge.json`` of the runs given; ``--write`` puts the table into ``docs/guide.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import block
import nibabel
import numpy as np
import prediction
import sam_hippocampus
import torch
from PIL import Image

from fedvfm import errors
from fedvfm.backbones import weights
from fedvfm.client.training import evaluator
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.data.volumes import geometry
from fedvfm.inference import delivery, distillation, export, forms, output, sessions
from fedvfm.model import adapted_model, sliding_window
from fedvfm.simulation import experiment
from fedvfm.storage import storage

ROOT = Path(__file__).parents[1]
GUIDE, RESULTS = ROOT / "docs" / "guide.md", ROOT / "simulations" / "results" / "edge.json"
TORCH, ONNX, INT8 = "adapter, torch, float32", "onnx, float32", "onnx, int8"
STUDENTS = {
    "unet": ('adapter.kind="full"', "optimiser.batch_size=2"),
    "litemedsam": (
        *('adapter.kind="head-only"', 'task.head="unet"', "data.input_size=[112, 112]"),
        *("data.mean=[0.0, 0.0, 0.0]", "data.std=[1.0, 1.0, 1.0]"),
        *("optimiser.learning_rate=3e-3", "optimiser.batch_size=2"),
    ),
}
"""Backbone of a student -> its recipe: a small network from scratch, or as ``sam-hippocampus`` has LiteMedSAM."""


@dataclass(frozen=True)
class Kind:
    """One way to predict: what is shipped for it, the model that images are prepared for, and what computes."""

    folder: Path
    model: adapted_model.AdaptedModel
    run: sliding_window.WithRows

    @classmethod
    def of_adapter(cls, folder: Path) -> Kind:
        """An adapter in float32."""
        model = delivery.exact(export.load_adapter(folder))
        return cls(folder, model, sliding_window.alone(model))

    @property
    def size(self) -> dict[str, int]:
        """Bytes of its folder, and of the backbone that must lie beside it; a graph holds its backbone."""
        graph = (self.folder / sessions.FILE).exists() or not self.model.backbone.sha256
        return {
            "folder": _size(self.folder),
            "backbone": 0 if graph else _size(weights.locate(self.model.recipe.backbone, download=False).folder),
        }

    def dice(self, hospitals: Sequence[Any]) -> float:
        """Macro Dice as a run's own test has it."""

        def many(model: Any, site: Any, shown: Any, ready: Sequence[Any], batch: int) -> Iterator[torch.Tensor]:
            return sliding_window.many(model, [one.image for one in ready], self.run, batch)

        with mock.patch.object(evaluator, "many", many):
            return sam_hippocampus.macro(self.model, self.model.read(), hospitals)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def images(what: schema.Experiment, folder: Path) -> None:
    """The run's training images as its hospitals' scanners show them, without labels: PNG, of volumes NIfTI.

    Volumes are written whole, also where training saw every N-th slice.
    """
    options = {key: 1 if key == "every" else value for key, value in what.data.options.items()}
    whole = what.model_copy(update={"data": what.data.model_copy(update={"options": options})})
    hospitals = experiment.hospitals(what)
    held = {sample.unit for one in hospitals for sample in (*one.val, *one.test)}
    with output.whole(folder) as made:
        for own, full in zip(hospitals, experiment.hospitals(whole), strict=True):
            units: dict[str, list[samples.Sample]] = {sample.unit: [] for sample in own.train}
            for sample in full.source.samples():
                if sample.unit in units and sample.unit not in held:
                    units[sample.unit].append(sample)
            for number, parts in enumerate(filter(None, units.values())):
                parts.sort(key=lambda sample: sample.part.index if sample.part else 0)
                pixels = [full.read(sample) for sample in parts]
                _write(made / f"{own.name}-{number:04d}", pixels, parts[0].part, what.recipe.data.plane)


def _write(path: Path, pixels: Sequence[samples.Pixels], part: samples.Part | None, plane: geometry.Plane) -> None:
    first = pixels[0]
    if part is None:
        image = first.image
        grey = (image[0] * 65535).round().astype(np.uint16)
        colour = (image.transpose(1, 2, 0) * 255).round().astype(np.uint8)
        Image.fromarray(grey if len(image) == 1 else colour).save(path.with_name(f"{path.name}.png"))
        return
    axis, (low, high) = geometry.ACROSS.get(plane, 2), first.units or (0.0, 1.0)
    shown = [geometry.hidden(one.image[len(one.image) // 2]) for one in pixels]  # of a stack the slice in its middle
    voxels = np.stack(shown, axis=axis) * (high - low) + low
    down, across = first.spacing or (1.0, 1.0)
    steps = np.insert([across, down], axis, part.step)
    nibabel.Nifti1Image(voxels, np.diag([*steps, 1.0])).to_filename(path.with_name(f"{path.name}.nii.gz"))


def kinds(
    run: Path, work: Path, students: Mapping[str, tuple[str, Path]], asked: Any
) -> Iterator[tuple[str, Kind | None]]:
    """Each kind by its name, made where it is not there; None for 8 bits where the export is refused."""
    adapter, pictures = run / "adapter", work / "images"
    if not pictures.exists():
        images(sam_hippocampus.read(run), pictures)
    teacher = Kind.of_adapter(adapter)
    yield TORCH, teacher
    graphs: dict[str, dict[str, Any]] = {ONNX: {}, INT8: {"int8": True, "calibrate": pictures}}
    for name, options in graphs.items():
        folder = work / ("int8" if options else "onnx")
        refused = folder.with_name(f"{folder.name}-refused.txt")
        if not folder.exists() and not refused.exists():
            try:
                forms.export_adapter(adapter, folder, "onnx", **options)
            except errors.CheckpointError as error:
                storage.write_text(refused, f"{error}\n")
        there = folder.exists()
        yield name, Kind(folder, teacher.model, sessions.Session(folder, teacher.model).run) if there else None
    for name, (student, folder) in students.items():
        if not folder.exists():
            sets, epochs = STUDENTS[student], asked.epochs
            distillation.run(adapter, pictures, folder, student, sets=sets, epochs=epochs, most=asked.most)
        yield name, Kind.of_adapter(folder)


def measured(run: Path, asked: Any) -> dict[str, Any]:
    """What a run is, and a row of figures for each kind."""
    what = sam_hippocampus.read(run)
    fingerprint = json.loads((run / "adapter" / export.ABOUT).read_text())["fingerprint"]
    work = asked.output / fingerprint[:12]
    chosen = asked.student or (["unet"] if what.recipe.backbone.name == "litemedsam" else ["litemedsam", "unet"])
    words = f"{asked.epochs} epochs, {asked.most} images at most"
    folders = {one: work / f"student-{one}-{asked.epochs}-{asked.most}" for one in chosen}
    students = {f"student {one}, {words}": (one, folder) for one, folder in folders.items()}
    names, kept = [TORCH, ONNX, INT8, *students], work / "figures.json"
    timed = f"{asked.images} images, {'; '.join(names)}"  # in turns, so that times of another set are not beside these
    figures: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {"rows": {}, "seconds": {}}
    if timed not in figures["seconds"]:
        made, hospitals = dict(kinds(run, work, students, asked)), experiment.hospitals(what)
        for name, kind in made.items():
            if name not in figures["rows"]:
                row = None if kind is None else {"dice": kind.dice(hospitals), "bytes": kind.size}
                figures["rows"][name] = row
                storage.write_text(kept, json.dumps(figures, indent=1))
                print(f"{run}: {name}: {row}", flush=True)
        there = {name: kind for name, kind in made.items() if kind is not None}
        figures["seconds"][timed] = seconds(run, there, asked.images)
        storage.write_text(kept, json.dumps(figures, indent=1))
    took = figures["seconds"][timed]
    rows = {name: figures["rows"][name] and {**figures["rows"][name], "seconds": took[name]} for name in names}
    facts = {"experiment": what.name, "seed": what.recipe.seed, "rounds": what.recipe.rounds}
    facts |= {"backbone": what.recipe.backbone.name, "adapter": fingerprint, "timed_images": asked.images}
    return {**facts, "rows": rows}


def seconds(run: Path, made: Mapping[str, Kind], most: int) -> dict[str, float]:
    """Processor seconds an image, medians; kinds in turns, and the first image twice, to warm up."""
    shown = {id(kind.model): prediction.images(run, kind.model, most) for kind in made.values()}
    took: dict[str, list[float]] = {name: [] for name in made}
    for at in (0, *range(len(next(iter(shown.values()))))):
        for name, kind in made.items():
            start = time.process_time()
            sliding_window.logits(kind.model, shown[id(kind.model)][at].image, kind.run)
            took[name].append(time.process_time() - start)
    return {name: statistics.median(values[1:]) for name, values in took.items()}


def lines(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The block as Markdown."""
    for one in runs:
        yield f"`{one['experiment']}`, seed {one['seed']}, {one['rounds']} rounds, {one['backbone']}; test Dice is the"
        yield f"mean over hospitals; processor seconds on one thread, median of {one['timed_images']} test images:"
        yield ""
        yield "| what predicts | macro Dice | MB: its folder | its backbone | both | s an image |"
        yield "|---|---|---|---|---|---|"
        for name, row in one["rows"].items():
            if row is None:
                yield f"| {name} | refused: not near enough to the adapter | | | | |"
                continue
            own, beside = (row["bytes"][part] / 1e6 for part in ("folder", "backbone"))
            shown = f"{beside:.1f}" if beside else "-"
            yield f"| {name} | {row['dice']:.3f} | {own:.1f} | {shown} | {own + beside:.1f} | {row['seconds']:.3f} |"
        yield ""


def main() -> None:
    """Print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--student", nargs="+", choices=tuple(STUDENTS), help="by default, those unlike the teacher")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--most", type=int, default=2000, help="images and slices that a student learns from")
    parser.add_argument("--images", type=int, default=24, help="test images that are timed")
    parser.add_argument("--output", type=Path, default=Path("runs/edge"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = [measured(run, asked) for run in asked.runs]
    text = "\n".join(lines(found)).strip()
    print(text)
    asked.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.write:
        block.write(GUIDE, "edge", text)


if __name__ == "__main__":
    main()
