"""Register your own backbone, adapter kind, rule, source, task or baseline from a notebook, in one line each.

The same tables take entry points (``fedvfm.backbone``, ``fedvfm.data_source``, ...) from installed packages.
"""

from __future__ import annotations

from typing import Any

from fedvfm import registry
from fedvfm.adapters import table as adapters
from fedvfm.aggregators import table as rules
from fedvfm.backbones import table as backbones
from fedvfm.data.sources import table as sources
from fedvfm.simulation import tables as simulation
from fedvfm.tasks import table as tasks


def _register(table: registry.Table, name: str, thing: Any, replace: bool) -> Any:
    table.add(name, thing, replace=replace)
    return thing


def register_backbone(name: str, load: Any, *, replace: bool = False) -> Any:
    """``load(settings, *, with_weights=True, device="cpu") -> backbones.base.Backbone``.

    The options it reads are named by ``@backbones.base.takes("option")``; adapter kinds and tasks name theirs in
    ``known_options``. Others are refused.
    """
    return _register(backbones.TABLE, name, load, replace)


def register_adapter(name: str, kind: Any, *, replace: bool = False) -> Any:
    """``kind() -> adapters.base.Adapter``."""
    return _register(adapters.TABLE, name, kind, replace)


def register_rule(name: str, rule: Any, *, replace: bool = False) -> Any:
    """``rule(**options) -> aggregators.base.Aggregator``; pure NumPy."""
    return _register(rules.TABLE, name, rule, replace)


def register_source(name: str, source: Any, *, replace: bool = False) -> Any:
    """``source(config.SourceConfig) -> data.sample.Source``."""
    return _register(sources.TABLE, name, source, replace)


def register_task(name: str, task: Any, *, replace: bool = False) -> Any:
    """``task(config.Recipe) -> tasks.base.Task``."""
    return _register(tasks.TABLE, name, task, replace)


def register_baseline(name: str, arms: Any, *, replace: bool = False) -> Any:
    """``arms(experiment, site names) -> list of simulation.baselines.Arm``."""
    return _register(simulation.BASELINES, name, arms, replace)
