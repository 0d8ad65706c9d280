"""fedvfm: adapt vision foundation models across hospitals without moving one image.

Importing this package imports neither torch nor Flower; the names below load on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedvfm.inference.export import load_adapter
    from fedvfm.inference.forms import export_adapter
    from fedvfm.inference.predict import predict
    from fedvfm.registry import (
        register_adapter,
        register_backbone,
        register_baseline,
        register_rule,
        register_source,
        register_task,
    )
    from fedvfm.simulation.experiment import load as load_experiment
    from fedvfm.simulation.run import resume, simulate

__version__ = "0.1.0"

# Flower reads these when it is imported: no reports home, no search for updates, unless the user says otherwise.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

_LAZY = {
    "export_adapter": "fedvfm.inference.forms:export_adapter",
    "load_adapter": "fedvfm.inference.export:load_adapter",
    "load_experiment": "fedvfm.simulation.experiment:load",
    "predict": "fedvfm.inference.predict:predict",
    "register_adapter": "fedvfm.registry:register_adapter",
    "register_backbone": "fedvfm.registry:register_backbone",
    "register_baseline": "fedvfm.registry:register_baseline",
    "register_rule": "fedvfm.registry:register_rule",
    "register_source": "fedvfm.registry:register_source",
    "register_task": "fedvfm.registry:register_task",
    "resume": "fedvfm.simulation.run:resume",
    "simulate": "fedvfm.simulation.run:simulate",
}

__all__ = [
    "__version__",
    "export_adapter",
    "load_adapter",
    "load_experiment",
    "predict",
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
    return getattr(importlib.import_module(module), attribute)
