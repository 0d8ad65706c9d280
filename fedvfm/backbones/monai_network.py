"""Networks of MONAI bundles: pretrained U-Nets named by a list, made of plain values; no code of a bundle is run.

A bundle's configuration is a small programming language: ``_target_`` names what is called, ``$`` is Python, ``@``
refers to other parts. Here it is data: the class is one of :data:`NETWORKS`, its arguments are numbers, texts and
lists, and whatever else it says is refused. The weights come as safetensors, or out of a pickle that is never run.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fedvfm import errors, registry
from fedvfm.backbones import base, identity, weights
from fedvfm.config import schema

MODEL_TYPE = "monai-network"
NETWORKS = {
    "UNet": "monai.networks.nets.unet",
    "BasicUNet": "monai.networks.nets.basic_unet",
    "SegResNet": "monai.networks.nets.segresnet",
}
"""Class -> its module: those whose layers compute each image by itself."""
FACE = "monai.networks.nets"
LARGEST = 4096
"""Of a number among the arguments."""
MOST = 64
"""Entries of a list, and layers where an argument of :data:`COUNTS` says how many; lists lie at most so deep as
:data:`DEEPEST`."""
COUNTS, DEEPEST = ("blocks_down", "blocks_up", "num_res_units"), 4


def checked(network: Any, where: str) -> dict[str, Any]:
    """A network's definition with the plain name of its class.

    Args:
        network: ``network_def`` of a bundle.
        where: it stands, for errors.

    Raises:
        WeightsError: listing every fault: another class, an expression, a reference, an argument of no plain kind.
    """
    if not isinstance(network, Mapping):
        raise errors.WeightsError(f"{where}: 'network_def' is no table")
    target = str(network.get("_target_", ""))
    module, _, name = target.rpartition(".")
    if name not in NETWORKS or module not in ("", FACE, NETWORKS[name]):
        raise errors.WeightsError(
            f"{where}: _target_ '{target[:100]}' is none of {', '.join(f'{FACE}.{known}' for known in NETWORKS)}"
            f"{registry.nearest(name, list(NETWORKS))}; no other code is run"
        )
    known = list(inspect.signature(_class(name)).parameters)
    faults = [
        f"{key}: {fault}"
        for key, value in network.items()
        if key != "_target_"
        for fault in (
            _faults(value, MOST if key in COUNTS else LARGEST) if key in known else [f"unknown argument of {name}"]
        )
    ]
    if network.get("spatial_dims") != 2:
        faults.append("spatial_dims: only networks of pictures and slices are taken, spatial_dims = 2")
    if network.get("in_channels", 1 if name != "UNet" else None) not in (1, 3):
        faults.append("in_channels: 1 or 3 is needed")
    classes = network.get("out_channels", 2)
    if not isinstance(classes, int) or classes < 1:
        faults.append("out_channels: a whole number from 1 is needed")
    if faults:
        raise errors.WeightsError(f"{where}: " + "; ".join(faults))
    return {**network, "_target_": name}


def _faults(value: Any, largest: int, depth: int = 0) -> list[str]:
    """What is wrong with an argument."""
    if depth > DEEPEST:
        return [f"nested deeper than {DEEPEST}"]
    if isinstance(value, str):
        return ["expressions and references are not evaluated; write the value"] if value[:1] in ("$", "@", "%") else []
    if value is None or isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [] if abs(value) <= largest else [f"a number over {largest}"]
    if isinstance(value, list):
        short = len(value) <= MOST
        return [fault for each in value for fault in _faults(each, largest, depth + 1)] if short else ["too long"]
    if isinstance(value, dict):
        marked = [f"'{key}' is not evaluated" for key in value if not isinstance(key, str) or key.startswith("_")]
        return marked + [fault for each in value.values() for fault in _faults(each, largest, depth + 1)]
    return ["of no plain kind"]


def _class(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI's imports warn about optional packages
        from monai.networks import nets

    return getattr(nets, name)


def built(network: Mapping[str, Any], where: str) -> nn.Module:
    """The network of a checked definition, on the meta device.

    Raises:
        WeightsError: if it takes no such arguments, or has layers that look at other images.
    """
    arguments = {key: value for key, value in network.items() if key != "_target_"}
    try:
        with torch.device("meta"):
            model: nn.Module = _class(network["_target_"])(**arguments)
    except Exception as error:  # whatever its constructor does not like
        raise errors.WeightsError(f"{where}: {network['_target_']} takes no such arguments: {error}") from None
    shared = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if shared:
        raise errors.WeightsError(
            f"{where}: {len(shared)} layers of batch norm ({shared[0]}): their statistics are of a site's own images, "
            "and are neither averaged nor private. Take a network with instance or group norm"
        )
    _require_grid(network, model, where)
    return model


def _require_grid(network: Mapping[str, Any], model: nn.Module, where: str) -> None:
    """Check on the meta device that a picture comes out as a grid of its own size, a channel a class.

    Raises:
        WeightsError: if not.
    """
    try:
        side = 4 * _multiple(network)
        wanted = (1, int(network.get("out_channels", 2)), side, side)
        with torch.no_grad(), torch.device("meta"):
            given = tuple(model.eval()(torch.empty(1, int(network.get("in_channels", 1)), side, side)).shape)
    except Exception as error:  # whatever its layers do not like
        raise errors.WeightsError(f"{where}: {network['_target_']} computes nothing of a picture: {error}") from None
    if given != wanted:
        raise errors.WeightsError(
            f"{where}: {network['_target_']} makes {given} of a picture, not {wanted} (image, out_channels, height, "
            "width). Take a network whose last layer makes its classes, at the size of the picture"
        )


class Network(base.Backbone):
    """A pretrained network of full resolution: its own classes' logits are the grid that a linear head ends.

    Shapes: pixels (B, 3, H, W) -> for each tap the same grid (B, out_channels, H, W). Sides that the strides do not
    divide are padded and cut. A network of one channel is given the mean of the three.
    """

    default_head = "patch"

    def __init__(self, name: str, network: Mapping[str, Any], model: nn.Module) -> None:
        super().__init__()
        self.name, self.sha256, self.pretrained, self.depth, self.patch = name, "", True, 0, 1
        self.model = model
        self._channels = int(network.get("in_channels", 1))
        self.width = int(network.get("out_channels", 2))
        self._multiple = _multiple(network)

    def train(self, mode: bool = True) -> Network:
        """It computes the same in training: no dropout, and no layer that keeps statistics of a site's images."""
        super().train(False)
        self.training = mode
        return self

    def taps(self, count: int) -> tuple[int, ...]:
        """One grid only, as often as it is asked for."""
        return (0,) * count

    def check_size(self, size: Sequence[int]) -> list[str]:
        """Any size fits."""
        return []

    def projection(self, block: int, part: str) -> str | None:
        """There is none."""
        return None

    def wire_name(self, parameter: str) -> str:
        """MONAI's own names behind ``network.``."""
        return f"network.{parameter}"

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None = None) -> base.Features:
        """See base."""
        height, width = pixels.shape[-2:]
        shown = pixels if self._channels == 3 else pixels.mean(dim=1, keepdim=True)
        below, right = -height % self._multiple, -width % self._multiple
        padded = torch.nn.functional.pad(shown, (0, right, 0, below), mode="replicate")
        grid = self.model(padded)[..., :height, :width]
        return base.Features(pixels, (grid,) * len(taps), grid.mean(dim=(2, 3)))


def _multiple(network: Mapping[str, Any]) -> int:
    """What the sides of its input must be multiples of."""
    if network["_target_"] == "UNet":
        strides = [stride if isinstance(stride, list) else [stride, stride] for stride in network["strides"]]
        return math.lcm(*(math.prod(side) for side in zip(*strides, strict=True)))
    if network["_target_"] == "SegResNet":
        blocks: Sequence[int] = network.get("blocks_down", (1, 2, 2, 4))
        return int(2 ** (len(blocks) - 1))
    return 16


def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> Network:
    """A network that was imported from a bundle.

    Raises:
        WeightsError: if its weights are missing, damaged or not of its arrays, or its definition is refused.
    """
    values = weights.describe(settings)
    where = f"backbone '{settings.name}'"
    network = checked(values.get("network"), where)
    model = built(network, where)
    backbone = Network(settings.name, network, model)
    if not with_weights:
        backbone.sha256, backbone.config_sha256 = weights.pinned(settings)
        return backbone
    located = weights.locate(settings)
    arrays = safetensors.torch.load_file(located.folder / identity.SINGLE)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if {name: tuple(value.shape) for name, value in arrays.items()} != shapes:
        raise errors.WeightsError(
            f"{where}: its {len(arrays)} arrays are not the {len(shapes)} of {network['_target_']} with these arguments"
        )
    model.load_state_dict({name: value.float().to(device) for name, value in arrays.items()}, assign=True)
    backbone.sha256, backbone.config_sha256 = located.sha256, located.config_sha256
    return backbone
