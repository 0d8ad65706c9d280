"""A tiny experiment on real files: 24 pictures at three natural sites, a random DINOv2 of two narrow blocks on disk.

One whole run of it takes a few seconds, most of them imports, so that the real command line can be run many times.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import forks

SITES = ("east", "north", "south")
PER_SITE = 8
SIDE = 28
LONGEST_S = 1800
"""Of one call. A federation of real processes takes 20 s, and on a machine with eight times its load more than 200."""


@dataclass(frozen=True)
class Tiny:
    """The tiny experiment's files.

    Attributes:
        root: where they lie.
        template: forks the processes of the command line.
    """

    root: Path
    template: forks.Template

    @property
    def experiment(self) -> Path:
        return self.root / "tiny.toml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def backbone(self) -> Path:
        return self.root / "backbone"

    @property
    def recipe(self) -> str:
        """The recipe alone, as a file of its own says it."""
        text = self.experiment.read_text()
        return text[text.index("[recipe]\n") :].replace("[recipe]\n", "", 1).replace("[recipe.", "[")

    def site(self, name: str, data: Path | None = None) -> str:
        """A hospital's own file but for what it allows: the images of the natural site of its name."""
        source = f'[data]\nsource = "folder"\npath = "{data or self.data}"\n'
        return f'name = "{name}"\ninclude = ["{name}"]\n{source}'

    def with_patients(self, folder: Path) -> Path:
        """The same images in another folder, several of a patient, every patient in one split."""
        shutil.copytree(self.data, folder)
        table, rows = folder / "index.csv", ["id,site,patient,split"]
        for number, line in enumerate(table.read_text().splitlines()[1:]):
            site, at = line.split(",")[1], number % PER_SITE
            rows.append(f"{line},{site} {'aabbcdef'[at]},{('train', 'val', 'test')[max(0, at - 5)]}")
        table.write_text("\n".join(rows) + "\n")
        return folder

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """That of a real process: one thread, no network, nothing of the caller's terminal."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDVFM_", "RAY_", "COV_"))}
        fixed = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "FEDVFM_CACHE": str(self.root / "no-cache"),
            "COLUMNS": "200",
        }
        return {**kept, **fixed, "PYTHONPATH": str(Path(__file__).parents[2]), **(more or {})}

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "fedvfm.cli", *map(str, arguments)]

    def start(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> forks.Forked:
        """Start a process of the command line, forked from the template; the caller ends it."""
        return self.template.start(*arguments, folder=self.root, environment=self.environment(environment), **options)

    def run(self, *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: Any) -> forks.Answer:
        """The same to its end; one that hangs is ended."""
        return self.start(*arguments, environment=environment, **options).answer(LONGEST_S)

    def start_anew(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a new interpreter: its arguments are the command's, and it begins with nothing imported."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run_anew(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> forks.Answer:
        """The same to its end; one that hangs is ended."""
        process = self.start_anew(*arguments, environment=environment, **options)
        try:
            out, err = process.communicate(timeout=LONGEST_S)
        finally:
            process.kill()
        return forks.Answer(process.returncode, out, err)

    @staticmethod
    def summary(run: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((run / "summary.json").read_text())
        return found

    @staticmethod
    def results(run: Path) -> dict[str, Any]:
        """What must not depend on how often a run was stopped: the fingerprint and every arm's scores."""
        made = Tiny.summary(run)
        return {key: made[key] for key in ("fingerprint", "arms", "backbone", "trainable_parameters", "rounds", "seed")}

    @staticmethod
    def lines(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    @staticmethod
    def one_error(answer: forks.Answer, code: int, *words: str) -> str:
        """One clear message on standard error, the exit code, no traceback; the message holds every word."""
        assert answer.code == code, answer
        assert "Traceback" not in answer.err + answer.out, answer.err
        for word in words:
            assert word in answer.err, f"{word!r} is not in: {answer.err}"
        return answer.err


def picture(site: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc on a dark, noisy ground; sites differ in brightness."""
    rng = np.random.default_rng([site, number])
    rows, columns = np.mgrid[:SIDE, :SIDE]
    middle, radius = rng.uniform(9, 19, size=2), rng.uniform(5, 9)
    mask = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
    image = 40 + 20 * site + 90 * mask + rng.normal(0, 8, size=mask.shape)
    return np.clip(image, 0, 255).astype(np.uint8), mask.astype(np.uint8)


def write_data(folder: Path, sites: Sequence[str] = SITES, per_site: int = PER_SITE) -> Path:
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rows = ["id,site"]
    for site, name in enumerate(sites):
        for number in range(per_site):
            image, mask = picture(site, number)
            stem = f"{name}-{number:02d}"
            Image.fromarray(image).save(folder / "images" / f"{stem}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{stem}.png")
            rows.append(f"{stem},{name}")
    (folder / "index.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_backbone(folder: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=14, image_size=SIDE
    )
    transformers.Dinov2Model(settings).save_pretrained(folder)
    return folder


def write_experiment(path: Path, data: Path, backbone: Path) -> Path:
    path.write_text(f"""
name = "tiny"
title = "discs"
baselines = ["pooled"]

[data]
source = "folder"
path = "{data}"

[partition]
kind = "natural"

[recipe]
rounds = 3
threads = 1
precision = "float32"

[recipe.backbone]
name = "{backbone}"

[recipe.adapter]
rank = 2

[recipe.data]
class_names = ["background", "disc"]
input_size = [28, 28]

[recipe.optimiser]
learning_rate = 1e-2
batch_size = 3

[recipe.evaluation]
surface = false
""")
    return path


def write(root: Path, template: forks.Template) -> Tiny:
    tiny = Tiny(root, template)
    write_data(tiny.data)
    write_backbone(tiny.backbone)
    write_experiment(tiny.experiment, tiny.data, tiny.backbone)
    return tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, template: forks.Template) -> Tiny:
    return write(tmp_path_factory.mktemp("tiny"), template)


@pytest.fixture(scope="session")
def finished(tiny: Tiny) -> Path:
    """An undisturbed run in an interpreter of its own; tests copy it before they change it."""
    folder = tiny.root / "finished"
    tiny.template.begin()  # its imports go on beside this run
    answer = tiny.run_anew("simulate", tiny.experiment, "--output", folder)
    assert answer.code == 0, answer.err
    (tiny.root / "finished.err").write_text(answer.err)
    (tiny.root / "finished.out").write_text(answer.out)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def cli(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, cli: Any) -> Any:
    """The command line in this process, in the tiny experiment's folder."""
    for key in ("HF_HUB_OFFLINE", "FEDVFM_CACHE", "COLUMNS"):
        monkeypatch.setenv(key, tiny.environment()[key])
    monkeypatch.chdir(tiny.root)
    return cli
