"""The same federated LoRA training as a plain PyTorch loop and by the in-process engine: CPU time and peak PSS.

    python benchmarks/plain_loop.py [--sites 4 64] [--rounds 8 1] [--runs 5]

Both import the same libraries, read the same images with the same transforms, hold one backbone (a random DINOv2 of
ViT-tiny's shape), start from the same adapter and end at the same one (checked). The plain loop swaps adapters by hand,
averages them with NumPy, tests the last one and writes nothing; the engine goes through Flower's apps, messages,
admission, checkpoints, journal, summary and report. CPU time and memory are those of the process tree; runs are
interleaved; medians are printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZE, IMAGES = 112, 12


def make_backbone(folder: Path) -> None:
    """A random DINOv2 of ViT-tiny's shape, saved as Hugging Face does."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 224, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**shape)).save_pretrained(folder)


def make_experiment(folder: Path, sites: int, rounds: int) -> Any:
    """The experiment both runners work on."""
    import fedvfm
    from fedvfm.simulation import experiment

    fedvfm.register_source("discs", lambda settings: Discs(sites))
    values = {
        "name": "plain-loop",
        "baselines": [],
        "cache_mib": 0,
        "data": {"source": "discs"},
        "recipe": {
            "rounds": rounds,
            "threads": 1,
            "backbone": {"name": str(folder)},
            "adapter": {"rank": 8, "alpha": 16},
            "data": {"class_names": ["background", "disc"], "input_size": [SIZE, SIZE], "augment": ["flip"]},
            "optimiser": {"local_epochs": 2, "batch_size": 4, "learning_rate": 1e-3},
            "evaluation": {"every": 0, "surface": False},
        },
    }
    return experiment.parse(values, "benchmark")


class Discs:
    """Bright discs, made when read; each site has the same number."""

    def __init__(self, sites: int) -> None:
        from fedvfm.data import sample

        self.info = sample.SourceInfo("discs", "segmentation", ("background", "disc"), "CC0")
        splits = ["train"] * IMAGES + ["test"]
        self._samples = [
            sample.Sample(f"s{s:03d}-{i:03d}", site=f"site-{s:03d}", split=split)
            for s in range(sites)
            for i, split in enumerate(splits)
        ]

    def samples(self) -> Any:
        """All samples."""
        return self._samples

    def read(self, one: Any) -> Any:
        """One disc at a place of its own."""
        import numpy as np

        from fedvfm import seeding
        from fedvfm.data import sample

        rng = seeding.stream(0, one.id)
        y, x = np.mgrid[:SIZE, :SIZE] - rng.integers(30, SIZE - 30, 2)[:, None, None]
        mask = (y**2 + x**2 < 400).astype(np.int64)
        image = (0.5 * mask + 0.4 * rng.random((SIZE, SIZE)))[None].astype(np.float32)
        return sample.Pixels(image, mask)


def engine(folder: Path, sites: int, rounds: int, out: Path) -> str:
    """By fedvfm."""
    import fedvfm

    result = fedvfm.simulate(make_experiment(folder, sites, rounds), output=out)
    return str(result.summary["fingerprint"])


def plain(folder: Path, sites: int, rounds: int) -> str:
    """By hand: one model, a dictionary of arrays, an optimiser a site and round, a mean."""
    import monai  # noqa: F401
    import numpy as np
    import torch

    from fedvfm import seeding, state
    from fedvfm.client import model as models
    from fedvfm.client import trainer
    from fedvfm.data import transforms
    from fedvfm.simulation import experiment as experiments

    for library in ("flwr.clientapp", "flwr.serverapp"):  # both runners import the same
        importlib.import_module(library)
    what = make_experiment(folder, sites, rounds)
    recipe = what.recipe
    torch.set_num_threads(recipe.threads)
    hospitals = experiments.hospitals(what)
    model = models.AdaptedModel(recipe)
    names = dict(model._parameters_by_name)
    current = dict(model.initial())
    settings, contract = recipe.optimiser, recipe.data
    for number in range(1, rounds + 1):
        answers = []
        for hospital in hospitals:
            torch.manual_seed(seeding.torch_seed(recipe.seed, "train", number, hospital.name))
            with torch.no_grad():
                for name, parameter in names.items():
                    parameter.copy_(torch.tensor(current[name]))
            model.train()
            groups = model.trainable()
            rates = {"adapter": settings.learning_rate, "head": settings.head_learning_rate or settings.learning_rate}
            optimiser = torch.optim.AdamW(
                [{"params": groups[key], "lr": rates[key], "base": rates[key]} for key in ("adapter", "head")],
                weight_decay=settings.weight_decay,
            )
            per_epoch = -(-len(hospital.train) // settings.batch_size)
            step, total = 0, per_epoch * settings.local_epochs * rounds
            for epoch in range(settings.local_epochs):
                passed = (number - 1) * settings.local_epochs + epoch
                order = seeding.stream(recipe.seed, "order", number, epoch, hospital.name).permutation(
                    len(hospital.train)
                )
                for start in range(0, len(order), settings.batch_size):
                    views = []
                    for index in order[start : start + settings.batch_size]:
                        sample = hospital.train[index]
                        prepared = transforms.prepare(hospital.read(sample), contract, 2, multiple=model.backbone.patch)
                        rng = seeding.stream(recipe.seed, "augment", sample.id, "epoch", passed)
                        views.append(transforms.training_view(prepared, contract, rng))
                    pixels = torch.from_numpy(transforms.normalise(np.stack([view.image for view in views]), contract))
                    target = torch.stack([torch.as_tensor(view.mask).long() for view in views])
                    done = (number - 1) * per_epoch * settings.local_epochs + step
                    for group in optimiser.param_groups:
                        group["lr"] = group["base"] * trainer.rate_factor(settings, done / total)
                    loss = model.task.loss(model(pixels), target)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    parameters = [p for group in optimiser.param_groups for p in group["params"]]
                    torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                    optimiser.step()
                    step += 1
            answers.append({name: parameter.detach().numpy().copy() for name, parameter in names.items()})
        weight = float(IMAGES)
        current = {
            name: (
                sum(weight * answer[name].astype(np.float64) for answer in answers) / (weight * len(answers))
            ).astype(np.float32)
            for name in names
        }
    adapter = state.AdapterState(current)
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(torch.tensor(current[name]))
        model.eval()
        for hospital in hospitals:
            for sample in hospital.test:
                prepared = transforms.prepare(hospital.read(sample), contract, 2, multiple=model.backbone.patch)
                pixels = torch.from_numpy(transforms.normalise(prepared.image[None], contract))
                found = model(pixels).argmax(1)[0].numpy() == 1
                dice = 2 * (found & (prepared.mask == 1)).sum() / max(1, found.sum() + (prepared.mask == 1).sum())
                print(hospital.name, dice)
    return adapter.fingerprint


def measure(kind: str, folder: Path, sites: int, rounds: int) -> tuple[float, float, float, str]:
    """CPU seconds, peak PSS in MiB and wall seconds of a child and its descendants, and the fingerprint it printed."""
    import psutil

    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--child",
        kind,
        "--backbone",
        str(folder),
        "--sites",
        str(sites),
        "--rounds",
        str(rounds),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    tree, peak, cpu = psutil.Process(child.pid), 0.0, 0.0
    while child.poll() is None:
        try:
            members = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(member.memory_full_info().pss for member in members) / 2**20)
            times = [member.cpu_times() for member in members]
            cpu = max(cpu, sum(t.user + t.system for t in times))
        except psutil.Error:
            pass
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"the {kind} runner failed with exit code {child.returncode}")
    text = child.stdout.read() if child.stdout else ""
    return cpu, peak, time.monotonic() - started, text.strip().splitlines()[-1]


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, nargs="+", default=[8, 1], help="for each number of sites")
    parser.add_argument("--child", choices=["engine", "plain"])
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    if arguments.child == "plain":
        print(plain(arguments.backbone, arguments.sites[0], arguments.rounds[0]))
        return
    if arguments.child == "engine":
        with tempfile.TemporaryDirectory() as out:
            print(engine(arguments.backbone, arguments.sites[0], arguments.rounds[0], Path(out) / "run"))
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        backbone = Path(scratch) / "backbone"
        make_backbone(backbone)
        for sites, rounds in zip(arguments.sites, arguments.rounds, strict=True):
            found: dict[str, list[tuple[float, float, float, str]]] = {"plain": [], "engine": []}
            for _ in range(arguments.runs):
                for kind in found:
                    found[kind].append(measure(kind, backbone, sites, rounds))
            equal = len({row[3] for rows in found.values() for row in rows}) == 1
            medians = {
                kind: [statistics.median(row[i] for row in rows) for i in range(3)] for kind, rows in found.items()
            }
            ratio = [e / p for e, p in zip(medians["engine"], medians["plain"], strict=True)]
            figures[str(sites)] = {"rounds": rounds, "medians": medians, "ratio": ratio, "same_adapter": equal}
            print(
                f"{sites:3d} sites, {rounds} rounds: CPU {ratio[0]:.3f}x "
                f"({medians['engine'][0]:.1f} / {medians['plain'][0]:.1f} s), "
                f"peak PSS {ratio[1]:.3f}x ({medians['engine'][1]:.0f} / {medians['plain'][1]:.0f} MiB), "
                f"wall {ratio[2]:.3f}x, same adapter: {equal}",
                flush=True,
            )
    if {"4", "64"} <= set(figures):
        growth = figures["64"]["medians"]["engine"][1] - figures["4"]["medians"]["engine"][1]
        figures["growth_mib"] = growth
        print(f"engine PSS(64) - PSS(4) = {growth:.1f} MiB")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
