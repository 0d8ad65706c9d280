"""What one patient adds: medians, units, colours, labels; and images that cannot be used, by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.data import sample as data
from fedvfm.survey import collection, layout
from tests.survey import hospital

W = layout.WHOLE


def row(survey: object, read: collection.Read = hospital.read, count: int = 2) -> dict[str, list[int]]:
    samples = [data.Sample(f"6-{number}", label=number % 3, patient="p") for number in range(count)]
    parts = collection.row(survey, layout.groups(survey), samples, read)  # type: ignore[arg-type]
    return {name: values.tolist() for name, values in parts.items()}


def test_intensities_are_in_the_units_that_were_asked_for() -> None:
    """The pictures are uniform from 0 to 1, which stand for -1000 and 1000."""
    survey = hospital.ask(scale="file", intensity_range=[-1000.0, 1000.0], intensity_bins=4)
    counts = row(survey)["intensity-0"]
    assert counts[0] == counts[5] == counts[6] == 0
    assert all(abs(count / W - 0.25) < 0.02 for count in counts[1:5])
    half = hospital.ask(intensity_range=[0.0, 0.5], intensity_bins=1)
    below, inside, above, none = row(half)["intensity-0"]
    assert (below, none) == (0, 0)
    assert abs(inside / W - 0.5) < 0.02
    assert inside + above == W


def test_padding_counts_as_no_pixel() -> None:
    def padded(sample: data.Sample) -> data.Pixels:
        pixels = hospital.read(sample)
        return dataclasses.replace(pixels, padded=np.ones(pixels.image.shape[1:], bool))

    counts = row(hospital.ask(), padded)
    assert counts["intensity-0"][-1] == counts["foreground-0"][-1] == W


def test_the_lower_median_of_a_patients_images_counts() -> None:
    def of_unlike_size(sample: data.Sample) -> data.Pixels:
        side = (40, 120, 250)[int(sample.id[-1])]
        return data.Pixels(np.zeros((1, side, side), np.float32), np.zeros((side, side), np.int64))

    survey = hospital.ask(size_edges=[64, 128, 256])
    assert row(survey, of_unlike_size, 3)["rows"] == [0, W, 0, 0]
    assert row(survey, of_unlike_size, 2)["rows"] == [W, 0, 0, 0]
    assert row(survey, of_unlike_size, 2)["row-spacing"][-1] == W  # not known


def test_at_most_so_many_images_of_a_patient_are_opened() -> None:
    opened = []

    def noting(sample: data.Sample) -> data.Pixels:
        opened.append(sample.id)
        return hospital.read(sample)

    row(hospital.ask(images_per_patient=2), noting, 5)
    assert opened == ["6-0", "6-4"]


def test_classes_of_images_need_no_pixels() -> None:
    def read(sample: data.Sample) -> data.Pixels:
        raise AssertionError

    survey = hospital.ask(task="classification", statistics=["patients", "images", "classes", "class-shares"])
    counts = row(survey, read, 4)
    assert counts["class-patients"] == [W, W, W]
    assert counts["class-shares"] == [W // 2, W // 4, W // 4]
    assert counts["images"][layout.place(layout.groups(survey)[1], 4)] == W


@pytest.mark.parametrize(
    "change",
    [
        {"mask": None},
        {"mask": np.full((300, 340), 7, np.int64)},
        {"mask": np.full((300, 340), -1, np.int64)},
        {"mask": np.zeros((3, 3), np.int64)},
        {"units": None},
    ],
)
def test_an_image_that_cannot_be_used_is_named(change: dict[str, object]) -> None:
    survey = hospital.ask(scale="file")
    with pytest.raises(errors.DataError, match="6-0"):
        row(survey, lambda sample: dataclasses.replace(hospital.read(sample), **change))  # type: ignore[arg-type]


def test_a_site_that_labels_some_classes_answers_nothing_of_them() -> None:
    """What it does not label would count as background."""
    survey = hospital.ask()
    assert collection.label_faults(survey, ()) == []
    assert collection.label_faults(survey, ("disc", "rare")) == []
    (fault,) = collection.label_faults(survey, ("disc",))
    assert "rare is not labelled here" in fault
    assert collection.label_faults(hospital.ask(statistics=["patients", "sizes"]), ("disc",)) == []


def test_sizes_alone_need_no_mask() -> None:
    survey = hospital.ask(statistics=["sizes"])
    counts = row(survey, lambda sample: dataclasses.replace(hospital.read(sample), mask=None))
    assert sum(counts["rows"]) == W
