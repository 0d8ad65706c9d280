"""Picture and volume files: values, orientation, and every way a file can be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.data import formats

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def save(path: Path, values: np.ndarray, mode: str | None = None, **options: object) -> Path:
    picture = Image.fromarray(values)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_grey_8_bit(tmp_path: Path, ending: str) -> None:
    image = formats.read_image(save(tmp_path / f"a.{ending}", RAMP))
    assert image.shape == (1, 3, 4)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[0], (RAMP / 255.0).astype(np.float32))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_16_bit_keeps_its_depth(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 1, 2], [300, 40_000, 65_535]], dtype=np.uint16)
    image = formats.read_image(save(tmp_path / f"a.{ending}", values))
    np.testing.assert_allclose(image[0], values / 65535.0, rtol=1e-6)
    np.testing.assert_array_equal(formats.read_mask(tmp_path / f"a.{ending}"), values)


def test_colour_alpha_and_palette_become_rgb(tmp_path: Path) -> None:
    colours = np.zeros((4, 5, 3), dtype=np.uint8)
    colours[..., 0], colours[1, 2] = 255, (51, 102, 0)  # of the web palette, so that P keeps it
    expected = (colours.transpose(2, 0, 1) / 255.0).astype(np.float32)
    for mode in ("RGB", "RGBA", "P"):
        image = formats.read_image(save(tmp_path / f"{mode}.png", colours, mode))
        np.testing.assert_array_equal(image, expected, err_msg=mode)


def test_jpeg_is_turned_upright(tmp_path: Path) -> None:
    values = np.zeros((20, 40), dtype=np.uint8)
    values[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: show turned by 90 degrees clockwise
    path = save(tmp_path / "a.jpg", values, exif=exif)
    image = formats.read_image(path)
    assert image.shape == (1, 40, 20)
    assert formats.picture_size(path) == (40, 20)
    assert image[0, :15].min() > 0.9
    assert image[0, 25:].max() < 0.1


def test_phone_photograph_with_a_second_picture_inside(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((20, 30, 3), value, dtype=np.uint8)) for value in (200, 20))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert formats.read_image(tmp_path / "a.jpg").mean() == pytest.approx(200 / 255, abs=0.01)


def test_masks_as_grey_palette_bits_and_equal_rgb(tmp_path: Path) -> None:
    classes = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    palette = Image.fromarray(classes, mode=None)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    save(tmp_path / "grey.png", classes)
    save(tmp_path / "rgb.png", np.repeat(classes[..., None], 3, axis=2))
    for name in ("palette", "grey", "rgb"):
        mask = formats.read_mask(tmp_path / f"{name}.png")
        assert mask.dtype == np.int64
        np.testing.assert_array_equal(mask, classes, err_msg=name)
    save(tmp_path / "bits.png", (classes > 1) * np.uint8(255), "1")
    np.testing.assert_array_equal(formats.read_mask(tmp_path / "bits.png"), classes > 1)


def test_colour_mask_is_refused(tmp_path: Path) -> None:
    colours = np.zeros((3, 3, 3), dtype=np.uint8)
    colours[..., 1] = 200
    with pytest.raises(errors.DataError, match=r"a\.png: a mask in colour .*one grey channel"):
        formats.read_mask(save(tmp_path / "a.png", colours))


def test_float_pictures_need_a_known_scale(tmp_path: Path) -> None:
    good = save(tmp_path / "good.tif", np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32))
    np.testing.assert_allclose(formats.read_image(good)[0], [[0, 0.25], [0.5, 1]])
    with pytest.raises(errors.DataError, match="values from -3 to 900"):
        formats.read_image(save(tmp_path / "bad.tif", np.array([[-3.0, 900.0], [0, 0]], dtype=np.float32)))
    with pytest.raises(errors.DataError, match="values from nan"):
        formats.read_image(save(tmp_path / "nan.tif", np.array([[np.nan, 0.5], [0, 0]], dtype=np.float32)))
    with pytest.raises(errors.DataError, match="no whole numbers"):
        formats.read_mask(good)


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="no such file"):
        formats.read_image(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(errors.DataError, match=r"text\.png: unreadable picture \(unknown or damaged content\)"):
        formats.read_image(text)
    array = tmp_path / "array.npy"
    array.write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(errors.DataError, match="unreadable picture"):
        formats.read_image(array)
    (tmp_path / "empty.png").touch()
    with pytest.raises(errors.DataError, match="unreadable picture"):
        formats.picture_size(tmp_path / "empty.png")


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp"])
def test_size_comes_from_the_header_alone(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)
    whole = save(tmp_path / f"whole.{ending}", noise)
    assert formats.picture_size(whole) == (64, 48)
    if ending != "tif":  # a TIFF keeps its header at the end
        whole.write_bytes(whole.read_bytes()[:1000])
        assert formats.picture_size(whole) == (64, 48)


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp"])
def test_file_cut_short(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    whole = save(tmp_path / f"whole.{ending}", noise).read_bytes()
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.DataError, match=rf"cut\.{ending}"):
        formats.read_image(cut)


def test_one_pixel_and_many_pages(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="1 x 1 pixels, at least 2 x 2"):
        formats.read_image(save(tmp_path / "one.png", np.zeros((1, 1), dtype=np.uint8)))
    page = Image.fromarray(RAMP)
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page, page])
    with pytest.raises(errors.DataError, match="holds 3 pages"):
        formats.read_image(tmp_path / "stack.tif")


def test_endings() -> None:
    assert formats.ending(Path("a/B.NII.GZ")) == ".nii.gz"
    assert formats.stem(Path("a/case.1_0000.nii.gz")) == "case.1_0000"
    assert formats.ending(Path("a/b.npy")) == ""
