"""Structures finer than the model's pixels, seen before training: what is lost there no arm can score."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from fedvfm.config import schema
from fedvfm.data import transforms
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.readiness import image_findings

LOOKED_AT = 3
"""Masks of each hospital."""


def note(what: schema.Experiment, hospitals: Sequence[virtual_hospitals.Hospital]) -> str:
    """How much of a few training masks is left at the recipe's size, where it is little; else empty."""
    contract = what.recipe.data
    if what.recipe.task.kind != "segmentation" or contract.fit != "resize":
        return ""
    rows = [transforms.kept_dice(mask, contract.input_size) for hospital in hospitals for mask in _masks(hospital)]
    lost = image_findings.lost_detail(rows, contract.class_names)
    if not lost:
        return ""
    height, width = contract.input_size
    return (
        f"brought to recipe.data.input_size = {height} x {width} and back, masks keep a Dice of {lost} with themselves "
        f"({len(rows)} looked at), and no arm can score much more; a larger input_size, or recipe.data.fit = 'native' "
        "(crops at the images' own scale), keeps finer structures"
    )


def _masks(hospital: virtual_hospitals.Hospital) -> Iterator[transforms.Mask]:
    """Of training samples at even distances; one that cannot be read is told of where it is trained on."""
    if hospital.without_labels:
        return
    for sample in hospital.train[:: max(1, len(hospital.train) // LOOKED_AT)][:LOOKED_AT]:
        with contextlib.suppress(Exception):  # a source of a third party may fail in any way
            mask = hospital.read(sample).mask
            if mask is not None:
                yield mask
