"""The same federated LoRA training as a plain PyTorch loop, by the in-process engine, and by stock Flower on Ray.

    python benchmarks/plain_loop.py [--sites 4 16 64] [--rounds 8 2 1] [--runs 5] [--peers plain flower]

Wall and CPU seconds and peak PSS of the process tree; runs in turns, medians. All read the same images with the same
transforms, hold a backbone of ViT-tiny's shape (a random DINOv2) and start from the same adapter; loop and engine end
at the same one (checked). The plain loop swaps adapters by hand, averages them with NumPy, tests the last one and
writes nothing. The engine goes through Flower's apps, messages, admission, checkpoints, journal, summary and report, in
as many workers as there are cores. Stock Flower is its own FedAvg on Ray with an actor a core, which keeps model and
data between messages; it runs the plain loop's code for a site's round and writes nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import process_tree

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


def engine(folder: Path, sites: int, rounds: int) -> dict[str, Any]:
    """By fedvfm, with as many workers as it takes by itself."""
    import fedvfm

    with tempfile.TemporaryDirectory() as out:
        made = fedvfm.simulate(make_experiment(folder, sites, rounds), output=Path(out) / "run").summary
    return {"fingerprint": made["fingerprint"], "dice": made["arms"]["federated"]["macro"], "workers": made["workers"]}


class Loop:
    """By hand: one model, a dictionary of arrays, an optimiser a site and round.

    Args:
        folder: of the backbone.
        sites: how many.
        rounds: how many.
    """

    def __init__(self, folder: Path, sites: int, rounds: int) -> None:
        import torch

        from fedvfm.model import adapted_model
        from fedvfm.simulation import experiment as experiments

        what = make_experiment(folder, sites, rounds)
        self.recipe, self.rounds = what.recipe, rounds
        torch.set_num_threads(1)
        self.hospitals = experiments.hospitals(what)
        self.model = adapted_model.AdaptedModel(self.recipe)
        self.names = dict(self.model._parameters_by_name)

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Swap the adapter."""
        import torch

        with torch.no_grad():
            for name, parameter in self.names.items():
                parameter.copy_(torch.tensor(arrays[name]))

    def train(self, hospital: Any, number: int, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """A site's round; its adapter."""
        import numpy as np
        import torch

        from fedvfm import seeding
        from fedvfm.config import rates as schedule
        from fedvfm.data import transforms

        recipe, model = self.recipe, self.model
        settings, contract = recipe.optimiser, recipe.data
        torch.manual_seed(seeding.torch_seed(recipe.seed, "train", number, hospital.name))
        self.write(arrays)
        model.train()
        groups = model.trainable()
        rates = {"adapter": settings.learning_rate, "head": settings.head_learning_rate or settings.learning_rate}
        optimiser = torch.optim.AdamW(
            [{"params": groups[key], "lr": rates[key], "base": rates[key]} for key in ("adapter", "head")],
            weight_decay=settings.weight_decay,
        )
        per_epoch = -(-len(hospital.train) // settings.batch_size)
        step, total = 0, per_epoch * settings.local_epochs * self.rounds
        for epoch in range(settings.local_epochs):
            passed = (number - 1) * settings.local_epochs + epoch
            order = seeding.stream(recipe.seed, "order", number, epoch, hospital.name).permutation(len(hospital.train))
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
                    group["lr"] = group["base"] * schedule.factor(settings, done / total)
                loss = model.task.loss(model(pixels), target)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                parameters = [p for group in optimiser.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                optimiser.step()
                step += 1
        return {name: parameter.detach().numpy().copy() for name, parameter in self.names.items()}

    def test(self, hospital: Any, arrays: Mapping[str, Any]) -> float:
        """Dice of a site's test image."""
        import torch

        from fedvfm.data import transforms

        self.write(arrays)
        self.model.eval()
        scores = []
        with torch.no_grad():
            for sample in hospital.test:
                contract, patch = self.recipe.data, self.model.backbone.patch
                prepared = transforms.prepare(hospital.read(sample), contract, 2, multiple=patch)
                pixels = torch.from_numpy(transforms.normalise(prepared.image[None], contract))
                found = self.model(pixels).argmax(1)[0].numpy() == 1
                both, either = found & (prepared.mask == 1), found.sum() + (prepared.mask == 1).sum()
                scores.append(2 * float(both.sum()) / max(1, int(either)))
        return sum(scores) / len(scores)


def plain(folder: Path, sites: int, rounds: int) -> dict[str, Any]:
    """A loop over rounds and sites, and a mean."""
    import numpy as np

    from fedvfm.state import state

    for library in ("flwr.clientapp", "flwr.serverapp"):  # all runners import the same
        importlib.import_module(library)
    loop = Loop(folder, sites, rounds)
    current = dict(loop.model.initial())
    for number in range(1, rounds + 1):
        answers = [loop.train(hospital, number, current) for hospital in loop.hospitals]
        total = float(IMAGES) * len(answers)
        current = {
            name: (sum(float(IMAGES) * answer[name].astype(np.float64) for answer in answers) / total).astype(
                np.float32
            )
            for name in loop.names
        }
    dice = [loop.test(hospital, current) for hospital in loop.hospitals]
    return {"fingerprint": state.AdapterState(current).fingerprint, "dice": sum(dice) / len(dice)}


def stock_flower(folder: Path, sites: int, rounds: int) -> dict[str, Any]:
    """Flower's own simulation on Ray: FedAvg, two actors, model and data built once a process."""
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, result = ClientApp(), ServerApp(), {}

    @client.train()
    def train(message: Message, context: Context) -> Message:
        loop = importlib.import_module("plain_loop").loop_of(folder, sites, rounds)
        hospital = loop.hospitals[int(context.node_config["partition-id"])]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        made = loop.train(hospital, int(message.content["config"]["server-round"]), arrays)
        metrics = MetricRecord({"num-examples": len(hospital.train)})
        return Message(RecordDict({"arrays": records(made), "metrics": metrics}), reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        loop = importlib.import_module("plain_loop").loop_of(folder, sites, rounds)
        hospital = loop.hospitals[int(context.node_config["partition-id"])]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": len(hospital.test), "dice": loop.test(hospital, arrays)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def records(arrays: Mapping[str, Any]) -> ArrayRecord:
        from flwr.app import Array

        return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        loop = Loop(folder, sites, rounds)
        first = records(loop.model.initial())
        del loop
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        made = strategy.start(grid, first, num_rounds=rounds, train_config=ConfigRecord())
        content = RecordDict({"arrays": made.arrays, "config": ConfigRecord()})
        messages = [Message(content, node, "evaluate") for node in grid.get_node_ids()]
        replies = [reply.content["metrics"]["dice"] for reply in grid.send_and_receive(messages)]
        result["dice"] = sum(replies) / len(replies)

    run_simulation(server, client, sites, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}})
    return {"fingerprint": "", **result}


@functools.lru_cache(maxsize=1)
def loop_of(folder: Path, sites: int, rounds: int) -> Loop:
    """That of one actor, kept between messages."""
    return Loop(folder, sites, rounds)


RUNNERS = {"plain": plain, "engine": engine, "flower": stock_flower}


def measure(kind: str, folder: Path, sites: int, rounds: int) -> tuple[process_tree.Cost, dict[str, Any]]:
    """What a runner takes in a process of its own, and what it printed."""
    options = ["--child", kind, "--backbone", str(folder), "--sites", str(sites), "--rounds", str(rounds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_DEDUP_LOGS": "0"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)  # actors import this file
    cost = process_tree.measure([sys.executable, "-W", "ignore", __file__, *options], environment)
    found: dict[str, Any] = json.loads(cost.out.strip().splitlines()[-1])
    return cost, found


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, nargs="+", default=[8, 2, 1], help="for each number of sites")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=["plain"], choices=["plain", "flower"])
    parser.add_argument("--child", choices=sorted(RUNNERS))
    parser.add_argument("--backbone", type=Path)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(RUNNERS[arguments.child](arguments.backbone, arguments.sites[0], arguments.rounds[0])))
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        backbone = Path(scratch) / "backbone"
        make_backbone(backbone)
        for sites, rounds in zip(arguments.sites, arguments.rounds, strict=True):
            figures[str(sites)] = compare(backbone, sites, rounds, arguments.peers, arguments.runs)
    if {"4", "64"} <= set(figures):
        growth = figures["64"]["medians"]["engine"]["pss"] - figures["4"]["medians"]["engine"]["pss"]
        figures["growth_mib"] = growth
        print(f"engine PSS(64) - PSS(4) = {growth:.1f} MiB")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(backbone: Path, sites: int, rounds: int, peers: list[str], runs: int) -> dict[str, Any]:
    """Runs in turns; medians, and ratios of the engine to each peer."""
    rows: dict[str, list[tuple[process_tree.Cost, dict[str, Any]]]] = {kind: [] for kind in (*peers, "engine")}
    for _ in range(runs):
        for kind, found in rows.items():
            found.append(measure(kind, backbone, sites, rounds))
    medians = {
        kind: {key: statistics.median(getattr(cost, key) for cost, _ in found) for key in ("wall", "cpu", "pss")}
        for kind, found in rows.items()
    }
    said = {kind: found[-1][1] for kind, found in rows.items()}
    equal = len({made["fingerprint"] for made in said.values() if made["fingerprint"]}) == 1
    ratios = {}
    for peer in peers:
        own, other = medians["engine"], medians[peer]
        ratios[peer] = {key: own[key] / other[key] for key in own}
        print(
            f"{sites:3d} sites, {rounds} rounds, engine ({said['engine']['workers']} workers) / {peer}: "
            f"wall {ratios[peer]['wall']:.3f} ({own['wall']:.1f} / {other['wall']:.1f} s), "
            f"CPU {ratios[peer]['cpu']:.3f} ({own['cpu']:.1f} / {other['cpu']:.1f} s), "
            f"peak PSS {ratios[peer]['pss']:.3f} ({own['pss']:.0f} / {other['pss']:.0f} MiB), "
            f"Dice {said['engine']['dice']:.4f} / {said[peer]['dice']:.4f}"
            + (f", same adapter: {equal}" if said[peer]["fingerprint"] else ""),
            flush=True,
        )
    return {"rounds": rounds, "medians": medians, "ratios": ratios, "same_adapter": equal, "load": os.getloadavg()}


if __name__ == "__main__":
    main()
