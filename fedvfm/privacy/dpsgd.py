"""One private step: clip the gradient of each unit, sum, add noise, divide by a number that tells nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.config import privacy, schema
from fedvfm.privacy import base, gradients, randomness

_SLACK = 1e-6
"""Rows are clipped to this much less than the clip, so that rounding brings none above it."""

_MOST_UNITS, _ROW_BYTES, NUMBER_BYTES = 16, 1 << 28, 12
"""Units whose gradients are held at a time, what they may take, and what each of their numbers takes."""


def units_held(settings: privacy.RecipePrivacy, numbers: int) -> int:
    """How many units' gradients, of so many numbers each, a step holds at a time."""
    room = _ROW_BYTES // (NUMBER_BYTES * max(numbers, 1))
    return settings.microbatch or max(1, min(_MOST_UNITS, room))


class PrivateSteps:
    """The steps of one round at one site.

    Args:
        way: of the gradients.
        work: what is trained.
        recipe: whose batch and memory options are read.
        event: what the round spends: rate, noise and clip.
        draws: where all randomness comes from.
        longest: None where noise is added here. Where it is added later, most that the sum of clipped gradients is
            long: it is shortened to that in float64, before any rounding.
    """

    def __init__(
        self,
        way: gradients.Way,
        work: base.Work,
        recipe: schema.Recipe,
        event: base.PrivacyEvent,
        draws: randomness.Draws,
        longest: float | None = None,
    ) -> None:
        self.way, self.event = way, event
        self._parameters, self._draws, self._where = work.parameters, draws, work.where
        self._longest = longest
        self._sizes = [one.numel() for one in self._parameters]
        self._numbers = sum(self._sizes)
        # Not the site's own count, where that is smaller: what leaves would tell it.
        self._batch = recipe.optimiser.batch_size
        self._images = recipe.privacy.images_per_patient
        self._held = units_held(recipe.privacy, self._numbers)

    def draw(self, units: int) -> list[int]:
        """Each unit by itself with the event's chance: a Poisson sample, which may be empty."""
        chosen = np.flatnonzero(self._draws.uniform(units) < self.event.sample_rate)
        return [int(one) for one in chosen]

    def choose(self, images: int) -> list[int]:
        """All of a unit's images where they are few, else as many as the recipe says, drawn afresh."""
        if images <= self._images:
            return list(range(images))
        return sorted(int(one) for one in np.argsort(self._draws.uniform(images))[: self._images])

    def gradient(self, units: Sequence[Sequence[Any]], losses: base.Losses) -> None:
        """See base. Without a unit it is noise alone, as it must be: that none was drawn is no one's to know."""
        noisy = self.clipped(units, losses)
        if self._longest is None:
            scale = self.event.noise_multiplier * self.event.clip
            noisy += scale * torch.from_numpy(self._draws.normal(self._numbers)).to(noisy.device)
        else:
            noisy *= min(1.0, self._longest / max(float(torch.linalg.vector_norm(noisy)), 1e-300))
        noisy /= self._batch
        for one, share in zip(self._parameters, torch.split(noisy, self._sizes), strict=True):
            one.grad = share.reshape(one.shape).to(one)

    def clipped(self, units: Sequence[Sequence[Any]], losses: base.Losses) -> Tensor:
        """The sum of the units' clipped gradients. Shapes: (P,), float64."""
        first = self._parameters[0]
        # Apple's GPUs have no float64.
        device = torch.device("cpu") if first.device.type == "mps" else first.device
        total = torch.zeros(self._numbers, dtype=torch.float64, device=device)
        for start in range(0, len(units), self._held):
            some = units[start : start + self._held]
            rows = self.way.rows(some, losses).to(device)
            if rows.shape != (len(some), self._numbers):
                raise errors.TrainingError(
                    f"{self._where}: {len(some)} units gave gradients {tuple(rows.shape)}, not one row each of "
                    f"{self._numbers}; nothing is sent. Report this"
                )
            total += clipped_sum(rows, self.event.clip)
        return total


def clipped_sum(rows: Tensor, clip: float) -> Tensor:
    """Sum of rows that are scaled down to a norm of at most ``clip``, over all their numbers; ``rows`` is changed.

    A row that is not finite, or that rounding leaves above the clip, adds nothing. A refusal would tell of it without
    noise.

    Shapes: (U, P) float32 -> (P,) float64.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    rows[~torch.isfinite(norms)] = 0.0
    factors = (clip * (1 - _SLACK) / norms).nan_to_num(0.0, posinf=1.0).clamp(max=1.0)
    rows *= factors.to(rows.dtype).unsqueeze(1)
    rows[~(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) <= clip)] = 0.0
    return rows.sum(dim=0, dtype=torch.float64)


@contextlib.contextmanager
def opened(
    work: base.Work,
    recipe: schema.Recipe,
    event: base.PrivacyEvent,
    draws: randomness.Draws,
    *,
    hooks: bool | None = None,
    longest: float | None = None,
) -> Iterator[PrivateSteps]:
    """The steps of a round, on a model that nothing stays in afterwards; ``hooks``: see :func:`gradients.opened`."""
    with gradients.opened(work, hooks=hooks) as way:
        yield PrivateSteps(way, work, recipe, event, draws, longest)
