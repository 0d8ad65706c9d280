"""Pictures as they are meant and masks as they are stored: depth, WhiteIsZero, palettes, EXIF orientation."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import formats
from fedvfm.data.sources import folder

DRAWN = np.array([[0, 1, 1, 0, 0, 0, 0, 0]] * 4, np.uint8)
BLACK, RED, GREEN, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (255, 255, 255)


def png(path: Path, values: np.ndarray, depth: int) -> Path:
    """A grey PNG of 1, 2 or 4 bits."""
    rows = b""
    for row in values:
        bits = "".join(format(int(value), f"0{depth}b") for value in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def tiff(path: Path, values: np.ndarray, bits: int, white: bool) -> Path:
    """An uncompressed grey TIFF of 1, 4, 8 or 16 bits, by hand: Pillow turns values round when it writes, too."""
    height, width = values.shape
    if bits == 16:
        content = values.astype("<u2").tobytes()
    elif bits == 8:
        content = values.astype(np.uint8).tobytes()
    else:
        content = b""
        for row in values:
            text = "".join(format(int(value), f"0{bits}b") for value in row)
            text += "0" * (-len(text) % 8)
            content += bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 0 if white else 1,
        273: 8,
        277: 1,
        278: height,
        279: len(content),
    }
    made = struct.pack("<2sHI", b"II", 42, 8 + len(content)) + content + struct.pack("<H", len(tags))
    for tag, value in tags.items():
        made += struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made + struct.pack("<I", 0))
    return path


def palette(path: Path, indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Path:
    made = Image.fromarray(indices, mode="P")
    made.putpalette([part for colour in colours for part in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return path


def make(path: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(path), "options": options})
    )


@pytest.mark.files("structures", "2 and 4 bits of grey", "PNG 11.2.1, TIFF 6.0 (258)", "the stored numbers")
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_of_a_png_mask_are_numbers(tmp_path: Path, depth: int) -> None:
    values = (np.arange(32).reshape(4, 8) % 2**depth).astype(np.uint8)
    np.testing.assert_array_equal(formats.read_mask(png(tmp_path / "a.png", values, depth)), values)
    shown = formats.read_image(tmp_path / "a.png")[0]
    np.testing.assert_allclose(shown, values / (2**depth - 1), atol=1e-6)


@pytest.mark.files(
    "greys", "WhiteIsZero", "TIFF 6.0 (262)", "images are turned at every depth, masks are stored numbers"
)
@pytest.mark.parametrize("bits", [1, 4, 8, 16])
@pytest.mark.parametrize("white", [False, True])
def test_white_is_zero_at_every_depth(tmp_path: Path, bits: int, white: bool) -> None:
    full = 2**bits - 1
    values = (np.arange(32).reshape(4, 8) * max(1, full // 32)) % (full + 1)
    path = tiff(tmp_path / "a.tif", values, bits, white)
    np.testing.assert_array_equal(formats.read_mask(path), values)
    expected = (full - values if white else values) / full
    np.testing.assert_allclose(formats.read_image(path)[0], expected, atol=1e-6)


@pytest.mark.files("structures", "palettes of greys", "PNG 11.2.2", "by the grey, not its place")
def test_greys_of_a_palette_count_and_not_their_order(tmp_path: Path) -> None:
    one = palette(tmp_path / "a.png", DRAWN, [BLACK, WHITE])
    two = palette(tmp_path / "b.png", 1 - DRAWN, [WHITE, BLACK])
    three = palette(tmp_path / "c.bmp", 1 - DRAWN, [WHITE, BLACK])
    for path in (one, two, three):
        np.testing.assert_array_equal(formats.read_mask(path), DRAWN * 255)
    small = palette(tmp_path / "d.png", 1 - DRAWN, [(1, 1, 1), BLACK])
    np.testing.assert_array_equal(formats.read_mask(small), DRAWN)


def test_two_numbers_of_one_colour_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="palette") as caught:
        formats.read_mask(palette(tmp_path / "a.png", DRAWN, [BLACK, BLACK]))
    assert caught.value.code == "mask-colour"


@pytest.mark.files(
    "structures", "palettes of colours", "PNG 11.2.2", "by number; refused where they differ inside a folder"
)
@pytest.mark.parametrize(
    ("second", "right"),
    [
        ([BLACK, RED, GREEN], True),
        ([BLACK, RED], True),
        ([BLACK, RED, GREEN, WHITE], True),
        ([BLACK, GREEN, RED], False),
        ([BLACK, GREEN], False),
        ([RED, BLACK, GREEN], False),
    ],
)
def test_palettes_of_colours_have_to_agree(tmp_path: Path, second: list[tuple[int, int, int]], right: bool) -> None:
    for name, colours in (("a", [BLACK, RED, GREEN]), ("b", second)):
        Image.fromarray(np.full((4, 8), 9, np.uint8)).save(_in(tmp_path / "images" / f"{name}.png"))
        palette(tmp_path / "masks" / f"{name}.png", DRAWN, colours)
    options = {"class_names": ["background", "red", "green"]}
    if right:
        source = make(tmp_path, **options)
        assert all(source.read(one).mask.sum() == 8 for one in source.samples())
        return
    with pytest.raises(errors.DataError, match="palette") as caught:
        make(tmp_path, **options)
    assert caught.value.faults[0].code == "mask-colour"


def _in(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def turned(path: Path, shape: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros(shape, np.uint8)).save(_in(path), exif=exif)


@pytest.mark.files(
    "places",
    "EXIF orientation of image and mask",
    "EXIF 2.32, 4.6.4",
    "refused where they differ and sizes do not tell",
)
@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize(
    ("image", "mask", "shape", "right"),
    [
        (1, 1, (4, 8), True),
        (3, 3, (4, 8), True),
        (6, 6, (8, 8), True),
        (2, 1, (4, 8), False),
        (3, 1, (4, 8), False),
        (4, 1, (4, 8), False),
        (1, 3, (4, 8), False),
        (6, 1, (8, 8), False),
        (5, 7, (4, 8), False),
    ],
)
def test_image_and_mask_turned_differently(
    tmp_path: Path, ending: str, image: int, mask: int, shape: tuple[int, int], right: bool
) -> None:
    turned(tmp_path / "images" / f"a.{ending}", shape, image)
    turned(tmp_path / "masks" / "a.png", shape, mask)
    if right:
        assert len(make(tmp_path).samples()) == 1
        return
    with pytest.raises(errors.DataError, match=f"EXIF orientation {mask}") as caught:
        make(tmp_path)
    assert caught.value.faults[0].code == "mask-size"


def test_a_mask_drawn_on_the_upright_picture_fits(tmp_path: Path) -> None:
    turned(tmp_path / "images" / "a.jpg", (4, 8), 6)
    turned(tmp_path / "masks" / "a.png", (8, 4), 1)
    assert len(make(tmp_path).samples()) == 1


def test_a_tiff_on_its_side(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "packed.tif", exif=exif, compression="tiff_lzw")
    assert formats.picture_size(tmp_path / "packed.tif") == (6, 4)
    np.testing.assert_array_equal(formats.read_mask(tmp_path / "packed.tif"), np.rot90(values, -1))
    Image.fromarray(values).save(tmp_path / "plain.tif", exif=exif)
    with pytest.raises(errors.DataError, match="orientation 6") as caught:
        formats.read_mask(tmp_path / "plain.tif")
    assert caught.value.code == "turned"


@pytest.mark.files("harm", "pictures", "", "67 million pixels")
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT" + bytes(64))
    with pytest.raises(errors.DataError, match="67,108,864") as caught:
        formats.picture_size(tmp_path / "a.png")
    assert caught.value.code == "too-large"


@pytest.mark.files("structures", "masks that are transparent where they have numbers", "PNG 12.1", "refused")
def test_masks_that_are_transparent_where_they_have_numbers_are_refused(tmp_path: Path) -> None:
    """Exported from a paint program: white all over, and what is drawn is what is not transparent."""
    drawn = np.full((4, 8, 4), 255, np.uint8)
    drawn[..., 3] = DRAWN * 255
    Image.fromarray(drawn).save(tmp_path / "a.png")
    with pytest.raises(errors.DataError, match="transparent"):
        formats.read_mask(tmp_path / "a.png")
    Image.fromarray(drawn * DRAWN[..., None]).save(tmp_path / "b.png")
    np.testing.assert_array_equal(formats.read_mask(tmp_path / "b.png"), DRAWN * 255)


@pytest.mark.files("structures", "masks packed as JPEG", "", "refused")
@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_masks_packed_as_jpeg_are_refused(tmp_path: Path, name: str) -> None:
    Image.fromarray(DRAWN.repeat(8, 0).repeat(8, 1)).save(tmp_path / name, compression="jpeg")
    with pytest.raises(errors.DataError) as caught:
        formats.read_mask(tmp_path / name)
    assert caught.value.code == "mask-value"


@pytest.mark.files("greys", "TIFF of 12 bits", "TIFF 6.0 (258)", "0 to 4095 is 0 to 1")
def test_twelve_bits_are_scaled_by_twelve(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", np.array([[0, 4095], [2048, 1]]), 12, False)
    np.testing.assert_allclose(formats.read_image(path)[0], np.array([[0, 4095], [2048, 1]]) / 4095)


@pytest.mark.files("structures", "masks of 16 bits in several channels (RGB, alpha)", "PNG 11.2.1", "refused")
@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_masks_of_several_wide_channels_are_refused(tmp_path: Path, kind: int, channels: int) -> None:
    """Pillow gives the upper 8 bits: number 1 would be background, and 256 class 1."""
    values = np.zeros((4, 8, channels), ">u2")
    values[..., :3] = DRAWN[..., None]
    if channels != 3:
        values[..., -1] = 65535  # opaque
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 8, 4, 16, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(errors.DataError, match="16 bits in each of several channels"):
        formats.read_mask(tmp_path / "a.png")
    assert formats.read_image(tmp_path / "a.png").max() < 0.01


@pytest.mark.files(
    "greys",
    "transparent pixels of a picture (alpha 0, a PNG's transparent colour)",
    "PNG 12.1",
    "dark, as padding; refused where all are",
)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "I;16"])
def test_what_lies_under_transparent_pixels_is_no_picture(tmp_path: Path, mode: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    clear, values = DRAWN == 1, np.where(DRAWN == 1, 250, np.arange(8, dtype=np.uint8) * 10)
    Image.fromarray(DRAWN).save(tmp_path / "masks" / "a.png")
    path, options = tmp_path / "images" / "a.png", {} if mode in ("RGBA", "LA") else {"transparency": 250}
    if mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16))
    else:
        picture = Image.fromarray(values.astype(np.uint8)).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    picture.save(path, **options)
    source = folder.Folder(schema.SourceConfig(source="folder", path=str(tmp_path)))
    pixels = source.read(source.samples()[0])
    np.testing.assert_array_equal(pixels.padded, clear)
    assert not pixels.image[:, clear].any()
    np.testing.assert_allclose(pixels.image[0, ~clear], values[~clear] / (65535 if mode == "I;16" else 255), rtol=1e-6)
    Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(path)
    with pytest.raises(errors.DataError, match="transparent everywhere"):
        formats.read_image(path)


def test_grey_multiplied_by_its_alpha_is_read(tmp_path: Path) -> None:
    values = np.full((8, 8, 2), 100, np.uint8)
    values[..., 1], values[:2] = 255, 0
    Image.fromarray(values, mode="LA").save(tmp_path / "a.tif")
    content, kind = (tmp_path / "a.tif").read_bytes(), struct.Struct("<HHIH")
    assert content.count(kind.pack(338, 3, 1, 2)) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(kind.pack(338, 3, 1, 2), kind.pack(338, 3, 1, 1)))
    image, clear = formats.read_shown(tmp_path / "a.tif")
    np.testing.assert_allclose(image[0, 2:], 100 / 255)
    assert clear is not None
    assert clear.sum() == 16
