"""How much memory and disk a site needs, from shapes, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from fedvfm import config as configs
from fedvfm.client import model as models

MIB = 1 << 20

BASE_MIB = 550.0
"""Memory of the imports alone (torch, transformers, peft, MONAI, flwr); see ``benchmarks/``."""

DISK_BASE_MIB = 256.0
"""Logs and temporary files of a site."""

ADAPTERS_KEPT = 4
"""The received and the sent adapter, each with the file that is being written beside it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Expected peak in MiB, part by part.

    Attributes:
        base: the imports.
        backbone: the frozen weights in float32.
        activations: of one batch, with their gradients.
        kept: prepared images and what the frozen blocks compute of them, at most the cache.
    """

    base: float
    backbone: float
    activations: float
    kept: float

    @property
    def total(self) -> float:
        """All together."""
        return self.base + self.backbone + self.activations + self.kept


def memory(recipe: configs.Recipe, model: models.AdaptedModel, images: int, cache_mib: int) -> Memory:
    """Expected peak memory of training.

    Args:
        recipe: what is trained.
        model: its shapes; the meta device will do.
        images: how many prepared images could be kept, views included.
        cache_mib: how much they may take.
    """
    backbone = model.backbone
    height, width = recipe.data.input_size
    tokens = (height // backbone.patch) * (width // backbone.patch)
    activations = 4 * backbone.activations((height, width)) * recipe.optimiser.batch_size
    prefix = 4 * tokens * backbone.width if model.frozen_blocks else 0
    kept = min(cache_mib * MIB, images * (4 * 5 * height * width + prefix))
    return Memory(BASE_MIB, 4 * model.backbone_parameters / MIB, activations / MIB, kept / MIB)


def disk_mib(model: models.AdaptedModel, *, with_backbone: bool) -> float:
    """Expected disk of a run: logs, adapters, and the backbone where it is not there yet."""
    adapter = 4 * model.manifest.parameters
    backbone = 4 * model.backbone_parameters if with_backbone else 0
    return DISK_BASE_MIB + (ADAPTERS_KEPT * adapter + backbone) / MIB
