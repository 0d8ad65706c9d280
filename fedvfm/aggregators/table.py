"""The table of aggregation rules."""

from __future__ import annotations

import dataclasses
from typing import cast

from fedvfm import errors, registry
from fedvfm.aggregators import base
from fedvfm.config import privacy, schema
from fedvfm.config import secure_aggregation as secure_config
from fedvfm.secure_aggregation import session
from fedvfm.state import control_variates, factors, groups

_PLACE = "fedvfm.aggregators."

TABLE = registry.Table(
    "aggregation rule",
    {
        "clipped-mean": _PLACE + "clipped_mean:ClippedMean",
        "fair": _PLACE + "fair:Fair",
        "geometric-median": _PLACE + "geometric_median:GeometricMedian",
        "hetlora": _PLACE + "hetlora:HetLora",
        "krum": _PLACE + "krum:Krum",
        "mean": _PLACE + "mean:Mean",
        "median": _PLACE + "median:Median",
        "residual": _PLACE + "residual:Residual",
        "stack": _PLACE + "stack:Stack",
        "svd": _PLACE + "svd:Svd",
        "trimmed-mean": _PLACE + "trimmed_mean:TrimmedMean",
    },
)


def make(settings: schema.AggregationConfig) -> base.Aggregator:
    """The recipe's rule with its options.

    Raises:
        UnknownName: if there is no such rule.
        ConfigError: if it does not take these options.
    """
    wrong = option_faults(settings)
    if wrong:
        raise errors.ConfigError("recipe", wrong)
    return cast(base.Aggregator, TABLE.get(settings.rule)(**settings.options))


def option_faults(settings: schema.AggregationConfig) -> list[str]:
    """Options that the rule does not take, one sentence a fault.

    Raises:
        UnknownName: if there is no such rule.
    """
    rule = TABLE.get(settings.rule)
    known = [field.name for field in dataclasses.fields(rule)] if dataclasses.is_dataclass(rule) else []
    unknown = [
        f"recipe.aggregation.options.{key}: unknown; known: {', '.join(known) or 'none'}"
        for key in settings.options
        if key not in known
    ]
    if unknown:
        return unknown
    try:
        rule(**settings.options)
    except ValueError as error:
        return [f"recipe.aggregation.options.{error}"]
    return []


def refactors(rule: base.Aggregator) -> bool:
    """Whether it makes both factors of every pair anew; of a rule that does not say so, whether it is no sum."""
    return getattr(rule, "refactors", not rule.sum_only)


def joins_factors(rule: base.Aggregator) -> bool:
    """Whether it needs both factors of a pair from every site; those that make both anew do."""
    return refactors(rule) or getattr(rule, "joins_factors", False)


def keeps_residual(rule: base.Aggregator) -> bool:
    """Whether it puts what it knows of the mean products into a residual beside the pairs."""
    return getattr(rule, "keeps_residual", False)


def averages_factors(rule: base.Aggregator) -> bool:
    """Of a rule that moves a residual, whether the factors beside it are the mean of the sites'."""
    return getattr(rule, "averages_factors", False)


def robust(rule: base.Aggregator) -> bool:
    """Whether it withstands bad sites; a rule that does not say so does not."""
    return getattr(rule, "robust", False)


def _compares(rule: base.Aggregator) -> bool:
    """Whether what it makes of one update depends on what the others are like."""
    return robust(rule) or bool(getattr(rule, "shorten", 0.0))


def faults(recipe: schema.Recipe) -> list[str]:
    """What of a recipe its rule cannot serve, one sentence a fault; names are checked elsewhere."""
    settings, way, mechanism = recipe.aggregation, recipe.adapter.factors, recipe.privacy.mechanism
    name = settings.rule
    if name not in TABLE:
        return []
    found = option_faults(settings)
    if found:
        return found
    rule = make(settings)
    if mechanism == privacy.SITE_LEVEL and not rule.sum_only:
        found.append(
            f"recipe.privacy.mechanism = '{mechanism}': rule '{name}' needs more than a sum of the updates, and the "
            'noise is on their sum; use recipe.aggregation.rule = "mean"'
        )
    elif mechanism == privacy.SITE_LEVEL and robust(rule):
        found.append(
            f"recipe.privacy.mechanism = '{mechanism}': it clips every update itself, and rule '{name}' would see "
            'their private mean alone; use recipe.aggregation.rule = "mean"'
        )
    if way != factors.BOTH and refactors(rule):
        found.append(
            f"recipe.adapter.factors = '{way}': rule '{name}' makes both factors of every pair anew, so that none "
            'stays as it is; use recipe.aggregation.rule = "mean"'
        )
    rank = recipe.adapter.options.get("residual", 0)
    if keeps_residual(rule) and not rank:
        found.append(
            f"recipe.aggregation.rule = '{name}': the adapter has no residual for what the rule finds. Use adapter "
            "kind 'lora' and set recipe.adapter.options.residual to a few times recipe.adapter.rank"
        )
    elif rank and not keeps_residual(rule):
        found.append(
            f"recipe.adapter.options.residual = {rank!r}: rule '{name}' puts nothing there; leave it out, or use "
            'recipe.aggregation.rule = "residual" or "stack"'
        )
    kind = recipe.personal.kind
    inside = kind not in (groups.NONE, *groups.BESIDE)  # what stays has a part in what leaves
    if inside and mechanism in privacy.SHARED and mechanism != privacy.SITE_LEVEL_SHARED:
        found.append(
            f"recipe.personal.kind = '{kind}': under mechanism '{mechanism}' noise is added to what leaves alone. The "
            "personal arrays would stay without it, every later gradient would depend on them, and no clip bounds "
            f"that; use mechanism '{privacy.SHARED[mechanism]}'"
        )
    if kind in groups.SPLITS_PAIRS and joins_factors(rule):
        found.append(
            f"recipe.personal.kind = '{kind}': rule '{name}' joins the products of both factors, and one of them never "
            'leaves its site; use recipe.aggregation.rule = "mean"'
        )
    if kind == groups.DITTO and refactors(rule):
        found.append(
            f"recipe.personal.kind = '{kind}': rule '{name}' makes the factors of every pair anew in each round, so "
            'that a pull to them means nothing; use recipe.aggregation.rule = "mean"'
        )
    if robust(rule) and settings.weighting != "uniform":
        found.append(
            f"recipe.aggregation.weighting = '{settings.weighting}': under rule '{name}' every site counts the same, "
            'or what a bad site says of itself would be its lever; use recipe.aggregation.weighting = "uniform"'
        )
    if settings.moves and refactors(rule):
        found.append(
            "recipe.aggregation: server_optimiser, server_momentum and server_learning_rate need a rule that keeps the "
            f"factors; '{name}' makes new ones every round, so a difference between rounds means nothing"
        )
    if settings.server_optimiser != "momentum" and settings.server_learning_rate >= 1.0:
        found.append(
            f"recipe.aggregation.server_learning_rate = {settings.server_learning_rate:g}: with server_optimiser = "
            f"'{settings.server_optimiser}' every number moves by about that much a round; begin with 0.01"
        )
    more = control_variates.faults(recipe) + secure_faults(recipe) + unlabelled_faults(recipe)
    return found + more + asynchronous_faults(recipe)


def unlabelled_faults(recipe: schema.Recipe) -> list[str]:
    """With what of a recipe hospitals without labels cannot take part, one sentence a fault."""
    own, joined, key = recipe.unlabelled, recipe.aggregation, "recipe.unlabelled"
    if own is None:
        return []
    even, mechanism, kind = own.weight == 1.0, recipe.privacy.mechanism, recipe.personal.kind
    known = joined.rule in TABLE and not option_faults(joined)
    rows = [
        (
            not recipe.data.augment,
            "recipe.data.augment is empty",
            "such a site learns to answer for an augmented image as the adapter does for the image itself",
            "recipe.data.augment, as ['flip', 'intensity', 'noise']",
        ),
        (
            not own.warmup_rounds and recipe.start is None,
            f"{key}.warmup_rounds = 0",
            "the adapter of round 0 has learned nothing that could be taught",
            "warmup_rounds = 1 or more; 0 is for a recipe that goes on from an earlier adapter (start)",
        ),
        (
            own.warmup_rounds >= recipe.rounds,
            f"{key}.warmup_rounds = {own.warmup_rounds}",
            f"the recipe has {recipe.rounds} rounds, so that no such site would ever be asked",
            "fewer, or more rounds",
        ),
        (
            bool(recipe.task.oracle),
            f"recipe.task.prompt = '{recipe.task.prompt}'",
            "prompts are drawn from the truth, which such a site does not have",
            "prompt = 'none' or 'auto'",
        ),
        (
            kind != groups.NONE,
            f"recipe.personal.kind = '{kind}'",
            "what stays at such a site would never meet a label",
            "personal.kind = 'none'",
        ),
        (
            joined.weighting == "loss",
            "recipe.aggregation.weighting = 'loss'",
            "a loss against the adapter's own answers is no loss against labels",
            "weighting = 'examples' or 'uniform'",
        ),
        (
            recipe.optimiser.control_variates,
            "recipe.optimiser.control_variates",
            "its gradient is of another loss, by which no other site may be corrected",
            "no control variates",
        ),
        (
            mechanism == privacy.SITE_LEVEL or mechanism in privacy.SHARED,
            f"recipe.privacy.mechanism = '{mechanism}'",
            "its noise is for a sum in which every site counts the same in every round",
            "a mechanism of single records or patients with the site's own noise, or none",
        ),
        (
            known and _compares(make(joined)),
            f"recipe.aggregation.rule = '{joined.rule}'",
            "it goes by what most updates are like, and those of sites where it is sure of nothing are 0",
            "rule = 'mean', or another that compares no updates (options.shorten left out)",
        ),
        (
            recipe.secure_aggregation is not None and joined.weighting == "uniform" and not even,
            f"{key}.weight = {own.weight:g}",
            "under secure aggregation weights are whole numbers, and with weighting 'uniform' each is 1",
            "weight = 1.0, or weighting = 'examples'",
        ),
    ]
    return [f"{key}: {what}: {why}; use {remedy}" for wrong, what, why, remedy in rows if wrong]


def asynchronous_faults(recipe: schema.Recipe) -> list[str]:
    """What of a recipe needs updates that all start from one adapter, one sentence a fault."""
    own, key, mechanism = recipe.asynchronous, "recipe.asynchronous", recipe.privacy.mechanism
    if own is None:
        return []
    rows = [
        (
            recipe.aggregation.rule != "mean",
            f"recipe.aggregation.rule = '{recipe.aggregation.rule}'",
            "it compares updates, or makes factors anew, and needs all of them from one adapter",
            'rule = "mean"',
        ),
        (
            recipe.aggregation.weighting == "loss",
            "recipe.aggregation.weighting = 'loss'",
            "a late update has the loss of an earlier adapter, and would count more for being late",
            'weighting = "examples" or "uniform"',
        ),
        (
            recipe.adapter.factors == factors.ALTERNATE,
            "recipe.adapter.factors = 'alternate'",
            "a late update is of the factor that does not train in the round that takes it",
            'factors = "both" or "freeze-A"',
        ),
        (
            recipe.personal.kind != groups.NONE,
            f"recipe.personal.kind = '{recipe.personal.kind}'",
            "what stays at a slow site would fit an adapter of earlier rounds",
            'personal.kind = "none"',
        ),
        (
            recipe.optimiser.control_variates,
            "recipe.optimiser.control_variates",
            "a correction is of the round that it was made for",
            "no control variates",
        ),
        (
            recipe.unlabelled is not None,
            "recipe.unlabelled",
            "a round could end with sites without labels alone",
            "no sites without labels",
        ),
        (
            mechanism == privacy.SITE_LEVEL or mechanism in privacy.SHARED,
            f"recipe.privacy.mechanism = '{mechanism}'",
            "its noise is for one sum of all sites that a round asked",
            "a mechanism of single records or patients with the site's own noise, or none",
        ),
        (
            recipe.secure_aggregation is not None,
            "recipe.secure_aggregation",
            "the masks of a round cancel out in one sum of its own sites",
            "no secure aggregation, or no asynchronous rounds",
        ),
        (
            recipe.min_sites > own.buffer_size,
            f"recipe.min_sites = {recipe.min_sites}",
            f"a round ends with buffer_size = {own.buffer_size}, and the sites were promised more",
            "a larger buffer_size",
        ),
    ]
    return [f"{key}: {what}: {why}; use {remedy}" for wrong, what, why, remedy in rows if wrong]


def secure_faults(recipe: schema.Recipe) -> list[str]:
    """Why a recipe's updates cannot be joined under masks, one sentence a fault; none where it asks for no masks."""
    secure, settings, table = recipe.secure_aggregation, recipe.aggregation, "recipe.secure_aggregation"
    if secure is None:
        return []
    wrong = []
    if settings.rule != "mean":
        wrong.append(
            f"{table}: rule '{settings.rule}' needs more than the plain weighted sum of the updates, and nothing else "
            'is ever seen; use recipe.aggregation.rule = "mean"; clip_norm bounds every update at its site'
        )
    if settings.weighting == "loss":
        wrong.append(
            f"{table}: recipe.aggregation.weighting = 'loss' needs each site's own loss, which is told in the sum "
            'alone; use "examples" or "uniform"'
        )
    if recipe.privacy.mechanism == privacy.SITE_LEVEL:
        wrong.append(
            f"{table}: mechanism '{privacy.SITE_LEVEL}' clips and noises plain updates at the coordinator, which sees "
            "none; use a mechanism of the sites, or none"
        )
    if recipe.codec != "fp32":
        wrong.append(
            f"{table}: codec '{recipe.codec}' writes every row with a scale of the site's own, and such numbers have "
            'no sum; use recipe.codec = "fp32"'
        )
    return wrong + _secure_numbers(recipe, secure)


def _secure_numbers(recipe: schema.Recipe, secure: secure_config.SecureAggregation) -> list[str]:
    table, wrong = "recipe.secure_aggregation", []
    fewest = max(secure_config.LEAST_SITES, secure.colluders + 2)
    if not fewest <= recipe.min_sites <= session.MOST_SITES:
        wrong.append(
            f"recipe.min_sites = {recipe.min_sites}: with secure aggregation and {secure.colluders} colluders a sum "
            f"must be of {fewest} sites or more, and of {session.MOST_SITES} at most, so that two updates at least "
            "stay hidden in it"
        )
    if secure.threshold and secure.threshold < session.least_threshold(recipe.min_sites, secure.colluders):
        wrong.append(
            f"{table}.threshold = {secure.threshold}: {recipe.min_sites} sites and {secure.colluders} colluders need "
            f"{session.least_threshold(recipe.min_sites, secure.colluders)}; or leave it out"
        )
    return wrong


def site_faults(recipe: schema.Recipe, sites: int) -> list[str]:
    """What the rule cannot promise with so few updates a round, one sentence a fault; names are checked elsewhere.

    Args:
        recipe: what is trained.
        sites: the least number of updates that a round goes on with.
    """
    settings = recipe.aggregation
    if recipe.secure_aggregation is not None and sites < recipe.min_sites:
        return [
            f"recipe.min_sites = {recipe.min_sites}: a round may go on with {sites}, and no sum of so few is opened. "
            "Raise server.quorum, or bring more sites"
        ]
    if settings.rule not in TABLE or option_faults(settings):
        return []
    least = getattr(make(settings), "least", 1)
    if sites >= least:
        return []
    return [
        f"recipe.aggregation.options.bad = {settings.options['bad']}: rule '{settings.rule}' needs {least} updates a "
        f"round for that, and a round may go on with {sites}. Lower it, or bring more sites (server.cohort, "
        "server.quorum)"
    ]
