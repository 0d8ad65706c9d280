"""``fedvfm privacy audit``: what an experiment's own updates tell of who was trained on, beside the epsilon it claims.

The federated arm is trained with each unit (image or patient) in or out by a fair coin. An attacker who knows every
image, and sees what the coordinator of a real federation would, scores each unit; from the scores comes a lower bound
of epsilon (:mod:`fedvfm.privacy.one_run_audit`). Several runs with coins and noise of their own are one release of all
their units together, so their scores are pooled.

The attack: an update is, to first order, a sum of the gradients of the units it was made from. Their coefficients are
estimated by ridge regression of the update on all units' gradients at the adapter that training began with.

Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, section 6 (white-box
    scores are inner products of updates with gradients); the ridge regression takes the place of the inner product, as
    canaries here are real images whose gradients are alike.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedvfm import errors, seeding
from fedvfm.client import app as client_app
from fedvfm.client.training import dp_trainer
from fedvfm.client.training import site as sites
from fedvfm.config import privacy, schema
from fedvfm.data import sample as samples
from fedvfm.data.partition import virtual_hospitals
from fedvfm.model import adapted_model, feature_cache
from fedvfm.privacy import accountant, base, dpsgd, events, gradients, one_run_audit
from fedvfm.protocol import codecs
from fedvfm.report import progress
from fedvfm.server.rounds import federation
from fedvfm.simulation import experiment, run
from fedvfm.simulation.engines import observed
from fedvfm.state import state

UPDATES, SUMS = "updates", "sums"
"""What the coordinator sees of a round: every site's update, or under secure aggregation what they came to."""
DELTA = 1e-5
"""Of a recipe that states none."""
_COLUMNS = 1 << 16
_TINY = 1e-12


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        mechanism: of the recipe.
        unit: "record" or "patient": what has a coin.
        seen: ``UPDATES`` or ``SUMS``.
        runs: how many.
        claimed: epsilon of the whole recipe, as the accountant says it, for the site where it is largest; None without
            a mechanism.
        shown: the lower bound.
    """

    mechanism: str
    unit: str
    seen: str
    runs: int
    claimed: float | None
    shown: one_run_audit.LowerBound

    @property
    def refuted(self) -> bool:
        """Whether the claim is false, with the stated confidence."""
        return self.claimed is not None and self.shown.epsilon > self.claimed

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        shown = dataclasses.asdict(self.shown)
        return {
            **{key: getattr(self, key) for key in ("mechanism", "unit", "seen", "runs", "claimed", "refuted")},
            "epsilon_at_least": shown.pop("epsilon"),
            "epsilon_most": shown.pop("most"),
            **shown,
        }

    def words(self) -> list[str]:
        """The same for people."""
        shown, who = self.shown, "every site's update" if self.seen == UPDATES else "the sum of the sites' updates"
        claim = "nothing is claimed: no mechanism" if self.claimed is None else f"claimed: epsilon {self.claimed:.2f}"
        return [
            f"attacker: sees {who} of each round, knows every image; {self.runs} run{'s' * (self.runs != 1)}",
            f"{shown.canaries:,} {self.unit}s with a coin; {shown.right:,} of {shown.guesses:,} guesses right",
            f"shown: epsilon at least {shown.epsilon:.2f} ({self.unit} level, delta {shown.delta:g}, confidence "
            f"{shown.confidence:g}); with so few {self.unit}s no attack shows more than {shown.most:.2f}",
            f"{claim}" + ("" if self.claimed is None else f" ({self.mechanism}, of the whole run)"),
            "a low bound does not prove privacy: a better attack may show more",
        ]

    def require_held(self) -> None:
        """Refuse a claim that the attack refutes.

        Raises:
            ClaimRefuted: with both numbers.
        """
        if self.refuted:
            raise errors.ClaimRefuted(
                f"epsilon is at least {self.shown.epsilon:.2f} with confidence {self.shown.confidence:g}, but "
                f"{self.mechanism} claims {self.claimed:.2f} at delta {self.shown.delta:g}. Repeat it with another "
                "seed and more --runs; where it stands, do not use this model, adapter or task under privacy, and "
                "report it"
            )


@dataclass(frozen=True)
class Member:
    """A site with its coins.

    Attributes:
        whole: the site with all its units.
        thinned: the site as it trains, without the units that are out.
        canaries: the samples of each unit that has a coin.
        coins: whether each is in.
        claimed: epsilon of the recipe here.
    """

    whole: sites.Site
    thinned: sites.Site
    canaries: tuple[dp_trainer.Unit, ...]
    coins: one_run_audit.Coins
    claimed: float | None


def audit(
    what: schema.Experiment | Mapping[str, Any] | str,
    *,
    runs: int = 1,
    canaries: int = 0,
    confidence: float = 0.95,
    observer: progress.Observer = progress.silent,
) -> Audit:
    """Train, attack, and bound epsilon from below.

    Args:
        what: the experiment; its baselines are not run.
        runs: with coins, noise and first adapter of their own.
        canaries: at most so many units of a site have a coin, the others are always in; 0 for all.
        confidence: of the bound.
        observer: told of progress.

    Raises:
        ConfigError: if the experiment cannot be audited.
        DataError: if it has too few units.
        FedvfmError: what stopped a run.
    """
    prepared, shapes = run.prepare(what)
    recipe = prepared.recipe
    faults = _faults(prepared)
    if faults:
        raise errors.ConfigError("privacy audit", faults)
    seen = UPDATES if recipe.secure_aggregation is None else SUMS
    unit = privacy.UNITS.get(recipe.privacy.mechanism, "patient")
    scores: list[one_run_audit.Scores] = []
    coins: list[one_run_audit.Coins] = []
    claims: list[float] = []
    for number in range(runs):
        own = _with_seed(prepared, (recipe.seed + number) % 2**63)
        observer("note", text=f"run {number + 1} of {runs}")
        shapes = shapes if number == 0 else run.prepare(own)[1]
        members = [with_coins(own, hospital, unit, canaries) for hospital in experiment.hospitals(own)]
        scores.append(_attacked(own, shapes, members, seen, observer))
        coins += [member.coins for member in members]
        claims += [member.claimed for member in members if member.claimed is not None]
    shown = one_run_audit.bound(
        np.concatenate(scores), np.concatenate(coins), recipe.privacy.delta or DELTA, confidence
    )
    return Audit(recipe.privacy.mechanism, unit, seen, runs, max(claims, default=None), shown)


def _faults(what: schema.Experiment) -> list[str]:
    recipe, wrong = what.recipe, []
    if privacy.UNITS.get(recipe.privacy.mechanism) == "site":
        wrong.append(
            f"recipe.privacy.mechanism = '{recipe.privacy.mechanism}': the audit puts images or patients in and out, "
            "not hospitals; take record-level or patient-level"
        )
    if recipe.codec != codecs.PLAIN:
        wrong.append(f"recipe.codec = '{recipe.codec}': the audit reads whole updates; set it to 'fp32'")
    if what.attack is not None:
        wrong.append("attack: sites that send something else are not audited; leave [attack] out")
    if any(rank != recipe.adapter.rank for rank in what.site_ranks.values()):
        wrong.append("site_ranks: the audit compares updates of one rank; leave site_ranks out")
    return wrong


def _with_seed(what: schema.Experiment, seed: int) -> schema.Experiment:
    """One run of several; nothing is evaluated, as scores are no part of what is audited."""
    evaluation = what.recipe.evaluation.model_copy(update={"every": 0})
    recipe = what.recipe.model_copy(update={"seed": seed, "evaluation": evaluation})
    return what.model_copy(update={"recipe": recipe, "baselines": (), "workers": 1})


def with_coins(what: schema.Experiment, hospital: virtual_hospitals.Hospital, unit: str, most: int) -> Member:
    """A site whose units are in or out. One unit, drawn first, has no coin and is in: no site is ever empty."""
    recipe = what.recipe
    units = list(events.members(unit, hospital.train, hospital.source).values())
    rng = seeding.stream(recipe.seed, "privacy audit", hospital.name)
    order = [int(place) for place in rng.permutation(len(units))]
    chosen = order[1 : most + 1] if most else order[1:]
    coins = rng.integers(0, 2, len(chosen)).astype(bool)
    out = {sample.id for place, coin in zip(chosen, coins, strict=True) if not coin for sample in units[place]}
    thin = dataclasses.replace(
        hospital, train=tuple(sample for sample in hospital.train if sample.id not in out), notes=()
    )
    event = events.event_of(recipe, len(units))
    claimed = None
    if event is not None:
        spent = accountant.steps(event.sample_rate, event.noise_multiplier, event.steps * recipe.rounds, event.shared)
        claimed = accountant.epsilon(spent, recipe.privacy.delta or DELTA).value
    cache = feature_cache.FeatureCache(what.cache_mib * run.MIB)
    # Rate, steps and noise come from the number of all units, which no coin changes.
    whole, thinned = (
        sites.Site(hospital.name, house, what.device, cache=cache, simulated=True, units=len(units))
        for house in (hospital, thin)
    )
    return Member(whole, thinned, tuple(units[place] for place in chosen), coins, claimed)


def _attacked(
    what: schema.Experiment,
    shapes: adapted_model.AdaptedModel,
    members: Sequence[Member],
    seen: str,
    observer: progress.Observer,
) -> one_run_audit.Scores:
    """The score of each canary, site by site. Shapes: (m,)."""
    built = client_app.Models(threads=what.threads or 1)
    with tempfile.TemporaryDirectory(prefix="fedvfm-audit-") as folder, run.as_before():
        names = tuple(member.whole.name for member in members)
        locked = run.locked_here(shapes)
        job = federation.Job("audited", locked, Path(folder), names, (), what.server, simulated=True)
        exchanges, adapters = observed.run(job, [member.thinned for member in members], built, observer)
        model = built.get(locked.recipe, what.device)
        if seen == SUMS:
            steps = [_standard(_joint(model, members, adapters, number)) for number in range(1, len(adapters))]
            total: one_run_audit.Scores = np.sum(steps, axis=0)
            return total
        totals = {member.whole.name: np.zeros(len(member.canaries)) for member in members}
        by_name = {member.whole.name: member for member in members}
        for exchange in exchanges:
            rows = _rows(model, by_name[exchange.site], exchange.base, exchange.round)
            change = _change(model, exchange.base, exchange.update, exchange.round)
            totals[exchange.site] += _standard(coefficients(rows, change))
        return np.concatenate([_standard(totals[name]) for name in names])


def _joint(
    model: adapted_model.AdaptedModel, members: Sequence[Member], adapters: Sequence[state.AdapterState], number: int
) -> one_run_audit.Scores:
    """The coefficients of all sites' canaries in the change of the global adapter."""
    before, after = adapters[number - 1], adapters[number]
    rows = torch.cat([_rows(model, member, before, number) for member in members])
    return coefficients(rows, _change(model, before, after, number))


def _groups(model: adapted_model.AdaptedModel, number: int) -> list[list[torch.nn.Parameter]]:
    return [group for group in model.trainable(number).values() if group]


def _rows(model: adapted_model.AdaptedModel, member: Member, start: state.AdapterState, number: int) -> torch.Tensor:
    """The gradient of each canary at ``start``, as the mechanism would take it, of the numbers that leave the site.

    Shapes: (m, P), float32.
    """
    recipe, site = model.recipe, member.whole
    model.write(start)
    model.select(number)
    model.eval()
    views, passed = recipe.data.views, (number - 1) * recipe.optimiser.local_epochs
    view = passed % views if views else -1

    def losses(some: Sequence[samples.Sample]) -> torch.Tensor:
        return dp_trainer.losses_of(model, [site.example(model, sample, view, ("epoch", passed)) for sample in some])

    work = base.Work(
        model,
        _groups(model, number),
        f"site '{site.name}', round {number}",
        dp_trainer.made(model),
        lambda examples: dp_trainer.losses_of(model, examples),
    )
    most = recipe.privacy.images_per_patient
    with gradients.opened(work) as way:
        rows = torch.cat([way.rows([unit[:most]], losses).cpu() for unit in member.canaries])
    if recipe.privacy.clip is not None:  # of the whole gradient, personal numbers too
        rows = torch.stack([dpsgd.clipped_sum(row[None], recipe.privacy.clip).float() for row in rows])
    return rows[:, _leaving(model, number)]


def _leaving(model: adapted_model.AdaptedModel, number: int) -> torch.Tensor:
    """Whether each trained number leaves: of personal ones nobody sees a change. Shapes: (numbers,), bool."""
    parameters = [weight for group in _groups(model, number) for weight in group]
    whether = zip(parameters, model.leaves(number), strict=True)
    return torch.cat([torch.full((weight.numel(),), leaves) for weight, leaves in whether])


def _change(
    model: adapted_model.AdaptedModel, before: state.AdapterState, after: state.AdapterState, number: int
) -> torch.Tensor:
    """What was subtracted from the trained numbers that leave, in the order of the gradients. Shapes: (P,), float64."""
    flat = []
    for adapter in (before, after):
        model.write(adapter)
        parts = [weight.detach().reshape(-1).double().cpu() for group in _groups(model, number) for weight in group]
        flat.append(torch.cat(parts))
    return (flat[0] - flat[1])[_leaving(model, number)]


def coefficients(rows: torch.Tensor, change: torch.Tensor) -> one_run_audit.Scores:
    """How much of each row is in ``change``: ridge regression whose penalty is noise over signal, both estimated.

    What of the change lies outside the rows' span is noise of the same size in every direction; what lies inside is
    that noise and the rows' part.

    Shapes: rows (m, P) and change (P,) -> (m,).
    """
    count, numbers = rows.shape
    gram, products = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for columns, part in zip(torch.split(rows, _COLUMNS, dim=1), torch.split(change, _COLUMNS), strict=True):
        wide = columns.double()
        gram += wide @ wide.T
        products += wide @ part
    sizes, axes = (tensor.numpy() for tensor in torch.linalg.eigh(gram))
    along = axes.T @ products.numpy()
    real = sizes > 1e-9 * max(float(sizes[-1]), _TINY)
    inside = float(np.sum(along[real] ** 2 / sizes[real]))
    outside = max(float(change.square().sum()) - inside, 0.0)
    noise = outside / max(numbers - int(real.sum()), 1)
    signal = max(inside - int(real.sum()) * noise, 1e-6 * inside) / max(float(sizes.sum()), _TINY)
    penalty = noise / signal if signal > 0 else 1.0
    estimate: NDArray[np.float64] = axes[:, real] @ (along[real] / (sizes[real] + penalty))
    return estimate


def _standard(scores: one_run_audit.Scores) -> one_run_audit.Scores:
    """With mean 0 and deviation 1, so that rounds and sites count alike; equal ones are 0."""
    spread = float(scores.std())
    return (scores - scores.mean()) / spread if spread > _TINY else np.zeros_like(scores)
