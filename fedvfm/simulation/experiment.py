"""An experiment file becomes an Experiment, and an Experiment becomes virtual hospitals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvfm import errors, registry
from fedvfm.adapters import table as adapters
from fedvfm.aggregators import table as rules
from fedvfm.backbones import table as backbones
from fedvfm.config import overrides as assignments
from fedvfm.config import schema
from fedvfm.data.sources import table as sources
from fedvfm.protocol import codecs
from fedvfm.server.rounds import cohort
from fedvfm.simulation import attacks, baselines, tables
from fedvfm.tasks import table as tasks

if TYPE_CHECKING:
    from fedvfm.data.partition import virtual_hospitals
    from fedvfm.model import adapted_model

# What needs torch is imported where it is used: a fault of form or name is answered at once.

_INSTALLED = Path(__file__).parent / "experiments"
_CHECKOUT = Path(__file__).parents[2] / "simulations" / "experiments"


def bundled() -> dict[str, Path]:
    """Name -> file of every experiment that comes with fedvfm."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(name_or_path: str, sets: Sequence[str] = (), **overrides: Any) -> schema.Experiment:
    """Read and override an experiment and check its form; :func:`examine` checks the rest.

    Args:
        name_or_path: a bundled name or a TOML file.
        sets: ``key.path=TOML value`` assignments.
        overrides: ``rounds``, ``engine``, ``device``, ``workers``, ``seed``; None leaves the file's value.

    Raises:
        ConfigError: with all faults of form at once, and with those of names beside them.
    """
    values, source = read(name_or_path)
    values = assignments.apply(values, sets)
    for key in ("engine", "device", "workers"):
        if overrides.get(key) is not None:
            values[key] = overrides[key]
    recipe = values.setdefault("recipe", {})
    for key in ("rounds", "seed"):
        if overrides.get(key) is not None and isinstance(recipe, dict):
            recipe[key] = overrides[key]
    return parse(values, source)


def read(name_or_path: str) -> tuple[dict[str, Any], str]:
    """The values of a bundled experiment or a TOML file, and the path of the file.

    Raises:
        ConfigError: if the file is missing or no TOML.
        UnknownName: if nothing is bundled under that name.
    """
    path = _find(name_or_path)
    return schema.read_toml(path), str(path)


def _find(name_or_path: str) -> Path:
    known = bundled()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.exists():
        return path
    hint = registry.nearest(name_or_path, list(known))
    raise errors.UnknownName(
        f"unknown experiment '{name_or_path}'; bundled: {', '.join(known)}{hint}; or give a TOML file"
    )


def parse(values: Mapping[str, Any], what: str) -> schema.Experiment:
    """Check the form of a table of values.

    Raises:
        ConfigError: with all faults of form at once, and with those of names beside them.
    """
    try:
        return schema.parse(schema.Experiment, values, what)
    except errors.ConfigError as error:
        raise errors.ConfigError(what, [*error.faults, *name_faults(values)]) from None


def examine(experiment: schema.Experiment) -> adapted_model.AdaptedModel:
    """The model of the recipe on the meta device. Needs neither weights nor network nor images.

    Raises:
        ConfigError: with all faults of names and per-kind parameters, if it has any.
    """
    names = name_faults(experiment.model_dump(mode="json"))
    faults = _rank_faults(experiment)
    if experiment.recipe.start is not None:
        faults.append("recipe.start: only a server goes on from an earlier adapter; leave it out")
    no_clock = "a simulation looks at no clock, and nobody is late in it"
    faults += cohort.asynchronous_faults(experiment.recipe, experiment.server)
    faults += cohort.idle_clock(experiment.server, no_clock) if experiment.recipe.asynchronous is None else []
    faults += rules.faults(experiment.recipe) + baselines.faults(experiment) + attacks.faults(experiment)
    shapes: adapted_model.AdaptedModel | None = None
    if not names:
        from fedvfm.data.partition import virtual_hospitals
        from fedvfm.model import adapted_model

        shapes, wrong = adapted_model.examine(experiment.recipe)
        faults += wrong + virtual_hospitals.faults(experiment.partition)
    if names or faults or shapes is None:
        raise errors.ConfigError(f"experiment '{experiment.name}'", names + faults)
    return shapes


def name_faults(values: Mapping[str, Any]) -> list[str]:
    """Names that stand in no table, in values whose form may be wrong elsewhere. Needs no torch."""
    return [f"{where}: {fault}" for where, table, name in _named(values) if (fault := _name_fault(table, name))]


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, registry.Table, str]]:
    from fedvfm.data.partition import partitioners

    single = {
        "attack.kind": tables.ATTACKS,
        "engine": tables.ENGINES,
        "data.source": sources.TABLE,
        "partition.kind": partitioners.TABLE,
        "recipe.backbone.name": backbones.TABLE,
        "recipe.adapter.kind": adapters.TABLE,
        "recipe.task.kind": tasks.TABLE,
        "recipe.aggregation.rule": rules.TABLE,
        "recipe.codec": codecs.TABLE,
    }
    for where, table in single.items():
        name = _at(values, where)
        if isinstance(name, str):
            yield where, table, name.partition(":")[0] if where == "data.source" else name
    yield from (("baselines", tables.BASELINES, name) for name in _texts(values, "baselines"))
    augment = _texts(values, "recipe.data.augment")
    if augment:
        from fedvfm.data import transforms

        yield from (("recipe.data.augment", transforms.AUGMENTATIONS, name) for name in augment)


def _at(values: Any, where: str) -> Any:
    for step in where.split("."):
        values = values.get(step) if isinstance(values, Mapping) else None
    return values


def _texts(values: Mapping[str, Any], where: str) -> list[str]:
    found = _at(values, where)
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _name_fault(table: registry.Table, name: str) -> str:
    if name in table:
        return ""
    if table is not backbones.TABLE:
        return table.fault(name)
    return (
        ""
        if backbones.elsewhere(name)
        else f"{table.fault(name)}; or a Hugging Face name (owner/model), or a local folder"
    )


def _rank_faults(experiment: schema.Experiment) -> list[str]:
    top = experiment.recipe.adapter.rank
    found = [
        f"site_ranks.{site} = {rank}: is over recipe.adapter.rank = {top}"
        for site, rank in experiment.site_ranks.items()
        if rank > top
    ]
    rule = experiment.recipe.aggregation.rule
    mixed = any(rank != top for rank in experiment.site_ranks.values())
    if mixed and rule in rules.TABLE and not rules.TABLE.get(rule).mixed_ranks:
        found.append(f"site_ranks: rule '{rule}' needs one rank at all sites; use recipe.aggregation.rule = \"svd\"")
    return found


def hospitals(experiment: schema.Experiment) -> list[virtual_hospitals.Hospital]:
    """The virtual hospitals, sorted by name. Reads an index, no pixels.

    Raises:
        DataError, PartitionError: if the data is not there or cannot be divided so.
        ConfigError: if the recipe's task or classes are not those of the data, or something needs other sites.
    """
    from fedvfm.data import bags, columns, labels
    from fedvfm.data.partition import virtual_hospitals

    source = sources.make(experiment.data, experiment.recipe.data)
    faults = labels.faults(experiment.recipe, source.info)
    if faults:
        raise errors.ConfigError("experiment and data", faults)
    source = bags.of(source, experiment.recipe)
    drawn = virtual_hospitals.make_hospitals(source, experiment.partition, experiment.recipe.seed)
    hospitals = virtual_hospitals.partly_labelled(drawn, experiment.partition, experiment.recipe)
    hospitals = virtual_hospitals.without_labels(hospitals, experiment.partition, experiment.recipe)
    hospitals = virtual_hospitals.without_table(hospitals, experiment.partition, experiment.recipe)
    hospitals = virtual_hospitals.without_images(hospitals, experiment.partition, experiment.recipe)
    hospitals = virtual_hospitals.without_channels(hospitals, experiment.partition, experiment.recipe.data)
    for hospital in hospitals:
        parts = {"train": hospital.train, "val": hospital.val, "test": hospital.test}
        columns.require_follow_up(experiment.recipe, hospital.name, parts)
    names = [hospital.name for hospital in hospitals]
    faults = site_faults(experiment, names) + _label_faults(experiment, hospitals)
    if faults:
        raise errors.ConfigError(f"experiment '{experiment.name}' with {len(names)} sites", faults)
    return hospitals


def site_faults(experiment: schema.Experiment, names: Sequence[str]) -> list[str]:
    """What cannot be with these sites, one sentence a fault: ranks, cohort and quorum, baselines that need more."""
    found = cohort.faults(len(names), experiment.server) + attacks.site_faults(experiment, names)
    if not found:
        found += rules.site_faults(experiment.recipe, _fewest(experiment, len(names)))
    for key in ("site_ranks", "site_pace", "site_times"):
        named = getattr(experiment, key)
        unknown = sorted(set(named) - set(names))
        if unknown:
            found.append(f"{key}: no site {', '.join(unknown)}; sites: {', '.join(names)}")
    if experiment.site_pace and not experiment.recipe.optimiser.round_minutes:
        found.append("site_pace: only recipe.optimiser.round_minutes reads it; set that, or leave site_pace out")
    if experiment.site_times and experiment.recipe.asynchronous is None:
        found.append("site_times: only recipe.asynchronous reads it; set that, or leave site_times out")
    for name in experiment.baselines:
        if name in tables.BASELINES and not tables.BASELINES.get(name)(experiment, names):
            found.append(f"baselines: '{name}' needs more sites than {', '.join(names)}; bring more or leave it out")
    return found


def _label_faults(experiment: schema.Experiment, members: Sequence[virtual_hospitals.Hospital]) -> list[str]:
    """Classes that leave-one-out would leave without any site that labels them."""
    from fedvfm.data import partial_labels

    if "leave-one-out" not in experiment.baselines:
        return []
    having = {hospital.name: hospital.labelled for hospital in members if not hospital.without_labels}
    if len(having) == 1 and len(members) > 1:
        return [f"baselines: 'leave-one-out' without '{next(iter(having))}' has no site with labels"]
    sites, faults = having, []
    for name in sites:
        rest = {other: names for other, names in sites.items() if other != name}
        missing = partial_labels.nobody(experiment.recipe, rest) if rest else ()
        if missing:
            faults.append(f"baselines: 'leave-one-out' without '{name}' has no site that labels {', '.join(missing)}")
    return faults


def _fewest(experiment: schema.Experiment, sites: int) -> int:
    """The least number of updates that a round of any arm with several sites goes on with."""
    server = experiment.server
    asked = min(server.cohort or sites, sites - 1 if "leave-one-out" in experiment.baselines else sites)
    return max(min(cohort.quorum(asked, server), asked), 1)
