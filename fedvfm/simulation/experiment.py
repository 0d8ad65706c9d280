"""An experiment file becomes an Experiment, and an Experiment becomes virtual hospitals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import config as configs
from fedvfm import errors, registry
from fedvfm.client import model as models
from fedvfm.data import hospitals as hospital_data
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.data.sources import table as sources
from fedvfm.server.aggregators import table as rules
from fedvfm.simulation import tables

_INSTALLED = Path(__file__).parent / "experiments"
_CHECKOUT = Path(__file__).parents[2] / "simulations" / "experiments"


def bundled() -> dict[str, Path]:
    """Name -> file of every experiment that comes with fedvfm."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(name_or_path: str, sets: Sequence[str] = (), **overrides: Any) -> configs.Experiment:
    """Read, override and validate an experiment.

    Args:
        name_or_path: a bundled name or a TOML file.
        sets: ``key.path=TOML value`` assignments.
        overrides: ``rounds``, ``engine``, ``device``, ``seed``; None leaves the file's value.

    Raises:
        ConfigError: with all faults at once.
    """
    path = _find(name_or_path)
    values = configs.apply_sets(configs.read_toml(path), sets)
    for key in ("engine", "device"):
        if overrides.get(key) is not None:
            values[key] = overrides[key]
    for key in ("rounds", "seed"):
        if overrides.get(key) is not None:
            values.setdefault("recipe", {})[key] = overrides[key]
    return parse(values, str(path))


def _find(name_or_path: str) -> Path:
    known = bundled()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.exists():
        return path
    hint = registry.nearest(name_or_path, list(known))
    raise errors.UnknownName(f"unknown experiment '{name_or_path}'; bundled: {', '.join(known)}{hint}; or give a TOML file")


def parse(values: Mapping[str, Any], what: str) -> configs.Experiment:
    """Check form and names of a table of values.

    Raises:
        ConfigError: with all faults at once.
    """
    experiment = configs.parse(configs.Experiment, values, what)
    faults = validate(experiment)
    if faults:
        raise errors.ConfigError(what, faults)
    return experiment


def validate(experiment: configs.Experiment) -> list[str]:
    """Faults of names and per-kind parameters, one sentence a fault. Needs neither weights nor network nor images."""
    faults = models.validate(experiment.recipe)
    pairs: list[tuple[registry.Table, str, str]] = [
        (sources.TABLE, experiment.data.source.partition(":")[0], "data.source"),
        (rules.TABLE, experiment.recipe.aggregation.rule, "recipe.aggregation.rule"),
        (tables.ENGINES, experiment.engine, "engine"),
        *((tables.BASELINES, name, "baselines") for name in experiment.baselines),
        *((transforms.AUGMENTATIONS, name, "recipe.data.augment") for name in experiment.recipe.data.augment),
    ]
    faults += [f"{where}: {table.fault(name)}" for table, name, where in pairs if name not in table]
    faults += hospital_data.faults(experiment.partition)
    faults += _rank_faults(experiment)
    if experiment.recipe.aggregation.rule in rules.TABLE:
        faults += _option_faults(experiment)
    return faults


def _rank_faults(experiment: configs.Experiment) -> list[str]:
    top = experiment.recipe.adapter.rank
    found = [f"site_ranks.{site} = {rank}: is over recipe.adapter.rank = {top}" for site, rank in experiment.site_ranks.items() if rank > top]
    rule = experiment.recipe.aggregation.rule
    mixed = any(rank != top for rank in experiment.site_ranks.values())
    if mixed and rule in rules.TABLE and not rules.TABLE.get(rule).mixed_ranks:
        found.append(f"site_ranks: rule '{rule}' needs one rank at all sites; use recipe.aggregation.rule = \"svd\"")
    return found


def _option_faults(experiment: configs.Experiment) -> list[str]:
    rule = rules.TABLE.get(experiment.recipe.aggregation.rule)
    known = [field.name for field in dataclasses.fields(rule)] if dataclasses.is_dataclass(rule) else []
    return [f"recipe.aggregation.options.{key}: unknown; known: {', '.join(known) or 'none'}" for key in experiment.recipe.aggregation.options if key not in known]


def hospitals(experiment: configs.Experiment) -> list[hospital_data.Hospital]:
    """The virtual hospitals, sorted by name. Reads an index, no pixels.

    Raises:
        DataError, PartitionError: if the data is not there or cannot be divided so.
        ConfigError: if the recipe's task or classes are not those of the data.
    """
    source = sources.make(experiment.data)
    _check_contract(experiment, source.info)
    made = hospital_data.make_hospitals(source, experiment.partition, experiment.recipe.seed)
    unknown = sorted(set(experiment.site_ranks) - {hospital.name for hospital in made})
    if unknown:
        names = ", ".join(hospital.name for hospital in made)
        raise errors.ConfigError("experiment", [f"site_ranks: no site {', '.join(unknown)}; sites: {names}"])
    return made


def _check_contract(experiment: configs.Experiment, info: samples.SourceInfo) -> None:
    recipe, faults = experiment.recipe, []
    if recipe.task.kind in ("segmentation", "classification") and info.task != recipe.task.kind:
        faults.append(f"recipe.task.kind = '{recipe.task.kind}': source '{info.name}' is for {info.task}")
    if len(info.class_names) != len(recipe.data.class_names):
        theirs, ours = ", ".join(info.class_names), ", ".join(recipe.data.class_names)
        faults.append(f"recipe.data.class_names: {ours}; source '{info.name}' has {len(info.class_names)} classes: {theirs}")
    if faults:
        raise errors.ConfigError("experiment and data", faults)
