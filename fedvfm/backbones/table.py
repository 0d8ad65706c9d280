"""The table of backbones. A name that is not in it may be a Hugging Face name or a local folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedvfm import config as configs
from fedvfm import errors, registry

_VIT = "fedvfm.backbones.vit:load"

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
        "vit-base": _VIT,
        "deit-tiny": _VIT,
        "deit-small": _VIT,
        "deit-base": _VIT,
        "clip-vit-base": _VIT,
        "siglip-base": _VIT,
        "unet": "fedvfm.backbones.unet:load",
    },
)


def loader(settings: configs.BackboneConfig) -> Callable[..., Any]:
    """The function that loads this backbone.

    Raises:
        UnknownName: for a name that is in no table and looks like neither a Hugging Face name nor a folder.
    """
    name = settings.name
    if name in TABLE:
        found: Callable[..., Any] = TABLE.get(name)
        return found
    if "/" in name or Path(name).is_dir():
        found = TABLE.get("dinov2-small")
        return found
    raise errors.UnknownName(f"{TABLE.fault(name)}; or a Hugging Face name (owner/model), or a local folder")
