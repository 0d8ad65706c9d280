"""Processor seconds of start-up, beside another checkout: imports of a process that trains, one prediction, commands.

    fedvfm weights fetch dinov2-small-imgfocus
    python benchmarks/startup.py [OTHER] [--runs 5]

``OTHER`` is the folder of another checkout of this repository; its own ``.venv`` is used where it has one. Everything
runs in fresh processes, whose processor time (with that of their children) is taken by the operating system; the
checkouts take turns. Printed are the least of the runs, and this checkout's as ratio of the other's.

``--template`` measures in this checkout alone what the tests' template saves (``tests/support/template.py``): commands
in a new interpreter, beside the same forked from a process that has imported everything, and what that one takes.

The imports of a process that trains are the modules that are loaded after one training step and one evaluation of the
demo's backbone at a site, imported anew in the order of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
SIDE = 182

TRAIN = """
import json, sys
from pathlib import Path

import torch

from fedvfm.protocol import protocol
from fedvfm.client.training import evaluator, trainer
from fedvfm.model import adapted_model as models
from fedvfm.client.training import site as sites
from fedvfm.simulation import experiment

torch.set_num_threads(1)
what = experiment.load(sys.argv[1])
hospital = experiment.hospitals(what)[0]
model = models.AdaptedModel(what.recipe)
site = sites.Site(hospital.name, hospital)
trainer.train(model, site, model.initial(), 1)
evaluator.evaluate(model, site, model.read(), protocol.Task(what.recipe, 1, model.read(), "test", surface=True))
names = [name for name in sys.modules if name != "__main__"]
Path(sys.argv[2]).write_text(json.dumps(names))
"""
IMPORT = """
import contextlib, importlib, json, sys, warnings
warnings.simplefilter("ignore")
for name in json.load(open(sys.argv[1])):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
"""
COMMAND = "import sys; import runpy; sys.argv[0] = 'fedvfm'; runpy.run_module('fedvfm.cli', run_name='__main__')"
EXPERIMENT = """
name = "startup"
title = "discs"
baselines = []

[data]
source = "folder"
path = "{data}"

[partition]
kind = "natural"

[recipe]
rounds = 1
threads = 1

[recipe.backbone]
name = "dinov2-small-imgfocus"

[recipe.adapter]
rank = 8
layers = [8, 9, 10, 11]

[recipe.data]
class_names = ["background", "disc"]
input_size = [{side}, {side}]

[recipe.optimiser]
learning_rate = 1e-3
batch_size = 2
"""


def write_data(folder: Path) -> None:
    """Two sites with one bright disc an image."""
    rng = np.random.default_rng(0)
    rows = ["id,site,split"]
    for number in range(8):
        y, x = np.mgrid[:SIDE, :SIDE] - rng.integers(40, SIDE - 40, 2)[:, None, None]
        mask = (y**2 + x**2 < 900).astype(np.uint8)
        for part, array in (("images", 150 * mask + rng.integers(0, 90, mask.shape)), ("masks", mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(folder / part / f"{number}.png")
        split = ("train", "train", "val", "test")[number // 2]
        rows.append(f"{number},{'ab'[number % 2]},{split}")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")


class Checkout:
    """A checkout, what it needs to be measured, and how.

    Args:
        root: of the repository.
        scratch: an empty folder for what it writes.
        data: images of :func:`write_data`.
    """

    def __init__(self, root: Path, scratch: Path, data: Path) -> None:
        self.root, self.scratch = root, scratch
        own = root / ".venv" / "bin" / "python"
        self.python = str(own if own.exists() else sys.executable)
        self.experiment, self.modules = scratch / "startup.toml", scratch / "modules.json"
        self.image = data / "images" / "0.png"
        self.experiment.write_text(EXPERIMENT.format(data=data, side=SIDE))
        self.run("-c", TRAIN, self.experiment, self.modules)
        self.run("-c", COMMAND, "simulate", self.experiment, "--output", scratch / "run")

    def run(self, *arguments: str | Path) -> float:
        """Processor seconds of a process and its children."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",
        }
        with (self.scratch / "output").open("w+") as output:
            child = subprocess.Popen(
                [self.python, *map(str, arguments)], cwd=self.scratch, env=environment, stdout=output, stderr=output
            )
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                output.seek(0)
                raise SystemExit(
                    f"{self.root}: {arguments[-3:]} ended with {child.returncode}:\n{output.read()[-2000:]}"
                )
        return usage.ru_utime + usage.ru_stime

    def measures(self) -> dict[str, list[str | Path]]:
        """What is measured: its name -> arguments of Python."""
        return {
            "imports of a process that trains": ["-c", IMPORT, self.modules],
            "training step and evaluation": ["-c", TRAIN, self.experiment, self.scratch / "again.json"],
            "fedvfm predict, one image": [
                *("-c", COMMAND, "predict", self.scratch / "run" / "adapter", self.image),
                *("--output", self.scratch / "predicted"),
            ],
            "fedvfm simulate brain-mri --dry-run": ["-c", COMMAND, "simulate", "brain-mri", "--dry-run"],
            "fedvfm --help": ["-c", COMMAND, "--help"],
            "import fedvfm": ["-c", "import fedvfm"],
        }

    def loaded(self) -> str:
        """Which of the slow libraries a process that trains has loaded."""
        names = {
            "monai",
            "opacus",
            "peft",
            "sklearn",
            "sympy",
            "torch._dynamo",
            "transformers",
            "scipy.stats",
            "pandas",
        }
        return ", ".join(sorted(names & set(json.loads(self.modules.read_text())))) or "none"


def of_children() -> float:
    """Processor seconds of all processes that this one has waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def forked(checkout: Checkout, command: list[str], runs: int) -> tuple[float, float]:
    """Processor seconds of a template that forks a command so many times; its memory (PSS) in MiB when it is ready."""
    sys.path.insert(0, str(HERE))
    from tests.support import forks

    before, template = of_children(), forks.Template()
    template.wait_ready()
    memory = psutil.Process(template.pid).memory_full_info().pss / 2**20
    for run in range(runs):
        words = [*command, "--output", str(checkout.scratch / f"forked-{command[0]}-{run}")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        answer = template.start(*words, folder=checkout.scratch, environment=environment).answer()
        if answer.code:
            raise SystemExit(answer.err)
    template.close()
    return of_children() - before, memory


def template_table(checkout: Checkout, runs: int) -> None:
    """What a command costs in a new interpreter and forked."""
    commands = {
        "simulate, one round": ["simulate", str(checkout.experiment)],
        "predict, one image": ["predict", str(checkout.scratch / "run" / "adapter"), str(checkout.image)],
    }
    base, memory = forked(checkout, ["none"], 0)
    print(f"the template: {base:.2f} CPU s once, {memory:.0f} MiB (PSS)")
    print("| command | new interpreter, CPU s | forked, CPU s |")
    print("|---|---|---|")
    for what, command in commands.items():
        anew = [
            checkout.run("-c", COMMAND, *command, "--output", checkout.scratch / f"anew-{command[0]}-{run}")
            for run in range(runs)
        ]
        each = (forked(checkout, command, runs)[0] - base) / runs
        print(f"| {what} | {min(anew):.2f} | {each:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="folder of another checkout")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--template", action="store_true", help="what the template of the tests saves")
    arguments = parser.parse_args()
    roots = [HERE, *([arguments.other.resolve()] if arguments.other else [])]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        write_data(data)
        checkouts = []
        for number, root in enumerate(roots):
            (Path(scratch) / str(number)).mkdir()
            checkouts.append(Checkout(root, Path(scratch) / str(number), data))
        if arguments.template:
            template_table(checkouts[0], arguments.runs)
            return
        print("| what | " + " | ".join(f"{root.name}, CPU s" for root in roots) + " | ratio |")
        print("|---|" + "---|" * (len(roots) + 1))
        for what in checkouts[0].measures():
            seconds: list[list[float]] = [[] for _ in checkouts]
            for run in range(arguments.runs):
                for checkout, taken in zip(checkouts, seconds, strict=True):
                    command = checkout.measures()[what]
                    if "--output" in command:  # a folder of its own for every run
                        command[-1] = f"{command[-1]}-{run}"
                    taken.append(checkout.run(*command))
            least = [min(taken) for taken in seconds]
            ratio = f"{least[0] / least[1]:.2f}" if len(least) > 1 else ""
            print(f"| {what} | " + " | ".join(f"{one:.2f}" for one in least) + f" | {ratio} |", flush=True)
        for checkout in checkouts:
            print(f"{checkout.root.name}: a process that trains has loaded {checkout.loaded()}")


if __name__ == "__main__":
    main()
