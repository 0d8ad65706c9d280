"""What joins an image with sentences in CLIP and SigLIP: the frozen text tower, and the way of an image's vector to it.

The image tower is the backbone itself (:mod:`fedvfm.backbones.vit`). All else is read only where a recipe has words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.backbones import base, identity, stock, tokens, weights
from fedvfm.config import schema
from fedvfm.config import words as words_config

MODELS = {tokens.CLIP: "CLIPModel", tokens.SIGLIP: "SiglipModel"}
"""``model_type`` of a model with both towers -> its class in transformers."""
_MOST_AT_ONCE = 64
"""Sentences embedded together where nothing of them trains."""


class Towers(nn.Module):
    """The frozen parts beside the image tower, and the sentences of one recipe.

    Args:
        kind: "clip" or "siglip".
        model: the stock model with both towers; of its image tower only the last pooling is kept.

    Attributes:
        scale, bias: of the cosine of image and sentence, fixed by the weights.
        classes: (K, E), of length 1: the classes' sentences, where nothing of them trains.
        before: (K, L, D), the sentences before the text tower; where context trains.
        begun: (M, D), what the context vectors begin as.
    """

    classes: Tensor
    before: Tensor
    begun: Tensor
    ends: Tensor

    def __init__(self, kind: str, model: Any) -> None:
        super().__init__()
        self.kind, self.text = kind, model.text_model
        clip = kind == tokens.CLIP
        self.project_image: nn.Module = model.visual_projection if clip else model.vision_model.head
        self.project_text: nn.Module = model.text_projection if clip else model.text_model.head
        self.scale = nn.Parameter(model.logit_scale.detach().clone().reshape(()), requires_grad=False)
        bias = torch.zeros_like(self.scale) if clip else model.logit_bias.detach().clone().reshape(())
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.first = 0
        self.requires_grad_(False)
        self.eval()

    @property
    def width(self) -> int:
        """Numbers of a token before the text tower."""
        return int(self.text.embeddings.token_embedding.weight.shape[1])

    def image(self, features: base.Features) -> Tensor:
        """Images where they meet sentences: see :func:`images`."""
        return images(self.kind, self.project_image, features)

    def embed(self, tokens_in: Tensor, ends: Tensor) -> Tensor:
        """Sentences through the text tower, each of length 1.

        Shapes: tokens_in (S, L, D), ends (S,) -> (S, E), float32.
        Source: Radford et al., ICML 2021 (CLIP: causal attention, the end token's state); Zhai et al., ICCV 2023
            (SigLIP: attention over all, padding too, and the last token's state).
        """
        text = self.text
        hidden = tokens_in + text.embeddings.position_embedding.weight[: tokens_in.shape[1]]
        arguments = {"is_causal": True} if self.kind == tokens.CLIP else {}
        for layer in text.encoder.layers:
            answer = layer(hidden, None, **arguments)
            hidden = answer[0] if isinstance(answer, tuple) else answer
        states = hidden[torch.arange(len(ends), device=hidden.device), ends]
        return _unit(self.project_text(text.final_layer_norm(states)))

    @torch.no_grad()
    def take(self, words: words_config.WordsConfig, encoded: tokens.Encoded) -> None:
        """Keep a recipe's sentences: their embeddings, or what the text tower is given of them."""
        table = self.text.embeddings.token_embedding.weight
        ids = torch.tensor(encoded.ids, device=table.device)
        ends = torch.tensor(encoded.ends, device=table.device)
        self.first = encoded.first
        if not words.learned:
            parts = zip(torch.split(ids, _MOST_AT_ONCE), torch.split(ends, _MOST_AT_ONCE), strict=True)
            vectors = torch.cat([self.embed(table[some], last) for some, last in parts])
            means = vectors.reshape(-1, len(words.templates), vectors.shape[1]).mean(dim=1)
            self.register_buffer("classes", _unit(means), persistent=False)
            return
        self.register_buffer("before", table[ids], persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        begun = self.before[0, self.first : self.first + words.context].clone()
        self.register_buffer("begun", begun if words.begins else torch.zeros_like(begun), persistent=False)

    def shapes_only(self, words: words_config.WordsConfig, classes: int) -> None:
        """The same on the meta device, where no sentence is read."""
        length, width = self.text.embeddings.position_embedding.weight.shape
        with torch.device("meta"):
            empty = {
                "classes": torch.zeros(classes, self.outputs),
                "before": torch.zeros(classes, length, width),
                "ends": torch.zeros(classes, dtype=torch.long),
                "begun": torch.zeros(words.context, width),
            }
        self.first = int(self.kind == tokens.CLIP)
        for name, value in empty.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def outputs(self) -> int:
        """Numbers of an image or a sentence where they meet."""
        projection: Any = self.project_text
        return int(projection.weight.shape[0])

    def context(self, vectors: Tensor) -> Tensor:
        """The classes' sentences with context vectors in place.

        Shapes: vectors (M, D), or (K, M, D) where each class has its own -> (K, E), of length 1.
        """
        own = vectors if vectors.dim() == 3 else vectors.expand(len(self.before), -1, -1)
        behind = self.first + own.shape[1]
        return self.embed(torch.cat([self.before[:, : self.first], own, self.before[:, behind:]], dim=1), self.ends)


def images(kind: str, project: nn.Module, features: base.Features) -> Tensor:
    """Images where they meet sentences: CLIP's projected class token, SigLIP's patches pooled by attention.

    Shapes: pooled (B, D) or the last grid (B, D, h, w) -> (B, E), of length 1, float32.
    """
    if kind == tokens.CLIP:
        return _unit(project(features.pooled))
    return _unit(project(features.grids[-1].flatten(2).transpose(1, 2)))


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1, in float32."""
    exact = vectors.float()
    unit: Tensor = exact / torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return unit


def refused(config: Mapping[str, Any]) -> str:
    """Why a model takes no sentences; empty where it does."""
    kind = str(config.get("model_type"))
    if kind in MODELS:
        return ""
    if kind in ("clip_vision_model", "siglip_vision_model"):
        return "it is the image part alone; import the whole model, with its text tower and tokenizer.json"
    return f"model type '{kind}' has no text tower that is read here; those of {', '.join(sorted(MODELS))} are"


def _config(values: Mapping[str, Any]) -> tuple[str, Any]:
    """Class in transformers, and its configuration."""
    name = MODELS[str(values["model_type"])]
    chosen = {key: value for key, value in values.items() if key != "model_type"}
    return name, stock.transformers_class(name).config_class(**chosen)


def require_whole(folder: Path, given: Path) -> None:
    """Check that a folder of converted weights holds both towers.

    Args:
        folder: of the weights.
        given: what they were made from, as errors name it.

    Raises:
        WeightsError: if arrays are missing or of another shape.
    """
    located = weights.Located(folder, identity.read_config(folder), "", "")
    name, config = _config(located.config)
    try:
        stock.read(name, located, config)
    except errors.WeightsError as error:
        raise errors.WeightsError(str(error).replace(str(folder), str(given))) from None


def open_towers(recipe: schema.Recipe, *, with_weights: bool, device: str) -> Towers:
    """The towers of a recipe's backbone, with its sentences.

    Args:
        recipe: with words.
        with_weights: False builds shapes only, on the meta device.
        device: where to compute.

    Raises:
        ConfigError: if the model has no text tower, or sentences cannot be read as they are meant.
        WeightsError: if weights or tokenizer are not here, damaged, or not the pinned ones.
    """
    words, settings = recipe.words, recipe.backbone
    if words is None:
        raise ValueError("the recipe has no words")
    located = weights.locate(settings) if with_weights else None
    values = weights.describe(settings) if located is None else located.config
    why = refused(values)
    if why:
        raise errors.ConfigError("recipe", [f"recipe.words: backbone '{settings.name}': {why}"])
    kind = str(values["model_type"])
    with stock.described(settings.name):
        name, config = _config(values)
        if located is None:
            with torch.device("meta"):
                shapes = Towers(kind, stock.transformers_class(name)(config))
            shapes.shapes_only(words, len(recipe.data.class_names))
            return shapes
    own = tokens.opened(located.folder, values, words)
    encoded = own.encode(words, recipe.data.class_names, tokens.own_length(values))
    towers: Any = stock.shared(located.key, name, device, lambda: Towers(kind, stock.read(name, located, config)))
    towers.take(words, encoded)
    result: Towers = towers
    return result
