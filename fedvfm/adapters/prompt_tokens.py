"""Prompt tokens: trained tokens among those of the image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from fedvfm import errors
from fedvfm.adapters import base
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.state import state

DEPTHS = ("deep", "shallow")


class PromptTokens(base.Adapter):
    """Trained tokens between the class token and the patches; heads see neither them nor a shifted grid.

    ``depth = "deep"`` (the default): fresh tokens enter before every block and take the place of those before.
    ``layers`` names the blocks before which fresh ones enter: a block that it does not name takes what the block before
    made of them, and the blocks before the first one named see no token and are frozen.
    ``depth = "shallow"``: tokens enter before block 0 alone and pass through all blocks, so nothing of the backbone is
    frozen in the sense of the activation cache; ``layers`` has no meaning and must be empty.

    Unlike the other kinds this one does not begin as the backbone: tokens, whatever their values, take attention.

    Options: ``depth``; ``count`` of tokens a block.

    Shapes: (count, D), a named block.
    Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, eq. (4) to (7); first values uniform within
    sqrt(6 / (3 patch^2 + D)) as in the authors' code.
    """

    known_options = ("depth", "count")
    numbers: ClassVar[Mapping[str, tuple[float, float, float]]] = {"count": (10, 1, 1024)}
    foldable = False

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        if backbone.tokens_refused:
            return [
                f"recipe.adapter.kind = '{settings.kind}': backbone '{backbone.name}' takes no prompt tokens: "
                f"{backbone.tokens_refused}"
            ]
        return super().faults(settings, backbone) + _depth_faults(settings)

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base.

        Raises:
            ConfigError: if the options cannot be used.
        """
        if wrong := _depth_faults(settings):
            raise errors.ConfigError(f"adapter '{settings.kind}'", wrong)
        blocks = base.blocks_of(settings, backbone) if _depth(settings) == "deep" else [0]
        shape = (int(self.number(settings, "count")), backbone.width)
        device = next(backbone.model.parameters()).device
        for block in blocks:
            backbone.tokens[str(block)] = nn.Parameter(torch.zeros(shape, device=device))
        parameters = {f"block.{block:02d}.prompt": backbone.tokens[str(block)] for block in blocks}
        specs = tuple(state.ArraySpec(name, shape, "prompt") for name in parameters)
        bound = math.sqrt(6.0 / (3 * backbone.patch**2 + backbone.width))
        return base.Injected(specs, parameters, bounds=dict.fromkeys(parameters, bound))


def _depth(settings: schema.AdapterConfig) -> object:
    return settings.options.get("depth", DEPTHS[0])


def _depth_faults(settings: schema.AdapterConfig) -> list[str]:
    depth, found = _depth(settings), []
    if depth not in DEPTHS:
        found.append(f"recipe.adapter.options.depth = {depth!r}: known: {', '.join(DEPTHS)}")
    if depth == "shallow" and settings.layers:
        found.append(
            f"recipe.adapter.layers = {list(settings.layers)}: shallow prompt tokens enter before block 0 alone; leave "
            f"layers empty, or use depth 'deep'"
        )
    if settings.dropout:
        found.append(f"recipe.adapter.dropout = {settings.dropout}: prompt tokens are not dropped; leave it 0")
    return found
