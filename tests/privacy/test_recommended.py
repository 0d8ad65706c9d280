"""The experiment that the README names for differential privacy is one that was measured, with what was recommended."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedvfm.simulation import experiment as experiments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks/privacy_utility.py``, which made the tables of docs/privacy.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("privacy_utility", ROOT / "benchmarks" / "privacy_utility.py")
    assert spec is not None
    assert spec.loader is not None
    module = ModuleType(spec.name)
    module.__file__ = spec.origin
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_it_is_the_measured_run(measured: Any) -> None:
    found = experiments.load("nuclei-private")
    run = experiments.parse(measured.experiment("nuclei", "LoRA, alternate", 8.0, 0), "measured")
    assert found.recipe == run.recipe.model_copy(update={"threads": None})  # measured with 1, for equal bits
    assert (found.data, found.partition) == (run.data, run.partition)


def test_it_follows_what_the_page_says(measured: Any) -> None:
    recipe = experiments.load("nuclei-private").recipe
    page = (ROOT / "docs" / "privacy.md").read_text()
    assert "take `alternate` for LoRA under privacy" in page
    assert recipe.adapter.factors == "alternate"
    assert "Choose the head's learning rate anew for private training" in page
    assert recipe.optimiser.head_learning_rate == measured.HEAD_RATES["nuclei", True]
    assert recipe.optimiser.head_learning_rate != measured.HEAD_RATES["nuclei", False]
    assert recipe.aggregation.weighting == "uniform"


def test_the_readme_names_it() -> None:
    text = (ROOT / "README.md").read_text()
    private = text[text.index("## Differential privacy") :]
    assert "fedvfm simulate nuclei-private" in private
    assert "freeze-A" not in private
