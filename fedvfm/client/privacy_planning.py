"""What privacy would cost a recipe at this site: its own counts, its own ledger, and what trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.client import site_file
from fedvfm.config import privacy as privacy_config
from fedvfm.config import schema
from fedvfm.data import bags, labels
from fedvfm.data.sources import table as sources
from fedvfm.ledger import entries, ledger
from fedvfm.privacy import accountant, events, planner, records
from fedvfm.state import factors
from fedvfm.trust import recipes


def build(recipe: Path, site: Path | None, changes: Mapping[str, Any], accountants: tuple[str, ...]) -> planner.Plan:
    """A plan.

    Args:
        recipe: the recipe, of either form; an experiment's will do.
        site: the site's file; None where ``changes`` name the units.
        changes: what the person asked for in place of what the files say: ``mechanism``, ``units``, ``batch``,
            ``rounds``, ``epsilon``, ``noise_multiplier``, ``delta``; None where nothing was.
        accountants: the first one finds the noise.

    Raises:
        ConfigError: if the files have faults, or something is asked for that they do not say.
        DataError: if the site's data cannot be counted.
    """
    wanted = {name: value for name, value in changes.items() if value is not None}
    found, here = _recipe(recipe, wanted), None if site is None else site_file.read_site(site)
    units, names, mechanism = _units(found, here, wanted)
    asked = planner.question(found, units, mechanism=mechanism)
    asked = replace(asked, **_target(found.privacy, here, wanted))
    asked = replace(asked, numbers=_numbers(found, mechanism), before=_before(here, names, asked))
    return planner.plan(asked, accountants)


def _recipe(path: Path, wanted: Mapping[str, Any]) -> schema.Recipe:
    """The recipe as written: one that cannot be trained with here may be planned."""
    found = recipes.written(path)
    optimiser = found.optimiser.model_copy(update={"batch_size": wanted.get("batch", found.optimiser.batch_size)})
    return found.model_copy(update={"rounds": wanted.get("rounds", found.rounds), "optimiser": optimiser})


def _units(
    recipe: schema.Recipe, site: schema.SiteConfig | None, wanted: Mapping[str, Any]
) -> tuple[int, list[str], str]:
    """How many units it is made from, the names that are charged where the site's data says them, and the mechanism."""
    mechanism = wanted.get("mechanism") or recipe.privacy.mechanism
    known = None if mechanism == privacy_config.NO_MECHANISM else str(mechanism)
    if known is not None and known not in privacy_config.UNITS:
        raise errors.ConfigError("privacy plan", [f"mechanism '{known}': known: {', '.join(privacy_config.UNITS)}"])
    if wanted.get("units"):
        return int(wanted["units"]), [], known or "record-level"
    whole = privacy_config.UNITS.get(known or "") == "site"
    if site is None or whole:
        missing = "--sites" if whole else "SITE.toml or --samples"
        raise errors.ConfigError("privacy plan", [f"how many there are to draw from is not known; give {missing}"])
    source, train = _train(recipe, site)
    if known is None:
        # The patient where one has several images, else the image.
        patients = len(records.ids("patient", train, source))
        known = "patient-level" if patients < len(train) else "record-level"
    unit = privacy_config.UNITS[known]
    units = events.counted(len(records.ids(unit, train, source)), unit, site.privacy)
    if not units:
        raise errors.DataError(f"site '{site.name}' has no training sample; nothing can be planned")
    return units, records.charged(unit, train, source), known


def _train(recipe: schema.Recipe, site: schema.SiteConfig) -> tuple[Any, list[Any]]:
    raw = sources.make(site.data, recipe.data)
    mapped = labels.mapped(raw, site.labels, recipe.data.class_names)
    source = bags.of(mapped, recipe, table=site.table == "given")
    return source, site_file.whole(site, site_file.split(site, site_file.belonging(site, source.samples()), source))[
        "train"
    ]


def _target(
    privacy: privacy_config.RecipePrivacy, site: schema.SiteConfig | None, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Epsilon or noise, and delta: as asked, else as the recipe says, else as the site's budget does."""
    budget = None if site is None else site.privacy
    noise, epsilon = wanted.get("noise_multiplier"), wanted.get("epsilon")
    if noise is None and epsilon is None:
        noise, epsilon = privacy.noise_multiplier, privacy.epsilon
    if noise is None and epsilon is None and budget is not None:
        epsilon = budget.epsilon
    delta = wanted.get("delta") or privacy.delta or (None if budget is None else budget.delta)
    faults = []
    if noise is None and epsilon is None:
        faults.append("give --epsilon or --noise, or [privacy] in the recipe or SITE.toml")
    if noise is not None and epsilon is not None:
        faults.append("give --epsilon or --noise, not both")
    if delta is None:
        faults.append("give --delta, well below 1 / the number of patients")
    if faults:
        raise errors.ConfigError("privacy plan", faults)
    return {"noise_multiplier": noise, "epsilon": epsilon, "delta": delta}


def _numbers(recipe: schema.Recipe, mechanism: str) -> dict[str, int]:
    """Numbers that train in a step, by which factors of the pairs do; empty where the backbone is not here.

    The recipe's own way is the first one: the verdict is on it.

    Raises:
        ConfigError: if the recipe has faults, or its model has layers that the mechanism cannot be used with.
    """
    from fedvfm.model import adapted_model  # torch only here
    from fedvfm.privacy import gradients

    plain = recipe.model_copy(update={"privacy": privacy_config.NONE})
    shapes, faults = adapted_model.examine(plain)
    if faults or shapes is None:
        raise errors.ConfigError("recipe", faults)
    wrong = [] if privacy_config.UNITS[mechanism] == "site" else gradients.faults(shapes)
    if wrong:
        raise errors.ConfigError("recipe", wrong)
    manifest = shapes.manifest
    if not manifest.pairs():
        return {"all that trains": manifest.parameters}
    ways = sorted(factors.WAYS, key=lambda way: way != recipe.adapter.factors)
    # Of alternate the round with the larger factor is the noisier one.
    return {factors.WAYS[way]: factors.most(manifest, way) for way in ways}


def _before(site: schema.SiteConfig | None, names: list[str], asked: planner.Question) -> accountant.Curve:
    """What these records have spent already; the ledger is only looked at."""
    budget = None if site is None else site.privacy
    if site is None or budget is None or not names or not (Path(budget.ledger) / entries.FILE).is_file():
        return ()
    if budget.unit != asked.unit:
        return ()
    found = ledger.Ledger(Path(budget.ledger), site.name, budget.unit)
    spent = found.spending(found.entries).worst(found.records.find, found.records.hashes(names))
    return max(spent, key=lambda one: accountant.epsilon(one, asked.delta).value, default=())
