"""``simulate --plugin FILE``: what a file registers can be named; what is wrong with it is one clear error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.data.sources import table

PLUGIN = """
import numpy as np
import fedvfm
from fedvfm.data.sample import Pixels, Sample, SourceInfo

class Discs:
    info = SourceInfo("discs", "segmentation", ("background", "disc"), licence="CC0")
    def __init__(self, settings): pass
    def samples(self):
        return [Sample(f"disc-{i}", site="left" if i % 2 else "right") for i in range(40)]
    def read(self, sample):
        mask = np.zeros((32, 32), np.int64)
        mask[8:16, 8:16] = 1
        return Pixels(mask[None].astype(np.float32), mask)

fedvfm.register_source("discs", Discs)
"""
EXPERIMENT = """
name = "mine"
baselines = []
[data]
source = "discs"
[recipe.backbone]
name = "unet"
[recipe.adapter]
kind = "full"
[recipe.data]
class_names = ["background", "disc"]
input_size = [32, 32]
"""


@pytest.fixture(autouse=True)
def _table_as_before() -> Iterator[None]:
    kept = dict(table.TABLE._entries)
    yield
    table.TABLE._entries = kept


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    experiment, plugin = tmp_path / "mine.toml", tmp_path / "discs.py"
    experiment.write_text(EXPERIMENT)
    plugin.write_text(PLUGIN)
    return experiment, plugin


def test_a_plan_of_what_a_file_registers(cli: Any, files: tuple[Path, Path]) -> None:
    experiment, plugin = files
    without = cli("simulate", experiment, "--dry-run")
    assert (without.code, "unknown data source 'discs'" in without.err) == (errors.ConfigError.exit_code, True)
    answer = cli("simulate", experiment, "--plugin", plugin, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    assert set(json.loads(answer.out)["sites"]) == {"left", "right"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0\n", "ZeroDivisionError"),
        ("def (\n", "SyntaxError"),
        ("import fedvfm\nfedvfm.register_source('cells', object)\n", "has no method samples()"),
        (None, "give a Python file"),
    ],
)
def test_a_file_that_breaks_is_one_error(cli: Any, files: tuple[Path, Path], text: str | None, said: str) -> None:
    experiment, plugin = files
    plugin.unlink() if text is None else plugin.write_text(text)
    answer = cli("simulate", experiment, "--plugin", plugin, "--dry-run")
    assert (answer.code, said in answer.err) == (errors.ConfigError.exit_code, True), answer.err
    assert "Traceback" not in answer.err


def test_other_engines_do_not_know_it(cli: Any, files: tuple[Path, Path]) -> None:
    experiment, plugin = files
    answer = cli("simulate", experiment, "--plugin", plugin, "--engine", "deployment", "--dry-run")
    assert (answer.code, "only engine 'in-process'" in answer.err) == (errors.ConfigError.exit_code, True)
