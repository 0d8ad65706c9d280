"""Training of a student by a teacher's answers: what the teacher says of each image is computed once and kept in files.

Both see the same images as they are. The student fits the teacher's probabilities at a temperature, in segmentation
also the overlap of the soft masks, and, where its backbone trains, the teacher's last features through a linear
projection that is thrown away afterwards.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2 (soft
targets, gradients times T squared); Romero et al., "FitNets", ICLR 2015 (features through a regressor).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedvfm import errors, seeding
from fedvfm.backbones import base as backbones
from fedvfm.config import rates, schema
from fedvfm.data import transforms
from fedvfm.inference import delivery, images
from fedvfm.model import adapted_model, feature_cache
from fedvfm.report import progress
from fedvfm.tasks import segmentation

LARGEST = 6e4
"""Masks and features are kept in half precision; beyond this they are cut. Answers that are no masks are float32."""
KINDS = {
    "class": "soft",
    "cox": "values",
    "multi-label": "sides",
    "ordinal": "soft",
    "regression": "values",
    "survival": "soft",
}
"""Target -> how answers are compared: probabilities of one of several, of each label, or values."""


@dataclass(frozen=True)
class Settings:
    """How a student is fitted.

    Attributes:
        temperature: that both answers are divided by before they are compared.
        features: weight of the features' loss beside that of the answers; 0 leaves them out.
        seed: of the first weights and of the order of images.
        cache_mib: memory for what the student's frozen blocks make of the images.
    """

    temperature: float = 2.0
    features: float = 0.5
    seed: int = 0
    cache_mib: int = 1024

    def __post_init__(self) -> None:
        faults = []
        if not 0.1 <= self.temperature <= 100:
            faults.append(f"--temperature {self.temperature:g}: give a number from 0.1 to 100")
        if not 0 <= self.features <= 100:
            faults.append(f"--features {self.features:g}: give a weight from 0 (left out) to 100")
        if not 0 <= self.seed < 2**63:
            faults.append(f"--seed {self.seed}: give a number from 0 to 9223372036854775807")
        if faults:
            raise errors.ConfigError("distil", faults)


@dataclass(frozen=True)
class Targets:
    """What is known of images, in files.

    Shapes: images (N, 3, h, w) as the student takes them, not normalised; answers (N, K, h, w) or (N, K); features
    (N, D, gh, gw) or (N, D), of the teacher, or None.
    """

    images: NDArray[np.float32]
    answers: NDArray[np.floating]
    features: NDArray[np.floating] | None


@torch.no_grad()
def targets(
    teacher: adapted_model.AdaptedModel,
    student: adapted_model.AdaptedModel,
    reader: images.Images,
    places: Sequence[images.Place],
    folder: Path,
    *,
    with_features: bool,
    observer: progress.Observer,
) -> Targets:
    """The teacher's answers for images, kept in ``folder``.

    Raises:
        DataError: if an image cannot be used.
        StorageError: if the disk has no room.
    """
    teacher, known = delivery.exact(teacher).eval(), None
    size, classes = student.recipe.data.input_size, len(student.recipe.data.class_names)
    for at, place in enumerate(places):
        observer("input", name=f"teacher: {place.name}", index=at, count=len(places))
        pixels = reader.at(place)
        shown = transforms.prepare(pixels, teacher.recipe.data, classes, multiple=teacher.backbone.patch).image
        own = transforms.prepare(pixels, student.recipe.data, classes, multiple=student.backbone.patch).image
        seen = teacher.features(_normalised(shown[None], teacher))
        logits = teacher.head(seen).float()
        if delivery.dense(teacher):
            logits = backbones.resize(logits, size) if tuple(logits.shape[2:]) != tuple(size) else logits
        last = (seen.grids[-1] if delivery.dense(teacher) else seen.pooled).float() if with_features else None
        if known is None:
            known = _files(folder, len(places), own.shape, logits.shape[1:], None if last is None else last.shape[1:])
        known.images[at] = own
        kept = logits[0].clamp(-LARGEST, LARGEST) if delivery.dense(teacher) else logits[0]
        known.answers[at] = kept.cpu().numpy()
        if known.features is not None and last is not None:
            known.features[at] = last[0].clamp(-LARGEST, LARGEST).cpu().numpy()
    if known is None:
        raise ValueError("no image")
    return known


def fit(
    student: adapted_model.AdaptedModel,
    known: Targets,
    chosen: Sequence[int],
    settings: Settings,
    observer: progress.Observer,
) -> list[float]:
    """Train the student on chosen images; the mean loss of each epoch.

    Raises:
        TrainingError: if a loss is not finite.
    """
    optimiser_settings, epochs = student.recipe.optimiser, student.recipe.optimiser.local_epochs
    torch.manual_seed(seeding.torch_seed(settings.seed, "distil"))
    projection = _projection(student, known)
    groups = student.trainable()
    head_rate = optimiser_settings.head_learning_rate or optimiser_settings.learning_rate
    rows = [(groups["adapter"], optimiser_settings.learning_rate), (groups["head"], head_rate)]
    if projection is not None:
        rows.append((list(projection.parameters()), optimiser_settings.learning_rate))
    optimiser = torch.optim.AdamW(
        [{"params": own, "lr": rate, "base": rate} for own, rate in rows if own],
        weight_decay=optimiser_settings.weight_decay,
    )
    cache = feature_cache.FeatureCache(settings.cache_mib * feature_cache.MIB)
    student.train()
    batch = optimiser_settings.batch_size
    steps, losses = math.ceil(len(chosen) / batch), []
    for epoch in range(epochs):
        observer("input", name=f"student: pass {epoch + 1}", index=epoch, count=epochs)
        order = seeding.stream(settings.seed, "distil", "order", epoch).permutation(len(chosen))
        total = 0.0
        for step in range(steps):
            share = (epoch * steps + step) / (epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * rates.factor(optimiser_settings, share)
            some = [chosen[at] for at in order[step * batch : (step + 1) * batch]]
            value = _loss(student, known, some, settings, projection, cache)
            if not torch.isfinite(value):
                raise errors.TrainingError(
                    f"distil: the loss is {float(value)} in pass {epoch + 1}. Lower it: --set optimiser.learning_rate="
                    f"{optimiser_settings.learning_rate / 4:g}"
                )
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            if optimiser_settings.clip_norm:
                trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(trained, optimiser_settings.clip_norm)
            optimiser.step()
            total += float(value.detach()) * len(some)
        losses.append(total / len(chosen))
    student.eval()
    return losses


@torch.no_grad()
def answers(student: adapted_model.AdaptedModel, known: Targets, chosen: Sequence[int]) -> list[Tensor]:
    """The student's logits of images. Shapes: (K, h, w) or (K,) each."""
    student.eval()
    return [student(_normalised(known.images[at][None], student))[0].float().cpu() for at in chosen]


def _files(
    folder: Path, count: int, image: Sequence[int], answer: Sequence[int], feature: Sequence[int] | None
) -> Targets:
    """Empty arrays on disk, readable by this user alone.

    Raises:
        StorageError: if they do not fit: a file that grows in memory's place ends the process where the disk is full.
    """
    kind = np.float16 if len(answer) > 1 else np.float32
    need = count * (4 * math.prod(image) + np.dtype(kind).itemsize * math.prod(answer) + 2 * math.prod(feature or (0,)))
    free = shutil.disk_usage(folder).free
    if need * 1.05 > free:
        raise errors.StorageError(
            f"distil keeps the teacher's answers in {folder.parent}: {need / 2**20:,.0f} MiB, and {free / 2**20:,.0f} "
            "MiB are free. Set TMPDIR to a larger disk, or give fewer images with --most"
        )

    def array(name: str, shape: Sequence[int], kind: type[np.floating]) -> NDArray[np.floating]:
        return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(count, *shape))

    return Targets(
        array("images", image, np.float32),
        array("answers", answer, kind),
        None if feature is None else array("features", feature, np.float16),
    )


def _normalised(prepared: NDArray[np.float32], model: adapted_model.AdaptedModel) -> Tensor:
    return torch.from_numpy(transforms.normalise(prepared, model.recipe.data)).to(model.device)


def _projection(student: adapted_model.AdaptedModel, known: Targets) -> nn.Module | None:
    """From the student's features to the teacher's; None where no features are fitted."""
    if known.features is None:
        return None
    width = known.features.shape[1]
    with torch.no_grad():
        seen = student.features(_normalised(known.images[:1], student))
    if known.features.ndim == 4:
        return nn.Conv2d(seen.grids[-1].shape[1], width, 1).to(student.device)
    return nn.Linear(seen.pooled.shape[1], width).to(student.device)


def _prefixes(
    student: adapted_model.AdaptedModel, prepared: NDArray[np.float32], cache: feature_cache.FeatureCache
) -> backbones.Prefix | None:
    """What the student's frozen blocks make of images, each computed once where there is memory."""
    if student.frozen_blocks == 0 or not cache.enabled:
        return None
    each = [
        cache.features(image, "student", lambda image=image: student.frozen_prefix(_normalised(image[None], student)))  # type: ignore[misc]
        for image in prepared
    ]
    return feature_cache.joined(each, student.device)


def _loss(
    student: adapted_model.AdaptedModel,
    known: Targets,
    some: Sequence[int],
    settings: Settings,
    projection: nn.Module | None,
    cache: feature_cache.FeatureCache,
) -> Tensor:
    prepared = np.stack([known.images[at] for at in some])
    seen = student.features(_normalised(prepared, student), _prefixes(student, prepared, cache))
    taught = torch.from_numpy(np.stack([known.answers[at] for at in some]).astype(np.float32)).to(student.device)
    loss = of_answers(student.head(seen).float(), taught, student.recipe, settings.temperature)
    if projection is None or known.features is None:
        return loss
    other = torch.from_numpy(np.stack([known.features[at] for at in some]).astype(np.float32)).to(student.device)
    own: Tensor = projection(seen.grids[-1] if other.ndim == 4 else seen.pooled)
    if other.ndim == 4 and own.shape[2:] != other.shape[2:]:
        own = backbones.resize(own, other.shape[2:])
    return loss + settings.features * (1 - nn.functional.cosine_similarity(own, other, dim=1)).mean()


def of_answers(own: Tensor, taught: Tensor, recipe: schema.Recipe, temperature: float) -> Tensor:
    """How far the student's answers are from the teacher's; 0 where they are the same.

    Segmentation: the recipe's weights of cross entropy and Dice, for the divergence of the probabilities at the
    temperature and for 1 - Dice of the soft masks, with squares (V-Net), which alone is 0 for equal soft masks. Several
    labels: binary divergence at the temperature. Values: squared error in the recipe's scales; a risk has none.

    Shapes: (B, K, h, w) or (B, K) both; a scalar.
    """
    kind = KINDS[recipe.target.kind]
    if kind == "values":
        return ((own - taught) / own.new_tensor(recipe.target.scales or (1.0,))).square().mean()
    if kind == "sides":
        soft = (taught / temperature).sigmoid()
        loss = nn.functional.binary_cross_entropy_with_logits(own / temperature, soft)
        least = nn.functional.binary_cross_entropy(soft, soft)
        return (loss - least) * temperature**2
    wanted = (taught / temperature).log_softmax(dim=1)
    apart = nn.functional.kl_div((own / temperature).log_softmax(dim=1), wanted, reduction="none", log_target=True)
    divergence = apart.sum(dim=1).mean() * temperature**2
    if own.ndim == 2:
        return divergence
    masks, truth = own.softmax(dim=1)[:, 1:], taught.softmax(dim=1)[:, 1:]
    over = (0, 2, 3) if recipe.task.dice == "batch" else (2, 3)
    both, sizes = (masks * truth).sum(dim=over), (masks.square() + truth.square()).sum(dim=over)
    dice = 1 - (2 * both + segmentation.SMOOTH) / (sizes + segmentation.SMOOTH)
    return recipe.task.ce_weight * divergence + recipe.task.dice_weight * dice.mean()
