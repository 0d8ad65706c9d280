"""A hospital in memory: pictures drawn from the patient's number, several with two images, some without structures."""

from __future__ import annotations

import hashlib

import numpy as np

from fedvfm.config import schema
from fedvfm.config import survey as surveys
from fedvfm.data import sample as data
from fedvfm.survey import collection, statistics

CLASSES = ("background", "disc", "rare")


def ask(**values: object) -> surveys.Survey:
    about = {
        "title": "t",
        "task": "segmentation",
        "class_names": CLASSES,
        "statistics": [name for name in surveys.STATISTICS if name != "columns"],
    }
    return schema.parse(surveys.Survey, {**about, **values}, "survey")


def samples(first: int, last: int) -> list[data.Sample]:
    """Patients of these numbers; every third one has two images."""
    return [
        data.Sample(f"{patient}-{image}", label=patient % 3, patient=f"p{patient}")
        for patient in range(first, last)
        for image in range(1 + (patient % 3 == 0))
    ]


def read(sample: data.Sample) -> data.Pixels:
    patient = int(sample.id.partition("-")[0])
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:4], "big"))
    side = 100 if patient % 2 else 300
    image = rng.random((1, side, side + 40), dtype=np.float32)
    mask = np.zeros(image.shape[1:], np.int64)
    if patient % 5:
        mask[: side // 4] = 1
    if patient % 17 == 3:
        mask[-1] = 2
    spacing = (0.5, 0.75) if patient % 4 else None
    return data.Pixels(image, mask, spacing, (-1000.0, 1000.0))


def totals(survey: surveys.Survey, first: int, last: int) -> statistics.Totals:
    return collection.totals(survey, collection.patients(samples(first, last)), read)
