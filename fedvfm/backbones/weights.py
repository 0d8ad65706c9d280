"""Find a backbone's weights: local first, safetensors only, pinned by revision and sha256. Imports no torch.

The cache is ``$FEDVFM_CACHE`` or ``~/.cache/fedvfm``; Hugging Face names use Hugging Face's own cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvfm import config as configs
from fedvfm import errors


@dataclass(frozen=True)
class Known:
    """A backbone we know by name: where it comes from and its shape, so that plans need no network.

    Attributes:
        hub: Hugging Face name; empty for the embedded one.
        scope: "general" or the modality it was trained on.
        config: what ``config.json`` says about shapes.
    """

    hub: str
    scope: str
    config: Mapping[str, Any] = field(default_factory=dict)


def _dino(kind: str, width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    shape = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": 14,
        "image_size": 518,
    }
    return {"model_type": kind, **shape, "layer_norm_eps": 1e-6, "qkv_bias": True, **more}


def _vit(kind: str, width: int, depth: int, heads: int, patch: int = 16, **more: Any) -> dict[str, Any]:
    shape = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    return {"model_type": kind, **shape, "patch_size": patch, "image_size": 224, **more}


KNOWN: dict[str, Known] = {
    "dinov2-small-imgfocus": Known("", "general", _dino("dinov2", 384, 12, 6)),
    "dinov2-small": Known("facebook/dinov2-small", "general", _dino("dinov2", 384, 12, 6)),
    "dinov2-base": Known("facebook/dinov2-base", "general", _dino("dinov2", 768, 12, 12)),
    "dinov2-large": Known("facebook/dinov2-large", "general", _dino("dinov2", 1024, 24, 16)),
    "dinov2-small-registers": Known(
        "facebook/dinov2-with-registers-small", "general", _dino("dinov2_with_registers", 384, 12, 6)
    ),
    "dinov2-base-registers": Known(
        "facebook/dinov2-with-registers-base", "general", _dino("dinov2_with_registers", 768, 12, 12)
    ),
    "rad-dino": Known("microsoft/rad-dino", "chest radiographs", _dino("dinov2", 768, 12, 12)),
    "dinov3-small": Known(
        "facebook/dinov3-vits16-pretrain-lvd1689m", "general", _vit("dinov3_vit", 384, 12, 6, num_register_tokens=4)
    ),
    "dinov3-base": Known(
        "facebook/dinov3-vitb16-pretrain-lvd1689m", "general", _vit("dinov3_vit", 768, 12, 12, num_register_tokens=4)
    ),
    "vit-base": Known("google/vit-base-patch16-224-in21k", "general", _vit("vit", 768, 12, 12)),
    "deit-tiny": Known("facebook/deit-tiny-patch16-224", "general", _vit("deit", 192, 12, 3)),
    "deit-small": Known("facebook/deit-small-patch16-224", "general", _vit("deit", 384, 12, 6)),
    "deit-base": Known("facebook/deit-base-patch16-224", "general", _vit("deit", 768, 12, 12)),
    "clip-vit-base": Known("openai/clip-vit-base-patch16", "general", _vit("clip_vision_model", 768, 12, 12)),
    "siglip-base": Known("google/siglip-base-patch16-224", "general", _vit("siglip_vision_model", 768, 12, 12)),
}

EMBEDDED = "dinov2-small-imgfocus"


@dataclass(frozen=True)
class Located:
    """Weights on this machine."""

    folder: Path
    config: Mapping[str, Any]
    sha256: str


def cache() -> Path:
    """Our cache folder."""
    return Path(os.environ.get("FEDVFM_CACHE") or Path.home() / ".cache" / "fedvfm")


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(settings: configs.BackboneConfig) -> Mapping[str, Any]:
    """The values of ``config.json`` without weights or network.

    Raises:
        WeightsError: if neither the table nor this machine knows the model's shape.
    """
    if settings.name in KNOWN:
        return KNOWN[settings.name].config
    folder = _folder(settings, download=False)
    if folder is None:
        raise errors.WeightsError(
            f"backbone '{settings.name}': its shape is not known without network. Run: fedvfm weights fetch "
            f"{settings.name}"
        )
    return _read_config(folder)


def locate(settings: configs.BackboneConfig, *, download: bool = True) -> Located:
    """Find the weights and check their sha256.

    Raises:
        WeightsError: if they are missing, not safetensors, or not the pinned bytes.
    """
    folder = _folder(settings, download=download)
    if folder is None:
        raise errors.WeightsError(
            f"backbone '{settings.name}' is not on this machine. Run: fedvfm weights fetch {settings.name}"
        )
    file = folder / "model.safetensors"
    if not file.is_file():
        raise errors.WeightsError(
            f"{folder}: has no model.safetensors; other formats are not read (they can carry code)"
        )
    digest = sha256_of(file)
    if settings.sha256 and digest != settings.sha256:
        raise errors.WeightsError(
            f"backbone '{settings.name}': sha256 of {file} is {digest[:16]}..., the recipe pins "
            f"{settings.sha256[:16]}.... "
            f"Fetch it again: fedvfm weights fetch {settings.name}"
        )
    return Located(folder, _read_config(folder), digest)


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.WeightsError(
            f"{path}: cannot be read ({type(error).__name__}). Fetch the backbone again"
        ) from None
    if not isinstance(values, dict):
        raise errors.WeightsError(f"{path}: is not a table of settings. Fetch the backbone again")
    return values


def _folder(settings: configs.BackboneConfig, *, download: bool) -> Path | None:
    name = settings.name
    if name not in KNOWN and Path(name).is_dir():
        return Path(name)
    own = cache() / "weights" / name.replace("/", "--")
    if (own / "config.json").is_file():
        return own
    if name == EMBEDDED:
        return None
    hub = KNOWN[name].hub if name in KNOWN else name
    return _from_hub(hub, settings.revision, download=download)


def _from_hub(hub: str, revision: str | None, *, download: bool) -> Path | None:
    """Hugging Face's cache first, the network second."""
    import huggingface_hub

    files = ["config.json", "model.safetensors"]
    for local_only in (True, False) if download else (True,):
        try:
            found = huggingface_hub.snapshot_download(
                hub, revision=revision, allow_patterns=files, local_files_only=local_only
            )
            if (Path(found) / "model.safetensors").is_file() or not download:
                return Path(found)
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            reason = type(error).__name__
            if not local_only:
                raise errors.WeightsError(
                    f"backbone '{hub}' is not on this machine and cannot be downloaded ({reason}). On a machine "
                    f"with internet run "
                    f"'fedvfm weights fetch {hub}' and bring its folder here, or name the folder in "
                    f"recipe.backbone.name"
                ) from None
    return None
