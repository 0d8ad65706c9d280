"""What a classification of images or cases answers with: head, loss, metrics, row of a prediction.

A head computes numbers; a target says how many, what they mean and how far they are from the truth. No sample's loss
depends on another's but by the weighted mean of one class, so that one gradient a sample is what it is alone; but for
Cox's, which compares the cases of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedvfm import registry
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as samples
from fedvfm.tasks import base, metrics, survival_metrics, target_metrics

TABLE = registry.Table(
    "target",
    {
        "class": "fedvfm.tasks.targets:OneClass",
        "cox": "fedvfm.tasks.targets:Cox",
        "multi-label": "fedvfm.tasks.targets:MultiLabel",
        "ordinal": "fedvfm.tasks.targets:Ordinal",
        "regression": "fedvfm.tasks.targets:Regression",
        "survival": "fedvfm.tasks.targets:Survival",
    },
)

LEAST_AT_RISK = 2
"""Cases of a step that can be compared at all."""


class Target:
    """Base of all targets.

    Args:
        recipe: the resolved recipe.
    """

    def __init__(self, recipe: schema.Recipe) -> None:
        self.recipe = recipe
        self.names = recipe.data.class_names

    @property
    def outputs(self) -> int:
        """How many numbers the head computes."""
        return len(self.names)

    @property
    def width(self) -> int:
        """How many numbers the task gives of a sample."""
        return len(self.names)

    def head(self, inner: nn.Module) -> nn.Module:
        """The head whose numbers are as :meth:`answers` and :meth:`losses` take them.

        Args:
            inner: a head with :attr:`outputs` numbers.
        """
        return inner

    def faults(self) -> list[str]:
        """What is wrong with the recipe for this target, one sentence a fault."""
        return self.recipe.target.faults(self.names)

    def private_faults(self) -> list[str]:
        """Why no gradient can be clipped for one record or patient, one sentence a fault."""
        return []

    def target(self, truth: samples.Truth) -> Any:
        """What the loss compares one sample with.

        Raises:
            DataError: without a truth.
        """
        raise NotImplementedError

    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """A scalar, mean over the batch."""
        return self.losses(numbers, target).mean()

    def losses(self, numbers: Tensor, target: Tensor) -> Tensor:
        """One loss each, of that sample alone. Shapes: (B,)."""
        raise NotImplementedError

    def scores(self) -> metrics.MetricSet:
        """An empty metric set."""
        raise NotImplementedError

    def add(self, into: Any, sample_id: str, numbers: Tensor, truth: samples.Truth, part: metrics.Part | None) -> None:
        """Add one sample's numbers to the metric set. Shapes: numbers (K,).

        Raises:
            DataError: without a truth.
        """
        raise NotImplementedError

    def answers(self, numbers: Tensor) -> Tensor:
        """What is told of a sample: probabilities, or values in their units; the mean of a volume's slices is one too.

        Shapes: (K,) -> (K,), float64.
        """
        raise NotImplementedError

    def row(self, answers: Tensor) -> dict[str, Any]:
        """The same as a prediction's row holds it."""
        raise NotImplementedError

    def drawn(self, number: int) -> dict[str, Any]:
        """The truth of a drawn sample of no site, by the field of :class:`fedvfm.data.sample.Sample`."""
        raise NotImplementedError


class OneClass(Target):
    """One of several classes: softmax and cross entropy, weighted by the recipe's public weights.

    Shapes: numbers (B, K), target (B,) of class numbers.
    """

    def faults(self) -> list[str]:
        """See Target."""
        return [*super().faults(), *base.class_weight_faults(self.recipe)]

    def target(self, truth: samples.Truth) -> Any:
        """See Target."""
        return _label(truth, "a sample without a label")

    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """See Target."""
        return nn.functional.cross_entropy(numbers.float(), target, weight=self._weights(numbers.device))

    def losses(self, numbers: Tensor, target: Tensor) -> Tensor:
        """See Target. Of one sample alone a weighted mean knows no weight: that of its class stands beside the mean's.

        The mean is over the classes, not over the samples, which would tie one to another.
        """
        weight = self._weights(numbers.device)
        own = nn.functional.cross_entropy(numbers.float(), target, weight=weight, reduction="none")
        return own if weight is None else own / weight.mean()

    def _weights(self, device: torch.device) -> Tensor | None:
        weights = self.recipe.task.class_weights
        return torch.tensor(weights, device=device) if weights else None

    def scores(self) -> metrics.MetricSet:
        """See Target."""
        return metrics.ClassificationScores(self.names)

    def add(self, into: Any, sample_id: str, numbers: Tensor, truth: samples.Truth, part: metrics.Part | None) -> None:
        """See Target."""
        label = _label(truth, f"sample '{sample_id}' has no label to score against")
        into.add(sample_id, numbers.float().softmax(dim=0).cpu().double().numpy(), label, part)

    def answers(self, numbers: Tensor) -> Tensor:
        """See Target."""
        return numbers.double().softmax(dim=0)

    def row(self, answers: Tensor) -> dict[str, Any]:
        """See Target."""
        chances = {name: round(float(chance), 6) for name, chance in zip(self.names, answers, strict=True)}
        return {"class": self.names[int(answers.argmax())], "probabilities": chances}

    def drawn(self, number: int) -> dict[str, Any]:
        """See Target."""
        return base.heaviest(self.recipe, number)


class Ordinal(OneClass):
    """Grades in their order, the lowest first, by the chance of going on from each grade to the next.

    The head computes K - 1 numbers z, where sigmoid(z_k) = P(y > k | y >= k); P(y = k) is made of them, so the chances
    of all grades are never at odds with their order. The loss is their likelihood, a sum over samples.

    Source: Shi, Cao and Raschka, "Deep Neural Networks for Rank-Consistent Ordinal Regression Based On Conditional
        Probabilities" (CORN), arXiv 2111.08851, eqs. (4) to (7), each sample counted once; the continuation-ratio model
        of Fienberg, "The Analysis of Cross-Classified Categorical Data", 1980.
    """

    @property
    def outputs(self) -> int:
        """See Target."""
        return len(self.names) - 1

    def head(self, inner: nn.Module) -> nn.Module:
        """See Target."""
        return Ladder(inner)

    def scores(self) -> metrics.MetricSet:
        """See Target."""
        return target_metrics.OrdinalScores(self.names)


class OfColumns(Target):
    """Base of the targets that are columns of the table, any of which may be missing.

    A missing truth adds nothing to the loss, which is divided by the number of columns all the same: by a constant.

    Shapes: numbers (B, K), target (B, 2 K): which truths are known (1, else 0), then the truths.
    """

    def faults(self) -> list[str]:
        """See Target."""
        return [*super().faults(), *no_classes(self.recipe)]

    def target(self, truth: samples.Truth) -> Any:
        """See Target."""
        values = _values(truth, "a sample without values", len(self.names))
        known = [value is not None for value in values]
        return np.array([*known, *(value or 0.0 for value in values)], dtype=np.float32)

    def losses(self, numbers: Tensor, target: Tensor) -> Tensor:
        """See Target."""
        known, truth = target.chunk(2, dim=1)
        return (known * self._each(numbers.float(), truth)).sum(dim=1) / len(self.names)

    def _each(self, numbers: Tensor, truth: Tensor) -> Tensor:
        """One loss a sample and column. Shapes: (B, K)."""
        raise NotImplementedError

    def add(self, into: Any, sample_id: str, numbers: Tensor, truth: samples.Truth, part: metrics.Part | None) -> None:
        """See Target."""
        values = _values(truth, f"sample '{sample_id}' has no values", len(self.names))
        into.add(sample_id, self.answers(numbers).cpu().numpy(), values, part)


class MultiLabel(OfColumns):
    """Labels of which each is there or not, independently: sigmoid and binary cross entropy.

    With a public prevalence p, yes counts 1 / (2 p) and no 1 / (2 (1 - p)), so both weigh alike where the data are as
    stated; the numbers are shifted back by the logarithm of p / (1 - p), so their sigmoid still is a probability.
    """

    def __init__(self, recipe: schema.Recipe) -> None:
        super().__init__(recipe)
        self._prevalence = recipe.target.prevalence or (0.5,) * len(self.names)

    def head(self, inner: nn.Module) -> nn.Module:
        """See Target."""
        return Affine(inner, [1.0] * len(self.names), [math.log(p / (1 - p)) for p in self._prevalence])

    def _each(self, numbers: Tensor, truth: Tensor) -> Tensor:
        chance = numbers.new_tensor(self._prevalence)
        shifted = numbers - torch.logit(chance)
        yes, no = nn.functional.softplus(-shifted) / (2 * chance), nn.functional.softplus(shifted) / (2 * (1 - chance))
        return truth * yes + (1 - truth) * no

    def scores(self) -> metrics.MetricSet:
        """See Target."""
        return target_metrics.MultiLabelScores(self.names, self.recipe.target.prevalence)

    def answers(self, numbers: Tensor) -> Tensor:
        """See Target."""
        return numbers.double().sigmoid()

    def row(self, answers: Tensor) -> dict[str, Any]:
        """See Target."""
        return {"values": {f"p_{name}": round(float(p), 6) for name, p in zip(self.names, answers, strict=True)}}

    def drawn(self, number: int) -> dict[str, Any]:
        """See Target."""
        return {"values": tuple(float((number + at) % 2) for at in range(len(self.names)))}


class Regression(OfColumns):
    """Numbers: the squared error in units of the recipe's public scales.

    The head's numbers are standardised; what it gives is in the columns' own units, so an exported graph answers in
    them too.
    """

    def head(self, inner: nn.Module) -> nn.Module:
        """See Target."""
        return Affine(inner, self.recipe.target.scales, self.recipe.target.centres)

    def _each(self, numbers: Tensor, truth: Tensor) -> Tensor:
        return ((numbers - truth) / numbers.new_tensor(self.recipe.target.scales)).square()

    def scores(self) -> metrics.MetricSet:
        """See Target."""
        return target_metrics.RegressionScores(self.names, self.recipe.target.ranges)

    def answers(self, numbers: Tensor) -> Tensor:
        """See Target."""
        return numbers.double()

    def row(self, answers: Tensor) -> dict[str, Any]:
        """See Target."""
        return {"values": {name: float(f"{float(value):.6g}") for name, value in zip(self.names, answers, strict=True)}}

    def drawn(self, number: int) -> dict[str, Any]:
        """See Target."""
        ends = [bounds[number % 2] for bounds in self.recipe.target.ranges]
        return {"values": tuple(ends)}


class Survival(Target):
    """Time until an event in the public intervals of ``recipe.target.bins``: a chance of going through each of them.

    The head computes J numbers z, where sigmoid(z_j) is the chance of no event in interval j of those who reached it. A
    case with an event in interval j counts -log P(event in j); one that is censored -log P(no event in the intervals it
    went through), of which the last counts from its middle on; follow-up beyond the last end counts as going through
    all. This loss is a sum over cases, which no batch and no site changes.

    Shapes: numbers (B, J + 1), logarithms of the chances of an event in each interval and of none; target (B, 2): the
        interval of the event (or how many were gone through), and whether there was an event.
    Source: Gensheimer and Narasimhan, "A scalable discrete-time survival model for neural networks", PeerJ 7:e6257,
        2019, eqs. (1) to (3).
    """

    @property
    def outputs(self) -> int:
        """See Target."""
        return len(self.recipe.target.bins)

    @property
    def width(self) -> int:
        """See Target."""
        return self.outputs + 1

    def head(self, inner: nn.Module) -> nn.Module:
        """See Target."""
        return Ladder(inner)

    def faults(self) -> list[str]:
        """See Target."""
        return [*super().faults(), *no_classes(self.recipe)]

    def target(self, truth: samples.Truth) -> Any:
        """See Target."""
        time, event = _known(truth, "a sample without values")
        ends = np.asarray(self.recipe.target.bins)
        if event and time <= ends[-1]:
            return np.array([int(np.searchsorted(ends, time, side="left")), 1], dtype=np.int64)
        middles = (np.concatenate([[0.0], ends[:-1]]) + ends) / 2
        return np.array([len(ends) if event else int((middles <= time).sum()), 0], dtype=np.int64)

    def losses(self, numbers: Tensor, target: Tensor) -> Tensor:
        """See Target."""
        numbers = numbers.float()
        through = numbers.flip(1).logcumsumexp(1).flip(1)
        at, event = target[:, :1], target[:, 1] > 0
        return -torch.where(event, numbers.gather(1, at)[:, 0], through.gather(1, at)[:, 0])

    def scores(self) -> metrics.MetricSet:
        """See Target."""
        return survival_metrics.SurvivalScores(self.names, self.recipe.target.bins)

    def add(self, into: Any, sample_id: str, numbers: Tensor, truth: samples.Truth, part: metrics.Part | None) -> None:
        """See Target."""
        known = _known(truth, f"sample '{sample_id}' has no values")
        into.add(sample_id, self.answers(numbers).cpu().numpy(), known, part)

    def answers(self, numbers: Tensor) -> Tensor:
        """See Target: the chance of no event up to each end. Shapes: (J + 1,) -> (J,)."""
        return (1 - numbers.double().softmax(dim=0)[:-1].cumsum(0)).clamp(0.0, 1.0)

    def row(self, answers: Tensor) -> dict[str, Any]:
        """See Target; ``risk`` is 1 minus the mean over the ends: what orders cases."""
        chances = {
            f"survival_{end:g}": round(float(p), 6) for end, p in zip(self.recipe.target.bins, answers, strict=True)
        }
        return {"values": {"risk": round(1 - float(answers.mean()), 6), **chances}}

    def drawn(self, number: int) -> dict[str, Any]:
        """See Target."""
        ends = self.recipe.target.bins
        return {"values": (ends[-1], 0.0) if number % 2 else (ends[0], 1.0)}


class Cox(Target):
    """Time until an event by one number a case, the logarithm of its hazard ratio, under Cox's partial likelihood.

    The loss of a step is the mean over its events of minus the logarithm of the chance that the case with the event is
    the one of all that were still at risk then: the risk set is that of the cases of the step, ties are Efron's. So it
    is no sum over cases, and changes with what is drawn together; a step without an event, or in which nobody else was
    at risk, has loss and gradient 0. Cases are compared with others of their own site alone: averaged over sites it is
    a model stratified by site, each with a baseline hazard of its own, which is not estimated.

    Shapes: numbers (B, 1); target (B, 2): the time, as :func:`_ordered`, and whether there was an event.
    Sources: Cox, "Regression models and life-tables", Journal of the Royal Statistical Society B 34, 1972; Efron, "The
        efficiency of Cox's likelihood function for censored data", JASA 72, 1977; risk sets of a step: Kvamme, Borgan
        and Scheel, "Time-to-event prediction with neural networks and Cox regression", JMLR 20, 2019, section 3.1.
    """

    @property
    def outputs(self) -> int:
        """See Target."""
        return 1

    @property
    def width(self) -> int:
        """See Target."""
        return 1

    def faults(self) -> list[str]:
        """See Target."""
        wrong = [*super().faults(), *no_classes(self.recipe)]
        if self.recipe.optimiser.batch_size < LEAST_AT_RISK:
            wrong.append(
                f"recipe.optimiser.batch_size = {self.recipe.optimiser.batch_size}: target 'cox' compares the cases "
                f"of a step, and one alone has nothing to learn from; give at least {LEAST_AT_RISK}, better 32 or "
                "more, or use target 'survival'"
            )
        return wrong

    def private_faults(self) -> list[str]:
        """See Target."""
        return [
            f"recipe.privacy.mechanism = '{self.recipe.privacy.mechanism}': the loss of target 'cox' compares cases "
            "and is no sum over them, so what one case adds cannot be clipped; use target 'survival', whose loss is "
            "one, or a mechanism of the whole site"
        ]

    def target(self, truth: samples.Truth) -> Any:
        """See Target."""
        time, event = _known(truth, "a sample without values")
        return np.array([_ordered(time), event > 0], dtype=np.int64)

    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """See Target: the mean over the events of the batch."""
        return partial_likelihood(numbers.float()[:, 0], target[:, 0], target[:, 1] > 0)

    def scores(self) -> metrics.MetricSet:
        """See Target."""
        return survival_metrics.CoxScores(self.names, self.recipe.target.bins[-1])

    def add(self, into: Any, sample_id: str, numbers: Tensor, truth: samples.Truth, part: metrics.Part | None) -> None:
        """See Target."""
        known = _known(truth, f"sample '{sample_id}' has no values")
        into.add(sample_id, self.answers(numbers).cpu().numpy(), known, part)

    def answers(self, numbers: Tensor) -> Tensor:
        """See Target: the logarithm of the hazard ratio. Shapes: (1,) -> (1,)."""
        return numbers.double()

    def row(self, answers: Tensor) -> dict[str, Any]:
        """See Target."""
        return {"values": {"log_risk": round(float(answers[0]), 6)}}

    def drawn(self, number: int) -> dict[str, Any]:
        """See Target."""
        end = self.recipe.target.bins[-1]
        return {"values": (end, 0.0) if number % 2 else (end / 2, 1.0)}


def partial_likelihood(log_risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Minus the logarithm of Cox's partial likelihood with Efron's ties, mean over events; 0 without any.

    Of d events at one time the l-th (from 0) has a risk set without the share l / d of each of the d. Memory grows with
    the square of the number of cases.

    Shapes: log_risk, time, event (B,); time of any type that orders.
    """
    if not bool(event.any()):
        return log_risk.sum() * 0.0
    own = time[event, None]
    among_events = own == own.T
    share = among_events.tril(-1).sum(dim=1, keepdim=True) / among_events.sum(dim=1, keepdim=True)
    counted = (time >= own).to(log_risk.dtype) - share * (event & (time == own))
    return (torch.logsumexp(log_risk + counted.log(), dim=1) - log_risk[event]).mean()


class _Around(nn.Module):
    """A head around another one, whose parameters it has; what the answer rests on is the inner head's to say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def weights(self, cases: Any) -> Tensor:
        """See :meth:`fedvfm.tasks.case_heads.CaseHead.weights`."""
        weights: Tensor = self.inner.weights(cases)  # type: ignore[operator]
        return weights


class Affine(_Around):
    """The numbers of a head times ``scale`` plus ``shift``, in float32. Shapes: (B, K), scale and shift K numbers."""

    def __init__(self, inner: nn.Module, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__(inner)
        self._scale, self._shift = tuple(scale), tuple(shift)

    def forward(self, given: Any, *rows: Tensor | None) -> Tensor:
        """See the class."""
        numbers: Tensor = self.inner(given, *rows).float()
        return numbers * numbers.new_tensor(self._scale) + numbers.new_tensor(self._shift)


class Ladder(_Around):
    """From K - 1 chances of going on to the logarithms of the chances of K grades. Shapes: (B, K - 1) -> (B, K)."""

    def forward(self, given: Any, *rows: Tensor | None) -> Tensor:
        """See the class."""
        numbers = self.inner(given, *rows).float()
        on, stay = -nn.functional.softplus(-numbers), -nn.functional.softplus(numbers)
        reached = torch.cumsum(torch.cat([torch.zeros_like(on[:, :1]), on], dim=1), dim=1)
        return reached + torch.cat([stay, torch.zeros_like(stay[:, :1])], dim=1)


def _known(truth: samples.Truth, what: str) -> tuple[float, float]:
    """Time and event."""
    time, event = _values(truth, what, 2)
    if time is None or event is None:
        raise defect.LABEL_MISSING.error(f"{what} of time and event; fill its row of the table in, or leave it out")
    return time, event


def _ordered(time: float) -> int:
    """A time of 0 or more as a whole number: two of them are in the same order, and equal where the times are.

    Those are the bits of the float64 number, which no device without float64 has to round.
    """
    return int(np.float64(time + 0.0).view(np.int64))


def no_classes(recipe: schema.Recipe) -> list[str]:
    """What weighs or balances classes, where the target has none; one sentence a fault."""
    settings, kind = recipe.task, recipe.target.kind
    instead = "use recipe.target.prevalence" if kind == "multi-label" else "leave it out"
    wrong = []
    if settings.class_weights:
        wrong.append(f"recipe.task.class_weights: target '{kind}' has no classes to weigh; {instead}")
    if settings.options.get("sampling", "uniform") != "uniform":
        wrong.append(f"recipe.task.options.sampling: target '{kind}' has no classes to balance; {instead}")
    return wrong


def _label(truth: samples.Truth, what: str) -> int:
    if not isinstance(truth, int):
        raise defect.LABEL_MISSING.error(f"{what}; give every image, or every case, a class")
    return truth


def _values(truth: samples.Truth, what: str, count: int) -> Sequence[float | None]:
    if truth is None or isinstance(truth, int) or len(truth) != count:
        raise defect.LABEL_MISSING.error(
            f"{what} of the columns that recipe.data.class_names names; fill its row of the table in"
        )
    return truth


def described(recipe: schema.Recipe) -> Mapping[str, str]:
    """Column -> how a number of it is read: its unit, or that it is a probability; empty of a class or a grade."""
    if recipe.target.kind == "multi-label":
        return dict.fromkeys(recipe.data.class_names, "probability")
    units = recipe.target.units or ("",) * len(recipe.data.class_names)
    return dict(zip(recipe.data.class_names, units, strict=True)) if recipe.target.kind == "regression" else {}
