"""The thresholding baseline: Otsu by hand, exact thresholds against brute force, and real nuclei."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.data import sample as data
from fedvfm.simulation import classical

SITES = ("fluo256", "fluo360", "fluo696", "purple320", "he_white320", "brightfield1024")


@dataclass
class Site:
    pixels: dict[str, data.Pixels]
    train: Sequence[data.Sample] = field(init=False)
    without_labels: bool = False

    def __post_init__(self) -> None:
        self.train = [data.Sample(id=name) for name in self.pixels]

    def read(self, sample: data.Sample) -> data.Pixels:
        return self.pixels[sample.id]


def site(*pairs: tuple[np.ndarray, np.ndarray | None]) -> Site:
    """Hospital of (H, W) images with their masks."""
    return Site({str(i): data.Pixels(image[None].astype(np.float32), mask) for i, (image, mask) in enumerate(pairs)})


def blob(inside: float, outside: float, rows: slice = slice(4, 9)) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((16, 16), dtype=np.int64)
    mask[rows, 3:10] = 1
    rng = np.random.default_rng(0)
    return (np.where(mask == 1, inside, outside) + rng.uniform(-0.05, 0.05, mask.shape)), mask


def test_otsu_splits_where_the_between_group_variance_is_largest() -> None:
    values = np.random.default_rng(0).beta(2, 5, (30, 30)).astype(np.float32)
    bright = classical.otsu(values)

    def variance(side: np.ndarray) -> float:
        share = side.mean()
        return float(share * (1 - share) * (values[side].mean() - values[~side].mean()) ** 2)

    best = max(variance(values > cut) for cut in np.sort(values.ravel())[:-1])
    assert variance(bright) == pytest.approx(best, rel=1e-3)
    assert values[bright].min() > values[~bright].max()


def test_otsu_by_hand_and_on_a_constant_image() -> None:
    values = np.array([[0.1, 0.1, 0.1, 0.15, 0.8, 0.9]], dtype=np.float32)
    assert classical.otsu(values).tolist() == [[False, False, False, False, True, True]]
    assert not classical.otsu(np.full((4, 4), 0.3, dtype=np.float32)).any()
    assert classical.fit([site(blob(0.2, 0.9))], 2).predict(np.ones((1, 4, 4), np.float32)).sum() == 0


def test_polarity_is_decided_for_each_image() -> None:
    hospitals = [site(blob(0.9, 0.2)), site(blob(0.2, 0.9))]
    fitted = classical.fit(hospitals, 2)
    for hospital in hospitals:
        pixels = hospital.read(hospital.train[0])
        predicted = fitted.predict(pixels.image)
        np.testing.assert_array_equal(predicted, pixels.mask)
        assert predicted.dtype == np.int64
    assert "border" in fitted.describe()


def test_the_rule_follows_the_training_images() -> None:
    """Each rule wins where only it is right: large foregrounds of one polarity, small ones along the border."""
    image, mask = blob(0.9, 0.2)
    assert classical.fit([site((1 - image, 1 - mask), (1 - image, 1 - mask))], 2).describe().endswith("brighter side")
    assert classical.fit([site((image, 1 - mask))], 2).describe().endswith("darker side")
    frame = np.pad(np.zeros((14, 14), dtype=np.int64), 1, constant_values=1)
    rim = site((0.2 + 0.6 * frame, frame)), site((0.8 - 0.6 * frame, frame))
    assert classical.fit(rim, 2).describe().endswith("smaller side")


def test_images_without_foreground_have_no_say() -> None:
    image, mask = blob(0.2, 0.9)
    empty = (image, np.zeros_like(mask))
    assert classical.fit([site((image, mask), empty, empty)], 2) == classical.fit([site((image, mask))], 2)
    assert isinstance(classical.fit([site(empty)], 2), classical.Otsu)


def brute_force(counts: np.ndarray) -> float:
    classes, levels = counts.shape
    scores = []
    for order in itertools.permutations(range(classes)):
        for cuts in itertools.combinations_with_replacement(range(levels + 1), classes - 1):
            ends = (0, *cuts, levels)
            scores.append(score(counts, order, ends))
    return max(scores)


def score(counts: np.ndarray, order: Sequence[int], ends: Sequence[int]) -> float:
    total = 0.0
    for k, low, high in zip(order, ends, ends[1:], strict=False):
        if k:
            total += 2 * counts[k, low:high].sum() / max(counts[k].sum() + counts[:, low:high].sum(), 1)
    return total / (len(counts) - 1)


@pytest.mark.parametrize(("classes", "levels", "seed"), [(2, 9, 0), (3, 8, 1), (3, 8, 2), (4, 6, 3), (4, 6, 4)])
def test_thresholds_are_the_best_there_are(classes: int, levels: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 20, (classes, levels)).astype(float)
    counts[:, levels // 2] = 0
    found = classical.best_thresholds(counts)
    assert sorted(found.order) == list(range(classes))
    assert list(found.cuts) == sorted(found.cuts)
    assert score(counts, found.order, (0, *found.cuts, levels)) == pytest.approx(brute_force(counts))


def test_three_classes_in_any_order_of_brightness() -> None:
    mask = np.repeat(np.arange(3), 16).reshape(6, 8)
    image = np.array([0.5, 0.9, 0.1])[mask] + np.random.default_rng(0).uniform(-0.1, 0.1, mask.shape)
    fitted = classical.fit([site((image, mask))], 3)
    np.testing.assert_array_equal(fitted.predict(image[None].astype(np.float32)), mask)
    assert fitted.describe().endswith("from dark to bright: 2, 0, 1")


def test_colour_is_read_as_luminance() -> None:
    image = np.stack([np.full((2, 2), level, np.float32) for level in (1.0, 0.5, 0.0)])
    np.testing.assert_allclose(classical.grey(image), 0.299 + 0.5 * 0.587, rtol=1e-6)


def test_what_it_cannot_do_it_says() -> None:
    image, mask = blob(0.9, 0.2)
    with pytest.raises(errors.DataError, match="2 to 8 classes, not 9"):
        classical.fit([site((image, mask))], 9)
    with pytest.raises(errors.DataError, match="no hospital has a training sample"):
        classical.fit([site()], 2)
    with pytest.raises(errors.DataError, match="'0' has no mask"):
        classical.fit([site((image, None))], 2)
    with pytest.raises(errors.DataError, match="holds values 0 to 3, the task has classes 0 to 2"):
        classical.fit([site((image, mask * 3))], 3)


def nuclei(folder: Path, name: str, rows: list[dict[str, str]]) -> Site:
    pixels = {}
    for row in rows:
        image = np.asarray(Image.open(folder / "images" / f"{row['id']}.png").convert("RGB"), dtype=np.float32) / 255
        mask = np.asarray(Image.open(folder / "labels" / f"{row['id']}.png")) > 0
        pixels[row["id"]] = data.Pixels(image.transpose(2, 0, 1), mask.astype(np.int64))
    return Site(pixels)


def test_real_nuclei_of_six_sites() -> None:
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("FEDVFM_DATA", default)) / "nuclei"
    if not (folder / "index.csv").is_file():
        pytest.skip(f"no nuclei in {folder}; set FEDVFM_DATA to the folder that holds nuclei/")
    with (folder / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_site = {name: [row for row in rows if row["site"] == name] for name in SITES}
    fitted = classical.fit([nuclei(folder, name, found[:6]) for name, found in by_site.items()], 2)
    scores = {}
    for name, found in by_site.items():
        hospital = nuclei(folder, name, found[6:14])
        scores[name] = np.mean(
            [
                classical._dice(fitted.predict(pixels.image) == 1, pixels.mask == 1)
                for pixels in hospital.pixels.values()
                if pixels.mask is not None
            ]
        )
    assert np.mean(list(scores.values())) == pytest.approx(0.76, abs=0.05), scores
    assert scores["brightfield1024"] < 0.3 < 0.75 < scores["purple320"], scores
