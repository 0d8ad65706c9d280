"""Vision transformers through ``transformers``: ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP and SigLIP vision.

A family says where a transformer keeps its blocks; the forward walks them itself, so that grids of several depths can
be taken. A test holds the last grid equal to the stock model's ``last_hidden_state`` for every family.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fedvfm import config as configs
from fedvfm import errors
from fedvfm.backbones import base, weights


@dataclass(frozen=True)
class Family:
    """Where one of transformers' vision models keeps its parts.

    Attributes:
        model: class name in transformers.
        blocks: path of the list of blocks.
        parts: our part (q, k, v, o, fc1, fc2) -> its path inside a block.
        norms: names of a block's two norms, in order.
        final: path of the last norm, applied to all tokens; empty where the stock model applies none to them.
        pooled_norm: path of a norm for the pooled vector alone; empty where there is none.
        arguments: further arguments of the class.
        settings: settings that differ from the stock model's: parts we do not use are not built.
    """

    model: str
    blocks: str
    parts: Mapping[str, str]
    norms: tuple[str, str]
    final: str
    pooled_norm: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def _parts(attention: str, out: str, up: str = "fc1", down: str = "fc2") -> dict[str, str]:
    projections = {
        "q": f"{attention}.q_proj",
        "k": f"{attention}.k_proj",
        "v": f"{attention}.v_proj",
        "o": f"{attention}.{out}",
    }
    return {**projections, "fc1": f"mlp.{up}", "fc2": f"mlp.{down}"}


_VIT = Family(
    "ViTModel",
    "layers",
    _parts("attention", "o_proj"),
    ("layernorm_before", "layernorm_after"),
    "layernorm",
    arguments={"add_pooling_layer": False},
)
_DINOV2 = Family("Dinov2Model", "encoder.layer", _parts("attention", "o_proj"), ("norm1", "norm2"), "layernorm")
FAMILIES: dict[str, Family] = {
    "vit": _VIT,
    "deit": replace(_VIT, model="DeiTModel"),
    "dinov2": _DINOV2,
    "dinov2_with_registers": replace(_DINOV2, model="Dinov2WithRegistersModel"),
    "dinov3_vit": Family(
        "DINOv3ViTModel",
        "model.layer",
        _parts("attention", "o_proj", "up_proj", "down_proj"),
        ("norm1", "norm2"),
        "norm",
    ),
    "clip_vision_model": Family(
        "CLIPVisionModel",
        "encoder.layers",
        _parts("self_attn", "out_proj"),
        ("layer_norm1", "layer_norm2"),
        "",
        "post_layernorm",
    ),
    "siglip_vision_model": Family(
        "SiglipVisionModel",
        "encoder.layers",
        _parts("self_attn", "out_proj"),
        ("layer_norm1", "layer_norm2"),
        "post_layernorm",
        settings={"vision_use_head": False},
    ),
}


class VisionTransformer(base.Backbone):
    """One of the families, frozen.

    Args:
        name: as the recipe names it.
        family: where the model keeps its parts.
        model: the stock transformers model.
        sha256: of its weights file.
    """

    def __init__(self, name: str, family: Family, model: nn.Module, sha256: str) -> None:
        super().__init__()
        self.name, self.family, self.model, self.sha256, self.pretrained = name, family, model, sha256, True
        settings: Any = model.config
        self.width, self.depth = int(settings.hidden_size), int(settings.num_hidden_layers)
        self.patch = int(settings.patch_size)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> VisionTransformer:
        """Only the dropout of an adapter knows a training mode: the frozen blocks always compute the same.

        DINOv3 would jitter its positions in training, others drop tokens; what is kept of the frozen blocks would not
        fit then.
        """
        super().train(False)
        self.training = mode
        for path, module in self.model.named_modules():
            if "lora_dropout" in path:
                module.train(mode)
        return self

    def check_size(self, size: Sequence[int]) -> list[str]:
        """Faults of an input size (height, width)."""
        wrong = [side for side in size if side % self.patch]
        if not wrong:
            return []
        near = max(self.patch, round(wrong[0] / self.patch) * self.patch)
        return [
            f"recipe.data.input_size = {list(size)}: sides must be multiples of the patch size {self.patch}; "
            f"nearest: {near}"
        ]

    def projection(self, block: int, part: str) -> str | None:
        """See base."""
        path = self.family.parts.get(part)
        return f"{self.family.blocks}.{block}.{path}" if path else None

    def wire_name(self, parameter: str) -> str:
        """Our stable name: ``block.03.q.weight``, ``block.03.norm1.bias``, ``final_norm.weight``.

        Others keep their own.
        """
        match = re.match(rf"{re.escape(self.family.blocks)}\.(\d+)\.(.+)\.([^.]+)$", parameter)
        if match:
            inner = {path: part for part, path in self.family.parts.items()}
            inner |= {path: f"norm{index}" for index, path in enumerate(self.family.norms, start=1)}
            return f"block.{int(match[1]):02d}.{inner.get(match[2], match[2])}.{match[3]}"
        final = self.family.final or self.family.pooled_norm
        return re.sub(rf"^{re.escape(final)}\.", "final_norm.", parameter)

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        hidden, arguments = self._embed(pixels)
        return self._walk(hidden, arguments, range(stop), taps)

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None = None) -> base.Features:
        """See base. The pooled vector is the normalised class token, or the mean of the patches where there is none."""
        last = max(taps)
        if prefix is None:
            prefix = self.prefix(pixels, last, taps)
        else:
            arguments = self._arguments(pixels)
            rest = self._walk(prefix.hidden, arguments, range(prefix.stop, last), taps)
            prefix = base.Prefix(last, rest.hidden, {**prefix.taken, **rest.taken})
        taken = dict(prefix.taken)
        if last == self.depth and self.family.final:
            taken[last] = self.model.get_submodule(self.family.final)(prefix.hidden)
        rows, columns = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        extra = prefix.hidden.shape[1] - rows * columns
        grids = tuple(self._grid(taken[tap], extra, rows, columns) for tap in taps)
        return base.Features(pixels, grids, self._pooled(taken[last], extra))

    def _walk(self, hidden: Tensor, arguments: Mapping[str, Any], blocks: range, taps: Sequence[int]) -> base.Prefix:
        taken: dict[int, Tensor] = {}
        modules: Any = self.model.get_submodule(self.family.blocks)
        for index in blocks:
            answer: Any = modules[index](hidden, **arguments)
            hidden = answer[0] if isinstance(answer, tuple) else answer
            if index + 1 in taps:
                taken[index + 1] = hidden
        return base.Prefix(blocks.stop, hidden, taken)

    @staticmethod
    def _grid(tokens: Tensor, extra: int, rows: int, columns: int) -> Tensor:
        return tokens[:, extra:].transpose(1, 2).reshape(len(tokens), tokens.shape[2], rows, columns)

    def _pooled(self, tokens: Tensor, extra: int) -> Tensor:
        pooled = tokens[:, 0] if extra else tokens.mean(dim=1)
        return self.model.get_submodule(self.family.pooled_norm)(pooled) if self.family.pooled_norm else pooled

    def _embed(self, pixels: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """First hidden states and the blocks' further arguments.

        Position tables are interpolated to the input's size.
        """
        model: Any = self.model
        if self.family.model.startswith(("Dinov2", "DINOv3")):
            return model.embeddings(pixels), self._arguments(pixels)
        hidden = model.embeddings(pixels, interpolate_pos_encoding=True)
        hidden = model.pre_layrnorm(hidden) if self.family.model == "CLIPVisionModel" else hidden
        return hidden, self._arguments(pixels)

    def _arguments(self, pixels: Tensor) -> Mapping[str, Any]:
        model: Any = self.model
        if self.family.model == "DINOv3ViTModel":
            return {"position_embeddings": model.rope_embeddings(pixels)}
        return {"attention_mask": None} if self.family.model in ("CLIPVisionModel", "SiglipVisionModel") else {}


_masters: dict[tuple[str, str], nn.Module] = {}


def _share(module: nn.Module) -> nn.Module:
    """A copy of the module tree on the same tensors: one frozen backbone in memory, however many models stand on it."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def load(settings: configs.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> VisionTransformer:
    """A frozen vision transformer by table name, Hugging Face name or local folder.

    With ``with_weights=False`` the model lies on the meta device: shapes without weights or network.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if the model is of no known family.
    """
    if not with_weights:
        values = weights.describe(settings)
        family = _family(settings.name, values)
        with torch.device("meta"):
            model = _transformers_class(family)(_make_config(family, values), **family.arguments)
        return VisionTransformer(settings.name, family, model, settings.sha256 or "")
    located = weights.locate(settings)
    family = _family(settings.name, located.config)
    key = (located.sha256, device)
    if key not in _masters:
        _masters.clear()
        _masters[key] = _read(family, located).to(device)
    return VisionTransformer(settings.name, family, _share(_masters[key]), located.sha256)


def _family(name: str, values: Mapping[str, Any]) -> Family:
    kind = values.get("model_type")
    aliases = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
    kind = aliases.get(str(kind), str(kind))
    if kind not in FAMILIES:
        raise errors.ConfigError(
            f"backbone '{name}'", [f"model type '{kind}' is not supported; supported: {', '.join(sorted(FAMILIES))}"]
        )
    return FAMILIES[kind]


def _transformers_class(family: Family) -> Callable[..., Any]:
    import transformers

    found: Callable[..., Any] = getattr(transformers, family.model)
    return found


def _make_config(family: Family, values: Mapping[str, Any]) -> Any:
    vision = values.get("vision_config")
    settings = dict(vision if isinstance(vision, dict) else values)
    settings.pop("model_type", None)
    config_class: Any = _transformers_class(family).config_class  # type: ignore[attr-defined]
    made = config_class(**{**settings, **family.settings})
    made._attn_implementation = "sdpa"
    return made


def _read(family: Family, located: weights.Located) -> nn.Module:
    try:
        with _quiet():
            model, info = _transformers_class(family).from_pretrained(  # type: ignore[attr-defined]
                located.folder,
                config=_make_config(family, located.config),
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **family.arguments,
            )
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise errors.WeightsError(
            f"{located.folder}: the weights cannot be read into {family.model} ({type(error).__name__}). Fetch "
            f"the backbone again"
        ) from None
    missing = sorted(set(info["missing_keys"]) - {"embeddings.mask_token"})
    if missing:
        raise errors.WeightsError(
            f"{located.folder}: the weights lack {len(missing)} arrays (first: {missing[0]}). Fetch the backbone again"
        )
    model.eval()
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and reports: what matters becomes an error of ours."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
