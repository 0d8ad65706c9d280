"""ViT and DINOv2 in the layout of ``transformers``, without the seconds that importing it takes.

The modules, their names and the order of what they compute are those of ``ViTModel`` and ``Dinov2Model``; a test holds
both equal to the last bit. Only settings that are known here to the last key are taken (:func:`settings_of`), and only
weights whose arrays all have the names known here (:func:`read`): everything else goes through ``transformers``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.backbones import identity, weights

_MASK = "embeddings.mask_token"
_READ = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size"),
    "qkv_bias",
}
_ONLY: Mapping[str, Any] = {"hidden_act": "gelu", "num_channels": 3, "use_swiglu_ffn": False, "use_mask_token": True}
"""Settings that are taken with one value alone."""
_IDLE = {
    *("model_type", "initializer_range", "layerscale_value"),  # first values, which the weights replace
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),  # a frozen backbone drops nothing
    *("pooler_act", "pooler_output_size", "encoder_stride"),  # parts that are not built
    *("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states"),
    *("problem_type", "return_dict"),
}
"""Settings that change nothing of what is computed here."""
_QKV_NAMES = tuple(
    (f".attention.attention.{name}.", f".attention.{name[0]}_proj.") for name in ("query", "key", "value")
)
_OLD_NAMES = {
    "vit": (
        ("encoder.layer.", "layers."),
        *_QKV_NAMES,
        (".attention.output.dense.", ".attention.o_proj."),
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
    ),
    "dinov2": (*_QKV_NAMES, (".attention.output.dense.", ".attention.o_proj.")),
}
"""Parts of the names of published weights, which transformers 5 renames when it reads them -> those of the modules."""


@dataclass(frozen=True)
class Settings:
    """What ``config.json`` says of the shape; the defaults are those of ``transformers``.

    Attributes:
        values: all that ``config.json`` says.
    """

    model_type: str
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    qkv_bias: bool = True
    values: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def settings_of(values: Mapping[str, Any]) -> Settings | None:
    """The settings, if every key of ``config.json`` is known here and has a value that is; else None."""
    kind = values.get("model_type")
    known = {**_ONLY, **dict.fromkeys(_READ | _IDLE | identity.REMARKS | {"intermediate_size", "mlp_ratio"})}
    if kind not in _OLD_NAMES or not values.keys() <= known.keys():
        return None
    if any(
        values[key] != value or type(values[key]) is not type(value) for key, value in _ONLY.items() if key in values
    ):
        return None
    shape: dict[str, Any] = {key: values[key] for key in _READ if key in values}
    if kind == "dinov2":
        shape = {"layer_norm_eps": 1e-6, "patch_size": 14, **shape}
        ratio, width = values.get("mlp_ratio", 4), shape.get("hidden_size", Settings.hidden_size)
        shape["intermediate_size"] = ratio * width if type(ratio) is type(width) is int else None
    elif "intermediate_size" in values:
        shape["intermediate_size"] = values["intermediate_size"]
    made = Settings(str(kind), **shape, values=values)
    return made if _sound(made) else None


def _sound(settings: Settings) -> bool:
    numbers = [getattr(settings, one.name) for one in dataclasses.fields(settings) if one.type == "int"]
    if not all(type(number) is int and number > 0 for number in numbers):
        return False
    fits = settings.hidden_size % settings.num_attention_heads == settings.image_size % settings.patch_size == 0
    return fits and type(settings.qkv_bias) is bool and type(settings.layer_norm_eps) is float


class Encoder(nn.Module):
    """The modules of a model of ``transformers``; :class:`fedvfm.backbones.vit.VisionTransformer` walks them.

    Attributes:
        config: its shape.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.config = settings
        dino = settings.model_type == "dinov2"
        self.embeddings = Embeddings(settings, mask_token=dino)
        blocks = nn.ModuleList(
            [(_DinoBlock if dino else _VitBlock)(settings) for _ in range(settings.num_hidden_layers)]
        )
        if dino:
            self.encoder = nn.Module()
            self.encoder.layer = blocks
        else:
            self.layers = blocks
        self.layernorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)


class Embeddings(nn.Module):
    """Patches, class token and positions, which are interpolated to the size of the input.

    Shapes: (B, 3, H, W) -> (B, 1 + H W / patch^2, D).
    """

    def __init__(self, settings: Settings, *, mask_token: bool) -> None:
        super().__init__()
        width, patch = settings.hidden_size, settings.patch_size
        self.patch = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if mask_token else None
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position_embeddings = nn.Parameter(torch.zeros(1, (settings.image_size // patch) ** 2 + 1, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        projection: Any = self.patch_embeddings.projection
        patches = projection(pixels.to(projection.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        return tokens + self._positions(tokens, *pixels.shape[-2:])

    def _positions(self, tokens: Tensor, height: int, width: int) -> Tensor:
        table = self.position_embeddings
        # An exporter must see the interpolation, so that what it writes takes other sizes too.
        tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if not tracing and tokens.shape[1] == table.shape[1] and height == width:
            return table
        side = round((table.shape[1] - 1) ** 0.5)
        grid = table[:, 1:].reshape(1, side, side, table.shape[-1]).permute(0, 3, 1, 2)
        size = (height // self.patch, width // self.patch)
        resized = nn.functional.interpolate(grid.float(), size=size, mode="bicubic", align_corners=False)
        places = resized.to(table.dtype).permute(0, 2, 3, 1).view(1, -1, table.shape[-1])
        return torch.cat((table[:, :1], places), dim=1)


class _Attention(nn.Module):
    """Softmax attention of several heads. Shapes: (B, T, D) -> (B, T, D)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.head_width = width // settings.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=settings.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=settings.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=settings.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        heads = (*hidden.shape[:-1], -1, self.head_width)
        q, k, v = (layer(hidden).view(heads).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.head_width**-0.5)
        joined: Tensor = self.o_proj(mixed.transpose(1, 2).contiguous().reshape(*hidden.shape[:-1], -1).contiguous())
        return joined


class _Mlp(nn.Module):
    """Two layers with GELU between them. Shapes: (B, T, D) -> (B, T, D)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.fc1 = nn.Linear(settings.hidden_size, settings.intermediate_size)
        self.fc2 = nn.Linear(settings.intermediate_size, settings.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.fc2(nn.functional.gelu(self.fc1(hidden)))
        return result


class _Scale(nn.Module):
    """A factor a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        return hidden * self.lambda1


class _VitBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what entered.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, eqs. (2) and (3).
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention = _Attention(settings)
        self.layernorm_before = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.mlp = _Mlp(settings)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        hidden = self.attention(self.layernorm_before(hidden)) + hidden
        result: Tensor = self.mlp(self.layernorm_after(hidden)) + hidden
        return result


class _DinoBlock(nn.Module):
    """As a ViT's, each branch with a scale.

    Source: Oquab et al., "DINOv2", TMLR 2024; LayerScale: Touvron et al., ICCV 2021.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.attention = _Attention(settings)
        self.layer_scale1 = _Scale(settings.hidden_size)
        self.norm2 = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)
        self.mlp = _Mlp(settings)
        self.layer_scale2 = _Scale(settings.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        hidden = self.layer_scale1(self.attention(self.norm1(hidden))) + hidden
        result: Tensor = self.layer_scale2(self.mlp(self.norm2(hidden))) + hidden
        return result


def read(settings: Settings, located: weights.Located) -> Encoder | None:
    """The model with the weights in float32; None where an array does not have a name that is known here.

    Raises:
        WeightsError: if a file is damaged or an array has another shape.
    """
    with torch.device("meta"):
        made = Encoder(settings)
    wanted = made.state_dict()
    found: dict[str, Tensor] = {}
    if _MASK in wanted:  # published weights may lack it, and nothing is masked here
        found[_MASK] = torch.zeros(wanted[_MASK].shape)
    for file in identity.weight_files(located.folder):
        if file.suffix == ".safetensors":
            found |= _arrays(file, settings, wanted)
    if wanted.keys() != found.keys():
        return None
    made.load_state_dict(found, assign=True)
    return made.eval()


def _arrays(file: Path, settings: Settings, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those arrays of a file that are wanted, copied."""
    found = {}
    try:
        with safetensors.safe_open(file, framework="pt") as arrays:
            for stored in arrays.keys():  # noqa: SIM118
                name = _module_name(stored, settings.model_type)
                if name in wanted:
                    found[name] = arrays.get_tensor(stored).to(torch.float32, copy=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.WeightsError(
            f"{file}: the weights cannot be read ({type(error).__name__}). Fetch the backbone again"
        ) from None
    for name, array in found.items():
        if array.shape != wanted[name].shape:
            raise errors.WeightsError(
                f"{file}: the weights cannot be read: {name} has shape {tuple(array.shape)}, config.json asks for "
                f"{tuple(wanted[name].shape)}. Fetch the backbone again"
            )
    return found


def _module_name(stored: str, kind: str) -> str:
    """The name of the module's parameter that a stored array is for."""
    name = stored.removeprefix(f"{kind}.")
    for old, new in _OLD_NAMES[kind]:
        name = name.replace(old, new)
    return name
