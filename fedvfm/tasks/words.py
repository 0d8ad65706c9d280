"""A head that holds an image against sentences: zero-shot as they are, or with context vectors that are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedvfm.backbones import base, towers
from fedvfm.config import schema

BEGIN = 0.02
"""Standard deviation of context vectors that begin as no words."""
TARGETS = ("class", "multi-label")


class Words(nn.Module):
    """Cosine of image and class, times the scale of the weights, plus their bias.

    What trains is ``context``: the difference of the context vectors from the words that they begin as, or, without
    such words, the vectors themselves. The towers belong to the backbone, and are no part of this module.

    Shapes: Features -> (B, K); context (M, D), or (K, M, D) where each class has its own.
    Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022 (CoOp), with the class at the end.
    """

    grids = 1

    def __init__(self, recipe: schema.Recipe, own: towers.Towers) -> None:
        super().__init__()
        words = recipe.words
        if words is None:
            raise ValueError("the recipe has no words")
        self._own = (own,)  # in a tuple: its parameters are not this head's
        self._kept: tuple[Tensor, bool, Tensor] | None = None
        self.context: nn.Parameter | None = None
        if words.learned:
            whose = (len(recipe.data.class_names),) if words.per_class else ()
            shape = (*whose, words.context, own.width)
            self.context = nn.Parameter(torch.zeros(shape) if words.begins else BEGIN * torch.randn(shape))

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        (own,) = self._own
        images, classes = own.image(features), self.classes()
        with torch.autocast(images.device.type, enabled=False):
            return own.scale.exp() * images @ classes.T + own.bias

    def classes(self) -> Tensor:
        """The embedding of each class; computed once while nothing of it changes. Shapes: (K, E), of length 1."""
        (own,) = self._own
        if self.context is None:
            return own.classes
        if torch.is_grad_enabled() or self.context.is_meta:
            return own.context(own.begun + self.context)
        # bfloat16 and float32 give two embeddings.
        narrow = torch.is_autocast_enabled(self.context.device.type)
        if self._kept is None or self._kept[1] != narrow or not torch.equal(self._kept[0], self.context):
            classes = own.context(own.begun + self.context)
            self._kept = (self.context.detach().clone(), narrow, classes)
        return self._kept[2]


class Folded(nn.Module):
    """The same with the sentences' embeddings as one matrix: what an export holds, without text tower or tokenizer.

    Shapes: Features -> (B, K).
    """

    classes: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, head: Words) -> None:
        super().__init__()
        (own,) = head._own
        self.kind, self.project_image = own.kind, own.project_image
        self.register_buffer("classes", own.scale.exp() * head.classes())
        self.register_buffer("bias", own.bias.detach())

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        images = towers.images(self.kind, self.project_image, features)
        return images @ self.classes.T + self.bias

    def matrix(self) -> dict[str, Tensor]:
        """``classes`` (K, E) and ``bias`` (): logits of an ``image_embeds`` of transformers, which has length 1."""
        return {"classes": self.classes, "bias": self.bias}


def faults(recipe: schema.Recipe, *, bias: bool | None) -> list[str]:
    """What of a recipe does not fit its words, one sentence a fault.

    Args:
        recipe: any.
        bias: whether the model has one, as SigLIP; None where that is not known.
    """
    words, target = recipe.words, recipe.target.kind
    if words is None:
        return []
    wrong = words.faults(recipe.data.class_names)
    if recipe.task.kind != "classification":
        wrong.append(f"recipe.words: task '{recipe.task.kind}' does not read it; use 'classification', or leave it out")
    if recipe.task.head is not None:
        wrong.append(f"recipe.task.head = '{recipe.task.head}': the words take its place; leave one of them out")
    if recipe.inputs.columns:
        wrong.append("recipe.words: sentences have no place for recipe.inputs; leave one of them out")
    if target not in TARGETS:
        wrong.append(f"recipe.words: target '{target}' has no sentence a class; known: {', '.join(TARGETS)}")
    if target == "multi-label" and bias is False:
        wrong.append(
            "recipe.words: target 'multi-label' asks for the chance of each sentence by itself, which a clip model was "
            "not trained to give; use a siglip model, or a head"
        )
    fields = schema.DataContract.model_fields
    if (recipe.data.mean, recipe.data.std) == (fields["mean"].default, fields["std"].default):
        wrong.append(
            "recipe.data.mean and std are ImageNet's, with which no clip or siglip model was trained: the sentences "
            "would be held against other images. OpenAI's CLIP: mean = [0.48145466, 0.4578275, 0.40821073], std = "
            "[0.26862954, 0.26130258, 0.27577711]; SigLIP: 0.5 each; else those of the model's preprocessor_config.json"
        )
    if not words.learned and recipe.adapter.kind == "head-only":
        wrong.append(
            "recipe.words.mode = 'zero-shot': nothing would train with adapter kind 'head-only'. Use prompt-learning "
            "or an adapter such as lora; what the sentences reach by themselves is the baseline 'zero-shot' of a "
            "simulation"
        )
    return wrong
