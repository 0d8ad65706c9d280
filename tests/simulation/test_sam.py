"""A federation on a promptable backbone, from experiment to report: what is resolved, kept frozen, and delivered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedvfm
from fedvfm import errors
from fedvfm.config import schema
from fedvfm.simulation import experiment, plan, run


def values(tiny: Any, folder: Path | str, **recipe: Any) -> dict[str, Any]:
    """The tiny experiment on another backbone."""
    own = {**tiny.values["recipe"], "backbone": {"name": str(folder)}, "adapter": {"rank": 2}, "rounds": 1}
    own["data"] = {**own["data"], "input_size": [64, 64]}
    return {**tiny.values, "name": "tiny-sam", "baselines": ["head-only"], "recipe": {**own, **recipe}}


def test_a_federation_of_sam(tiny: Any, sam_folders: dict[str, Path], tmp_path: Path) -> None:
    result = run.simulate(values(tiny, sam_folders["sam"]), output=tmp_path / "run")
    assert set(result.summary["arms"]) == {"federated", "head-only"}
    assert result.summary["trainable_parameters"] == 4 * 4 * 2 * 32 + 2678
    about = json.loads((tmp_path / "run" / "adapter" / "fedvfm.json").read_text())
    assert about["recipe"]["task"]["head"] == "sam-masks"
    assert about["recipe"]["adapter"]["parts"] == ["upscale", "output_hypernetworks_mlps", "mask_tokens"]
    adapter = fedvfm.load_adapter(tmp_path / "run" / "adapter").read()
    for name in ("block.00.q.B", "block.03.v.B", "decoder.upscale_conv1.weight", "decoder.mask_tokens.weight"):
        assert np.abs(adapter[name]).max() > 0, name
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    # What travelled is what the plan said, and the report names the recipe that was trained.
    what = experiment.parse(values(tiny, sam_folders["sam"]), "experiment")
    planned = plan.plan(what, experiment.hospitals(what))["bytes"]
    assert all(planned[way] == pytest.approx(result.summary["bytes"][way], rel=0.015) for way in ("up", "down"))
    recipe = schema.parse(schema.Recipe, about["recipe"], "recipe")
    assert recipe.hash in (tmp_path / "run" / "report.html").read_text()
    assert f"recipe hash: `{recipe.hash}`" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_plan_of_the_real_shape_needs_no_weights(tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    what = experiment.parse(values(tiny, "sam-vit-base"), "experiment")
    found = plan.plan(what, experiment.hospitals(what))
    assert found["trainable_parameters"] == 147_456 // 2 + 634_208
    assert found["backbone"]["parameters"] == 93_735_728
    assert found["peak_mib"] > 93_735_728 * 4 / 2**20


def test_arms_that_could_train_nothing_are_refused_before_they_start(
    tiny: Any, sam_folders: dict[str, Path], tmp_path: Path
) -> None:
    lora_only = values(tiny, sam_folders["sam"], adapter={"rank": 2, "parts": []})
    with pytest.raises(errors.ConfigError, match="nothing would train"):
        run.simulate(lora_only, output=tmp_path / "run")
    what = experiment.parse(lora_only, "experiment")
    with pytest.raises(errors.ConfigError, match=r"arm 'head-only': recipe\.adapter: nothing would train"):
        plan.plan(what, experiment.hospitals(what))
