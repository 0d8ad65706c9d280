"""Real training steps on the hospital's own images, and from their time that of a round."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedvfm import errors
from fedvfm.backbones import weights
from fedvfm.client.training import evaluator, trainer
from fedvfm.client.training import site as sites
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as samples
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.readiness import finding
from fedvfm.model import adapted_model
from fedvfm.state import groups

ROUND_TIMEOUT_S = schema.ServerConfig().round_timeout_s
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured, and what follows from it.

    Attributes:
        first_s: the first step, files and kernels cold.
        step_s: the second step.
        image_s: prediction of one whole image.
        steps: training steps of a round.
        round_s: expected time of a round: its steps, and validation where the recipe validates. What a cache of
            prepared images saves in later rounds is not counted.
        gpu_mib: highest GPU memory of the steps, or None.
    """

    first_s: float
    step_s: float
    image_s: float
    steps: int
    round_s: float
    gpu_mib: float | None

    def as_json(self) -> dict[str, Any]:
        """The numbers, rounded."""
        return {key: round(value, 3) if value is not None else None for key, value in dataclasses.asdict(self).items()}


def measure(
    recipe: schema.Recipe,
    site: schema.SiteConfig,
    source: samples.Source,
    usable: Mapping[str, Sequence[samples.Sample]],
    counts: Mapping[str, int],
    device: str,
) -> tuple[Timing | None, list[finding.Finding], str]:
    """Two real training steps and one prediction.

    Args:
        recipe: at the site's own rank.
        site: the hospital's settings.
        source: where images are read.
        usable: samples by split, those that were read.
        counts: how many there are in all.
        device: where to compute.

    Returns:
        The timing where it went well, findings, and the full text of an error (for the hospital's eyes only).
    """
    try:
        model = adapted_model.AdaptedModel(recipe, device=device)
        timing = _timed(model, site, source, usable, counts)
    except Exception as error:
        # Whatever breaks here would break in the federation; the check itself must end with its report.
        return None, [_failed(error)], f"{type(error).__name__}: {error}"
    slow = []
    if timing.round_s > ROUND_TIMEOUT_S:
        problem = f"a round would take about {timing.round_s / 3600:.1f} hours here"
        slow.append(finding.make("round-slow", problem))
    return timing, slow, ""


def _failed(error: Exception) -> finding.Finding:
    """A finding without the error's text where that may name a file."""
    if isinstance(error, errors.DataError):
        return finding.make("step-failed", f"an image could not be prepared for training ({defect.of(error)})")
    import torch

    if isinstance(error, errors.FedvfmError | torch.OutOfMemoryError):
        lines = str(error).splitlines() or ["no message"]
        return finding.make("step-failed", f"{type(error).__name__}: {lines[0][:300]}")
    return finding.make("step-failed", f"{type(error).__name__} in the training step")


def _timed(
    model: adapted_model.AdaptedModel,
    site: schema.SiteConfig,
    source: samples.Source,
    usable: Mapping[str, Sequence[samples.Sample]],
    counts: Mapping[str, int],
) -> Timing:
    train, val, test = (tuple(usable[name]) for name in ("train", "val", "test"))
    without = site.without_labels
    hospital = virtual_hospitals.Hospital(site.name, source, train, val, test, without_labels=without)
    public = 0 if site.privacy is None else site.privacy.units or 0
    node = sites.Site(site.name, hospital, device=model.device, units=public)
    _reset_peak(model.device)
    first, second = trainer.trial(model, node, steps=2)
    model.eval()
    shown = [*val, *test, *train][0]
    started = time.monotonic()
    evaluator.answer(model, node, shown)
    image_s = time.monotonic() - started
    settings = model.recipe.optimiser
    steps = math.ceil(counts["train"] / settings.batch_size) * settings.local_epochs
    validated = counts["val"] if model.recipe.evaluation.every else 0
    training_s = min(steps * second, 60.0 * settings.round_minutes or math.inf)
    training_s *= 2 if model.recipe.personal.kind in groups.BESIDE else 1
    training_s += counts["train"] * image_s if without else 0.0  # the adapter answers for each image first
    round_s = training_s + validated * image_s
    return Timing(first, second, image_s, steps, round_s, _peak(model.device))


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return float(torch.cuda.max_memory_allocated(device)) / MIB


def missing_weights(recipe: schema.Recipe, shapes: adapted_model.AdaptedModel) -> list[finding.Finding]:
    """A finding where the backbone's weights are not on this machine, or not the pinned ones. Downloads nothing."""
    if not shapes.backbone.pretrained:
        return []
    try:
        weights.locate(recipe.backbone, download=False)
    except errors.WeightsError as error:
        return [finding.make("weights-missing", str(error), remedy=weights.remedy(recipe.backbone))]
    return []
