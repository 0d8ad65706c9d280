"""fedvfm: adapt vision foundation models across hospitals without moving one image.

Importing this package imports neither torch nor Flower; the names below load on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedvfm import errors
    from fedvfm.config.schema import Experiment, Recipe
    from fedvfm.errors import FedvfmError
    from fedvfm.inference.export import load_adapter
    from fedvfm.inference.forms import export_adapter
    from fedvfm.inference.predict import predict
    from fedvfm.inference.publication import push_to_hub
    from fedvfm.registry import (
        register_adapter,
        register_backbone,
        register_baseline,
        register_rule,
        register_source,
        register_task,
    )
    from fedvfm.simulation.experiment import load as load_experiment
    from fedvfm.simulation.notebook import fetch_weights, simulate
    from fedvfm.simulation.notebook import plan_of as plan
    from fedvfm.simulation.results.compare import compare
    from fedvfm.simulation.run import Result, resume

__version__ = "0.1.0"

# Flower reads these when it is imported: no reports home, no search for updates, unless the user says otherwise.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_LAZY = {
    "Experiment": "fedvfm.config.schema:Experiment",
    "FedvfmError": "fedvfm.errors:FedvfmError",
    "Recipe": "fedvfm.config.schema:Recipe",
    "Result": "fedvfm.simulation.run:Result",
    "compare": "fedvfm.simulation.results.compare:compare",
    "errors": "fedvfm.errors",
    "export_adapter": "fedvfm.inference.forms:export_adapter",
    "fetch_weights": "fedvfm.simulation.notebook:fetch_weights",
    "load_adapter": "fedvfm.inference.export:load_adapter",
    "load_experiment": "fedvfm.simulation.experiment:load",
    "plan": "fedvfm.simulation.notebook:plan_of",
    "predict": "fedvfm.inference.predict:predict",
    "push_to_hub": "fedvfm.inference.publication:push_to_hub",
    "register_adapter": "fedvfm.registry:register_adapter",
    "register_backbone": "fedvfm.registry:register_backbone",
    "register_baseline": "fedvfm.registry:register_baseline",
    "register_rule": "fedvfm.registry:register_rule",
    "register_source": "fedvfm.registry:register_source",
    "register_task": "fedvfm.registry:register_task",
    "resume": "fedvfm.simulation.run:resume",
    "simulate": "fedvfm.simulation.notebook:simulate",
}

__all__ = [
    "Experiment",
    "FedvfmError",
    "Recipe",
    "Result",
    "__version__",
    "compare",
    "errors",
    "export_adapter",
    "fetch_weights",
    "load_adapter",
    "load_experiment",
    "plan",
    "predict",
    "push_to_hub",
    "register_adapter",
    "register_backbone",
    "register_baseline",
    "register_rule",
    "register_source",
    "register_task",
    "resume",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedvfm' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return list(__all__)
