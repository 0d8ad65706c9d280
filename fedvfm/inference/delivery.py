"""What exports share: the model with its adapter folded in, what goes into it, and the check that it is the same."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.adapters import table as adapter_table
from fedvfm.backbones import base as backbones
from fedvfm.inference import export
from fedvfm.model import adapted_model, precision
from fedvfm.tasks import detection, segmentation, words

TOLERANCE = 1e-4

Module = TypeVar("Module", bound=nn.Module)


class Deliverable(nn.Module):
    """A model that takes prepared images as they are: the contract's mean and standard deviation are part of it.

    One that needs prompts is told the same box for every class: enough to check that two models compute the same.

    Shapes: image (B, 3, h, w) in [0, 1], rows of the table (B, C) where the recipe takes one -> logits (B, K, h, w) in
        segmentation, (B, K) in classification; images and logits of whole volumes have a further side.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: adapted_model.AdaptedModel) -> None:
        super().__init__()
        contract = model.recipe.data
        self.model = model
        shape = (1, 3, *[1 for _ in contract.patch_size])
        self.register_buffer("mean", torch.tensor(contract.mean).reshape(shape))
        self.register_buffer("std", torch.tensor(contract.std).reshape(shape))

    def forward(self, image: Tensor, table: Tensor | None = None) -> Tensor:
        """See the class."""
        told = (_middle_box(image),) * (len(self.model.recipe.data.class_names) - 1)
        prompts = told if self.model.recipe.task.oracle else None
        result: Tensor = self.model((image - self.mean) / self.std, None, prompts, None, table)
        return result


def _middle_box(image: Tensor) -> backbones.Prompts:
    """Shapes: image (B, 3, h, w) -> boxes (B, 4)."""
    height, width = image.shape[-2:]
    box = torch.tensor([width / 4, height / 4, 3 * width / 4, 3 * height / 4], device=image.device)
    return backbones.Prompts(boxes=box.expand(len(image), 4))


def folded(model: adapted_model.AdaptedModel) -> adapted_model.AdaptedModel:
    """The same model on a backbone with the adapter folded into its weights; head and recipe are those of ``model``.

    A kind that adds layers or tokens cannot be folded: there the model itself is what is given.
    """
    model = _with_classifier(model)
    if not adapter_table.TABLE.get(model.recipe.adapter.kind)().foldable:
        return model
    return on(model, export.merge(model))


def _with_classifier(model: adapted_model.AdaptedModel) -> adapted_model.AdaptedModel:
    """The same model with its sentences as one matrix, without text tower; a model without sentences as it is."""
    if not isinstance(model.head, words.Words):
        return model
    whole, backbone = _beside(model), _beside(model.backbone)
    whole.head = words.Folded(model.head)
    del backbone._modules["words"]
    backbone.words = None
    whole.backbone = backbone
    return whole


def on(model: adapted_model.AdaptedModel, stock: nn.Module) -> adapted_model.AdaptedModel:
    """The same model with another stock model in its backbone."""
    made, backbone = _beside(model), _beside(model.backbone)
    backbone.model = stock.eval()
    made.backbone = backbone
    return made


def exact(model: adapted_model.AdaptedModel) -> adapted_model.AdaptedModel:
    """The same model, computing in float32: rounding to bfloat16 would hide whether two models are the same."""
    made = _beside(model)
    made.precision = precision.FLOAT32
    return made


def _beside(module: Module) -> Module:
    """A shallow copy whose parts can be exchanged without touching the first."""
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def example(model: adapted_model.AdaptedModel, batch: int = 2) -> Tensor:
    """Prepared images that are the same every time: smooth, so that nothing hangs on a single pixel.

    Shapes: (batch, 3, h, w) in [0, 1], at the contract's input size; of volumes (batch, 3, d, h, w).
    """
    rng, size = np.random.default_rng(0), model.recipe.data.patch_size
    coarse = torch.from_numpy(rng.random((batch, 3, *[8 for _ in size]), dtype=np.float32)).to(model.device)
    return backbones.resize(coarse, size)


def example_rows(model: adapted_model.AdaptedModel, batch: int = 2) -> tuple[Tensor, ...]:
    """Rows of the table, the same every time, some values missing; nothing where the recipe takes no table.

    Shapes: (batch, C), where images may be missing (batch, C + 1), with every other image missing.
    """
    chosen, rng = model.recipe.inputs, np.random.default_rng(1)
    if not chosen.columns:
        return ()
    spread = zip(chosen.centres, chosen.scales, strict=True)
    numbers = [centre + scale * rng.standard_normal(batch) for centre, scale in spread]
    words = [rng.integers(0, len(chosen.categories[name]), batch) for name in sorted(chosen.categories)]
    rows = np.stack([*numbers, *words], axis=1).astype(np.float32)
    rows[rng.random(rows.shape) < 0.25] = np.nan
    if chosen.images_missing:
        rows = np.column_stack([rows, np.arange(batch, dtype=np.float32) % 2])
    return (torch.from_numpy(rows).to(model.device),)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest value (of 1 at least)."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def parts_of(model: adapted_model.AdaptedModel, values: Tensor) -> list[Tensor]:
    """What is compared by itself, as it has a unit of its own: heat maps and distances in pixels, else all together."""
    return list(values.tensor_split([values.shape[1] - 4], dim=1)) if detects(model) else [values]


def require_same(what: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> float:
    """Their difference, if it is small.

    Raises:
        CheckpointError: if it is not; nothing is delivered then.
    """
    off = difference(found, expected)
    if not off <= tolerance:
        raise errors.CheckpointError(
            f"{what} does not compute what the adapter does: it is off by {off:.2g}, {tolerance:g} is allowed. Nothing "
            f"was written; tell us the backbone, the adapter kind and the versions of torch and transformers"
        )
    return off


def require_boxes(model: adapted_model.AdaptedModel, given: bool) -> None:
    """Refuse to predict without boxes where the adapter needs them, and with boxes where it takes none.

    Raises:
        ConfigError: naming the remedy.
    """
    kind = model.recipe.task.prompt
    if given and kind != "box":
        raise errors.ConfigError(
            "--boxes", [f"this adapter takes no boxes (recipe.task.prompt = '{kind}', not 'box'); leave it out"]
        )
    if kind == "box" and not given:
        raise errors.ConfigError(
            "predict",
            [
                "this adapter was trained with prompts (recipe.task.prompt = 'box') and segments nothing without them. "
                "Give boxes: --boxes FILE. Train with prompt = 'none' or 'auto' where nobody draws any"
            ],
        )
    if not given:
        require_promptless(model, "predict")


def require_promptless(model: adapted_model.AdaptedModel, what: str) -> None:
    """Refuse adapters that must be told where each class is: files to predict come without.

    Raises:
        ConfigError: naming the remedy.
    """
    kind = model.recipe.task.prompt
    if model.recipe.task.oracle:
        raise errors.ConfigError(
            what,
            [
                f"this adapter was trained with prompts (recipe.task.prompt = '{kind}') and segments nothing without "
                "them, and there is no way to give them here. Train with prompt = 'none', predict with --boxes where "
                "it is 'box', or export --format hf and prompt the merged model with transformers"
            ],
        )


def require_images(model: adapted_model.AdaptedModel, what: str) -> None:
    """Refuse adapters that answer for cases of many images, where only images by themselves can be answered for.

    Raises:
        ConfigError: naming the remedy.
    """
    if model.task.bags:
        raise errors.ConfigError(
            what,
            [
                f"this adapter answers for cases of many images (recipe.task.kind = '{model.recipe.task.kind}'), which "
                "this does not hold. Use 'fedvfm predict' without --graph, or export --format onnx: a graph of the "
                "backbone and one of the head"
            ],
        )


def require_no_boxes(model: adapted_model.AdaptedModel, what: str) -> None:
    """Refuse adapters that detect, where only classes of images or pixels can be answered.

    Raises:
        ConfigError: naming the remedy.
    """
    if detects(model):
        raise errors.ConfigError(
            what,
            [
                "this adapter answers with boxes (recipe.task.kind = 'detection'), which this does not hold. Use "
                "'fedvfm predict', or export --format onnx: a graph of heat maps and distances"
            ],
        )


def require_slices(model: adapted_model.AdaptedModel, what: str) -> None:
    """Refuse adapters that see whole volumes, where images are taken one by one.

    Raises:
        ConfigError: saying so.
    """
    if model.recipe.data.depth:
        raise errors.ConfigError(
            what,
            [f"this adapter sees whole volumes (recipe.data.depth = {model.recipe.data.depth}), this takes images"],
        )


def require_tableless(model: adapted_model.AdaptedModel, what: str) -> None:
    """Refuse adapters that take a row of a table beside the image, where only images can be given.

    Raises:
        ConfigError: naming the remedy.
    """
    if model.recipe.inputs.columns:
        raise errors.ConfigError(
            what,
            [
                f"this adapter takes a table beside the image (recipe.inputs: {', '.join(model.recipe.inputs.columns)})"
                ", which this does not hold. Use 'fedvfm predict --table', or export --format onnx: its graph has an "
                "input for the table"
            ],
        )


def table_lines(model: adapted_model.AdaptedModel) -> list[str]:
    """Lines of a card: the columns of the table in their order; none where the recipe takes no table."""
    chosen = model.recipe.inputs
    units = chosen.units or ("",) * len(chosen.numbers)
    lines = [
        f"  - `{name}`: a number from {low:g} to {high:g}{f' {unit}' if unit else ''}"
        for name, (low, high), unit in zip(chosen.numbers, chosen.ranges, units, strict=True)
    ]
    return [
        *lines,
        *(
            f"  - `{name}`: " + ", ".join(f"{at} for {word}" for at, word in enumerate(chosen.categories[name]))
            for name in sorted(chosen.categories)
        ),
        *(["  - last: 1 where the image is missing, which is then not looked at, else 0"] * chosen.images_missing),
    ]


def what_goes_in(model: adapted_model.AdaptedModel) -> list[str]:
    """Lines of a card, for who normalises too: how an image is prepared, the classes, and how values are normalised."""
    return [*what_is_prepared(model), normalisation_line(model)]


def what_is_prepared(model: adapted_model.AdaptedModel) -> list[str]:
    """Lines of a card, for what normalises by itself: how an image is prepared, and the classes."""
    contract, share = model.recipe.data, model.task.neighbours
    size, each = " x ".join(map(str, contract.patch_size)), "volume" if contract.depth else "image"
    names = _OUTPUTS.get(model.recipe.target.kind, "classes, in the order of the output")
    lines = [f"- {names}: {', '.join(contract.class_names)}"]
    if contract.stack > 1:
        lines.append("- channels: each slice between its two neighbours")
    elif contract.channels:
        lines.append(f"- channels, in this order: {', '.join(contract.channels)}")
    if model.recipe.words is not None:
        lines.append(f"- sentences: {model.recipe.words.describe(contract.class_names)}")
    lines.append(
        f"- input size: {size}{' (slices, height, width of whole volumes)' if contract.depth else ''}"
        + (" (every image resized to it)" if contract.fit == "resize" else " (windows at the image's own scale)")
    )
    if contract.depth:
        wanted = " x ".join(f"{side:g}" for side in contract.spacing)
        voxels = f"voxels resampled to {wanted} mm" if wanted else "voxels keep their size"
        lines.append(f"- axes: {_AXES[contract.plane]}; {voxels}")
    shown = _INTENSITIES[contract.intensity].format(each=each)
    if contract.limits is not None:
        shown = "from {:g} to {:g} in the file's units to [0, 1], the rest cut".format(*contract.limits)
    lines.append(f"- intensity: {shown}" + ("; colour becomes luminance first" if contract.grey else ""))
    if share:
        lines.append(
            f"- afterwards, in volumes: a slice's logits times {1 - 2 * share:g} and each neighbour's times {share:g}, "
            "at the ends its own in place of one that is not there; `fedvfm predict` does so itself"
        )
    return lines


def normalisation_line(model: adapted_model.AdaptedModel) -> str:
    """The line of a card on how prepared values are normalised."""
    contract = model.recipe.data
    return f"- then normalised with mean {list(contract.mean)} and standard deviation {list(contract.std)}"


_INTENSITIES = {
    "none": "values of the format's full scale to [0, 1]",
    "percentile": "the 0.5th and 99.5th percentile of each {each} to 0 and 1, the rest cut",
    "polarity": "the 0.5th and 99.5th percentile of each {each} to 0 and 1, the rest cut; {each}s with a median over "
    "0.5 inverted",
}
"""How values are brought to [0, 1] -> what a card says of it."""
_AXES = {
    "axial": "slices from feet to head, rows from front to back, columns from the patient's right to left",
    "coronal": "slices from back to front, rows from head to feet, columns from the patient's right to left",
    "sagittal": "slices from the patient's left to right, rows from head to feet, columns from front to back",
    "acquired": "slices as the scanner acquired them",
}
"""Plane -> how whole volumes run."""
_OUTPUTS = {
    "multi-label": "labels, in the order of the output",
    "ordinal": "grades, the lowest first, in the order of the output",
    "regression": "columns, in the order of the output",
    "cox": "columns of time and event that it learned from",
    "survival": "columns of time and event that it learned from",
}
"""Target -> what the names of a recipe's data are."""


def what_comes_out(model: adapted_model.AdaptedModel) -> str:
    """How the numbers of the head are read, where they are no logits of classes; else nothing."""
    if detects(model):
        heat = len(model.recipe.data.class_names) - 1
        return (
            f", first {heat} heat map{'s' * (heat > 1)} of the classes but the background, as logits: a box stands at "
            "each peak, and the sigmoid there is its score; then the distances from a pixel's middle to the left, "
            "upper, right and lower side of its box, in pixels of the input"
        )
    target = model.recipe.target
    units = ", ".join(unit for unit in target.units if unit) or "the unit of each column"
    meanings = {
        "multi-label": ", the sigmoid of each is the probability of its label",
        "ordinal": ", logarithms of the probabilities of the grades",
        "regression": f", values in {units}",
        "cox": ", one number: a case whose number is greater by 1 has e = 2.72 times the hazard; by itself a number "
        "says nothing, it is no probability",
        "survival": ", logarithms of the chances of an event in each interval that ends at "
        f"{', '.join(f'{end:g}' for end in target.bins)}, and of none",
    }
    return meanings.get(target.kind, "")


def outputs(model: adapted_model.AdaptedModel) -> tuple[str, ...]:
    """What each number is that the model gives of an image or a pixel: its classes, but of a prognosis."""
    target = model.recipe.target
    if target.kind == "cox":
        return ("logarithm of the hazard ratio",)
    if target.kind == "survival":
        intervals = itertools.pairwise((0.0, *target.bins))
        return (*(f"event from {low:g} to {high:g}" for low, high in intervals), f"no event up to {target.bins[-1]:g}")
    return model.recipe.data.class_names


def licence_line(model: adapted_model.AdaptedModel) -> list[str]:
    """Line of a card: the terms of use of the backbone's weights; none where they are made from the seed."""
    return [f"- backbone licence: {model.licence}"] if model.backbone.sha256 else []


def dense(model: adapted_model.AdaptedModel) -> bool:
    """Whether the model gives a class for every pixel, rather than one for the image."""
    return isinstance(model.task, segmentation.Segmentation)


def detects(model: adapted_model.AdaptedModel) -> bool:
    """Whether the model answers with boxes."""
    return isinstance(model.task, detection.Detection)
