"""What privacy will cost before anything is trained: noise for an epsilon, epsilon for a noise, and whether to try.

The noise is measured in clips against the averaged clipped gradient, whose norm is at most one clip: its norm is about
``sigma sqrt(d) / batch`` a step. Over T steps noise adds up like sqrt(T) and a gradient that keeps its direction like
T, so that ``sigma sqrt(d) / (batch sqrt(T))`` is the least noise a run's sum can have relative to its signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedvfm.config import privacy, schema
from fedvfm.privacy import accountant, base
from fedvfm.secure_aggregation import shared_noise

HOPELESS, HARD, FAIR = "hopeless", "hard", "fair"
_NOISE_AS_LARGE, _NOISE_FELT = 1.0, 0.3
"""Above the first about half of what training gives is lost, above the second a tenth and more: docs/privacy.md."""
_FEW_SITES, _WEAK_EPSILON = 50, 10.0

COVERED = (
    "the update that leaves in each round: adapter, head and whatever else trains",
    "everything made from updates later: the global adapter, exports, predictions",
)
COVERED_SHARED = (
    "the sum of the sites' updates that is opened in each round, with the stated number of honest sites in it",
    "everything made from it later; not one site's update, should its masks come off",
)
NOT_COVERED = (
    "metrics: they come from test patients who are not trained on, and are outside epsilon; the policy can forbid them",
    "the number of validation and test images, which the handshake tells, and how long a round takes",
    "about how many units there are to train on, because noise and steps follow from it; units in [privacy] hides it",
    "what the coordinator or others learn elsewhere, and that this site took part",
)


@dataclass(frozen=True)
class Question:
    """What a plan is made for.

    Attributes:
        mechanism: "record-level", "patient-level" or "site-level"; or one of them with "-shared".
        unit: whose presence it protects.
        units: how many of them there are.
        batch: of them a step is expected to draw.
        steps: in the whole run.
        delta: the delta.
        numbers: that train, by how they train: ``"both factors"``, ``"freeze-A"``, ``"alternate"``.
        epsilon: wanted; or
        noise_multiplier: given.
        before: what the data set has spent already.
        share: of the noise that a site would have alone, what the mean of the least sites of a sum has where they share
            it.
    """

    mechanism: str
    unit: str
    units: int
    batch: int
    steps: int
    delta: float
    numbers: dict[str, int] = field(default_factory=dict)
    epsilon: float | None = None
    noise_multiplier: float | None = None
    before: accountant.Curve = ()
    share: float = 1.0

    @property
    def rate(self) -> float:
        """Chance of a unit to be in a step's batch."""
        return base.sample_rate(self.units, self.batch)

    @property
    def shared(self) -> bool:
        """Whether the noise is a sum of the sites' parts."""
        return self.mechanism in privacy.SHARED

    @property
    def covered(self) -> tuple[str, ...]:
        """What epsilon covers, in sentences."""
        return COVERED_SHARED if self.shared else COVERED

    def spent(self, noise_multiplier: float) -> accountant.Curve:
        """What the whole run comes to."""
        return accountant.steps(self.rate, noise_multiplier, self.steps, self.shared)


@dataclass(frozen=True)
class Signal:
    """Noise of one way to train.

    Attributes:
        way: "both factors", "freeze-A" or "alternate".
        numbers: that are noised in a step.
        step: norm of a step's noise, in clips; an averaged clipped gradient has at most 1.
        run: the same for the sum of all steps, if every gradient points the same way: the best that can be.
    """

    way: str
    numbers: int
    step: float
    run: float

    @property
    def verdict(self) -> str:
        """A rule of thumb, not a law: above 1 the noise of a run is larger than any signal can be."""
        return HOPELESS if self.run >= _NOISE_AS_LARGE else HARD if self.run >= _NOISE_FELT else FAIR


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        question: what was asked.
        noise_multiplier: given or found; None where none reaches the epsilon.
        epsilons: by accountant, of this run and what was spent before.
        signals: the noise of each way to train.
        warnings: sentences for a person.
    """

    question: Question
    noise_multiplier: float | None
    epsilons: dict[str, accountant.Epsilon]
    signals: tuple[Signal, ...]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Of the way the recipe trains now, which is the first."""
        if self.noise_multiplier is None:
            return HOPELESS
        return self.signals[0].verdict if self.signals else FAIR

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; no infinite number is in it."""
        asked = {key: value for key, value in asdict(self.question).items() if key not in ("before", "numbers")}
        return {
            **asked,
            "sample_rate": self.question.rate,
            "noise_multiplier": self.noise_multiplier,
            "epsilons": {
                name: {"epsilon": finite(one.value), "delta": one.delta, "order": finite(one.order)}
                for name, one in self.epsilons.items()
            },
            "signals": [{**asdict(one), "verdict": one.verdict} for one in self.signals],
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "covered": list(self.question.covered),
            "not_covered": list(NOT_COVERED),
        }


def question(recipe: schema.Recipe, units: int, **changes: Any) -> Question:
    """What a recipe asks at a site with so many units; ``changes`` are fields of :class:`Question` to put in place.

    At site level every site takes part in every round, and a round is one step; so it is where noise is shared.
    """
    own, optimiser = recipe.privacy, recipe.optimiser
    mechanism = str(changes.get("mechanism", own.mechanism))
    unit = privacy.UNITS.get(mechanism, "record")
    batch = units if unit == "site" else optimiser.batch_size
    single = unit == "site" or mechanism in privacy.SHARED
    steps = recipe.rounds * (1 if single else base.steps(units, batch, optimiser.local_epochs))
    made = Question(
        mechanism=mechanism,
        unit=unit,
        units=units,
        batch=batch,
        steps=steps,
        delta=own.delta or 0.0,
        epsilon=own.epsilon,
        noise_multiplier=own.noise_multiplier,
        share=_share(recipe, mechanism, units),
    )
    return replace(made, **changes)


def _share(recipe: schema.Recipe, mechanism: str, units: int) -> float:
    secure = recipe.secure_aggregation
    if secure is None or mechanism not in privacy.SHARED:
        return 1.0
    honest = max(1, shared_noise.honest(recipe.min_sites, secure))  # of fewer than two nobody trains, but may plan
    if privacy.UNITS[mechanism] == "site":
        return math.sqrt(max(units, honest) / honest)  # of a sum of all, which is divided by all further down
    return math.sqrt(recipe.min_sites / honest) / recipe.min_sites


def run_epsilon(recipe: schema.Recipe, units: int) -> float | None:
    """Epsilon of the whole run of a recipe at its delta; None without a mechanism."""
    own = recipe.privacy
    if own.mechanism == privacy.NO_MECHANISM or own.delta is None or own.noise_multiplier is None:
        return own.epsilon
    asked = question(recipe, units)
    return accountant.epsilon(asked.spent(own.noise_multiplier), own.delta).value


def finite(value: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else None


def plan(asked: Question, accountants: Sequence[str] = ("rdp",)) -> Plan:
    """Answer a question; the first accountant finds the noise.

    Raises:
        ValueError: if neither or both of epsilon and noise are given.
    """
    if (asked.epsilon is None) == (asked.noise_multiplier is None):
        raise ValueError("give epsilon or noise_multiplier")
    sigma = asked.noise_multiplier
    if asked.epsilon is not None:
        sigma = accountant.noise(
            asked.epsilon, asked.delta, asked.rate, asked.steps, accountants[0], asked.before, asked.shared
        )
    if sigma is None:
        return Plan(asked, None, {}, (), tuple(_warnings(asked, None, None, ())))
    spent = accountant.joined([asked.before, asked.spent(sigma)])
    found = {name: accountant.epsilon(spent, asked.delta, name) for name in accountants}
    signals = tuple(signal(way, numbers, sigma, asked) for way, numbers in asked.numbers.items())
    said = _warnings(asked, sigma, found[accountants[0]].value, signals)
    return Plan(asked, sigma, found, signals, tuple(said))


def signal(way: str, numbers: int, sigma: float, asked: Question) -> Signal:
    """Noise against signal; where all units are drawn in a step, they are what it averages over."""
    step = sigma * asked.share * math.sqrt(numbers) / min(asked.batch, asked.units)
    return Signal(way, numbers, step, step / math.sqrt(asked.steps))


def _warnings(asked: Question, sigma: float | None, epsilon: float | None, signals: Sequence[Signal]) -> list[str]:
    found = []
    if asked.delta >= 1 / asked.units:
        found.append(
            f"delta {asked.delta:g} is not below 1 / {asked.units} {asked.unit}s: giving away one whole {asked.unit} "
            "would count as private"
        )
    if sigma is None:
        found.append(
            f"hopeless: no noise reaches epsilon {asked.epsilon:g} at delta {asked.delta:g} with what was spent "
            "before. Raise epsilon, or use data that was never trained on"
        )
    if epsilon is not None and epsilon > _WEAK_EPSILON:
        found.append(
            f"epsilon {epsilon:.2f} promises little: a {asked.unit}'s presence may shift odds by e^{epsilon:.0f}"
        )
    if asked.unit == "site" and asked.units < _FEW_SITES:
        found.append(
            f"site-level privacy with {asked.units} sites: one site is {100 / asked.units:.0f}% of what is averaged "
            "and must drown in noise, and so does all else. It is for federations of hundreds; use record-level or "
            "patient-level at each site"
        )
    if signals and signals[0].verdict != FAIR:
        found.append(_outlook(signals))
    return found


def _outlook(signals: Sequence[Signal]) -> str:
    first = signals[0]
    text = (
        f"{first.verdict}: a step's noise is {first.step:.1f} clips on a gradient of at most 1, and over the run still "
        f"{first.run:.2f} of the largest possible signal. "
    )
    if first.verdict == HOPELESS:
        return text + "Take more data, fewer trained numbers or a larger epsilon; or train without privacy and say so"
    return text + (
        "Expect a loss of accuracy; more data, larger batches and fewer trained numbers help, and so does a learning "
        "rate of the head that is chosen anew: clipped gradients want a larger one"
    )
