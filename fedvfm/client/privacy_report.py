"""What a recipe's privacy comes to at this site, for people: before a round, in a review, and while the client runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import table as backbones
from fedvfm.backbones import weights
from fedvfm.client import site_file, state_folder
from fedvfm.client.gate import policy, privacy_charge
from fedvfm.config import privacy, schema
from fedvfm.data import sample as samples
from fedvfm.data.partition import virtual_hospitals
from fedvfm.ledger import entries as lines
from fedvfm.ledger import ledger, summary
from fedvfm.ledger import spending as spendings
from fedvfm.privacy import accountant, base, events, planner
from fedvfm.report import quantity
from fedvfm.storage import storage
from fedvfm.trust import locked_recipe

FILE = "privacy.json"
"""In the folder of the run's files: what the last recipe with a mechanism comes to here, for ``client status``."""


@dataclass(frozen=True)
class Here:
    """What a recipe's privacy comes to at this site.

    Attributes:
        mechanism, unit, noise_multiplier, sample_rate, steps, clip: of one round; see
            :class:`fedvfm.privacy.base.PrivacyEvent`.
        units: how many can be drawn.
        public: the number that rate, steps and noise are made from in their place; 0 where it is ``units``.
        rounds: of the recipe.
        delta, epsilon: of the whole run of the recipe alone; None for an infinite one.
        data_set, allowed, budget_delta: the site's budget; empty or None without one.
        spent: epsilon of these units by the ledger, at the budget's delta.
        after: the same once the rounds that are left of the recipe are spent.
        waiting: whether the ledger waits to be reconciled.
        ledger: its folder.
        honest: sites that are assumed to be honest, where sites share the noise; 0 elsewhere.
    """

    mechanism: str
    unit: str
    units: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    clip: float
    rounds: int
    delta: float
    epsilon: float | None
    data_set: str = ""
    allowed: float | None = None
    budget_delta: float | None = None
    spent: float | None = 0.0
    after: float | None = None
    waiting: bool = False
    ledger: str = ""
    public: int = 0
    honest: int = 0

    @property
    def fits(self) -> bool:
        """Whether the rest of the run is within the budget."""
        return self.allowed is not None and self.after is not None and self.after <= self.allowed and not self.waiting


def look(recipe: schema.Recipe, hospital: Any, budget: privacy.Budget | None) -> Here | None:
    """What the recipe's privacy comes to here; changes nothing, makes no ledger. None without a mechanism.

    Raises:
        LedgerError, AuditError: if there is a ledger and it cannot be read.
    """
    units = privacy_charge.names(recipe, hospital) if privacy_charge.private(recipe) else []
    made_from = privacy_charge.counted(recipe, hospital, budget) if units else 0
    event = events.event_of(recipe, made_from) if units else None
    if event is None:
        return None
    delta = recipe.privacy.delta or 0.0
    whole = accountant.epsilon(_times(event, recipe.rounds), delta).value
    release = (event.noise_multiplier, event.sample_rate, event.steps, event.clip)
    run = (recipe.rounds, delta, planner.finite(whole))
    made = Here(event.mechanism, event.unit, len(units), *release, *run, honest=event.honest)
    if budget is None or budget.unit != event.unit:
        return made
    made = replace(made, public=budget.units or 0)
    return _with_budget(made, recipe, hospital, event, budget)


def _times(event: base.PrivacyEvent, number: int) -> accountant.Curve:
    return accountant.joined([accountant.curve([event])] * number)


def _with_budget(
    made: Here,
    recipe: schema.Recipe,
    hospital: Any,
    event: base.PrivacyEvent,
    budget: privacy.Budget,
) -> Here:
    folder = Path(budget.ledger)
    now, before, done, waits = spendings.Spending(()), [accountant.joined([])], 0, False
    if (folder / lines.FILE).is_file():
        book = ledger.Ledger(folder, hospital.name, budget.unit)
        entries = book.entries
        now = book.spending(entries)
        before = now.worst(book.records.find, book.records.hashes(privacy_charge.charged(recipe, hospital)))
        charged = [line for line in entries if line["event"] == "charged" and line["recipe"] == recipe.hash]
        # Scores of a round are charged too, and take no round off what is left to train.
        done = len({line["round"] for line in charged if line["mechanism"] != base.SCORES})
        waits = bool(lines.waiting(entries))
    more = _times(event, max(0, recipe.rounds - done))
    spent, after = (
        spendings.epsilon(now, curves, budget.delta, budget.accountant).value
        for curves in (before, [accountant.joined([one, more]) for one in before])
    )
    return replace(
        made,
        data_set=budget.data_set,
        allowed=budget.epsilon,
        budget_delta=budget.delta,
        spent=planner.finite(spent),
        after=planner.finite(after),
        waiting=waits,
        ledger=str(folder),
    )


def words(found: Here) -> list[str]:
    """The same for a person."""
    shown = _shown(found.epsilon)
    drawn = "the coordinator adds the noise, once a round"
    if found.honest:
        drawn = "each site adds a part of the noise, once a round"
    if found.unit != "site":
        stated = f", counted as {found.public:,}," if found.public else ""
        drawn = (
            f"{found.units:,} {found.unit}s here{stated}{'' if stated else ','} each drawn with chance "
            f"{found.sample_rate:.3g} in each of {found.steps:,} steps a round"
        )
    rows = [
        f"{found.mechanism}: {drawn}; noise multiplier {found.noise_multiplier:g}, clip {found.clip:g}",
        f"the whole run of {found.rounds} rounds: epsilon {shown} at delta {found.delta:g} ({found.unit} level)",
    ]
    if found.honest:
        rows.append(
            f"that noise is the sum of {found.honest} sites' parts, this one's among them: so many sites of every sum "
            "are assumed to be honest. It holds for the sum that secure aggregation opens, and for no update alone"
        )
    if found.unit != "site" and not found.public:
        rows.append(
            f"about how many {found.unit}s there are is taken as public, because noise and steps follow from it; with "
            "units = N in [privacy] they follow from N"
        )
    if found.allowed is None:
        return [*rows, f"no budget: without [privacy] that counts by {found.unit} in the site's file none is trained"]
    rows.append(
        f"data set {found.data_set}: epsilon {_shown(found.spent)} of {found.allowed:.2f} is spent ({found.unit} "
        f"level, delta {found.budget_delta:g}), {_shown(found.after)} after this run"
    )
    if found.waiting:
        rows.append("the ledger waits for 'fedvfm ledger reconcile': no round is trained until then")
    elif not found.fits:
        rows.append("the run does not fit into the budget: the round that would exceed it is refused before training")
    return rows


def _shown(value: float | None) -> str:
    return "infinity" if value is None else ledger.shown(value)


@dataclass(frozen=True)
class Judged:
    """A recipe at a site whose people look at it; the site's data was listed at most once.

    Attributes:
        recipe: the recipe.
        rules: the site's policy; None where no file was given.
        facts: what the policy judges, with the epsilon that the recipe comes to on this site's own data.
        hospital: the site's data; None where the recipe has no mechanism or the data is not known.
        budget: the site's ``[privacy]``.
        without_labels: whether the site takes part without labels.
    """

    recipe: schema.Recipe
    rules: schema.PolicyConfig | None
    facts: policy.Facts
    hospital: virtual_hospitals.Hospital | None = None
    budget: privacy.Budget | None = None
    without_labels: bool = False

    @property
    def verdicts(self) -> list[policy.Verdict] | None:
        """Of the policy's rules; None where no file was given."""
        return None if self.rules is None else policy.check(self.rules, self.facts)

    @property
    def here(self) -> Here | None:
        """What the recipe's privacy comes to here; see :func:`look`."""
        return None if self.hospital is None else look(self.recipe, self.hospital, self.budget)

    def require(self) -> None:
        """Raise PolicyRefused if the policy does not accept the recipe."""
        if self.rules is not None:
            policy.require(self.rules, self.facts)


def judge(
    locked: locked_recipe.LockedRecipe,
    settings: schema.SiteConfig | schema.PolicyConfig | None,
    *,
    listed: samples.Source | None = None,
    examined: bool = False,
) -> Judged:
    """What a site's policy judges of a recipe; a policy alone says nothing of data.

    Args:
        locked: the recipe.
        settings: the site's file.
        listed: the site's data as the recipe asks for it, where it was listed before.
        examined: whether the recipe's model was built on this machine before.

    Raises:
        ConfigError, DataError: if file or data cannot be used.
    """
    recipe = locked.recipe
    if not isinstance(settings, schema.SiteConfig) or not privacy_charge.private(recipe):
        if not isinstance(settings, schema.SiteConfig):
            return Judged(recipe, settings, policy.Facts.of(locked))
        return Judged(recipe, settings.policy, policy.Facts.of(locked), without_labels=settings.without_labels)
    if not examined:
        _require_apart(recipe)
    hospital = site_file.hospital(settings, recipe, listed)
    units = privacy_charge.counted(recipe, hospital, settings.privacy)
    facts = policy.Facts.of(locked, units or None)
    return Judged(recipe, settings.policy, facts, hospital, settings.privacy, settings.without_labels)


def _require_apart(recipe: schema.Recipe) -> None:
    """Check that the mechanism can bound each unit in the recipe's model, where its shapes are on this machine.

    Raises:
        ConfigError: naming the layers that tie images together, or the faults by which there is no such model.
    """
    name = recipe.backbone.name
    if not (name in backbones.TABLE or weights.in_cache(name) or weights.is_folder(name)):
        return  # nothing is fetched because a recipe names it
    from fedvfm.model import adapted_model  # torch only here

    wrong = adapted_model.examine(recipe)[1]  # all of it: a model is not built of whatever a stranger wrote
    if wrong:
        raise errors.ConfigError("recipe", wrong)


def note(where: state_folder.State, recipe: str, found: Here) -> None:
    """Keep for ``client status`` what a recipe's privacy comes to here."""
    storage.write_text(where.folder / "run" / FILE, json.dumps({"recipe": recipe, **asdict(found)}) + "\n")


def status(where: state_folder.State) -> dict[str, Any] | None:
    """What was kept, and what the ledger says now; None where no recipe with a mechanism came yet."""
    try:
        kept = json.loads((where.folder / "run" / FILE).read_text())
    except (OSError, ValueError):
        return None
    found: dict[str, Any] = {**kept, "data_sets": [], "problem": ""}
    if not kept["ledger"] or not (Path(kept["ledger"]) / lines.FILE).is_file():
        return found
    try:
        book = summary.build(Path(kept["ledger"]), None)
    except errors.FedvfmError as error:
        return {**found, "problem": str(error)}
    return {**found, "data_sets": book["data_sets"], "waiting": bool(book["waiting"])}


def status_lines(found: Mapping[str, Any]) -> Iterable[str]:
    """The same for a person."""
    units = f"{found['units']:,} {found['unit']}{'' if found['units'] == 1 else 's'}"
    yield (
        f"privacy    {found['mechanism']}, noise multiplier {found['noise_multiplier']:g}, {units}; the whole run: "
        f"epsilon {_shown(found['epsilon'])} at delta {found['delta']:g}"
    )
    for data_set in found["data_sets"]:
        left = None if data_set["epsilon"] is None else max(0.0, data_set["allowed"] - data_set["epsilon"])
        scores = f" and {quantity.of(data_set['scores'], 'release')} of scores" if data_set["scores"] else ""
        yield (
            f"           data set {data_set['name']}: epsilon {_shown(data_set['epsilon'])} of "
            f"{data_set['allowed']:.2f} spent in {data_set['releases'] - data_set['scores']} updates{scores}, "
            f"{'nothing' if left is None else f'{left:.2f}'} left"
        )
    if found["problem"] or found["waiting"]:
        yield f"           nothing is charged: {found['problem'] or 'the ledger waits for fedvfm ledger reconcile'}"
