"""Whole slides: which files are read, at which scale, which tiles, and what is refused in words."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import slides as config
from fedvfm.data import bags
from fedvfm.data import sample as data
from fedvfm.data.decoding import decoder
from fedvfm.data.slides import slide_file, tissue
from fedvfm.data.sources import table as sources
from tests.support import slides as drawn

tifffile = pytest.importorskip("tifffile", reason="whole slides need the extra slides")
WANTED = config.SlidesConfig(tile=128)


@pytest.fixture(autouse=True)
def _here() -> Any:
    with decoder.trusted():
        yield


def _choose(path: Path, **wanted: Any) -> tissue.Chosen:
    return tissue.choose(slide_file.read_header(path), WANTED.model_copy(update=wanted))


def test_tiles_are_the_slides_own_pixels_at_every_level(tmp_path: Path) -> None:
    made = drawn.write(tmp_path / "a.tif")
    slide = slide_file.read_header(tmp_path / "a.tif")
    assert slide.levels == ((2048, 2048), (1024, 1024), (512, 512))
    assert slide.mpp == pytest.approx(0.5)
    for mpp, step in ((0.5, 1), (1.0, 2), (2.0, 4)):
        wanted = WANTED.model_copy(update={"mpp": mpp})
        chosen = tissue.choose(slide, wanted)
        for tile in chosen.tiles:
            own = made[tile.top : tile.top + 128 * step : step, tile.left : tile.left + 128 * step : step]
            assert np.array_equal(tissue.read(slide, tile, wanted), own)
    # Tissue of 768 x 1280 pixels, whose edges the median filter rounds: 6 x 10 tiles of 128.
    assert len(_choose(tmp_path / "a.tif").tiles) == 60


def test_between_levels_a_finer_one_is_averaged(tmp_path: Path) -> None:
    made = drawn.write(tmp_path / "a.tif")
    wanted = WANTED.model_copy(update={"mpp": 0.75})
    slide = slide_file.read_header(tmp_path / "a.tif")
    tile = tissue.choose(slide, wanted).tiles[9]
    shown = tissue.read(slide, tile, wanted)
    own = made[tile.top : tile.top + 192, tile.left : tile.left + 192]
    assert shown.shape == (128, 128, 3)
    assert np.abs(shown.mean(axis=(0, 1)) - own.mean(axis=(0, 1))).max() < 1
    assert np.asarray(Image.fromarray(own).resize((128, 128), Image.Resampling.BILINEAR)).tolist() == shown.tolist()


@pytest.mark.parametrize("compression", ["jpeg", "lzw", "none", "jpeg2000"])
def test_packings_that_scanners_write(tmp_path: Path, compression: str) -> None:
    made = drawn.write(tmp_path / "a.tif", compression=compression)
    slide = slide_file.read_header(tmp_path / "a.tif")
    found = slide_file.read_region(slide.path, 0, 700, 600, 300, 200)
    own = made[600:800, 700:1000]
    assert np.abs(found.mean(axis=(0, 1)) - own.mean(axis=(0, 1))).max() < 2
    assert (compression == "jpeg") or np.array_equal(found, own)


def test_colours_of_aperios_jpeg_2000_are_those_of_its_compression(tmp_path: Path) -> None:
    """33003 holds YCbCr, whatever the header's photometric interpretation says."""
    imagecodecs = pytest.importorskip("imagecodecs")
    made = drawn.pixels(side=512)
    stored = np.asarray(Image.fromarray(made).convert("YCbCr"))
    corners = [(row, column) for row in (0, 256) for column in (0, 256)]
    tiles = [
        imagecodecs.jpeg2k_encode(stored[row : row + 256, column : column + 256].copy(), codecformat="j2k", mct=False)
        for row, column in corners
    ]
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        file.write(iter(tiles), shape=made.shape, dtype="uint8", tile=(256, 256), compression=33003, photometric="rgb")
    found = slide_file.read_region(tmp_path / "a.svs", 0, 0, 0, 512, 512)
    assert np.abs(found.astype(int) - made).max() <= 4


def test_scale_of_aperio_is_what_its_description_says(tmp_path: Path) -> None:
    text = "Aperio Image Library v12.0.15\r\n2048x2048 (256x256) JPEG/RGB Q=70|AppMag = 40|MPP = 0.2527|Left = 1.5"
    drawn.write(tmp_path / "a.svs", mpp=None, description=text, metadata=None)
    assert slide_file.read_header(tmp_path / "a.svs").mpp == pytest.approx(0.2527)


def test_most_tiles_are_spread_over_the_tissue(tmp_path: Path) -> None:
    drawn.write(tmp_path / "a.tif")
    whole, some = _choose(tmp_path / "a.tif"), _choose(tmp_path / "a.tif", most=7)
    assert some.on_tissue == len(whole.tiles) == 60
    assert some.tiles == tuple(whole.tiles[at * 60 // 7] for at in range(7))


def test_tiles_that_a_writer_left_out_are_glass(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    drawn.write(path)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["TileByteCounts"]
        place, order = tag.valueoffset, file.byteorder
    with path.open("r+b") as raw:
        raw.seek(place + 4 * (2 * 8 + 4))  # row 2, column 4
        raw.write(struct.pack(f"{order}I", 0))
    assert (slide_file.read_region(path, 0, 1024, 512, 256, 256) == slide_file.WHITE).all()


def test_one_level_of_a_large_slide_is_looked_at_in_steps(tmp_path: Path) -> None:
    made = drawn.write(tmp_path / "a.tif", levels=1)
    small = slide_file.read_small(tmp_path / "a.tif", 0, 3)
    assert np.array_equal(small, made[::3, ::3])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"mpp": None}, "slide-scale"),
        ({"mpp": 352.8}, "slide-scale"),
        ({"made": np.full((1024, 1024, 3), 240, np.uint8)}, "no-tissue"),
        ({"made": np.random.default_rng(0).integers(0, 4, (1024, 1024, 3)).astype(np.uint8)}, "no-tissue"),
        ({"made": np.random.default_rng(0).integers(236, 244, (1024, 1024, 3)).astype(np.uint8)}, "no-tissue"),
        ({"compression": "zstd"}, "compressed"),
    ],
)
def test_slides_that_cannot_be_used_are_refused_by_code(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    (tmp_path / "slides").mkdir()
    drawn.write(tmp_path / "slides" / "b.tif")
    drawn.write(tmp_path / "slides" / "a.tif", **change)
    (tmp_path / "labels.csv").write_text("id,label\na,plain\nb,spot\n")
    with pytest.raises(errors.DataError) as told:
        _source(tmp_path)
    assert [fault.code for fault in told.value.faults] == [code]
    assert "slides/a.tif" in str(told.value)
    if code == "slide-scale":
        assert len(_source(tmp_path, mpp=0.5).samples()) > 1


@pytest.mark.parametrize("bytes_kept", [10, 5000, 100_000])
def test_damaged_slides_are_refused(tmp_path: Path, bytes_kept: int) -> None:
    drawn.write(tmp_path / "a.tif")
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[:bytes_kept])
    with pytest.raises(errors.DataError) as told:
        _choose(tmp_path / "a.tif")
    assert told.value.code == "unreadable"


def test_a_picture_in_strips_is_no_slide(tmp_path: Path) -> None:
    Image.fromarray(drawn.pixels(side=256)).save(tmp_path / "a.tif")
    with pytest.raises(errors.DataError, match="tiled, pyramidal TIFF"):
        slide_file.read_header(tmp_path / "a.tif")


def test_what_was_not_scanned_is_not_shown(tmp_path: Path) -> None:
    drawn.write(tmp_path / "a.tif")
    with pytest.raises(errors.DataError, match=r"scanned with 0\.5") as told:
        _choose(tmp_path / "a.tif", mpp=0.25)
    assert told.value.code == "slide-scale"


def test_otsu_parts_two_heaps() -> None:
    histogram = np.zeros(256, dtype=np.int64)
    histogram[[10, 12, 90, 95]] = 50, 40, 20, 30
    assert 12 <= tissue.otsu(histogram) < 90


def _source(path: Path, **options: Any) -> data.Source:
    return sources.make(schema.SourceConfig(source="folder", path=str(path), options=options))


def _recipe(**slides: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": "dinov2-small"},
        "task": {"kind": "case-classification"},
        "data": {"class_names": ["plain", "spot"], **({"slides": slides} if slides else {})},
    }
    return schema.parse(schema.Recipe, values, "recipe")


def test_a_slide_is_a_case_of_its_tiles(tmp_path: Path) -> None:
    recipe = _recipe(tile=64, mpp=1.0)
    path = drawn.folder(tmp_path, ("east",))
    source = bags.of(sources.make(schema.SourceConfig(source="folder", path=str(path)), recipe.data), recipe)
    first = source.samples()[0]
    assert (first.label, first.patient, first.split) == (0, "patient-0001", "train")
    assert len(source.samples()) == 8
    assert len(first.images) > 8
    shown = source.read(first.images[0])
    assert shown.image.shape == (3, 64, 64)
    assert shown.spacing == pytest.approx((0.001, 0.001))
    assert {source.stable(image)[0] for image in first.images} == {"east-0 slide"}, "one record, however it is cut"


def test_slides_and_recipes_of_slides_belong_together(tmp_path: Path) -> None:
    path = drawn.folder(tmp_path / "slides-here", ("east",))
    where = schema.SourceConfig(source="folder", path=str(path))
    with pytest.raises(errors.DataError, match=r"\[data.slides\]"):
        sources.make(where, _recipe().data)
    pictures = tmp_path / "pictures" / "images"
    pictures.mkdir(parents=True)
    Image.fromarray(drawn.pixels(side=256)).save(pictures / "a.png")
    (tmp_path / "pictures" / "labels.csv").write_text("id,label\na,plain\n")
    only = schema.SourceConfig(
        source="folder", path=str(tmp_path / "pictures"), options={"class_names": ["plain", "spot"]}
    )
    with pytest.raises(errors.DataError, match="no whole slide"):
        sources.make(only, _recipe(tile=64).data)


def test_a_table_and_slides_that_do_not_fit_are_told_together(tmp_path: Path) -> None:
    path = drawn.folder(tmp_path, ("east",))
    (path / "slides" / "stray.tif").write_bytes(b"II*\0")
    (path / "slides" / "notes.docx").write_bytes(b"PK")
    (path / "slides" / "east-7.tif").unlink()
    with pytest.raises(errors.DataError) as told:
        _source(path)
    assert {"ending", "table"} <= {fault.code for fault in told.value.faults}
    for words in ("stray", "notes.docx", "'east-7' has no image"):
        assert words in str(told.value)
