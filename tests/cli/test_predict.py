"""``fedvfm predict`` and ``fedvfm export`` on what a run left: what they print, write and refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedvfm.inference import export
from fedvfm.state import checkpoint
from fedvfm.storage import hash_chain


@pytest.fixture
def images(tiny: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("east-00", "north-01"):
        shutil.copy(tiny.data / "images" / f"{name}.png", folder)
    return folder


def test_masks_overlays_and_json(cli: Any, tiny: Any, finished: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks"
    answer = cli("predict", finished / "adapter", images, "-o", out, "--overlays", "--json")
    assert answer.code == 0, answer.err
    assert answer.err == ""
    made = json.loads(answer.out)
    assert made == json.loads((out / "summary.json").read_text())
    assert [row["id"] for row in made["inputs"]] == ["east-00", "north-01"]
    assert made["failed"] == {}
    assert made["adapter"]["fingerprint"] == tiny.summary(finished)["fingerprint"]
    for row in made["inputs"]:
        assert row["files"] == [f"{row['id']}.png", f"overlays/{row['id']}.png"]
        mask = np.asarray(Image.open(out / row["files"][0]))
        truth = np.asarray(Image.open(tiny.data / "masks" / row["files"][0]))
        assert mask.shape == truth.shape
        assert int((mask == 1).sum()) == row["classes"]["disc"]["voxels"]
        assert 2 * (mask * truth).sum() / (mask.sum() + truth.sum()) > 0.5, "a trained adapter finds the disc"


def test_channels_series_and_notes(cli: Any, tiny: Any, finished: Path, images: Path, tmp_path: Path) -> None:
    """The options reach prediction, and what reading left in doubt stands under the table."""
    adapted, out = finished / "adapter", tmp_path / "masks"
    tiny.one_error(cli("predict", adapted, images, "-o", out, "--series", "CT"), 2, "--series", "no DICOM")
    tiny.one_error(cli("predict", adapted, images, "-o", out, "--channels", "0,1"), 2, "--channels", "one file a case")
    values = np.random.default_rng(0).integers(0, 99, (32, 32, 2)).astype(np.int16)
    image = nibabel.Nifti1Image(values, None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    for number in range(5):
        nibabel.save(image, images / f"guess-{number}.nii")
    answer = cli("predict", adapted, images, "-o", out)
    assert answer.code == 0, answer.err
    assert "note: neither sform nor qform is set" in answer.out
    assert "(guess-0, guess-1, guess-2 and 2 more)" in answer.out
    assert answer.out.count("neither sform") == 1


def test_a_real_process_shows_a_line_an_input(tiny: Any, finished: Path, images: Path, tmp_path: Path) -> None:
    answer = tiny.run_anew("predict", finished / "adapter", images, "--output", tmp_path / "masks")
    assert answer.code == 0, answer.err
    assert "1/2 east-00" in answer.err
    assert "2/2 north-01" in answer.err
    assert "warn" not in answer.err.lower()
    assert "px" in answer.out
    assert str(tmp_path / "masks") in answer.out


def test_bad_inputs_are_listed_at_the_end(cli: Any, tiny: Any, finished: Path, images: Path, tmp_path: Path) -> None:
    (images / "broken.png").write_text("no picture")
    answer = cli("predict", finished / "adapter", images, "-o", tmp_path / "masks", "--json")
    tiny.one_error(answer, 3, "1 of 3 inputs could not be used", "broken: ", "unreadable picture")
    made = json.loads(answer.out)
    assert [row["id"] for row in made["inputs"]] == ["east-00", "north-01"]
    assert list(made["failed"]) == ["broken"]


def test_what_predict_refuses(cli: Any, tiny: Any, finished: Path, copy: Path, images: Path, tmp_path: Path) -> None:
    adapted, out = finished / "adapter", tmp_path / "masks"
    tiny.one_error(cli("predict", adapted, images, "-o", images), 6, "OutputInUse", "not empty")
    tiny.one_error(cli("predict", adapted, tmp_path / "none", "-o", out), 3, "no such file or folder")
    tiny.one_error(cli("predict", tmp_path, images, "-o", out), 5, "no adapter of this fedvfm")
    tiny.one_error(cli("predict", adapted, images, "-o", out, "--as", "jpeg"), 2, "auto, png, nifti, dicom-seg")
    tiny.one_error(cli("predict", adapted, images, "-o", out, "--device", "cuda:99"), 2, "--device")
    about = json.loads((copy / "adapter" / "fedvfm.json").read_text())
    about["backbone_sha256"] = "0" * 64
    (copy / "adapter" / "fedvfm.json").write_text(json.dumps(about))
    tiny.one_error(cli("predict", copy / "adapter", images, "-o", out), 4, "sha256")
    about["recipe"]["backbone"]["name"] = "dinov2-small-imgfocus"
    (copy / "adapter" / "fedvfm.json").write_text(json.dumps(about))
    tiny.one_error(cli("predict", copy / "adapter", images, "-o", out), 5, "the recipe in fedvfm.json is not the one")
    adapter, _, marks = checkpoint.read(copy / "adapter" / export.STATE)
    marks["recipe"] = hashlib.sha256(hash_chain.canonical(about["recipe"]).encode()).hexdigest()
    checkpoint.write(copy / "adapter" / export.STATE, adapter, marks)
    tiny.one_error(cli("predict", copy / "adapter", images, "-o", out), 4, "fedvfm weights fetch dinov2-small-imgfocus")
    assert not out.exists()


@pytest.mark.parametrize(
    ("form", "file"), [("hf", "config.json"), ("monai", "configs/inference.json"), ("peft", "adapter_config.json")]
)
def test_export(cli: Any, finished: Path, tmp_path: Path, form: str, file: str) -> None:
    out = tmp_path / form
    answer = cli("export", finished / "adapter", "-o", out, "--format", form, "--json")
    assert answer.code == 0, answer.err
    assert answer.err == ""
    made = json.loads(answer.out)
    assert made["format"] == form
    assert made["files"][file] == (out / file).stat().st_size
    again = cli("export", finished / "adapter", "-o", tmp_path / "again", "--format", form)
    assert again.out.startswith(f"{tmp_path / 'again'}: {form}, {len(made['files'])} files")


def test_what_export_refuses(cli: Any, tiny: Any, finished: Path, images: Path, tmp_path: Path) -> None:
    adapter = finished / "adapter"
    tiny.one_error(cli("export", adapter, "-o", tmp_path / "x", "--format", "monay"), 2, "nearest: 'monai'")
    tiny.one_error(cli("export", adapter, "-o", images), 6, "not empty")
    tiny.one_error(cli("export", images, "-o", tmp_path / "x"), 5, "no adapter of this fedvfm")
    assert not (tmp_path / "x").exists()
