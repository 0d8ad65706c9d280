"""Images that an export is measured on: read as in prediction, evenly spread over what is given."""

from __future__ import annotations

from pathlib import Path

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import transforms
from fedvfm.data.decoding import decoder
from fedvfm.inference import images
from fedvfm.model import adapted_model

LEAST, MOST = 32, 128
"""Images that are needed, and that are taken of more."""
HELD_BYTES = 512 * 1024**2
"""Of prepared images; beyond it no more than the least number are taken."""


def read(model: adapted_model.AdaptedModel, source: Path) -> list[transforms.Image]:
    """Pictures and slices below a folder, prepared as the recipe asks; of many some, evenly spaced in their order.

    Shapes: (3, h, w) in [0, 1] each.

    Raises:
        DataError: if they are fewer than :data:`LEAST`, or one cannot be used.
    """
    decoder.limit(schema.DecodingLimits())
    contract = model.recipe.data
    reader = images.Images(contract)
    places = reader.places(source, "--calibrate")
    if len(places) < LEAST:
        raise errors.DataError(
            f"--calibrate {source}: {len(places)} images and slices; ranges are measured on at least {LEAST}, of the "
            "kind that will be predicted. Give more"
        )
    height, width = contract.input_size
    chosen = images.evenly(places, min(max(LEAST, HELD_BYTES // (3 * height * width * 4)), MOST))
    patch, classes = model.backbone.patch, len(contract.class_names)
    return [transforms.prepare(reader.at(place), contract, classes, multiple=patch).image for place in chosen]
