"""Decoder parts by name: pretrained modules of a mask decoder that train beside the adapter of the encoder.

LoRA alone on SAM's encoder does not reach a new task (FLAP-SAM: Dice 36.9 against 60.5): what turns the embedding into
masks must move too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fedvfm import registry
from fedvfm.adapters import base
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.state import state

GROUP = "decoder"
UNREAD = "iou_prediction_head"


def faults(parts: Sequence[str], backbone: backbones.Backbone, kind: str, *, masks: bool) -> list[str]:
    """What is wrong with the parts for this backbone and adapter kind, one sentence a fault.

    Args:
        parts: names, as the recipe gives them.
        backbone: whose decoder they are of.
        kind: the adapter kind.
        masks: whether the head takes the decoder's masks.
    """
    if not parts:
        return []
    where, known = f"recipe.adapter.parts = {list(parts)}", sorted(backbone.parts())
    if not known:
        return [f"{where}: backbone '{backbone.name}' has no mask decoder; leave parts out"]
    if not masks:
        return [f"{where}: only the head 'sam-masks' uses the mask decoder; set recipe.task.head, or leave parts out"]
    if kind == "full":
        return [f"{where}: kind 'full' trains every part of the model already; leave parts out"]
    if UNREAD in parts:
        return [f"{where}: no loss reads the predicted IoU, so '{UNREAD}' would never move; leave it out"]
    return [
        f"{where}: unknown part '{part}'; known: {', '.join(known)}{registry.nearest(part, known)}"
        for part in parts
        if part not in known
    ]


def paths(parts: Sequence[str], backbone: backbones.Backbone) -> list[str]:
    """Paths of the modules of all named parts, each once, in the decoder's order."""
    chosen = {path for part in parts for path in backbone.parts()[part]}
    return [name for name, _ in backbone.model.named_modules() if name in chosen]


def inject(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
    """Make the parameters of the named parts trainable copies; they travel as differences from the frozen values."""
    parameters: dict[str, nn.Parameter] = {}
    reference: dict[str, Tensor] = {}
    for path in paths(settings.parts or (), backbone):
        module = backbone.model.get_submodule(path)
        for last, frozen in list(module.named_parameters(recurse=False)):
            name = backbone.wire_name(f"{path}.{last}")
            parameters[name] = nn.Parameter(frozen.detach().clone())
            reference[name] = frozen.detach()
            setattr(module, last, parameters[name])
    specs = tuple(state.ArraySpec(name, tuple(p.shape), GROUP) for name, p in parameters.items())
    return base.Injected(specs, parameters, reference)
