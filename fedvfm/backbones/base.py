"""What a backbone is: a frozen model that turns pixels into token grids, with our own names for its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Features:
    """What a head sees.

    Shapes: image (B, 3, H, W) normalised; each grid (B, D, h, w); pooled (B, D); masks (B, M, h, w), the logits of
    every mask token of a mask decoder, None where it is not open.
    """

    image: Tensor
    grids: tuple[Tensor, ...]
    pooled: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a mask decoder is told of the object to segment, one set an image.

    Shapes: points (B, N, 2) as (x, y) in pixels of the input; labels (B, N), 1 on the object, 0 off it, -10 for
    padding; boxes (B, 4) as (left, top, right, bottom); present (B,), False where the image has no such object and
    the other numbers mean nothing; masks (B, 4h, 4w) of an image embedding (B, C, h, w), the logits of an earlier mask
    of the object.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    present: Tensor | None = None
    masks: Tensor | None = None


Decode = Callable[[Sequence[Prompts]], Tensor]
"""One set of prompts a foreground class -> logits of every class. Shapes: (B, 1 + P, 4h, 4w), the background first."""

Propose = Callable[[Tensor, Sequence[int], Decode], Tensor]
"""Image embedding (B, C, h, w), size of the input (height, width) and a way to decode -> masks (B, M, 4h, 4w)."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the first blocks computed: it does not change while the blocks before the first adapted one are frozen.

    Attributes:
        stop: number of blocks done.
        hidden: tokens after them, (B, T, D).
        taken: block count -> tokens tapped there.
    """

    stop: int
    hidden: Tensor
    taken: Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a fused linear layer that are one projection.

    Attributes:
        path: of the layer.
        start, stop: its rows.
    """

    path: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Seat:
    """A place where a bottleneck can sit at a frozen branch of the model.

    Attributes:
        name: wire name of the bottleneck there (``block.03.ffn``).
        paths: the branch's modules, computed one after the other.
        width: channels of what enters and leaves.
        side: "beside" sees what enters the branch and is added to what leaves it; "behind" sees what leaves it,
            "before" what enters it, and each is added to what it sees.
    """

    name: str
    paths: tuple[str, ...]
    width: int
    side: Literal["beside", "behind", "before"] = "beside"


class Backbone(nn.Module):
    """Base of all backbones.

    Attributes:
        name: as the recipe names it.
        sha256: of the weights file; empty where the weights are made from the seed.
        config_sha256: of the settings that decide what the weights compute; empty where there is no ``config.json``.
        pretrained: whether dense adapters travel as differences from the frozen weights.
        width: channels of a grid.
        depth: number of blocks; 0 where the model has none that can be adapted apart.
        patch: side of a patch in pixels; sides of the input are multiples of it.
        tokens: block -> prompt tokens (N, D) that enter before it, in place of those that entered earlier.
        tokens_refused: why prompt tokens cannot enter; empty where they can.
        mask_tokens: tokens of its mask decoder, each of which gives one mask; 0 where it has none.
        stock_mask_tokens: how many of them are pretrained.
        promptable: whether it can be told where each class is (see ``prompted``).
        prompt_width: channels of the image embedding that its prompts meet; 0 where it takes none.
        default_parts: decoder parts that train where the recipe names none.
        volumetric: whether it takes whole volumes: pixels and grids then have an axis of slices before their sides.
        default_head: of segmentation, where the recipe names none; None leaves it to the task.
        stock_differs: why the stock class computes something else with the same weights; empty where it does not.
        slices: how many slices of a volume it is given of each sample, which meet in depth branches; their middle is
            the sample. 1 where an image is a sample.
        joined: blocks behind which the middle slice goes on alone.
        behind: 1 where a neck follows the blocks that counts as one more in a prefix: it is computed once where it is
            frozen too; 0 where there is none or a head sees what enters it.
        words: what joins its images with the recipe's sentences (:mod:`fedvfm.backbones.towers`); None without words.
    """

    name: str
    sha256: str
    config_sha256: str = ""
    pretrained: bool
    width: int
    depth: int
    patch: int
    model: nn.Module
    tokens: nn.ParameterDict
    tokens_refused: str = "it has no sequence of tokens"
    mask_tokens: int = 0
    stock_mask_tokens: int = 0
    promptable: bool = False
    prompt_width: int = 0
    default_parts: tuple[str, ...] = ()
    volumetric: bool = False
    default_head: str | None = None
    stock_differs: str = ""
    slices: int = 1
    joined: int = 0
    behind: int = 0
    words: Any

    def __init__(self) -> None:
        super().__init__()
        self.words = None

    def taps(self, count: int) -> tuple[int, ...]:
        """Block counts after which ``count`` grids are taken, evenly spaced, the last after the last block.

        A model of fewer blocks than grids gives a grid twice.
        """
        return tuple(max(1, round(self.depth * (index + 1) / count)) for index in range(count))

    def check_size(self, size: Sequence[int]) -> list[str]:
        """Faults of an input size (height, width), one sentence each."""
        raise NotImplementedError

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> Prefix:
        """Embedding and the first ``stop`` blocks."""
        raise NotImplementedError

    def advanced(self, prefix: Prefix, stop: int, taps: Sequence[int]) -> Prefix:
        """``prefix`` with the blocks up to ``stop`` done too."""
        raise NotImplementedError

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: Prefix | None = None) -> Features:
        """Run the model, or what is left of it after ``prefix``.

        Shapes: pixels (B, 3, H, W); see Features.
        """
        raise NotImplementedError

    def prompted(
        self, pixels: Tensor, taps: Sequence[int], prefix: Prefix | None, prompts: Sequence[Prompts]
    ) -> Features:
        """``features`` of a model that is told where each foreground class is: masks are the logits of every class.

        Shapes: masks (B, 1 + number of prompts, h, w); the background is first.
        """
        raise NotImplementedError

    def proposed(self, pixels: Tensor, taps: Sequence[int], prefix: Prefix | None, propose: Propose) -> Features:
        """``features`` of a model whose prompts come from its own image embedding: masks are what ``propose`` makes."""
        raise NotImplementedError

    def projection(self, block: int, part: str) -> str | None:
        """Module path of a linear projection (``part`` in q, k, v, o, fc1, fc2), or None if there is none."""
        raise NotImplementedError

    def fused(self, block: int, part: str) -> Slice | None:
        """Where a projection lies in a fused layer, or None if it is a layer of its own (see ``projection``)."""
        return None

    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Named parts of the mask decoder -> paths of the modules that own their parameters."""
        return {}

    def open_masks(self, count: int, seed: int) -> None:
        """Let ``features`` give masks, at least ``count``: tokens the pretrained decoder lacks are added and seeded.

        They are the same wherever the seed is, and frozen as all else.
        """
        raise NotImplementedError

    def activations(self, size: Sequence[int]) -> int:
        """About how many numbers one image of ``size`` (height, width) keeps for the backward pass."""
        # A transformer block keeps about 34 floats a token and channel (Korthikanti et al., 2022).
        tokens = (size[0] // self.patch) * (size[1] // self.patch)
        return 34 * tokens * self.width * max(self.depth, 1)

    def seats(self) -> tuple[Seat, ...]:
        """Where bottlenecks can sit; ``block.NN.ffn`` is the feed-forward branch of a block."""
        return ()

    def wire_name(self, parameter: str) -> str:
        """Our stable name for one of the model's parameters."""
        raise NotImplementedError

    def stock(self, model: nn.Module) -> nn.Module:
        """A model of this shape as an object of the stock class, on the same tensors: what an export is made of."""
        return model

    def parameters_total(self) -> int:
        """Number of the model's own parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


Loader = TypeVar("Loader", bound=Callable[..., Any])


def takes(*options: str) -> Callable[[Loader], Loader]:
    """Mark a loader with the keys of ``recipe.backbone.options`` that it reads; others are refused.

    A loader without the mark takes no options.
    """

    def mark(load: Loader) -> Loader:
        load.known_options = options  # type: ignore[attr-defined]
        return load

    return mark


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of (B, C, H, W) to ``size`` (H, W); of (B, C, D, H, W) trilinear."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return torch.nn.functional.interpolate(image, size=tuple(size), mode=mode, align_corners=False)
