"""The table of backbones. A name that is not in it may be a Hugging Face name or a local folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedvfm import errors, registry
from fedvfm.backbones import weights
from fedvfm.config import schema

_VIT = "fedvfm.backbones.vit:load"
_SAM = "fedvfm.backbones.sam:load"
_SAM_HQ = "fedvfm.backbones.sam_hq:load"
_SAM_MED2D = "fedvfm.backbones.sam_med2d:load"
_SAM2 = "fedvfm.backbones.sam2:load"
_CONVNEXT = "fedvfm.backbones.convnext:load"
_SWIN = "fedvfm.backbones.swin:load"
_TINYVIT_SAM = "fedvfm.backbones.tinyvit_sam:load"

TABLE = registry.Table(
    "backbone",
    {
        "dinov2-small-imgfocus": _VIT,
        "dinov2-small": _VIT,
        "dinov2-base": _VIT,
        "dinov2-large": _VIT,
        "dinov2-small-registers": _VIT,
        "dinov2-base-registers": _VIT,
        "rad-dino": _VIT,
        "dinov3-small": _VIT,
        "dinov3-base": _VIT,
        "dinov3-convnext-tiny": _CONVNEXT,
        "dinov3-convnext-small": _CONVNEXT,
        "dinov3-convnext-base": _CONVNEXT,
        "vit-base": _VIT,
        "deit-tiny": _VIT,
        "deit-small": _VIT,
        "deit-base": _VIT,
        "clip-vit-base": _VIT,
        "siglip-base": _VIT,
        "swin-tiny": _SWIN,
        "swin-base": _SWIN,
        "swin-large-384": _SWIN,
        "ark-plus": _SWIN,
        "sam-vit-base": _SAM,
        "sam-vit-large": _SAM,
        "sam-vit-huge": _SAM,
        "medsam": _SAM,
        "sam-med2d": _SAM_MED2D,
        "sam-hq-vit-base": _SAM_HQ,
        "sam-hq-vit-large": _SAM_HQ,
        "sam-hq-vit-huge": _SAM_HQ,
        "sam2-hiera-tiny": _SAM2,
        "sam2-hiera-small": _SAM2,
        "sam2-hiera-base-plus": _SAM2,
        "sam2-hiera-large": _SAM2,
        "sam3": "fedvfm.backbones.sam3:load",
        "litemedsam": _TINYVIT_SAM,
        "mobilesam": _TINYVIT_SAM,
        "sam-shaped": _SAM,
        "unet": "fedvfm.backbones.unet:load",
        "unet3d": "fedvfm.backbones.unet:load_volumetric",
    },
)

STORED = registry.Table("stored backbone", {"monai-network": "fedvfm.backbones.monai_network:load"})
"""``model_type`` of what was imported here -> what loads it, where that is no entry of the table."""

KINDS = {
    "sam": "sam-vit-base",
    "sam_hq": "sam-hq-vit-base",
    "sam_med2d": "sam-med2d",
    "sam2": "sam2-hiera-tiny",
    "sam2_video": "sam2-hiera-tiny",
    "sam3": "sam3",
    "sam3_tracker": "sam3",
    "sam3_tracker_video": "sam3",
    "sam3_video": "sam3",
    "tinyvit_sam": "litemedsam",
    "swin": "swin-base",
    "dinov3_convnext": "dinov3-convnext-tiny",
}
"""``model_type`` of a model that is in no table -> the entry that loads it; vision transformers load all others."""


def elsewhere(name: str) -> bool:
    """Whether a name that stands in no table may name weights: on Hugging Face, imported here, or in a folder."""
    return "/" in name or weights.in_cache(name) or weights.is_folder(name)


def loader(settings: schema.BackboneConfig) -> Callable[..., Any]:
    """The function that loads this backbone.

    Raises:
        UnknownName: for a name that is in no table and looks like neither a Hugging Face name nor a folder, and
            for a bundle that was not imported.
    """
    name = settings.name
    if name in TABLE:
        found: Callable[..., Any] = TABLE.get(name)
        return found
    if name.startswith("bundle:"):
        raise errors.UnknownName(
            f"'{name}': a MONAI bundle is imported first, at each site: fedvfm weights import {name[7:] or 'FOLDER'} "
            "--name NAME; the recipe then says NAME"
        )
    if elsewhere(name):
        return _by_kind(settings)
    raise errors.UnknownName(f"{TABLE.fault(name)}; or a Hugging Face name (owner/model), or a local folder")


def _by_kind(settings: schema.BackboneConfig) -> Callable[..., Any]:
    """The loader of a Hugging Face name or a folder, by what its configuration says it is."""
    try:
        values = weights.describe(settings)
    except errors.WeightsError:
        return _fetch_first
    kind = str(values.get("model_type"))
    if kind in STORED:
        stored: Callable[..., Any] = STORED.get(kind)
        return stored
    found: Callable[..., Any] = TABLE.get(KINDS.get(kind, "dinov2-small"))
    return found


def _fetch_first(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> Any:
    """Load a model whose configuration is not on this machine yet."""
    if with_weights:
        weights.locate(settings)
    else:
        weights.describe(settings)
    return _by_kind(settings)(settings, with_weights=with_weights, device=device)
