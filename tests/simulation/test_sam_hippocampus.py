"""The script that measures sam-hippocampus, on drawn volumes and a SAM of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fedvfm.data.sources import hippocampus
from tests.simulation import test_sam_shaped

CASES = 70


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As many cases as six hospitals need, of 8 x 9 x 3 voxels with both classes in each slice."""
    rng = np.random.default_rng(0)
    for number in range(CASES):
        labels = np.zeros((8, 9, 3), dtype=np.uint8)
        labels[2:6, 1:5], labels[2:6, 5:8] = 1, 2
        image = (100 * labels + rng.integers(0, 40, labels.shape)).astype(np.int16)
        for part, values in (("images", image), ("labels", labels)):
            folder = tmp_path / "data" / "hippocampus" / part
            folder.mkdir(parents=True, exist_ok=True)
            nibabel.Nifti1Image(values, np.eye(4)).to_filename(folder / f"hippocampus_{number:03d}.nii.gz")
    monkeypatch.setenv("FEDVFM_DATA", str(tmp_path / "data"))
    return tmp_path


def test_what_is_no_sam_or_is_told_reaches_no_target() -> None:
    test_sam_shaped.script("block")
    bench: Any = test_sam_shaped.script("sam_hippocampus")
    score = {"macro": 0.9, "low": None, "high": None, "by_seed": {"0": 0.9}}
    row = {"arms": {"federated": score}, "difference": None, "seeds": [0]}
    run = {
        "trainable_parameters": 10,
        "bytes": {"up": 1, "down": 1},
        "backbone": {"parameters": 100},
        "arms": {"federated": {"worst": {"site": "west", "value": 0.8}}},
        "rounds": 1,
    }
    half = {"seed": "0", "curve": [], "federated": {"west": 0.9}, "local-only": {}, "pooled": {}}
    half["curve"] = [{"round": 1, "loss": 0.1, "dice": 0.9}]
    figures = {"arms": {"unet3d": row, "oracle": row}, "runs": {"unet3d": run, "oracle": run}}
    figures |= {"curves": {}, "unfinished": {"unet3d": half, "oracle": half}}
    assert "Target" not in "\n".join(bench.lines(figures))
    figures["arms"] |= {"unet": {**row, "arms": {"federated": {**score, "macro": 0.5}}}}
    figures["runs"] |= {"unet": run}
    assert "Target 0.865 without an oracle: 0.500 (not reached)." in "\n".join(bench.lines(figures))


@pytest.mark.slow
def test_arms_run_once_and_end_in_a_table(
    volumes: Path, sam_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    test_sam_shaped.script("block")
    bench: Any = test_sam_shaped.script("sam_hippocampus")
    sets = [f'recipe.backbone.name="{sam_folders["tinyvit"]}"', "recipe.adapter.layers=[3]", "workers=1"]
    sets += ["recipe.data.input_size=[64,64]", "recipe.evaluation.every=1", "recipe.evaluation.surface=false"]
    sets += bench.TINY
    folder = volumes / "runs"
    bench.run(["prompt-free", "oracle"], [0], folder, sets, baselines=False)
    bench.run(["prompt-free"], [1], folder, sets, baselines=False)
    monkeypatch.setattr(bench, "simulate", lambda *_: pytest.fail("a finished run is not run again"))
    bench.run(["prompt-free", "oracle"], [0], folder, sets, baselines=False)
    monkeypatch.setattr(bench, "RESULTS", volumes / "none.json")
    costs = bench.jitter(folder / "oracle" / "seed-0")
    assert [list(row) for row in costs.values()] == [["0", "0.1", "0.2", "0.3"]] * 2
    assert all(0 <= value <= 1 for row in costs.values() for value in row.values())
    figures = {**bench.collect(folder), "jitter": costs}
    assert figures["unfinished"] == {}
    both = figures["arms"]["prompt-free"]
    scores = both["arms"]["federated"]["by_seed"]
    assert (both["seeds"], list(scores)) == ([0, 1], ["0", "1"]), "of one arm, though a seed deals the cases too"
    assert both["arms"]["federated"]["macro"] == pytest.approx(sum(scores.values()) / 2)
    assert figures["arms"]["oracle"]["seeds"] == [0]
    row = bench.unfinished(folder / "oracle" / "seed-0")
    assert (row["local-only"], row["pooled"]) == ({}, {}), "no baselines"
    assert row["federated"].keys() == hippocampus.SHARES.keys()
    assert "| macro |" in "\n".join(bench._unfinished("oracle", row))
    assert figures["runs"]["oracle"]["prompt"] == "oracle prompt"
    assert set(figures["runs"]["prompt-free"]["arms"]["federated"]["sites"]) == set(hippocampus.SHARES)
    text = "\n".join(bench.lines(figures))
    for words in ("boxes from the truth (oracle)", "Target 0.865 without an oracle", "| LiteMedSAM as it is |"):
        assert words in text
