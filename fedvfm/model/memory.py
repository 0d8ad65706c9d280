"""How much memory and disk a site or a run needs, from shapes, before anything is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedvfm.backbones import base as backbones
from fedvfm.config import privacy, schema
from fedvfm.model import adapted_model, feature_cache, precision, shape_rules, sliding_window
from fedvfm.privacy import dpsgd
from fedvfm.tasks import case_classification, case_heads

MIB = 1 << 20

BASE_MIB = 490.0
"""Memory of the imports alone, and of what a run needs whatever it trains; see ``benchmarks/memory_forecast.py``."""

DISK_BASE_MIB = 256.0
"""Logs and temporary files of a site."""

ADAPTERS_KEPT = 15
"""As many as a site holds at most of a recipe, residuals and personal arrays among them (``client.doctor.KEPT``)."""

COPIES = 10
"""Of what trains: parameters, gradients, two moments of the optimiser, what was received, sent and serialised."""

NARROW = 0.4
"""What activations of a backbone's blocks take in bfloat16, beside float32; those of the head stay as wide."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Expected peak in MiB, part by part.

    Attributes:
        base: the imports.
        backbone: the frozen weights in float32.
        activations: of one batch, with their gradients.
        kept: prepared images and what the frozen blocks compute of them, at most the cache.
        features: what the frozen blocks compute of all images: what a cache that recomputes nothing needs for it.
        images: prepared images, all of them.
    """

    base: float
    backbone: float
    activations: float
    kept: float
    features: float = 0.0
    images: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.base + self.backbone + self.activations + self.kept


@dataclass(frozen=True, slots=True)
class Images:
    """Samples that look alike, and how many there are.

    Attributes:
        size: (height, width) of a whole prepared image, as evaluation sees it; of a volume slices before them.
        nbytes: of it in the cache, with mask and truth.
        view_nbytes: of a training view in the cache.
        train: how many are trained on.
        evaluated: how many are validated or tested on.
    """

    size: tuple[int, ...]
    nbytes: int
    view_nbytes: int
    train: int
    evaluated: int

    @classmethod
    def usual(cls, contract: schema.DataContract, train: int, evaluated: int) -> Images:
        """Where none was opened: of the input size, in three channels."""
        voxels = math.prod(contract.patch_size)
        return cls(contract.patch_size, 14 * voxels, 13 * voxels, train, evaluated)


@dataclass(frozen=True, slots=True)
class Places:
    """Where features and images are kept, in MiB.

    Attributes:
        memory, files: bounds.
        files_first: whether features go to files while there is room.
    """

    memory: int
    files: int = 0
    files_first: bool = False


def memory(model: adapted_model.AdaptedModel, seen: Iterable[Images], places: Places, device: str = "cpu") -> Memory:
    """Expected peak memory of training and evaluation.

    Args:
        model: its shapes, on the meta device.
        seen: the images.
        places: where they are kept.
        device: where it will compute: what decides between float32 and bfloat16.
    """
    recipe, seen = model.recipe, list(seen)
    narrow = precision.of(recipe.precision, device) == precision.BFLOAT16
    views = views_used(recipe)
    vectors = model.task.bags and model.frozen_whole  # kept of an image where nothing else of it is needed
    images = sum((one.train + one.evaluated) * one.nbytes + one.train * views * one.view_nbytes for one in seen)
    images = 0 if vectors else images
    features = _features(model, seen, views) // (1 if vectors else 1 + narrow) if places.memory or places.files else 0
    pixels = max((math.prod(one.size) for one in seen), default=0)
    # Logits, their sums and their resized form, and the image with its normalised copy.
    scored = 4 * pixels * (3 * len(recipe.data.class_names) + 6)
    spilled = min(places.files * MIB, features) if places.files_first else 0
    kept = min(places.memory * MIB, images + features - spilled)
    trained = (4 * COPIES + dpsgd.NUMBER_BYTES * _units_held(model)) * model.manifest.parameters
    step = activations(model, narrow=narrow)
    beside = sum(value.numel() for value in model.backbone.words.parameters()) if recipe.words is not None else 0
    parts = (4 * (model.backbone_parameters + beside), max(step, scored) + trained, kept, features, images)
    return Memory(BASE_MIB, *(part / MIB for part in parts))


def views_used(recipe: schema.Recipe) -> int:
    """How many fixed views of an image are drawn in all rounds."""
    return min(recipe.data.views, recipe.rounds * recipe.optimiser.local_epochs)


def _features(model: adapted_model.AdaptedModel, seen: Sequence[Images], views: int) -> int:
    """Bytes of the features of all views and all windows of evaluation, in float32."""
    if model.frozen_blocks == 0:
        return 0
    if model.task.bags and model.frozen_whole:  # one vector an image, in half precision
        return sum(2 * model.backbone.width * (images.evaluated + images.train * views) for images in seen)
    of_size: dict[tuple[int, ...], int] = {}
    total = 0
    for one in seen:
        window, count = sliding_window.tiling(model, one.size)
        for size in (window, model.recipe.data.patch_size):
            if size not in of_size:
                of_size[size] = feature_bytes(model, size)
        total += one.evaluated * count * of_size[window] + one.train * views * of_size[model.recipe.data.patch_size]
    return total


@torch.no_grad()
def feature_bytes(model: adapted_model.AdaptedModel, size: Sequence[int]) -> int:
    """Bytes of what the frozen blocks give of an image of ``size`` (height, width), in float32; ``model`` on meta."""
    with shape_rules.ShapeRules():
        found = model.begun(torch.empty(1, 3, *size, device="meta"), model.frozen_blocks)
    return feature_cache.nbytes(found)


def activations(model: adapted_model.AdaptedModel, *, narrow: bool = False) -> int:
    """Bytes that a step keeps of a batch for the backward pass, and what it computes meanwhile.

    Counted on the meta device: what torch saves in a forward pass, each storage once. Where the shapes alone do not
    suffice for one, it is estimated from the backbone. ``narrow``: computed in bfloat16.
    """
    recipe = model.recipe
    if model.device != "meta":
        model = adapted_model.AdaptedModel(recipe, with_weights=False)
    size, batch = recipe.data.patch_size, images_a_step(model)
    estimated = 4 * model.backbone.activations(size) * batch * model.backbone.slices
    with contextlib.suppress(RuntimeError, NotImplementedError, TypeError, ValueError):
        with shape_rules.ShapeRules():
            blocks, head, largest = _saved(model, torch.empty(batch, 3, *size, device="meta"))
        return round(blocks * (NARROW if narrow else 1.0)) + head + 2 * largest
    return estimated


def images_a_step(model: adapted_model.AdaptedModel) -> int:
    """Images whose activations a training step holds at a time: under privacy at the site those of a few units."""
    batch = model.recipe.optimiser.batch_size
    held = _units_held(model)
    if held:
        batch = min(batch, held * model.recipe.privacy.images_per_patient)
    return batch * images_a_sample(model)


def _units_held(model: adapted_model.AdaptedModel) -> int:
    """Units whose own gradients a step holds at a time; 0 where it holds the gradient of the batch alone."""
    settings = model.recipe.privacy
    if privacy.UNITS.get(settings.mechanism, "site") == "site":
        return 0
    return dpsgd.units_held(settings, model.manifest.parameters)


def images_a_sample(model: adapted_model.AdaptedModel) -> int:
    """Images of a sample that a training step takes: of a case as many as the task draws."""
    return model.task.parts if isinstance(model.task, case_classification.CaseClassification) else 1


def _saved(model: adapted_model.AdaptedModel, pixels: Tensor) -> tuple[int, int, int]:
    """Bytes of all storages that a forward pass saves in the backbone and then in the head, and of the largest one."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, or its number would be given to another
        return tensor

    prefix: backbones.Prefix | None = None
    if model.frozen_blocks:
        with torch.no_grad():
            prefix = model.begun(pixels, model.frozen_blocks)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if model.recipe.task.oracle:
            raise NotImplementedError("prompts have values, not shapes alone")
        features = model.features(pixels, prefix)
        count = len(pixels) // (images_a_sample(model) if model.task.bags else 1)
        columns = model.recipe.inputs.numbers_a_row
        rows = (torch.empty(count, columns, device="meta"),) if columns else ()
        blocks = sum(storage.nbytes() for storage in storages.values())
        if model.task.bags:
            images = images_a_sample(model)
            places = [range(images)] * count
            logits = model.head(case_heads.bags(features.pooled.float(), places), *rows)
        else:
            logits = model.head(features, *rows)
    sizes = [storage.nbytes() for storage in storages.values()]
    # The loss keeps probabilities, their logarithms and the truth.
    lost = 4 * logits.numel() * logits.element_size()
    return blocks, sum(sizes) - blocks + lost, max(sizes, default=0)


def largest(parts: Iterable[Memory], places: Places) -> Memory:
    """The peak of several trainings of the same images, one after another, that share a cache.

    Args:
        parts: one a training.
        places: what they share.
    """
    parts = list(parts)
    features, images = sum(one.features for one in parts), max(one.images for one in parts)
    spilled = min(places.files, features) if places.files_first else 0.0
    kept = min(float(places.memory), images + features - spilled)
    peak = max(parts, key=lambda one: one.backbone + one.activations)
    return dataclasses.replace(peak, kept=kept, features=features, images=images)


def disk_mib(model: adapted_model.AdaptedModel, *, with_backbone: bool) -> float:
    """Expected disk of a run: logs, adapters, and the backbone where it is not there yet."""
    adapter = 4 * model.manifest.parameters
    backbone = 4 * model.backbone_parameters if with_backbone else 0
    return DISK_BASE_MIB + (ADAPTERS_KEPT * adapter + backbone) / MIB
